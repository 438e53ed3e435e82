"""Group Relative Policy Optimization (GRPO, arXiv 2402.03300), and the recipes that differ from it by a setting.

One training step reads: sample completions, score them, turn rewards into advantages within each prompt's group, take
the clipped policy-gradient loss, log. The formulas live in `losses/policy.py`, `advantages.py` and `logprobs.py`.

Axes: `B` prompts of a generation batch, `G` completions per prompt, `N = B * G`, `P` prompt tokens, `T` completion
tokens, `K` reward functions.
"""

import contextlib
import inspect
import logging
import math
import os
import sys
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from accelerate.utils import gather_object, is_peft_model, set_seed
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from outspoken.diagnostics.recorder import Recorder
from outspoken.diagnostics.records import as_number
from outspoken.trainers import advantages as group_advantages
from outspoken.trainers import loading
from outspoken.trainers.config import OutspokenConfig, as_config, live_field, live_fields
from outspoken.trainers.data.formats import column_names, is_messages
from outspoken.trainers.logprobs import IGNORE_INDEX, label_scores
from outspoken.trainers.losses import policy
from outspoken.trainers.model_card import ModelCardMixin
from outspoken.trainers.reference import make_reference, prepare_reference, reference_policy
from outspoken.trainers.rewards import call_reward_functions, callable_name, checked_rewards
from outspoken.trainers.rollouts.batch import RolloutBatch, pad_ids
from outspoken.trainers.rollouts.sampler import RepeatSampler, repeat_stream
from outspoken.trainers.rollouts.show import print_completions
from outspoken.trainers.rollouts.transformers_backend import eos_token_ids, generate
from outspoken.trainers.setup import disable_dropout, finish_setup, prepare_processing, set_up_router_loss

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import BitsAndBytesConfig

logger = logging.getLogger(__name__)

# A reward is a function, a sequence classifier with one label, or the path of one.
RewardFunc = str | PreTrainedModel | Callable[..., Any]


