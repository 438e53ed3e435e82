"""Logs of public training runs, where they lie beside the checkout: read without a crash and without a silent drop.

The expected counts come from the files themselves, parsed here with `json` alone.
"""

import gzip
import json
import math
from pathlib import Path

import pytest

from outspoken.diagnostics.sources import read

RUNS = Path(__file__).resolve().parents[2] / "shared" / "real_runs"
FOLDERS = sorted(p for p in RUNS.iterdir() if p.is_dir()) if RUNS.is_dir() else []
LOGS = [p for folder in FOLDERS for p in sorted(folder.glob("log.jsonl*"))]
RAW_JSON = [p for folder in FOLDERS for p in sorted(folder.glob("raw_*.json*"))]

TEXTS = [p for folder in FOLDERS for p in sorted(folder.glob("raw_*")) if not p.suffix.startswith(".json")]

pytestmark = pytest.mark.skipif(not FOLDERS, reason="no recorded runs beside this checkout")

SUMMARY = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos", "train_loss"}
CLOCKS = {"step", "current_steps", "global_step", "epoch", "time", "timestamp"}


def raw_rows(path):
    """The rows of a file, by the plainest means."""
    if path.suffix == ".json":
        document = json.loads(path.read_text(encoding="utf-8"))
        return document["log_history"] if isinstance(document, dict) else document
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]


def cells_of(value):
    """How many cells a row holds: those of objects within it count one by one."""
    return sum(cells_of(v) if isinstance(v, dict) and v else 1 for v in value.values())


def name_of(path):
    return f"{path.parent.name}/{path.name}"


# What the collector of these logs says of a run -> what a reader should find.
METHODS = {
    "SFT": "sft",
    "pretrain": "sft",
    "CPT": "sft",
    "PT/SFT": "sft",
    "SFT (off-policy distillation)": "sft",
    "DPO": "dpo",
    "IPO": "dpo",
    "DPO-type preference (LLaMA-Factory logs accuracy; stage not visible)": "dpo",
    "GRPO": "grpo",
    "GRPO/importance-sampling RL": "grpo",
    "REINFORCE": "grpo",  # a reward and nothing that tells the estimator: the note says "low confidence"
    "PPO": "ppo",
    "reward model": "reward",
    "on-policy distillation": "distillation",
}
SYSTEMS = {
    "tinker-cookbook": {"tinker"},
    "verl": {"verl"},
    "custom": {"other"},
    "DeepSpeed-Chat": {"other"},
    "LLaMA-Factory": {"llama_factory", "trl"},  # its trainer_state.json is the Trainer's
    "LLaMA-Factory?": {"trl"},
}
AXES = {"step": "step", "current_steps": "current_steps", "row_index_1based": "row number"}
# They log a loss that begins near ln 2 and nothing else; what the console says around it is not in the rows.
ONLY_A_LOSS = {
    "kyler_dpo_deepseek_67b",
    "kyler_dpo_qwen_coder_7b",
    "kyler_dpo_starcoder2_15b",
    "ningguo_query_lora_sft",
}


@pytest.fixture(scope="module")
def read_once():
    """Each log is read once for all tests."""
    cache = {}
    return lambda path: cache[path] if path in cache else cache.setdefault(path, read(path))


@pytest.mark.parametrize("path", LOGS + RAW_JSON + TEXTS, ids=name_of)
def test_method_system_and_steps_are_the_right_ones(read_once, path):
    run, source = read_once(path), json.loads((path.parent / "source.json").read_text())
    untold = path.parent.name in ONLY_A_LOSS and path not in TEXTS
    assert run.method == ("unknown" if untold else METHODS[source["trainer"]])
    assert run.family in SYSTEMS.get(source["framework"], {"trl"})
    assert run.step_axis == AXES[source["step_basis"]]
    if source["trainer"] == "REINFORCE":
        assert "low confidence" in run.method_reason


@pytest.mark.parametrize("path", TEXTS, ids=name_of)
def test_a_console_gives_the_rows_that_were_cut_from_it(read_once, path):
    """`log.jsonl` of these runs was made from the console's text by somebody else's parser."""
    ours, theirs = list(read_once(path).rows), raw_rows(path.parent / "log.jsonl")
    as_numbers = lambda row: {k: repr(float(v)) for k, v in row.items()}  # noqa: E731
    assert [as_numbers(row) for row in ours] == [as_numbers(row) for row in theirs]


