"""How far a student's next-token distributions are from a teacher's: the generalised Jensen-Shannon divergence.

    D_beta(S, T) = beta KL(T || M) + (1 - beta) KL(S || M),    M = (1 - beta) S + beta T        (GKD, arXiv 2306.13649)

for 0 < beta < 1. The ends are the plain divergences: beta = 0 the forward KL(T || S), beta = 1 the reverse KL(S || T).

Axis letters: `B` rows of a batch, `T` tokens of a row, `N` compared tokens, `K` tokens of a sparse teacher, `V`
vocabulary.

`generalised_jsd` and `sparse_jsd` compare logits that exist. `label_divergence` runs both models and compares them a
tile of positions at a time, so that neither model's (N, V) logits ever exist as a whole; its backward pass writes the
gradient over the student's tile.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from transformers.utils import ModelOutput

from outspoken.trainers.logprobs import (
    CPU_BLOCK_LOGITS,
    CPU_TILE_LOGITS,
    DEVICE_BLOCK_LOGITS,
    FORBIDDEN,
    IGNORE_INDEX,
    MAX_SLICE_LOGITS,
    finish_logits,
    head_slices,
    is_plain,
    logit_transform,
    run_without_head,
    shift_labels,
    whole_weight,
)

# ---------------------------------------------------------------------- of logits that exist


def generalised_jsd(student_logits: Tensor, teacher_logits: Tensor, beta: float, temperature: float = 1.0) -> Tensor:
    """Divergence in nats of `softmax(student / temperature)` and `softmax(teacher / temperature)`: (..., V) -> (...).

    A token that one of them forbids (logit -inf) counts as one of log-probability -10000 there.
    """
    log_s, log_t = (_log_softmax(_exactly(x) / temperature) for x in (student_logits, teacher_logits))
    return _divergence(log_s, log_t, beta)


def sparse_jsd(
    student_logits: Tensor,
    teacher_ids: Tensor,
    teacher_logps: Tensor,
    beta: float,
    temperature: float = 1.0,
    add_tail: bool = True,
) -> Tensor:
    """Divergence in nats from a teacher of which only K tokens are known, say its likeliest: (...).

    Args:
        student_logits: (..., V).
        teacher_ids: (..., K), tokens.
        teacher_logps: (..., K), their log-probabilities under the teacher, at this temperature.
        add_tail: compare K + 1 probabilities, the last that of all other tokens together. Otherwise compare the
            distributions given that the token is one of the K; of one token nothing is left to compare then.
    """
    logits = _exactly(student_logits) / temperature
    add_tail = add_tail and teacher_ids.size(-1) < logits.size(-1)
    log_s = _over_support(logits, teacher_ids, add_tail)
    log_t = teacher_logps.to(log_s.dtype)
    if add_tail:
        log_t = torch.cat([log_t, _log_rest(log_t)], dim=-1)
    return _divergence(_log_softmax(log_s), _log_softmax(log_t), beta)


def _divergence(log_s: Tensor, log_t: Tensor, beta: float) -> Tensor:
    if beta == 0.0:
        return (log_t.exp() * (log_t - log_s)).sum(-1)
    if beta == 1.0:
        return (log_s.exp() * (log_s - log_t)).sum(-1)
    log_m = torch.logaddexp(log_s + math.log1p(-beta), log_t + math.log(beta))
    of_teacher, of_student = ((x.exp() * (x - log_m)).sum(-1) for x in (log_t, log_s))
    return beta * of_teacher + (1 - beta) * of_student


def _exactly(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _log_softmax(logits: Tensor) -> Tensor:
    logps = torch.log_softmax(logits, dim=-1)
    return logps.clamp(min=FORBIDDEN) if logps.requires_grad else logps.clamp_(min=FORBIDDEN)


def _over_support(logits: Tensor, ids: Tensor, add_tail: bool) -> Tensor:
    """Logits of the distribution over the K tokens, (..., K), or over them and all others together, (..., K + 1)."""
    chosen = logits.gather(-1, ids)
    if not add_tail:
        return chosen
    rest = logits.scatter(-1, ids, -math.inf).logsumexp(-1, keepdim=True)
    return torch.cat([chosen, rest], dim=-1)


def _log_rest(logps: Tensor) -> Tensor:
    """log(1 - sum of the K probabilities), (..., 1); where rounding leaves nothing, about the rounding error."""
    log_sum = logps.logsumexp(-1, keepdim=True).clamp(max=-torch.finfo(logps.dtype).eps)
    return torch.log(-torch.expm1(log_sum))


# ---------------------------------------------------------------------- of two models, in tiles


@dataclass
class TokenDivergence:
    """What is known of each label's position, (B, T - 1), zero where the label is -100; only the divergence has a
    gradient.

    Attributes:
        divergence: between the student's and the teacher's distribution of the label, in nats.
        mask: True where the label is not -100.
        forward_kl: KL(teacher || student), in nats, over the whole vocabulary.
        reverse_kl: KL(student || teacher), the same.
        entropy: of the student's distribution, in nats.
        teacher_entropy: of the teacher's.
        same_top1: 1 where both find the same token most likely.
        logps: the label's log-probability under the student.
        teacher_logps: under the teacher.
    """

    divergence: Tensor
    mask: Tensor
    forward_kl: Tensor
    reverse_kl: Tensor
    entropy: Tensor
    teacher_entropy: Tensor
    same_top1: Tensor
    logps: Tensor
    teacher_logps: Tensor


_MEASURED = tuple(field.name for field in fields(TokenDivergence))[2:]


@dataclass(frozen=True)
class _How:
    """What is compared, and how the student's logits are made of what its head gives."""

    beta: float
    temperature: float
    top_k: int | None
    add_tail: bool
    vocabulary: int  # ids below it are compared
    max_slice_logits: int
    dtype: torch.dtype  # in which the head multiplies
    multiplier: float = 1.0  # see `logprobs.logit_transform`
    cap: float | None = None

    @property
    def exact(self) -> torch.dtype:
        """The precision of logits and softmax: differences of distributions drown in the rounding of bfloat16."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32


# Logits of the teacher for some of the N positions, (n, V), in the precision and on the device that is asked for.
_TeacherLogits = Callable[[slice, Tensor], Tensor]


def label_divergence(
    student: nn.Module,
    teacher: nn.Module,
    inputs: Mapping[str, Any],
    labels: Tensor,
    *,
    beta: float,
    temperature: float = 1.0,
    top_k: int | None = None,
    add_tail: bool = True,
    unwrapped: nn.Module | None = None,
    unwrapped_teacher: nn.Module | None = None,
    teacher_inputs: Mapping[str, Any] | None = None,
    max_slice_logits: int = MAX_SLICE_LOGITS,
) -> tuple[TokenDivergence, ModelOutput]:
    """Compare two causal language models at the positions whose next token has a label.

    Both run through their own `forward` (so adapters, hooks and wrappers take part) with all but one position withheld
    from their output heads; the heads are then applied to the same positions, a tile at a time. The gradient goes to
    the student alone.

    Where their embeddings are padded to different sizes, the token ids that both have are compared, as if there were
    no others; every label has to be one of them.

    Args:
        student, teacher: the models to call, possibly wrapped for distributed training.
        inputs: keyword arguments of the student's forward, without labels.
        labels: (B, T), aligned with `input_ids`; -100 where nothing is compared. Shifted here, not by the caller.
        beta: see this file's head.
        temperature: both models' logits are divided by it.
        top_k: compare only the teacher's so many likeliest tokens, and with `add_tail` all others as if they were one
            token (see `sparse_jsd`); None: all tokens.
        unwrapped, unwrapped_teacher: the models inside, where they are wrapped.
        teacher_inputs: keyword arguments of the teacher's forward, where they differ.
        max_slice_logits: how many float32 logits may exist at a time.

    Returns:
        What is known of each position, (B, T - 1) (under prompt learning (B, T - 1 + P), for P virtual tokens), and the
        student's output, whose logits are those of the last position only.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}.")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}.")
    inner: Any = student if unwrapped is None else unwrapped
    inner_teacher: Any = teacher if unwrapped_teacher is None else unwrapped_teacher
    teacher_logits, vocabulary = _teacher_logits(
        teacher, inner_teacher, inputs if teacher_inputs is None else teacher_inputs, labels
    )

    withheld, output = run_without_head(student, inputs, inner)
    vocabulary = min(vocabulary, output.logits.size(-1))
    states = output.logits if withheld is None else withheld.hidden
    labels = shift_labels(labels, states.size(1)).to(states.device)
    mask = labels != IGNORE_INDEX
    targets, index = labels[mask], mask.nonzero(as_tuple=True)
    how = _How(
        beta,
        temperature,
        None if top_k is None or top_k >= vocabulary else top_k,
        add_tail,
        vocabulary,
        max_slice_logits,
        dtype=states.dtype if withheld is None else withheld.autocast or states.dtype,
    )
    if withheld is None:
        found = _compare(states[:, :-1, :vocabulary], index, targets, how, teacher_logits)
        output.logits = output.logits[:, -1:]
    elif is_plain(withheld.head):
        multiplier, cap = logit_transform(inner.config)
        how = replace(how, multiplier=multiplier, cap=cap)
        weight, bias = whole_weight(withheld.head.weight), whole_weight(withheld.head.bias)
        assert weight is not None
        if vocabulary < len(weight):
            weight, bias = weight[:vocabulary], None if bias is None else bias[:vocabulary]
        found = _compare(states[:, :-1], index, targets, how, teacher_logits, weight, bias)
    else:
        found = _compare_through_head(states[:, :-1], index, targets, how, teacher_logits, withheld, inner.config)
    # masked_scatter keeps the graph connected when nothing is compared, so backward gives zeros instead of failing.
    spread = [value.new_zeros(mask.shape).masked_scatter(mask, value) for value in found]
    return TokenDivergence(spread[0], mask, *spread[1:]), output


