"""Numerics and optimisation: values that are not finite, spikes, dead gradients, divergence."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from outspoken.diagnostics import signals as signal_table
from outspoken.diagnostics import stats
from outspoken.diagnostics.records import (
    Confidence,
    Evidence,
    Expectation,
    Finding,
    Severity,
    Suggestion,
    Unknown,
    change_field,
)
from outspoken.diagnostics.rules.fixes import advise, consider, listed, say, scale_field, set_field, when_of
from outspoken.diagnostics.rules.registry import (
    ANY_METHOD,
    DISTILLATION,
    GROUPED_RL,
    ONLINE_RL,
    PREFERENCE,
    SUPERVISED,
    Params,
    rule,
)
from outspoken.diagnostics.view import CAPACITY, RunView, Window

# Methods whose loss falls while all is well. The loss of group-based RL hovers at 0 and says nothing.
LOSS_FALLS = (*SUPERVISED, *PREFERENCE, *DISTILLATION, "unknown")

# Signals that are computed from the same log-probabilities as the loss: if one is not finite, neither was the loss of
# some batch. Left out: logits/*, a plain mean over padding too, which is -inf or NaN in healthy runs; KTO's, whose
# batches may hold no chosen answer at all; every rewards/<function>/*, NaN where a function scores nothing.
SIBLINGS_PREFERENCE = ("logps/chosen", "logps/rejected", "rewards/chosen", "rewards/rejected", "rewards/margins")
SIBLINGS_RL = ("kl", "entropy", "policy/approx_kl")

HISTORY = 50  # points before a spike that it is compared with
MIN_HISTORY = 20
SPARSE = 4  # times further back, where most steps have nothing to compare with
NEWEST = 30  # points that a divergence has to last


def is_rl(run: RunView) -> bool:
    """Whether the loss is a policy-gradient loss: by the method, or for an unknown one by the rewards it logs."""
    return run.method in ONLINE_RL or (run.method == "unknown" and (run.has("reward") or run.has("kl")))


def _precision(run: RunView) -> Literal["fp16", "wide", "unknown"]:
    """Whether a loss scaler skips steps by design ("fp16"), or not, or nobody knows."""
    if run.config.get("fp16") is True:
        return "fp16"
    return "wide" if "fp16" in run.config or "bf16" in run.config else "unknown"


def lower_learning_rate(
    run: RunView, id: str, factor: float, *, more: Sequence[tuple[str, Any, Any]] = (), **rest: Any
) -> Suggestion:
    """`learning_rate` times `factor`, with `more` fields (name, old, new) in the same patch; `rest` as in `set_field`.

    Without a patch if the config does not tell the present value. A change that can be made live stays so: fields that
    would need a restart are then left out.
    """
    rest.setdefault("risk", "low")
    cut = scale_field(run, id, "learning_rate", factor, side_effects=("slower learning",), **rest)
    if cut.when == "live":
        more = [change for change in more if when_of(run, change[0]) == "live"]
    if not cut.patch or not more:
        return cut
    ops = [op for name, old, new in more for op in change_field(name, old, new)]
    return replace(cut, title=f"{cut.title}, {_changes(ops)}", patch=[*cut.patch, *ops])


def _changes(patch: Sequence[Mapping[str, Any]]) -> str:
    """A patch of test and replace pairs in words: "learning_rate from 2e-05 to 1e-05 and …"."""
    pairs = zip(patch[::2], patch[1::2])
    return " and ".join(f"{op['path'][1:]} from {say(test['value'])} to {say(op['value'])}" for test, op in pairs)


def changes_of(suggestion: Suggestion, otherwise: str) -> str:
    """The suggestion's patch in words, or `otherwise` if it has none."""
    return _changes(suggestion.patch) if suggestion.patch else otherwise


def _clipping_on(run: RunView) -> list[tuple[str, Any, Any]]:
    """The change to max_grad_norm = min(1, old), as (name, old, new); nothing if it is unknown or already so."""
    if "max_grad_norm" not in run.config:
        return []
    old = run.number("max_grad_norm", 0.0)
    if old is not None and 0 < old <= 1:
        return []
    return [("max_grad_norm", run.config["max_grad_norm"], 1.0)]


# ---------------------------------------------------------------------------------------------------- not finite


