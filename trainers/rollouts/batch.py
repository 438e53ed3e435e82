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


@dataclass
class RolloutBatch:
    """`N` sampled completions with what the loss needs of them. `P` prompt tokens (left-padded), `T` completion tokens
    (right-padded).

    Attributes:
        prompt_ids, prompt_mask: (N, P).
        completion_ids, completion_mask: (N, T); the mask is 0 on padding and on completions excluded from the loss.
        advantages: (N,).
        active_tokens: masked-in completion tokens of the whole generation batch, over all processes; scalar.
        temperature: what the completions were sampled at, and therefore are scored at.
        max_completion_length: the cap they were sampled under.
        old_logps: log-probabilities under the policy that sampled them, (N, T); None where the ratio is 1 by
            construction, because the batch is used up before the policy changes.
        ref_logps: log-probabilities under the reference model, (N, T); None without a KL term.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    completion_ids: Tensor
    completion_mask: Tensor
    advantages: Tensor
    active_tokens: Tensor
    temperature: float
    max_completion_length: int
    old_logps: Tensor | None = None
    ref_logps: Tensor | None = None

    def __len__(self) -> int:
        return self.completion_ids.size(0)

    def select(self, index: Tensor | slice) -> "RolloutBatch":
        """The rows at `index`; what belongs to the whole generation batch stays as it is."""
        rows: dict[str, Any] = {
            f.name: value[index]
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor) and value.ndim > 0
        }
        return replace(self, **rows)

    def shuffled(self) -> "RolloutBatch":
        """The rows in a random order, drawn from torch's global generator."""
        return self.select(torch.randperm(len(self)))

    def split(self, parts: int) -> "list[RolloutBatch]":
        """`parts` batches of equal size, in order."""
        size = len(self) // parts
        return [self.select(slice(i * size, (i + 1) * size)) for i in range(parts)]


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
