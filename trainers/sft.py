"""Supervised fine-tuning: the model learns to continue texts, to complete prompts, or to answer as the assistant does.

The step, top to bottom: rows become tokens and labels once (`data/supervised.py`), and several short rows one long row
where packing is on (`data/packing.py`); a batch is padded, or its rows are joined; attention is told where documents
begin (`attention.py`); the labels' log-probabilities come from a forward pass that never builds the full logits
(`logprobs.py`); the loss (`losses/supervised.py`) is their negative sum over the labels of the whole optimizer step.
"""

import logging
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor
from transformers import (
    DataCollator,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_utils import EvalPrediction

from outspoken.diagnostics.recorder import StepRecorder
from outspoken.trainers.activation_offloading import offload_activations
from outspoken.trainers.attention import (
    boundary_lengths,
    needs_one_row,
    one_document_a_row,
    prove_boundaries,
    refuse_prompt_learning,
    refuse_unproved,
    tell_boundaries,
)
from outspoken.trainers.config import OutspokenConfig, as_config, live_field
from outspoken.trainers.data.chat_templates import template_with_marks, trains_to_stop
from outspoken.trainers.data.checks import SUPERVISED, check_rows
from outspoken.trainers.data.formats import column_names, first_row
from outspoken.trainers.data.packing import PACKING_STRATEGIES, pack_dataset
from outspoken.trainers.data.padding import pad
from outspoken.trainers.data.supervised import SupervisedFormat, check_prepared, prepare_supervised
from outspoken.trainers.data.vision import (
    IMAGE_COLUMNS,
    DataCollatorForVisionLanguageModeling,
    contents_as_blocks,
    expect_unused_parameters,
    refuse_new_images,
    refuse_with_images,
)
from outspoken.trainers.logprobs import IGNORE_INDEX, label_scores, scores_from_logits, shift_labels
from outspoken.trainers.losses.supervised import dft_loss, nll_loss, smoothed_nll_loss
from outspoken.trainers.measuring import end_token_ids, ends_with, sum_over_processes
from outspoken.trainers.model_card import ModelCardMixin
from outspoken.trainers.setup import (
    AnyDataset,
    Datasets,
    add_metrics,
    check_datasets,
    finish_setup,
    map_datasets,
    parse_pad_to_multiple_of,
    prepare_liger,
    prepare_model,
    prepare_processing,
    set_up_router_loss,
)

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import BitsAndBytesConfig

logger = logging.getLogger(__name__)


@dataclass
class SFTConfig(OutspokenConfig):
    """Settings of `SFTTrainer`, beside those of `TrainingArguments`. Names and defaults are TRL's.

    Differences of the defaults from `TrainingArguments`: `learning_rate` 2e-5, `logging_steps` 10,
    `gradient_checkpointing` on, `bf16` on where the accelerator supports it.
    """

    _VALID_DICT_FIELDS = [*OutspokenConfig._VALID_DICT_FIELDS, "model_init_kwargs", "dataset_kwargs"]

    learning_rate: float = live_field(2e-5, "Peak learning rate.", minimum=0.0, maximum=1.0)

    # The model
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Keyword arguments of `from_pretrained`, for a model given as a path. The dtype is float32 unless "
            "`dtype` is among them."
        },
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run code that comes with a model or tokenizer from the hub."}
    )
    router_aux_loss_coef: float | None = field(
        default=None,
        metadata={
            "help": "Weight of the load-balancing loss of a mixture-of-experts model. Unset: what its config says; 0 "
            "switches it off."
        },
    )
    chat_template_path: str | None = field(
        default=None,
        metadata={
            "help": "Chat template to train with: a Jinja file, or a tokenizer to take template and tokens from."
        },
    )

    # The data
    dataset_text_field: str = field(default="text", metadata={"help": "Column of plain text."})
    dataset_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "{'skip_prepare_dataset': true} hands the dataset to the collator as it is."},
    )
    dataset_num_proc: int | None = field(default=None, metadata={"help": "Processes that tokenize the dataset."})
    eos_token: str | None = field(
        default=None, metadata={"help": "Token that ends a turn or text. Unset: the tokenizer's own."}
    )
    max_length: int | None = field(
        default=1024, metadata={"help": "Rows are cut to this many tokens. None: rows are never cut."}
    )
    truncation_mode: str = field(
        default="keep_start",
        metadata={"help": "Which end of a long row stays.", "choices": ["keep_end", "keep_start"]},
    )
    shuffle_dataset: bool = field(default=False, metadata={"help": "Shuffle the datasets once, with `seed`."})
    packing: bool = field(
        default=False,
        metadata={"help": "Put several rows into one of up to `max_length` tokens, without attention between them."},
    )
    packing_strategy: str = field(
        default="bfd",
        metadata={
            "help": "How rows are packed: 'bfd' cuts long rows and loses the rest, 'bfd_split' goes on with the rest in "
            "another row, 'wrapped' fills every row up and cuts rows where they do not fit.",
            "choices": ["bfd", "bfd_split", "wrapped"],
        },
    )
    padding_free: bool = field(
        default=False,
        metadata={
            "help": "Join a batch's rows instead of padding them. Saves memory with flash attention; other backends "
            "need a mask of the joined length squared."
        },
    )
    pad_to_multiple_of: int | str | None = field(
        default="auto", metadata={"help": "Pad batches to a multiple of this many tokens; 'auto' does not."}
    )
    eval_packing: bool | None = field(default=None, metadata={"help": "`packing` for evaluation. Unset: the same."})

    # The loss
    completion_only_loss: bool | None = field(
        default=None,
        metadata={
            "help": "Loss on the completion only. Unset: yes if the training dataset has prompts and completions."
        },
    )
    assistant_only_loss: bool = field(
        default=False, metadata={"help": "Loss only on what the assistant says. Needs conversations."}
    )
    loss_type: str = live_field(
        "nll", "'nll', the negative log-likelihood, or 'dft', dynamic fine-tuning.", choices=["nll", "dft"]
    )
    label_smoothing_factor: float = live_field(
        0.0, "Share of the target spread evenly over the vocabulary ('nll' only).", minimum=0.0, maximum=1.0
    )
    activation_offloading: bool = field(
        default=False, metadata={"help": "Keep in CPU memory what the backward pass needs."}
    )
    pad_token: str | None = field(
        default=None, metadata={"help": "Deprecated: set `tokenizer.pad_token` and pass it as `processing_class`."}
    )

    def __post_init__(self):
        super().__post_init__()
        self.pad_to_multiple_of = parse_pad_to_multiple_of(self.pad_to_multiple_of)
        if self.loss_type == "chunked_nll":
            warnings.warn(
                "`loss_type='chunked_nll'` is deprecated; 'nll' computes the same, also without full logits.",
                FutureWarning,
                stacklevel=3,
            )
            self.loss_type = "nll"
        if self.loss_type not in ("nll", "dft"):
            raise ValueError(f"`loss_type` is {self.loss_type!r}; use 'nll' or 'dft'.")
        if self.pad_token is not None:
            warnings.warn(
                "`pad_token` is deprecated; set `tokenizer.pad_token` and pass the tokenizer as `processing_class`.",
                FutureWarning,
                stacklevel=3,
            )
        if self.truncation_mode == "keep_end":
            warnings.warn(
                "`truncation_mode='keep_end'` is deprecated; it cuts off the beginning of the prompt.",
                FutureWarning,
                stacklevel=3,
            )
        if self.packing_strategy not in PACKING_STRATEGIES:
            raise ValueError(
                f"`packing_strategy` is {self.packing_strategy!r}; use one of "
                f"{', '.join(map(repr, PACKING_STRATEGIES))}."
            )
        if (self.packing or self.eval_packing) and self.max_length is None:
            raise ValueError(
                "`packing=True` fills rows of `max_length` tokens, and `max_length` is None; set it to the length that "
                "rows shall have."
            )


