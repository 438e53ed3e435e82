"""Per-token log-probabilities and entropies of given labels, without holding the vocabulary axis for a whole batch.

Axis letters: `B` rows of a batch, `T` tokens of a row, `N` scored tokens, `H` hidden size, `V` vocabulary.

Two ways in: `scores_from_logits` when the logits exist anyway, and `label_scores`, which runs a causal language model
and projects only the positions that carry a label, a slice at a time, so that no (B, T, V) tensor is ever built. Both
recompute a slice's softmax in the backward pass instead of keeping it.
"""

import weakref
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig
from transformers.utils import ModelOutput

IGNORE_INDEX = -100  # the label of a token that carries no loss

# Rows are scored in slices of at most this many logits: 2**26 float32 values are 256 MiB.
MAX_SLICE_LOGITS = 2**26


@dataclass
class TokenScores:
    """What is known about each label under the model, all of the labels' shape and zero where the label is -100.

    Attributes:
        logps: log-probability of the label, in nats, float32 (float64 for float64 logits), differentiable.
        mask: True where the label is not -100.
        entropy: entropy of the distribution the label was drawn from, in nats; None unless asked for.
        is_top1: whether the label is the most likely token; None unless asked for.
        mean_logps: mean log-probability over the vocabulary (what label smoothing pulls up); None unless asked for.
        mean_logits: mean over the vocabulary of the logits, divided by the temperature, without gradient; None unless
            asked for.
        log_sum_sq_probs: log of the sum over the vocabulary of p^2, without gradient (WPO, arXiv 2406.11827); None
            unless asked for.
    """

    logps: Tensor
    mask: Tensor
    entropy: Tensor | None = None
    is_top1: Tensor | None = None
    mean_logps: Tensor | None = None
    mean_logits: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None


