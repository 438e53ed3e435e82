"""The run directory: what was written is there whatever happens to the process, the disk or the inbox."""

import errno
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outspoken import schemas
from outspoken.diagnostics import rundir
from outspoken.diagnostics.patches import PatchRefused, check_patch, same_value
from outspoken.diagnostics.records import Observation, change_field
from outspoken.diagnostics.rundir import BadRequest, RunDirectory, Tail, is_alive, last_line, read_json, read_jsonl


def strict(line):
    """The line as JSON; the words NaN and Infinity, which JSON lacks, are an error."""

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    return json.loads(line, parse_constant=refuse)


def lines(path):
    return [strict(line) for line in Path(path).read_text().splitlines()]


def a_run(**more):
    return {
        "schema": "outspoken.run/1",
        "id": "run-1",
        "parent": None,
        "method": "grpo",
        "trainer": "GRPOTrainer",
        "status": "running",
        "started": 1000.0,
        "heartbeat": 1000.0,
        "step": 0,
        "total_steps": 100,
        "config": {"learning_rate": 1e-5},
        "live": {"learning_rate": {"minimum": 0.0, "maximum": 1.0, "choices": None}},
        "config_rev": "sha256:0",
        "versions": {},
        "hardware": {},
        "world_size": 1,
        "dataset": None,
        "facts": {},
        "segment": 0,
        "verdict": None,
        **more,
    }


def a_change(change_id="c1", state="applied", **more):
    return {
        "schema": "outspoken.change/1",
        "id": change_id,
        "state": state,
        "step": 3,
        "time": 1.0,
        "actor": "me",
        "patch": change_field("learning_rate", 1e-5, 5e-6),
        "fields": {"learning_rate": {"old": 1e-5, "new": 5e-6}},
        "reason": "",
        "suggestion": None,
        "diagnostic": None,
        "segment": 1,
        "config_rev": "sha256:0",
        "expect": None,
        "observed": {},
        "rollback_on_failure": True,
        "run": "run-1",
        **more,
    }


def a_request(request_id, **more):
    return {
        "schema": "outspoken.request/1",
        "id": request_id,
        "kind": "apply",
        "actor": "me",
        "patch": change_field("learning_rate", 1e-5, 5e-6),
        "suggestion": None,
        "diagnostic": None,
        "expect": None,
        "rollback_on_failure": True,
        "time": 1.0,
        **more,
    }


def put(directory, name, content):
    (directory.control / name).write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.fixture
def said():
    return []


@pytest.fixture
def directory(tmp_path, said):
    made = RunDirectory(tmp_path / "outspoken", say=said.append)
    yield made
    made.close()


# ---------------------------------------------------------------- lines


def test_observation_in_its_four_states(directory):
    raw = {"loss": float("nan"), "reward": 0.5, "kl": float("-inf"), "text": ["a", "list"], "none": None, "n": 3}
    assert directory.append_observation(Observation.from_raw(7, raw, time=12.5, epoch=0.25), segment=2)
    (line,) = lines(directory.path / "metrics.jsonl")
    schemas.validate(line)
    assert line == {
        "schema": "outspoken.observation/1",
        "step": 7,
        "time": 12.5,
        "epoch": 0.25,
        "segment": 2,
        "signals": {"loss": None, "reward": 0.5, "kl": None, "n": 3.0},
        "nonfinite": {"loss": "nan", "kl": "-inf"},
        "unreadable": {"text": "['a', 'list']"},
    }


raw_values = (
    st.floats()
    | st.integers()
    | st.integers(10**300, 10**400)
    | st.booleans()
    | st.none()
    | st.text(max_size=30)
    | st.sampled_from(["1e400", "-1e400", "0.25", "NaN", " 7 "])
    | st.lists(st.floats(), max_size=3)
)


@settings(max_examples=40, deadline=None)
@given(raw=st.dictionaries(st.text(max_size=20), raw_values, max_size=6), sorted_out=st.booleans())
def test_any_values_become_one_valid_line(raw, sorted_out):
    with tempfile.TemporaryDirectory() as folder:
        directory = RunDirectory(folder)
        observation = Observation.from_raw(1, raw) if sorted_out else Observation(1, raw)  # … or nobody sorted them
        assert directory.append_observation(observation, 0)
        directory.close()
        (line,) = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    made = strict(line)
    schemas.validate(made)
    expected = Observation.from_raw(1, raw)
    assert {k: v for k, v in made["signals"].items() if v is not None} == expected.signals
    assert made["nonfinite"] == expected.nonfinite
    assert {k for k, v in made["signals"].items() if v is None} == set(expected.nonfinite)
    assert set(made["unreadable"]) == set(expected.unreadable)