@rule("NUM001", "nonfinite-loss", severity="error", for_=1, keep=20, warm_up=False, params={"lr_factor": 0.5})
def nonfinite_loss(run: RunView, p: Params) -> Finding | None:
    """The loss, the gradients or the weights are NaN or infinite.

    ## Why it hurts

    One optimizer step with a NaN gradient turns every weight it touches into NaN. From then on each step, and each
    checkpoint, is lost.

    ## How it is decided

    `loss` is not finite at this step, or `parameters/nonfinite` is above 0 ("the weights are corrupted"), or
    `grad/nonfinite` is above 0 and no fp16 loss scaler would have skipped the step. At once: no warm-up, no second
    look. On a live run the loss is read in the training step, before the logger's filter. The other signals do not
    count here; NUM002 reads those that share the loss's log-probabilities.

    ## When it is fine

    Never for the loss. NaN in optional metrics (a reward function that scored no completion, statistics of tools that
    were not called, `logits/*` over padding) is ordinary and is not read. Under fp16 a gradient that is not finite
    belongs to the search for the loss scale.

    ## What to change

    - Resume from the last checkpoint before the first bad step with `learning_rate` x0.5 and `max_grad_norm` at most
      1. Risk low; it comes back if one example is to blame.
    - Look at the batch of that step: a row without labels (DAT003), an empty completion, a huge number.

    ## Sources

    PaLM (arXiv 2204.02311) restarts from before a spike and skips batches. The factor 0.5 is *judgement*.
    """
    kind = run.nonfinite_now.get("loss")
    corrupted = run.last("parameters/nonfinite") or 0.0
    bad_grads = 0.0
    ring = run.rings.get("grad/nonfinite")
    if ring is not None and ring.last_step == run.step and _precision(run) == "wide":
        bad_grads = run.last("grad/nonfinite") or 0.0
    if kind is None and corrupted <= 0 and bad_grads <= 0:
        return None

    last = run.window("loss", 1)
    parts, evidence = [], []
    here = (run.step, run.step)
    if kind is not None:
        finite = f" (last finite value {last.values[0]:.4g} at step {int(last.steps[0])})" if last else ""
        parts.append(f"loss is {kind} at step {run.step}{finite}")
        evidence.append(
            Evidence("loss", "value", None, 1, here, baseline=float(last.values[0]) if last is not None else None)
        )
    if bad_grads > 0:
        parts.append(f"{bad_grads:.0f} gradient elements are not finite at step {run.step}")
        evidence.append(Evidence("grad/nonfinite", "value", bad_grads, 1, here, threshold=0, direction="above"))
    if corrupted > 0:
        parts.append(f"{corrupted:.0f} sampled parameter elements are not finite: the weights are corrupted")
        evidence.append(Evidence("parameters/nonfinite", "value", corrupted, 1, here, threshold=0, direction="above"))

    steps = [s for name in ("loss", "grad_norm") for s in run.nonfinite.get(name, ()) if s >= run.segment_start]
    onset = min([run.step, *steps])
    expect = None
    if run.has("parameters/nonfinite"):
        expect = Expectation("parameters/nonfinite", "below", 0, within_steps=50, min_n=1)
    resume = _resume_slower(run, "NUM001.1", p.lr_factor, onset, expect)
    changes = changes_of(resume, f"learning_rate to {p.lr_factor:g} times its value and max_grad_norm to at most 1")
    causes = [code for code in ("DAT003", "NUM015") if code in run.firing]
    first = "Stop. Rows without labels come first (DAT003); then resume" if "DAT003" in causes else "Stop and resume"
    return Finding(
        message="; ".join(parts) + ".",
        advice=f"{first} from a checkpoint before step {onset}, changing {changes}.",
        evidence=evidence,
        suggestions=listed((resume, _look_at_batch("NUM001.2", onset), _to_bf16(run, "NUM001.3"))),
        confidence="high",
        onset_step=onset,
        impact="every further step trains on, and saves, damaged weights",
        causes=causes,
        not_checked=() if run.has("parameters/nonfinite") else ("parameters/nonfinite: not measured",),
    )


def _resume_slower(run: RunView, id: str, factor: float, onset: int, expect: Expectation | None = None) -> Suggestion:
    return lower_learning_rate(
        run,
        id,
        factor,
        more=_clipping_on(run),
        when="earlier_checkpoint",
        expect=expect,
        preconditions=(f"a checkpoint from before step {onset}",),
    )


def _look_at_batch(id: str, step: int) -> Suggestion:
    return advise(id, f"Inspect the batch of step {step}", inputs={"step": step}, risk="low")


def _to_bf16(run: RunView, id: str) -> Suggestion | None:
    """fp16 -> bf16. Not in RL, where fp16 may be meant to bring sampler and trainer together (arXiv 2510.26788)."""
    if run.config.get("fp16") is not True or "bf16" not in run.config or is_rl(run):
        return None
    return Suggestion(
        id,
        "Train in bf16 instead of fp16",
        "suggest",
        "earlier_checkpoint",
        patch=change_field("fp16", True, False) + change_field("bf16", run.config["bf16"], True),
        preconditions=("the device supports bf16",),
        side_effects=("8 instead of 11 significant bits",),
        risk="low",
    )


