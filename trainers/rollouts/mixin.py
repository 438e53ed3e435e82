"""The methods of `transformers.Trainer` that every trainer that samples overrides in the same way.

`SamplingMixin` draws prompts, keeps what was sampled until it is used up, and carries it through checkpoints;
`RewardMixin` also calls reward functions. No method's formula lives here: a trainer brings `_sample_and_score` and
`compute_loss`.
"""

import contextlib
import logging
import math
import time
from collections import defaultdict
from typing import Any

import torch
from accelerate.utils import gather_object, is_peft_model
from datasets import Dataset, IterableDataset
from torch import Tensor
from torch.utils.data import Sampler
from transformers import Trainer

from outspoken.diagnostics.recorder import StepRecorder
from outspoken.diagnostics.records import as_number
from outspoken.trainers.callbacks import SyncRefModelCallback
from outspoken.trainers.completion_scores import logps_without_grad
from outspoken.trainers.measuring import gather_rows
from outspoken.trainers.reference import make_reference, prepare_reference, reference_policy
from outspoken.trainers.rewards.reward_set import RewardSet
from outspoken.trainers.rollouts import checkpoint, measures, sampler
from outspoken.trainers.rollouts.batch import RolloutBatch
from outspoken.trainers.rollouts.rollout import Rollouts, RolloutWorker
from outspoken.trainers.rollouts.show import CompletionsLog
from outspoken.trainers.setup import add_metrics, prepare_model, set_up_router_loss

logger = logging.getLogger(__name__)


def identity(rows: Any) -> Any:
    """A collator that leaves rows as they are."""
    return rows


def prepare_models(
    model: Any, args: Any, processing: Any, quantization_config: Any, peft_config: Any
) -> tuple[Any, Any, float]:
    """(policy, reference model or None, weight of the load-balancing loss), as `args` say.

    The reference is the policy as it is now. Of an adapter it is the model without it, and None here.
    """
    source = model
    model = prepare_model(model, args, processing, peft_config=peft_config, quantization_config=quantization_config)
    reference = make_reference(model, source, args, quantization_config) if args.beta != 0.0 else None
    if args.sync_ref_model and reference is None:
        raise ValueError(
            "sync_ref_model is True, but with an adapter the reference is the model without it, which cannot move; set "
            "it to False, or train without an adapter."
        )
    return model, reference, set_up_router_loss(model, args.router_aux_loss_coef)


