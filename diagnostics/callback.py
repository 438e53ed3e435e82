"""The observer inside a training loop: our trainers add it, and it attaches unchanged to any `transformers.Trainer`.

It measures (losses before any filter, gradient norms, phase times, memory, the raw reward matrix), feeds the engine
once per optimizer step, writes the run directory, prints what the engine says, and carries out requests from
`control/` between two steps. Nothing here may stop or corrupt a run: every hook catches its own errors, says so
once, and lets training go on.
"""

import atexit
import functools
import inspect
import math
import os
import platform
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

import outspoken
from outspoken.diagnostics import changes, live, torch_probes
from outspoken.diagnostics import probes as host_probes
from outspoken.diagnostics.engine import Engine
from outspoken.diagnostics.groups import RewardRange, group_signals
from outspoken.diagnostics.patches import PatchRefused, check_patch
from outspoken.diagnostics.recorder import Recorder
from outspoken.diagnostics.records import Observation
from outspoken.diagnostics.rundir import BadRequest, RunDirectory, read_json, read_jsonl
from outspoken.diagnostics.sinks import Guarded, default_sinks

RUN_SCHEMA = "outspoken.run/1"
RUN_FOLDER = "outspoken"  # the run directory is <output_dir>/outspoken

METHODS = (  # trainer class name -> method; the first match in the class's ancestry counts
    ("GRPO", "grpo"),
    ("RLOO", "rloo"),
    ("PPO", "ppo"),
    ("OnlineDPO", "online_dpo"),
    ("DPO", "dpo"),
    ("KTO", "kto"),
    ("ORPO", "orpo"),
    ("CPO", "cpo"),
    ("Reward", "reward"),
    ("Distillation", "distillation"),
    ("SFT", "sft"),
)

MEMORY_EVERY = 10  # steps between two looks at NVML and the host's memory
GRADIENT_EVERY = 20  # steps between two looks at single gradient tensors
FAILURES_BEFORE_OFF = 5
HISTORY_REPLAYED = 20_000  # observations replayed into the engine when a run is resumed


def method_of(trainer: Any) -> str:
    """The method a trainer trains by, from its class name or an ancestor's; a plain `Trainer` counts as "sft"."""
    for cls in type(trainer).__mro__:
        for part, method in METHODS:
            if part in cls.__name__:
                return method
    return "sft"


def _guarded(hook: Callable[..., None]) -> Callable[..., None]:
    """Keep an error of ours from reaching the training loop: report it once, give up after a few."""

    @functools.wraps(hook)
    def safe(self: "DiagnosticsCallback", *args: Any, **kwargs: Any) -> None:
        if self._off:
            return
        try:
            hook(self, *args, **kwargs)
        except Exception as error:
            self._failed(hook.__name__, error)

    return safe


@dataclass
class _Checkpoint:
    step: int
    path: str
    good: bool  # no error fired when it was written


