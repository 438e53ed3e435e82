"""Torn, mixed, packed, foreign and hostile files: a diagnosis or one sentence, never a crash, a hang or a wrong number."""

import contextlib
import gzip
import io
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import textwrap
import zlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from outspoken import Recorder
from outspoken.cli.main import main
from outspoken.diagnostics.follow import Follower
from outspoken.diagnostics.sources import UnreadableLog, read

PEER = Path(__file__).parent / "peer_logs"

ROWS = [
    {
        "step": i,
        "loss": 1.5 - 0.01 * i,
        "grad_norm": 0.5 + 0.01 * (i % 7),
        "learning_rate": 1e-5,
        "reward": 0.3 + 0.01 * i,
        "reward_std": 0.2,
        "kl": 0.001 * i,
    }
    for i in range(1, 31)
]
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS)
CSV = ",".join(ROWS[0]) + "\n" + "".join(",".join(map(str, row.values())) + "\n" for row in ROWS)
STATE = json.dumps({"log_history": ROWS, "global_step": 30})
CONSOLE = "".join(f"{{'loss': {row['loss']}, 'grad_norm': 0.5, 'epoch': {row['step'] / 10}}}\n" for row in ROWS)
OWN = "".join(
    json.dumps({"schema": "outspoken.observation/1", "step": i, "time": 1.7e9 + i, "signals": {"loss": 0.5 + i / 100}})
    + "\n"
    for i in range(30)
)


@pytest.fixture(autouse=True)
def end_what_hangs(request):
    """A reader that hangs fails its test instead of holding up all others."""

    def fail(signum, frame):
        pytest.fail("it hangs")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(100 if request.node.get_closest_marker("slow") is None else 1500)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


# ---------------------------------------------------------------------- what every file has to give


def read_or_refused(path, format=None):
    """The run, whose cells are all accounted for; or the sentence why there is none."""
    try:
        run = read(path, format=format)
    except UnreadableLog as error:
        sentence = str(error)
        assert "\n" not in sentence and len(sentence) < len(str(path)) + 1000
        assert str(path) in sentence or Path(sentence.split(":")[0]).is_relative_to(path.parent)
        return sentence
    assert run.account.balanced
    count = 0
    for observation in run.observations:
        count += 1
        assert all(isinstance(v, float) and math.isfinite(v) for v in observation.signals.values())
        assert set(observation.nonfinite.values()) <= {"nan", "inf", "-inf"}
    assert count == len(run.observations) > 0
    assert all(len(name) <= 500 for name in run.signals)
    return run


