"""Keys and values while completions are sampled: those of a prompt once, however many completions it gets.

A step of sampling feeds one token a row. What attention then needs is in two places: the keys and values of the prompt,
which all rows of a group share, and those of the row's own completion, in buffers that are written in place. The
queries of a group's rows meet the prompt together, in one matrix product, and each row meets its own completion; one
softmax goes over both. So the prompt's keys and values are neither copied nor read once a row.

Axes: `B` prompts, `G` most rows that a prompt has, `N` rows, `H` key-value heads, `R` query heads that share one, `P`
prompt tokens (left-padded), `T` completion tokens so far, `D` head size.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache, PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

ATTENTION = "outspoken_shared_prompts"  # the name under which models find `attend`
FIRST_CAPACITY = 32  # completion tokens that a buffer holds at first; doubled when it is full


@dataclass
class Groups:
    """Which prompt each row belongs to, laid out as a table of `prompts` times `width` rows.

    Attributes:
        source: the row in each place of the table, (B * G,), any in places that are empty; None where the rows stand in
            the order of the table and fill it.
        place: the place of each row, (N,); None likewise.
    """

    prompts: int
    width: int
    source: Tensor | None = None
    place: Tensor | None = None

    @classmethod
    def of(cls, owners: Sequence[int], prompts: int, device: torch.device) -> "Groups":
        """From the prompt of each row, of which there are `prompts`."""
        rows: list[list[int]] = [[] for _ in range(prompts)]
        for row, owner in enumerate(owners):
            rows[owner].append(row)
        width = max(map(len, rows))
        if len(owners) == prompts * width and [row for group in rows for row in group] == list(range(len(owners))):
            return cls(prompts, width)
        source = [row for group in rows for row in group + [0] * (width - len(group))]
        place = [0] * len(owners)
        for owner, group in enumerate(rows):
            for column, row in enumerate(group):
                place[row] = owner * width + column
        return cls(prompts, width, torch.tensor(source, device=device), torch.tensor(place, device=device))


class SharedPromptLayer(CacheLayerMixin):
    """A layer's keys and values: those of the prompts, (B, H, P, D), and those of the completions, (N, H, T, D).

    Args:
        keys, values: of the prompts.
        window: how many tokens back the layer sees, itself included; None for all.
        most: completion tokens that will come at most.
    """

    def __init__(self, keys: Tensor, values: Tensor, window: int | None, most: int):
        super().__init__()
        self.prompt_keys, self.prompt_values = keys, values
        self.window, self.most = window, most
        self.length = 0
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is left to do: the prompts are there."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add a token's keys and values, (N, H, 1, D); returns those of all completion tokens that it sees."""
        if self.keys is None or self.length == self.keys.size(2):
            self.keys = self._grown(self.keys, key_states)
            self.values = self._grown(self.values, value_states)
        assert self.keys is not None and self.values is not None
        self.keys.select(2, self.length).copy_(key_states.squeeze(2))
        self.values.select(2, self.length).copy_(value_states.squeeze(2))
        self.length += 1
        first = 0 if self.window is None else max(0, self.length - self.window)
        return self.keys[:, :, first : self.length], self.values[:, :, first : self.length]

    def _grown(self, old: Tensor | None, like: Tensor) -> Tensor:
        capacity = min(self.most, FIRST_CAPACITY) if old is None else min(self.most, 2 * self.length)
        rows, heads, _, size = like.shape
        new = like.new_empty(rows, heads, max(capacity, self.length + 1), size)
        if old is not None:
            new[:, :, : self.length] = old[:, :, : self.length]
        return new

    def prompt(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the prompt tokens that the newest token sees, the last columns of all.

        Prompts are padded on the left, so the window has the same place in all rows.
        """
        columns = self.prompt_keys.size(2)
        seen = columns if self.window is None else min(columns, max(0, self.window - self.length))
        first = columns - seen
        return self.prompt_keys[:, :, first:], self.prompt_values[:, :, first:]

    def move_rows(self, to: Tensor, source: Tensor, number: int) -> None:
        if self.keys is not None and self.values is not None:
            if len(to):
                for buffer in (self.keys, self.values):
                    buffer[to, :, : self.length] = buffer[source, :, : self.length]
            self.keys, self.values = self.keys[:number], self.values[:number]

    def move_prompts(self, to: Tensor, source: Tensor, number: int) -> None:
        if len(to):
            self.prompt_keys[to] = self.prompt_keys[source]
            self.prompt_values[to] = self.prompt_values[source]
        self.prompt_keys, self.prompt_values = self.prompt_keys[:number], self.prompt_values[:number]

    def get_seq_length(self) -> int:
        return self.prompt_keys.size(2) + self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1


class SharedPromptCache(Cache):
    """The cache of a model that samples `N` completions of `B` prompts; `attend` reads it.

    Attributes:
        bias: what is added to the attention logits of the prompts' columns, (B, 1, 1, P): 0, or -inf on padding; None
            without padding.
        groups: which prompt each row belongs to.
    """

    layers: Any

    def __init__(self, layers: Any, bias: Tensor | None, groups: Groups):
        super().__init__(layers=layers)
        self.bias, self.groups = bias, groups

    def move_rows(self, to: Tensor, source: Tensor, number: int) -> None:
        """Let the rows `source` take the places `to`, and forget all but the first `number`.

        `groups` is the caller's to set.
        """
        for layer in self.layers:
            layer.move_rows(to, source, number)

    def move_prompts(self, to: Tensor, source: Tensor, number: int) -> None:
        """Let the prompts `source` take the places `to`, and forget all but the first `number`."""
        for layer in self.layers:
            layer.move_prompts(to, source, number)
        if self.bias is not None:
            self.bias[to] = self.bias[source]
            self.bias = self.bias[:number]


def share_prompts(caches: Sequence[Any], lengths: Sequence[int], groups: Groups, most: int) -> SharedPromptCache:
    """The cache to sample with, from those that came of passing the prompts through the model, some at a time.

    Args:
        caches: one for each part of the prompts, in order; they are emptied.
        lengths: tokens of each prompt, (B,).
        most: completion tokens that will come at most.
    """
    layers: list[SharedPromptLayer] = []
    for index, first in enumerate(caches[0].layers):
        parts: list[Any] = [cache.layers[index] for cache in caches]
        keys, values = _stacked([part.keys for part in parts]), _stacked([part.values for part in parts])
        window = first.sliding_window if isinstance(first, DynamicSlidingWindowLayer) else None
        layers.append(SharedPromptLayer(keys, values, window, most))
        for part in parts:
            part.reset()
    longest, device = max(lengths), layers[0].prompt_keys.device
    bias = None
    if min(lengths) < longest:
        padding = longest - torch.tensor(lengths, device=device)
        padded = torch.arange(longest, device=device) < padding[:, None]
        bias = torch.zeros(padded.shape, device=device).masked_fill_(padded, -torch.inf)[:, None, None]
    return SharedPromptCache(layers, bias, groups)


def _stacked(parts: list[Tensor]) -> Tensor:
    """Tensors (b, H, p, D) as one (B, H, P, D), filled up with zeros on the left."""
    if len(parts) == 1:
        return parts[0].contiguous()
    longest = max(part.size(2) for part in parts)
    return torch.cat([nn.functional.pad(part, (0, 0, longest - part.size(2), 0)) for part in parts])


def new_cache(config: PreTrainedConfig) -> DynamicCache:
    """An empty cache for the pass over the prompts."""
    return DynamicCache(config=config)


def why_not_cached(config: PreTrainedConfig) -> str | None:
    """Why this model's keys and values cannot be kept here, in a phrase; None if they can."""
    kinds = {*(getattr(config.get_text_config(), "layer_types", None) or ())}
    other = kinds - {"full_attention", "sliding_attention"}
    if other:
        return f"it has layers of the kind {min(other)!r}"
    for layer in new_cache(config).layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            return f"its cache has layers of the kind {type(layer).__name__}"
    return None


_active: list[SharedPromptCache] = []  # the cache of the forward pass under way


@contextlib.contextmanager
def attending(config: PreTrainedConfig, cache: SharedPromptCache) -> Iterator[None]:
    """Let the models of this config attend through `attend`, to this cache."""
    before = {id(c): (c, c._attn_implementation) for c in (config, config.get_text_config())}
    _active.append(cache)
    for part, _ in before.values():
        part._attn_implementation_internal = ATTENTION
    try:
        yield
    finally:
        _active.pop()
        for part, name in before.values():
            part._attn_implementation_internal = name


# What models hand to an attention function beside what it needs; none of it matters to one new token a row.
_HARMLESS = {
    "position_ids",
    "use_cache",
    "cache_position",
    "sliding_window",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "is_causal",
    "return_dict",
    "logits_to_keep",
    "position_embeddings",
}


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one new token a row to its prompt and to its completion so far.

    Args:
        module: the model's attention layer, whose `layer_idx` says which layer of the cache to read.
        query: (N, H * R, 1, D). key, value: those of the completions, (N, H, T, D), as `update` returned them.
        softcap: bound of the logits. s_aux: a logit per query head that takes part in the softmax only (a sink).

    Returns:
        (N, 1, H * R, D), and None for the weights.
    """
    unknown = [name for name, given in kwargs.items() if given is not None and name not in _HARMLESS]
    if unknown or attention_mask is not None:
        raise NotImplementedError(f"attention with {(unknown or ['attention_mask'])[0]!r}")
    cache = _active[-1]
    index: Any = module.layer_idx
    prompt_keys, prompt_values = cache.layers[index].prompt()
    groups, columns = cache.groups, prompt_keys.size(2)
    rows, query_heads, _, size = query.shape
    heads = key.size(1)
    scale = size**-0.5 if scaling is None else scaling
    query = query.reshape(rows, heads, query_heads // heads, size)
    logits = _products(query.flatten(0, 1), key, scale, softcap).view(rows, heads, -1, key.size(2))
    if columns:
        met = _products(_by_prompt(query, groups), prompt_keys, scale, softcap)
        if cache.bias is not None:
            met = met.view(groups.prompts, heads, -1, columns) + cache.bias[..., -columns:].to(met.dtype)
        logits = torch.cat([_by_row(met, groups, heads), logits], -1)
    if s_aux is not None:
        sink = s_aux.reshape(1, heads, -1, 1).expand(rows, -1, -1, 1).to(logits.dtype)
        logits = torch.cat([logits, sink], -1)
    weights = torch.softmax(logits, -1, dtype=torch.float32).to(query.dtype)
    of_prompt, of_row = weights[..., :columns], weights[..., columns : columns + key.size(2)]
    mixed = torch.matmul(of_row, value)
    if columns:
        mixed += _by_row(torch.bmm(_by_prompt(of_prompt, groups), prompt_values.flatten(0, 1)), groups, heads)
    return mixed.reshape(rows, 1, query_heads, -1), None


AttentionInterface.register(ATTENTION, attend)


def _products(queries: Tensor, keys: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Attention logits of queries (X * H, Y, D) with keys (X, H, Z, D): (X * H, Y, Z)."""
    unused = queries.new_empty(1, 1, 1)
    logits = torch.baddbmm(unused, queries, keys.flatten(0, 1).transpose(1, 2), beta=0, alpha=scale)
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def _by_prompt(rows: Tensor, groups: Groups) -> Tensor:
    """(N, H, R, X) as (B * H, G * R, X)."""
    if groups.source is not None:
        rows = rows.index_select(0, groups.source)
    _, heads, shared, last = rows.shape
    table = rows.reshape(groups.prompts, groups.width, heads, shared, last)
    return table.transpose(1, 2).reshape(groups.prompts * heads, groups.width * shared, last)


def _by_row(prompts: Tensor, groups: Groups, heads: int) -> Tensor:
    """(B * H, G * R, X) as (N, H, R, X)."""
    table = prompts.view(groups.prompts, heads, groups.width, -1, prompts.size(-1)).transpose(1, 2)
    rows = table.reshape(groups.prompts * groups.width, heads, -1, prompts.size(-1))
    return rows if groups.place is None else rows.index_select(0, groups.place)