class SamplingMixin(Trainer):
    """Samples a generation batch every `steps_per_generation * num_iterations` micro-batches, and serves it in parts."""

    # transformers types these for every trainer there is.
    model: Any
    args: Any
    processing_class: Any
    train_dataset: Any
    eval_dataset: Any
    _signature_columns: Any
    # `compute_loss` divides by the number of micro-batches itself.
    loss_is_scaled_for_ga = True

    _metrics: dict[str, dict[str, list[float]]]
    rollouts: RolloutWorker
    completions_log: CompletionsLog

    def _start_sampling(self) -> None:
        """To be called before `Trainer.__init__`."""
        self.recorder = StepRecorder()
        self._step: int | None = None  # micro-batches trained on in this run; None: to be found from the state
        self._micro_batches: list[RolloutBatch] | None = None  # of the last generation batch; None: to be sampled
        self._step_time = 0.0
        self._is_sampling = False  # an error now leaves the weights of the last update step

    def _sample_and_score(self, rows: list[dict[str, Any]]) -> RolloutBatch:
        """Sample a completion per row (a prompt's G rows stand together) and add what the loss needs."""
        raise NotImplementedError

    # Drawing prompts

    def _set_signature_columns_if_needed(self):
        if self._signature_columns is None:
            self._signature_columns = ["prompt", "image", "images"]

    def get_train_dataloader(self):
        return sampler.train_dataloader(self)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler:
        return sampler.train_sampler(self, train_dataset if train_dataset is not None else self.train_dataset)

    def get_eval_dataloader(self, eval_dataset: str | Dataset | IterableDataset | None = None):
        return super().get_eval_dataloader(sampler.eval_stream(self, eval_dataset, self._group_size("eval")))

    def _get_eval_sampler(self, eval_dataset: Dataset) -> Sampler:
        return sampler.RepeatSampler(eval_dataset, group_size=self._group_size("eval"), seed=self.args.seed)

    def _group_size(self, mode: str) -> int:
        return (mode == "eval" and self.args.num_generations_eval) or self.args.num_generations

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    def _phase(self, name: str) -> contextlib.AbstractContextManager:
        """Time a phase of a training step; evaluation is timed as a whole, elsewhere."""
        return self.recorder.phase(name) if self._mode == "train" else contextlib.nullcontext()

    # A training step

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        self._step, self._micro_batches = None, None
        if resume_from_checkpoint is True:
            # transformers would take the beginning of a checkpoint, too, that a run killed while saving left behind.
            resume_from_checkpoint = checkpoint.last_whole(self.args.output_dir) or True
        try:
            with checkpoint.saved_on_failure(self):
                return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self._is_sampling = False
            if self.rollouts.environments is not None:
                self.rollouts.environments.close()  # later episodes get new ones

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self._step is None:
            self._step = sampler.micro_batches_before(self)
        start = time.perf_counter()
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._step += 1
        self._step_time += time.perf_counter() - start
        if self._step % self.current_gradient_accumulation_steps == 0:
            self._metrics["train"]["step_time"].append(self._step_time)
            self._step_time = 0.0
        return loss

    def _prepare_inputs(self, rows: Any) -> Any:
        """The completions to take the loss on, a `RolloutBatch`: sampled now, or left of the last generation batch."""
        if self._mode == "eval":
            return self._sampled(rows)
        args = self.args
        steps = args.steps_per_generation
        assert self._step is not None
        if self._step % self._cycle == 0 or self._micro_batches is None:
            # Completions of one prompt stay together, so that a micro-batch shares their prompt.
            block = math.gcd(args.num_generations, args.per_device_train_batch_size) if args.share_prompts else 1
            batch = self._sampled(rows).shuffled(block)
            self._micro_batches = batch.split(steps, args.pad_to_multiple_of)
        return self._micro_batches[self._step % steps]

    def _sampled(self, rows: list[dict[str, Any]]) -> RolloutBatch:
        self._is_sampling = True
        batch = self._sample_and_score(rows)
        self._is_sampling = False  # not where it raises: `saved_on_failure` asks
        return batch

    @property
    def _cycle(self) -> int:
        """Micro-batches that one generation batch serves."""
        return self.args.steps_per_generation * self.args.num_iterations

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        batch = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, batch)
        return loss.mean().detach(), None, None

    # Logging. `_metrics[mode][name]` collects values until `log` averages them.

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        add_metrics(self, logs, skip_nan=True)
        super().log(logs, start_time)
        if self.args.log_completions and self.accelerator.is_main_process and self.completions_log.is_new:
            self.completions_log.show(self.args, self.state.global_step)

    # Checkpoints

    def _state_to_keep(self) -> dict[str, Any]:
        """What a trainer holds beside the weights, on this process: numbers, tensors, batches."""
        # Counted up to the last update step: sampling may have failed later, and a resumed run starts from that step.
        unused = self._step is not None and sampler.micro_batches_before(self) % self._cycle != 0
        return {
            "micro_batches": self._micro_batches if unused else None,
            "metrics": {name: list(values) for name, values in self._metrics["train"].items()},
        }

    def _take_state(self, state: dict[str, Any]) -> None:
        """Become what `_state_to_keep` described."""
        if state["micro_batches"] is not None:
            self._micro_batches = [batch.to(self.accelerator.device) for batch in state["micro_batches"]]
        self._metrics["train"].update(state["metrics"])

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        checkpoint.save(self, self._state_to_keep(), trial)
        super()._save_checkpoint(model, trial)

    def _load_optimizer_and_scheduler(self, checkpoint_folder: Any) -> None:
        super()._load_optimizer_and_scheduler(checkpoint_folder)
        state = checkpoint.load(self, checkpoint_folder)
        if state is not None:
            self._take_state(state)


