"""The observer inside a training loop: our trainers add it, and it attaches unchanged to any `transformers.Trainer`.

It measures (losses before any filter, gradient norms, phase times, memory, the raw reward matrix), feeds the engine
once per optimizer step, writes the run directory, prints what the engine says, and carries out requests from
`control/` between two steps. Nothing here may stop or corrupt a run: every hook catches its own errors, says so
once, and lets training go on.

What happens between two steps (checkpoints, evaluation, logging) counts in the times of the step that follows. This
library's own work is told apart as `time/diagnostics`, of the step before.
"""

import atexit
import functools
import inspect
import math
import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from outspoken.diagnostics import changes, live, torch_probes
from outspoken.diagnostics import probes as host_probes
from outspoken.diagnostics.engine import Engine
from outspoken.diagnostics.groups import RewardRange, group_signals
from outspoken.diagnostics.journal import (
    RUN_FOLDER,
    Harmless,
    Journal,
    guarded,
    make_sinks,
    new_run_id,
    previous_run,
    replay,
    run_record,
)
from outspoken.diagnostics.patches import PatchRefused, check_patch, same_value
from outspoken.diagnostics.recorder import GroupRewards, StepRecorder
from outspoken.diagnostics.records import Observation, as_number
from outspoken.diagnostics.rundir import CHANGES, METRICS, RunDirectory, read_jsonl
from outspoken.diagnostics.sinks import Guarded

METHODS = (  # part of a trainer's class name -> method; the first match counts
    ("GRPO", "grpo"),
    ("RLOO", "rloo"),
    ("PPO", "ppo"),
    ("OnlineDPO", "online_dpo"),
    ("DPO", "dpo"),
    ("KTO", "kto"),
    ("ORPO", "orpo"),
    ("CPO", "cpo"),
    ("Reward", "reward"),
    ("Pairwise", "reward"),  # LLaMA-Factory's
    ("Distillation", "distillation"),
    ("SFT", "sft"),
)

MEMORY_EVERY = 10  # steps between two looks at NVML and the host's memory
GRADIENT_EVERY = 20  # steps between two looks at single gradient tensors
CHECKPOINTS_KEPT = 50  # newest checkpoints remembered
IGNORED_LABEL = -100
NO_METRICS = frozenset({"epoch", "step", "total_flos"})  # of what transformers logs


def method_of(trainer: Any) -> str:
    """The method a trainer trains by, from its class name or an ancestor's; a plain `Trainer` counts as "sft"."""
    names = [cls.__name__ for cls in type(trainer).__mro__]
    for part, method in METHODS:
        if f"{part}Trainer" in names:
            return method
    return next((method for name in names for part, method in METHODS if part in name), "sft")


@dataclass
class _Checkpoint:
    step: int
    path: str
    good: bool  # no error fired when it was written, nor was found later to have begun before


