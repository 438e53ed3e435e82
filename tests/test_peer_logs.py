"""Logs that other systems' own loggers wrote (`tests/peer_logs`) are read with the right names, steps and values.

Their numbers are arithmetic of the step, written down here once more, or the file is parsed here by itself.
"""

import ast
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest

from outspoken.diagnostics.diagnose import diagnose
from outspoken.diagnostics.sources import read as read_log

LOGS = Path(__file__).parent / "peer_logs"
NAN = math.nan
OTHERS = {"tensorboard", "wandb", "mlflow"}  # of other tests


@cache
def read(path):
    return read_log(LOGS / path)


def observed(path):
    return list(read(path).observations)


def at(observation, name):
    """What was measured: a number, not a number included, or None."""
    return NAN if name in observation.nonfinite else observation.signals.get(name)


def same(ours, expected, rel=1e-6):
    if expected is None or ours is None:
        return ours is expected
    return (math.isnan(ours) and math.isnan(expected)) or ours == pytest.approx(expected, rel=rel, abs=1e-12)


@dataclass
class Log:
    """A log, and what it must be read as.

    Attributes:
        steps: of the observations, in order; a step that goes back is a restart.
        values: our name -> value at a step; None where nothing was logged.
        shift: our name -> how much higher it is after the restart.
        rel: relative precision of the numbers in the file.
        family: None where the names alone do not tell.
    """

    path: str
    format: str
    family: str
    method: str
    steps: list[int]
    values: dict[str, Callable[[int], float | None]]
    axis: str = "step"
    shift: dict[str, float] = field(default_factory=dict)
    rel: float = 1e-6


def every(value):
    return lambda step: value


def only(steps, value):
    """`value(step)` at these steps and nothing elsewhere."""
    return lambda step: value(step) if step in steps else None


def nan_at(bad, value):
    return lambda step: NAN if step == bad else value(step)


TO_12 = list(range(1, 13))
RESUMED_AT_8 = [*range(1, 13), *range(9, 13)]

