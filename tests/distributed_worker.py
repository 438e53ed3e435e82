"""Trains small models with each method and writes down what came of it: run by tests/test_distributed_offline.py.

`python tests/distributed_worker.py FOLDER BATCH METHOD …` alone, or started twice by accelerate: then each process takes
half the batch. For each method FOLDER/<method>/ gets result.json (on rank 0), the weights in model/, those of BEMA in
bema/, and the run directory; FOLDER/<method>-resumed/ the same from the checkpoint of step 2 on.
"""

import json
import logging
import os
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed.fsdp as fsdp
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer, GenerationConfig, TrainerCallback

import outspoken

STEPS, SAVED = 4, 2


def words(i):
    """Texts of different lengths, so that the processes' batches are not alike."""
    return " ".join(["sky", "blue", "green", "grass", "seven"][(i + j) % 5] for j in range(1 + i * 7 % 5))


PAIRS = [
    {"prompt": f"What {words(i)}?", "chosen": f" It is {words(i + 1)}.", "rejected": f" No {words(3 * i + 2)}"}
    for i in range(32)
]
TEXTS = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS]
RATED = [
    {"prompt": row["prompt"], "completion": f"{row['rejected' if i % 3 else 'chosen']} {i}", "label": i % 3 == 0}
    for i, row in enumerate(PAIRS)
]
# Method -> its class, rows and own settings. With a small epsilon Adam's first steps would be the sign of gradients that
# are zero but for rounding.
METHODS = {
    "sft": ("SFTTrainer", TEXTS, {"learning_rate": 0.05}),
    "reward": ("RewardTrainer", PAIRS, {"learning_rate": 0.05, "center_rewards_coefficient": 0.1}),
    "dpo": (
        "DPOTrainer",
        PAIRS,
        {
            "learning_rate": 0.05,
            "sync_ref_model": True,
            "ref_model_sync_steps": 2,
            "ref_model_mixup_alpha": 0.5,
            "beta": 0.5,
        },
    ),
    # Precomputed, so that which answers a prompt is put to does not depend on a process's batch.
    "kto": ("KTOTrainer", RATED, {"learning_rate": 0.05, "beta": 0.5, "precompute_ref_log_probs": True}),
    "sft-lora": ("SFTTrainer", TEXTS, {"learning_rate": 0.2, "lora": True}),
    "dpo-lora": ("DPOTrainer", PAIRS, {"learning_rate": 0.05, "beta": 0.5, "lora": True}),
    "kto-apo": ("KTOTrainer", RATED, {"learning_rate": 0.05, "loss_type": "apo_zero_unpaired"}),
}


def pretends_to_have_devices():
    return os.environ.get("ACCELERATE_USE_FSDP") == "true" or os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"


def pretend_to_have_devices():
    """Accelerate shards models over accelerators only, though torch and DeepSpeed also do over the CPU's processes."""
    from accelerate.state import DistributedType, PartialState

    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda self, *args: ("gloo", DistributedType.MULTI_GPU)
    # What FSDP1 gathers on the CPU and is to copy to the CPU, torch has freed by then, and crashes.
    for kind in (fsdp.FullStateDictConfig, fsdp.FullOptimStateDictConfig):
        kind.offload_to_cpu = property(lambda self: False, lambda self, value: None)


class Watch(TrainerCallback):
    """What each process saw."""

    def __init__(self):
        self.wrote = None

    def on_step_end(self, args, state, control, **kwargs):
        observer = next(
            c for c in self.trainer.callback_handler.callbacks if isinstance(c, outspoken.DiagnosticsCallback)
        )
        self.wrote = observer._writer is not None


def train(method, folder, batch, model_dir, checkpoint=None):
    kind, rows, own = METHODS[method]
    own = dict(own)
    lora = own.pop("lora", False)
    world = int(os.environ.get("WORLD_SIZE", 1))
    settings = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": batch // world,
        "per_device_eval_batch_size": batch // world,
        "gradient_accumulation_steps": 2,
        "adam_epsilon": 1e-2,
        "lr_scheduler_type": "linear",
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": SAVED,
        "eval_strategy": "steps",
        "eval_steps": STEPS,
        "report_to": [],
        "use_cpu": not pretends_to_have_devices(),
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "seed": 3,
        **own,
    }
    config = getattr(outspoken, kind.replace("Trainer", "Config"))(**settings)
    callbacks = [watch := Watch()]
    if method == "sft":
        callbacks.append(outspoken.BEMACallback(update_freq=1, update_after=1))
    trainer = getattr(outspoken, kind)(
        model=model_dir,
        args=config,
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[:8]),
        processing_class=AutoTokenizer.from_pretrained(model_dir),
        callbacks=callbacks,
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM") if lora else None,
    )
    watch.trainer = trainer
    completions = None
    if method == "sft":
        completions = outspoken.LogCompletionsCallback(
            trainer, GenerationConfig(max_new_tokens=8, do_sample=False), num_prompts=3, freq=STEPS
        )
        trainer.add_callback(completions)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(str(folder / "model"))
    wrote = trainer.accelerator.gather(torch.tensor([int(bool(watch.wrote))])).tolist()
    ref = getattr(trainer, "ref_model", None)
    if ref is not None:
        from outspoken.trainers.sharding import save_whole_model

        save_whole_model(ref, str(folder / "reference"), trainer.is_world_process_zero())
    if trainer.is_world_process_zero():
        result = {
            "history": trainer.state.log_history,
            "wrote": wrote,
            "world": trainer.accelerator.num_processes,
            "kind": str(trainer.accelerator.distributed_type),
            "completions": None if completions is None else completions.table,
        }
        (folder / "result.json").write_text(json.dumps(result))
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.free_memory()


def main(folder, batch, model_dir, methods):
    torch.set_num_threads(1)
    if pretends_to_have_devices():
        pretend_to_have_devices()
    logging.basicConfig(level=logging.WARNING)
    for method in methods:
        out = Path(folder, method)
        try:
            train(method, out, batch, model_dir)
            train(method, Path(folder, f"{method}-resumed"), batch, model_dir, str(out / f"checkpoint-{SAVED}"))
        except Exception:
            # The other process may wait for this one; the launcher ends it. What was done before stays done.
            out.mkdir(parents=True, exist_ok=True)
            (out / f"error-{os.environ.get('RANK', 0)}.txt").write_text(traceback.format_exc())
            raise


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4:])
