"""Trains small models with the trainers that sample and writes down what came of it: run by test_distributed_online.py.

`python tests/distributed_online.py FOLDER MODEL CASE …` alone, or started twice by accelerate: then each process takes half
of every batch. For each case FOLDER/<case>/ gets result.json (on rank 0), the weights in model/, checkpoints and the run
directory; FOLDER/<case>-resumed/ the same from the checkpoint of step 3 on; a case that fails, error-<rank>.txt.
"""

import contextlib
import json
import logging
import os
import random
import sys
import threading
import time
import traceback
from pathlib import Path

import torch
import torch.distributed.fsdp as fsdp
from accelerate.utils import gather_object
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer, TrainerCallback

import outspoken
from outspoken.trainers.rollouts.batch import RolloutBatch, sampled_from_ids

STEPS, SAVED = 6, 3
END = 0  # the tokenizer's end token


def words(i):
    """Texts of different lengths, so that the processes' prompts are not alike."""
    return " ".join(["sky", "blue", "green", "grass", "seven"][(i + j) % 5] for j in range(1 + i * 7 % 9))


ROWS = [{"prompt": f"What {words(i)}?", "number": i} for i in range(24)]


def graded(completion_ids, **_):
    return [(sum(ids) % 11 - 5) / 4 for ids in completion_ids]


def short(completion_ids, **_):
    return [-len(ids) / 10 if len(ids) > 3 else None for ids in completion_ids]


def two_worded(completion_ids, **_):
    """Two values only, so that many small groups are all alike."""
    return [float(sum(ids) % 3 == 0) for ids in completion_ids]


# Case -> trainer, settings. `batch` is that of all processes together. With a small epsilon Adam's first steps would be the
# sign of gradients that are zero but for rounding.
GROUPS = {"batch": 4, "num_generations": 4, "steps_per_generation": 2, "gradient_accumulation_steps": 2}
# Three groups of 4 over micro-batches of 6: one process holds one group and a half.
SPANNING = {"batch": 6, "num_generations": 4, "steps_per_generation": 2, "gradient_accumulation_steps": 1}
SCRIPTED = {
    "grpo": ("GRPO", {**GROUPS, "beta": 0.1, "eval": True}),
    "grpo-lora": ("GRPO", {**GROUPS, "beta": 0.1, "lora": True, "learning_rate": 0.2}),
    "off-policy": ("GRPO", {**SPANNING, "num_iterations": 2, "beta": 0.05, "epsilon": 0.05, "learning_rate": 0.003}),
    "per-completion": (
        "GRPO",
        {**SPANNING, "loss_type": "grpo", "scale_rewards": "batch", "mask_truncated_completions": True},
    ),
    "entropy": (
        "GRPO",
        {
            **GROUPS,
            "loss_type": "dr_grpo",
            "use_adaptive_entropy": True,
            "entropy_coef": 0.01,
            "entropy_target": 4.5,
            "top_entropy_quantile": 0.5,
        },
    ),
    "gspo": ("GRPO", {**SPANNING, "importance_sampling_level": "sequence", "epsilon": 3e-3, "num_iterations": 2}),
    "returns": ("GRPO", {**SPANNING, "advantage_estimator": "reinforce++", "beta": 0.1}),
    "dynamic": ("GRPO", {**SPANNING, "num_generations": 2, "dynamic_sampling": True, "rewards": [two_worded]}),
    "plain-prompts": ("GRPO", {**GROUPS, "share_prompts": False, "sync_ref_model": True, "ref_model_sync_steps": 2,
                               "beta": 0.2}),
    "rloo": ("RLOO", {**GROUPS, "beta": 0.1}),
    "rloo-clipped": (
        "RLOO",
        {**SPANNING, "beta": 0.1, "loss_type": "clipped", "num_iterations": 2, "epsilon": 0.05, "learning_rate": 0.003},
    ),
}  # fmt: skip
# What they sample themselves, and each process other completions than the next.
SAMPLED = {
    "sampled": ("GRPO", {**SPANNING, "num_iterations": 2, "beta": 0.05, "max_completion_length": 24}),
    "sampled-rloo": ("RLOO", {**GROUPS, "max_completion_length": 12}),
}
CASES = SCRIPTED | SAMPLED
DEFAULT_REWARDS = [graded, short]


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


def script(trainer):
    """Let the completions depend on the step, the prompt and the place in its group, and on nothing else."""
    calls = [0, None]

    def generate(prompt_ids, params, *, caps=None, images=None):
        step = trainer.state.global_step, trainer.model.training
        calls[:] = [calls[0] + 1 if calls[1] == step else 0, step]
        rank, parts = trainer.accelerator.process_index, gather_object([prompt_ids])
        everywhere = [tuple(ids) for part in parts for ids in part]
        start = sum(map(len, parts[:rank]))
        completions = []
        for place in range(start, start + len(prompt_ids)):
            copy = 0
            while copy < place and everywhere[place - copy - 1] == everywhere[place]:
                copy += 1
            drawn = random.Random(repr((step, calls[0], everywhere[place], copy)))
            ids = [drawn.randrange(4, 300) for _ in range(drawn.randrange(1, params.max_new_tokens + 1))]
            completions.append(ids if len(ids) == params.max_new_tokens else [*ids, END])
        return sampled_from_ids(completions, params.end_ids)

    trainer.rollouts.generate = generate


