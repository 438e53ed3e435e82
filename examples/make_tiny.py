"""Writes a tiny model and small datasets to examples/tiny/, so that the examples run anywhere, without a network.

Run it once from the repository's root: `python examples/make_tiny.py`. Then `outspoken sft --config examples/sft.yaml`,
whose model the other configs go on from: `outspoken dpo --config examples/dpo.yaml`, and likewise reward, kto and grpo.
"""

import sys
from pathlib import Path

from outspoken.cli.demo_task import (
    build_model,
    build_tokenizer,
    compared_examples,
    problems,
    rated_examples,
    solved_examples,
)


def write(folder: Path, seed: int = 0) -> None:
    """A fresh model of some hundred thousand parameters; sums that are solved for SFT, compared for DPO and reward
    modelling, rated for KTO, and unsolved for GRPO."""
    tokenizer = build_tokenizer()
    build_model(tokenizer, seed).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    solved_examples(4000, seed + 1).to_json(folder / "solved.jsonl")
    problems(2000, seed + 2).to_json(folder / "problems.jsonl")
    compared_examples(2000, seed + 3).to_json(folder / "compared.jsonl")
    rated_examples(2000, seed + 4).to_json(folder / "rated.jsonl")


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "tiny"
    write(target)
    print(f"wrote {target}/model, and solved, problems, compared and rated.jsonl beside it")
