"""A script as TRL's users write it: conversations, a LoRA adapter, an evaluation dataset."""

import json
import sys

from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

model, output_dir = sys.argv[1:]


def conversation(i):
    return {
        "messages": [
            {"role": "user", "content": f"What is {i} + 1?"},
            {"role": "assistant", "content": f"It is {i + 1}."},
        ]
    }


trainer = SFTTrainer(
    model=model,
    args=SFTConfig(
        output_dir=output_dir,
        max_steps=3,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        max_length=64,
        assistant_only_loss=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
    ),
    train_dataset=Dataset.from_list([conversation(i) for i in range(16)]),
    eval_dataset=Dataset.from_list([conversation(i) for i in range(16, 20)]),
    peft_config=LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
)
trainer.train()
print(json.dumps({"log": trainer.state.log_history, "eval": trainer.evaluate()}))