@dataclass
class GRPOConfig(OutspokenConfig):
    """Settings of `GRPOTrainer`: those of `transformers.TrainingArguments` and the following.

    Names and defaults are TRL 1.16's. Fields marked live may be changed while the run trains.
    """

    learning_rate: float = live_field(1e-6, "Peak learning rate.", minimum=0.0, maximum=1.0)

    # Model and reference model
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Keyword arguments of `from_pretrained`, where `model` is a path or hub name."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Allow models and tokenizers that bring their own Python code."}
    )
    router_aux_loss_coef: float | None = field(
        default=None,
        metadata={
            "help": "Weight of the load-balancing loss of mixture-of-experts models. Unset: what the model's config "
            "says; 0: none."
        },
    )
    disable_dropout: bool = field(default=False, metadata={"help": "Set every dropout of the models to 0."})
    cast_lm_head_to_fp32: bool = field(
        default=False, metadata={"help": "Keep the output head, and so the log-probabilities, in float32."}
    )

    # Data
    remove_unused_columns: bool | None = field(  # type: ignore[assignment]
        default=False, metadata={"help": "Drop all columns but `prompt`; reward functions then see no other column."}
    )
    num_generations: int = field(default=8, metadata={"help": "Completions sampled per prompt: the group size G."})
    num_generations_eval: int | None = field(
        default=None, metadata={"help": "Completions per prompt in evaluation. Unset: `num_generations`."}
    )
    shuffle_dataset: bool = field(default=True, metadata={"help": "Draw the prompts in random order."})
    pad_to_multiple_of: int | str | None = field(
        default="auto", metadata={"help": "Pad prompts and completions to a multiple of this. 'auto': do not."}
    )

    # Sampling
    max_completion_length: int = live_field(
        512, "Completions are cut after this many tokens.", minimum=1, maximum=1_000_000
    )
    generation_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Completions sampled at a time, over all processes. Unset: per_device_train_batch_size * processes "
            "* steps_per_generation."
        },
    )
    steps_per_generation: int | None = field(
        default=None,
        metadata={
            "help": "Micro-batches that one generation batch is split into. Unset: gradient_accumulation_steps."
        },
    )
    temperature: float = live_field(
        1.0, "Temperature of sampling, and of scoring what was sampled.", minimum=0.01, maximum=10.0
    )
    top_p: float = live_field(1.0, "Sample from the most likely tokens of this total.", minimum=0.01, maximum=1.0)
    top_k: int = live_field(0, "Sample from this many most likely tokens; 0: from all.", minimum=0)
    min_p: float | None = live_field(
        None, "Sample from tokens at least this likely, relative to the likeliest.", minimum=0.0, maximum=1.0
    )
    repetition_penalty: float = live_field(
        1.0, "Above 1, tokens seen before are less likely; below 1, more.", minimum=0.1, maximum=10.0
    )
    generation_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "More fields of `GenerationConfig`; they win over the settings above."}
    )
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Keyword arguments of the tokenizer's `apply_chat_template`."}
    )
    cache_implementation: str | None = field(
        default=None, metadata={"help": "Key-value cache that `generate` uses. Unset: its own choice."}
    )
    use_vllm: bool = field(default=False, metadata={"help": "Sample with vLLM. Not supported yet."})

    # Objective
    beta: float = live_field(0.0, "Weight of the KL term against the reference model; 0: no such model.", minimum=0.0)
    num_iterations: int = field(default=1, metadata={"help": "Passes over each generation batch (mu in the paper)."})
    epsilon: float = live_field(0.2, "Ratios are clipped below 1 - epsilon.", minimum=0.0, maximum=1.0)
    epsilon_high: float | None = live_field(
        None, "Ratios are clipped above 1 + epsilon_high. Unset: as `epsilon`.", minimum=0.0
    )
    delta: float | None = live_field(
        None, "Upper bound of the ratio where the advantage is negative; above 1 + epsilon_high.", minimum=0.0
    )
    importance_sampling_level: str = field(
        default="token", metadata={"help": "'token': a ratio per token. 'sequence': one per completion (GSPO)."}
    )
    reward_weights: list[float] | None = live_field(None, "A weight per reward function. Unset: all 1.")  # noqa: RUF009
    multi_objective_aggregation: str = field(
        default="sum_then_normalize",
        metadata={"help": "'sum_then_normalize', or 'normalize_then_sum': each reward function on its own (GDPO)."},
    )
    scale_rewards: str = live_field(
        "group",
        "What advantages are divided by: the std of the 'group', of the 'batch', or 'none'. True is 'group', False "
        "'none'.",
        choices=("group", "batch", "none"),
    )
    loss_type: str = live_field("dapo", "How token losses are averaged.", choices=tuple(policy.POLICY_LOSSES))
    mask_truncated_completions: bool = live_field(
        False, "Leave completions that hit max_completion_length out of the loss.", choices=(True, False)
    )
    top_entropy_quantile: float = field(
        default=1.0, metadata={"help": "Share of tokens, those of highest entropy, that the policy loss uses."}
    )
    entropy_coef: float = field(default=0.0, metadata={"help": "Weight of the entropy bonus."})
    use_adaptive_entropy: bool = field(
        default=False, metadata={"help": "Steer `entropy_coef` towards a target entropy. Not supported yet."}
    )
    off_policy_mask_threshold: float | None = field(
        default=None,
        metadata={"help": "Drop completions with A < 0 whose mean log pi_old - log pi exceeds this. Unset: none."},
    )
    use_bias_correction_kl: bool = field(
        default=True, metadata={"help": "Multiply the KL term by the importance ratio (DeepSeek-V3.2)."}
    )
    sync_ref_model: bool = field(
        default=False, metadata={"help": "Move the reference model towards the policy. Not supported yet."}
    )

    # Logging
    log_completions: bool = field(
        default=False,
        metadata={"help": "At each log, print completions and write them to <output_dir>/completions/*.parquet."},
    )
    num_completions_to_print: int | None = field(
        default=None, metadata={"help": "How many of them to print. Unset: all."}
    )
    log_unique_prompts: bool = field(
        default=False, metadata={"help": "One row per prompt in the table sent to wandb or trackio."}
    )

    _VALID_DICT_FIELDS = [
        *OutspokenConfig._VALID_DICT_FIELDS,
        "model_init_kwargs",
        "generation_kwargs",
        "chat_template_kwargs",
    ]

    def __post_init__(self):
        super().__post_init__()
        # Booleans are its older form.
        self.scale_rewards = {"true": "group", "false": "none"}.get(
            str(self.scale_rewards).lower(), self.scale_rewards
        )
        if isinstance(self.pad_to_multiple_of, str):
            word = self.pad_to_multiple_of.lower()
            self.pad_to_multiple_of = None if word in ("auto", "none", "null") else int(word)
        self._refuse_unsupported()
        self._check_values()
        self._size_generation_batch()

    def _refuse_unsupported(self) -> None:
        if self.use_vllm:
            raise ValueError("use_vllm is True, but sampling with vLLM is not supported yet; leave it False.")
        if self.sync_ref_model:
            raise ValueError(
                "sync_ref_model is True, but a moving reference model is not supported yet; leave it False."
            )
        if self.use_adaptive_entropy:
            raise ValueError(
                "use_adaptive_entropy is True, but adaptive entropy control is not supported yet; set a constant "
                "`entropy_coef` instead."
            )
        if self.auto_find_batch_size:
            raise ValueError(
                "auto_find_batch_size is True, but a smaller batch would break up the groups of num_generations "
                "completions; set it to False and lower per_device_train_batch_size yourself."
            )
        if self.use_liger_kernel:
            raise ValueError("use_liger_kernel is True, but GRPO computes its own loss; leave it False.")

    def _check_values(self) -> None:
        words: tuple[tuple[str, tuple[str, ...]], ...] = (
            ("loss_type", tuple(policy.POLICY_LOSSES)),
            ("scale_rewards", ("group", "batch", "none")),
            ("importance_sampling_level", ("token", "sequence")),
            ("multi_objective_aggregation", ("sum_then_normalize", "normalize_then_sum")),
        )
        for name, allowed in words:
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name} is {value!r}; choose one of {', '.join(map(repr, allowed))}.")
        for name, bounds in live_fields(self).items():
            value = getattr(self, name)
            if value is None or bounds["choices"] is not None or isinstance(value, list):
                continue
            low, high = bounds["minimum"], bounds["maximum"]
            if (low is not None and value < low) or (high is not None and value > high):
                bound = f"at least {low}" if high is None else f"between {low} and {high}"
                raise ValueError(f"{name} is {value}; choose a value {bound}.")
        if self.num_iterations < 1:
            raise ValueError(f"num_iterations is {self.num_iterations}; choose 1 or more.")
        if self.num_generations < 2:
            raise ValueError(
                f"num_generations is {self.num_generations}; advantages compare completions of the same prompt, so "
                "choose 2 or more."
            )
        if not 0.0 <= self.top_entropy_quantile <= 1.0:
            raise ValueError(f"top_entropy_quantile is {self.top_entropy_quantile}; choose a share between 0 and 1.")

    def _size_generation_batch(self) -> None:
        """Settle `steps_per_generation` and `generation_batch_size`, and check that groups stay whole."""
        step_size = self.per_device_train_batch_size * self.world_size
        if self.generation_batch_size is not None and self.steps_per_generation is not None:
            if self.generation_batch_size != step_size * self.steps_per_generation:
                raise ValueError(
                    f"generation_batch_size is {self.generation_batch_size} and steps_per_generation is "
                    f"{self.steps_per_generation}; each follows from the other, so set only one of them."
                )
        elif self.generation_batch_size is not None:
            if self.generation_batch_size % step_size != 0:
                raise ValueError(
                    f"generation_batch_size is {self.generation_batch_size}, which is not divisible by the "
                    f"{step_size} completions of a step (per_device_train_batch_size={self.per_device_train_batch_size} "
                    f"on {self.world_size} process(es)); choose a multiple of {step_size}."
                )
            self.steps_per_generation = self.generation_batch_size // step_size
        else:
            if self.steps_per_generation is None:
                self.steps_per_generation = self.gradient_accumulation_steps
            self.generation_batch_size = step_size * self.steps_per_generation
        if self.generation_batch_size % self.num_generations != 0:
            raise ValueError(
                f"generation_batch_size is {self.generation_batch_size} (per_device_train_batch_size="
                f"{self.per_device_train_batch_size} * {self.world_size} process(es) * steps_per_generation="
                f"{self.steps_per_generation}), which is not divisible by num_generations={self.num_generations}; "
                "change one of them so that groups stay whole."
            )
        if self.do_eval and self.eval_strategy != "no":
            group = self.num_generations_eval or self.num_generations
            if (self.per_device_eval_batch_size * self.world_size) % group != 0:
                raise ValueError(
                    f"per_device_eval_batch_size is {self.per_device_eval_batch_size} on {self.world_size} process(es), "
                    f"which is not divisible by the {group} completions per prompt in evaluation; change it, or "
                    "set num_generations_eval."
                )


