"""Prompts that several completions share, computed once in the training pass.

Plain, a completion is a row, `prompt completion`. Grouped, completions of the same prompt stand in one row: the prompt
but for its last token, then a branch for each completion, which begins with that token and lacks its own last token.

    plain    p0 p1 p2 a0 a1 a2         grouped  p0 p1 | p2 a0 a1 | p2 b0 | pad
             p0 p1 p2 b0 b1            position  0  1    2  3  4    2  3
                                       predicts           a0 a1 a2   b0 b1

A branch sees the prompt and itself, and its positions go on from the prompt: every token finds the context and the
position it has in a row of its own, so its scores and gradients are the same. The repeated token predicts the
completion's first one; the last one predicts nothing, so it need not be there, and a branch is as long as its
completion. Labels are still shifted by one place: a branch's last label stands above the next branch's first token.

Long rows cost more attention and uneven rows more padding, so how many branches a row takes is settled by an estimate
of the cost (`plan_rows`).

Axis letters: `N` completions, `P` prompt tokens, `T` completion tokens, `R` rows, `W` tokens of a row.
"""

import heapq
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from outspoken.trainers.branch_mask import BranchMask
from outspoken.trainers.logprobs import IGNORE_INDEX
from outspoken.trainers.shared_prompts import (
    ATTENTION_HIDDEN_SIZES,
    MAX_COST_SHARE,
    AnswerBatch,
    attention_mask,
    attention_of,
    attention_windows,
    is_sharded,
    mask_dtype_of,
    why_not_by_config,
    why_not_equal,
)

# Layers whose tokens see a part of what is before them: the config's name for how many tokens that are.
_REACH = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
# What a call of attention costs a CPU beside its work, in pairs of tokens.
CALL_COST = 10_000
_PADDING = -1  # the part of a row behind its branches, which are 1, 2, ...; the prompt is part 0


def plain_completions(
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    completion_ids: Tensor,
    completion_mask: Tensor,
    *,
    position_ids: bool,
    scored: Tensor | None = None,
) -> AnswerBatch:
    """One row a completion, padded on the right.

    Args:
        prompt_ids, prompt_mask: (N, P), padded on the left.
        completion_ids, completion_mask: (N, T), padded on the right; the mask is 1 on real tokens, those of tools too.
        position_ids: whether the model takes positions.
        scored: (N, T), nonzero on the tokens to score; unset: all.

    Returns:
        A batch whose `take` gives (N, T), aligned with `completion_ids`. The first token after an empty prompt has no
        score.
    """
    before, lengths = prompt_mask.sum(1, keepdim=True), completion_mask.sum(1, keepdim=True)
    ids = torch.cat([prompt_ids, completion_ids], dim=1)
    column = torch.arange(int((before + lengths).max()), device=ids.device)
    source = column + prompt_ids.size(1) - before
    ids = ids.gather(1, source.clamp(max=ids.size(1) - 1))
    inputs = {"input_ids": ids, "attention_mask": (column < before + lengths).to(prompt_mask.dtype)}
    if position_ids:
        inputs["position_ids"] = column.expand_as(ids)
    row = torch.arange(len(ids), device=ids.device).unsqueeze(1)
    return _answers(inputs, completion_ids, completion_mask, row, before, scored)


