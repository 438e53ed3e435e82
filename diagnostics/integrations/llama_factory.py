"""LLaMA-Factory: its trainers are transformers', so the callback attaches to them as it is.

    python -m outspoken.diagnostics.integrations.llama_factory train.yaml

trains as `llamafactory-cli train train.yaml` does, with the callback; several processes are started by `torchrun -m`.
In a script of one's own it is `run_exp(args, callbacks=[outspoken.DiagnosticsCallback()])`.

Written for LLaMA-Factory 0.9.5, whose `run_exp(args=None, callbacks=None)` reads the command line without `args`.
"""

from typing import Any

import outspoken


def run(args: dict[str, Any] | None = None, **settings: Any) -> None:
    """Train with LLaMA-Factory, watched.

    Args:
        args: its arguments; by default those of the command line. settings: for `DiagnosticsCallback`.
    """
    from llamafactory.train.tuner import run_exp

    run_exp(args, callbacks=[outspoken.DiagnosticsCallback(**settings)])


if __name__ == "__main__":
    run()