@rule(
    "NUM002",
    "nan-masked-by-logger",
    severity="error",
    for_=1,
    keep=10,
    warm_up=False,
    inhibited_by=("NUM001", "DAT003"),
    params={"points": 2, "of": 3, "points_fp16": 10, "points_unknown": 5},
)
def nan_masked_by_logger(run: RunView, p: Params) -> Finding | None:
    """The logged loss looks fine, but what it is made of is NaN.

    ## Why it hurts

    `logging_nan_inf_filter=True`, the default of `transformers`, replaces a NaN loss in the logged average by the mean
    of the others, or by 0. The run is dead and its curve looks plausible.

    ## How it is decided

    Error: `grad_norm` is not finite in 2 of its last 3 points; or, outside RL, `loss` is exactly 0 while `grad_norm`,
    `eval_loss`, `logps/*` or the preference `rewards/*` are not finite; or one of the latter in 2 of its last 3
    points. Warning: one such point, or `kl`, `entropy` or `policy/approx_kl` not finite in 2 of the last 3 points of an
    RL run.

    ## When it is fine

    A loss of 0 alone is normal in group-based RL, where advantages cancel. Under fp16 the loss scaler skips steps with
    an infinite gradient: 10 in a row are needed; 5 if the precision is not known. `logits/*` (a mean over padding),
    KTO's `rewards/*` (a batch may hold no chosen answer) and `rewards/<function>/*` are not read.

    ## What to change

    - `logging_nan_inf_filter` True -> False: shows the true loss, changes nothing in training. Needs a restart.
    - An error is then treated as NUM001 is: resume from before the first NaN with `learning_rate` x0.5.
    - A warning: look at the batch. One example may be to blame.

    ## Sources

    The filter and its default: `transformers.TrainingArguments`. A loss of 0 in healthy GRPO: open-r1 issue 239, TRL
    issue 3452. The counts are *judgement*.
    """
    if not run.nonfinite:
        return None
    rl = is_rl(run)
    zero_loss = not rl and run.last("loss") == 0.0
    severity: Severity | None = None
    confidence: Confidence = "high"
    found: list[tuple[str, int, int, int]] = []  # signal, bad points, points, how many were needed

    precision = _precision(run)
    need, of = {
        "wide": (int(p.points), int(p.of)),
        "fp16": (int(p.points_fp16), int(p.points_fp16)),
        "unknown": (int(p.points_unknown), int(p.points_unknown)),
    }[precision]
    if "grad_norm" in run.nonfinite:
        bad, n = run.share_nonfinite("grad_norm", of)
        if bad >= need or (zero_loss and "grad_norm" in run.nonfinite_now):
            found.append(("grad_norm", bad, n, need))
            severity = "error"
            confidence = "low" if precision == "unknown" and not zero_loss else "high"
    siblings: tuple[str, ...] = ("eval_loss",)
    if rl:
        siblings = SIBLINGS_RL
    elif run.method != "kto":
        siblings = ("eval_loss", *SIBLINGS_PREFERENCE)
    for name in siblings:
        if name not in run.nonfinite:
            continue
        bad, n = run.share_nonfinite(name, int(p.of))
        often = bad >= p.points
        if not often and (rl or name not in run.nonfinite_now):
            continue
        found.append((name, bad, n, int(p.points)))
        worse: Severity = "error" if not rl and (often or zero_loss) else "warning"
        severity = "error" if "error" in (severity, worse) else "warning"
    if not found or severity is None:
        return None

    name, bad, n, need = found[0]
    last = run.last("loss")
    shown = "the logged loss" if run.source == "log" else "loss"
    loss = f"while {shown} is {last:.4g}" if last is not None else "and no finite loss is logged"
    others = f" ({', '.join(f[0] for f in found[1:])} too)" if len(found) > 1 else ""
    bad_steps = sorted(s for f in found for s in run.nonfinite[f[0]] if s >= run.segment_start)
    onset = min(bad_steps, default=run.step)
    suggestions = []
    show = "Set logging_nan_inf_filter=False to see the true loss"
    if run.config.get("logging_nan_inf_filter") is True:
        show = "Consider changing logging_nan_inf_filter from True to False to see the true loss"
        shows = set_field(run, "NUM002.1", "logging_nan_inf_filter", False, when="checkpoint", risk="low")
        suggestions.append(replace(shows, applicability="auto"))  # it changes what is shown, not what is learned
    elif run.config.get("logging_nan_inf_filter") is False:
        show = "The log is not filtered, so the loss of that batch is right and something behind it is not"
    if severity == "error":
        resume = _resume_slower(run, "NUM002.2", 0.5, onset)
        suggestions += listed((resume, _to_bf16(run, "NUM002.3")))
        changes = changes_of(resume, "learning_rate to half and max_grad_norm to at most 1")
        then = f"resume from a checkpoint before step {onset}, changing {changes}"
    else:
        suggestions.append(_look_at_batch("NUM002.2", bad_steps[-1] if bad_steps else run.step))
        then = f"look at the batch of step {bad_steps[-1] if bad_steps else run.step}"
    count = f"in {bad} of its last {n} points" if n > 1 else f"at step {run.nonfinite[name][-1]}"
    return Finding(
        message=f"{name} is not finite {count}{others} {loss}.",
        advice=f"{show}, and {then}.",
        evidence=[
            Evidence(
                f,
                "nonfinite_count",
                bad_,
                n_,
                (run.nonfinite[f][0], run.nonfinite[f][-1]),
                threshold=t,
                direction="above",
            )
            for f, bad_, n_, t in found
        ],
        suggestions=suggestions,
        severity=severity,
        confidence=confidence,
        onset_step=onset,
        impact="batches with a NaN loss are trained on while the logged loss looks plausible",
        causes=[code for code in ("DAT003",) if code in run.firing],
        not_checked=()
        if precision != "unknown"
        else ("fp16, bf16: not in the config, so skipped steps may be by design",),
    )


# -------------------------------------------------------------------------------------------------------- spikes


def _near_a_break(run: RunView, points: int = 10) -> str | None:
    """A reason why the loss may jump now: a new epoch or a restarted schedule within the last `points` points."""
    epoch = run.window("epoch", points + 1)
    if epoch is not None and len(epoch) > 1 and math.floor(epoch.values[-1]) > math.floor(epoch.values[0]):
        return "a new epoch began"
    lr = run.window("learning_rate", points + 1)
    if lr is not None and len(lr) > 1:
        lowest = float(lr.values.min())
        if lr.values[-1] > 2 * lowest and run.step > run.warmup_steps + points:
            return "the learning rate was raised"
    return None


def _level(history: NDArray[np.float64], floor: float) -> tuple[float, float]:
    """Median and robust standard deviation, the latter at least `floor` times the median's size."""
    median = stats.median(history)
    return median, max(stats.mad_sd(history), floor * abs(median), 1e-12)


@rule(
    "NUM004",
    "loss-spike",
    severity="warning",
    methods=LOSS_FALLS,
    needs=("loss",),
    for_=1,
    keep=10,
    inhibited_by=("NUM001", "NUM009"),
    params={"z": 6.0, "sd_floor": 0.05, "points": 3, "stay": 20, "single_ratio": 2.0, "again_within": 200},
)
def loss_spike(run: RunView, p: Params) -> Finding | Unknown | None:
    """The loss jumps up.

    ## Why it hurts

    Most spikes pass. Those that do not are the first steps of a divergence, and every spike that a large step caused
    leaves Adam's moments bent for a while.

    ## How it is decided

    Three consecutive points more than 6 robust standard deviations above the median of the 50 points before them; the
    standard deviation counts as at least 5 % of the median, so the jump is at least 30 %. It is an error when 18 of 20
    points stay that high. One high point is information, and only if it also stands out on a log scale
    and is more than twice the median. The comparison moves along, because the loss falls. RL losses are not read.

    ## When it is fine

    Within 10 points after a new epoch or a raised learning rate nothing is said. A change of data mixture looks the
    same; a resumed run starts afresh.

    ## What to change

    - First spike: nothing. Look at the batch.
    - A second one within 200 steps: `learning_rate` x0.5, and `max_grad_norm` 1 where clipping is off or looser.
    - Not recovered: resume from before it, with `learning_rate` x0.5, and skip the batch.

    ## Sources

    Spikes and restarts: PaLM (arXiv 2204.02311); arXiv 2304.13013, 2312.16903. Of healthy series without outliers,
    about 1 % reach 6 robust standard deviations once in 1000 steps (simulated; .2 with strong autocorrelation); three in
    a row, and 20 points, are *judgement*.
    """
    k, stay = int(p.points), int(p.stay)
    window = run.window("loss", HISTORY + stay, min_n=MIN_HISTORY + k)
    if window is None:
        return Unknown(f"loss: fewer than {MIN_HISTORY + k} points in this segment")
    if is_rl(run):
        return None
    values = window.values
    last = float(values[-1])
    before = values[-HISTORY - k : -k]
    median = stats.median(before)
    older = values[:-stay] if len(values) >= MIN_HISTORY + stay else None
    old_median = stats.median(older) if older is not None else math.inf
    if last - median <= p.z * p.sd_floor * abs(median) and last - old_median <= p.z * p.sd_floor * abs(old_median):
        return None

    if older is not None:
        level, sd = _level(older, p.sd_floor)
        bound = level + p.z * sd
        high = np.count_nonzero(values[-stay:] > bound) >= 0.9 * stay
        if high and stats.median(values[-10:]) > bound and not _near_a_break(run, stay + 10):
            return _spike_finding(run, p, "error", stay, level, sd, values[-stay:], window.steps[-stay:])
    median, sd = _level(before, p.sd_floor)
    high = (values[-k:] - median) / sd > p.z
    if not high[-1] or _near_a_break(run):
        return None
    if high.all():
        return _spike_finding(run, p, "warning", k, median, sd, values[-k:], window.steps[-k:])
    z = stats.zlog(last, before, 0.05) if last > 0 and (before > 0).all() else p.z + 1
    if z is not None and z > p.z and last > p.single_ratio * abs(median):
        return _spike_finding(run, p, "info", 1, median, sd, values[-1:], window.steps[-1:])
    return None


