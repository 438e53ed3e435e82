"""In which order prompts are drawn for group-relative methods, and the data loaders that do it.

The training loader yields a whole generation batch for every micro-batch; a trainer samples from the first of each
`steps_per_generation * num_iterations`, and serves the others from what was sampled.
"""

import math
from collections.abc import Iterator, Sized
from typing import Any

import torch
from datasets import Dataset, IterableDataset
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


def train_repeats(args: Any) -> dict[str, int]:
    """How `RepeatSampler` and `repeat_stream` repeat prompts for a `GroupConfig`."""
    return {
        "group_size": args.num_generations,
        "prompts_per_batch": args.generation_batch_size // args.num_generations,
        "repeats": args.num_iterations * args.steps_per_generation,
    }


def train_sampler(trainer: Any, dataset: Dataset) -> RepeatSampler:
    """The order of a training set that is no stream."""
    args = trainer.args
    return RepeatSampler(dataset, **train_repeats(args), shuffle=args.shuffle_dataset, seed=args.seed)


def train_dataloader(trainer: Any) -> Any:
    """The loader of generation batches."""
    dataset, args = trainer.train_dataset, trainer.args
    if isinstance(dataset, IterableDataset):
        if args.shuffle_dataset:
            dataset = dataset.shuffle(seed=args.seed)
        dataset = repeat_stream(dataset, **train_repeats(args))
    return trainer._get_dataloader(
        dataset=dataset,
        description="Training",
        batch_size=trainer._train_batch_size * args.steps_per_generation,
        sampler_fn=trainer._get_train_sampler,
        is_training=True,
    )


def eval_stream(trainer: Any, eval_dataset: Any, group_size: int) -> Any:
    """What `Trainer.get_eval_dataloader` is to get for an evaluation set: of a stream, each row `group_size` times."""
    dataset = trainer.eval_dataset if eval_dataset is None else eval_dataset
    if isinstance(dataset, str):
        dataset = trainer.eval_dataset[dataset]
    if not isinstance(dataset, IterableDataset):
        return eval_dataset
    return repeat_stream(dataset.shuffle(seed=trainer.args.seed), group_size=group_size)


def micro_batches_before(trainer: Any) -> int:
    """Micro-batches up to the step that a checkpoint resumes from, so that generation keeps its rhythm."""
    accumulation, step = trainer.args.gradient_accumulation_steps, trainer.state.global_step
    if isinstance(trainer.train_dataset, IterableDataset):
        return step * accumulation
    per_epoch = len(trainer.callback_handler.train_dataloader)
    epochs, steps = divmod(step, math.ceil(per_epoch / accumulation))
    return epochs * per_epoch + steps * accumulation


def more_prompts(size: int, count: int, seed: int, batch: int, attempt: int) -> list[int]:
    """`count` row numbers out of `size`, the same on all processes and after a resume: those that generation batch
    number `batch` draws in addition at its `attempt`-th try. None twice, unless there are fewer rows.
    """
    generator = torch.Generator().manual_seed((seed * 1_000_003 + batch) * 101 + attempt)
    rounds = -(-count // size)
    return torch.cat([torch.randperm(size, generator=generator) for _ in range(rounds)])[:count].tolist()
