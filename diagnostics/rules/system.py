"""The measuring itself: sensors that fell silent or froze."""

from functools import lru_cache

import numpy as np

from outspoken.diagnostics import signals as signal_table
from outspoken.diagnostics.records import Evidence, Finding
from outspoken.diagnostics.rules.fixes import advise
from outspoken.diagnostics.rules.registry import ANY_METHOD, Params, all_rules, rule
from outspoken.diagnostics.view import RunView, Window

# Signals that never repeat to the last bit while a run is alive, unless they are 0. Left out are all that may stand
# still in health: shares, lengths at a cap, clip ratios on-policy, rewards, schedules, memory, counters.
JITTERS = (
    "grad_norm",
    "entropy",
    "kl",
    "policy/approx_kl",
    "logps/chosen",
    "logps/rejected",
    "rewards/margins",
    "step_time",
    "time/step",
)
JITTERS_SUPERVISED = ("loss",)


@lru_cache(maxsize=32)
def _needed(method: str) -> dict[str, tuple[str, ...]]:
    """Signal -> codes of the rules of this method that cannot judge without it."""
    needed: dict[str, tuple[str, ...]] = {}
    for code, r in all_rules().items():
        if method in r.methods and code != "SYS012":
            for name in r.needs:
                needed[name] = (*needed.get(name, ()), code)
    return needed


@rule(
    "SYS012",
    "sensor-dead",
    severity="info",
    methods=ANY_METHOD,
    every=20,
    for_=2,
    keep=2,
    inhibited_by=("NUM001",),
    params={"absent": 3, "min_points": 10, "frozen": 20, "digits": 4},
)
def sensor_dead(run: RunView, p: Params) -> Finding | None:
    """A signal that rules rely on fell silent, or has not moved by one bit.

    ## Why it hurts

    Rules that read it see nothing, or see calm. Silence must not be taken for health.

    ## How it is decided

    A signal that at least one rule of this method needs, seen 10 times in this segment, has been absent for more than 3
    times its usual distance in steps, and more than 1.5 times the longest gap so far. Or a signal that never repeats
    exactly in a living run (gradient norm, entropy, KL, step time, log-probabilities, a supervised loss) had the same
    value, not 0 and with at least 4 digits, in the last 20 points. At 2 evaluations, 20 observations apart.

    ## When it is fine

    Signals that may stand still are not read for freezing: clip ratios (0 on-policy), longest completions (at the
    cap), shares, rewards, learning rate, memory. Values of few digits may be equal by rounding.

    ## What to change

    Nothing in training. Look for what stopped logging it: a changed version, a renamed metric, a callback that failed.

    ## Sources

    `reward_std` changed its meaning between TRL versions (TRL issue 3857). The limits are *judgement*.
    """
    silent: list[tuple[str, int, float]] = []
    for name in _needed(run.method):
        window = run.window(name, 100, min_n=int(p.min_points))
        if window is None or signal_table.impossible(name, run.method, run.config):
            continue
        bad = run.nonfinite.get(name)
        newest = max(window.steps[-1], bad[-1] if bad else -1)
        absent = run.step - newest
        if absent <= 0:
            continue
        gaps = np.diff(window.steps)
        usual = max(1.0, float(np.median(gaps)))
        if absent > p.absent * usual and absent > 1.5 * float(gaps.max()):
            silent.append((name, int(absent), usual))
    frozen = []
    names = JITTERS if run.method in signal_table.RL or run.has("reward") else (*JITTERS, *JITTERS_SUPERVISED)
    for name in names:
        window = run.window(name, int(p.frozen), min_n=int(p.frozen))
        if window is not None and _frozen(window, int(p.digits)):
            frozen.append(window)
    if not silent and not frozen:
        return None

    needed = _needed(run.method)
    parts, evidence = [], []
    for name, absent, usual in silent:
        parts.append(f"{name} has not been logged for {absent} steps (usually every {usual:.0f})")
        evidence.append(
            Evidence(
                name, "steps_absent", float(absent), 1, (run.step - absent, run.step),
                baseline=usual, threshold=p.absent * usual, direction="above",
            )
        )  # fmt: skip
    for window in frozen:
        parts.append(f"{window.name} is exactly {window.values[-1]:.6g} on the last {len(window)} points")
        evidence.append(window.evidence("distinct_values", 1.0, threshold=2, direction="below"))
    dead = [name for name, *_ in silent] + [w.name for w in frozen]
    rules = sorted({code for name in dead for code in needed.get(name, ())})
    return Finding(
        message="; ".join(parts) + ".",
        advice="Look for what stopped measuring it; no setting of the training is at fault."
        + (f" Until then {', '.join(rules)} cannot be judged." if rules else ""),
        evidence=evidence,
        suggestions=[advise("SYS012.1", f"Inspect what logs {dead[0]}", risk="low")],
        confidence="medium",
        impact="what these rules watch goes unseen",
    )


def _frozen(window: Window, digits: int) -> bool:
    value = float(window.values[-1])
    return (
        value != 0
        and bool((window.values == value).all())
        and float(f"{value:.{digits - 1}g}") != value  # else equal by rounding, perhaps
    )
