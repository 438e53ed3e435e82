"""Prompts that a chosen and a rejected answer share, computed once.

Plain, a pair is two rows, `prompt chosen` and `prompt rejected`. Shared, it is one row: the beginning that both have in
common but for its last token, then two branches that both begin with that token.

    plain    p0 p1 p2 c0 c1            shared   p0 p1 | p2 c0 c1 | p2 r0
             p0 p1 p2 r0               position  0  1    2  3  4    2  3

A branch sees what is common and itself, not the other branch, and its positions go on from what is common: every token
finds the context and the position it has in a row of its own, so its scores and gradients are the same. The repeated
token predicts each branch's first answer token, so labels are still shifted by one place only.

Axis letters: `B` pairs, `T` tokens of a row, `R` rows of a batch, `A` answers (2B, the chosen ones first), `C` tokens of
the longest answer.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn

from outspoken.trainers.logprobs import IGNORE_INDEX

# Prompts are shared where that costs less than this share of the plain batch, by the estimate of `saves_enough`.
MAX_COST_SHARE = 0.9
# Tokens of context, in hidden sizes, from which on a token costs more in attention than in all else.
ATTENTION_HIDDEN_SIZES = 4

# Layers that carry nothing from token to token but by attention.
ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
_SHARED_KEYS = {"input_ids", "attention_mask", "completion_mask"}
# What configs call the number of tokens that attention reaches back.
_WINDOWS = ("sliding_window", "attention_chunk_size", "window_size", "attention_window_size")
_CHOSEN, _REJECTED, _PADDING = 1, 2, 3  # parts of a shared row, beside 0 for what both have in common


@dataclass
class AnswerBatch:
    """A batch for the model, and where in its scores every answer lies: the same for all ways to lay out the answers.

    Attributes:
        inputs: keyword arguments of the model's forward, without labels.
        labels: (R, T), -100 off the answers.
        rows, columns: (A, C), where in scores of shape (R, T - 1), as `label_scores` returns them, each answer's tokens
            lie, from the first on.
        mask: (A, C), True where an answer has a token.
    """

    inputs: dict[str, Any]
    labels: Tensor
    rows: Tensor
    columns: Tensor
    mask: Tensor

    def take(self, values: Tensor) -> Tensor:
        """The values of the answers' tokens, (A, C), 0 where `mask` is False; differentiable.

        Args:
            values: (R, T - 1) as `label_scores` returns them, or (R, T - 1 + P) with P virtual tokens of prompt
                learning in front.
        """
        virtual = values.size(1) - (self.labels.size(1) - 1)
        taken = values[self.rows, self.columns + virtual]
        return torch.where(self.mask, taken, torch.zeros((), dtype=values.dtype, device=values.device))


def plain_batch(inputs: Mapping[str, Any]) -> AnswerBatch:
    """Two rows a pair, as they are.

    Args:
        inputs: `input_ids`, `attention_mask` and `completion_mask`, each (2B, T), padded on the right, the chosen rows
            first. Other entries go to the model.
    """
    ids, scored = inputs["input_ids"], _scored(inputs)
    start, end = _span(scored)
    length = int((end - start).max())
    columns, mask = _places(scored, start, end, length, torch.zeros_like(start))
    return AnswerBatch(
        inputs={key: value for key, value in inputs.items() if key != "completion_mask"},
        labels=ids.masked_fill(~scored, IGNORE_INDEX),
        rows=torch.arange(len(ids), device=ids.device).unsqueeze(1).expand_as(columns),
        columns=columns,
        mask=mask,
    )


def shared_batch(
    inputs: Mapping[str, Any],
    pad_token_id: int,
    *,
    mask_dtype: torch.dtype | None = None,
    hidden_size: int = 1024,
) -> AnswerBatch | None:
    """One row a pair, its common beginning once; or None, where the plain batch is to be used.

    That is where it would save little or nothing (`saves_enough`; so do prompts that differ), and where the model gets
    more than tokens, such as images.

    Args:
        inputs: as for `plain_batch`.
        mask_dtype: None for a boolean attention mask; `mask_dtype_of(model)` knows.
        hidden_size: the model's; it tells from which length on attention counts most.
    """
    if any(isinstance(value, Tensor) for key, value in inputs.items() if key not in _SHARED_KEYS):
        return None
    ids, scored = inputs["input_ids"], _scored(inputs)
    pairs = len(ids) // 2
    start, end = _span(scored)
    lengths = inputs["attention_mask"].sum(1)
    # Both branches begin with a token before the answer, which predicts the answer's first.
    before = torch.where(end > start, start, lengths) - 1
    common = common_length(ids, lengths, limit=torch.minimum(before[:pairs], before[pairs:]))
    width, length = torch.stack([shared_width(lengths, common), (end - start).max()]).tolist()  # one transfer
    if not saves_enough(width, ids.size(1), hidden_size):
        return None
    rows, source, part = merge_rows(ids, lengths, common, width, pad_token_id)
    scored_here = _merge(scored, source, part) & (part != _PADDING)
    shift = torch.cat([torch.zeros_like(common), lengths[:pairs] - common])
    columns, mask = _places(scored, start, end, length, shift)
    return AnswerBatch(
        inputs={
            **{key: value for key, value in inputs.items() if key not in _SHARED_KEYS},
            **rows,
            "attention_mask": attention_mask(part, mask_dtype),
        },
        labels=rows["input_ids"].masked_fill(~scored_here, IGNORE_INDEX),
        rows=(torch.arange(2 * pairs, device=ids.device) % pairs).unsqueeze(1).expand_as(columns),
        columns=columns,
        mask=mask,
    )


def shared_ends(
    inputs: Mapping[str, Any],
    pad_token_id: int,
    *,
    mask_dtype: torch.dtype | None = None,
    hidden_size: int = 1024,
) -> tuple[dict[str, Any], Tensor, Tensor] | None:
    """One row a pair, for a model that says something about a whole sequence at its last token; None as above.

    Args:
        inputs: `input_ids` and `attention_mask`, each (2B, T), padded on the right, the chosen rows first.
        pad_token_id: what also marks padding: the last token of a sequence is the last that is another one.
        mask_dtype, hidden_size: as for `shared_batch`.

    Returns:
        Keyword arguments of the model's forward, and row and column of each sequence's last token, (2B,).
    """
    if any(isinstance(value, Tensor) for key, value in inputs.items() if key not in _SHARED_KEYS):
        return None
    ids, lengths = inputs["input_ids"], inputs["attention_mask"].sum(1)
    pairs = len(ids) // 2
    common = common_length(ids, lengths, limit=lengths[:pairs])
    width = int(shared_width(lengths, common))
    if not saves_enough(width, ids.size(1), hidden_size):
        return None
    rows, _, part = merge_rows(ids, lengths, common, width, pad_token_id)
    last = (torch.arange(ids.size(1), device=ids.device) * (ids != pad_token_id)).argmax(1)
    behind = torch.where(last[pairs:] < common, 0, lengths[:pairs] - common)
    columns = last + torch.cat([torch.zeros_like(behind), behind])
    return (
        {
            **{key: value for key, value in inputs.items() if key not in _SHARED_KEYS},
            **rows,
            "attention_mask": attention_mask(part, mask_dtype),
        },
        torch.arange(2 * pairs, device=ids.device) % pairs,
        columns,
    )


def common_length(ids: Tensor, lengths: Tensor, limit: Tensor) -> Tensor:
    """How many leading tokens the two rows of each pair share, at most `limit` and never a whole row: (B,).

    Args:
        ids: (2B, T), padded on the right, chosen rows first. lengths: (2B,). limit: (B,).
    """
    pairs = len(ids) // 2
    equal = (ids[:pairs] == ids[pairs:]).cumprod(1).sum(1)
    shortest = torch.minimum(lengths[:pairs], lengths[pairs:])
    return torch.minimum(torch.minimum(equal, limit), shortest - 1).clamp(min=0)


def shared_width(lengths: Tensor, common: Tensor) -> Tensor:
    """Tokens of the longest row when the first `common` (B,) tokens of each pair stand there once: a scalar."""
    pairs = len(common)
    return (lengths[:pairs] + lengths[pairs:] - common).max()


def saves_enough(width: int, plain_width: int, hidden_size: int) -> bool:
    """Whether B rows of `width` tokens are worth it instead of 2B rows of `plain_width`, padding included.

    In a layer, a token's projections and its attention cost about as much when it sees 4 hidden sizes of tokens. A
    shared row is longer than a plain one, so long answers to short prompts are not worth it.
    """

    def cost(rows: int, length: int) -> int:
        return rows * length * (ATTENTION_HIDDEN_SIZES * hidden_size + length)

    return cost(1, width) < MAX_COST_SHARE * cost(2, plain_width)


def merge_rows(
    ids: Tensor, lengths: Tensor, common: Tensor, width: int, pad_token_id: int
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Lay out each pair in one row of `width` tokens: what is common, the rest of the chosen row, of the rejected row.

    Args:
        ids: (2B, T), padded on the right, chosen rows first. lengths: (2B,). common: (B,), from `common_length`.

    Returns:
        `input_ids` and `position_ids`, (B, width); the column of the plain row each token comes from; and the part of
        the row it belongs to.
    """
    pairs = len(common)
    column = torch.arange(width, device=ids.device).expand(pairs, width)
    chosen, total = lengths[:pairs, None], (lengths[:pairs] + lengths[pairs:] - common)[:, None]
    common = common[:, None]
    part = torch.full_like(column, _PADDING)
    part = torch.where(column < total, _REJECTED, part)
    part = torch.where(column < chosen, _CHOSEN, part)
    part = torch.where(column < common, 0, part)
    source = torch.where(column < chosen, column, column - chosen + common)
    source = torch.where(column < total, source, 0)
    merged = _merge(ids, source, part)
    merged = torch.where(part == _PADDING, pad_token_id, merged)
    return {"input_ids": merged, "position_ids": source}, source, part


