"""Learning from rated answers: pairs are taken apart by the utility that TRL exports for it."""

import json
import sys

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import KTOConfig, KTOTrainer, unpair_preference_dataset

path, output_dir = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForCausalLM.from_pretrained(path)
pairs = Dataset.from_list(
    [{"prompt": f"What is {i} + 1?", "chosen": f" It is {i + 1}.", "rejected": " No."} for i in range(16)]
)
args = KTOConfig(
    output_dir=output_dir,
    max_steps=3,
    per_device_train_batch_size=4,
    learning_rate=1e-3,
    desirable_weight=1.2,
    logging_steps=1,
    save_strategy="no",
    report_to="none",
    use_cpu=True,
    bf16=False,
)
trainer = KTOTrainer(
    model=model, args=args, train_dataset=unpair_preference_dataset(pairs), processing_class=tokenizer
)
trainer.train()
print(json.dumps({"log": trainer.state.log_history}))
