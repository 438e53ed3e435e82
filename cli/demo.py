"""`outspoken demo`: a healthy run, then one with a planted fault that is named, fixed while it trains, and checked."""

import copy
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets.utils.logging import disable_progress_bar
from transformers import PreTrainedTokenizerFast, PrinterCallback, ProgressCallback, TrainerCallback

from outspoken import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
from outspoken.cli.demo_task import build_model, build_tokenizer, problems, right_answer, solved_examples

SFT_STEPS = 800
HEALTHY_STEPS = 100
FAULTY_STEPS = {"truncation": 180, "learning_rate": 280}
LEARNING_RATE = 2e-4
CAP = 24  # longest solution: 15 characters and the end
CAP_THAT_CUTS = 8
LEARNING_RATE_FACTOR = 30
FAULTS = ("truncation", "learning_rate")
REPORT_EVERY = 20


@dataclass
class Outcome:
    """How a run ended, as its own records tell it."""

    path: Path
    verdict: str
    fired: list[str]  # codes with a severity above info that fired
    changes: list[str]  # states that changes went through, in order
    first_reward: float
    last_reward: float


class ShortProgress(TrainerCallback):
    """One line now and then in place of the whole table of metrics."""

    def __init__(self, every: int):
        self.every = every

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        logs = logs or {}
        if state.global_step % self.every:
            return
        if "reward" in logs:
            parts = [f"reward {logs['reward']:.2f}", f"cut {logs['completions/clipped_ratio']:.0%}"]
        elif "loss" in logs:
            parts = [f"loss {logs['loss']:.3f}"]
        else:
            return
        print(f"  step {state.global_step:>4}  " + "  ".join(parts), flush=True)


def demo(fault: str = "truncation", seed: int = 0, output_dir: str | Path = "outspoken-demo") -> list[Outcome]:
    """Run the demo and print it. Returns the outcomes of the healthy and of the faulty run.

    Args:
        fault: "truncation" (answers are cut by a small `max_completion_length`) or "learning_rate" (30 times too
            large).
        seed: of the model, the data and the sampling.
        output_dir: where the three runs are written; what an earlier demo left there is set aside, not mixed in.

    Raises:
        ValueError: no such fault.
    """
    if fault not in FAULTS:
        raise ValueError(f"fault={fault!r} is not known; choose one of: {', '.join(FAULTS)}")
    torch.set_num_threads(1)  # the model is so small that a second thread only costs
    disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    started, out = time.monotonic(), Path(output_dir)
    tokenizer = build_tokenizer()

    heading("1. Supervised fine-tuning", "A tiny model learns to add from a teacher who often guesses.")
    model = build_model(tokenizer, seed)
    trainer = SFTTrainer(
        model,
        args=SFTConfig(
            **common(out / "sft", seed, SFT_STEPS),
            per_device_train_batch_size=32,
            learning_rate=3e-3,
            lr_scheduler_type="cosine",
            warmup_steps=20,
        ),
        train_dataset=solved_examples(4000, seed + 1),
        processing_class=tokenizer,
    )
    train(trainer, every=200)

    heading("2. GRPO, healthy", "It is rewarded for right sums, and learns to do the working.")
    healthy = reinforce(copy.deepcopy(model), tokenizer, out / "grpo-healthy", seed, HEALTHY_STEPS)

    if fault == "truncation":
        heading(
            "3. GRPO with a planted fault",
            f"max_completion_length is {CAP_THAT_CUTS}: every answer is cut before its result. An agent watches.",
        )
    else:
        heading(
            "3. GRPO with a planted fault",
            f"learning_rate is {LEARNING_RATE_FACTOR} times too large. An agent watches.",
        )
    faulty_dir = out / f"grpo-{fault.replace('_', '-')}"
    faulty = reinforce(model, tokenizer, faulty_dir, seed, FAULTY_STEPS[fault], planted(fault), with_agent=True)

    heading("What happened", f"{time.monotonic() - started:.0f} seconds in all.")
    for title, outcome in (("healthy", healthy), ("faulty ", faulty)):
        fired = ", ".join(outcome.fired) or "nothing above info"
        print(
            f"  {title}  verdict {outcome.verdict:<18} reward {outcome.first_reward:.2f} -> {outcome.last_reward:.2f}"
        )
        print(f"           fired: {fired}; changes: {' -> '.join(outcome.changes) or 'none'}")
    print("\nThe run directories:")
    for path in (out / "sft", healthy.path, faulty.path):
        print(f"  {path}/outspoken")
    first = faulty.fired[0] if faulty.fired else "RL016"
    other = "learning_rate" if fault == "truncation" else "truncation"
    print("\nTry next:")
    for words, what in (
        (f"diagnose {faulty.path}", "what was seen, with the evidence"),
        (f"explain {first}", "what a rule looks at, and when it is wrong"),
        (f"gate {healthy.path}", "what a CI job asks: exit code 0, 1 or 2"),
        (f"demo --fault {other}", "another fault"),
    ):
        print(f"  {program()} {words:<44}  # {what}")
    return [healthy, faulty]