TINKER_RL = {
    "reward": lambda s: s / 16,
    "entropy": lambda s: 1 - s / 16,
    "learning_rate": every(1e-4),
    "groups/all_passed": lambda s: s / 32,
    "groups/all_failed": lambda s: 0.5 - s / 32,
    "groups/zero_std": every(0.5),  # half of the groups are mixed
    "completions/mean_length": lambda s: 64 + s,
    "num_completions": every(32),
    "time/step": every(4),
    "sampling/k1": nan_at(5, lambda s: s / 1024),
}
TINKER_SFT = {
    "loss": nan_at(7, lambda s: 2 / (1 + s)),
    "eval_loss": only({0, 5, 10}, lambda s: 3 / (1 + s)),
    "learning_rate": lambda s: 2e-4 * (1 - s / 12),
}
TINKER_DPO = {
    "loss": lambda s: 0.6875 - s / 32,
    "rewards/accuracies": lambda s: 0.5 + s / 32,
    "rewards/margins": lambda s: s / 4,
    "rewards/chosen": lambda s: -s / 8,
    "rewards/rejected": lambda s: -s * 3 / 8,
    "learning_rate": every(1e-5),
}
TORCHTUNE_SFT = {
    "loss": nan_at(5, lambda s: 2 / (1 + s)),
    "learning_rate": lambda s: 2e-5 * min(1, s / 4),
    "grad_norm": lambda s: 1 / s,
    "memory/peak_allocated": every(6.25),
    "memory/peak_reserved": every(8),
}
TORCHTUNE_DPO = {
    "loss": lambda s: 0.6875 - s / 32,
    "learning_rate": every(5e-6),
    "rewards/chosen": lambda s: -s / 8,
    "rewards/rejected": lambda s: -s * 3 / 8,
    "rewards/accuracies": lambda s: 0.5 + s / 32,
    "rewards/margins": lambda s: s / 4,
    "logps/chosen": lambda s: -100 - s,
    "logps/rejected": lambda s: -200 - s,
}
TORCHTUNE_PPO = {
    "reward": lambda s: s / 16,
    "completions/mean_length": every(64),
}
VERL = {
    "reward": lambda s: s / 16,
    "entropy": lambda s: 1 - s / 32,
    "kl": lambda s: s / 1024,
    "grad_norm": nan_at(5, lambda s: 1 / s),
    "learning_rate": every(1e-6),
    "completions/mean_length": lambda s: 100 + s,
    "completions/max_length": every(256),
    "completions/min_length": every(8),
    "completions/clipped_ratio": lambda s: s / 64,
    "clip_ratio/region_mean": every(1 / 64),
    "time/generate": every(5),
    "time/step": every(12),
    "memory/peak_allocated": every(40.5),
    "rewards/max_seen": every(1),
    "rewards/range": every(1),
}
VERL = {
    **{name: only(range(1, 13), value) for name, value in VERL.items()},  # step 0 only validates
    "val-core/gsm8k/reward/mean@1": lambda s: {0: 0.125, 10: 0.5}.get(s),
}
OPENRLHF = {
    "reward": lambda s: s / 16,
    "reward_std": every(0.5),
    "kl": lambda s: s / 1024,
    "grad_norm": nan_at(5, lambda s: 1 / s),
    "learning_rate": every(5e-7),
    "clip_ratio/region_mean": every(1 / 64),
    "groups/std_mean": every(0.25),
    "completions/mean_length": lambda s: 100 + s,
    "completions/clipped_ratio": lambda s: s / 64,
    "num_completions": every(128),
    "loss": every(-1 / 512),
    "time/step": every(9.5),
}
HF = {  # not a number at step 5, and from then on: the Trainer carries the sum over
    "loss": lambda s: 2 / (1 + s) if s < 5 else NAN,
    "grad_norm": lambda s: 1 / s,
    "learning_rate": lambda s: 1e-3 * (13 - s) / 12,
    "eval_loss": only({6, 12}, every(0.75)),
}
HF_RESUMED = {  # from the checkpoint of step 8; the steps before are those of the first run
    **HF,
    "loss": lambda s: 2 / (1 + s) + (1 / 64 if s > 8 else 0) if s < 5 or s > 8 else NAN,
    "eval_loss": lambda s: {6: 0.75, 12: 0.75 + 1 / 64}.get(s),
}
FACTORY = {  # the filter of the Trainer writes 0 where the loss is not a number
    "loss": lambda s: 0 if s == 5 else 2 / (1 + s),
    "learning_rate": HF["learning_rate"],
    "eval_loss": only({6, 12}, every(0.75)),
}
LIGHTNING = {
    "loss": nan_at(5, lambda s: 2 / (1 + s)),
    "grad_norm": lambda s: 1 / (1 + s),
    "learning_rate": every(0.01),
    # after an epoch of six steps the module counts 6, and the row stands under step 5
    "eval_loss": only({5, 11}, lambda s: 3 / (2 + s)),
}
PRIME_TRAINER = {
    "loss": every(-1 / 512),
    "entropy": lambda s: 1 - s / 32,
    "sampling/k3": lambda s: None if s == 5 else s / 4096,  # the file leaves out what is not finite
    "grad_norm": lambda s: 1 / s,
    "learning_rate": every(1e-6),
    "time/step": every(12),
    "memory/peak_reserved": every(40.5),
}
PRIME_ORCHESTRATOR = {
    "reward": lambda s: s / 16,  # of all rollouts, not of those that were kept
    "groups/all_failed": lambda s: 0.5 - s / 32,
    "groups/all_passed": lambda s: s / 32,
    "groups/zero_std": every(0.5),
    "num_completions": every(128),
    "completions/mean_length": lambda s: 100 + s,
    "completions/max_length": every(256),
    "completions/clipped_ratio": lambda s: s / 64,
    "sample/staleness_mean": every(1),
    "sample/staleness_max": every(2),
}
PIPELINE = {
    "reward": lambda s: s / 8,
    "entropy": lambda s: 1 - s / 32,
    "kl": lambda s: s / 8,
    "grad_norm": lambda s: None if s == 5 else 1 / s,  # -1 stands for "not available"
    "learning_rate": every(1e-6),
}
OAT = {
    "reward": lambda s: s / 16,
    "loss": every(-1 / 512),
    "entropy": lambda s: 1 - s / 32,
    "kl": lambda s: s / 1024,  # its sum over 64 tokens, by length
    "grad_norm": nan_at(5, lambda s: 1 / s),
    "learning_rate": every(1e-6),
    "completions/mean_length": every(64),
    "completions/clipped_ratio": every(8 / 32),
    "clip_ratio/region_mean": every(1 / 64),
}
NEMO = {
    "loss": nan_at(5, lambda s: 2 / (1 + s)),
    "reward": lambda s: s / 16,
    "completions/mean_length": lambda s: 100 + s,
    "sampling/k3": lambda s: s / 64,
}
OPEN_INSTRUCT = {
    "reward": lambda s: 10 * s / 16,
    "entropy": lambda s: 1 - s / 32,
    "kl": lambda s: s / 1024,  # its kl2 is k3
    "grad_norm": nan_at(5, lambda s: 1 / s),
    "learning_rate": every(1e-6),
    "completions/mean_length": lambda s: 100 + s,
    "clip_ratio/region_mean": every(1 / 64),
    "completions/clipped_ratio": lambda s: s / 64,
}

