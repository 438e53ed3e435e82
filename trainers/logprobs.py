"""Per-token log-probabilities and entropies of given labels, without holding the vocabulary axis for a whole batch.

Axis letters: `B` rows of a batch, `T` tokens of a row, `N` scored tokens, `H` hidden size, `V` vocabulary.

Two ways in: `scores_from_logits` when the logits exist anyway, and `label_scores`, which runs a causal language model
and projects only the positions that carry a label, a tile at a time, so that no (B, T, V) tensor is ever built. Both
score with one autograd function, `_LabelScores`, whose backward pass writes the gradient of a tile over the tile.
"""

import math
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Partial
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig
from transformers.utils import ModelOutput

IGNORE_INDEX = -100  # the label of a token that carries no loss

# At most this many float32 logits (or twice as many in half precision) exist at a time: 2**26 are 256 MiB.
MAX_SLICE_LOGITS = 2**26
# If that is not all, a tile on a CPU has so many: larger ones are not faster, for each needs fresh memory.
CPU_TILE_LOGITS = 2**24
# A tile is so wide or wider, where it can be: of narrow ones there are more, and each reads the hidden states again.
MIN_TILE_WIDTH = 2**13
# A tile is scored in blocks of so many logits. On a CPU a block and its copy stay in the cache; elsewhere, a block is
# large against the time that it takes to start a kernel.
CPU_BLOCK_LOGITS = 2**18
DEVICE_BLOCK_LOGITS = 2**24
# The log-probability of a forbidden token, which is -inf, where it is multiplied with its probability: 0, not nan.
FORBIDDEN = -1e4


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
    how = _How(logits.dtype, temperature, tuple(want), entropy_grad, max_slice_logits)
    return _spread(_score(logits, mask.nonzero(as_tuple=True), labels[mask], how), mask)


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
    withheld, output = run_without_head(model, inputs, inner)
    if withheld is not None:
        head, hidden = withheld.head, withheld.hidden
        labels = shift_labels(labels, hidden.size(1)).to(hidden.device)
        mask = labels != IGNORE_INDEX
        labelled = hidden[:, :-1], mask.nonzero(as_tuple=True), labels[mask]
        dtype = torch.float32 if fp32_head else withheld.autocast or hidden.dtype
        how = _How(dtype, temperature, tuple(want), entropy_grad, max_slice_logits)
        if is_plain(head):
            multiplier, cap = logit_transform(inner.config)
            how = replace(how, multiplier=multiplier, cap=cap)
            found = _score(*labelled, how, whole_weight(head.weight), whole_weight(head.bias))
        else:
            with torch.autocast(hidden.device.type, dtype=withheld.autocast, enabled=dtype == withheld.autocast):
                found = _score_through_head(*labelled, how, head, inner.config, output.logits.size(-1))
        return _spread(found, mask), output

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


def run_without_head(model: nn.Module, inputs: Mapping[str, Any], inner: Any) -> "tuple[WithheldHead | None, Any]":
    """Run a causal language model with all but the last position withheld from its output head.

    Args:
        model: the model to call, possibly wrapped.
        inner: the model inside.

    Returns:
        What was withheld, and the output, whose logits are those of the last position; or None and the whole output,
        where the architecture does something to its logits that `finish_logits` does not know.
    """
    head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    # FSDP1 has taken the head's weight apart again when its forward pass ends.
    if head is not None and inner not in _HEAD_IS_NOT_ALL and not isinstance(model, FullyShardedDataParallel):
        with WithheldHead(head) as withheld:
            output = model(**inputs)
        if withheld.hidden is not None and (inner in _HEAD_IS_ALL or withheld.explains(output.logits, inner.config)):
            _HEAD_IS_ALL.add(inner)
            if isinstance(model, FSDPModule):
                withheld.hidden = Follow.apply(withheld.hidden, output.logits)
            return withheld, output
        _HEAD_IS_NOT_ALL.add(inner)
    return None, model(**inputs)