def _spike_finding(
    run: RunView,
    p: Params,
    severity: Severity,
    n: int,
    level: float,
    sd: float,
    values: NDArray[np.float64],
    steps: NDArray[np.float64],
) -> Finding:
    top, onset = float(values.max()), int(steps[0])
    z = (float(values.min()) - level) / sd
    repeated = severity == "warning" and _earlier_spikes(run, p, onset) > 0
    expect = Expectation("loss", "below", float(f"{level + 2 * sd:.4g}"), within_steps=30)
    look = _look_at_batch("NUM004.1", onset)
    suggestions = [look]
    if severity == "error":
        cut = _resume_slower(run, "NUM004.2", 0.5, onset, expect)
        words = changes_of(cut, "learning_rate to half")
        advice = f"It has not recovered: resume from a checkpoint before step {onset}, changing {words}."
        suggestions = [cut, look]
    elif repeated:
        cut = lower_learning_rate(run, "NUM004.2", 0.5, expect=expect, more=_clipping_on(run))
        words = changes_of(cut, "learning_rate to half")
        advice = f"It is not the first within {p.again_within:.0f} steps. Consider changing {words}."
        suggestions = [cut, look]
    else:
        advice = f"Most spikes pass: change nothing yet, and look at the batch of step {onset}."
    for_points = f"for {n} points" if n > 1 else f"at step {onset}"
    return Finding(
        message=f"loss rose to {top:.4g} {for_points}, from a median of {level:.4g} before (limit {level + p.z * sd:.4g}).",
        advice=advice,
        evidence=[
            Evidence(
                "loss",
                "robust_z",
                float(z),
                n,
                (onset, int(steps[-1])),
                baseline=level,
                threshold=p.z,
                direction="above",
            )
        ],
        suggestions=suggestions,
        severity=severity,
        confidence="high" if severity == "error" else "medium",
        onset_step=onset,
        impact="a spike that does not pass becomes a divergence",
    )


def _earlier_spikes(run: RunView, p: Params, onset: int) -> int:
    """Spikes (see `loss_spike`) of the newest `again_within` steps that had ended before `onset`."""
    k = int(p.points)
    window = run.window("loss", int(p.again_within) + HISTORY + k)
    if window is None:
        return 0
    values = window.values
    spikes, quiet_from = 0, 0
    for i in np.flatnonzero(values > (1 + p.z * p.sd_floor) * stats.median(values)):
        if i < max(MIN_HISTORY, quiet_from) or i + k > len(values) or window.steps[i] <= run.step - p.again_within:
            continue
        if window.steps[i + k - 1] >= onset:
            break
        level, sd = _level(values[max(0, i - HISTORY) : i], p.sd_floor)
        if ((values[i : i + k] - level) / sd > p.z).all():
            passed = i + k + np.flatnonzero(values[i + k :] <= level + p.z * sd)
            if not len(passed) or window.steps[passed[0]] >= onset:
                break  # it goes on still: the same spike
            spikes += 1
            quiet_from = int(i) + 10
    return spikes