def as_grpo_config(args: TrainingArguments | None, model: "str | PreTrainedModel | PeftModel") -> GRPOConfig:
    """A `GRPOConfig` from what the user passed: itself, or one with the fields that a `TrainingArguments` shares."""
    return as_config(GRPOConfig, args, model, "GRPOTrainer")


class GRPOTrainer(ModelCardMixin, Trainer):
    """Trains a causal language model on rewards of its own completions, by GRPO (arXiv 2402.03300).

    Args:
        model: the model, or the path or hub name to load it from; a `PeftModel` trains its adapter.
        reward_funcs: what scores the completions, one or several: a function (see `outspoken.trainers.rewards`), a
            sequence classifier with one label, or the path of one. A function is called with keywords `prompts`,
            `completions`, `completion_ids`, the dataset's other columns, `trainer_state`, `log_extra(column, values)`
            and `log_metric(name, value)`, and returns one number (or None: not scorable) per completion.
        args: a `GRPOConfig`; a `TrainingArguments`, or TRL's `GRPOConfig`, is converted.
        train_dataset: rows with a `prompt`: a string, or a list of messages. A stream (`IterableDataset`) needs
            `max_steps`.
        eval_dataset: like `train_dataset`, or several by name.
        processing_class: the tokenizer. Default: the one stored with the model.
        reward_processing_classes: tokenizers of the reward models, in the order of `reward_funcs`.
        callbacks, optimizers: as in `transformers.Trainer`.
        quantization_config: used where `model` is loaded from a path.
        peft_config: wraps the model in a fresh adapter.
        tools, rollout_func, environment_factory: not supported yet.

    Raises:
        ValueError, TypeError: an argument is unusable; the message says what to change.
    """

    # transformers types these for every trainer there is.
    model: Any
    args: Any  # GRPOConfig
    processing_class: Any
    train_dataset: Any
    eval_dataset: Any
    _signature_columns: Any
    # `compute_loss` divides by the number of micro-batches itself.
    loss_is_scaled_for_ga = True

    _metrics: dict[str, dict[str, list[float]]]

    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel",
        reward_funcs: RewardFunc | list[RewardFunc] | None = None,
        args: GRPOConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase | None] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: "BitsAndBytesConfig | None" = None,
        peft_config: "PeftConfig | None" = None,
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
                raise ValueError(f"`{name}` is set, but GRPOTrainer does not support it yet; leave it out.")
        args = as_grpo_config(args, model)
        datasets = {"train_dataset": train_dataset}
        if isinstance(eval_dataset, dict):
            datasets |= {f"eval_dataset[{name!r}]": dataset for name, dataset in eval_dataset.items()}
        elif eval_dataset is not None:
            datasets["eval_dataset"] = eval_dataset
        for name, dataset in datasets.items():
            _check_dataset(name, dataset)
        if any(isinstance(dataset, IterableDataset) for dataset in datasets.values()):
            # One process cannot hand a stream's rows to the others: they are no tensors.
            accelerator_config: Any = args.accelerator_config
            accelerator_config.dispatch_batches = False
        if isinstance(train_dataset, IterableDataset) and args.dataloader_num_workers:
            logger.warning("dataloader_num_workers is set to 0: several workers would break up a stream's groups.")
            args.dataloader_num_workers = 0

        # Adapters are initialised at random, hence the seed before they are made.
        set_seed(args.seed)
        model_init_kwargs: Any = args.model_init_kwargs
        load: dict[str, Any] = {
            "model_init_kwargs": model_init_kwargs,
            "trust_remote_code": args.trust_remote_code,
            "quantization_config": quantization_config,
        }
        processing = prepare_processing(model, args, processing_class, trainer="GRPOTrainer")
        tokenizer = processing.tokenizer
        source = model
        model = loading.load_model(model, **load)
        loading.tell_model(model, tokenizer)
        self.eos_token_ids = eos_token_ids(model, tokenizer)
        model = loading.wrap_with_peft(model, peft_config, args)
        # The reference is the policy as it is now; an adapter's is reached by switching the adapter.
        self.ref_model: Any = None
        if args.beta != 0.0:
            self.ref_model = make_reference(model, source, args, quantization_config)
        for prepared in [model] if self.ref_model is None else [model, self.ref_model]:
            if args.disable_dropout:
                disable_dropout(prepared)
            if args.cast_lm_head_to_fp32:
                _cast_head_to_fp32(prepared)
        self.aux_loss_coef = set_up_router_loss(model, args.router_aux_loss_coef)
        self._takes_position_ids = _takes_position_ids(model)

        self.recorder = Recorder()
        self._step: int | None = None  # micro-batches trained on in this run; None: to be found from the state
        self._micro_batches: list[RolloutBatch] | None = None  # what is left to train on, of the last generation batch
        self._step_time = 0.0
        super().__init__(
            model=model,
            args=args,
            data_collator=_identity,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        if self.ref_model is not None:
            self.ref_model = prepare_reference(self.ref_model, self.accelerator, self)
        self._set_reward_functions(reward_funcs, reward_processing_classes)

        # The completions of the latest generation batch, column by column, for the completions table.
        size = args.generation_batch_size
        self._logs: dict[str, Any] = {
            "prompt": deque(maxlen=size),
            "completion": deque(maxlen=size),
            "rewards": defaultdict(lambda: deque(maxlen=size)),
            "advantages": deque(maxlen=size),
            "extra": defaultdict(lambda: deque(maxlen=size)),
        }
        self._logs_are_new = False
        self._pending_extra: dict[str, list] = defaultdict(list)
        self._pending_metrics: dict[str, list[float]] = defaultdict(list)
        self._not_numbers: set[str] = set()  # names of metrics that were given something else, and told of

        # Processes must not draw the same completions.
        set_seed(args.seed, device_specific=True)

        finish_setup(self, "grpo")

    # Setting up

    def _set_reward_functions(
        self,
        reward_funcs: RewardFunc | list[RewardFunc] | None,
        processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase | None] | None,
    ) -> None:
        functions = list(reward_funcs) if isinstance(reward_funcs, (list, tuple)) else [reward_funcs]
        functions = [function for function in functions if function is not None]
        if not functions:
            raise ValueError("`reward_funcs` is empty; pass at least one reward function.")
        tokenizers = processing_classes if isinstance(processing_classes, list) else [processing_classes]
        if processing_classes is None:
            tokenizers = [None] * len(functions)
        if len(tokenizers) != len(functions):
            raise ValueError(
                f"`reward_processing_classes` has {len(tokenizers)} entries for {len(functions)} reward functions; give "
                "one per function, None for those that are no models."
            )
        self.reward_funcs: dict[str, Any] = {}  # functions, and models in evaluation mode
        self.reward_tokenizers: dict[str, PreTrainedTokenizerBase] = {}
        function: Any
        for function, tokenizer in zip(functions, tokenizers):
            if isinstance(function, str):
                function = loading.load_model(
                    function,
                    {**(self.args.model_init_kwargs or {}), "num_labels": 1},
                    trust_remote_code=self.args.trust_remote_code,
                    auto_class=AutoModelForSequenceClassification,
                )
            is_model = isinstance(function, nn.Module)
            if not is_model and not callable(function):
                raise TypeError(
                    f"`reward_funcs` holds a {type(function).__name__}; pass functions, sequence classifiers or paths."
                )
            model_name = loading.model_id(function).split("/")[-1] or type(function).__name__ if is_model else ""
            name = _unused(model_name or callable_name(function), self.reward_funcs)
            if is_model:
                self.reward_tokenizers[name] = self._reward_tokenizer(function, tokenizer)
                function = self.accelerator.prepare_model(function, evaluation_mode=True, device_placement=True)
                function.eval()
            self.reward_funcs[name] = function
        self._reward_weights()  # checks their number

    def _reward_tokenizer(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None):
        if tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(
                loading.model_id(model), trust_remote_code=self.args.trust_remote_code
            )
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        # A sequence classifier reads the last token that is not padding.
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
        return tokenizer

    def _reward_weights(self) -> Tensor:
        weights = self.args.reward_weights
        if weights is None:
            weights = [1.0] * len(self.reward_funcs)
        if len(weights) != len(self.reward_funcs):
            raise ValueError(
                f"reward_weights has {len(weights)} entries for {len(self.reward_funcs)} reward functions "
                f"({', '.join(self.reward_funcs)}); give one weight per function."
            )
        return torch.tensor(weights, dtype=torch.float32, device=self.accelerator.device)

    def _set_signature_columns_if_needed(self):
        if self._signature_columns is None:
            self._signature_columns = ["prompt"]

    # Drawing prompts. The dataloader yields a whole generation batch for every micro-batch; `_prepare_inputs` samples
    # from the first of each `steps_per_generation * num_iterations`, and serves the others from what was sampled.

    def get_train_dataloader(self):
        dataset = self.train_dataset
        if isinstance(dataset, IterableDataset):
            if self.args.shuffle_dataset:
                dataset = dataset.shuffle(seed=self.args.seed)
            dataset = repeat_stream(dataset, **self._train_repeats())
        return self._get_dataloader(
            dataset=dataset,
            description="Training",
            batch_size=self._train_batch_size * self.args.steps_per_generation,
            sampler_fn=self._get_train_sampler,
            is_training=True,
        )

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler:
        return RepeatSampler(
            train_dataset if train_dataset is not None else self.train_dataset,
            **self._train_repeats(),
            shuffle=self.args.shuffle_dataset,
            seed=self.args.seed,
        )

    def _train_repeats(self) -> dict[str, int]:
        return {
            "group_size": self.args.num_generations,
            "prompts_per_batch": self.args.generation_batch_size // self.args.num_generations,
            "repeats": self.args.num_iterations * self.args.steps_per_generation,
        }

    def get_eval_dataloader(self, eval_dataset: str | Dataset | IterableDataset | None = None):
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, str):
            dataset = self.eval_dataset[dataset]
        if not isinstance(dataset, IterableDataset):
            return super().get_eval_dataloader(eval_dataset)
        stream = repeat_stream(dataset.shuffle(seed=self.args.seed), group_size=self._group_size("eval"))
        return super().get_eval_dataloader(stream)

    def _get_eval_sampler(self, eval_dataset: Dataset) -> Sampler:
        return RepeatSampler(eval_dataset, group_size=self._group_size("eval"), seed=self.args.seed)

    def _group_size(self, mode: str) -> int:
        return (mode == "eval" and self.args.num_generations_eval) or self.args.num_generations

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    def _phase(self, name: str) -> contextlib.AbstractContextManager:
        """Time a phase of a training step; evaluation is timed as a whole, elsewhere."""
        return self.recorder.phase(name) if self._mode == "train" else contextlib.nullcontext()

    # A training step

    def train(self, *args, **kwargs):
        self._step, self._micro_batches = None, None
        return super().train(*args, **kwargs)

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self._step is None:
            self._step = self._micro_batches_before()
        start = time.perf_counter()
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._step += 1
        self._step_time += time.perf_counter() - start
        if self._step % self.current_gradient_accumulation_steps == 0:
            self._metrics["train"]["step_time"].append(self._step_time)
            self._step_time = 0.0
        return loss

    def _micro_batches_before(self) -> int:
        """Micro-batches up to the step that a checkpoint resumes from, so that generation keeps its rhythm."""
        accumulation = self.args.gradient_accumulation_steps
        if isinstance(self.train_dataset, IterableDataset):
            return self.state.global_step * accumulation
        per_epoch = len(self.callback_handler.train_dataloader)
        epochs, steps = divmod(self.state.global_step, math.ceil(per_epoch / accumulation))
        return epochs * per_epoch + steps * accumulation

    def _prepare_inputs(self, rows: Any) -> Any:
        """The completions to take the loss on, a `RolloutBatch`: sampled now, or left of the last generation batch."""
        if self._mode == "eval":
            return self._sample_and_score(rows)
        steps = self.args.steps_per_generation
        if self._step % (steps * self.args.num_iterations) == 0 or self._micro_batches is None:
            self._micro_batches = self._sample_and_score(rows).shuffled().split(steps)
        return self._micro_batches[self._step % steps]

    def _sample_and_score(self, rows: list[dict[str, Any]]) -> RolloutBatch:
        """Sample a completion per row (a prompt's G rows stand together), score them, compute their advantages."""
        mode, args = self._mode, self.args
        temperature, cap = args.temperature, args.max_completion_length
        prompts = [row["prompt"] for row in rows]
        prompt_ids = self._tokenize(prompts)
        with self._phase("generate"):
            completion_ids = self._generate(prompt_ids)
        completions = self._decode(completion_ids, conversational=is_messages(prompts[0]))
        finished = self._finished(completion_ids)
        self._log_lengths(mode, prompt_ids, completion_ids, finished)

        batch = self._batch(prompt_ids, completion_ids, finished, temperature, cap)
        if self._policy_moves_before_use():
            batch.old_logps = self._logps_without_grad(self.model, batch)
        if args.beta != 0.0:
            batch.ref_logps = self._reference_logps(batch)

        with self._phase("score"):
            per_function = self._score(rows, prompts, completions, completion_ids)  # (N, K) over all processes
        found = self._advantages(per_function, self._group_size(mode))
        local = slice(self.accelerator.process_index * len(rows), (self.accelerator.process_index + 1) * len(rows))
        batch.advantages = found.advantages[local]

        self._log_rewards(mode, per_function, found)
        self._log_texts(mode, prompts, completions, per_function, found)
        if mode == "train":
            self._record(prompt_ids, completion_ids, finished, per_function, found, cap)
        return batch

    def _tokenize(self, prompts: list) -> list[list[int]]:
        if not is_messages(prompts[0]):
            return self.processing_class(text=prompts)["input_ids"]
        return self.processing_class.apply_chat_template(
            conversation=prompts,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            **(self.args.chat_template_kwargs or {}),
        )["input_ids"]

    def _generate(self, prompt_ids: list[list[int]]) -> list[list[int]]:
        """One completion (token ids) per prompt. Override to sample by other means."""
        model = self.accelerator.unwrap_model(self.model_wrapped)
        return generate(model, self.processing_class, prompt_ids, self.args, self.eos_token_ids)

    def _decode(self, completion_ids: list[list[int]], conversational: bool) -> list:
        texts = self.processing_class.batch_decode(completion_ids, skip_special_tokens=True)
        return [[{"role": "assistant", "content": text}] for text in texts] if conversational else texts

    def _finished(self, completion_ids: list[list[int]]) -> list[bool]:
        """Whether each completion ended by itself, and was not cut at the cap."""
        ends = {*self.eos_token_ids, self.processing_class.pad_token_id}
        return [ids[-1] in ends for ids in completion_ids]

    def _batch(
        self,
        prompt_ids: list[list[int]],
        completion_ids: list[list[int]],
        finished: list[bool],
        temperature: float,
        cap: int,
    ) -> RolloutBatch:
        device, pad_id = self.accelerator.device, self.processing_class.pad_token_id
        multiple = self.args.pad_to_multiple_of
        padded_prompts, prompt_mask = pad_ids(prompt_ids, pad_id, "left", multiple)
        padded_completions, completion_mask = pad_ids(completion_ids, pad_id, "right", multiple)
        if self.args.mask_truncated_completions:
            completion_mask = completion_mask * torch.tensor(finished).long().unsqueeze(1)
        completion_mask = completion_mask.to(device)
        return RolloutBatch(
            prompt_ids=padded_prompts.to(device),
            prompt_mask=prompt_mask.to(device),
            completion_ids=padded_completions.to(device),
            completion_mask=completion_mask,
            advantages=torch.zeros(len(prompt_ids), device=device),
            active_tokens=self.accelerator.gather(completion_mask.sum()).sum(),
            temperature=temperature,
            max_completion_length=cap,
        )

    def _policy_moves_before_use(self) -> bool:
        """Whether some micro-batch is trained on after an optimizer step has changed the policy that sampled it."""
        return self.args.gradient_accumulation_steps % (self.args.steps_per_generation * self.args.num_iterations) != 0

    def _score(self, rows: list[dict[str, Any]], prompts: list, completions: list, completion_ids: list) -> Tensor:
        """Rewards of each function, (N, K) over all processes; NaN where a function does not apply."""
        columns = {name: [row[name] for row in rows] for name in rows[0] if name not in _RESERVED_COLUMNS}
        functions = {name: f for name, f in self.reward_funcs.items() if not isinstance(f, nn.Module)}
        rewards = call_reward_functions(
            functions,
            len(rows),
            prompts=prompts,
            completions=completions,
            completion_ids=completion_ids,
            **columns,
            trainer_state=self.state,
            log_extra=lambda column, values: self._pending_extra[column].extend(values),
            log_metric=self._log_metric,
        )
        for name, tokenizer in self.reward_tokenizers.items():
            scores = self._model_rewards(self.reward_funcs[name], tokenizer, prompts, completions)
            rewards[name] = checked_rewards(name, scores, len(rows))
        columns_of_k = [torch.as_tensor(rewards[name], dtype=torch.float32) for name in self.reward_funcs]
        per_function = torch.stack(columns_of_k, dim=1).to(self.accelerator.device)
        unscorable = int(torch.isnan(per_function).all(dim=1).sum())
        if unscorable:
            logger.warning(
                f"{unscorable} of {len(rows)} completions got None from every reward function "
                f"({', '.join(self.reward_funcs)}) and teach nothing; at least one function should score each."
            )
        return self.accelerator.gather(per_function)

    def _model_rewards(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: list, completions: list
    ) -> list[float]:
        if not is_messages(prompts[0]):
            texts = [prompt + completion for prompt, completion in zip(prompts, completions)]
        else:
            texts = [
                tokenizer.apply_chat_template(
                    prompt + completion, tokenize=False, **(self.args.chat_template_kwargs or {})
                )
                for prompt, completion in zip(prompts, completions)
            ]
        inputs = tokenizer(
            text=texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False
        ).to(self.accelerator.device)
        with torch.inference_mode():
            return model(**inputs).logits[:, 0].float().tolist()

    def _advantages(self, per_function: Tensor, group_size: int) -> group_advantages.GroupAdvantages:
        weights = self._reward_weights()
        if self.args.multi_objective_aggregation == "normalize_then_sum":
            return group_advantages.normalize_then_sum(per_function, weights, group_size)
        return group_advantages.sum_then_normalize(per_function, weights, group_size, self.args.scale_rewards)

    # Log-probabilities

    def _token_scores(
        self, model: nn.Module, batch: RolloutBatch, want: tuple[str, ...] = (), entropy_grad: bool = False
    ) -> tuple[Tensor, Any, Tensor | None]:
        """(log-probabilities, entropies, load-balancing loss) of the completion tokens: (N, T), (N, T) if wanted,
        scalar for mixtures of experts."""
        inner = self.accelerator.unwrap_model(model)
        ids = torch.cat([batch.prompt_ids, batch.completion_ids], dim=1)
        mask = torch.cat([batch.prompt_mask, batch.completion_mask], dim=1)
        length = batch.completion_ids.size(1)
        labels = ids.masked_fill(mask == 0, IGNORE_INDEX)
        labels[:, :-length] = IGNORE_INDEX
        inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
        if self._takes_position_ids:
            # Counted from the first real token, as `generate` does; learned positions would be off by the padding.
            inputs["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)
        with_aux_loss = bool(self.aux_loss_coef and want)
        if with_aux_loss:
            inputs["output_router_logits"] = True
        with self.accelerator.autocast():
            scores, output = label_scores(
                model,
                inputs,
                labels,
                unwrapped=inner,
                temperature=batch.temperature,
                want=want,
                entropy_grad=entropy_grad,
                fp32_head=self.args.cast_lm_head_to_fp32,
            )
        entropy = None if scores.entropy is None else scores.entropy[:, -length:]
        return scores.logps[:, -length:], entropy, output["aux_loss"] if with_aux_loss else None

    def _logps_without_grad(self, model: nn.Module, batch: RolloutBatch) -> Tensor:
        """Log-probabilities (N, T) under the model without dropout, a micro-batch at a time."""
        mode = self._mode
        size = self.args.per_device_train_batch_size if mode == "train" else self.args.per_device_eval_batch_size
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad():
                parts = [
                    self._token_scores(model, batch.select(slice(start, start + size)))[0]
                    for start in range(0, len(batch), size)
                ]
        finally:
            model.train(was_training)
        return torch.cat(parts)

    def _reference_logps(self, batch: RolloutBatch) -> Tensor:
        if self.ref_model is None and not is_peft_model(self.model):
            raise ValueError(
                f"beta is {self.args.beta}, but the run started with beta=0 and holds no reference model; start a new "
                "run with beta set."
            )
        with reference_policy(self) as model:
            return self._logps_without_grad(model, batch)

    # The loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if return_outputs:
            raise ValueError("return_outputs is True, but GRPOTrainer has no outputs to return; leave it False.")
        batch: RolloutBatch = inputs
        args, mode = self.args, self._mode
        mask, advantages = batch.completion_mask, batch.advantages.unsqueeze(1)
        epsilon_high = args.epsilon if args.epsilon_high is None else args.epsilon_high

        logps, entropies, aux_loss = self._token_scores(
            model, batch, want=("entropy",), entropy_grad=args.entropy_coef != 0.0
        )
        log_ratio = logps - (logps.detach() if batch.old_logps is None else batch.old_logps)
        ratio = policy.importance_log_weights(log_ratio, mask, args.importance_sampling_level).exp()

        token_loss = policy.clipped_surrogate(ratio, advantages, args.epsilon, epsilon_high, args.delta)
        if args.off_policy_mask_threshold is not None:
            token_loss = token_loss * policy.on_policy_sequences(
                advantages, log_ratio, mask, args.off_policy_mask_threshold
            )
        used = mask
        if args.top_entropy_quantile < 1.0:
            used = mask * policy.high_entropy_tokens(entropies, mask, args.top_entropy_quantile)
            token_loss = token_loss * used
        kl = None
        if args.beta != 0.0 and batch.ref_logps is not None:
            kl = policy.k3(batch.ref_logps, logps)
            kl = kl * ratio if args.use_bias_correction_kl else kl
            token_loss = token_loss + args.beta * kl

        # In evaluation a batch is neither split nor accumulated.
        micro_batches = self.current_gradient_accumulation_steps if mode == "train" else 1.0
        active_tokens = batch.active_tokens.clamp(min=1.0) / self.accelerator.num_processes
        if mode == "train":  # `batch.active_tokens` counts the generation batch; one step uses this share of it
            active_tokens = active_tokens * micro_batches / args.steps_per_generation
        by = policy.Normaliser(micro_batches, active_tokens, batch.max_completion_length)
        policy_loss, loss = policy.POLICY_LOSSES[args.loss_type](token_loss, mask, by)
        if args.entropy_coef != 0.0:
            bonus = (entropies * used).sum() / used.sum().clamp(min=1.0)
            loss = loss - args.entropy_coef * bonus / micro_batches
            self._log(mode, "policy_loss", self.accelerator.gather(policy_loss).nanmean())
            if mode == "train" and self.accelerator.sync_gradients:
                self._log(mode, "entropy_coef", args.entropy_coef)
        if aux_loss is not None:
            loss = loss + self.aux_loss_coef * aux_loss / micro_batches
            self._log(mode, "aux_loss", self.accelerator.gather_for_metrics(aux_loss.detach()).mean())

        with torch.no_grad():
            bounded = ratio if args.delta is None else ratio.clamp(max=args.delta)
            self._log_loss(
                mode, mask, entropies, kl, policy.clip_fractions(bounded, advantages, args.epsilon, epsilon_high)
            )
        if mode == "train" and batch.old_logps is not None:
            self._record_log_ratio(log_ratio, mask)
        return loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        batch = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, batch)
        return loss.mean().detach(), None, None

    # Logging. `_metrics[mode][name]` collects values until `log` averages them.

    def _log(self, mode: str, name: str, value: Tensor | float) -> None:
        self._metrics[mode][name].append(float(value))

    def _log_metric(self, name: str, value: Any) -> None:
        """What reward functions call as `log_metric`. A slip in a metric must not end a run."""
        number = as_number(value)
        if number is not None:
            self._pending_metrics[name].append(number)
        elif name not in self._not_numbers:
            self._not_numbers.add(name)
            logger.warning(f"log_metric({name!r}) got a {type(value).__name__}, not a number; it is left out.")

    def _log_lengths(self, mode: str, prompt_ids: list, completion_ids: list, finished: list[bool]) -> None:
        lengths = self._gathered([[len(p), len(c), done] for p, c, done in zip(prompt_ids, completion_ids, finished)])
        completion, done = lengths[:, 1].float(), lengths[:, 2].bool()
        if mode == "train":
            self.state.num_input_tokens_seen += int(lengths[:, :2].sum())
        self._metrics[mode]["num_tokens"] = [self.state.num_input_tokens_seen]
        terminated = completion[done] if done.any() else torch.zeros(1)
        for kind, values in (("", completion), ("terminated_", terminated)):
            self._log(mode, f"completions/mean_{kind}length", values.mean())
            self._log(mode, f"completions/min_{kind}length", values.min())
            self._log(mode, f"completions/max_{kind}length", values.max())
        self._log(mode, "completions/clipped_ratio", (~done).float().mean())

    def _log_rewards(self, mode: str, per_function: Tensor, found: group_advantages.GroupAdvantages) -> None:
        for name, rewards in zip(self.reward_funcs, per_function.T):
            self._log(mode, f"rewards/{name}/mean", torch.nanmean(rewards))
            self._log(mode, f"rewards/{name}/std", group_advantages.nan_std(rewards))
        self._log(mode, "reward", torch.nanmean(found.rewards))
        self._log(mode, "reward_std", group_advantages.nan_std(found.rewards))
        no_spread = torch.isclose(found.std, torch.zeros_like(found.std))
        self._log(mode, "frac_reward_zero_std", no_spread.float().mean())

    def _log_texts(
        self,
        mode: str,
        prompts: list,
        completions: list,
        per_function: Tensor,
        found: group_advantages.GroupAdvantages,
    ) -> None:
        """Keep the completions for the table, and what reward functions handed to `log_extra` and `log_metric`."""
        kept, rows_before = self._logs, len(self._logs["prompt"])
        kept["prompt"].extend(gather_object(prompts))
        kept["completion"].extend(gather_object(completions))
        for name, rewards in zip(self.reward_funcs, per_function.T):
            kept["rewards"][name].extend(rewards.tolist())
        kept["advantages"].extend(found.advantages.tolist())
        self._logs_are_new = True
        # Sorted, so that all processes gather in the same order. A column stays aligned with the prompts even if it is
        # not logged for every batch.
        for column in sorted({*gather_object(list(self._pending_extra)), *kept["extra"]}):
            values = self._pending_extra.get(column, [None] * len(prompts))
            if len(values) != len(prompts):
                raise ValueError(
                    f"log_extra({column!r}) got {len(values)} values for {len(prompts)} completions; pass one for each."
                )
            kept["extra"][column].extend([None] * (rows_before - len(kept["extra"][column])))
            kept["extra"][column].extend(gather_object(values))
        for name in sorted(set(gather_object(list(self._pending_metrics)))):
            values = gather_object(self._pending_metrics.get(name, []))
            self._log(mode, name, sum(values) / len(values))
        self._pending_extra.clear()
        self._pending_metrics.clear()

    def _log_loss(
        self, mode: str, mask: Tensor, entropies: Tensor, kl: Tensor | None, clipped: Sequence[Tensor]
    ) -> None:
        def mean(values: Tensor) -> Tensor:
            total, count = self.accelerator.reduce(torch.stack(policy.masked_mean(values, mask)), reduction="sum")
            return total / count.clamp(min=1.0)

        if kl is not None:
            self._log(mode, "kl", mean(kl))
        self._log(mode, "entropy", mean(entropies))
        low, high, either = clipped
        self._log(mode, "clip_ratio/low_mean", mean(low))
        self._log(mode, "clip_ratio/high_mean", mean(high))
        self._log(mode, "clip_ratio/region_mean", mean(either))
        # A completion that is masked out has no share of clipped tokens.
        lows, highs = (self.accelerator.gather(policy.masked_mean_by_sequence(x, mask)) for x in (low, high))
        self._log(mode, "clip_ratio/low_min", min(lows[~lows.isnan()].tolist(), default=math.nan))
        self._log(mode, "clip_ratio/high_max", max(highs[~highs.isnan()].tolist(), default=math.nan))

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        mode = self._mode
        prefix = "eval_" if mode == "eval" else ""
        for name, values in self._metrics[mode].items():
            known = [value for value in values if not math.isnan(value)]
            logs[prefix + name] = sum(known) / len(known) if known else None
        super().log(logs, start_time)
        self._metrics[mode].clear()
        if self.args.log_completions and self.accelerator.is_main_process and self._logs_are_new:
            self._show_completions()
            self._logs_are_new = False

    def _show_completions(self) -> None:
        """Print the completions of the latest batch and write them beside the checkpoints (and to wandb, trackio)."""
        logs, step = self._logs, self.state.global_step
        columns = {name: list(logs[name]) for name in ("prompt", "completion", "advantages")}
        rewards = {name: list(values) for name, values in logs["rewards"].items()}
        extra = {name: list(map(_tabular, values)) for name, values in logs["extra"].items()}
        print_completions(
            columns["prompt"],
            columns["completion"],
            columns["advantages"],
            rewards,
            extra,
            step,
            self.args.num_completions_to_print,
        )
        table = pd.DataFrame(
            {
                "step": [step] * len(columns["prompt"]),
                "prompt": columns["prompt"],
                "completion": columns["completion"],
                **rewards,
                **extra,
                "advantage": columns["advantages"],
            }
        )
        folder = os.path.join(self.args.output_dir, "completions")
        os.makedirs(folder, exist_ok=True)
        table.to_parquet(os.path.join(folder, f"completions_{step:05d}.parquet"))
        for name in ("wandb", "trackio"):
            # Trainer's own integration has imported and started it by now.
            backend = sys.modules.get(name) if name in (self.args.report_to or []) else None
            if backend is None or (name == "wandb" and backend.run is None):
                continue
            if self.args.log_unique_prompts:
                table = table[~table["prompt"].astype(str).duplicated()]
            backend.log({"completions": backend.Table(dataframe=table)})

    # What the diagnostics see beyond the metrics

    def _record(
        self,
        prompt_ids: list,
        completion_ids: list,
        finished: list[bool],
        per_function: Tensor,
        found: group_advantages.GroupAdvantages,
        cap: int,
    ) -> None:
        """Hand over the rewards of each group and a few facts of this generation batch (all processes' together)."""
        group = self.args.num_generations
        columns = {name: rewards.view(-1, group).tolist() for name, rewards in zip(self.reward_funcs, per_function.T)}
        self.recorder.rewards(found.rewards.view(-1, group).tolist(), columns)

        completion_ids = gather_object(completion_ids)
        lengths = torch.tensor([len(ids) for ids in completion_ids], dtype=torch.float32)
        prompt_lengths = torch.tensor([len(ids) for ids in gather_object(prompt_ids)], dtype=torch.float32)
        done = torch.tensor(gather_object(finished))
        n = len(completion_ids)
        groups = [completion_ids[start : start + group] for start in range(0, n, group)]
        count = self.recorder.count

        def record(name: str, value: Tensor | float) -> None:
            self.recorder.set(name, float(value))

        record("num_completions", n)
        record("num_prompts", len(groups))
        record("prompts/p95_length", torch.quantile(prompt_lengths, 0.95))
        if done.any():
            record("completions/p50_terminated_length", torch.quantile(lengths[done], 0.50))
            record("completions/p99_terminated_length", torch.quantile(lengths[done], 0.99))
        for name, chosen in (("truncated", ~done), ("terminated", done)):
            rewards = found.rewards.cpu()[chosen]
            if not torch.isnan(rewards).all():
                record(f"completions/{name}_reward", torch.nanmean(rewards))
        count("completions/at_cap", int((lengths >= cap).sum()), n)
        count("completions/duplicate_share", sum(len(ids) - len(set(map(tuple, ids))) for ids in groups), n)
        count("advantages/zero_share", int((found.advantages.abs() < 1e-8).sum()), n)
        record("advantages/abs_mean", found.advantages.abs().mean())

    def _record_log_ratio(self, log_ratio: Tensor, mask: Tensor) -> None:
        statistics = policy.log_ratio_statistics(log_ratio, mask)
        names = {
            "p01": "log_ratio/p01",
            "p99": "log_ratio/p99",
            "abs_mean": "log_ratio/abs_mean",
            "ess": "ratio/ess",
            "approx_kl": "policy/approx_kl",
        }
        for statistic, name in names.items():
            if statistic in statistics:
                self.recorder.set(name, statistics[statistic])

    def _gathered(self, rows: list[list[int]]) -> Tensor:
        return self.accelerator.gather(torch.tensor(rows, device=self.accelerator.device)).cpu()