@dataclass
class DataCollatorForLanguageModeling:
    """Pads B tokenized rows on the right to (B, T): `input_ids`, `attention_mask`, and `labels` with -100 as padding.

    Rows without labels are their own labels. Rows that are packed have `seq_lengths`, the lengths of their documents;
    then, and if padding-free, there are `position_ids` that start at 0 with each document, and the first token of a
    document has no label. What `attention_mask` marks as padding counts as a document.

    Attributes:
        padding_free: join the rows to a single one; further entries tell its documents apart
            (`attention.boundary_lengths`).
    """

    pad_token_id: int
    padding_free: bool = False
    pad_to_multiple_of: Any = None  # int or None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        ids = [torch.as_tensor(row["input_ids"], dtype=torch.long) for row in rows]
        labels = [torch.as_tensor(row.get("labels", row["input_ids"]), dtype=torch.long) for row in rows]
        lengths = [list(row.get("seq_lengths", [len(row["input_ids"])])) for row in rows]
        if self.padding_free:
            ids, labels, lengths = [torch.cat(ids)], [torch.cat(labels)], [list(chain.from_iterable(lengths))]
        batch: dict[str, Any] = {
            "input_ids": pad(ids, self.pad_token_id, multiple_of=self.pad_to_multiple_of),
            "attention_mask": pad([torch.ones_like(row) for row in ids], 0, multiple_of=self.pad_to_multiple_of),
            "labels": pad(labels, IGNORE_INDEX, multiple_of=self.pad_to_multiple_of),
        }
        if self.padding_free or "seq_lengths" in rows[0]:
            width = batch["input_ids"].size(1)
            lengths = [[*documents, width - sum(documents)] for documents in lengths]
            positions = [torch.cat([torch.arange(length) for length in documents]) for documents in lengths]
            batch["position_ids"] = torch.stack(positions)
            batch["labels"][batch["position_ids"] == 0] = IGNORE_INDEX
        if self.padding_free:
            batch |= boundary_lengths(lengths[0])
        return batch