def test_numpy_numbers_and_foreign_objects(directory):
    class Hostile:
        def __repr__(self):
            raise RuntimeError("no repr")

    directory.append_observation(
        Observation(np.int64(3), {"a": np.float32(0.5), "b": np.int64(2), "c": np.array(1.5), "d": True}), 0
    )
    directory.append_change(a_change(observed={"x": np.float64("nan"), "y": (1, 2), "z": Hostile(), 3: {4}}))
    (line,) = lines(directory.path / "metrics.jsonl")
    assert line["step"] == 3 and line["signals"] == {"a": 0.5, "b": 2.0, "c": 1.5, "d": 1.0}
    (change,) = lines(directory.path / "changes.jsonl")
    assert change["observed"] == {"x": None, "y": [1, 2], "z": "<Hostile>", "3": [4]}
    schemas.validate(line)
    schemas.validate(change)


def test_texts_are_bounded_and_control_characters_escaped(directory):
    directory.append_change(a_change(reason="\x1b[2J\n" + "x" * 10_000, actor="a\u2028\ud800"))
    directory.append_observation(Observation(1, {"y" * 10_000: 1.0}, unreadable={"u": "z" * 10_000}), 0)
    data = (directory.path / "changes.jsonl").read_bytes()
    assert data.count(b"\n") == 1 and b"\x1b" not in data and data.isascii()
    (change,) = lines(directory.path / "changes.jsonl")
    assert len(change["reason"]) == 2000 and change["reason"].startswith("\x1b[2J\n")
    (line,) = lines(directory.path / "metrics.jsonl")
    schemas.validate(line)
    assert [len(name) for name in line["signals"]] == [500] and len(line["unreadable"]["u"]) == 500


def test_deep_and_endless_values_are_cut(directory):
    loop = {}
    loop["again"] = loop
    assert directory.append_change(a_change(observed=loop))
    assert directory.write_run(a_run(config={"template": "x" * 15_000}))
    assert len(read_json(directory.path / "run.json")["config"]["template"]) == 15_000


def test_a_line_reaches_the_system_before_the_call_returns(directory):
    directory.append_observation(Observation(1, {"loss": 1.0}), 0)
    directory.append_diagnostic({"schema": "outspoken.diagnostic/1", "code": "RL016"})
    # Read through another descriptor while the writer is open and has not been asked to flush.
    assert len(read_jsonl(directory.path / "metrics.jsonl")[0]) == 1
    assert len(read_jsonl(directory.path / "diagnostics.jsonl")[0]) == 1


def test_resuming_appends(tmp_path):
    for step in (1, 2):
        directory = RunDirectory(tmp_path)
        directory.append_observation(Observation(step, {"loss": 1.0}), step - 1)
        directory.close()
    assert [(line["step"], line["segment"]) for line in lines(tmp_path / "metrics.jsonl")] == [(1, 0), (2, 1)]


def test_another_run_in_the_same_place_sets_the_first_aside(tmp_path):
    for name in ("first", "first", "se/cond"):
        directory = RunDirectory(tmp_path, resume=False)
        assert lines(tmp_path / "metrics.jsonl") == []
        directory.write_run(a_run(id=name))
        directory.append_observation(Observation(1, {"loss": 1.0}), 0)
        directory.close()
    assert read_json(tmp_path / "run.json")["id"] == "se/cond"
    assert sorted(p.name for p in (tmp_path / "earlier").iterdir()) == ["first", "first-2"]
    for name in ("first", "first-2"):
        assert read_json(tmp_path / "earlier" / name / "run.json")["id"] == "first"
        assert len(lines(tmp_path / "earlier" / name / "metrics.jsonl")) == 1
    directory = RunDirectory(tmp_path, resume=False)
    directory.close()
    names = {p.name for p in (tmp_path / "earlier").iterdir()}
    assert len(names) == 3 and any(name.startswith("se_cond-") for name in names)


# ---------------------------------------------------------------- run.json, verdict.json


def test_run_record_is_valid_and_replaced_whole(directory):
    directory.write_run(a_run())
    first = (directory.path / "run.json").stat().st_ino
    directory.write_run(a_run(status="finished", step=100))
    record = read_json(directory.path / "run.json")
    schemas.validate(record)
    assert record["status"] == "finished" and record["process"]["pid"] == os.getpid()
    assert (directory.path / "run.json").stat().st_ino != first  # another file was put in its place
    assert sorted(os.listdir(directory.path)) == [
        "changes.jsonl",
        "control",
        "diagnostics.jsonl",
        "metrics.jsonl",
        "run.json",
    ]


