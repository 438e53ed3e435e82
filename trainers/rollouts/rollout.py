"""From rows of a dataset to completions: prompts are tokenised, sampled from by a backend, run through tools, decoded."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from datasets import IterableDataset
from torch import Tensor

from outspoken.trainers.data.formats import column_names, is_messages, prepare_multimodal_messages
from outspoken.trainers.data.vision import TOKEN_TYPES, image_inputs, row_images
from outspoken.trainers.rollouts.backends import TransformersBackend
from outspoken.trainers.rollouts.batch import RolloutBatch, Sampled, pad_floats, pad_ids
from outspoken.trainers.rollouts.sampling import SamplingParams, sampling_params
from outspoken.trainers.rollouts.transformers_backend import eos_token_ids
from outspoken.trainers.setup import Processing, check_dataset_type, named_datasets

logger = logging.getLogger(__name__)

# Columns that reward functions get under other names, or that would collide with what they get.
RESERVED_COLUMNS = ("prompt", "completion", "completion_ids")


@dataclass
class Rollouts:
    """Completions of this process's rows, one entry each, in the order of the rows.

    Attributes:
        rows: the rows of the dataset.
        prompts: strings or lists of messages, as reward functions get them.
        completions: strings or lists of messages.
        prompt_ids, completion_ids: token ids.
        finished: whether the completion ended by itself.
        logps, entropies: per token, or None for a completion whose backend keeps none (`Sampled`).
        tool_masks: per token, 1 where the model wrote it; None where it wrote all.
        environments: what each completion was sampled in; None without environments.
        extra: further columns for the reward functions, name -> one value a row.
        images: what the model takes beside tokens; None for a row without.
        counts: sums over the rows of what is counted, such as tool calls.
    """

    rows: list[dict[str, Any]]
    prompts: list[Any]
    completions: list[Any]
    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    finished: list[bool]
    logps: list[list[float] | None]
    entropies: list[list[float] | None]
    tool_masks: list[list[int] | None]
    environments: list[Any] | None = None
    extra: dict[str, list[Any]] = field(default_factory=dict)
    images: list[dict[str, Tensor] | None] | None = None
    counts: dict[str, float] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    def put(self, places: Sequence[int], others: "Rollouts") -> None:
        """Replace the entries at `places` by those of `others`, in order. What was counted stays counted."""
        for f in fields(self):
            mine, theirs = getattr(self, f.name), getattr(others, f.name)
            if isinstance(mine, list) and isinstance(theirs, list):
                for place, value in zip(places, theirs):
                    mine[place] = value
        for name, values in others.extra.items():
            mine = self.extra.setdefault(name, [None] * len(self))
            for place, value in zip(places, values):
                mine[place] = value
        for name, value in others.counts.items():
            self.counts[name] = self.counts.get(name, 0.0) + value

    def columns(self) -> dict[str, list[Any]]:
        """What reward functions get beside prompts and completions: the dataset's further columns, and `extra`."""
        names = [name for name in self.rows[0] if name not in RESERVED_COLUMNS] if self.rows else []
        return {**{name: [row.get(name) for row in self.rows] for name in names}, **self.extra}

    def model_tokens(self) -> list[int]:
        """How many tokens of each completion the model wrote itself."""
        return [len(ids) if mask is None else sum(mask) for ids, mask in zip(self.completion_ids, self.tool_masks)]