REALS = [
    Log("tinker/rl", "jsonl", "tinker", "grpo", [*range(10), *range(8, 12)], TINKER_RL, shift={"reward": 1 / 64}),
    Log("tinker/sft", "jsonl", "tinker", "sft", list(range(12)), TINKER_SFT),
    Log("tinker/dpo", "jsonl", "tinker", "dpo", list(range(12)), TINKER_DPO),
    Log("torchtune/sft/log_1700000000.txt", "console", "torchtune", "sft", TO_12, TORCHTUNE_SFT | {"eval_loss": only({10}, every(0.375))}),
    Log("torchtune/sft/stdout.txt", "console", "torchtune", "sft", TO_12, TORCHTUNE_SFT),
    Log("torchtune/sft/log_1700000000.jsonl", "jsonl", "torchtune", "sft", TO_12, TORCHTUNE_SFT),
    Log("torchtune/dpo/log_1700000000.txt", "console", "torchtune", "dpo", TO_12, TORCHTUNE_DPO),
    Log("torchtune/ppo/log_1700000000.txt", "console", "torchtune", "ppo", TO_12, TORCHTUNE_PPO),
    Log("torchtune/restart/log_1700000000.txt", "console", "torchtune", "sft", [*range(1, 11), *range(9, 13)], TORCHTUNE_SFT, shift={"loss": 1 / 64}),
    Log("verl/gsm8k.jsonl", "jsonl", "verl", "grpo", list(range(13)), VERL),
    Log("verl/console.log", "console", "verl", "grpo", list(range(13)), VERL),
    Log("openrlhf/console.log", "console", "openrlhf", "grpo", TO_12, OPENRLHF),
    Log("openrlhf/console_async.log", "console", "openrlhf", "grpo", [*range(1, 10), *range(8, 13)], OPENRLHF, shift={"reward": 1 / 64}),
    Log("transformers/trainer_state.json", "trainer_state", "trl", "sft", TO_12, HF_RESUMED),
    Log("transformers/console.log", "console", "trl", "sft", TO_12, HF, axis="row number", rel=1e-3),
    Log("transformers/table.ipynb", "notebook", "trl", "sft", [3, 6, 9, 12], {"loss": HF["loss"], "eval_loss": every(0.75)}, axis="Step"),
    Log("llama_factory/trainer_log.jsonl", "jsonl", "llama_factory", "sft", RESUMED_AT_8, FACTORY, axis="current_steps", shift={"loss": 1 / 64, "eval_loss": 1 / 64}),
    Log("llama_factory/trainer_state.json", "trainer_state", "trl", "sft", TO_12, {"grad_norm": HF["grad_norm"], "learning_rate": HF["learning_rate"]}),
    Log("lightning/lightning_logs/version_0/metrics.csv", "csv", "trl", "sft", [1, 3, 5, 7, 9, 11], LIGHTNING),
]  # fmt: skip
DOCUMENTED = [
    Log("prime_rl/trainer/metrics.jsonl", "jsonl", "prime_rl", "grpo", TO_12, PRIME_TRAINER),
    Log("prime_rl/orchestrator/metrics.jsonl", "jsonl", "prime_rl", "grpo", TO_12, PRIME_ORCHESTRATOR),
    Log("prime_rl/trainer.log", "console", "prime_rl", "grpo", TO_12, {name: PRIME_TRAINER[name] for name in ("grad_norm", "learning_rate", "time/step")}, rel=1e-3),
    Log("prime_rl/orchestrator.log", "console", None, "grpo", TO_12, {"reward": lambda s: s / 16}, rel=1e-3),
    Log("pipeline_rl/finetune.log", "console", "pipeline_rl", "grpo", TO_12, PIPELINE, axis="stats/completed_steps", rel=5e-3),
    Log("oat/console.log", "console", "oat", "grpo", TO_12, OAT, axis="misc/policy_sgd_step"),
    Log("nemo_rl/console.log", "console", "nemo_rl", "grpo", TO_12, NEMO, rel=5e-3),
    Log("open_instruct/history.csv", "csv", "open_instruct", "grpo", TO_12, OPEN_INSTRUCT, axis="training_step"),
]  # fmt: skip


