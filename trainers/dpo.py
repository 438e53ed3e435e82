"""Direct preference optimization: learning from pairs of answers of which one was preferred (arXiv 2305.18290).

The step, top to bottom: rows become tokens once (`data/preference.py`); the collator pads the pairs of a batch; a prompt
that both answers share is computed once where the model allows it (`shared_prompts.py`); policy and reference score the
answers (`logprobs.py`, `reference.py`); the losses (`losses/preference.py`) compare how far the policy has moved from
the reference on each.
"""

import logging
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

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
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import EvalPrediction

from outspoken.diagnostics.recorder import StepRecorder
from outspoken.trainers.activation_offloading import offload_activations
from outspoken.trainers.callbacks import SyncRefModelCallback
from outspoken.trainers.config import OutspokenConfig, as_config, live_field
from outspoken.trainers.data.checks import PREFERENCE, check_rows
from outspoken.trainers.data.formats import column_names, first_row
from outspoken.trainers.data.padding import pad
from outspoken.trainers.data.preference import TOKENS, prepare_preference
from outspoken.trainers.data.vision import (
    IMAGE_COLUMNS,
    DataCollatorForVisionPreference,
    contents_as_blocks,
    expect_unused_parameters,
    refuse_new_images,
    refuse_with_images,
)
from outspoken.trainers.logprobs import TokenScores, label_scores, scores_from_logits, shift_labels
from outspoken.trainers.losses import preference as losses
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
from outspoken.trainers.shared_prompts import AnswerBatch, mask_dtype_of, plain_batch, shared_batch, why_not_shared

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import BitsAndBytesConfig

logger = logging.getLogger(__name__)

_OF_MARGIN = ("sigmoid", "hinge", "exo_pair", "robust", "discopop")
_OF_SCORES = (*_OF_MARGIN, "ipo", "sigmoid_norm")  # beta log Z(x) cancels, so any f-divergence is possible
_SMOOTHED = ("sigmoid", "exo_pair", "robust", "aot", "aot_unpaired", "sigmoid_norm")
LOSS_TYPES = (*losses.PAIR_LOSSES, "sft")

# ---------------------------------------------------------------------- settings