class RolloutWorker:
    """Samples completions for a trainer.

    Args:
        trainer: it has `args`, `accelerator`, `model`, `model_wrapped`, `state`.
        processing: the tokenizer, and the processor of a model that takes images.
        tools, rollout_func, environment_factory: see `GRPOTrainer`.
    """

    def __init__(
        self,
        trainer: Any,
        processing: Processing,
        *,
        tools: list[Callable] | None = None,
        rollout_func: Callable | None = None,
        environment_factory: Callable | dict[str, Callable] | None = None,
    ):
        for name, value in (
            ("tools", tools),
            ("rollout_func", rollout_func),
            ("environment_factory", environment_factory),
        ):
            if value:
                raise ValueError(f"`{name}` is set, but this is not supported yet; leave it out.")
        self.trainer = trainer
        self.tokenizer = processing.tokenizer
        self.processor = processing.processor
        self.end_ids = eos_token_ids(trainer.model, self.tokenizer)
        self.backend: Any = TransformersBackend(trainer, self.tokenizer)

    def with_own_rewards(self, reward_funcs: Any) -> Any:
        """The reward functions, and those that environments bring."""
        return reward_funcs

    def generate(
        self, prompt_ids: list[list[int]], params: SamplingParams, *, caps: list[int] | None = None, images: Any = None
    ) -> Sampled:
        """One completion per prompt, all processes together. Replace it to sample by other means."""
        return self.backend.generate(prompt_ids, params, caps=caps, **({} if images is None else {"images": images}))

    def params(self, greedy: bool = False) -> SamplingParams:
        """How to sample, as the trainer's config stands now; `greedy`: the likeliest token instead."""
        params = sampling_params(self.trainer.args, self.end_ids)
        return replace(params, temperature=0.0) if greedy else params

    def sample(self, rows: list[dict[str, Any]], params: SamplingParams | None = None) -> Rollouts:
        """A completion for each row. All processes must call it, if need be with no rows."""
        params = params or self.params()
        prompts, prompt_ids, images = self._tokenize([row["prompt"] for row in rows], rows)
        sampled = self.generate(prompt_ids, params, images=images)
        n = len(rows)
        return Rollouts(
            rows=rows,
            prompts=prompts,
            completions=self._decode(sampled.completion_ids, conversational=bool(rows) and is_messages(prompts[0])),
            prompt_ids=prompt_ids,
            completion_ids=sampled.completion_ids,
            finished=sampled.finished,
            logps=list(sampled.logps) if sampled.logps is not None else [None] * n,
            entropies=list(sampled.entropies) if sampled.entropies is not None else [None] * n,
            tool_masks=list(sampled.tool_mask) if sampled.tool_mask is not None else [None] * n,
            images=images,
        )

    def _tokenize(
        self, prompts: list[Any], rows: list[dict[str, Any]]
    ) -> tuple[list[Any], list[list[int]], list[dict[str, Tensor]] | None]:
        """(prompts, their token ids, what the model gets of their images)."""
        settings = self.trainer.args.chat_template_kwargs or {}
        if not prompts:
            return prompts, [], None
        if self.processor is not self.tokenizer:
            return self._tokenize_with_images(prompts, rows, settings)
        if not is_messages(prompts[0]):
            return prompts, self.tokenizer(text=prompts)["input_ids"], None
        ids = self.tokenizer.apply_chat_template(
            conversation=prompts, add_generation_prompt=True, tokenize=True, return_dict=True, **settings
        )["input_ids"]
        return prompts, ids, None

    def _tokenize_with_images(
        self, prompts: list[Any], rows: list[dict[str, Any]], settings: dict[str, Any]
    ) -> tuple[list[Any], list[list[int]], list[dict[str, Tensor]] | None]:
        """Prompt by prompt, so that what belongs to each stays apart; a group's copies are processed once."""
        with_places, ids, inputs = [], [], []
        previous: tuple[Any, Any] | None = None
        for prompt, row in zip(prompts, rows):
            images = row_images(row)
            if images and not is_messages(prompt):
                raise ValueError(
                    "The dataset has images, but its prompts are texts; pass prompts as lists of messages, so that the "
                    "chat template says where an image stands."
                )
            if previous is None or previous[0] != prompt or (previous[1] is not images and previous[1] != images):
                placed = prepare_multimodal_messages(prompt, images or None) if is_messages(prompt) else prompt
                text = placed
                if is_messages(prompt):
                    text = self.processor.apply_chat_template(
                        placed, add_generation_prompt=True, tokenize=False, **settings
                    )
                found = self.processor(
                    text=[text],
                    images=[images] if images else None,
                    return_tensors="pt",
                    add_special_tokens=not is_messages(prompt),
                )
                tokens = found["input_ids"][0].tolist()
                of_images = image_inputs(found) | {n: found[n][0] for n in TOKEN_TYPES if n in found}
                previous = prompt, images
            with_places.append(placed)
            ids.append(tokens)
            inputs.append({name: value for name, value in of_images.items() if isinstance(value, Tensor)})
        return with_places, ids, inputs if any(inputs) else None

    def _decode(self, completion_ids: list[list[int]], conversational: bool) -> list[Any]:
        texts = self.tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
        return [[{"role": "assistant", "content": text}] for text in texts] if conversational else texts


