"""TensorBoard, W&B and MLflow: what their own libraries wrote is read back, whole and nothing else.

The files in `peer_logs/{tensorboard,wandb,mlflow}` were written by the scripts `peer_logs/make_*.py`; the expected
numbers follow from the arithmetic there: the loss is 2 / (1 + step), the gradient norm step / 8.
"""

import gzip
import json
import math
import random
import shutil
import sqlite3
import struct
import tracemalloc
import zlib
from itertools import pairwise
from pathlib import Path

import pytest

from outspoken.diagnostics.sources import mlflow_files, tensorboard, wandb_files
from outspoken.diagnostics.sources.files import UnreadableLog
from outspoken.diagnostics.sources.measurements import survey, to_rows

LOGS = Path(__file__).parent / "peer_logs"
BOARD, WANDB, MLFLOW = LOGS / "tensorboard", LOGS / "wandb", LOGS / "mlflow"


def loss(step):
    return 2 / (1 + step)


def same(a, b):
    return a == b or (a != a and b != b)


def only(folder, pattern):
    [found] = folder.rglob(pattern)
    return found


def without(row, *names):
    return {name: value for name, value in row.items() if name not in names}


# ---------------------------------------------------------------------- TensorBoard


def board(*paths):
    notes = []
    return list(tensorboard.rows(paths, notes)), notes


def single(value):
    """The nearest 32-bit float, which is what a plain scalar is kept as."""
    return struct.unpack("<f", struct.pack("<f", value))[0]


def test_tensorboard_rows_are_the_steps_that_were_logged():
    rows, notes = board(BOARD / "plain")
    assert [row["step"] for row in rows] == list(range(50))
    for step, row in enumerate(rows):
        expected = {7: math.nan, 8: math.inf, 9: -math.inf}.get(step, loss(step))
        assert same(single(row["train/loss"]), single(expected))
        assert row["train/grad_norm"] == step / 8
        assert ("eval/loss" in row) == (step % 10 == 0)
        if step % 10 == 0:
            assert single(row["eval/loss"]) == single(loss(step) + 0.5)
    times = [row["time"] for row in rows]
    assert times == sorted(times) and 1.7e9 < times[0] < 1.9e9 and times[-1] - times[0] < 60
    assert notes == ["Values that are no scalars were not read: histograms (1), images (1), texts (1)."]


def test_short_decimals_come_back_as_they_were_logged():
    rows, _ = board(BOARD / "transformers_callback")
    assert [row["train/learning_rate"] for row in rows if "train/learning_rate" in row] == [2e-05] * 6
    assert rows[0]["train/loss"] == single(1 / 3)  # no decimal of 7 digits is this number
    tensors, _ = board(BOARD / "tensors")
    assert tensors[4]["loss"] == 0.4 and tensors[9]["loss"] == 0.2 != single(0.2)


def test_scalars_as_tensors():
    rows, notes = board(BOARD / "tensors")
    for step in range(20):
        assert single(rows[step]["loss"]) == single(loss(step))
        assert rows[step]["precise"] == step / 7  # 64 bits
    assert without(rows[20], "step", "time") == {
        "content_float": 0.25,
        "content_double": 0.1,
        "content_half": 1.5,
        "content_bfloat16": -2.5,
        "content_int64": -3.0,
        "half": 0.75,
        "int": -5.0,
        "int64": float(2**40),
        "bool": 1.0,
    }
    assert notes == ["Values that are no scalars were not read: other values (2)."]


def test_a_restart_in_one_folder_stays_visible():
    rows, notes = board(BOARD / "restart")
    assert [row["step"] for row in rows] == [*range(1, 31), *range(21, 41)]
    assert [single(loss(row["step"])) for row in rows] == [single(row["train/loss"]) for row in rows]
    assert len(notes) == 1 and "2 event files of one run were read one after another" in notes[0]


def test_a_resumed_run_with_folders_of_its_own_is_one_run_and_another_run_is_not():
    rows, notes = board(BOARD / "run_folders")
    assert [row["step"] for row in rows] == [*range(1, 31), *range(21, 41)]
    assert "b_first, c_resumed were read one after another" in notes[0]
    assert "1 other run lies there" in notes[1]
    rows, notes = board(BOARD / "run_folders" / "a_other")
    assert [row["step"] for row in rows] == list(range(1, 10)) and not notes