def keep_order(trainer, world):
    """No shuffling; and one process forms the micro-batches that two would."""

    def shuffled(self, block=1):
        steps = trainer.args.steps_per_generation
        if world == 2:
            return self
        places = torch.arange(len(self)).view(2, steps, -1).transpose(0, 1)
        return self.select(places.flatten())

    RolloutBatch.shuffled = shuffled


class Watch(TrainerCallback):
    """Whether this process wrote the run directory."""

    wrote = None

    def on_step_end(self, args, state, control, **kwargs):
        observer = next(
            c for c in self.trainer.callback_handler.callbacks if isinstance(c, outspoken.DiagnosticsCallback)
        )
        self.wrote = observer._writer is not None


def build(case, folder, model_dir, **more):
    kind, own = CASES[case]
    own = {**own, **more}
    world = int(os.environ.get("WORLD_SIZE", 1))
    batch = own.pop("batch") // world
    lora, evaluates = own.pop("lora", False), own.pop("eval", False)
    rewards, callbacks = own.pop("rewards", DEFAULT_REWARDS), own.pop("callbacks", [])
    rows = own.pop("rows", ROWS)
    arguments = own.pop("arguments", {})
    settings = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": batch,
        "per_device_eval_batch_size": batch,
        "max_completion_length": 8,
        "learning_rate": 0.02,
        "adam_epsilon": 1e-2,
        "lr_scheduler_type": "linear",
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": SAVED,
        "report_to": [],
        "use_cpu": not pretends_to_have_devices(),
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "seed": 3,
        **({"eval_strategy": "steps", "eval_steps": STEPS} if evaluates else {}),
        **own,
    }
    watch = Watch()
    trainer = getattr(outspoken, f"{kind}Trainer")(
        model=model_dir,
        reward_funcs=rewards,
        args=getattr(outspoken, f"{kind}Config")(**settings),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[:4]) if evaluates else None,
        processing_class=AutoTokenizer.from_pretrained(model_dir),
        callbacks=[watch, *callbacks],
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM") if lora else None,
        **arguments,
    )
    watch.trainer = trainer
    return trainer


def train(case, folder, model_dir, checkpoint=None):
    trainer = build(case, folder, model_dir)
    world = trainer.accelerator.num_processes
    seen = []
    if case in SCRIPTED:
        script(trainer)
        keep_order(trainer, world)
    else:
        score = trainer.rewards.score

        def scored(prompts, completions, completion_ids, *args, **kwargs):
            seen.extend([trainer.state.global_step, *pair] for pair in zip(prompts, completion_ids))
            return score(prompts, completions, completion_ids, *args, **kwargs)

        trainer.rewards.score = scored
    trainer.train(resume_from_checkpoint=checkpoint)
    sharded_adapter = trainer.is_fsdp_enabled and "lora" in case
    if not sharded_adapter:
        trainer.save_model(str(folder / "model"))
    finish(trainer, folder, {"seen": gather_object([seen])})


def finish(trainer, folder, more):
    """Write the result, on rank 0."""
    watch = next(c for c in trainer.callback_handler.callbacks if isinstance(c, Watch))
    result = {
        "history": trainer.state.log_history,
        "wrote": trainer.accelerator.gather(torch.tensor([int(bool(watch.wrote))])).tolist(),
        "world": trainer.accelerator.num_processes,
        "kind": str(trainer.accelerator.distributed_type),
        **more,
    }
    if trainer.is_world_process_zero():
        (folder / "result.json").write_text(json.dumps(result))
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.free_memory()


def run_case(case, folder, model_dir):
    out = folder / case
    train(case, out, model_dir)
    train(case, folder / f"{case}-resumed", model_dir, str(out / f"checkpoint-{SAVED}"))


def main(folder, model_dir, cases):
    torch.set_num_threads(1)
    if pretends_to_have_devices():
        pretend_to_have_devices()
    logging.basicConfig(level=logging.WARNING)
    for case in cases:
        out = Path(folder, case)
        shuffled = RolloutBatch.shuffled
        try:
            run_case(case, Path(folder), model_dir)
        except Exception:
            # The other process may wait for this one; the launcher ends it. What was done before stays done.
            out.mkdir(parents=True, exist_ok=True)
            (out / f"error-{os.environ.get('RANK', 0)}.txt").write_text(traceback.format_exc())
            raise
        finally:
            RolloutBatch.shuffled = shuffled


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
