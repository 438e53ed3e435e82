"""How well a run does: its goal, whether the goal moved, and whether that can be believed.

The goal is the reward (online RL), minus the loss (supervised), or how far chosen answers lie before rejected ones
(preference training and reward models). A model that compares answers learns any pairs by heart within a few passes,
random ones too, so that its progress counts only where no pair was trained on before: on held-out pairs, and in the
first pass over the data, whose pairs are measured before the update that learns them.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from outspoken.diagnostics import stats
from outspoken.diagnostics.records import Evidence
from outspoken.diagnostics.signals import PREFERENCE, REFERENCED, RL
from outspoken.diagnostics.view import MOST_TRIALS, Array, RunView, Window, pool_newest

COMPARES = (*PREFERENCE, "reward")  # methods that learn which of two answers is better
CHANCE = ("dpo", "reward")  # where the accuracy on new pairs is 1/2 until something was learned
LENGTH_NORMALISED = {"ipo", "sigmoid_norm"}  # DPO losses that compare means per token; the margin compares sums

SIGNIFICANT = 3.5  # |T| of the two-window test
MIN_POINTS = 8  # points on each side of a comparison
MAX_POINTS = 50
EARLY_POINTS = 10  # a short beginning, beside the long one
ALPHA = 1e-3  # of a pooled share against chance
DISPLACED = -0.3  # nats/token that chosen answers may lose (judgement)
DISPLACED_SHARE = -0.5  # the same without lengths: share of the reference's log-probability (judgement)
CHANCE_PAIRS, CHANCE_HELD_OUT = 2000, 200  # pairs from which an accuracy near 1/2 means that nothing is learned
CHANCE_EVALUATIONS = 3  # of them, unless the run is over: the first may come too early
BETTER_THAN_CHANCE = 0.55


@dataclass(frozen=True)
class Progress:
    """How the run's goal moved: `recent` against the window before, `total` against the run's beginning."""

    signal: str
    sign: int  # +1 where larger is better
    recent: stats.TwoWindow | None
    total: stats.TwoWindow | None
    level: float
    n: int
    window: tuple[int, int]

    def up(self) -> bool:
        recent, total = self._t(self.recent), self._t(self.total)
        return (total is not None and total > SIGNIFICANT) or (
            recent is not None and recent > SIGNIFICANT and (total is None or total > 0)
        )

    def down(self) -> bool:
        recent, total = self._t(self.recent), self._t(self.total)
        return (total is not None and total < -SIGNIFICANT) or (recent is not None and recent < -SIGNIFICANT)

    def _t(self, two: stats.TwoWindow | None) -> float | None:
        return None if two is None else self.sign * two.t

    def moved(self) -> str:
        """The change in words."""
        two = self.total or self.recent
        if two is None:
            return f"{self.signal} is at {self.level:.4g}"
        return f"{self.signal} went from {two.mean1:.4g} to {two.mean2:.4g} (T={two.t:.1f})"

    def evidence(self) -> Evidence:
        best = self.total or self.recent
        t = best.t if best is not None else None
        return Evidence(self.signal, "two_window_t", t, self.n, self.window, threshold=SIGNIFICANT)


def goal_of(view: RunView) -> tuple[str, int] | None:
    """The signal that says how well the run does, and its sign; None if it is not there."""
    candidates: tuple[tuple[str, int], ...] = (("loss", -1),)
    if view.method in RL:
        candidates = (("reward", 1), ("objective/scores", 1), ("objective/rlhf_reward", 1))
    elif view.method == "reward":
        candidates = (("margin", 1), ("accuracy", 1), ("loss", -1))
    elif view.method in PREFERENCE and margin_is_goal(view):
        candidates = (("rewards/margins", 1), ("loss", -1))
    for name, sign in candidates:
        if view.has(name):
            return name, sign
    return None


def loss_types(view: RunView) -> set[str]:
    """`loss_type` of the config, which may be one or a list of them; empty if it is not known."""
    given = view.config.get("loss_type")
    return {str(each) for each in given} if isinstance(given, list | tuple) else ({given} if given else set())


def margin_is_goal(view: RunView) -> bool:
    """Whether the loss wants the margin of summed log-ratios to grow, not likelihood only, nor means per token."""
    types = loss_types(view)
    if types == {"sft"}:
        return False
    # With WPO's weights a loss also falls when answers become less likely.
    return not types or not types <= LENGTH_NORMALISED or bool(view.config.get("use_weighting"))


def compares(view: RunView) -> bool:
    """Whether the run is trained on comparisons, which can be learned by heart."""
    return view.method in COMPARES and loss_types(view) != {"sft"}


def progress(view: RunView) -> Progress | None:
    """How the goal moved over all that was measured in training; None if there is no goal."""
    goal = goal_of(view)
    window = view.window(goal[0]) if goal is not None else None
    return _moved(view, window, goal[1]) if goal is not None and window is not None else None


def first_pass(view: RunView) -> Progress | None:
    """How the goal moved while no row had been trained on before; None where that was too short, or nobody knows."""
    goal = goal_of(view)
    window = _unseen(view, goal[0]) if goal is not None else None
    return _moved(view, window, goal[1]) if goal is not None and window is not None else None


def _moved(view: RunView, window: Window, sign: int) -> Progress:
    n = len(window)
    width = min(MAX_POINTS, max(MIN_POINTS, n // 3))
    recent = stats.two_window(window.values[-2 * width : -width], window.values[-width:]) if n >= 2 * width else None
    newest = window.values[-min(width, n) :]
    total = _since_beginning(view, window, newest, (EARLY_POINTS, width))
    return Progress(window.name, sign, recent, total, float(np.mean(newest)), n, window.span)


def _since_beginning(view: RunView, window: Window, newest: Array, widths: tuple[int, ...]) -> stats.TwoWindow | None:
    """The newest points against the run's first ones. Of several widths of the beginning the clearest counts: a short
    one sees a gain that came at once, a long one a gain that came slowly."""
    ring = view.rings[window.name]
    before = ring.total - int(np.sum(ring.window(ring.size)[0] > window.steps[-1]))  # points up to the newest
    compared = []
    for width in widths:
        first = view.first(window.name, width)
        if min(len(first), len(newest)) < MIN_POINTS or before < len(first) + len(newest):
            continue
        compared.append(stats.two_window(first, newest))
    return max((c for c in compared if c is not None), key=lambda c: abs(c.t), default=None)


def epoch_known(view: RunView) -> bool:
    return view.has("epoch") or view.config.get("num_train_epochs") == 1


def in_first_pass(view: RunView) -> bool:
    """Whether the run is still in its first pass over the data, as far as one knows."""
    epoch = view.last("epoch")
    return epoch is None or epoch <= 1 + 1e-6


def _unseen(view: RunView, name: str) -> Window | None:
    """The newest points of a signal, those of the first pass over the data only; None if there are none."""
    window = view.window(name)
    kept = None if window is None else _is_new(view, window)
    if window is None or kept is None:
        return window
    return Window(name, window.steps[kept], window.values[kept]) if kept.any() else None


def _is_new(view: RunView, window: Window) -> NDArray[np.bool_] | None:
    """Which points of a window were measured in the first pass over the data; None if epochs are not told."""
    epochs = view.window("epoch")
    if epochs is None:
        return None
    within = epochs.steps[epochs.values <= 1 + 1e-6]
    return window.steps <= (within[-1] if len(within) else -np.inf)


# ------------------------------------------------------------------------------------------------ new and held-out pairs


def held_out_progress(view: RunView, sign: int) -> Progress | None:
    """Progress on held-out data, from at least six evaluations (three against three)."""
    if view.method in COMPARES:
        scores = ("eval_rewards/accuracies", "eval_rewards/margins", "eval_accuracy", "eval_margin")
        names: tuple[tuple[str, int], ...] = (*((name, 1) for name in scores), ("eval_loss", -1))
        if not compares(view):
            names = (("eval_loss", -1),)
    else:
        names = (("eval_reward", 1),) if sign > 0 else (("eval_loss", -1),)
    for name, direction in names:
        window = view.window(name, min_n=6)
        if window is not None:
            half = min(len(window) // 2, 10)
            floor = 0.0
            if name.endswith(("accuracies", "accuracy")):  # a few pairs more or less are no change
                floor = 0.5 / math.sqrt(_held_out_pairs(view) or 625)
            total = stats.two_window(window.values[:half], window.values[-half:], sd_floor=floor)
            return Progress(name, direction, None, total, window.values[-1], len(window), window.span)
    return None


def accuracy_on_new_pairs(view: RunView) -> tuple[stats.Pooled, Evidence] | None:
    """Pairs told apart in the newer half of the first pass, pooled; None where they are not counted."""
    name = _accuracy_name(view)
    window = view.window(name) if name else None
    trials = None if window is None else view.trials(window.name, len(window))
    if window is None or trials is None:
        return None
    kept = _is_new(view, window)
    if kept is not None:
        if not kept.any():
            return None
        window, trials = Window(window.name, window.steps[kept], window.values[kept]), trials[kept]
    pooled = pool_newest(window, window.values, trials, (len(window) + 1) // 2)
    return None if pooled is None else (stats.Pooled(pooled.k, pooled.n), pooled.evidence(threshold=0.5))


def held_out_accuracy(view: RunView) -> tuple[stats.Pooled, Evidence] | None:
    """Held-out pairs told apart at the last evaluation; None where it is not measured, or on how many pairs."""
    name = _accuracy_name(view)
    window = view.window(f"eval_{name}", 1) if name else None
    if window is None:
        return None
    pairs = _held_out_pairs(view)
    pooled = None if pairs is None else pool_newest(window, window.values, np.array([pairs]), 1)
    return None if pooled is None else (stats.Pooled(pooled.k, pooled.n), pooled.evidence(threshold=0.5))


def _held_out_pairs(view: RunView) -> float | None:
    """The size of the held-out set, as the evaluation's time and speed tell it."""
    seconds, per_second = view.last("eval_runtime"), view.last("eval_samples_per_second")
    if seconds is None or per_second is None or not 0.5 <= seconds * per_second <= MOST_TRIALS:
        return None
    return float(round(seconds * per_second))


