"""How many runs end how: the demo's three runs over ten seeds, and forty healthy runs of many sizes.

    python benchmarks/seeds.py [--out runs/seeds] [--only healthy-grpo,healthy-sft,demo] [--write]

Each run is one real training run on a CPU. With `--write` the table goes into docs/seeds.md. What was run already (its
result lies in OUT/results.jsonl) is not run again.
"""

import argparse
import itertools
import json
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets.utils.logging import disable_progress_bar

from outspoken import SFTConfig, SFTTrainer
from outspoken.cli import demo
from outspoken.cli.demo_task import build_model, build_tokenizer, solved_examples

DOC = Path(__file__).parents[1] / "docs" / "seeds.md"
SEEDS = 10
SIZES = list(itertools.product((48, 64, 96), (1, 2, 3)))  # hidden size, layers


def jobs(only: list[str]) -> Iterator[tuple[str, int]]:
    if "demo" in only:
        for seed in range(SEEDS):
            yield from ((kind, seed) for kind in ("healthy", "truncation", "learning_rate"))
    if "healthy-grpo" in only:
        yield from (("healthy-grpo", seed) for seed in range(100, 120))
    if "healthy-sft" in only:
        yield from (("healthy-sft", seed) for seed in range(200, 220))


def sft(model: Any, tokenizer: Any, out: Path, seed: int, steps: int, evaluate: bool, learning_rate: float) -> Any:
    more = {"eval_strategy": "steps", "eval_steps": max(1, steps // 8)} if evaluate else {}
    trainer = SFTTrainer(
        model,
        args=SFTConfig(
            **demo.common(out, seed, steps),
            **more,
            per_device_train_batch_size=32,
            learning_rate=learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=20,
        ),
        train_dataset=solved_examples(4000, seed + 1),
        eval_dataset=solved_examples(200, seed + 7) if evaluate else None,
        processing_class=tokenizer,
    )
    demo.train(trainer, every=10**9)
    return model


def pretrained(tokenizer: Any, seed: int, cache: Path) -> Any:
    """The demo's model after its supervised training; trained once per seed."""
    model, file = build_model(tokenizer, seed), cache / f"sft-{seed}.pt"
    if file.exists():
        model.load_state_dict(torch.load(file))
        return model
    sft(model, tokenizer, cache / f"sft-{seed}", seed, demo.SFT_STEPS, False, 3e-3)
    torch.save(model.state_dict(), file)
    return model


def run(kind: str, seed: int, out: Path) -> dict[str, Any]:
    tokenizer = build_tokenizer()
    path = out / f"{kind}-{seed}"
    if kind in ("healthy", "truncation", "learning_rate"):
        model = pretrained(tokenizer, seed, out)
        if kind == "healthy":
            outcome = demo.reinforce(model, tokenizer, path, seed, demo.HEALTHY_STEPS)
        else:
            settings, steps = demo.planted(kind), demo.FAULTY_STEPS[kind]
            outcome = demo.reinforce(model, tokenizer, path, seed, steps, settings, with_agent=True)
        return summary(path, outcome.first_reward, outcome.last_reward)
    hidden, layers = SIZES[seed % len(SIZES)]
    model = build_model(tokenizer, seed, hidden_size=hidden, layers=layers)
    if kind == "healthy-sft":
        rate, steps = (1e-3, 2e-3, 3e-3)[seed % 3], (150, 400, 800)[seed % 3]
        sft(model, tokenizer, path, seed, steps, seed % 2 == 0, rate)
        return summary(path, None, None) | {"hidden": hidden, "layers": layers, "steps": steps, "learning_rate": rate}
    sft(model, tokenizer, out / f"{kind}-{seed}-sft", seed, 800, False, 3e-3)
    settings = {
        "num_generations": (4, 8, 16)[seed % 3],
        "per_device_train_batch_size": (32, 64)[seed % 2],
        "learning_rate": (1e-4, 2e-4)[seed // 2 % 2],
        "beta": (0.0, 0.01)[seed // 3 % 2],
        "loss_type": ("dapo", "grpo", "dr_grpo")[seed % 3],
        "num_iterations": (1, 1, 2)[seed % 3],
    }
    outcome = demo.reinforce(model, tokenizer, path, seed, (60, 100, 200)[seed % 3], settings)
    return summary(path, outcome.first_reward, outcome.last_reward) | {"hidden": hidden, "layers": layers, **settings}


def summary(path: Path, first: float | None, last: float | None) -> dict[str, Any]:
    folder = path / "outspoken"
    diagnostics = [json.loads(line) for line in (folder / "diagnostics.jsonl").read_text().splitlines()]
    fired = [(d["code"], d["severity"], d["fired_step"]) for d in diagnostics if d["state"] == "firing"]
    changes = [json.loads(line)["state"] for line in (folder / "changes.jsonl").read_text().splitlines()]
    return {
        "verdict": json.loads((folder / "verdict.json").read_text())["state"],
        "warnings": list(dict.fromkeys(f"{c}@{s}" for c, severity, s in fired if severity != "info")),
        "infos": list(dict.fromkeys(f"{c}@{s}" for c, severity, s in fired if severity == "info")),
        "held_back": sorted({d["code"] for d in diagnostics if d["state"] == "suppressed"}),
        "changes": [state for state in changes if state != "requested"],
        "first_reward": first,
        "last_reward": last,
    }


def table(results: list[dict[str, Any]]) -> str:
    lines = []
    for kind in dict.fromkeys(r["kind"] for r in results):
        rows = [r for r in results if r["kind"] == kind]
        verdicts = ", ".join(f"{n} {v}" for v, n in Counter(r["verdict"] for r in rows).most_common())
        alarms = sum(len(r["warnings"]) for r in rows)
        runs = sum(bool(r["warnings"]) for r in rows)
        ends = Counter(r["changes"][-1] if r["changes"] else "no change" for r in rows)
        lines += [
            f"### {kind}: {len(rows)} runs\n",
            f"Verdicts: {verdicts}. Warnings and errors: {alarms} in {runs} runs; infos: "
            f"{sum(len(r['infos']) for r in rows)}."
            + (
                f" Last state of a change: {', '.join(f'{n} {s}' for s, n in ends.most_common())}."
                if ends.keys() - {"no change"}
                else ""
            )
            + "\n",
            "| seed | verdict | warnings and errors | held back | infos | changes | reward |",
            "|---|---|---|---|---|---|---|",
        ]
        for r in rows:
            reward = "–" if r["first_reward"] is None else f"{r['first_reward']:.2f} → {r['last_reward']:.2f}"
            cells = [" ".join(r[key]) or "–" for key in ("warnings", "held_back", "infos", "changes")]
            lines.append(f"| {r['seed']} | {r['verdict']} | {' | '.join(cells)} | {reward} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/seeds"))
    parser.add_argument("--only", default="demo,healthy-grpo,healthy-sft")
    parser.add_argument("--write", action="store_true", help="put the table into docs/seeds.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    args.out.mkdir(parents=True, exist_ok=True)
    store = args.out / "results.jsonl"
    done = [json.loads(line) for line in store.read_text().splitlines()] if store.exists() else []
    have = {(r["kind"], r["seed"]) for r in done}
    for kind, seed in jobs(args.only.split(",")):
        if (kind, seed) in have:
            continue
        started = time.monotonic()
        result = {"kind": kind, "seed": seed, **run(kind, seed, args.out), "seconds": time.monotonic() - started}
        done.append(result)
        with store.open("a") as file:
            file.write(json.dumps(result) + "\n")
        print(json.dumps(result), flush=True)
    text = table(done)
    print(text)
    if args.write:
        head, _, rest = DOC.read_text().partition("<!-- generated: begin -->")
        _, _, tail = rest.partition("<!-- generated: end -->")
        DOC.write_text(f"{head}<!-- generated: begin -->\n\n{text}\n<!-- generated: end -->{tail}")


if __name__ == "__main__":
    main()