@rule(
    "NUM005",
    "grad-spike",
    severity="info",
    needs=("grad_norm",),
    for_=1,
    keep=10,
    inhibited_by=("NUM001", "NUM009"),
    params={"z": 6.0, "ratio": 5.0, "sd_floor": 0.1, "repeats": 5, "within": 100, "loss_z": 4.0, "look_back": 5},
)
def grad_spike(run: RunView, p: Params) -> Finding | Unknown | None:
    """The gradient norm jumps far above its usual size.

    ## Why it hurts

    One spike is harmless where gradients are clipped. Spikes that repeat, or that move the loss, mean that steps are
    too large for the data or the curvature.

    ## How it is decided

    A point of `grad_norm` (before clipping) whose logarithm lies more than 6 robust standard deviations above the
    logarithms of the 50 points before it (standard deviation at least 0.1), and which is more than 5 times their median.
    Steps with a gradient of exactly 0, and RL steps in which all groups had equal rewards, are left out of the
    comparison: without an advantage the norm is that of the KL term alone. Information by itself; a warning from the fifth within 100 steps, or when the loss of a supervised or preference run rises by
    more than 4 robust standard deviations at one of the 5 points after it. (The loss of the spike's own step does not count: a
    hard batch has a large loss and a large gradient, and harms nothing.)

    ## When it is fine

    Gradient norms are skewed: without the logarithm, a limit of 6 standard deviations fires on 99 % of healthy skewed
    series. A single spike with an unmoved loss is ordinary (1 of 15 public logs has one).

    ## What to change

    - `max_grad_norm` 0 -> 1 where clipping is off. Risk low.
    - If it repeats: `learning_rate` x0.7.

    ## Sources

    Log scale and limits: simulation and 15 public logs. ZClip (arXiv 2504.02507) detects spikes by z of the gradient norm.
    A rate of one in 200 is ordinary; the fifth in 100 steps is what it no longer explains (exact binomial: four have
    p = 0.002, five 0.0002).
    """
    back = int(p.look_back)
    window = run.window("grad_norm", HISTORY + back + 1, min_n=MIN_HISTORY + back + 1)
    if window is None:
        return Unknown(f"grad_norm: fewer than {MIN_HISTORY + back + 1} points in this segment")
    before, recent = window.values[: -back - 1], window.values[-back - 1 :]
    top = float(recent.max())
    if top <= p.ratio * float(before.min()):  # the common case, without a median
        return None
    positive = before[before > 0]
    if len(positive) >= MIN_HISTORY and top <= p.ratio * stats.median(positive):
        return None
    # Where many steps have no advantage, 50 points with one reach further back.
    longer = run.window("grad_norm", SPARSE * HISTORY + back + 1)
    assert longer is not None  # `window` is not None
    usable = (longer.values > 0) & _has_advantage(run, longer)
    positive = longer.values[: -back - 1][usable[: -back - 1]][-HISTORY:]
    if len(positive) < MIN_HISTORY:
        return Unknown(
            f"grad_norm: fewer than {MIN_HISTORY} of the last {len(longer)} points have a gradient to compare with"
        )
    median = stats.median(positive)
    if top <= p.ratio * median:
        return None
    z = stats.zlog(top, positive, p.sd_floor)
    if z is None or z <= p.z:
        return None

    at = int(np.argmax(recent)) - len(recent)
    step = int(window.steps[at])
    spikes = _grad_spikes(run, p)
    loss_z = None
    if run.method in LOSS_FALLS and not is_rl(run):
        loss_z = _loss_after(run, step, p)
    moved = loss_z is not None and loss_z > p.loss_z
    repeated = spikes >= p.repeats
    severity: Severity = "warning" if moved or repeated else "info"
    suggestions = []
    clip_known = "max_grad_norm" in run.config
    clip = run.number("max_grad_norm", 0.0) or 0.0
    advice = "A single spike needs no change while the loss does not move."
    if clip_known and clip <= 0:
        suggestions.append(
            set_field(
                run,
                "NUM005.1",
                "max_grad_norm",
                1.0,
                verb="Set",
                risk="low",
                side_effects=("large steps are shortened",),
            )
        )
        advice = consider(suggestions[0])
    elif severity == "warning":
        expect = Expectation("grad_norm", "below", float(f"{p.ratio * median:.3g}"), within_steps=100)
        suggestions.append(lower_learning_rate(run, "NUM005.2", 0.7, expect=expect))
        advice = consider(suggestions[0])
    more = f"; {spikes} such points in the last {p.within:.0f} steps (limit {p.repeats:.0f})" if repeated else ""
    more += f"; the loss rose by {loss_z:.1f} standard deviations after it (limit {p.loss_z:g})" if moved else ""
    return Finding(
        message=f"grad_norm reached {top:.3g} at step {step}, {top / median:.1f} times the median {median:.3g} of the "
        f"{len(positive)} points before (limit {p.ratio:g}){more}.",
        advice=advice,
        evidence=[
            Evidence(
                "grad_norm",
                "log_robust_z",
                float(z),
                len(positive),
                (int(window.steps[0]), int(window.steps[-1])),
                baseline=median,
                threshold=p.z,
                direction="above",
            )
        ],
        suggestions=suggestions,
        severity=severity,
        onset_step=step,
        impact="steps are larger than the loss can follow" if severity == "warning" else "none by itself",
    )


def _grad_spikes(run: RunView, p: Params) -> int:
    """Spikes of the newest `within` steps, each against the 50 points before it."""
    window = run.window("grad_norm", int(p.within) + SPARSE * HISTORY)
    if window is None:
        return 0
    values, count = window.values, 0
    usable = (values > 0) & _has_advantage(run, window)
    for i in np.flatnonzero(values > p.ratio * float(values[usable].min(initial=math.inf))):
        if i < MIN_HISTORY or window.steps[i] <= run.step - p.within:
            continue
        before = values[:i][usable[:i]][-HISTORY:]
        if len(before) < MIN_HISTORY or values[i] <= p.ratio * stats.median(before):
            continue
        z = stats.zlog(float(values[i]), before, p.sd_floor)
        count += z is not None and z > p.z
    return count


def _has_advantage(run: RunView, window: Window) -> NDArray[np.bool_]:
    """For each point of a window, whether its step had an advantage: in RL, not all groups had equal rewards."""
    there = np.ones(len(window), dtype=bool)
    name = _zero_std_signal(run) if is_rl(run) else None
    shares = run.window(name) if name is not None else None
    if shares is None:
        return there
    # A rollout that is used for several steps logs its rewards once, at the first of them.
    at = np.searchsorted(shares.steps, window.steps, side="right") - 1
    there[(at >= 0) & (shares.values[at] >= 1)] = False
    return there


def _share_behind(run: RunView, name: str, window: Window) -> float | None:
    """Mean over a window's steps of a share that is logged once per rollout, which may serve several steps."""
    shares = run.window(name)
    if shares is None or shares.steps[-1] < window.steps[0]:
        return None
    at = np.searchsorted(shares.steps, window.steps, side="right") - 1
    known = at >= 0
    return float(shares.values[at[known]].mean()) if 2 * known.sum() >= len(window) else None


def _zero_std_signal(run: RunView) -> str | None:
    """The signal that tells the share of groups with equal rewards, where it can be trusted."""
    if run.has("groups/zero_std"):
        return "groups/zero_std"
    name = "frac_reward_zero_std"
    known = run.method in GROUPED_RL and run.has(name)
    return name if known and not signal_table.impossible(name, run.method, run.config) else None