def _accuracy_name(view: RunView) -> str | None:
    if view.method not in CHANCE or not compares(view):
        return None
    return "accuracy" if view.method == "reward" else "rewards/accuracies"


# ---------------------------------------------------------------------------------------------------------- judgement


def at_chance(view: RunView, final: bool) -> tuple[str, Evidence] | None:
    """One sentence, and its evidence, if new pairs are told apart no better than by a coin.

    None if that is not so, or there are too few to say. `final`: the run is over.
    """
    held_out = held_out_accuracy(view)
    if held_out is not None:
        pairs, evidence = held_out
        often = final or view.window(evidence.signal, min_n=CHANCE_EVALUATIONS) is not None
        if often and pairs.n >= CHANCE_HELD_OUT and not pairs.exceeds(0.5, 0.05):
            return (
                f"Of {pairs.n:.0f} held-out pairs {pairs.mean:.1%} are told apart: no more than by chance.",
                evidence,
            )
        return None
    new = accuracy_on_new_pairs(view)
    if new is None:
        return None
    pairs, evidence = new
    if pairs.n < CHANCE_PAIRS or pairs.exceeds(0.5, ALPHA) or not pairs.below(BETTER_THAN_CHANCE, ALPHA):
        return None
    return f"Of {pairs.n:.0f} new pairs {pairs.mean:.1%} were told apart: no more than by chance.", evidence