def program() -> str:
    """How this program is called from here: by its name if that is on the path, else by where it lies."""
    return "outspoken" if shutil.which("outspoken") else os.path.relpath(Path(sys.executable).parent / "outspoken")


def planted(fault: str) -> dict[str, Any]:
    """The settings that make a run go wrong."""
    if fault == "truncation":
        return {"max_completion_length": CAP_THAT_CUTS}
    return {
        "learning_rate": LEARNING_RATE * LEARNING_RATE_FACTOR,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 20,
        "save_strategy": "steps",
        "save_steps": 5,
        "save_total_limit": None,  # the last good one may be far back
    }


def heading(title: str, text: str) -> None:
    print(f"\n== {title} ==\n{text}", flush=True)


def common(output_dir: Path, seed: int, steps: int) -> dict[str, Any]:
    return {
        "output_dir": str(output_dir),
        "max_steps": steps,
        "seed": seed,
        "report_to": [],
        "save_strategy": "no",
        "gradient_checkpointing": False,
        "use_cpu": True,
        "logging_steps": 5,
    }


def train(trainer: Any, every: int) -> None:
    for noisy in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(noisy)
    trainer.add_callback(ShortProgress(every))
    trainer.train()


def reinforce(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    output_dir: Path,
    seed: int,
    steps: int,
    more: dict[str, Any] | None = None,
    with_agent: bool = False,
) -> Outcome:
    settings = {
        **common(output_dir, seed, steps),
        "per_device_train_batch_size": 64,
        "num_generations": 8,
        "max_completion_length": CAP,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        **(more or {}),
    }
    trainer = GRPOTrainer(
        model,
        right_answer,
        args=GRPOConfig(**settings),
        train_dataset=problems(2000, seed + 2),
        processing_class=tokenizer,
    )
    agent = None
    if with_agent:
        started = time.time()  # the agent must not take an earlier demo's run for this one
        command = [sys.executable, "-m", "outspoken.cli.demo_agent", str(output_dir), str(started)]
        agent = subprocess.Popen(command)
    try:
        train(trainer, REPORT_EVERY)
    finally:
        if agent is not None:
            try:
                agent.wait(timeout=20)
            except subprocess.TimeoutExpired:
                agent.kill()
    return outcome_of(output_dir)


def outcome_of(output_dir: Path) -> Outcome:
    folder = output_dir / "outspoken"
    diagnostics = _lines(folder / "diagnostics.jsonl")
    rewards = [r["signals"]["reward"] for r in _lines(folder / "metrics.jsonl") if "reward" in r["signals"]]
    fired = [d["code"] for d in diagnostics if d["state"] == "firing" and d["severity"] != "info"]
    return Outcome(
        output_dir,
        json.loads((folder / "verdict.json").read_text())["state"],
        list(dict.fromkeys(fired)),
        [c["state"] for c in _lines(folder / "changes.jsonl")],
        sum(rewards[:10]) / len(rewards[:10]),
        sum(rewards[-10:]) / len(rewards[-10:]),
    )


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
