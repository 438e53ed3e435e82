"""On-policy distillation: a student learns from a teacher's next-token distributions on what the student itself writes
(GKD, arXiv 2306.13649), or in part on what the dataset holds.

One training step reads: sample completions, compare the two models' distributions at each of their tokens, take the
mean divergence, log. The divergence lives in `losses/distillation.py`, sampling in `rollouts/`.

Axes: `N` completions of a generation batch, `P` prompt tokens, `T` completion tokens.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import set_seed
from datasets import Dataset, IterableDataset
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    Trainer,
    TrainerCallback,
)

from outspoken.trainers import loading
from outspoken.trainers.completion_scores import lay_out, takes_position_ids
from outspoken.trainers.config import as_config, live_field
from outspoken.trainers.data.chat_templates import (
    apply_chat_template,
    tokenize_chat,
    tokenize_chat_with_assistant_mask,
)
from outspoken.trainers.data.formats import (
    check_messages,
    check_text,
    column_names,
    common_prefix_length,
    is_messages,
    prepare_multimodal_messages,
)
from outspoken.trainers.data.supervised import with_eos
from outspoken.trainers.data.vision import expect_unused_parameters
from outspoken.trainers.losses.distillation import TokenDivergence, label_divergence
from outspoken.trainers.measuring import end_token_ids, together
from outspoken.trainers.model_card import ModelCardMixin
from outspoken.trainers.reference import freeze_reference, prepare_reference
from outspoken.trainers.rollouts import measures
from outspoken.trainers.rollouts.batch import RolloutBatch
from outspoken.trainers.rollouts.config import SamplingConfig
from outspoken.trainers.rollouts.mixin import SamplingMixin, identity
from outspoken.trainers.rollouts.rollout import (
    Rollouts,
    RolloutWorker,
    as_batch,
    check_chat_template,
    check_number_of_prompts,
    check_prompts,
)
from outspoken.trainers.rollouts.show import CompletionsLog
from outspoken.trainers.rollouts.tools import schemas
from outspoken.trainers.setup import datasets_by_argument, finish_setup, prepare_model, prepare_processing

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import BitsAndBytesConfig

logger = logging.getLogger(__name__)

# Ids that mean another token to the teacher than to the student: up to this share they are renamed special tokens.
MAX_OTHER_TOKENS = 0.01


@dataclass
class DistillationConfig(SamplingConfig):
    """Settings of `DistillationTrainer`: those of `transformers.TrainingArguments` and the following.

    Names and defaults are TRL 1.16's; those that TRL does not have say so. Fields marked live may be changed while the
    run trains.
    """

    # Teacher
    teacher_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Path or hub name of the teacher, where the trainer is not given one."}
    )
    teacher_model_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of the teacher on the hub."}
    )
    teacher_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Keyword arguments of `from_pretrained` for a teacher that is loaded."}
    )
    teacher_top_k: int | None = live_field(
        None, "Compare only the teacher's so many likeliest tokens. Unset: all. Not in TRL's trainer.", minimum=1
    )
    loss_add_tail: bool = live_field(
        True,
        "With `teacher_top_k`: compare the remaining probability too, as that of one token.",
        choices=(True, False),
    )

    # Objective
    beta: float = live_field(
        1.0,
        "The divergence: 0 is the forward KL(teacher || student), 1 the reverse KL(student || teacher), between them "
        "lies the generalised Jensen-Shannon divergence.",
        minimum=0.0,
        maximum=1.0,
    )
    lmbda: float = live_field(
        1.0,
        "Share of generation batches that the student samples; the others are the dataset's own completions. Not in "
        "TRL's trainer.",
        minimum=0.0,
        maximum=1.0,
    )
    max_tool_calling_iterations: int | None = field(
        default=None, metadata={"help": "Turns in which the model may call tools. Unset: as many as fit."}
    )

    _VALID_DICT_FIELDS = [*SamplingConfig._VALID_DICT_FIELDS, "teacher_model_init_kwargs"]

    # What the data loaders of trainers that sample go by (`rollouts/sampler.py`).

    num_generations = num_iterations = 1
    num_generations_eval = None
    share_prompts = False

    @property
    def steps_per_generation(self) -> int:
        return self.gradient_accumulation_steps

    @property
    def generation_batch_size(self) -> int:
        """Completions of an update step, over all processes."""
        return self.per_device_train_batch_size * self.world_size * self.gradient_accumulation_steps


class DistillationTrainer(SamplingMixin, ModelCardMixin, Trainer):
    """Trains a causal language model, the student, to predict as a larger one, the teacher, does (arXiv 2306.13649).

    Args:
        model: the student, or the path or hub name to load it from; a `PeftModel` trains its adapter.
        teacher_model: the teacher, or the path or hub name to load it from (in the precision it is stored in, unless
            `args.teacher_model_init_kwargs` says otherwise). Default: `args.teacher_model_name_or_path`. It has the
            student's tokenizer; its embeddings may be padded to another size.
        args: a `DistillationConfig`; a `TrainingArguments`, or TRL's `DistillationConfig`, is converted.
        train_dataset: rows with a `prompt`: a string, or a list of messages; `image` or `images` beside it for models
            that take them. With `lmbda` below 1 also a `completion` of the same kind. Instead of both, `messages`,
            whose last one is the completion. A stream (`IterableDataset`) needs `max_steps`.
        eval_dataset: like `train_dataset`, or several by name. The student's samples are evaluated; with `lmbda=0` the
            dataset's completions.
        processing_class: the tokenizer, or the processor of a model that takes images. Default: the one stored with the
            model.
        callbacks, optimizers: as in `transformers.Trainer`.
        quantization_config: used where `model` is loaded from a path.
        peft_config: wraps the student in a fresh adapter.
        tools: functions that the student may call, with type hints and docstrings.

    Raises:
        ValueError, TypeError: an argument is unusable; the message says what to change.
    """

    args: Any  # DistillationConfig

    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel",
        teacher_model: "str | PreTrainedModel | PeftModel | None" = None,
        args: DistillationConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: "BitsAndBytesConfig | None" = None,
        peft_config: "PeftConfig | None" = None,
        tools: list[Callable] | None = None,
    ):
        args = as_config(DistillationConfig, args, model, "DistillationTrainer")
        _check_datasets(train_dataset, eval_dataset, args)
        self._has_completions = _has_completions(train_dataset, "train_dataset")

        processing = prepare_processing(model, args, processing_class, trainer="DistillationTrainer", images=True)
        check_number_of_prompts(train_dataset, args)
        check_chat_template(processing, train_dataset)
        expect_unused_parameters(processing.processor, args)
        teacher = _teacher(teacher_model, model, args)
        student = prepare_model(
            model, args, processing, peft_config=peft_config, quantization_config=quantization_config
        )
        self._known_tokens, self._teacher_tokens = _check_vocabularies(student, teacher, processing.tokenizer, args)
        self._grouping = None  # no two completions share a prompt
        self._takes_position_ids = takes_position_ids(student)
        self._teacher_takes_position_ids = takes_position_ids(teacher)
        self._teacher_takes_images = getattr(teacher.config, "vision_config", None) is not None

        self._start_sampling()
        super().__init__(
            model=student,
            args=args,
            data_collator=identity,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing.processor,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.teacher_model = prepare_reference(teacher, self.accelerator, self)
        self.rollouts = RolloutWorker(self, processing, tools=tools)
        self.completions_log = CompletionsLog(args)
        self._end_tokens = end_token_ids(processing.tokenizer)

        # Processes must not draw the same completions.
        set_seed(args.seed, device_specific=True)

        finish_setup(self, "distillation")

    def _set_signature_columns_if_needed(self):
        if self._signature_columns is None:
            self._signature_columns = ["prompt", "completion", "messages", "image", "images"]

    def _sample_and_score(self, rows: list[dict[str, Any]]) -> RolloutBatch:
        """A completion of each row: sampled from the student, or the dataset's own."""
        mode, args = self._mode, self.args
        temperature, cap = args.temperature, args.max_completion_length  # either may change while this runs
        rows = together(self.accelerator, lambda: [_with_prompt(row) for row in rows])
        on_policy = self._draws_on_policy(mode)
        with self._phase("generate"):
            rollouts = (
                self.rollouts.sample(rows) if on_policy else together(self.accelerator, lambda: self._read(rows, cap))
            )
        if on_policy:
            measures.log_completions(self, mode, rollouts)
            measures.log_counts(self, mode, rollouts)
            pictures = rollouts.shown_images(self.rollouts.takes_images)
            self.completions_log.add(rollouts.prompts, rollouts.completions, images=pictures)
            if mode == "train":
                measures.record_completions(self, rollouts, None, None, [], 1, cap)
                measures.record_speed(self)
        else:
            self._count_tokens(mode, rollouts)
        if mode == "train" and self._has_completions:
            measures.log(self, mode, "distillation/on_policy", float(on_policy))
        batch = as_batch(self, rollouts, temperature, cap)
        if self._known_tokens is not None:
            unknown = batch.completion_ids >= self._known_tokens
            batch.loss_mask = batch.loss_mask * (unknown.cumsum(1) == 0)
            batch.active_tokens = self.accelerator.gather(batch.loss_mask.sum()).sum()
        return batch

    def _draws_on_policy(self, mode: str) -> bool:
        """Whether this generation batch is sampled: the same draw on all processes, and after a resume."""
        lmbda = self.args.lmbda
        if mode == "eval":
            return lmbda > 0.0
        if lmbda < 1.0 and not self._has_completions:
            logger.warning_once(  # type: ignore[attr-defined]
                f"lmbda is {lmbda}, but the training dataset has no completions; all batches stay sampled."
            )
            return True
        number = self._step // self.args.steps_per_generation
        generator = torch.Generator().manual_seed(self.args.seed * 1_000_003 + number)
        return float(torch.rand((), generator=generator, dtype=torch.float64)) < lmbda

    def _read(self, rows: list[dict[str, Any]], cap: int) -> Rollouts:
        """The dataset's completions as if they had been sampled, cut like samples are."""
        given = self.rollouts.prepare(rows)
        prompt_ids, completion_ids, masks = [], [], []
        for i, row in enumerate(rows):
            tools = schemas(given.tools[i]) if given.tools else None
            prompt, ids, mask = self._completion_tokens(
                row["completion"], given.prompts[i], given.prompt_ids[i], tools
            )
            prompt_ids.append(prompt)
            completion_ids.append(ids[:cap])
            masks.append(None if mask is None else mask[:cap])
        n = len(rows)
        return Rollouts(
            rows=rows,
            prompts=given.prompts,
            completions=[row["completion"] for row in rows],
            prompt_ids=prompt_ids,
            completion_ids=completion_ids,
            finished=[bool(ids) and ids[-1] in self._end_tokens.ends for ids in completion_ids],
            logps=[None] * n,
            entropies=[None] * n,
            tool_masks=masks,
            images=None if given.images is None else [*given.images],
        )

    def _completion_tokens(
        self, answer: Any, prompt: Any, prompt_ids: list[int], tools: Any
    ) -> tuple[list[int], list[int], list[int] | None]:
        """(prompt, completion, which tokens of the completion the assistant wrote; None: all) of a row."""
        tokenizer, mask = self.rollouts.tokenizer, None
        settings = {"tools": tools, **(self.args.chat_template_kwargs or {})}
        conversational = is_messages(prompt)
        check: Any = check_messages if conversational else check_text
        answer = check(answer, self._mode, None, "completion")
        if self.processing_class is not tokenizer:  # images take places in the prompt, which texts do not show
            if conversational:
                parts = {"prompt": prompt, "completion": prepare_multimodal_messages(answer)}
                text = apply_chat_template(parts, self.processing_class, **settings)["completion"]
            else:
                text = with_eos(answer, tokenizer)
            start, ids = len(prompt_ids), prompt_ids + tokenizer(text=text, add_special_tokens=False)["input_ids"]
        else:
            if not conversational:
                ids = tokenizer(text=prompt + with_eos(answer, tokenizer))["input_ids"]
            elif all(message["role"] == "assistant" for message in answer):
                ids = tokenize_chat(tokenizer, [*prompt, *answer], **settings)
            else:
                ids, mask = tokenize_chat_with_assistant_mask(tokenizer, [*prompt, *answer], **settings)
            # The completion begins where the tokens of the prompt and of the whole part, which need not be after the
            # prompt.
            start = common_prefix_length(prompt_ids, ids)
        end = len(ids)
        while end > start and ids[end - 1] in self._end_tokens.blanks:
            end -= 1
        if end == start or ids[end - 1] not in self._end_tokens.ends:
            end = len(ids)  # whitespace is left out only where a template puts it behind the last turn
        return ids[:start], ids[start:end], None if mask is None else mask[start:end]

    def _count_tokens(self, mode: str, rollouts: Rollouts) -> None:
        count = sum(map(len, rollouts.prompt_ids)) + sum(map(len, rollouts.completion_ids))
        total = self.accelerator.gather(torch.tensor([count], device=self.accelerator.device)).sum()
        if mode == "train":
            self.state.num_input_tokens_seen += int(total)
        self._metrics[mode]["num_tokens"] = [self.state.num_input_tokens_seen]

    # The loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if return_outputs:
            raise ValueError(
                "return_outputs is True, but DistillationTrainer has no outputs to return; leave it False."
            )
        batch: RolloutBatch = inputs
        args = self.args
        if batch.images is not None and not self._teacher_takes_images:
            raise ValueError(
                "The dataset has images, but the teacher takes text only; pass a teacher that takes images, or drop "
                "the images."
            )
        laid_out = lay_out(self, batch)
        student_inputs = {**laid_out.inputs, "use_cache": False}
        teacher_inputs = dict(student_inputs)
        if not self._teacher_takes_position_ids:
            teacher_inputs.pop("position_ids", None)
        if self._teacher_tokens is not None:
            # Behind a token that the teacher does not know nothing is compared.
            ids = teacher_inputs["input_ids"]
            teacher_inputs["input_ids"] = ids.masked_fill(ids >= self._teacher_tokens, 0)
        with self.accelerator.autocast():
            found, _ = label_divergence(
                model,
                self.teacher_model,
                student_inputs,
                laid_out.labels,
                beta=args.beta,
                temperature=batch.temperature,
                top_k=args.teacher_top_k,
                add_tail=args.loss_add_tail,
                unwrapped=self.accelerator.unwrap_model(model),
                unwrapped_teacher=self.accelerator.unwrap_model(self.teacher_model),
                teacher_inputs=teacher_inputs,
            )
        # The mean over the tokens of all processes and micro-batches of the update step, whose gradients are averaged
        # over the processes and summed over the micro-batches.
        tokens = batch.active_tokens.clamp(min=1.0) / self.accelerator.num_processes
        loss = found.divergence.sum() / tokens
        self._log_divergence(found)
        if self._mode == "train" and batch.sampler_logps is not None:
            measures.record_update(self, batch, laid_out.take(found.logps), batch.loss_mask)
        return loss

    def _log_divergence(self, found: TokenDivergence) -> None:
        """Means over the tokens of this micro-batch on all processes."""
        columns = {
            "entropy": found.entropy,
            "distillation/divergence": found.divergence.detach(),
            "distillation/forward_kl": found.forward_kl,
            "distillation/reverse_kl": found.reverse_kl,
            "distillation/teacher_entropy": found.teacher_entropy,
            "distillation/top1_agreement": found.same_top1,
        }
        sums = torch.stack([found.mask.sum(), *(column.sum() for column in columns.values())]).double()
        tokens, *totals = self.accelerator.reduce(sums, reduction="sum").tolist()
        if tokens > 0:
            for name, total in zip(columns, totals):
                measures.log(self, self._mode, name, total / tokens)


