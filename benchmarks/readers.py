"""How fast logs are read, and what memory it takes: 100,000 rows of ten metrics in each container.

    python benchmarks/readers.py [--containers jsonl,csv] [--rows 100000] [--huge 2] [--write]

Each container is read in a process of its own, `sources.read` and one pass over the observations, after the bare lines
of the same run were parsed by `json.loads` in that process: the ratio of the two times is what can be compared between
machines. Memory is the growth of the process's peak while it read. `--huge N` reads JSON lines of N GiB instead.
"""

import argparse
import csv
import json
import math
import random
import resource
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import write

MARKERS = "<!-- readers: begin -->", "<!-- readers: end -->"
NAMES = (
    "loss",
    "grad_norm",
    "learning_rate",
    "reward",
    "reward_std",
    "kl",
    "entropy",
    "completions/mean_length",
    "frac_reward_zero_std",
    "clip_ratio/region_mean",
)
SHORT = "jsonl"  # what is parsed bare, to compare with


def run(count: int) -> Iterator[dict[str, Any]]:
    draw = random.Random(0)
    for step in range(1, count + 1):
        yield {"step": step, **{name: round(draw.random(), 6) for name in NAMES}}


# ---------------------------------------------------------------------- containers


def jsonl(folder: Path, count: int) -> Path:
    with (path := folder / "log.jsonl").open("w") as out:
        out.writelines(json.dumps(row) + "\n" for row in run(count))
    return path


def trainer_state(folder: Path, count: int) -> Path:
    with (path := folder / "trainer_state.json").open("w") as out:
        out.write('{"best_metric": null, "log_history": [')
        for i, row in enumerate(run(count)):
            out.write((", " if i else "") + json.dumps(row, indent=2))
        out.write('], "max_steps": 100000}')
    return path


def csv_file(folder: Path, count: int) -> Path:
    with (path := folder / "log.csv").open("w", newline="") as out:
        table = csv.DictWriter(out, ["step", *NAMES])
        table.writeheader()
        table.writerows(run(count))
    return path


def console(folder: Path, count: int) -> Path:
    """The dictionaries that transformers prints, each after a line of noise."""
    with (path := folder / "train.log").open("w") as out:
        for row in run(count):
            step = row.pop("step")
            out.write(
                f" {step % 100}%|███  | {step}/{count} [00:01<00:02,  1.20it/s]\n{row | {'epoch': step / count}}\n"
            )
    return path


def verl(folder: Path, count: int) -> Path:
    with (path := folder / "verl.log").open("w") as out:
        for row in run(count):
            cells = " - ".join(f"{name}:{value}" for name, value in row.items())
            out.write(f"(TaskRunner pid=11) {cells}\n")
    return path


def notebook(folder: Path, count: int) -> Path:
    """The table that a notebook shows while the Trainer runs."""
    head = "".join(f"<th>{name}</th>" for name in ("Step", *NAMES))
    rows = "".join("<tr>" + "".join(f"<td>{v}</td>" for v in row.values()) + "</tr>\n" for row in run(count))
    html = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    output = {"output_type": "display_data", "data": {"text/html": [html]}, "metadata": {}}
    cell = {"cell_type": "code", "source": [], "outputs": [output], "metadata": {}, "execution_count": 1}
    path = folder / "train.ipynb"
    path.write_text(json.dumps({"cells": [cell], "nbformat": 4, "nbformat_minor": 5, "metadata": {}}))
    return path


def _crc_table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return table


_CRC = _crc_table()


def _masked(data: bytes) -> bytes:
    """The checksum of a record of TensorBoard: CRC-32C, rotated by 15 and shifted."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC[(crc ^ byte) & 255] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def _varint(number: int) -> bytes:
    out = b""
    while number > 127:
        out, number = out + bytes([number & 127 | 128]), number >> 7
    return out + bytes([number])


def _field(number: int, data: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def tensorboard(folder: Path, count: int) -> Path:
    with (path := folder / "events.out.tfevents.1700000000.host.1.0").open("wb") as out:

        def put(event: bytes) -> None:
            length = struct.pack("<Q", len(event))
            out.write(length + _masked(length) + event + _masked(event))

        put(b"\x09" + struct.pack("<d", 1.7e9) + _field(3, b"brain.Event:2"))
        for row in run(count):
            step = row.pop("step")
            clock = b"\x09" + struct.pack("<d", 1.7e9 + step) + b"\x10" + _varint(step)
            for name, value in row.items():
                scalar = _field(1, name.encode()) + b"\x15" + struct.pack("<f", value)
                put(clock + _field(5, _field(1, scalar)))
    return path


def wandb(folder: Path, count: int) -> Path:
    """The transaction log of W&B: records of protocol buffers in the blocks of LevelDB's log."""
    with (path := folder / "run-bench.wandb").open("wb") as out:
        out.write(b":W&B" + struct.pack("<HB", 0xBEE1, 0))
        for row in run(count):
            step = row.pop("step")
            items = {**row, "train/global_step": step, "_step": step, "_timestamp": 1.7e9 + step}
            history = b"".join(
                _field(1, _field(2, name.encode()) + _field(16, json.dumps(value).encode()))
                for name, value in items.items()
            )
            data, first = _field(2, history), True
            while data or first:
                room = 32768 - out.tell() % 32768
                if room < 7:
                    out.write(b"\0" * room)
                    continue
                part, data = data[: room - 7], data[room - 7 :]
                kind = (1 if not data else 2) if first else (4 if not data else 3)
                out.write(struct.pack("<IHB", zlib.crc32(bytes([kind]) + part), len(part), kind) + part)
                first = False
    return path


