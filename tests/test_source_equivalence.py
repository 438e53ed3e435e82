"""One run is judged alike whatever it was exported as, and whatever system's names and units it is written in.

The first part writes runs with known faults into each container and compares whole reports with the one on the plain
JSON lines. The second writes one run under the names and in the units of other systems, by renderings of their own (the
inverse of what the readers do, from those systems' documentation), and compares values and reports. The third writes
public runs, where they lie beside the checkout, into other containers.
"""

import csv
import gzip
import html
import io
import json
import math
import random
import re
import sqlite3
import struct
import zlib
from pathlib import Path

import pytest

from outspoken.diagnostics.diagnose import diagnose
from outspoken.diagnostics.sources import read

NAN = math.nan

# ---------------------------------------------------------------------- runs


def rl_rows(seed, steps=100):
    """A healthy GRPO run as TRL logs it: 16 groups of 8 completions a step, rewards 0 or 1, a cap of 512 tokens."""
    noise = random.Random(seed)
    rows = []
    for step in range(1, steps + 1):
        passed = [
            sum(noise.random() < min(0.9, max(0.05, p + 0.002 * step)) for _ in range(8))
            for p in (0.8 * noise.betavariate(2, 2) for _ in range(16))
        ]
        mean = sum(passed) / 128
        rows.append(
            {
                "step": step,
                "loss": noise.gauss(0, 0.004),
                "grad_norm": math.exp(noise.gauss(-1.2, 0.2)),
                "learning_rate": 1e-6 * min(1, step / 10),
                "reward": mean,
                "reward_std": math.sqrt(mean * (1 - mean)),
                "frac_reward_zero_std": (passed.count(0) + passed.count(8)) / 16,
                "completions/mean_length": 310 + noise.gauss(0, 6) + 0.2 * step,
                "completions/min_length": float(noise.randint(30, 60)),
                "completions/max_length": 512.0,
                "completions/clipped_ratio": sum(noise.random() < 0.05 for _ in range(128)) / 128,
                "entropy": 0.62 + noise.gauss(0, 0.01) - 0.001 * step,
                "kl": 0.00012 * step * math.exp(noise.gauss(0, 0.1)),
                "clip_ratio/region_mean": abs(noise.gauss(0.002, 0.0004)),
                "epoch": step / 400,
            }
        )
    return rows


def nan_rows():
    """Loss and gradient are not numbers from step 60 on."""
    return [row | ({"loss": NAN, "grad_norm": NAN} if row["step"] >= 60 else {}) for row in rl_rows(0)]


def cut_rows():
    """Three of four completions are cut by the cap, from the first step on."""
    noise = random.Random(5)
    return [
        row
        | {
            "completions/clipped_ratio": sum(noise.random() < 0.78 for _ in range(128)) / 128,
            "completions/mean_length": 490 + noise.gauss(0, 2),
            "reward": 0.1 + noise.gauss(0, 0.01),
        }
        for row in rl_rows(1)
    ]


def collapsed_rows():
    """Entropy falls to nothing by step 60, and from step 50 on hardly a group has rewards that differ."""
    noise = random.Random(6)
    return [
        row
        | {
            "entropy": max(0.004, 0.6 * (1 - row["step"] / 55)) * math.exp(noise.gauss(0, 0.03)),
            "frac_reward_zero_std": row["frac_reward_zero_std"] if row["step"] < 50 else noise.randint(15, 16) / 16,
            "grad_norm": row["grad_norm"] * (1 if row["step"] < 50 else 0.02),
        }
        for row in rl_rows(3)
    ]


def blown_up_rows():
    """Entropy and KL rise from step 45 on, and the reward falls."""
    rows = []
    for row in rl_rows(2):
        late = max(0, row["step"] - 45)
        rows.append(
            row
            | {
                "entropy": row["entropy"] + 0.06 * late,
                "kl": row["kl"] * math.exp(0.15 * late),
                "reward": row["reward"] * max(0.05, 1 - 0.03 * late),
            }
        )
    return rows


def resumed_rows():
    """The run with the late faults, taken up again at step 51 after step 70, in the same log."""
    rows = blown_up_rows()
    return [*rows[:70], *(row | {"grad_norm": row["grad_norm"] * 1.01} for row in rows[50:])]


