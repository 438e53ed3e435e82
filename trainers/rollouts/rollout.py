"""From rows of a dataset to completions: prompts are tokenised, sampled from by a backend, run through tools, decoded."""

import logging
import random
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor

from outspoken.trainers.data.checks import PROMPTS, check_rows
from outspoken.trainers.data.formats import column_names, first_row, is_messages, prepare_multimodal_messages
from outspoken.trainers.data.response_templates import add_response_schema
from outspoken.trainers.data.vision import TOKEN_TYPES, image_inputs, image_token_ids, process, row_images
from outspoken.trainers.measuring import raise_together, together
from outspoken.trainers.rollouts.backends import TransformersBackend
from outspoken.trainers.rollouts.batch import RolloutBatch, Sampled, pad_floats, pad_ids, sampled_from_ids
from outspoken.trainers.rollouts.environments import EnvironmentPool, environment_dataset
from outspoken.trainers.rollouts.rollout_func import call_rollout_func
from outspoken.trainers.rollouts.sampling import SamplingParams, sampling_params
from outspoken.trainers.rollouts.tools import (
    TOOL_TIMEOUT,
    ToolSet,
    check_tool_template,
    row_tools,
    run_with_tools,
    schemas,
    tokenize_tool_prompts,
    tool_set,
    tool_totals,
)
from outspoken.trainers.rollouts.transformers_backend import eos_token_ids
from outspoken.trainers.setup import Processing, check_datasets, datasets_by_argument

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
        logged: columns that reward functions logged about these completions.
        images: what the model takes beside tokens; None without images.
        pictures: the images as the dataset has them.
        counts: what `tool_totals` counts of calls and turns; empty without tools.
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
    logged: dict[str, list[Any]] = field(default_factory=lambda: defaultdict(list))
    images: list[dict[str, Tensor]] | None = None
    pictures: list[list[Any]] | None = None
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
        for mine, theirs in ((self.extra, others.extra), (self.logged, others.logged)):
            for name in {*mine, *theirs}:
                column = mine.setdefault(name, [None] * len(self))
                for place, value in zip(places, theirs.get(name, [None] * len(others))):
                    column[place] = value
        for name, value in others.counts.items():
            so_far = self.counts.get(name, 0.0)
            self.counts[name] = max(so_far, value) if name == "max_turns" else so_far + value

    def columns(self) -> dict[str, list[Any]]:
        """What reward functions get beside prompts and completions: the dataset's further columns, and `extra`."""
        names = [name for name in self.rows[0] if name not in RESERVED_COLUMNS] if self.rows else []
        return {**{name: [row.get(name) for row in self.rows] for name in names}, **self.extra}

    def shown_images(self, takes_images: bool) -> list[list[Any]] | None:
        """The images to show beside each completion; None where the model takes none.

        What is gathered has to be there on every process, also on one whose prompts have no images.
        """
        return (self.pictures or [[]] * len(self)) if takes_images else None

    def model_tokens(self) -> list[int]:
        """How many tokens of each completion the model wrote itself."""
        return [len(ids) if mask is None else sum(mask) for ids, mask in zip(self.completion_ids, self.tool_masks)]


@dataclass
class Prepared:
    """Rows with their prompts: messages or texts, tokens, tools, images as they are and as the model gets them."""

    rows: list[dict[str, Any]]
    prompts: list[Any]
    prompt_ids: list[list[int]]
    tools: list[ToolSet]
    pictures: list[list[Any]] | None
    images: "list[dict[str, Tensor]] | None"
    environments: list[Any] | None


class _FailedElsewhere(Exception):
    """Another process cannot go on with its conversations; `raise_together` tells why."""


