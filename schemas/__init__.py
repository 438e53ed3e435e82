"""The JSON Schemas (draft 2020-12) of everything that is written to disk or sent to an agent.

One file per record, beside this one; `common.json` holds what several records share. Records are dicts as JSON gives
them: lists, not tuples; finite numbers only.
"""

import json
import math
import reprlib
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import resources
from itertools import islice
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jsonschema.exceptions import ValidationError
    from jsonschema.protocols import Validator

VERSION = 1
NAMES = ("observation", "diagnostic", "suggestion", "request", "change", "run", "verdict", "report")

_ERRORS_WEIGHED = 50  # a huge wrong record has a million errors; the first few tell enough


class InvalidRecord(ValueError):
    """A record that its schema refuses; the message names record, path, value and problem in one sentence."""


def names() -> tuple[str, ...]:
    """The records that have a schema."""
    return NAMES


@cache
def _load(name: str) -> dict[str, Any]:
    text = (resources.files(__name__) / f"{name}.json").read_text(encoding="utf-8")
    loaded: dict[str, Any] = json.loads(text)
    return loaded


def schema(name: str) -> dict[str, Any]:
    """The JSON Schema of a record (or `common`), as a dict of your own.

    Raises:
        KeyError: there is no such record.
    """
    if name not in (*NAMES, "common"):
        raise KeyError(f"no record is called {name!r}; there are {', '.join(NAMES)}")
    copied: dict[str, Any] = json.loads(json.dumps(_load(name)))
    return copied


def schema_id(name: str) -> str:
    """What stands in the field `schema` of a record: `outspoken.run/1`."""
    return f"outspoken.{name}/{VERSION}"


def not_readable(record: Any, name: str) -> str | None:
    """Why `record` is no record `name` that this version can read, or None. A look at its stamp only: fast."""
    if not isinstance(record, Mapping):
        return f"is {_cut(record)}, not a JSON object"
    stamp = record.get("schema")
    if stamp == schema_id(name):
        return None
    kind, _, version = str(stamp).partition("/")
    if kind == f"outspoken.{name}" and version.isdigit() and int(version) > VERSION:
        return f"has schema {stamp}, which is newer than {schema_id(name)}: update outspoken to read it"
    return f"has schema {_cut(stamp)}, not {schema_id(name)!r}"


def validate(record: Any, name: str | None = None) -> None:
    """Check a record against the schema that its `schema` field names, or against that of `name`.

    Raises:
        InvalidRecord: the record is not as its schema says, or no schema is known for it.
    """
    if name is None:
        stamp = record.get("schema") if isinstance(record, Mapping) else None
        name = str(stamp).removeprefix("outspoken.").partition("/")[0]
        if name not in NAMES:
            if not isinstance(record, Mapping):
                raise InvalidRecord(f"a record must be a JSON object, not {_cut(record)}")
            known = ", ".join(schema_id(n) for n in NAMES)
            raise InvalidRecord(f"the record has schema {_cut(stamp)}, which is none of {known}")
    if "schema" in _load(name)["properties"] and (problem := not_readable(record, name)):
        raise InvalidRecord(f"{name} record: it {problem}")
    from jsonschema.exceptions import best_match

    try:
        error = best_match(islice(_validator(name).iter_errors(record), _ERRORS_WEIGHED))
    except RecursionError:
        raise InvalidRecord(f"{name} record: it is nested too deeply") from None
    if error is not None:
        raise InvalidRecord(_sentence(name, error))


@cache
def _validator(name: str) -> "Validator":
    # Imported here: jsonschema takes 0.1 s to load, and most readers validate nothing.
    from jsonschema import Draft202012Validator
    from jsonschema.validators import extend
    from referencing import Registry
    from referencing.jsonschema import DRAFT202012

    loaded = [_load(n) for n in (*NAMES, "common")]
    registry: Registry[Any] = Registry().with_resources((s["$id"], DRAFT202012.create_resource(s)) for s in loaded)
    finite = Draft202012Validator.TYPE_CHECKER.redefine("number", lambda _, value: _is_finite(value))
    strict: Any = extend(Draft202012Validator, type_checker=finite)  # type: ignore[no-untyped-call]
    validator: Validator = strict(_load(name), registry=registry)
    return validator


def _is_finite(value: Any) -> bool:
    """JSON has no nan and no infinity, but Python's json reads and writes them."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False


def _sentence(name: str, error: "ValidationError") -> str:
    or_null = ""
    rule: Any = error.validator_value
    while error.validator == "anyOf":  # the first alternative is what is meant; the others are null or a simpler form
        or_null = " or be null" if {"type": "null"} in rule else or_null
        error = next(e for e in error.context or () if e.schema_path[0] == 0)
        rule = error.validator_value
    path = "/".join(str(part)[:100] for part in error.absolute_path)
    where = f"{name} record: {path or 'it'}"
    if error.validator == "required":
        instance: Any = error.instance
        missing = [key for key in rule if key not in instance]
        return f"{where} lacks {', '.join(repr(key) for key in missing)}"
    return f"{where} is {_cut(error.instance)} but {_demand(str(error.validator), rule)}{or_null}"


def _demand(keyword: str, rule: Any) -> str:
    def listed(values: Any) -> Iterator[str]:
        return (json.dumps(v) for v in ([values] if isinstance(values, str) else values))

    if keyword == "type":
        types = " or ".join(v.strip('"') for v in listed(rule))
        return f"must be of type {types}" + (" (finite)" if "number" in types else "")
    if keyword == "enum":
        return f"must be one of {', '.join(listed(rule))}"
    bounds = {
        "const": "must be",
        "pattern": "must match",
        "minimum": "must be at least",
        "maximum": "must be at most",
        "maxLength": "may have no more characters than",
        "minLength": "must have at least this many characters:",
        "maxItems": "may have no more items than",
        "minItems": "must have at least this many items:",
    }
    return f"{bounds.get(keyword, f'breaks {keyword}')} {_cut(rule)}"


def _cut(value: Any) -> str:
    """The value's repr, short whatever the value is."""
    shorten = reprlib.Repr()
    shorten.maxstring = shorten.maxother = shorten.maxlong = 80
    return shorten.repr(value)