def attention_mask(part: Tensor, dtype: torch.dtype | None = None, near: Tensor | None = None) -> Tensor:
    """Who sees whom in shared rows: (B, 1, T, T), True (or 0) where the token of a row sees that of a column.

    A token sees what stands before it in the common part and in its own branch, and itself, padding included: so no
    row of the softmax is empty.

    Args:
        part: (B, T), from `merge_rows`.
        dtype: of a mask that is added to the attention's logits; None for a boolean one.
        near: (B, T, T), what else has to be True; unset: nothing.
    """
    position = torch.arange(part.size(1), device=part.device)
    sees = (part[:, None, :] == 0) | (part[:, None, :] == part[:, :, None])
    sees &= position[:, None] >= position
    if near is not None:
        sees &= near
    sees = sees.unsqueeze(1)
    if dtype is None:
        return sees
    return torch.zeros(sees.shape, dtype=dtype, device=part.device).masked_fill(~sees, torch.finfo(dtype).min)


def mask_dtype_of(model: Any) -> torch.dtype | None:
    """What attention mask the model takes: None for a boolean one (sdpa), else the dtype of one to be added (eager)."""
    return None if attention_of(model) == "sdpa" else model.dtype


def _scored(inputs: Mapping[str, Any]) -> Tensor:
    """(2B, T) bool, where an answer's token is that some token before it predicts."""
    scored = inputs["completion_mask"].bool() & inputs["attention_mask"].bool()
    scored[:, :1] = False
    return scored