class RewardMixin(SamplingMixin):
    """Samples groups of completions and has them scored by reward functions."""

    ref_model: Any
    rewards: RewardSet

    def _start_sampling(self) -> None:
        super()._start_sampling()
        self._pending_metrics: dict[str, list[float]] = defaultdict(list)
        self._not_numbers: set[str] = set()  # names of metrics that were given something else, and told of

    @property
    def reward_funcs(self) -> list[Any]:
        """The reward functions and models, in the order of their weights."""
        return list(self.rewards.functions.values())

    @property
    def reward_func_names(self) -> list[str]:
        """What their rewards are logged under."""
        return self.rewards.names

    def _place_reference(self) -> None:
        """Put the reference model where the policy is; to be called after `Trainer.__init__`."""
        if self.ref_model is not None:
            self.ref_model = prepare_reference(self.ref_model, self.accelerator, self)
        if self.args.sync_ref_model:
            self.add_callback(SyncRefModelCallback(self.ref_model, self.accelerator))

    def _score(self, rollouts: Rollouts, measured: bool = True) -> Tensor:
        """Rewards of each function, (N, K) over all processes; NaN where a function does not apply.

        Args:
            measured: whether what functions give to `log_metric` counts: not for completions beside those drawn first.
        """
        local = self.rewards.score(
            rollouts.prompts,
            rollouts.completions,
            rollouts.completion_ids,
            rollouts.columns(),
            trainer_state=self.state,
            log_extra=lambda column, values: rollouts.logged[column].extend(values),
            log_metric=self._log_metric if measured else None,
            environments=rollouts.environments,
        )
        if self._mode == "train":
            for name, seconds in self.rewards.calls.seconds.items():
                self.recorder.set(f"rewards/{name}/seconds", seconds)
            for name, failures in self.rewards.calls.failures.items():
                self.recorder.set(f"rewards/{name}/failures", failures)
        return gather_rows(self.accelerator, local.to(self.accelerator.device))

    def _old_logps(self, batch: RolloutBatch) -> Tensor:
        """Log-probabilities under the policy that is about to be trained, (N, T)."""
        # The sampler's own numbers are the policy's up to rounding where it is the policy, in full precision.
        known = batch.sampler_logps
        exact = self.accelerator.mixed_precision == "no" and next(self.model.parameters()).dtype == torch.float32
        usable = known is not None and exact and not self.args.use_vllm and not bool(torch.isnan(known).any())
        # All processes or none: a pass through a sharded model is made together.
        everywhere: Any = self.accelerator.gather(torch.tensor([usable], device=self.accelerator.device))
        if known is not None and bool(everywhere.all()):
            return known
        return logps_without_grad(self, self.model, batch)

    def _reference_logps(self, batch: RolloutBatch) -> Tensor:
        """Log-probabilities under the reference model, (N, T)."""
        if self.ref_model is None and not is_peft_model(self.model):
            raise ValueError(
                f"beta is {self.args.beta}, but the run started with beta=0 and holds no reference model; start a new "
                "run with beta set."
            )
        with reference_policy(self) as model:
            return logps_without_grad(self, model, batch)

    def _log_metric(self, name: str, value: Any) -> None:
        """What reward functions call as `log_metric`. A slip in a metric must not end a run."""
        number = as_number(value)
        if number is not None:
            self._pending_metrics[name].append(number)
        elif name not in self._not_numbers:
            self._not_numbers.add(name)
            logger.warning(f"log_metric({name!r}) got a {type(value).__name__}, not a number; it is left out.")

    def _log_texts(self, mode: str, rollouts: Rollouts, per_function: Tensor, advantages: Tensor) -> None:
        """Keep the completions for the table, and what reward functions handed to `log_extra` and `log_metric`."""
        of_completions = advantages if advantages.ndim == 1 else advantages.mean(1)
        self.completions_log.add(
            rollouts.prompts,
            rollouts.completions,
            of_completions.tolist(),
            {name: column.tolist() for name, column in zip(self.rewards.names, per_function.T)},
            rollouts.logged,
            rollouts.shown_images(self.rollouts.takes_images),
        )
        for name in sorted(set(gather_object(list(self._pending_metrics)))):
            values = gather_object(self._pending_metrics.get(name, []))
            measures.log(self, mode, name, sum(values) / len(values))
        self._pending_metrics.clear()