def selective_log_softmax(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probability of each label: `log_softmax(logits / temperature)` gathered at `labels`.

    Args:
        logits: (..., V).
        labels: (...), token ids; -100 gives 0.

    Returns:
        (...), float32 whatever the logits' precision.
    """
    return scores_from_logits(logits, labels, temperature=temperature).logps


def entropy_from_logits(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy in nats of `softmax(logits / temperature)`, without gradient: (..., V) -> (...)."""
    labels = torch.zeros(logits.shape[:-1], dtype=torch.long, device=logits.device)
    with torch.no_grad():
        entropy = scores_from_logits(logits, labels, temperature=temperature, want=("entropy",)).entropy
    assert entropy is not None
    return entropy


def scores_from_logits(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    want: tuple[str, ...] = (),
    entropy_grad: bool = False,
    max_slice_logits: int = MAX_SLICE_LOGITS,
) -> TokenScores:
    """Score labels against logits that are already aligned with them (no shift happens here).

    Args:
        logits: (..., V).
        labels: (...), -100 where nothing is scored.
        temperature: the logits are divided by it.
        want: further fields of `TokenScores` to compute, of "entropy", "is_top1", "mean_logps",
            "mean_logits", "log_sum_sq_probs".
        entropy_grad: whether gradients flow through the entropy.
        max_slice_logits: how many float32 logits may exist at a time beside the given ones.
    """
    mask = labels != IGNORE_INDEX
    return _score(
        logits, labels, mask, nn.Identity(), logits.size(-1), temperature, want, entropy_grad, max_slice_logits
    )


def label_scores(
    model: nn.Module,
    inputs: Mapping[str, Any],
    labels: Tensor,
    *,
    unwrapped: nn.Module | None = None,
    temperature: float = 1.0,
    want: tuple[str, ...] = (),
    entropy_grad: bool = False,
    fp32_head: bool = False,
    max_slice_logits: int = MAX_SLICE_LOGITS,
) -> tuple[TokenScores, ModelOutput]:
    """Score the next-token labels of a causal language model without building its (B, T, V) logits.

    The model runs through its own `forward` (so adapters, hooks and wrappers take part) with all but one position
    withheld from its output head. The head is then applied, in slices, to the positions whose next token has a label.

    Args:
        model: the model to call, possibly wrapped for distributed training.
        inputs: keyword arguments of its forward, without labels.
        labels: (B, T), aligned with `input_ids`; -100 where no loss is wanted. Shifted here, not by the caller.
        unwrapped: the `PreTrainedModel` or `PeftModel` inside `model`, if `model` is wrapped.
        temperature, want, entropy_grad, max_slice_logits: see `scores_from_logits`.
        fp32_head: project in float32, outside autocast.

    Returns:
        Scores of shape (B, T - 1), where position t scores token t + 1, and the model's output, whose logits are
        those of the last position only. Under prompt learning the shape is (B, T - 1 + P), for P virtual tokens.
    """
    inner: Any = model if unwrapped is None else unwrapped
    head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    if head is not None and inner not in _HEAD_IS_NOT_ALL:
        with _WithheldHead(head) as withheld:
            output = model(**inputs)
        if withheld.hidden is not None and withheld.explains(output.logits, inner.config):
            hidden = withheld.hidden[:, :-1]
            labels = shift_labels(labels, withheld.hidden.size(1)).to(hidden.device)
            mask = labels != IGNORE_INDEX
            project = partial(_project, head=head, finish=partial(finish_logits, config=inner.config))
            context = withheld.autocast()
            if fp32_head:
                hidden, context = hidden.float(), torch.autocast(hidden.device.type, enabled=False)
            with context:
                vocabulary = output.logits.size(-1)
                scores = _score(
                    hidden, labels, mask, project, vocabulary, temperature, want, entropy_grad, max_slice_logits
                )
            return scores, output
        # This architecture does something to its logits that `finish_logits` does not know.
        _HEAD_IS_NOT_ALL.add(inner)

    output = model(**inputs)
    labels = shift_labels(labels, output.logits.size(1)).to(output.logits.device)
    scores = scores_from_logits(
        output.logits[:, :-1],
        labels,
        temperature=temperature,
        want=want,
        entropy_grad=entropy_grad,
        max_slice_logits=max_slice_logits,
    )
    output.logits = output.logits[:, -1:]
    return scores, output


def finish_logits(logits: Tensor, config: PreTrainedConfig) -> Tensor:
    """What an architecture does to its logits after the output head: scaling (Cohere, Granite, Falcon-H1) and the
    tanh soft cap (Gemma)."""
    config = config.get_text_config()
    multiplier = next(
        (
            value
            for name in ("logit_scale", "output_multiplier", "lm_head_multiplier")
            if (value := getattr(config, name, None)) is not None
        ),
        None,
    )
    divisor = getattr(config, "logits_scaling", None)
    if multiplier is None and divisor is not None:
        multiplier = divisor if config.model_type == "hyperclovax" else 1 / divisor
    if multiplier is not None and multiplier != 1:
        logits = logits * multiplier
    cap = getattr(config, "final_logit_softcapping", None)
    if cap is not None:
        logits = torch.tanh(logits / cap) * cap
    return logits


# Models found to change their logits in a way `finish_logits` does not know: their full logits are used.
_HEAD_IS_NOT_ALL: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()


class _WithheldHead:
    """While open, the output head sees the last position only, and the hidden states it should have seen are kept."""

    def __init__(self, head: nn.Module) -> None:
        self.head = head
        self.hidden: Tensor | None = None  # (B, T, H)
        self._raw: Tensor | None = None  # what the head made of the last position, (B, 1, V)
        self._autocast: torch.dtype | None = None

    def __enter__(self) -> "_WithheldHead":
        self._handles = [
            self.head.register_forward_pre_hook(self._before),
            self.head.register_forward_hook(self._after),
        ]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _before(self, head: nn.Module, args: tuple) -> tuple:
        self.hidden = args[0]
        device = args[0].device.type
        self._autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        return (args[0][:, -1:], *args[1:])

    def _after(self, head: nn.Module, args: tuple, output: Tensor) -> None:
        self._raw = output.detach()

    def autocast(self) -> AbstractContextManager:
        """The autocast state the head would have run under."""
        if self._autocast is None or self.hidden is None:
            return nullcontext()
        return torch.autocast(self.hidden.device.type, dtype=self._autocast)

    def explains(self, logits: Tensor, config: PreTrainedConfig) -> bool:
        """Whether the model's logits of the kept position are what `finish_logits` makes of the head's output."""
        if self._raw is None or logits.shape != self._raw.shape:
            return False
        expected = finish_logits(self._raw, config).float()
        return torch.allclose(logits.detach().float(), expected, rtol=1e-2, atol=1e-3, equal_nan=True)


def _project(rows: Tensor, head: nn.Module, finish: Callable[[Tensor], Tensor]) -> Tensor:
    return finish(head(rows))


def shift_labels(labels: Tensor, length: int) -> Tensor:
    """Labels of the next token, (B, length - 1); virtual tokens of prompt learning stand in front, unlabelled."""
    virtual = length - labels.size(1)
    if virtual > 0:
        labels = nn.functional.pad(labels, (virtual, 0), value=IGNORE_INDEX)
    return labels[:, 1:]


def _score(
    states: Tensor,
    labels: Tensor,
    mask: Tensor,
    project: Callable[[Tensor], Tensor],
    vocabulary: int,
    temperature: float,
    want: tuple[str, ...],
    entropy_grad: bool,
    max_slice_logits: int,
) -> TokenScores:
    """Score the positions in `mask`: states (..., H) or (..., V), labels and mask (...)."""
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}.")
    rows, targets = states[mask], labels[mask]
    size = max(1, max_slice_logits // vocabulary)
    slices = [
        checkpoint(_score_slice, row, target, project, temperature, want, entropy_grad, use_reentrant=False)
        if torch.is_grad_enabled()
        else _score_slice(row, target, project, temperature, want, entropy_grad)
        for row, target in zip(rows.split(size), targets.split(size))
    ]
    scores = {}
    for name in ("logps", *want):
        values = torch.cat([part[name] for part in slices])
        # masked_scatter keeps the graph connected when nothing is scored, so backward gives zeros instead of failing.
        scores[name] = values.new_zeros(mask.shape).masked_scatter(mask, values)
    return TokenScores(mask=mask, **scores)


def _score_slice(
    rows: Tensor,
    targets: Tensor,
    project: Callable[[Tensor], Tensor],
    temperature: float,
    want: tuple[str, ...],
    entropy_grad: bool,
) -> dict[str, Tensor]:
    """Scores of N rows, each (N,). The softmax is taken in float32: in bfloat16 it is off by percents."""
    logits = project(rows)
    if logits.dtype != torch.float64:
        logits = logits.float()
    if temperature != 1.0:
        logits = logits / temperature
    normalizer = logits.logsumexp(-1)
    scores = {"logps": logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - normalizer}
    if "entropy" in want:
        with nullcontext() if entropy_grad else torch.no_grad():
            all_logps = logits - normalizer.unsqueeze(-1)
            # A forbidden token (logit -inf) adds 0 to the entropy, not 0 * inf.
            scores["entropy"] = -(all_logps.exp() * all_logps.clamp(min=torch.finfo(logits.dtype).min)).sum(-1)
    if "is_top1" in want:
        scores["is_top1"] = logits.detach().argmax(-1) == targets
    if "mean_logps" in want:
        scores["mean_logps"] = logits.mean(-1) - normalizer
    if "mean_logits" in want:
        scores["mean_logits"] = logits.detach().mean(-1)
    if "log_sum_sq_probs" in want:
        with torch.no_grad():
            scores["log_sum_sq_probs"] = (2 * logits).logsumexp(-1) - 2 * normalizer
    return scores