def _span(scored: Tensor) -> tuple[Tensor, Tensor]:
    """First column of each row's answer and the one after its last, both (2B,); 0 and 0 for none."""
    position = torch.arange(scored.size(1), device=scored.device)
    start = torch.where(scored, position, scored.size(1)).amin(1)
    end = torch.where(scored, position + 1, 0).amax(1)
    return torch.minimum(start, end), end


def _places(scored: Tensor, start: Tensor, end: Tensor, length: int, shift: Tensor) -> tuple[Tensor, Tensor]:
    """`columns` and `mask` of an `AnswerBatch`, for rows that stand `shift` (A,) places further right."""
    column = start[:, None] + torch.arange(length, device=scored.device)
    inside = column < end[:, None]
    column = torch.where(inside, column, 1)
    mask = inside & scored.gather(1, column) if length else inside
    return torch.where(inside, column - 1 + shift[:, None], 0), mask


def _merge(values: Tensor, source: Tensor, part: Tensor) -> Tensor:
    """Values of plain rows (2B, T) laid out like the tokens of shared rows (B, T'); those of padding are arbitrary."""
    pairs = len(source)
    return torch.where(part == _REJECTED, values[pairs:].gather(1, source), values[:pairs].gather(1, source))


# ------------------------------------------------------------------------------------------- models that allow it