def _loss_after(run: RunView, step: int, p: Params) -> float | None:
    """The largest robust z of the loss in the points after a gradient spike, against the points before it."""
    window = run.window("loss", HISTORY + int(p.look_back) + 1, min_n=MIN_HISTORY + 1)
    if window is None:
        return None
    first = int(np.searchsorted(window.steps, step))
    if first < MIN_HISTORY or first + 1 >= len(window):
        return None
    level, sd = _level(window.values[:first], 0.05)
    return (float(window.values[first + 1 :].max()) - level) / sd


# -------------------------------------------------------------------------------------------------- dead gradient


@rule(
    "NUM008",
    "zero-gradient",
    severity="error",
    needs=("grad_norm",),
    for_=1,
    keep=5,
    warm_up=False,
    inhibited_by=("NUM001", "NUM015", "DAT003", "RL001"),
    params={"floor": 1e-8, "points": 3, "rl_share": 0.8, "rl_points": 30, "rl_excess": 0.3},
)
def zero_gradient(run: RunView, p: Params) -> Finding | Unknown | None:
    """The gradient is zero: nothing is learned.

    ## Why it hurts

    With a gradient of 0 the optimizer moves no weight (or only decays them). The run burns time and changes nothing.

    ## How it is decided

    Supervised and preference training: `grad_norm` below 1e-8 on 3 consecutive points while the learning rate is above
    0; error. Online RL: exactly 0 on more than 80 % of the last 30 points. There a step is rightly 0 when all its groups
    have equal rewards, so the share of such groups must explain it: if the share of zero steps exceeds the share of
    equal groups by more than 0.3, the graph is broken (error); else it is RL001's finding (warning).

    ## When it is fine

    RL steps whose rewards are all equal; RL with `mask_truncated_completions` while nearly all completions are cut
    (named, as a warning). A preference loss below 1e-6 has nothing left to learn (warning). A trainer whose
    `grad_norm` reads 0 while the loss falls has a dead sensor, not a dead gradient: not judged.

    ## What to change

    By cause: weights that are frozen or not in the optimizer (NUM015), labels all masked (DAT003), equal rewards (RL001),
    log-probabilities taken without a graph. Nothing that a setting cures: look at which tensors require gradients.

    ## Sources

    ms-swift issue 5571: gradient 0 although reward_std is 0.44 and no group has equal rewards. TRL issue 3926: an
    adapter frozen by the trainer. The counts are *judgement*.
    """
    if is_rl(run):
        return _zero_gradient_rl(run, p)
    window = run.window("grad_norm", int(p.points), min_n=int(p.points))
    if window is None:
        return Unknown(f"grad_norm: fewer than {p.points:.0f} points in this segment")
    if float(window.values.max()) >= p.floor:
        return None
    rates = run.window("learning_rate", int(p.points))
    if rates is not None and float(rates.values.max()) <= 0:
        return None
    longer = run.window("grad_norm", 40, min_n=20)
    if longer is not None and float(longer.values.max()) < p.floor:
        moved = run.two("loss", 20) if run.has("loss") else None
        if moved is not None and moved.t < -3.5:
            return Unknown("grad_norm reads 0 although the loss falls: the number is not the gradient's norm")
    loss = run.last("loss")
    finished = loss is not None and 0 < loss < 1e-6
    causes = [code for code in ("NUM015", "DAT003") if code in run.firing]
    shares = run.last("grad/zero_share")
    dead = f" {shares:.0%} of the trainable tensors have no gradient at all." if shares else ""
    at_loss = f" at a loss of {loss:.3g}" if loss is not None else ""
    return Finding(
        message=f"grad_norm is {float(window.values.max()):.3g} on the last {len(window)} points (limit {p.floor:g})"
        f"{at_loss}.{dead}",
        advice="The loss has reached 0: stop, or check that the task is not trivial."
        if finished
        else "Check which tensors require gradients and are in the optimizer, and that rows carry labels.",
        evidence=[window.evidence("max", float(window.values.max()), threshold=p.floor, direction="below")],
        suggestions=[_inspect_graph("NUM008.1")],
        severity="warning" if finished else "error",
        confidence="high",
        onset_step=int(window.steps[0]),
        impact="no weight moves",
        causes=causes,
    )


def _inspect_graph(id: str) -> Suggestion:
    return advise(id, "Inspect which tensors require gradients, get them, and are in the optimizer", risk="low")


def _zero_gradient_rl(run: RunView, p: Params) -> Finding | Unknown | None:
    n = int(p.rl_points)
    window = run.window("grad_norm", n, min_n=n)
    if window is None:
        return Unknown(f"grad_norm: fewer than {n} points in this segment")
    zeros = n - int(np.count_nonzero(window.values))
    share = zeros / n
    if share <= (p.rl_share - 0.3 if run.is_firing else p.rl_share):
        return None
    name, equal = _zero_std_signal(run), None
    if name is not None:
        equal = _share_behind(run, name, window)
    cut = run.median("completions/clipped_ratio", 10)
    masked = bool(run.config.get("mask_truncated_completions")) and cut is not None and cut > 0.8
    evidence = [window.evidence("share_zero", share, threshold=p.rl_share, direction="above")]
    said = f"grad_norm is 0 on {zeros} of the last {n} points"
    if name is not None and equal is not None:
        evidence.append(Evidence(name, "mean", equal, n, window.span))
    if masked:
        return Finding(
            message=f"{said}; mask_truncated_completions leaves out {cut:.0%} of the completions.",
            advice="Cut completions carry no loss: raise max_completion_length first (RL016).",
            evidence=evidence,
            severity="warning",
            causes=("RL016",),
            impact="no weight moves",
        )
    if equal is not None and share - equal > p.rl_excess:
        return Finding(
            message=f"{said} (limit {p.rl_share:.0%}) although only {equal:.0%} of the groups have equal rewards.",
            advice="The rewards differ but no gradient arrives: check which tensors require gradients, that the "
            "optimizer holds them, and that the completion mask is not empty.",
            evidence=evidence,
            suggestions=[_inspect_graph("NUM008.1")],
            severity="error",
            confidence="high",
            onset_step=int(window.steps[0]),
            impact="no weight moves although there is a signal",
        )
    because = f": {equal:.0%} of the groups have equal rewards, so no advantage" if equal is not None else ""
    return Finding(
        message=f"{said} (limit {p.rl_share:.0%}){because}.",
        advice="See RL001: groups with equal rewards give no gradient."
        if equal is not None
        else "Look whether the rewards within a group differ (RL001); if they do, which tensors require gradients.",
        evidence=evidence,
        suggestions=[] if equal is not None else [_inspect_graph("NUM008.1")],
        severity="warning",
        confidence="medium" if equal is not None else "low",
        onset_step=int(window.steps[0]),
        impact="no weight moves",
        causes=("RL001",) if equal is not None else (),
        not_checked=() if equal is not None else ("share of groups with equal rewards: not measured",),
    )


