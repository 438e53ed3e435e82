"""In which order prompts are drawn for group-relative methods."""

from collections.abc import Iterator, Sized
from typing import Any

import torch
from datasets import IterableDataset
from torch.utils.data import Sampler


class RepeatSampler(Sampler[int]):
    """Every index `group_size` times in a row, and every block of `prompts_per_batch` indices `repeats` times.

    A row's copies stand next to each other, so that the completions of one prompt form a contiguous group; a block is
    repeated because each generation batch serves `repeats` training steps. A last, incomplete block is left out.

    >>> list(RepeatSampler("abcde", group_size=2, prompts_per_batch=2, repeats=2, shuffle=False))
    [0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3]

    The order of epoch `e` is permutation number `e` of one generator seeded with `seed`, so a resumed run sees the order
    that an uninterrupted one would have seen.
    """

    def __init__(
        self,
        data_source: Sized,
        group_size: int,
        prompts_per_batch: int = 1,
        repeats: int = 1,
        shuffle: bool = True,
        seed: int = 0,
    ):
        self.size = len(data_source)
        self.group_size = group_size
        self.prompts_per_batch = prompts_per_batch
        self.repeats = repeats
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        order = list(range(self.size))
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed)
            for _ in range(self.epoch + 1):
                permutation = torch.randperm(self.size, generator=generator)
            order = permutation.tolist()
        self.epoch += 1
        for start in range(0, self.size - self.prompts_per_batch + 1, self.prompts_per_batch):
            block = order[start : start + self.prompts_per_batch]
            for _ in range(self.repeats):
                for index in block:
                    for _ in range(self.group_size):
                        yield index

    def __len__(self) -> int:
        return self.size // self.prompts_per_batch * self.prompts_per_batch * self.group_size * self.repeats


def repeat_stream(
    dataset: IterableDataset, group_size: int, prompts_per_batch: int = 1, repeats: int = 1
) -> IterableDataset:
    """The rows of a stream in the order in which `RepeatSampler` (without shuffling) draws those of a dataset."""

    def repeated(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        size = len(next(iter(rows.values())))
        order = [index for _ in range(repeats) for index in range(size) for _ in range(group_size)]
        return {name: [values[index] for index in order] for name, values in rows.items()}

    return dataset.map(repeated, batched=True, batch_size=prompts_per_batch, drop_last_batch=True)
