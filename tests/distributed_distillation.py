"""Distills small models and writes down what came of it: run by test_distillation_distributed.py.

`python tests/distributed_distillation.py FOLDER STUDENT TEACHER VARIANT …` alone, or started twice by accelerate: then each
process takes half of every batch. For each variant FOLDER/<variant>/ gets result.json (on rank 0) and the weights in model/.
"""

import functools
import sys

import torch
from datasets import Dataset
from distributed_common import Watch, finish, run_each, settings, words
from peft import LoraConfig
from transformers import AutoTokenizer

from outspoken.trainers import distillation
from outspoken.trainers.losses.distillation import label_divergence

BATCH, STEPS = 4, 3
# Variant -> the config's settings. The dataset's completions are the same for one process and two; samples are not.
VARIANTS = {
    "dense": {"lmbda": 0.0, "beta": 0.5},
    # An adapter on the head, which is called on slices: the processes have different numbers of tokens, so of slices.
    "head": {"lmbda": 0.0, "beta": 1.0, "lora": True, "max_slice_logits": 3000},
    "top_k": {"lmbda": 0.0, "beta": 0.0, "teacher_top_k": 5},
    "mix": {"lmbda": 0.5, "beta": 1.0, "max_completion_length": 6},
}


def train(variant, folder, model_dir, teacher_dir):
    own = dict(VARIANTS[variant])
    lora, limit = own.pop("lora", False), own.pop("max_slice_logits", 2**26)
    distillation.label_divergence = functools.partial(label_divergence, max_slice_logits=limit)
    args = distillation.DistillationConfig(
        **settings(folder, BATCH), max_steps=STEPS, gradient_accumulation_steps=2, learning_rate=0.05,
        save_strategy="no", **{"max_completion_length": 40, **own},
    )  # fmt: skip
    rows = [{"prompt": f"What {words(i)}?", "completion": f" It is {words(3 * i + 1)}."} for i in range(32)]
    torch.manual_seed(0)
    trainer = distillation.DistillationTrainer(
        model=model_dir,
        teacher_model=teacher_dir,
        args=args,
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[:8]),
        processing_class=AutoTokenizer.from_pretrained(model_dir),
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM") if lora else None,
    )
    trainer.add_callback(Watch(trainer))
    trainer.train()
    trainer.evaluate()
    if not (lora and trainer.is_fsdp_enabled and not trainer.accelerator.is_fsdp2):
        trainer.save_model(str(folder / "model"))
    finish(trainer, folder)


if __name__ == "__main__":
    folder, model_dir, teacher_dir, *variants = sys.argv[1:]
    run_each(variants, folder, lambda variant, folder: train(variant, folder / variant, model_dir, teacher_dir))
