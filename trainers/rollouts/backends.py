"""The policy itself as what samples for a trainer. (`vllm_backend.py` is the other one.)"""

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import GenerationConfig
from transformers.generation import ContinuousBatchingConfig

from outspoken.trainers.data.vision import joined_images
from outspoken.trainers.measuring import on_any_process
from outspoken.trainers.rollouts import transformers_backend
from outspoken.trainers.rollouts.batch import Sampled, sampled_from_ids
from outspoken.trainers.rollouts.sampling import SamplingParams
from outspoken.trainers.sharding import is_sharded, whole_under_zero3


class TransformersBackend:
    """Samples with the policy itself, in the process that trains it and in the precision it trains in.

    Args:
        trainer: it has `args`, `accelerator`, `model_wrapped`.
        tokenizer: of the policy.
    """

    def __init__(self, trainer: Any, tokenizer: Any):
        self.trainer = trainer
        self.tokenizer = tokenizer

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
                synced=partial(on_any_process, accelerator) if synced else None,
            )

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