class DiagnosticsCallback(TrainerCallback, Harmless):
    """Watches a training run and says what is wrong with it.

    Args:
        run_dir: where to write the run directory; `<output_dir>/outspoken` by default.
        params: overrides of rule parameters, code -> {parameter: number}.
        ignore: codes of rules to switch off.
        sinks: where lines go; by default the console (or JSON lines with `OUTSPOKEN_LOG=json`), and OpenTelemetry
            when an OTLP endpoint is set.
        method: the method, where the trainer's class does not tell it.
        accept_requests: whether changes asked for through `control/` are carried out.

    Raises:
        ValueError: at the start of training, when `params` or `ignore` name an unknown rule or parameter.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike[str] | None = None,
        *,
        params: Mapping[str, Mapping[str, Any]] | None = None,
        ignore: Iterable[str] | None = None,
        sinks: list[Any] | None = None,
        method: str | None = None,
        accept_requests: bool = True,
    ):
        self.engine: Engine | None = None
        self.run_id: str | None = None
        self._run_dir = run_dir
        self._params, self._ignore = params, ignore if ignore is None else list(ignore)
        self._given_sinks = sinks
        self._method = method
        self._accept_requests = accept_requests
        self._trainer: Any = None
        self._recorder = StepRecorder()
        self._undo: list[Callable[[], None]] = []
        self._finished = True
        self._reset_run()

    def _reset_run(self) -> None:
        """What belongs to one call of `train`."""
        self.engine = None  # this and the journal are on rank 0 only
        self._journal: Journal | None = None
        self._sinks = None
        self._args: Any = None
        self._optimizer: Any = None
        self._scheduler: Any = None
        self._model: Any = None
        self._nvml: host_probes.NvmlProbe | None = None
        self._range = RewardRange()
        self._trial: changes.Trial | None = None
        self._carried_over: dict[str, Any] = {}  # changes of before a resume that hold on
        self._checkpoints: list[_Checkpoint] = []
        self._told = set()
        self._seen: dict[str, tuple[Any, int]] = {}  # metric -> the trainer's list, and how much of it was read
        self._measured: set[str] = set()  # names of the signals that are read at every step
        self._bad_gradient = False
        self._failures, self._off = 0, False
        self._own_seconds = 0.0
        self._last_step = 0
        self._reset_step()

    def _reset_step(self) -> None:
        self._losses: list[Any] = []
        self._step_values: dict[str, Any] = {}
        self._unsupervised: list[tuple[Any, int]] = []  # (rows without a label that counts, rows)
        self._optimizer_started: float | None = None
        self._optimizer_seconds = 0.0
        self._step_started = time.perf_counter()

    # ------------------------------------------------------------------ attaching

    def attach(self, trainer: Any) -> None:
        """Check the settings of the diagnostics before a trainer trains. Our trainers call this.

        Raises:
            ValueError: `params` or `ignore` name an unknown rule or parameter.
        """
        self._trainer = trainer
        Engine(
            method=self._method or method_of(trainer),
            config={},
            params=self._overrides(trainer.args),
            ignore=self._ignored(trainer.args),
        )

    def _overrides(self, args: Any) -> Mapping[str, Mapping[str, Any]] | None:
        if self._params is not None:
            return self._params
        own = getattr(args, "diagnostics_params", None)
        return own if isinstance(own, Mapping) else None

    def _ignored(self, args: Any) -> list[str]:
        return self._ignore if self._ignore is not None else list(getattr(args, "diagnostics_ignore", None) or [])

    def _find_trainer(self) -> Any:
        """The trainer whose loop called us: callbacks are not given it, so it is looked up on the call stack."""
        frame = inspect.currentframe()
        while frame is not None:
            owner = frame.f_locals.get("self")
            if isinstance(owner, Trainer) and self in owner.callback_handler.callbacks:
                return owner
            frame = frame.f_back
        return None

    # ------------------------------------------------------------------ the training loop's hooks

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._close("failed")  # what ended without a word, such as a batch size that auto_find_batch_size gave up
        self._reset_run()
        self._trainer = self._find_trainer() or self._trainer
        if self._trainer is not None:
            self.attach(self._trainer)  # mistakes in the user's own settings are told before training
        self._recorder = getattr(self._trainer, "recorder", None) or StepRecorder()
        self._optimizer, self._scheduler = kwargs.get("optimizer"), kwargs.get("lr_scheduler")
        if state.global_step > 0:
            kept: list[Any] = []
            if state.is_world_process_zero:
                self._find_kept_changes(args, state.global_step, kept)
            self._carry_over(args, self._share(args, kept))
        self._begin(args, state, **kwargs)

    @guarded
    def _begin(self, args: Any, state: Any, model: Any = None, **kwargs: Any) -> None:
        self._args, self._model = args, model
        self._last_step = state.global_step
        self._finished = False
        self._instrument()
        if state.is_world_process_zero:
            try:
                self._start_run(args, state)
            except Exception:
                self.engine, self._journal = None, None
                raise
            atexit.register(self._at_exit)
        self._reset_step()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._before_optimizer(state)
        self._optimizer_started = time.perf_counter()

    @guarded
    def _before_optimizer(self, state: Any) -> None:
        if self.engine is None:
            return
        if self._optimizer is not None:
            self._step_values["learning_rate"] = self._optimizer.param_groups[0]["lr"]
        if self._due(state.global_step + 1, GRADIENT_EVERY) and self._model is not None and not self._sharded():
            self._step_values["grad_norm_clipped"] = torch_probes.gradient_facts(self._model).get("grad_norm")

    def _sharded(self) -> bool:
        """Whether a process sees only its share of the gradients, or (DeepSpeed) none."""
        return any(getattr(self._trainer, f"is_{how}_enabled", False) for how in ("fsdp", "deepspeed"))

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._optimizer_started is not None:
            self._optimizer_seconds += time.perf_counter() - self._optimizer_started

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._last_step = state.global_step
        if self._journal is not None:
            self._journal.step = state.global_step
        self._average_losses(args)
        actions: list[dict[str, Any]] = []
        if self.engine is not None:
            self._observe_step(state, actions)
        self._recorder.take()  # what nobody took
        for action in self._share(args, actions):
            self._carry_out(action)
        self._reset_step()

    def _average_losses(self, args: Any) -> None:
        """The mean over all processes; each has the loss of its own rows. Every process takes part, come what may."""
        if args.world_size == 1 or not torch.distributed.is_initialized():
            return
        summed = [sum(float(loss) for loss in self._losses), 1.0] if self._losses else [0.0, 0.0]
        total = torch.tensor(summed, device=args.device)
        torch.distributed.all_reduce(total)
        self._losses = [total[0] / total[1]] if total[1] > 0 else []

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, Any] | None = None, **kw: Any
    ) -> None:
        self._evaluated(state, metrics or {})

    @guarded
    def _evaluated(self, state: Any, metrics: dict[str, Any]) -> None:
        if self.engine is not None and not self._finished:
            values = {k: v for k, v in metrics.items() if k.startswith("eval_")}
            self._tell(Observation.from_raw(state.global_step, values, time.time(), state.epoch))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kw: Any) -> None:
        self._logged(state, logs or {})

    @guarded
    def _logged(self, state: Any, logs: dict[str, Any]) -> None:
        """Pick up what a trainer logs and does not show at every step; all else was measured when the step ended."""
        if self.engine is None or self._finished or any(k.startswith("eval_") for k in logs):
            return
        known = NO_METRICS | self._measured | self._metric_lists().keys()
        picked = {k: v for k, v in logs.items() if k not in known and not k.startswith("train_") and v is not None}
        if picked:
            self._tell(Observation.from_raw(state.global_step, picked, time.time(), state.epoch))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._saved(args, state.global_step)

    @guarded
    def _saved(self, args: Any, step: int) -> None:
        if self.engine is not None:
            good = not self.engine.errors("firing") and self.engine.verdict()["state"] not in ("broken", "collapsing")
            self._checkpoints.append(_Checkpoint(step, _checkpoint_path(args, step), good))
            del self._checkpoints[:-CHECKPOINTS_KEPT]

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._close("finished")

    # ------------------------------------------------------------------ measuring

    def _instrument(self) -> None:
        """Wrap the trainer's own methods on the instance, so that phases are timed and raw values seen."""
        trainer = self._trainer
        if trainer is None:
            return
        for name in ("_evaluate", "_run_epoch", "_finalize_training"):  # all that follows on_train_begin
            self._wrap(name, self._until_it_fails)
        self._wrap("training_step", self._around_training_step)
        self._wrap("get_batch_samples", self._timed("data"))
        self._wrap("_clip_grad_norm", self._around_clip)
        self._wrap("_get_grad_norm", self._around_grad_norm)
        self._wrap("_save_checkpoint", self._timed("save"))
        self._wrap("evaluate", self._timed("eval"))
        if not hasattr(trainer, "recorder"):  # ours times these itself
            self._wrap("_generate", self._timed("generate", in_eval=False))
            self._wrap("_calculate_rewards", self._around_rewards)

    def _wrap(self, name: str, around: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        trainer = self._trainer
        original = getattr(trainer, name, None)
        if original is None:
            return
        had_own = name in vars(trainer)
        setattr(trainer, name, functools.wraps(original)(around(original)))

        def undo() -> None:
            if had_own:
                setattr(trainer, name, original)
            else:
                vars(trainer).pop(name, None)

        self._undo.append(undo)

    def _until_it_fails(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Callbacks are not told when training ends by an exception."""

        def watched(*args: Any, **kwargs: Any) -> Any:
            try:
                return original(*args, **kwargs)
            except BaseException as error:
                self._close("interrupted" if isinstance(error, KeyboardInterrupt | SystemExit) else "failed")
                raise

        return watched

    def _timed(self, phase: str, in_eval: bool = True) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Time the calls of a method as a phase; with `in_eval=False` those of evaluation are left to that."""

        def around(original: Callable[..., Any]) -> Callable[..., Any]:
            def timed(*args: Any, **kwargs: Any) -> Any:
                if not in_eval and not self._trainer.model.training:
                    return original(*args, **kwargs)
                with self._recorder.phase(phase):
                    return original(*args, **kwargs)

            return timed

        return around

    def _around_training_step(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def training_step(*args: Any, **kwargs: Any) -> Any:
            with self._recorder.phase("forward_backward"):
                loss = original(*args, **kwargs)
            self._losses.append(loss)
            self._look_at_labels(args)
            return loss

        return training_step

    @guarded
    def _look_at_labels(self, args: tuple[Any, ...]) -> None:
        """Rows without one label that counts, for trainers that do not report them themselves."""
        if self.engine is None or hasattr(self._trainer, "recorder"):
            return
        labels = args[1].get("labels") if len(args) > 1 and isinstance(args[1], Mapping) else None
        if isinstance(labels, torch.Tensor) and labels.ndim == 2 and not labels.is_floating_point():
            without = (
                (labels == IGNORED_LABEL).all(dim=1).sum()
            )  # read when the step has ended: no wait for the device
            self._unsupervised.append((without, len(labels)))

    def _around_clip(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def clip(*args: Any, **kwargs: Any) -> Any:
            self._look_at_gradients()
            with self._recorder.phase("optimizer"):
                norm = original(*args, **kwargs)
            self._step_values["grad_norm"] = norm
            return norm

        return clip

    def _around_grad_norm(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def grad_norm(*args: Any, **kwargs: Any) -> Any:
            if "grad_norm" not in self._step_values:  # max_grad_norm=0: nothing was clipped
                self._look_at_gradients()
            norm = original(*args, **kwargs)
            self._step_values["grad_norm"] = norm
            return norm

        return grad_norm

    @guarded
    def _look_at_gradients(self) -> None:
        """Single tensors before clipping: now and then, and where the loss or the last gradient was not finite."""
        if self.engine is None or self._model is None or self._sharded():
            return
        due = self._due(self._last_step + 1, GRADIENT_EVERY) or self._bad_gradient
        if not due and all(math.isfinite(float(loss)) for loss in self._losses):
            return
        facts = torch_probes.gradient_facts(self._model)
        self._step_values.update({k: facts[k] for k in ("grad/zero_share", "grad/nonfinite") if k in facts})
        known = self.engine.view.facts
        if facts.get("grad/nonfinite_names") and not (self._bad_gradient and "grad/nonfinite_names" in known):
            known["grad/nonfinite_names"] = facts["grad/nonfinite_names"]  # of the step where it began, not the rest

    def _around_rewards(self, original: Callable[..., Any]) -> Callable[..., Any]:
        timed = self._timed("score", in_eval=False)(original)

        def calculate_rewards(*args: Any, **kwargs: Any) -> Any:
            per_function = timed(*args, **kwargs)
            self._hand_over_rewards(per_function)
            return per_function

        return calculate_rewards

    @guarded
    def _hand_over_rewards(self, per_function: Any) -> None:
        """TRL's scores, (samples, functions), as groups: its generations of a prompt lie next to each other."""
        trainer = self._trainer
        if self.engine is None or not trainer.model.training:
            return
        group = int(trainer.num_generations)
        weights = trainer.reward_weights.to(per_function.device).unsqueeze(0)
        total = (per_function * weights).nansum(dim=1)
        total[per_function.isnan().all(dim=1)] = math.nan
        columns = {
            name: per_function[:, i].view(-1, group).tolist() for i, name in enumerate(trainer.reward_func_names)
        }
        self._recorder.rewards(total.view(-1, group).tolist(), columns)

    def _due(self, step: int, every: int) -> bool:
        return step % every == 0 or step <= 2

    def _measure(self, state: Any) -> dict[str, Any]:
        """All signals of the step that just ended, as raw as they came."""
        step = state.global_step
        taken = self._recorder.take()
        values: dict[str, Any] = self._new_metrics() | taken.signals | self._reward_signals(taken.rewards)
        if self._unsupervised:
            rows = sum(n for _, n in self._unsupervised)
            values["samples/no_supervised"] = sum(int(k) for k, _ in self._unsupervised) / rows
            values["samples/no_supervised#n"] = rows
        if self._losses:
            values["loss"] = sum(float(loss) for loss in self._losses)
        values |= {k: as_number(v) for k, v in self._step_values.items()}
        if self._optimizer_seconds:
            values["time/optimizer"] = values.get("time/optimizer", 0.0) + self._optimizer_seconds
        values["time/step"] = time.perf_counter() - self._step_started
        values["time/diagnostics"], self._own_seconds = self._own_seconds, 0.0
        grad_norm = values.get("grad_norm")
        self._bad_gradient = grad_norm is not None and not math.isfinite(grad_norm)
        if self._bad_gradient and self._model is not None:
            values["parameters/nonfinite"] = torch_probes.nonfinite_parameters(self._model)
        device = self._args.device
        if device.type == "cuda":
            values |= torch_probes.allocator_memory(device, reset_peak=True)
        if self._due(step, MEMORY_EVERY):
            values |= self._memory()
        self._measured |= values.keys()
        return values

    def _reward_signals(self, batches: list[GroupRewards]) -> dict[str, float]:
        """Signals of the reward matrices of the step's generation batches, taken as one."""
        if not batches:
            return {}
        total = [group for batch in batches for group in batch.total]
        columns = {
            name: [group for batch in batches for group in batch.per_function[name]]
            for name in batches[0].per_function
        }
        return {"num_completions": sum(map(len, total)), **group_signals(total, columns, self._range)}

    def _memory(self) -> dict[str, float]:
        values = {**host_probes.host_memory(), **host_probes.cgroup_memory()}
        if self._nvml is not None:
            values.update(self._nvml.read())
        return values

    def _metric_lists(self) -> Mapping[str, Any]:
        """Metric -> the values since the last log, where a trainer collects them as ours and TRL's do."""
        lists = getattr(self._trainer, "_metrics", None)
        lists = lists.get("train") if isinstance(lists, Mapping) else None
        return lists if isinstance(lists, Mapping) else {}

    def _new_metrics(self) -> dict[str, Any]:
        """Mean of what the trainer appended to its lists of metrics during this step, NaN left out as it does."""
        values: dict[str, Any] = {}
        for name, entries in self._metric_lists().items():
            if not isinstance(entries, list):
                continue
            known, seen = self._seen.get(name, (None, 0))
            new = entries[seen if known is entries else 0 :]  # after a log the trainer begins a new list
            self._seen[name] = (entries, len(entries))
            if not new:
                continue
            numbers = [as_number(value) for value in new]
            finite = [x for x in numbers if x is not None and not math.isnan(x)]
            if finite:
                values[name] = sum(finite) / len(finite)
            else:
                values[name] = math.nan if None not in numbers else new[-1]
        return values

    # ------------------------------------------------------------------ the engine's side, rank 0 only

    def folder(self, args: Any) -> Path:
        """Where the run directory is."""
        return Path(self._run_dir) if self._run_dir is not None else Path(args.output_dir) / RUN_FOLDER

    @guarded
    def _find_kept_changes(self, args: Any, step: int, kept: list[dict[str, Any]]) -> None:
        """Put the settings that were changed live before the checkpoint of `step` into `kept`.

        Who starts the run again does so with the settings of its first start. A setting that was edited since holds.
        """
        if not self._accept_requests or previous_run(self.folder(args)) is None:
            return
        asked, _ = read_jsonl(self.folder(args) / CHANGES)
        observed, _ = read_jsonl(self.folder(args) / METRICS)
        config, fields = live.config_of(args), live.live_fields(self._trainer, args)
        for name, (old, new) in changes.lasting(asked, observed, step).items():
            if name in fields and same_value(config.get(name), old):
                kept.append({name: new})

    @guarded
    def _carry_over(self, args: Any, kept: list[dict[str, Any]]) -> None:
        self._carried_over = {name: new for field in kept for name, new in field.items()}
        # The checkpoint's schedule and optimizer have the changed learning rate already, if it holds them.
        schedule = getattr(self._scheduler, "scheduler", self._scheduler)
        not_loaded = args.learning_rate in getattr(schedule, "base_lrs", ())
        rates = (self._optimizer, self._scheduler) if not_loaded else (None, None)
        live.apply_fields(self._trainer, args, self._carried_over, *rates)

    def _start_run(self, args: Any, state: Any) -> None:
        trainer = self._trainer
        method = self._method or (method_of(trainer) if trainer is not None else "sft")
        folder = self.folder(args)
        # From step 0 it is another run; the writer sets aside what one before it left here.
        previous = previous_run(folder) if state.global_step > 0 else None
        self.run_id = previous["id"] if previous is not None else new_run_id(method)
        self._sinks = self._make_sinks()
        config = live.config_of(args)
        bounds = live.live_fields(trainer, args) if self._accept_requests else {}
        facts: dict[str, Any] = {
            "live_fields": sorted(bounds),
            "world_size": config["world_size"],
            **torch_probes.parameter_facts(self._model, self._optimizer),
            **torch_probes.device_facts(args.device),
            **self._recorder.facts,
        }
        if hasattr(trainer, "reward_func_names"):
            facts["reward_functions"] = list(trainer.reward_func_names)
        uuid = facts.get("device_uuid")
        self._nvml = host_probes.NvmlProbe([uuid] if uuid else None) if args.device.type == "cuda" else None
        self.engine = Engine(
            method=method,
            config=config,
            facts=facts,
            params=self._overrides(args),
            ignore=self._ignored(args),
            total_steps=state.max_steps or None,
            run_id=self.run_id,
        )
        writer = RunDirectory(folder, resume=previous is not None, say=self._note)
        if previous is not None:
            self._replay(previous, folder, args, state.global_step)
            self.engine.open_segment(state.global_step, "resumed", config)
            if self._carried_over:
                kept = ", ".join(f"{name}={value}" for name, value in self._carried_over.items())
                self._note(f"resumed with the changes made before step {state.global_step}: {kept}")
        record = run_record(
            self.engine,
            previous,
            trainer=f"{type(trainer).__module__}.{type(trainer).__qualname__}" if trainer is not None else None,
            step=state.global_step,
            live=bounds,
            hardware=_hardware(args),
            world_size=config["world_size"],
            dataset=_dataset_facts(trainer),
        )
        self._journal = Journal(self.engine, writer, self._sinks, record)
        self._journal.start(fresh=previous is None)

    def _make_sinks(self) -> list[Guarded]:
        return make_sinks(self._given_sinks, self.run_id)

    @guarded
    def _replay(self, previous: Mapping[str, Any], folder: Path, args: Any, step: int) -> None:
        """Give a resumed run's engine what it had seen before the checkpoint."""
        assert self.engine is not None

        def seen(at: int) -> None:
            if os.path.isdir(_checkpoint_path(args, at)):
                self._saved(args, at)

        replay(self.engine, folder, previous, step, seen)
        view = self.engine.view
        self._range = RewardRange(view.last("rewards/min_seen"), view.last("rewards/max_seen"))

    @guarded
    def _observe_step(self, state: Any, actions: list[dict[str, Any]]) -> None:
        """Measure the step, tell everybody, and put what is to be done about it into `actions`."""
        assert self._journal is not None
        self._tell(Observation.from_raw(state.global_step, self._measure(state), time.time(), state.epoch))
        self._journal.writer.heartbeat(state.global_step)
        if self._trial is not None:
            actions += self._judge_trial(self._trial)
        if not actions:  # otherwise requests wait until the rollback is done
            asked = self._journal.take_requests(
                lambda request, accepted: self._consider(request, state.global_step, accepted)
            )
            actions += [] if asked is None else [asked]

    def _tell(self, observation: Observation) -> None:
        assert self._journal is not None
        for transition in self._journal.tell(observation):
            if transition.kind == "transition":
                self._distrust_checkpoints(transition.record)

    def _distrust_checkpoints(self, record: Mapping[str, Any]) -> None:
        """An error that fires now began earlier: checkpoints written in between hold what it did."""
        if record["state"] == "firing" and record["severity"] == "error" and record["onset_step"] is not None:
            for checkpoint in self._checkpoints:
                if checkpoint.step >= record["onset_step"]:
                    checkpoint.good = False

    # ------------------------------------------------------------------ changes

    def _consider(self, request: dict[str, Any], step: int, accepted: dict[str, Any] | None) -> dict[str, Any] | str:
        """What to do about a request, or why it is refused."""
        assert self.engine is not None
        if not self._accept_requests:
            return "this run takes no requests (accept_requests=False)"
        if self._trial is not None:
            return f"change {self._trial.record['id']} is on trial until step {self._trial.deadline}"
        if accepted is not None:
            return f"change {accepted['request']['id']} was asked for first; one change is tried at a time"
        config = self.engine.view.config
        try:
            fields = check_patch(request["patch"], config, live.live_fields(self._trainer, self._args))
        except PatchRefused as refused:
            return str(refused)
        new = {name: value for name, (_, value) in fields.items()}
        reason = live.refusal(self._trainer, config, new)
        if reason is not None:
            return reason
        restore = None
        if request.get("restore"):
            restore = self._last_good_checkpoint(request, step)
            if restore is None:
                return "no good checkpoint from before the trouble is there; save_steps says how often one is written"
        request = {**request, "fields": {name: {"old": old, "new": value} for name, (old, value) in fields.items()}}
        return {"set": new, "restore": restore, "request": request, "why": "apply"}

    def _judge_trial(self, trial: changes.Trial) -> list[dict[str, Any]]:
        assert self._journal is not None
        judgement = self._journal.settle(trial)
        if judgement is None:
            return []
        self._trial = None
        if judgement.outcome == "verified" or not trial.record.get("rollback_on_failure"):
            return []
        old = {name: pair["old"] for name, pair in trial.record["fields"].items()}
        restore = self._last_good_checkpoint(trial.record, trial.step)
        return [{"set": old, "restore": restore, "request": trial.record, "why": "rollback"}]

    def _last_good_checkpoint(self, request: Mapping[str, Any], step: int) -> str | None:
        """The newest checkpoint of `step` or before it, from before what the change is to cure began."""
        assert self.engine is not None
        if getattr(self._trainer, "is_deepspeed_enabled", False):
            return None  # DeepSpeed loads checkpoints into an engine that has just been started only
        for record in self.engine.diagnostics().values():
            if record["id"] == request.get("diagnostic") and record["onset_step"] is not None:
                step = min(step, record["onset_step"] - 1)
        for checkpoint in reversed(self._checkpoints):
            if checkpoint.step <= step and checkpoint.good and os.path.isdir(checkpoint.path):
                return checkpoint.path
        return None

    def _share(self, args: Any, decided: list[Any]) -> list[Any]:
        """What rank 0 decided, on every rank, so that all do the same at the same step."""
        if not self._accept_requests or args.world_size == 1 or not torch.distributed.is_initialized():
            return decided
        box = [decided]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    def _carry_out(self, action: dict[str, Any]) -> None:
        """Make a change, on every rank; rank 0 also keeps the record. An error leaves the settings as they were."""
        request, restore = action["request"], action["restore"]
        applies = action["why"] == "apply"
        try:
            trial = None
            if self.engine is not None and applies:
                trial = changes.start_trial(
                    request, self.engine.view, self.engine.errors("firing", "suppressed", "unknown")
                )
            if restore is not None:
                self._restore(restore)
            live.apply_fields(self._trainer, self._args, action["set"], self._optimizer, self._scheduler)
        except Exception as error:
            self._undo_change(action, error)
            return
        self._record_change(action, trial)

    @guarded
    def _undo_change(self, action: dict[str, Any], error: Exception) -> None:
        was = {
            name: pair["old" if action["why"] == "apply" else "new"]
            for name, pair in action["request"]["fields"].items()
        }
        try:
            live.apply_fields(self._trainer, self._args, was, self._optimizer, self._scheduler)
        finally:
            if self._journal is not None:
                self._journal.change(
                    action["request"], "failed", f"could not be applied: {type(error).__name__}: {error}"
                )

    @guarded
    def _record_change(self, action: dict[str, Any], trial: changes.Trial | None) -> None:
        """Open a segment with the new config, and start the trial of the change."""
        journal = self._journal
        if journal is None:
            return
        request, restore = action["request"], action["restore"]
        journal.open_segment(f"change {request['id']}", live.config_of(self._args))
        if action["why"] == "apply":
            self._trial = trial
            went_back = f"weights and optimizer first went back to {restore}" if restore else ""
            journal.change(request, "applied", went_back)
        else:
            what = f"weights and optimizer from {restore}" if restore else "settings only: no good checkpoint is older"
            journal.change(request, "rolled_back", what)

    def _restore(self, checkpoint: str) -> None:
        """Load weights and optimizer state of a checkpoint into the live run. The step counter and schedule go on."""
        trainer, scheduler = self._trainer, self._scheduler
        schedule = None if scheduler is None else scheduler.state_dict()
        trainer._load_from_checkpoint(checkpoint, trainer.model)
        trainer._load_optimizer_and_scheduler(checkpoint)
        if schedule is not None:
            scheduler.load_state_dict(schedule)
            inner = getattr(scheduler, "scheduler", scheduler)
            base = getattr(inner, "base_lrs", None) or [None] * len(self._optimizer.param_groups)
            for group, rate, peak in zip(self._optimizer.param_groups, inner.get_last_lr(), base, strict=True):
                group["lr"] = rate
                if peak is not None:
                    group["initial_lr"] = peak
        for callback in trainer.callback_handler.callbacks:  # what they carry from step to step goes back too
            if hasattr(callback, "restore"):
                callback.restore(trainer.args, checkpoint)
        for rollouts in ("_buffered_inputs", "_micro_batches"):  # TRL's and ours: of the policy that was thrown away
            if hasattr(trainer, rollouts):
                setattr(trainer, rollouts, None)

    # ------------------------------------------------------------------ the end, and our own failures

    def _close(self, status: str) -> None:
        """End the run with this status, and take our wrappers off the trainer."""
        if self._finished:
            return
        self._finished = True
        atexit.unregister(self._at_exit)
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()
        try:
            if self._journal is not None:
                self._end_run(self._journal, status)
            if self._nvml is not None:
                self._nvml.close()
        except Exception as error:
            self._failed("closing the run", error)

    def _end_run(self, journal: Journal, status: str) -> None:
        rest = {k: v for k, v in self._recorder.take().signals.items() if k in ("time/save", "time/eval")}
        if rest and not self._off:  # after the last step, so that no step will tell
            self._tell(Observation.from_raw(self._last_step, rest, time.time()))
        journal.end(status)

    def _at_exit(self) -> None:
        self._close("interrupted")


def _checkpoint_path(args: Any, step: int) -> str:
    return os.path.join(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{step}")


def _hardware(args: Any) -> dict[str, Any]:
    device = args.device
    hardware: dict[str, Any] = {"device": str(device), "cpus": os.cpu_count(), "machine": platform.machine()}
    if device.type == "cuda":
        hardware["name"] = torch.cuda.get_device_name(device)
        hardware["memory_gib"] = torch.cuda.get_device_properties(device).total_memory / 2**30
    return hardware


def _dataset_facts(trainer: Any) -> dict[str, Any]:
    dataset = getattr(trainer, "train_dataset", None)
    if dataset is None:
        return {}
    facts: dict[str, Any] = {"fingerprint": getattr(dataset, "_fingerprint", None)}
    if hasattr(dataset, "__len__"):
        facts["rows"] = len(dataset)
    if getattr(dataset, "column_names", None):
        facts["columns"] = list(dataset.column_names)
    return facts
