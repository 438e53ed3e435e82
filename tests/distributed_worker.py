"""Trains small models with each method and writes down what came of it: run by tests/test_distributed_offline.py.

`python tests/distributed_worker.py FOLDER BATCH METHOD …` alone, or started twice by accelerate: then each process takes
half the batch. For each method FOLDER/<method>/ gets result.json (on rank 0), the weights in model/, those of BEMA in
bema/, and the run directory; FOLDER/<method>-resumed/ the same from the checkpoint of step 2 on.
"""

import sys

from datasets import Dataset
from distributed_common import Watch, finish, run_each, settings, words
from peft import LoraConfig
from transformers import AutoTokenizer, GenerationConfig

import outspoken

STEPS, SAVED = 4, 2


PAIRS = [
    {
        "prompt": f"What {words(i, 5)}?",
        "chosen": f" It is {words(i + 1, 5)}.",
        "rejected": f" No {words(3 * i + 2, 5)}",
    }
    for i in range(32)
]
TEXTS = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS]
RATED = [
    {"prompt": row["prompt"], "completion": f"{row['rejected' if i % 3 else 'chosen']} {i}", "label": i % 3 == 0}
    for i, row in enumerate(PAIRS)
]
# Method -> its class, rows and own settings.
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


def train(method, folder, batch, model_dir, checkpoint=None):
    kind, rows, own = METHODS[method]
    own = dict(own)
    lora = own.pop("lora", False)
    config = getattr(outspoken, kind.replace("Trainer", "Config"))(
        **settings(folder, batch),
        max_steps=STEPS,
        gradient_accumulation_steps=2,
        save_strategy="steps",
        save_steps=SAVED,
        eval_strategy="steps",
        eval_steps=STEPS,
        **own,
    )
    trainer = getattr(outspoken, kind)(
        model=model_dir,
        args=config,
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[:8]),
        processing_class=AutoTokenizer.from_pretrained(model_dir),
        callbacks=[outspoken.BEMACallback(update_freq=1, update_after=1)] if method == "sft" else None,
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM") if lora else None,
    )
    trainer.add_callback(Watch(trainer))
    completions = None
    if method == "sft":
        completions = outspoken.LogCompletionsCallback(
            trainer, GenerationConfig(max_new_tokens=8, do_sample=False), num_prompts=3, freq=STEPS
        )
        trainer.add_callback(completions)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(str(folder / "model"))
    ref = getattr(trainer, "ref_model", None)
    if ref is not None:
        from outspoken.trainers.sharding import save_whole_model

        save_whole_model(ref, str(folder / "reference"), trainer.is_world_process_zero())
    finish(trainer, folder, completions=None if completions is None else completions.table)


def train_and_resume(method, folder, batch, model_dir):
    train(method, folder / method, batch, model_dir)
    train(method, folder / f"{method}-resumed", batch, model_dir, str(folder / method / f"checkpoint-{SAVED}"))


if __name__ == "__main__":
    folder, batch, model_dir, *methods = sys.argv[1:]
    run_each(methods, folder, lambda method, folder: train_and_resume(method, folder, int(batch), model_dir))
