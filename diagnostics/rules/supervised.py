"""Supervised fine-tuning."""

import math

from outspoken.diagnostics import stats
from outspoken.diagnostics.records import Evidence, Expectation, Finding, Unknown
from outspoken.diagnostics.rules.fixes import set_field
from outspoken.diagnostics.rules.numerics import is_rl, lower_learning_rate
from outspoken.diagnostics.rules.registry import DISTILLATION, PREFERENCE, SUPERVISED, Params, rule
from outspoken.diagnostics.view import RunView


@rule(
    "SFT001",
    "overfit",
    severity="warning",
    methods=(*SUPERVISED, *PREFERENCE, *DISTILLATION, "unknown"),
    needs=("eval_loss", "loss"),
    for_=1,
    keep=5,
    warm_up=False,
    inhibited_by=("NUM001", "NUM009"),
    params={"rise": 0.01, "evals": 4, "worse": 2},
)
def overfit(run: RunView, p: Params) -> Finding | Unknown | None:
    """The training loss falls while the held-out loss rises.

    ## Why it hurts

    The model learns the training rows by heart. Each further step makes it worse on everything else.

    ## How it is decided

    At least 4 evaluations; the last 2 both lie above the best one by more than 1 % (and by more than 2 standard errors,
    where `eval_loss_se` is logged), and the training loss since the evaluation before the last is lower than it was
    around the best one.

    ## When it is fine

    A held-out loss can rise while the answers get better: the model grows too sure (InstructGPT trained past the
    minimum for that reason). Trust a task metric more. An evaluation set from another distribution may rise by itself.

    ## What to change

    - Stop, and keep the best checkpoint: `load_best_model_at_end` True.
    - `num_train_epochs` to the epoch of the best evaluation, rounded up.
    - Next run: `learning_rate` x0.5, or `weight_decay` 0.01 to 0.1, or `lora_dropout` 0.05.

    ## Sources

    InstructGPT (arXiv 2203.02155); axolotl's documentation. 4 evaluations, 2 in a row and 1 % are *judgement*.
    """
    if is_rl(run):
        return None
    evals = run.window("eval_loss")
    if evals is None or len(evals) < p.evals:
        return Unknown(f"eval_loss: {len(evals) if evals is not None else 0} evaluations, {p.evals:.0f} needed")
    values, worse = evals.values, int(p.worse)
    at = int(values.argmin())
    best, best_step = float(values[at]), int(evals.steps[at])
    if at >= len(values) - worse:
        return None
    errors = run.last("eval_loss_se") or 0.0
    limit = best + max(2 * errors, p.rise * abs(best))
    if run.is_firing:
        if values[-1] <= (best + limit) / 2:
            return None
    elif not (values[-worse:] > limit).all():
        return None

    losses = run.window("loss")
    if losses is None:
        return None
    earlier = evals.steps[at - 1] if at else -math.inf
    around = losses.values[(losses.steps > earlier) & (losses.steps <= best_step)]
    since = losses.values[losses.steps > evals.steps[-2]]
    if not len(since):  # no training step was logged between the last two evaluations
        since = losses.values[-1:]
    if not len(around):
        return Unknown(f"loss: no point kept from around step {best_step}, where eval_loss was best")
    then, now = stats.median(around), stats.median(since)
    if now >= then:
        return None

    suggestions, words = [], []
    epochs, epoch = run.number("num_train_epochs"), _epoch_at(run, best_step)
    if epochs is not None and epoch is not None and math.ceil(epoch) < epochs:
        fewer = max(1, math.ceil(epoch))
        words.append(f"num_train_epochs from {run.config['num_train_epochs']} to {fewer}")
        suggestions.append(
            set_field(
                run,
                "SFT001.1",
                "num_train_epochs",
                fewer,
                when="earlier_checkpoint",
                formula="epoch of the best evaluation, rounded up",
                inputs={"epoch": round(epoch, 3), "step": best_step},
                side_effects=("the learning-rate schedule becomes shorter too",),
                risk="low",
                expect=Expectation(
                    "eval_loss", "below", float(f"{limit:.4g}"), within_steps=max(1, best_step), min_n=1
                ),
            )
        )
    if run.config.get("load_best_model_at_end") is False:
        words.append("load_best_model_at_end from False to True")
        suggestions.append(
            set_field(
                run,
                "SFT001.2",
                "load_best_model_at_end",
                True,
                when="checkpoint",
                preconditions=("save_strategy equals eval_strategy, and save_steps is a multiple of eval_steps",),
                risk="low",
            )
        )
    suggestions.append(lower_learning_rate(run, "SFT001.3", 0.5, when="earlier_checkpoint"))
    change = (
        f"; consider changing {' and '.join(words)}" if words else "; train less long, or at half the learning_rate"
    )
    last = float(values[-1])
    return Finding(
        message=f"eval_loss rose from {best:.4g} (step {best_step}) to {last:.4g} (step {int(evals.steps[-1])}), by "
        f"{last / best - 1:.1%} (limit {limit / best - 1:.0%}), while loss fell from {then:.4g} to {now:.4g}.",
        advice=f"Stop and keep the checkpoint of step {best_step}{change}.",
        evidence=[
            Evidence(
                "eval_loss", "value", last, len(evals), evals.span, baseline=best, threshold=limit, direction="above"
            ),
            Evidence(
                "loss",
                "median",
                now,
                len(since),
                (int(losses.steps[-len(since)]), int(losses.steps[-1])),
                baseline=then,
            ),
        ],
        suggestions=suggestions,
        confidence="medium" if errors else "low" if last - best < 0.02 * abs(best) else "medium",
        onset_step=best_step,
        impact="each further step makes the model worse on new data",
        not_checked=() if errors else ("standard error of eval_loss: not measured", "a task metric: not measured"),
    )


def _epoch_at(run: RunView, step: int) -> float | None:
    """The epoch of a step: as logged at or before it, else from the planned epochs and steps."""
    epochs = run.window("epoch")
    if epochs is not None and epochs.steps[0] <= step:
        return float(epochs.values[epochs.steps <= step][-1])
    planned = run.number("num_train_epochs")
    return step / run.total_steps * planned if planned and run.total_steps else None