# Columns that reward functions get under other names, or that would collide with what they get.
_RESERVED_COLUMNS = ("prompt", "completion", "completion_ids")


def _identity(rows: Any) -> Any:
    return rows


def _check_dataset(name: str, dataset: Any) -> None:
    if dataset is None:
        raise ValueError(f"`{name}` is missing; pass a datasets.Dataset with a column 'prompt'.")
    if not isinstance(dataset, (Dataset, IterableDataset)):
        raise TypeError(
            f"`{name}` is a {type(dataset).__name__}; pass a datasets.Dataset (Dataset.from_list makes one of rows)."
        )
    columns = column_names(dataset, name)
    if "prompt" not in columns:
        raise ValueError(f"`{name}` has the columns {', '.join(columns)}, but no 'prompt'; rename or add it.")


def _tabular(value: Any) -> Any:
    """A value as a column of mixed values can hold it."""
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _unused(name: str, taken: dict[str, Any]) -> str:
    """The name, or with a number behind it if it is taken: two lambdas must not share a metric."""
    number = 2
    unused = name
    while unused in taken:
        unused, number = f"{name}_{number}", number + 1
    return unused


def _takes_position_ids(model: Any) -> bool:
    if is_peft_model(model):
        if model.active_peft_config.is_prompt_learning:
            return False
        model = model.get_base_model()
    return "position_ids" in inspect.signature(model.forward).parameters


def _cast_head_to_fp32(model: Any) -> None:
    """Put the output head in float32 and feed it float32 (ScaleRL, arXiv 2510.13786)."""
    base = model.get_base_model() if is_peft_model(model) else model
    head = base.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ValueError(
            f"cast_lm_head_to_fp32 is True, but the output head is a {type(head).__name__}, not a linear layer; leave "
            "the head out of the adapter's target_modules, or set it to False."
        )
    dtype = head.weight.dtype
    head.float()
    head.register_forward_pre_hook(lambda module, args: (args[0].float(), *args[1:]))
    if base.config.tie_word_embeddings:
        base.get_input_embeddings().register_forward_hook(lambda module, args, output: output.to(dtype))
