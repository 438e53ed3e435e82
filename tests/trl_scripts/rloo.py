"""RLOO with two reward functions and a reference model, as TRL's users write it."""

import json
import sys

from datasets import Dataset
from trl import RLOOConfig, RLOOTrainer

model, output_dir = sys.argv[1:]


def shorter_is_better(completions, **kwargs):
    return [-float(len(completion[0]["content"])) for completion in completions]


async def says_it(completions, word, **kwargs):
    return [float(each in completion[0]["content"]) for completion, each in zip(completions, word)]


trainer = RLOOTrainer(
    model=model,
    reward_funcs=[shorter_is_better, says_it],
    args=RLOOConfig(
        output_dir=output_dir,
        max_steps=2,
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=8,
        beta=0.05,
        reward_weights=[0.1, 1.0],
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
    ),
    train_dataset=Dataset.from_dict(
        {
            "prompt": [[{"role": "user", "content": f"What is {i} + 1?"}] for i in range(8)],
            "word": [str(i + 1) for i in range(8)],
        }
    ),
)
trainer.train()
print(json.dumps({"log": trainer.state.log_history}))
