"""The demo's world: a tiny model, a tokenizer of single characters, and sums whose working must be written out."""

import random
from collections.abc import Sequence

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHARACTERS = "0123456789+=;?"
HIGHEST = 6  # largest digit in a sum
PAD, END = "<pad>", "<end>"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are single characters, plus padding and end of text."""
    vocabulary = {token: i for i, token in enumerate([PAD, END, *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, padding_side="left")


def build_model(
    tokenizer: PreTrainedTokenizerFast, seed: int, hidden_size: int = 64, layers: int = 2
) -> LlamaForCausalLM:
    """A Llama of some hundred thousand parameters, freshly initialised."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def problem(rng: random.Random) -> tuple[str, str]:
    """A sum of three digits and its working: '3+8+5=' -> '3+8=11;11+5=16'."""
    a, b, c = (rng.randrange(HIGHEST + 1) for _ in range(3))
    return f"{a}+{b}+{c}=", f"{a}+{b}={a + b};{a + b}+{c}={a + b + c}"


def solved_examples(n: int, seed: int, careless: float = 0.7) -> Dataset:
    """Sums to imitate. In a share `careless` of them the teacher did no working and guessed the result: a habit that
    reinforcement learning can remove."""
    rng = random.Random(seed)
    rows = []
    for _ in range(n):
        prompt, solution = problem(rng)
        if rng.random() < careless:
            solution = f"?+?=??;??+?={rng.randrange(3 * HIGHEST + 1)}"
        rows.append({"prompt": prompt, "completion": solution + END})
    return Dataset.from_list(rows)


def compared_examples(n: int, seed: int) -> Dataset:
    """Sums with two answers each: the working written out, which is chosen, and a guess, which is rejected."""
    rng = random.Random(seed)
    rows = []
    for _ in range(n):
        prompt, solution = problem(rng)
        guess = f"?+?=??;??+?={rng.randrange(3 * HIGHEST + 1)}"
        rows.append({"prompt": prompt, "chosen": solution + END, "rejected": guess + END})
    return Dataset.from_list(rows)


def rated_examples(n: int, seed: int) -> Dataset:
    """Sums with one answer each, labelled true where the working is written out and false where it is a guess."""
    rng = random.Random(seed)
    rows = []
    for row in compared_examples(n, seed):
        liked = rng.random() < 0.5
        rows.append({"prompt": row["prompt"], "completion": row["chosen" if liked else "rejected"], "label": liked})
    return Dataset.from_list(rows)


def problems(n: int, seed: int) -> Dataset:
    rng = random.Random(seed)
    pairs = [problem(rng) for _ in range(n)]
    return Dataset.from_dict({"prompt": [p for p, _ in pairs], "answer": [s.rsplit("=", 1)[1] for _, s in pairs]})


def right_answer(completions: Sequence[str], answer: Sequence[str], **_: object) -> list[float]:
    """1 if what stands after the last '=' is the right sum, else 0."""
    return [float(text.rsplit("=", 1)[-1].strip() == right) for text, right in zip(completions, answer, strict=True)]
