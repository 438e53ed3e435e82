"""Reward models: a model learns to score answers, from pairs of which one is preferred.

The step, top to bottom: rows become two sequences of tokens once (`data/pairs.py`); a batch holds the chosen ones and
then the rejected ones; the model scores each at its last token, what both have in common computed once
(`shared_prompts.py`); the loss (`losses/reward.py`) asks that the better answer scores higher.
"""

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    DataCollator,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_utils import EvalPrediction

from outspoken.diagnostics.recorder import StepRecorder
from outspoken.trainers.activation_offloading import offload_activations
from outspoken.trainers.config import OutspokenConfig, as_config, live_field
from outspoken.trainers.data.formats import first_row
from outspoken.trainers.data.padding import pad
from outspoken.trainers.data.pairs import prepare_pairs
from outspoken.trainers.loading import config_of
from outspoken.trainers.logprobs import Follow
from outspoken.trainers.losses.reward import bradley_terry_loss, centering_loss
from outspoken.trainers.measuring import RecentCorrelation, gather_rows, sum_over_processes
from outspoken.trainers.model_card import ModelCardMixin
from outspoken.trainers.score_head import (
    base_model,
    check_head,
    head_is_new,
    head_is_trained,
    new_head_expected,
    outputs_of,
    train_new_head,
)
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
)
from outspoken.trainers.shared_prompts import common_length, mask_dtype_of, shared_ends, why_not_shared

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import BitsAndBytesConfig

logger = logging.getLogger(__name__)


@dataclass
class RewardConfig(OutspokenConfig):
    """Settings of `RewardTrainer`, beside those of `TrainingArguments`. Names and defaults are TRL's.

    Differences of the defaults from `TrainingArguments`: `learning_rate` 1e-4, `logging_steps` 10,
    `gradient_checkpointing` on, `bf16` on where the accelerator supports it. `num_scores` and `share_prompts` are ours.
    """

    _VALID_DICT_FIELDS = [*OutspokenConfig._VALID_DICT_FIELDS, "model_init_kwargs"]

    learning_rate: float = live_field(1e-4, "Peak learning rate.", minimum=0.0, maximum=1.0)

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
    chat_template_path: str | None = field(
        default=None,
        metadata={
            "help": "Chat template to train with: a Jinja file, or a tokenizer to take template and tokens from."
        },
    )
    disable_dropout: bool = field(default=True, metadata={"help": "Switch dropout off in the model."})
    num_scores: int = field(
        default=1,
        metadata={
            "help": "How many scores an answer gets, each with an output of its own. The columns 'margin' and "
            "'preferences' may then hold a list of so many numbers."
        },
    )

    # The data
    dataset_num_proc: int | None = field(default=None, metadata={"help": "Processes that tokenize the dataset."})
    eos_token: str | None = field(
        default=None, metadata={"help": "Token that ends a turn or text. Unset: the tokenizer's own."}
    )
    max_length: int | None = field(
        default=1024,
        metadata={"help": "Pairs with a longer sequence than this many tokens are dropped. None: none is."},
    )
    pad_to_multiple_of: int | str | None = field(
        default="auto", metadata={"help": "Pad batches to a multiple of this many tokens; 'auto' does not."}
    )
    share_prompts: bool = field(
        default=True,
        metadata={"help": "Compute what both answers of a pair begin with once, where the model allows it."},
    )

    # The loss
    center_rewards_coefficient: float | None = live_field(
        None, "Weight of a term that draws the scores' mean to 0; 0.01 is usual.", minimum=0.0
    )
    activation_offloading: bool = field(
        default=False, metadata={"help": "Keep activations in the host's memory until the backward pass."}
    )
    pad_token: str | None = field(
        default=None, metadata={"help": "Deprecated: set `tokenizer.pad_token` and pass it as `processing_class`."}
    )

    def __post_init__(self):
        super().__post_init__()
        self.pad_to_multiple_of = parse_pad_to_multiple_of(self.pad_to_multiple_of)
        if self.pad_token is not None:
            warnings.warn(
                "`pad_token` is deprecated; set `tokenizer.pad_token` and pass the tokenizer as `processing_class`.",
                FutureWarning,
                stacklevel=3,
            )
        if self.num_scores < 1:
            raise ValueError(f"`num_scores` is {self.num_scores}; choose 1 or more.")
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"`max_length` is {self.max_length}; choose 1 or more, or None.")
        if self.center_rewards_coefficient is not None and self.center_rewards_coefficient < 0:
            raise ValueError(
                f"`center_rewards_coefficient` is {self.center_rewards_coefficient}; choose 0 or more, or None."
            )


