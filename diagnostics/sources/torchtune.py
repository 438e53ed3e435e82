"""torchtune: `log_<seconds>.txt` or `.jsonl` of its DiskLogger, or the trackers that its recipes write to."""

from outspoken.diagnostics.sources.names import Family

TORCHTUNE = Family("torchtune", title="torchtune", signs=("tokens_per_second_per_gpu",))