@pytest.mark.parametrize("log", [*REALS, *DOCUMENTED], ids=lambda log: log.path)
def test_a_log_is_read_as_what_it_is(log):
    run = read(log.path)
    assert (run.format, run.method) == (log.format, log.method)
    assert log.family in (run.family, None)
    observations = list(run.observations)
    assert [o.step for o in observations] == log.steps
    assert run.step_axis == log.axis
    falls = [i for i in range(1, len(log.steps)) if log.steps[i] < log.steps[i - 1]]
    assert [s.first for s in run.segments] == [0, *falls]
    assert run.account.balanced
    wrong = []
    for name, value in log.values.items():
        for i, observation in enumerate(observations):
            expected = value(observation.step)
            if expected is not None and falls and i >= falls[0]:
                expected += log.shift.get(name, 0)
            if not same(at(observation, name), expected, log.rel):
                wrong.append((name, observation.step, at(observation, name), expected))
    assert not wrong, wrong[:8]
    assert set(log.values) <= set(run.signals)


def test_a_console_without_steps_counts_rows():
    """Resumed at step 8: its rows 13 to 16 are the steps 9 to 12, which nothing in the text tells."""
    run = read("transformers/console_resumed.log")
    assert run.step_axis == "row number" and [o.step for o in run.observations] == list(range(1, 17))
    assert any("rows were numbered" in note for note in run.notes)
    for o in run.observations:
        step, again = (o.step, 0) if o.step <= 12 else (o.step - 4, 1 / 64)
        loss = 2 / (1 + step) + again if step < 5 or again else NAN
        assert same(at(o, "loss"), loss, 1e-3) and same(at(o, "grad_norm"), 1 / step, 1e-3)


def test_a_bar_is_read_once_per_update():
    """Every second of 24 micro-batches gives the bar a new text, which it shows again at the next one."""
    observations = observed("openrlhf/sft.log")
    assert read("openrlhf/sft.log").method == "sft"
    by_step = {o.step: o for o in observations}
    for update in range(1, 13):
        o = by_step.pop(2 * update)
        assert same(at(o, "loss"), 2 / (1 + update), 5e-3) and at(o, "learning_rate") == 1e-5
        assert same(at(o, "grad_norm"), NAN if update == 5 else 1 / update, 5e-3)
    assert set(by_step) <= {11}  # what is not a number is not taken for a repetition


# ---------------------------------------------------------------------- two files of one run


@pytest.mark.parametrize("pair", [("verl/gsm8k.jsonl", "verl/console.log")])
def test_two_files_of_one_run_are_the_same_observations(pair):
    a, b = (observed(path) for path in pair)
    assert len(a) == len(b)
    for x, y in zip(a, b):
        assert (x.step, x.signals, x.nonfinite) == (y.step, y.signals, y.nonfinite)