def test_the_newest_of_unrelated_runs_is_read(tmp_path):
    for name, first in (("a", 100.0), ("b", 300.0)):
        events = [event(first + step, step, "loss", step / 4 + first) for step in range(10, 60, 10)]
        write_board(tmp_path / name / "events.out.tfevents.1.h", events)
    rows, notes = board(tmp_path)
    assert [(row["step"], row["loss"]) for row in rows] == [(s, s / 4 + 300) for s in range(10, 60, 10)]
    assert notes == [
        f"{tmp_path}: 1 other run lies there; the one written last, b, was read. "
        "Give a run's own folder to read another."
    ]


def test_sub_folders_belong_to_their_run():
    rows, notes = board(BOARD / "sub_folders")
    assert [row["step"] for row in rows] == list(range(10))
    for step, row in enumerate(rows):
        assert row["train/reward/mean"] == step / 4 and row["train/reward/best"] == step
        assert single(row["train/loss"]) == single(loss(step))
    assert len(notes) == 1 and "holds no scalar that belongs to a step" in notes[0]  # of add_hparams


def test_train_and_eval_folders_side_by_side(tmp_path):
    write_board(tmp_path / "train" / "events.out.tfevents.1.h", [event(s, s, "loss", s / 2) for s in range(1, 9)])
    write_board(tmp_path / "eval" / "events.out.tfevents.1.h", [event(s, s, "loss", s / 4) for s in range(2, 9, 2)])
    rows, _ = board(tmp_path)
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert [row["train/loss"] for row in rows] == [s / 2 for s in range(1, 9)]
    assert {row["step"]: row["eval/loss"] for row in rows if "eval/loss" in row} == {s: s / 4 for s in (2, 4, 6, 8)}


def test_two_writers_of_the_same_steps_are_not_mixed(tmp_path):
    write_board(tmp_path / "events.out.tfevents.1.rank0", [event(s, s, "loss", s / 2) for s in range(1, 9)])
    second = [e for s in range(1, 8) for e in (event(s + 0.1, s, "loss", -s), event(s + 0.1, s, "memory", s / 8))]
    write_board(tmp_path / "events.out.tfevents.1.rank1", second)
    rows, notes = board(tmp_path)
    # the loss of the one that wrote more of it
    assert [(row["step"], row["loss"]) for row in rows] == [(s, s / 2) for s in range(1, 9)]
    assert [row.get("memory") for row in rows] == [*(s / 8 for s in range(1, 8)), None]
    assert notes == [
        "events.out.tfevents.1.rank1 was written at the same time as events.out.tfevents.1.rank0; "
        "what both hold was not read from it: loss."
    ]


def test_names_that_count_something_else_do_not_look_like_restarts():
    rows, notes = board(BOARD / "axes")
    assert [row["step"] for row in rows] == list(range(1, 41))
    for row in rows:
        assert single(row["lm-loss"]) == single(loss(row["step"])) and row["grad-norm"] == row["step"] / 8
    # an evaluation each 10 steps, logged at epoch 1 to 4
    vals = {row["step"]: single(row["val"]) for row in rows if "val" in row}
    assert vals == {step: single(loss(step) + 0.5) for step in (10, 20, 30, 40)}
    assert len(notes) == 1 and "lm-loss vs samples, val count something other than the training steps" in notes[0]


def test_a_log_without_steps():
    rows, notes = board(BOARD / "stepless")
    assert [single(row["loss"]) for row in rows] == [single(loss(step)) for step in range(10)]
    assert not any("step" in row for row in rows)
    assert len(notes) == 1 and "every step is 0" in notes[0]


def test_settings_beside_the_scalars():
    args = tensorboard.settings([BOARD / "transformers_callback"])
    assert args["learning_rate"] == 2e-05 and args["per_device_train_batch_size"] == 4 and len(args) > 50
    assert tensorboard.settings([BOARD / "sub_folders"]) == {"lr": 1e-05, "method": "grpo", "packed": True}
    assert tensorboard.settings([BOARD / "plain"]) == {}


def test_event_files_are_told_by_their_content_and_their_name(tmp_path):
    for path in tensorboard.event_files(BOARD):
        assert tensorboard.is_event_file(Path("anything"), path.read_bytes()[:64])
    assert len(tensorboard.event_files(BOARD)) == 14
    for head in (b"", b'{"step": 1}' * 10, b"\0" * 64, b":W&B\xe1\xbe\0" + b"\1" * 60, b"\x18" + b"\0" * 63):
        assert not tensorboard.is_event_file(Path("log.jsonl"), head)
    assert tensorboard.is_event_file(Path("events.out.tfevents.1700000000.host"), b"")


# A writer of our own for what no library would write: protocol buffers and CRC-32C by the book, bit by bit.


