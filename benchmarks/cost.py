"""What diagnosis costs: the engine per step, the share of a training step, reading a run, importing the package.

    python benchmarks/cost.py [--write]

All numbers come from one run on one machine; ratios are of runs side by side. `--write` puts the table into
docs/performance.md.
"""

import argparse
import copy
import json
import math
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path
from typing import Any

from common import write

from outspoken.diagnostics.engine import Engine
from outspoken.diagnostics.records import Observation
from outspoken.diagnostics.rundir import RunDirectory

SIGNALS = 60
GRPO_SIGNALS = """
loss grad_norm learning_rate epoch num_tokens entropy reward reward_std frac_reward_zero_std groups/count groups/zero_std
groups/all_failed groups/all_passed groups/tiny_std groups/std_mean groups/attenuation rewards/range rewards/max_seen
rewards/min_seen rewards/unscored rewards/f/mean rewards/f/std rewards/f/none_share advantages/abs_mean
advantages/zero_share num_completions completions/mean_length completions/min_length completions/max_length
completions/clipped_ratio completions/at_cap completions/mean_terminated_length completions/min_terminated_length
completions/max_terminated_length completions/p50_terminated_length completions/p99_terminated_length
completions/truncated_reward completions/terminated_reward completions/duplicate_share prompts/p95_length kl
policy/approx_kl clip_ratio/low_mean clip_ratio/high_mean clip_ratio/region_mean log_ratio/p01 log_ratio/p99
log_ratio/abs_mean ratio/ess step_time time/step time/data time/generate time/score time/forward_backward
time/optimizer memory/host_rss memory/host_available memory/cgroup_used time/diagnostics
""".split()
CONFIG = {
    "num_generations": 8,
    "max_completion_length": 512,
    "learning_rate": 1e-6,
    "beta": 0.01,
    "num_iterations": 2,
    "steps_per_generation": 4,
    "gradient_accumulation_steps": 4,
    "scale_rewards": "group",
    "epsilon": 0.2,
    "per_device_train_batch_size": 8,
    "generation_batch_size": 64,
}


def rows(n: int, seed: int = 0) -> list[dict[str, float]]:
    """Observations of a healthy, noisy GRPO run with `SIGNALS` signals."""
    assert len(GRPO_SIGNALS) == SIGNALS, len(GRPO_SIGNALS)
    rng, out = random.Random(seed), []
    for _ in range(n):
        row = {name: abs(rng.gauss(0.3, 0.05)) for name in GRPO_SIGNALS}
        row |= {
            "reward": 0.5 + rng.gauss(0, 0.05),
            "entropy": 0.6 + rng.gauss(0, 0.02),
            "loss": rng.gauss(0, 0.01),
            "grad_norm": math.exp(rng.gauss(-1, 0.3)),
            "kl": 0.001 * math.exp(rng.gauss(0, 0.2)),
            "groups/count": 8.0,
            "num_completions": 64.0,
            "rewards/range": 1.0,
            "rewards/max_seen": 1.0,
            "rewards/min_seen": 0.0,
            "completions/clipped_ratio": 0.02,
            "groups/tiny_std": 0.0,
            "groups/all_passed": 0.1,
            "clip_ratio/region_mean": 0.01,
            "completions/mean_length": 200 * math.exp(rng.gauss(0, 0.1)),
            "rewards/unscored": 0.0,
            "rewards/f/none_share": 0.0,
        }
        out.append(row)
    return out


def engine_memory(steps: int = 100_000) -> dict[int, float]:
    """MiB that Python holds for an engine after so many steps."""
    pool = rows(2000)
    engine = Engine(method="grpo", config=CONFIG, total_steps=steps, facts={"live_fields": ["learning_rate"]})
    out = {}
    tracemalloc.start()
    for step in range(1, steps + 1):
        engine.observe(Observation(step, pool[step % len(pool)]))
        if step in (1_000, 10_000, 100_000):
            out[step] = tracemalloc.get_traced_memory()[0] / 2**20
    tracemalloc.stop()
    return out


def engine_times(steps: int = 100_000) -> dict[int, float]:
    """Mean microseconds per step over the 1,000 steps (or as many as there are) that end at each mark."""
    pool = rows(2000)
    engine = Engine(method="grpo", config=CONFIG, total_steps=steps, facts={"live_fields": ["learning_rate"]})
    spent, out = [], {}
    for step in range(1, steps + 1):
        observation = Observation(step, pool[step % len(pool)])
        start = time.perf_counter()
        engine.observe(observation)
        spent.append(time.perf_counter() - start)
        if step in (100, 1_000, 10_000, 100_000):
            out[step] = 1e6 * statistics.fmean(spent[-1_000:])
    return out


