"""What samples for a trainer: the policy itself, or another engine that holds its weights."""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch.distributed.fsdp import FullyShardedDataParallel

from outspoken.trainers.rollouts import transformers_backend
from outspoken.trainers.rollouts.batch import Sampled, sampled_from_ids
from outspoken.trainers.rollouts.sampling import SamplingParams


class TransformersBackend:
    """Samples with the policy itself, in the process that trains it.

    Args:
        trainer: it has `args`, `accelerator`, `model_wrapped`.
        tokenizer: of the policy.
    """

    def __init__(self, trainer: Any, tokenizer: Any):
        self.trainer = trainer
        self.tokenizer = tokenizer

    def generate(
        self, prompt_ids: list[list[int]], params: SamplingParams, *, caps: list[int] | None = None, images: Any = None
    ) -> Sampled:
        with whole_model(self.trainer) as model:
            ids = transformers_backend.generate(
                model, self.tokenizer, prompt_ids, self.trainer.args, list(params.end_ids)
            )
        return sampled_from_ids(ids, [*params.end_ids, self.tokenizer.pad_token_id])

    def refresh(self, version: int) -> dict[str, float]:
        """Nothing to do: the policy that trains is the one that samples."""
        return {}

    def close(self) -> None: ...


@contextlib.contextmanager
def whole_model(trainer: Any) -> Iterator[Any]:
    """While open, the policy unwrapped, with its weights gathered so far as sampling needs them."""
    accelerator, wrapped = trainer.accelerator, trainer.model_wrapped
    model = accelerator.unwrap_model(wrapped)
    if isinstance(wrapped, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(wrapped, recurse=False, writeback=False):
            yield model
    else:
        yield model
