"""Log-probabilities of sampled completions under a model, prompts of a group computed once where that pays.

Axes: `N` completions, `P` prompt tokens, `T` completion tokens.
"""

import inspect
import logging
from typing import Any, NamedTuple

import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn

from outspoken.trainers.data.vision import joined_images
from outspoken.trainers.group_prompts import (
    grouped_completions,
    grouping_settings,
    plain_completions,
    why_not_grouped,
)
from outspoken.trainers.logprobs import IGNORE_INDEX, label_scores
from outspoken.trainers.rollouts.batch import RolloutBatch
from outspoken.trainers.shared_prompts import AnswerBatch

logger = logging.getLogger(__name__)


class CompletionScores(NamedTuple):
    """Of each completion token, (N, T): log-probability; entropy in nats, or None; and the load-balancing loss of a
    mixture of experts, a scalar, or None."""

    logps: Tensor
    entropy: Tensor | None
    aux_loss: Tensor | None


def completion_scores(
    trainer: Any,
    model: nn.Module,
    batch: RolloutBatch,
    *,
    want: tuple[str, ...] = (),
    entropy_grad: bool = False,
    aux_loss: bool = False,
) -> CompletionScores:
    """Score the completions of a batch at the temperature they were sampled at.

    Args:
        trainer: it has `accelerator`, `args` and `rollouts`, and `prepare_scoring` has seen it.
        model: the policy or the reference, possibly wrapped.
        want: ("entropy",) for the entropies.
        entropy_grad: whether gradients flow through them.
        aux_loss: whether to return the load-balancing loss.
    """
    inner = trainer.accelerator.unwrap_model(model)
    laid_out = lay_out(trainer, batch)
    inputs = {**laid_out.inputs, "use_cache": False}
    if aux_loss:
        inputs["output_router_logits"] = True
    with trainer.accelerator.autocast():
        scores, output = label_scores(
            model,
            inputs,
            laid_out.labels,
            unwrapped=inner,
            temperature=batch.temperature,
            want=want,
            entropy_grad=entropy_grad,
            fp32_head=getattr(trainer.args, "cast_lm_head_to_fp32", False),
        )
    entropy = None if scores.entropy is None else laid_out.take(scores.entropy)
    return CompletionScores(laid_out.take(scores.logps), entropy, output["aux_loss"] if aux_loss else None)


def lay_out(trainer: Any, batch: RolloutBatch) -> AnswerBatch:
    """The batch as the model gets it: rows of a prompt and its completions where that pays, or a row a completion."""
    prompts_and_completions = batch.prompt_ids, batch.prompt_mask, batch.completion_ids, batch.completion_mask
    if batch.images is not None:
        return _with_images(batch)
    laid_out = None
    if trainer._grouping is not None and trainer.args.share_prompts:
        laid_out = grouped_completions(
            *prompts_and_completions,
            trainer.rollouts.tokenizer.pad_token_id,
            scored=batch.loss_mask,
            **trainer._grouping,
        )
    return laid_out or plain_completions(
        *prompts_and_completions, position_ids=trainer._takes_position_ids, scored=batch.loss_mask
    )


def _with_images(batch: RolloutBatch) -> AnswerBatch:
    """Rows as they are, padded on the left: where an image's tokens stand decides what the model puts there."""
    ids = torch.cat([batch.prompt_ids, batch.completion_ids], dim=1)
    mask = torch.cat([batch.prompt_mask, batch.completion_mask], dim=1)
    n, width = batch.prompt_ids.shape
    labels = ids.clone()
    labels[:, :width] = IGNORE_INDEX
    labels[:, width:] = labels[:, width:].masked_fill(batch.loss_mask == 0, IGNORE_INDEX)
    columns = torch.arange(width - 1, ids.size(1) - 1, device=ids.device).expand(n, -1)
    rows = torch.arange(n, device=ids.device).unsqueeze(1).expand_as(columns)
    assert batch.images is not None
    of_images = joined_images(batch.images, width, behind=ids.size(1) - width)
    inputs = {"input_ids": ids, "attention_mask": mask, **of_images}
    return AnswerBatch(inputs, labels, rows, columns, batch.loss_mask.bool())