def crc32c(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def masked(data):
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def framed(data):
    length = struct.pack("<Q", len(data))
    return length + masked(length) + data + masked(data)


def number(value):
    value &= 0xFFFFFFFFFFFFFFFF
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes((*out, value))


def text(field, data):
    data = data.encode() if isinstance(data, str) else data
    return number(field << 3 | 2) + number(len(data)) + data


def event(time, step, tag, value):
    summary = text(1, text(1, tag) + b"\x15" + struct.pack("<f", value))
    return b"\x09" + struct.pack("<d", time) + b"\x10" + number(step) + text(5, summary)


def write_board(path, events):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(framed(b"\x09" + bytes(8) + text(3, "brain.Event:2")) + b"".join(map(framed, events)))
    return path


def test_checksums():
    assert tensorboard._crc(b"123456789", 9) == 0xE3069283 == crc32c(b"123456789")  # the check value of CRC-32C
    records = [event(s, s, "loss", s / 3) for s in range(300)]
    batch = [(data + masked(data), len(data)) for data in records]
    assert tensorboard._changed(batch) == set()
    for i in (0, 7, 150, 299):
        data, size = batch[i]
        batch[i] = (data[:12] + bytes([data[12] ^ 1]) + data[13:], size)
    assert tensorboard._changed(batch) == {0, 7, 150, 299}


def test_negative_and_large_steps_long_names_and_several_values_a_record(tmp_path):
    name = "n" * 300
    several = b"\x09" + struct.pack("<d", 9.0) + b"\x10\x05"
    several += text(
        5, text(1, text(1, "a") + b"\x15" + struct.pack("<f", 1)) + text(1, text(1, "b") + b"\x15" + bytes(4))
    )
    events = [event(1.0, -3, "loss", 1), several, event(10.0, 2**40, name, 2), event(11.0, 2**40 + 1, name, 3)]
    rows, _ = board(write_board(tmp_path / "x.tfevents.1", events))
    assert rows == [
        {"step": -3, "time": 1.0, "loss": 1.0},
        {"step": 5, "time": 9.0, "a": 1.0, "b": 0.0},
        {"step": 2**40, "time": 10.0, name: 2.0},
        {"step": 2**40 + 1, "time": 11.0, name: 3.0},
    ]


def test_tags_that_are_called_step_or_time_do_not_hide_the_clock(tmp_path):
    events = [e for s in (1, 2) for e in (event(s, s, "step", 100 + s), event(s, s, "time", 0.5))]
    rows, _ = board(write_board(tmp_path / "x.tfevents.1", events))
    assert rows == [{"step": s, "time": float(s), "step (logged)": 100.0 + s, "time (logged)": 0.5} for s in (1, 2)]


def test_a_cut_event_file_gives_what_was_whole(tmp_path):
    data = only(BOARD / "restart", "*.3").read_bytes()
    whole, _ = board(only(BOARD / "restart", "*.3"))
    ends, at = [], 0
    while at < len(data):
        at += 16 + struct.unpack_from("<Q", data, at)[0]
        ends.append(at)
    assert len(ends) == 21 and ends[-1] == len(data)  # the version and 20 scalars
    # each byte of the first and the last records, each third between
    for cut in {*range(200), *range(200, len(data), 3), *range(len(data) - 150, len(data)), *ends[:-1]}:
        path = tmp_path / f"{cut}.tfevents.1"
        path.write_bytes(data[:cut])
        scalars = max(0, sum(end <= cut for end in ends) - 1)
        if scalars == 0:
            with pytest.raises(UnreadableLog):
                board(path)
            continue
        rows, notes = board(path)
        assert rows == whole[:scalars]
        assert notes == (
            [] if cut in ends else [f"{path.name}: the last record was still being written; it was skipped."]
        )


def test_a_changed_record_is_skipped_and_counted(tmp_path):
    data = bytearray(only(BOARD / "restart", "*.3").read_bytes())
    whole, _ = board(only(BOARD / "restart", "*.3"))
    data[-8] ^= 0x40  # in the last number
    path = tmp_path / "x.tfevents.1"
    path.write_bytes(data)
    rows, notes = board(path)
    assert rows == whole[:-1] and notes == ["1 damaged record was skipped."]


def test_damage_between_records_ends_the_reading_and_is_told(tmp_path):
    events = [event(s, s, "loss", s / 2) for s in range(1, 9)]
    path = write_board(tmp_path / "x.tfevents.1", events)
    before = len(path.read_bytes()) - 3 * len(framed(events[0]))
    path.write_bytes(path.read_bytes()[:before] + b"\0" * 500)
    rows, notes = board(path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert notes == [f"x.tfevents.1: is damaged at byte {before}; what stood before was read, what follows was not."]


def flips(data, times, seed):
    generator = random.Random(seed)
    for _ in range(times):
        changed = bytearray(data)
        for _ in range(generator.choice((1, 1, 2, 20))):
            changed[generator.randrange(len(changed))] ^= 1 << generator.randrange(8)
        yield bytes(changed)


@pytest.mark.parametrize("name", ["plain", "tensors", "sub_folders/train_reward_best"])
def test_no_flipped_bit_in_an_event_file_invents_a_number(tmp_path, name):
    original = tensorboard.event_files(BOARD / name)[0]
    known = {(row["step"], tag, repr(value)) for row in board(original)[0] for tag, value in row.items()}
    for i, data in enumerate(flips(original.read_bytes(), 120, name)):
        path = tmp_path / f"{i}.tfevents.1"
        path.write_bytes(data)
        try:
            rows, _ = board(path)
        except UnreadableLog as error:
            assert str(path) in str(error) and "\n" not in str(error)
            continue
        found = {(row["step"], tag, repr(value)) for row in rows for tag, value in row.items() if tag != "time"}
        assert found <= known


def test_a_length_that_cannot_be_takes_no_memory(tmp_path):
    path = write_board(tmp_path / "x.tfevents.1", [event(1.0, 1, "loss", 2.0)])
    length = struct.pack("<Q", 2**60)
    path.write_bytes(path.read_bytes() + length + masked(length) + b"\x09" * 1000)
    tracemalloc.start()
    rows, notes = board(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(rows) == 1 and peak < 8e6
    assert any("still being written" in note for note in notes)


def test_what_is_no_event_file_is_one_sentence(tmp_path):
    for content in (b"", b"text\n" * 50, b"\0" * 1000, framed(b"\xff" * 30), framed(b"\x09" + bytes(8))):
        path = tmp_path / f"{zlib.crc32(content)}.tfevents.1"
        path.write_bytes(content)
        with pytest.raises(UnreadableLog, match="tfevents") as error:
            board(path)
        assert str(error.value).endswith(".") and "\n" not in str(error.value)
    with pytest.raises(UnreadableLog, match="no TensorBoard event file"):
        board(LOGS / "mlflow")
    with pytest.raises(UnreadableLog, match="cannot be opened"):
        board(tmp_path / "missing.tfevents.1")


def test_a_packed_event_file(tmp_path):
    original = only(BOARD / "plain", "*tfevents*")
    packed = gzip.compress(original.read_bytes())
    (tmp_path / "x.tfevents.gz").write_bytes(packed)
    (tmp_path / "cut.tfevents.gz").write_bytes(packed[: len(packed) // 6])
    assert repr(board(tmp_path / "x.tfevents.gz")[0]) == repr(board(original)[0])
    rows, notes = board(tmp_path / "cut.tfevents.gz")
    assert 0 < len(rows) < 50 and "ends early" in notes[0]


# ---------------------------------------------------------------------- steps


def through(measurements):
    notes = []
    axes = survey(lambda: iter(measurements), "log")
    return list(to_rows(measurements, axes, "log", notes)), notes


def test_a_restart_within_one_log_is_no_other_axis():
    steps = [*range(1, 11), *range(6, 16)]
    rows, notes = through([(float(i), s, n, s / 2) for i, s in enumerate(steps) for n in ("kl", "loss", "reward")])
    assert [row["step"] for row in rows] == steps and all(len(row) == 5 for row in rows) and not notes


def test_values_before_the_first_step_and_several_within_a_step():
    loop = [(float(s), s, "loss", s / 2) for s in range(10, 15)]
    samples = [(0.5 + i / 2, i, "system/memory", i * 1.0) for i in range(30)]
    rows, notes = through(sorted(samples + loop))
    assert [row["step"] for row in rows] == [10, 11, 12, 13, 14]
    # samples 0 to 18 were taken at 0.5 … 9.5, 19 at 10.0 but the loss of step 10 sorts behind it; then two a step
    assert [row["system/memory"] for row in rows] == [20.0, 22.0, 24.0, 26.0, 29.0]
    assert len(notes) == 1 and "replaced: 25" in notes[0]


# ---------------------------------------------------------------------- W&B


def weights(path):
    notes = []
    return list(wandb_files.rows(path, notes)), notes


@pytest.fixture(params=["v0_17", "v0_31"])
def version(request):
    return WANDB / request.param


def test_wandb_rows_are_the_calls_of_log(version):
    rows, notes = weights(only(version / "plain", "*.wandb"))
    assert [row["_step"] for row in rows] == list(range(30))
    for call, row in enumerate(rows):
        step = 5 * (call + 1)
        assert row["train/global_step"] == step and type(row["train/global_step"]) is int
        assert same(row["train/loss"], {7: math.nan, 8: math.inf, 9: -math.inf}.get(call, loss(step)))
        assert row["train/grad_norm"] == step / 8
        assert 1.7e9 < row["_timestamp"] < 1.9e9 and 0 <= row["_runtime"] < 60
        names = {"train/loss", "train/grad_norm", "train/global_step", "_step", "_timestamp", "_runtime"}
        assert set(row) - names == ({"words", "empty", "nested/a", "nested/b/c"} if call == 3 else set())
    assert without(rows[3], *rows[0]) == {"words": "some text", "empty": None, "nested/a": 1, "nested/b/c": 2.5}
    assert notes[0] == "Values that are no numbers were not read: histogram (2)."
    assert len(notes) == 2 and notes[1].startswith("Samples of the machine (system metrics)")


def test_wandb_config_with_later_changes(version):
    assert wandb_files.settings(only(version / "plain", "*.wandb")) == {
        "learning_rate": 1e-05,
        "model": {"type": "llama", "layers": [1, 2]},
        "note": None,
        "packed": True,
        "later": 3,
    }


def test_wandb_folders(version, tmp_path):
    run_folder = next((version / "plain" / "wandb").iterdir())
    whole = weights(only(version / "plain", "*.wandb"))[0]
    for path in (run_folder, run_folder.parent):
        assert wandb_files.is_wandb_directory(path)
        assert repr(weights(path)[0]) == repr(whole)
    assert not wandb_files.is_wandb_directory(version) and not wandb_files.is_wandb_directory(tmp_path)

    rows, notes = weights(version / "resumed" / "wandb")
    assert [row["global_step"] for row in rows] == [*range(1, 21), *range(11, 31)]
    assert [row["loss"] for row in rows] == [loss(row["global_step"]) for row in rows]
    assert notes[0].endswith("run resumed was resumed; its 2 folders were read one after another.")

    for name, source in (("run-20200101_000000-old", "plain"), ("run-20990101_000000-empty", None)):
        (tmp_path / name).mkdir()
        made = tmp_path / name / "run-x.wandb"
        made.write_bytes(only(version / source, "*.wandb").read_bytes() if source else b":W&B\xe1\xbe\0")
    for folder in (version / "resumed" / "wandb").iterdir():
        shutil.copytree(folder, tmp_path / folder.name)
    again, notes = weights(tmp_path)
    assert again == rows
    assert "the newest run that logged anything, resumed, was read; 2 others lie there" in notes[0]


def test_a_wandb_record_over_several_blocks(version, tmp_path):
    data = gzip.decompress(only(version / "long", "*.gz").read_bytes())
    assert len(data) > 2 * 32768
    path = tmp_path / "run-long.wandb"
    path.write_bytes(data)
    rows, _ = weights(path)
    assert [row["loss"] for row in rows] == [loss(call) for call in range(20)]
    assert [len(row["words"]) for row in rows if "words" in row] == [33_000]


def wandb_log(*records):
    """A `.wandb` file of these records, pieces and checksums by the book."""
    out = bytearray(b":W&B\xe1\xbe\0")
    for record in records:
        begun = False
        while True:
            room = 32768 - len(out) % 32768
            if room < 7:
                out += bytes(room)
                room = 32768
            piece, record = record[: room - 7], record[room - 7 :]
            kind = (3 if record else 4) if begun else (2 if record else 1)
            out += struct.pack("<IHB", zlib.crc32(bytes([kind]) + piece), len(piece), kind) + piece
            begun = True
            if not record:
                break
    return bytes(out)


def history(step, **values):
    items = [text(1, text(2, name) + text(16, json.dumps(value))) for name, value in values.items()]
    return text(2, b"".join(items) + text(2, b"\x08" + number(step)))


def test_wandb_pieces_end_anywhere_in_a_block(tmp_path):
    for padding in range(32768 - 60, 32768 - 20):
        path = tmp_path / f"{padding}.wandb"
        path.write_bytes(wandb_log(text(13, bytes(padding)), history(1, loss=0.5), history(2, loss=0.25)))
        assert weights(path)[0] == [{"loss": 0.5, "_step": 1}, {"loss": 0.25, "_step": 2}]


def test_wandb_values_with_a_type_of_their_own(tmp_path):
    items = [
        text(1, text(1, "boolean") + b"\x20\x01"),
        text(1, text(1, "integer") + b"\x28" + number(5)),  # zigzag: -3
        text(1, text(1, "number") + b"\x31" + struct.pack("<d", 0.1)),
        text(1, text(1, "text") + text(7, "NaN")),
        text(1, text(1, "json") + text(8, '{"a": 2}')),
        text(1, text(1, "none") + b"\x18\x00"),
        text(1, text(1, "quoted") + text(16, '"-Infinity"')),
    ]
    path = tmp_path / "x.wandb"
    path.write_bytes(wandb_log(text(2, b"".join(items) + text(2, b"\x08\x07"))))
    [row], _ = weights(path)
    nan = row.pop("text")
    assert nan != nan
    assert row == {
        "boolean": True,
        "integer": -3,
        "number": 0.1,
        "json/a": 2,
        "none": None,
        "quoted": -math.inf,
        "_step": 7,
    }


def test_a_cut_wandb_file_gives_what_was_whole(version, tmp_path):
    data = only(version / "plain", "*.wandb").read_bytes()
    whole = [repr(row) for row in weights(only(version / "plain", "*.wandb"))[0]]
    lengths = set()
    for cut in range(0, len(data), 41):
        path = tmp_path / f"{cut}.wandb"
        path.write_bytes(data[:cut])
        try:
            rows, _ = weights(path)
        except UnreadableLog:
            lengths.add(0)
            continue
        assert [repr(row) for row in rows] == whole[: len(rows)]
        lengths.add(len(rows))
    assert lengths == set(range(31))


def test_no_flipped_bit_in_a_wandb_file_invents_a_number(version, tmp_path):
    data = only(version / "plain", "*.wandb").read_bytes()
    known = {
        (row["_step"], name, repr(v))
        for row in weights(only(version / "plain", "*.wandb"))[0]
        for name, v in row.items()
    }
    lost = 0
    for i, changed in enumerate(flips(data, 150, version.name)):
        path = tmp_path / f"{i}.wandb"
        path.write_bytes(changed)
        try:
            rows, notes = weights(path)
        except UnreadableLog as error:
            assert str(path) in str(error)
            continue
        assert {(row["_step"], name, repr(v)) for row in rows for name, v in row.items()} <= known
        lost += len(rows) < 30
        assert len(rows) == 30 or any("damaged" in n or "being written" in n for n in notes)
    assert lost > 50


def test_after_damage_the_next_block_is_read(tmp_path):
    records = [history(step, loss=loss(step)) for step in range(3000)]
    data = bytearray(wandb_log(*records))
    assert len(data) > 4 * 32768
    data[32768 + 100] ^= 1
    path = tmp_path / "x.wandb"
    path.write_bytes(data)
    rows, notes = weights(path)
    steps = [row["_step"] for row in rows]
    [(before, after)] = [(a, b) for a, b in pairwise(steps) if b != a + 1]
    assert steps[0] == 0 and steps[-1] == 2999 and 0 < after - before < 32768 // len(records[0])
    assert any("damaged" in note for note in notes)


def test_wandb_before_its_own_format(tmp_path):
    folder = tmp_path / "run-20200101_000000-abc"
    folder.mkdir()
    rows = [{"loss": loss(s), "_step": s, "_timestamp": 1.6e9 + s, "g": {"_type": "histogram"}} for s in range(5)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    lines += '{"loss": NaN, "reward": "Infinity", "_step": 5}\nnot json\n{"loss": 0.'
    (folder / "wandb-history.jsonl").write_text(lines)
    (folder / "config.yaml").write_text(
        "wandb_version: 1\nlr:\n  desc: null\n  value: 1.0e-05\n_wandb:\n  value: {}\n"
    )
    for path in (folder, tmp_path):
        read, notes = weights(path)
        assert [without(row, "loss") for row in read[:5]] == [{"_step": s, "_timestamp": 1.6e9 + s} for s in range(5)]
        assert [row["loss"] for row in read[:5]] == [loss(s) for s in range(5)]
        assert math.isnan(read[5]["loss"]) and read[5]["reward"] == math.inf
        assert notes == [
            "wandb-history.jsonl: the last line was still being written; it was skipped.",
            "Values that are no numbers were not read: histogram (5).",
            "1 damaged record was skipped.",
        ]
        assert wandb_files.settings(path) == {"lr": 1e-05}


def test_what_is_no_wandb_run_is_one_sentence(tmp_path):
    for content in (
        b"",
        b":W&B",
        b":W&B\0\0\0" + b"x" * 50,
        b"{}" * 20,
        b":W&B\xe1\xbe\0",
        b":W&B\xe1\xbe\0" + b"\xff" * 40000,
    ):
        path = tmp_path / f"{zlib.crc32(content)}.wandb"
        path.write_bytes(content)
        with pytest.raises(UnreadableLog, match=r"\.wandb.*\.$"):
            weights(path)
    with pytest.raises(UnreadableLog, match="holds no run"):
        weights(LOGS / "mlflow")


# ---------------------------------------------------------------------- MLflow


def flow(path):
    notes = []
    return list(mlflow_files.rows(path, notes)), notes


@pytest.fixture(params=["folder", "database"])
def store(request, tmp_path):
    if request.param == "folder":
        return MLFLOW / "mlruns"
    path = tmp_path / "mlflow.db"
    path.write_bytes(gzip.decompress((MLFLOW / "mlflow.db.gz").read_bytes()))
    return path


def test_mlflow_rows(store):
    assert mlflow_files.is_mlflow(store)
    rows, notes = flow(store)
    assert [row["step"] for row in rows] == [*range(1, 41), *range(31, 51)]  # restarted from step 30
    for row in rows[:40]:
        step = row["step"]
        assert same(row["train/loss"], {7: math.nan, 8: math.inf, 9: -math.inf}.get(step, loss(step)))
        assert ("eval/loss" in row) == ("system/gpu" in row) == (step % 10 == 0)
        if step % 10 == 0:
            assert row["eval/loss"] == loss(step) + 0.5 and row["system/gpu"] == step / 40
    for row in rows[40:]:
        assert row["train/loss"] == loss(row["step"]) + 1
    assert all(row["train/grad_norm"] == row["step"] / 8 for row in rows)
    times = [row["time"] for row in rows]
    assert times == sorted(times) and 1.7e9 < times[0] < 1.9e9
    assert "was read; 1 other lies there" in notes[0]
    assert "system/gpu counts something other than the training steps" in notes[1] and len(notes) == 2


def test_mlflow_settings(store):
    assert mlflow_files.settings(store) == {
        "learning_rate": 2e-05,
        "packed": True,
        "note": None,
        "name": "a text",
        "layers": [1, 2],
    }


def test_mlflow_folders(tmp_path):
    run = next(MLFLOW.rglob("eval")).parent.parent
    whole, _ = flow(MLFLOW / "mlruns")
    for path in (run, run.parent):
        assert mlflow_files.is_mlflow(path)
        assert repr(flow(path)[0]) == repr(whole)
    for path in (LOGS, BOARD, run / "metrics", tmp_path, BOARD / "plain", MLFLOW / "mlflow.db.gz"):
        assert not mlflow_files.is_mlflow(path)

    shutil.copytree(MLFLOW / "mlruns", tmp_path / "mlruns")
    meta = next(tmp_path.rglob("eval")).parent.parent / "meta.yaml"
    meta.write_text(meta.read_text().replace("lifecycle_stage: active", "lifecycle_stage: deleted"))
    rows, notes = flow(tmp_path / "mlruns")
    assert [without(row, "time") for row in rows] == [{"step": 1, "loss": 9.0}] and not notes


def mlflow_run(folder, **metrics):
    (folder / "metrics").mkdir(parents=True)
    (folder / "params").mkdir()
    for name, lines in metrics.items():
        (folder / "metrics" / name).write_text(lines)
    return folder


def test_mlflow_lines_of_every_kind(tmp_path):
    run = mlflow_run(
        tmp_path / "r",
        loss="1000 0.5 1\n2000 0.25 2\nnonsense\n\n3000 0.125 3 data 0a1b\n4000 0.0625 4\n5000 0.0",
        late="2000 7 2\n",
    )
    rows, notes = flow(run)
    assert rows == [
        {"step": 1, "time": 1.0, "loss": 0.5},
        {"step": 2, "time": 2.0, "late": 7.0, "loss": 0.25},
        {"step": 3, "time": 3.0, "loss": 0.125},
        {"step": 4, "time": 4.0, "loss": 0.0625},
    ]
    assert notes == [
        f"{run}: the last line of 1 metric was cut off.",
        f"{run}: measurements that could not be understood were skipped: 1.",
    ]
    rows, notes = flow(mlflow_run(tmp_path / "old", loss="1000 0.5\n2000 0.25\n"))
    assert rows == [{"time": 1.0, "loss": 0.5}, {"time": 2.0, "loss": 0.25}] and "every step is 0" in notes[0]


def test_a_metric_longer_than_what_is_read_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(mlflow_files, "MEMORY", 0)  # pieces of 4 KiB
    lines = "".join(f"{1000 * step} {loss(step)} {step}\n" for step in range(2000))
    rows, notes = flow(mlflow_run(tmp_path / "r", loss=lines))
    assert [(row["step"], row["loss"]) for row in rows] == [(step, loss(step)) for step in range(2000)] and not notes


def test_garbage_in_mlflow_folders_is_one_sentence(tmp_path):
    generator = random.Random(0)
    for i in range(40):
        run = mlflow_run(tmp_path / f"r{i}")
        size = generator.choice((0, 10, 1000, 20_000))
        (run / "metrics" / "loss").write_bytes(bytes(generator.choices(b"0123456789.e- \nnai\xff\0", k=size)))
        try:
            for row in flow(run)[0]:
                assert set(row) <= {"step", "time", "loss"} and isinstance(row["loss"], float)
        except UnreadableLog as error:
            assert str(run) in str(error)
    run = mlflow_run(tmp_path / "line", loss="1" * 1_000_000)
    with pytest.raises(UnreadableLog, match="longer than"):
        flow(run)
    with pytest.raises(UnreadableLog, match="holds no run of MLflow"):
        flow(BOARD)


def test_garbage_in_a_database_is_one_sentence(tmp_path):
    data = gzip.decompress((MLFLOW / "mlflow.db.gz").read_bytes())
    path = tmp_path / "cut.db"
    for cut in (0, 50, 100, 4096, 100_000, len(data) // 2, len(data) - 4096):
        path.write_bytes(data[:cut])
        mlflow_files.is_mlflow(path)
        with pytest.raises(UnreadableLog, match=r"cut\.db.*\.$"):
            flow(path)
    used = [i for i in range(0, len(data), 4096) if data[i : i + 4096].strip(b"\0")]
    generator = random.Random(1)
    for i in range(40):
        changed = bytearray(data)
        for _ in range(200):
            changed[generator.choice(used) + generator.randrange(4096)] ^= 1 << generator.randrange(8)
        path = tmp_path / f"{i}.db"
        path.write_bytes(changed)
        try:
            flow(path)
            mlflow_files.settings(path)
        except UnreadableLog as error:
            assert str(path) in str(error) and "\n" not in str(error)


def test_a_database_of_something_else_and_one_that_computes(tmp_path):
    other = tmp_path / "other.db"
    with sqlite3.connect(other) as database:
        database.execute("CREATE TABLE metrics (a)")
    assert not mlflow_files.is_mlflow(other)
    with pytest.raises(UnreadableLog, match="not of MLflow"):
        flow(other)

    hostile = tmp_path / "hostile.db"
    with sqlite3.connect(hostile) as database:
        database.execute("CREATE TABLE runs (run_uuid, name, start_time, lifecycle_stage)")
        database.execute("CREATE TABLE params (key, value, run_uuid)")
        forever = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i FROM n"
        database.execute(f"CREATE VIEW metrics AS {forever}")
    assert not mlflow_files.is_mlflow(hostile)
    with pytest.raises(UnreadableLog, match="not of MLflow"):
        flow(hostile)

    odd = tmp_path / "odd.db"
    with sqlite3.connect(odd) as database:
        database.execute("CREATE TABLE runs (run_uuid, name, start_time, lifecycle_stage)")
        database.execute("CREATE TABLE params (key, value, run_uuid)")
        database.execute("CREATE TABLE metrics (key, value, timestamp, run_uuid, step, is_nan)")
        database.execute("INSERT INTO runs VALUES ('r', NULL, NULL, NULL)")
        database.executemany(
            "INSERT INTO metrics VALUES (?, ?, ?, 'r', ?, 0)",
            [("loss", 0.5, 1000, 1), ("loss", "text", 2000, 2), ("loss", b"\xff", 3000, 3), (None, 1.0, None, None)],
        )
    rows, notes = flow(odd)
    assert rows == [{"step": 1, "time": 1.0, "loss": 0.5}]
    assert notes == [f"{odd}: measurements that could not be understood were skipped: 3."]


def test_a_database_is_left_as_it_was(store):
    if store.is_dir():
        return
    before = store.read_bytes()
    flow(store)
    mlflow_files.settings(store)
    assert store.read_bytes() == before and [p.name for p in store.parent.iterdir()] == ["mlflow.db"]