def finish_logits(logits: Tensor, config: PreTrainedConfig) -> Tensor:
    """What an architecture does to its logits after the output head: scaling (Cohere, Granite, Falcon-H1) and the
    tanh soft cap (Gemma)."""
    multiplier, cap = logit_transform(config)
    if multiplier != 1:
        logits = logits * multiplier
    if cap is not None:
        logits = torch.tanh(logits / cap) * cap
    return logits


def logit_transform(config: PreTrainedConfig) -> tuple[float, float | None]:
    """The two numbers of `finish_logits`: what the head's output is multiplied by, and the soft cap or None."""
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
    return 1.0 if multiplier is None else multiplier, getattr(config, "final_logit_softcapping", None)


# Models found to change their logits in a way `finish_logits` does not know (their full logits are used), and those
# found not to.
_HEAD_IS_NOT_ALL: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()
_HEAD_IS_ALL: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()


def is_plain(head: nn.Module) -> bool:
    """Whether calling the head only multiplies with its weight, which this process holds whole or can gather.

    Not so for adapters, quantized layers, hooks, forwards replaced by Accelerate, and weights that are gathered when the
    head is called (DeepSpeed ZeRO-3, a head that FSDP shards by itself).
    """
    kind = type(head)
    hooks = [
        hook
        for each in (head._forward_pre_hooks, head._forward_hooks, head._backward_pre_hooks, head._backward_hooks)
        for hook in each.values()
    ]
    if isinstance(head, FSDPModule):
        if isinstance(head.weight, DTensor):
            return False
        kind = kind.__bases__[-1]
        hooks = [hook for hook in hooks if not hook.__module__.startswith("torch.distributed.fsdp")]
    if kind is not nn.Linear or hooks or "forward" in vars(head) or hasattr(head.weight, "ds_id"):
        return False
    weights: list[Any] = [weight for weight in (head.weight, head.bias) if weight is not None]
    return (
        all(type(w) in (nn.Parameter, Tensor, DTensor) and w.is_floating_point() for w in weights)
        and weights[0].shape == (head.out_features, head.in_features)
        and weights[0].untyped_storage().size() > 0
    )


def whole_weight(weight: Tensor | None) -> Tensor | None:
    """A weight of the head, gathered if FSDP2 has sharded it again after the model's forward pass."""
    if not isinstance(weight, DTensor):
        return weight
    # FSDP averages the gradients of the processes, and each has a gradient of its own batch.
    mesh = weight.device_mesh
    whole = weight.full_tensor(grad_placements=[Partial()] * mesh.ndim)
    if whole.requires_grad:
        whole.register_hook(lambda grad: grad / mesh.size())
    return whole


class Follow(torch.autograd.Function):
    """`hidden` as it is, whose backward pass waits for that of the model's logits, which get no gradient.

    FSDP gathers the root's weights for the backward pass when that reaches an output of the model.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, logits: Tensor) -> Tensor:
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class WithheldHead:
    """While open, the output head sees the last position only, and the hidden states it should have seen are kept."""

    def __init__(self, head: nn.Module) -> None:
        self.head: Any = head
        self.hidden: Any = None  # (B, T, H); None while the head was not called
        self.autocast: torch.dtype | None = None  # the precision of the autocast that the head runs under, if any
        self._raw: Tensor | None = None  # what the head made of the last position, (B, 1, V)

    def __enter__(self) -> "WithheldHead":
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
        self.autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        return (args[0][:, -1:], *args[1:])

    def _after(self, head: nn.Module, args: tuple, output: Tensor) -> None:
        self._raw = output.detach()

    def explains(self, logits: Tensor, config: PreTrainedConfig) -> bool:
        """Whether the model's logits of the kept position are what `finish_logits` makes of the head's output."""
        if self._raw is None or logits.shape != self._raw.shape:
            return False
        expected = finish_logits(self._raw, config).float()
        return torch.allclose(logits.detach().float(), expected, rtol=1e-2, atol=1e-3, equal_nan=True)


def shift_labels(labels: Tensor, length: int) -> Tensor:
    """Labels of the next token, (B, length - 1); virtual tokens of prompt learning stand in front, unlabelled."""
    virtual = length - labels.size(1)
    if virtual > 0:
        labels = nn.functional.pad(labels, (virtual, 0), value=IGNORE_INDEX)
    return labels[:, 1:]


@dataclass(frozen=True)
class _How:
    """How logits are made of states, and what is computed of them."""

    dtype: torch.dtype  # in which the head projects
    temperature: float
    want: tuple[str, ...]
    entropy_grad: bool
    max_slice_logits: int
    multiplier: float = 1.0  # see `logit_transform`
    cap: float | None = None

    @property
    def exact(self) -> torch.dtype:
        """The precision of the softmax: in bfloat16 it would be off by percents."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32


