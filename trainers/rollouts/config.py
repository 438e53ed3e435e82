"""Settings that trainers share because they sample completions: how to sample, with what, and what to show of it."""

from dataclasses import dataclass, field
from typing import Any

from outspoken.trainers.config import OutspokenConfig, live_field, live_fields
from outspoken.trainers.setup import parse_pad_to_multiple_of

VLLM_MODES = ("colocate", "server")


@dataclass
class SamplingConfig(OutspokenConfig):
    """Settings of every trainer that samples: those of `transformers.TrainingArguments` and the following.

    Names and defaults are TRL 1.16's; those that TRL does not have say so. Fields marked live may be changed while the
    run trains.
    """

    learning_rate: float = live_field(1e-6, "Peak learning rate.", minimum=0.0, maximum=1.0)

    # Model
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Keyword arguments of `from_pretrained`, where `model` is a path or hub name."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Allow models and tokenizers that bring their own Python code."}
    )
    disable_dropout: bool = field(default=False, metadata={"help": "Set every dropout of the models to 0."})

    # Data
    remove_unused_columns: bool | None = field(  # type: ignore[assignment]
        default=False, metadata={"help": "Drop all columns but `prompt`; reward functions then see no other column."}
    )
    shuffle_dataset: bool | None = field(default=True, metadata={"help": "Draw the prompts in random order."})
    pad_to_multiple_of: int | str | None = field(
        default="auto", metadata={"help": "Pad prompts and completions to a multiple of this. 'auto': do not."}
    )

    # Sampling
    max_completion_length: int = live_field(
        512, "Completions are cut after this many tokens.", minimum=1, maximum=1_000_000
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
        default=None,
        metadata={
            "help": "More settings of the sampler, such as `stop` or `seed`: fields of transformers' "
            "`GenerationConfig`, or of vLLM's `SamplingParams` with `use_vllm`; they win over the settings above."
        },
    )
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Keyword arguments of the tokenizer's `apply_chat_template`."}
    )
    cache_implementation: str | None = field(
        default=None,
        metadata={"help": "Key-value cache that transformers' `generate` uses. Unset: the trainer's own sampler."},
    )
    use_transformers_continuous_batching: bool = field(
        default=False,
        metadata={"help": "Sample with transformers' continuous batching instead of the trainer's own sampler."},
    )
    transformers_continuous_batching_config: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Keyword arguments of transformers' `ContinuousBatchingConfig`."}
    )
    use_transformers_paged: bool = field(
        default=False, metadata={"help": "Older name of `use_transformers_continuous_batching`."}
    )
    ds3_gather_for_generation: bool = field(
        default=True,
        metadata={
            "help": "Under ZeRO-3, gather all weights once to sample (fast), or layer by layer at every token (False: "
            "models that fit no device whole)."
        },
    )

    # vLLM
    use_vllm: bool = field(default=False, metadata={"help": "Sample with vLLM."})
    vllm_mode: str = field(
        default="colocate",
        metadata={"help": "'colocate': inside the training processes. 'server': by a running `outspoken vllm-serve`."},
    )
    vllm_model_impl: str = field(
        default="vllm", metadata={"help": "Model code that vLLM runs: 'vllm', 'transformers'."}
    )
    vllm_enable_sleep_mode: bool = field(
        default=False, metadata={"help": "Colocated vLLM frees its memory while the model trains."}
    )
    vllm_structured_outputs_regex: str | None = field(
        default=None, metadata={"help": "Regular expression that every completion has to match."}
    )
    vllm_server_base_url: str | None = field(
        default=None, metadata={"help": "URL of the server; it wins over `vllm_server_host` and `vllm_server_port`."}
    )
    vllm_server_host: str = field(default="0.0.0.0", metadata={"help": "Host of the server."})
    vllm_server_port: int = field(default=8000, metadata={"help": "Port of the server."})
    vllm_server_timeout: float = field(
        default=240.0, metadata={"help": "Seconds to wait for the server to come up, or to come back."}
    )
    vllm_group_port: int = field(
        default=51216, metadata={"help": "Port over which GPUs exchange weights with the server."}
    )
    vllm_gpu_memory_utilization: float = field(
        default=0.3, metadata={"help": "Share of the GPU's memory that colocated vLLM may take."}
    )
    vllm_max_model_length: int | None = field(
        default=None, metadata={"help": "Longest prompt and completion together, for colocated vLLM."}
    )
    vllm_tensor_parallel_size: int = field(
        default=1, metadata={"help": "Training processes that share one colocated vLLM engine."}
    )

    # Logging
    log_completions: bool = field(
        default=False,
        metadata={"help": "At each log, print completions and write them to <output_dir>/completions/*.parquet."},
    )
    log_multimodal: bool = field(
        default=True, metadata={"help": "Put images into the table of completions sent to wandb or trackio."}
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
        "transformers_continuous_batching_config",
    ]

    def __post_init__(self):
        super().__post_init__()
        self.pad_to_multiple_of = parse_pad_to_multiple_of(self.pad_to_multiple_of)
        if self.use_transformers_paged:
            self.use_transformers_continuous_batching = True
        refuse_unbatchable(self)
        check_choice(self, "vllm_mode", VLLM_MODES)
        check_live_bounds(self)
        if self.use_vllm and self.use_transformers_continuous_batching:
            raise ValueError(
                "use_vllm and use_transformers_continuous_batching are both set; completions are sampled by one of "
                "them, so set the other to False."
            )
        if self.transformers_continuous_batching_config and not self.use_transformers_continuous_batching:
            raise ValueError(
                "transformers_continuous_batching_config is set, but use_transformers_continuous_batching is False; "
                "set that to True, or leave the config out."
            )


