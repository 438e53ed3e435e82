"""Rules of online reinforcement learning: groups without signal, entropy, divergence, clipping, lengths, rewards."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from outspoken.diagnostics import signals as signal_table
from outspoken.diagnostics import stats
from outspoken.diagnostics.records import (
    Evidence,
    Expectation,
    Finding,
    RuleResult,
    Severity,
    Suggestion,
    Unknown,
)
from outspoken.diagnostics.rules.falls import (
    FALL,
    NEWEST_POINTS,
    START_POINTS,
    Fall,
    early_fall,
    policy_moved,
    recent_fall,
)
from outspoken.diagnostics.rules.fixes import (
    advise,
    consider,
    listed,
    round_up,
    scale_field,
    set_field,
    tried_and_failed,
)
from outspoken.diagnostics.rules.reading import (
    HINT,
    REWARD,
    SIGNIFICANT,
    DeadGroups,
    Flat,
    Progress,
    dead_groups,
    flat_reward,
    held_out_unchecked,
    keeps_moving,
    median_evidence,
    over,
    pool,
    reference,
    reward_progress,
    reward_range,
    reward_since,
    scaling,
    span,
    steps_for,
    trials_known,
    uncounted,
)
from outspoken.diagnostics.rules.registry import GROUPED_RL, ONLINE_RL, Params, rule
from outspoken.diagnostics.view import CAPACITY, Array, PooledWindow, RunView

SILENCED_BY = ("NUM001", "NUM002")  # a NaN explains whatever else looks wrong


# ------------------------------------------------------------------------------ groups that teach nothing


def composition(run: RunView, pooled: PooledWindow) -> dict[str, float]:
    """Share of all groups that failed as a whole and that passed as a whole, over the steps of `pooled`."""
    found = {}
    for name in ("groups/all_failed", "groups/all_passed"):
        window = run.window(name)
        if window is not None:
            inside = window.values[window.steps >= pooled.span[0]]
            if len(inside):
                found[name] = float(inside.mean())
    return found


def still_learning(run: RunView) -> str | None:
    """Why failing groups are no alarm: success rises, or too few points to see whether it does. None otherwise."""
    window = run.window(REWARD, 100)
    if window is None:
        return None
    if len(window) >= 40:
        trend = stats.mann_kendall(stats.block_means(window.values, 5))
        if trend is not None and trend.z > HINT:
            return f"the reward rises (trend z={trend.z:.1f} over {len(window)} steps)"
    if len(window) < 100:
        return f"{len(window)} of 100 steps seen: too early to tell whether a sparse reward is being learned"
    return None


def more_generations(run: RunView, id: str, share: float, target: float, signal: str) -> Suggestion | None:
    """Larger groups: the smallest of 8, 16, 32, 64 that brings the share of dead groups to `target`.

    With equally hard prompts a share f of tied groups of size G becomes f^(G'/G) at size G'. None where even 64 would
    not do, or where the generation batch cannot be divided so.
    """
    old = run.config.get("num_generations")
    if not isinstance(old, int) or old < 1 or not 0 < share < 1:
        return None
    new = next((g for g in (8, 16, 32, 64) if g > old and share ** (g / old) <= target), None)
    batch = signal_table.implied_trials("completions/clipped_ratio", {**run.config, "points_per_log": 1})
    if new is None or (batch is not None and batch % new != 0):
        return None
    return set_field(
        run,
        id,
        "num_generations",
        new,
        formula=f"smallest of 8, 16, 32, 64 with f^(G'/G) <= {target:g}",
        inputs={"f": round(share, 3), "G": old, "forecast": round(share ** (new / old), 3)},
        preconditions=("prompts are about equally hard; where some always and some never succeed, this helps little",),
        side_effects=(f"{new / old:g} times fewer prompts a generation batch, or as much more sampling",),
        expect=Expectation(signal, "below", target, steps_for(run, signal, 64 * new / old), min_n=64),
    )


def _resample(run: RunView, id: str, share: float, target: float) -> Suggestion | None:
    """Replace groups without spread while sampling; None where the trainer cannot, or does."""
    if run.config.get("dynamic_sampling") is not False or not 0 < share < 1:
        return None
    cost = 1 / (1 - share)
    return set_field(
        run,
        id,
        "dynamic_sampling",
        True,
        formula="1 / (1 - f) times the sampling",
        inputs={"f": round(share, 3), "cost": round(cost, 2)},
        side_effects=(
            f"about {cost:.1f} times the sampling",
            "prompts that are too easy or too hard are trained on less",
        ),
        expect=Expectation(
            "advantages/zero_share", "below", target, steps_for(run, "advantages/zero_share", 64), min_n=64
        ),
    )


@rule(
    "RL001",
    "group-std-collapse",
    severity="warning",
    methods=GROUPED_RL,
    keep=5,
    inhibited_by=(*SILENCED_BY, "RL033", "RL017", "RL005", "RL004", "RL016", "RL003", "RL002"),
    params={
        "limit": 0.60,
        "clear": 0.50,
        "error": 0.95,
        "min_groups": 48,
        "min_steps": 10,
        "explained": 0.80,
        "explained_groups": 96,
    },
)
def group_std_collapse(run: RunView, p: Params) -> RuleResult:
    """Too many prompt groups have equal rewards, so they teach nothing.

    ## Why it hurts

    Group-relative methods learn from the differences between the completions of one prompt. A group whose rewards are
    all equal has advantage 0 everywhere: it was sampled and scored for nothing, and the policy gradient comes from the
    few other groups, with more noise.

    ## How it is decided

    Counts of groups are pooled over the newest steps, at least 48 groups (or 50 steps) and 10 steps. The rule fires
    when more than 60 % of them carry no advantage, beyond chance (exact binomial test, p < 0.001), three steps in a
    row; it is an error from 95 % over 64 groups. It resolves below 50 %. What counts as "no advantage" depends on
    `scale_rewards`: with `group`, ties, and what the normalisation s/(s + 0.0001) takes away; with `batch` or `none`,
    ties, and groups whose spread is below 2 % of the reward range. When nearly all dead groups failed (RL003) or
    passed (RL002) as a whole, those rules name the cause, and this one waits for 96 groups.

    `frac_reward_zero_std` is used only where the raw rewards are not at hand, and not where it says nothing about
    groups: `scale_rewards="batch"`, `normalize_then_sum`, and RLOO with a KL term. Where `dynamic_sampling` replaces such
    groups, what counts is how many are left after it (`dynamic_sampling/left_share`).

    ## When it is fine

    28-45 % of groups without signal is ordinary in math RL. With few completions per prompt and prompts that are
    either very easy or very hard, ties cannot be avoided. While nearly all dead groups are failures and the reward
    rises, or fewer than 100 steps were seen, the run may be learning a sparse reward, and the rule is silent.

    ## What to change

    - Filter prompts whose running pass rate is 0 or 1. Risk: the distribution of prompts shifts.
    - Set `dynamic_sampling` to true: such groups are replaced by groups of further prompts. A share f of them costs
      about 1/(1-f) times the sampling.
    - Raise `num_generations` to the smallest of 8, 16, 32, 64 that is forecast to bring the share to 50 %. With
      equally hard prompts the share f becomes f^(G'/G). Costs sampling, or prompts per step.

    ## Sources

    The expected gradient vanishes with the reward's standard deviation even far from the optimum: arXiv 2310.20703.
    28-45 % of collapsed groups in ordinary runs: arXiv 2605.21125. Dynamic sampling: DAPO, arXiv 2503.14476. The
    sample size: 48 groups tell 0.9 from 0.6 with 95 % power (simulation). The limits 60, 50 and 95 %: judgement.
    """
    dead = dead_groups(run)
    if isinstance(dead, Unknown):
        return dead
    pooled = pool(run, dead.name, p.min_groups, min_steps=int(p.min_steps), values=dead.shares)
    if isinstance(pooled, Unknown):
        return pooled
    if not (pooled.mean > p.clear if run.is_firing else pooled.exceeds(p.limit)):
        return None

    parts = composition(run, pooled)
    failed, passed = parts.get("groups/all_failed", 0.0), parts.get("groups/all_passed", 0.0)
    if max(failed, passed) >= p.explained * pooled.mean and not run.is_firing:
        wider = pool(run, dead.name, p.explained_groups, enough_steps=100, values=dead.shares)
        if isinstance(wider, Unknown):
            return wider
        if not wider.exceeds(p.limit):
            return None
        pooled = wider
        if failed > passed and pooled.mean < p.error:
            reason = still_learning(run)
            if reason is not None:
                return Unknown(f"{pooled.mean:.0%} of groups carry no advantage, nearly all failed; but {reason}")

    shares = [f"{value:.0%} {name.removeprefix('groups/all_')} as a whole" for name, value in parts.items()]
    severe = pool(run, dead.name, 64, enough_steps=64, values=dead.shares)
    error = isinstance(severe, PooledWindow) and severe.mean >= p.error
    evidence = [pooled.evidence(p.limit)]
    kept = run.median("groups/attenuation")
    if kept is not None:
        evidence.append(Evidence("groups/attenuation", "median", kept, 10, pooled.span))
    suggestions = listed(
        [
            advise(
                "RL001.1",
                "Drop prompts whose running pass rate is 0 or 1"
                + ("" if run.config.get("dynamic_sampling") is True else ", or sample until groups are mixed"),
                applicability="template",
                side_effects=("the distribution of prompts shifts",),
                expect=Expectation(dead.name, "below", p.clear, steps_for(run, dead.name, 64), min_n=64),
            ),
            _resample(run, "RL001.3", pooled.mean, p.clear),
            more_generations(run, "RL001.2", pooled.mean, p.clear, dead.name),
        ]
    )
    return Finding(
        message=f"{pooled.mean:.0%} of {over(run, pooled, 'groups')} {dead.why} (limit {p.limit:.0%})"
        + (f": {', '.join(shares)}." if shares else "."),
        advice=consider(suggestions[-1]),
        evidence=evidence,
        suggestions=suggestions,
        severity="error" if error else "warning",
        confidence="high" if dead.name == "groups/zero_std" and trials_known(run, dead.name) else "medium",
        impact="these groups were sampled and scored for nothing",
        not_checked=uncounted(run, dead.name, "groups"),
    )


@rule(
    "RL002",
    "all-correct-groups",
    severity="info",
    methods=GROUPED_RL,
    needs=("groups/all_passed",),
    inhibited_by=(*SILENCED_BY, "RL004"),
    params={"limit": 0.50, "clear": 0.40, "min_groups": 64, "held_out": 0.80},
)
def all_correct_groups(run: RunView, p: Params) -> RuleResult:
    """Most prompt groups are solved by every completion.

    ## Why it hurts

    A prompt that every completion solves has no differences to learn from: sampling it is a waste, and the share of
    steps that move the policy shrinks. Often it is simply success, and the run can stop.

    ## How it is decided

    A group passed when all its rewards are within 1 % of the reward range of the largest reward seen in the run. The
    rule fires when more than 50 % of at least 64 groups passed, beyond chance (exact binomial, p < 0.001). It is
    information, and a warning if the reward on held-out prompts is below 80 % of the range: then the training prompts
    are solved and the task is not.

    ## When it is fine

    At the end of a successful run. If the largest reward seen is not the largest possible one (no completion got a
    bonus yet), the groups are equal but not solved.

    ## What to change

    - Drop prompts with a running pass rate of at least 0.9, or use harder ones. Risk: easy items are forgotten.
    - Or stop: there is little left to learn from these prompts.

    ## Sources

    ScaleRL drops prompts with a historic pass rate of at least 0.9: arXiv 2510.13786. The limits 50 and 80 %:
    judgement.
    """
    pooled = pool(run, "groups/all_passed", p.min_groups)
    if isinstance(pooled, Unknown):
        return pooled
    if not (pooled.mean > p.clear if run.is_firing else pooled.exceeds(p.limit)):
        return None
    best, worst, held_out = run.last("rewards/max_seen"), run.last("rewards/min_seen"), run.median("eval_reward", 1)
    unsolved = (
        best is not None
        and worst is not None
        and held_out is not None
        and best > worst
        and held_out < worst + p.held_out * (best - worst)
    )
    level = "" if best is None else f" ({best:.4g}, the largest seen)"
    message = f"{pooled.mean:.0%} of {over(run, pooled, 'groups')} got the full reward{level} from every completion"
    evidence = [pooled.evidence(p.limit)]
    if unsolved and held_out is not None:
        message += f", but held-out prompts only {held_out:.3g}"
        evidence.append(Evidence("eval_reward", "value", held_out, 1, (run.step, run.step)))
    fix = advise(
        "RL002.1",
        "Drop prompts with a running pass rate of at least 0.9, or use harder ones",
        applicability="template",
        side_effects=("easy items may be forgotten",),
        expect=Expectation("groups/all_passed", "below", p.limit, steps_for(run, "groups/all_passed", 64), min_n=64),
    )
    return Finding(
        message=f"{message} (limit {p.limit:.0%}).",
        advice=consider(fix) if unsolved else "Consider stopping here, or dropping the prompts that are solved.",
        evidence=evidence,
        suggestions=(fix,),
        severity="warning" if unsolved else "info",
        confidence="medium",
        impact="solved prompts give no gradient",
        not_checked=(
            *uncounted(run, "groups/all_passed", "groups"),
            *(() if held_out is not None else ("reward on held-out prompts: not measured",)),
        ),
    )


@rule(
    "RL003",
    "all-wrong-groups",
    severity="warning",
    methods=GROUPED_RL,
    needs=("groups/all_failed",),
    inhibited_by=(*SILENCED_BY, "RL033", "RL017", "RL005", "RL004", "RL016"),
    params={"limit": 0.60, "clear": 0.50, "min_groups": 64, "error": 0.95, "error_groups": 128},
)
def all_wrong_groups(run: RunView, p: Params) -> RuleResult:
    """Most prompt groups have no success to learn from.

    ## Why it hurts

    Where every completion of a prompt fails, all rewards are equal and the prompt gives no gradient. A policy that
    never succeeds cannot learn what success is.

    ## How it is decided

    A group failed when all its rewards are within 1 % of the reward range of the smallest reward seen. The rule fires
    when more than 60 % of at least 64 groups failed, beyond chance (exact binomial, p < 0.001), and the reward has not
    risen over the last 100 steps; an error above 95 % of 128 groups, at any time. It resolves below 50 %.

    ## When it is fine

    Sparse rewards: with a pass rate of 5 % and groups of 8, two thirds of the groups fail as a whole, and learning can
    still start. So the rule waits for 100 steps, and is silent while the reward rises. RL004 is the case that no
    completion ever succeeds; RL016 the case that answers are cut before they end.

    ## What to change

    - Raise `num_generations` to the smallest of 8, 16, 32, 64 that brings the share to 60 %; f becomes f^(G'/G).
    - Easier prompts (a pass rate between 0.2 and 0.8), a short supervised warm start on solved examples, or a reward
      for partial success. Risk of the last: it is learned instead of the task.

    ## Sources

    Small supervised warm starts suffice: arXiv 2310.20703. Testing the reward on its own when the mean stays 0 for 20
    steps: axolotl's documentation. (1 - p)^G: arithmetic. The limits 60 and 95 %: judgement.
    """
    pooled = pool(run, "groups/all_failed", p.min_groups)
    if isinstance(pooled, Unknown):
        return pooled
    if pooled.mean <= p.clear:
        return None
    severe = pool(run, "groups/all_failed", p.error_groups, enough_steps=int(p.error_groups))
    error = isinstance(severe, PooledWindow) and severe.mean > p.error
    if not error:
        if not run.is_firing and not pooled.exceeds(p.limit):
            return None
        reason = still_learning(run)
        if reason is not None:
            if reason.startswith("the reward rises"):
                return None
            if not run.is_firing:  # what stands does not have to wait
                return Unknown(f"{pooled.mean:.0%} of groups failed as a whole, but {reason}")
    suggestions = listed(
        [
            more_generations(run, "RL003.1", pooled.mean, p.limit, "groups/all_failed"),
            advise(
                "RL003.2",
                "Use easier prompts, with a pass rate between 0.2 and 0.8",
                applicability="template",
                expect=Expectation("groups/all_failed", "below", p.limit, 50, min_n=64),
            ),
            advise(
                "RL003.3",
                "Train a little on solved examples first (a supervised warm start)",
                applicability="template",
                expect=Expectation("groups/all_failed", "below", p.limit, 50, min_n=64),
            ),
        ]
    )
    shown = severe if error and isinstance(severe, PooledWindow) else pooled
    floor = run.last("rewards/min_seen")
    level = "" if floor is None else f" (reward {floor:.4g})"
    return Finding(
        message=f"Every completion failed{level} in {shown.mean:.0%} of {over(run, shown, 'groups')} "
        f"(limit {p.limit:.0%}), and the reward does not rise.",
        advice=consider(suggestions[0]),
        evidence=[shown.evidence(p.limit)],
        suggestions=suggestions,
        severity="error" if error else "warning",
        confidence="high" if trials_known(run, "groups/all_failed") else "medium",
        impact="prompts without one success give no gradient",
        not_checked=(
            *uncounted(run, "groups/all_failed", "groups"),
            "whether the reward function accepts an answer known to be right",
        ),
    )


# ----------------------------------------------------------------------------------------- reward functions


@rule(
    "RL004",
    "reward-function-broken",
    severity="error",
    methods=ONLINE_RL,
    warm_up=False,
    for_=3,
    inhibited_by=SILENCED_BY,
    params={
        "min_steps": 20,
        "min_completions": 256,
        "steps_if_uncounted": 100,
        "unscored": 0.20,
        "clear": 0.10,
        "truncated": 0.50,
    },
)
def reward_function_broken(run: RunView, p: Params) -> RuleResult:
    """A reward function gives every completion the same value, or no value at all.

    ## Why it hurts

    A constant reward has no gradient: the run burns compute and cannot improve. The usual reasons are a parser that
    never matches, a wrong dataset column, an exception that is swallowed, and a judge that is down.

    ## How it is decided

    A reward function is constant when its standard deviation over the batch was 0, and its mean the same, for 20 steps
    and 256 completions (none of 256 means a pass rate below 1.2 %, with 95 % confidence). It is an error when it never
    varied in this run and nothing else in the reward varies either; a warning when other functions vary, or when it
    used to vary; information when its constant is positive while others vary: then it is dead weight. Also an error:
    more than 20 % of at least 256 completions that no function could score (exact binomial, p < 0.001), or a function
    that scored none of them.

    Where the number of completions a step is not known, 100 steps are needed instead. While more than half of the
    completions are cut (RL016), the rule says unknown: what never ends cannot be scored.

    ## When it is fine

    A function that reached its largest value after it varied is saturated, not broken. A format reward that a well
    tuned model satisfies from the first step is dead weight, no fault. Functions that apply to a part of the prompts
    give None for the rest by design. And a task that is far too hard looks the same: no success in 256 completions.

    ## What to change

    - Call the function on an answer that is known to be right, on an empty one and on one with the answer to another
      prompt: the first must score above 0.9 of the maximum, the others below half. Nothing is changed automatically.
    - If it scores right, the task is too hard: see RL003. Dead weight may be taken out of `reward_weights`.

    ## Sources

    TRL excludes completions that all functions return None for, and warns (source). 0 of 256: Clopper-Pearson. The
    numbers of steps and completions, and the 20 %: judgement.
    """
    functions = sorted(
        {
            name.split("/")[1]
            for name in run.rings
            if name.startswith("rewards/") and name.endswith(("/std", "/none_share")) and name.count("/") == 2
        }
    )
    if not functions and not run.has("reward_std"):
        return Unknown("neither reward_std nor rewards/<function>/std is measured")

    unscored = pool(run, "rewards/unscored", p.min_completions) if run.last("rewards/unscored") else None
    if isinstance(unscored, PooledWindow) and (
        unscored.mean > p.clear if run.is_firing else unscored.exceeds(p.unscored)
    ):
        return _unscored(run, p, unscored)

    weights = _function_weights(run, functions)
    stuck = [
        c for c in (_constant(run, p, f) for f in functions or [""]) if c is not None and weights.get(c.function, 1.0)
    ]
    if not stuck:
        return None
    cut = pool(run, "completions/clipped_ratio", 64) if run.has("completions/clipped_ratio") else None
    if isinstance(cut, PooledWindow) and cut.mean > p.truncated:
        return Unknown(
            f"{cut.mean:.0%} of completions are cut before they end: their rewards say little of the functions"
        )
    alone = len(stuck) == len([f for f in functions or [""] if weights.get(f, 1.0)])
    return _constant_functions(run, stuck, alone)


@dataclass(frozen=True)
class _Constant:
    function: str  # "" stands for the total reward, where single functions are not measured
    value: float | None  # None: it scored nothing
    steps: int
    completions: int | None  # None: not known
    varied: bool  # earlier in the run
    evidence: Evidence

    @property
    def name(self) -> str:
        return self.function or "the reward"


def _constant(run: RunView, p: Params, function: str) -> _Constant | None:
    """The function's constant, if it had one value for long enough."""
    spread_name = f"rewards/{function}/std" if function else "reward_std"
    mean_name = f"rewards/{function}/mean" if function else REWARD
    none = run.last(f"rewards/{function}/none_share") if function else None
    if none is not None and none > 0.999:
        window = run.window(f"rewards/{function}/none_share")
        assert window is not None
        steps = _trailing(window.values > 0.999)
        enough, completions = _enough(run, p, window.name, steps)
        if not enough:
            return None
        evidence = Evidence(window.name, "value", none, steps, window.span)
        return _Constant(function, None, steps, completions, steps < len(window), evidence)
    newest, level = run.last(spread_name), run.last(mean_name)
    if newest is None or level is None or newest > 1e-6 * max(1.0, abs(level)):
        return None
    spreads, means = run.window(spread_name), run.window(mean_name)
    assert spreads is not None and means is not None
    n = min(len(spreads), len(means))
    tolerance = 1e-6 * max(1.0, abs(level))
    same = (spreads.values[-n:] <= tolerance) & (np.abs(means.values[-n:] - level) <= tolerance)
    steps = _trailing(same)
    enough, completions = _enough(run, p, "completions/clipped_ratio", steps)
    if not enough:
        return None
    earlier = [mean for _, mean, _ in run.blocks(mean_name)] + means.values[:-steps].tolist()
    varied = any(abs(mean - level) > tolerance for mean in earlier)
    told_apart = (spreads.values[:-steps] > tolerance).any() or any(
        s > tolerance for _, s, _ in run.blocks(spread_name)
    )
    if (varied or told_apart) and level >= max(earlier, default=level) - tolerance:
        return None  # saturated at its best value, or a reward by comparison, whose mean is always the same
    evidence = Evidence(spread_name, "value", newest, steps, (int(spreads.steps[-steps]), spreads.span[1]))
    return _Constant(function, level, steps, completions, varied, evidence)


def _trailing(same: Any) -> int:
    """How many of the newest entries are true in a row."""
    different = np.flatnonzero(~same)
    return len(same) - (int(different[-1]) + 1 if len(different) else 0)


def _enough(run: RunView, p: Params, name: str, steps: int) -> tuple[bool, int | None]:
    """Whether so many steps are enough to call something constant, and the completions in them."""
    trials = run.trials(name, steps) if steps else None
    if trials is None:
        return steps >= p.steps_if_uncounted, None
    completions = round(float(trials[-steps:].sum()))
    return steps >= p.min_steps and completions >= p.min_completions, completions


def _function_weights(run: RunView, functions: list[str]) -> Mapping[str, float]:
    weights, names = run.config.get("reward_weights"), run.facts.get("reward_functions")
    if isinstance(weights, list) and isinstance(names, list) and len(weights) == len(names):
        return dict(zip(names, weights))
    return {}


def _unscored(run: RunView, p: Params, unscored: PooledWindow) -> Finding:
    fix = advise("RL004.1", "Repair the reward functions: find out why they return None for these completions")
    return Finding(
        message=f"{unscored.mean:.0%} of {over(run, unscored, 'completions')} could not be scored by any reward "
        f"function (limit {p.unscored:.0%}).",
        advice=consider(fix),
        evidence=[unscored.evidence(p.unscored)],
        suggestions=(fix,),
        severity="error",
        confidence="high",
        impact="completions without a reward are left out of the loss",
        not_checked=uncounted(run, unscored.name, "completions"),
    )


def _constant_functions(run: RunView, stuck: list[_Constant], alone: bool) -> Finding:
    first = min(stuck, key=lambda c: (c.varied, (c.value or 0.0) > 0))
    severity: Severity = "warning"
    if alone and not first.varied:
        severity = "error"
    elif not alone and not first.varied and first.value is not None and first.value > 0:
        severity = "info"
    amount = f"{first.steps} steps" + (f", {first.completions} completions" if first.completions is not None else "")
    what = "scored nothing" if first.value is None else f"gave {first.value:.4g} to every completion"
    before = "after it had varied" if first.varied else "and never anything else in this run"
    also = [c.name for c in stuck if c is not first]
    names = ", ".join([*([first.function] if first.function else []), *[c.function for c in stuck if c is not first]])
    target = names or "the reward function"
    fix = advise(
        "RL004.1",
        f"Check {target} on an answer known to be right, on an empty one and on another prompt's",
        on_failure="if it scores right, the task is too hard: see RL003",
    )
    dead_weight = severity == "info"
    return Finding(
        message=f"{first.name} {what} for {amount}, {before}."
        + (f" Also constant: {', '.join(also)}." if also else ""),
        advice=f"It adds nothing to the advantage: {target} may be left out." if dead_weight else consider(fix),
        evidence=[c.evidence for c in stuck],
        suggestions=(fix,),
        severity=severity,
        confidence="low" if first.completions is None else "medium",
        onset_step=first.evidence.window[0],
        impact="a constant reward has no gradient",
        # A policy that collapsed scores nothing too; then the reward function is not to blame.
        explained_by=("RL033", "RL017", "RL005") if first.varied and policy_moved(run) else (),
        not_checked=(
            "the reward function on a reference answer: not tried",
            *(() if first.completions is not None else ("how many completions a step holds is not known",)),
        ),
    )


# ------------------------------------------------------------------------------------------------- entropy


@rule(
    "RL005",
    "entropy-collapse",
    severity="warning",
    methods=ONLINE_RL,
    needs=("entropy",),
    every=5,
    for_=3,
    keep=4,
    inhibited_by=(*SILENCED_BY, "RL017"),
    params={
        "fall": 0.30,
        "clear": 0.40,
        "error": 0.10,
        "fast_fall": 0.50,
        "duplicates": 0.30,
        "duplicates_rise": 1.5,
        "trend_z": 3.5,
        "ceiling": 0.95,
    },
)
def entropy_collapse(run: RunView, p: Params) -> RuleResult:
    """The policy becomes nearly deterministic, and the groups lose their variety.

    ## Why it hurts

    A policy that no longer tries different answers finds no better ones: gains stop, and stay stopped.

    ## How it is decided

    Two signs together. First, the median entropy of the last 10 steps is below 0.3 of its own beginning (steps 3 to
    22) and falls (over 50 steps: Mann-Kendall z < -3.5, or the newest 10 below all of the first 25), or it halved
    within 20 steps. Second, the groups lose their variety: the share of tied groups that did not pass rises (two
    windows of 25 steps, T > 3.5), or more than 30 % of completions repeat another of their group, and 1.5 times as many
    as at the beginning. Evaluated every 5 steps, three times in a row. An error below 0.1 of the beginning while the
    reward does not improve; information while it improves, or where it stands above 95 % of its range. It resolves
    above 0.4.

    ## When it is fine

    Entropy falls in every successful run, and healthy levels differ tenfold between models: neither a level nor a fall
    alone is ever reported. A task that is solved leaves nothing to try. A changed temperature or mask shifts the metric.

    ## What to change

    In this order: `epsilon_high` to 0.28, where clipping acts at all (several updates per batch); half the learning
    rate; `temperature` up by 0.1; a KL term (`beta` 0.001); an entropy bonus. Risk: overshoot (RL006).

    ## Sources

    Reward gain is bought with entropy, R = -a exp(H) + b: arXiv 2505.22617. Clip-higher: DAPO, arXiv 2503.14476.
    Target entropy: arXiv 2505.22312. The factors 0.3, 0.4, 0.1 and the duplicates: judgement.
    """
    now, start = run.median("entropy"), reference(run, "entropy")
    if now is None or start is None:
        return Unknown("entropy has fewer than 22 points in this segment")
    if start <= 0:
        return Unknown(f"entropy began at {start:.3g}, which is no entropy in nats")
    evidence = [median_evidence(run, "entropy", now, start, p.fall * start, "below")]
    if run.is_firing:
        if now > p.clear * start:
            return None
    else:
        slow = now < p.fall * start
        fast = False
        if slow:
            falls = keeps_moving(run, "entropy", -p.trend_z)
            if isinstance(falls, Unknown):
                return falls
            slow = falls is not None
            evidence += [falls] if falls is not None else []
        elif now < p.fast_fall * start:
            window = run.window("entropy", 25, min_n=25)
            if window is not None:
                fast = stats.median(window.values[-5:]) < p.fast_fall * stats.median(window.values[:5])
        if not (slow or fast):
            return None
    second = _variety_lost(run, p)
    if isinstance(second, list) and second:
        evidence.extend(second)
    elif not run.is_firing:
        return second if isinstance(second, Unknown) else None

    reward = reward_progress(run)
    improving, solved = reward.state in ("up", "rising"), _at_its_best(run, p.ceiling)
    severity: Severity = "info" if improving or solved else "warning"
    if now < p.error * start and reward.state in ("flat", "down") and not solved:
        severity = "error"
    suggestions = _more_entropy(run, now)
    return Finding(
        message=f"Entropy fell from {start:.3g} to {now:.3g} nats/token ({now / start:.0%} of its beginning, limit "
        f"{p.fall:.0%}), and the groups lose their variety; {reward.words}.",
        advice="The reward is at its best: nothing is left to try."
        if solved
        else ("The reward still improves: watch it." if improving else consider(suggestions[0])),
        evidence=[*evidence, *reward.evidence(run)],
        suggestions=suggestions,
        severity=severity,
        impact="without different answers there is nothing to choose from",
        not_checked=held_out_unchecked(run),
    )


def _at_its_best(run: RunView, share: float) -> bool:
    """Whether the reward stands within the highest part of its range, above `share` of it."""
    best, worst, level = run.last("rewards/max_seen"), run.last("rewards/min_seen"), run.median(REWARD)
    if best is None or worst is None or level is None or best <= worst:
        return False
    return level >= worst + share * (best - worst)


def _variety_lost(run: RunView, p: Params) -> list[Evidence] | Unknown:
    """Evidence that groups lose their variety: an empty list if they do not, Unknown if that is not measured."""
    found, measured = [], False
    repeated, start = run.median("completions/duplicate_share"), run.base("completions/duplicate_share")
    if repeated is not None and start is not None:
        measured = True
        if repeated > p.duplicates and repeated > p.duplicates_rise * start.median:
            found.append(
                median_evidence(run, "completions/duplicate_share", repeated, start.median, p.duplicates, "above")
            )
    tied = dead_groups(run)
    if isinstance(tied, DeadGroups) and len(tied.shares) >= 50:
        measured = True
        shares = tied.shares[-50:]
        solved = run.window("groups/all_passed", 50, min_n=50)
        if solved is not None:
            shares = np.maximum(shares - solved.values, 0.0)
        two = stats.two_window(shares[:25], shares[25:])
        if two is not None and two.t > SIGNIFICANT:
            found.append(
                Evidence(tied.name, "two_window_t", two.t, 50, span(run, tied.name, 50), None, SIGNIFICANT, "above")
            )
    if not measured:
        return Unknown(
            "entropy fell far, but neither tied groups nor duplicate completions are measured to confirm it"
        )
    return found


def _more_entropy(run: RunView, now: float) -> tuple[Suggestion, ...]:
    expect = Expectation("entropy", "above", float(f"{0.95 * now:.3g}"), 50, min_n=10)
    low, high = run.number("epsilon"), run.number("epsilon_high")
    clips = "num_iterations" in run.config and not signal_table.on_policy(run.config)
    temperature, beta = run.number("temperature"), run.number("beta")
    return listed(
        [
            set_field(
                run,
                "RL005.1",
                "epsilon_high",
                0.28,
                verb="Raise",
                formula="DAPO's clip-higher",
                risk="low",
                expect=expect,
                preconditions=("clipping acts: more than one update per generation batch",),
            )
            if clips and low is not None and (high if high is not None else low) < 0.28
            else None,
            scale_field(run, "RL005.2", "learning_rate", 0.5, expect=expect, side_effects=("slower learning",)),
            set_field(
                run,
                "RL005.3",
                "temperature",
                round(temperature + 0.1, 3),
                formula="temperature + 0.1",
                expect=expect,
                side_effects=("entropy is measured at the temperature: its level shifts by itself",),
            )
            if temperature is not None
            else None,
            set_field(run, "RL005.4", "beta", 0.001, expect=expect, side_effects=("a reference model takes memory",))
            if beta == 0
            else None,
        ]
    )


@rule(
    "RL006",
    "entropy-explosion",
    severity="warning",
    methods=ONLINE_RL,
    needs=("entropy",),
    every=5,
    for_=3,
    keep=4,
    inhibited_by=SILENCED_BY,
    params={
        "rise": 2.0,
        "clear": 1.5,
        "min_rise": 0.05,
        "trend_z": 3.5,
        "grad_rise": 1.25,
        "leap": 5.0,
        "leap_floor": 3.0,
        "leap_nats": 0.3,
    },
)
def entropy_explosion(run: RunView, p: Params) -> RuleResult:
    """The policy's distribution flattens while the run gets worse.

    ## Why it hurts

    Completions turn into garbled text. It is the usual shape of a late collapse: entropy falls, turns, and rises
    steadily until the reward follows.

    ## How it is decided

    The median entropy of the last 10 steps is above twice its smallest 10-step mean in this segment, at least 0.05
    nats/token above it, above its own beginning, and rising (over 50 steps: Mann-Kendall z > 3.5, or the newest 10
    above all of the first 25); and at least one of: the reward falls (two windows of 25 steps, T < -3.5), the gradient
    norm rises (T > 3.5 on its logarithm, by a quarter or more), the difference between sampling and training
    log-probabilities rises (T > 3.5). Every 5 steps, three times in a row. An error when the reward falls. It resolves
    below 1.5 times the minimum.

    Before there are 50 steps, only a leap counts: the newest 10 steps against the run's first 5, median five times as
    high and all of them three times, at least 0.3 nats/token more, and a reward without a hint of a gain (T < 2).

    ## When it is fine

    Clip-higher and entropy bonuses raise entropy by design; a rise that levels off below 1 nat is reported as fine by
    maintainers. Without a second sign nothing is said.

    ## What to change

    - Go back to a checkpoint before the minimum and train on with 0.3 of the learning rate.
    - Lower `max_grad_norm` to 0.1; a KL term; a smaller `entropy_coef`; `epsilon_high` back to `epsilon`.

    ## Sources

    Fall, then steady rise before collapse: INTELLECT-2, arXiv 2505.07291. The factors 2, 1.5, 1.25, 5 and 3, 0.05 and
    0.3: judgement.
    """
    leap = _leap(run, p)
    if leap is not None:
        return leap
    now, start = run.median("entropy"), reference(run, "entropy")
    window = run.window("entropy", CAPACITY, min_n=50)
    if now is None or start is None or window is None:
        return Unknown("entropy has fewer than 50 points in this segment")
    if now <= start and not run.is_firing:
        return None
    lowest = min(stats.block_means(window.values, 10))
    if lowest < 0:
        return Unknown(f"entropy was {lowest:.3g}, which is no entropy in nats")
    reward = reward_progress(run) if now > p.clear * lowest else None
    if reward is None:
        return None
    evidence = [median_evidence(run, "entropy", now, lowest, p.rise * lowest, "above")]
    if not run.is_firing:
        if now <= p.rise * lowest or now - lowest < p.min_rise:
            return None
        rises = keeps_moving(run, "entropy", p.trend_z)
        if not isinstance(rises, Evidence):
            return rises
        evidence.append(rises)
        second = _unstable(run, p, reward)
        if not second:
            return None
        evidence.extend(second)
    falls = reward.state == "down"
    suggestions = _less_entropy(run, now)
    return Finding(
        message=f"Entropy rose to {now:.3g} nats/token, {now / max(lowest, 1e-9):.1f} times its minimum of "
        f"{lowest:.3g} (limit {p.rise:g} times){_with(evidence)}; {reward.words}.",
        advice=consider(suggestions[0]),
        evidence=evidence,
        suggestions=suggestions,
        severity="error" if falls else "warning",
        impact="completions turn into garbled text",
        not_checked=("garbled text in completions: not measured",),
    )


def _leap(run: RunView, p: Params) -> Finding | None:
    """Entropy that leapt far above the run's first steps, without a gain in reward."""
    first, window = run.first("entropy", START_POINTS), run.window("entropy", NEWEST_POINTS, min_n=NEWEST_POINTS)
    if window is None or len(first) < START_POINTS or run.rings["entropy"].total < START_POINTS + NEWEST_POINTS:
        return None
    start, now = float(first.mean()), window.median
    factor = p.clear if run.is_firing else p.leap
    if start <= 0 or now < factor * start or now - start < p.leap_nats:
        return None
    if not run.is_firing and float(window.values.min()) < p.leap_floor * start:
        return None
    newest = run.window(REWARD, NEWEST_POINTS, min_n=NEWEST_POINTS)
    before = run.first(REWARD, NEWEST_POINTS)
    gain = stats.two_window(before, newest.values) if newest is not None and len(before) >= START_POINTS else None
    if gain is None or gain.t > HINT:
        return None
    suggestions = _less_entropy(run, now)
    return Finding(
        message=f"Entropy leapt to {now:.3g} nats/token, {now / start:.1f} times what it was in the run's first "
        f"{START_POINTS} steps (limit {p.leap:g} times), and the reward has not risen since "
        f"({gain.mean1:.3g} -> {gain.mean2:.3g}).",
        advice=consider(suggestions[0]),
        evidence=[
            window.evidence("median", baseline=start, threshold=p.leap * start, direction="above"),
            Evidence(REWARD, "two_window_t", gain.t, gain.n1 + gain.n2, span(run, REWARD, NEWEST_POINTS)),
        ],
        suggestions=suggestions,
        severity="error" if gain.t < -SIGNIFICANT else "warning",
        impact="completions turn into garbled text",
        not_checked=("garbled text in completions: not measured",),
    )


def _with(evidence: list[Evidence]) -> str:
    """The signs beside the entropy itself, as in ", while grad_norm gets worse"."""
    others = list(dict.fromkeys(e.signal for e in evidence if e.signal != "entropy"))
    return f", while {' and '.join(others)} get{'s' if len(others) == 1 else ''} worse" if others else ""


def _unstable(run: RunView, p: Params, reward: Progress) -> list[Evidence]:
    found = list(reward.evidence(run)) if reward.state == "down" else []
    for name, least in (("grad_norm", p.grad_rise), ("sampling/sampling_logp_difference/mean", 1.0)):
        window = run.window(name, 50, min_n=50)
        if window is None or window.values.min() <= 0:
            continue
        logs = np.log(window.values)
        two = stats.two_window(logs[:25], logs[25:])
        if two is not None and two.t > SIGNIFICANT and two.diff > math.log(least):
            found.append(window.evidence("two_window_t", two.t, threshold=SIGNIFICANT, direction="above"))
    return found


def _less_entropy(run: RunView, now: float) -> tuple[Suggestion, ...]:
    expect = Expectation("entropy", "below", float(f"{now:.3g}"), 30, min_n=10)
    clip, bonus = run.number("max_grad_norm"), run.number("entropy_coef")
    low, high = run.number("epsilon"), run.number("epsilon_high")
    return listed(
        [
            scale_field(
                run,
                "RL006.1",
                "learning_rate",
                0.3,
                when="earlier_checkpoint",
                preconditions=("a checkpoint from before the minimum of the entropy",),
                expect=expect,
            ),
            set_field(run, "RL006.2", "max_grad_norm", 0.1, expect=expect)
            if clip is not None and clip > 0.1
            else None,
            scale_field(run, "RL006.3", "entropy_coef", 0.2, expect=expect)
            if bonus is not None and bonus > 0
            else None,
            set_field(run, "RL006.4", "epsilon_high", low, verb="Lower", expect=expect)
            if low is not None and high is not None and high > low
            else None,
        ]
    )


# ------------------------------------------------------------------------- divergence and the size of a step


@rule(
    "RL007",
    "kl-drift",
    severity="warning",
    methods=ONLINE_RL,
    needs=("kl",),
    every=5,
    for_=3,
    keep=4,
    inhibited_by=SILENCED_BY,
    params={"rise": 0.50, "min_rise": 0.02, "high": 0.5, "error": 2.0, "flat_share": 0.05, "flat_t": 2.0},
)
def kl_drift(run: RunView, p: Params) -> RuleResult:
    """The policy leaves its reference faster than the reward justifies.

    ## Why it hurts

    Divergence is the price of reward. When the price rises and the reward does not, the policy is being changed in
    ways nobody asked for: style, language, and later garbage.

    ## How it is decided

    By efficiency: the median of 10 steps of `kl` rose by more than 50 % and 0.02 nats/token over 50 steps, and
    significantly (two windows of 25 steps on the logarithm, T > 3.5), while the reward fell (two windows of 25 steps,
    T < -3.5) or was flat for 100 to 512 steps though a change of 5 % of its range would have shown (the test of
    RL031). Or by level, per token: above 0.5 a warning, above 2 an error. `kl` is the per-token estimate of GRPO and
    RLOO; where it is a sum per sequence (PPO), it is divided by the mean completion length. Every 5 steps, three times
    in a row.

    ## When it is fine

    KL must grow while a policy learns, and recipes without a KL term accept large values. A single token can dominate
    the estimate, so medians are used. If the reward is too noisy to be called flat, the rule says unknown. Without a
    KL term (`beta` 0) there is no `kl` at all. In asynchronous training `kl` compares the new with the sampling
    policy, and the rule does not apply.

    ## What to change

    - `beta` times clip(KL / KL_target, 1.5, 4), KL_target being the value 50 steps ago (or the limit, if smaller).
      Risk: too much freezes the policy.
    - The learning rate times 0.7.

    ## Sources

    Adaptive KL control: arXiv 1909.08593. KL above 2 as a red flag: axolotl's documentation. Pitfalls of the
    estimators: arXiv 2512.21852. 50 %, 0.02, 0.5 and 10 %: judgement.
    """
    if "async" in str(run.facts.get("trainer", "")).lower():
        return Unknown("in asynchronous training kl compares the new with the sampling policy, not with the reference")
    window = run.window("kl", min_n=10)
    if window is None:
        return Unknown("kl has fewer than 10 points in this segment")
    per_token, unit = 1.0, "nats/token"
    if run.method not in GROUPED_RL:
        length = run.median("completions/mean_length")
        if length is None or length < 1:
            return Unknown(f"kl is a sum per sequence in {run.method}; completions/mean_length is needed to judge it")
        per_token = 1 / length
    values = window.values * per_token
    now = stats.median(values[-10:])
    limit = p.high * (0.8 if run.is_firing else 1.0)
    high = now > limit
    before = stats.median(values[-60:-50]) if len(values) >= 60 else None
    rose = before is not None and now - before > p.min_rise and now > (1 + p.rise) * before and _rises(values[-50:])
    if not high and not rose:
        return None
    reward = reward_progress(run)
    if not high:
        if reward.state == "up":
            return None
        flat = None if reward.state == "down" else flat_reward(run, p.flat_share, p.flat_t)
        if reward.state != "down" and not isinstance(flat, Flat):
            return flat
    beta = run.number("beta")
    target = max(min(before if before is not None and rose else p.high, p.high), 1e-6)
    factor = float(f"{min(max(now / target, 1.5), 4.0):.3g}")
    calmer = now + 0.5 * (now - before) if before is not None and now > before else now
    expect = Expectation("kl", "below", float(f"{calmer / per_token:.3g}"), 50, min_n=10)
    stronger = (
        scale_field(
            run,
            "RL007.1",
            "beta",
            factor,
            formula="beta * clip(KL / KL_target, 1.5, 4)",
            inputs={"KL": now, "KL_target": target, "factor": factor},
            side_effects=("too strong a KL term freezes the policy",),
            expect=expect,
        )
        if beta is None or beta > 0
        else set_field(run, "RL007.1", "beta", 0.001, expect=expect)
    )
    suggestions = (stronger, scale_field(run, "RL007.2", "learning_rate", 0.7, expect=expect))
    moved = f"rose from {before:.3g} to {now:.3g} {unit} in 50 steps" if rose else f"is {now:.3g} {unit}"
    against = "" if rose and not high else f" (limit {p.high:g})"
    return Finding(
        message=f"KL to the reference {moved}{against}; {reward.words}.",
        advice=consider(stronger),
        evidence=[
            median_evidence(run, "kl", now / per_token, before, p.high / per_token, "above"),
            *reward.evidence(run),
        ],
        suggestions=suggestions,
        severity="error" if now > p.error else "warning",
        confidence="high" if reward.state == "down" else "medium",
        impact="the policy changes in ways the reward does not ask for",
        not_checked=held_out_unchecked(run),
    )


def _rises(values: Array) -> bool:
    """Whether the later half of positive values lies significantly above the earlier one, on the logarithm."""
    if float(values.min()) <= 0:
        return False
    logs, half = np.log(values), len(values) // 2
    two = stats.two_window(logs[:half], logs[half:])
    return two is not None and two.t > SIGNIFICANT


@rule(
    "RL009",
    "clip-fraction-high",
    severity="warning",
    methods=ONLINE_RL,
    needs=("clip_ratio/region_mean",),
    for_=5,
    inhibited_by=SILENCED_BY,
    params={"limit": 0.10, "clear": 0.05, "error": 0.30, "target": 0.05, "rise": 3.0},
)
def clip_fraction_high(run: RunView, p: Params) -> RuleResult:
    """Many tokens hit the trust region: the update is too large, or the data too stale.

    ## Why it hurts

    A clipped token gives no gradient. When many are clipped, the policy has moved further from the one that sampled
    the data than the method allows for, and what remains of the gradient is biased.

    ## How it is decided

    `clip_ratio/region_mean` is the share of *tokens* (not of updates) whose ratio is outside [1 - epsilon, 1 +
    epsilon_high] on the side where clipping binds. Its median over 10 steps above 10 % is a warning, above 30 % an
    error, five evaluations in a row; it resolves below 5 %. With ratios per sequence (`importance_sampling_level=
    "sequence"`, and RLOO) the unit is sequences, far more are clipped in health, and the limit is 3 times the run's
    own beginning instead. With one update per generation batch the ratio is exactly 1, and the rule does not apply.

    ## When it is fine

    GSPO clips about two orders of magnitude more than GRPO and trains well: hence the relative limit. `low_min` and
    `high_max` are extremes and are never looked at.

    ## What to change

    - The learning rate times z(f)/z(0.05), z(f) being the two-sided normal quantile of the clipped share f: with
      log-normal ratios whose scale is proportional to the learning rate, this brings the share to 5 %. At least 0.1.
    - Fewer updates per generation batch: `num_iterations` halved, or `steps_per_generation` down to
      `gradient_accumulation_steps`.
    - Never a wider `epsilon`: that hides it.

    ## Sources

    GSPO, arXiv 2507.18071. Below 0.1 healthy, above 0.3 a red flag: axolotl's documentation. What TRL counts: its
    source. The formula: derived from the assumption named; the factor 3: judgement.
    """
    if signal_table.on_policy(run.config):
        return None
    now = run.median("clip_ratio/region_mean")
    if now is None:
        return Unknown("clip_ratio/region_mean has fewer than 10 points in this segment")
    if now <= p.clear:
        return None
    level = run.config.get("importance_sampling_level")
    sequences = level == "sequence" or run.method == "rloo"
    if sequences:
        start = reference(run, "clip_ratio/region_mean")
        if start is None:
            return Unknown("clipping per sequence is judged against the run's beginning: fewer than 22 points so far")
        start = max(start, 0.01)
        limit, error, clear, target = p.rise * start, 3 * p.rise * start, 2 * start, min(start, 0.5)
        unit, bound = "sequences", f"{p.rise:g} times its beginning, {start:.1%}"
    else:
        limit, error, clear, target = p.limit, p.error, p.clear, p.target
        unit, bound = "tokens", f"limit {p.limit:.0%}"
    if now <= (clear if run.is_firing else limit):
        return None
    z_now, z_target = _two_sided_z(now), _two_sided_z(target)
    factor = float(f"{max(min(z_now / z_target, 0.9), 0.1):.3g}")
    expect = Expectation("clip_ratio/region_mean", "below", float(f"{target:.3g}"), 20, min_n=10)
    iterations, splits = run.config.get("num_iterations"), run.config.get("steps_per_generation")
    accumulation = run.config.get("gradient_accumulation_steps")
    suggestions = listed(
        [
            scale_field(
                run,
                "RL009.1",
                "learning_rate",
                factor,
                formula="learning_rate * z(f_observed) / z(f_target), z(f) = Phi^-1(1 - f/2)",
                inputs={"f_observed": now, "f_target": target, "factor": factor},
                side_effects=("slower learning",),
                expect=expect,
            ),
            set_field(
                run, "RL009.2", "num_iterations", max(1, iterations // 2), formula="max(1, k // 2)", expect=expect
            )
            if isinstance(iterations, int) and iterations > 1
            else None,
            set_field(
                run,
                "RL009.3",
                "steps_per_generation",
                accumulation,
                formula="gradient_accumulation_steps",
                expect=expect,
                preconditions=("the generation batch shrinks in proportion, and must still hold whole groups",),
            )
            if isinstance(splits, int) and isinstance(accumulation, int) and splits > accumulation
            else None,
        ]
    )
    return Finding(
        message=f"{now:.0%} of {unit} hit the clipping bound of the ratio (median of 10 steps, {bound}).",
        advice=consider(suggestions[0]),
        evidence=[median_evidence(run, "clip_ratio/region_mean", now, None, limit, "above")],
        suggestions=suggestions,
        severity="error" if now > error else "warning",
        confidence="medium" if level is not None or run.method == "rloo" else "low",
        impact="clipped tokens give no gradient, and the rest is biased",
        not_checked=()
        if level is not None or run.method == "rloo"
        else ("importance_sampling_level is not known: taken as token",),
    )


def _two_sided_z(share: float) -> float:
    """Phi^-1(1 - f/2): how many standard deviations leave a share f outside, on both sides together."""
    return NormalDist().inv_cdf(1 - min(max(share, 1e-6), 0.999) / 2)


# -------------------------------------------------------------------------------------------------- lengths


def length_growth(run: RunView, factor: float, least: float) -> tuple[float, float] | None:
    """(median length at the beginning, now) if completions grew by more than `factor` and `least` tokens."""
    now, start = run.median("completions/mean_length"), reference(run, "completions/mean_length")
    if now is None or start is None or now <= factor * start or now - start < least:
        return None
    return start, now


def _left_off(run: RunView, name: str, start: float, factor: float) -> int:
    """The last step at which a signal's 10-point mean was still within `factor` of where it started."""
    window = run.window(name)
    assert window is not None
    if len(window) < 10:
        return int(window.steps[0])
    means = np.convolve(window.values, np.ones(10) / 10, "valid")
    near = np.flatnonzero(means <= factor * start if factor > 1 else means >= factor * start)
    return int(window.steps[near[-1] + 9]) if len(near) else int(window.steps[0])


def _pays(run: RunView, start: float) -> bool:
    """Whether the reward rose since completions began to grow from `start` tokens."""
    since = _left_off(run, "completions/mean_length", start, 1.25)
    return reward_since(run, since).state in ("up", "rising")


@rule(
    "RL015",
    "length-explosion",
    severity="warning",
    methods=ONLINE_RL,
    needs=("completions/mean_length",),
    every=2,
    for_=3,
    keep=5,
    inhibited_by=SILENCED_BY,
    params={
        "rise": 2.0,
        "clear": 1.5,
        "min_growth": 16,
        "clipped": 0.10,
        "error": 0.50,
        "min_completions": 128,
        "flat_share": 0.05,
    },
)
def length_explosion(run: RunView, p: Params) -> RuleResult:
    """Completions grow longer and longer.

    ## Why it hurts

    Length is time and memory. Growth without reward is usually a fault of the objective (long wrong answers are
    punished less per token) or the start of endless text, and ends in truncation.

    ## How it is decided

    The median of `completions/mean_length` over 10 steps is above twice its own beginning (steps 3 to 22), by at least
    16 tokens. That alone is information. The reward of the newest 25 steps is compared with that of 25 steps before
    the growth began (the last time the length was within 1.25 of its beginning). It is a warning when the reward did
    not improve and either more than 10 % of at least 128 completions are cut (exact binomial, p < 0.001), or the
    reward is flat (a change of 5 % of its range would have shown) or fell; an error when more than half are cut. Every
    second step, three times in a row; it resolves below 1.5 times the beginning.

    ## When it is fine

    Reasoning runs lengthen usefully: while the reward rises, this stays information. Longer prompts or another
    environment also change lengths.

    ## What to change

    - `loss_type` "grpo" to "dapo": averaging per sequence favours long wrong answers.
    - A soft penalty for overlong answers in the reward. Keep `max_completion_length`: raising it feeds the growth.
    - `mask_truncated_completions`: cut answers leave the loss. Risk: nothing then pushes towards ending.

    ## Sources

    Length bias of the per-sequence average: Dr. GRPO, arXiv 2503.20783. Soft overlong punishment: DAPO, arXiv
    2503.14476. One public log: 143 to 2021 tokens, 34 % cut, reward flat. The factors: judgement.
    """
    grown = length_growth(run, p.clear if run.is_firing else p.rise, p.min_growth)
    if grown is None:
        if run.median("completions/mean_length") is None or reference(run, "completions/mean_length") is None:
            return Unknown("completions/mean_length has fewer than 22 points in this segment")
        return None
    start, now = grown
    reward = reward_since(run, _left_off(run, "completions/mean_length", start, 1.25), p.flat_share)
    cut = pool(run, "completions/clipped_ratio", p.min_completions, min_steps=10)
    clipped = cut.mean if isinstance(cut, PooledWindow) else 0.0
    severity: Severity = "info"
    if reward.state not in ("up", "rising") and now > p.rise * start:
        if clipped > p.error:
            severity = "error"
        elif (isinstance(cut, PooledWindow) and cut.exceeds(p.clipped)) or reward.state in ("flat", "down"):
            severity = "warning"
    suggestions = _shorter(run, now, clipped)
    evidence = [median_evidence(run, "completions/mean_length", now, start, p.rise * start, "above")]
    if isinstance(cut, PooledWindow):
        evidence.append(cut.evidence(p.clipped))
    share = f", {clipped:.0%} are cut" if isinstance(cut, PooledWindow) else ""
    return Finding(
        message=f"Completions grew from {start:.0f} to {now:.0f} tokens (limit {p.rise:g} times){share}; {reward.words}.",
        advice=consider(suggestions[0])
        if severity != "info"
        else "Longer answers may be worth it: compare the reward on held-out prompts.",
        evidence=[*evidence, *reward.evidence(run)],
        suggestions=suggestions,
        severity=severity,
        confidence="medium" if reward.state != "unclear" else "low",
        impact="length costs time and memory, and ends in truncation",
        not_checked=held_out_unchecked(run),
    )


def _shorter(run: RunView, now: float, clipped: float) -> tuple[Suggestion, ...]:
    expect = Expectation("completions/mean_length", "below", float(math.ceil(1.05 * now)), 50, min_n=10)
    return listed(
        [
            set_field(
                run,
                "RL015.1",
                "loss_type",
                "dapo",
                verb="Switch",
                formula="average over all tokens instead of per sequence",
                side_effects=("the loss is scaled differently",),
                expect=expect,
            )
            if run.config.get("loss_type") == "grpo"
            else None,
            advise(
                "RL015.2",
                "Add a soft penalty for overlong answers to the reward, and keep max_completion_length",
                applicability="template",
                side_effects=("reasoning may get shorter",),
                expect=expect,
            ),
            set_field(
                run,
                "RL015.3",
                "mask_truncated_completions",
                True,
                side_effects=("nothing in the loss pushes towards ending any more",),
                risk="high",
                expect=expect,
            )
            if run.config.get("mask_truncated_completions") is False and clipped > 0.10
            else None,
        ]
    )


@rule(
    "RL016",
    "truncation-saturation",
    severity="warning",
    methods=ONLINE_RL,
    needs=("completions/clipped_ratio",),
    inhibited_by=SILENCED_BY,
    params={
        "limit": 0.20,
        "clear": 0.10,
        "error": 0.50,
        "min_completions": 128,
        "margin": 1.3,
        "no_end_token": 0.95,
        "growth": 2.0,
        "min_growth": 16,
    },
)
def truncation_saturation(run: RunView, p: Params) -> RuleResult:
    """Too many completions reach `max_completion_length` and are cut.

    ## Why it hurts

    A cut answer usually scores 0 whatever it was going to say. Long correct answers are punished, groups tie at 0, and
    the reward stays flat: this is named before all of those.

    ## How it is decided

    `completions/clipped_ratio`, the share of completions that did not end with an end token, pooled over at least 128
    completions (or 50 steps): more than 20 % beyond chance (exact binomial, p < 0.001) is a warning, more than 50 % an
    error, three steps in a row. It resolves below 10 %. `completions/max_length` sits at the cap in healthy runs and
    is not used.

    If completions do not end with an end token and are *shorter* than the cap, they were not cut: the end token that
    is counted is not the one the model uses. Then nothing about the cap is proposed. That is decided from
    `completions/at_cap` (less than half of those without an end token), or else from a longest completion below the
    cap while more than 95 % do not end.

    If fewer than 10 % were cut in the run's first 5 steps, and the reward has since collapsed (below where it began, as
    for RL033, or in the newest 3 steps against 30 up to 15 steps earlier, T < -4), the policy has forgotten how to end: the cap is not the cause, and nothing about it is proposed. While
    RL033 fires, this finding is recorded and not shown.

    ## When it is fine

    Stop strings and tool turns may end a completion without an end token. Cut answers that score as well as the others
    do little harm; the confidence is then low.

    ## What to change

    - Raise `max_completion_length` to the smallest multiple of 64 (of 8 below 64) that leaves room for both 1.3 times
      the 99th percentile of the completions that end, and, if the tail of lengths is exponential, for all but 10 %:
      cap * ln(0.1)/ln(share cut); at most twice the old cap. Costs time and memory; not proposed while completions
      grow without reward (RL015).
    - If the completions that end are far shorter than the cap, the cut ones are probably loops: look at them first.
    - `mask_truncated_completions`: cut answers leave the loss. Risk: nothing then pushes towards ending.

    ## Sources

    Overlong filtering: DAPO, arXiv 2503.14476. Below 0.3 healthy, above 0.8 bad: axolotl's documentation. What counts
    as clipped, and that the mean length of those that ended is 0 when none did: TRL's source. 20, 50 and 10 %, the
    factor 1.3 and the exponential tail: judgement.
    """
    name = "completions/clipped_ratio"
    pooled = pool(run, name, p.min_completions)
    if isinstance(pooled, Unknown):
        return pooled
    if not (pooled.mean > p.clear if run.is_firing else pooled.exceeds(p.limit)):
        return None
    old = run.config.get("max_completion_length")
    cap = old if isinstance(old, int) and not isinstance(old, bool) and old > 0 else None
    severity: Severity = "error" if pooled.mean > p.error else "warning"
    if _no_end_token(run, p, pooled, cap):
        return _end_token_finding(run, p, pooled, cap, severity)

    evidence = [pooled.evidence(p.limit)]
    cut_reward, whole_reward = run.median("completions/truncated_reward"), run.median("completions/terminated_reward")
    harmless = False
    paid = ""
    if cut_reward is not None and whole_reward is not None:
        spread = reward_range(run) or 0.0
        harmless = cut_reward >= whole_reward - 0.05 * spread
        paid = f" They score {cut_reward:.3g}, the others {whole_reward:.3g}."
        evidence.append(median_evidence(run, "completions/truncated_reward", cut_reward, whole_reward))
    fell = early_fall(run, *FALL)
    before = run.first(name, START_POINTS)
    if len(before) == START_POINTS and float(before.mean()) < p.clear:
        if not isinstance(fell, Fall):
            fell = recent_fall(run, FALL[0]) or fell
        if isinstance(fell, Fall):
            return _lost_the_end(run, p, pooled, cap, severity, fell, evidence)
        if isinstance(fell, Unknown) and run.segment and run.segment_points < NEWEST_POINTS:
            return Unknown("how the reward moves since the change is not known yet")
    grown = length_growth(run, p.growth, p.min_growth)
    without_reward = grown is not None and not _pays(run, grown[0])
    looping = _ends_early(run, p, pooled, cap)
    raised = _raise_cap(run, p, pooled, cap, looping)
    masked = _mask_truncated(run, pooled)
    look = advise("RL016.3", "Inspect the longest completions for loops and endings that are missed")
    if without_reward and grown is not None:
        penalty = advise(
            "RL016.4",
            "Add a soft penalty for overlong answers to the reward, and keep max_completion_length",
            applicability="template",
            expect=raised.expect,
        )
        suggestions = listed([penalty, look])
    elif looping:
        suggestions = listed([look, raised, masked])
    else:
        suggestions = listed([raised, masked, look])
    reached = "the length cap" if cap is None else f"max_completion_length={cap}"
    return Finding(
        message=f"{pooled.mean:.0%} of {over(run, pooled, 'completions')} reached {reached} (limit {p.limit:.0%}).{paid}",
        advice=consider(suggestions[0]),
        evidence=evidence,
        suggestions=suggestions,
        severity=severity,
        confidence="low" if harmless else ("high" if trials_known(run, name) else "medium"),
        onset_step=None,
        impact="cut answers score as failures, which punishes long correct answers",
        causes=("RL015",) if "RL015" in run.firing else (),
        not_checked=uncounted(run, name, "completions"),
    )


def _no_end_token(run: RunView, p: Params, pooled: PooledWindow, cap: int | None) -> bool:
    """Whether completions count as cut although they are shorter than the cap."""
    at_cap = pool(run, "completions/at_cap", p.min_completions) if run.has("completions/at_cap") else None
    if isinstance(at_cap, PooledWindow):
        return at_cap.mean < 0.5 * pooled.mean
    longest = run.median("completions/max_length")
    return cap is not None and longest is not None and pooled.mean > p.no_end_token and longest < cap - 0.5


def _end_token_finding(run: RunView, p: Params, pooled: PooledWindow, cap: int | None, severity: Severity) -> Finding:
    fix = advise(
        "RL016.1",
        "Check the end token: eos_token_id of the tokenizer and of the generation config, and the chat template",
    )
    longest = run.median("completions/max_length")
    shorter = f"the longest has {longest:.0f} tokens" if longest is not None else "few of them are that long"
    limit = "the cap" if cap is None else f"max_completion_length={cap}"
    evidence = [pooled.evidence(p.limit)]
    at_cap = pool(run, "completions/at_cap", p.min_completions) if run.has("completions/at_cap") else None
    if isinstance(at_cap, PooledWindow):
        evidence.append(Evidence(at_cap.name, "pooled", at_cap.mean, at_cap.n, at_cap.span))
        shorter = f"only {at_cap.mean:.0%} are that long"
    return Finding(
        message=f"{pooled.mean:.0%} of {over(run, pooled, 'completions')} did not end with the end token, but they were "
        f"not cut by {limit}: {shorter}.",
        advice=consider(fix),
        evidence=evidence,
        suggestions=(fix,),
        severity=severity,
        impact="completions are taken for truncated that are not",
        not_checked=uncounted(run, pooled.name, "completions"),
    )


def _ends_early(run: RunView, p: Params, pooled: PooledWindow, cap: int | None) -> bool:
    """Whether what ends does so far below the cap: then what does not end is no tail of the same lengths."""
    p99 = run.median("completions/p99_terminated_length")
    return cap is not None and p99 is not None and pooled.mean <= p.error and p.margin * p99 <= cap


def _raise_cap(run: RunView, p: Params, pooled: PooledWindow, cap: int | None, looping: bool) -> Suggestion:
    expect = Expectation(pooled.name, "below", p.clear, 30, min_n=int(p.min_completions))
    preconditions = ("prompt and completion together fit the model's context, and vLLM's vllm_max_model_length",)
    side_effects = ("sampling and training take longer", "peak memory grows with the completion length")
    if cap is None:
        return advise(
            "RL016.1",
            "Raise max_completion_length",
            applicability="template",
            when="checkpoint",
            preconditions=preconditions,
            side_effects=side_effects,
            expect=expect,
        )
    p99 = run.median("completions/p99_terminated_length")
    new = longer_cap(cap, pooled.mean, p99, p.margin, p.clear)
    return set_field(
        run,
        "RL016.1",
        "max_completion_length",
        new,
        formula="min(2 * old, max(1.3 * p99_terminated, old * ln(target) / ln(clipped))), rounded up",
        inputs={"clipped": round(pooled.mean, 4), "p99_terminated": p99, "target": p.clear, "old": cap},
        preconditions=preconditions,
        side_effects=side_effects,
        risk="high" if looping else "medium",
        expect=expect,
        on_failure="revert and inspect the 16 longest completions",
    )


def longer_cap(old: int, share: float, p99: float | None, margin: float, target: float) -> int:
    """The cap that leaves about `target` of the completions cut, if `share` is cut at `old`; always above `old`.

    The larger of margin * p99 of what ended, and old * ln(target)/ln(share), which an exponential tail asks for; at
    most 2 * old; rounded up to a multiple of 64 (of 8 where `old` is below 64).

    >>> longer_cap(2048, 0.22, 2040, 1.3, 0.10)  # 2048 * ln 0.1 / ln 0.22 = 3114.5
    3136
    """
    unit = 64 if old >= 64 else 8
    tail = old * math.log(target) / math.log(share) if target < share < 1 else 2.0 * old
    need = max(tail, margin * p99 if p99 is not None else 0.0)
    return round_up(max(min(need, 2.0 * old), old + 1), unit)


def _mask_truncated(run: RunView, pooled: PooledWindow) -> Suggestion | None:
    if run.config.get("mask_truncated_completions") is not False or pooled.mean > 0.5:
        return None
    return set_field(
        run,
        "RL016.2",
        "mask_truncated_completions",
        True,
        side_effects=("nothing in the loss pushes towards ending any more; the same completions are still cut",),
        risk="high",
    )


@rule(
    "RL017",
    "length-collapse",
    severity="warning",
    methods=ONLINE_RL,
    needs=("completions/mean_length",),
    every=5,
    for_=3,
    keep=4,
    inhibited_by=(*SILENCED_BY, "RL016"),
    params={"fall": 0.40, "clear": 0.70, "trend_z": 3.5},
)
def length_collapse(run: RunView, p: Params) -> RuleResult:
    """Answers shrink to next to nothing while the reward does not improve.

    ## Why it hurts

    The policy has found that saying little is safe: no reasoning, a refusal, or an end token at once.

    ## How it is decided

    The median of `completions/mean_length` over 10 steps is below 0.4 of its own beginning (steps 3 to 22) and falls
    (over 50 steps: Mann-Kendall z < -3.5 on the logarithm, or the newest 10 below all of the first 25), and the reward
    did not improve since the length last stood at 0.8 of its beginning. It is information where the reward is too
    noisy to say, or a reward function is named for length or brevity. Every 5 steps, three times in a row; it resolves
    above 0.7 of the beginning.

    ## When it is fine

    A verbose model that learns to answer briefly gets shorter while its reward rises: nothing is said. A brevity
    reward asks for it.

    ## What to change

    - If the reward holds a length penalty, its weight in `reward_weights` times 0.3.
    - A stronger KL term: `beta` times 2. In PPO: `lam` from 0.95 to 1.0, which stops the value function from
      shortening long reasoning.

    ## Sources

    PPO shortens long reasoning through value bias: VC-PPO, arXiv 2503.01491. The factors 0.4, 0.7 and 0.3: judgement.
    """
    name = "completions/mean_length"
    now, start = run.median(name), reference(run, name)
    if now is None or start is None:
        return Unknown(f"{name} has fewer than 22 points in this segment")
    if now >= (p.clear if run.is_firing else p.fall) * start:
        return None
    evidence = [median_evidence(run, name, now, start, p.fall * start, "below")]
    if not run.is_firing:
        falls = keeps_moving(run, name, -p.trend_z, log=True)
        if not isinstance(falls, Evidence):
            return falls
        evidence.append(falls)
    reward = reward_since(run, _left_off(run, name, start, 0.8))
    if reward.state in ("up", "rising"):
        return None
    penalties = sorted({n.split("/")[1] for n in run.rings if n.startswith("rewards/") and _about_length(n)})
    unsure = reward.state == "unclear" or bool(penalties)
    expect = Expectation(name, "above", float(math.floor(0.7 * start)), 50, min_n=10)
    beta, lam = run.number("beta"), run.number("lam")
    suggestions = listed(
        [
            advise(
                "RL017.1",
                f"Lower the weight of {', '.join(penalties) or 'any length penalty'} in reward_weights to 0.3 times its value",
                applicability="template",
                when="live" if "reward_weights" in run.facts.get("live_fields", ()) else "checkpoint",
                expect=expect,
            ),
            scale_field(run, "RL017.2", "beta", 2.0, expect=expect) if beta else None,
            set_field(run, "RL017.3", "lam", 1.0, expect=expect)
            if run.method == "ppo" and lam is not None and lam < 1
            else None,
        ]
    )
    return Finding(
        message=f"Completions shrank from {start:.0f} to {now:.0f} tokens ({now / start:.0%} of their beginning, limit "
        f"{p.fall:.0%}); {reward.words}.",
        advice=consider(suggestions[0]),
        evidence=[*evidence, *reward.evidence(run)],
        suggestions=suggestions,
        severity="info" if unsure else "warning",
        confidence="low" if unsure else "medium",
        impact="answers without reasoning",
        not_checked=held_out_unchecked(run),
    )


def _about_length(name: str) -> bool:
    return any(word in name.lower() for word in ("length", "brev", "concise", "short", "overlong"))


# ------------------------------------------------------------------------------------- noise, plateau, collapse


@rule(
    "RL023",
    "noise-amplified-advantage",
    severity="warning",
    methods=GROUPED_RL,
    needs=("groups/tiny_std",),
    inhibited_by=(*SILENCED_BY, "RL004"),
    params={"limit": 0.30, "clear": 0.20, "min_groups": 64, "kept": 0.75},
)
def noise_amplified_advantage(run: RunView, p: Params) -> RuleResult:
    """Groups with next to equal rewards are normalised to full-size advantages.

    ## Why it hurts

    With `scale_rewards="group"` every group's rewards are divided by their own standard deviation. Where the rewards
    differ by noise only, the noise becomes a full-size update.

    ## How it is decided

    More than 30 % of at least 64 groups have a standard deviation above 0 and below 2 % of the reward range seen in
    the run, beyond chance (exact binomial, p < 0.001), and those groups keep at least 75 % of a full advantage, which
    s/(s + 0.0001) does from s = 0.0003 on. Only with `scale_rewards="group"`: with `batch` or `none` such groups have
    hardly any advantage, and below 0.0003 it vanishes (RL001). It resolves below 20 %.

    ## When it is fine

    A finely graded reward whose small differences are real. Score the same 32 completions twice: if the differences
    within groups are larger than those between the two scorings, there is no noise to amplify.

    ## What to change

    - `scale_rewards` to "batch": one standard deviation for all groups. The size of an update changes.
    - Round the reward to the steps that mean something.

    ## Sources

    The normalisation: TRL's source. s/(s + 0.0001) >= 0.75: arithmetic. 2 %, 30 % and 20 %: judgement.
    """
    if scaling(run) != "group":
        return None if scaling(run) is not None else Unknown("scale_rewards is not known")
    pooled = pool(run, "groups/tiny_std", p.min_groups)
    if isinstance(pooled, Unknown):
        return pooled
    if not (pooled.mean > p.clear if run.is_firing else pooled.exceeds(p.limit)):
        return None
    first = pooled.span[0]
    parts = {}
    for name in ("groups/tiny_std", "groups/zero_std", "groups/attenuation"):
        window = run.window(name)
        if window is None:
            return Unknown(f"{name} is not measured")
        parts[name] = float(window.values[window.steps >= first].mean())
    tiny, zero = parts["groups/tiny_std"], parts["groups/zero_std"]
    kept = (parts["groups/attenuation"] - (1 - zero - tiny)) / tiny  # the other groups keep all of theirs
    if kept < p.kept:
        return None
    spread = run.last("rewards/range")
    fix = set_field(
        run,
        "RL023.1",
        "scale_rewards",
        "batch",
        verb="Switch",
        side_effects=("advantages of quiet groups shrink: the effective learning rate changes",),
        expect=_not_worse(run),
    )
    return Finding(
        message=f"{pooled.mean:.0%} of {over(run, pooled, 'groups')} differ in reward by less than 2% of its range "
        f"({spread:.3g}), yet scale_rewards='group' gives them {kept:.0%} of a full advantage (limit {p.limit:.0%})."
        if spread is not None
        else f"{pooled.mean:.0%} of {over(run, pooled, 'groups')} have next to equal rewards and {kept:.0%} of a full "
        f"advantage (limit {p.limit:.0%}).",
        advice=consider(fix),
        evidence=[
            pooled.evidence(p.limit),
            Evidence("groups/attenuation", "mean", parts["groups/attenuation"], pooled.n, pooled.span),
        ],
        suggestions=(
            fix,
            advise(
                "RL023.2",
                "Check the reward by scoring the same 32 completions twice, and round it to steps that mean something",
            ),
        ),
        confidence="medium",
        impact="noise in the reward becomes full-size updates",
        not_checked=("repeatability of the reward: not measured", *uncounted(run, "groups/tiny_std", "groups")),
    )


def _not_worse(run: RunView) -> Expectation | None:
    two = run.two(REWARD, 25)
    if two is None:
        return None
    return Expectation(REWARD, "above", float(f"{two.mean2 - 2.8 * two.se:.3g}"), 100, min_n=25)


@rule(
    "RL031",
    "plateau",
    severity="info",
    methods=ONLINE_RL,
    needs=("reward",),
    every=50,
    for_=1,
    keep=2,
    inhibited_by=(*SILENCED_BY, "RL033", "RL004", "RL016", "RL003", "RL002", "RL001"),
    params={"mde_share": 0.05, "ceiling": 0.95, "flat_t": 2.0, "dead": 0.60},
)
def plateau(run: RunView, p: Params) -> RuleResult:
    """The reward has not moved for long, and a change would have shown.

    ## Why it hurts

    It does not, but it costs: the run goes on without gaining anything.

    ## How it is decided

    Of 100, 200, 400 and 512 steps, the shortest span is taken over which a change of 5 % of the reward range would
    show (5 % error, 80 % power: 5.6 standard errors of the difference between its halves). Over that span the reward
    must have changed by less than that, with 95 % confidence, the halves must not differ (|T| < 2), and no
    neighbouring quarters significantly (|T| < 3.5). Groups must carry a signal (else RL001). Every 50 steps.

    If even 512 steps cannot show a change of 5 %, the answer is unknown, with the change that would show: a run with
    16 completions a step cannot tell a plateau from a gain of 0.05 in 100 steps.

    ## When it is fine

    Above 95 % of the range the run has converged, and nothing is said. A pause before the next gain is possible.

    ## What to change

    - Stop, or use harder prompts.
    - Learning rate times 1.5, or `num_generations` times 2, one at a time. Risk: tuning for nothing.

    ## Sources

    The minimum detectable effect: two-sample arithmetic with the design effect of serial correlation. Asymptote
    against efficiency: ScaleRL, arXiv 2510.13786. 5 % and 95 %: judgement.
    """
    flat = flat_reward(run, p.mde_share, p.flat_t)
    if not isinstance(flat, Flat):
        return flat
    steps, halves, level, spread = flat.steps, flat.halves, flat.level, flat.spread
    best, worst = run.last("rewards/max_seen"), run.last("rewards/min_seen")
    if best is not None and worst is not None and best > worst and level >= worst + p.ceiling * (best - worst):
        return None  # converged
    dead = dead_groups(run)
    if isinstance(dead, DeadGroups) and float(dead.shares[-50:].mean()) > p.dead:
        return None
    hurried = Expectation(REWARD, "above", float(f"{level + flat.mde:.3g}"), steps, min_n=25)
    generations = run.config.get("num_generations")
    suggestions = listed(
        [
            advise("RL031.1", "Stop here, or use harder prompts", applicability="template"),
            scale_field(run, "RL031.2", "learning_rate", 1.5, expect=hurried, risk="medium"),
            set_field(run, "RL031.3", "num_generations", 2 * generations, formula="2 * old", expect=hurried)
            if isinstance(generations, int) and run.method in GROUPED_RL
            else None,
        ]
    )
    entropy, entropy_start = run.median("entropy"), reference(run, "entropy")
    low = entropy is not None and entropy_start is not None and 0 < entropy < 0.3 * entropy_start
    return Finding(
        message=f"The reward is flat at {level:.3g}: {halves.mean1:.3g} -> {halves.mean2:.3g} over {steps} steps, and a "
        f"change of {flat.mde:.2g} ({flat.mde / spread:.1%} of its range) would have shown.",
        advice=consider(suggestions[0]) + (" Entropy is low: see RL005." if low else ""),
        evidence=[
            Evidence(REWARD, "two_window_t", halves.t, steps, span(run, REWARD, steps), halves.mean1, p.flat_t),
            Evidence(
                REWARD,
                "minimum_detectable_effect",
                flat.mde,
                steps,
                span(run, REWARD, steps),
                threshold=p.mde_share * spread,
            ),
        ],
        suggestions=suggestions,
        confidence="medium" if run.has("rewards/range") else "low",
        impact="the run goes on without gaining anything",
        not_checked=held_out_unchecked(run),
    )


# Signals that move before or with a collapse, the direction that hurts, and the rules that speak of them.
LEADERS: tuple[tuple[str, stats.Direction, tuple[str, ...]], ...] = (
    ("grad_norm", "up", ("NUM006", "NUM005")),
    ("entropy", "both", ("RL006", "RL005")),
    ("kl", "up", ("RL007",)),
    ("policy/approx_kl", "up", ()),
    ("clip_ratio/region_mean", "up", ("RL009",)),
    ("sampling/sampling_logp_difference/mean", "up", ("RL012",)),
    ("completions/mean_length", "both", ("RL015", "RL017")),
    ("completions/clipped_ratio", "up", ("RL016",)),
    ("learning_rate", "up", ("NUM010",)),
)


def _lost_the_end(
    run: RunView,
    p: Params,
    pooled: PooledWindow,
    cap: int | None,
    severity: Severity,
    fell: Fall,
    evidence: list[Evidence],
) -> Finding:
    """Completions ended at first, then the policy collapsed and they no longer do."""
    reached = "the length cap" if cap is None else f"max_completion_length={cap}"
    name = pooled.name
    return Finding(
        message=f"{pooled.mean:.0%} of {over(run, pooled, 'completions')} reached {reached} (limit {p.limit:.0%}), "
        f"after {run.first(name, START_POINTS).mean():.0%} at the start: they stopped ending when the reward fell.",
        advice="Consider a lower learning_rate from an earlier checkpoint (RL033), not a higher cap.",
        evidence=[*evidence, Evidence(REWARD, "fall_t", fell.t, fell.n, span(run, REWARD, 10), fell.start)],
        suggestions=(advise("RL016.5", "Look at RL033 first: a higher cap only makes the loops longer"),),
        severity=severity,
        confidence="medium",
        onset_step=fell.onset,
        impact="the policy no longer ends its answers",
        explained_by=("RL033",),
    )


@rule(
    "RL033",
    "reward-collapse",
    severity="error",
    methods=ONLINE_RL,
    needs=("reward",),
    every=5,
    for_=2,
    keep=4,
    inhibited_by=SILENCED_BY,
    params={
        "t": 4.0,
        "slow_t": 6.0,
        "share_of_gain": 0.25,
        "clear": 0.125,
        "gain_errors": 6.0,
        "min_share": 0.05,
        "share_of_range": 0.25,
        "early_t": FALL[0],
        "early_share_of_start": FALL[1],
        "early_share_of_range": FALL[2],
    },
)
def reward_collapse(run: RunView, p: Params) -> RuleResult:
    """The reward has fallen far from the best it had reached.

    ## Why it hurts

    What the run had learned is being lost, and every further step makes the way back longer.

    ## How it is decided

    The newest 25 steps against the best 30 or so steps of the run (block means). They must have fallen significantly:
    against the 25 steps before with T < -4, or against the best window of this segment with T < -6. And far: by more
    than 25 % of what the run had gained over its first 20 steps. A gain counts as one when it is 6 standard errors and
    5 % of the reward range; a run that never rose must fall by 25 % of the range instead, and every fall must be 5 %
    of the range. Every 5 steps, twice in a row. It resolves when the reward is within 12.5 % of the gain of its best.

    Early, before there are 50 steps: the newest 10 steps against the run's first 5, with the standard error that the
    spread and number of the completions imply (design effect of groups included). T < -4 and a fall by half of the
    starting level and by 10 % of the reward range is a collapse below where the run began.

    Signals that left their course in the last 150 steps (gradient norm, entropy, KL, clipping, lengths) are listed
    with the step at which they began, the earliest first: it is the likeliest cause, and no proof.

    ## When it is fine

    Harder prompts (a curriculum), another mix, or a changed reward function make the reward fall without any harm; a
    bad batch is over before it is significant.

    ## What to change

    - Go back to the checkpoint before the fall and train on with 0.3 of the learning rate, after fixing what moved
      first. A run that trains can do this by itself, if it has written a checkpoint by then. Where 0.3 has been tried
      and failed, 0.1. Risk: the steps since the checkpoint are lost.
    - Or lower the learning rate and go on. Risk: a policy that has collapsed may give no signal to learn from.

    ## Sources

    Collapse patterns: arXiv 2505.07291. T < -4 and 25 % of the gain: judgement; -6 allows for the best window being
    chosen after the fact.
    """
    fell = early_fall(run, p.early_t, p.early_share_of_start, p.early_share_of_range)
    if isinstance(fell, Fall):
        return _fallen_below_start(run, p, fell)
    window = run.window(REWARD, CAPACITY, min_n=50)
    blocks = run.blocks(REWARD)
    start = run.first(REWARD, 22)[2:]
    if window is None or len(blocks) < 3 or len(start) < 20:
        if fell is None and run.is_firing:
            return None  # it is back near its start
        return Unknown("the reward has fewer than 50 points in this segment")
    values = window.values
    now = float(values[-25:].mean())
    best, best_step = _best(blocks)
    initial = float(start.mean())
    if now >= best:
        return None
    spread = reward_range(run)
    gain, drop = best - initial, best - now
    if spread is not None and drop < p.min_share * spread and not run.is_firing:
        return None
    fast = stats.two_window(values[-50:-25], values[-25:])
    slow = _against_best(values)
    if fast is None or not (run.is_firing or fast.t < -p.t or (slow is not None and slow.t < -p.slow_t)):
        return None
    gained = gain > p.gain_errors * fast.se and gain >= p.min_share * (spread or 0.0)
    if not gained and spread is None:
        return Unknown("the reward fell, but neither its range nor a gain is known to compare the fall with")
    scale, share = (gain, p.share_of_gain) if gained else (spread or 0.0, p.share_of_range)
    if run.is_firing:
        if drop <= (p.clear if gained else p.share_of_range / 2) * scale:
            return None
    elif drop <= share * scale:
        return None
    moved = _moved_before(run)
    firing = [code for _, _, codes in LEADERS for code in codes if code in run.firing]
    onset = _onset(window.steps, values, best, now)
    earlier = {code for name, _, codes in LEADERS for code in codes if _moved_by(moved, name, onset)}
    fix = scale_field(
        run,
        "RL033.1",
        "learning_rate",
        0.3,
        when="earlier_checkpoint",
        preconditions=(f"a checkpoint from about step {best_step}", "what moved first is fixed"),
        expect=Expectation(REWARD, "above", float(f"{best - 0.1 * scale:.3g}"), 100, min_n=25),
    )
    of_what = f"{drop / scale:.0%} of " + ("what it had gained" if gained else "its range")
    first = f" First to move: {moved[0].signal} at step {moved[0].window[0]}." if moved else ""
    t, statistic = (fast.t, "two_window_t") if fast.t < -p.t or slow is None else (slow.t, "two_window_t_against_best")
    return Finding(
        message=f"The reward fell from {best:.3g} (around step {best_step}) to {now:.3g}, {of_what} "
        f"(limit {share:.0%}).{first}",
        advice=f"Consider going back to the checkpoint before step {best_step} with "
        + _from_to(fix)
        + (f", after looking at {moved[0].signal}." if moved else "."),
        evidence=[
            Evidence(REWARD, statistic, t, 50, span(run, REWARD, 50), best, -p.t, "below"),
            *moved,
        ],
        suggestions=(fix,),
        confidence="high" if fast.t < -p.t and gained else "medium",
        onset_step=onset,
        impact="what was learned is being lost",
        causes=tuple(code for code in firing if code in earlier),
        not_checked=("whether prompts or reward changed: not measured", *held_out_unchecked(run)),
    )


def _fallen_below_start(run: RunView, p: Params, fell: Fall) -> Finding:
    moved = _moved_before(run)
    low = run.last("rewards/min_seen") or 0.0
    back = float(f"{fell.now + 0.7 * (fell.start - fell.now):.3g}")
    expect = Expectation(REWARD, "above", back, 50, min_n=10)
    factor = 0.1 if tried_and_failed(run, "learning_rate", 0.3) else 0.3
    again = scale_field(
        run,
        "RL033.1",
        "learning_rate",
        factor,
        when="earlier_checkpoint",
        preconditions=(f"a checkpoint from before step {fell.onset}",),
        expect=expect,
    )
    on = scale_field(run, "RL033.2", "learning_rate", factor, expect=expect, risk="high")
    return Finding(
        message=f"The reward collapsed from {fell.start:.3g} in the run's first {START_POINTS} steps to {fell.now:.3g} "
        f"(T={fell.t:.1f}, limit -{p.early_t:g}), from about step {fell.onset}.",
        advice=f"Consider going back to a checkpoint before step {fell.onset} with {_from_to(again)}.",
        evidence=[
            Evidence(REWARD, "early_fall_t", fell.t, fell.n, span(run, REWARD, 10), fell.start, -p.early_t, "below"),
            *moved,
        ],
        suggestions=(again, on),
        explained_by=("RL004",) if _all_equal(run) and not policy_moved(run) else (),
        confidence="high" if fell.now <= low + 0.1 * (fell.start - low) else "medium",
        onset_step=fell.onset,
        impact="what the model could do before training is being lost",
        causes=tuple(code for _, _, codes in LEADERS for code in codes if code in run.firing and code != "RL016"),
        not_checked=("whether prompts or reward changed: not measured", *held_out_unchecked(run)),
    )


def _all_equal(run: RunView) -> bool:
    """Whether every one of the newest 10 rewards is the same."""
    window = run.window(REWARD, NEWEST_POINTS)
    return window is not None and float(window.values.min()) == float(window.values.max())


def _best(blocks: list[tuple[float, float, float]]) -> tuple[float, int]:
    """The best mean of consecutive blocks that hold at least 25 points, and its last step."""
    best, best_step = -math.inf, 0
    for i in range(len(blocks)):
        total = points = 0.0
        for j in range(i, len(blocks)):
            step, mean, n = blocks[j]
            total, points = total + mean * n, points + n
            if points >= 25:
                if total / points > best:
                    best, best_step = total / points, int(step)
                break
    return best, best_step


def _against_best(values: Array) -> stats.TwoWindow | None:
    """The newest 25 points against the best 30 consecutive ones of the segment before them."""
    earlier = values[:-25]
    if len(earlier) < 60:
        return None
    sums = np.convolve(earlier, np.ones(30), "valid")
    at = int(sums.argmax())
    return stats.two_window(earlier[at : at + 30], values[-25:])


def _onset(steps: Array, values: Array, best: float, now: float) -> int:
    """The step after the last one at which a 5-point mean was within a quarter of the fall from the best."""
    means = np.convolve(values, np.ones(5) / 5, "valid")
    high = np.flatnonzero(means >= best - 0.25 * (best - now))
    at = min(int(high[-1]) + 5, len(steps) - 1) if len(high) else 0
    return int(steps[at])


def _moved_before(run: RunView) -> list[Evidence]:
    """Signals that left their course within the last 150 points (CUSUM* on logarithms), the earliest first."""
    found = []
    for name, direction, _ in LEADERS:
        window = run.window(name, 150, min_n=80)
        if window is None or name == "learning_rate" or window.values.min() <= 0:
            continue
        logs = np.log(window.values)
        drift = stats.Cusum.fit(logs[:50], sd_floor=0.1, direction=direction, h=10.0)
        if drift is None or drift.first_alarm(logs[50:]) is None:
            continue
        onset = 50 + drift.onset
        span = (int(window.steps[onset]), window.span[1])
        start, end = stats.median(window.values[:50]), stats.median(window.values[-10:])
        found.append(Evidence(name, "cusum", end, len(window), span, baseline=start))
    return sorted(found, key=lambda e: e.window[0])


def _moved_by(moved: list[Evidence], name: str, step: int) -> bool:
    """Whether a signal had left its course by a step: what moved later is no cause."""
    return any(e.signal == name and e.window[0] <= step for e in moved)


def _from_to(suggestion: Suggestion) -> str:
    return suggestion.title.partition(" ")[2]