class _Turns:
    """The turns of conversations that processes sample together, until none goes on with any.

    Attributes:
        under_way: whether the other processes may be waiting to hear of this one's next turn.
    """

    def __init__(self, accelerator: Any):
        self.accelerator = accelerator
        self.under_way = False

    def anyone(self, going_on: bool) -> bool:
        """Whether any process goes on.

        Raises:
            _FailedElsewhere: one has failed.
        """
        if self.accelerator.num_processes == 1:
            return going_on
        going_on, failed = self._told(going_on, False)
        self.under_way = going_on and not failed
        if failed:
            raise _FailedElsewhere
        return going_on

    def fail(self) -> None:
        """Tell the processes that wait for this one's next turn that there is none."""
        if self.under_way and self.accelerator.num_processes > 1:
            self._told(False, True)

    def _told(self, *flags: bool) -> list[bool]:
        return self.accelerator.gather(torch.tensor([flags], device=self.accelerator.device)).any(0).tolist()


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
        args = trainer.args
        if rollout_func is not None and (tools or environment_factory is not None):
            raise ValueError(
                "`rollout_func` samples in the trainer's place, so `tools` and `environment_factory` would not be used; "
                "leave them out, or leave out `rollout_func`."
            )
        self.trainer = trainer
        self.tokenizer = processing.tokenizer
        self.processor = processing.processor
        self.takes_images = self.processor is not self.tokenizer
        self.end_ids = eos_token_ids(trainer.model, self.tokenizer)
        self.rollout_func = rollout_func
        self._moment: tuple[int, bool] | None = None  # step and mode of the last call with a seed
        self._calls = 0  # how many there were before it at that moment
        self.sampled_tokens, self.sampling_seconds = 0, 0.0  # of this process, since they were last measured
        self.tools: ToolSet = tool_set(tools or [])
        self.environments: EnvironmentPool | None = None
        if environment_factory is not None:
            timeout = getattr(args, "tool_timeout", TOOL_TIMEOUT)
            self.environments = EnvironmentPool(environment_factory, self.tools, timeout)
        self._converses = bool(self.tools) or self.environments is not None
        self._template = None
        if self._converses:
            self._template = check_tool_template(self.processor)
            if getattr(self.tokenizer, "response_template", None) is None:
                add_response_schema(self.processor)
        self.backend: Any
        if args.use_vllm:
            from outspoken.trainers.rollouts.vllm_backend import VLLMBackend

            self.backend = VLLMBackend(trainer.model, self.tokenizer, args, trainer.accelerator)
        else:
            self.backend = TransformersBackend(trainer, self.tokenizer)

    def generate(
        self, prompt_ids: list[list[int]], params: SamplingParams, *, caps: list[int] | None = None, images: Any = None
    ) -> Sampled:
        """One completion per prompt, all processes together. Replace it to sample by other means."""
        params = self._with_seed_of_its_own(params)
        return self.backend.generate(prompt_ids, params, caps=caps, **({} if images is None else {"images": images}))

    def _with_seed_of_its_own(self, params: SamplingParams) -> SamplingParams:
        """A seed for this call and process: the same one would draw alike at each step, and on each process."""
        if params.seed is None:
            return params
        moment = self.trainer.state.global_step, self.trainer.model.training
        self._calls = self._calls + 1 if moment == self._moment else 0
        self._moment = moment
        drawn = random.Random(repr((params.seed, *moment, self._calls, self.trainer.accelerator.process_index)))
        return replace(params, seed=drawn.getrandbits(62))

    def params(self, greedy: bool = False) -> SamplingParams:
        """How to sample, as the trainer's config stands now; `greedy`: the likeliest token instead."""
        params = sampling_params(self.trainer.args, self.end_ids)
        if self.takes_images:
            # A token that stands for a part of an image would have none behind it.
            unwritable = image_token_ids(self.processor)
            if self.trainer.args.use_vllm:
                no_images: dict[str, Any] = {"logit_bias": dict.fromkeys(unwritable, -100.0)}
            else:
                no_images = {"suppress_tokens": unwritable}
            params = replace(params, extra={**no_images, **params.extra})
        return replace(params, temperature=0.0) if greedy else params

    def refresh(self) -> None:
        """Let another engine hold the weights as they are now, if it does not. All processes must call it."""
        report = self.backend.push_weights(self.trainer.model_wrapped, self.trainer.state.global_step)
        if report is not None and report.pushed and self.trainer.model.training:
            for name, value in report.metrics().items():
                self.trainer.recorder.set(name, value)

    def sample(self, rows: list[dict[str, Any]], params: SamplingParams | None = None) -> Rollouts:
        """A completion for each row. All processes must call it, if need be with no rows.

        Raises:
            RuntimeError: also where another process failed, so that all of them stop.
        """
        params = params or self.params()
        prepared = together(self.trainer.accelerator, lambda: self.prepare(rows))
        self.refresh()
        rollouts, error = None, None
        turns, start = _Turns(self.trainer.accelerator), time.perf_counter()
        try:
            rollouts = self._sample(prepared, params, turns)
        except _FailedElsewhere:
            pass
        except Exception as problem:
            error = problem
            turns.fail()
        raise_together(self.trainer.accelerator, error)
        assert rollouts is not None
        self.sampled_tokens += sum(rollouts.model_tokens())
        self.sampling_seconds += time.perf_counter() - start
        return rollouts

    def prepare(self, rows: list[dict[str, Any]]) -> "Prepared":
        """What is sampled from, yet without tokens of the model."""
        if self.environments is not None:
            episodes = self.environments.start(rows)
            prompts, tools = episodes.prompts, episodes.tools
            environments: list[Any] | None = episodes.environments
        else:
            prompts, environments = [row["prompt"] for row in rows], None
            tools = row_tools(self.tools, rows) if self.tools else []
        if self.rollout_func is not None:
            return Prepared(rows, prompts, [], tools, None, None, environments)
        pictures = inputs = None
        if rows and self.takes_images:
            prompts, prompt_ids, pictures, inputs = self._tokenize_with_images(prompts, rows, tools)
        else:
            prompt_ids = self._tokenize(prompts, tools)
        return Prepared(rows, prompts, prompt_ids, tools, pictures, inputs, environments)

    def _sample(self, given: "Prepared", params: SamplingParams, turns: "_Turns") -> Rollouts:
        rows, n = given.rows, len(given.rows)
        extra: dict[str, list[Any]] = {}
        counts: dict[str, float] = {}
        prompt_ids = given.prompt_ids
        completions = None
        # Another engine prepares images itself.
        images = given.pictures if self.trainer.args.use_vllm else given.images
        if self.rollout_func is not None:
            custom = call_rollout_func(self.rollout_func, given.prompts, self.trainer)
            prompt_ids, extra = custom.prompt_ids, custom.extra
            ends = [*self.end_ids, self.tokenizer.pad_token_id]
            sampled = sampled_from_ids(custom.completion_ids, ends)
            sampled.logps, sampled.tool_mask = custom.logps, custom.tool_mask
        elif self._converses:
            turns.under_way = True
            rollout = run_with_tools(
                self.generate,
                given.prompts,
                prompt_ids,
                tokenizer=self.processor,
                tools=given.tools,
                params=params,
                max_iterations=self.trainer.args.max_tool_calling_iterations,
                chat_template=self._template,
                chat_template_kwargs=self.trainer.args.chat_template_kwargs,
                timeout=getattr(self.trainer.args, "tool_timeout", TOOL_TIMEOUT),
                max_length=self._longest(),
                images=images,
                anyone=turns.anyone,
            )
            sampled, completions, counts = rollout, rollout.completions, tool_totals(rollout)
        else:
            sampled = self.generate(prompt_ids, params, images=images)
        if completions is None:
            conversational = bool(rows) and is_messages(given.prompts[0])
            completions = self._decode(sampled.completion_ids, conversational)
        return Rollouts(
            rows=rows,
            prompts=given.prompts,
            completions=completions,
            prompt_ids=prompt_ids,
            completion_ids=sampled.completion_ids,
            finished=sampled.finished,
            logps=list(sampled.logps) if sampled.logps is not None else [None] * n,
            entropies=list(sampled.entropies) if sampled.entropies is not None else [None] * n,
            tool_masks=list(sampled.tool_mask) if sampled.tool_mask is not None else [None] * n,
            environments=given.environments,
            extra=extra,
            images=given.images,
            pictures=given.pictures,
            counts=counts,
        )

    def _longest(self) -> int | None:
        """Tokens of prompt and completion that the model can take."""
        given = getattr(self.trainer.args, "vllm_max_model_length", None) if self.trainer.args.use_vllm else None
        return given or getattr(self.trainer.model.config.get_text_config(), "max_position_embeddings", None)

    def _tokenize(self, prompts: list[Any], tools: list[ToolSet]) -> list[list[int]]:
        settings = self.trainer.args.chat_template_kwargs or {}
        if not prompts:
            return []
        if not is_messages(prompts[0]) and not self._converses:
            return self.tokenizer(text=prompts)["input_ids"]
        return tokenize_tool_prompts(self.tokenizer, prompts, tools or [{}] * len(prompts), self._template, settings)

    def _tokenize_with_images(
        self, prompts: list[Any], rows: list[dict[str, Any]], tools: list[ToolSet]
    ) -> tuple[list[Any], list[list[int]], list[list[Any]] | None, list[dict[str, Tensor]] | None]:
        """Prompt by prompt, so that what belongs to each stays apart; a group's copies are processed once."""
        settings: dict[str, Any] = {**(self.trainer.args.chat_template_kwargs or {})}
        if self._template is not None:
            settings["chat_template"] = self._template
        with_places, ids, pictures, inputs = [], [], [], []
        previous: tuple[Any, Any, Any] | None = None
        for prompt, row, own in zip(prompts, rows, tools or [{}] * len(prompts)):
            images = row_images(row)
            if not is_messages(prompt):
                if images:
                    raise ValueError(
                        "The dataset has images, but its prompts are texts; pass prompts as lists of messages, so that "
                        "the chat template says where an image stands."
                    )
                placed, found = prompt, self.processor(text=[prompt], return_tensors="pt")
            elif previous is None or previous != (prompt, images, [*own]):
                placed = prepare_multimodal_messages(prompt, images or None)
                images_placed = [
                    part["image"]
                    for message in placed
                    for part in message["content"] or []
                    if part["type"] == "image" and part.get("image") is not None
                ]
                text = self.processor.apply_chat_template(
                    placed, tools=schemas(own), add_generation_prompt=True, tokenize=False, **settings
                )
                found = process(self.processor, [text], [images_placed])
                previous = prompt, images, [*own]
            with_places.append(placed)
            ids.append(torch.as_tensor(found["input_ids"])[0].tolist())
            pictures.append([] if not is_messages(prompt) else images_placed)
            of_images = image_inputs(found) | {
                name: torch.as_tensor(found[name])[0] for name in TOKEN_TYPES if name in found
            }
            inputs.append({name: value for name, value in of_images.items() if isinstance(value, Tensor)})
        seen = any(pictures)
        return with_places, ids, pictures if seen else None, inputs if seen else None

    def _decode(self, completion_ids: list[list[int]], conversational: bool) -> list[Any]:
        if not completion_ids:
            return []  # for which `batch_decode` has one empty text
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