# ----------------------------------------------------------------------------------------------------- divergence


@rule(
    "NUM009",
    "divergence",
    severity="error",
    methods=(*SUPERVISED, *PREFERENCE, "unknown"),
    needs=("loss",),
    every=10,
    for_=2,
    keep=3,
    inhibited_by=("NUM001",),
    params={
        "rise": 0.15,
        "sds": 6.0,
        "trend_z": 3.5,
        "step_t": 4.0,
        "step_rise": 0.3,
        "best_t": 8.0,
        "early_rise": 0.05,
        "early_t": 4.0,
        "lr_factor": 0.3,
    },
)
def divergence(run: RunView, p: Params) -> Finding | Unknown | None:
    """The loss rises and does not come back.

    ## Why it hurts

    A diverged model has forgotten what it knew. More steps at the same learning rate do not repair it.

    ## How it is decided

    The newest 30 points, as medians of 10, all lie above the lowest level of this segment (the least mean of 10 points
    or more) by more than 15 % and more than 6 standard errors of such a median (from the point-to-point noise,
    corrected for autocorrelation); and either the loss has risen since that lowest level (Mann-Kendall z above 3.5) or
    the newest 30 points lie by more than 30 % above the 50 before them (two-window t above 4) or above the 30 up to
    the lowest level (t above 8), all corrected likewise. Or, early: after warm-up the medians and the mean of the
    newest 30 points lie above the run's first two by more than 5 % and 4 standard errors. At 2 evaluations, 10
    observations apart.

    ## When it is fine

    A change of the data mixture or a curriculum, where the new data are harder. Distillation with a rising share of
    the student's own samples is left out, and so is RL: its loss says nothing. A single spike is NUM004.

    ## What to change

    - Resume from the checkpoint nearest to the lowest loss with `learning_rate` x0.3 and `warmup_steps` at least
      max(100, 3 % of the run). Risk: the compute since then is lost.

    ## Sources

    Sensitivity of the loss to the learning rate: arXiv 2309.14322. Trend test: Mann-Kendall with the correction of Hamed
    and Rao (1998). The limits are *judgement*: of 1200 simulated runs of 600 steps, with a loss that falls or stands
    still under noise of 10 to 40 %, 1 alarms while the noise has a lag-1 correlation of 0.5 or less; at 0.9, 5 % of
    those that fall do and 9 % of those that stand still.
    """
    if is_rl(run):
        return None
    window = run.window("loss", NEWEST + 50, min_n=NEWEST + 10)
    if window is None:
        return Unknown(f"loss: fewer than {NEWEST + 10} points in this segment")
    newest, before = window.values[-NEWEST:], window.values[:-NEWEST]
    recent = stats.median(newest[-10:])
    ring = run.rings["loss"]
    blocks = [b for b in ring.blocks if b[0] >= run.segment_start]
    best_step, best, _ = min(blocks, key=lambda b: b[1]) if blocks else (run.segment_start, math.inf, 0)
    first = run.window("loss", min_n=2) if run.segment == 0 and ring.size < CAPACITY else None
    start = float(first.values[:2].mean()) if first is not None else math.inf
    higher = recent - best > p.rise * abs(best) / (2 if run.is_firing else 1)
    if not higher and recent - start <= p.early_rise * abs(start) / (2 if run.is_firing else 1):
        return None

    lowest = min(recent, stats.median(newest[:10]), stats.median(newest[10:20]))
    noise = stats.MAD_TO_SD * stats.median(np.abs(np.diff(newest))) / math.sqrt(2)
    tendency = stats.mann_kendall(newest)
    assert tendency is not None  # there are enough points
    deff = stats.design_effect(tendency.phi)  # of what is left when a trend is taken out
    if higher:
        se = 1.2533 * noise * math.sqrt(deff / 10)  # a median of 10 has about 1.25 times the mean's standard error
        limit = best + max(p.sds * se, p.rise * abs(best))
        if run.is_firing and recent > (best + limit) / 2:
            return _diverged(run, p, window, recent, best, int(best_step), limit, "still above it")
        rising = _rising(run, p, best_step, before, newest) if lowest > limit else None
        if rising is not None:
            return _diverged(run, p, window, recent, best, int(best_step), limit, rising)
    if first is not None:
        now, sd = float(newest.mean()), float(newest.std(ddof=1))
        # Two neighbours, correlated like the newest points, against the mean of those.
        se = max(sd, noise) * math.sqrt((1 + tendency.phi) / 2 + deff / NEWEST)
        limit = start + max(p.early_rise * abs(start), p.early_t * se)
        if min(lowest, now) > limit or (run.is_firing and now > (start + limit) / 2):
            return _diverged(run, p, window, now, start, int(first.steps[0]), limit, None)
    return None