def mlflow(folder: Path, count: int) -> Path:
    run_folder = folder / "mlruns" / "0" / ("a" * 32)
    files = {}
    for name in NAMES:
        place = run_folder / "metrics" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        files[name] = place.open("w")
    (run_folder / "meta.yaml").write_text(f"run_id: {'a' * 32}\nrun_uuid: {'a' * 32}\nexperiment_id: '0'\nstatus: 3\n")
    (run_folder.parent / "meta.yaml").write_text("experiment_id: '0'\nname: Default\n")
    for row in run(count):
        for name, out in files.items():
            out.write(f"{1_700_000_000_000 + row['step']} {row[name]} {row['step']}\n")
    for out in files.values():
        out.close()
    return folder / "mlruns"


def run_directory(folder: Path, count: int) -> Path:
    """A run directory of ours."""
    with (path := folder / "metrics.jsonl").open("w") as out:
        for row in run(count):
            record = {"schema": "outspoken.observation/1", "step": row.pop("step"), "time": 1.7e9, "epoch": None}
            out.write(json.dumps(record | {"segment": 0, "signals": row, "nonfinite": {}, "unreadable": {}}) + "\n")
    return path


CONTAINERS = {
    "jsonl": jsonl,
    "trainer_state": trainer_state,
    "csv": csv_file,
    "console": console,
    "verl": verl,
    "notebook": notebook,
    "tensorboard": tensorboard,
    "wandb": wandb,
    "mlflow": mlflow,
    "run_directory": run_directory,
}


# ---------------------------------------------------------------------- measuring


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(path: str, bare: str, count: int) -> None:
    """Read one log in this process and print what it took."""
    from outspoken.diagnostics.sources import read

    began = time.process_time()
    with open(bare) as lines:
        for line in lines:
            json.loads(line)
    parsing = time.process_time() - began
    before, began, clock = peak(), time.process_time(), time.perf_counter()
    log = read(path)
    seen = sum(1 for _ in log.observations)
    took = {"cpu": time.process_time() - began, "wall": time.perf_counter() - clock, "memory": peak() - before}
    if seen != count or len(log.rows) != count:
        raise SystemExit(f"{path}: {seen} observations of {len(log.rows)} rows, where {count} were written")
    print(json.dumps(took | {"parsing": parsing}))


def contest(container: str, count: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        place, other = Path(folder, "run"), Path(folder, "bare")
        place.mkdir()
        other.mkdir()
        path, bare = CONTAINERS[container](place, count), jsonl(other, count)
        done = subprocess.run(
            [sys.executable, __file__, "--measure", str(path), str(bare), str(count)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(done.stderr)
        size = sum(p.stat().st_size for p in ([path] if path.is_file() else path.rglob("*"))) / 2**20
        return {"container": container, "size": size, **json.loads(done.stdout)}


def table(found: list[dict[str, Any]], count: int) -> str:
    lines = [
        f"{count:,} rows of {len(NAMES)} metrics:",
        "",
        "| container | MiB | seconds of processor | times bare `json.loads` | memory, MiB |",
        "|---|---|---|---|---|",
    ]
    for each in found:
        lines.append(
            f"| {each['container']} | {each['size']:.0f} | {each['cpu']:.1f} | {each['cpu'] / each['parsing']:.1f} | "
            f"{each['memory']:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--containers", default=",".join(CONTAINERS), help="of " + ", ".join(CONTAINERS))
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--huge", type=float, metavar="GIB", help="read JSON lines of so many GiB instead")
    parser.add_argument("--write", action="store_true", help="put the table into docs/performance.md")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(args.measure[0], args.measure[1], int(args.measure[2]))
        return
    names = args.containers.split(",")
    if unknown := [name for name in names if name not in CONTAINERS]:
        parser.error(f"--containers has {unknown[0]!r}; use {', '.join(CONTAINERS)}")
    count = args.rows
    if args.huge:
        row = sum(len(json.dumps(row)) + 1 for row in run(1000)) / 1000
        names, count = [SHORT], math.ceil(args.huge * 2**30 / row)
    found = []
    for name in names:
        found.append(contest(name, count))
        print(json.dumps({k: round(v, 2) if isinstance(v, float) else v for k, v in found[-1].items()}), flush=True)
    text = table(found, count)
    print(text)
    if args.write:
        write(*MARKERS, text)


if __name__ == "__main__":
    main()
