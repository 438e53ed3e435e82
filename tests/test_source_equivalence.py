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
import pprint
import random
import sqlite3
import struct
import zlib
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from outspoken.diagnostics.diagnose import diagnose, replayed
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
        gained = 0.3 * margin if healthy else -0.06 * step
        accuracy = sum(noise.random() < 0.5 + 0.3 * (1 - math.exp(-step / 40)) for _ in range(32)) / 32
        chosen, rejected = gained + noise.gauss(0, 0.02), gained - margin + noise.gauss(0, 0.02)
        rows.append(
            {
                "step": step,
                "loss": math.log1p(math.exp(-margin)) + noise.gauss(0, 0.02),
                "grad_norm": math.exp(noise.gauss(1, 0.2)) * (40 if not healthy and step >= 120 and step % 2 else 1),
                "learning_rate": 5e-6 * (1 - step / (steps + 1)),
                "rewards/chosen": chosen,
                "rewards/rejected": rejected,
                "rewards/margins": chosen - rejected,
                "rewards/accuracies": accuracy,
                "logps/chosen": -180 + chosen / 0.1 + noise.gauss(0, 2),
                "logps/rejected": -170 + rejected / 0.1 + noise.gauss(0, 2),
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
    state = {"best_metric": None, "epoch": rows[-1].get("epoch"), "global_step": rows[-1].get("step")}
    return put(folder / "trainer_state.json", json.dumps(state | {"log_history": rows, "is_world_process_zero": True}))


def as_csv(folder, rows, delimiter=","):
    rows = wide(rows)
    out = io.StringIO()
    writer = csv.writer(out, delimiter=delimiter)
    writer.writerow(rows[0])
    writer.writerows(
        ["" if value is None else value if isinstance(value, str) else repr(value) for value in row.values()]
        for row in rows
    )
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


def unnamed(row):
    """A row under its own names."""
    return row


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


def as_wandb_file(folder, rows, named=in_tracker, **settings):
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

    updates = ((1, message((2, name), (16, json.dumps(value)))) for name, value in settings.items())
    append(message((1, 0), (17, message((1, "run7"), (3, "project"), (4, message(*updates))))))
    for number, row in enumerate(rows):
        cells = named(row) | {"_step": number, "_timestamp": CLOCK + 7.0 * number, "_runtime": 7.0 * number}
        items = [(1, message((2, name), (16, json.dumps(value)))) for name, value in cells.items()]
        append(message((1, number + 1), (2, message(*items, (2, message((1, number)))))))
    run = folder / "wandb" / "offline-run-20260601_100000-run7"
    run.mkdir(parents=True)
    (run / "run-run7.wandb").write_bytes(log)
    return folder / "wandb"


def as_event_file(folder, rows, named=in_tracker, **settings):
    """What TensorBoard's writer leaves: an event a scalar, 32-bit floats."""

    def record(data):
        head = struct.pack("<Q", len(data))
        return head + struct.pack("<I", masked_crc(head)) + data + struct.pack("<I", masked_crc(data))

    out = bytearray(record(message((1, CLOCK), (3, "brain.Event:2"))))
    if settings:  # as text: a tensor of strings
        text = message((1, 7), (2, message((2, message((1, 1))))), (8, json.dumps(settings, indent=2)))
        plugin = message((1, message((1, "text"))))
        out += record(
            message((1, CLOCK), (5, message((1, message((1, "args/text_summary"), (9, plugin), (8, text))))))
        )
    for i, row in enumerate(rows):
        for name, value in named(row).items():
            if name not in ("step", "train/global_step"):
                scalar = message((1, name), (2, struct.pack("<f", value)))
                out += record(message((1, CLOCK + 7.0 * i), (2, row["step"]), (5, message((1, scalar)))))
    run = folder / "runs" / "Jun01_10-00-00_host"
    run.mkdir(parents=True)
    (run / "events.out.tfevents.1780000000.host.1.0").write_bytes(out)
    return run


def as_mlflow_folder(folder, rows, **settings):
    """`mlruns/<experiment>/<run>/metrics/<name>`, a line "milliseconds value step" a measurement."""
    run = folder / "mlruns" / "7" / "0123456789abcdef0123456789abcdef"
    run.mkdir(parents=True)
    put(run.parent / "meta.yaml", "experiment_id: '7'\nname: tuning\nlifecycle_stage: active\n")
    put(run / "meta.yaml", f"run_id: {run.name}\nstart_time: {CLOCK * 1000:.0f}\nlifecycle_stage: active\n")
    for name, value in settings.items():
        (run / "params").mkdir(exist_ok=True)
        put(run / "params" / name, str(value))
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


def as_mlflow_database(folder, rows, **settings):
    path = folder / "mlflow.db"
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE runs (run_uuid TEXT, name TEXT, start_time INTEGER, lifecycle_stage TEXT)")
        database.execute("CREATE TABLE params (run_uuid TEXT, key TEXT, value TEXT)")
        database.execute(
            "CREATE TABLE metrics (run_uuid TEXT, key TEXT, value REAL, timestamp INTEGER, step INTEGER, is_nan BOOL)"
        )
        database.executemany("INSERT INTO params VALUES ('run7', ?, ?)", [(n, str(v)) for n, v in settings.items()])
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


# Runs, and whether with settings, that are looked at by default; the others take longer in all.
FAST = [("nan", False), ("cut", True), ("resumed", False), ("sft_overfit", False), ("dpo_spikes", False)]


@pytest.mark.parametrize(
    ("name", "given"),
    [
        pytest.param(name, given, marks=[] if (name, given) in FAST else [pytest.mark.slow])
        for name in RUNS
        for given in (False, True)
    ],
)
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


def as_json_lines_beside_settings(folder, rows, **settings):
    put(folder / "args.json", json.dumps(settings))
    return as_json_lines(folder, rows)


@pytest.mark.parametrize("name", ["cut", "dpo_spikes"])
def test_settings_inside_a_log_or_beside_it_count_as_those_handed_over(folder, name):
    settings = config_of(name)
    rows = rounded(RUNS[name](), ROUNDED[as_event_file])
    report = diagnose(as_json_lines(folder(), rows), config=settings)
    assert report["config_known"]
    for write in (
        *(as_json_lines_beside_settings, as_wandb_file, as_event_file, as_mlflow_folder, as_mlflow_database),
    ):
        path = write(folder(), rows, **settings)
        for place in {path, *([path.parent] if write is as_event_file else [])}:
            assert judged(diagnose(place)) == judged(report), (write.__name__, place.name)


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


# ---------------------------------------------------------------------- one run in the names and units of other systems
#
# The truth is a row under our names and in our units, measured in full. A system writes what it logs of it in its own
# way; which of our signals that is, stands beside.


def rl_truth(seed, steps=100):
    """`rl_rows` with what other systems measure beside; the length is a sum of tokens over 128 completions."""
    noise = random.Random(100 + seed)
    rows = []
    for row in rl_rows(seed, steps):
        groups = round(row["frac_reward_zero_std"] * 16)
        failed = noise.randint(0, groups)
        k3 = 0.0008 * math.exp(noise.gauss(0, 0.2))
        rows.append(
            row
            | {
                "completions/mean_length": round(row["completions/mean_length"] * 128) / 128,
                "num_completions": 128.0,
                "groups/count": 16.0,
                "groups/zero_std": groups / 16,
                "groups/all_failed": failed / 16,
                "groups/all_passed": (groups - failed) / 16,
                "groups/std_mean": 0.35 + noise.gauss(0, 0.01),
                "sampling/k1": noise.gauss(0, 0.0005),
                "sampling/k3": k3,
                "sampling/importance_sampling_ratio/mean": 1 + noise.gauss(0, 0.002),
                "sampling/sampling_logp_difference/mean": math.sqrt(2 * k3),
                "sampling/sampling_logp_difference/max": 0.6 + noise.random() / 4,
                "policy/approx_kl": k3 * 1.1,
                "log_ratio/abs_mean": math.sqrt(2.2 * k3),
                "ratio/ess": 0.97 + noise.gauss(0, 0.003),
                "sample/staleness_mean": 0.5 + 0.01 * noise.randint(0, 9),
                "sample/staleness_max": float(noise.randint(1, 2)),
                "time/step": 40 + noise.gauss(0, 1),
                "time/generate": 22 + noise.gauss(0, 0.5),
                "memory/peak_allocated": 40.5,
                "memory/peak_reserved": 48.25,
                "rewards/max_seen": 1.0,
                "rewards/min_seen": 0.0,
                "rewards/range": 1.0,
            }
        )
    return rows


def cut_truth(seed):
    return with_faults(rl_truth(seed), cut_rows(), ("completions/clipped_ratio", "reward"))


def blown_up_truth(seed):
    return with_faults(rl_truth(seed), blown_up_rows(), ("entropy", "kl", "reward"))


def collapsed_truth(seed):
    """The groups that have no spread any more are all solved."""
    truth = with_faults(rl_truth(seed), collapsed_rows(), ("entropy", "frac_reward_zero_std", "grad_norm"))
    for row in truth:
        zero = row["frac_reward_zero_std"]
        row.update({"groups/zero_std": zero, "groups/all_failed": 0.0, "groups/all_passed": zero})
    return truth


def nan_truth(seed):
    return with_faults(rl_truth(seed), nan_rows(), ("loss", "grad_norm"))


def with_faults(truth, rows, names):
    return [row | {name: faulty[name] for name in names} for row, faulty in zip(truth, rows, strict=True)]


def without_nan(rows):
    return [{name: value for name, value in row.items() if value == value} for row in rows]


# Each function writes one step of the truth as a list of raw rows.


def trl(row):
    names = (*RL_OF_TRL, "epoch", "step")
    return [{name: row[name] for name in names}]


def trl_of_old(row):
    """TRL before 0.17 and Unsloth: one length, no truncation."""
    names = ("step", "loss", "grad_norm", "learning_rate", "reward", "reward_std", "kl", "epoch")
    return [{name: row[name] for name in names} | {"completion_length": row["completions/mean_length"]}]


def openrlhf(row):
    """Its console: means of all samples under `rollout/`, and of training batches that differ from them."""
    return [
        {
            "step": row["step"],
            "policy_loss": row["loss"],
            "actor_grad_norm": row["grad_norm"],
            "actor_lr": row["learning_rate"],
            "ppo_clip_ratio": row["clip_ratio/region_mean"],
            "ppo_kl": row["sampling/k1"] / 3,
            "vllm_kl": row["sampling/k1"],
            "kl": row["kl"],
            "entropy_loss": row["entropy"],
            "logprobs_diff": -row["kl"],
            "reward": 0.9 * row["reward"],
            "return": 0.9 * row["reward"] - row["kl"],
            "group_reward_std": row["groups/std_mean"],
            "response_length": row["completions/mean_length"] - 3,
            "total_length": row["completions/mean_length"] + 90,
            "truncated": row["completions/clipped_ratio"] / 2,
            "rollout/reward_mean": row["reward"],
            "rollout/reward_std": row["reward_std"],
            "rollout/response_length_mean": row["completions/mean_length"],
            "rollout/truncated_rate": row["completions/clipped_ratio"],
            "rollout/num_samples": row["num_completions"],
            "timing/make_experience": row["time/generate"] + 2,
            "timing/ppo_train": 12.0,
            "timing/step_total": row["time/step"],
        }
    ]


def openrlhf_tracker(row):
    """The same in W&B, with the steps that it counts there."""
    (plain,) = openrlhf(row)
    step = plain.pop("step")
    return [{f"train/{name}": value for name, value in plain.items()} | {"train/global_step": step, "_step": 7 * step}]


def verl(row):
    """`data` of its file logger. Rewards after the KL penalty, and clipped tokens of the dual clip, are other things."""
    return [
        {
            "step": row["step"],
            "data": {
                "actor/entropy": row["entropy"],
                "actor/pg_loss": row["loss"],
                "actor/kl_loss": row["kl"],
                "actor/kl_coef": 0.001,
                "actor/pg_clipfrac": row["clip_ratio/region_mean"],
                "actor/pg_clipfrac_lower": row["clip_ratio/region_mean"] / 9,
                "actor/ppo_kl": row["sampling/k1"] / 3,
                "actor/grad_norm": row["grad_norm"],
                "actor/lr": row["learning_rate"],
                "critic/score/mean": row["reward"],
                "critic/score/max": 1.0,
                "critic/score/min": 0.0,
                "critic/rewards/mean": row["reward"] - 0.05,
                "critic/rewards/max": 1.1,
                "critic/rewards/min": -0.1,
                "critic/advantages/mean": 0.0,
                "critic/advantages/max": 2.2,
                "critic/advantages/min": -2.2,
                "response_length/mean": row["completions/mean_length"],
                "response_length/min": row["completions/min_length"],
                "response_length/max": row["completions/max_length"],
                "response_length/clip_ratio": row["completions/clipped_ratio"],
                "response/aborted_ratio": 0.0,
                "prompt_length/mean": 95.0,
                "prompt_length/clip_ratio": 0.0,
                "rollout_corr/kl": row["sampling/k1"],
                "rollout_corr/k3_kl": row["sampling/k3"],
                "rollout_corr/rollout_is_mean": row["sampling/importance_sampling_ratio/mean"],
                "rollout_corr/rollout_is_eff_sample_size": 0.9,
                "training/rollout_probs_diff_mean": 0.006,
                "training/off_policy/trajectory_staleness/mean": row["sample/staleness_mean"] / 2,
                "training/off_policy/trajectory_staleness_worst/mean": row["sample/staleness_mean"],
                "training/off_policy/trajectory_staleness_worst/max": row["sample/staleness_max"],
                "timing_s/gen": row["time/generate"],
                "timing_s/step": row["time/step"],
                "timing_per_token_ms/gen": 0.2,
                "perf/max_memory_allocated_gb": row["memory/peak_allocated"],
                "perf/max_memory_reserved_gb": row["memory/peak_reserved"],
                "perf/throughput": 1500.0,
                "perf/mfu/actor": 0.3,
                "training/global_step": row["step"],
                "training/epoch": 0,
            },
        }
    ]


def verl_of_old(row):
    """Its console of 0.2: the learning rate in units of 1e-4, `timing/`, the entropy as a loss, the KL in the reward."""
    return [
        {
            "step": row["step"],
            "actor/entropy_loss": row["entropy"],
            "actor/pg_loss": row["loss"],
            "actor/pg_clipfrac": row["clip_ratio/region_mean"],
            "actor/ppo_kl": row["sampling/k1"] / 3,
            "critic/kl": row["kl"],
            "actor/grad_norm": row["grad_norm"],
            "actor/lr(1e-4)": row["learning_rate"] * 1e4,
            "critic/score/mean": row["reward"],
            "critic/score/max": 1.0,
            "critic/score/min": 0.0,
            "critic/rewards/mean": row["reward"] - 0.05,
            "response_length/mean": row["completions/mean_length"],
            "response_length/min": row["completions/min_length"],
            "response_length/max": row["completions/max_length"],
            "response_length/clip_ratio": row["completions/clipped_ratio"],
            "timing/gen": row["time/generate"],
            "timing/step": row["time/step"],
        }
    ]


def verl_of_prometheus(row):
    """What its rl_insight backend makes of the names."""
    ((plain,),) = [verl(row)]
    data = {f"rl_insight_monitor_{name.replace('/', '_')}": value for name, value in plain["data"].items()}
    return [{"step": row["step"]} | data]


def prime_rl(row, agent="solver"):
    """Rows of two processes, the trainer's in three parts; what is not finite is left out. Effective rollouts are those
    of groups with spread, so their means are others."""
    of_all, kept = f"train/agg/all/{agent}/", f"train/agg/effective/{agent}/"
    rollouts = {
        "reward/min": 0.0,
        "reward/max": 1.0,
        "num_output_tokens/mean": row["completions/mean_length"],
        "num_output_tokens/min": row["completions/min_length"],
        "num_output_tokens/max": row["completions/max_length"],
        "is_truncated/mean": row["completions/clipped_ratio"],
    }
    rows = [
        {
            "progress/rollouts": row["num_completions"],
            "progress/tasks": row["groups/count"],
            "off_policy/mean": row["sample/staleness_mean"],
            "off_policy/max": row["sample/staleness_max"],
            "time/wait_for_policy": 1.5,
            f"{of_all}reward/mean": row["reward"],
            f"{kept}reward/mean": 0.5,
            **{of_all + name: value for name, value in rollouts.items()},
            **{kept + name: value for name, value in rollouts.items()},
            f"{of_all}solved_none": row["groups/all_failed"],
            f"{of_all}solved_all": row["groups/all_passed"],
            f"{of_all}has_error/mean": 0.0,
        },
        {
            "loss/mean": row["loss"],
            "entropy/all/mean": row["entropy"],
            "mismatch_kl/all/mean": row["sampling/k3"],
            "mismatch_kl/all/max": 0.5,
            "is_masked/mean": 0.01,
        },
        {"perf/throughput": 9000.0, "perf/mfu": 31.0, "perf/peak_memory": row["memory/peak_reserved"]},
        {"optim/lr": row["learning_rate"], "optim/grad_norm": row["grad_norm"], "optim/zero_grad_ratio": 0.2},
    ]
    clock = CLOCK + 40 * row["step"]
    return [{"step": row["step"], "time": clock + i, **part} for i, part in enumerate(without_nan(rows)) if part]


def prime_rl_of_old(row):
    """Before rollouts were summed up by agent."""
    clock = CLOCK + 40 * row["step"]
    rows = [
        {
            "step": row["step"],
            "time": clock,
            "reward/all/mean": row["reward"],
            "decode_len/all/mean": row["completions/mean_length"],
            "is_truncated/all/mean": row["completions/clipped_ratio"],
            "solve_none/all": row["groups/all_failed"],
            "effective_batch_size/all": 0.8,
            "progress/problems": row["groups/count"],
            "progress/samples": row["num_completions"],
        },
        {
            "step": row["step"],
            "time": clock + 1,
            "loss/mean": row["loss"],
            "entropy/mean": row["entropy"],
            "mismatch_kl/mean": row["sampling/k3"],
            "optim/lr": row["learning_rate"],
            "optim/grad_norm": row["grad_norm"],
        },
    ]
    return without_nan(rows)


def pipeline_rl(row):
    """W&B, its three processes in one run: a variance in place of a deviation, lag in samples, and neither extremes nor
    a variance where the variance is 0."""
    variance = row["reward_std"] ** 2
    spread = {"actor/reward_var": variance, "actor/reward_max": 1.0, "actor/reward_min": 0.0}
    samples = 128 * row["step"]
    return [
        {
            "_step": 3 * row["step"],
            "stats/completed_steps": row["step"],
            "stats/samples": samples,
            "stats/lag": row["sample/staleness_max"] * 128,
            "stats/lr": row["learning_rate"],
            "stats/grad_norm": row["grad_norm"],
            "rl/loss": row["loss"],
            "rl/reward": 0.9 * row["reward"],
            "rl/entropy": row["entropy"],
            "rl/kl": row["kl"],
            "rl/ratio_ref_old": 1.01,
            "rl/ratio_ref_new": 1.01,
            "rl/kl_new_old": row["policy/approx_kl"],
            "rl/mean_abs_log_ratio_new_old": row["log_ratio/abs_mean"],
            "rl/ess": row["ratio/ess"],
            "rl/clamp_log_ratio_new_old_indicator": 0.1,
            "actor/reward_mean": row["reward"],
            **(spread if variance > 0 else {}),
            "actor/success_mean": row["reward"],
            "actor/output_tokens_mean": row["completions/mean_length"],
            "actor/output_tokens_min": row["completions/min_length"],
            "actor/output_tokens_max": row["completions/max_length"],
            "actor/overlong_mean": row["completions/clipped_ratio"],
            "actor/always_success": row["groups/all_passed"],
            "actor/never_success": row["groups/all_failed"],
        }
    ]


def oat(row):
    """The KL is a sum over a response; how many were cut is a count of those sampled."""
    return [
        {
            "misc/policy_sgd_step": row["step"],
            "misc/global_step": 4 * row["step"],
            "misc/lr": row["learning_rate"],
            "misc/pi_beta_version": row["step"] - 1,
            "actor/rewards": row["reward"],
            "actor/response_tok_len": row["completions/mean_length"],
            "actor/no_eos_count": row["completions/clipped_ratio"] * 128,
            "actor/num_data": 128.0,
            "actor/generate_time": row["time/generate"],
            "train/pg_loss": row["loss"],
            "train/entropy": row["entropy"],
            "train/kl3": row["kl"] * row["completions/mean_length"],
            "train/policy_grad_norm": row["grad_norm"],
            "train/pg_clipfrac": row["clip_ratio/region_mean"],
            "train/kl_sample_train_v1": row["sampling/k1"],
            "train/kl_sample_train_v2": row["sampling/k3"],
            "train/adv_max": 2.0,
            "train/all_zero_rewards_count": 1.0,
            "train/all_one_rewards_count": 2.0,
            "train/learning_round": row["step"],
        }
    ]


def tinker(row):
    """Tokens and episodes are counts; whose weights sampled is a step."""
    return [
        {
            "step": row["step"],
            "progress/batch": row["step"],
            "progress/done_frac": row["step"] / 400,
            "optim/lr": row["learning_rate"],
            "optim/entropy": row["entropy"],
            "optim/kl_sample_train_v1": row["sampling/k1"],
            "optim/kl_sample_train_v2": row["sampling/k3"] * 1.1,
            "kl_policy_base": row["kl"],
            "env/all/reward/total": row["reward"],
            "env/all/total_episodes": 128,
            "env/all/total_ac_tokens": row["completions/mean_length"] * 128,
            "env/all/ac_tokens_per_turn": row["completions/mean_length"] / 2,
            "env/all/turns_per_episode": 2.0,
            "env/all/by_group/frac_all_good": row["groups/all_passed"],
            "env/all/by_group/frac_all_bad": row["groups/all_failed"],
            "env/all/by_group/frac_mixed": 1 - row["groups/zero_std"],
            "training_client/step": row["step"],
            "sampling_client/step_mean": row["step"] - row["sample/staleness_mean"],
            "sampling_client/step_min": row["step"] - row["sample/staleness_max"],
            "sampling_client/step_max": row["step"],
            "time/sample": row["time/generate"],
            "time/total": row["time/step"],
        }
    ]


def nemo_rl(row):
    """Its logger's names; baselines that are all 0 or all 1 are percentages."""
    return [
        {
            "step": row["step"],
            "train/loss": row["loss"],
            "train/grad_norm": row["grad_norm"],
            "train/lr": row["learning_rate"],
            "train/wd": 0.01,
            "train/reward": row["reward"],
            "train/kl_penalty": row["kl"],
            "train/approx_entropy": row["entropy"],
            "train/probs_ratio": 1.0,
            "train/probs_ratio_clamped": 0.999,
            "train/gen_kl_error": row["sampling/k3"],
            "train/policy_kl_error": row["sampling/k3"] * 1.2,
            "train/token_mult_prob_error": 1.02,
            "train/sampling_importance_ratio": row["sampling/importance_sampling_ratio/mean"],
            "train/baseline_reward/pct_0": 100 * row["groups/all_failed"],
            "train/baseline_reward/pct_1": 100 * row["groups/all_passed"],
            "train/baseline_reward/pct_mixed": 100 - 100 * row["groups/zero_std"],
            "train/mean_gen_tokens_per_sample": row["completions/mean_length"],
            "train/gen_tokens_per_sample/max": row["completions/max_length"],
            "train/truncation_rate": row["completions/clipped_ratio"],
            "train/avg_trajectory_age": row["sample/staleness_mean"],
            "train/global_valid_toks": 39000,
            "timing/train/total_step_time": row["time/step"],
            "timing/train/generation": row["time/generate"],
            "performance/tokens_per_sec_per_gpu": 900.0,
        }
    ]


def open_instruct(row):
    """W&B: four estimates of the KL counted from 0, and how many completions stopped by themselves."""
    return [
        {
            "_step": row["step"] - 1,
            "training_step": row["step"],
            "episode": 128 * row["step"],
            "objective/verifiable_reward": row["reward"],
            "objective/verifiable_correct_rate": row["reward"] / 10,
            "scores": 0.5,
            "objective/kl0_avg": row["kl"] / 2,
            "objective/kl1_avg": row["kl"] * 1.1,
            "objective/kl2_avg": row["kl"],
            "objective/kl3_avg": row["kl"] * 0.9,
            "loss/policy_avg": row["loss"] / 2,
            "loss/total_avg": row["loss"],
            "policy/clipfrac_avg": row["clip_ratio/region_mean"],
            "policy/entropy_avg": row["entropy"],
            "optim/grad_norm": row["grad_norm"],
            "lr": row["learning_rate"],
            "val/sequence_lengths": row["completions/mean_length"],
            "val/sequence_lengths_min": row["completions/min_length"],
            "val/sequence_lengths_max": row["completions/max_length"],
            "val/stop_rate": 1 - row["completions/clipped_ratio"],
            "val/total_reward_groups": 16,
            "debug/vllm_vs_local_logprob_diff_mean": row["sampling/sampling_logp_difference/mean"],
            "debug/vllm_vs_local_logprob_diff_max": row["sampling/sampling_logp_difference/max"],
        }
    ]


def torchtune_grpo(row):
    return [
        {
            "step": row["step"],
            "loss": row["loss"],
            "policy_loss": row["loss"] * 0.9,
            "kl_loss": row["kl"],
            "clipfrac": 0.0,
            "ratios": 1.0,
            "approx_policy_kl": 0.0,
            "rewards": row["reward"],
            "successes": row["reward"],
            "num_stop_tokens": 120,
            "response_lengths": row["completions/mean_length"],
            "grad_norm": row["grad_norm"],
            "lr": row["learning_rate"],
        }
    ]


def torchtune_ppo(row):
    """The KL is a sum over a response."""
    return [
        {
            "step": row["step"],
            "loss": row["loss"],
            "policy_loss": row["loss"] / 2,
            "value_loss": 0.1,
            "scores": row["reward"],
            "rlhf_reward": row["reward"] - 0.01,
            "kl": row["kl"] * row["completions/mean_length"],
            "kl_reward": -0.01,
            "clipfrac": row["clip_ratio/region_mean"],
            "ratios": 1.001,
            "approx_policy_kl": 0.001,
            "num_stop_tokens": 120,
            "response_lengths": row["completions/mean_length"],
        }
    ]


RL_OF_TRL = (
    *("loss", "grad_norm", "learning_rate", "reward", "reward_std", "frac_reward_zero_std", "entropy", "kl"),
    *("completions/mean_length", "completions/min_length", "completions/max_length", "completions/clipped_ratio"),
    "clip_ratio/region_mean",
)
_STEP = ("loss", "grad_norm", "learning_rate")
_LENGTHS = ("completions/mean_length", "completions/min_length", "completions/max_length")
_CUT = "completions/clipped_ratio"
_GROUPS = ("groups/zero_std", "groups/all_failed", "groups/all_passed")
_RANGE = ("rewards/max_seen", "rewards/min_seen", "rewards/range")
_TIMES = ("time/step", "time/generate")
_STALE = ("sample/staleness_mean", "sample/staleness_max")
_VERL = (*_STEP, *_LENGTHS, _CUT, *_RANGE, *_TIMES, "reward", "entropy", "kl", "clip_ratio/region_mean")
_VERL_NOW = (
    *(*_VERL, *_STALE, "sampling/k1", "sampling/k3", "sampling/importance_sampling_ratio/mean"),
    *("memory/peak_allocated", "memory/peak_reserved"),
)
_OPENRLHF = (
    *(*_STEP, _CUT, "reward", "reward_std", "entropy", "kl", "clip_ratio/region_mean", "sampling/k1"),
    *("groups/std_mean", "completions/mean_length", "num_completions", "time/step"),
)

# System -> (its rendering, container, family as it is told, method, our signals that it logs)
RL_SYSTEMS = {
    "trl": (trl, as_trainer_state, "trl", "grpo", RL_OF_TRL),
    "trl_of_old": (
        *(trl_of_old, as_json_lines, "trl", "grpo"),
        (*_STEP, "reward", "reward_std", "kl", "completions/mean_length"),
    ),
    "openrlhf": (openrlhf, as_console_of_global_steps, "openrlhf", "grpo", _OPENRLHF),
    "openrlhf_tracker": (openrlhf_tracker, as_json_lines, "openrlhf", "grpo", _OPENRLHF),
    "verl": (verl, as_json_lines, "verl", "grpo", _VERL_NOW),
    "verl_of_old": (verl_of_old, as_console_of_steps, "verl", "grpo", _VERL),
    "verl_of_prometheus": (verl_of_prometheus, as_csv, "verl", "grpo", _VERL_NOW),
    "prime_rl": (
        *(prime_rl, as_json_lines, "prime_rl", "grpo"),
        (
            *(*_STEP, *_LENGTHS, _CUT, *_GROUPS, *_STALE, "reward", "entropy", "sampling/k3"),
            *("num_completions", "groups/count", "memory/peak_reserved"),
        ),
    ),
    "prime_rl_of_old": (
        *(prime_rl_of_old, as_json_lines, "prime_rl", "grpo"),
        (
            *(*_STEP, _CUT, "reward", "entropy", "sampling/k3", "completions/mean_length"),
            *("num_completions", "groups/count"),
        ),
    ),
    "pipeline_rl": (
        *(pipeline_rl, as_json_lines, "pipeline_rl", "grpo"),
        (
            *(*_STEP, *_LENGTHS, _CUT, "reward", "reward_std", "entropy", "kl", "policy/approx_kl"),
            *("log_ratio/abs_mean", "ratio/ess", "groups/all_failed", "groups/all_passed", "sample/staleness_max"),
        ),
    ),
    "oat": (
        *(oat, as_json_lines, "oat", "grpo"),
        (
            *(*_STEP, _CUT, "reward", "entropy", "kl", "completions/mean_length", "clip_ratio/region_mean"),
            *("sampling/k1", "sampling/k3", "time/generate"),
        ),
    ),
    "tinker": (
        *(tinker, as_json_lines, "tinker", "grpo"),
        (
            *("learning_rate", "reward", "entropy", "kl", "completions/mean_length", "num_completions"),
            *(*_GROUPS, *_STALE, *_TIMES, "sampling/k1"),
        ),
    ),
    "nemo_rl": (
        *(nemo_rl, as_json_lines, "nemo_rl", "grpo"),
        (
            *(*_STEP, _CUT, *_GROUPS, *_TIMES, "reward", "entropy", "kl", "sampling/k3", "completions/mean_length"),
            *("completions/max_length", "sampling/importance_sampling_ratio/mean", "sample/staleness_mean"),
        ),
    ),
    "open_instruct": (
        *(open_instruct, as_csv, "open_instruct", "grpo"),
        (
            *(*_STEP, *_LENGTHS, _CUT, "reward", "entropy", "kl", "clip_ratio/region_mean"),
            *("sampling/sampling_logp_difference/mean", "sampling/sampling_logp_difference/max"),
        ),
    ),
    "torchtune_grpo": (
        *(torchtune_grpo, as_torchtune_text, "torchtune", "grpo"),
        (*_STEP, "reward", "kl", "completions/mean_length"),
    ),
    "torchtune_ppo": (
        *(torchtune_ppo, as_torchtune_text, "torchtune", "ppo"),
        ("loss", "reward", "kl", "completions/mean_length", "clip_ratio/region_mean"),
    ),
}


# Supervised training and preference learning: `train` and `held_out` write a training row and an evaluation.


def sft_of_openrlhf(row):
    step = row["step"]
    if "eval_loss" in row:
        return [{"eval/eval_loss": row["eval_loss"], "eval/global_step": step, "train/global_step": step}]
    return [
        {
            "train/gpt_loss": row["loss"],
            "train/loss_mean": row["loss"] * 1.01,
            "train/lr": row["learning_rate"],
            "train/grad_norm": row["grad_norm"],
            "train/global_step": step,
        }
    ]


def sft_of_prime_rl(row):
    clock = CLOCK + 4.0 * row["step"]
    if "eval_loss" in row:
        return [{"step": row["step"], "time": clock + 1, "val/loss": row["eval_loss"]}]
    return [
        {"step": row["step"], "time": clock, "loss/mean": row["loss"], "loss/perplexity": math.exp(row["loss"])},
        {"step": row["step"], "time": clock, "optim/lr": row["learning_rate"], "optim/grad_norm": row["grad_norm"]},
        {"step": row["step"], "time": clock, "perf/throughput": 9000.0, "perf/mfu": 31.0},
    ]


def sft_of_verl(row):
    if "eval_loss" in row:
        return [{"step": row["step"], "data": {"val/loss": row["eval_loss"]}}]
    data = {"train/loss": row["loss"], "train/grad_norm": row["grad_norm"], "train/lr": row["learning_rate"]}
    return [{"step": row["step"], "data": data | {"train/global_tokens": 65536, "train/mfu": 0.4}}]


def sft_of_tinker(row):
    if "eval_loss" in row:
        return [{"step": row["step"], "test/nll": row["eval_loss"]}]
    return [
        {
            "step": row["step"],
            "train_mean_nll": row["loss"],
            "train_mean_bpb": row["loss"] / 3,
            "learning_rate": row["learning_rate"],
            "num_sequences": 32,
            "num_tokens": 30000,  # of this step alone
            "num_loss_tokens": 20000,
            "progress": row["step"] / 600,
        }
    ]


def of_llama_factory(row):
    """One fixed set of columns, for supervised and preference training; no gradient norm."""
    head = {"current_steps": row["step"], "total_steps": 600}
    tail = {
        "epoch": row["epoch"],
        "percentage": row["step"] / 6,
        "elapsed_time": "0:04:02",
        "remaining_time": "0:33:29",
    }
    if "eval_loss" in row:
        return [head | {"eval_loss": row["eval_loss"]} | tail]
    accuracy = {"accuracy": row["rewards/accuracies"]} if "rewards/accuracies" in row else {}
    memory = {"vram_allocated": 0, "vram_reserved": 0}
    return [head | {"loss": row["loss"], **accuracy, "lr": row["learning_rate"]} | tail | memory]


def sft_of_torchtune(row):
    if "eval_loss" in row:
        return [{"step": row["step"], "val_loss": row["eval_loss"]}]
    return [
        {
            "step": row["step"],
            "loss": row["loss"],
            "lr": row["learning_rate"],
            "tokens_per_second_per_gpu": 3000.0,
            "grad_norm": row["grad_norm"],
            "peak_memory_active": 10.0,
        }
    ]


def sft_of_nemo_rl(row):
    if "eval_loss" in row:
        return [{"step": row["step"], "validation/val_loss": row["eval_loss"], "timing/validation/total": 3.0}]
    return [
        {
            "step": row["step"],
            "train/loss": row["loss"],
            "train/lr": row["learning_rate"],
            "train/wd": 0.01,
            "train/grad_norm": row["grad_norm"],
            "train/num_unmasked_tokens": 4096,
            "train/num_valid_samples": 32,
            "train/global_valid_toks": 4096,
        }
    ]


def sft_of_open_instruct(row):
    return [
        {
            "training_step": row["step"],
            "train_loss": row["loss"],
            "learning_rate": row["learning_rate"],
            "total_tokens": 1000 * row["step"],
            "per_device_tps": 2000.0,
        }
        for _ in ([] if "eval_loss" in row else [0])
    ]


def sft_of_oat(row):
    return [
        {
            "misc/policy_sgd_step": row["step"],
            "misc/global_step": 4 * row["step"],
            "misc/lr": row["learning_rate"],
            "train/loss_mean": row["loss"],
            "train/learning_round": row["step"],
        }
        for _ in ([] if "eval_loss" in row else [0])
    ]


def dpo_of_openrlhf(row):
    step = row["step"]
    if "eval_loss" in row:
        held_out = {"eval/eval_loss": row["eval_loss"], "eval/acc_mean": row["eval_rewards/accuracies"]}
        return [held_out | {"eval/global_step": step, "train/global_step": step}]
    return [
        {
            "train/loss": row["loss"],
            "train/acc": row["rewards/accuracies"],
            "train/chosen_reward": row["rewards/chosen"],
            "train/reject_reward": row["rewards/rejected"],
            "train/loss_mean": row["loss"] * 1.1,
            "train/acc_mean": row["rewards/accuracies"] * 0.9,
            "train/lr": row["learning_rate"],
            "train/grad_norm": row["grad_norm"],
            "train/global_step": step,
        }
    ]


def dpo_of_tinker(row):
    if "eval_loss" in row:
        return []
    return [
        {
            "step": row["step"],
            "dpo_loss": row["loss"],
            "accuracy": row["rewards/accuracies"],
            "margin": row["rewards/margins"],
            "chosen_reward": row["rewards/chosen"],
            "rejected_reward": row["rewards/rejected"],
            "num_pairs": 32,
            "num_tokens": 9000,
            "learning_rate": row["learning_rate"],
            "progress": row["step"] / 160,
        }
    ]


def dpo_of_torchtune(row):
    if "eval_loss" in row:
        return []
    same = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
    return [
        {
            "step": row["step"],
            **{name: row[name] for name in same},
            "lr": row["learning_rate"],
            "tokens_per_second_per_gpu": 800.0,
            "log_probs/chosen": row["logps/chosen"],
            "log_probs/rejected": row["logps/rejected"],
            "logits/chosen": -1.0,
            "logits/rejected": -1.2,
        }
    ]


def dpo_of_nemo_rl(row):
    """Its rewards are log-ratios without beta."""
    if "eval_loss" in row:
        return [{"step": row["step"], "validation/loss": row["eval_loss"]}]
    return [
        {
            "step": row["step"],
            "train/loss": row["loss"],
            "train/preference_loss": row["loss"],
            "train/sft_loss": 0.0,
            "train/accuracy": row["rewards/accuracies"],
            "train/rewards_chosen_mean": row["rewards/chosen"] / 0.1,
            "train/rewards_rejected_mean": row["rewards/rejected"] / 0.1,
            "train/num_valid_samples": 32,
            "train/global_valid_seqs": 64,
            "train/lr": row["learning_rate"],
            "train/grad_norm": row["grad_norm"],
        }
    ]


def dpo_of_oat(row):
    if "eval_loss" in row:
        return []
    return [
        {
            "misc/policy_sgd_step": row["step"],
            "misc/global_step": 4 * row["step"],
            "misc/lr": row["learning_rate"],
            "train/loss_mean": row["loss"],
            "train/acc_mean": row["rewards/accuracies"],
            "train/chosen_reward": row["rewards/chosen"],
            "train/rejected_reward": row["rewards/rejected"],
            "train/reward_margin": row["rewards/margins"],
            "train/learning_round": row["step"],
        }
    ]


def dpo_of_open_instruct(row):
    if "eval_loss" in row:
        return []
    return [
        {
            "training_step": row["step"],
            "train_loss": row["loss"],
            "learning_rate": row["learning_rate"],
            "logps/chosen": row["logps/chosen"],
            "logps/rejected": row["logps/rejected"],
            "rewards/chosen": row["rewards/chosen"],
            "rewards/rejected": row["rewards/rejected"],
            "rewards/average": (row["rewards/chosen"] + row["rewards/rejected"]) / 2,
            "rewards/accuracy": row["rewards/accuracies"],
            "rewards/margin": row["rewards/margins"],
            "per_device_tps": 2000.0,
        }
    ]


def of_trl(row):
    return [row]


_SFT = ("loss", "learning_rate")
_PAIRS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
_LOGPS = ("logps/chosen", "logps/rejected")
SUPERVISED_SYSTEMS = {
    "sft": {
        "trl": (of_trl, as_trainer_state, "trl", (*_STEP, "eval_loss", "mean_token_accuracy", "entropy")),
        "openrlhf": (sft_of_openrlhf, as_json_lines, "openrlhf", (*_STEP, "eval_loss")),
        "prime_rl": (sft_of_prime_rl, as_json_lines, "prime_rl", (*_STEP, "eval_loss")),
        "verl": (sft_of_verl, as_json_lines, "verl", (*_STEP, "eval_loss")),
        "tinker": (sft_of_tinker, as_json_lines, "tinker", (*_SFT, "eval_loss")),
        "llama_factory": (of_llama_factory, as_json_lines, "llama_factory", (*_SFT, "eval_loss")),
        "torchtune": (sft_of_torchtune, as_torchtune_text, "torchtune", (*_STEP, "eval_loss")),
        "nemo_rl": (sft_of_nemo_rl, as_json_lines, "nemo_rl", (*_STEP, "eval_loss")),
        "open_instruct": (sft_of_open_instruct, as_csv, "open_instruct", _SFT),
        "oat": (sft_of_oat, as_json_lines, "oat", _SFT),
    },
    "dpo": {
        "trl": (
            *(of_trl, as_trainer_state, "trl"),
            (*_STEP, *_PAIRS, *_LOGPS, "eval_loss", "eval_rewards/accuracies", "eval_rewards/margins"),
        ),
        "openrlhf": (
            *(dpo_of_openrlhf, as_json_lines, "openrlhf"),
            (*_STEP, *_PAIRS, "eval_loss", "eval_rewards/accuracies"),
        ),
        "tinker": (dpo_of_tinker, as_json_lines, "tinker", (*_SFT, *_PAIRS)),
        "llama_factory": (
            *(of_llama_factory, as_json_lines, "llama_factory"),
            (*_SFT, "rewards/accuracies", "eval_loss"),
        ),
        "torchtune": (dpo_of_torchtune, as_torchtune_text, "torchtune", (*_SFT, *_PAIRS, *_LOGPS)),
        "nemo_rl": (dpo_of_nemo_rl, as_json_lines, "nemo_rl", (*_STEP, "rewards/accuracies", "eval_loss")),
        "oat": (dpo_of_oat, as_json_lines, "oat", (*_SFT, *_PAIRS)),
        "open_instruct": (dpo_of_open_instruct, as_csv, "open_instruct", (*_SFT, *_PAIRS, *_LOGPS)),
    },
}


# What is printed for people has few digits.


def pipeline_rl_console(folder, truth):
    lines = []
    for row in truth:
        (raw,) = pipeline_rl(row)
        del raw["_step"]
        raw["rl/reward"] = row["reward"]
        shown = {n: f"{v:.3e}" if 0 < abs(v) < 0.01 else f"{v:.3f}" for n, v in raw.items() if n[:5] != "actor"}
        lines.append(f"[finetune]: 06/01/2026 10:00:00.000 - INFO - loop - Completed steps {row['step']}: {shown!r}\n")
    return put(folder / "train.log", in_noise(lines))


def prime_rl_trainer_console(folder, truth):
    lines = (
        f"10:00:07 SUCCESS Step {row['step']} | {row['time/step']:.2f}s | Loss {row['loss']:.4f} | "
        f"Entropy {row['entropy']:.4f} | Mismatch KL {row['sampling/k3']:.4f} | Grad. Norm {row['grad_norm']:.4f} | "
        f"LR {row['learning_rate']:.2e} | Throughput 8712 tokens/s | MFU 31.2% | "
        f"Peak Mem. {row['memory/peak_reserved']:.1f} GiB\n"
        for row in truth
    )
    return put(folder / "trainer.log", in_noise(lines))


def prime_rl_orchestrator_console(folder, truth):
    lines = (
        f"10:00:07 SUCCESS Step {row['step']} | {row['time/step']:.2f}s | Reward {row['reward']:.4f} | Trainable 120/128 (93.8%) | "
        f"Turns 1.0 | Branches 1.0 | Max Off-Policy {row['sample/staleness_max']:.0f} | Error 0.0% | Cancelled 0.0% | "
        f"Truncation {100 * row['completions/clipped_ratio']:.1f}%\n"
        for row in truth
    )
    return put(folder / "orchestrator.log", in_noise(lines))


def oat_console(folder, truth):
    """Python's pprint, a name a line, with every digit."""
    return put(
        folder / "out.log", "".join(f"{pprint.pformat(oat(row)[0], width=20)}\nsynced weights\n" for row in truth)
    )


def nemo_rl_console(folder, truth):
    blocks = (
        f"\n========================= Step {row['step']}/{len(truth)} =========================\n"
        "▶ Generating responses for batch of size 128...\n\n📊 Training Results:\n"
        f"  • Loss: {row['loss']:.4f}\n  • Generation KL Error: {row['sampling/k3']:.4f}\n"
        f"  • Avg Reward: {row['reward']:.4f}\n"
        f"  • Mean Generation Length: {row['completions/mean_length']:.4f}\n\n⏱️  Timing:\n"
        f"  • Total step time: {row['time/step']:.2f}s\n  • generation: {row['time/generate']:.2f}s (55.0%)\n"
        for row in truth
    )
    return put(folder / "out.log", "".join(blocks))


# Console -> (system, our signals in it -> the largest error of what is printed)
CONSOLES = {
    pipeline_rl_console: (
        "pipeline_rl",
        {
            **dict.fromkeys(("reward", "entropy", "grad_norm", "loss", "kl", "ratio/ess"), 5e-4),
            "learning_rate": 5e-10,
            "policy/approx_kl": 5e-6,
            "log_ratio/abs_mean": 5e-4,
            "sample/staleness_max": 1e-6,
        },
    ),
    prime_rl_trainer_console: (
        "prime_rl",
        {
            **dict.fromkeys(("loss", "entropy", "sampling/k3", "grad_norm"), 5e-5),
            "learning_rate": 5e-9,
            "memory/peak_reserved": 0.05,
            "time/step": 5e-3,
        },
    ),
    prime_rl_orchestrator_console: (
        "prime_rl",
        {"reward": 5e-5, "completions/clipped_ratio": 5e-4, "sample/staleness_max": 0.0, "time/step": 5e-3},
    ),
    oat_console: ("oat", dict.fromkeys(RL_SYSTEMS["oat"][4], 1e-9)),
    nemo_rl_console: (
        "nemo_rl",
        {
            **dict.fromkeys(("loss", "sampling/k3", "reward", "completions/mean_length"), 5e-5),
            **dict.fromkeys(("time/step", "time/generate"), 5e-3),
        },
    ),
}


def same_number(a, b, error):
    if a is None or b is None:
        return a is b
    return (a != a and b != b) or math.isclose(a, b, rel_tol=1e-9, abs_tol=error)


def check_values(run, truth, names, error=lambda name: 1e-13):
    """Each of the signals has the truth's value at each step, and no other signal of the truth is read from anything.

    `error`: by how much what is printed of a signal may be off.
    """
    of_truth = {row["step"]: row for row in truth}
    assert [o.step for o in run.observations] == list(of_truth)
    for observation in run.observations:
        row = of_truth[observation.step]
        for name in names:
            value = NAN if name in observation.nonfinite else observation.signals.get(name)
            assert same_number(value, row.get(name), error(name)), (name, observation.step, value, row.get(name))
        others = {n for n in observation.signals.keys() & row.keys() - set(names) if not n.endswith("#n")}
        assert not others, f"{others} of {observation.step} came from something else"


def close(a, b):
    """Whether two reports say the same; numbers may differ in the last digits that a change of units leaves."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(close(a[name], b[name]) for name in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(close, a, b))
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-9)
    return a == b


RL_TRUTHS = {
    "cut": cut_truth,
    "collapsed": collapsed_truth,
    "blown_up": blown_up_truth,
    "nan": nan_truth,
}


def logged(truth, names, keep=("step",)):
    """What of the truth a system logs, under our names."""
    rows = [{name: row[name] for name in (*keep, *names) if name in row} for row in truth]
    return [row for row in rows if len(row) > len(keep)]


@cache
def shown_of_truth(fault):
    """Codes that the whole truth shows, everything measured."""
    with TemporaryDirectory() as folder:
        return shown(diagnose(as_json_lines(Path(folder), RL_TRUTHS[fault](7))))


@pytest.mark.parametrize(
    ("system", "given"),
    [pytest.param(s, given, marks=[pytest.mark.slow] if given else []) for s in RL_SYSTEMS for given in (False, True)],
)
def test_a_run_is_judged_alike_under_the_names_of_every_system(folder, system, given):
    """Values come back as they were, and the report is the one on the same signals under our names."""
    render, write, family, method, names = RL_SYSTEMS[system]
    for fault, make in RL_TRUTHS.items():
        truth = make(7)
        path = write(folder(), [raw for row in truth for raw in render(row)])
        run = read(path)
        assert (run.family, run.method) == (family, method)
        if system.startswith("prime_rl"):  # leaves out what is not finite, so that a NaN is a gap
            truth = without_nan(truth)
        check_values(run, truth, names)
        config = config_of("rl") if given else None
        report = diagnose(path, config=config) if given else replayed(run)
        same = diagnose(as_json_lines(folder(), logged(truth, names)), config=config, method=method)
        assert close(judged(report), judged(same)), fault
        # Nothing that the whole truth does not show, but for what stands in for a cause that is not logged: a collapse
        # of entropy for groups without spread, a loss that ends for one that is not a number.
        assert shown(report) - shown_of_truth(fault) <= {"collapsed": {"RL005"}, "nan": {"SYS012"}}.get(fault, set())


@pytest.mark.parametrize("write", CONSOLES)
def test_consoles_round_and_say_nothing_new(folder, write):
    family, errors = CONSOLES[write]
    for fault, make in RL_TRUTHS.items():
        truth = make(7)
        path = write(folder(), truth)
        run = read(path)
        assert (run.format, run.family, run.method) == ("console", family, "grpo")
        check_values(run, truth, errors, lambda name: 1.001 * errors[name])
        assert shown(replayed(run)) <= shown_of_truth(fault)


@pytest.mark.parametrize("given", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("kind", "system"), [(kind, system) for kind, systems in SUPERVISED_SYSTEMS.items() for system in systems]
)
def test_supervised_runs_are_judged_alike_under_the_names_of_every_system(folder, kind, system, given):
    render, write, family, names = SUPERVISED_SYSTEMS[kind][system]
    config = config_of(kind) if given else None
    for faulty in (True, False):
        truth = supervised_truth(kind, faulty, seed=3)
        path = write(folder(), [raw for row in truth for raw in render(row)])
        run = read(path)
        assert (run.family, run.method) == (family, kind)
        check_values(run, [{n: v for n, v in row.items() if n != "epoch"} for row in merged(truth)], names)
        keep = ("step", "epoch") if run.observations[0].epoch is not None else ("step",)
        report = diagnose(path, config=config) if given else replayed(run)
        same = diagnose(as_json_lines(folder(), logged(truth, names, keep)), config=config, method=kind)
        assert close(judged(report), judged(same))
        assert shown(report) <= (SHOWS["sft_overfit" if kind == "sft" else "dpo_spikes"] if faulty else set())
        if "eval_loss" in names and kind == "sft":
            assert shown(report) == ({"SFT001"} if faulty else set())


def supervised_truth(kind, faulty, seed):
    return sft_rows(overfit=faulty, seed=seed) if kind == "sft" else dpo_rows(healthy=not faulty, seed=seed)


@pytest.mark.parametrize("seeds", [range(2), pytest.param(range(2, 40), marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("kind", ["rl", "sft", "dpo"])
def test_a_healthy_run_gives_no_warning_in_any_system(folder, kind, seeds):
    systems = RL_SYSTEMS if kind == "rl" else SUPERVISED_SYSTEMS[kind]
    for seed in seeds:
        truth = rl_truth(seed) if kind == "rl" else supervised_truth(kind, False, seed)
        for system, (render, write, *_) in systems.items():
            report = diagnose(write(folder(), [raw for row in truth for raw in render(row)]))
            assert (shown(report), report["verdict"]["state"]) == (set(), "improving"), (system, seed)


# Names by which systems count steps in rows that have no "step".
STEP_NAMES = ("train/global_step", "misc/policy_sgd_step", "stats/completed_steps", "training_step", "current_steps")


def with_step(raw):
    """A row as a tracker gets it: flat, with its step."""
    flat = {**raw, **raw.get("data", {})}
    flat.pop("data", None)
    return {"step": next(flat[name] for name in ("step", *STEP_NAMES) if name in flat), **flat}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "system"),
    [("rl", system) for system in RL_SYSTEMS if system != "verl_of_prometheus"]  # by name a tracker of its own
    + [(kind, system) for kind, systems in SUPERVISED_SYSTEMS.items() for system in systems],
)
def test_every_system_is_judged_alike_in_every_tracker(folder, kind, system):
    render = (RL_SYSTEMS if kind == "rl" else SUPERVISED_SYSTEMS[kind])[system][0]
    truth = blown_up_truth(7) if kind == "rl" else supervised_truth(kind, True, seed=3)
    rows = [with_step(raw) for row in truth for raw in render(row)]
    rows = [{n: v for n, v in row.items() if not isinstance(v, str)} for row in rounded(rows, ROUNDED[as_event_file])]
    report = judged(diagnose(as_json_lines(folder(), rows)))
    timeless = [{name: value for name, value in row.items() if name != "time"} for row in rows]  # they have their own
    assert judged(diagnose(as_wandb_file(folder(), timeless, unnamed))) == report
    assert judged(diagnose(as_event_file(folder(), timeless, unnamed))) == report
    for write in (as_mlflow_folder, as_mlflow_database, as_csv, as_console_of_steps):
        assert judged(diagnose(write(folder(), timeless))) == report, write.__name__


# ---------------------------------------------------------------------- public runs

PUBLIC = Path(__file__).resolve().parents[2] / "shared" / "real_runs"
# Of several systems and methods, healthy and not.
PUBLIC_FAST = (
    *(
        "cognidet_sft",
        "fuguez_qwen05_dpo",
        "zhuoyuan_gec_ipo_lr1e_06_ep1",
        "srinath_grpo",
        "rusheel_chaos_economy_grpo",
    ),
    *(
        "tinker_arithmetic_rl",
        "tinker_distill_on",
        "verl_getting_started_ppo",
        "kartik_ppo_v1_2026",
        "chelsi_dpo_corrupt",
    ),
    *("nlpgrpo24_divc_shaped_kl_03_ent_01_t1_2", "jaong_cpt", "terrense_sft_final", "ningguo_hotpot_grpo_v1"),
)
PUBLIC_RUNS = sorted(p.name for p in PUBLIC.iterdir() if list(p.glob("log.jsonl*"))) if PUBLIC.is_dir() else []


def public_rows(name):
    (path,) = PUBLIC.joinpath(name).glob("log.jsonl*")
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in text.decode().splitlines() if line.strip()]


@pytest.mark.skipif(not PUBLIC_RUNS, reason="no recorded runs beside this checkout")
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in PUBLIC_FAST else [pytest.mark.slow]) for n in PUBLIC_RUNS]
)
def test_a_public_run_is_judged_alike_in_every_container(folder, name):
    """Its log under the names of its own system, written once more; without what may lie beside the log."""
    rows = public_rows(name)
    report = judged(diagnose(as_json_lines(folder(), rows)))
    writers = [as_gzipped_json_lines, as_json_list, as_trainer_state, as_csv]
    values = [value for row in rows for value in row.values()]
    if all("step" in row for row in rows) and all(type(value) in (int, float) for value in values):
        writers += [as_mlflow_database, as_console_of_steps, as_console_of_global_steps]
        if not any(f"{a}/" in b for a in rows[0] for b in rows[0]):  # no file and folder of one name
            writers.append(as_mlflow_folder)
        if not any(" " in name for row in rows for name in row):  # between spaces, no name has one
            writers.append(as_torchtune_text)
        assert judged(diagnose(as_wandb_file(folder(), rows, unnamed))) == report
        short = rounded(rows, ROUNDED[as_event_file])
        same = judged(diagnose(as_json_lines(folder(), short)))
        assert judged(diagnose(as_event_file(folder(), short, unnamed))) == same
    for write in writers:
        assert judged(diagnose(write(folder(), rows))) == report, write.__name__