_Scores = dict[str, Tensor]  # fields of `TokenScores`, each (N,)


def _score(
    states: Tensor,
    index: tuple[Tensor, ...],
    targets: Tensor,
    how: _How,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> _Scores:
    """The scores of N labels; the arguments are those of `_LabelScores`."""
    if how.temperature <= 0:
        raise ValueError(f"temperature must be positive, got {how.temperature}.")
    names = ("logps", "entropy", "mean_logps", "is_top1", "mean_logits", "log_sum_sq_probs")
    values: Any = _LabelScores.apply(states, weight, bias, targets, how, torch.is_grad_enabled(), *index)
    return {name: value for name, value in zip(names, values) if value is not None}


def _score_through_head(
    hidden: Tensor,
    index: tuple[Tensor, ...],
    targets: Tensor,
    how: _How,
    head: nn.Module,
    config: PreTrainedConfig,
    vocabulary: int,
) -> _Scores:
    """The scores of N labels by calling the head, whatever it is, on slices of their hidden states."""

    def score(rows: Tensor, targets: Tensor) -> _Scores:
        logits = finish_logits(head(rows), config)
        places = torch.arange(len(rows), device=rows.device)
        return _score(logits, (places,), targets, replace(how, dtype=logits.dtype))

    rows = hidden[index].float() if how.dtype == torch.float32 else hidden[index]
    # Not checked for equal shapes: under ZeRO-3 a weight is there in the forward pass and may be away before the backward.
    slices = [
        checkpoint(score, rows[cut], targets[cut], use_reentrant=False, determinism_check="none")
        if torch.is_grad_enabled()
        else score(rows[cut], targets[cut])
        for cut in head_slices(head, rows, how.max_slice_logits // vocabulary)
    ]
    return _join(slices)


def head_slices(head: nn.Module, rows: Tensor, size: int) -> list[slice]:
    """Slices of at most `size` rows for a head that is called on each; at least one.

    On every process as many, where the head's weights are spread over them (ZeRO-3, FSDP2) and each call gathers them:
    then all processes must call it, and some slices may be empty.
    """
    cuts = _slices(len(rows), size)
    if any(isinstance(module, FSDPModule) for module in head.modules()) or any(
        isinstance(p, DTensor) or hasattr(p, "ds_id") for p in head.parameters()
    ):
        most = torch.tensor(len(cuts), device=rows.device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        cuts += [slice(len(rows), len(rows))] * (int(most) - len(cuts))
    return cuts


def _spread(scores: _Scores, mask: Tensor) -> TokenScores:
    """N scores at the places of the N labels, zero elsewhere."""
    # masked_scatter keeps the graph connected when nothing is scored, so backward gives zeros instead of failing.
    return TokenScores(
        mask=mask, **{name: value.new_zeros(mask.shape).masked_scatter(mask, value) for name, value in scores.items()}
    )


def _join(parts: list[_Scores]) -> _Scores:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


class _LabelScores(torch.autograd.Function):
    """Scores of N labels, each (N,), from their states: hidden states and the output head's weight, or logits.

    The logits exist in tiles, some rows x some of the vocabulary. Within a tile, blocks of rows that fit into the
    processor's cache are scored in place; the tiles of the same rows are merged. The backward pass computes each tile
    again and writes its gradient over it, unless a single tile holds all logits: then their probabilities stay in its
    memory. Products that are summed over tiles are summed in float32, because rounding each to bfloat16 first biases
    training.

    Args of `apply`:
        states: (..., H), or logits (..., V) if there is no weight.
        weight, bias: the head's, (V, H) and (V,), or None.
        targets: (N,), the labels.
        how: see `_How`.
        training: whether a backward pass may follow.
        index: where the N rows lie in `states`, one (N,) tensor for each leading dimension.
    """

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        targets: Tensor,
        how: _How,
        training: bool,
        *index: Tensor,
    ) -> tuple[Tensor | None, ...]:
        vocabulary = (states if weight is None else weight.t()).size(-1)
        row_cuts, column_cuts = _cuts(states, weight, len(targets), how)
        alone = weight is not None and len(row_cuts) == len(column_cuts) == 1
        keep = training and alone and how.cap is None and not how.entropy_grad
        buffer = _buffer(states, weight, row_cuts, column_cuts, how)
        parts = []
        for rows in row_cuts:
            inputs = states[_at(index, rows)].to(how.dtype)
            of_tiles = []
            for columns in column_cuts:
                tile = _tile(inputs, weight, bias, columns, buffer, how)
                of_tiles.append(_score_tile(tile, targets[rows] - columns.start, how, keep))
            parts.append(reduce(_merge, of_tiles))
        found = _join(parts)
        normalizer, mean = found["normalizer"], found["sum"] / vocabulary if "sum" in found else None
        logps = found["label"] - normalizer
        entropy = found.get("entropy")
        scores = {
            "logps": logps,
            "entropy": entropy,
            "mean_logps": mean - normalizer if mean is not None and "mean_logps" in how.want else None,
            "is_top1": found.get("is_top1"),
            "mean_logits": mean if "mean_logits" in how.want else None,
            "log_sum_sq_probs": found.get("log_sum_sq_probs"),
        }
        ctx.how, ctx.kept = how, tile if keep else None
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(states, weight, bias, targets, normalizer, logps, entropy, *index)
        without = ("is_top1", "mean_logits", "log_sum_sq_probs", *(() if how.entropy_grad else ("entropy",)))
        ctx.mark_non_differentiable(*(scores[name] for name in without if scores[name] is not None))
        return tuple(scores.values())

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, on_logps: Tensor | None, on_entropy: Tensor | None, on_mean_logps: Tensor | None, *none: None
    ) -> tuple[Tensor | None, ...]:
        if on_logps is None and on_entropy is None and on_mean_logps is None:
            return (None,) * len(ctx.needs_input_grad)
        states, weight, bias, targets, normalizer, logps, entropy, *index = ctx.saved_tensors
        how: _How = ctx.how
        kept, ctx.kept = ctx.kept, None  # overwritten below, so a second backward pass computes it again
        vocabulary = (states if weight is None else weight.t()).size(-1)
        row_cuts, column_cuts = _cuts(states, weight, len(targets), how)
        buffer = None if kept is not None else _buffer(states, weight, row_cuts, column_cuts, how)
        on_rows = _RowGradients.of(on_logps, on_entropy, on_mean_logps, entropy, vocabulary, how)

        wants_states, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        grad_states = torch.zeros(states.shape, dtype=states.dtype, device=states.device) if wants_states else None
        grad_weight = grad_bias = None
        if wants_weight:
            one_product = len(row_cuts) == 1 and weight.dtype == how.dtype
            grad_weight = torch.empty_like(weight, dtype=how.dtype if one_product else how.exact)
        if wants_bias:
            grad_bias = torch.zeros_like(bias, dtype=how.exact)
        for rows in row_cuts:
            inputs = states[_at(index, rows)].to(how.dtype)
            grad_inputs = torch.empty_like(inputs, dtype=how.dtype if len(column_cuts) == 1 else how.exact)
            for columns in column_cuts:
                local = targets[rows] - columns.start
                if kept is not None:
                    tile = kept
                    _overwrite_probabilities(tile, local, logps, on_rows)
                else:
                    tile = _tile(inputs, weight, bias, columns, buffer, how)
                    _overwrite_logits(tile, local, normalizer[rows], on_rows.select(rows), how)
                if weight is None:
                    grad_inputs = tile
                elif wants_states:
                    _add_product(grad_inputs, tile, weight[columns].to(how.dtype), first=columns is column_cuts[0])
                if grad_weight is not None:
                    _add_product(grad_weight[columns], tile.t(), inputs, first=rows is row_cuts[0])
                if grad_bias is not None:
                    grad_bias[columns] += tile.sum(0, dtype=how.exact)
            if grad_states is not None:
                grad_states[_at(index, rows)] = grad_inputs.to(states.dtype)
        return (
            grad_states,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            *[None] * (len(ctx.needs_input_grad) - 3),
        )


def _at(index: Sequence[Tensor], rows: slice) -> tuple[Tensor, ...]:
    return tuple(along[rows] for along in index)


def _cuts(states: Tensor, weight: Tensor | None, number: int, how: _How) -> tuple[list[slice], list[slice]]:
    """How the (number, V) logits are cut into tiles: by rows and by columns."""
    if weight is None:  # the logits exist, a tile is a copy
        size = min(how.max_slice_logits, _block_size(states)) // states.size(-1)
        return _slices(number, size), [slice(0, states.size(-1))]
    limit = how.max_slice_logits
    if states.device.type == "cpu":
        limit = limit if number * len(weight) <= limit else min(limit, CPU_TILE_LOGITS)
    elif how.dtype.itemsize == 2:
        limit *= 2
    rows = _slices(number, limit // min(len(weight), MIN_TILE_WIDTH))
    return rows, _slices(len(weight), limit // max(1, rows[0].stop))


def _slices(number: int, size: int) -> list[slice]:
    """`range(number)` in as few slices of at most `size` as possible, none longer than the first; at least one."""
    count = max(1, math.ceil(number / max(1, size)))
    ends = [math.ceil(number * i / count) for i in range(count + 1)]
    return [slice(*pair) for pair in pairwise(ends)]


def _buffer(
    states: Tensor, weight: Tensor | None, row_cuts: list[slice], column_cuts: list[slice], how: _How
) -> Tensor | None:
    """Memory for each tile in turn; the first one is the largest."""
    return None if weight is None else states.new_empty(row_cuts[0].stop * column_cuts[0].stop, dtype=how.dtype)


def _tile(
    inputs: Tensor, weight: Tensor | None, bias: Tensor | None, columns: slice, buffer: Tensor | None, how: _How
) -> Tensor:
    """What the head makes of the inputs, in the buffer; or the inputs, which then are copied logits."""
    if weight is None or buffer is None:
        return inputs.to(how.exact)
    shape = len(inputs), columns.stop - columns.start
    tile = buffer[: math.prod(shape)].view(shape)
    part = weight[columns].to(how.dtype).t()
    if bias is None:
        return torch.mm(inputs, part, out=tile)
    return torch.addmm(bias[columns].to(how.dtype), inputs, part, out=tile)


def _block_size(like: Tensor) -> int:
    return CPU_BLOCK_LOGITS if like.device.type == "cpu" else DEVICE_BLOCK_LOGITS


def _blocks(tile: Tensor) -> list[slice]:
    return _slices(len(tile), _block_size(tile) // tile.size(1))


def _finish_tile(block: Tensor, how: _How) -> Tensor:
    """The logits to score from what the head made, in the precision of the softmax: `block` itself if it has it."""
    logits = block.to(how.exact)
    factor = how.multiplier / how.temperature if how.cap is None else how.multiplier / how.cap
    if factor != 1:
        logits.mul_(factor)
    if how.cap is not None:
        logits.tanh_().mul_(how.cap / how.temperature)
    return logits


def _score_tile(tile: Tensor, targets: Tensor, how: _How, keep: bool) -> _Scores:
    """Scores of a tile's rows as far as its columns tell; it is overwritten, if `keep` by the rows' probabilities.

    Targets are numbers of columns; one that is out of range lies in another tile.
    """
    want = {"mean_logits" if name == "mean_logps" else name for name in how.want}
    scratch = None
    parts = []
    for block in _blocks(tile):
        logits, local = _finish_tile(tile[block], how), targets[block]
        inside = (local >= 0) & (local < logits.size(1))
        at_label = logits.gather(1, local.clamp(0, logits.size(1) - 1).unsqueeze(1)).squeeze(1)
        top = logits.amax(1)
        found = {"label": at_label.masked_fill(~inside, -math.inf), "top": top}
        if "is_top1" in want:
            found["is_top1"] = inside & _is_first_maximum(logits, local, at_label, top)
        if "mean_logits" in want:
            found["sum"] = logits.sum(1)
        shift = top.clamp(
            min=torch.finfo(how.exact).min
        )  # a tile may hold nothing but forbidden tokens, whose logits are -inf
        logits.sub_(shift.unsqueeze(1))
        if "entropy" in want:
            logits.clamp_(min=FORBIDDEN)
            scratch = torch.empty_like(logits) if scratch is None else scratch
            exps = torch.exp(logits, out=scratch[: len(logits)])
        else:
            exps = logits.exp_()
        total = exps.sum(1).clamp_(min=torch.finfo(how.exact).tiny)
        found["normalizer"] = shift + total.log()
        if "entropy" in want:
            found["entropy"] = total.log() - logits.mul_(exps).sum(1) / total
        if "log_sum_sq_probs" in want:
            found["log_sum_sq_probs"] = exps.square().sum(1).log() - 2 * total.log()
        if keep:
            torch.div(exps, total.unsqueeze(1), out=tile[block])
        parts.append(found)
    return _join(parts)


def _is_first_maximum(logits: Tensor, targets: Tensor, at_target: Tensor, top: Tensor) -> Tensor:
    """Whether the target is the first of the row's largest logits."""
    if logits.device.type != "cpu":
        return logits.argmax(1) == targets
    # On a CPU `argmax` takes as long as all the rest, and is needed only to break ties.
    hit = at_target == top
    rows = hit.nonzero().squeeze(1)
    hit[rows] = logits[rows].argmax(1) == targets[rows]
    return hit


def _merge(left: _Scores, right: _Scores) -> _Scores:
    """Scores of rows from those of two parts of the vocabulary, `left` in front."""
    normalizer = torch.logaddexp(left["normalizer"], right["normalizer"])
    shares = [(part["normalizer"] - normalizer).exp() for part in (left, right)]
    merged = {
        "normalizer": normalizer,
        "label": torch.maximum(left["label"], right["label"]),
        "top": torch.maximum(left["top"], right["top"]),
    }
    if "is_top1" in left:
        overtaken = right["top"] > left["top"]
        merged["is_top1"] = torch.where(overtaken, right["is_top1"], left["is_top1"])
    if "sum" in left:
        merged["sum"] = left["sum"] + right["sum"]
    if "entropy" in left:
        of_left, of_right = (
            share * (part["entropy"] + normalizer - part["normalizer"]) for share, part in zip(shares, (left, right))
        )
        merged["entropy"] = of_left + of_right
    if "log_sum_sq_probs" in left:
        merged["log_sum_sq_probs"] = torch.logaddexp(
            *(part["log_sum_sq_probs"] + 2 * (part["normalizer"] - normalizer) for part in (left, right))
        )
    return merged


@dataclass
class _RowGradients:
    """What is needed of each row for the gradient of its logits, p (share + slope log p) + flat + label [is the label].

    Each (N,); `flat` and `slope` are None where they are zero.
    """

    label: Tensor
    share: Tensor
    flat: Tensor | None
    slope: Tensor | None

    @classmethod
    def of(
        cls,
        on_logps: Tensor | None,
        on_entropy: Tensor | None,
        on_mean_logps: Tensor | None,
        entropy: Tensor | None,
        vocabulary: int,
        how: _How,
    ) -> "_RowGradients":
        """From the gradients of the scores: of log p_label it is [is the label] - p, of the mean of log p it is
        1/V - p, and of the entropy it is -p (log p + entropy)."""
        some = next(grad for grad in (on_logps, on_entropy, on_mean_logps) if grad is not None)
        factor = how.multiplier / how.temperature
        label = torch.zeros_like(some) if on_logps is None else on_logps * factor
        share, flat, slope = -label, None, None
        if on_mean_logps is not None:
            share, flat = share - on_mean_logps * factor, on_mean_logps * (factor / vocabulary)
        if on_entropy is not None and entropy is not None:
            slope = -on_entropy * factor
            share = share + slope * entropy
        return cls(label, share, flat, slope)

    def select(self, rows: slice) -> "_RowGradients":
        flat, slope = self.flat, self.slope
        return _RowGradients(
            self.label[rows],
            self.share[rows],
            None if flat is None else flat[rows],
            None if slope is None else slope[rows],
        )


def _overwrite_probabilities(tile: Tensor, targets: Tensor, logps: Tensor, on: _RowGradients) -> None:
    """Write the gradient of the logits, (N, V), over their probabilities."""
    at_label = on.share * logps.exp() + on.label  # from float32, for 1 - p is lost in half precision
    tile.mul_(on.share.unsqueeze(1))
    if on.flat is not None:
        tile.add_(on.flat.unsqueeze(1))
        at_label += on.flat
    tile.scatter_(1, targets.unsqueeze(1), at_label.unsqueeze(1).to(tile.dtype))


def _overwrite_logits(tile: Tensor, targets: Tensor, normalizer: Tensor, on: _RowGradients, how: _How) -> None:
    """Write the gradient of what the head made over it; the tile is a part of the vocabulary, as in `_score_tile`."""
    for block in _blocks(tile):
        logits, local, at = _finish_tile(tile[block], how), targets[block], on.select(block)
        through_cap = None if how.cap is None else 1 - (logits * (how.temperature / how.cap)).square_()
        logits.sub_(normalizer[block].unsqueeze(1))  # log p
        if at.slope is None:
            logits.exp_().mul_(at.share.unsqueeze(1))
        else:
            p = logits.exp()
            logits.clamp_(min=FORBIDDEN).mul_(at.slope.unsqueeze(1)).add_(at.share.unsqueeze(1)).mul_(p)
        if at.flat is not None:
            logits.add_(at.flat.unsqueeze(1))
        inside = (local >= 0) & (local < logits.size(1))
        at_label = torch.where(inside, at.label, 0.0).unsqueeze(1)
        logits.scatter_add_(1, local.clamp(0, logits.size(1) - 1).unsqueeze(1), at_label)
        if through_cap is not None:
            logits.mul_(through_cap)
        if logits.dtype != tile.dtype:
            tile[block] = logits


def _add_product(total: Tensor, left: Tensor, right: Tensor, first: bool) -> None:
    """total += left @ right, summed in the precision of `total`; `first`: total = left @ right."""
    beta = 0.0 if first else 1.0
    if left.dtype == total.dtype:
        total.addmm_(left, right, beta=beta)
    elif total.is_cuda and torch.__version__ >= (2, 8):  # type: ignore[operator]
        torch.addmm(total, left, right, beta=beta, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype), beta=beta)
