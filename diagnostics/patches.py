"""Whether a patch may be applied to a running trainer's config, and what it changes.

Both sides ask: an agent before it sends a request, the trainer before it applies one.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from outspoken.diagnostics.records import MAX_TEXT

SAME_NUMBER = 1e-9  # relative difference within which two numbers count as equal


class PatchRefused(ValueError):
    """A patch that must not be applied; the message names the field, the value and what would be right.

    `field` is the config field at fault, if it is one field's fault.
    """

    def __init__(self, message: str, field: str | None = None):
        super().__init__(message)
        self.field = field


def check_patch(
    patch: Sequence[Mapping[str, Any]],
    config: Mapping[str, Any],
    live_fields: Mapping[str, Mapping[str, Any]],
) -> dict[str, tuple[Any, Any]]:
    """Field -> (old, new) of an RFC 6902 patch on the top level of `config`, if all of it may take effect in flight.

    Args:
        patch: operations `test`, `replace` and `add`, in order. `test` takes numbers that differ by less than 1e-9
            of their size as equal (1 and 1.0 too, but not true and 1).
        config: the run's settings.
        live_fields: field -> `{"minimum", "maximum", "choices"}` (bounds inclusive, None: unbounded), and perhaps
            `"type"` where the old value does not tell the field's type.

    Raises:
        PatchRefused: with the reason. Nothing of a refused patch may be applied.
    """
    import jsonpatch
    from jsonpointer import JsonPointer, JsonPointerException

    try:
        operations = list(jsonpatch.JsonPatch(patch))
    except (jsonpatch.JsonPatchException, JsonPointerException, TypeError, AttributeError) as error:
        raise PatchRefused(f"it is no RFC 6902 patch: {error}"[:MAX_TEXT]) from None
    changes: dict[str, tuple[Any, Any]] = {}
    for operation in operations:
        op, path = operation["op"], operation["path"]
        if op not in ("test", "replace", "add"):
            raise PatchRefused(f"operation {op!r} on {path} is not allowed; use test, replace or add")
        parts = JsonPointer(path).parts
        if len(parts) != 1:
            raise PatchRefused(f"path {_show(path)} must name one top-level config field, like /learning_rate")
        name = parts[0]
        if "value" not in operation:
            raise PatchRefused(f"operation {op!r} on {name} has no value", name)
        if name not in config:
            raise PatchRefused(f"{_show(name)} is no field of this run's config", name)
        value = operation["value"]
        if op == "test":
            now = changes[name][1] if name in changes else config[name]
            if not same_value(now, value):
                raise PatchRefused(f"{name} is {_show(now)} now, not {_show(value)} as the patch expects", name)
            continue
        if name in changes:
            raise PatchRefused(f"{name} is set twice", name)
        if name not in live_fields:
            raise PatchRefused(f"{name} cannot be changed while the run trains", name)
        new = _fitting(name, config[name], value, live_fields[name])
        if same_value(config[name], new):
            raise PatchRefused(f"{name} is {_show(new)} already", name)
        changes[name] = (config[name], new)
    if not changes:
        raise PatchRefused("the patch changes nothing: it has no replace operation")
    return changes


def same_value(a: Any, b: Any) -> bool:
    """Equality of JSON values as the `test` operation sees it."""
    if _is_number(a) and _is_number(b):
        x, y = _as_float(a), _as_float(b)
        return a == b or (x is not None and y is not None and math.isclose(x, y, rel_tol=SAME_NUMBER))
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(same_value(x, y) for x, y in zip(a, b))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(same_value(a[key], b[key]) for key in a)
    return type(a) is type(b) and bool(a == b)


def _fitting(name: str, old: Any, new: Any, bounds: Mapping[str, Any]) -> Any:
    """`new` as the field's type, or PatchRefused if it is of another type or out of bounds."""
    choices = bounds.get("choices")
    if choices is not None:
        for choice in choices:
            if same_value(choice, new):
                return choice
        raise PatchRefused(f"{name}={_show(new)} is none of {', '.join(_show(c) for c in choices)}", name)
    kind = _kind(old, bounds)
    new = _as_kind(name, kind, old, new)
    if _is_number(new):
        low, high = bounds.get("minimum"), bounds.get("maximum")
        if low is not None and new < low:
            raise PatchRefused(f"{name}={_show(new)} is below its minimum {low}", name)
        if high is not None and new > high:
            raise PatchRefused(f"{name}={_show(new)} is above its maximum {high}", name)
    return new


def _kind(old: Any, bounds: Mapping[str, Any]) -> str | None:
    """The field's type: as declared, else that of its value. A whole number in a field with float bounds is a float.

    None if nothing tells it: the field is unset and declares no type.
    """
    declared = bounds.get("type")
    if declared is not None:
        return str(declared)
    if isinstance(old, bool):
        return "bool"
    limits = [limit for limit in (bounds.get("minimum"), bounds.get("maximum")) if limit is not None]
    if isinstance(old, float) or (isinstance(old, int) and any(isinstance(limit, float) for limit in limits)):
        return "float"
    if isinstance(old, int):
        return "int"
    for kind, types in (("str", str), ("list", list | tuple), ("dict", Mapping)):
        if isinstance(old, types):
            return kind
    return "number" if limits else None


def _as_kind(name: str, kind: str | None, old: Any, new: Any) -> Any:
    if isinstance(new, float) and not math.isfinite(new):
        raise PatchRefused(f"{name}={new} is not finite", name)
    if new is None:
        raise PatchRefused(f"{name} cannot be unset while the run trains", name)
    fits: Any = None
    if kind == "bool":
        wanted, fits = "true or false", new if isinstance(new, bool) else None
    elif kind == "int":
        wanted = "a whole number"
        if _is_number(new) and _as_float(new) is not None and (isinstance(new, int) or new.is_integer()):
            fits = int(new)
    elif kind in ("float", "number"):
        wanted = "a number"
        if _is_number(new):
            number = _as_float(new)
            fits = new if kind == "number" and number is not None else number
    elif kind == "str":
        wanted, fits = "a text", new if isinstance(new, str) else None
    elif kind == "list":
        wanted, fits = _as_list(old, new)
    elif kind == "dict":
        wanted, fits = "an object", new if isinstance(new, Mapping) else None
    else:
        wanted, fits = "a number, text, true or false", None if isinstance(new, list | tuple | Mapping) else new
    if fits is None:
        raise PatchRefused(f"{name} must be {wanted}, not {_show(new)}", name)
    return fits


def _as_list(old: Any, new: Any) -> tuple[str, list[Any] | None]:
    """What a list must be like, and the list if it is. A list of numbers (say, of weights) keeps its length."""
    if not old or not all(_is_number(v) for v in old):
        return "a list", list(new) if isinstance(new, list | tuple) else None
    wanted = f"a list of {len(old)} finite numbers"
    if not isinstance(new, list | tuple) or len(new) != len(old) or not all(_is_number(v) for v in new):
        return wanted, None
    return wanted, list(new) if all(v is not None and math.isfinite(v) for v in map(_as_float, new)) else None


def _as_float(value: float) -> float | None:
    """The number as a float; None for a whole number that no float can hold."""
    try:
        return float(value)
    except OverflowError:
        return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _show(value: Any) -> str:
    text = repr(value) if isinstance(value, str | float | int) else str(value)
    return text if len(text) <= 80 else text[:79] + "…"