@torch.no_grad()
def _teacher_logits(model: Any, inner: Any, inputs: Mapping[str, Any], labels: Tensor) -> tuple[_TeacherLogits, int]:
    """Run the teacher; return what makes its logits of some of the labelled positions, and how many logits there are."""
    withheld, output = run_without_head(model, inputs, inner)
    size = output.logits.size(-1)
    states = output.logits if withheld is None else withheld.hidden
    mask = shift_labels(labels, states.size(1)).to(states.device) != IGNORE_INDEX
    index, states = mask.nonzero(as_tuple=True), states[:, :-1]
    if withheld is None:
        return lambda rows, like: states[_at(index, rows)].to(like.device, like.dtype), size

    head, config, dtype = withheld.head, inner.config, withheld.autocast or states.dtype
    parameters = list(head.parameters())
    if is_plain(head) or (any(hasattr(p, "ds_id") for p in parameters) and type(head) is nn.Linear):
        weight, bias = _gathered(head)
        weight = weight.to(_product_dtype(dtype, weight.device))

        def by_weight(rows: slice, like: Tensor) -> Tensor:
            with torch.no_grad():
                logits = _project(states[_at(index, rows)], weight, bias, _exact(dtype))
                return finish_logits(logits, config).to(like.device, like.dtype)

        return by_weight, size

    def by_head(rows: slice, like: Tensor) -> Tensor:
        autocast = torch.autocast(states.device.type, dtype=withheld.autocast, enabled=withheld.autocast is not None)
        with torch.no_grad(), autocast:
            return finish_logits(head(states[_at(index, rows)]).to(_exact(dtype)), config).to(like.device, like.dtype)

    return by_head, size