def prepare_scoring(trainer: Any) -> None:
    """Find out, once, how the trainer's models are to be asked: sets `_takes_position_ids` and `_grouping`.

    To be called after `Trainer.__init__`, before the models are wrapped.
    """
    trainer._takes_position_ids = takes_position_ids(trainer.model)
    models = [trainer.model] if trainer.ref_model is None else [trainer.model, trainer.ref_model]
    settings = [grouping_settings(model, compiled=trainer.args.torch_compile) for model in models]
    why_not = None
    if not trainer.args.share_prompts:
        why_not = "`share_prompts` is off"
    elif settings[0] != settings[-1]:
        why_not = "policy and reference take different attention masks"
    for model in models:
        why_not = why_not or why_not_grouped(model)
    trainer._grouping = settings[0] if why_not is None else None
    if why_not is not None:
        logger.info(f"The prompt of a group is computed for each of its completions: {why_not}.")


def logps_without_grad(trainer: Any, model: nn.Module, batch: RolloutBatch) -> Tensor:
    """Log-probabilities (N, T) under the model without dropout, a micro-batch at a time."""
    args = trainer.args
    size = args.per_device_train_batch_size if trainer.model.training else args.per_device_eval_batch_size
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            parts = [
                completion_scores(trainer, model, batch.select(slice(start, start + size))).logps
                for start in range(0, len(batch), size)
            ]
    finally:
        model.train(was_training)
    return torch.cat(parts)


def needed_rows(advantages: Tensor, mask: Tensor) -> Tensor:
    """Which completions give the policy loss a gradient: those with an advantage and with a token in the loss.

    Never none, so that every process has a backward pass.

    Args:
        advantages: (N,) or (N, T). mask: (N, T), 1 on tokens in the loss.
    """
    of_tokens = advantages if advantages.ndim == 2 else advantages.unsqueeze(1)
    rows = ((of_tokens != 0) & mask.bool()).any(1).nonzero().flatten()
    return rows if len(rows) else rows.new_zeros(1)


def needed_scores(
    trainer: Any, model: nn.Module, batch: RolloutBatch, *, leave_out: bool, entropy_grad: bool = False
) -> tuple[CompletionScores, Tensor]:
    """Score a batch with gradients, but for the completions whose gradient is zero because they have no advantage.

    Of those, what is known from sampling stands in the scores: log-probabilities, so that their ratio is 1, and entropies.

    Args:
        leave_out: whether advantages alone give a gradient, so that completions may be left out. In evaluation, and with
            a load-balancing loss, none is.

    Returns:
        The scores of all completions, and which of them went through the model, (N,) bool.
    """
    with_aux_loss = trainer.aux_loss_coef != 0.0
    wanted: dict[str, Any] = {"want": ("entropy",), "entropy_grad": entropy_grad, "aux_loss": with_aux_loss}
    all_of_them = torch.ones(len(batch), dtype=torch.bool, device=batch.advantages.device)
    if not leave_out or with_aux_loss or not trainer.model.training:
        return completion_scores(trainer, model, batch, **wanted), all_of_them
    rows = needed_rows(batch.advantages, batch.loss_mask)
    if len(rows) == len(batch):
        return completion_scores(trainer, model, batch, **wanted), all_of_them
    part = batch.select(rows).trimmed(trainer.args.pad_to_multiple_of)
    scores = completion_scores(trainer, model, part, **wanted)
    assert scores.entropy is not None

    def spread(values: Tensor, others: Tensor | None) -> Tensor:
        filled = torch.zeros_like(batch.loss_mask, dtype=values.dtype)
        if others is not None:
            filled = torch.nan_to_num(others.to(values.dtype))
        padded = nn.functional.pad(values, (0, filled.size(1) - values.size(1)))
        return filled.index_copy(0, rows, padded)

    before = batch.sampler_logps if batch.old_logps is None else batch.old_logps
    scored = torch.zeros_like(all_of_them).index_fill(0, rows, True)
    return CompletionScores(
        spread(scores.logps, before), spread(scores.entropy, batch.sampler_entropies), None
    ), scored


def takes_position_ids(model: Any) -> bool:
    """Whether a causal language model, possibly with an adapter, can be told the positions of its tokens."""
    if is_peft_model(model):
        if model.active_peft_config.is_prompt_learning:
            return False
        model = model.get_base_model()
    return "position_ids" in inspect.signature(model.forward).parameters
