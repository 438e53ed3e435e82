"""OpenRLHF: its own command, started through this module.

    python -m outspoken.diagnostics.integrations.openrlhf openrlhf.cli.train_ppo_ray --…
    deepspeed --module outspoken.diagnostics.integrations.openrlhf openrlhf.cli.train_sft --…

What it logs every `--logger.logging_steps` steps is written to `<--ckpt.output_dir>/outspoken` and judged at once,
beside W&B and TensorBoard, which need not be on.

Written for OpenRLHF 0.11: `BasePPOTrainer` keeps `tensorboard_logger`, with `log_train(global_step, logs_dict)`,
`log_eval(…)` and `close()`; the other trainers keep `_wandb`, with `log(logs)` and `finish()`, on rank 0. With Ray the
PPO trainer lives in a process of its own, which a setup hook of Ray's reaches.
"""

import os
import runpy
import sys
from argparse import Namespace
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from outspoken.diagnostics.integrations import after_init, when_imported
from outspoken.diagnostics.loop import Recorder

HERE = "outspoken.diagnostics.integrations.openrlhf"
RAY_HOOK = "RAY_RUNTIME_ENV_HOOK"  # names a function that Ray calls with the runtime environment of a job
TRAINERS = (  # module, class, method
    ("openrlhf.trainer.sft_trainer", "SFTTrainer", "sft"),
    ("openrlhf.trainer.dpo_trainer", "DPOTrainer", "dpo"),
    ("openrlhf.trainer.rm_trainer", "RewardModelTrainer", "reward"),
)


def recorder(args: Any, **settings: Any) -> Recorder:
    """A recorder for a run with these arguments of OpenRLHF's.

    Args:
        args: its namespace of namespaces. settings: for `Recorder`, to override.
    """
    config = _mapping(args)
    folder = config.get("ckpt", {}).get("output_dir") if isinstance(config.get("ckpt"), Mapping) else None
    settings = {"output_dir": folder or "./ckpt", "resume": "auto", **settings}
    return Recorder(config=config, system="openrlhf", rank=0, **settings)


class PolicyLogger:
    """Stands for the TensorBoard logger of a PPO trainer: records, and hands on to the one that was there."""

    def __init__(self, recorder: Recorder, other: Any = None):
        self.recorder, self._other = recorder, other

    def log_train(self, global_step: int, logs_dict: Mapping[str, Any]) -> None:
        kept = {f"train/{k}": v for k, v in logs_dict.items() if k != "generated_samples"}
        self.recorder.log(kept, step=global_step)
        if self._other is not None:
            self._other.log_train(global_step, logs_dict)

    def log_eval(self, global_step: int, logs_dict: Mapping[str, Any]) -> None:
        self.recorder.log({f"eval/{k}": v for k, v in logs_dict.items()}, step=global_step)
        if self._other is not None:
            self._other.log_eval(global_step, logs_dict)

    def close(self) -> None:
        self.recorder.finish()
        if self._other is not None:
            self._other.close()


class RunLogger:
    """Stands for W&B in a trainer of the other kinds: records, and hands on to W&B or TensorBoard if they are on."""

    def __init__(self, recorder: Recorder, wandb: Any = None, tensorboard: Any = None):
        self.recorder, self._other, self._tensorboard = recorder, wandb, tensorboard

    def log(self, logs: Mapping[str, Any]) -> None:
        step = next((v for k, v in logs.items() if k.endswith("/global_step")), None)
        metrics = {k: v for k, v in logs.items() if not k.endswith("/global_step")}
        self.recorder.log(metrics, step=step)
        if self._other is not None:
            self._other.log(logs)
        elif self._tensorboard is not None:
            for name, value in metrics.items():
                self._tensorboard.add_scalar(name, value, step)

    def finish(self) -> None:
        self.recorder.finish()
        if self._other is not None:
            self._other.finish()


def attach() -> None:
    """Record what OpenRLHF trains in this process, from now on."""
    when_imported("openrlhf.trainer.ppo_trainer", lambda module: after_init(module.BasePPOTrainer, _watch_policy))
    for module, name, method in TRAINERS:
        when_imported(module, _watcher(name, method))


def _watcher(name: str, method: str) -> Any:
    def watch(trainer: Any) -> None:
        strategy = trainer.strategy
        if strategy.is_rank_0():
            made = recorder(strategy.args, method=method)
            trainer._wandb = RunLogger(made, trainer._wandb, trainer._tensorboard)

    return lambda module: after_init(getattr(module, name), watch)


def _watch_policy(trainer: Any) -> None:
    trainer.tensorboard_logger = PolicyLogger(recorder(trainer.args), trainer.tensorboard_logger)


def runtime_env(env: Mapping[str, Any] | None) -> dict[str, Any]:
    """What Ray is to do in each new process of a job: call `attach`. Ray calls this, see `RAY_HOOK`."""
    return {**(env or {}), "worker_process_setup_hook": f"{HERE}.attach"}


def _mapping(args: Any) -> dict[str, Any]:
    """A namespace of namespaces as nested mappings."""
    return {
        name: _mapping(value) if isinstance(value, SimpleNamespace | Namespace) else value
        for name, value in vars(args).items()
    }


def main() -> None:
    if len(sys.argv) < 2:
        raise SystemExit(f"usage: python -m {HERE} openrlhf.cli.train_ppo_ray …")
    if os.environ.get(RAY_HOOK, f"{HERE}.runtime_env") != f"{HERE}.runtime_env":
        raise SystemExit(f"{RAY_HOOK} is set to {os.environ[RAY_HOOK]}; unset it, for this command sets it itself")
    os.environ[RAY_HOOK] = f"{HERE}.runtime_env"
    attach()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
