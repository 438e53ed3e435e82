"""What the workers beside it share, that tests start alone or twice by accelerate: spreading, settings, results, errors."""

import json
import logging
import os
import traceback
from pathlib import Path

import torch
import torch.distributed.fsdp as fsdp
from transformers import TrainerCallback

import outspoken


def words(i, most=9):
    """Texts of different lengths, so that the processes' batches are not alike."""
    return " ".join(["sky", "blue", "green", "grass", "seven"][(i + j) % 5] for j in range(1 + i * 7 % most))


def is_sharded():
    return os.environ.get("ACCELERATE_USE_FSDP") == "true" or os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"


def pretend_to_have_devices():
    """Accelerate shards models over accelerators only, though torch and DeepSpeed also do over the CPU's processes."""
    from accelerate.state import DistributedType, PartialState

    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda self, *args: ("gloo", DistributedType.MULTI_GPU)
    # What FSDP1 gathers on the CPU and is to copy to the CPU, torch has freed by then, and crashes.
    for kind in (fsdp.FullStateDictConfig, fsdp.FullOptimStateDictConfig):
        kind.offload_to_cpu = property(lambda self: False, lambda self, value: None)


def settings(folder, batch):
    """Of any config. `batch`: rows of a micro-batch, of all processes together."""
    batch //= int(os.environ.get("WORLD_SIZE", 1))
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": batch,
        "per_device_eval_batch_size": batch,
        # With a small one Adam's first steps would be the sign of gradients that are zero but for rounding.
        "adam_epsilon": 1e-2,
        "lr_scheduler_type": "linear",
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": not is_sharded(),
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "seed": 3,
    }


class Watch(TrainerCallback):
    """Whether this process wrote the run directory."""

    def __init__(self, trainer):
        self.trainer, self.wrote = trainer, False

    def on_step_end(self, args, state, control, **kwargs):
        callbacks = self.trainer.callback_handler.callbacks
        observer = next(c for c in callbacks if isinstance(c, outspoken.DiagnosticsCallback))
        self.wrote = observer.engine is not None


def finish(trainer, folder, **more):
    """Write FOLDER/result.json, on rank 0."""
    watch = next(c for c in trainer.callback_handler.callbacks if isinstance(c, Watch))
    result = {
        "history": trainer.state.log_history,
        "wrote": trainer.accelerator.gather(torch.tensor([int(watch.wrote)])).tolist(),
        "world": trainer.accelerator.num_processes,
        "kind": str(trainer.accelerator.distributed_type),
        **more,
    }
    if trainer.is_world_process_zero():
        (folder / "result.json").write_text(json.dumps(result))
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.free_memory()


def run_each(cases, folder, run):
    """`run(case, folder)` for each; one that fails ends it all, and leaves FOLDER/<case>/error-<rank>.txt."""
    torch.set_num_threads(1)
    if is_sharded():
        pretend_to_have_devices()
    logging.basicConfig(level=logging.WARNING)
    for case in cases:
        try:
            run(case, Path(folder))
        except Exception:
            # The other process may wait for this one; the launcher ends it. What was done before stays done.
            out = Path(folder, case)
            out.mkdir(parents=True, exist_ok=True)
            (out / f"error-{os.environ.get('RANK', 0)}.txt").write_text(traceback.format_exc())
            raise