@dataclass
class DataCollatorForPreference:
    """Pads B pairs on the right to (2B, T), the chosen sequences first: `input_ids` and `attention_mask`.

    `margin` and `preferences`, where rows have them, become (B,), or (B, S) for lists of S numbers.
    """

    pad_token_id: int
    pad_to_multiple_of: Any = None  # int or None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        ids = [torch.as_tensor(row[column]) for column in ("chosen_ids", "rejected_ids") for row in rows]
        batch = {
            "input_ids": pad(ids, self.pad_token_id, multiple_of=self.pad_to_multiple_of, dtype=torch.long),
            "attention_mask": pad([torch.ones_like(row) for row in ids], 0, multiple_of=self.pad_to_multiple_of),
        }
        for column in _PAIR_COLUMNS:
            if column in rows[0]:
                batch[column] = torch.tensor([row[column] for row in rows], dtype=torch.float)
        return batch


class RewardTrainer(ModelCardMixin, Trainer):
    """Trains a model with a score head on pairs of answers, so that the better one scores higher.

    >>> from outspoken import RewardConfig, RewardTrainer
    >>> trainer = RewardTrainer("Qwen/Qwen3-0.6B", RewardConfig("my-judge"), train_dataset=dataset)  # doctest: +SKIP
    >>> trainer.train()  # doctest: +SKIP

    Several scores are trained in one pass with `num_scores=S`: a pair's column `preferences` then says for each score
    whether the chosen answer is the better one (1), the rejected one (-1), or whether they are not compared (0); numbers
    between weigh the pair less. The loss is the weighed mean over all comparisons of a step.

    Args:
        model: a path or hub name, loaded in float32 unless `args.model_init_kwargs["dtype"]` says otherwise, with a new
            score head unless the checkpoint has one; a `PreTrainedModel` for sequence classification with `num_scores`
            labels; or a `PeftModel` of one.
        args: a `RewardConfig`; a `TrainingArguments`, or TRL's `RewardConfig`, is converted.
        data_collator: makes batches of prepared rows, with the keys of `DataCollatorForPreference`.
        train_dataset: rows with `chosen` and `rejected`, alone or behind a `prompt`, or with `chosen_ids` and
            `rejected_ids`; optionally `margin`, by how much the better answer should be ahead, and `preferences`. See
            `outspoken.trainers.data.pairs.prepare_pairs`. A stream (`IterableDataset`) needs `max_steps`.
        eval_dataset: the same, or a dict of several.
        processing_class: the tokenizer; by default the one beside the model.
        compute_metrics: metrics of an evaluation. Its predictions are the scores of the chosen and the rejected answer,
            (N, 2) for N pairs, or (N, 2, S); its label ids are 0, the place of the chosen one.
        callbacks, optimizers, optimizer_cls_and_kwargs, preprocess_logits_for_metrics: as in `Trainer`.
        quantization_config: a `BitsAndBytesConfig`, for a model given as a path.
        peft_config: the adapter to train instead of the model; a new score head is trained and saved beside it.

    Logs, beside the loss: `accuracy`, the share of pairs whose better answer scores higher; `margin`, by how much, on
    average; `mean_reward`, `min_reward` and `max_reward` of the scores; `num_tokens` seen so far. With several scores also
    `accuracy/0`, `margin/0`, `mean_reward/0` and so on for each. With the prefix `eval_` in evaluations.

    Raises:
        ValueError, TypeError: in one sentence, what is wrong with an argument or the data, and what to do.
    """

    # transformers types these for every trainer there is.
    model: Any
    args: Any  # RewardConfig
    processing_class: Any
    _signature_columns: Any
    _metrics: dict[str, dict[str, list[float]]]

    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel",
        args: RewardConfig | TrainingArguments | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: AnyDataset | None = None,
        eval_dataset: Datasets = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[Tensor, Tensor], Tensor] | None = None,
        quantization_config: "BitsAndBytesConfig | None" = None,
        peft_config: "PeftConfig | None" = None,
    ):
        args = as_config(RewardConfig, args, model, "RewardTrainer")
        check_datasets(train_dataset, eval_dataset, args)
        if {"image", "images"} & {*first_row(train_dataset, "train")}:
            raise ValueError(
                "RewardTrainer trains text models only, but the train dataset has a column of images; remove it."
            )
        init_kwargs: Any = args.model_init_kwargs
        config = config_of(model, init_kwargs, args.trust_remote_code)
        check_head(config, args.num_scores, built=not isinstance(model, str))
        processing = prepare_processing(model, args, processing_class, trainer="RewardTrainer")
        tokenizer = processing.tokenizer
        if processing.pad_token_id == tokenizer.eos_token_id:
            logger.warning(
                f"{tokenizer.eos_token!r} pads rows and ends them, so answers are scored at the token before it, whether "
                "they ended or were cut; set `tokenizer.pad_token` to another token."
            )
        self.recorder = StepRecorder()
        self._scores_and_lengths = RecentCorrelation(2 * 512)  # two answers a pair
        self._step_scores: tuple[int, list[Tensor]] = (-1, [])
        train_dataset, facts = self._prepare(train_dataset, "train", args, tokenizer)
        self.recorder.facts.update(facts)
        eval_dataset = map_datasets(
            eval_dataset, "eval", lambda dataset, name: self._prepare(dataset, name, args, tokenizer)[0]
        )
        if data_collator is None:
            data_collator = DataCollatorForPreference(processing.pad_token_id, args.pad_to_multiple_of)
        prepare_liger(args)
        with new_head_expected():
            loaded = prepare_model(
                model,
                args,
                processing,
                peft_config=train_new_head(peft_config, config),
                quantization_config=quantization_config,
                auto_class=AutoModelForSequenceClassification,
                num_labels=args.num_scores,
            )
        if is_peft_model(loaded) and head_is_new(config) and not head_is_trained(loaded):
            logger.warning(
                "The score head is new and not part of the adapter, so it stays at random and is not saved with it; add "
                "its name to `modules_to_save` of the adapter's config."
            )

        super().__init__(
            model=loaded,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        self.model_accepts_loss_kwargs = True  # `compute_loss` divides by what `_get_num_items_in_batch` counts
        self._share_prompts = args.share_prompts
        if args.share_prompts and (why_not := self._why_not_shared()) is not None:
            self._share_prompts = False
            logger.info(f"What both answers of a pair begin with is computed twice: {why_not}.")
        finish_setup(self, "reward")

    def _prepare(
        self, dataset: AnyDataset, name: str, args: RewardConfig, tokenizer: PreTrainedTokenizerBase
    ) -> tuple[AnyDataset, dict[str, float]]:
        """Tokenize a dataset, as `args` say; returns it and the facts about it."""
        by_length = args.train_sampling_strategy in ("group_by_length", "batch_rebalance")
        with args.main_process_first(desc=f"preparing the {name} dataset"):
            return prepare_pairs(
                dataset,
                tokenizer,
                args.max_length,
                num_scores=args.num_scores,
                name=name,
                num_proc=args.dataset_num_proc,
                length_column=args.length_column_name if by_length else None,
            )

    def _why_not_shared(self) -> str | None:
        """Why what answers have in common cannot be computed once, in a phrase; None if it can."""
        if self.args.torch_compile:
            return "a compiled model does not show its score of every token"
        if not isinstance(self.data_collator, DataCollatorForPreference):
            return "`data_collator` is not the trainer's own"
        if not isinstance(getattr(base_model(self.model), "score", None), nn.Module):
            return f"{type(base_model(self.model)).__name__} does not score every token"
        return why_not_shared(self.model, self.args.max_length)

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns = ["chosen_ids", "rejected_ids", *_PAIR_COLUMNS, self.args.length_column_name]

    def training_step(self, *args, **kwargs):
        with offload_activations(self.model) if self.args.activation_offloading else nullcontext():
            return super().training_step(*args, **kwargs)

    def _get_num_items_in_batch(self, batch_samples, device):
        """Count what an optimizer step compares on all processes: each weighs the same, whatever its micro-batch."""
        counts = [self._counts(batch) for batch in batch_samples]
        pairs, comparisons = sum(c.pairs for c in counts), sum(c.comparisons for c in counts)
        return StepCounts(**sum_over_processes(self.accelerator, device, pairs=pairs, comparisons=comparisons))

    def _counts(self, inputs: Mapping[str, Tensor]) -> "StepCounts":
        pairs, preferences = len(inputs["input_ids"]) // 2, inputs.get("preferences")
        weight = pairs if preferences is None else preferences.abs().view(pairs, -1).mean(1).sum()
        return StepCounts(pairs, weight * self.args.num_scores)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of a micro-batch, a scalar: its share of the mean over all comparisons of the optimizer step.

        With `return_outputs`, also the model's output: its logits are the scores, (2B, S), the chosen answers' first.
        """
        coefficient = self.args.center_rewards_coefficient
        outputs = self._score(model, {key: value for key, value in inputs.items() if key not in _PAIR_COLUMNS})
        chosen, rejected = outputs.logits.chunk(2)  # each (B, S)
        margin, preferences = (
            inputs[column].view(len(chosen), -1) if column in inputs else None for column in _PAIR_COLUMNS
        )  # each (B, 1) or (B, S)
        counts = self._counts(inputs) if num_items_in_batch is None else num_items_in_batch
        loss = bradley_terry_loss(chosen, rejected, 0.0 if margin is None else margin, preferences).sum()
        loss = loss / max(counts.comparisons, 1e-6)  # pairs that are not compared at all give 0
        if coefficient is not None:
            loss = loss + coefficient * centering_loss(chosen, rejected).mean(1).sum() / counts.pairs
        if num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # whose gradients are averaged
        self._measure(inputs, chosen, rejected, preferences)
        return (loss, outputs) if return_outputs else loss

    def _score(self, model: Any, inputs: Mapping[str, Tensor]) -> Any:
        """The model's output, whose logits are each sequence's scores, (2B, S), in float32."""
        shared = None
        if self._share_prompts:
            shared = shared_ends(
                inputs,
                self.processing_class.pad_token_id,
                mask_dtype=mask_dtype_of(self.model),
                hidden_size=self.model.config.get_text_config().hidden_size,
            )
        if shared is None:
            outputs = model(**inputs, use_cache=False)
        else:
            shared_inputs, rows, columns = shared
            with outputs_of(base_model(self.model).score) as kept:
                outputs = model(**shared_inputs, use_cache=False)
            outputs.logits = Follow.apply(kept[-1][rows, columns], outputs.logits)
        outputs.logits = outputs.logits.float()
        return outputs

    @torch.no_grad()
    def _measure(self, inputs: Mapping[str, Tensor], chosen: Tensor, rejected: Tensor, preferences: Any) -> None:
        """Collect the metrics of a micro-batch from the pairs of all processes, in one transfer from the device."""
        training = self.model.training
        ids, present = inputs["input_ids"], inputs["attention_mask"].sum(1)
        pairs = len(chosen)
        answers = present - common_length(ids, present, limit=present[:pairs]).repeat(2)  # (2B,), without the prompt
        identical = (ids[:pairs] == ids[pairs:]).all(1) & (present[:pairs] == present[pairs:])
        weights = torch.ones_like(chosen) if preferences is None else preferences.expand_as(chosen)
        columns = [
            *(chosen, rejected, weights),  # (B, S) each
            *(answers[:pairs, None], answers[pairs:, None]),
            *(present[:pairs, None] + present[pairs:, None], identical[:, None]),
        ]
        local = torch.cat([column.float() for column in columns], dim=1)
        # In an evaluation the last batch is filled up with rows that were seen before; they are dropped.
        rows: Any = gather_rows(self.accelerator, local) if training else self.accelerator.gather_for_metrics(local)
        sizes = [column.size(1) for column in columns]
        # Of N pairs: (N, S) three times, (N, 1) four times.
        chosen, rejected, weights, *lengths, tokens, same = rows.double().cpu().split(sizes, dim=1)
        scores, count = torch.cat([chosen, rejected]), chosen.size(1)

        metrics = self._metrics["train" if training else "eval"]
        each = {f"/{i}": slice(i, i + 1) for i in range(count)} if count > 1 else {}
        for name, score in {"": slice(None), **each}.items():
            ahead = (weights.sign() * (chosen - rejected))[:, score][weights[:, score] != 0]
            # Each pair counts the same, in however large a batch it came.
            metrics[f"accuracy{name}"].extend((ahead > 0).double().tolist())
            metrics[f"margin{name}"].extend(ahead.tolist())
            metrics[f"mean_reward{name}"].extend(scores[:, score].mean(1).tolist())
            metrics[f"min_reward{name}"].append(scores[:, score].min().item())
            metrics[f"max_reward{name}"].append(scores[:, score].max().item())
        if training:
            if self.args.include_num_input_tokens_seen == "no":  # else `Trainer` counts
                self.state.num_input_tokens_seen += int(tokens.sum())
            self._record(scores, torch.cat(lengths).squeeze(1), same)
        metrics["num_tokens"] = [self.state.num_input_tokens_seen]

    def _record(self, scores: Tensor, lengths: Tensor, identical: Tensor) -> None:
        """Hand over what is no metric of TRL's: scores (2N, S), answers' lengths (2N,), the chosen ones first."""
        pairs = len(identical)
        for name, length in zip(("lengths/chosen", "lengths/rejected"), lengths.chunk(2)):
            self.recorder.count(name, length.sum().item(), pairs)
        self.recorder.count("pairs/identical", identical.sum().item(), pairs)
        step, seen = self._step_scores
        seen = [*seen, scores] if step == self.state.global_step else [scores]
        self._step_scores = (self.state.global_step, seen)
        self.recorder.set("scores/mean", torch.cat(seen).mean().item())
        self.recorder.set("scores/std", torch.cat(seen).std().item())
        self._scores_and_lengths.add(scores.mean(1), lengths)
        correlation = self._scores_and_lengths.value()
        if correlation is not None:
            self.recorder.set("scores/length_correlation", correlation[0])
            self.recorder.set("scores/length_correlation#n", correlation[1])

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The loss of a batch; for metrics also its pairs of scores, (B, 2) or (B, 2, S), and as labels B zeros."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        if prediction_loss_only:
            return loss, None, None
        scores = torch.stack(outputs.logits.chunk(2), dim=1)  # (B, 2, S)
        labels = torch.zeros(len(scores), dtype=torch.long, device=scores.device)
        return loss, scores.squeeze(2) if scores.size(2) == 1 else scores, labels

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Evaluate; a dataset given here is prepared like those given to the trainer."""
        # Of a dict, `Trainer` evaluates one dataset after the other, here.
        if isinstance(eval_dataset, (Dataset, IterableDataset)):
            eval_dataset, _ = self._prepare(eval_dataset, "eval", self.args, self.processing_class)
        return super().evaluate(eval_dataset, ignore_keys=ignore_keys, metric_key_prefix=metric_key_prefix)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        add_metrics(self, logs)
        super().log(logs, start_time)


class StepCounts(NamedTuple):
    """What the losses of a step are divided by: its pairs, and the sum of the comparisons' weights over all scores."""

    pairs: Any
    comparisons: Any


_PAIR_COLUMNS = ("margin", "preferences")