def _gathered(head: Any) -> tuple[Tensor, Tensor | None]:
    """The weight and bias of a frozen linear head, whole on every process; all processes must call it."""
    kept = [p for p in (head.weight, head.bias) if p is not None]
    if not any(hasattr(p, "ds_id") for p in kept):
        bias = whole_weight(head.bias)
        return whole_weight(head.weight).detach(), None if bias is None else bias.detach()  # type: ignore[union-attr]
    import deepspeed

    with deepspeed.zero.GatheredParameters(kept):
        copies = [p.detach().clone() for p in kept]
    return copies[0], copies[1] if len(copies) > 1 else None


def _compare(
    states: Tensor,
    index: Sequence[Tensor],
    targets: Tensor,
    how: _How,
    teacher: _TeacherLogits,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> list[Tensor]:
    """The divergence and what is measured beside it at N positions, each (N,); the arguments are `_Divergence`'s."""
    divergence, measured = _Divergence.apply(
        states, weight, bias, targets, teacher, how, torch.is_grad_enabled(), *index
    )
    return [divergence, *measured.unbind(1)]


def _compare_through_head(
    states: Tensor,
    index: Sequence[Tensor],
    targets: Tensor,
    how: _How,
    teacher: _TeacherLogits,
    withheld: Any,
    config: Any,
) -> list[Tensor]:
    """As `_compare`, by calling the student's head, whatever it is, on slices of the hidden states."""
    rows = states[tuple(index)]
    autocast = withheld.autocast

    def compare(part: Tensor, targets: Tensor, start: int) -> list[Tensor]:
        with torch.autocast(part.device.type, dtype=autocast, enabled=autocast is not None):
            logits = finish_logits(withheld.head(part), config)[:, : how.vocabulary]
        places = torch.arange(len(part), device=part.device)

        def of_slice(at: slice, like: Tensor) -> Tensor:
            return teacher(slice(start + at.start, start + at.stop), like)

        return _compare(logits, (places,), targets, replace(how, dtype=logits.dtype), of_slice)

    found = []
    for cut in head_slices(withheld.head, rows, how.max_slice_logits // how.vocabulary):
        args = rows[cut], targets[cut], cut.start
        # Not checked for equal shapes: under ZeRO-3 a weight is there in the forward pass and may be away before the
        # backward.
        if torch.is_grad_enabled():
            found.append(checkpoint(compare, *args, use_reentrant=False, determinism_check="none"))
        else:
            found.append(compare(*args))
    return [torch.cat(parts) for parts in zip(*found)]


class _Divergence(torch.autograd.Function):
    """The divergence at N positions, (N,), and what is measured beside it, (N, 7), from the student's states.

    A tile is some positions x the whole vocabulary, of both models. Within it, blocks of rows that fit into the
    processor's cache are compared; in the backward pass the gradient of the student's logits is written over them. If
    one tile holds all positions, the forward pass does so already, and the backward pass only has to multiply.

    Args of `apply`:
        states: (..., H) of the student, or its logits (..., V) if there is no weight.
        weight, bias: of the student's head, (V, H) and (V,), or None.
        targets: (N,), the labels.
        teacher: makes the teacher's logits of a slice of the N positions.
        how: see `_How`.
        training: whether a backward pass may follow.
        index: where the N positions lie in `states`, one (N,) tensor for each leading dimension.
    """

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        targets: Tensor,
        teacher: _TeacherLogits,
        how: _How,
        training: bool,
        *index: Tensor,
    ) -> tuple[Tensor, Tensor]:
        cuts = _cuts(len(targets), states, how)
        keep = training and len(cuts) == 1
        factor = weight if weight is None else weight.to(_product_dtype(how.dtype, weight.device))
        parts = []
        for rows in cuts:
            tile = _student_tile(states, index, rows, factor, bias, how)
            parts += _compare_tile(tile, teacher(rows, tile), targets[rows], how, write_gradient=keep)
        divergence, measured = (torch.cat(column) for column in zip(*parts))
        ctx.how, ctx.teacher, ctx.kept = how, teacher, tile if keep else None
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(states, weight, bias, targets, *index)
        ctx.mark_non_differentiable(measured)
        return divergence, measured

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, on_divergence: Tensor | None, none: None) -> tuple[Tensor | None, ...]:
        if on_divergence is None:
            return (None,) * len(ctx.needs_input_grad)
        states, weight, bias, targets, *index = ctx.saved_tensors
        how: _How = ctx.how
        kept, ctx.kept = ctx.kept, None  # overwritten below, so a second backward pass computes it again
        wants_states, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        grad_states = torch.zeros_like(states) if wants_states else None
        grad_weight = torch.zeros_like(weight, dtype=how.exact) if wants_weight else None
        grad_bias = torch.zeros_like(bias, dtype=how.exact) if wants_bias else None
        product = _product_dtype(how.dtype, states.device)
        factor = weight if weight is None else weight.to(product)
        for rows in _cuts(len(targets), states, how):
            tile = kept
            if tile is None:
                tile = _student_tile(states, index, rows, factor, bias, how)
                _compare_tile(tile, ctx.teacher(rows, tile), targets[rows], how, write_gradient=True, measure=False)
            tile.mul_(on_divergence[rows].to(tile.dtype).unsqueeze(1))
            at = _at(index, rows)
            if grad_bias is not None:
                grad_bias += tile.sum(0)
            if factor is None:
                if grad_states is not None:
                    grad_states[at] = tile.to(grad_states.dtype)
                continue
            rounded = tile.to(product)
            if grad_states is not None:
                grad_states[at] = (rounded @ factor).to(grad_states.dtype)
            if grad_weight is not None:
                _add_product(grad_weight, rounded.t(), states[at].to(product))
        return (
            grad_states,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            *[None] * (len(ctx.needs_input_grad) - 3),
        )


