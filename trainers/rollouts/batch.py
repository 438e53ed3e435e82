"""The record that passes from sampling to the loss."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from outspoken.trainers.data.padding import pad


@dataclass
class Sampled:
    """What a backend sampled, one entry per prompt in the order of the prompts.

    Attributes:
        completion_ids: token ids, up to and with the token that ended the completion.
        finished: whether it ended by itself (an end token or a stop text) and was not cut.
        logps: log-probability in nats of each token under `softmax(logits / temperature)`, before top-k, top-p, min-p
            and penalties: what a pass over the finished text gives. None where the backend keeps none.
        entropies: entropy in nats of those distributions; None where the backend keeps none.
        tool_mask: 1 on tokens that the model wrote, 0 on those put in between by tools and environments; None: all 1.
    """

    completion_ids: list[list[int]]
    finished: list[bool]
    logps: list[list[float]] | None = None
    entropies: list[list[float]] | None = None
    tool_mask: list[list[int]] | None = None


def sampled_from_ids(completion_ids: list[list[int]], end_ids: Sequence[int]) -> Sampled:
    """What was sampled, from tokens alone: a completion has ended by itself if its last token is an end token."""
    ends = set(end_ids)
    return Sampled(completion_ids, [bool(ids) and ids[-1] in ends for ids in completion_ids])


@dataclass
class RolloutBatch:
    """`N` sampled completions with what the loss needs of them. `P` prompt tokens (left-padded), `T` completion tokens
    (right-padded).

    Attributes:
        prompt_ids, prompt_mask: (N, P).
        completion_ids, completion_mask: (N, T); the mask is 1 on tokens and 0 on padding.
        loss_mask: (N, T), 1 on the tokens that the loss may use: not on what tools and environments wrote, nor in
            completions excluded from the loss.
        advantages: (N,), or (N, T) where tokens of one completion differ.
        active_tokens: tokens in `loss_mask` of the whole generation batch, over all processes; scalar.
        temperature: what the completions were sampled at, and therefore are scored at.
        max_completion_length: the cap they were sampled under.
        versions: (N,), the update step whose policy sampled each completion.
        old_logps: log-probabilities under the policy at the time of sampling, (N, T); None where the ratio is 1 by
            construction, because the batch is used up before the policy changes.
        ref_logps: log-probabilities under the reference model, (N, T); None without a KL term.
        sampler_logps, sampler_entropies: what the sampler itself says, (N, T), zero on padding and NaN where it does not
            know; None if it keeps none. They differ from `old_logps` by rounding, or by more where another engine
            samples.
        sampler_weights: importance weights of the trainer's policy over the sampler's, (N, T) or (N, 1); None if they
            are not corrected for.
        images: what the model takes beside tokens, per completion, each tensor with the axis that is concatenated in
            front; None without images.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    completion_ids: Tensor
    completion_mask: Tensor
    loss_mask: Tensor
    advantages: Tensor
    active_tokens: Tensor
    temperature: float
    max_completion_length: int
    versions: Tensor
    old_logps: Tensor | None = None
    ref_logps: Tensor | None = None
    sampler_logps: Tensor | None = None
    sampler_entropies: Tensor | None = None
    sampler_weights: Tensor | None = None
    images: "list[dict[str, Tensor]] | None" = None

    _PROMPT_AXIS = ("prompt_ids", "prompt_mask")
    _COMPLETION_AXIS = (
        "completion_ids",
        "completion_mask",
        "loss_mask",
        "old_logps",
        "ref_logps",
        "sampler_logps",
        "sampler_entropies",
    )

    def __len__(self) -> int:
        return self.completion_ids.size(0)

    def select(self, index: Tensor | slice) -> "RolloutBatch":
        """The rows at `index`; what belongs to the whole generation batch stays as it is."""
        rows: dict[str, Any] = {
            f.name: value[index]
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor) and value.ndim > 0
        }
        if self.images is not None:
            chosen = range(len(self))[index] if isinstance(index, slice) else index.tolist()
            rows["images"] = [self.images[i] for i in chosen]
        return replace(self, **rows)

    def to(self, device: Any) -> "RolloutBatch":
        """The batch on another device."""
        moved: dict[str, Any] = {
            f.name: value.to(device) for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)
        }
        if self.images is not None:
            moved["images"] = [{name: value.to(device) for name, value in row.items()} for row in self.images]
        return replace(self, **moved)

    def shuffled(self, block: int = 1) -> "RolloutBatch":
        """The rows in a random order, drawn from torch's global generator; `block` neighbours stay together."""
        blocks = torch.randperm(len(self) // block)
        return self.select((blocks[:, None] * block + torch.arange(block)).flatten())

    def trimmed(self, multiple_of: int | None = None) -> "RolloutBatch":
        """Without the columns of padding that no row needs, except those that round lengths up to a multiple."""
        prompt = _rounded(int(self.prompt_mask.sum(1).max()), multiple_of)
        completion = _rounded(int(self.completion_mask.sum(1).max()), multiple_of)
        cut: dict[str, Any] = {name: getattr(self, name)[:, -prompt:] for name in self._PROMPT_AXIS if prompt}
        names = [*self._COMPLETION_AXIS, *(("advantages",) if self.advantages.ndim == 2 else ())]
        if self.sampler_weights is not None and self.sampler_weights.size(1) > 1:
            names.append("sampler_weights")
        for name in names:
            value = getattr(self, name)
            cut[name] = None if value is None else value[:, :completion]
        return replace(self, **cut)

    def split(self, parts: int, multiple_of: int | None = None) -> "list[RolloutBatch]":
        """`parts` batches of equal size, in order, each trimmed."""
        size = len(self) // parts
        return [self.select(slice(i * size, (i + 1) * size)).trimmed(multiple_of) for i in range(parts)]


def _rounded(length: int, multiple_of: int | None) -> int:
    length = max(length, 1)
    return length if not multiple_of else -(-length // multiple_of) * multiple_of


def pad_floats(rows: Sequence[Sequence[float]], length: int, value: float = 0.0) -> Tensor:
    """Numbers of unequal count as one tensor, padded on the right: (N, length), float32. None becomes NaN."""
    padded = torch.full((len(rows), length), value)
    for row, numbers in zip(padded, rows):
        if len(numbers):
            row[: len(numbers)] = torch.tensor([float("nan") if x is None else x for x in numbers])
    return padded


def pad_ids(
    sequences: Sequence[Sequence[int]], value: int, side: str, multiple_of: int | None = None
) -> tuple[Tensor, Tensor]:
    """Token ids of unequal length as one tensor, and its mask (1 on tokens, 0 on padding): both (N, longest), int64.

    Args:
        value: what to pad with.
        side: "left" or "right".
        multiple_of: round the length up to a multiple of this.
    """
    ids = pad(sequences, value, side, multiple_of, dtype=torch.long)
    mask = pad([[1] * len(sequence) for sequence in sequences], 0, side, multiple_of, dtype=torch.long)
    return ids, mask
