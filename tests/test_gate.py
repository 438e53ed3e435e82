"""The gate: 0, 1 or 2 for every way in which a run can end."""

import json
import shutil
import subprocess
import sys

import pytest

from outspoken.agent_api import gate as gate_module
from outspoken.agent_api.gate import gate
from outspoken.diagnostics.rundir import RunDirectory, this_process
from outspoken.diagnostics.verdict import STATES


def a_diagnostic(code, state, severity="warning", fired_step=8, step=10):
    return {
        "schema": "outspoken.diagnostic/1",
        "id": f"run-1-{code}-1",
        "fingerprint": f"{code}|run-1",
        "code": code,
        "severity": severity,
        "state": state,
        "step": step,
        "fired_step": fired_step,
        "message": "31% of the last 512 completions reached max_completion_length=2048.",
    }


@pytest.fixture
def a_run(tmp_path):
    """Writes a run that ended, and gives its output directory."""

    def write(verdict="improving", diagnostics=(), status="finished", **more):
        shutil.rmtree(tmp_path, ignore_errors=True)
        directory = RunDirectory(tmp_path / "outspoken")
        record = {"schema": "outspoken.run/1", "id": "run-1", "status": status, "step": 100, "heartbeat": 1.0, **more}
        directory.write_run(record)
        if verdict is not None:
            directory.write_verdict({"schema": "outspoken.verdict/1", "state": verdict, "reason": "because"})
        for diagnostic in diagnostics:
            directory.append_diagnostic(diagnostic)
        directory.close()
        return tmp_path

    return write


@pytest.mark.parametrize("state", STATES)
def test_verdicts(a_run, state):
    path = a_run(state)
    expected = {"collapsing": 1, "broken": 1, "unknown": 2, "warming_up": 2}.get(state, 0)
    result = gate(path)
    assert result.exit_code == expected and result.verdict == state and result.run == "run-1"
    assert state in result.reasons[0]
    if expected:
        assert result.reasons == [f"verdict is {state}: because"]
    assert gate(path, [state]).exit_code == 1  # asked for, whatever it is
    other = "plateauing" if state != "plateauing" else "drifting"
    assert gate(path, [other]).exit_code == (2 if state in ("unknown", "warming_up") else 0)


def test_collapse_means_collapsing(a_run):
    assert gate(a_run("collapsing"), "collapse").exit_code == 1
    assert gate(a_run("broken"), " collapse , broken").exit_code == 1
    assert gate(a_run("broken"), "collapse").exit_code == 0


FIRED_ERROR = [a_diagnostic("NUM001", "firing", "error")]
PAST_ERROR = [*FIRED_ERROR, a_diagnostic("NUM001", "resolved", "error", step=20)]
FIRED_WARNING = [a_diagnostic("RL016", "firing")]
PAST_WARNING = [*FIRED_WARNING, a_diagnostic("RL016", "resolved", step=20)]
LOST_WARNING = [*FIRED_WARNING, a_diagnostic("RL016", "unknown", step=20)]
SUPPRESSED = [a_diagnostic("RL001", "suppressed", "error")]
PENDING = [a_diagnostic("NUM001", "pending", "error", fired_step=None)]
INFO = [a_diagnostic("PERF001", "firing", "info")]
WORSENED = [
    *FIRED_WARNING,
    a_diagnostic("RL016", "firing", "error", step=12),
    a_diagnostic("RL016", "resolved", step=30),
]


EASED = [*FIRED_ERROR, a_diagnostic("NUM001", "firing", "warning", step=12)]


@pytest.mark.parametrize(
    ("diagnostics", "fail_on", "default", "unresolved_only", "ever"),
    [
        (FIRED_ERROR, "error", 1, 1, 1),
        (PAST_ERROR, "error", 1, 0, 1),
        (FIRED_WARNING, "error", 0, 0, 0),
        (FIRED_WARNING, "warning", 1, 1, 1),
        (PAST_WARNING, "warning", 0, 0, 1),
        (LOST_WARNING, "warning", 1, 1, 1),
        (FIRED_ERROR, "warning", 1, 1, 1),
        (PAST_ERROR, "warning", 1, 0, 1),
        (FIRED_ERROR, "broken", 0, 0, 0),
        (SUPPRESSED, "error", 0, 0, 0),
        (PENDING, "error", 0, 0, 0),
        (INFO, "warning", 0, 0, 0),
        (INFO, "PERF001", 1, 1, 1),
        (PAST_WARNING, "RL016", 1, 0, 1),
        (PAST_WARNING, "RL001", 0, 0, 0),
        (WORSENED, "error", 0, 0, 1),  # it was an error, and was cured
        (WORSENED, "RL016", 1, 0, 1),
        (EASED, "error", 1, 1, 1),
    ],
)
def test_diagnostics(a_run, diagnostics, fail_on, default, unresolved_only, ever):
    path = a_run(diagnostics=diagnostics)
    assert gate(path, fail_on).exit_code == default
    assert gate(path, fail_on, unresolved_only=True).exit_code == unresolved_only
    assert gate(path, fail_on, unresolved_only=False).exit_code == ever