@dataclass
class GroupConfig(SamplingConfig):
    """What GRPO and RLOO share: several completions per prompt, compared with each other by reward functions."""

    router_aux_loss_coef: float | None = field(
        default=None,
        metadata={
            "help": "Weight of the load-balancing loss of mixture-of-experts models. Unset: what the model's config "
            "says; 0: none."
        },
    )

    # Groups
    num_generations: int = field(default=8, metadata={"help": "Completions sampled per prompt: the group size G."})
    num_generations_eval: int | None = field(
        default=None, metadata={"help": "Completions per prompt in evaluation. Unset: `num_generations`."}
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
    num_iterations: int = field(default=1, metadata={"help": "Passes over each generation batch (mu in the paper)."})
    share_prompts: bool = field(
        default=True,
        metadata={
            "help": "Compute the prompt of a group once for its completions where the model allows it: the same "
            "numbers, faster. Not in TRL."
        },
    )

    # Objective
    epsilon: float = live_field(0.2, "Ratios are clipped below 1 - epsilon.", minimum=0.0, maximum=1.0)
    epsilon_high: float | None = live_field(
        None, "Ratios are clipped above 1 + epsilon_high. Unset: as `epsilon`.", minimum=0.0
    )
    reward_weights: list[float] | None = live_field(None, "A weight per reward function. Unset: all 1.")  # noqa: RUF009
    mask_truncated_completions: bool = live_field(
        False, "Leave completions that hit max_completion_length out of the loss.", choices=(True, False)
    )
    sync_ref_model: bool = field(
        default=False,
        metadata={"help": "Every `ref_model_sync_steps`, move the reference model towards the policy (TR-DPO)."},
    )
    ref_model_mixup_alpha: float = live_field(
        0.6, "With `sync_ref_model`: reference = alpha * policy + (1 - alpha) * reference.", minimum=0.0, maximum=1.0
    )
    ref_model_sync_steps: int = live_field(512, "Steps between two moves of the reference model.", minimum=1)

    # Calling reward functions
    reward_timeout: float | None = field(
        default=None,
        metadata={
            "help": "Seconds that a call of one reward function may take; then it is tried again, or fails. Unset: as "
            "long as it takes. Not in TRL."
        },
    )
    reward_max_retries: int = field(
        default=0, metadata={"help": "How often a failed call of a reward function is repeated. Not in TRL."}
    )
    reward_on_error: str = field(
        default="raise",
        metadata={
            "help": "When a reward function fails for good: 'raise' ends the run (with a checkpoint), 'none' goes on as "
            "if it did not apply to these completions. Not in TRL."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if self.num_iterations < 1:
            raise ValueError(f"num_iterations is {self.num_iterations}; choose 1 or more.")
        if self.num_generations < 2:
            raise ValueError(
                f"num_generations is {self.num_generations}; advantages compare completions of the same prompt, so "
                "choose 2 or more."
            )
        check_choice(self, "reward_on_error", ("raise", "none"))
        if self.reward_timeout is not None and self.reward_timeout <= 0:
            raise ValueError(f"reward_timeout is {self.reward_timeout}; choose seconds above 0, or leave it unset.")
        if self.reward_max_retries < 0:
            raise ValueError(f"reward_max_retries is {self.reward_max_retries}; choose 0 or more.")
        if self.sync_ref_model and self.beta == 0.0:
            raise ValueError(
                "sync_ref_model is True, but beta is 0, so there is no reference model to move; set beta, or leave "
                "sync_ref_model False."
            )
        size_generation_batch(self)

    @property
    def policy_moves_before_use(self) -> bool:
        """Whether some micro-batch is trained on after an optimizer step has changed the policy that sampled it."""
        assert self.steps_per_generation is not None  # settled in __post_init__
        return self.gradient_accumulation_steps % (self.steps_per_generation * self.num_iterations) != 0

    @property
    def upper_epsilon(self) -> float:
        """Ratios are clipped above 1 plus this."""
        return self.epsilon if self.epsilon_high is None else self.epsilon_high

    @property
    def completions_per_process(self) -> int:
        """Completions of a generation batch on one process."""
        assert self.steps_per_generation is not None
        return self.per_device_train_batch_size * self.steps_per_generation


def refuse_unbatchable(args: Any) -> None:
    """Raise for settings that would break up a generation batch."""
    if args.auto_find_batch_size:
        raise ValueError(
            "auto_find_batch_size is True, but a smaller batch would break up the groups of num_generations "
            "completions; set it to False and lower per_device_train_batch_size yourself."
        )
    if args.use_liger_kernel:
        raise ValueError(
            "use_liger_kernel is True, but its kernels cannot sample with a cache of keys and values; leave it False."
        )


def check_choice(args: Any, name: str, allowed: tuple[str, ...]) -> None:
    """Raise unless the setting is one of the allowed words."""
    value = getattr(args, name)
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; choose one of {', '.join(map(repr, allowed))}.")


def check_live_bounds(args: Any) -> None:
    """Raise unless every live number lies within its bounds."""
    for name, bounds in live_fields(args).items():
        value = getattr(args, name)
        if value is None or bounds["choices"] is not None or isinstance(value, (list, tuple)):
            continue
        low, high = bounds["minimum"], bounds["maximum"]
        if (low is not None and value < low) or (high is not None and value > high):
            bound = f"at least {low}" if high is None else f"between {low} and {high}"
            raise ValueError(f"{name} is {value}; choose a value {bound}.")


def size_generation_batch(args: Any) -> None:
    """Settle `steps_per_generation` and `generation_batch_size`, and check that groups stay whole."""
    step_size = args.per_device_train_batch_size * args.world_size
    if args.generation_batch_size is not None and args.steps_per_generation is not None:
        if args.generation_batch_size != step_size * args.steps_per_generation:
            raise ValueError(
                f"generation_batch_size is {args.generation_batch_size} and steps_per_generation is "
                f"{args.steps_per_generation}; each follows from the other, so set only one of them."
            )
    elif args.generation_batch_size is not None:
        if args.generation_batch_size % step_size != 0:
            raise ValueError(
                f"generation_batch_size is {args.generation_batch_size}, which is not divisible by the "
                f"{step_size} completions of a step (per_device_train_batch_size={args.per_device_train_batch_size} "
                f"on {args.world_size} process(es)); choose a multiple of {step_size}."
            )
        args.steps_per_generation = args.generation_batch_size // step_size
    else:
        if args.steps_per_generation is None:
            args.steps_per_generation = args.gradient_accumulation_steps
        args.generation_batch_size = step_size * args.steps_per_generation
    if args.generation_batch_size % args.num_generations != 0:
        raise ValueError(
            f"generation_batch_size is {args.generation_batch_size} (per_device_train_batch_size="
            f"{args.per_device_train_batch_size} * {args.world_size} process(es) * steps_per_generation="
            f"{args.steps_per_generation}), which is not divisible by num_generations={args.num_generations}; "
            "change one of them so that groups stay whole."
        )
    if args.do_eval and args.eval_strategy != "no":
        group = args.num_generations_eval or args.num_generations
        if (args.per_device_eval_batch_size * args.world_size) % group != 0:
            raise ValueError(
                f"per_device_eval_batch_size is {args.per_device_eval_batch_size} on {args.world_size} process(es), "
                f"which is not divisible by the {group} completions per prompt in evaluation; change it, or "
                "set num_generations_eval."
            )