def why_not_shared(model: Any, max_length: int | None = None) -> str | None:
    """Why this model's prompts cannot be shared, in a phrase; None if they can.

    Told from the config, then tried: a pair of few tokens goes through the model both ways. Models whose weights are
    spread over processes are not tried.

    Args:
        model: a `PreTrainedModel` or `PeftModel`, not wrapped for distributed training.
        max_length: longest row that will come, against which attention windows are held; None for any.
    """
    why_not = why_not_by_config(model, ("sdpa", "eager"))
    if why_not is None and (windows := attention_windows(model)) and (max_length is None or max_length > min(windows)):
        why_not = f"its attention reaches back {min(windows)} tokens only, and rows may be longer"
    return why_not or (None if is_sharded(model) else _why_not_by_trial(model))


def why_not_by_config(model: Any, attentions: tuple[str, ...]) -> str | None:
    """Why the config says that this model takes no rows of which a token sees a part only; None if it does not.

    Args:
        attentions: the attention implementations for which there is a mask.
    """
    base = model.get_base_model() if is_peft_model(model) else model
    if is_peft_model(model) and model.active_peft_config.is_prompt_learning:
        return "the adapter puts virtual tokens in front"
    if any(getattr(model.config, f"{kind}_config", None) is not None for kind in ("vision", "audio")):
        return "the model takes more than text"
    if "position_ids" not in inspect.signature(base.forward).parameters:
        return f"{type(base).__name__} takes no position ids"
    config = model.config.get_text_config()
    if attention_of(model) not in attentions:
        return f"the attention {attention_of(model)!r} takes no mask of pairs of tokens; 'sdpa' and 'eager' do"
    if getattr(config, "output_router_logits", False):
        return "the router's loss counts every token of the batch"
    other = {*(getattr(config, "layer_types", None) or ())} - ATTENTION_LAYERS
    if other:
        return f"it has layers of the kind {min(other)!r}"
    return None


def attention_windows(model: Any) -> list[int]:
    """How many tokens the model's attention reaches back, where it does not see all; empty if it does."""
    config = model.config.get_text_config()
    kinds = {*(getattr(config, "layer_types", None) or ())}
    if kinds == {"full_attention"} or getattr(config, "use_sliding_window", True) is False:
        return []
    return [window for name in _WINDOWS if isinstance(window := getattr(config, name, None), int)]


