# placeholder
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from outspoken.diagnostics.sources.names import Family


@dataclass
class Beside:
    settings: dict[str, Any] = field(default_factory=dict)
    complete: bool = False
    method: str | None = None
    sources: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def find(path: Path, family: Family) -> Beside:
    notes = []
    if (path.parent / "training_args.bin").is_file():
        notes.append(
            "training_args.bin lies beside the log; it is a pickle and is never opened. Give settings by --config."
        )
    return Beside(notes=notes)
