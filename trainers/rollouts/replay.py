"""Informative groups of earlier policies, kept to be trained on in the place of groups that teach nothing.

A group is informative if its rewards differ: its score is the sum of its absolute advantages times the standard
deviation of its rewards (selective sample replay, arXiv 2504.08837). What is replayed carries the log-probabilities
of the policy that sampled it, so the ratio of the loss stays right.
"""

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from outspoken.trainers.rollouts.batch import RolloutBatch


class ReplayBuffer:
    """The best groups seen, at most `size`, each a `RolloutBatch` of `group_size` completions. One a process.

    A group is used once: it leaves the buffer when it is replayed.
    """

    def __init__(self, size: int, group_size: int):
        self.size = size
        self.group_size = group_size
        self.groups: list[tuple[float, RolloutBatch]] = []  # best first; equal scores: the newest first

    def __len__(self) -> int:
        return len(self.groups)

    def exchange(self, batch: RolloutBatch, scores: Tensor) -> tuple[RolloutBatch, int]:
        """Replace the groups of a batch that teach nothing, and keep those that teach.

        Args:
            batch: groups stand together.
            scores: (B,) of its groups; 0 for one without spread.

        Returns:
            The batch to train on, and how many of its groups were replaced.
        """
        fresh = batch.split(len(scores))
        empty = [i for i, score in enumerate(scores.tolist()) if score == 0.0]
        used, replaced = list(fresh), 0
        for i in empty:
            if not self.groups:
                break
            used[i] = self.groups.pop(0)[1]
            replaced += 1
        # Copies: a view would keep its whole generation batch in memory.
        kept = [
            (score, group.select(torch.arange(len(group))))
            for score, group in zip(scores.tolist(), fresh)
            if score > 0.0
        ]
        # The sort is stable: of equal scores, the newest stays.
        self.groups = sorted([*kept, *self.groups], key=lambda item: -item[0])[: self.size]
        return (join(used) if replaced else batch), replaced

    def state(self) -> list[Any]:
        """What `restore` takes."""
        return [[score, group] for score, group in self.groups]

    def restore(self, state: list[Any] | None, device: Any) -> None:
        """Become what `state` was taken of."""
        self.groups = [(score, group.to(device)) for score, group in state or []]


def join(batches: list[RolloutBatch]) -> RolloutBatch:
    """Batches below each other, padded to the longest prompt and completion. What belongs to a whole generation batch
    (its cap, its temperature, its count of tokens) is the first one's."""
    first = batches[0]
    prompt = max(b.prompt_ids.size(1) for b in batches)
    completion = max(b.completion_ids.size(1) for b in batches)
    joined: dict[str, Any] = {}
    for f in fields(first):
        values = [getattr(b, f.name) for b in batches]
        if f.name == "images":
            joined[f.name] = None if values[0] is None else [row for rows in values for row in rows]
        elif not isinstance(values[0], Tensor) or values[0].ndim == 0:
            joined[f.name] = values[0]
        elif any(value is None for value in values):
            joined[f.name] = None
        elif f.name in RolloutBatch._PROMPT_AXIS:
            joined[f.name] = torch.cat([pad(v, (prompt - v.size(1), 0)) for v in values])
        elif values[0].ndim == 2 and any(v.size(1) > 1 for v in values):
            joined[f.name] = torch.cat([pad(v, (0, completion - v.size(1))) for v in values])
        else:
            joined[f.name] = torch.cat(values)
    return RolloutBatch(**joined)
