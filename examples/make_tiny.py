"""Writes a tiny model and two small datasets to examples/tiny/, so that the examples run anywhere, without a network.

Run it once from the repository's root, then the two configs: `python examples/make_tiny.py`, `outspoken sft --config
examples/sft.yaml`, `outspoken grpo --config examples/grpo.yaml`.
"""

import sys
from pathlib import Path

from outspoken.cli.demo_task import build_model, build_tokenizer, problems, solved_examples


def write(folder: Path, seed: int = 0) -> None:
    """A fresh model of some hundred thousand parameters, solved sums for SFT, and unsolved ones for GRPO."""
    tokenizer = build_tokenizer()
    build_model(tokenizer, seed).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    solved_examples(4000, seed + 1).to_json(folder / "solved.jsonl")
    problems(2000, seed + 2).to_json(folder / "problems.jsonl")


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "tiny"
    write(target)
    print(f"wrote {target}/model, {target}/solved.jsonl and {target}/problems.jsonl")