def grouped_completions(
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    completion_ids: Tensor,
    completion_mask: Tensor,
    pad_token_id: int,
    *,
    mask_dtype: torch.dtype | None = None,
    hidden_size: int = 1024,
    flex: bool = False,
    by_branch: bool = False,
    windows: Mapping[str, int | None] | None = None,
    scored: Tensor | None = None,
) -> AnswerBatch | None:
    """Rows of a prompt and several of its completions; or None, where the plain batch costs less or little more.

    Completions of the same prompt need not be neighbours.

    Args:
        prompt_ids, prompt_mask, completion_ids, completion_mask, scored: as for `plain_completions`.
        mask_dtype, hidden_size, flex, by_branch, windows: what `grouping_settings` says of the model.
    """
    if completion_ids.numel() == 0 or prompt_ids.numel() == 0:
        return None
    group = prompt_ids.masked_fill(prompt_mask == 0, -1).unique(dim=0, return_inverse=True)[1]
    counts = torch.stack([group, prompt_mask.sum(1), completion_mask.sum(1)])
    groups, prompts, lengths = counts.tolist()  # one transfer
    by_branch = by_branch and completion_ids.device.type == "cpu"
    rows = plan_rows(groups, prompts, lengths, hidden_size, "flex" if flex else "branches" if by_branch else "rows")
    if rows is None:
        return None
    batch, part = lay_out(rows, prompts, lengths, prompt_ids, completion_ids, completion_mask, pad_token_id, scored)
    sizes = _sizes(rows, prompts, lengths)
    if _seen_by_branch(sizes) >= part.numel() * part.size(1):
        by_branch = False
    batch.inputs["attention_mask"] = attention_masks(
        part,
        batch.inputs["position_ids"],
        max(map(sum, zip(prompts, lengths))),
        mask_dtype=mask_dtype,
        flex=flex,
        windows=windows,
        sizes=sizes if by_branch else None,
    )
    return batch


def plan_rows(
    groups: Sequence[int], prompts: Sequence[int], lengths: Sequence[int], hidden_size: int, attention: str = "rows"
) -> list[list[int]] | None:
    """Which completions share a row, so that the batch costs least by estimate; None where plain rows are as good.

    The rows of one prompt get about the same number of tokens. All prompts' rows are padded to the same width: a prompt
    with many or long completions gets more rows.

    Args:
        groups: (N,), the number of each completion's prompt. prompts: (N,), its tokens. lengths: (N,), the tokens of
            the completion.
        hidden_size: the model's.
        attention: what it costs: "rows": all pairs of a row's tokens; "branches": those or, where that is less, those of
            each branch and its prompt (`BranchMask`); "flex": what tokens see (FlexAttention).

    Returns:
        The numbers of the completions of each row; those without tokens stand in none.
    """
    members = defaultdict(list)
    for completion in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if lengths[completion] > 0:
            members[groups[completion]].append(completion)
    if not members or min(prompts) == 0:
        return None
    # For each prompt: its completions in 1, 2, ... rows, and the width of the longest.
    splits = []
    for completions in members.values():
        ways = [_split(completions, lengths, count) for count in range(1, len(completions) + 1)]
        before = prompts[completions[0]] - 1
        splits.append([(max(before + sum(lengths[i] for i in row) + 1 for row in rows), rows) for rows in ways])
    best, least = None, MAX_COST_SHARE * _plain_cost(prompts, lengths, hidden_size, attention)
    for count in range(max(map(len, splits))):
        width = max(ways[min(count, len(ways) - 1)][0] for ways in splits)
        fewest = [next(rows for own, rows in ways if own <= width) for ways in splits]
        rows = [row for rows in fewest for row in rows]
        seen = len(rows) * width**2
        if attention == "flex":
            seen = _seen(rows, prompts, lengths)
        elif attention == "branches":
            seen = min(seen, _seen_by_branch(_sizes(rows, prompts, lengths)))
        cost = len(rows) * width * ATTENTION_HIDDEN_SIZES * hidden_size + seen
        if cost < least:
            best, least = rows, cost
    return best


def _split(completions: list[int], lengths: Sequence[int], count: int) -> list[list[int]]:
    """Completions, the longest first, over `count` rows of about as many tokens."""
    rows: list[list[int]] = [[] for _ in range(count)]
    loads = [(0, row) for row in range(count)]
    for completion in completions:
        load, row = loads[0]
        rows[row].append(completion)
        heapq.heapreplace(loads, (load + lengths[completion], row))
    return rows


