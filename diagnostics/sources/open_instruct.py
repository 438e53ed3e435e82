"""open-instruct: the metrics of its GRPO, supervised and preference trainers."""

from outspoken.diagnostics.sources.names import Family

OPEN_INSTRUCT = Family("open_instruct", title="open-instruct", signs=("objective/verifiable_correct_rate",))