def _why_not_by_trial(model: Any) -> str | None:
    """Compare the last hidden states of tokens in rows of their own and in a shared row."""
    embeddings = model.get_input_embeddings()
    generator = torch.Generator().manual_seed(0)  # the run's own random numbers stay as they are
    tokens = torch.randint(embeddings.weight.size(0), (2, 12), generator=generator)
    tokens[1, :6] = tokens[0, :6]
    inputs = {
        "input_ids": tokens,
        "attention_mask": torch.tensor([[1] * 10 + [0] * 2, [1] * 12]),
        "completion_mask": torch.tensor([[0] * 6 + [1] * 6] * 2),
    }
    inputs = {key: value.to(embeddings.weight.device) for key, value in inputs.items()}
    plain, shared = plain_batch(inputs), shared_batch(inputs, 0, mask_dtype=mask_dtype_of(model))
    assert shared is not None
    return why_not_equal(model, plain, shared)


def why_not_equal(model: Any, plain: AnswerBatch, other: AnswerBatch, *, gradients: bool = False) -> str | None:
    """How the model's last hidden states differ between two layouts of the same few tokens, in a phrase; None if not.

    Args:
        gradients: whether also the gradients that reach the embeddings are compared.
    """
    training = model.training
    model.eval()
    try:
        with torch.set_grad_enabled(gradients):
            tokens = plain.inputs["input_ids"].unique()
            found = [_trace(model, batch, tokens if gradients else None) for batch in (plain, other)]
    except Exception as error:  # whatever a model of someone else's does with a mask it was not made for
        return f"it fails on a mask of pairs of tokens ({type(error).__name__}: {str(error).splitlines()[0][:100]})"
    finally:
        model.train(training)
    precise = all(p.dtype in (torch.float32, torch.float64) for p in model.parameters())
    for name, one, two in zip(("hidden states", "gradients"), *found):
        # The mean forgives one token that a router sends elsewhere for a rounding error.
        difference = (one - two).norm(dim=-1).mean() / one.norm(dim=-1).mean()
        # A wrong mask or position makes 0.1 or more in trained models, rounding 1e-6 in float32 (1e-3 where an
        # accelerator multiplies in TF32) and 1e-2 in bfloat16.
        tolerance = 5e-2 if not precise else 1e-4 if difference.device.type == "cpu" else 3e-3
        if not difference <= tolerance:
            return f"its {name} would differ by {difference:.1e} of their size"
    return None


def _trace(model: Any, batch: AnswerBatch, tokens: Tensor | None) -> list[Tensor]:
    """Last hidden states that score the answers; and how their sum, weighted at random, changes with the embeddings of
    these tokens, (number of tokens, H)."""
    embeddings: list[Tensor] = []

    def keep(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        embeddings.append(output.detach().requires_grad_(tokens is not None))
        return embeddings[-1].clone()  # some models scale their embeddings in place

    handle = model.get_input_embeddings().register_forward_hook(keep)
    try:
        hidden = model(**batch.inputs, use_cache=False, output_hidden_states=True).hidden_states[-1][:, :-1]
    finally:
        handle.remove()
    states = hidden.float()[batch.rows, batch.columns][batch.mask]
    if tokens is None:
        return [states]
    weights = torch.randn(states.shape, generator=torch.Generator().manual_seed(0)).to(states.device)
    (gradient,) = torch.autograd.grad((states * weights).sum(), embeddings[0])
    changes = torch.zeros(len(tokens), gradient.size(-1), device=gradient.device)
    number = torch.searchsorted(tokens, batch.inputs["input_ids"]).flatten()
    return [states.detach(), changes.index_add(0, number, gradient.float().flatten(0, 1))]


def attention_of(model: Any) -> str:
    return getattr(model.config.get_text_config(), "_attn_implementation", None) or "eager"


def is_sharded(model: nn.Module) -> bool:
    """Whether this process holds a part of the weights only (ZeRO-3, FSDP, tensor parallelism), or none yet."""
    return any(
        p.is_meta or p.numel() == 0 or hasattr(p, "ds_id") or type(p).__name__ == "DTensor" for p in model.parameters()
    )
