"""REINFORCE Leave-One-Out (RLOO, arXiv 2402.14740).

One training step reads: sample completions, score them, take the KL penalty off the rewards, compare each with the
others of its prompt, take the policy-gradient loss, log.

Axes: `B` prompts of a generation batch, `G` completions per prompt, `N = B * G`, `T` completion tokens, `K` reward
functions.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import set_seed
from datasets import Dataset, IterableDataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, Trainer, TrainerCallback

from outspoken.trainers import advantages as group_advantages
from outspoken.trainers.completion_scores import needed_scores, prepare_scoring
from outspoken.trainers.config import as_config, live_field
from outspoken.trainers.data.vision import expect_unused_parameters
from outspoken.trainers.losses import policy
from outspoken.trainers.measuring import gather_rows
from outspoken.trainers.model_card import ModelCardMixin
from outspoken.trainers.rewards.reward_set import RewardSet
from outspoken.trainers.rollouts import measures
from outspoken.trainers.rollouts.batch import RolloutBatch
from outspoken.trainers.rollouts.config import GroupConfig, check_choice
from outspoken.trainers.rollouts.mixin import RewardMixin, identity, prepare_models
from outspoken.trainers.rollouts.rollout import (
    RolloutWorker,
    as_batch,
    check_chat_template,
    check_number_of_prompts,
    check_prompts,
)
from outspoken.trainers.rollouts.show import CompletionsLog
from outspoken.trainers.setup import finish_setup, prepare_processing

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import BitsAndBytesConfig

logger = logging.getLogger(__name__)

LOSSES = ("reinforce", "clipped")


@dataclass
class RLOOConfig(GroupConfig):
    """Settings of `RLOOTrainer`: those of `transformers.TrainingArguments` and the following.

    Names and defaults are TRL 1.16's; those that TRL does not have say so. Fields marked live may be changed while the
    run trains.
    """

    num_generations: int = field(default=2, metadata={"help": "Completions sampled per prompt: the group size G."})
    beta: float = live_field(
        0.05, "Weight of the KL penalty in the reward, against the reference model; 0: no such model.", minimum=0.0
    )
    loss_type: str = live_field(
        "reinforce",
        "'reinforce': the advantage times the completion's log-probability, as published. 'clipped': TRL's, a clipped "
        "ratio of the whole completion; the same gradient as long as the policy has not moved since it sampled. Not in "
        "TRL.",
        choices=LOSSES,
    )
    normalize_advantages: bool = live_field(
        False, "Divide the advantages of a generation batch by their standard deviation.", choices=(True, False)
    )
    reward_clip_range: tuple[float, float] | None = field(
        default=None, metadata={"help": "Rewards are cut to this range, before the KL penalty."}
    )

    def __post_init__(self):
        super().__post_init__()
        check_choice(self, "loss_type", LOSSES)
        span = self.reward_clip_range
        if span is not None and (len(span) != 2 or not span[0] < span[1]):
            raise ValueError(f"reward_clip_range is {span!r}; give two numbers, the lower one first.")
        if self.policy_moves_before_use and self.loss_type == "reinforce":
            logger.warning(
                "A generation batch serves several update steps, and loss_type 'reinforce' takes no account of how far "
                "the policy has moved since it sampled; set loss_type='clipped', or sample for each step "
                "(num_iterations=1, steps_per_generation at most gradient_accumulation_steps)."
            )


class RLOOTrainer(RewardMixin, ModelCardMixin, Trainer):
    """Trains a causal language model on rewards of its own completions, by RLOO (arXiv 2402.14740).

    Args:
        model: the model, or the path or hub name to load it from; a `PeftModel` trains its adapter.
        reward_funcs: what scores the completions, one or several; see `GRPOTrainer`.
        args: an `RLOOConfig`; a `TrainingArguments`, or TRL's `RLOOConfig`, is converted.
        train_dataset: rows with a `prompt`: a string, or a list of messages; `image` or `images` beside it for a model
            that takes them. A stream (`IterableDataset`) needs `max_steps`.
        eval_dataset: like `train_dataset`, or several by name.
        processing_class: the tokenizer or processor. Default: the one stored with the model.
        reward_processing_classes: tokenizers of the reward models, in the order of `reward_funcs`.
        callbacks, optimizers: as in `transformers.Trainer`.
        quantization_config: used where `model` is loaded from a path.
        peft_config: wraps the model in a fresh adapter.

    Raises:
        ValueError, TypeError: an argument is unusable; the message says what to change.
    """

    args: Any  # RLOOConfig

    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel",
        reward_funcs: str | PreTrainedModel | Callable | list[str | PreTrainedModel | Callable],
        args: RLOOConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        reward_processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase | None] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: "BitsAndBytesConfig | None" = None,
        peft_config: "PeftConfig | None" = None,
    ):
        args = as_config(RLOOConfig, args, model, "RLOOTrainer")
        check_prompts(train_dataset, eval_dataset, args)
        processing = prepare_processing(model, args, processing_class, trainer="RLOOTrainer", images=True)
        check_number_of_prompts(train_dataset, args)
        check_chat_template(processing, train_dataset)
        expect_unused_parameters(processing.processor, args)
        prepared, self.ref_model, self.aux_loss_coef = prepare_models(
            model, args, processing, quantization_config, peft_config
        )
        self._start_sampling()
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
        self.rollouts = RolloutWorker(self, processing)
        self.rewards = RewardSet(reward_funcs, reward_processing_classes, args, self.accelerator)
        self.completions_log = CompletionsLog(args)

        # Processes must not draw the same completions.
        set_seed(args.seed, device_specific=True)

        finish_setup(self, "rloo")

    def _sample_and_score(self, rows: list[dict[str, Any]]) -> RolloutBatch:
        """Sample a completion per row (a prompt's G rows stand together), score them, compute their advantages."""
        mode, args = self._mode, self.args
        group = self._group_size(mode)
        temperature, cap = args.temperature, args.max_completion_length  # either may change while this runs
        with self._phase("generate"):
            rollouts = self.rollouts.sample(rows)
        with self._phase("score"):
            per_function = self._score(rollouts)
        measures.log_completions(self, mode, rollouts)

        batch = as_batch(self, rollouts, temperature, cap)
        if args.beta != 0.0 or (mode == "train" and args.policy_moves_before_use):
            batch.old_logps = self._old_logps(batch)
        weights = self.rewards.weights(args)
        rewards = group_advantages.weighted_sum(per_function, weights)
        found = self._advantages(mode, batch, rewards, group)
        batch.advantages = found[self.accelerator.process_index * len(rows) :][: len(rows)]

        measures.log_rewards(self, mode, per_function, rewards, self.rewards.names, group)
        self._log_texts(mode, rollouts, per_function, found)
        if mode == "train":
            measures.record_completions(self, rollouts, rewards, per_function, self.rewards.names, group, cap, weights)
            measures.record_advantages(self, found)
            measures.record_speed(self)
        return batch

    def _advantages(self, mode: str, batch: RolloutBatch, rewards: Tensor, group: int) -> Tensor:
        """Leave-one-out advantages of all processes' completions, (N,), the KL penalty taken off the rewards (N,)."""
        args = self.args
        if args.reward_clip_range is not None:
            rewards = rewards.clamp(*args.reward_clip_range)
        if args.beta != 0.0:
            batch.ref_logps = self._reference_logps(batch)
            assert batch.old_logps is not None
            kl = policy.k1(batch.ref_logps, batch.old_logps) * batch.loss_mask
            rewards = rewards - args.beta * gather_rows(self.accelerator, kl.sum(1))
            sums = self.accelerator.reduce(torch.stack([kl.sum(), batch.loss_mask.sum()]), reduction="sum")
            measures.log(self, mode, "kl", sums[0] / sums[1].clamp(min=1.0))
        return group_advantages.rloo(rewards, group, normalize=args.normalize_advantages)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if return_outputs:
            raise ValueError("return_outputs is True, but RLOOTrainer has no outputs to return; leave it False.")
        batch: RolloutBatch = inputs
        args, mode = self.args, self._mode
        mask, advantages = batch.loss_mask, batch.advantages.unsqueeze(1)

        scores, scored = needed_scores(self, model, batch, leave_out=True)
        logps, entropies = scores.logps, scores.entropy
        log_ratio = logps - (logps.detach() if batch.old_logps is None else batch.old_logps)
        # Not normalised by length: a completion is one action.
        ratio = (log_ratio * mask).sum(1, keepdim=True).exp()
        if args.loss_type == "clipped":
            loss_of = policy.clipped_surrogate(ratio, advantages, args.epsilon, args.upper_epsilon)
        else:
            loss_of = policy.reinforce((logps * mask).sum(1, keepdim=True), advantages)
        # In evaluation a batch is not accumulated.
        micro_batches = self.current_gradient_accumulation_steps if mode == "train" else 1.0
        loss = loss_of.mean() / micro_batches
        loss = measures.with_aux_loss(self, mode, loss, scores.aux_loss, micro_batches)

        with torch.no_grad():
            known = scored if batch.sampler_entropies is None else torch.ones_like(scored)
            # Of 'reinforce', which does not clip, they tell which completions are outside of the range.
            clipped = measures.clip_ratios(ratio, advantages, args.epsilon, args.upper_epsilon)
            measures.log_update(self, mode, mask, entropies, known, None, clipped)
            if mode == "train":
                measures.record_update(self, batch, logps.detach(), mask * scored.unsqueeze(1))
        return loss
