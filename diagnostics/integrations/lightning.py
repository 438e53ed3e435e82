"""Lightning: a callback for `lightning.pytorch` and `pytorch_lightning`.

    from outspoken.diagnostics.integrations.lightning import OutspokenCallback
    Trainer(callbacks=[OutspokenCallback(method="sft", config={"learning_rate": 1e-4})], …)

Each optimizer step is one observation: what `self.log` was given in `training_step`, the loss, the gradient norm before
clipping and the learning rate. What `validation_step` logs is taken when the evaluation ends, as Lightning sums it up.

Written for Lightning 2.6; the class is made when it is asked for, on the `Callback` of each of the two packages that is
loaded.
"""

import math
import sys
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from outspoken.diagnostics.loop import Recorder
from outspoken.diagnostics.records import as_number
from outspoken.diagnostics.sources.names import is_evaluation

PACKAGES = ("lightning.pytorch", "pytorch_lightning")
SHARDED = ("FSDP", "DeepSpeed", "ModelParallel")  # strategies in which a process sees its share of the gradients only

_made: dict[tuple[str, ...], type] = {}


class _Hooks:
    """Writes Lightning's run as a run directory, and says what is wrong with it while it trains.

    Args:
        output_dir: the run directory is `<output_dir>/outspoken`; by default the trainer's `default_root_dir`.
        settings: for `outspoken.Recorder`: `method`, `config`, `params`, `ignore`, `sinks`, `live`, `apply` …
    """

    def __init__(self, output_dir: Any = None, **settings: Any):
        super().__init__()
        self.recorder: Recorder | None = None
        self._output_dir, self._settings = output_dir, settings
        self._module: Any = None
        self._reset()

    def _reset(self) -> None:
        self._logged: dict[str, list[Any]] = {}  # in training, since the last optimizer step
        self._evaluated: set[str] = set()  # names logged in this evaluation
        self._losses: list[Any] = []
        self._grad_norm: float | None = None
        self._step = 0

    # ------------------------------------------------------------------ Lightning's hooks

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._reset()
        self._step = trainer.global_step
        settings = {"method": "unknown", **self._settings}
        settings["config"] = {**_settings_of(trainer), **(settings.get("config") or {})}
        settings.setdefault("total_steps", _total_steps(trainer))
        settings.setdefault("resume", trainer.global_step)
        settings.setdefault("trainer", "lightning")
        self.recorder = Recorder(
            self._output_dir if self._output_dir is not None else trainer.default_root_dir,
            rank=trainer.global_rank,
            **settings,
        )
        self._listen(trainer, pl_module)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if any(how in type(trainer.strategy).__name__ for how in SHARDED):
            return
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if gradients:
            squared = float(sum(gradient.detach().float().norm() ** 2 for gradient in gradients))
            self._grad_norm = math.sqrt(squared + (self._grad_norm or 0.0) ** 2)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if loss is not None:
            self._losses.append(loss)
        if trainer.global_step == self._step or self.recorder is None:  # gradients are still summed up
            return
        self._step = trainer.global_step
        metrics = {name: _mean(values) for name, values in self._logged.items()}
        if self._losses:
            # each was divided by the number of batches of a step
            metrics["loss"] = _mean(self._losses) * max(1, int(getattr(trainer, "accumulate_grad_batches", 1)))
        if self._grad_norm is not None:
            metrics["grad_norm"] = self._grad_norm
        if trainer.optimizers:
            metrics["learning_rate"] = trainer.optimizers[0].param_groups[0]["lr"]
        self._logged, self._losses, self._grad_norm = {}, [], None
        self.recorder.log(metrics, step=self._step, epoch=trainer.current_epoch)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        names, self._evaluated = self._evaluated, set()
        if trainer.sanity_checking or self.recorder is None:
            return
        found = trainer.callback_metrics
        # of several sets of data, each has its number behind the name
        values = {name: found[name] for name in found if name.split("/dataloader_idx_")[0] in names}
        self.recorder.log(
            {name if is_evaluation(name) else f"eval_{name}": value for name, value in values.items()},
            step=trainer.global_step,
            epoch=trainer.current_epoch,
        )

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._end("failed" if isinstance(exception, Exception) else "interrupted")

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        self._end("finished")

    # ------------------------------------------------------------------ ours

    def _listen(self, trainer: Any, pl_module: Any) -> None:
        """See what the module logs when it logs it: later Lightning cannot tell new values from old ones."""
        original = pl_module.log

        def log(name: str, value: Any, *args: Any, **kwargs: Any) -> Any:
            if trainer.validating:
                self._evaluated.add(name)
            elif trainer.training and as_number(value) is not None:
                self._logged.setdefault(name, []).append(value.detach() if hasattr(value, "detach") else value)
            return original(name, value, *args, **kwargs)

        pl_module.log = log
        self._module = pl_module

    def _end(self, status: Any) -> None:
        if self._module is not None:
            vars(self._module).pop("log", None)
            self._module = None
        if self.recorder is not None:
            self.recorder.finish(status)


def _mean(values: list[Any]) -> float:
    return sum(float(value) for value in values) / len(values)


def _settings_of(trainer: Any) -> dict[str, Any]:
    """What the trainer itself tells, under our names."""
    clip = trainer.gradient_clip_val
    made = {
        "gradient_accumulation_steps": trainer.accumulate_grad_batches,
        "max_grad_norm": clip if clip and trainer.gradient_clip_algorithm in (None, "norm") else None,
        "world_size": trainer.world_size,
    }
    return {name: value for name, value in made.items() if value is not None}


def _total_steps(trainer: Any) -> int | None:
    try:
        steps = trainer.estimated_stepping_batches
    except Exception:  # Lightning cannot work it out either
        return None
    return int(steps) if math.isfinite(steps) and steps > 0 else None


def __getattr__(name: str) -> Any:
    if name != "OutspokenCallback":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    loaded = tuple(package for package in PACKAGES if package in sys.modules) or (_installed(),)
    if loaded not in _made:
        bases = tuple(import_module(package).Callback for package in loaded)
        _made[loaded] = type(name, (_Hooks, *bases), {"__doc__": _Hooks.__doc__, "__module__": __name__})
    return _made[loaded]


def _installed() -> str:
    for package in PACKAGES:
        try:
            import_module(package)
        except ImportError:
            continue
        return package
    raise ImportError("neither lightning nor pytorch_lightning is installed; `pip install lightning`")