def doubt(view: RunView, on_new: Progress | None) -> str | None:
    """Why a goal that rises in training is no sign of learning to compare; None if it is one.

    `on_new` is how the goal moved during the first pass over the data. The goal must have risen there, with the new
    pairs told apart better than by chance; or held-out pairs must say so. And the loss must not have risen.
    """
    goal = goal_of(view)
    assert goal is not None
    loss = _unseen(view, "loss") if view.segment == 0 else None  # a changed setting may have changed its scale
    worse = _moved(view, loss, -1) if loss is not None and goal[0] != "loss" else None
    if worse is not None and worse.total is not None and worse.total.t > SIGNIFICANT:
        return f"{goal[0]} rises, but so does the loss: {worse.moved()}"
    if held_out_confirms(view, goal[1]):
        return None
    if on_new is None or not on_new.up():
        if in_first_pass(view):
            return f"{goal[0]} rises, but not clearly from its beginning"
        return (
            f"{goal[0]} rises on pairs that were trained on before, which learning them by heart explains; evaluate "
            "held-out pairs"
        )
    new = accuracy_on_new_pairs(view) if goal[0] != "loss" else None
    if new is not None:
        pairs = new[0]
        if pairs.mean <= 0.5 or (pairs.n >= 30 and not pairs.exceeds(0.5, 0.01)):
            return f"{goal[0]} rises, but only {pairs.mean:.1%} of the last {pairs.n:.0f} new pairs are told apart"
    return None


def held_out_confirms(view: RunView, sign: int) -> bool:
    """Whether held-out data say that the run learned something."""
    moved = held_out_progress(view, sign)
    if moved is not None and moved.up():
        return True
    pairs = held_out_accuracy(view)
    return pairs is not None and pairs[0].exceeds(0.5, ALPHA) and not (moved is not None and moved.down())


def displaced(view: RunView) -> tuple[str, Evidence] | None:
    """One sentence, and its evidence, if chosen answers lost much of their probability; None if not, or unknown.

    The margin grows just as well by pushing both answers down, the rejected one more. The mass then goes to answers
    that nobody chose (arXiv 2410.08847). 'apo_down' asks for that.
    """
    if view.method not in REFERENCED or "apo_down" in loss_types(view):
        return None
    window = view.window("shift/chosen", 10, min_n=MIN_POINTS)
    if window is not None:
        if window.median >= DISPLACED:
            return None
        lost = f"chosen answers lost {-window.median:.2f} nats a token (limit {-DISPLACED:g})"
        return lost, window.evidence("median", threshold=DISPLACED, direction="below")
    rewards, logps = view.window("rewards/chosen", 10, min_n=MIN_POINTS), view.window("logps/chosen", 10)
    beta = view.number("beta")
    if rewards is None or logps is None or not beta:
        return None
    log_ratio = rewards.median / beta
    reference = logps.median - log_ratio
    if reference >= 0 or log_ratio >= 0 or log_ratio / -reference >= DISPLACED_SHARE:
        return None
    lost = f"the chosen answers' log-probability fell by {log_ratio / reference:.0%} (limit {-DISPLACED_SHARE:.0%})"
    return lost, rewards.evidence("median", threshold=DISPLACED_SHARE * -reference * beta, direction="below")