def prompts_of_environments(args: Any) -> Dataset:
    """A dataset for environments that bring their own tasks: as many rows as the run draws.

    Raises:
        ValueError: `max_steps` does not say how long the run is.
    """
    if args.max_steps <= 0:
        raise ValueError(
            f"`max_steps` is {args.max_steps} and there is no `train_dataset`, so nothing says how long to train; set "
            "`max_steps`, or pass a dataset."
        )
    cycle = args.steps_per_generation * args.num_iterations
    batches = -(-args.max_steps * args.gradient_accumulation_steps // cycle)
    return environment_dataset(batches * args.generation_batch_size // args.num_generations)


def check_number_of_prompts(train_dataset: Any, args: Any) -> None:
    """Raise if there are too few prompts for one generation batch: the run would train on nothing."""
    if isinstance(train_dataset, Dataset):
        prompts = args.generation_batch_size // args.num_generations
        if len(train_dataset) < prompts:
            raise ValueError(
                f"The train dataset has {len(train_dataset)} rows, but a generation batch takes {prompts} prompts "
                f"(generation_batch_size={args.generation_batch_size} / num_generations={args.num_generations}); add rows, "
                "or lower per_device_train_batch_size or steps_per_generation."
            )


def check_chat_template(processing: Processing, dataset: Any) -> None:
    """Raise if the prompts are conversations, and nothing says how to render them."""
    if "prompt" not in column_names(dataset, "train"):
        return
    prompt = first_row(dataset.select_columns(["prompt"]), "train")["prompt"]
    if is_messages(prompt) and processing.tokenizer.chat_template is None:
        raise ValueError(
            "The train dataset's column 'prompt' holds conversations, but the tokenizer has no chat template; pass prompts "
            "as text, set `processing_class.chat_template`, or use a model that was trained for chat."
        )


def check_prompts(train_dataset: Any, eval_dataset: Any, args: Any, *, environments: bool = False) -> None:
    """Raise unless the datasets have prompts to sample from; make streams work with several processes.

    Args:
        environments: whether environments may bring the prompts, so that the column is not needed.

    Raises:
        ValueError, TypeError: one is missing or something else.
    """
    check_datasets(train_dataset, eval_dataset, args)
    datasets = datasets_by_argument(train_dataset, eval_dataset)
    for name, dataset in datasets.items():
        columns = column_names(dataset, name)
        if "prompt" not in columns and not environments:
            raise ValueError(f"`{name}` has the columns {', '.join(columns)}, but no 'prompt'; rename or add it.")
        said = "train" if name == "train_dataset" else "eval"
        if isinstance(dataset, Dataset) and len(dataset) == 0:
            raise ValueError(f"The {said} dataset is empty; pass a dataset with at least one row.")
        if "prompt" in columns:
            check_rows(dataset.select_columns(["prompt"]), said, PROMPTS, "the trainer")
    if any(isinstance(dataset, IterableDataset) for dataset in datasets.values()):
        # One process cannot hand a stream's rows to the others: they are no tensors.
        args.accelerator_config.dispatch_batches = False
    if isinstance(train_dataset, IterableDataset) and args.dataloader_num_workers:
        logger.warning("dataloader_num_workers is set to 0: several workers would break up a stream's groups.")
        args.dataloader_num_workers = 0
