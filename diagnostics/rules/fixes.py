"""What rules propose: suggestions with their patch, worded from old to new.

A suggestion is a patch only where the old value is known. Without it (a log read without its config) the change is
told in words, and nothing can be applied by mistake.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from outspoken.diagnostics.records import Applicability, Expectation, Suggestion, When, change_field
from outspoken.diagnostics.view import RunView

SMALLEST_LR_FACTOR = 0.1  # a learning rate is never cut further than this in one go

_GERUNDS = {
    "Add": "adding",
    "Check": "checking",
    "Drop": "dropping",
    "Go": "going",
    "Inspect": "inspecting",
    "Keep": "keeping",
    "Lower": "lowering",
    "Raise": "raising",
    "Repair": "repairing",
    "Set": "setting",
    "Stop": "stopping",
    "Switch": "switching",
    "Train": "training",
    "Use": "using",
}


def consider(suggestion: Suggestion) -> str:
    """The suggestion as a sentence: "Raise x from 1 to 2" becomes "Consider raising x from 1 to 2."."""
    verb, _, rest = suggestion.title.partition(" ")
    return f"Consider {_GERUNDS[verb]} {rest}."


def when_of(run: RunView, field: str) -> When:
    """When a change of this field can take effect: "live" if the trainer reads it at every step.

    A KL term that is off (`beta` 0) cannot be switched on live: no reference model was loaded.
    """
    if field == "beta" and run.config.get("beta") == 0:
        return "checkpoint"
    return "live" if field in run.facts.get("live_fields", ()) else "checkpoint"


def set_field(
    run: RunView,
    id: str,
    field: str,
    new: Any,
    *,
    verb: str | None = None,
    formula: str = "",
    inputs: Mapping[str, Any] | None = None,
    when: When | None = None,
    risk: Literal["low", "medium", "high"] = "medium",
    expect: Expectation | None = None,
    preconditions: Sequence[str] = (),
    side_effects: Sequence[str] = (),
    on_failure: str = "revert",
) -> Suggestion:
    """Propose `field` = `new`. Without the old value in the run's config there is no patch, and it is a template.

    `verb` defaults to "Raise" or "Lower" for numbers and "Set" for the rest.
    """
    known = field in run.config
    old = run.config.get(field)
    if verb is None:
        verb = ("Raise" if new > old else "Lower") if known and _is_number(old) and _is_number(new) else "Set"
    title = f"{verb} {field} from {say(old)} to {say(new)}" if known else f"{verb} {field} to {say(new)}"
    return Suggestion(
        id=id,
        title=title,
        applicability="suggest" if known else "template",
        when=when or when_of(run, field),
        patch=change_field(field, old, new) if known else (),
        formula=formula,
        inputs=dict(inputs or {}),
        preconditions=preconditions,
        side_effects=side_effects,
        risk=risk,
        expect=expect,
        on_failure=on_failure,
    )


def scale_field(run: RunView, id: str, field: str, factor: float, **more: Any) -> Suggestion:
    """Propose `field` times `factor`, rounded to three digits; in words if the field's value is not known.

    A learning rate is never cut below a tenth at once.
    """
    if field == "learning_rate":
        factor = max(factor, SMALLEST_LR_FACTOR)
    old = run.number(field)
    if old is None or old == 0:
        verb = "Raise" if factor > 1 else "Lower"
        return advise(
            id,
            f"{verb} {field} to {factor:.2g} times its value",
            applicability="template",
            when=more.pop("when", None) or when_of(run, field),
            **more,
        )
    more.setdefault("formula", f"{factor:.2g} * {field}")
    return set_field(run, id, field, float(f"{old * factor:.3g}"), **more)


def tried_and_failed(run: RunView, field: str, factor: float) -> bool:
    """Whether a change of `field` from its value now to `factor` times that was tried in this run and failed."""
    now = run.number(field)
    if now is None:
        return False
    tried = (change.get(field) for change in run.facts.get("failed_changes", ()))
    return any(
        _is_number(c["old"])
        and _is_number(c["new"])
        and math.isclose(c["old"], now, rel_tol=0.01)
        and math.isclose(c["new"], factor * now, rel_tol=0.05)
        for c in tried
        if c is not None
    )


def advise(
    id: str, title: str, *, applicability: Applicability = "inspect", when: When = "code", **more: Any
) -> Suggestion:
    """A suggestion without a patch: something for a person to look at ("inspect") or to write ("template")."""
    return Suggestion(id=id, title=title, applicability=applicability, when=when, **more)


def round_up(value: float, unit: int) -> int:
    """The smallest multiple of `unit` that is at least `value`.

    >>> round_up(2662.4, 64)
    2688
    """
    return unit * math.ceil(value / unit - 1e-9)


def say(value: Any) -> str:
    """A setting's value as a person would write it: 5e-06 for a small number, unset for None."""
    if value is None:
        return "unset"
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value)


def listed(suggestions: Iterable[Suggestion | None]) -> tuple[Suggestion, ...]:
    """The suggestions that are there, in order."""
    return tuple(s for s in suggestions if s is not None)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
