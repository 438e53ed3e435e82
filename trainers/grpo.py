"""Group Relative Policy Optimization (GRPO, arXiv 2402.03300), and the recipes that differ from it by a setting.

One training step reads: sample completions, score them, turn rewards into advantages within each prompt's group, take
the clipped policy-gradient loss, log. The formulas live in `losses/policy.py`, `advantages.py` and `logprobs.py`,
sampling in `rollouts/`, reward functions in `rewards.py`.

Axes: `B` prompts of a generation batch, `G` completions per prompt, `N = B * G`, `P` prompt tokens, `T` completion
tokens, `K` reward functions.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import is_peft_model, set_seed
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, Trainer, TrainerCallback

from outspoken.trainers import advantages as group_advantages
from outspoken.trainers.completion_scores import needed_scores, prepare_scoring
from outspoken.trainers.config import as_config, live_field
from outspoken.trainers.data.vision import expect_unused_parameters
from outspoken.trainers.losses import policy
from outspoken.trainers.measuring import gather_rows
from outspoken.trainers.model_card import ModelCardMixin
from outspoken.trainers.rewards.reward_set import RewardSet
from outspoken.trainers.rollouts import measures, sampler
from outspoken.trainers.rollouts.batch import RolloutBatch
from outspoken.trainers.rollouts.config import GroupConfig, check_choice
from outspoken.trainers.rollouts.mixin import RewardMixin, identity, prepare_models
from outspoken.trainers.rollouts.replay import ReplayBuffer
from outspoken.trainers.rollouts.rollout import (
    Rollouts,
    RolloutWorker,
    as_batch,
    check_chat_template,
    check_number_of_prompts,
    check_prompts,
    prompts_of_environments,
)
from outspoken.trainers.rollouts.show import CompletionsLog
from outspoken.trainers.setup import finish_setup, prepare_processing

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import BitsAndBytesConfig

logger = logging.getLogger(__name__)

# A reward is a function, a sequence classifier with one label, or the path of one.
RewardFunc = str | PreTrainedModel | Callable[..., Any]

ADVANTAGE_ESTIMATORS = (
    "grpo",
    "rloo",
    "reinforce++",
    "reinforce++_baseline",
    "opo",
    "remax",
    "gpg",
    "best_of_group",
    "pass_at_k",
)


@dataclass
class GRPOConfig(GroupConfig):
    """Settings of `GRPOTrainer`: those of `transformers.TrainingArguments` and the following.

    Names and defaults are TRL 1.16's; those that TRL does not have say so. Fields marked live may be changed while the
    run trains.
    """

    cast_lm_head_to_fp32: bool = field(
        default=False, metadata={"help": "Keep the output head, and so the log-probabilities, in float32."}
    )

    # Objective
    beta: float = live_field(0.0, "Weight of the KL term against the reference model; 0: no such model.", minimum=0.0)
    kl_estimator: str = live_field(
        "k3", "Estimate of the KL term: 'k1', 'k2' or 'k3'. Not in TRL.", choices=tuple(policy.KL_ESTIMATORS)
    )
    use_bias_correction_kl: bool = field(
        default=True, metadata={"help": "Multiply the KL term by the importance ratio (DeepSeek-V3.2)."}
    )
    loss_type: str = live_field(
        "dapo",
        "The objective of a token, and how tokens are averaged. 'gmpo' and 'gpg' are not in TRL.",
        choices=tuple(policy.POLICY_LOSSES),
    )
    importance_sampling_level: str = field(
        default="token",
        metadata={
            "help": "'token': a ratio per token. 'sequence': one per completion (GSPO). 'sequence_token': that of the "
            "completion, differentiated by token (GSPO-token)."
        },
    )
    delta: float | None = live_field(
        None, "Upper bound of the ratio where the advantage is negative; above 1 + epsilon_high.", minimum=0.0
    )
    dual_clip: float | None = live_field(
        None,
        "Where the advantage is negative, the objective is at least this times it; above 1. Not in TRL.",
        minimum=1.0,
    )
    sapo_temperature_neg: float = live_field(
        1.05, "loss_type 'sapo': temperature of the gate where the advantage is not positive.", minimum=1e-3
    )
    sapo_temperature_pos: float = live_field(
        1.0, "loss_type 'sapo': temperature of the gate where the advantage is positive.", minimum=1e-3
    )
    vespo_k_pos: float = live_field(
        2.0, "loss_type 'vespo': exponent where the advantage is not negative.", minimum=0.0
    )
    vespo_lambda_pos: float = live_field(
        3.0, "loss_type 'vespo': decay where the advantage is not negative.", minimum=0.0
    )
    vespo_k_neg: float = live_field(3.0, "loss_type 'vespo': exponent where the advantage is negative.", minimum=0.0)
    vespo_lambda_neg: float = live_field(2.0, "loss_type 'vespo': decay where the advantage is negative.", minimum=0.0)

    # Advantages
    advantage_estimator: str = field(
        default="grpo",
        metadata={
            "help": "How rewards become advantages: 'grpo' (with `scale_rewards` and `multi_objective_aggregation`), "
            "'rloo', 'reinforce++', 'reinforce++_baseline', 'opo', 'remax', 'gpg', 'best_of_group', 'pass_at_k'. Not "
            "in TRL."
        },
    )
    pass_at_k: int | None = field(
        default=None, metadata={"help": "advantage_estimator 'pass_at_k': k, below num_generations. Not in TRL."}
    )
    pass_reward: float = live_field(
        1.0, "advantage_estimator 'pass_at_k': the reward from which a completion passes. Not in TRL."
    )
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

    # Which completions and tokens to train on
    dynamic_sampling: bool = live_field(
        False,
        "Replace groups whose rewards are all alike by groups of further prompts (DAPO). Not in TRL.",
        choices=(True, False),
    )
    dynamic_sampling_max_rounds: int = live_field(
        3, "dynamic_sampling: how often at most, per generation batch. Not in TRL.", minimum=1, maximum=100
    )
    replay_buffer_size: int = field(
        default=0,
        metadata={
            "help": "Keep so many informative groups per process, and train on them in place of groups whose rewards "
            "are all alike; 0: none. Not in TRL 1.16."
        },
    )
    top_entropy_quantile: float = live_field(
        1.0, "Share of tokens, those of highest entropy, that the policy loss uses.", minimum=0.0, maximum=1.0
    )
    off_policy_mask_threshold: float | None = live_field(
        None, "Drop completions with A < 0 whose mean log pi_old - log pi exceeds this. Unset: none.", minimum=0.0
    )
    covariance_control: str = field(
        default="none",
        metadata={
            "help": "What is done about tokens whose log-probability and advantage vary together most, which costs "
            "entropy: 'none', 'clip_cov' (they get no gradient) or 'kl_cov' (they are held). Not in TRL."
        },
    )
    clip_cov_ratio: float = live_field(2e-4, "clip_cov: share of tokens. Not in TRL.", minimum=0.0, maximum=1.0)
    clip_cov_min: float = live_field(1.0, "clip_cov: lowest covariance of such a token. Not in TRL.")
    clip_cov_max: float = live_field(5.0, "clip_cov: highest covariance of such a token. Not in TRL.")
    kl_cov_ratio: float = live_field(2e-3, "kl_cov: share of tokens. Not in TRL.", minimum=0.0, maximum=1.0)
    kl_cov_coef: float = live_field(1.0, "kl_cov: weight of what holds them. Not in TRL.", minimum=0.0)

    # Entropy bonus
    entropy_coef: float = live_field(0.0, "Weight of the entropy bonus.", minimum=0.0, maximum=1.0)
    use_adaptive_entropy: bool = field(
        default=False,
        metadata={
            "help": "After each step, raise the weight of the entropy bonus by `entropy_coef_delta` if the entropy is "
            "at most `entropy_target`, else lower it; the bonus counts while the entropy is that low (Skywork-OR1)."
        },
    )
    entropy_coef_min: float = live_field(0.0, "use_adaptive_entropy: lowest weight.", minimum=0.0)
    entropy_coef_max: float = live_field(1.0, "use_adaptive_entropy: highest weight.", minimum=0.0)
    entropy_coef_delta: float = live_field(0.005, "use_adaptive_entropy: by how much the weight changes.", minimum=0.0)
    entropy_target: float = live_field(
        0.2,
        "use_adaptive_entropy: the entropy to keep, in nats per token; set it near what the run starts with.",
        minimum=0.0,
    )

    # Another engine samples
    vllm_importance_sampling_correction: bool = field(
        default=True,
        metadata={"help": "Correct for the difference between the trainer's probabilities and those of vLLM."},
    )
    vllm_importance_sampling_mode: str = field(
        default="sequence_mask",
        metadata={
            "help": "How: by the ratio of each token or of the sequence; a ratio out of bounds is cut to them "
            "('token_truncate', 'sequence_truncate') or set to 0 ('token_mask', 'sequence_mask')."
        },
    )
    vllm_importance_sampling_clip_max: float | None = live_field(3.0, "Upper bound of these ratios.", minimum=0.0)
    vllm_importance_sampling_clip_min: float | None = live_field(None, "Lower bound of these ratios.", minimum=0.0)
    vllm_importance_sampling_cap: float | None = field(
        default=None, metadata={"help": "Older name of `vllm_importance_sampling_clip_max`."}
    )

    # Tools and environments
    max_tool_calling_iterations: int | None = field(
        default=None,
        metadata={"help": "Rounds of tool calls in one completion. Unset: up to the completion's length."},
    )
    tool_timeout: float | None = field(
        default=60.0,
        metadata={"help": "Seconds that a tool or an environment may take for one call. Unset: no bound. Not in TRL."},
    )

    log_completions_hub_repo: str | None = field(
        default=None, metadata={"help": "Dataset repository on the hub that logged completions are sent to."}
    )

    def __post_init__(self):
        # Booleans are its older form.
        self.scale_rewards = {"true": "group", "false": "none"}.get(
            str(self.scale_rewards).lower(), self.scale_rewards
        )
        if self.vllm_importance_sampling_cap is not None:
            self.vllm_importance_sampling_clip_max = self.vllm_importance_sampling_cap
        super().__post_init__()
        for name, allowed in (
            ("loss_type", tuple(policy.POLICY_LOSSES)),
            ("kl_estimator", tuple(policy.KL_ESTIMATORS)),
            ("scale_rewards", ("group", "batch", "none")),
            ("importance_sampling_level", policy.IMPORTANCE_LEVELS),
            ("multi_objective_aggregation", ("sum_then_normalize", "normalize_then_sum")),
            ("advantage_estimator", ADVANTAGE_ESTIMATORS),
            ("covariance_control", ("none", "clip_cov", "kl_cov")),
            ("vllm_importance_sampling_mode", policy.SAMPLER_CORRECTIONS),
        ):
            check_choice(self, name, allowed)
        self._check_combinations()

    def _check_combinations(self) -> None:
        if self.loss_type == "cispo" and self.epsilon_high is None:
            raise ValueError(
                "loss_type is 'cispo', which bounds the ratio by epsilon_high itself, but epsilon_high is unset; set "
                "it, to 5.0 as a start (the default of 0.2 would scale every gradient by 0.2)."
            )
        low, high = self.vllm_importance_sampling_clip_min, self.vllm_importance_sampling_clip_max
        if low is not None and high is not None and low >= high:
            raise ValueError(
                f"vllm_importance_sampling_clip_min is {low}, but vllm_importance_sampling_clip_max is {high}; choose a "
                "lower bound below the upper."
            )
        if low is None and high is None and self.vllm_importance_sampling_mode.endswith("truncate"):
            raise ValueError(
                f"vllm_importance_sampling_mode is {self.vllm_importance_sampling_mode!r}, but neither "
                "vllm_importance_sampling_clip_min nor vllm_importance_sampling_clip_max is set; set one."
            )
        if self.advantage_estimator != "grpo" and self.multi_objective_aggregation != "sum_then_normalize":
            raise ValueError(
                f"multi_objective_aggregation is {self.multi_objective_aggregation!r}, which is a way to compute GRPO's "
                f"advantages, but advantage_estimator is {self.advantage_estimator!r}; leave one at its default."
            )
        if self.advantage_estimator == "pass_at_k" and not (
            self.pass_at_k is not None and 1 <= self.pass_at_k < self.num_generations
        ):
            raise ValueError(
                f"advantage_estimator is 'pass_at_k', but pass_at_k is {self.pass_at_k}; choose a k from 1 to "
                f"{self.num_generations - 1}, below num_generations."
            )
        if self.replay_buffer_size < 0:
            raise ValueError(f"replay_buffer_size is {self.replay_buffer_size}; choose 0 or more.")
        for name, used in (
            ("replay_buffer_size", self.replay_buffer_size > 0),
            ("advantage_estimator='remax'", self.advantage_estimator == "remax"),
        ):
            if used and self.completions_per_process % self.num_generations != 0:
                raise ValueError(
                    f"{name} needs whole groups on every process, but a process samples "
                    f"{self.completions_per_process} completions "
                    f"(per_device_train_batch_size * steps_per_generation), not a multiple of num_generations="
                    f"{self.num_generations}; change one of them."
                )
        if self.log_completions_hub_repo is not None and not self.log_completions:
            raise ValueError(
                "log_completions_hub_repo is set, but log_completions is False; set that to True, or leave the "
                "repository out."
            )

    @property
    def corrects_sampler(self) -> bool:
        """Whether the loss is weighted by what the trainer's probabilities differ from the sampler's."""
        return self.use_vllm and self.vllm_importance_sampling_correction

    @property
    def entropy_bonus(self) -> bool:
        """Whether the loss has an entropy bonus."""
        return self.entropy_coef != 0.0 or self.use_adaptive_entropy


class GRPOTrainer(RewardMixin, ModelCardMixin, Trainer):
    """Trains a causal language model on rewards of its own completions, by GRPO (arXiv 2402.03300).

    Args:
        model: the model, or the path or hub name to load it from; a `PeftModel` trains its adapter.
        reward_funcs: what scores the completions, one or several: a function (see `outspoken.trainers.rewards`), a
            sequence classifier with one label, or the path of one. A function is called with keywords `prompts`,
            `completions`, `completion_ids`, the dataset's other columns, `trainer_state`, `log_extra(column, values)`
            and `log_metric(name, value)`, and returns one number (or None: not scorable) per completion. It may be left
            out where environments reward.
        args: a `GRPOConfig`; a `TrainingArguments`, or TRL's `GRPOConfig`, is converted.
        train_dataset: rows with a `prompt`: a string, or a list of messages; `image` or `images` beside it for a model
            that takes them. A stream (`IterableDataset`) needs `max_steps`.
        eval_dataset: like `train_dataset`, or several by name.
        processing_class: the tokenizer, or the processor of a model that takes images. Default: the one stored with the
            model.
        reward_processing_classes: tokenizers of the reward models, in the order of `reward_funcs`.
        callbacks, optimizers: as in `transformers.Trainer`.
        quantization_config: used where `model` is loaded from a path.
        peft_config: wraps the model in a fresh adapter.
        tools: functions that the model may call, with type hints and docstrings.
        rollout_func: `f(prompts, trainer)` samples in the trainer's place; see `rollouts/environments.py`.
        environment_factory: makes the environment of a completion, or several kinds of them by name.

    Raises:
        ValueError, TypeError: an argument is unusable; the message says what to change.
    """

    args: Any  # GRPOConfig

    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel",
        reward_funcs: RewardFunc | list[RewardFunc] | None = None,
        args: GRPOConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        reward_processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase | None] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: "BitsAndBytesConfig | None" = None,
        peft_config: "PeftConfig | None" = None,
        tools: list[Callable] | None = None,
        rollout_func: Callable | None = None,
        environment_factory: Callable | dict[str, Callable] | None = None,
    ):
        args = as_config(GRPOConfig, args, model, "GRPOTrainer")
        if train_dataset is None and environment_factory is not None:
            train_dataset = prompts_of_environments(args)
        check_prompts(train_dataset, eval_dataset, args, environments=environment_factory is not None)

        processing = prepare_processing(model, args, processing_class, trainer="GRPOTrainer", images=True)
        check_number_of_prompts(train_dataset, args)
        check_chat_template(processing, train_dataset)
        expect_unused_parameters(processing.processor, args)
        prepared, self.ref_model, self.aux_loss_coef = prepare_models(
            model, args, processing, quantization_config, peft_config
        )
        if args.cast_lm_head_to_fp32:
            for either in [prepared] if self.ref_model is None else [prepared, self.ref_model]:
                _cast_head_to_fp32(either)
        self._start_sampling()
        self._entropy_sums: Tensor | None = None  # (entropy, tokens) of this update step, for adaptive control
        self._last_entropy = math.inf
        self.entropy_coef = args.entropy_coef  # what adaptive control has made of it
        super().__init__(
            model=prepared,
            args=args,
            data_collator=identity,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing.processor,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        prepare_scoring(self)
        self._place_reference()
        self.rollouts = RolloutWorker(
            self,
            processing,
            tools=tools,
            rollout_func=rollout_func,
            environment_factory=environment_factory,
        )
        environments = self.rollouts.environments
        self.rewards = RewardSet(
            reward_funcs,
            reward_processing_classes,
            args,
            self.accelerator,
            environment_rewards=None if environments is None else environments.reward_functions(),
        )
        self.replay = ReplayBuffer(args.replay_buffer_size, args.num_generations)
        self.completions_log = CompletionsLog(args)

        # Processes must not draw the same completions.
        set_seed(args.seed, device_specific=True)

        finish_setup(self, "grpo")

    def _sample_and_score(self, rows: list[dict[str, Any]]) -> RolloutBatch:
        """Sample a completion per row (a prompt's G rows stand together), score them, compute their advantages."""
        mode, args = self._mode, self.args
        group = self._group_size(mode)
        temperature, cap = args.temperature, args.max_completion_length  # either may change while this runs
        with self._phase("generate"):
            rollouts = self.rollouts.sample(rows)
        with self._phase("score"):
            per_function = self._score(rollouts)
        # What is measured of the policy is of what was drawn first, before anything is replaced.
        names, weights = self.rewards.names, self.rewards.weights(args)
        rewards = group_advantages.weighted_sum(per_function, weights)
        measures.log_completions(self, mode, rollouts)
        measures.log_counts(self, mode, rollouts)
        measures.log_rewards(self, mode, per_function, rewards, names, group)
        if mode == "train":
            measures.record_completions(self, rollouts, rewards, per_function, names, group, cap, weights)
            if args.dynamic_sampling:
                per_function = self._resample(rollouts, per_function, group)

        batch = as_batch(self, rollouts, temperature, cap)
        self._add_logps(batch)
        found = self._advantages(batch, rollouts, per_function, group)
        local = slice(self.accelerator.process_index * len(rows), (self.accelerator.process_index + 1) * len(rows))
        batch.advantages = found.advantages[local]
        if batch.advantages.ndim == 2:  # as wide as the longest completion of all processes
            batch.advantages = batch.advantages[:, : batch.completion_ids.size(1)]
        self._log_texts(mode, rollouts, per_function, found.advantages)
        if mode == "train":
            measures.record_advantages(self, found.advantages)
            measures.record_speed(self)
            if args.replay_buffer_size:
                batch = self._replay(batch, found, local)
        return batch

    def _resample(self, rollouts: Rollouts, per_function: Tensor, group: int) -> Tensor:
        """Replace groups whose rewards are all alike by groups of further prompts (DAPO, arXiv 2503.14476), in place.

        All processes know all rewards, so they agree on the groups; each samples the completions that it holds.

        Returns:
            The rewards, (N, K) over all processes.
        """
        args, n = self.args, len(rollouts)
        weights = self.rewards.weights(args)
        offset = self.accelerator.process_index * n
        replaced, rounds = 0, 0
        is_stream = isinstance(self.train_dataset, IterableDataset)

        def without_spread() -> list[int]:
            rewards = group_advantages.weighted_sum(per_function, weights)
            return group_advantages.zero_variance_groups(rewards, group).nonzero().flatten().tolist()

        flat = without_spread()
        while flat and rounds < args.dynamic_sampling_max_rounds:
            rounds += 1
            replaced += len(flat)
            places = [i * group + j for i in flat for j in range(group)]
            mine = [place - offset for place in places if offset <= place < offset + n]
            if is_stream:  # its rows pass by once; the prompts get new completions
                rows = [rollouts.rows[i] for i in mine]
            else:
                assert self._step is not None
                batch_number = self._step // self._cycle
                numbers = sampler.more_prompts(len(self.train_dataset), len(flat), args.seed, batch_number, rounds)
                row_of = dict(zip(flat, numbers))
                rows = [self.train_dataset[row_of[(i + offset) // group]] for i in mine]
            with self._phase("generate"):
                fresh = self.rollouts.sample(rows)
            with self._phase("score"):
                scored = self._score(fresh, measured=False)
            rollouts.put(mine, fresh)
            per_function = per_function.clone()
            per_function[torch.tensor(places, device=per_function.device)] = scored
            flat = without_spread()
        groups = len(per_function) // group
        measures.log(self, "train", "dynamic_sampling/rounds", rounds)
        measures.log(self, "train", "dynamic_sampling/replaced_groups", replaced)
        measures.log(self, "train", "dynamic_sampling/left_share", len(flat) / groups)
        measures.log(self, "train", "dynamic_sampling/sampled_per_trained", (groups + replaced) / groups)
        return per_function

    def _replay(self, batch: RolloutBatch, found: group_advantages.GroupAdvantages, local: slice) -> RolloutBatch:
        """Put informative groups of earlier policies in the place of groups that teach nothing (arXiv 2504.08837)."""
        group = self.args.num_generations
        advantages = found.advantages if found.advantages.ndim == 1 else found.advantages.abs().amax(1)
        std = group_advantages.group_std(found.rewards[local], group)
        scores = group_advantages.informative_score(advantages[local], std, group)
        batch, replayed = self.replay.exchange(batch, scores)
        counts = torch.tensor([replayed, len(self.replay), int(batch.loss_mask.sum())], device=self.accelerator.device)
        counts = self.accelerator.reduce(counts, reduction="sum")
        measures.log(self, "train", "replay/replaced_groups", counts[0])
        measures.log(self, "train", "replay/buffered_groups", counts[1])
        batch.active_tokens = counts[2]
        return batch

    def _advantages(
        self, batch: RolloutBatch, rollouts: Rollouts, per_function: Tensor, group: int
    ) -> group_advantages.GroupAdvantages:
        """Advantages of all processes' completions, (N,); with `reinforce++`, (N, T) padded to the longest."""
        args, weights = self.args, self.rewards.weights(self.args)
        if args.advantage_estimator == "grpo":
            if args.multi_objective_aggregation == "normalize_then_sum":
                return group_advantages.normalize_then_sum(per_function, weights, group)
            return group_advantages.sum_then_normalize(per_function, weights, group, args.scale_rewards)
        rewards = group_advantages.weighted_sum(per_function, weights)
        kind = args.advantage_estimator
        if kind == "rloo":
            values = group_advantages.rloo(rewards, group)
        elif kind == "opo":
            lengths = gather_rows(self.accelerator, batch.loss_mask.sum(1))
            values = group_advantages.opo(rewards, lengths, group)
        elif kind == "gpg":
            values = group_advantages.gpg(rewards, group)
        elif kind == "best_of_group":
            values = group_advantages.best_of_group(rewards, group)
        elif kind == "pass_at_k":
            values = group_advantages.pass_at_k(rewards, group, args.pass_at_k, args.pass_reward)
        elif kind == "remax":
            values = group_advantages.remax(rewards, self._greedy_rewards(rollouts, group), group)
        elif kind == "reinforce++_baseline":
            lengths = gather_rows(self.accelerator, batch.loss_mask.sum(1))
            values = group_advantages.reinforce_plus_plus_baseline(rewards, group, lengths)
        else:
            values = self._reinforce_plus_plus(batch, rewards)
        std = group_advantages.group_std(rewards, group).repeat_interleave(group)
        return group_advantages.GroupAdvantages(values, rewards, std)

    def _greedy_rewards(self, rollouts: Rollouts, group: int) -> Tensor:
        """The reward of each prompt's likeliest completion, (B,) over all processes (ReMax, arXiv 2310.10505)."""
        with self._phase("generate"):
            greedy = self.rollouts.sample(rollouts.rows[::group], self.rollouts.params(greedy=True))
        with self._phase("score"):
            scored = self._score(greedy, measured=False)
        return group_advantages.weighted_sum(scored, self.rewards.weights(self.args))

    def _reinforce_plus_plus(self, batch: RolloutBatch, rewards: Tensor) -> Tensor:
        """Token-level returns with the KL penalty inside, normalised over the whole batch (arXiv 2501.03262): (N, T)."""
        n, process = len(batch), self.accelerator.process_index
        kl = None
        if self.args.beta != 0.0:
            assert batch.old_logps is not None and batch.ref_logps is not None
            kl = batch.old_logps - batch.ref_logps
        values = group_advantages.reinforce_plus_plus(
            rewards[process * n : (process + 1) * n],
            kl,
            batch.loss_mask,
            self.args.beta,
            reduce=lambda sums: self.accelerator.reduce(sums, reduction="sum"),
        )
        return gather_rows(self.accelerator, self.accelerator.pad_across_processes(values, dim=1))

    # Log-probabilities

    def _add_logps(self, batch: RolloutBatch) -> None:
        """What the loss needs of the policy that sampled, and of the reference."""
        args = self.args
        in_reward = args.advantage_estimator == "reinforce++" and args.beta != 0.0
        moves = self._mode == "train" and (args.policy_moves_before_use or args.replay_buffer_size > 0)
        if moves or args.corrects_sampler or in_reward:
            batch.old_logps = self._old_logps(batch)
        if args.beta != 0.0:
            batch.ref_logps = self._reference_logps(batch)
        if batch.sampler_logps is not None and batch.old_logps is not None:
            if args.corrects_sampler:
                batch.sampler_weights = policy.sampler_importance_weights(
                    batch.old_logps,
                    batch.sampler_logps,
                    batch.loss_mask,
                    args.vllm_importance_sampling_mode,
                    args.vllm_importance_sampling_clip_max,
                    args.vllm_importance_sampling_clip_min,
                )
            measures.log_sampler_gap(self, self._mode, batch)

    # The loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if return_outputs:
            raise ValueError("return_outputs is True, but GRPOTrainer has no outputs to return; leave it False.")
        batch: RolloutBatch = inputs
        args, mode = self.args, self._mode
        mask = batch.loss_mask
        advantages = batch.advantages if batch.advantages.ndim == 2 else batch.advantages.unsqueeze(1)

        # Without advantage there is no gradient, unless one of these gives one; and the share of tokens of highest entropy
        # needs the entropies of all.
        has_gradient = (
            (args.beta != 0.0 and args.advantage_estimator != "reinforce++")
            or args.entropy_bonus
            or args.covariance_control == "kl_cov"
        )
        needs_all = args.top_entropy_quantile < 1.0 and batch.sampler_entropies is None
        scores, scored = needed_scores(
            self, model, batch, leave_out=not (has_gradient or needs_all), entropy_grad=args.entropy_bonus
        )
        logps, entropies = scores.logps, scores.entropy
        log_ratio = logps - (logps.detach() if batch.old_logps is None else batch.old_logps)
        level = "sequence" if args.loss_type == "luspo" else args.importance_sampling_level
        ratio = policy.importance_log_weights(log_ratio, mask, level).exp()

        used = mask
        if args.top_entropy_quantile < 1.0:
            limit = measures.entropy_limit(self.accelerator, entropies, mask, args.top_entropy_quantile)
            used = policy.high_entropy_tokens(entropies, mask, args.top_entropy_quantile, limit=limit)
        objective = self._objective(logps, log_ratio, ratio, advantages, mask, used, batch)
        token_loss = objective.loss
        if used is not mask and args.loss_type != "gmpo":  # whose mean of a completion has left the other tokens out
            token_loss = token_loss * used
        if args.off_policy_mask_threshold is not None:
            sampled = batch.sampler_logps if args.use_vllm else None
            drift = log_ratio if sampled is None else logps - sampled
            token_loss = token_loss * policy.on_policy_sequences(
                advantages, drift, mask, args.off_policy_mask_threshold
            )
        if args.covariance_control == "clip_cov":
            token_loss = token_loss * policy.clip_cov(
                logps,
                advantages,
                mask,
                objective.metrics.get("clip_ratio/region"),
                args.clip_cov_ratio,
                args.clip_cov_min,
                args.clip_cov_max,
            )
        elif args.covariance_control == "kl_cov":
            token_loss = token_loss + policy.kl_cov(
                log_ratio, logps, advantages, mask, args.kl_cov_ratio, args.kl_cov_coef
            )
        if batch.sampler_weights is not None and args.loss_type != "vespo":
            token_loss = token_loss * batch.sampler_weights
        kl = None
        if args.beta != 0.0 and batch.ref_logps is not None:
            kl = policy.KL_ESTIMATORS[args.kl_estimator](batch.ref_logps, logps)
            kl = kl * ratio if args.use_bias_correction_kl else kl
            if args.advantage_estimator != "reinforce++":  # there it is part of the reward
                token_loss = token_loss + args.beta * kl

        # In evaluation a batch is neither split nor accumulated.
        micro_batches = self.current_gradient_accumulation_steps if mode == "train" else 1.0
        active_tokens = batch.active_tokens.clamp(min=1.0) / self.accelerator.num_processes
        if mode == "train":  # `batch.active_tokens` counts the generation batch; one step uses this share of it
            active_tokens = active_tokens * micro_batches / args.steps_per_generation
        by = policy.Normaliser(micro_batches, active_tokens, batch.max_completion_length)
        policy_loss, loss = policy.POLICY_LOSSES[args.loss_type](token_loss, mask, by)
        if args.entropy_bonus:
            loss = loss - self._entropy_bonus(mode, entropies, used) / micro_batches
            measures.log(self, mode, "policy_loss", self.accelerator.gather(policy_loss).nanmean())
            if mode == "train" and self.accelerator.sync_gradients:
                measures.log(
                    self, mode, "entropy_coef", self.entropy_coef if args.use_adaptive_entropy else args.entropy_coef
                )
        loss = measures.with_aux_loss(self, mode, loss, scores.aux_loss, micro_batches)

        with torch.no_grad():
            known = scored if batch.sampler_entropies is None else torch.ones_like(scored)
            measures.log_update(self, mode, mask, entropies, known, kl, objective.metrics)
            if mode == "train":
                measures.record_update(self, batch, logps.detach(), mask * scored.unsqueeze(1))
        return loss

    def _objective(
        self,
        logps: Tensor,
        log_ratio: Tensor,
        ratio: Tensor,
        advantages: Tensor,
        mask: Tensor,
        used: Tensor,
        batch: RolloutBatch,
    ) -> "Objective":
        """The loss of each token (or completion) before it is averaged, and what of it is logged.

        `used` is 1 on the tokens that the policy loss is to use, all those in `mask` or a share of them.
        """
        args, kind = self.args, self.args.loss_type
        epsilon, epsilon_high = args.epsilon, args.upper_epsilon
        if args.covariance_control == "kl_cov":  # it holds the ratios in the place of clipping
            epsilon = epsilon_high = math.inf
        if kind == "cispo":
            capped = policy.cispo_clip_fraction(ratio, advantages, epsilon_high)
            return Objective(policy.cispo(ratio, logps, advantages, epsilon_high), {"cispo_clip_ratio": capped})
        if kind == "sapo":
            return Objective(policy.sapo(ratio, advantages, args.sapo_temperature_pos, args.sapo_temperature_neg), {})
        if kind == "vespo":
            loss, phi = policy.vespo(
                log_ratio,
                logps,
                advantages,
                mask,
                k_pos=args.vespo_k_pos,
                lambda_pos=args.vespo_lambda_pos,
                k_neg=args.vespo_k_neg,
                lambda_neg=args.vespo_lambda_neg,
                sampler_weights=batch.sampler_weights,
            )
            return Objective(loss, {"vespo/phi_seq_mean": phi})
        if kind in ("gpg", "reinforce"):
            return Objective(policy.reinforce(logps, advantages), {})
        if kind == "gmpo":
            loss = policy.gmpo(log_ratio, advantages, used, epsilon, epsilon_high)
            clipped = measures.clip_ratios(log_ratio, advantages, epsilon, epsilon_high, centre=0.0)
        else:
            bounded = ratio if args.delta is None else ratio.clamp(max=args.delta)
            clipped = measures.clip_ratios(bounded, advantages, epsilon, epsilon_high)
            loss = policy.clipped_surrogate(
                ratio, advantages, epsilon, epsilon_high, args.delta, dual_clip=args.dual_clip
            )
        return Objective(loss, clipped)

    def _entropy_bonus(self, mode: str, entropies: Tensor, used: Tensor) -> Tensor:
        """The weighted bonus of a micro-batch; with adaptive control, the weight of the next step is set at its end."""
        args = self.args
        # Over the tokens of all processes: gradients are averaged over the processes afterwards.
        tokens = self.accelerator.reduce(used.sum(), reduction="sum") / self.accelerator.num_processes
        bonus = (entropies * used).sum() / tokens.clamp(min=1.0 / self.accelerator.num_processes)
        if not args.use_adaptive_entropy:
            return args.entropy_coef * bonus
        coef = policy.applied_entropy_coef(self.entropy_coef, self._last_entropy, args.entropy_target)
        if mode == "train":
            sums = torch.stack([(entropies * used).sum(), used.sum()]).detach()
            self._entropy_sums = sums if self._entropy_sums is None else self._entropy_sums + sums
            if self.accelerator.sync_gradients:
                entropy, tokens = self.accelerator.reduce(self._entropy_sums, reduction="sum").tolist()
                self._last_entropy, self._entropy_sums = entropy / max(tokens, 1.0), None
                self.entropy_coef = policy.adaptive_entropy_coef(
                    self.entropy_coef,
                    self._last_entropy,
                    args.entropy_target,
                    args.entropy_coef_delta,
                    args.entropy_coef_min,
                    args.entropy_coef_max,
                )
        return coef * bonus

    def _state_to_keep(self) -> dict[str, Any]:
        return super()._state_to_keep() | {
            "replay": self.replay.state(),
            "entropy_coef": self.entropy_coef,
            "last_entropy": self._last_entropy,
        }

    def _take_state(self, state: dict[str, Any]) -> None:
        super()._take_state(state)
        self.replay.restore(state["replay"], self.accelerator.device)
        self.entropy_coef, self._last_entropy = state["entropy_coef"], state["last_entropy"]


@dataclass
class Objective:
    """The loss of each token, (N, T), or of each completion, (N, 1); and what of it is logged, name -> same shape."""

    loss: Tensor
    metrics: dict[str, Tensor]


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
