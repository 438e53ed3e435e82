"""Data and formatting, as far as a run's signals show them."""

import math

import numpy as np

from outspoken.diagnostics.records import Evidence, Expectation, Finding, Severity, Unknown
from outspoken.diagnostics.rules.fixes import advise, round_up, set_field
from outspoken.diagnostics.rules.registry import SUPERVISED, Params, rule
from outspoken.diagnostics.view import RunView


@rule(
    "DAT003",
    "all-labels-masked",
    severity="error",
    methods=SUPERVISED,
    for_=1,
    keep=20,
    warm_up=False,
    params={"some": 0.01, "many": 0.20, "min_rows": 48, "empty_steps": 3, "within": 100},
)
def all_labels_masked(run: RunView, p: Params) -> Finding | Unknown | None:
    """Rows without one token that carries loss.

    ## Why it hurts

    A row whose labels are all masked teaches nothing. A batch made of such rows has a loss of 0/0 = NaN, which can end
    the run.

    ## How it is decided

    Before training, from the prepared data set: more than 1 % of the rows have no supervised token (warning), more
    than 20 % (error). While training, from `samples/no_supervised`: one step in which no row has any (warning), 3
    such steps within 100 points (error); or, pooled over at least 48 rows, more than 1 % (warning) or 20 % (error) by
    the exact binomial test.

    ## When it is fine

    A few long multi-turn rows whose last turn was cut: below 1 % nothing is said.

    ## What to change

    - `max_length` up to the 99th percentile of the rows' lengths, at most x2, if rows are cut before their answer
      begins. More memory.
    - Correct the response template, the markers of the chat template or the column names; or drop the rows. Not a
      setting.

    ## Sources

    Unsloth warns of rows without trainable tokens; axolotl repairs evaluation for the NaN of masked batches. The
    shares are *judgement*.
    """
    here = (run.step, run.step)
    share = run.facts.get("data/no_supervised_share")
    if isinstance(share, bool) or not isinstance(share, int | float) or not math.isfinite(share):
        share = None
    window = run.window("samples/no_supervised", int(p.within))
    if window is None and share is None:
        return Unknown("samples/no_supervised and data/no_supervised_share are not measured")

    found: list[tuple[Severity, str, Evidence]] = []
    if share is not None and share > p.some:
        rows = run.facts.get("data/rows")
        n = int(rows) if isinstance(rows, int | float) else 0
        of = f" of the {n:,} rows" if n else " of the data set's rows"
        found.append(
            (
                "error" if share > p.many else "warning",
                f"{share:.1%}{of} have no token that carries loss (limit {p.some:.0%})",
                Evidence(
                    "data/no_supervised_share",
                    "value",
                    float(share),
                    n,
                    here,
                    threshold=p.some,
                    direction="above",
                ),
            )
        )
    if window is not None and window.values.any():
        empty = int(np.count_nonzero(window.values >= 1))
        if empty:
            last = int(window.steps[window.values >= 1][-1])
            found.append(
                (
                    "error" if empty >= p.empty_steps else "warning",
                    f"no row had a token that carries loss in {empty} of the last {len(window)} steps (last: step {last})",
                    window.evidence("count_all_masked", float(empty), threshold=0, direction="above"),
                )
            )
        pooled = run.pooled("samples/no_supervised", int(p.min_rows))
        limits: tuple[tuple[float, Severity], ...] = ((p.many, "error"), (p.some, "warning"))
        for limit, severity in limits:
            if pooled is not None and pooled.exceeds(limit):
                found.append(
                    (
                        severity,
                        f"{pooled.mean:.1%} of the last {pooled.n} rows have no token that carries loss (limit {limit:.0%})",
                        pooled.evidence(threshold=limit),
                    )
                )
                break
    if not found:
        return None
    worst: Severity = "error" if any(f[0] == "error" for f in found) else "warning"
    advice = "Check the response template and the columns that mark what is trained, and drop rows without an answer"
    suggestions = []
    longer = _longer(run)
    if longer is not None:
        old, new, p99 = longer
        advice = f"If these rows are cut before their answer, consider raising max_length from {old} to {new}; "
        advice += "else check the response template and the columns that mark what is trained, and drop such rows"
        suggestions.append(
            set_field(
                run,
                "DAT003.1",
                "max_length",
                new,
                when="earlier_checkpoint",
                formula="min(2*max_length, p99_length rounded up to 64)",
                inputs={"max_length": old, "p99_length": p99},
                preconditions=("the rows without labels are longer than max_length",),
                side_effects=("more memory and time for long rows",),
                expect=Expectation("samples/no_supervised", "below", p.some, within_steps=50),
            )
        )
    suggestions.append(
        advise("DAT003.2", "Repair or drop the rows without labels", applicability="template", risk="low")
    )
    return Finding(
        message="; ".join(f[1] for f in found) + ".",
        advice=advice + ".",
        evidence=[f[2] for f in found],
        suggestions=suggestions,
        severity=worst,
        confidence="high",
        impact="these rows teach nothing, and a batch of them has a NaN loss",
    )


def _longer(run: RunView) -> tuple[int, int, float | None] | None:
    """max_length, a larger one, and the rows' 99th percentile of lengths; None if no row is cut, or nobody knows."""
    old = run.config.get("max_length")
    if not isinstance(old, int) or isinstance(old, bool) or old <= 0:
        return None
    longest, p99 = run.facts.get("data/longest"), run.facts.get("data/p99_length")
    if isinstance(longest, int | float) and longest <= old:
        return None
    if not isinstance(p99, int | float) or p99 <= old:
        return old, 2 * old, None
    return old, min(2 * old, round_up(p99, 64)), float(p99)
