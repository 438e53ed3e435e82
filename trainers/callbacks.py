"""Callbacks that a user adds to a trainer: averaged weights, a moving reference model, completions, a progress display.

They take what `transformers.Trainer` gives every callback, so they also work with trainers that are not ours.
"""

import atexit
import copy
import inspect
import itertools
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import pandas as pd
import torch
from accelerate.utils import gather_object, is_peft_model
from rich.columns import Columns
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import Progress
from rich.table import Table
from rich.text import Text
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    Trainer,
    TrainerCallback,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, has_length

from outspoken.trainers.data.formats import is_messages
from outspoken.trainers.rollouts.batch import pad_ids
from outspoken.trainers.rollouts.transformers_backend import cut_after_eos, eos_token_ids
from outspoken.trainers.sharding import (
    blend,
    is_sharded,
    local_part,
    plain_name,
    refresh,
    reshard,
    save_whole_model,
    unwrapped,
)

logger = logging.getLogger(__name__)


class BEMACallback(TrainerCallback):
    r"""Averages the trained weights with BEMA, the bias-corrected exponential moving average (arXiv 2508.00180).

    From step tau = `update_after` on, every phi = `update_freq` steps t, with theta_0 the weights at step tau:

        EMA  <- (1 - beta_t) EMA + beta_t theta_t,      beta_t  = max((rho + gamma t)^-kappa, min_ema_multiplier)
        BEMA <- EMA + alpha_t (theta_t - theta_0),      alpha_t = (rho + gamma t)^-eta

    The averages are kept in float32, of the parameters that train. At the end of training the model with the averaged
    weights is written to `<output_dir>/bema`. Checkpoints carry the averages, and a resumed run goes on with them.

    Args:
        update_freq: phi, steps between two updates.
        ema_power: kappa. 0: no averaging, EMA is the current weights.
        bias_power: eta. Large: no correction. 0: full correction at every step.
        lag: rho, a virtual age of the run at its start.
        update_after: tau, steps of burn-in, in which the average is the current weights.
        multiplier: gamma.
        min_ema_multiplier: lower bound of beta.
        device: where the averages are kept: three float32 numbers per trained weight. On every process where the
            model is sharded (each its share) or the reference model is updated, else on the main process only.
        update_ref_model: also copy the averaged weights into the trainer's reference model, `trainer.ref_model` (or
            the adapter "ref").
        ref_model_update_freq: steps between two such copies.
        ref_model_update_after: the first step of such a copy.

    Raises:
        ValueError: at the start of training, if a number makes no sense, or there is no reference model to update.
    """

    def __init__(
        self,
        update_freq: int = 400,
        ema_power: float = 0.5,
        bias_power: float = 0.2,
        lag: int = 10,
        update_after: int = 0,
        multiplier: float = 1.0,
        min_ema_multiplier: float = 0.0,
        device: str = "cpu",
        update_ref_model: bool = False,
        ref_model_update_freq: int = 400,
        ref_model_update_after: int = 0,
    ):
        for name, value, minimum in (
            ("update_freq", update_freq, 1),
            ("lag", lag, 0),
            ("update_after", update_after, 0),
            ("multiplier", multiplier, 0),
            ("ref_model_update_freq", ref_model_update_freq, 1),
            ("ref_model_update_after", ref_model_update_after, 0),
        ):
            if value < minimum:
                raise ValueError(f"`{name}` is {value}; choose {minimum} or more.")
        self.update_freq = update_freq
        self.ema_power = ema_power
        self.bias_power = bias_power
        self.lag = lag
        self.update_after = update_after
        self.multiplier = multiplier
        self.min_ema_multiplier = min_ema_multiplier
        self.device = device
        self.update_ref_model = update_ref_model
        self.ref_model_update_freq = ref_model_update_freq
        self.ref_model_update_after = ref_model_update_after
        self._reset()

    def _reset(self) -> None:
        self.param_names: list[str] = []
        self.thetat_params: list[nn.Parameter] = []  # what trains, not a copy
        self.theta0_params: list[Tensor] = []  # these three: this process's part, float32, on `device`
        self.ema_params: list[Tensor] = []
        self.bema_params: list[Tensor] = []
        self._model: Any = None
        self._ref_model: Any = None
        self._keeps = False  # whether this process keeps averages

    # The training loop's hooks

    @torch.no_grad()
    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._reset()
        self._model = model
        reshard(model)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                self.param_names.append(plain_name(name))
                self.thetat_params.append(parameter)
        trainer, checkpoint = _training_loop(self)
        if self.update_ref_model:
            self._ref_model = kwargs.get("ref_model", getattr(trainer, "ref_model", None))
            self._reference()  # raises where there is none
        self._keeps = is_sharded(model) or self.update_ref_model or state.is_world_process_zero
        self._snapshot()
        if state.global_step > 0:
            self.restore(
                args, checkpoint or os.path.join(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
            )
        if 0 < state.max_steps < self.update_after + self.update_freq:
            logger.warning(
                f"BEMACallback will not average anything: its first update comes at step "
                f"{self.update_after + self.update_freq} (update_after + update_freq), and training ends at step "
                f"{state.max_steps}; lower `update_freq`."
            )

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = state.global_step
        if step == self.update_after:
            self._snapshot()
        elif step > self.update_after and (step - self.update_after) % self.update_freq == 0:
            self._update(step)
        since = step - self.ref_model_update_after
        if self.update_ref_model and since >= 0 and since % self.ref_model_update_freq == 0:
            if step < self.update_after:
                self._snapshot()
            self._copy_to_reference()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        sharded = is_sharded(self._model)
        if args.save_only_model or not (sharded or state.is_world_process_zero):
            return
        folder = os.path.join(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
        _save_parts(os.path.join(folder, _parts_file("bema", args, sharded)), self._state())

    @torch.no_grad()
    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step < self.update_after:
            self._snapshot()
        folder = os.path.join(args.output_dir, "bema")
        with self.averaged_weights():
            save_whole_model(self._model, folder, state.is_world_process_zero)
        processor = kwargs.get("processing_class")
        if state.is_world_process_zero and processor is not None:
            processor.save_pretrained(folder)

    # The averages

    def _ema_beta(self, step: int) -> float:
        age = self.lag + self.multiplier * step
        return max(age**-self.ema_power if age > 0 else 1.0, self.min_ema_multiplier)

    def _bema_alpha(self, step: int) -> float:
        age = self.lag + self.multiplier * step
        return age**-self.bias_power if age > 0 else 1.0

    def _averages(self) -> dict[str, list[Tensor]]:
        return {"theta0": self.theta0_params, "ema": self.ema_params, "bema": self.bema_params}

    def _state(self) -> dict[str, Tensor]:
        """What a checkpoint carries: the averages and, where it moves, the reference model."""
        kinds: dict[str, Sequence[Tensor]] = {**self._averages()}
        if self.update_ref_model:
            kinds["reference"] = [local_part(parameter) for parameter in self._reference()]
        return {f"{kind}/{n}": part for kind, parts in kinds.items() for n, part in zip(self.param_names, parts)}

    def _snapshot(self) -> None:
        """Begin anew: all averages are the current weights."""
        if not self._keeps:
            return
        for parts in self._averages().values():
            parts[:] = [self._theta(parameter).clone() for parameter in self.thetat_params]

    def _theta(self, parameter: nn.Parameter) -> Tensor:
        return local_part(parameter).to(self.device, torch.float32)

    def _update(self, step: int) -> None:
        beta, alpha = self._ema_beta(step), self._bema_alpha(step)
        if self._keeps:
            for parameter, theta0, ema, bema in zip(
                self.thetat_params, self.theta0_params, self.ema_params, self.bema_params, strict=True
            ):
                theta = self._theta(parameter)
                ema.mul_(1 - beta).add_(theta, alpha=beta)
                torch.add(ema, theta - theta0, alpha=alpha, out=bema)

    @torch.no_grad()
    def restore(self, args: Any, checkpoint: str) -> None:
        """Go on with the averages of a checkpoint, whose weights the model has already."""
        path = os.path.join(checkpoint, _parts_file("bema", args, is_sharded(self._model)))
        loaded = self._keeps and _load_parts(path, self._state())
        if self.update_ref_model and self._ref_model is not None:
            refresh(self._ref_model)
        if self._keeps and not loaded:
            self._snapshot()
            logger.warning(
                f"BEMACallback begins a new average, because {path} holds none of this model on as many processes."
            )

    @contextmanager
    def averaged_weights(self) -> Iterator[Any]:
        """While open, the model has the averaged weights; all processes must enter. Yields the model."""
        if self._model is None:
            raise RuntimeError("BEMACallback has no averages before training has begun; call `trainer.train()` first.")
        reshard(self._model)
        kept: list[Tensor] = []
        if self._keeps:
            with torch.no_grad():
                kept = [local_part(parameter).clone() for parameter in self.thetat_params]
                for parameter, bema in zip(self.thetat_params, self.bema_params, strict=True):
                    local_part(parameter).copy_(bema)
                refresh(self._model)
        try:
            yield self._model
        finally:
            with torch.no_grad():
                for parameter, theta in zip(self.thetat_params, kept):
                    local_part(parameter).copy_(theta)
                refresh(self._model)

    @property
    def running_model(self) -> Any:
        """A copy of the model with the averaged weights, on `device`; None before training and where none are kept."""
        if self._model is None or not self._keeps or is_sharded(self._model):
            return None
        with self.averaged_weights() as model:
            return copy.deepcopy(model).to(self.device)

    # The reference model

    def _reference(self) -> list[nn.Parameter]:
        """The reference's parameters, in the order of `param_names`."""
        reshard(self._model if self._ref_model is None else self._ref_model)
        if self._ref_model is not None:
            found = {plain_name(name): p for name, p in unwrapped(self._ref_model).named_parameters()}
            names = self.param_names
        elif is_peft_model(self._model) and "ref" in self._model.peft_config:
            found = {plain_name(name): p for name, p in self._model.named_parameters()}
            names = [name.replace(f".{self._model.active_adapter}.", ".ref.") for name in self.param_names]
        else:
            raise ValueError(
                "`update_ref_model=True` needs a reference model of its own, and this trainer has none (it precomputes "
                "its log-probabilities, or takes the model without its adapter); set it to False."
            )
        missing = [name for name in names if name not in found]
        if missing:
            raise ValueError(
                f"`update_ref_model=True`, but the reference model has no parameter {missing[0]!r} that the trained "
                "model has; set it to False, or train the whole model."
            )
        return [found[name] for name in names]

    def _copy_to_reference(self) -> None:
        parts = [bema.to(local_part(p).device) for bema, p in zip(self.bema_params, self.thetat_params, strict=True)]
        reference = self._model if self._ref_model is None else self._ref_model
        blend(self._model, reference, zip(parts, self._reference(), strict=True), alpha=1.0)


class SyncRefModelCallback(TrainerCallback):
    """Moves the reference model towards the policy every few steps (TR-DPO, arXiv 2404.09656).

    Every `args.ref_model_sync_steps` steps, with alpha = `args.ref_model_mixup_alpha`, both read at that moment:

        ref <- alpha * policy + (1 - alpha) * ref

    Checkpoints carry the moved reference model, and a resumed run goes on with it.

    Args:
        ref_model: the reference model, as the trainer uses it.
        accelerator: the trainer's.
    """

    def __init__(self, ref_model: PreTrainedModel | nn.Module | None, accelerator: Any = None):
        self.ref_model = ref_model
        self.accelerator = accelerator

    @staticmethod
    @torch.no_grad()
    def sync_target_model(model: nn.Module, target_model: nn.Module, alpha: float) -> None:
        """`target_model <- alpha * model + (1 - alpha) * target_model`. All processes must call it."""
        for either in (model, target_model):
            reshard(either)
        sources, targets = (list(unwrapped(m).parameters()) for m in (model, target_model))
        if len(sources) != len(targets):
            raise ValueError(
                f"The model has {len(sources)} parameters and the reference model {len(targets)}; only a reference of "
                "the same architecture, without an adapter on either, can be synchronized."
            )
        blend(model, target_model, ((local_part(p), target) for p, target in zip(sources, targets)), alpha)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.ref_model is None or state.global_step < args.ref_model_sync_steps:
            return
        _, checkpoint = _training_loop(self)
        self.restore(args, checkpoint or os.path.join(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"))

    @torch.no_grad()
    def restore(self, args: Any, checkpoint: str) -> None:
        """Give the reference model the weights that it had at a checkpoint."""
        if self.ref_model is None:
            return
        path = os.path.join(checkpoint, _parts_file("reference", args, is_sharded(self.ref_model)))
        loaded = _load_parts(path, self._parts())
        refresh(self.ref_model)
        if not loaded:
            logger.warning(f"The reference model keeps the weights it has now: {path} does not hold it.")

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.ref_model is not None and state.global_step % args.ref_model_sync_steps == 0:
            self.sync_target_model(model, self.ref_model, args.ref_model_mixup_alpha)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        sharded = self.ref_model is not None and is_sharded(self.ref_model)
        moved = self.ref_model is not None and state.global_step >= args.ref_model_sync_steps
        if moved and not args.save_only_model and (sharded or state.is_world_process_zero):
            folder = os.path.join(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
            _save_parts(os.path.join(folder, _parts_file("reference", args, sharded)), self._parts())

    def _parts(self) -> dict[str, Tensor]:
        reshard(self.ref_model)  # type: ignore[arg-type]
        return {plain_name(name): local_part(p) for name, p in unwrapped(self.ref_model).named_parameters()}


# ---------------------------------------------------------------------- what checkpoints carry


def _parts_file(stem: str, args: Any, sharded: bool) -> str:
    """Where a checkpoint holds what a callback keeps: one file, or one for each process's share."""
    return f"{stem}-{args.process_index + 1}-of-{args.world_size}.safetensors" if sharded else f"{stem}.safetensors"


def _save_parts(path: str, tensors: Mapping[str, Tensor]) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    save_file({name: part.detach().to("cpu", copy=True).contiguous() for name, part in tensors.items()}, path)


def _load_parts(path: str, into: Mapping[str, Tensor]) -> bool:
    """Copy a file's tensors into these. False, and nothing copied, if it does not hold exactly these."""
    if not os.path.isfile(path):
        return False
    with safe_open(path, framework="pt") as file:
        if {name: file.get_slice(name).get_shape() for name in file.keys()} != {  # noqa: SIM118
            name: list(tensor.shape) for name, tensor in into.items()
        }:
            return False
        for name, tensor in into.items():
            tensor.copy_(file.get_tensor(name))
    return True


def _training_loop(callback: TrainerCallback) -> tuple[Any, str | None]:
    """The trainer that calls this callback and the checkpoint it resumes from: found on the call stack, because
    callbacks are told neither."""
    frame = inspect.currentframe()
    checkpoint = None
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, Trainer) and callback in owner.callback_handler.callbacks:
            checkpoint = frame.f_locals.get("resume_from_checkpoint")
            if isinstance(checkpoint, str | os.PathLike):
                return owner, os.fspath(checkpoint)
            return owner, None
        frame = frame.f_back
    return None, None


# ---------------------------------------------------------------------- completions


class LogCompletionsCallback(TrainerCallback):
    """Lets the model complete prompts of the evaluation dataset now and then, and logs what it said.

    The table (step, prompt, completion; `callback.table` has its rows) goes to Weights & Biases, Comet and trackio where
    `report_to` names them, and what is new in it to `<output_dir>/completions/`.

    >>> trainer.add_callback(LogCompletionsCallback(trainer))  # doctest: +SKIP

    Args:
        trainer: a trainer whose evaluation dataset has a column `prompt`, text or messages (or `input_ids` and
            `labels`: what comes before the first label is the prompt).
        generation_config: how to sample; by default as the model's own config says.
        num_prompts: how many prompts; by default all.
        freq: steps between two tables; by default the trainer's `eval_steps`.

    Raises:
        ValueError: there is no evaluation dataset, or it has no prompts.
    """

    def __init__(
        self,
        trainer: Trainer,
        generation_config: GenerationConfig | None = None,
        num_prompts: int | None = None,
        freq: int | None = None,
    ):
        self.trainer = trainer
        self.generation_config = generation_config
        self.freq = freq
        self.table: list[tuple[int, str, str]] = []
        self._last_logged_step = -1
        self._prompts = _eval_prompts(trainer, num_prompts, "LogCompletionsCallback")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step, freq = state.global_step, int(self.freq or state.eval_steps)
        if step == self._last_logged_step or freq < 1 or step % freq != 0:
            return
        self._last_logged_step = step
        completions = _complete(self.trainer, self._prompts, self.generation_config)
        if not state.is_world_process_zero:
            return
        tokenizer = _tokenizer(self.trainer)
        new = [(step, _text(tokenizer, ids), text) for ids, text in zip(self._prompts, completions, strict=True)]
        self.table += new
        self._publish(args, step, pd.DataFrame(self.table, columns=["step", "prompt", "completion"]), len(new))

    def _publish(self, args: Any, step: int, table: pd.DataFrame, new: int) -> None:
        folder = os.path.join(str(args.output_dir), "completions")
        os.makedirs(folder, exist_ok=True)
        table.tail(new).to_parquet(os.path.join(folder, f"eval_completions_{step:05d}.parquet"))
        # The trainer's own integrations have imported and started these by now.
        for name in ("wandb", "trackio"):
            backend = sys.modules.get(name) if name in (args.report_to or []) else None
            if backend is not None and (name != "wandb" or backend.run is not None):
                backend.log({"completions": backend.Table(dataframe=table)})
        comet = sys.modules.get("comet_ml") if "comet_ml" in (args.report_to or []) else None
        experiment = comet.get_running_experiment() if comet is not None else None
        if experiment is not None:
            experiment.log_table(tabular_data=table, filename="completions.csv")


class WeaveCallback(TrainerCallback):
    """Lets the model complete prompts of the evaluation dataset at each evaluation, and logs them to W&B Weave.

    Args:
        trainer: a trainer whose evaluation dataset has prompts, as for `LogCompletionsCallback`.
        project_name: the Weave project; by default that of the Weave client or the wandb run that is active.
        scorers: name -> `f(prompt, completion)`, a number that is logged beside each completion, and its mean.
        generation_config: how to sample; by default as the model's own config says.
        num_prompts: how many prompts; by default all.
        dataset_name, model_name: how they are called in Weave; the model by default as in its config.

    Raises:
        ImportError: weave is not installed.
        ValueError: there is no evaluation dataset, or it has no prompts; at the start of training, if no project is
            known.
    """

    def __init__(
        self,
        trainer: Trainer,
        project_name: str | None = None,
        scorers: dict[str, Callable[[str, str], float]] | None = None,
        generation_config: GenerationConfig | None = None,
        num_prompts: int | None = None,
        dataset_name: str = "eval_dataset",
        model_name: str | None = None,
    ):
        try:
            import weave  # noqa: F401
        except ImportError:
            raise ImportError(
                "WeaveCallback needs the package `weave`; install it with `pip install weave`."
            ) from None
        self.trainer = trainer
        self.project_name = project_name
        self.scorers = scorers or {}
        self.generation_config = generation_config
        self.dataset_name = dataset_name
        self.model_name = model_name
        self._last_logged_step = -1
        self._ready = False
        self._prompts = _eval_prompts(trainer, num_prompts, "WeaveCallback")

    @property
    def is_evaluation_mode(self) -> bool:
        """Whether completions are scored."""
        return bool(self.scorers)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self._start()

    def _start(self) -> None:
        """Connect to Weave, once."""
        if self._ready:
            return
        import weave
        from weave.trace.context import weave_client_context

        if weave_client_context.get_weave_client() is None:
            wandb = sys.modules.get("wandb")
            if self.project_name is None and wandb is not None and wandb.run is not None:
                self.project_name = f"{wandb.run.entity}/{wandb.run.project}"
            if self.project_name is None:
                raise ValueError(
                    "WeaveCallback knows no project; pass `project_name`, call `weave.init` before training, or log to "
                    "wandb too."
                )
            weave.init(self.project_name)
        if self.model_name is None:
            config = getattr(unwrapped(self.trainer.model), "config", None)
            self.model_name = getattr(config, "_name_or_path", "") or "unknown_model"
        self._ready = True

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self._last_logged_step:
            return
        self._last_logged_step = state.global_step
        completions = _complete(self.trainer, self._prompts, self.generation_config)
        if not state.is_world_process_zero:
            return
        self._start()
        tokenizer = _tokenizer(self.trainer)
        try:
            self._log([_text(tokenizer, ids) for ids in self._prompts], completions, state.global_step)
        except Exception as error:  # a dashboard that is down must not end a run
            logger.warning(f"Weave did not take the completions of step {state.global_step}: {error}")

    def _log(self, prompts: list[str], completions: list[str], step: int) -> None:
        from weave import EvaluationLogger

        sampling = self.generation_config.to_dict() if self.generation_config is not None else None
        evaluation = EvaluationLogger(
            model=self.model_name,
            dataset=self.dataset_name,
            eval_attributes={"training_step": step, "model_name": self.model_name, "generation_config": sampling},
        )
        scores: dict[str, list[float]] = {name: [] for name in self.scorers}
        for prompt, completion in zip(prompts, completions, strict=True):
            prediction = evaluation.log_prediction(inputs={"prompt": prompt}, output=completion)
            for name, scorer in self.scorers.items():
                try:
                    score = scorer(prompt, completion)
                except Exception as error:
                    logger.warning(f"The scorer {name!r} failed at step {step}: {type(error).__name__}: {error}")
                    continue
                prediction.log_score(scorer=name, score=score)
                scores[name].append(score)
            prediction.finish()
        if any(scores.values()):
            means = {f"avg_{name}": sum(values) / len(values) for name, values in scores.items() if values}
            evaluation.log_summary(
                {"total_predictions": len(prompts), "successful_predictions": len(completions), **means}
            )
        else:
            evaluation.finish()


def _tokenizer(trainer: Trainer) -> PreTrainedTokenizerBase:
    processor: Any = trainer.processing_class
    return processor.tokenizer if isinstance(processor, ProcessorMixin) else processor


def _text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], **options: Any) -> str:
    return str(tokenizer.decode(list(ids), **options))


def _eval_prompts(trainer: Trainer, count: int | None, callback: str) -> list[list[int]]:
    """Token ids of the first `count` prompts of the trainer's evaluation dataset(s)."""
    dataset: Any = trainer.eval_dataset
    if dataset is None:
        raise ValueError(
            f"{callback} completes prompts of the evaluation dataset; pass the trainer an `eval_dataset`."
        )
    parts = list(dataset.values()) if isinstance(dataset, dict) else [dataset]
    if count is None and not all(has_length(part) for part in parts):
        raise ValueError(f"{callback} cannot complete all prompts of a streamed `eval_dataset`; pass `num_prompts`.")
    tokenizer = _tokenizer(trainer)
    return [_prompt_ids(row, tokenizer, callback) for row in itertools.islice(itertools.chain(*parts), count)]


def _prompt_ids(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, callback: str) -> list[int]:
    prompt: Any = row.get("prompt")
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    if is_messages(prompt):
        options = {"tools": row.get("tools"), **(row.get("chat_template_kwargs") or {})}
        unfinished = prompt[-1]["role"] == "assistant"  # it is to be continued, not answered
        text = tokenizer.apply_chat_template(
            prompt,
            add_generation_prompt=not unfinished,
            continue_final_message=unfinished,
            tokenize=False,
            **options,
        )
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    labels = row.get("labels")
    if labels is not None and "input_ids" in row:
        length = next((i for i, label in enumerate(labels) if label != -100), 0)
        if length > 0:
            return list(row["input_ids"][:length])
    raise ValueError(
        f"{callback} needs prompts, and the evaluation dataset has {', '.join(map(repr, row))}; add a column 'prompt' "
        "of texts or messages."
    )


def _complete(trainer: Trainer, prompts: Sequence[Sequence[int]], config: GenerationConfig | None) -> list[str]:
    """One completion for each prompt, as text, on every process. The processes share the work, so all must call it.

    The model is in evaluation mode meanwhile, and what sampling draws does not change what training draws.
    """
    accelerator, tokenizer = trainer.accelerator, _tokenizer(trainer)
    rank, world = accelerator.process_index, accelerator.num_processes
    share = math.ceil(len(prompts) / world)
    # As many for each process, because a sharded model works only where all take part.
    mine = [prompts[(i * world + rank) % len(prompts)] for i in range(share)]
    wrapped = trainer.model_wrapped
    model: Any = accelerator.unwrap_model(wrapped)
    ends = eos_token_ids(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
    size = trainer.args.per_device_eval_batch_size
    device = trainer.args.device
    # FSDP1 gathers the layers by itself, but not what lies outside them.
    outside = (
        FullyShardedDataParallel.summon_full_params(wrapped, writeback=False, recurse=False)
        if isinstance(wrapped, FullyShardedDataParallel)
        else nullcontext()
    )
    texts: list[str] = []
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), outside, torch.random.fork_rng([device] if device.type == "cuda" else []):
            for start in range(0, len(mine), size):
                ids, mask = pad_ids(mine[start : start + size], pad, "left")
                options = {} if config is None else {"generation_config": config}
                sampled = model.generate(
                    input_ids=ids.to(device), attention_mask=mask.to(device), pad_token_id=pad, **options
                )
                for row in sampled[:, ids.size(1) :].tolist():
                    texts.append(_text(tokenizer, cut_after_eos(row, set(ends)), skip_special_tokens=True))
    finally:
        model.train(was_training)
    gathered = gather_object(texts)
    return [gathered[(i % world) * share + i // world] for i in range(len(prompts))]


# ---------------------------------------------------------------------- progress


class RichProgressCallback(TrainerCallback):
    """Shows the progress of training and evaluation, and the newest metrics, in a live panel on the terminal."""

    def __init__(self) -> None:
        self._live: Live | None = None
        self._training = self._evaluation = Progress()
        self._training_task: Any = None
        self._evaluation_task: Any = None
        self._status: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        self._stop()
        self._training, self._evaluation = Progress(), Progress()
        self._status = Console().status("Nothing to log yet ...")
        self._live = Live(Panel(Group(self._training, self._evaluation, self._status)))
        self._live.start()
        atexit.register(self._stop)  # training that ends by an error tells nobody; the terminal wants its cursor back
        self._training_task = self._training.add_task(
            "[blue]Training  ", total=state.max_steps, completed=state.global_step
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._live is not None:
            self._training.update(self._training_task, completed=state.global_step)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        dataloader = kwargs.get("eval_dataloader")
        if self._live is None or not has_length(dataloader):
            return
        if self._evaluation_task is None:
            self._evaluation_task = self._evaluation.add_task("[blue]Evaluation", total=len(dataloader))  # type: ignore[arg-type]
        self._evaluation.advance(self._evaluation_task)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._evaluation_task is not None:
            self._evaluation.remove_task(self._evaluation_task)
            self._evaluation_task = None

    def on_predict(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        self.on_evaluate(args, state, control)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._live is not None:
            title = f"[bold green]Step {state.global_step}[/bold green]"
            self._status.update(Panel(_metric_tables(kwargs.get("logs") or {}), title=title, border_style="green"))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._live is not None:
            self._live.stop()
            atexit.unregister(self._stop)
        self._live = self._evaluation_task = None


def _metric_tables(logs: Mapping[str, Any]) -> Columns:
    """A table for each group of metrics: `rewards/chosen` stands as `chosen` under `rewards`."""
    groups: dict[str, dict[str, Any]] = {}
    for key, value in logs.items():
        group, slash, name = key.partition("/")
        if not slash:
            group, name = "", key
        groups.setdefault(group, {})[name] = value
    panels = []
    for group, metrics in groups.items():
        table = Table(title=Text(group, "bold blue") if group else None, header_style="bold magenta", box=None)
        table.add_column("Metric", justify="left", no_wrap=True)
        table.add_column("Value", justify="right")
        for name, value in metrics.items():
            number = isinstance(value, float | int) and not isinstance(value, bool)
            table.add_row(Text(name), Text(_number(value) if number else str(value)))
        panels.append(Panel(table, border_style="cyan", padding=(0, 1)))
    return Columns(panels, equal=False, expand=True)


def _number(value: float) -> str:
    """Three decimals, or three digits where those would be zeros: a learning rate of 2e-6 is not 0.000."""
    return f"{value:.3f}" if value == 0 or abs(value) >= 1e-2 else f"{value:.2e}"
