"""The plain records that pass between trainer, engine, disk and agents. The words are those of docs/architecture.md."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Severity = Literal["error", "warning", "info"]
State = Literal["pending", "firing", "resolved", "unknown", "suppressed"]
Confidence = Literal["low", "medium", "high"]
Applicability = Literal["auto", "suggest", "template", "inspect"]
When = Literal["live", "checkpoint", "earlier_checkpoint", "code"]

SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info")  # worst first

# Texts that come from outside (a model's completion, a user's metric) are cut to this many characters.
MAX_TEXT = 500


@dataclass(frozen=True)
class Observation:
    """One step's signals.

    A signal is in one of four states: in `signals` (a finite value), in `nonfinite` ("nan", "inf" or "-inf"), in
    neither (not emitted), or impossible under the configuration (the signal table tells). What was emitted and could
    not be read as a number stands in `unreadable`, cut short.
    """

    step: int
    signals: Mapping[str, float]
    nonfinite: Mapping[str, str] = field(default_factory=dict)
    unreadable: Mapping[str, str] = field(default_factory=dict)
    time: float | None = None  # seconds since the epoch
    epoch: float | None = None

    @classmethod
    def from_raw(
        cls, step: int, raw: Mapping[str, Any], time: float | None = None, epoch: float | None = None
    ) -> "Observation":
        """Sort raw metric values (numbers, numeric strings, anything) into the four states.

        `None` counts as not emitted. A number too large for a float (`1e400` in JSON) is infinite.
        """
        signals: dict[str, float] = {}
        nonfinite: dict[str, str] = {}
        unreadable: dict[str, str] = {}
        for name, value in raw.items():
            number = as_number(value)
            if number is None:
                if value is not None:
                    unreadable[str(name)[:MAX_TEXT]] = repr(value)[:MAX_TEXT]
            elif math.isfinite(number):
                signals[name] = number
            else:
                nonfinite[name] = "nan" if number != number else ("inf" if number > 0 else "-inf")
        return cls(step, signals, nonfinite, unreadable, time, epoch)


def as_number(value: Any) -> float | None:
    """The value as a float (perhaps nan or inf), or None if it is no number. Numeric strings count as numbers."""
    if isinstance(value, float):
        return value
    if isinstance(value, bool | int):
        try:
            return float(value)
        except OverflowError:
            return math.inf if value > 0 else -math.inf
    if isinstance(value, str):
        try:
            return float(value.strip())
        except ValueError:
            return None
    item = getattr(value, "item", None)  # zero-dimensional arrays and tensors
    if callable(item) and getattr(value, "ndim", None) == 0:
        return as_number(item())
    return None


@dataclass(frozen=True)
class Evidence:
    """One number that a rule's finding stands on."""

    signal: str
    statistic: str  # "pooled", "median", "trend_z", "two_window_t", "value", "count" …
    value: float | None
    n: int  # points, completions or groups behind the value
    window: tuple[int, int]  # first and last step
    baseline: float | None = None
    threshold: float | None = None
    direction: Literal["above", "below"] | None = None
    p: float | None = None  # tail probability, where a test gave one

    def as_dict(self) -> dict[str, Any]:
        return {k: _finite(v) for k, v in asdict(self).items() if v is not None or k == "value"}


@dataclass(frozen=True)
class Expectation:
    """What a change should do: `signal` at most or at least `value`, judged on what follows within `within_steps`."""

    signal: str
    direction: Literal["below", "above"]
    value: float
    within_steps: int
    min_n: int = 5  # points (or completions, for a signal that is pooled) needed to judge

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Suggestion:
    """A fix as an RFC 6902 patch on the run's config.

    `patch` begins with a `test` of the old value, so that a suggestion made for another configuration is refused.
    `formula` names how the new value was computed and `inputs` what went in.
    """

    id: str
    title: str
    applicability: Applicability
    when: When
    patch: Sequence[Mapping[str, Any]] = ()
    formula: str = ""
    inputs: Mapping[str, Any] = field(default_factory=dict)
    preconditions: Sequence[str] = ()
    side_effects: Sequence[str] = ()
    risk: Literal["low", "medium", "high"] = "medium"
    expect: Expectation | None = None
    on_failure: str = "revert"

    def as_dict(self) -> dict[str, Any]:
        record = asdict(self)
        record["patch"] = [dict(op) for op in self.patch]
        for key in ("preconditions", "side_effects"):
            record[key] = list(record[key])
        record["inputs"] = {k: _finite(v) for k, v in self.inputs.items()}
        return record


def change_field(name: str, old: Any, new: Any) -> list[dict[str, Any]]:
    """The patch that sets config field `name` from `old` to `new`.

    >>> change_field("learning_rate", 1e-5, 5e-6)[0]
    {'op': 'test', 'path': '/learning_rate', 'value': 1e-05}
    """
    path = "/" + name.replace("~", "~0").replace("/", "~1")
    return [{"op": "test", "path": path, "value": old}, {"op": "replace", "path": path, "value": new}]


@dataclass(frozen=True)
class Finding:
    """What a rule saw now. `message` holds the numbers, `advice` the setting and old -> new."""

    message: str
    advice: str
    evidence: Sequence[Evidence]
    suggestions: Sequence[Suggestion] = ()
    severity: Severity | None = None  # overrides the rule's own
    confidence: Confidence = "medium"
    onset_step: int | None = None
    impact: str = ""
    causes: Sequence[str] = ()  # codes that the rule itself names as cause; it is shown all the same
    explained_by: Sequence[str] = ()  # codes that, while they fire, explain this finding in this case: it is held back
    not_checked: Sequence[str] = ()


@dataclass(frozen=True)
class Unknown:
    """A rule's answer when it cannot judge: which signal or fact it lacks, or how much more data it needs."""

    reason: str


RuleResult = Finding | Unknown | None


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return list(value) if isinstance(value, tuple) else value
