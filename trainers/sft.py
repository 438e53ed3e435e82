"""Supervised fine-tuning: the model learns to continue texts, to complete prompts, or to answer as the assistant does.

The step, top to bottom: rows become tokens and labels once (`data/supervised.py`); a batch is padded; the labels'
log-probabilities come from a forward pass that never builds the full logits (`logprobs.py`); the loss
(`losses/supervised.py`) is their negative sum over the labels of the whole optimizer step.
"""

import logging
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
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

from outspoken.diagnostics.recorder import Recorder
from outspoken.trainers.config import OutspokenConfig, as_config, live_field
from outspoken.trainers.data.chat_templates import trains_to_stop
from outspoken.trainers.data.formats import column_names, first_row
from outspoken.trainers.data.padding import pad
from outspoken.trainers.data.supervised import SupervisedFormat, prepare_supervised
from outspoken.trainers.logprobs import IGNORE_INDEX, label_scores, scores_from_logits, shift_labels
from outspoken.trainers.losses.supervised import dft_loss, nll_loss, smoothed_nll_loss
from outspoken.trainers.measuring import end_token_ids, ends_with, sum_over_processes
from outspoken.trainers.setup import (
    AnyDataset,
    Datasets,
    add_metrics,
    check_datasets,
    finish_setup,
    map_datasets,
    parse_pad_to_multiple_of,
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
    packing: bool = field(default=False, metadata={"help": "Put several rows into one sequence. Not supported yet."})
    packing_strategy: str = field(
        default="bfd", metadata={"help": "How rows are packed.", "choices": ["bfd", "bfd_split", "wrapped"]}
    )
    padding_free: bool = field(
        default=False, metadata={"help": "Join a batch's rows instead of padding them. Not supported yet."}
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
        default=False, metadata={"help": "Keep activations in CPU memory. Not supported yet."}
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
        for name in ("packing", "padding_free", "eval_packing", "activation_offloading"):
            if getattr(self, name):
                raise ValueError(f"`{name}=True` is not supported yet; set it to False.")


@dataclass
class DataCollatorForLanguageModeling:
    """Pads B tokenized rows on the right to (B, T): `input_ids`, `attention_mask`, and `labels` with -100 as padding.

    Rows without labels are their own labels.
    """

    pad_token_id: int
    pad_to_multiple_of: Any = None  # int or None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        ids = [torch.as_tensor(row["input_ids"]) for row in rows]
        labels = [row["labels"] if "labels" in row else row["input_ids"] for row in rows]
        return {
            "input_ids": pad(ids, self.pad_token_id, multiple_of=self.pad_to_multiple_of, dtype=torch.long),
            "attention_mask": pad([torch.ones_like(row) for row in ids], 0, multiple_of=self.pad_to_multiple_of),
            "labels": pad(labels, IGNORE_INDEX, multiple_of=self.pad_to_multiple_of, dtype=torch.long),
        }


class SFTTrainer(Trainer):
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
            `outspoken.trainers.data.supervised.prepare_supervised`. A stream (`IterableDataset`) needs `max_steps`.
        eval_dataset: the same, or a dict of several.
        processing_class: the tokenizer; by default the one beside the model.
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
        args = as_sft_config(args, model)
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
        if {"image", "images"} & {*row}:
            raise ValueError(
                "SFTTrainer trains text models only, but the train dataset has a column of images; remove it."
            )
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
        processing = prepare_processing(model, args, processing_class, trainer="SFTTrainer")
        tokenizer = processing.tokenizer
        self._end_tokens = end_token_ids(tokenizer)
        if args.assistant_only_loss and not trains_to_stop(tokenizer):
            logger.warning(
                "With this chat template, `assistant_only_loss=True` puts no loss on the token that ends the "
                "assistant's turn, so the model may not learn to stop; move that token inside {% generation %}, or set "
                "`assistant_only_loss=False`."
            )
        self.recorder = Recorder()
        dataset_kwargs: Any = args.dataset_kwargs
        self._skip_prepare_dataset = bool((dataset_kwargs or {}).get("skip_prepare_dataset"))
        self._formatting_func = formatting_func
        own_collator = data_collator is None
        train_dataset, facts = self._prepare(train_dataset, "train", args, tokenizer, own_collator)
        self.recorder.facts.update(facts)
        eval_dataset = map_datasets(
            eval_dataset, "eval", lambda dataset, name: self._prepare(dataset, name, args, tokenizer, own_collator)[0]
        )
        if own_collator:
            data_collator = DataCollatorForLanguageModeling(processing.pad_token_id, args.pad_to_multiple_of)

        super().__init__(
            model=prepare_model(
                model, args, processing, peft_config=peft_config, quantization_config=quantization_config
            ),
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
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
        self.router_aux_loss_coef = set_up_router_loss(self.model, args.router_aux_loss_coef)
        self.aux_loss_enabled = self.router_aux_loss_coef != 0.0
        finish_setup(self, "sft")

    def _prepare(
        self, dataset: AnyDataset, name: str, args: SFTConfig, tokenizer: PreTrainedTokenizerBase, own_collator: bool
    ) -> tuple[AnyDataset, dict[str, float]]:
        """Tokenize, label, truncate and shuffle a dataset, as `args` say; returns it and the facts about it."""
        if self._skip_prepare_dataset:
            columns = {*column_names(dataset, name)}
            if own_collator and "input_ids" not in columns:
                raise ValueError(
                    f"`skip_prepare_dataset` is set, but the {name} dataset has no column 'input_ids'; tokenize it, "
                    "drop the option, or pass a `data_collator`."
                )
            if own_collator and "labels" not in columns and columns & {"completion_mask", "assistant_masks"}:
                raise ValueError(
                    f"`skip_prepare_dataset` is set, so the masks of the {name} dataset would be ignored; add a column "
                    "'labels' (-100 where no loss is wanted), or drop the option."
                )
            return dataset, {}
        how = SupervisedFormat(
            text_column=args.dataset_text_field,
            completion_only_loss=self.completion_only_loss,
            assistant_only_loss=args.assistant_only_loss,
            max_length=args.max_length,
            truncation_mode=args.truncation_mode,
        )
        with args.main_process_first(desc=f"preparing the {name} dataset"):
            dataset, facts = prepare_supervised(
                dataset,
                tokenizer,
                how,
                name=name,
                formatting_func=self._formatting_func,
                num_proc=args.dataset_num_proc,
            )
        return (dataset.shuffle(seed=args.seed) if args.shuffle_dataset else dataset), facts

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns = ["input_ids", "labels"]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of a micro-batch, a scalar: its share of the mean over all `num_items_in_batch` labels of the step.

        With `return_outputs`, also the model's output with its full logits.
        """
        args = self.args
        labels = inputs["labels"]  # (B, T)
        model_inputs = {key: value for key, value in inputs.items() if key != "labels"}
        model_inputs["use_cache"] = False
        if self.aux_loss_enabled:
            model_inputs["output_router_logits"] = True
        smoothing = args.label_smoothing_factor if args.loss_type == "nll" else 0.0
        want = ("entropy", "is_top1", *(["mean_logps"] if smoothing else []))
        if self.compute_loss_func is not None or return_outputs:
            outputs = model(**model_inputs)
            shifted = shift_labels(labels, outputs.logits.size(1))
            scores = scores_from_logits(outputs.logits[:, :-1], shifted, want=want)
        else:
            scores, outputs = label_scores(model, model_inputs, labels, unwrapped=self.model, want=want)

        num_tokens = scores.mask.sum() if num_items_in_batch is None else num_items_in_batch
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
        supervised = scores.mask.sum(1)  # (B,)
        labels = shift_labels(inputs["labels"], scores.mask.size(1) + 1)
        found = sum_over_processes(
            self.accelerator,
            scores.logps.device,
            labels=supervised.sum(),
            entropy=scores.entropy.sum(),
            correct=scores.is_top1.sum(),
            tokens=inputs["attention_mask"].sum() if "attention_mask" in inputs else inputs["input_ids"].numel(),
            rows=len(supervised),
            rows_without=(supervised == 0).sum(),
            rows_ended=ends_with(labels, scores.mask, self._end_tokens).sum(),
            rows_cut=self._rows_cut(inputs),
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

    def _rows_cut(self, inputs) -> Tensor | float:
        """Rows of `max_length` tokens without an end token at their end; NaN where the end does not tell."""
        args = self.args
        if args.max_length is None or args.truncation_mode != "keep_start" or self._skip_prepare_dataset:
            return 0.0 if args.max_length is None else math.nan
        if "attention_mask" not in inputs:
            return math.nan
        present = inputs["attention_mask"]
        full = present.sum(1) >= args.max_length
        return (full & ~ends_with(inputs["input_ids"], present, self._end_tokens)).sum()

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
            own_collator = isinstance(self.data_collator, DataCollatorForLanguageModeling)
            eval_dataset, _ = self._prepare(eval_dataset, "eval", self.args, self.processing_class, own_collator)
        return super().evaluate(eval_dataset, ignore_keys=ignore_keys, metric_key_prefix=metric_key_prefix)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        add_metrics(self, logs)
        super().log(logs, start_time)


def as_sft_config(args: TrainingArguments | None, model: "str | PreTrainedModel | PeftModel") -> SFTConfig:
    """An `SFTConfig` from what the user passed: itself, or one with the fields that a `TrainingArguments` shares."""
    return as_config(SFTConfig, args, model, "SFTTrainer")