# ---------------------------------------------------------------------- data


def _check_datasets(train_dataset: Any, eval_dataset: Any, args: DistillationConfig) -> None:
    """Raise unless the datasets have prompts, and completions where they are trained on."""
    check_prompts(train_dataset, eval_dataset, args, environments=True)
    for name, dataset in datasets_by_argument(train_dataset, eval_dataset).items():
        columns = column_names(dataset, name)
        if not {"prompt", "messages"} & {*columns}:
            raise ValueError(f"`{name}` has the columns {', '.join(columns)}, but no 'prompt'; rename or add it.")
        needed = args.lmbda < 1.0 if name == "train_dataset" else args.lmbda == 0.0
        if needed and not _has_completions(dataset, name):
            raise ValueError(
                f"lmbda is {args.lmbda}, so completions of `{name}` are trained on, but it has the columns "
                f"{', '.join(columns)} and no 'completion'; add it, or set lmbda to 1."
                if name == "train_dataset"
                else f"lmbda is 0, so completions of `{name}` are compared, but it has the columns "
                f"{', '.join(columns)} and no 'completion'; add it, or raise lmbda."
            )


def _has_completions(dataset: Any, name: str) -> bool:
    columns = {*column_names(dataset, name)}
    return "completion" in columns or ("messages" in columns and "prompt" not in columns)