def training_share(steps: int = 60) -> dict[str, float]:
    """Seconds per step of a tiny GRPO run with and without diagnosis, in alternation, medians; and their ratio."""
    import torch
    import transformers
    from datasets.utils.logging import disable_progress_bar

    from outspoken import GRPOConfig, GRPOTrainer
    from outspoken.cli import demo
    from outspoken.cli.demo_task import build_model, build_tokenizer, problems, right_answer

    torch.set_num_threads(1)
    disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    os.environ["OUTSPOKEN_LOG"] = "off"
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, 0)

    class Clock(transformers.TrainerCallback):
        def __init__(self) -> None:
            self.at: list[float] = []

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.at.append(time.perf_counter())

    spent: dict[bool, list[float]] = {True: [], False: []}
    own: list[float] = []
    for repeat in range(6):
        diagnose = repeat % 2 == 0
        with tempfile.TemporaryDirectory() as folder:
            clock = Clock()
            trainer = GRPOTrainer(
                copy.deepcopy(model),
                right_answer,
                args=GRPOConfig(
                    **{**demo.common(Path(folder), 0, steps), "logging_steps": 10},
                    per_device_train_batch_size=64,
                    num_generations=8,
                    max_completion_length=24,
                    learning_rate=1e-6,
                    diagnose=diagnose,
                ),
                train_dataset=problems(500, 1),
                processing_class=tokenizer,
                callbacks=[clock],
            )
            for noisy in (transformers.PrinterCallback, transformers.ProgressCallback):
                trainer.remove_callback(noisy)
            trainer.train()
            spent[diagnose] += [b - a for a, b in zip(clock.at[5:], clock.at[6:])]
            if diagnose:
                lines = (Path(folder) / "outspoken" / "metrics.jsonl").read_text().splitlines()
                signals = [json.loads(line)["signals"] for line in lines[6:]]
                own += [row["time/diagnostics"] for row in signals if "time/diagnostics" in row]
    with_, without = statistics.median(spent[True]), statistics.median(spent[False])
    return {
        "with": with_,
        "without": without,
        "share": with_ / without - 1,
        "own": statistics.median(own),
        "own_share": statistics.median(own) / with_,
    }


def gate_time(steps: int = 10_000) -> dict[str, float]:
    """Seconds of `outspoken gate` as a whole process on a run of so many steps, and the size of its metrics."""
    with tempfile.TemporaryDirectory() as folder:
        engine = Engine(method="grpo", config=CONFIG, total_steps=steps, run_id="bench")
        writer = RunDirectory(folder)
        for step, row in enumerate(rows(2000) * (steps // 2000), 1):
            observation = Observation(step, row, time=0.0, epoch=0.0)
            for transition in engine.observe(observation):
                if transition.kind == "transition":
                    writer.append_diagnostic(transition.record)
            writer.append_observation(observation, 0)
        engine.finish()
        verdict = engine.verdict()
        writer.write_verdict(verdict)
        writer.write_run(
            {
                "schema": "outspoken.run/1", "id": "bench", "parent": None, "method": "grpo", "trainer": "bench",
                "status": "finished", "started": 0.0, "heartbeat": 0.0, "step": steps, "total_steps": steps,
                "config": CONFIG, "live": {}, "config_rev": engine.config_rev, "versions": {}, "hardware": {},
                "world_size": 1, "dataset": {}, "facts": {}, "segment": 0, "verdict": verdict,
            }
        )  # fmt: skip
        size = (Path(folder) / "metrics.jsonl").stat().st_size / 2**20
        best = math.inf
        for _ in range(5):
            start = time.perf_counter()
            done = subprocess.run(
                [sys.executable, "-m", "outspoken.cli.main", "gate", folder, "--json"], capture_output=True, text=True
            )
            best = min(best, time.perf_counter() - start)
            assert done.returncode in (0, 1, 2), done.stderr
            json.loads(done.stdout)
    return {"seconds": best, "metrics_mib": size}


def process_seconds(code: str) -> float:
    """Best of seven: a Python process that runs the code, less one that runs nothing."""

    def best(text: str) -> float:
        times = []
        for _ in range(7):
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", text], check=True)
            times.append(time.perf_counter() - start)
        return min(times)

    return best(code) - best("pass")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    times = engine_times()
    memory = engine_memory()
    share = training_share()
    gate = gate_time()
    imported = process_seconds("import outspoken")
    cells = [
        (f"engine, all GRPO rules, {SIGNALS} signals: per step", "under 300 µs, flat", ", ".join(f"{v:.0f} µs at step {k:,}" for k, v in times.items())),
        ("memory of the engine", "flat", ", ".join(f"{v:.1f} MiB at step {k:,}" for k, v in memory.items())),
        ("diagnosis in a tiny GRPO step (64 completions, 83k parameters)", "under 2 %", f"{share['own_share']:.1%} by its own clock ({1e3 * share['own']:.2f} ms); {share['share']:+.1%} side by side: {1e3 * share['with']:.1f} ms with, {1e3 * share['without']:.1f} ms without, medians of alternating runs (the noise is larger than the difference)"),
        ("`outspoken gate`, whole process, a run of 10,000 steps", "under 1 s", f"{gate['seconds']:.2f} s ({gate['metrics_mib']:.0f} MiB of metrics)"),
        ("`import outspoken`", "under 0.1 s", f"{imported:.3f} s"),
    ]  # fmt: skip
    lines = ["| what | aim | measured |", "|---|---|---|", *(f"| {a} | {b} | {c} |" for a, b, c in cells)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}; peak memory of this benchmark {peak:.1f} GiB"
    text = "\n".join([*lines, "", f"Machine: {machine}."])
    print(text)
    if args.write:
        write("<!-- generated: begin -->", "<!-- generated: end -->", text)


if __name__ == "__main__":
    main()
