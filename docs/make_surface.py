"""Writes docs/public_surface.json: every public name, its arguments, and the fields of the configs with their defaults.

A test compares the file with the code, so that nothing a user leans on changes unnoticed. `make surface` rewrites it;
docs/stability.md says which changes are allowed when.
"""

import dataclasses
import enum
import inspect
import json
import sys
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

import outspoken
from outspoken.trainers.config import live_fields

FILE = Path(__file__).parent / "public_surface.json"


def surface() -> dict[str, Any]:
    """Public name -> what a user can rely on about it."""
    return {name: describe(getattr(outspoken, name)) for name in outspoken.__all__ if name != "__version__"}


def describe(thing: Any) -> dict[str, Any]:
    """A function's arguments; a class' constructor, its own public methods, and a config's fields."""
    if not inspect.isclass(thing):
        return {"function": arguments(thing)} if callable(thing) else {"value": value(thing)}
    described: dict[str, Any] = {}
    if dataclasses.is_dataclass(thing):
        live = live_fields(thing)
        described["fields"] = {
            f.name: default(f) + (" (live)" if f.name in live else "")
            for f in dataclasses.fields(thing)
            if f.init and not f.name.startswith("_") and is_ours(thing, f.name)
        }
    else:
        described["constructor"] = arguments(thing.__init__)
    methods = {
        name: arguments(member)
        for name, member in sorted(vars(thing).items())
        if not name.startswith("_") and inspect.isfunction(member)
    }
    properties = sorted(
        name for name, member in vars(thing).items() if not name.startswith("_") and isinstance(member, property)
    )
    return {
        **described,
        **({"methods": methods} if methods else {}),
        **({"properties": properties} if properties else {}),
    }


def is_ours(config: type, name: str) -> bool:
    """Whether a config's field is declared by this library; those of `TrainingArguments` are transformers' promise."""
    declared = [cls for cls in config.__mro__ if name in vars(cls).get("__annotations__", {})]
    return bool(declared) and not issubclass(TrainingArguments, declared[0])


def arguments(function: Any) -> list[str]:
    """Its parameters as written, without types: `["name", "name=default", "*", "**kwargs"]`."""
    written = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name == "self":
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not any(w == "*" or w.startswith("*") for w in written):
            written.append("*")
        star = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        tail = "" if parameter.default is parameter.empty else f"={value(parameter.default)}"
        written.append(f"{star}{parameter.name}{tail}")
    return written


def default(field: dataclasses.Field) -> str:
    if field.default is not dataclasses.MISSING:
        return value(field.default)
    if field.default_factory is not dataclasses.MISSING:
        return value(field.default_factory())
    return "required"


def value(thing: Any) -> str:
    if isinstance(thing, enum.Enum):
        return repr(thing.value)
    if callable(thing):
        return getattr(thing, "__qualname__", type(thing).__qualname__)
    return repr(thing)


def as_text() -> str:
    return json.dumps(surface(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    FILE.write_text(as_text(), encoding="utf-8")
    sys.stdout.write(f"wrote {FILE}\n")