def _with_prompt(row: dict[str, Any]) -> dict[str, Any]:
    """A row with `prompt` (and `completion`); from its `messages`, the last of the assistant's is the completion."""
    if "prompt" in row:
        return row
    messages = check_messages(row["messages"], "prompt", None, "messages")
    turns = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns or turns[-1] == 0:
        raise ValueError(
            "A row's 'messages' have no message of the assistant behind another one, so there is nothing to answer; "
            "drop the row, or add a column 'prompt'."
        )
    return {**row, "prompt": messages[: turns[-1]], "completion": [messages[turns[-1]]]}


# ---------------------------------------------------------------------- the teacher


def _teacher(teacher: Any, student: Any, args: DistillationConfig) -> Any:
    """The teacher, loaded if it is a path, frozen and in evaluation mode."""
    teacher = args.teacher_model_name_or_path if teacher is None else teacher
    if teacher is None:
        raise ValueError(
            "`teacher_model` is missing; pass the teacher or its path, or set `teacher_model_name_or_path` in the config."
        )
    if isinstance(teacher, str):
        kwargs: dict[str, Any] = {"dtype": "auto", **(args.teacher_model_init_kwargs or {})}  # type: ignore[dict-item]
        if args.teacher_model_revision is not None:
            kwargs.setdefault("revision", args.teacher_model_revision)
        loading.config_of(teacher, kwargs, args.trust_remote_code)  # says in one sentence if there is none
        teacher = loading.load_model(teacher, kwargs, trust_remote_code=args.trust_remote_code)
    elif args.teacher_model_init_kwargs is not None:
        raise ValueError(
            "`teacher_model_init_kwargs` is set, but `teacher_model` is already built, not a path; leave it out."
        )
    elif teacher is student:
        raise ValueError(
            "`teacher_model` is the same object as `model`, so it would train along; pass another model, or its path."
        )
    return freeze_reference(teacher, args)


