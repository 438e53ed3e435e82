"""A script in the shape of TRL's own: three dataclasses read from the command line, then a trainer."""

import json

from datasets import Dataset
from trl import DPOConfig, DPOTrainer, ModelConfig, ScriptArguments, TrlParser, get_peft_config

parser = TrlParser((ScriptArguments, DPOConfig, ModelConfig))
script_args, training_args, model_args = parser.parse_args_and_config()

rows = [
    {
        "prompt": [{"role": "user", "content": f"What is {i} + 1?"}],
        "chosen": [{"role": "assistant", "content": f"It is {i + 1}."}],
        "rejected": [{"role": "assistant", "content": f"I think it may well be {i + 2}, who knows?"}],
    }
    for i in range(16)
]
trainer = DPOTrainer(
    model=model_args.model_name_or_path,
    args=training_args,
    train_dataset=Dataset.from_list(rows),
    eval_dataset=Dataset.from_list(rows[:4]) if training_args.eval_strategy != "no" else None,
    peft_config=get_peft_config(model_args),
)
trainer.train()
trainer.save_model(training_args.output_dir)
print(json.dumps({"log": trainer.state.log_history, "eval": trainer.evaluate()}))
