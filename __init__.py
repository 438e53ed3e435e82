"""Outspoken: post-training whose trainers say what is wrong with a run, why, and which setting to change.

The public names are loaded on first use, so ``import outspoken`` loads neither torch nor transformers.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Public name -> the module that defines it.
_PUBLIC = {
    "BEMACallback": "outspoken.trainers.callbacks",
    "DiagnosticsCallback": "outspoken.diagnostics.callback",
    "GRPOConfig": "outspoken.trainers.grpo",
    "GRPOTrainer": "outspoken.trainers.grpo",
    "LogCompletionsCallback": "outspoken.trainers.callbacks",
    "RichProgressCallback": "outspoken.trainers.callbacks",
    "Run": "outspoken.agent_api",
    "SFTConfig": "outspoken.trainers.sft",
    "SFTTrainer": "outspoken.trainers.sft",
    "SyncRefModelCallback": "outspoken.trainers.callbacks",
    "WeaveCallback": "outspoken.trainers.callbacks",
}

__all__ = [*sorted(_PUBLIC), "__version__"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'outspoken' has no attribute {name!r}; its public names are {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted(__all__)