def test_heartbeat_is_throttled(directory, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(rundir.time, "monotonic", lambda: now[0])
    directory.heartbeat(1)  # nothing to say before the run is known
    assert not (directory.path / "run.json").exists()
    directory.write_run(a_run())
    for step, at, written in ((5, 105.0, 0), (9, 109.0, 0), (10, 110.0, 10), (15, 115.0, 10), (21, 121.0, 21)):
        now[0] = at
        directory.heartbeat(step)
        assert read_json(directory.path / "run.json")["step"] == written
    assert read_json(directory.path / "run.json")["heartbeat"] == pytest.approx(time.time(), abs=60)


# ---------------------------------------------------------------- kill -9

WRITER = """
import sys
from outspoken.diagnostics.rundir import RunDirectory
from outspoken.diagnostics.records import Observation
directory = RunDirectory(sys.argv[1])
step = int(sys.argv[2])
signals = {f"signal_{i}": i / 7 for i in range(60)}
while True:
    step += 1
    directory.append_observation(Observation(step, signals), 0)
    directory.append_diagnostic({"step": step, "message": "x" * 1500})
    directory.write_verdict({"step": step})
    directory.write_run({"schema": "outspoken.run/1", "id": "r", "step": step})
    print(step, flush=True)
"""


def test_kill_9_loses_no_record(tmp_path):
    chance = random.Random(5)
    step, acknowledged = 0, []
    for _ in range(4):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), str(step)], stdout=subprocess.PIPE, text=True
        )
        acknowledged.append(int(writer.stdout.readline()))
        time.sleep(chance.uniform(0.0, 0.15))
        writer.send_signal(signal.SIGKILL)
        acknowledged += [int(line) for line in writer.stdout.read().split("\n")[:-1]]
        writer.stdout.close()
        writer.wait()
        step = acknowledged[-1] + 1
        for name in ("metrics.jsonl", "diagnostics.jsonl"):
            records, notes = read_jsonl(tmp_path / name)
            assert set(acknowledged) <= {record["step"] for record in records}
            assert notes == []
        for name in ("run.json", "verdict.json"):  # never half written
            assert read_json(tmp_path / name)["step"] in (step - 1, step)
    assert len(acknowledged) > 8


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_a_torn_last_line_stays_torn_alone(tmp_path, cut):
    directory = RunDirectory(tmp_path)
    for step in (1, 2, 3):
        directory.append_observation(Observation(step, {"loss": 1.0}), 0)
    directory.close()
    file = tmp_path / "metrics.jsonl"
    os.truncate(file, file.stat().st_size - cut)
    records, notes = read_jsonl(file)
    if cut == 1:  # only the line end is missing: the record is whole
        assert [r["step"] for r in records] == [1, 2, 3] and notes == []
    else:
        assert [r["step"] for r in records] == [1, 2]
        assert notes == ["metrics.jsonl line 3: skipped, its end is torn off"]
    directory = RunDirectory(tmp_path)
    directory.append_observation(Observation(4, {"loss": 1.0}), 1)
    directory.close()
    records, notes = read_jsonl(file)
    assert [r["step"] for r in records] == ([1, 2, 3, 4] if cut == 1 else [1, 2, 4])
    assert len(notes) == (cut != 1) and all(
        note.startswith("metrics.jsonl line 3: skipped, it is no") for note in notes
    )


# ---------------------------------------------------------------- a directory that fails


def fill(directory, n, first=1):
    return [directory.append_observation(Observation(first + i, {"loss": 1.0}), 0) for i in range(n)]


def test_a_file_in_place_of_the_directory(tmp_path, said):
    (tmp_path / "outspoken").write_text("mine")
    directory = RunDirectory(tmp_path / "outspoken", say=said.append)
    assert not directory.write_run(a_run())
    assert fill(directory, 120) == [False] * 120
    assert directory.lost_lines == 120
    assert list(directory.requests()) == []
    directory.done("x")
    directory.heartbeat(3)
    assert len(said) == 1 and said[0] == directory.problem and "outspoken" in said[0] and "Training goes on" in said[0]
    assert (tmp_path / "outspoken").read_text() == "mine"
    (tmp_path / "outspoken").unlink()
    assert any(fill(directory, rundir.RETRY_WRITES))
    assert directory.problem is None
    assert len(said) == 2 and f"{directory.lost_lines} lines were lost" in said[1]
    schemas.validate(read_json(tmp_path / "outspoken" / "run.json"))  # what was known is written now
    directory.close()


