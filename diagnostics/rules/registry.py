"""The registry of rules: a rule is a function with a code, a page (its docstring) and named parameters."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from types import SimpleNamespace
from typing import Any

from outspoken.diagnostics.records import RuleResult, Severity
from outspoken.diagnostics.view import RunView

# Methods by family, for the `methods` of a rule. "unknown" is a run whose method could not be told.
ONLINE_RL = ("grpo", "rloo", "ppo", "online_dpo")
GROUPED_RL = ("grpo", "rloo")
PREFERENCE = ("dpo", "kto", "orpo", "cpo", "simpo", "bco")
SUPERVISED = ("sft", "reward", "pretrain", "prm")
DISTILLATION = ("distillation", "gkd", "gold")
ANY_METHOD = (*ONLINE_RL, *PREFERENCE, *SUPERVISED, *DISTILLATION, "unknown")

CODE = re.compile(r"^[A-Z]{2,5}\d{3}$")
PAGE_SECTIONS = ("Why it hurts", "How it is decided", "When it is fine", "What to change", "Sources")

Params = SimpleNamespace


@dataclass(frozen=True)
class Rule:
    """A coded check and how the engine should run it.

    Attributes:
        needs: signals without which the rule answers `unknown`.
        every: observations between two evaluations. for_: consecutive evaluations with a finding before it fires.
        keep: evaluations without a finding before it is resolved.
        inhibited_by: codes that explain this one; while they fire, this one is kept but not shown.
        warm_up: whether the rule waits for the warm-up gate.
        params: thresholds, overridable per run. Their sources stand in the page.
        live_only: needs probes of a live trainer; not evaluated on logs.
    """

    code: str
    name: str
    severity: Severity
    methods: tuple[str, ...]
    check: Callable[[RunView, Any], RuleResult]
    needs: tuple[str, ...] = ()
    every: int = 1
    for_: int = 3
    keep: int = 5
    inhibited_by: tuple[str, ...] = ()
    warm_up: bool = True
    params: Mapping[str, float] = None  # type: ignore[assignment]
    category: str = ""
    live_only: bool = False

    @property
    def page(self) -> str:
        """The rule's page, in Markdown: its docstring, dedented."""
        import inspect

        return inspect.getdoc(self.check) or ""

    @property
    def summary(self) -> str:
        return self.page.split("\n\n")[0].replace("\n", " ")


RULES: dict[str, Rule] = {}

# The modules whose import registers the rules.
MODULES = ("numerics", "performance", "data", "supervised", "online_rl", "system")


def rule(
    code: str,
    name: str,
    *,
    severity: Severity,
    methods: Sequence[str] = ANY_METHOD,
    needs: Sequence[str] = (),
    every: int = 1,
    for_: int = 3,
    keep: int = 5,
    inhibited_by: Sequence[str] = (),
    warm_up: bool = True,
    params: Mapping[str, float] | None = None,
    live_only: bool = False,
) -> Callable[[Callable[[RunView, Any], RuleResult]], Callable[[RunView, Any], RuleResult]]:
    """Register a check. Its docstring is the page that `outspoken explain CODE` shows."""

    def register(check: Callable[[RunView, Any], RuleResult]) -> Callable[[RunView, Any], RuleResult]:
        if not CODE.match(code):
            raise ValueError(f"rule code {code!r} must be capital letters and three digits, like RL016")
        if code in RULES and RULES[code].check is not check and RULES[code].check.__name__ != check.__name__:
            raise ValueError(f"rule code {code} is taken by {RULES[code].name}")
        category = check.__module__.rsplit(".", 1)[-1]
        RULES[code] = Rule(
            code,
            name,
            severity,
            tuple(methods),
            check,
            tuple(needs),
            every,
            for_,
            keep,
            tuple(inhibited_by),
            warm_up,
            dict(params or {}),
            category,
            live_only,
        )
        return check

    return register


def all_rules() -> dict[str, Rule]:
    """Code -> rule, for every rule of the library, ordered by code."""
    for module in MODULES:
        import_module(f"outspoken.diagnostics.rules.{module}")
    return dict(sorted(RULES.items()))


def parameters(rule: Rule, overrides: Mapping[str, Any] | None) -> Params:
    """The rule's parameters with a run's overrides.

    Raises:
        ValueError: an override names a parameter that the rule does not have, or is no number.
    """
    values = dict(rule.params)
    for key, value in (overrides or {}).items():
        if key not in values:
            known = ", ".join(values) or "none"
            raise ValueError(f"{rule.code} has no parameter {key!r} (it has: {known})")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"parameter {key} of {rule.code} must be a number, not {value!r}")
        values[key] = value
    return Params(**values)
