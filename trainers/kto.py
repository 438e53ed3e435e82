"""Learning from answers that are marked desirable or not, one by one: KTO (arXiv 2402.01306) and unpaired APO-zero.

The step, top to bottom: rows become tokens once (`data/unpaired.py`); the collator pads a batch and puts every
completion behind another row's prompt too; policy and reference score the answers (`logprobs.py`, `reference.py`); the
mismatched pairs give the reference point z0, pooled over all processes; the loss (`losses/kto.py`) compares each
answer's log-ratio with it.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import is_peft_model
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
from outspoken.trainers.callbacks import SyncRefModelCallback
from outspoken.trainers.config import OutspokenConfig, as_config, live_field
from outspoken.trainers.data.formats import first_row
from outspoken.trainers.data.padding import pad
from outspoken.trainers.data.unpaired import (
    fix_mismatched_completions,
    mismatched_completions,
    prepare_unpaired,
    spare_rows,
)
from outspoken.trainers.logprobs import IGNORE_INDEX, TokenScores, label_scores, scores_from_logits, shift_labels
from outspoken.trainers.losses.kto import apo_zero_unpaired_loss, kto_loss, reference_point
from outspoken.trainers.measuring import (
    REWARD_ROUNDING,
    RecentCorrelation,
    end_token_ids,
    ends_with,
    gather_rows,
    sum_over_processes,
)
from outspoken.trainers.model_card import ModelCardMixin
from outspoken.trainers.reference import (
    given_reference,
    make_reference,
    precompute,
    prepare_exactly,
    prepare_reference,
    reference_policy,
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
    set_up_router_loss,
)

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import BitsAndBytesConfig


@dataclass
class KTOConfig(OutspokenConfig):
    """Settings of `KTOTrainer`, beside those of `TrainingArguments`. Names and defaults are TRL's.

    Differences of the defaults from `TrainingArguments`: `learning_rate` 1e-6, `logging_steps` 10,
    `gradient_checkpointing` on, `bf16` on where the accelerator supports it. Unlike in TRL, rows are shuffled
    (`train_sampling_strategy` is "random").
    """

    _VALID_DICT_FIELDS = [*OutspokenConfig._VALID_DICT_FIELDS, "model_init_kwargs"]

    learning_rate: float = live_field(1e-6, "Peak learning rate.", minimum=0.0, maximum=1.0)

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
    disable_dropout: bool = field(
        default=True, metadata={"help": "Switch dropout off in the model and the reference model."}
    )

    # The data
    dataset_num_proc: int | None = field(default=None, metadata={"help": "Processes that tokenize the dataset."})
    max_length: int | None = field(
        default=1024, metadata={"help": "Rows are cut to this many tokens, at the end. None: rows are never cut."}
    )
    pad_to_multiple_of: int | str | None = field(
        default="auto", metadata={"help": "Pad batches to a multiple of this many tokens; 'auto' does not."}
    )
    precompute_ref_log_probs: bool = field(
        default=False,
        metadata={
            "help": "Compute the reference's log-probabilities before training, so that no reference model is held "
            "during it. Mismatched pairs are then formed once, not in each batch."
        },
    )
    precompute_ref_batch_size: int | None = field(
        default=None, metadata={"help": "Rows per process at a time for that. Unset: as in training or evaluation."}
    )

    # The loss
    loss_type: str = field(
        default="kto",
        metadata={
            "help": "'kto', or 'apo_zero_unpaired', which does without the reference point.",
            "choices": ["kto", "apo_zero_unpaired"],
        },
    )
    beta: float = live_field(
        0.1, "How strongly the policy is held to the reference: an answer's reward is beta log(pi/pi_ref).", 1e-6
    )
    desirable_weight: float = live_field(1.0, "Weight of the loss of desirable answers.", minimum=0.0)
    undesirable_weight: float = live_field(1.0, "Weight of the loss of undesirable answers.", minimum=0.0)
    activation_offloading: bool = field(
        default=False, metadata={"help": "Keep activations in the host's memory until the backward pass."}
    )
    sync_ref_model: bool = field(
        default=False,
        metadata={"help": "Move the reference model towards the policy every `ref_model_sync_steps` steps."},
    )
    ref_model_mixup_alpha: float = live_field(
        0.6, "How far it moves: ref <- alpha policy + (1 - alpha) ref.", minimum=0.0, maximum=1.0
    )
    ref_model_sync_steps: int = live_field(512, "Steps between two of these moves.", minimum=1)

    def __post_init__(self):
        super().__post_init__()
        self.pad_to_multiple_of = parse_pad_to_multiple_of(self.pad_to_multiple_of)
        if self.loss_type not in ("kto", "apo_zero_unpaired"):
            raise ValueError(f"`loss_type` is {self.loss_type!r}; use 'kto' or 'apo_zero_unpaired'.")
        if self.beta <= 0:
            raise ValueError(f"`beta` is {self.beta}; choose a number above 0.")
        for name in ("desirable_weight", "undesirable_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` is {getattr(self, name)}; choose 0 or more.")
        if self.sync_ref_model and self.precompute_ref_log_probs:
            raise ValueError(
                "`sync_ref_model=True` moves the reference model, which `precompute_ref_log_probs=True` asks only "
                "once, before training; set one of them to False."
            )


@dataclass
class DataCollatorForUnpairedPreference:
    """Pads B tokenized rows on the right: `input_ids`, `attention_mask` and `completion_mask`, (B, T), `label`, (B,),
    and `truncated`, (B,), where `max_length` cut a row.

    With `calculate_kl` also `KL_input_ids`, `KL_attention_mask` and `KL_completion_mask`, (B, T'): each prompt with
    another row's completion, as `mismatched_completions` chooses it, from `spares` where the batch has none.
    `ref_logps` and `ref_KL_logps` are passed on.
    """

    pad_token_id: int
    max_length: int | None = None
    pad_to_multiple_of: Any = None  # int or None
    calculate_kl: bool = True
    spares: Sequence[Mapping[str, Any]] = ()

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        prompts, completions = [row["prompt_ids"] for row in rows], [row["completion_ids"] for row in rows]
        batch = self._sequences(prompts, completions)
        if self.calculate_kl:
            mismatched = self._sequences(prompts, mismatched_completions(rows, self.spares))
            batch.update({f"KL_{key}": value for key, value in mismatched.items()})
        batch["label"] = torch.tensor([bool(row["label"]) for row in rows])
        if self.max_length is not None:
            lengths = [len(prompt) + len(completion) for prompt, completion in zip(prompts, completions)]
            batch["truncated"] = torch.tensor(lengths) > self.max_length
        for column in _REFERENCE_LOGPS:
            if column in rows[0]:
                batch[column] = torch.tensor([row[column] for row in rows])
        return batch

    def _sequences(self, prompts: Sequence[list[int]], completions: Sequence[list[int]]) -> dict[str, Tensor]:
        ids = [(prompt + completion)[: self.max_length] for prompt, completion in zip(prompts, completions)]
        masks = [[0] * len(prompt) + [1] * (len(row) - len(prompt)) for prompt, row in zip(prompts, ids)]
        present = [[1] * len(row) for row in ids]
        padding = {"input_ids": self.pad_token_id, "attention_mask": 0, "completion_mask": 0}
        return {
            key: pad(values, padding[key], multiple_of=self.pad_to_multiple_of, dtype=torch.long)
            for key, values in zip(padding, (ids, present, masks))
        }


_REFERENCE_LOGPS = ("ref_logps", "ref_KL_logps")


class KTOTrainer(ModelCardMixin, Trainer):
    """Trains a causal language model on answers of which each is marked as desirable or not.

    >>> from outspoken import KTOConfig, KTOTrainer
    >>> trainer = KTOTrainer("Qwen/Qwen3-0.6B", args=KTOConfig("my-model"), train_dataset=dataset)  # doctest: +SKIP
    >>> trainer.train()  # doctest: +SKIP

    Args:
        model: a path or hub name, loaded in float32 unless `args.model_init_kwargs["dtype"]` says otherwise; a causal
            `PreTrainedModel`; or a `PeftModel`.
        ref_model: the reference policy; by default the model as it is now: a frozen copy of it, or for an adapter the
            model below it (an adapter that was trained before is kept as a frozen copy).
        args: a `KTOConfig`; a `TrainingArguments`, or TRL's `KTOConfig`, is converted.
        data_collator: makes batches of prepared rows, with the keys of `DataCollatorForUnpairedPreference`.
        train_dataset: rows with `prompt`, `completion` and `label`, or with `chosen` and `rejected`; see
            `outspoken.trainers.data.unpaired.prepare_unpaired`. A stream (`IterableDataset`) needs `max_steps`.
        eval_dataset: the same, or a dict of several.
        processing_class: the tokenizer; by default the one beside the model.
        compute_metrics: metrics of an evaluation, from its logits and `input_ids`. Needs the full logits.
        callbacks, optimizers: as in `Trainer`.
        quantization_config: a `BitsAndBytesConfig`, for a model given as a path.
        peft_config: the adapter to train instead of the model.

    Logs, beside the loss: `rewards/chosen`, `rewards/rejected` (beta times the log-ratio, means over desirable and
    undesirable answers), `rewards/margins`, `logps/*` (sums over an answer's tokens, in nats), `logits/*` (means over
    tokens and vocabulary), `kl` (z0, of `loss_type="kto"` only), `entropy` in nats, `num_tokens` seen so far, and
    `aux_loss` for a mixture of experts; with the prefix `eval_` in evaluations.

    Raises:
        ValueError, TypeError: in one sentence, what is wrong with an argument or the data, and what to do.
    """

    # transformers types these for every trainer there is.
    model: Any
    args: Any  # KTOConfig
    _signature_columns: Any
    _metrics: dict[str, dict[str, list[float]]]

    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel",
        ref_model: PreTrainedModel | None = None,
        args: KTOConfig | TrainingArguments | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: AnyDataset | None = None,
        eval_dataset: Datasets = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: "BitsAndBytesConfig | None" = None,
        peft_config: "PeftConfig | None" = None,
    ):
        args = as_config(KTOConfig, args, model, "KTOTrainer")
        check_datasets(train_dataset, eval_dataset, args)
        if {"image", "images"} & {*first_row(train_dataset, "train")}:
            raise ValueError(
                "KTOTrainer trains text models only, but the train dataset has a column of images; remove it."
            )
        adapted = peft_config is not None or (not isinstance(model, str) and is_peft_model(model))
        if args.sync_ref_model and adapted:
            raise ValueError(
                "`sync_ref_model=True` needs a reference model of its own, but with an adapter the reference is the "
                "model below it; set it to False."
            )
        processing = prepare_processing(model, args, processing_class, trainer="KTOTrainer")
        self.recorder = StepRecorder()
        self._end_tokens = end_token_ids(processing.tokenizer)
        self._rewards_and_lengths = RecentCorrelation(min_spread=REWARD_ROUNDING)
        self._initial_gap = 0.0
        self._spares: list[dict[str, list[int]]] = []
        train_dataset, facts = self._prepare(train_dataset, "train", args, processing.tokenizer)
        self.recorder.facts.update(facts)
        eval_dataset = map_datasets(
            eval_dataset, "eval", lambda dataset, name: self._prepare(dataset, name, args, processing.tokenizer)[0]
        )
        if data_collator is None:
            data_collator = DataCollatorForUnpairedPreference(
                processing.pad_token_id,
                args.max_length,
                args.pad_to_multiple_of,
                calculate_kl=args.loss_type == "kto",
                spares=self._spares,
            )
        prepare_liger(args)
        loaded = prepare_model(
            model, args, processing, peft_config=peft_config, quantization_config=quantization_config
        )
        self.router_aux_loss_coef = set_up_router_loss(loaded, args.router_aux_loss_coef)
        self.aux_loss_enabled = self.router_aux_loss_coef != 0.0
        self.ref_model: Any = None
        if ref_model is not None:
            self.ref_model = given_reference(ref_model, model, args)
        elif is_peft_model(loaded) or not args.precompute_ref_log_probs:
            self.ref_model = make_reference(loaded, model, args, quantization_config)

        super().__init__(
            model=loaded,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing.tokenizer,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.model_accepts_loss_kwargs = True  # `compute_loss` divides by what `_get_num_items_in_batch` counts
        if self.ref_model is not None:
            self.ref_model = prepare_reference(self.ref_model, self.accelerator, self)
        if args.sync_ref_model:
            self.add_callback(SyncRefModelCallback(self.ref_model, self.accelerator))
        if args.precompute_ref_log_probs:
            self.train_dataset = self._ask_reference(self.train_dataset, "train")
            self.eval_dataset = map_datasets(self.eval_dataset, "eval", self._ask_reference)
        finish_setup(self, "kto")

    def _prepare(
        self, dataset: AnyDataset, name: str, args: KTOConfig, tokenizer: PreTrainedTokenizerBase
    ) -> tuple[AnyDataset, dict[str, float]]:
        """Tokenize a dataset, and form its mismatched pairs where they must stay; returns it and the facts about it.

        The train dataset, which comes first, also gives the spare rows.
        """
        by_length = args.train_sampling_strategy in ("group_by_length", "batch_rebalance")
        with args.main_process_first(desc=f"preparing the {name} dataset"):
            dataset, facts = prepare_unpaired(
                dataset,
                tokenizer,
                args.max_length,
                name=name,
                num_proc=args.dataset_num_proc,
                length_column=args.length_column_name if by_length else None,
            )
            if args.loss_type == "kto":
                self._spares = self._spares or spare_rows(dataset, args.seed, name)
                if args.precompute_ref_log_probs and isinstance(dataset, Dataset):
                    dataset = fix_mismatched_completions(dataset, self._spares, args.dataset_num_proc)
        return dataset, facts

    def _ask_reference(self, dataset: Any, name: str) -> Any:
        """Add what the reference says about each row: `ref_logps`, and for the mismatched pair `ref_KL_logps`."""
        args = self.args
        present = [column for column in _reference_columns(args) if column in (dataset.column_names or ())]
        if len(present) == len(_reference_columns(args)):
            return dataset
        dataset = dataset.remove_columns(present)
        self._set_signature_columns_if_needed()
        batch_size = args.per_device_train_batch_size if name == "train" else args.per_device_eval_batch_size

        def score(model: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return dict(zip(_reference_columns(args), self._both_logps(model, batch)))

        return precompute(self, dataset, name, args.precompute_ref_batch_size or batch_size, score)

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            columns = ["prompt_ids", "completion_ids", "KL_completion_ids", "label", *_REFERENCE_LOGPS]
            self._signature_columns = [*columns, self.args.length_column_name]

    # The loss

    def _get_num_items_in_batch(self, batch_samples, device):
        """Count the rows of an optimizer step on all processes: each weighs the same, whatever its micro-batch."""
        return sum_over_processes(self.accelerator, device, rows=sum(len(b["label"]) for b in batch_samples))["rows"]

    def _prepare_inputs(self, inputs):
        return prepare_exactly(super()._prepare_inputs, inputs, _REFERENCE_LOGPS, self.args.device)

    def training_step(self, *args, **kwargs):
        with offload_activations(self.model) if self.args.activation_offloading else nullcontext():
            return super().training_step(*args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of a micro-batch, a scalar: its share of the mean over all rows of the optimizer step.

        With `return_outputs`, also the model's output with its full logits.
        """
        args = self.args
        desirable = inputs["label"].bool()  # (B,)
        ref_logps, *ref_kl_logps = self._reference_logps(inputs)  # (B,)
        z0 = None
        if args.loss_type == "kto":
            with torch.no_grad():
                z0 = self._reference_point(self._answer_logps(model, inputs, "KL_") - ref_kl_logps[0])
        router = {"output_router_logits": True} if self.aux_loss_enabled else {}
        want = ("entropy", "mean_logits")
        scores, outputs = self._score(model, inputs, want=want, full_logits=return_outputs, **router)
        log_ratios = scores.logps.sum(1) - ref_logps  # (B,)
        weights = (args.beta, args.desirable_weight, args.undesirable_weight)
        if z0 is not None:
            losses = kto_loss(log_ratios, desirable, z0, *weights)  # (B,)
        else:
            losses = apo_zero_unpaired_loss(log_ratios, desirable, *weights)
        if num_items_in_batch is None:
            loss, steps = losses.mean(), 1
        else:
            loss = losses.sum() * self.accelerator.num_processes / num_items_in_batch  # gradients are averaged
            steps = self.current_gradient_accumulation_steps
        if self.aux_loss_enabled:  # a mean over the micro-batch
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss / steps
        self._measure(inputs, scores, log_ratios, z0, outputs)
        return (loss, outputs) if return_outputs else loss

    def _score(self, model, inputs, prefix="", want=(), full_logits=False, **model_kwargs) -> tuple[TokenScores, Any]:
        """Scores of the completions' tokens, (B, T - 1), and the model's output. `KL_` names the mismatched pairs."""
        ids = inputs[f"{prefix}input_ids"]
        labels = ids.masked_fill(inputs[f"{prefix}completion_mask"] == 0, IGNORE_INDEX)
        mask = inputs[f"{prefix}attention_mask"]
        model_inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False, **model_kwargs}
        if full_logits:
            outputs = model(**model_inputs)
            shifted = shift_labels(labels, outputs.logits.size(1))
            return scores_from_logits(outputs.logits[:, :-1], shifted, want=want), outputs
        unwrapped = self.accelerator.unwrap_model(model)
        return label_scores(model, model_inputs, labels, unwrapped=unwrapped, want=want)

    def _answer_logps(self, model: Any, inputs: Mapping[str, Tensor], prefix: str = "") -> Tensor:
        """Log-probability of each row's completion, (B,), in nats."""
        _need(inputs, f"{prefix}input_ids", f"`loss_type={self.args.loss_type!r}`")
        return self._score(model, inputs, prefix)[0].logps.sum(1)

    def _both_logps(self, model: Any, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """What a model says about the completions and, for KTO, about the mismatched ones: each (B,)."""
        prefixes = ("", "KL_") if self.args.loss_type == "kto" else ("",)
        return [self._answer_logps(model, inputs, prefix) for prefix in prefixes]

    def _reference_logps(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """The same of the reference."""
        if not self.args.precompute_ref_log_probs:
            with reference_policy(self) as model:
                return self._both_logps(model, inputs)
        for column in _reference_columns(self.args):
            _need(inputs, column, "`precompute_ref_log_probs=True`")
        return [inputs[column] for column in _reference_columns(self.args)]

    def _reference_point(self, log_ratios: Tensor) -> Tensor:
        """z0 from the mismatched pairs of all processes."""
        gathered: Any = self.accelerator.gather(torch.stack([log_ratios.sum(), torch.ones_like(log_ratios).sum()]))
        total, count = gathered.view(-1, 2).sum(0)
        return reference_point(total, count)

    # What is measured

    @torch.no_grad()
    def _measure(self, inputs, scores: TokenScores, log_ratios: Tensor, z0: Tensor | None, outputs: Any) -> None:
        """Collect the metrics of a micro-batch from the rows of all processes, in one transfer from the device."""
        training = self.model.training
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, IGNORE_INDEX)
        ended = ends_with(shift_labels(labels, scores.mask.size(1) + 1), scores.mask, self._end_tokens)
        columns = {
            **{name: getattr(scores, name).sum(1) for name in ("logps", "entropy", "mean_logits")},
            "length": scores.mask.sum(1),
            "log_ratio": log_ratios,
            "desirable": inputs["label"],
            "present": inputs["attention_mask"].sum(1),
            "truncated": inputs.get("truncated", torch.zeros_like(ended)),
            "ended": ended,
        }
        rows = gather_rows(self.accelerator, torch.stack([column.float() for column in columns.values()], dim=1))
        found = dict(zip(columns, rows.double().cpu().numpy().T))  # each (N,), N rows of all processes
        length, rewards = found["length"], self.args.beta * found["log_ratio"]
        sides = {"chosen": found["desirable"] == 1, "rejected": found["desirable"] == 0}

        metrics = self._metrics["train" if training else "eval"]
        for name, side in sides.items():
            if side.any():  # each row counts the same, however many of its kind a batch has
                metrics[f"rewards/{name}"].extend(rewards[side].tolist())
                metrics[f"logps/{name}"].extend(found["logps"][side].tolist())
            if length[side].any():
                metrics[f"logits/{name}"].append(found["mean_logits"][side].sum() / length[side].sum())
        if all(side.any() for side in sides.values()):
            metrics["rewards/margins"].append(rewards[sides["chosen"]].mean() - rewards[sides["rejected"]].mean())
        if z0 is not None:
            metrics["kl"].append(z0.item())
        if length.any():
            metrics["entropy"].append(found["entropy"].sum() / length.sum())
        if self.aux_loss_enabled:
            metrics["aux_loss"].append(self.accelerator.gather(outputs.aux_loss.detach()).mean().item())
        if training:
            if self.args.include_num_input_tokens_seen == "no":  # else `Trainer` counts
                self.state.num_input_tokens_seen += int(found["present"].sum())
            self._record(found, rewards, sides)
        metrics["num_tokens"] = [self.state.num_input_tokens_seen]

    def _record(self, found: dict[str, np.ndarray], rewards: np.ndarray, sides: dict[str, np.ndarray]) -> None:
        """Hand over what is no metric of TRL's."""
        length, count = found["length"], self.recorder.count
        scored = length > 0
        count("samples/desirable", sides["chosen"].sum(), len(length))
        count("samples/no_supervised", (~scored).sum(), len(length))
        count("samples/supervised_eos", found["ended"].sum(), scored.sum())
        count("samples/truncated", found["truncated"].sum(), len(length))
        count("tokens/supervised_share", length.sum(), found["present"].sum())
        for name, side in sides.items():
            count(f"lengths/{name}", length[side].sum(), side.sum())
            count(f"shift/{name}", found["log_ratio"][side].sum(), length[side].sum())
        self._rewards_and_lengths.add(rewards, length)
        correlation = self._rewards_and_lengths.value()
        if correlation is not None:
            self.recorder.set("rewards/length_correlation", correlation[0])
            self.recorder.set("rewards/length_correlation#n", correlation[1])
        if self.state.global_step == 0 and scored.any():  # no update yet: the policy should be its reference
            gaps = np.abs(found["log_ratio"][scored] / length[scored])
            self._initial_gap = max(float(gaps.max()), self._initial_gap)
            self.recorder.set("reference/initial_gap", self._initial_gap)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The loss of a batch, and its logits and tokens only if metrics are computed from them."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            if prediction_loss_only:
                return self.compute_loss(model, inputs), None, None
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        return loss, outputs.logits, inputs["input_ids"]

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Evaluate; a dataset given here is prepared like those given to the trainer."""
        # Of a dict, `Trainer` evaluates one dataset after the other, here.
        if isinstance(eval_dataset, (Dataset, IterableDataset)):
            eval_dataset, _ = self._prepare(eval_dataset, "eval", self.args, self.processing_class)
            if self.args.precompute_ref_log_probs:
                eval_dataset = self._ask_reference(eval_dataset, "eval")
        return super().evaluate(eval_dataset, ignore_keys=ignore_keys, metric_key_prefix=metric_key_prefix)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        add_metrics(self, logs)
        chosen, rejected, margins = (
            f"{'' if self.model.training else 'eval_'}rewards/{name}" for name in ("chosen", "rejected", "margins")
        )
        if chosen in logs and rejected in logs:  # over all rows, also where no micro-batch had both kinds
            logs[margins] = logs[chosen] - logs[rejected]
        super().log(logs, start_time)


def _reference_columns(args: KTOConfig) -> tuple[str, ...]:
    return _REFERENCE_LOGPS if args.loss_type == "kto" else _REFERENCE_LOGPS[:1]


def _need(inputs: Mapping[str, Tensor], key: str, what: str) -> None:
    if key not in inputs:
        raise ValueError(
            f"The batch has no {key!r}, which {what} needs; let `data_collator` make it or pass it on, or leave that "
            "argument out."
        )
