"""The policy itself as what samples for a trainer. (`vllm_backend.py` is the other one.)"""

import contextlib
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import GenerationConfig
from transformers.generation import ContinuousBatchingConfig

from outspoken.trainers.data.vision import joined_images
from outspoken.trainers.rollouts import transformers_backend
from outspoken.trainers.rollouts.batch import Sampled, sampled_from_ids
from outspoken.trainers.rollouts.sampling import SamplingParams
from outspoken.trainers.sharding import is_sharded, whole_under_zero3


class TransformersBackend:
    """Samples with the policy itself, in the process that trains it and in the precision it trains in.

    Args:
        trainer: it has `args`, `accelerator`, `model`, `model_wrapped`, `state`.
        tokenizer: of the policy.
    """

    def __init__(self, trainer: Any, tokenizer: Any):
        self.trainer = trainer
        self.tokenizer = tokenizer
        self._moment: tuple[int, bool] | None = None  # step and mode of the last call with a seed
        self._calls = 0  # how many there were before it at that moment

    def generate(
        self,
        prompt_ids: list[list[int]],
        params: SamplingParams,
        *,
        caps: list[int] | None = None,
        images: list[dict[str, Tensor]] | None = None,
    ) -> Sampled:
        """One completion per prompt; see `transformers_backend.sample`.

        Args:
            images: what the model gets of each prompt's images; see `RolloutBatch`.
        """
        args, accelerator = self.trainer.args, self.trainer.accelerator
        params = self._with_seed_of_its_own(params)
        inputs = None if images is None else joined_images(images, max(map(len, prompt_ids), default=0))
        with whole_model(self.trainer) as (model, synced), accelerator.autocast():
            if args.use_transformers_continuous_batching:
                if images is not None:
                    raise ValueError(
                        "use_transformers_continuous_batching is True, but transformers' continuous batching takes no "
                        "images; set it to False."
                    )
                return sample_continuously(model, prompt_ids, params, self.tokenizer, args, caps)
            return transformers_backend.sample(
                model,
                prompt_ids,
                params,
                tokenizer=self.tokenizer,
                caps=caps,
                cache_implementation=args.cache_implementation,
                model_inputs=inputs and {name: value.to(accelerator.device) for name, value in inputs.items()},
                synced=self._anyone if synced else None,
            )

    def _with_seed_of_its_own(self, params: SamplingParams) -> SamplingParams:
        """A seed for this call and process: the same one would draw alike at each step, and on each process."""
        if params.seed is None:
            return params
        moment = self.trainer.state.global_step, self.trainer.model.training
        self._calls = self._calls + 1 if moment == self._moment else 0
        self._moment = moment
        drawn = random.Random(repr((params.seed, *moment, self._calls, self.trainer.accelerator.process_index)))
        return replace(params, seed=drawn.getrandbits(63))

    def _anyone(self, here: bool) -> bool:
        accelerator = self.trainer.accelerator
        return bool(accelerator.gather(torch.tensor([here], device=accelerator.device)).any())

    def push_weights(self, model: Any, version: int) -> None:
        """Nothing to do: what trains is what samples."""


def sample_continuously(
    model: Any, prompt_ids: list[list[int]], params: SamplingParams, tokenizer: Any, args: Any, caps: list[int] | None
) -> Sampled:
    """Sample with transformers' continuous batching, which keeps no log-probabilities and knows no stop texts."""
    if params.stop:
        raise ValueError(
            f"generation_kwargs has the stop texts {list(params.stop)}, which transformers' continuous batching does not "
            "know; leave them out, or set use_transformers_continuous_batching to False."
        )
    if not prompt_ids:
        return Sampled([], [])
    settings: dict[str, Any] = {
        "max_new_tokens": params.max_new_tokens,
        "do_sample": params.temperature > 0,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": list(params.end_ids),
        "repetition_penalty": params.repetition_penalty,
    }
    if params.temperature > 0:
        settings |= {name: getattr(params, name) for name in ("temperature", "top_p", "top_k", "min_p")}
    settings |= params.extra
    config = ContinuousBatchingConfig(**(args.transformers_continuous_batching_config or {}))
    was_training = model.training
    model.eval()
    try:
        outputs = model.generate_batch(
            prompt_ids,
            generation_config=GenerationConfig(**settings),
            continuous_batching_config=config,
            progress_bar=False,
        )
    finally:
        model.train(was_training)
    ends = set(params.end_ids)
    ids = [transformers_backend.cut_after_eos(list(output.generated_tokens), ends) for output in outputs.values()]
    if caps is not None:
        ids = [row[:cap] for row, cap in zip(ids, caps)]
    return sampled_from_ids(ids, params.end_ids)


@contextlib.contextmanager
def whole_model(trainer: Any) -> Iterator[tuple[Any, bool]]:
    """While open, the policy unwrapped, with its weights gathered so far as sampling needs them; and whether its forward
    passes have to be made by all processes together."""
    wrapped = trainer.model_wrapped
    model = trainer.accelerator.unwrap_model(wrapped)
    if isinstance(wrapped, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(wrapped, recurse=False, writeback=False):
            yield model, True
    elif trainer.args.ds3_gather_for_generation and any(hasattr(p, "ds_tensor") for p in model.parameters()):
        with whole_under_zero3(wrapped):
            yield model, False
    else:
        yield model, is_sharded(model)