@pytest.mark.parametrize("method", ["sft", "dpo", "grpo"])
def test_trl_in_full_and_in_four_digits(method):
    state, console = (list(observed(f"trl/{method}/{name}")) for name in ("trainer_state.json", "console.log"))
    assert read(f"trl/{method}/trainer_state.json").method == read(f"trl/{method}/console.log").method == method
    assert [o.step for o in state] == [o.step for o in console] == list(range(1, 11))
    for exact, printed in zip(state, console):
        timing = {name for name in {*exact.signals, *printed.signals} if "runtime" in name or "per_second" in name}
        assert exact.signals.keys() - timing == printed.signals.keys() - timing
        for name in exact.signals.keys() - timing:
            assert printed.signals[name] == pytest.approx(exact.signals[name], rel=1e-3, abs=1e-9), name


SAME_RUN = [
    ["verl/gsm8k.jsonl", "verl/console.log"],
    ["torchtune/sft/log_1700000000.jsonl", "torchtune/sft/stdout.txt"],
    ["trl/sft/trainer_state.json", "trl/sft/console.log"],
    ["trl/dpo/trainer_state.json", "trl/dpo/console.log"],
    ["trl/grpo/trainer_state.json", "trl/grpo/console.log"],
]


@pytest.mark.parametrize("paths", SAME_RUN, ids=lambda paths: paths[0])
def test_two_files_of_one_run_get_the_same_diagnosis(paths):
    reports = [diagnose(LOGS / path) for path in paths]
    seen = [[(d["code"], d["state"], d["first_step"], d["last_step"]) for d in r["diagnostics"]] for r in reports]
    assert seen[0] == seen[1]
    assert reports[0]["verdict"]["state"] == reports[1]["verdict"]["state"]


NOT_A_NUMBER = [
    ("tinker/sft", 7),
    ("torchtune/sft/log_1700000000.txt", 5),
    ("torchtune/sft/log_1700000000.jsonl", 5),
    ("transformers/console.log", 5),
    ("lightning/lightning_logs", 5),
    ("nemo_rl/console.log", 5),
]


@pytest.mark.parametrize(("path", "step"), NOT_A_NUMBER)
def test_a_loss_that_is_not_a_number_breaks_the_run(path, step):
    report = diagnose(LOGS / path)
    (found,) = [d for d in report["diagnostics"] if d["code"] == "NUM001"]
    assert found["first_step"] == step and report["verdict"]["state"] == "broken"


# ---------------------------------------------------------------------- directories, and settings beside the log


def test_the_files_of_two_processes_are_one_run():
    """The orchestrator knows the rewards, the trainer the losses; both write `time/step`, at paces of their own."""
    both = read(LOGS / "prime_rl")
    parts = [read(LOGS / "prime_rl" / name / "metrics.jsonl") for name in ("orchestrator", "trainer")]
    assert both.family == "prime_rl" and both.method == "grpo" and len(both.segments) == 1
    assert len(both.rows) == sum(len(part.rows) for part in parts)
    assert both.account.balanced and both.account.cells == sum(part.account.cells for part in parts)
    assert set(both.signals) == {name for part in parts for name in part.signals}
    for i, observation in enumerate(both.observations):
        halves = [part.observations[i] for part in parts]
        assert {o.step for o in halves} == {observation.step}
        for half in halves:
            shared = {"time/step", "time/save"} & observation.signals.keys()
            assert {k: v for k, v in half.signals.items() if k not in shared and not k.endswith("#n")}.items() <= (
                observation.signals.items()
            )
    assert {"reward", "grad_norm"} <= both.observations[0].signals.keys()


@pytest.mark.parametrize(
    ("directory", "chosen"),
    [
        ("tinker/rl", "metrics.jsonl"),
        ("torchtune/dpo", "log_1700000000.txt"),
        ("lightning", "lightning_logs/version_0/metrics.csv"),
        ("prime_rl", ""),
        ("llama_factory", "trainer_state.json"),
        ("transformers", "trainer_state.json"),
        ("open_instruct", "history.csv"),
    ],
)
def test_the_log_of_a_directory(directory, chosen):
    assert Path(read(directory).path) == LOGS / directory / chosen