def _at(index: Sequence[Tensor], rows: slice) -> tuple[Tensor, ...]:
    return tuple(along[rows] for along in index)


def _cuts(number: int, states: Tensor, how: _How) -> list[slice]:
    """The N positions in tiles, as few and as even as possible; at least one. Two tiles, one a model, exist at a time."""
    limit = how.max_slice_logits // 2
    if states.device.type == "cpu" and number * how.vocabulary > limit:
        limit = min(limit, CPU_TILE_LOGITS)
    count = max(1, math.ceil(number / max(1, limit // how.vocabulary)))
    return [slice(number * i // count, number * (i + 1) // count) for i in range(count)]


def _student_tile(
    states: Tensor,
    index: Sequence[Tensor],
    rows: slice,
    weight: Tensor | None,
    bias: Tensor | None,
    how: _How,
) -> Tensor:
    """What the student's head gives for these positions, (n, V), in memory that may be overwritten."""
    inputs = states[_at(index, rows)]  # a copy
    return inputs.to(how.exact) if weight is None else _project(inputs, weight, bias, how.exact)


def _exact(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """In which precision factors of a product are: half only where a product of halves can be had in float32."""
    return dtype if device.type == "cuda" and torch.__version__ >= (2, 8) else _exact(dtype)  # type: ignore[operator]


def _project(inputs: Tensor, weight: Tensor, bias: Tensor | None, exact: torch.dtype) -> Tensor:
    """`inputs @ weight.T + bias`, never rounded to less than `exact`: (n, H), (V, H) -> (n, V)."""
    inputs = inputs.to(weight.dtype)
    logits = torch.mm(inputs, weight.t()) if weight.dtype == exact else torch.mm(inputs, weight.t(), out_dtype=exact)
    return logits if bias is None else logits.add_(bias.to(exact))


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, summed in the precision of `total`: rounding each summand first biases training."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)


def _compare_tile(
    tile: Tensor, teacher: Tensor, targets: Tensor, how: _How, write_gradient: bool, measure: bool = True
) -> list[tuple[Tensor, Tensor]]:
    """(divergence, measured) of each block of rows; the student's tile is overwritten, if so by the gradient of what
    its head gave."""
    size = CPU_BLOCK_LOGITS if tile.device.type == "cpu" else DEVICE_BLOCK_LOGITS
    size = max(1, size // how.vocabulary)
    starts = range(0, max(1, len(tile)), size)
    return [
        _compare_block(
            tile[i : i + size],
            teacher[i : i + size, : how.vocabulary],
            targets[i : i + size],
            how,
            write_gradient,
            measure,
        )
        for i in starts
    ]


def _compare_block(
    block: Tensor, teacher: Tensor, targets: Tensor, how: _How, write_gradient: bool, measure: bool
) -> tuple[Tensor, Tensor]:
    factor = how.multiplier / how.temperature if how.cap is None else how.multiplier / how.cap
    block.mul_(factor)
    through_head = torch.full((), how.multiplier / how.temperature, dtype=block.dtype, device=block.device)
    if how.cap is not None:
        block.tanh_()
        if write_gradient:
            through_head = through_head * (1 - block.square())
        block.mul_(how.cap / how.temperature)
    logits, teacher = block, teacher / how.temperature
    log_s, log_t = _log_softmax(logits), _log_softmax(teacher)
    p_s, p_t = log_s.exp(), log_t.exp()

    measured = torch.empty(0, len(_MEASURED), dtype=block.dtype, device=block.device)
    if measure:
        gap, at_label = log_t - log_s, targets.unsqueeze(1)
        columns = {
            "forward_kl": _dot(p_t, gap),
            "reverse_kl": -_dot(p_s, gap),
            "entropy": -_dot(p_s, log_s),
            "teacher_entropy": -_dot(p_t, log_t),
            "same_top1": (log_s.argmax(1) == log_t.argmax(1)).to(block.dtype),
            "logps": log_s.gather(1, at_label).squeeze(1),
            "teacher_logps": log_t.gather(1, at_label).squeeze(1),
        }
        measured = torch.stack([columns[name] for name in _MEASURED], dim=1)

    if how.top_k is None:
        divergence, gradient = _with_gradient(log_s, p_s, log_t, p_t, how.beta, write_gradient)
    else:
        ids = teacher.topk(how.top_k, dim=1).indices
        sparse_s = _log_softmax(_over_support(logits, ids, how.add_tail))
        sparse_t = _log_softmax(_over_support(teacher, ids, how.add_tail))
        divergence, sparse = _with_gradient(
            sparse_s, sparse_s.exp(), sparse_t, sparse_t.exp(), how.beta, write_gradient
        )
        gradient = None
        if sparse is not None:
            # Of the tail, which is one token to the divergence, each token has its share.
            gradient = torch.zeros_like(logits)
            if how.add_tail:
                rest = logits.scatter(1, ids, -math.inf)
                gradient = torch.softmax(rest, dim=1).nan_to_num_(0.0).mul_(sparse[:, -1:])
            gradient.scatter_(1, ids, sparse[:, : how.top_k])
    if gradient is not None:
        torch.mul(gradient, through_head, out=block)
    return divergence, measured


def _with_gradient(
    log_s: Tensor, p_s: Tensor, log_t: Tensor, p_t: Tensor, beta: float, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """The divergence of N distributions, (N,), and its gradient with respect to the student's logits, (N, V).

    Of KL(T || S) it is `S - T`; of KL(S || T), `S (log S - log T - KL)`; in between, `(1 - beta) S (log S - log M -
    KL(S || M))`: how log M depends on S cancels between the two terms.
    """
    if beta == 0.0:
        return _dot(p_t, log_t - log_s), p_s - p_t if gradient else None
    if beta == 1.0:
        gap = log_s - log_t
        divergence = _dot(p_s, gap)
        return divergence, gap.sub_(divergence.unsqueeze(1)).mul_(p_s) if gradient else None
    log_m = torch.logaddexp(log_s + math.log1p(-beta), log_t + math.log(beta))
    gap = log_s - log_m
    of_student, of_teacher = _dot(p_s, gap), _dot(p_t, log_t - log_m)
    divergence = beta * of_teacher + (1 - beta) * of_student
    return divergence, gap.sub_(of_student.unsqueeze(1)).mul_(p_s).mul_(1 - beta) if gradient else None


def _dot(left: Tensor, right: Tensor) -> Tensor:
    """Inner products of rows: (n, V), (n, V) -> (n,)."""
    return torch.linalg.vecdot(left, right)