def as_batch(trainer: Any, rollouts: Rollouts, temperature: float, cap: int) -> RolloutBatch:
    """The completions of this process as tensors on its device, without advantages yet.

    Args:
        trainer: it has `accelerator`, `args`, `rollouts`, `state`.
        temperature, cap: what the completions were sampled at, and under which limit of tokens.
    """
    device, multiple = trainer.accelerator.device, trainer.args.pad_to_multiple_of
    pad_id = trainer.rollouts.tokenizer.pad_token_id
    n = len(rollouts)
    prompt_ids, prompt_mask = pad_ids(rollouts.prompt_ids, pad_id, "left", multiple)
    completion_ids, completion_mask = pad_ids(rollouts.completion_ids, pad_id, "right", multiple)
    loss_mask = completion_mask.clone()
    if any(mask is not None for mask in rollouts.tool_masks):
        written = [
            [1] * len(ids) if mask is None else mask for ids, mask in zip(rollouts.completion_ids, rollouts.tool_masks)
        ]
        loss_mask = loss_mask * pad_ids(written, 0, "right", multiple)[0]
    if getattr(trainer.args, "mask_truncated_completions", False):
        loss_mask = loss_mask * torch.tensor(rollouts.finished).long().unsqueeze(1)
    loss_mask = loss_mask.to(device)

    def known(rows: list[list[float] | None]) -> Tensor | None:
        if all(row is None for row in rows):
            return None
        numbers = [
            [float("nan")] * len(ids) if row is None else row for row, ids in zip(rows, rollouts.completion_ids)
        ]
        return pad_floats(numbers, completion_ids.size(1)).to(device)

    return RolloutBatch(
        prompt_ids=prompt_ids.to(device),
        prompt_mask=prompt_mask.to(device),
        completion_ids=completion_ids.to(device),
        completion_mask=completion_mask.to(device),
        loss_mask=loss_mask,
        advantages=torch.zeros(n, device=device),
        active_tokens=trainer.accelerator.gather(loss_mask.sum()).sum(),
        temperature=temperature,
        max_completion_length=cap,
        versions=torch.full((n,), trainer.state.global_step, device=device),
        sampler_logps=known(rollouts.logps),
        sampler_entropies=known(rollouts.entropies),
        images=_on(device, rollouts.images),
    )


def _on(device: Any, images: "list[dict[str, Tensor]] | None") -> "list[dict[str, Tensor]] | None":
    return images and [{name: value.to(device) for name, value in row.items()} for row in images]


def check_prompts(train_dataset: Any, eval_dataset: Any, args: Any, *, environments: bool = False) -> None:
    """Raise unless the datasets have prompts to sample from; make streams work with several processes.

    Args:
        environments: whether environments may bring the prompts, so that the column is not needed.

    Raises:
        ValueError, TypeError: one is missing or something else.
    """
    datasets = {"train_dataset": train_dataset}
    for name, dataset in named_datasets(eval_dataset, "eval").items():
        datasets[f"eval_dataset[{name!r}]" if isinstance(eval_dataset, dict) else "eval_dataset"] = dataset
    for name, dataset in datasets.items():
        check_dataset_type(dataset, name)
        columns = column_names(dataset, name)
        if "prompt" not in columns and not environments:
            raise ValueError(f"`{name}` has the columns {', '.join(columns)}, but no 'prompt'; rename or add it.")
    if any(isinstance(dataset, IterableDataset) for dataset in datasets.values()):
        # One process cannot hand a stream's rows to the others: they are no tensors.
        args.accelerator_config.dispatch_batches = False
    if isinstance(train_dataset, IterableDataset) and args.dataloader_num_workers:
        logger.warning("dataloader_num_workers is set to 0: several workers would break up a stream's groups.")
        args.dataloader_num_workers = 0
