"""veRL: a backend of its `Tracking`, named "outspoken" in `trainer.logger`.

veRL asks for plugins by itself and finds this one where outspoken is installed, so that

    python -m verl.trainer.main_ppo … trainer.logger='["console","outspoken"]'

is all there is to it. Where it does not (releases without plugins), `VERL_USE_EXTERNAL_MODULES` names the module to
load, `outspoken.diagnostics.integrations.verl_plugin`, or a script calls `register()` in the process that trains.

Written for veRL 0.9: `Tracking(project_name, experiment_name, default_backend, config)` keeps its backends in `logger`,
calls `log(data=…, step=…)` of each, and in `finish` ends those that it knows by name.
"""

import atexit
import functools
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from outspoken.diagnostics.integrations import when_imported
from outspoken.diagnostics.loop import Recorder

BACKEND = "outspoken"


class OutspokenLogger:
    """What veRL logs, written as a run directory and judged at once.

    Args:
        project_name, experiment_name: veRL's.
        config: veRL's whole configuration, as nested mappings.
        settings: for `Recorder`, to override what the configuration tells: `output_dir`, `method`, `params` …

    The run directory is `<trainer.default_local_dir>/outspoken`, or `<project>/<experiment>/outspoken` without such a
    setting. A run whose first logged step goes beyond that of the run before is taken for its continuation.
    """

    def __init__(
        self,
        project_name: str = "",
        experiment_name: str = "",
        config: Mapping[str, Any] | None = None,
        **settings: Any,
    ):
        config = config if isinstance(config, Mapping) else {}
        own_folder = _at(config, "trainer.default_local_dir")
        settings.setdefault("output_dir", own_folder or Path(str(project_name)) / str(experiment_name))
        if config and "actor_rollout_ref" not in config:
            settings.setdefault("method", "sft")
        settings.setdefault("total_steps", _total_steps(config))
        settings.setdefault("resume", "auto")
        self.total_steps: int | None = settings["total_steps"]
        self.recorder = Recorder(config=config, system="verl", rank=0, **settings)  # veRL makes one for all processes
        atexit.register(self.finish)
        self._step = 0

    def log(self, data: Mapping[str, Any], step: int) -> None:
        self.recorder.log(data, step=step)
        self._step = step

    def finish(self, exit_code: int = 0) -> None:
        """End the run. veRL says so in the same way when it trained to the end and when it was given up."""
        atexit.unregister(self.finish)
        if exit_code:
            self.recorder.finish("failed")
        else:
            early = self.total_steps is not None and self._step < self.total_steps
            self.recorder.finish("interrupted" if early else "finished")


def register(tracking: Any = None) -> None:
    """Make "outspoken" a backend of veRL's `Tracking`, in this process; now or as soon as veRL imports it.

    Args:
        tracking: the class; by default `verl.utils.tracking.Tracking`.
    """
    if tracking is None:
        when_imported("verl.utils.tracking", lambda module: register(module.Tracking))
        return
    if BACKEND in tracking.supported_backend:
        return
    tracking.supported_backend = [*tracking.supported_backend, BACKEND]
    begin, end = tracking.__init__, getattr(tracking, "finish", None)

    @functools.wraps(begin)
    def init(
        self: Any, project_name: Any, experiment_name: Any, default_backend: Any = "console", config: Any = None
    ) -> None:
        begin(self, project_name, experiment_name, default_backend, config)
        if BACKEND in ([default_backend] if isinstance(default_backend, str) else default_backend):
            try:
                self.logger[BACKEND] = OutspokenLogger(project_name, experiment_name, config)
            except Exception as error:
                print(f"[outspoken] note: this run is not recorded ({type(error).__name__}: {error})", file=sys.stderr)

    tracking.__init__ = init
    if end is None:
        return  # older: its backends end when they are collected, ours when the process does

    @functools.wraps(end)
    def finish(self: Any, *args: Any, **kwargs: Any) -> None:
        ours = getattr(self, "logger", {}).pop(BACKEND, None)
        try:
            end(self, *args, **kwargs)
        finally:
            if ours is not None:
                ours.finish(*args, **kwargs)

    tracking.finish = finish


def _at(config: Any, path: str) -> Any:
    """The setting at a dotted path, None if there is none."""
    for name in path.split("."):
        config = config.get(name) if isinstance(config, Mapping) else None
    return config


def _total_steps(config: Mapping[str, Any]) -> int | None:
    """Planned steps: as set, else as the trainer works them out and hands them to the optimizer."""
    for path in ("trainer.total_training_steps", "actor_rollout_ref.actor.optim.total_training_steps"):
        steps = _at(config, path)
        if isinstance(steps, int) and steps > 0:
            return steps
    return None