@pytest.mark.parametrize("path", LOGS + RAW_JSON, ids=name_of)
def test_every_cell_is_accounted_for(read_once, path):
    rows = raw_rows(path)
    run = read_once(path)
    account = run.account
    assert account.balanced
    assert account.cells == sum(map(cells_of, rows))
    assert len(run.rows) == len(rows)
    if account.duplicate or account.superseded:
        return  # counted with the rest, below compared by value
    cells = [value for row in rows for value in row.values()]
    assert account.empty + account.text >= sum(value is None for value in cells)
    nonfinite = sum(isinstance(value, float) and not math.isfinite(value) for value in cells)
    assert account.nonfinite == nonfinite


@pytest.mark.parametrize("path", LOGS + RAW_JSON, ids=name_of)
def test_every_number_stands_in_the_observation_of_its_step(read_once, path):
    """Each finite number of each row is found at its step, and each NaN or infinity as such."""
    run = read_once(path)
    found = {}
    for observation in run.observations:
        for name, value in observation.signals.items():
            found.setdefault((name, observation.step), set()).add(value)
        for name in observation.nonfinite:
            found.setdefault((name, observation.step), set()).add("nonfinite")
    numbered = run.step_axis == "row number"
    repeats = any("only repeat the row before" in note for note in run.notes)
    step, missing, checked, latest, number, together = None, [], 0, {}, 0, set()
    for row in raw_rows(path):
        closing = "train_runtime" in row
        names = row.keys() - CLOCKS - (SUMMARY if closing else set())
        # an evaluation belongs to the row before it, unless that has one
        if not number or names & together or (not closing and any(not name.startswith("eval_") for name in names)):
            number, together = number + 1, set()
        together |= names
        step = (number or 1) if numbered else row.get(run.step_axis, step)
        if step is None:
            assert not names & run.columns.keys()  # it describes the run
            continue
        for raw, value in row.items():
            column = run.columns[raw]
            if column.kind != "signal" or value is None or isinstance(value, str):
                continue
            if raw in run.summary and "train_runtime" in row:
                assert run.summary[raw] == value
                continue
            checked += 1
            wanted = value * column.scale if math.isfinite(value) else "nonfinite"
            values = found.get((column.name, step), set())
            if wanted in values:
                latest[column.name] = values
            elif not (repeats and wanted in latest.get(column.name, ())):  # it stands where it was first written
                missing.append((step, raw, value))
    assert checked > 0
    assert len(missing) == run.account.superseded == 0, missing[:5]


@pytest.mark.parametrize("path", [p for p in RAW_JSON if p.name.startswith("raw_trainer_state")], ids=name_of)
def test_trainer_state_says_what_its_rows_say(read_once, path):
    """The raw trainer_state.json and the rows taken from it give the same observations."""
    state, rows = read_once(path), read_once(path.parent / "log.jsonl")
    assert state.format == "trainer_state"
    assert state.config["max_steps"] == json.loads(path.read_text())["max_steps"] == state.total_steps
    assert [o.step for o in state.observations] == [o.step for o in rows.observations]
    for a, b in zip(state.observations, rows.observations):
        assert a.signals == b.signals and a.nonfinite == b.nonfinite and a.epoch == b.epoch


def test_the_method_is_told_or_left_open():
    """Judged by what each source says its trainer was; an open answer is no wrong one."""
    expected = {
        "SFT": {"sft", "unknown"},
        "pretrain": {"sft", "unknown"},
        "PT/SFT": {"sft", "unknown"},
        "CPT": {"sft", "unknown"},
        "DPO": {"dpo", "unknown"},
        "IPO": {"dpo"},
        "GRPO": {"grpo"},
        "PPO": {"ppo"},
        "REINFORCE": {"grpo"},
        "reward model": {"reward"},
        "on-policy distillation": {"distillation"},
    }
    seen = 0
    for path in LOGS:
        trainer = json.loads((path.parent / "source.json").read_text())["trainer"]
        if trainer in expected:
            seen += 1
            assert read(path).method in expected[trainer], path
    assert seen >= 0.9 * len(LOGS)