def sft_rows(overfit, seed=0, steps=600):
    """Supervised training, logged every 5 steps, evaluated every 25. Overfit: the held-out loss turns after step 200."""
    noise = random.Random(seed)
    rows = []
    for step in range(5, steps + 1, 5):
        train = 1.1 + 0.9 * math.exp(-step / 80) - (step / 1000 if overfit else 0)
        rows.append(
            {
                "loss": train + noise.gauss(0, 0.02),
                "grad_norm": math.exp(noise.gauss(0, 0.15)),
                "learning_rate": 2e-5 * min(1, step / 30) * (1 - step / (steps + 5)),
                "mean_token_accuracy": 0.7 - 0.1 * math.exp(-step / 80) + noise.gauss(0, 0.003),
                "entropy": 1.0 + noise.gauss(0, 0.02),
                "epoch": step / 120,
                "step": step,
            }
        )
        if step % 25 == 0:
            held_out = 1.2 + 0.9 * math.exp(-step / 80) + (max(0, step - 200) / 500 if overfit else 0)
            rows.append({"eval_loss": held_out + noise.gauss(0, 0.004), "epoch": step / 120, "step": step})
    return rows


def dpo_rows(healthy, seed=0, steps=160):
    """DPO over one epoch, logged at each step. Unhealthy: chosen answers lose most of their probability, and from step
    120 on every other gradient is some forty times as large."""
    noise = random.Random(seed)
    rows = []
    for step in range(1, steps + 1):
        margin = 1.2 * (1 - math.exp(-step / 60))
        chosen = 0.3 * margin if healthy else -0.06 * step
        accuracy = sum(noise.random() < 0.5 + 0.3 * (1 - math.exp(-step / 40)) for _ in range(32)) / 32
        lost = chosen / 0.1
        rows.append(
            {
                "step": step,
                "loss": math.log1p(math.exp(-margin)) + noise.gauss(0, 0.02),
                "grad_norm": math.exp(noise.gauss(1, 0.2)) * (40 if not healthy and step >= 120 and step % 2 else 1),
                "learning_rate": 5e-6 * (1 - step / (steps + 1)),
                "rewards/chosen": chosen + noise.gauss(0, 0.02),
                "rewards/rejected": chosen - margin + noise.gauss(0, 0.02),
                "rewards/margins": margin + noise.gauss(0, 0.03),
                "rewards/accuracies": accuracy,
                "logps/chosen": -180 + lost + noise.gauss(0, 2),
                "logps/rejected": -170 + lost - margin / 0.1 + noise.gauss(0, 2),
                "epoch": step / steps,
            }
        )
        if step % 40 == 0:
            rows.append(
                {
                    "step": step,
                    "eval_loss": math.log1p(math.exp(-0.8 * margin)) + noise.gauss(0, 0.005),
                    "eval_rewards/accuracies": 0.5 + 0.28 * (1 - math.exp(-step / 40)),
                    "eval_rewards/margins": 0.8 * margin,
                    "epoch": step / steps,
                }
            )
    return rows


RUNS = {
    "nan": nan_rows,
    "cut": cut_rows,
    "collapsed": collapsed_rows,
    "blown_up": blown_up_rows,
    "resumed": resumed_rows,
    "sft_overfit": lambda: sft_rows(overfit=True),
    "dpo_spikes": lambda: dpo_rows(healthy=False),
    "healthy_rl": lambda: rl_rows(4),
    "healthy_sft": lambda: sft_rows(overfit=False),
    "healthy_dpo": lambda: dpo_rows(healthy=True),
}
# What fires or was suppressed in each: if a run showed nothing, that all containers agree would say little.
SHOWS = {
    "nan": {"NUM001", "NUM002"},
    "cut": {"RL016", "RL031"},
    "collapsed": {"RL001", "RL005"},
    "blown_up": {"RL006", "RL007", "RL033"},
    "resumed": {"RL007"},
    "sft_overfit": {"SFT001"},
    "dpo_spikes": {"NUM005"},
    "healthy_rl": set(),
    "healthy_sft": set(),
    "healthy_dpo": set(),
}
_RL_CONFIG = {
    "learning_rate": 1e-6,
    "per_device_train_batch_size": 16,
    "gradient_accumulation_steps": 8,
    "num_generations": 8,
    "num_iterations": 1,
    "max_completion_length": 512,
    "beta": 0.04,
    "temperature": 1.0,
    "loss_type": "dapo",
    "max_grad_norm": 1.0,
    "logging_steps": 1,
    "max_steps": 100,
}
_SUPERVISED_CONFIG = {
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 4,
    "max_grad_norm": 1.0,
    "warmup_steps": 0,
    "lr_scheduler_type": "linear",
}
CONFIGS = {
    "sft": _SUPERVISED_CONFIG | {"learning_rate": 2e-5, "logging_steps": 5, "max_steps": 600, "max_length": 1024},
    "dpo": _SUPERVISED_CONFIG | {"learning_rate": 5e-6, "logging_steps": 1, "max_steps": 160, "beta": 0.1},
    "rl": _RL_CONFIG,
}