def _rising(
    run: RunView, p: Params, since: float, before: NDArray[np.float64], newest: NDArray[np.float64]
) -> str | None:
    """How the loss rose: as a trend since step `since`, or as a step up. In words; None if chance may explain it."""
    points = run.window("loss")
    assert points is not None  # the caller has read it
    values = points.values[points.steps > since]
    if len(values) < 50:
        values = points.values[-50:]
    trend = stats.mann_kendall(stats.block_means(values, math.ceil(len(values) / 50)))
    if trend is not None and trend.z > p.trend_z:
        return f"rising (trend z {trend.z:.1f})"
    # A jump that overshoots hides in the points before; those around the lowest level, chosen for being low, ask more.
    around = points.values[points.steps <= since][-NEWEST:]
    for old, where, limit in ((before, "before", p.step_t), (around, f"up to step {since:.0f}", p.best_t)):
        step = stats.two_window(old, newest) if len(old) >= MIN_HISTORY else None
        if step is not None and step.t > limit and step.diff > p.step_rise * abs(step.mean1):
            return f"above the {len(old)} points {where} (t {step.t:.1f})"
    return None


def _diverged(
    run: RunView,
    p: Params,
    window: Window,
    now: float,
    best: float,
    best_step: int,
    limit: float,
    rising: str | None,
) -> Finding:
    more: list[tuple[str, Any, Any]] = []
    steps = run.config.get("warmup_steps")
    if isinstance(steps, int) and not isinstance(steps, bool):
        wanted = max(run.warmup_steps, 100, math.ceil(0.03 * (run.total_steps or 0)))
        if wanted > run.warmup_steps and (run.total_steps is None or wanted < run.total_steps / 2):
            more.append(("warmup_steps", steps, wanted))
    before = f"a checkpoint near step {best_step}" if rising is not None else "the start"
    cut = lower_learning_rate(
        run,
        "NUM009.1",
        p.lr_factor,
        more=more,
        when="earlier_checkpoint",
        expect=Expectation("loss", "below", float(f"{limit:.4g}"), within_steps=100),
        preconditions=(before,),
    )
    words = changes_of(cut, f"learning_rate to {p.lr_factor:g} times its value")
    if rising is not None:
        what = f"the median of the last 10 points of loss is {now:.4g}, {now / best - 1:.0%} above its lowest level"
        message = f"{what} {best:.4g} at step {best_step} (limit {limit:.4g}), and {rising}."
    else:
        message = f"loss is {now:.4g} (mean of {NEWEST} points) and began at {best:.4g} (limit {limit:.4g})."
    found = [
        window.evidence(
            "median_10" if rising is not None else f"mean_{NEWEST}",
            now,
            baseline=best,
            threshold=limit,
            direction="above",
        )
    ]
    return Finding(
        message=message,
        advice=f"Stop and resume from {before}, changing {words}.",
        evidence=found,
        suggestions=[cut],
        confidence="high" if rising is not None else "medium",
        onset_step=best_step if rising is not None else None,
        impact="the model loses what it learned",
    )


# -------------------------------------------------------------------------------------------------- at the start


@rule(
    "NUM015",
    "no-trainable-params",
    severity="error",
    methods=ANY_METHOD,
    every=5,
    for_=1,
    keep=1,
    warm_up=False,
    params={"share": 0.5},
)
def no_trainable_params(run: RunView, p: Params) -> Finding | Unknown | None:
    """No weights, too few, or not the intended ones are being trained.

    ## Why it hurts

    The run looks alive (data flow, a loss is logged), and the weights that should learn stay as they were.

    ## How it is decided

    From the facts taken when training begins. Error: no parameter requires a gradient; or PEFT is used and no adapter
    parameter does. Warning: without PEFT, fewer than 50 % of the parameters do; or some that do are missing from the
    optimizer. A log without these facts is not judged.

    ## When it is fine

    Layers frozen on purpose (embeddings, a vision tower): the names are listed once, and the rule can be ignored for the
    run. Sharded parameters (ZeRO-3) count as nothing on one rank: not judged.

    ## What to change

    - Unfreeze them, rebuild the PEFT model with `is_trainable=True`, or hand the trainer a `peft_config` and the plain
      model instead of a wrapped one. Code, not a setting.

    ## Sources

    TRL issue 3926: SFTTrainer froze the adapter of a PEFT model passed to it. The share of 50 % is *judgement*.
    """
    facts = run.facts
    trainable, total = facts.get("trainable_parameters"), facts.get("total_parameters")
    if trainable is None or not total:
        return Unknown("trainable_parameters and total_parameters are not among the facts of the run")
    peft = bool(facts.get("peft"))
    adapter = facts.get("peft_trainable")
    outside = [str(name)[:100] for name in facts.get("parameters_outside_optimizer") or ()]
    severity: Severity = "warning"
    applicable = True
    if trainable == 0:
        severity = "error"
        message = f"0 of {total:,} parameters are trainable."
        advice = "Unfreeze the model (requires_grad) before it is handed to the trainer."
        if peft:
            advice = "Load the adapter with is_trainable=True, or pass peft_config with the plain model."
    elif peft and adapter == 0:
        severity = "error"
        message = f"PEFT is used, but none of its adapter parameters is trainable ({trainable:,} others are)."
        advice = "Load the adapter with is_trainable=True, or pass peft_config with the plain model."
    elif outside:
        few = ", ".join(outside[:3]) + (f" and {len(outside) - 3} more" if len(outside) > 3 else "")
        message = f"{len(outside)} trainable tensors are not in the optimizer: {few}."
        advice = "Build the optimizer after all parameters exist and require gradients, or freeze these on purpose."
    elif not peft and trainable < p.share * total:
        message = (
            f"Only {trainable / total:.1%} of {total:,} parameters are trainable, without PEFT (limit {p.share:.0%})."
        )
        advice = "If the rest is frozen on purpose, ignore NUM015 for this run; else unfreeze it."
    else:
        applicable = False
    if not applicable:
        return None
    here = (run.step, run.step)
    return Finding(
        message=message,
        advice=advice,
        evidence=[
            Evidence(
                "trainable_parameters",
                "value",
                float(adapter if peft and adapter == 0 else trainable),
                1,
                here,
                baseline=float(total),
                threshold=0.0 if severity == "error" else p.share * total,
                direction="below",
            )
        ],
        suggestions=[advise("NUM015.1", "Repair which parameters are trained", applicability="template", risk="low")],
        severity=severity,
        confidence="high" if severity == "error" else "medium",
        impact="the weights that should learn do not change",
    )
