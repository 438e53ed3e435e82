"""On-policy distillation from a teacher, as TRL's users write it."""

import json
import sys

from datasets import Dataset
from trl import DistillationConfig, DistillationTrainer

model, output_dir = sys.argv[1:]

trainer = DistillationTrainer(
    model=model,
    teacher_model=model,
    args=DistillationConfig(
        output_dir=output_dir,
        max_steps=2,
        per_device_train_batch_size=4,
        max_completion_length=8,
        beta=0.5,
        temperature=0.8,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
    ),
    train_dataset=Dataset.from_dict({"prompt": [f"What is {i} + 1?" for i in range(8)]}),
)
trainer.train()
print(json.dumps({"log": trainer.state.log_history}))