@dataclass
class DPOConfig(OutspokenConfig):
    """Settings of `DPOTrainer`, beside those of `TrainingArguments`. Names and defaults are TRL's, where TRL has them.

    Differences of the defaults from `TrainingArguments`: `learning_rate` 1e-6, `logging_steps` 10,
    `gradient_checkpointing` on, `bf16` on where the accelerator supports it.

    Recipes: RPO (arXiv 2405.16436) is `loss_type=["sigmoid", "sft"], loss_weights=[1, 0.005]`, iterative RPO
    (2404.19733) the same with weights `[1, 1]`, MPO (2411.10442) `["sigmoid", "bco_pair", "sft"]` with
    `[0.8, 0.2, 1]`, TR-DPO (2404.09656) `sync_ref_model=True`.
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
        default=1024, metadata={"help": "Prompt and answer are cut to this many tokens. None: never."}
    )
    truncation_mode: str = field(
        default="keep_start",
        metadata={"help": "Which end of a long row stays.", "choices": ["keep_end", "keep_start"]},
    )
    padding_free: bool = field(
        default=False, metadata={"help": "Join a batch's rows instead of padding them. Not supported, as in TRL 1.16."}
    )
    pad_to_multiple_of: int | str | None = field(
        default="auto", metadata={"help": "Pad batches to a multiple of this many tokens; 'auto' does not."}
    )
    share_prompts: bool = field(
        default=True,
        metadata={
            "help": "Compute the prompt that a chosen and a rejected answer have in common once, where the model allows "
            "it and it saves a tenth of the tokens. The results are the same."
        },
    )
    precompute_ref_log_probs: bool = field(
        default=False,
        metadata={
            "help": "Compute the reference's log-probabilities before training, so that no reference model is held "
            "during it."
        },
    )
    precompute_ref_batch_size: int | None = field(
        default=None, metadata={"help": "Rows per process at a time for that. Unset: as in training or evaluation."}
    )

    # The loss
    loss_type: list[str] = field(
        default_factory=lambda: ["sigmoid"],
        metadata={"help": f"The loss, or several to add up: {', '.join(map(repr, LOSS_TYPES))}."},
    )
    loss_weights: list[float] | None = live_field(  # noqa: RUF009
        None, "A weight for each loss of `loss_type`. Unset: 1 each."
    )
    beta: float = live_field(
        0.1,
        "How strongly the policy is held to the reference: an answer's reward is beta log(pi/pi_ref). IPO's tau.",
        minimum=1e-6,
    )
    label_smoothing: float = live_field(
        0.0,
        "Probability that a pair is labelled the wrong way round: with 'sigmoid' and 'sigmoid_norm' conservative DPO; "
        "used by 'robust' (0.1 in the paper), 'exo_pair' (above 0; 1e-3 in the paper), 'aot' and 'aot_unpaired'.",
        minimum=0.0,
        maximum=0.49,
    )
    f_divergence_type: str = field(
        default="reverse_kl",
        metadata={
            "help": "Divergence that holds the policy to the reference. Others than 'reverse_kl' work with "
            f"{', '.join(map(repr, _OF_SCORES))} and 'sft'.",
            "choices": list(losses.F_DIVERGENCES),
        },
    )
    f_alpha_divergence_coef: float = live_field(
        0.5, "1 - alpha of the f-DPO paper's alpha divergence: 0 is the forward and 1 the reverse KL."
    )
    ld_alpha: float | None = live_field(
        None,
        "LD-DPO's weight of the tokens by which one answer is longer than the other. Unset or 1: all count.",
        minimum=0.0,
        maximum=1.0,
    )
    use_weighting: bool = field(
        default=False,
        metadata={"help": "Weigh each pair by how likely the policy is to write both answers (WPO)."},
    )
    discopop_tau: float = live_field(0.05, "Temperature of 'discopop'.", minimum=1e-4)
    length_alpha: float = live_field(
        0.0,
        "R-DPO's charge per token on an answer's reward, for losses of the whole answers' margin: "
        f"{', '.join(map(repr, _OF_MARGIN))}.",
    )
    dpop_lambda: float = live_field(
        0.0,
        "DPO-Positive's weight (5 to 500 in the paper) of the penalty for a chosen answer that became less likely, for "
        "the same losses as `length_alpha`.",
        minimum=0.0,
    )
    bco_shift: bool = field(
        default=False,
        metadata={
            "help": "Shift the rewards in 'bco_pair' by their running mean, as its paper does. Off, as in TRL: by 0."
        },
    )
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
        if self.truncation_mode == "keep_end":
            warnings.warn(
                "`truncation_mode='keep_end'` is deprecated; it cuts off the beginning of the prompt.",
                FutureWarning,
                stacklevel=3,
            )
        if isinstance(self.loss_type, str):
            self.loss_type = [self.loss_type]
        self._check_losses()
        if self.truncation_mode not in ("keep_start", "keep_end"):
            raise ValueError(f"`truncation_mode` is {self.truncation_mode!r}; use 'keep_start' or 'keep_end'.")
        if self.padding_free:
            raise ValueError("`padding_free=True` is not supported; set it to False. Shared prompts save more.")
        if self.beta <= 0:
            raise ValueError(f"`beta` is {self.beta}; choose a number above 0.")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"`label_smoothing` is {self.label_smoothing}; choose at least 0 and less than 0.5.")
        if self.ld_alpha is not None and not 0 <= self.ld_alpha <= 1:
            raise ValueError(f"`ld_alpha` is {self.ld_alpha}; choose a number from 0 to 1, or leave it unset.")
        if self.sync_ref_model and self.precompute_ref_log_probs:
            raise ValueError(
                "`sync_ref_model=True` moves the reference model, which `precompute_ref_log_probs=True` asks only "
                "once, before training; set one of them to False."
            )

    def _check_losses(self) -> None:
        types = {*self.loss_type}
        unknown = [name for name in self.loss_type if name not in LOSS_TYPES]
        if unknown or not types:
            found = repr(unknown[0]) if unknown else "empty"
            raise ValueError(f"`loss_type` is {found}; use one or more of {', '.join(map(repr, LOSS_TYPES))}.")
        if self.loss_weights is not None and len(self.loss_weights) != len(self.loss_type):
            raise ValueError(
                f"`loss_weights` has {len(self.loss_weights)} numbers for {len(self.loss_type)} losses in `loss_type`; "
                "give one for each."
            )
        if self.f_divergence_type not in losses.F_DIVERGENCES:
            raise ValueError(
                f"`f_divergence_type` is {self.f_divergence_type!r}; use one of "
                f"{', '.join(map(repr, losses.F_DIVERGENCES))}."
            )
        other = sorted(types - {*_OF_SCORES, "sft"})
        if self.f_divergence_type != "reverse_kl" and other:
            raise ValueError(
                f"`f_divergence_type={self.f_divergence_type!r}` does not work with `loss_type={other[0]!r}`, which is "
                f"not built on the difference of two rewards; use one of {', '.join(map(repr, _OF_SCORES))}."
            )
        if "exo_pair" in types and self.label_smoothing == 0:
            raise ValueError("`loss_type='exo_pair'` needs `label_smoothing` above 0; its paper takes 1e-3.")
        if self.use_weighting and types & {"aot", "aot_unpaired"}:
            raise ValueError(
                "`use_weighting=True` weighs pairs, which 'aot' and 'aot_unpaired' take apart; set it to False."
            )
        if self.label_smoothing and not types & {*_SMOOTHED}:
            logger.warning(
                f"`label_smoothing={self.label_smoothing}` has no effect with `loss_type={self.loss_type}`; it changes "
                f"{', '.join(map(repr, _SMOOTHED))}."
            )
        for name, value, those in (
            ("length_alpha", self.length_alpha, _OF_MARGIN),
            ("dpop_lambda", self.dpop_lambda, _OF_MARGIN),
            ("bco_shift", self.bco_shift, ("bco_pair",)),
        ):
            if value and not types & {*those}:
                raise ValueError(
                    f"`{name}={value}` has no effect with `loss_type={self.loss_type}`; leave it unset, or use one of "
                    f"{', '.join(map(repr, those))}."
                )


# ---------------------------------------------------------------------- batches


@dataclass
class DataCollatorForPreference:
    """Pads B tokenized pairs on the right: `input_ids`, `attention_mask` and `completion_mask`, (2B, T), the chosen
    answers in the first half; and `truncated`, (2B,), where `max_length` cut one.

    `ref_chosen_logps` and `ref_rejected_logps`, (B,), are passed on.

    >>> collate = DataCollatorForPreference(pad_token_id=0)
    >>> collate([{"prompt_ids": [5, 6], "chosen_ids": [7], "rejected_ids": [8, 9]}])["input_ids"]
    tensor([[5, 6, 7, 0],
            [5, 6, 8, 9]])
    """

    pad_token_id: int
    max_length: int | None = None
    truncation_mode: str = "keep_start"
    pad_to_multiple_of: Any = None  # int or None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        prompts = [list(row["prompt_ids"]) for row in rows] * 2
        answers = [list(row[column]) for column in ("chosen_ids", "rejected_ids") for row in rows]
        lengths = torch.tensor([len(prompt) + len(answer) for prompt, answer in zip(prompts, answers)])
        keep = slice(self.max_length)
        if self.max_length is not None and self.truncation_mode == "keep_end":
            keep = slice(-self.max_length, None)
        ids = [(prompt + answer)[keep] for prompt, answer in zip(prompts, answers)]
        masks = [([0] * len(prompt) + [1] * len(answer))[keep] for prompt, answer in zip(prompts, answers)]
        padding = {"input_ids": self.pad_token_id, "attention_mask": 0, "completion_mask": 0}
        batch = {
            key: pad(values, padding[key], multiple_of=self.pad_to_multiple_of, dtype=torch.long)
            for key, values in zip(padding, (ids, [[1] * len(row) for row in ids], masks))
        }
        if self.max_length is not None:
            batch["truncated"] = lengths > self.max_length
        for column in _REFERENCE_LOGPS:
            if column in rows[0]:
                batch[column] = torch.tensor([row[column] for row in rows])
        return batch


_REFERENCE_LOGPS = ("ref_chosen_logps", "ref_rejected_logps")
_NOT_FOR_THE_MODEL = (*_REFERENCE_LOGPS, "truncated")


class StepCounts(NamedTuple):
    """What the losses of an optimizer step are divided by, over its micro-batches and all processes."""

    pairs: float
    chosen_tokens: float


class RewardShift(TrainerCallback, ExportableState):
    """BCO's shift: the mean over the run of the rewards of all answers. Checkpoints carry it."""

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0.0

    def add(self, total: float, count: float) -> None:
        self.total, self.count = self.total + total, self.count + count

    def value(self) -> float:
        return self.total / self.count if self.count else 0.0

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"total": self.total, "count": self.count}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        saved = state.stateful_callbacks.get(type(self).__name__) if state.global_step else None
        if isinstance(saved, Mapping):
            self.total, self.count = saved["attributes"]["total"], saved["attributes"]["count"]