def _check_vocabularies(
    student: Any, teacher: Any, tokenizer: PreTrainedTokenizerBase, args: DistillationConfig
) -> tuple[int | None, int | None]:
    """Raise unless both models speak of the same tokens.

    Returns:
        (number of ids that both have, number of ids that the teacher has) where their embeddings differ in size, else
        (None, None).

    Raises:
        ValueError: the teacher's tokenizer is another one, or one model's embeddings do not hold the student's tokenizer.
    """
    remedy = (
        "distillation compares their distributions token by token, so pass a teacher with the student's tokenizer."
    )
    ours = {number: token for token, number in tokenizer.get_vocab().items()}
    other = _teacher_tokenizer(teacher, args)
    if other is not None:
        theirs = {number: token for token, number in other.get_vocab().items()}
        limit = MAX_OTHER_TOKENS * len(ours)
        renamed = sorted(number for number in ours.keys() & theirs.keys() if ours[number] != theirs[number])
        if len(renamed) > limit:
            number = renamed[0]
            raise ValueError(
                f"Student and teacher have different vocabularies (token {number} is {ours[number]!r} and "
                f"{theirs[number]!r}), but {remedy}"
            )
        if abs(len(ours) - len(theirs)) > limit:
            raise ValueError(
                f"Student and teacher have different vocabularies ({len(ours)} and {len(theirs)} tokens), but {remedy}"
            )
    size, teacher_size = (model.config.get_text_config().vocab_size for model in (student, teacher))
    if size == teacher_size:
        return None, None
    if min(size, teacher_size) <= max(ours):
        raise ValueError(
            f"The embeddings of student and teacher have {size} and {teacher_size} tokens, the tokenizer "
            f"{max(ours) + 1}, but {remedy}"
        )
    return min(size, teacher_size), teacher_size


def _teacher_tokenizer(teacher: Any, args: DistillationConfig) -> PreTrainedTokenizerBase | None:
    """The tokenizer stored beside the teacher, if there is one at hand."""
    path = loading.model_id(teacher)
    if not path:
        return None
    kwargs = {"revision": args.teacher_model_revision, "trust_remote_code": args.trust_remote_code}
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True, **kwargs)
    except Exception:  # none is stored there, or it was not downloaded: nothing can be compared
        return None