def config_of(name):
    return CONFIGS[next((kind for kind in ("sft", "dpo") if kind in name), "rl")]


# ---------------------------------------------------------------------- containers
#
# Each writer takes an empty folder and rows, and returns what is handed to `diagnose`.


def as_json_lines(folder, rows):
    return put(folder / "log.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def as_gzipped_json_lines(folder, rows):
    path = folder / "log.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode(), mtime=0))
    return path


def as_utf16_json_lines(folder, rows):
    return put(folder / "log.txt", "".join(json.dumps(row) + "\n" for row in rows), "utf-16")


def as_nested_json_lines(folder, rows):
    """`{"step": 1, "metrics": {"completions": {"mean_length": …}}}`, with blank lines in between."""
    lines = []
    for row in rows:
        metrics = {}
        for name, value in row.items():
            *outer, last = name.split("/")
            inner = metrics
            for part in outer:
                inner = inner.setdefault(part, {})
            inner[last] = value
        lines.append(json.dumps({"step": metrics.pop("step"), "metrics": metrics}) + "\n\n")
    return put(folder / "log.jsonl", "".join(lines))


def as_json_list(folder, rows):
    return put(folder / "history.json", json.dumps(rows, indent=1))


def as_json_columns(folder, rows):
    rows = wide(rows)
    return put(folder / "history.json", json.dumps({name: [row[name] for row in rows] for name in rows[0]}))


def as_trainer_state(folder, rows):
    """As `transformers` saves it, without the settings that it may hold beside the rows."""
    state = {"best_metric": None, "epoch": rows[-1].get("epoch"), "global_step": rows[-1]["step"]}
    return put(folder / "trainer_state.json", json.dumps(state | {"log_history": rows, "is_world_process_zero": True}))


def as_csv(folder, rows, delimiter=","):
    rows = wide(rows)
    out = io.StringIO()
    writer = csv.writer(out, delimiter=delimiter)
    writer.writerow(rows[0])
    writer.writerows(["" if value is None else repr(value) for value in row.values()] for row in rows)
    return put(folder / "log.csv", out.getvalue())


def as_semicolon_csv(folder, rows):
    return as_csv(folder, rows, ";")


def as_tsv(folder, rows):
    return as_csv(folder, rows, "\t")


def in_tracker(row):
    """A row under the names by which the Trainer hands it to W&B and TensorBoard."""
    named = {}
    for name, value in row.items():
        if name == "step":
            named["train/global_step"] = value
        elif name.startswith("eval_"):
            named["eval/" + name.removeprefix("eval_")] = value
        else:
            named["train/" + name] = value
    return named


def as_chart_of_wandb(folder, rows):
    """A panel exported as CSV: a column a metric, with its smallest and largest value beside it."""
    rows = [in_tracker(row) for row in rows]
    names = [name for name in dict.fromkeys(n for row in rows for n in row) if name != "train/global_step"]
    lines = [["train/global_step", *(f"sunny-sky-7 - {n}{end}" for n in names for end in ("", "__MIN", "__MAX"))]]
    for row in rows:
        cells = ("" if row.get(n) is None else repr(row[n]) for n in names for _ in range(3))
        lines.append([str(row["train/global_step"]), *cells])
    return put(folder / "wandb_export.csv", "".join(",".join(f'"{cell}"' for cell in line) + "\n" for line in lines))


def as_wandb_history(folder, rows):
    """`run.history()` of W&B's API saved as CSV: each call of `log` a row, with the time and W&B's own count."""
    rows = [
        in_tracker(row) | {"_step": i, "_timestamp": CLOCK + 7.0 * i, "_runtime": 7.0 * i}
        for i, row in enumerate(rows)
    ]
    return as_csv(folder, rows)


def as_wandb_file(folder, rows):
    """`run-*.wandb`: a log of blocks (leveldb's log_format.md) of `Record` messages, one a call of `log`."""
    log = bytearray(b":W&B\xe1\xbe\x00")

    def append(data):
        first = True
        while first or data:
            room = 32768 - len(log) % 32768
            if room < 7:
                log.extend(bytes(room))
                room = 32768
            piece, data = data[: room - 7], data[room - 7 :]
            kind = (1 if not data else 2) if first else (4 if not data else 3)
            log.extend(struct.pack("<IHB", zlib.crc32(bytes([kind]) + piece), len(piece), kind) + piece)
            first = False

    append(message((1, 0), (17, message((1, "run7"), (3, "project")))))
    for number, row in enumerate(rows):
        named = in_tracker(row) | {"_step": number, "_timestamp": CLOCK + 7.0 * number, "_runtime": 7.0 * number}
        items = [(1, message((2, name), (16, json.dumps(value)))) for name, value in named.items()]
        append(message((1, number + 1), (2, message(*items, (2, message((1, number)))))))
    run = folder / "wandb" / "offline-run-20260601_100000-run7"
    run.mkdir(parents=True)
    (run / "run-run7.wandb").write_bytes(log)
    return folder / "wandb"


def as_event_file(folder, rows):
    """What TensorBoard's writer leaves: an event a scalar, 32-bit floats."""

    def record(data):
        head = struct.pack("<Q", len(data))
        return head + struct.pack("<I", masked_crc(head)) + data + struct.pack("<I", masked_crc(data))

    out = bytearray(record(message((1, CLOCK), (3, "brain.Event:2"))))
    for i, row in enumerate(rows):
        for name, value in in_tracker(row).items():
            if name != "train/global_step":
                scalar = message((1, name), (2, struct.pack("<f", value)))
                out += record(message((1, CLOCK + 7.0 * i), (2, row["step"]), (5, message((1, scalar)))))
    run = folder / "runs" / "Jun01_10-00-00_host"
    run.mkdir(parents=True)
    (run / "events.out.tfevents.1780000000.host.1.0").write_bytes(out)
    return run


def as_mlflow_folder(folder, rows):
    """`mlruns/<experiment>/<run>/metrics/<name>`, a line "milliseconds value step" a measurement."""
    run = folder / "mlruns" / "7" / "0123456789abcdef0123456789abcdef"
    run.mkdir(parents=True)
    put(run.parent / "meta.yaml", "experiment_id: '7'\nname: tuning\nlifecycle_stage: active\n")
    put(run / "meta.yaml", f"run_id: {run.name}\nstart_time: {CLOCK * 1000:.0f}\nlifecycle_stage: active\n")
    lines = {}
    for i, row in enumerate(rows):
        for name, value in row.items():
            if name != "step":
                lines.setdefault(name, []).append(f"{CLOCK * 1000 + 7000 * i:.0f} {float(value)!r} {row['step']}\n")
    for name, text in lines.items():
        path = run / "metrics" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        put(path, "".join(text))
    return folder / "mlruns"


def as_mlflow_database(folder, rows):
    path = folder / "mlflow.db"
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE runs (run_uuid TEXT, name TEXT, start_time INTEGER, lifecycle_stage TEXT)")
        database.execute("CREATE TABLE params (run_uuid TEXT, key TEXT, value TEXT)")
        database.execute(
            "CREATE TABLE metrics (run_uuid TEXT, key TEXT, value REAL, timestamp INTEGER, step INTEGER, is_nan BOOL)"
        )
        database.execute("INSERT INTO runs VALUES ('run7', 'sunny-sky', ?, 'active')", (int(CLOCK * 1000),))
        database.executemany(
            "INSERT INTO metrics VALUES ('run7', ?, ?, ?, ?, ?)",
            [
                (name, 0.0 if value != value else value, int(CLOCK * 1000) + 7000 * i, row["step"], value != value)
                for i, row in enumerate(rows)
                for name, value in row.items()
                if name != "step"
            ],
        )
    database.close()
    return path


NOISE = (
    "(TaskRunner pid=4711) WARNING 06-01 10:00:00 scheduler.py:12] KV cache is 93.1% full, swapping 3 sequences\n",
    "Training Progress:   3%|3         | 3/100 [00:21<11:18,  7.00s/it]\n",
    "\x1b[36m(WorkerDict pid=99)\x1b[0m rank 3: gathered 291 tensors in 0.31s\n",
    "\n",
    "{'lr': 1e-06, 'model': 'tiny', 'clip': None}\n",
)


def in_noise(lines):
    """Lines of metrics between what else a run prints."""
    noise = random.Random(9)
    return "".join("".join(noise.sample(NOISE, noise.randint(0, 2))) + line for line in lines) + NOISE[0]


def as_console_of_steps(folder, rows):
    """`step:3 - loss:0.5 - grad_norm:1.25`, behind Ray's prefix."""
    lines = []
    for row in rows:
        cells = " - ".join(f"{name}:{value!r}" for name, value in row.items() if name != "step")
        lines.append(f"(TaskRunner pid=4711) step:{row['step']} - {cells}\n")
    return put(folder / "train.log", in_noise(lines))


def as_console_of_global_steps(folder, rows):
    """`Global step 3: {'loss': 0.5}`"""
    lines = []
    for row in rows:
        cells = {name: value for name, value in row.items() if name != "step"}
        lines.append(f"INFO 06-01 10:00:07 trainer.py:320] ✨ Global step {row['step']}: {cells!r}\n")
    return put(folder / "train.log", in_noise(lines))


def as_torchtune_text(folder, rows):
    lines = []
    for row in rows:
        cells = "".join(f"{name}:{value!r} " for name, value in row.items() if name != "step")
        lines.append(f"Step {row['step']} | {cells}\n")
    return put(folder / "log_1780000000.txt", "".join(lines))


def as_notebook(folder, rows):
    """The table that a Trainer shows: six decimals, "No Log" where there is no value."""
    rows = wide(merged(rows))
    table = ["<table border='1' class='dataframe'><thead><tr>"]
    table += [f"<th>{html.escape(name)}</th>" for name in rows[0]]
    table.append("</tr></thead><tbody>")
    for row in rows:
        shown = (
            str(value) if name == "step" else "No Log" if value is None else f"{value:.6f}"
            for name, value in row.items()
        )
        table.append("<tr>" + "".join(f"<td>{text}</td>" for text in shown) + "</tr>")
    output = {"output_type": "display_data", "data": {"text/html": [*table, "</tbody></table>"]}}
    other = {"output_type": "stream", "name": "stdout", "text": ["Loading the model …\n"]}
    cells = [
        {"cell_type": "markdown", "metadata": {}, "source": ["# Training"]},
        {"cell_type": "code", "metadata": {}, "source": ["trainer.train()"], "outputs": [other, output]},
    ]
    return put(folder / "train.ipynb", json.dumps({"cells": cells, "nbformat": 4, "nbformat_minor": 5}))


def as_printed_dicts(folder, rows):
    """What the Trainer prints: texts of four digits, no step."""
    lines = []
    for row in rows:
        cells = {name: f"{value:.4g}" for name, value in row.items() if name != "step"}
        lines.append(f"{cells!r}\n")
    return put(folder / "train.log", in_noise(lines))


CLOCK = 1780000000.0

# What writes every digit.
EXACT = (
    as_gzipped_json_lines,
    as_utf16_json_lines,
    as_nested_json_lines,
    as_json_list,
    as_json_columns,
    as_trainer_state,
    as_csv,
    as_semicolon_csv,
    as_tsv,
    as_chart_of_wandb,
    as_wandb_history,
    as_wandb_file,
    as_mlflow_folder,
    as_mlflow_database,
    as_console_of_steps,
    as_console_of_global_steps,
    as_torchtune_text,
)
# What rounds, and how: its run is compared with the same run, rounded alike. A 32-bit float keeps six digits for sure.
ROUNDED = {
    as_event_file: lambda value: float(f"{value:.6g}"),
    as_notebook: lambda value: float(f"{value:.6f}"),
}


def rounded(rows, how):
    return [{n: how(v) if isinstance(v, float) else v for n, v in row.items()} for row in rows]


def put(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return path


def wide(rows):
    """The rows, each with all names; None where it had no value."""
    names = dict.fromkeys(name for row in rows for name in row)
    return [{name: row.get(name) for name in names} for row in rows]


def merged(rows):
    """An evaluation and the training row of its step in one row."""
    out = []
    for row in rows:
        if out and out[-1]["step"] == row["step"]:
            out[-1] = out[-1] | row
        else:
            out.append(dict(row))
    return out


def numbered(rows):
    """The rows with their numbers for steps; an evaluation belongs to the row before."""
    out = []
    for row in rows:
        step = out[-1]["step"] if out else 0
        out.append(row | {"step": step if any(name.startswith("eval_") for name in row) else step + 1})
    return out


def varint(value):
    out = bytearray()
    while value >= 128:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes((*out, value))


def message(*fields):
    """A protocol-buffer message of (number, value): int, float (64 bit), text, bytes; 4 bytes are a 32-bit float."""
    out = b""
    for number, value in fields:
        if isinstance(value, int):
            out += varint(number << 3) + varint(value)
        elif isinstance(value, float):
            out += varint(number << 3 | 1) + struct.pack("<d", value)
        elif isinstance(value, bytes) and len(value) == 4:
            out += varint(number << 3 | 5) + value
        else:
            data = value.encode() if isinstance(value, str) else value
            out += varint(number << 3 | 2) + varint(len(data)) + data
    return out


def _crc_table():
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return table


CRC32C = _crc_table()


def masked_crc(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc = CRC32C[(crc ^ byte) & 255] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


# ---------------------------------------------------------------------- reports


# Of a report, what is its own: where it was read from and when, and the numbers that are drawn for it.
OWN = {"id", "time", "run", "doc", "schema", "fingerprint"}


def judged(report):
    """What a report says of the run, with nothing that is its own."""

    def bare(value):
        if isinstance(value, dict):
            return {name: bare(inner) for name, inner in value.items() if name not in OWN}
        return [bare(inner) for inner in value] if isinstance(value, list) else value

    return bare({name: report[name] for name in ("method", "config_known", "verdict", "diagnostics", "not_checked")})


def shown(report):
    """Codes of what fires, has fired, or would but for its cause."""
    return {d["code"] for d in report["diagnostics"] if d["state"] in ("firing", "suppressed", "resolved")}


# ---------------------------------------------------------------------- one run in many containers


@pytest.fixture
def folder(tmp_path):
    """A fresh folder at each call."""
    count = iter(range(10_000))

    def fresh():
        path = tmp_path / str(next(count))
        path.mkdir()
        return path

    return fresh


def with_config(names, fast):
    """Runs without settings and with them; with them only `fast` by default."""
    return [
        pytest.param(name, given, marks=[pytest.mark.slow] if given and name not in fast else [])
        for name in names
        for given in (False, True)
    ]


@pytest.mark.parametrize(("name", "given"), with_config(RUNS, fast=("cut", "resumed", "dpo_spikes")))
def test_a_run_is_judged_alike_in_every_container(folder, name, given):
    config = config_of(name) if given else None
    rows = RUNS[name]()
    report = diagnose(as_json_lines(folder(), rows), config=config)
    assert shown(report) == SHOWS[name]
    assert report["config_known"] is given
    for write in EXACT:
        assert judged(diagnose(write(folder(), rows), config=config)) == judged(report), write.__name__
    for write, digits in ROUNDED.items():
        rows = rounded(RUNS[name](), digits)
        report = diagnose(as_json_lines(folder(), rows), config=config)
        assert shown(report) == SHOWS[name]
        assert judged(diagnose(write(folder(), rows), config=config)) == judged(report), write.__name__


@pytest.mark.parametrize("name", RUNS)
def test_a_console_without_steps_says_the_same_of_numbered_rows(folder, name):
    """The Trainer prints no step, so its rows are numbered: what is said of them is what is said of the log whose steps
    are such numbers. A resumed run alone differs from that one: its epochs tell where it began anew, numbers do not."""
    rows = rounded(RUNS[name](), lambda value: float(f"{value:.4g}"))
    printed = diagnose(as_printed_dicts(folder(), rows))
    if name != "resumed":
        assert judged(printed) == judged(diagnose(as_json_lines(folder(), numbered(rows))))
    assert shown(printed) == SHOWS[name]
    assert printed["verdict"]["state"] == diagnose(as_json_lines(folder(), rows))["verdict"]["state"]