class DiagnosticsCallback(TrainerCallback):
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
        self._params, self._ignore = params, list(ignore) if ignore is not None else None
        self._sinks: list[Any] | None = None if sinks is None else [Guarded(sink) for sink in sinks]
        self._method = method
        self._accept_requests = accept_requests
        self._trainer: Any = None
        self._recorder = Recorder()
        self._writer: RunDirectory | None = None
        self._run_record: dict[str, Any] = {}
        self._args: Any = None
        self._optimizer: Any = None
        self._scheduler: Any = None
        self._model: Any = None
        self._undo: list[Callable[[], None]] = []
        self._off = False
        self._bad_gradient = False
        self._failures = 0
        self._finished = True
        self._optimizer_started: float | None = None
        self._reset_step()
        self._seen: dict[str, int] = {}
        self._range = RewardRange()
        self._nvml: host_probes.NvmlProbe | None = None
        self._trial: changes.Trial | None = None
        self._checkpoints: list[_Checkpoint] = []
        self._verdict_told: str | None = None
        self._step_started = 0.0
        self._restore_before: int | None = None
        self._last_step = 0

    # ------------------------------------------------------------------ attaching

    def attach(self, trainer: Any) -> None:
        """Bind to a trainer before it trains. Our trainers call this; for others it is done when training starts."""
        self._trainer = trainer
        self._recorder = getattr(trainer, "recorder", None) or self._recorder
        # Mistakes in the user's own settings are errors of the user's, told before training.
        args = trainer.args
        Engine(
            method=self._method or method_of(trainer),
            config={},
            params=self._overrides(args),
            ignore=self._ignored(args),
        )
        original = trainer.train

        @functools.wraps(original)
        def train(*a: Any, **k: Any) -> Any:
            try:
                return original(*a, **k)
            except BaseException as error:
                self._close("interrupted" if isinstance(error, KeyboardInterrupt) else "failed")
                raise

        trainer.train = train

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
        if self._trainer is None:
            self._trainer = self._find_trainer()
            self._recorder = getattr(self._trainer, "recorder", None) or self._recorder
        self._params, self._ignore = self._overrides(args), self._ignored(args)
        self._begin(args, state, **kwargs)

    @_guarded
    def _begin(self, args: Any, state: Any, model: Any = None, **kwargs: Any) -> None:
        self._args, self._model = args, model
        self._optimizer, self._scheduler = kwargs.get("optimizer"), kwargs.get("lr_scheduler")
        self._seen, self._reset = {}, None
        self._finished = False
        self._last_step = state.global_step
        self._instrument()
        if not state.is_world_process_zero:
            return
        self._start_run(args, state)
        self._step_started = time.perf_counter()
        atexit.register(self._at_exit)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._before_optimizer(state)

    @_guarded
    def _before_optimizer(self, state: Any) -> None:
        if self._optimizer is not None:
            self._step_values["learning_rate"] = self._optimizer.param_groups[0]["lr"]
        if self.engine is not None and self._due(state.global_step + 1, GRADIENT_EVERY) and self._model is not None:
            clipped = torch_probes.gradient_facts(self._model).get("grad_norm")
            if clipped is not None:
                self._step_values["grad_norm_clipped"] = clipped
        self._optimizer_started = time.perf_counter()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._optimizer_started is not None:
            elapsed = time.perf_counter() - self._optimizer_started
            self._optimizer_seconds += elapsed

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        actions: list[dict[str, Any]] = []
        if self.engine is not None and not self._off:
            started = time.perf_counter()
            try:
                actions = self._observe_step(state)
            except Exception as error:
                self._failed("on_step_end", error)
            self._own_seconds = time.perf_counter() - started
        self._reset_step()
        self._recorder.take() if self.engine is None else None
        actions = self._share(args, actions)
        for action in actions:
            self._carry_out(action)
        self._step_started = time.perf_counter()

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, Any] | None = None, **kw: Any
    ) -> None:
        self._evaluated(state, metrics or {})

    @_guarded
    def _evaluated(self, state: Any, metrics: dict[str, Any]) -> None:
        if self.engine is None or self._finished:
            return
        values = {k: v for k, v in metrics.items() if k.startswith("eval_")}
        self._tell(Observation.from_raw(state.global_step, values, time.time(), state.epoch))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kw: Any) -> None:
        self._logged(state, logs or {})

    @_guarded
    def _logged(self, state: Any, logs: dict[str, Any]) -> None:
        """Metrics are read at every step; here only those that a trainer logs by other ways are picked up."""
        self._seen.clear()  # the trainer's lists of metrics start anew after each log
        if self.engine is None or self._finished or any(k.startswith("eval_") for k in logs):
            return
        known = {"loss", "grad_norm", "learning_rate", "epoch", "step", "total_flos", "train_loss", "train_runtime"}
        rings = self.engine.view.rings
        extra = {k: v for k, v in logs.items() if k not in known and k not in rings and not k.startswith("train_")}
        self._logged_only.update(dict.fromkeys(extra))
        picked = {k: logs[k] for k in self._logged_only if k in logs}
        if picked:
            self._tell(Observation.from_raw(state.global_step, picked, time.time(), state.epoch))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._saved(args, state)

    @_guarded
    def _saved(self, args: Any, state: Any) -> None:
        if self.engine is None:
            return
        path = os.path.join(args.output_dir, f"checkpoint-{state.global_step}")
        good = not self._errors() and self.engine.verdict()["state"] not in ("broken", "collapsing")
        self._checkpoints.append(_Checkpoint(state.global_step, path, good))
        del self._checkpoints[:-50]

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._close("finished")

    # ------------------------------------------------------------------ measuring

    def _reset_step(self) -> None:
        self._losses: list[Any] = []
        self._step_values: dict[str, float] = {}
        self._optimizer_started = None
        self._optimizer_seconds = 0.0
        self._own_seconds = getattr(self, "_own_seconds", 0.0)
        self._logged_only: dict[str, None] = getattr(self, "_logged_only", {})

    def _instrument(self) -> None:
        """Wrap the trainer's own methods on the instance, so that phases are timed and raw values seen."""
        trainer = self._trainer
        if trainer is None:
            return
        self._wrap("training_step", self._around_training_step)
        self._wrap("get_batch_samples", self._timed("data"))
        self._wrap("_clip_grad_norm", self._around_clip)
        self._wrap("_get_grad_norm", self._around_grad_norm)
        self._wrap("_save_checkpoint", self._timed("save"))
        self._wrap("evaluate", self._timed("eval"))
        if not hasattr(trainer, "recorder"):  # ours times these itself
            self._wrap("_generate", self._timed("generate"))
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

    def _timed(self, phase: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def around(original: Callable[..., Any]) -> Callable[..., Any]:
            def timed(*args: Any, **kwargs: Any) -> Any:
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

    def _look_at_labels(self, args: tuple[Any, ...]) -> None:
        """Rows without one label that counts, for trainers that do not report them themselves."""
        if hasattr(self._trainer, "recorder") or len(args) < 2 or not isinstance(args[1], Mapping):
            return
        labels = args[1].get("labels")
        if isinstance(labels, torch.Tensor) and labels.ndim == 2 and not labels.is_floating_point():
            counted = (labels != -100).any(dim=1)
            self._recorder.count("samples/no_supervised", int((~counted).sum()), counted.numel())

    def _around_clip(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def clip(model: Any) -> Any:
            self._look_at_gradients(model)
            with self._recorder.phase("optimizer"):
                norm = original(model)
            self._step_values["grad_norm"] = norm
            return norm

        return clip

    def _around_grad_norm(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def grad_norm(model: Any, grad_norm: Any = None) -> Any:
            norm = original(model, grad_norm=grad_norm)
            self._step_values["grad_norm"] = norm
            return norm

        return grad_norm

    @_guarded
    def _look_at_gradients(self, model: Any) -> None:
        """Single tensors before clipping, now and then, and after a step whose gradient was not finite."""
        if self.engine is None or not (self._due(self._last_step + 1, GRADIENT_EVERY) or self._bad_gradient):
            return
        facts = torch_probes.gradient_facts(model)
        self._step_values.update({k: facts[k] for k in ("grad/zero_share", "grad/nonfinite") if k in facts})
        if facts.get("grad/nonfinite_names"):
            self.engine.view.facts["grad/nonfinite_names"] = facts["grad/nonfinite_names"]

    def _around_rewards(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def calculate_rewards(*args: Any, **kwargs: Any) -> Any:
            with self._recorder.phase("score"):
                per_function = original(*args, **kwargs)
            try:
                self._hand_over_rewards(per_function)
            except Exception as error:
                self._failed("rewards", error)
            return per_function

        return calculate_rewards

    def _hand_over_rewards(self, per_function: Any) -> None:
        """TRL's scores, (samples, functions), as groups: its generations of a prompt lie next to each other."""
        trainer = self._trainer
        group = int(trainer.num_generations)
        if not trainer.model.training or per_function.shape[0] % group:
            return
        weights = trainer.reward_weights.to(per_function.device).unsqueeze(0)
        total = (per_function * weights).nansum(dim=1)
        total[per_function.isnan().all(dim=1)] = math.nan
        columns = {
            name: per_function[:, i].view(-1, group).tolist() for i, name in enumerate(trainer.reward_func_names)
        }
        self._recorder.rewards(total.view(-1, group).tolist(), columns)
        self._recorder.set("num_completions", per_function.shape[0])

    def _due(self, step: int, every: int) -> bool:
        return step % every == 0 or step <= 2

    def _measure(self, state: Any) -> dict[str, Any]:
        """All signals of the step that just ended."""
        step = state.global_step
        values: dict[str, Any] = {}
        taken = self._recorder.take()
        values.update(self._new_metrics())
        values.update(taken.signals)
        for rewards in taken.rewards:
            values.update(group_signals(rewards.total, rewards.per_function, self._range))
        if self._losses:
            values["loss"] = float(sum(float(loss) for loss in self._losses))
        values.update({k: _number(v) for k, v in self._step_values.items()})
        if self._optimizer_seconds:
            values["time/optimizer"] = values.get("time/optimizer", 0.0) + self._optimizer_seconds
        values["time/step"] = time.perf_counter() - self._step_started
        values["time/diagnostics"] = self._own_seconds
        grad_norm = values.get("grad_norm")
        self._bad_gradient = grad_norm is not None and not math.isfinite(grad_norm)
        if self._bad_gradient and self._model is not None:
            values["parameters/nonfinite"] = torch_probes.nonfinite_parameters(self._model)
        device = self._args.device
        if device.type == "cuda":
            values.update(torch_probes.allocator_memory(device, reset_peak=True))
        if self._due(step, MEMORY_EVERY):
            values.update(self._memory())
        return values

    def _memory(self) -> dict[str, float]:
        values = {**host_probes.host_memory(), **host_probes.cgroup_memory()}
        if self._nvml is not None:
            values.update(self._nvml.read())
        return values

    def _new_metrics(self) -> dict[str, float]:
        """Mean of what the trainer appended to its lists of metrics during this step, NaN left out as it does."""
        lists = getattr(self._trainer, "_metrics", None)
        if not isinstance(lists, Mapping) or "train" not in lists:
            return {}
        values = {}
        for name, entries in lists["train"].items():
            seen = self._seen.get(name, 0)
            if len(entries) < seen:  # the trainer began a new list
                seen = 0
            new = [float(v) for v in entries[seen:] if v is not None]
            replaced = name == "num_tokens" and len(entries) == 1  # a running total kept in a list of one
            self._seen[name] = 0 if replaced else len(entries)
            finite = [v for v in new if not math.isnan(v)]
            if finite:
                values[name] = sum(finite) / len(finite)
            elif new:
                values[name] = math.nan
        return values

    # ------------------------------------------------------------------ the engine's side, rank 0 only

    def _start_run(self, args: Any, state: Any) -> None:
        trainer = self._trainer
        method = self._method or (method_of(trainer) if trainer is not None else "sft")
        folder = Path(self._run_dir) if self._run_dir is not None else Path(args.output_dir) / RUN_FOLDER
        resumed = state.global_step > 0
        previous = _previous_run(folder)
        if not resumed:
            previous = None  # another run that wrote here is set aside by the writer
        self.run_id = previous["id"] if previous is not None else _new_run_id(method)
        config = live.config_of(args)
        bounds = live.live_fields(trainer, args)
        facts: dict[str, Any] = {
            "live_fields": sorted(bounds),
            "world_size": config["world_size"],
            **torch_probes.parameter_facts(self._model, self._optimizer),
            **torch_probes.device_facts(args.device),
            **self._recorder.facts,
        }
        uuid = facts.get("device_uuid")
        self._nvml = host_probes.NvmlProbe([uuid] if uuid else None) if args.device.type == "cuda" else None
        self.engine = Engine(
            method=method,
            config=config,
            facts=facts,
            params=self._params,
            ignore=self._ignore or (),
            total_steps=state.max_steps or None,
            run_id=self.run_id,
        )
        if self._sinks is None:
            self._sinks = list(default_sinks(os.environ, self.run_id))
        self._writer = RunDirectory(folder, resume=previous is not None, say=self._note)
        if previous is not None:
            self._replay(folder, state.global_step)
            self.engine.open_segment(state.global_step, "resumed", config)
        self._run_record = {
            "schema": RUN_SCHEMA,
            "id": self.run_id,
            "parent": previous.get("parent") if previous is not None else None,
            "method": method,
            "trainer": f"{type(trainer).__module__}.{type(trainer).__qualname__}" if trainer is not None else None,
            "status": "running",
            "started": previous["started"] if previous is not None else time.time(),
            "heartbeat": time.time(),
            "step": state.global_step,
            "total_steps": state.max_steps or None,
            "config": config,
            "live": bounds,
            "config_rev": self.engine.config_rev,
            "versions": _versions(),
            "hardware": _hardware(args),
            "world_size": config["world_size"],
            "dataset": _dataset_facts(trainer),
            "facts": {k: live._plain(v) for k, v in facts.items()},
            "segment": self.engine.view.segment,
            "verdict": None,
        }
        self._writer.write_run(self._run_record)
        self._writer.write_verdict(self.engine.verdict())

    def _replay(self, folder: Path, step: int) -> None:
        """Give a resumed run's engine what it had seen before the checkpoint."""
        assert self.engine is not None
        records, _ = read_jsonl(folder / "metrics.jsonl")
        old = [r for r in records if isinstance(r.get("step"), int) and r["step"] <= step][-HISTORY_REPLAYED:]
        segment = 0
        for record in old:
            if record.get("segment", 0) != segment:
                segment = record.get("segment", 0)
                self.engine.open_segment(record["step"], "as recorded")
            values = {k: v for k, v in record.get("signals", {}).items() if v is not None}
            self.engine.observe(
                Observation(
                    record["step"], values, record.get("nonfinite", {}), {}, record.get("time"), record.get("epoch")
                )
            )

    def _observe_step(self, state: Any) -> list[dict[str, Any]]:
        assert self.engine is not None and self._writer is not None
        self._last_step = state.global_step
        observation = Observation.from_raw(state.global_step, self._measure(state), time.time(), state.epoch)
        self._tell(observation)
        self._writer.heartbeat(state.global_step)
        actions = []
        if self._trial is not None:
            actions += self._judge_trial()
        if self._accept_requests:
            actions += self._requests(state.global_step)
        return actions

    def _tell(self, observation: Observation) -> None:
        """One observation to the engine, to disk, and what follows from it to everybody."""
        assert self.engine is not None and self._writer is not None
        transitions = self.engine.observe(observation)
        self._writer.append_observation(observation, self.engine.view.segment)
        for sink in self._sinks or []:
            sink.observation(observation.step, observation.signals)
        self._publish(transitions)

    def _publish(self, transitions: list[Any]) -> None:
        assert self.engine is not None and self._writer is not None
        for transition in transitions:
            if transition.kind == "transition":
                self._writer.append_diagnostic(transition.record)
            for sink in self._sinks or []:
                sink.transition(transition)
        verdict = self.engine.verdict()
        if verdict["state"] != self._verdict_told:
            self._verdict_told = verdict["state"]
            self._writer.write_verdict(verdict)
            for sink in self._sinks or []:
                sink.verdict(verdict)
        elif transitions or self.engine.view.points % 20 == 0:
            self._writer.write_verdict(verdict)
        digest = self.engine.take_digest()
        if digest:
            self._note(digest)
        for code, reason in self.engine.failed_rules().items():
            self._note_once(f"rule {code} is not evaluated: {reason}")

    def _errors(self) -> frozenset[str]:
        if self.engine is None:
            return frozenset()
        return frozenset(
            code
            for code, record in self.engine.diagnostics().items()
            if record["state"] == "firing" and record["severity"] == "error"
        )

    # ------------------------------------------------------------------ changes

    def _requests(self, step: int) -> list[dict[str, Any]]:
        """Take what agents asked for: one change at a time, the others wait or are refused with a reason."""
        assert self._writer is not None and self.engine is not None
        actions = []
        for request in self._writer.requests():
            if isinstance(request, BadRequest):
                self._change({"id": request.id, "patch": [], "actor": "unknown"}, "rejected", request.reason)
                self._writer.done(request.id)
                continue
            action = self._consider(request, step)
            if action is not None:
                actions.append(action)
            self._writer.done(request["id"])
        return actions

    def _consider(self, request: dict[str, Any], step: int) -> dict[str, Any] | None:
        assert self.engine is not None
        self._change(request, "requested", "")
        if self._trial is not None:
            other = self._trial.record["id"]
            self._change(request, "rejected", f"change {other} is on trial until step {self._trial.deadline}")
            return None
        config = self.engine.view.config
        try:
            fields = check_patch(request["patch"], config, live.live_fields(self._trainer, self._args))
        except PatchRefused as refused:
            self._change(request, "rejected", str(refused))
            return None
        new = {name: pair[1] for name, pair in fields.items()}
        reason = live.refusal(self._trainer, config, new)
        if reason is not None:
            self._change(request, "rejected", reason)
            return None
        request = {**request, "fields": {name: {"old": old, "new": value} for name, (old, value) in fields.items()}}
        restore = None
        if request.get("restore"):
            checkpoint = self._last_good_checkpoint(request, step)
            if checkpoint is None:
                lack = "no good checkpoint from before the trouble is there; save_steps says how often one is written"
                self._change(request, "rejected", lack)
                return None
            restore = checkpoint.path
        return {"set": new, "restore": restore, "request": request, "why": "apply"}

    def _judge_trial(self) -> list[dict[str, Any]]:
        assert self._trial is not None and self.engine is not None
        trial = self._trial
        judgement = changes.judge(trial, self.engine.view, self._errors())
        if judgement is None:
            return []
        self._trial = None
        self._change(trial.record, judgement.outcome, judgement.reason, dict(judgement.observed))
        if judgement.outcome == "verified" or not trial.record.get("rollback_on_failure"):
            return []
        old = {name: pair["old"] for name, pair in trial.record["fields"].items()}
        checkpoint = self._last_good_checkpoint(trial.record, trial.step)
        return [
            {
                "set": old,
                "restore": None if checkpoint is None else checkpoint.path,
                "request": trial.record,
                "why": "rollback",
            }
        ]

    def _last_good_checkpoint(self, request: Mapping[str, Any], step: int) -> _Checkpoint | None:
        """The newest checkpoint from before `step`, and before what the change is to cure began."""
        onset = step
        assert self.engine is not None
        for record in self.engine.diagnostics().values():
            if record["id"] == request.get("diagnostic") and record["onset_step"] is not None:
                onset = min(onset, record["onset_step"])
        for checkpoint in reversed(self._checkpoints):
            if checkpoint.step <= onset and checkpoint.good and os.path.isdir(checkpoint.path):
                return checkpoint
        return None

    def _share(self, args: Any, actions: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """All ranks carry out what rank 0 decided, at the same step."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()) or args.world_size == 1:
            return actions
        box = [actions]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    def _carry_out(self, action: dict[str, Any]) -> None:
        request, step = action["request"], self._last_step
        try:
            trial = None
            if self.engine is not None and action["why"] == "apply":
                trial = changes.start_trial(request, self.engine.view, self._errors())
            if action["restore"] is not None:
                self._restore(action["restore"])
            live.apply_fields(self._trainer, self._args, action["set"], self._optimizer, self._scheduler)
        except Exception as error:
            self._failed("applying a change", error)
            if self.engine is not None:
                self._change(request, "failed", f"could not be applied: {type(error).__name__}: {error}")
            return
        if self.engine is None or self._writer is None:
            return
        config = live.config_of(self._args)
        self.engine.open_segment(step, f"change {request['id']}", config)
        self._run_record |= {
            "config": config,
            "config_rev": self.engine.config_rev,
            "segment": self.engine.view.segment,
        }
        self._writer.write_run(self._run_record | {"step": step, "heartbeat": time.time()})
        if action["why"] == "apply":
            self._trial = trial
            source = action["restore"]
            self._change(request, "applied", f"weights and optimizer first went back to {source}" if source else "")
        else:
            source = action["restore"]
            said = f"weights and optimizer from {source}" if source else "settings only: no good checkpoint is older"
            self._change(request, "rolled_back", said)

    def _restore(self, checkpoint: str) -> None:
        """Load weights and optimizer state of a checkpoint into the live run. The step counter and schedule go on."""
        trainer = self._trainer
        scheduler_state = self._scheduler.state_dict() if self._scheduler is not None else None
        trainer._load_from_checkpoint(checkpoint, trainer.model)
        trainer._load_optimizer_and_scheduler(checkpoint)
        if scheduler_state is not None:
            self._scheduler.load_state_dict(scheduler_state)
            scheduler = getattr(self._scheduler, "scheduler", self._scheduler)
            for group, rate in zip(self._optimizer.param_groups, scheduler.get_last_lr(), strict=True):
                group["lr"] = rate
        if hasattr(trainer, "_buffered_inputs"):
            trainer._buffered_inputs = None  # rollouts of the policy that was thrown away

    def _change(
        self, request: dict[str, Any], state: str, reason: str, observed: dict[str, Any] | None = None
    ) -> None:
        assert self.engine is not None and self._writer is not None
        record = {
            "schema": changes.SCHEMA,
            "id": request["id"],
            "state": state,
            "step": self._last_step,
            "time": time.time(),
            "actor": request.get("actor", "unknown"),
            "patch": request.get("patch", []),
            "fields": request.get("fields", {}),
            "reason": reason[:2000],
            "suggestion": request.get("suggestion"),
            "diagnostic": request.get("diagnostic"),
            "segment": self.engine.view.segment,
            "config_rev": self.engine.config_rev,
            "expect": request.get("expect"),
            "observed": observed or {},
            "rollback_on_failure": bool(request.get("rollback_on_failure", False)),
            "run": self.run_id,
        }
        self._writer.append_change(record)
        for sink in self._sinks or []:
            sink.change(record)

    # ------------------------------------------------------------------ the end, and our own failures

    def _close(self, status: str) -> None:
        if self._finished:
            return
        self._finished = True
        atexit.unregister(self._at_exit)
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()
        if self.engine is None or self._writer is None:
            return
        try:
            self._publish(self.engine.finish())
            for request in self._writer.requests():
                if isinstance(request, BadRequest):
                    self._change({"id": request.id}, "rejected", request.reason)
                    self._writer.done(request.id)
                else:
                    self._change(request, "rejected", f"the run has {status}")
                    self._writer.done(request["id"])
            verdict = self.engine.verdict()
            self._writer.write_verdict(verdict)
            self._run_record |= {
                "status": status,
                "step": self._last_step,
                "heartbeat": time.time(),
                "verdict": verdict,
            }
            self._writer.write_run(self._run_record)
            self._writer.close()
            for sink in self._sinks or []:
                sink.close()
        except Exception as error:
            self._failed("closing the run", error)
        if self._nvml is not None:
            self._nvml.close()

    def _at_exit(self) -> None:
        self._close("interrupted")

    def _failed(self, where: str, error: Exception) -> None:
        self._failures += 1
        if os.environ.get("OUTSPOKEN_DEBUG"):
            raise error
        self._note_once(f"diagnostics failed in {where} ({type(error).__name__}: {error}); training goes on")
        if self._failures >= FAILURES_BEFORE_OFF and not self._off:
            self._off = True
            self._note("diagnostics are switched off for the rest of this run")

    def _note_once(self, text: str) -> None:
        told = self.__dict__.setdefault("_told", set())
        if text not in told:
            told.add(text)
            self._note(text)

    def _note(self, text: str) -> None:
        for sink in self._sinks or []:
            try:
                sink.note(text)
            except Exception:
                print(f"[outspoken] note: {text}", file=sys.stderr)


def _number(value: Any) -> float:
    return float(value.item()) if hasattr(value, "item") else float(value)


def _new_run_id(method: str) -> str:
    return f"{method}-{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}"


def _previous_run(folder: Path) -> dict[str, Any] | None:
    try:
        record = read_json(folder / "run.json")
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and record.get("schema") == RUN_SCHEMA else None


def _versions() -> dict[str, str]:
    versions = {
        "outspoken": outspoken.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    for name in ("trl", "peft", "accelerate", "vllm", "deepspeed"):
        module = sys.modules.get(name)
        if module is not None and hasattr(module, "__version__"):
            versions[name] = module.__version__
    return versions


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