def test_settings_that_lie_beside_a_log():
    # config.json: learning_rate, max_tokens, temperature, kl_penalty_coef, dataset_builder.group_size, eval_every
    tinker = {"learning_rate": 1e-4, "max_completion_length": 128, "temperature": 1.0, "beta": 0.0}
    assert read("tinker/rl").config.items() >= {**tinker, "num_generations": 4, "eval_steps": 5}.items()
    # torchtune_config.yaml: optimizer.lr, gradient_accumulation_steps, clip_grad_norm, lr_scheduler.num_warmup_steps
    torchtune = {"learning_rate": 2e-5, "gradient_accumulation_steps": 8, "max_grad_norm": 1.0, "warmup_steps": 4}
    assert read("torchtune/sft/log_1700000000.txt").config.items() >= torchtune.items()
    # hparams.yaml
    assert read("lightning").config.items() >= {"learning_rate": 0.01, "weight_decay": 0.0}.items()
    # trainer_state.json itself
    state = {"max_steps": 12, "per_device_train_batch_size": 1, "logging_steps": 1, "eval_steps": 6, "save_steps": 4}
    assert read("transformers").config.items() >= state.items()


# ---------------------------------------------------------------------- against the raw file


@pytest.mark.parametrize("path", ["trl/sft", "trl/dpo", "trl/grpo", "transformers", "llama_factory"])
def test_every_row_of_trainer_state_is_there(path):
    rows = json.loads((LOGS / path / "trainer_state.json").read_text())["log_history"]
    by_step = {o.step: o for o in observed(f"{path}/trainer_state.json")}
    cells = 0
    for row in rows:
        seen = by_step[row["step"]]
        for name, value in row.items():
            cells += 1
            if name not in ("step", "epoch") and "train_runtime" not in row:
                assert same(at(seen, name), value), (name, row["step"])
    assert read(f"{path}/trainer_state.json").account.cells == cells


def test_the_rewards_of_grpo():
    """Step s gives 1 to the first s % 5 of each group of four: no spread where that is none or all of them."""
    for o in observed("trl/grpo/trainer_state.json"):
        passed = o.step % 5
        assert o.signals["reward"] == passed / 4
        assert o.signals["frac_reward_zero_std"] == (passed in (0, 4))


def test_every_line_of_a_console_is_there():
    text = (LOGS / "openrlhf/console.log").read_text()
    found = re.findall(r"Global step (\d+): (\{.*\})", text)
    assert len(found) == 12
    for (step, dict_text), o in zip(found, observed("openrlhf/console.log")):
        row = ast.literal_eval(dict_text.replace("nan", "'nan'"))
        assert int(step) == o.step
        # each number of the line is in the observation, under whatever name
        numbers = sorted(float(v) for v in row.values() if v != "nan")
        kept = sorted(o.signals.values())
        assert all(any(same(k, n) for k in kept) for n in numbers), step


# ---------------------------------------------------------------------- the files themselves


def test_each_log_has_a_script_and_is_small():
    scripts = "\n".join(path.read_text() for path in LOGS.glob("make_*.py"))
    folders = {path.name for path in LOGS.iterdir() if path.is_dir() and path.name != "__pycache__"} - OTHERS
    assert folders == {log.path.split("/")[0] for log in (*REALS, *DOCUMENTED)} | {"trl"}
    for folder in folders:
        assert f"{folder}/" in scripts or f"peer_logs/{folder}" in scripts, folder
        for path in (LOGS / folder).rglob("*"):
            assert not path.is_file() or path.stat().st_size < 60_000, path


def test_the_documented_logs_are_what_their_script_writes(tmp_path):
    subprocess.run([sys.executable, str(LOGS / "make_documented.py"), str(tmp_path)], check=True)
    made = {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()}
    assert {str(path) for path in made} >= {log.path for log in DOCUMENTED}
    for path in made:
        assert (tmp_path / path).read_text() == (LOGS / path).read_text(), path
