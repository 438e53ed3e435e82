"""A reward model from pairs of texts with a common beginning, as TRL's users train it."""

import json
import sys

from datasets import Dataset
from trl import RewardConfig, RewardTrainer

model, output_dir = sys.argv[1:]
rows = [
    {"chosen": f"What is {i} + 1? It is {i + 1}.", "rejected": f"What is {i} + 1? Who knows, {i + 5} maybe."}
    for i in range(16)
]
args = RewardConfig(
    output_dir=output_dir,
    max_steps=3,
    per_device_train_batch_size=4,
    learning_rate=1e-3,
    center_rewards_coefficient=0.01,
    logging_steps=1,
    save_strategy="no",
    report_to="none",
    use_cpu=True,
    bf16=False,
)
trainer = RewardTrainer(model=model, args=args, train_dataset=Dataset.from_list(rows))
trainer.train()
print(json.dumps({"log": trainer.state.log_history, "eval": trainer.evaluate(Dataset.from_list(rows[:4]))}))