def test_a_full_disk(directory, said, monkeypatch):
    assert all(fill(directory, 3))
    real = os.write

    def full(fd, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(rundir.os, "write", full)
    assert not any(fill(directory, 10, first=4))
    assert not directory.append_change(a_change())
    put(directory, "a.json", a_request("a"))
    assert list(directory.requests()) == []  # what became of it could not be recorded
    assert directory.lost_lines == 11 and "No space left on device" in directory.problem
    monkeypatch.setattr(rundir.os, "write", real)
    results = fill(directory, 60, first=14)
    recovered = results.index(True)
    assert recovered <= rundir.RETRY_WRITES and all(results[recovered:])
    assert directory.problem is None and directory.lost_lines == 11 + recovered
    assert [r["id"] for r in directory.requests()] == ["a"]
    assert len(said) == 2
    records, notes = read_jsonl(directory.path / "metrics.jsonl")
    assert [r["step"] for r in records] == [1, 2, 3, *range(14 + recovered, 74)] and notes == []


def test_a_failed_directory_is_tried_again_after_a_while(directory, said, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(rundir.time, "monotonic", lambda: now[0])
    with monkeypatch.context() as broken:
        broken.setattr(rundir.os, "write", lambda fd, data: (_ for _ in ()).throw(OSError(errno.EIO, "bad disk")))
        assert fill(directory, 1) == [False]
    assert fill(directory, 1) == [False]
    now[0] += rundir.RETRY_SECONDS
    assert fill(directory, 1) == [True]


def test_a_disk_that_takes_half_a_line(directory, monkeypatch):
    fill(directory, 1)
    real = os.write
    with monkeypatch.context() as broken:
        broken.setattr(rundir.os, "write", lambda fd, data: real(fd, data[: len(data) // 2]))
        assert fill(directory, 1, first=2) == [False]
    fill(directory, 60, first=3)
    records, notes = read_jsonl(directory.path / "metrics.jsonl")
    steps = [r["step"] for r in records]
    assert steps[0] == 1 and steps[-1] == 62 and 2 not in steps
    assert len(notes) == 1 and "line 2" in notes[0]  # the half line harmed no other


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_dev_full(tmp_path, said):
    os.symlink("/dev/full", tmp_path / "metrics.jsonl")
    directory = RunDirectory(tmp_path, say=said.append)
    assert not any(fill(directory, 5))
    assert directory.lost_lines == 5 and len(said) == 1
    directory.close()


def test_a_pipe_in_place_of_a_file_does_not_block(tmp_path, said):
    os.mkfifo(tmp_path / "control")
    directory = RunDirectory(tmp_path, say=said.append)
    assert not any(fill(directory, 2)) and list(directory.requests()) == []
    (tmp_path / "control").unlink()
    assert any(fill(directory, rundir.RETRY_WRITES))
    directory.close()


def test_a_directory_that_vanishes_is_made_anew(directory, said):
    directory.write_run(a_run())
    fill(directory, 3)
    shutil.rmtree(directory.path)
    assert list(directory.requests()) == []
    assert all(fill(directory, 3, first=4))
    assert directory.append_change(a_change()) and directory.write_verdict({"state": "improving"})
    assert [line["step"] for line in lines(directory.path / "metrics.jsonl")] == [4, 5, 6]
    assert read_json(directory.path / "run.json")["id"] == "run-1"
    assert len(said) == 1 and "was deleted" in said[0] and directory.lost_lines == 0


def test_a_directory_that_vanishes_before_run_json_is_replaced(directory):
    directory.write_run(a_run())
    shutil.rmtree(directory.path)
    assert directory.write_run(a_run(step=5))
    assert read_json(directory.path / "run.json")["step"] == 5
    assert all(fill(directory, 2))


def test_a_failed_replace_leaves_the_old_file_and_no_rubbish(directory, monkeypatch):
    directory.write_verdict({"state": "improving"})

    def fail(source, target):
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as broken:
        broken.setattr(rundir.os, "replace", fail)
        assert not directory.write_verdict({"state": "broken"})
    assert read_json(directory.path / "verdict.json") == {"state": "improving"}
    assert not [name for name in os.listdir(directory.path) if name.startswith(".")]


def test_the_default_announcement_is_a_log_warning(tmp_path, caplog):
    (tmp_path / "x").write_text("")
    RunDirectory(tmp_path / "x")
    assert [r.levelname for r in caplog.records] == ["WARNING"] and "cannot be written" in caplog.text


# ---------------------------------------------------------------- requests


def test_requests_come_oldest_first_until_done(directory):
    for name in ("20260102-b", "20260101-a", "20260103-c"):
        put(directory, f"{name}.json", a_request(name))
    put(directory, ".hidden.json", a_request("hidden"))
    put(directory, "half.json.part", "{")
    assert [r["id"] for r in directory.requests()] == ["20260101-a", "20260102-b", "20260103-c"]
    directory.append_change(a_change("20260101-a", "applied"))
    directory.done("20260101-a")
    assert not (directory.control / "20260101-a.json").exists()
    assert [r["id"] for r in directory.requests()] == ["20260102-b", "20260103-c"]
    directory.done("20260102-b")  # dealt with, but nothing recorded yet: the file stays, the request is not repeated
    assert (directory.control / "20260102-b.json").exists()
    assert [r["id"] for r in directory.requests()] == ["20260103-c"]
    directory.append_change(a_change("20260102-b", "rejected"))
    list(directory.requests())
    assert not (directory.control / "20260102-b.json").exists()


def test_an_expectation_without_min_n_gets_the_usual_one(directory):
    expect = {"signal": "kl", "direction": "below", "value": 0.1, "within_steps": 20}
    put(directory, "a.json", a_request("a", expect=expect))
    put(directory, "b.json", a_request("b", expect={**expect, "min_n": 64}))
    assert [r["expect"] for r in directory.requests()] == [{**expect, "min_n": 5}, {**expect, "min_n": 64}]


def test_a_request_is_not_done_twice_after_a_crash(tmp_path):
    directory = RunDirectory(tmp_path)
    for name in ("applied", "asked", "new"):
        put(directory, f"{name}.json", a_request(name))
    directory.append_change(a_change("applied", "requested"))
    directory.append_change(a_change("applied", "applied"))
    directory.append_change(a_change("asked", "requested"))  # and then the process dies
    directory.close()
    again = RunDirectory(tmp_path)
    assert [r["id"] for r in again.requests()] == ["asked", "new"]
    assert not (tmp_path / "control" / "applied.json").exists()
    again.close()


deep = "[" * 100_000 + "]" * 100_000
BAD_REQUESTS = {
    "garbage": ("\x00\x01garbage", "no JSON"),
    "empty": ("", "no JSON"),
    "list": ("[1]", "JSON list, not an object"),
    "deep": (deep, "nested too deeply"),
    "deep_value": (json.dumps(a_request("deep_value"))[:-1] + f', "patch": {deep}' + "}", "nested too deeply"),
    "wrong_schema": (json.dumps(a_request("wrong_schema", schema="outspoken.change/1")), "outspoken.change/1"),
    "newer": (json.dumps(a_request("newer", schema="outspoken.request/2")), "newer"),
    "missing": ('{"schema": "outspoken.request/1"}', "lacks 'id'"),
    "another": (json.dumps(a_request("someone")), "'someone'; file and request must have one id"),
    "nan": (json.dumps(a_request("nan", time=float("nan"))), "time is nan"),
    "huge_number": (json.dumps(a_request("huge_number")).replace("1.0", "1e400"), "time is inf"),
    "escape": (json.dumps(a_request("../escape")), "id is '../escape'"),
    "remove": (json.dumps(a_request("remove", patch=[{"op": "remove", "path": "/beta", "value": 0}])), "'remove'"),
    "no_patch": (json.dumps(a_request("no_patch", patch=[])), "patch is []"),
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_bad_requests_are_handed_out_with_a_reason(directory, name):
    content, reason = BAD_REQUESTS[name]
    put(directory, f"{name}.json", content)
    (bad,) = directory.requests()
    assert isinstance(bad, BadRequest) and bad.id == name and bad.path == directory.control / f"{name}.json"
    assert reason in bad.reason and len(bad.reason) <= 500
    rejected = a_change(bad.id, "rejected", reason=bad.reason, patch=[], fields={})
    schemas.validate(rejected)
    directory.append_change(rejected)
    directory.done(bad.id)
    assert list(directory.requests()) == [] and os.listdir(directory.control) == []


def test_a_request_that_is_not_utf8(directory):
    (directory.control / "latin.json").write_bytes('{"schema": "é"}'.encode("latin-1"))
    (bad,) = directory.requests()
    assert "not UTF-8" in bad.reason


def test_a_huge_request_is_refused_unread(directory):
    with open(directory.control / "huge.json", "wb") as file:
        file.write(b'{"schema": "outspoken.request/1", "id": "')
        file.truncate(50_000_000)
    tracemalloc.start()
    (bad,) = directory.requests()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert "larger than 1000000 bytes" in bad.reason
    assert peak < 5_000_000


def test_what_is_no_regular_file_is_refused(directory, tmp_path):
    (tmp_path / "elsewhere.json").write_text(json.dumps(a_request("link")))
    os.symlink(tmp_path / "elsewhere.json", directory.control / "link.json")
    os.symlink("/dev/zero", directory.control / "zero.json")
    os.symlink(tmp_path / "nowhere", directory.control / "dangling.json")
    (directory.control / "folder.json").mkdir()
    os.mkfifo(directory.control / "pipe.json")
    reasons = {bad.id: bad.reason for bad in directory.requests()}
    assert all("is a symbolic link" in reasons[name] for name in ("link", "zero", "dangling"))
    assert "no regular file" in reasons["folder"] and "no regular file" in reasons["pipe"]
    for name in reasons:
        directory.append_change(a_change(name, "rejected"))
        directory.done(name)
    assert list(directory.requests()) == []
    assert (tmp_path / "elsewhere.json").exists()  # the link went, not what it named
    assert os.listdir(directory.control) == ["folder.json"]  # not ours to delete; never handed out again


def test_odd_file_names_get_an_id_that_fits(directory):
    names = ["a b.json", "a_b.json", "x" * 200 + ".json", "é\n.json"]
    for name in names:
        put(directory, name, "garbage")
    os.close(os.open(os.fsencode(directory.control) + b"/\xff\xfe.json", os.O_CREAT | os.O_WRONLY))
    ids = [bad.id for bad in directory.requests()]
    assert len(set(ids)) == 5 and "a_b" in ids
    for request_id in ids:
        schemas.validate(a_change(request_id, "rejected"))
        directory.append_change(a_change(request_id, "rejected"))
        directory.done(request_id)
    assert os.listdir(directory.control) == []


# ---------------------------------------------------------------- readers


def test_readers_skip_what_is_no_record_and_say_where(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(
        b'{"step": 1}\n'
        b"\n"
        b"garbage\n"
        b'{"step": 2, "signals": {"loss": NaN, "kl": 1e400}}\n'
        b"[1, 2]\n"
        b"\xff\xfe\n" + b"[" * 100_000 + b"\n" + b'{"step": 3}'
    )
    records, notes = read_jsonl(file)
    assert [r["step"] for r in records] == [1, 2, 3]
    assert math.isnan(records[1]["signals"]["loss"]) and records[1]["signals"]["kl"] == math.inf
    assert [note.split(":")[0] for note in notes] == [f"metrics.jsonl line {n}" for n in (3, 5, 6, 7)]
    assert "not an object" in notes[1] and "UTF-8" in notes[2] and "too deeply" in notes[3]
    assert [r["step"] for r in read_jsonl(file, since_line=3)[0]] == [2, 3]
    assert read_jsonl(file, since_line=8) == ([], [])
    assert read_jsonl(tmp_path / "none.jsonl") == ([], [])
    assert last_line(file) == records[1]  # of the complete lines


def test_a_line_without_end_is_skipped_in_bounded_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(rundir, "MAX_LINE_BYTES", 1000)
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n' + "x" * 5500 + '\n{"step": 2}\n' + "y" * 2500)
    records, notes = read_jsonl(file)
    assert [r["step"] for r in records] == [1, 2]
    assert notes[0] == "metrics.jsonl line 2: skipped, it is longer than 1000 bytes" and len(notes) == 2


def test_tail_reads_each_complete_line_once(tmp_path):
    file = tmp_path / "changes.jsonl"
    tail = Tail(file)
    assert tail.read() == ([], [])
    file.write_text('{"a": 1}\n{"a": 2')
    assert tail.read() == ([{"a": 1}], [])
    assert tail.read() == ([], [])
    with open(file, "a") as more:
        more.write("2}\nbad\n")
    assert tail.read() == ([{"a": 22}], ["changes.jsonl line 3: skipped, it is no JSON "
                                         "(Expecting value: line 1 column 1 (char 0))"])  # fmt: skip
    assert tail.line == 3
    file.write_text('{"a": 9}\n')  # another file in its place
    assert tail.read() == ([{"a": 9}], [])


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"a": 1} x'])
def test_read_json_names_the_file(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ValueError, match=r"run\.json is no JSON object"):
        read_json(tmp_path / "run.json")


# ---------------------------------------------------------------- alive or dead


def test_alive_by_process():
    mine = a_run(process=rundir.this_process(), heartbeat=0.0)  # silent for long, but its process is here
    assert is_alive(mine)
    assert not is_alive({**mine, "status": "finished"})
    assert not is_alive(
        {**mine, "process": {**mine["process"], "created": 1.0}}
    )  # the id was given to another process
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    theirs = a_run(process={**rundir.this_process(), "pid": child.pid, "created": None}, heartbeat=time.time())
    assert is_alive(theirs)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # dead, and not yet buried
    assert not is_alive(theirs)
    child.communicate()
    assert not is_alive(theirs)


@pytest.mark.parametrize(
    ("started", "heartbeat", "step", "now", "alive"),
    [
        (0.0, 1000.0, 1000, 1299.0, True),  # a step a second: five minutes of silence are the limit
        (0.0, 1000.0, 1000, 1301.0, False),
        (0.0, 1000.0, 10, 2999.0, True),  # 100 s a step: twenty steps
        (0.0, 1000.0, 10, 3001.0, False),
        (1000.0, 1000.0, 0, 1200.0, True),
    ],
)
def test_alive_by_heartbeat_elsewhere(started, heartbeat, step, now, alive):
    record = a_run(started=started, heartbeat=heartbeat, step=step, process={"host": "elsewhere", "pid": 1})
    assert is_alive(record, now) is alive
    del record["process"]
    assert is_alive(record, now) is alive


@pytest.mark.parametrize(
    "process", [None, 3, {"host": None}, {"host": rundir._host()}, {"host": rundir._host(), "pid": 2**80}]
)
def test_odd_process_entries_do_no_harm(process):
    assert is_alive(a_run(process=process, heartbeat=0.0)) is False


# ---------------------------------------------------------------- patches

CONFIG = {
    "learning_rate": 1e-5,
    "beta": 0,
    "num_generations": 8,
    "max_completion_length": 256,
    "mask": True,
    "loss_type": "grpo",
    "reward_weights": [1.0, 0.5],
    "stop": ["a"],
    "a/b~c": 1.5,
    "delta": None,
    "entropy_target": None,
}
LIVE = {
    "learning_rate": {"minimum": 0.0, "maximum": 1.0, "choices": None},
    "beta": {"minimum": 0.0, "maximum": None, "choices": None},
    "max_completion_length": {"minimum": 1, "maximum": 4096, "choices": None},
    "mask": {},
    "loss_type": {"minimum": None, "maximum": None, "choices": ["grpo", "dapo"]},
    "reward_weights": {},
    "stop": {},
    "a/b~c": {},
    "delta": {"minimum": 1.0, "maximum": 10.0, "choices": None},
    "entropy_target": {"type": "float"},
}


def op(name, value, kind="replace"):
    return {"op": kind, "path": "/" + name, "value": value}


@pytest.mark.parametrize(
    ("patch", "changes"),
    [
        ([op("learning_rate", 5e-6)], {"learning_rate": (1e-5, 5e-6)}),
        ([op("learning_rate", 1e-5 * (1 + 1e-12), "test"), op("learning_rate", 0)], {"learning_rate": (1e-5, 0.0)}),
        ([op("learning_rate", 1)], {"learning_rate": (1e-5, 1.0)}),
        ([op("beta", 0.0, "test"), op("beta", 0.04)], {"beta": (0, 0.04)}),  # written as 0, but its bound is a float
        ([op("max_completion_length", 512.0)], {"max_completion_length": (256, 512)}),
        ([op("max_completion_length", 4096, "add")], {"max_completion_length": (256, 4096)}),
        ([op("mask", True, "test"), op("mask", False)], {"mask": (True, False)}),
        ([op("loss_type", "dapo")], {"loss_type": ("grpo", "dapo")}),
        ([op("reward_weights", [1, 2])], {"reward_weights": ([1.0, 0.5], [1, 2])}),
        ([op("reward_weights", [1, 0.5], "test"), op("stop", ["a", "b"])], {"stop": (["a"], ["a", "b"])}),
        ([op("a~1b~0c", 2)], {"a/b~c": (1.5, 2.0)}),
        ([op("delta", None, "test"), op("delta", 2)], {"delta": (None, 2)}),
        ([op("entropy_target", 1)], {"entropy_target": (None, 1.0)}),
        ([op("beta", 0.1), op("mask", False), op("num_generations", 8, "test")], {"beta": (0, 0.1), "mask": (True, False)}),
        ([op("beta", 0.1), op("beta", 0.1, "test")], {"beta": (0, 0.1)}),  # operations are done in order
    ],
)  # fmt: skip
def test_patches_that_may_be_applied(patch, changes):
    assert check_patch(patch, CONFIG, LIVE) == changes
    for name, (_, new) in changes.items():
        assert type(check_patch(patch, CONFIG, LIVE)[name][1]) is type(new)


@pytest.mark.parametrize(
    ("patch", "reason"),
    [
        ([], "changes nothing"),
        ([op("learning_rate", 1e-5, "test")], "changes nothing"),
        ([op("learning_rate", 1e-5)], "learning_rate is 1e-05 already"),
        ([op("max_completion_length", 256.0)], "is 256 already"),
        ([op("learning_rate", 2e-5, "test"), op("learning_rate", 1e-6)], "is 1e-05 now, not 2e-05 as the patch expects"),
        ([op("learning_rate", 1e-5 * (1 + 1e-6), "test"), op("learning_rate", 1e-6)], "as the patch expects"),
        ([op("mask", 1, "test"), op("mask", False)], "mask is True now, not 1"),
        ([op("beta", False, "test"), op("beta", 0.1)], "beta is 0 now, not False"),
        ([op("delta", 0, "test"), op("delta", 2.0)], "delta is None now, not 0"),
        ([op("learning_rate", 1.1)], "learning_rate=1.1 is above its maximum 1.0"),
        ([op("learning_rate", -1e-9)], "below its minimum 0.0"),
        ([op("max_completion_length", 0)], "below its minimum 1"),
        ([op("delta", 0.5)], "below its minimum 1.0"),
        ([op("learning_rate", float("nan"))], "not finite"),
        ([op("learning_rate", float("inf"))], "not finite"),
        ([op("learning_rate", 10**400)], "must be a number"),
        ([op("learning_rate", True)], "must be a number, not True"),
        ([op("learning_rate", "1e-6")], "must be a number, not '1e-6'"),
        ([op("learning_rate", None)], "cannot be unset"),
        ([op("max_completion_length", 300.5)], "must be a whole number, not 300.5"),
        ([op("mask", 0)], "must be true or false, not 0"),
        ([op("loss_type", "gspo")], "is none of 'grpo', 'dapo'"),
        ([op("reward_weights", [1.0])], "must be a list of 2 finite numbers"),
        ([op("reward_weights", [1.0, float("inf")])], "must be a list of 2 finite numbers"),
        ([op("reward_weights", 1.0)], "must be a list"),
        ([op("stop", "b")], "must be a list"),
        ([op("num_generations", 16)], "num_generations cannot be changed while the run trains"),
        ([op("lerning_rate", 1e-6)], "'lerning_rate' is no field"),
        ([op("lerning_rate", 1e-6, "add")], "'lerning_rate' is no field"),
        ([op("beta", 0.1), op("beta", 0.2)], "beta is set twice"),
        ([{"op": "remove", "path": "/beta"}], "'remove' on /beta is not allowed"),
        ([{"op": "move", "from": "/beta", "path": "/delta"}], "'move' on /delta is not allowed"),
        ([{"op": "replace", "path": "/beta"}], "has no value"),
        ([op("reward_weights/0", 2.0)], "must name one top-level config field"),
        ([{"op": "replace", "path": "", "value": {}}], "must name one top-level config field"),
        ([{"op": "replace", "path": "beta", "value": 1}], "no RFC 6902 patch"),
        ([{"path": "/beta", "value": 1}], "no RFC 6902 patch"),
        ([{"op": "spin", "path": "/beta", "value": 1}], "no RFC 6902 patch"),
        ([{"op": "replace", "path": 3, "value": 1}], "no RFC 6902 patch"),
        (["replace"], "no RFC 6902 patch"),
        ([3], "no RFC 6902 patch"),
        (3, "no RFC 6902 patch"),
        ("abc", "no RFC 6902 patch"),
        ({"op": "replace"}, "no RFC 6902 patch"),
    ],
)  # fmt: skip
def test_patches_that_are_refused(patch, reason):
    before = json.dumps(CONFIG)
    with pytest.raises(PatchRefused) as refused:
        check_patch(patch, CONFIG, LIVE)
    assert reason in str(refused.value) and "\n" not in str(refused.value)
    assert json.dumps(CONFIG) == before


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats(-5, 5) | st.sampled_from(["", "a"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("ab"), inner, max_size=2),
    max_leaves=4,
)


@settings(max_examples=60, deadline=None)
@given(a=json_values, b=json_values)
def test_same_value_is_an_equality(a, b):
    assert same_value(a, a) and same_value(a, json.loads(json.dumps(a)))
    assert same_value(a, b) == same_value(b, a)
    if isinstance(a, bool) != isinstance(b, bool):
        assert not same_value(a, b)


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(sorted(LIVE)), value=json_values)
def test_what_passes_is_of_the_old_type_and_in_bounds(name, value):
    try:
        changes = check_patch([op(name.replace("~", "~0").replace("/", "~1"), value)], CONFIG, LIVE)
    except PatchRefused:
        return
    old, new = changes[name]
    assert old == CONFIG[name] and not same_value(old, new)
    if name in ("learning_rate", "beta", "a/b~c"):
        assert type(new) is float
    elif old is not None:
        assert type(new) is type(old)
    low, high = LIVE[name].get("minimum"), LIVE[name].get("maximum")
    assert (low is None or new >= low) and (high is None or new <= high)