def outspoken(*arguments):
    """(exit code, standard output, standard error) of a command."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(argument) for argument in arguments])
    return code, out.getvalue(), err.getvalue()


def commands_hold(path, *options):
    """Whatever the file is: a known exit code, no traceback, nothing that a terminal obeys, JSON where it is asked for."""

    def no_number(constant):
        raise AssertionError(f"{constant} is no JSON")

    codes = set()
    for command in (("diagnose", path), ("watch", path, "--once")):
        for form in ((), ("--json",)):
            code, out, err = outspoken(*command, *options, *form)
            assert code in (0, 1, 2), (command, code)
            assert "Traceback" not in out + err and "OUTSPOKEN_DEBUG" not in out + err, (command, out, err)
            assert [c for c in err if not c.isprintable() and c != "\n"] == []
            if form:
                documents = [json.loads(line, parse_constant=no_number) for line in out.splitlines()]
                assert documents and (command[0] == "watch" or len(documents) == 1)
            else:
                assert [c for c in out if not c.isprintable() and c != "\n"] == []
                assert code != 2 or len(err.splitlines()) >= 1
            if command[0] == "diagnose":
                codes.add(code)
    assert len(codes) == 1
    return codes.pop()


@pytest.fixture
def write(tmp_path):
    """`write(content, name)` puts a file there."""

    def put(content, name="log.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
        return path

    return put


def steps(run):
    return [observation.step for observation in run.observations]


def values(run, name):
    return [observation.signals.get(name) for observation in run.observations]


# ---------------------------------------------------------------------- real small files, damaged


def real_files():
    """name -> bytes: what the systems wrote, and small files of every other container."""
    found = {
        path.relative_to(PEER).as_posix(): path.read_bytes()
        for path in sorted(PEER.rglob("*"))
        if path.is_file() and path.suffix not in (".py", ".yaml") and "mlruns" not in path.parts
    }
    found["mlflow.db"] = gzip.decompress(found["mlflow/mlflow.db.gz"])
    return found | {
        "log.jsonl": JSONL.encode(),
        "log.csv": CSV.encode(),
        "trainer_state.json": STATE.encode(),
        "rows.json": json.dumps(ROWS).encode(),
        "columns.json": json.dumps({name: [row[name] for row in ROWS] for name in ROWS[0]}).encode(),
        "log.jsonl.gz": gzip.compress(JSONL.encode()),
        "log.csv.gz": gzip.compress(CSV.encode()),
        "console.log": CONSOLE.encode(),
        "own/metrics.jsonl": OWN.encode(),
    }


REAL = real_files()
ONE_OF_EACH = [
    "log.jsonl",
    "log.csv",
    "trainer_state.json",
    "rows.json",
    "columns.json",
    "log.jsonl.gz",
    "console.log",
    "own/metrics.jsonl",
    "mlflow.db",
    "transformers/table.ipynb",
    "verl/console.log",
    "openrlhf/console.log",
    "nemo_rl/console.log",
    "oat/console.log",
    "torchtune/sft/log_1700000000.txt",
    "prime_rl/trainer.log",
    next(name for name in REAL if name.startswith("tensorboard/plain/")),
    next(name for name in REAL if name.startswith("wandb/v0_31/plain/")),
    next(name for name in REAL if name.startswith("wandb/v0_17/plain/")),
]
PIECES = [
    *(b"\0", b"\0" * 50, b"\xff", b"\xff\xfe", b"\xef\xbb\xbf", b"\xe9", b"\xed\xa0\x80", b"\r\n", b"\r", b"\n"),
    *(b'"', b"'", b"{", b"}", b"[", b"]", b",", b";", b"\t", b"#", b"NaN", b"1e999", b"-", b"9" * 400, b"\x1b[31m"),
    *(
        b"null",
        b"true",
        b'"a":',
        b"{'a': {",
        b"step",
        b"\\u0000",
        b"1,234",
        b"0,5",
        b"12%",
        b" - ",
        b" | ",
        b"<table>",
    ),
]
EXTENSIONS = ["", ".jsonl", ".json", ".csv", ".gz", ".log", ".ipynb", ".wandb", ".db", ".tfevents.1"]


def damaged(rng, data):
    """The bytes, with one kind of damage."""
    if not data:
        return data
    kind, size = rng.randrange(11), len(data)
    first, last = sorted((rng.randrange(size), rng.randrange(size)))
    if kind == 0:
        return data[:first]
    if kind == 1:
        flipped = bytearray(data)
        for _ in range(rng.choice([1, 1, 3, 20])):
            flipped[rng.randrange(size)] ^= 1 << rng.randrange(8)
        return bytes(flipped)
    if kind == 2:
        other = REAL[rng.choice(list(REAL))]
        return data[:first] + other[rng.randrange(len(other)) :]
    if kind == 3:
        return data[:last] + data[first:last] * rng.choice([1, 3]) + data[last:]
    if kind == 4:
        for _ in range(rng.choice([1, 1, 4])):
            at = rng.randrange(len(data) + 1)
            data = data[:at] + rng.choice(PIECES) + data[at:]
        return data
    if kind == 5:
        return data.replace(b"\n", rng.choice([b"\r\n", b"\r", b"\n\n"]))
    if kind == 6:
        packed = gzip.compress(data)
        return packed[: rng.randrange(1, len(packed) + 1)]
    if kind == 7:
        return data[:first] + data[min(last, first + 200) :]
    if kind == 8:
        lines = data.split(b"\n")
        rng.shuffle(lines)
        return b"\n".join(lines)
    if kind == 9:
        return re.sub(rb"\d+", lambda found: rng.choice(PIECES) if rng.random() < 0.05 else found.group(), data)
    encoding = rng.choice(["utf-16", "utf-16-le", "utf-16-be", "utf-8-sig", "latin-1"])
    return data.decode("utf-8", "replace").encode(encoding, "replace")


FORMATS = [None] * 6 + "csv jsonl json console trainer_state notebook tensorboard wandb mlflow verl trl".split()


def damaged_file(seed, folder):
    """(path, the format to ask for) of a damaged file, made from the seed."""
    rng = random.Random(seed)
    name = rng.choice(list(REAL))
    data = REAL[name]
    for _ in range(rng.choice([1, 1, 2, 3])):
        data = damaged(rng, data)
    base = "log" + rng.choice(EXTENSIONS) if rng.random() < 0.3 else Path(name).name
    path = folder / f"{seed}" / base
    path.parent.mkdir()
    path.write_bytes(data)
    return path, rng.choice(FORMATS)


def damage_is_told(seed, folder):
    path, format = damaged_file(seed, folder)
    read_or_refused(path, format)
    if seed % 10 == 0:
        commands_hold(path, *(["--format", format] if format else []))
    shutil.rmtree(path.parent)


@pytest.mark.parametrize("part", range(4))
def test_damaged_files_are_read_or_refused(tmp_path, part):
    for seed in range(part * 60, part * 60 + 60):
        damage_is_told(seed, tmp_path)


@pytest.mark.slow
@settings(max_examples=4000, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(10_000, 10**9))
def test_any_damaged_file_is_read_or_refused(tmp_path_factory, seed):
    damage_is_told(seed, tmp_path_factory.mktemp("damaged"))


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_file_cut_anywhere_is_read_as_far_as_it_goes_or_refused(tmp_path, name):
    """And nothing is invented: the steps and values of a cut file are those of the whole one."""
    cut_everywhere(tmp_path, name, max(1, len(REAL[name]) // 12))


@pytest.mark.slow
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_file_cut_at_any_byte_is_read_as_far_as_it_goes_or_refused(tmp_path, name):
    cut_everywhere(tmp_path, name, max(1, len(REAL[name]) // 1500))


def cut_everywhere(tmp_path, name, distance):
    data = REAL[name]
    path = tmp_path / Path(name).name
    path.write_bytes(data)
    whole: dict[int, list[dict[str, float]]] = {}
    for observation in read(path).observations:
        whole.setdefault(observation.step, []).append(dict(observation.signals))
    for size in range(len(data) - 1, 0, -distance):
        path.write_bytes(data[:size])
        run = read_or_refused(path)
        # a console or document that ends early may be understood otherwise: names and steps may be others
        if isinstance(run, str) or run.format in ("mlflow", "notebook") or run.step_axis == "row number":
            continue
        for observation in run.observations:
            assert observation.step in whole, f"step {observation.step} in the first {size} bytes"
            known = whole[observation.step]
            for signal_name, value in observation.signals.items():
                if signal_name == "rewards/range" or signal_name.endswith("#n"):
                    continue  # bounds, which follow from all that was logged
                if any(signal_name in row for row in known):
                    assert value in [row.get(signal_name) for row in known], (size, observation.step, signal_name)


# ---------------------------------------------------------------------- binary containers, damaged inside


def event_records(data):
    at = 0
    while at + 12 <= len(data):
        size = struct.unpack_from("<Q", data, at)[0]
        yield data[at + 12 : at + 12 + size]
        at += size + 16


def crc32c(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def event_file(records):
    return b"".join(
        (size := struct.pack("<Q", len(record))) + crc32c(size) + record + crc32c(record) for record in records
    )


def wandb_records(data):
    at, record = 7, b""
    while at + 7 <= len(data):
        room = 32768 - at % 32768
        if room >= 7:
            _, size, kind = struct.unpack_from("<IHB", data, at)
        if room < 7 or kind == 0:
            at += room
            continue
        piece = data[at + 7 : at + 7 + size]
        record = piece if kind in (1, 2) else record + piece
        if kind in (1, 4):
            yield record
        at += 7 + size


def wandb_file(records):
    out = bytearray(b":W&B\xe1\xbe\x00")
    for record in records:
        first = True
        while True:
            room = 32768 - len(out) % 32768
            if room < 7:
                out += b"\0" * room
                room = 32768
            size = min(len(record), room - 7)
            last = size == len(record)
            kind = {(True, True): 1, (True, False): 2, (False, False): 3, (False, True): 4}[first, last]
            piece, record, first = record[:size], record[size:], False
            out += struct.pack("<IHB", zlib.crc32(piece, zlib.crc32(bytes([kind]))), size, kind) + piece
            if last:
                break
    return bytes(out)


def test_the_files_that_these_tests_build_are_those_that_were_written():
    for name, data in REAL.items():
        if "tfevents" in name:
            assert event_file(event_records(data)) == data
        if name.endswith(".wandb"):
            assert list(wandb_records(wandb_file(wandb_records(data)))) == list(wandb_records(data))


@pytest.mark.parametrize("kind", ["tfevents", ".wandb"])
@pytest.mark.parametrize("seeds", [range(25), pytest.param(range(25, 1500), marks=pytest.mark.slow)])
def test_records_with_right_checksums_and_wrong_bytes(tmp_path, kind, seeds):
    split, join = (event_records, event_file) if kind == "tfevents" else (wandb_records, wandb_file)
    sources = [list(split(data)) for name, data in REAL.items() if kind in name and not name.endswith(".gz")]
    for seed in seeds:
        rng = random.Random(seed)
        records = [damaged(rng, r) if rng.random() < 0.1 else r for r in rng.choice(sources)]
        if rng.random() < 0.2:
            rng.shuffle(records)
        path = tmp_path / ("events.out.tfevents.1.vm.1.0" if kind == "tfevents" else "run-x.wandb")
        path.write_bytes(join(records))
        read_or_refused(path)


ODD_CELLS = ["NULL", "'x'", "1e400", "-1", "9e99", "zeroblob(50)", "'1'", "9223372036854775807", "char(27)||'[31m'"]


@pytest.mark.parametrize("seeds", [range(15), pytest.param(range(15, 400), marks=pytest.mark.slow)])
def test_odd_databases(tmp_path, seeds):
    for seed in seeds:
        rng = random.Random(seed)
        path = tmp_path / f"{seed}.db"
        path.write_bytes(REAL["mlflow.db"])
        with contextlib.closing(sqlite3.connect(path)) as database:
            for _ in range(rng.choice([1, 3])):
                table = rng.choice(["metrics", "metrics", "runs", "params"])
                columns = [row[1] for row in database.execute(f"pragma table_info({table})")]
                change = f"{rng.choice(columns)} = {rng.choice(ODD_CELLS)} where rowid % {rng.choice([1, 2, 7])} = 0"
                with contextlib.suppress(sqlite3.Error):
                    database.execute(f"update {table} set {change}")
            if rng.random() < 0.2:
                database.execute(rng.choice(["drop table params", "drop table metrics", "delete from metrics"]))
            database.commit()
        read_or_refused(path)
    foreign = tmp_path / "foreign.db"
    with contextlib.closing(sqlite3.connect(foreign)) as database:
        database.execute("create table people (name text)")
        database.commit()
    assert "a database that is not MLflow's" in read_or_refused(foreign)
    with contextlib.closing(sqlite3.connect(foreign)) as database:  # a view that computes for ever
        endless = "with recursive n(i) as (select 1 union all select i + 1 from n) select i as run_uuid from n"
        for name in ("runs", "metrics", "params"):
            database.execute(f"create view {name} as {endless}")
        database.commit()
    assert "a database that is not MLflow's" in read_or_refused(foreign)
    assert commands_hold(foreign) == 2


@pytest.mark.parametrize("seeds", [range(10), pytest.param(range(10, 300), marks=pytest.mark.slow)])
def test_damaged_file_stores(tmp_path, seeds):
    for seed in seeds:
        rng = random.Random(seed)
        folder = tmp_path / f"{seed}"
        shutil.copytree(PEER / "mlflow" / "mlruns", folder / "mlruns")
        for path in sorted((folder / "mlruns").rglob("*")):
            if path.is_file() and rng.random() < 0.3:
                path.write_bytes(damaged(rng, path.read_bytes()))
        read_or_refused(rng.choice([folder, folder / "mlruns"]))


ODD = [
    *(None, True, -1, 0, 1.5, 1e300, math.nan, math.inf, 10**400, 2**63, "", "x" * 2000, "\x1b[31m", "\ud800"),
    *("nan", "1e5", "step", "null", "1,234", [], [1, [2]], [None], {}, {"a": {"b": 1}}, {"": None}),
]


def odd(rng, value, share):
    """A JSON value in which a share of the values and names is replaced by odd ones."""
    if rng.random() < share:
        return rng.choice(ODD)
    if isinstance(value, list):
        return [odd(rng, each, share) for each in value]
    if isinstance(value, dict):
        kept = [(name, each) for name, each in value.items() if rng.random() > share / 4]
        names = [name if rng.random() > share / 4 else str(rng.choice(ODD))[:50] for name, _ in kept]
        return {name: odd(rng, each, share) for name, (_, each) in zip(names, kept)}
    return value


SETTINGS = {
    "learning_rate": 1e-5,
    "per_device_train_batch_size": 4,
    "num_generations": 8,
    "beta": 0.1,
    "max_steps": 40,
    "logging_steps": 1,
    "gradient_accumulation_steps": 2,
    "num_iterations": 1,
    "epsilon": 0.2,
    "peft_type": "LORA",
    "loss_type": "grpo",
    "max_completion_length": 64,
    "lr_scheduler_type": "linear",
    "reward_weights": [1, 2],
    "steps_per_generation": 4,
    "generation_batch_size": 16,
}


@pytest.mark.parametrize("seeds", [range(30), pytest.param(range(30, 1200), marks=pytest.mark.slow)])
def test_odd_values_in_rows_and_in_settings_beside_them(tmp_path, seeds):
    rows = [{**row, "time": 1.7e9, "epoch": row["step"] / 9, "rank": row["step"] % 2, "x/y": 1.0} for row in ROWS]
    for seed in seeds:
        rng = random.Random(seed)
        folder = tmp_path / f"{seed}"
        folder.mkdir()
        share = rng.choice([0.01, 0.05, 0.3])
        made = [row for row in (odd(rng, row, share) for row in rows) if isinstance(row, dict)]
        if rng.random() < 0.5:
            path = folder / "trainer_state.json"
            plan = {name: odd(rng, value, 0.3) for name, value in (("max_steps", 40), ("logging_steps", 1))}
            path.write_text(json.dumps({**plan, "log_history": made}))
        else:
            path = folder / "log.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in made))
        for name in ("args.json", "config.yaml", "adapter_config.json"):
            if rng.random() < 0.3:
                (folder / name).write_text(json.dumps(odd(rng, SETTINGS, 0.2)))
        read_or_refused(path)
        if seed % 5 == 0:
            commands_hold(path)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recorded")
    with Recorder(folder, method="grpo", config={"learning_rate": 1e-4, "num_generations": 8}) as recorder:
        for step in range(60):
            loss = 0.5 - step / 200 if step < 40 else math.nan
            recorder.log({"loss": loss, "reward": 0.1, "grad_norm": 3.0 + step % 3, "kl": 0.01}, step=step)
    return folder / "outspoken"


@pytest.mark.parametrize("seeds", [range(12), pytest.param(range(12, 600), marks=pytest.mark.slow)])
def test_damaged_run_directories(tmp_path, recorded, seeds):
    for seed in seeds:
        rng = random.Random(seed)
        folder = tmp_path / f"{seed}"
        shutil.copytree(recorded, folder / "outspoken")
        for path in sorted((folder / "outspoken").glob("*.json*")):
            if rng.random() < 0.5:
                continue
            if rng.random() < 0.4:
                path.write_bytes(damaged(rng, path.read_bytes()))
                continue
            lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
            share = rng.choice([0.01, 0.05, 0.2])
            path.write_text("".join(json.dumps(odd(rng, json.loads(line), share)) + "\n" for line in lines))
        read_or_refused(folder)
        commands_hold(rng.choice([folder, folder / "outspoken", folder / "outspoken" / "metrics.jsonl"]))


@pytest.mark.parametrize("seeds", [range(40), pytest.param(range(40, 1500), marks=pytest.mark.slow)])
def test_a_followed_log_that_is_cut_replaced_or_taken_away(tmp_path, seeds):
    names = list(REAL)
    for seed in seeds:
        rng = random.Random(seed)
        data = REAL[name := rng.choice(names)]
        path = tmp_path / f"{seed}" / Path(name).name
        path.parent.mkdir()
        follower, size = Follower(path if rng.random() < 0.8 else path.parent), 0
        for look in range(6):
            if path.is_dir():
                path.rmdir()
            match rng.choice(["grow", "grow", "cut", "damage", "other", "gone", "folder", "twice"]):
                case "grow":
                    size = min(len(data), size + rng.randrange(len(data) // 3 + 1))
                    path.write_bytes(data[:size])
                case "cut":
                    size = rng.randrange(size + 1)
                    path.write_bytes(data[:size])
                case "damage":
                    path.write_bytes(damaged(rng, data[:size]))
                case "other":
                    path.write_bytes(REAL[rng.choice(names)])
                case "twice":
                    path.write_bytes(data + data)
                case "gone":
                    path.unlink(missing_ok=True)
                case "folder":
                    path.unlink(missing_ok=True)
                    path.mkdir()
            try:
                follower.look(last=look == 5)
            except UnreadableLog as error:
                assert "\n" not in str(error)


# ---------------------------------------------------------------------- files of another kind than they seem

UTF16_ROWS = JSONL.encode("utf-16")
TAR = b"log.jsonl".ljust(257, b"\0") + b"ustar  \0" + b"\0" * 247 + JSONL.encode()

REFUSED = {
    "zip": (b"PK\x03\x04" + bytes(range(256)), "zip archive"),
    "pickle of protocol 4": (b"\x80\x04\x95" + bytes(range(256)), "pickle .* never opened"),
    "pickle of protocol 0": (b"(dp0\nVloss\np1\nF0.5\ns.", "no column of numbers"),
    "parquet": (b"PAR1" + bytes(range(256)), "Parquet"),
    "arrow": (b"ARROW1\0\0" + bytes(range(256)), "Arrow"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(range(256)), "HDF5"),
    "gguf": (b"GGUF\x03\0\0\0" + bytes(range(256)), "model weights"),
    "safetensors": (struct.pack("<Q", 80) + b'{"a":{"dtype":"F32"}}'.ljust(80) + b"\0" * 8, "binary"),
    "numpy": (b"\x93NUMPY\x01\0v\0{'descr': '<f8'}\n" + bytes(64), "binary"),
    "png": (b"\x89PNG\r\n\x1a\n" + bytes(range(256)), "image"),
    "jpeg": (b"\xff\xd8\xff\xe0" + bytes(range(256)), "image"),
    "pdf": (b"%PDF-1.4\n%\xe2\xe3\xcf\xd3\n1 0 obj\nendobj\n", "PDF"),
    "tar": (TAR, "tar archive"),
    "tar.gz": (gzip.compress(TAR), "tar archive"),
    "xz": (b"\xfd7zXZ\0" + bytes(range(256)), "unpack it first"),
    "zstandard": (b"\x28\xb5\x2f\xfd" + bytes(range(256)), "unpack it first"),
    "bzip2": (b"BZh91AY&SY" + bytes(range(256)), "unpack it first"),
    "7z": (b"7z\xbc\xaf\x27\x1c" + bytes(range(256)), "unpack it first"),
    "gzip of gzip": (gzip.compress(gzip.compress(JSONL.encode())), "compressed twice"),
    "gzip of nothing": (b"\x1f\x8b" + bytes(range(256)), "damaged gzip"),
    "database in gzip": (gzip.compress(REAL["mlflow.db"]), "unpack it first"),
    "W&B in gzip": (
        REAL["wandb/v0_31/long/wandb/offline-run-20261122_133116-long/run-long.wandb.gz"],
        "unpack it first",
    ),
    "UTF-32": (JSONL.encode("utf-32"), "UTF-32"),
    "UTF-16 without its mark": (JSONL.encode("utf-16-le"), "binary"),
    "latin-1": (CSV.replace("kl", "k\xe9").encode("latin-1"), "line 1 is not UTF-8"),
    "carriage returns only": (JSONL.replace("\n", "\r").encode(), "line 1"),
    "one line of 12 MB": (b'{"loss": "' + b"x" * 12_000_000, "line 1 "),
    "CSV with a line of 12 MB": (b"step,loss\n1," + b"9" * 12_000_000, "line 2 is longer than 10 MiB"),
    "value of 50 MB": (b'{"log_history": [{"loss": "' + b"x" * 50_000_000 + b'"}]}', "longer than 10 MiB"),
    "100,000 lists within lists": (b'{"log_history": [{"x": ' + b"[" * 100_000, "nested too deeply"),
    "40,000 columns": ((",".join(f"c{i}" for i in range(40_000)) + "\n" + "1," * 40_000).encode(), "20000 columns"),
    "40,000 columns of one name": ((",".join(["c"] * 40_000) + "\n" + "1," * 40_000).encode(), "20000 columns"),
    "a row of 40,000 cells": (b"step,loss\n1,2\n" + b"1," * 40_000 + b"1\n", "20000 columns"),
    "a row of 30,000 names": (
        json.dumps({"x": 1} | {f"n{i}": 1 for i in range(30_000)}).encode() + b"\n{}\n",
        "20000",
    ),
    "new names in every row": (
        "".join(json.dumps({f"n{s}_{i}": i for i in range(500)}) + "\n" for s in range(60)).encode(),
        "more than 20000 names",
    ),
    "names of 100 kB": (
        b"".join(b'{"step":%d,"%s%d":1}\n' % (i, b"n" * 100_000, i) for i in range(120)),
        "names of millions of characters",
    ),
    "an object of 30,000 numbers": (
        b'{"a": {},\n' + b",".join(b'"k%d":0' % i for i in range(30_000)) + b"}",
        "20000 names",
    ),
    "a cell over all lines": (b'step,loss\n1,"' + b'""\n' * 200_000, "line 65538 is not CSV"),
    "commas for decimal points": (b"step,loss,lr\n1,0,5,0,001\n2,0,4,0,001\n", "a comma stands for the decimal point"),
    "row names without a header": (b"step\tloss\na\t1\t0.5\nb\t2\t0.4\n", "more cells than the header"),
    "two formats": ((JSONL + CSV).encode(), "line 31 is not a JSON object, nor are 30 other lines"),
    "NUL bytes": (b"\0" * 100_000, "is empty"),
    "tags": (b"<table>" * 100_000, "neither JSON nor a CSV header"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_log_is_named(write, case):
    data, expected = REFUSED[case]
    for name in ("log.jsonl", "metrics.csv") if len(data) < 100_000 else ("log.jsonl",):
        assert re.search(expected, read_or_refused(write(data, name)))


@pytest.mark.parametrize("case", [case for case, (data, _) in REFUSED.items() if len(data) < 10_000])
def test_what_is_no_log_ends_the_commands_with_2(write, case):
    assert commands_hold(write(REFUSED[case][0])) == 2


WRONG_EXTENSIONS = {
    "state.csv": (STATE, "trainer_state"),
    "rows.csv": (JSONL, "jsonl"),
    "table.json": (CSV, "csv"),
    "table.jsonl": (CSV, "csv"),
    "plain.jsonl.gz": (JSONL, "jsonl"),
    "console.json": (CONSOLE, "console"),
    "events.jsonl": (REAL[next(name for name in REAL if name.startswith("tensorboard/plain/"))], "tensorboard"),
    "wandb.jsonl": (REAL[next(name for name in REAL if name.startswith("wandb/v0_31/plain/"))], "wandb"),
    "store.csv": (REAL["mlflow.db"], "mlflow"),
    "notebook.txt": (REAL["transformers/table.ipynb"], "notebook"),
    "utf16.csv": (CSV.encode("utf-16"), "csv"),
    "utf16be.csv": (b"\xfe\xff" + CSV.encode("utf-16-be"), "csv"),
    "dos.csv": (CSV.replace("\n", "\r\n"), "csv"),
    "marked.jsonl": ("\ufeff" + JSONL, "jsonl"),
}


@pytest.mark.parametrize("name", WRONG_EXTENSIONS)
def test_a_wrong_extension_does_not_matter(write, name):
    content, format = WRONG_EXTENSIONS[name]
    run = read_or_refused(write(content, name))
    assert run.format == format
    if isinstance(content, str) and format != "console":
        assert steps(run) == list(range(1, 31)) and values(run, "kl") == [0.001 * i for i in range(1, 31)]


def test_a_name_of_event_files_on_something_else(write):
    assert "is no TensorBoard event file" in read_or_refused(write(JSONL, "events.out.tfevents.1.x"))


# ---------------------------------------------------------------------- what is no file

READ = re.compile(r"no regular file|no such file|cannot be|directory|no log|is empty|not known|no name")


def test_pipes_devices_sockets_and_links(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    os.symlink("loop", tmp_path / "loop")
    os.symlink("gone", tmp_path / "dangling")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        for path in (
            *(tmp_path / name for name in ("pipe", "loop", "dangling", "socket", "nowhere", "loop/x", "a" * 300)),
            *(Path("/dev/zero"), Path("/dev/null"), Path("/dev/urandom")),
        ):
            assert READ.search(read_or_refused(path)), path
            assert commands_hold(path) == 2
    assert "no regular file" in read_or_refused(tmp_path / "pipe")
    assert "no regular file" in read_or_refused(Path("/dev/zero"))
    with pytest.raises(UnreadableLog, match="no name of a file"):
        read("a\0b")


def test_a_file_that_may_not_be_read(write, monkeypatch):
    path = write(JSONL)
    before = Path.open

    def refuse(self, *args, **kwargs):
        if self == path:
            raise PermissionError(13, "Permission denied")
        return before(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)
    assert "cannot be opened (Permission denied)" in read_or_refused(path)
    assert commands_hold(path) == 2


def test_a_path_that_may_not_be_looked_at(write, monkeypatch):
    path = write(JSONL)

    def refuse(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "is_dir", refuse)
    assert "cannot be read (Permission denied)" in read_or_refused(path)
    assert outspoken("diagnose", path)[0] == 2


@pytest.mark.parametrize(
    "name",
    "trainer_state.json metrics.jsonl log.jsonl x.tfevents.1 run.wandb mlflow.db mlruns metrics.csv wandb run.json "
    "outspoken".split(),
)
def test_directories_whose_log_is_no_file(tmp_path, name):
    for kind in ("folder", "pipe", "device", "loop", "empty", "noise"):
        folder = tmp_path / kind
        folder.mkdir()
        if kind == "folder":
            (folder / name).mkdir()
        elif kind == "pipe":
            os.mkfifo(folder / name)
        elif kind == "device":
            os.symlink("/dev/zero", folder / name)
        elif kind == "loop":
            os.symlink(name, folder / name)
        else:
            (folder / name).write_bytes(b"" if kind == "empty" else random.Random(0).randbytes(3000))
        assert isinstance(read_or_refused(folder), str), kind
    assert commands_hold(tmp_path / "pipe") == commands_hold(tmp_path / "device") == 2


@pytest.mark.parametrize("name", ["run.json", "verdict.json", "metrics.jsonl", "diagnostics.jsonl", "changes.jsonl"])
def test_run_directories_whose_files_are_no_files(tmp_path, recorded, name):
    for kind in ("folder", "pipe", "device"):
        folder = tmp_path / kind
        shutil.copytree(recorded, folder)
        (folder / name).unlink()
        if kind == "folder":
            (folder / name).mkdir()
        elif kind == "pipe":
            os.mkfifo(folder / name)
        else:
            os.symlink("/dev/zero", folder / name)
        read_or_refused(folder)
        commands_hold(folder)


def test_a_large_directory_and_links_that_go_round(tmp_path):
    for i in range(5000):
        (tmp_path / f"{i}.bin").touch()
    os.symlink(".", tmp_path / "here")
    os.symlink("..", tmp_path / "up")
    assert "no log of a usual name" in read_or_refused(tmp_path)
    (tmp_path / "log.jsonl").write_text(JSONL)
    assert steps(read_or_refused(tmp_path)) == list(range(1, 31))


# ---------------------------------------------------------------------- settings beside a log

BOMBS = {
    "lists": "a: &a [x,x,x,x,x,x,x,x,x,x]\n"
    + "".join(f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 10)}]\n" for i in range(12)),
    "objects": "a: &a {x: 1, y: 2}\n"
    + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} {{{','.join(f'k{j}: *' + chr(97 + i) for j in range(10))}}}\n"
        for i in range(12)
    ),
    "merged": "a: &a {x: 1}\n"
    + "".join(f"{chr(98 + i)}: &{chr(98 + i)} {{<<: [{','.join(['*' + chr(97 + i)] * 10)}]}}\n" for i in range(12)),
    "itself": "learning_rate: 1.0e-5\na: &a\n  b: *a\n",
    "deep": "learning_rate: 1.0\nx: " + "[" * 400,
    "tag": "learning_rate: !!python/object/apply:os.mkdir ['PLACE']\n",
    "digits": "learning_rate: " + "9" * 6000,
    "sixties": "learning_rate: 1" + ":1" * 5_000,
    "date": "learning_rate: 2001-99-99\n",
    "keys": "? [1, 2]\n: 3\nlearning_rate: 1\n",
    "json": '{"learning_rate": 1e-5, "x": ' + "[" * 980 + "]" * 980 + "}",
    "integers": '{"learning_rate": 1e-5, "max_steps": ' + "9" * 400 + ', "num_generations": ' + "9" * 400 + "}",
    "escapes": '{"learning_rate": "\\u001b[31m", "\\u001b[31mlr": 1, "optim": "\\u001b[2J\\ud800"}',
}


@pytest.mark.parametrize("name", ["config.yaml", "args.json", ".hydra/config.yaml", ".hydra/overrides.yaml"])
@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_beside_a_log(write, tmp_path, bomb, name):
    write(BOMBS[bomb].replace("PLACE", str(tmp_path / "executed")), name)
    run = read_or_refused(write(JSONL))
    assert steps(run) == list(range(1, 31)) and not (tmp_path / "executed").exists()
    assert run.total_steps is None or run.total_steps < 2**53


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_as_the_given_configuration(write, tmp_path, bomb):
    config = write(BOMBS[bomb].replace("PLACE", str(tmp_path / "executed")), "given.yaml")
    commands_hold(write(JSONL), "--config", config)
    assert not (tmp_path / "executed").exists()


# ---------------------------------------------------------------------- names and values

NAMES = {
    "empty": "",
    "long": "n" * 150_000,
    "escape": "\x1b[31mred\x1b]0;title\x07",
    "control": "a\0b\rc\nd\x85\u202e",
    "python": "__class__",
    "surrogate": "\ud800",
    "train/": "train/" * 2000 + "loss",
    "eval_": "eval_" * 3000 + "loss",
    "eval/": "eval/" * 3000 + "loss",
    "rewards/": "rewards/" * 1000 + "x",
    "dashes": " - " * 50_000 + "a",
    "markup": "{0.__class__}%s[bold]x[/bold]",
    "spaces": " " * 1000,
}


@pytest.mark.parametrize("case", NAMES)
@pytest.mark.parametrize("form", ["name", "name of text", "value", "state", "own"])
def test_names_and_texts_of_any_kind(write, case, form):
    """They do not disturb what stands beside them, and nothing of them reaches a terminal unescaped."""
    name = NAMES[case]
    if form == "own":
        rows = [
            {
                "schema": "outspoken.observation/1",
                "step": i,
                "signals": {"kl": 0.001 * i, name: 1.5},
                "nonfinite": {name + "x": "nan"},
                "unreadable": {name + "y": name},
            }
            for i in range(1, 31 if len(name) < 100_000 else 4)
        ]
    else:
        cell = {"name": {name: 1.5}, "name of text": {name: "x\x1b[2Jy"}, "state": {name: 1}, "value": {"loss": name}}
        rows = [{**row, **cell[form]} for row in (ROWS if len(name) < 100_000 else ROWS[:3])]
    if form == "state":
        path = write(json.dumps({"log_history": rows, name: name}), "trainer_state.json")
    else:
        path = write("".join(json.dumps(row) + "\n" for row in rows))
    run = read_or_refused(path)
    assert values(run, "kl") == [0.001 * (i + 1) for i in range(len(rows))]
    if form == "name" and case in ("python", "markup", "escape"):
        assert values(run, name) == [1.5] * 30
    if form == "value" and case in ("python", "train/"):
        assert values(run, "loss") == [None] * 30 and run.account.unreadable == 30
    if len(name) < 100_000 and form != "state":
        commands_hold(path)


def test_two_long_names_that_begin_alike_stay_apart(write):
    rows = [{"step": i, "loss": 0.5, "x" * 600 + "a": 1.0, "x" * 600 + "b": 2.0} for i in range(1, 6)]
    run = read_or_refused(write("".join(json.dumps(row) + "\n" for row in rows)))
    first, second = (name for name in run.signals if name.startswith("xxx"))
    assert values(run, first) == [1.0] * 5 and values(run, second) == [2.0] * 5
    assert "2 names longer than 500 characters were cut." in run.notes


STEPS = ['"a"', "[1]", "true", "-5", "1e300", "NaN", "null", "{}", '""', "9007199254740993", "9" * 400]


@pytest.mark.parametrize("step", STEPS)
def test_a_step_that_is_none(write, step):
    rows = [f'{{"step": {step}, "loss": {1 - i / 100}, "grad_norm": {i + 0.5}}}\n' for i in range(20)]
    run = read_or_refused(write("".join(rows)))
    assert run.step_axis == "row number" and steps(run) == list(range(1, 21))
    assert values(run, "loss") == [1 - i / 100 for i in range(20)]


@pytest.mark.parametrize("value", STEPS)
def test_clocks_and_plans_that_are_none(write, value):
    rows = "".join(
        f'{{"step": {i}, "time": {value}, "epoch": {value}, "total_steps": {value}, "loss": {1 - i / 100}}}\n'
        for i in range(20)
    )
    path = write(rows)
    run = read_or_refused(path)
    assert steps(run) == list(range(20)) and (run.total_steps is None or 0 < run.total_steps < 2**53)
    commands_hold(path)
    state = json.dumps({"log_history": ROWS})
    path = write(f'{{"max_steps": {value}, "logging_steps": {value}, {state[1:]}', "trainer_state.json")
    assert steps(read_or_refused(path)) == list(range(1, 31))
    commands_hold(path)
    observation = f'{{"schema": "outspoken.observation/1", "time": {value}, "epoch": {value}, "segment": {value}, '
    observation += f'"nonfinite": {value}, "unreadable": {value}, "signals": {{"loss": {value}, "kl": 0.5}}, "step": '
    path = write("".join(f"{observation}{i}}}\n" for i in range(5)))
    assert values(read_or_refused(path), "kl") == [0.5] * 5
    commands_hold(path)
    commands_hold(write("".join(f"{observation}{value}}}\n" for _ in range(5))))


def test_numbers_beyond_any_float(write):
    path = write(
        '{"step": 1, "loss": 1e400, "reward": -1e400}\n{"step": 2, "loss": 1e-400, "kl": ' + "1" * 5000 + "}\n"
    )
    first, second = read_or_refused(path).observations
    assert first.nonfinite == {"loss": "inf", "reward": "-inf"} and not first.signals
    assert second.signals == {"loss": 0.0} and second.nonfinite == {"kl": "inf"}


CELLS = ["1,234", "0,5", "12%", "3.2 GiB", "0x10", "N/A", "-", "None", "True", "1.2.3", "5 s", "1e", "−3"]


@pytest.mark.parametrize("cell", CELLS)
def test_a_text_that_is_no_plain_number_is_told_and_not_guessed(write, cell):
    table = f'step,loss,grad_norm\n1,"{cell}",0.5\n2,0.25,0.5\n'
    lines = json.dumps({"step": 1, "loss": cell, "grad_norm": 0.5}) + '\n{"step": 2, "loss": 0.25, "grad_norm": 0.5}\n'
    for content in (table, lines, f'step;loss;grad_norm\n1;"{cell}";0.5\n2;0.25;0.5\n'):
        run = read_or_refused(write(content))
        assert values(run, "loss") == [None, 0.25] and values(run, "grad_norm") == [0.5, 0.5]
        assert run.account.unreadable == 1 and run.observations[0].unreadable == {"loss": repr(cell)}
        assert any("no number" in note for note in run.notes)


def test_decimal_commas_between_semicolons_are_told(write):
    run = read_or_refused(write("step;loss;lr\n1;0,5;0.1\n2;0,4;0.1\n"))
    assert values(run, "loss") == [None, None] and run.account.unreadable == 2
    assert [o.unreadable for o in run.observations] == [{"loss": "'0,5'"}, {"loss": "'0,4'"}]


# ---------------------------------------------------------------------- JSON


def test_a_value_nested_too_deeply_costs_its_line_only(write):
    lines = [
        '{"step": 1, "loss": 0.5}',
        '{"step": 2, "x": ' + "[" * 500 + "]" * 500 + "}",
        '{"step": 3, "loss": 0.25}',
    ]
    run = read_or_refused(write("\n".join(lines) + "\n"))
    assert values(run, "loss") == [0.5, 0.25] and "1 line could not be parsed and was skipped: 2." in run.notes
    document = '{"log_history": [{"step": 1, "loss": 0.5},\n{"step": 2, "x": ' + "[" * 500 + "]" * 500 + "}]}"
    assert "line 2 begins a value that is nested too deeply" in read_or_refused(write(document))


def test_a_list_of_rows_that_stands_twice(write):
    first, second = json.dumps(ROWS[:2]), json.dumps(ROWS[2:4])
    run = read_or_refused(write(f'{{"log_history": {first}, "log_history": {second}}}'))
    assert steps(run) == [1, 2, 3, 4]
    assert any("stands 2 times in the document" in note for note in run.notes)


def test_what_stands_beside_the_rows_does_not_matter(write):
    beside = {
        "a": [1] * 300_000,
        "b": ["x"] * 1000,
        "c": "y" * 10_000_000,
        "d": [{"e": [1, 2]}, 3],
        "f": [[1, 2], [3]],
    }
    text = json.dumps({**beside, "log_history": ROWS})[:-1] + " " * 3_000_000 + "}"
    assert steps(read_or_refused(write(text))) == list(range(1, 31))


@pytest.mark.parametrize(
    "numbers", [[1, 2], [0.5, float("nan")], ["a", None], [True, -1e-300], [1, {}], [1, [2, 3], 4]]
)
def test_lists_of_plain_values_are_read_as_they_stand(write, numbers):
    """Long runs of them are taken at once: between numbers, words and commas of any spacing."""
    many = [*range(500), *numbers, *([0.25, None, True] * 100), *numbers]
    for text in (json.dumps(many), json.dumps(many, indent=1), json.dumps(many, separators=(",", ":"))):
        run = read_or_refused(write(f'{{"skip": {text},\n"log_history": {json.dumps(ROWS)}}}'))
        assert steps(run) == list(range(1, 31))
    lists = json.dumps({"step": list(range(500)), "loss": [i / 8 for i in range(500)]}, indent=1)
    assert values(read_or_refused(write(lists)), "loss") == [i / 8 for i in range(500)]


@pytest.mark.parametrize("broken", ["[1, 2,, 3]", "[1, 2, 3,]", "[1, 2 3]", "[1, --2, 3]", "[1, 2, x, 3]"])
def test_a_broken_list_of_numbers_is_refused(write, broken):
    text = f'{{"global_step": 3,\n"a": {broken},\n"log_history": {json.dumps(ROWS)}}}'
    assert "line 2 is not valid JSON" in read_or_refused(write(text))


# ---------------------------------------------------------------------- CSV


def test_a_header_that_stands_again_holds_for_what_follows(write):
    run = read_or_refused(write("step,loss\n1,0.5\n2,0.4\nstep,reward,loss\n3,0.1,0.3\n4,0.2,0.2\n", "log.csv"))
    assert values(run, "loss") == [0.5, 0.4, 0.3, 0.2] and values(run, "reward") == [None, None, 0.1, 0.2]
    assert any("The header stands again, 1 time (at line 4)" in note for note in run.notes)
    run = read_or_refused(write(CSV + CSV.replace("\n1,", "\n31,"), "log.csv"))
    assert any("at line 32" in note for note in run.notes) and run.account.unreadable == 0


def test_lines_of_words_among_rows_of_numbers_are_skipped(write):
    run = read_or_refused(write("step,loss\n1,0.5\nsaving, now\n2,0.4\nbye,now,dear,log\n", "log.csv"))
    assert values(run, "loss") == [0.5, 0.4] and "2 lines without a number were skipped: 3, 5." in run.notes


def test_a_delimiter_at_the_end_of_each_line_is_no_cell(write):
    run = read_or_refused(write("step,loss\n1,0.5,\n2,0.4, \n", "log.csv"))
    assert values(run, "loss") == [0.5, 0.4] and run.signals == ["loss"]


def test_a_quote_that_is_not_closed(write):
    run = read_or_refused(write('step,loss,kl\n1,0.5,0.1\n2,"0.4\n3,0.3,0.1\n4,0.2,0.1\n', "log.csv"))
    assert values(run, "loss") == [0.5, None] and any("went over several lines" in note for note in run.notes)


def test_the_last_cell_of_a_table_without_an_end_may_be_cut(write):
    run = read_or_refused(write("step,loss,lr\n1,0.5,1e-05\n2,0.4,1e-0", "log.csv"))
    assert values(run, "loss") == [0.5, 0.4] and values(run, "learning_rate") == [1e-5, None]
    assert any("'1e-0', may be cut and was left out" in note for note in run.notes)


# ---------------------------------------------------------------------- mixed logs


def test_rows_between_other_text(write):
    run = read_or_refused(write(CONSOLE.replace("\n", "\nsome text, 1: 2\n") + JSONL, "train.log"))
    assert run.format == "console" and values(run, "kl")[-30:] == [0.001 * i for i in range(1, 31)]
    run = read_or_refused(write(JSONL + "Training done.\n" * 10))
    assert run.format == "jsonl" and steps(run) == list(range(1, 31))
    assert any("10 lines could not be parsed and were skipped: 31, 32" in note for note in run.notes)


def test_two_runs_in_one_file(write):
    second = [{**row, "loss": row["loss"] / 2} for row in ROWS[:10]]
    run = read_or_refused(write(JSONL + "".join(json.dumps(row) + "\n" for row in second)))
    assert [(s.first, s.step) for s in run.segments] == [(0, 1), (30, 1)]
    assert values(run, "loss") == [row["loss"] for row in (*ROWS, *second)]


def test_two_ranks_in_one_file(write):
    rows = [{"step": i, "rank": rank, "loss": i / 8 + rank / 100} for i in range(20) for rank in (0, 1)]
    run = read_or_refused(write("".join(json.dumps(row) + "\n" for row in rows)))
    assert steps(run) == list(range(20)) and values(run, "loss") == [i / 8 for i in range(20)]
    assert run.account.other_process == 3 * 20


def test_rows_of_which_each_has_some_names(write):
    rows = [{"step": i, ("loss" if i % 2 else "kl"): i / 8} for i in range(20)]
    run = read_or_refused(write("".join(json.dumps(row) + "\n" for row in rows)))
    assert values(run, "loss") == [i / 8 if i % 2 else None for i in range(20)]
    assert values(run, "kl") == [None if i % 2 else i / 8 for i in range(20)]


# ---------------------------------------------------------------------- consoles

LOOPS = {
    "verl": "step:1 - a:1 - ",
    "openrlhf": "Global step 1: {'a': ",
    "pipeline_rl": "Completed steps 1: {'a': ",
    "prime_rl": "Step 1 | Loss: 1.0 | ",
    "torchtune": "Step 1 | loss:1.0 ",
    "dict": "{'loss': 0.5, ",
    "list": "{'loss': [",
    "bar": " 1/2 [00:10<03:00, loss=0.53]",
    "open bar": " 1/2 [aaa, ",
    "escapes": "\x1b[",
    "title": "\x1b]",
    "pairs": "step 1 loss 2 ",
    "quotes": "{'",
    "braces": "{'a': {'b': {'c': ",
    "call": "{'loss': np.float64(",
    "backslashes": "{'\\\\",
    "prefix": "(pid=1) ",
    "tables": "| Step | Loss ",
}


@pytest.mark.parametrize("form", LOOPS)
@pytest.mark.parametrize("size", [400_000, pytest.param(9_000_000, marks=pytest.mark.slow)])
def test_a_line_that_repeats_a_form(write, form, size):
    """What takes the square of the length of a line would not end here."""
    unit = LOOPS[form]
    read_or_refused(write(CONSOLE + unit * (size // len(unit)) + "\n" + CONSOLE, "train.log"))


def test_two_steps_on_one_line_of_verl(write):
    line = "step:{} - actor/pg_loss:{} - critic/score/mean:0.5"
    text = "".join(line.format(i, i / 8) + " " + line.format(i + 1, (i + 1) / 8) + "\n" for i in range(0, 20, 2))
    run = read_or_refused(write(text, "train.log"))
    assert steps(run) == list(range(20)) and values(run, "policy_loss") in (
        [i / 8 for i in range(20)],
        [None] * 20,
    )


def test_pages_of_many_tags(write):
    table = "<table><tr><th>Step</th><th>Training Loss</th></tr><tr><td>10</td><td>0.5</td></tr></table>"
    for unit in ("<", "<a x='", "<!--", "<![CDATA[", "<?", "</", "&#", "<td>", "<table>", "<script>", "<a/"):
        outputs = [{"data": {"text/html": table + unit * 50_000}}]
        book = {"nbformat": 4, "metadata": {}, "cells": [{"cell_type": "code", "outputs": outputs}]}
        run = read_or_refused(write(json.dumps(book), "table.ipynb"))
        assert isinstance(run, str) or values(run, "loss") == [0.5]


# ---------------------------------------------------------------------- memory

LIMITED = textwrap.dedent(
    """
    import resource, sys
    from outspoken.diagnostics.sources import UnreadableLog, read
    now = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize")) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (now + int(sys.argv[2]) * 2**20,) * 2)
    try:
        run = read(sys.argv[1])
        print(run.format, sum(1 for _ in run.observations))
    except UnreadableLog as error:
        print(error)
    """
)


def packed(path, pieces):
    with gzip.open(path, "wb", compresslevel=1) as file:
        for piece in pieces:
            file.write(piece)
    return path


def with_text(count):
    return ({"step": i, "loss": 1 / (i + 1), "text": "x" * 3000} for i in range(count))


def lines(rows):
    return (json.dumps(row).encode() + b"\n" for row in rows)


# what it unpacks to; its size in MB; what `read` says
UNPACKED = {
    "zeros": (lambda n: [b"\0" * 2**20] * n, 200, "is empty"),
    "one line": (lambda n: [b'{"a": "', *[b"x" * 2**20] * n], 200, "longer than"),
}
UNPACKED_SLOW = {
    "a list of numbers": (lambda n: [b'{"a": [0', *[b",0" * 2**19] * n, b"]}"], 10, "2000000 numbers"),
    "a value beside the rows": (
        lambda n: [b'{"log_history": [{"step": 1, "loss": 0.5}], "x": "', *[b"x" * 2**20] * n, b'"}'],
        200,
        "longer than",
    ),
    "an open quote": (lambda n: [b'step,loss\n1,"', *[b"x\n" * 2**19] * n], 200, "not CSV"),
    "a notebook": (lambda n: [b'{"cells": [{"cell_type": "code", "x": "', *[b"x" * 2**20] * n], 200, "more than 128"),
    "1 GB of zeros": (lambda n: [b"\0" * 2**20] * n, 1000, "is empty"),
    "rows with long texts": (lambda n: lines(with_text(n * 300)), 600, "jsonl 180000"),
    "a document with long texts": (
        lambda n: [b'{"log_history": [', b",".join(lines(with_text(n * 300))), b"]}"],
        300,
        "trainer_state 90000",
    ),
    "rows with long lists": (
        lambda n: (b'{"step":%d,"loss":0.5,"x":[%s0]}\n' % (i, b"0," * 50_000) for i in range(n * 10)),
        100,
        "jsonl 1000",
    ),
    "records of many signals": (
        lambda n: lines(
            {"schema": "outspoken.observation/1", "step": i, "signals": {f"s{j}": i * 0.1 for j in range(200)}}
            for i in range(n * 250)
        ),
        200,
        "run_directory 50000",
    ),
    "a console that never ends its line": (
        lambda n: [b"{'loss': 0.5, 'epoch': 1}\n" * 5, *[b"\rx" * 2**19] * n],
        100,
        "console 5",
    ),
}


@pytest.mark.parametrize("case", [*UNPACKED, *(pytest.param(case, marks=pytest.mark.slow) for case in UNPACKED_SLOW)])
def test_memory_stays_bounded(tmp_path, case):
    make, size, expected = (UNPACKED | UNPACKED_SLOW)[case]
    path = packed(tmp_path / "log.gz", make(size))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, path, "600"], capture_output=True, text=True, env=environment
    )
    assert expected in done.stdout and done.returncode == 0, done.stderr[-500:]


# ---------------------------------------------------------------------- what people see


def test_nothing_of_a_run_directory_reaches_a_terminal_unescaped(tmp_path, recorded):
    shutil.copytree(recorded, tmp_path / "run")
    hostile = "\x1b[31m\u202ex\n\ud800"
    for name in ("run.json", "verdict.json"):
        record = json.loads((tmp_path / "run" / name).read_text())
        for key, value in record.items():
            if isinstance(value, str) and key not in ("schema",):
                record[key] = hostile
        (tmp_path / "run" / name).write_text(json.dumps(record))
    path = tmp_path / "run" / "diagnostics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert records
    for record in records:
        for key in ("severity", "code", "name", "message", "advice", "step"):
            record[key] = hostile
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    commands_hold(tmp_path / "run")
    assert "\\x1b[31m" in outspoken("diagnose", tmp_path / "run")[1]


def test_the_name_of_a_file_is_escaped(tmp_path):
    path = tmp_path / os.fsdecode(b"caf\xe9\x1b[31m\n.jsonl")
    path.write_text(JSONL)
    assert commands_hold(path) in (0, 1)
    path.write_text("")
    assert commands_hold(path) == 2


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(text=st.text(max_size=200))
@example("step,loss\n1,2\n3")
@example('{"step": 1}\n{"loss": "\\ud800"}')
def test_any_text_ends_the_commands_well(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("any") / "any.log"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    commands_hold(path)