def test_reasons_name_what_was_found(a_run):
    assert gate(a_run("broken", [*PAST_ERROR, *FIRED_WARNING]), "broken,warning").reasons == [
        "verdict is broken: because",
        "error NUM001 at step 8, resolved at step 20: "
        "31% of the last 512 completions reached max_completion_length=2048.",
        "warning RL016 at step 8, still so at the end: "
        "31% of the last 512 completions reached max_completion_length=2048.",
    ]
    assert gate(a_run("improving")).reasons == ["verdict is improving; found none of collapsing, broken, error"]


def test_a_running_run_is_not_judged(a_run):
    path = a_run("collapsing", FIRED_ERROR, status="running", process=this_process())
    result = gate(path)
    assert result.exit_code == 2 and result.reasons == ["the run still trains (step 100); wait for its end"]
    assert gate(path, allow_running=True).exit_code == 1
    assert gate(a_run("improving", status="running", process=this_process()), allow_running=True).exit_code == 0


def test_an_interrupted_run(a_run):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    process = {**this_process(), "pid": dead.pid}
    result = gate(a_run("improving", status="running", process=process))
    assert result.exit_code == 2
    assert result.reasons == [
        "the run was interrupted at step 100; it says it is running, but nothing trains any more"
    ]
    elsewhere = {"host": "elsewhere", "pid": 1}  # seen from another machine: the heartbeat is decades old
    assert gate(a_run("improving", status="running", process=elsewhere)).exit_code == 2
    assert gate(a_run("improving", status="interrupted")).reasons == ["the run was interrupted at step 100"]
    found = gate(a_run("improving", FIRED_ERROR, status="interrupted"))
    assert found.exit_code == 1 and "NUM001" in found.reasons[0] and "interrupted" in found.reasons[1]


def test_a_failed_run_is_bad(a_run):
    result = gate(a_run("improving", status="failed"))
    assert result.exit_code == 1 and result.reasons == ["the run failed with an exception at step 100"]


def test_without_a_verdict(a_run):
    assert gate(a_run(None)).reasons == ["the run has no verdict"]
    assert gate(a_run(None)).exit_code == 2
    assert gate(a_run(None, FIRED_ERROR)).exit_code == 1


@pytest.mark.parametrize("words", ["colapse", "error,colapse", ["info"], "RL16", "", [], "rl016", "NUM999"])
def test_unknown_words_give_the_valid_ones(a_run, words):
    result = gate(a_run("improving"), words)
    assert result.exit_code == 2
    (reason,) = result.reasons
    assert (
        "collapsing" in reason and "stalled_no_signal" in reason and "warning" in reason and "codes of rules" in reason
    )
    for word in ("colapse", "info", "RL16", "rl016", "NUM999"):
        assert (repr(word) in reason) == (word in words)


def test_the_words_are_the_verdicts():
    assert gate_module.VERDICT_STATES == STATES


def test_no_run(tmp_path):
    assert gate(tmp_path / "nowhere").exit_code == 2
    result = gate(tmp_path)
    assert result.exit_code == 2 and "has no run.json" in result.reasons[0] and result.run is None


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("run.json", '{"schema": "outspoken.run/2", "status": "finished"}', "newer than outspoken.run/1"),
        ("run.json", "{", "cannot be read"),
        ("verdict.json", '{"schema": "outspoken.verdict/2", "state": "splendid"}', "newer than outspoken.verdict/1"),
        ("verdict.json", "garbage", "no JSON object"),
        ("verdict.json", "[]", "not an object"),
        ("diagnostics.jsonl", '{"schema": "outspoken.diagnostic/2"}\n', "newer than outspoken.diagnostic/1"),
        ("diagnostics.jsonl", "garbage\n", "no line of"),
        ("diagnostics.jsonl", None, "is missing, so what fired is not known"),
    ],
)
def test_what_cannot_be_read_is_not_judged(a_run, file, content, reason):
    path = a_run("improving", FIRED_ERROR)
    if content is None:
        (path / "outspoken" / file).unlink()
    else:
        (path / "outspoken" / file).write_text(content)
    result = gate(path)
    assert result.exit_code == 2 and reason in result.reasons[0]


def test_a_torn_last_line_is_noted(a_run):
    path = a_run("improving", FIRED_WARNING)
    with open(path / "outspoken" / "diagnostics.jsonl", "a") as file:
        file.write('{"schema": "outspoken.diag')
    result = gate(path)
    assert result.exit_code == 0 and "line 2" in result.notes[0]


def test_the_metrics_are_never_read(a_run):
    path = a_run("broken")
    (path / "outspoken" / "metrics.jsonl").unlink()
    (path / "outspoken" / "metrics.jsonl").mkdir()  # reading it would raise
    assert gate(path).exit_code == 1


def test_the_result_is_plain_data(a_run):
    result = gate(a_run("broken"))
    assert json.loads(json.dumps(result.as_dict())) == {
        "exit_code": 1,
        "reasons": ["verdict is broken: because"],
        "run": "run-1",
        "verdict": "broken",
        "notes": [],
    }