class SFTTrainer(ModelCardMixin, Trainer):
    """Trains a causal language model on texts, prompts with completions, or conversations.

    >>> from outspoken import SFTConfig, SFTTrainer
    >>> trainer = SFTTrainer("Qwen/Qwen3-0.6B", SFTConfig("my-model"), train_dataset=dataset)  # doctest: +SKIP
    >>> trainer.train()  # doctest: +SKIP

    Args:
        model: a path or hub name, loaded in float32 unless `args.model_init_kwargs["dtype"]` says otherwise; a causal
            `PreTrainedModel`; or a `PeftModel`.
        args: an `SFTConfig`; a `TrainingArguments`, or TRL's `SFTConfig`, is converted.
        data_collator: makes batches of prepared rows; by default pads them.
        train_dataset: rows with `text`, with `messages`, with `prompt` and `completion`, or with `input_ids`; see
            `outspoken.trainers.data.supervised.prepare_supervised`. With `image` or `images` beside, a model that sees
            is trained; see `outspoken.trainers.data.vision`. A stream (`IterableDataset`) needs `max_steps`.
        eval_dataset: the same, or a dict of several.
        processing_class: the tokenizer, or the processor of a model that sees; by default the one beside the model.
        compute_loss_func: `f(outputs, labels, num_items_in_batch)`, used instead of the loss. Needs the full logits.
        compute_metrics: metrics of an evaluation, from its logits and labels. Needs the full logits.
        callbacks, optimizers, optimizer_cls_and_kwargs, preprocess_logits_for_metrics: as in `Trainer`.
        quantization_config: a `BitsAndBytesConfig`, for a model given as a path.
        peft_config: the adapter to train instead of the model.
        formatting_func: makes one text of a row.

    Logs, beside the loss: `entropy` of the predictions in nats, `mean_token_accuracy`, `num_tokens` seen so far, and
    `aux_loss` for a mixture of experts; with the prefix `eval_` in evaluations.

    Raises:
        ValueError, TypeError: in one sentence, what is wrong with an argument or the data, and what to do.
    """

    # transformers types these for every trainer there is.
    model: Any
    args: Any  # SFTConfig
    data_collator: Any
    _signature_columns: Any
    _metrics: dict[str, dict[str, list[float]]]

    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel",
        args: SFTConfig | TrainingArguments | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: AnyDataset | None = None,
        eval_dataset: Datasets = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        compute_loss_func: Callable | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[Tensor, Tensor], Tensor] | None = None,
        quantization_config: "BitsAndBytesConfig | None" = None,
        peft_config: "PeftConfig | None" = None,
        formatting_func: Callable[[dict], str] | None = None,
    ):
        args = self.args = as_sft_config(args, model)
        if compute_loss_func is not None and args.loss_type != "nll":
            raise ValueError(
                f"`compute_loss_func` would replace `loss_type={args.loss_type!r}`; pass only one of them."
            )
        if args.label_smoothing_factor > 0 and (args.loss_type == "dft" or compute_loss_func is not None):
            logger.warning(
                f"`label_smoothing_factor={args.label_smoothing_factor}` has no effect: it only changes "
                "`loss_type='nll'`."
            )
        check_datasets(train_dataset, eval_dataset, args)
        row = first_row(train_dataset, "train")
        self._sees = bool({*IMAGE_COLUMNS} & {*row})
        # The setting, if any, that puts several documents into one row.
        self._eval_packing = args.packing if args.eval_packing is None else args.eval_packing
        packed = args.packing or self._eval_packing or "seq_lengths" in row
        joining = "packing" if packed else "padding_free" if args.padding_free else None
        if joining is not None and data_collator is not None:
            raise ValueError(
                f"`{joining}=True` needs batches that say where documents begin, which the trainer's own collator "
                f"makes; drop `data_collator`, or set `{joining}=False`."
            )
        refuse_prompt_learning(model, peft_config, joining)
        self.completion_only_loss = (
            {"prompt", "completion"} <= {*row} if args.completion_only_loss is None else args.completion_only_loss
        )
        if args.completion_only_loss and not {"prompt", "input_ids"} & {*row}:
            raise ValueError(
                "`completion_only_loss=True` needs columns 'prompt' and 'completion', and the train dataset has "
                f"{', '.join(map(repr, row))}; leave it unset."
            )
        if formatting_func is not None and self.completion_only_loss:
            raise ValueError(
                "`formatting_func` makes one text of prompt and completion, so `completion_only_loss` cannot tell them "
                "apart; set `completion_only_loss=False`, or format the dataset before."
            )
        processing = prepare_processing(model, args, processing_class, trainer="SFTTrainer", images=True)
        self._processing = processing
        self._end_tokens = end_token_ids(processing.tokenizer)
        if self._sees:
            refuse_with_images(processing.processor, args, "SFTTrainer")
        expect_unused_parameters(processing.processor, args)
        if args.assistant_only_loss and not trains_to_stop(processing.tokenizer) and not self._sees:
            logger.warning(
                "With this chat template, `assistant_only_loss=True` puts no loss on the token that ends the "
                "assistant's turn, so the model may not learn to stop; move that token inside {% generation %}, or set "
                "`assistant_only_loss=False`."
            )
        self.recorder = StepRecorder()
        dataset_kwargs: Any = args.dataset_kwargs
        self._skip_prepare_dataset = bool((dataset_kwargs or {}).get("skip_prepare_dataset"))
        self._formatting_func = formatting_func
        self._own_collator = data_collator is None
        train_dataset, facts = self._prepare(train_dataset, "train", args.packing)
        self.recorder.facts.update(facts)
        eval_dataset = map_datasets(
            eval_dataset, "eval", lambda dataset, name: self._prepare(dataset, name, self._eval_packing)[0]
        )

        prepare_liger(args)
        loaded = prepare_model(
            model, args, processing, peft_config=peft_config, quantization_config=quantization_config
        )
        self.router_aux_loss_coef = set_up_router_loss(loaded, args.router_aux_loss_coef)
        self.aux_loss_enabled = self.router_aux_loss_coef != 0.0
        if data_collator is None and self._sees:
            data_collator = DataCollatorForVisionLanguageModeling(
                processing.processor,
                args.max_length,
                self.completion_only_loss,
                args.pad_to_multiple_of,
                args.dataset_text_field,
                args.assistant_only_loss,
                template_with_marks(processing.processor) if args.assistant_only_loss else None,
            )
        elif data_collator is None:
            # Padding of packed rows would count in the load-balancing loss.
            one_row = packed and (needs_one_row(loaded.config) or self.aux_loss_enabled)
            data_collator = DataCollatorForLanguageModeling(
                processing.pad_token_id, args.padding_free or one_row, args.pad_to_multiple_of
            )

        super().__init__(
            model=loaded,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing.processor,
            compute_loss_func=compute_loss_func,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        # The loss below shifts the labels and divides by `num_items_in_batch` whatever the architecture.
        self.model_accepts_loss_kwargs = True
        self._loss_shifts_labels = True
        finish_setup(self, "sft")
        self._boundaries = None if joining is None else self._find_boundaries(joining)

    def _find_boundaries(self, joining: str) -> str:
        """How the model is told where documents begin; raises if it does not keep them apart."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return refuse_unproved(self.model.config, joining, self.aux_loss_enabled)
        return prove_boundaries(
            self.model,
            joining,
            one_row=self.data_collator.padding_free,
            context=self.compute_loss_context_manager(),
            **({"output_router_logits": True} if self.aux_loss_enabled else {}),
        )

    def _prepare(self, dataset: AnyDataset, name: str, packing: bool) -> tuple[AnyDataset, dict[str, float]]:
        """Tokenize, label, truncate, pack and shuffle a dataset, as `args` say; returns it and the facts about it."""
        args = self.args
        columns = {*column_names(dataset, name)}
        if self._sees:  # prepared batch by batch
            check_rows(dataset.select_columns(sorted(columns - {*IMAGE_COLUMNS})), name, SUPERVISED, "SFTTrainer")
            return (dataset.shuffle(seed=args.seed) if args.shuffle_dataset else dataset), {}
        refuse_new_images(columns, name)
        if self._skip_prepare_dataset or {"input_ids", "labels", "seq_lengths"} <= columns:
            if self._own_collator:
                check_prepared(columns, name)
            return dataset, {}
        how = SupervisedFormat(
            text_column=args.dataset_text_field,
            completion_only_loss=self.completion_only_loss,
            assistant_only_loss=args.assistant_only_loss,
            max_length=None if packing and args.packing_strategy != "bfd" else args.max_length,  # else nothing is cut
            truncation_mode=args.truncation_mode,
        )
        with args.main_process_first(desc=f"preparing the {name} dataset"):
            dataset, facts = prepare_supervised(
                contents_as_blocks(dataset, self._processing.processor),
                self._processing.tokenizer,
                how,
                name=name,
                formatting_func=self._formatting_func,
                num_proc=args.dataset_num_proc,
            )
            if args.shuffle_dataset:
                dataset = dataset.shuffle(seed=args.seed)
            if packing:
                dataset = dataset.select_columns(["input_ids", "labels"])
                progress = {"num_proc": args.dataset_num_proc, "desc": f"Packing {name} dataset"}
                progress = progress if isinstance(dataset, Dataset) else {}
                dataset = pack_dataset(dataset, args.max_length, args.packing_strategy, progress)
                if args.shuffle_dataset:
                    dataset = dataset.shuffle(seed=args.seed)
        return dataset, facts

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            columns = ["input_ids", "labels", "seq_lengths"]
            if self._sees:
                columns = ["messages", "prompt", "completion", self.args.dataset_text_field, *IMAGE_COLUMNS]
                columns += ["tools", "chat_template_kwargs"]
            self._signature_columns = columns

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of a micro-batch, a scalar: its share of the mean over all `num_items_in_batch` labels of the step.

        With `return_outputs`, also the model's output with its full logits.
        """
        args = self.args
        labels = inputs["labels"]  # (B, T)
        model_inputs = {key: value for key, value in inputs.items() if key != "labels"}
        if self._boundaries is not None and "position_ids" in inputs:  # which else a user's collator makes
            model_inputs = tell_boundaries(model_inputs, self._boundaries, self.model)
        model_inputs["use_cache"] = False
        if self.aux_loss_enabled:
            model_inputs["output_router_logits"] = True
        smoothing = args.label_smoothing_factor if args.loss_type == "nll" else 0.0
        want = ("entropy", "is_top1", *(["mean_logps"] if smoothing else []))
        with offload_activations(self.model) if args.activation_offloading else nullcontext():
            if self.compute_loss_func is not None or return_outputs:
                outputs = model(**model_inputs)
                shifted = shift_labels(labels, outputs.logits.size(1))
                scores = scores_from_logits(outputs.logits[:, :-1], shifted, want=want)
            else:
                scores, outputs = label_scores(model, model_inputs, labels, unwrapped=self.model, want=want)

        num_tokens = num_items_in_batch
        if num_tokens is None:  # in evaluations, where `Trainer` takes the mean over the processes
            num_tokens = self.accelerator.reduce(scores.mask.sum().float(), reduction="mean")
        if self.compute_loss_func is not None:
            loss = self.compute_loss_func(outputs, labels, num_items_in_batch=num_items_in_batch)
        elif args.loss_type == "dft":
            loss = dft_loss(scores.logps, num_tokens)
        elif smoothing:
            loss = smoothed_nll_loss(scores.logps, scores.mean_logps, smoothing, num_tokens)
        else:
            loss = nll_loss(scores.logps, num_tokens)
        if args.average_tokens_across_devices and num_items_in_batch is not None:
            # The labels of all processes are counted, and their gradients are averaged.
            loss = loss * self.accelerator.num_processes
        if self.aux_loss_enabled and self.compute_loss_func is None:
            # A mean over the micro-batch, so the accumulation has to be averaged here.
            steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss / steps
        self._measure(scores, inputs, outputs)
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def _measure(self, scores, inputs, outputs) -> None:
        """Collect the metrics of a micro-batch, summed over all processes, in one transfer from the device."""
        training = self.model.training
        ids, labels = inputs["input_ids"], inputs["labels"]  # (B, T)
        present = inputs.get("attention_mask", torch.ones_like(ids))
        if self._boundaries is not None and "position_ids" in inputs:  # padding is a document, too
            ids, labels, present = one_document_a_row(
                inputs["position_ids"], (ids, 0), (labels, IGNORE_INDEX), (present, 0)
            )
            real = present.any(1)
            ids, labels, present = ids[real], labels[real], present[real]
        supervised = labels[:, 1:] != IGNORE_INDEX  # (B, T - 1)
        found = sum_over_processes(
            self.accelerator,
            scores.logps.device,
            labels=scores.mask.sum(),
            entropy=scores.entropy.sum(),
            correct=scores.is_top1.sum(),
            tokens=present.sum(),
            rows=len(ids),
            rows_without=(~supervised.any(1)).sum(),
            rows_ended=ends_with(labels[:, 1:], supervised, self._end_tokens).sum(),
            rows_cut=self._rows_cut(ids, present),
            aux_loss=outputs.aux_loss if self.aux_loss_enabled else 0.0,
        )
        metrics = self._metrics["train" if training else "eval"]
        if found["labels"] > 0:
            metrics["entropy"].append(found["entropy"] / found["labels"])
            metrics["mean_token_accuracy"].append(found["correct"] / found["labels"])
        if self.aux_loss_enabled:
            metrics["aux_loss"].append(found["aux_loss"] / self.accelerator.num_processes)
        if training:
            if self.args.include_num_input_tokens_seen == "no":  # else `Trainer` counts
                self.state.num_input_tokens_seen += int(found["tokens"])
            rows = found["rows"]
            self.recorder.count("samples/no_supervised", found["rows_without"], rows)
            self.recorder.count("tokens/supervised_share", found["labels"], found["tokens"])
            self.recorder.count("samples/supervised_eos", found["rows_ended"], rows - found["rows_without"])
            if not math.isnan(found["rows_cut"]):
                self.recorder.count("samples/truncated", found["rows_cut"], rows)
        metrics["num_tokens"] = [self.state.num_input_tokens_seen]

    def _rows_cut(self, ids: Tensor, present: Tensor) -> Tensor | float:
        """Rows of `max_length` tokens without an end token at their end; NaN where the end does not tell."""
        args = self.args
        packing = args.packing if self.model.training else self._eval_packing
        if args.max_length is None or (packing and args.packing_strategy != "bfd"):
            return 0.0
        if args.truncation_mode != "keep_start" or self._skip_prepare_dataset:
            return math.nan
        full = present.sum(1) >= args.max_length
        return (full & ~ends_with(ids, present, self._end_tokens)).sum()

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The loss of a batch, and its logits and labels only if metrics are computed from them."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            if prediction_loss_only:
                return self.compute_loss(model, inputs), None, None
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        return loss, outputs.logits, inputs["labels"]

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Evaluate; a dataset given here is prepared like those given to the trainer."""
        # Of a dict, `Trainer` evaluates one dataset after the other, here.
        if isinstance(eval_dataset, (Dataset, IterableDataset)):
            eval_dataset, _ = self._prepare(eval_dataset, "eval", self._eval_packing)
        return super().evaluate(eval_dataset, ignore_keys=ignore_keys, metric_key_prefix=metric_key_prefix)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        add_metrics(self, logs)
        super().log(logs, start_time)


def as_sft_config(args: TrainingArguments | None, model: "str | PreTrainedModel | PeftModel") -> SFTConfig:
    """An `SFTConfig` from what the user passed: itself, or one with the fields that a `TrainingArguments` shares."""
    return as_config(SFTConfig, args, model, "SFTTrainer")