def _plain_cost(prompts: Sequence[int], lengths: Sequence[int], hidden_size: int, attention: str) -> float:
    widths = [prompt + length for prompt, length in zip(prompts, lengths)]
    width = max(widths)
    # Without padding there is no mask, and attention computes only what tokens see.
    seen = width / 2 if attention == "flex" or min(widths) == width else width
    return len(widths) * width * (ATTENTION_HIDDEN_SIZES * hidden_size + seen)


def _seen(rows: Sequence[Sequence[int]], prompts: Sequence[int], lengths: Sequence[int]) -> int:
    """How many tokens the tokens of the rows see."""
    return sum(
        prompts[row[0]] ** 2 // 2 + sum(lengths[i] * (prompts[i] + lengths[i] // 2) for i in row) for row in rows
    )


def _sizes(rows: Sequence[Sequence[int]], prompts: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
    """Tokens of each row's prompt but for the last one, of its branches, and of padding."""
    sizes = [[prompts[row[0]] - 1, *(lengths[i] for i in row)] for row in rows]
    width = max(map(sum, sizes)) + 1  # the last branch's last label stands behind it
    return [[*of_row, width - sum(of_row)] for of_row in sizes]


def _seen_by_branch(sizes: Sequence[Sequence[int]]) -> int:
    """Pairs of tokens that attention computes if each branch is a call of its own, and what the calls cost, in pairs."""
    return sum(
        prompt**2 // 2 + sum(length * (prompt + length) for length in lengths) + (1 + len(lengths)) * CALL_COST
        for prompt, *lengths, _ in sizes
    )


def lay_out(
    rows: Sequence[Sequence[int]],
    prompts: Sequence[int],
    lengths: Sequence[int],
    prompt_ids: Tensor,
    completion_ids: Tensor,
    completion_mask: Tensor,
    pad_token_id: int,
    scored: Tensor | None = None,
) -> tuple[AnswerBatch, Tensor]:
    """The rows of a plan, yet without an attention mask.

    Args:
        rows: as from `plan_rows`. prompts, lengths: as for it, no prompt empty. The others: as for `grouped_completions`.

    Returns:
        The batch; and the part of its row that each token belongs to, (R, W): 0 for the prompt, 1, 2, ... for branches,
        -1 for padding.
    """
    device = completion_ids.device
    row_of, start_of, width = [0] * len(lengths), [0] * len(lengths), sum(_sizes(rows, prompts, lengths)[0])
    for number, members in enumerate(rows):
        end = prompts[members[0]] - 1
        for member in members:
            row_of[member], start_of[member] = number, end
            end += lengths[member]
    row, start, before = torch.tensor([row_of, start_of, prompts], device=device).unsqueeze(2)  # (N, 1) each
    first = torch.tensor([members[0] for members in rows], device=device)

    column = torch.arange(width, device=device).expand(len(rows), width)
    source = column + prompt_ids.size(1) - before[first]
    in_prompt = column < before[first] - 1
    ids = prompt_ids[first].gather(1, source.clamp(max=prompt_ids.size(1) - 1))
    ids = torch.where(in_prompt, ids, pad_token_id)
    step = torch.arange(completion_ids.size(1), device=device)
    there = step < completion_mask.sum(1, keepdim=True)
    branch = torch.cat([prompt_ids[:, -1:], completion_ids[:, :-1]], dim=1)
    place = torch.where(there, row * width + start + step, -1)
    branch_number = torch.arange(1, len(lengths) + 1, device=device).unsqueeze(1).expand_as(place)
    inputs = {
        "input_ids": _put(branch, place, ids),
        "position_ids": _put(before - 1 + step, place, torch.where(in_prompt, column, 0)),
    }
    part = _put(branch_number, place, torch.where(in_prompt, 0, _PADDING))
    return _answers(inputs, completion_ids, completion_mask, row, start + 1, scored), part


def attention_masks(
    part: Tensor,
    positions: Tensor,
    longest: int,
    *,
    mask_dtype: torch.dtype | None = None,
    flex: bool = False,
    windows: Mapping[str, int | None] | None = None,
    sizes: Sequence[Sequence[int]] | None = None,
) -> Any:
    """Who sees whom in grouped rows: a mask for all layers, or one for each kind of layer.

    Args:
        part, positions: (R, W), the part of its row that a token belongs to, and its position.
        longest: tokens of the longest prompt and completion together.
        mask_dtype: of a mask that is added to the attention's logits; None for a boolean one.
        flex: a `BlockMask` for FlexAttention instead.
        windows: for each kind of layer, how many tokens it reaches back; None for all.
        sizes: for a `BranchMask` instead: tokens of each row's prompt, of its branches, and of padding.
    """
    windows = windows or {}
    if all(window is None or window >= longest for window in windows.values()):
        windows = {"full_attention": None}
    make = _block_mask if flex else partial(_tensor_mask, dtype=mask_dtype)
    if sizes is not None:
        make = partial(_branch_mask, sizes)
    masks = {kind: make(part, positions, kind, window) for kind, window in windows.items()}
    return masks if len(masks) > 1 else next(iter(masks.values()))


def _tensor_mask(part: Tensor, positions: Tensor, kind: str, window: int | None, dtype: torch.dtype | None) -> Tensor:
    if window is None:
        return attention_mask(part, dtype)
    return attention_mask(part, dtype, near=_is_near(kind, window, positions[:, :, None], positions[:, None, :]))


def _branch_mask(
    sizes: Sequence[Sequence[int]], part: Tensor, positions: Tensor, kind: str, window: int | None
) -> BranchMask:
    near = None if window is None else partial(_is_near, kind, window)
    return BranchMask(sizes, near, partial(_tensor_mask, part, positions, kind, window, None), part.device)


def _block_mask(part: Tensor, positions: Tensor, kind: str, window: int | None) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = (query >= key) & ((part[row, key] == 0) | (part[row, key] == part[row, query]))
        return seen if window is None else seen & _is_near(kind, window, positions[row, query], positions[row, key])

    rows, width = part.shape
    # Compiled, it needs no memory for all pairs of tokens.
    return create_block_mask(sees, rows, None, width, width, device=part.device.type, _compile=part.is_cuda)


def _is_near(kind: str, window: int, query: Tensor, key: Tensor) -> Tensor:
    """Whether tokens at these positions see each other in a layer of the kind."""
    return query // window == key // window if kind == "chunked_attention" else query - key < window


def _answers(
    inputs: dict[str, Any],
    completion_ids: Tensor,
    completion_mask: Tensor,
    row: Tensor,
    start: Tensor,
    scored: Tensor | None,
) -> AnswerBatch:
    """The batch of completions whose labels stand in `row` (N, 1), from column `start` (N, 1) on."""
    step = torch.arange(completion_ids.size(1), device=completion_ids.device)
    label_column = start + step
    mask = (step < completion_mask.sum(1, keepdim=True)) & (label_column > 0)
    if scored is not None:
        mask &= scored.bool()
    labels = torch.full_like(inputs["input_ids"], IGNORE_INDEX)
    return AnswerBatch(
        inputs=inputs,
        labels=_put(completion_ids, torch.where(mask, row * labels.size(1) + label_column, -1), labels),
        rows=row.expand_as(mask),
        columns=torch.where(mask, label_column - 1, 0),
        mask=mask,
    )


def _put(values: Tensor, place: Tensor, into: Tensor) -> Tensor:
    """`into` (R, W) with values (N, T) at their places (N, T), counted row by row; those at -1 are left out."""
    flat = torch.cat([into.flatten(), into.new_zeros(1)])
    flat[place] = values
    return flat[:-1].view_as(into)


# ------------------------------------------------------------------------------------------- models that allow it


def grouping_settings(model: Any, *, compiled: bool = False) -> dict[str, Any]:
    """What `grouped_completions` has to know of a model, as its keyword arguments.

    Args:
        compiled: whether `torch.compile` will compile the model, which takes tensors for masks only.
    """
    return {
        "mask_dtype": mask_dtype_of(model),
        "hidden_size": model.config.get_text_config().hidden_size,
        "flex": attention_of(model) == "flex_attention",
        "by_branch": attention_of(model) == "sdpa" and not compiled,
        "windows": layer_windows(model),
    }


def layer_windows(model: Any) -> dict[str, int | None]:
    """For each kind of layer, how many tokens its attention reaches back; None for all. Empty if all layers see all."""
    if not attention_windows(model):
        return {}
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    return {kind: getattr(config, _REACH[kind], None) if kind in _REACH else None for kind in sorted({*kinds})}


def why_not_grouped(model: Any, max_length: int | None = None) -> str | None:
    """Why this model's prompts cannot be shared by their completions, in a phrase; None if they can.

    Told from the config, then tried: a few completions of two prompts go through the model both ways, and hidden states
    and gradients have to be the same; where attention windows may be shorter than a prompt and its completion, also
    with windows of a few tokens. Models whose weights are spread over processes are not tried.

    Args:
        model: a `PreTrainedModel` or `PeftModel`, not wrapped for distributed training.
        max_length: longest prompt and completion together that will come; None for any.
    """
    why_not = why_not_by_config(model, ("sdpa", "eager", "flex_attention"))
    if why_not is not None:
        return why_not
    if attention_of(model) == "flex_attention" and model.get_input_embeddings().weight.device.type == "cpu":
        return "FlexAttention has no backward pass on a CPU"
    windows = attention_windows(model)
    too_long = bool(windows) and (max_length is None or max_length > min(windows))
    if too_long and (is_sharded(model) or not {*windows} <= {*layer_windows(model).values()}):
        return f"its attention reaches back {min(windows)} tokens only, and rows may be longer"
    if is_sharded(model):
        return None
    return _why_not_by_trial(model) or (_why_not_by_trial(model, window=4) if too_long else None)


def _why_not_by_trial(model: Any, window: int | None = None) -> str | None:
    """Compare both layouts of a few tokens; with `window`, in a model whose windows are set to it meanwhile."""
    config, embeddings = model.config.get_text_config(), model.get_input_embeddings().weight
    names = [name for name in _REACH.values() if window is not None and isinstance(getattr(config, name, None), int)]
    before = {name: getattr(config, name) for name in names}
    prompts, lengths = [5, 7, 5, 7, 5], [6, 2, 1, 4, 3]
    generator = torch.Generator().manual_seed(0)  # the run's own random numbers stay as they are
    tokens = torch.randint(1, embeddings.size(0), (5, 7 + 6), generator=generator)
    tokens[[2, 4], :7], tokens[3, :7] = tokens[0, :7], tokens[1, :7]
    prompt_mask = torch.arange(7) >= 7 - torch.tensor(prompts)[:, None]
    completion_mask = torch.arange(6) < torch.tensor(lengths)[:, None]
    masks = [mask.long().to(embeddings.device) for mask in (prompt_mask, completion_mask)]
    tokens = tokens.to(embeddings.device)
    tokens = torch.where(torch.cat(masks, dim=1) == 1, tokens, 0)
    prompt_ids, completion_ids = tokens[:, :7], tokens[:, 7:]
    try:
        for name in names:
            setattr(config, name, window)
        plain = plain_completions(prompt_ids, masks[0], completion_ids, masks[1], position_ids=True)
        rows = [[0, 4, 2], [1, 3]]
        grouped, part = lay_out(rows, prompts, lengths, prompt_ids, completion_ids, masks[1], 0)
        settings = grouping_settings(model)
        del settings["hidden_size"]
        if settings.pop("by_branch") and embeddings.device.type == "cpu":
            settings["sizes"] = _sizes(rows, prompts, lengths)
        positions = grouped.inputs["position_ids"]
        grouped.inputs["attention_mask"] = attention_masks(part, positions, 7 + 4, **settings)
        return why_not_equal(model, plain, grouped, gradients=True)
    finally:
        for name, value in before.items():
            setattr(config, name, value)