# ---------------------------------------------------------------------- the trainer


class DPOTrainer(ModelCardMixin, Trainer):
    """Trains a causal language model to prefer the chosen of two answers.

    >>> from outspoken import DPOConfig, DPOTrainer
    >>> trainer = DPOTrainer("Qwen/Qwen3-0.6B", args=DPOConfig("my-model"), train_dataset=dataset)  # doctest: +SKIP
    >>> trainer.train()  # doctest: +SKIP

    Args:
        model: a path or hub name, loaded in float32 unless `args.model_init_kwargs["dtype"]` says otherwise; a causal
            `PreTrainedModel`; or a `PeftModel`.
        ref_model: the reference policy; by default the model as it is now: a frozen copy of it, or for an adapter the
            model below it (an adapter that was trained before is kept as a frozen copy).
        args: a `DPOConfig`; a `TrainingArguments`, or TRL's `DPOConfig`, is converted.
        data_collator: makes batches of prepared rows, with the keys of `DataCollatorForPreference`.
        train_dataset: rows with `chosen` and `rejected`, and `prompt` unless both begin with it; see
            `outspoken.trainers.data.preference.prepare_preference`. With `image` or `images` beside, a model that sees
            is trained; see `outspoken.trainers.data.vision`. A stream (`IterableDataset`) needs `max_steps`.
        eval_dataset: the same, or a dict of several.
        processing_class: the tokenizer, or the processor of a model that sees; by default the one beside the model.
        compute_metrics: metrics of an evaluation, from its logits and `input_ids`. Needs the full logits.
        callbacks, optimizers: as in `Trainer`.
        quantization_config: a `BitsAndBytesConfig`, for a model given as a path.
        peft_config: the adapter to train instead of the model.

    Logs, beside the loss: `rewards/chosen` and `rewards/rejected` (beta times the log-ratio, whatever the loss),
    `rewards/accuracies` (share of pairs whose chosen answer has the higher reward), `rewards/margins`, `logps/*` (sums
    over an answer's tokens, in nats), `logits/*` (means over tokens and vocabulary), `entropy` of the predictions in
    nats, `mean_token_accuracy` on the chosen answers, `num_tokens` seen so far, and `aux_loss` for a mixture of
    experts; with the prefix `eval_` in evaluations.

    Raises:
        ValueError, TypeError: in one sentence, what is wrong with an argument or the data, and what to do.
    """

    # transformers types these for every trainer there is.
    model: Any
    args: Any  # DPOConfig
    _signature_columns: Any
    _metrics: dict[str, dict[str, list[float]]]

    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel",
        ref_model: PreTrainedModel | None = None,
        args: DPOConfig | TrainingArguments | None = None,
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
        args = as_config(DPOConfig, args, model, "DPOTrainer")
        check_datasets(train_dataset, eval_dataset, args)
        self._sees = bool({*IMAGE_COLUMNS} & {*first_row(train_dataset, "train")})
        adapted = peft_config is not None or (not isinstance(model, str) and is_peft_model(model))
        if args.sync_ref_model and adapted:
            raise ValueError(
                "`sync_ref_model=True` needs a reference model of its own, but with an adapter the reference is the "
                "model below it; set it to False."
            )
        prepare_liger(args)
        processing = prepare_processing(model, args, processing_class, trainer="DPOTrainer", images=True)
        self._processing = processing
        if self._sees:
            refuse_with_images(processing.processor, args, "DPOTrainer")
        expect_unused_parameters(processing.processor, args)
        self.recorder = StepRecorder()
        self._end_tokens = end_token_ids(processing.tokenizer)
        self._pad_token_id = processing.pad_token_id
        self._margins_and_lengths = RecentCorrelation(min_spread=REWARD_ROUNDING)
        self._initial_gap = 0.0
        self._steps_begun = 0  # over all calls of `train`
        train_dataset, facts = self._prepare(train_dataset, "train", args)
        self.recorder.facts.update(facts)
        eval_dataset = map_datasets(eval_dataset, "eval", lambda dataset, name: self._prepare(dataset, name, args)[0])
        if data_collator is None and self._sees:
            data_collator = DataCollatorForVisionPreference(
                processing.processor, args.max_length, args.pad_to_multiple_of
            )
        elif data_collator is None:
            data_collator = DataCollatorForPreference(
                processing.pad_token_id, args.max_length, args.truncation_mode, args.pad_to_multiple_of
            )
        loaded = prepare_model(
            model, args, processing, peft_config=peft_config, quantization_config=quantization_config
        )
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
            processing_class=processing.processor,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.model_accepts_loss_kwargs = True  # `compute_loss` divides by what `_get_num_items_in_batch` counts
        self.router_aux_loss_coef = set_up_router_loss(self.model, args.router_aux_loss_coef)
        self.aux_loss_enabled = self.router_aux_loss_coef != 0.0
        self._mask_dtype = mask_dtype_of(self.model)
        why_not = self._why_not_shared()
        self._share_prompts = why_not is None
        if why_not is not None:
            logger.info(f"The prompt of a chosen and a rejected answer is computed twice: {why_not}.")
        if self.ref_model is not None:
            self.ref_model = prepare_reference(self.ref_model, self.accelerator, self)
        if args.bco_shift:
            self.add_callback(RewardShift())
        if args.sync_ref_model:
            self.add_callback(SyncRefModelCallback(self.ref_model, self.accelerator))
        if args.precompute_ref_log_probs:
            self.train_dataset = self._ask_reference(self.train_dataset, "train")
            self.eval_dataset = map_datasets(self.eval_dataset, "eval", self._ask_reference)
        finish_setup(self, "dpo")

    def _prepare(self, dataset: AnyDataset, name: str, args: DPOConfig) -> tuple[AnyDataset, dict[str, float]]:
        """Tokenize a dataset; returns it and the facts about it. Rows with images are prepared batch by batch."""
        if self._sees:
            text = [column for column in column_names(dataset, name) if column not in IMAGE_COLUMNS]
            check_rows(dataset.select_columns(text), name, PREFERENCE, "DPOTrainer")
            return dataset, {}
        refuse_new_images(column_names(dataset, name), name)
        if args.precompute_ref_log_probs and not isinstance(dataset, Dataset):
            raise ValueError(
                f"`precompute_ref_log_probs=True` needs rows that stay in place, but the {name} dataset is a stream; "
                "pass a datasets.Dataset, or set it to False."
            )
        by_length = args.train_sampling_strategy in ("group_by_length", "batch_rebalance")
        with args.main_process_first(desc=f"preparing the {name} dataset"):
            return prepare_preference(
                contents_as_blocks(dataset, self._processing.processor),
                self._processing.tokenizer,
                args.max_length,
                args.truncation_mode,
                name=name,
                num_proc=args.dataset_num_proc,
                length_column=args.length_column_name if by_length else None,
            )

    def _why_not_shared(self) -> str | None:
        """Why the prompts that two answers share cannot be computed once, in a phrase; None if they can."""
        if not self.args.share_prompts:
            return "`share_prompts` is off"
        for model in [self.model] if self.ref_model is None else [self.model, self.ref_model]:
            if mask_dtype_of(model) != self._mask_dtype:
                return "policy and reference take different attention masks"
            why_not = why_not_shared(model, self.args.max_length)
            if why_not is not None:
                return why_not
        return None

    def _ask_reference(self, dataset: Any, name: str) -> Any:
        """Add what the reference says about each row: `ref_chosen_logps` and `ref_rejected_logps`."""
        if {*_REFERENCE_LOGPS} <= {*dataset.column_names}:
            return dataset
        args = self.args
        batch_size = args.per_device_train_batch_size if name == "train" else args.per_device_eval_batch_size

        def score(model: Any, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return dict(zip(_REFERENCE_LOGPS, self._answer_logps(model, self._answers(inputs)).chunk(2)))

        return precompute(
            self, dataset, name, args.precompute_ref_batch_size or batch_size, score, {"ld_alpha": args.ld_alpha}
        )

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            columns = [*TOKENS, *_REFERENCE_LOGPS, self.args.length_column_name]
            if self._sees:
                columns = ["prompt", "chosen", "rejected", *IMAGE_COLUMNS, "tools", "chat_template_kwargs"]
            self._signature_columns = columns

    # The loss

    def _get_num_items_in_batch(self, batch_samples, device):
        """Count what the losses are divided by, so that micro-batches weigh by their pairs and tokens."""
        self._steps_begun += 1
        scored = [(b["completion_mask"] * b["attention_mask"])[:, 1:] for b in batch_samples]
        counts = sum_over_processes(
            self.accelerator,
            device,
            pairs=sum(len(rows) // 2 for rows in scored),
            chosen_tokens=sum(rows[: len(rows) // 2].sum().to(device) for rows in scored),
        )
        return StepCounts(**counts)

    def _prepare_inputs(self, inputs):
        return prepare_exactly(super()._prepare_inputs, inputs, _REFERENCE_LOGPS, self.args.device)

    def training_step(self, *args, **kwargs):
        with offload_activations(self.model) if self.args.activation_offloading else nullcontext():
            return super().training_step(*args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of a micro-batch, a scalar: its share of the mean over all pairs of the optimizer step.

        With `return_outputs`, also the model's output with its full logits.
        """
        args = self.args
        batch = self._answers(inputs, share=not return_outputs)
        ref_logps = self._reference_logps(inputs, batch)  # (2B,)
        want = ["entropy", "is_top1", "mean_logits", *(["log_sum_sq_probs"] if args.use_weighting else [])]
        router = {"output_router_logits": True} if self.aux_loss_enabled else {}
        scores, outputs = self._score(model, batch, tuple(want), return_outputs, **router)
        tokens = batch.take(scores.logps)  # (2B, C)
        logps = losses.sequence_logps(tokens, batch.mask, args.ld_alpha)
        pairs = losses.Pairs(logps, ref_logps, batch.mask.sum(1), args)
        if args.bco_shift:
            pairs.shift = self._reward_shift(pairs)
        chosen_tokens = tokens[: len(tokens) // 2]
        counts = num_items_in_batch or StepCounts(len(chosen_tokens), batch.mask[: len(chosen_tokens)].sum())

        loss = torch.zeros((), device=logps.device)
        for loss_type, weight in zip(args.loss_type, args.loss_weights or [1.0] * len(args.loss_type), strict=True):
            if loss_type == "sft":
                loss = loss - weight * chosen_tokens.sum() / max(counts.chosen_tokens, 1)
                continue
            per_pair = losses.PAIR_LOSSES[loss_type](pairs, args)  # (B,)
            if args.use_weighting:
                per_pair = per_pair * losses.wpo_weights(tokens, batch.take(scores.log_sum_sq_probs), batch.mask)
            loss = loss + weight * per_pair.sum() / counts.pairs
        if num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # whose gradients are averaged
        if self.aux_loss_enabled:
            # A mean over the micro-batch, so the accumulation has to be averaged here.
            steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss / steps
        self._measure(inputs, batch, scores, pairs, outputs)
        return (loss, outputs) if return_outputs else loss

    def _answers(self, inputs: Mapping[str, Any], share: bool = True) -> AnswerBatch:
        """The batch for the model, with prompts that two answers share once where that is possible and worthwhile."""
        inputs = {key: value for key, value in inputs.items() if key not in _NOT_FOR_THE_MODEL}
        batch = None
        if share and self._share_prompts:
            hidden_size = self.model.config.get_text_config().hidden_size
            batch = shared_batch(inputs, self._pad_token_id, mask_dtype=self._mask_dtype, hidden_size=hidden_size)
        return plain_batch(inputs) if batch is None else batch

    def _score(
        self,
        model: Any,
        batch: AnswerBatch,
        want: tuple[str, ...] = (),
        full_logits: bool = False,
        **model_kwargs: Any,
    ) -> tuple[TokenScores, Any]:
        """Scores of the answers' tokens, (R, T - 1), and the model's output."""
        model_inputs = {**batch.inputs, "use_cache": False, **model_kwargs}
        if full_logits:
            outputs = model(**model_inputs)
            shifted = shift_labels(batch.labels, outputs.logits.size(1))
            return scores_from_logits(outputs.logits[:, :-1], shifted, want=want), outputs
        unwrapped = self.accelerator.unwrap_model(model)
        return label_scores(model, model_inputs, batch.labels, unwrapped=unwrapped, want=want)

    def _answer_logps(self, model: Any, batch: AnswerBatch) -> Tensor:
        """Log-probabilities of the answers, (2B,), in nats, weighted as in LD-DPO if that is on."""
        scores, _ = self._score(model, batch)
        return losses.sequence_logps(batch.take(scores.logps), batch.mask, self.args.ld_alpha)

    def _reference_logps(self, inputs: Mapping[str, Any], batch: AnswerBatch) -> Tensor:
        """What the reference says about the answers, (2B,)."""
        if not self.args.precompute_ref_log_probs:
            with reference_policy(self) as model:
                return self._answer_logps(model, batch)
        missing = [column for column in _REFERENCE_LOGPS if column not in inputs]
        if missing:
            raise ValueError(
                f"The batch has no {missing[0]!r}, which `precompute_ref_log_probs=True` has put into the dataset; let "
                "`data_collator` pass it on, or set that to False."
            )
        return torch.cat([inputs[column] for column in _REFERENCE_LOGPS])

    def _reward_shift(self, pairs: losses.Pairs) -> float:
        """BCO's shift, with the rewards of this micro-batch on all processes in it."""
        shift = next(c for c in self.callback_handler.callbacks if isinstance(c, RewardShift))
        if self.model.training:
            rewards = self.args.beta * torch.cat(pairs.log_ratios).detach()
            sums = sum_over_processes(self.accelerator, rewards.device, total=rewards.sum(), count=len(rewards))
            shift.add(**sums)
        return shift.value()

    # What is measured

    @torch.no_grad()
    def _measure(self, inputs, batch: AnswerBatch, scores: TokenScores, pairs: losses.Pairs, outputs: Any) -> None:
        """Collect the metrics of a micro-batch from the answers of all processes, in one transfer from the device."""
        training = self.model.training
        ids, present = inputs["input_ids"], inputs["attention_mask"]
        scored = (inputs["completion_mask"] * present)[:, 1:].bool()
        number = len(ids) // 2
        tokens = ids * present
        unknown = 0.0 if self.args.max_length is None else math.nan  # a collator of the user's does not tell
        taken = {name: batch.take(getattr(scores, name)).sum(1) for name in ("entropy", "mean_logits", "is_top1")}
        columns = {  # each (2B,)
            **taken,
            "length": pairs.lengths,
            "logps": pairs.logps,
            "log_ratio": pairs.logps - pairs.ref_logps,
            "present": present.sum(1),
            "truncated": inputs.get("truncated", torch.full_like(pairs.logps, unknown)),
            "ended": ends_with(ids[:, 1:], scored, self._end_tokens),
            "identical": (tokens[:number] == tokens[number:]).all(1).repeat(2),
        }
        rows = torch.stack([column.float() for column in columns.values()], dim=1).unflatten(0, (2, number))
        gathered = gather_rows(self.accelerator, rows.transpose(0, 1)).double().cpu().numpy()  # (pairs, 2, columns)
        found = dict(zip(columns, np.moveaxis(gathered, 2, 0)))  # each (pairs, 2): chosen, rejected
        length, rewards = found["length"], self.args.beta * found["log_ratio"]
        margins = rewards[:, 0] - rewards[:, 1]

        metrics = self._metrics["train" if training else "eval"]
        for side, name in enumerate(("chosen", "rejected")):
            metrics[f"rewards/{name}"].append(rewards[:, side].mean())
            metrics[f"logps/{name}"].append(found["logps"][:, side].mean())
            if length[:, side].any():
                metrics[f"logits/{name}"].append(found["mean_logits"][:, side].sum() / length[:, side].sum())
        metrics["rewards/accuracies"].append((margins > 0).mean())
        metrics["rewards/margins"].append(margins.mean())
        if length.any():
            metrics["entropy"].append(found["entropy"].sum() / length.sum())
        if length[:, 0].any():
            metrics["mean_token_accuracy"].append(found["is_top1"][:, 0].sum() / length[:, 0].sum())
        if self.aux_loss_enabled:
            metrics["aux_loss"].append(self.accelerator.gather(outputs.aux_loss.detach()).mean().item())
        if training:
            if self.args.include_num_input_tokens_seen == "no":  # else `Trainer` counts
                self.state.num_input_tokens_seen += int(found["present"].sum())
            self._record(found, margins)
        metrics["num_tokens"] = [self.state.num_input_tokens_seen]

    def _record(self, found: dict[str, np.ndarray], margins: np.ndarray) -> None:
        """Hand over what is no metric of TRL's."""
        length, count = found["length"], self.recorder.count
        scored = length > 0
        count("samples/no_supervised", (~scored).sum(), length.size)
        count("samples/supervised_eos", found["ended"].sum(), scored.sum())
        if not np.isnan(found["truncated"]).any():
            count("samples/truncated", found["truncated"].sum(), length.size)
        count("tokens/supervised_share", length.sum(), found["present"].sum())
        count("pairs/identical", found["identical"][:, 0].sum(), len(length))
        for side, name in enumerate(("chosen", "rejected")):
            count(f"lengths/{name}", length[:, side].sum(), len(length))
            count(f"shift/{name}", found["log_ratio"][:, side].sum(), length[:, side].sum())
        self._margins_and_lengths.add(margins, length[:, 0] - length[:, 1])
        correlation = self._margins_and_lengths.value()
        if correlation is not None:
            self.recorder.set("rewards/length_correlation", correlation[0])
            self.recorder.set("rewards/length_correlation#n", correlation[1])
        untouched = self.state.global_step == 0 and self._steps_begun <= 1
        if untouched and scored.any():  # the policy should still be its reference
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
            eval_dataset, _ = self._prepare(eval_dataset, "eval", self.args)
            if self.args.precompute_ref_log_probs:
                eval_dataset = self._ask_reference(eval_dataset, "eval")
        return super().evaluate(eval_dataset, ignore_keys=ignore_keys, metric_key_prefix=metric_key_prefix)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        add_metrics(self, logs)
        super().log(logs, start_time)
