"""Logs of TRL's trainers, from real steps of a model of two layers: SFT, DPO and GRPO.

Made with trl 1.16.0 and transformers 5.23.0:

    python tests/peer_logs/make_trl.py tests/peer_logs/trl

For each method `trainer_state.json` and `console.log`, the same run written twice: in full, and with four digits. The
rewards of GRPO are arithmetic: at step s (1 to 10), s % 5 of the four completions of each group are worth 1, the others 0.
"""

import argparse
import contextlib
import io
import json
import shutil
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

STEPS, GROUP = 10, 4


def tokenizer() -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|end|>", "<|pad|>"]
    bpe.train_from_iterator(
        ["What is 1 + 2?"],
        trainers.BpeTrainer(vocab_size=270, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=special[0], pad_token=special[1])


def save_model(folder: str) -> None:
    """Where TRL loads the policy and its reference from."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer()),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


class Rewards:
    """The first `step % 5` of each group are worth 1."""

    __name__ = "counted"

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, completions, **unused):
        self.calls += 1
        return [float(i % GROUP < self.calls % 5) for i in range(len(completions))]


def prompts(n: int) -> list[str]:
    return [f"What is {i} + 1?" for i in range(n)]


def sft(model, common):
    rows = Dataset.from_dict({"text": [f"{p} It is {i + 1}." for i, p in enumerate(prompts(40))]})
    args = SFTConfig(**common, max_length=64, eval_strategy="steps", eval_steps=5)
    held_out = rows.select(range(4))
    return SFTTrainer(model=model, args=args, train_dataset=rows, eval_dataset=held_out, processing_class=tokenizer())


def dpo(model, common):
    answers = {"chosen": [f"{i + 1}." for i in range(40)], "rejected": [f"{i}, I guess" for i in range(40)]}
    rows = Dataset.from_dict({"prompt": prompts(40), **answers})
    args = DPOConfig(**common, beta=0.1, max_length=64)
    return DPOTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer())


def grpo(model, common):
    args = GRPOConfig(
        **{**common, "per_device_train_batch_size": 2 * GROUP},
        num_generations=GROUP,
        max_completion_length=8,
        beta=0.04,
        use_vllm=False,
    )
    rows = Dataset.from_dict({"prompt": prompts(40)})
    return GRPOTrainer(
        model=model, reward_funcs=Rewards(), args=args, train_dataset=rows, processing_class=tokenizer()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    for make in (sft, dpo, grpo):
        out = folder / make.__name__
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        common = {
            "output_dir": str(out),
            "max_steps": STEPS,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "save_steps": STEPS,
            "report_to": "none",
            "use_cpu": True,
            "bf16": False,
            "disable_tqdm": True,
            "seed": 7,
        }
        with contextlib.redirect_stdout(io.StringIO()) as printed, tempfile.TemporaryDirectory() as model:
            save_model(model)
            make(model, common).train()
        state = json.loads((out / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
        for entry in out.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        (out / "trainer_state.json").write_text(json.dumps(state, indent=2) + "\n")
        (out / "console.log").write_text(printed.getvalue())


if __name__ == "__main__":
    main()
