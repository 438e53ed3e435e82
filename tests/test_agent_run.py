"""A run as an agent sees it: reading it live or dead, asking for a change, waiting for what becomes of it."""

import json
import math
import os
import subprocess
import sys
import threading
import time

import pytest

from outspoken import schemas
from outspoken.agent_api import NotARun, RequestRefused, Run
from outspoken.diagnostics.records import Observation, change_field
from outspoken.diagnostics.rundir import RunDirectory, this_process

CONFIG = {
    "learning_rate": 1e-5,
    "beta": 0,
    "temperature": 1.0,
    "max_completion_length": 256,
    "num_generations": 8,
    "scale_rewards": "group",
    "a/b~c": 1.0,
}
LIVE = {
    "learning_rate": {"minimum": 0.0, "maximum": 1.0, "choices": None},
    "beta": {"minimum": 0.0, "maximum": None, "choices": None},
    "max_completion_length": {"minimum": 1, "maximum": 4096, "choices": None},
    "scale_rewards": {"minimum": None, "maximum": None, "choices": ["group", "batch", "none"]},
    "a/b~c": {"minimum": 0.0, "maximum": None, "choices": None},
}


def a_run(**more):
    return {
        "schema": "outspoken.run/1",
        "id": "run-1",
        "parent": None,
        "method": "grpo",
        "trainer": "GRPOTrainer",
        "status": "running",
        "started": time.time(),
        "heartbeat": time.time(),
        "step": 3,
        "total_steps": 100,
        "config": CONFIG,
        "live": LIVE,
        "config_rev": "sha256:0",
        "versions": {},
        "hardware": {},
        "world_size": 1,
        "dataset": None,
        "facts": {},
        "segment": 1,
        "verdict": None,
        **more,
    }


def a_suggestion(suggestion_id="RL016.1", field="max_completion_length", old=256, new=512, **more):
    return {
        "id": suggestion_id,
        "title": "Raise the completion cap",
        "applicability": "suggest",
        "when": "live",
        "patch": change_field(field, old, new),
        "formula": "min(2*old, 1.3*p99)",
        "inputs": {"p99": 300},
        "preconditions": [],
        "side_effects": [],
        "risk": "medium",
        "expect": {
            "signal": "completions/clipped_ratio",
            "direction": "below",
            "value": 0.1,
            "within_steps": 30,
            "min_n": 128,
        },
        "on_failure": "revert",
        **more,
    }


def a_diagnostic(code="RL016", state="firing", severity="warning", step=10, **more):
    made = {
        "schema": "outspoken.diagnostic/1",
        "id": f"run-1-{code}-1",
        "fingerprint": f"{code}|run-1",
        "code": code,
        "name": "name",
        "doc": "",
        "severity": severity,
        "state": state,
        "confidence": "high",
        "category": "online_rl",
        "step": step,
        "first_step": 5,
        "fired_step": 8,
        "onset_step": 5,
        "last_step": step,
        "count": 3,
        "run": "run-1",
        "segment": 0,
        "config_rev": "sha256:0",
        "time": 1.0,
        "message": "m",
        "advice": "a",
        "evidence": [],
        "not_checked": [],
        "impact": "",
        "causes": [],
        "inhibits": [],
        "suggestions": [],
        **more,
    }
    schemas.validate(made)
    return made


def a_change(change_id, state, **more):
    made = {
        "schema": "outspoken.change/1",
        "id": change_id,
        "state": state,
        "step": 3,
        "time": 1.0,
        "actor": "me",
        "patch": [],
        "fields": {},
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
    schemas.validate(made)
    return made


def a_verdict(state, **more):
    made = {
        "schema": "outspoken.verdict/1",
        "state": state,
        "confidence": "high",
        "step": 10,
        "since_step": 5,
        "time": 1.0,
        "run": "run-1",
        "segment": 0,
        "reason": "because",
        "evidence": [],
        "runner_up": None,
        "would_change": "",
        "firing": [],
        "suppressed": [],
        "pending": [],
        **more,
    }
    schemas.validate(made)
    return made


@pytest.fixture
def writer(tmp_path):
    """A run directory that this process writes: its run is alive."""
    made = RunDirectory(tmp_path / "out" / "outspoken")
    made.write_run(a_run())
    schemas.validate(json.loads((made.path / "run.json").read_text()))
    yield made
    made.close()


@pytest.fixture
def run(writer):
    return Run(writer.path)


def observe(writer, step, signals, segment=0):
    writer.append_observation(Observation.from_raw(step, signals), segment)


def inbox(writer):
    return list(writer.requests())


# ---------------------------------------------------------------- finding and reading a run


def test_a_run_is_found_by_its_output_directory(writer):
    for path in (writer.path, writer.path.parent, str(writer.path)):
        run = Run(path)
        assert (run.id, run.status, run.method, run.segment) == ("run-1", "running", "grpo", 1)
        assert run.config == CONFIG and run.live_fields == LIVE and run.alive
    assert "grpo, running at step 3" in repr(run)


def test_what_is_no_run_is_refused_with_the_reason(tmp_path):
    with pytest.raises(NotARun, match="does not exist"):
        Run(tmp_path / "nowhere")
    with pytest.raises(NotARun, match=r"has no run\.json; name a run's output directory"):
        Run(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(NotARun, match="is a file"):
        Run(tmp_path / "file")
    for content, reason in (
        ("{", r"run\.json cannot be read.*no JSON object"),
        ('{"schema": "outspoken.run/2"}', "newer than outspoken.run/1"),
        ('{"schema": "trainer_state"}', "not 'outspoken.run/1'"),
    ):
        (tmp_path / "run.json").write_text(content)
        with pytest.raises(NotARun, match=reason):
            Run(tmp_path)


def test_a_live_run_is_read_anew(run, writer):
    assert run.step == 3
    observe(writer, 7, {"reward": 0.5})
    assert run.step == 7  # the heartbeat is throttled; the metrics are not
    writer.write_run(a_run(status="finished", step=9, config={**CONFIG, "beta": 0.1}))
    assert (run.step, run.status, run.config["beta"], run.alive) == (9, "finished", 0.1, False)


def test_a_dead_run_is_read_without_its_writer(writer):
    observe(writer, 4, {"reward": 0.5})
    writer.write_run(a_run(heartbeat=1.0, process={**this_process(), "pid": _dead_pid()}))
    writer.close()
    run = Run(writer.path)
    assert run.status == "running" and not run.alive and run.step == 4 and len(run.metrics()) == 1


def _dead_pid():
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_metrics_restores_what_is_not_finite(run, writer):
    observe(writer, 1, {"loss": 2.0, "reward": 0.25})
    observe(writer, 2, {"loss": float("nan"), "kl": 0.5})
    observe(writer, 3, {"loss": float("inf"), "reward": "-inf", "note": "text"})
    frame = run.metrics()
    assert frame.index.name == "step" and list(frame.index) == [1, 2, 3]
    assert list(frame.columns) == ["loss", "reward", "kl"] and all(frame.dtypes == "float64")
    assert frame["loss"][1] == 2.0 and math.isnan(frame["loss"][2]) and frame["loss"][3] == math.inf
    assert frame["reward"][1] == 0.25 and math.isnan(frame["reward"][2]) and frame["reward"][3] == -math.inf
    assert frame["kl"].notna().tolist() == [False, True, False]


def test_metrics_of_some_signals_since_a_step(run, writer):
    for step in range(1, 6):
        observe(writer, step, {"loss": step, "reward": 10 * step})
    assert run.metrics("reward", since=4)["reward"].tolist() == [40.0, 50.0]
    frame = run.metrics(["reward", "no/such", "loss"], since=5)
    assert list(frame.columns) == ["reward", "no/such", "loss"] and math.isnan(frame["no/such"][5])
    assert len(run.metrics(since=6)) == 0 and run.metrics(since=6).index.name == "step"


def test_metrics_of_a_resumed_run_has_each_step_once(run, writer):
    for step in range(1, 10):  # died at 9; the checkpoint is of step 4
        observe(writer, step, {"loss": step})
    for step in (5, 6):
        observe(writer, step, {"loss": 100 + step}, segment=1)
    observe(writer, 7, {"loss": 107}, segment=2)  # a change opens a segment, too: nothing was done anew
    observe(writer, 7, {"eval_loss": 9}, segment=3)
    frame = run.metrics()
    assert list(frame.index) == [1, 2, 3, 4, 5, 6, 7]  # 8 and 9 were thrown away and not reached again
    assert frame["loss"].tolist() == [1, 2, 3, 4, 105, 106, 107] and frame["eval_loss"][7] == 9


def test_metrics_of_odd_lines(run, writer):
    odd = [
        '{"step": 1, "signals": {"loss": 0.5, "list": [1], "text": "hello", "number": "0.25", "big": 1e400}}',
        '{"step": 2, "signals": {"loss": NaN}, "nonfinite": {"kl": "inf", "x": "?"}}',
        '{"step": "3", "signals": {"loss": 1}}',
        '{"step": 4, "signals": "none"}',
        "garbage",
        '{"step": 5, "signals": {"loss": 5}',
    ]
    (writer.path / "metrics.jsonl").write_text("\n".join(odd))
    frame = run.metrics()
    assert list(frame.index) == [1, 2, 4]
    assert list(frame.columns) == ["loss", "number", "big", "kl"]
    assert frame.loc[1, ["loss", "number", "big"]].tolist() == [0.5, 0.25, math.inf]
    assert math.isnan(frame["loss"][2]) and frame["kl"][2] == math.inf


def test_diagnostics_are_the_latest_of_each(run, writer):
    for record in (
        a_diagnostic("RL016", "firing", step=10),
        a_diagnostic("NUM001", "firing", "error", step=12),
        a_diagnostic("RL016", "resolved", step=20),
        a_diagnostic("RL003", "suppressed", "info", step=21),
    ):
        writer.append_diagnostic(record)
    assert [(d["code"], d["state"]) for d in run.diagnostics()] == [
        ("NUM001", "firing"),
        ("RL016", "resolved"),
        ("RL003", "suppressed"),
    ]
    assert [d["code"] for d in run.diagnostics(state="firing")] == ["NUM001"]
    assert [d["code"] for d in run.diagnostics(state=["firing", "resolved"])] == ["NUM001", "RL016"]
    assert [d["code"] for d in run.diagnostics(severity="info")] == ["RL003"]
    assert [d["code"] for d in run.diagnostics(severity=["error", "warning"], since=20)] == ["RL016"]
    assert [d["step"] for d in run.history()] == [10, 12, 20, 21]


def test_suggestions_most_urgent_first(run, writer):
    def caused_by(*codes):
        return [{"code": c, "relation": "caused_by", "onset_step": 1} for c in codes]

    # RL016 causes RL003, which causes RL001; NUM004 is apart; the error comes before all of them.
    for record in (
        a_diagnostic("RL001", causes=caused_by("RL003"), fired_step=2, suggestions=[a_suggestion("RL001.1")]),
        a_diagnostic("RL003", fired_step=3, suggestions=[a_suggestion("RL003.1"), a_suggestion("RL003.2")]),
        a_diagnostic("RL016", inhibits=["RL003"], fired_step=9, suggestions=[a_suggestion()]),
        a_diagnostic(
            "NUM004", fired_step=4, suggestions=[a_suggestion("NUM004.1", applicability="inspect", patch=[])]
        ),
        a_diagnostic("NUM009", severity="error", fired_step=50, suggestions=[a_suggestion("NUM009.1")]),
        a_diagnostic("RL009", state="resolved", suggestions=[a_suggestion("RL009.1")]),
        a_diagnostic("PERF001", severity="info", suggestions=[a_suggestion("PERF001.1", applicability="auto")]),
    ):
        writer.append_diagnostic(record)
    found = run.suggestions()
    assert [s["id"] for s in found] == [
        "NUM009.1",
        "NUM004.1",
        "RL016.1",
        "RL003.1",
        "RL003.2",
        "RL001.1",
        "PERF001.1",
    ]
    assert (found[0]["code"], found[0]["diagnostic"]) == ("NUM009", "run-1-NUM009-1")
    assert [s["id"] for s in run.suggestions("auto")] == ["PERF001.1"]
    assert [s["id"] for s in run.suggestions(["auto", "inspect"])] == ["NUM004.1", "PERF001.1"]


def test_causes_in_a_circle_do_not_hang(run, writer):
    for code, other in (("RL001", "RL002"), ("RL002", "RL001"), ("RL003", "RL003")):
        cause = {"code": other, "relation": "caused_by", "onset_step": None}
        writer.append_diagnostic(a_diagnostic(code, causes=[cause], suggestions=[a_suggestion(code)]))
    assert sorted(s["id"] for s in run.suggestions()) == ["RL001", "RL002", "RL003"]


def test_verdict_and_changes(run, writer):
    assert run.verdict() is None and run.changes() == [] and run.suggestions() == []
    writer.write_verdict(a_verdict("improving"))
    assert run.verdict()["state"] == "improving"
    for change_id, state in (("a", "requested"), ("b", "requested"), ("a", "applied"), ("a", "verified")):
        writer.append_change(a_change(change_id, state))
    assert [(c["id"], c["state"]) for c in run.changes()] == [("a", "verified"), ("b", "requested")]


# ---------------------------------------------------------------- asking for a change


def test_apply_a_suggestion(run, writer):
    writer.append_diagnostic(a_diagnostic(suggestions=[a_suggestion()]))
    (suggestion,) = run.suggestions()
    change_id = run.apply(suggestion, actor="agent", rollback_on_failure=False)
    (request,) = inbox(writer)
    schemas.validate(request)
    assert request["id"] == change_id and request["time"] == pytest.approx(time.time(), abs=60)
    assert {
        k: request[k] for k in ("actor", "patch", "suggestion", "diagnostic", "expect", "rollback_on_failure")
    } == {
        "actor": "agent",
        "patch": change_field("max_completion_length", 256, 512),
        "suggestion": "RL016.1",
        "diagnostic": "run-1-RL016-1",
        "expect": a_suggestion()["expect"],
        "rollback_on_failure": False,
    }
    assert os.listdir(writer.control) == [f"{change_id}.json"]


def test_apply_by_field_by_patch_and_by_name(run, writer):
    writer.append_diagnostic(a_diagnostic(suggestions=[a_suggestion()]))
    expect = {"signal": "kl", "direction": "below", "value": 0.1, "within_steps": 5}
    ids = [
        run.apply({"learning_rate": 5e-6, "beta": 0.04}, actor="me", expect=expect),
        run.apply([{"op": "replace", "path": "/scale_rewards", "value": "batch"}], actor="me"),
        run.apply("RL016.1", actor="me"),
        run.apply({"a/b~c": 2.0}, actor="me"),
    ]
    requests = inbox(writer)
    assert [r["id"] for r in requests] == ids  # names sort by time
    assert requests[0]["patch"] == change_field("learning_rate", 1e-5, 5e-6) + change_field("beta", 0, 0.04)
    assert requests[0]["expect"] == {**expect, "min_n": 5} and requests[0]["suggestion"] is None
    assert requests[0]["rollback_on_failure"] is True
    assert requests[2]["suggestion"] == "RL016.1"
    assert requests[3]["patch"][1] == {"op": "replace", "path": "/a~1b~0c", "value": 2.0}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"lerning_rate": 1e-6}, "'lerning_rate' is no field of this run's config; did you mean 'learning_rate'?"),
        ([{"op": "replace", "path": "/bata", "value": 1}], "did you mean 'beta'?"),
        ({"xyzzy": 1}, "'xyzzy' is no field of this run's config"),
        ({"num_generations": 16}, "num_generations cannot be changed while the run trains; it takes effect from a restart"),
        ({"learning_rate": 2.0}, "learning_rate=2.0 is above its maximum 1.0"),
        ({"learning_rate": "small"}, "learning_rate must be a number, not 'small'"),
        ({"learning_rate": float("nan")}, "not finite"),
        ({"learning_rate": 1e-5}, "is 1e-05 already"),
        ({"max_completion_length": 300.5}, "must be a whole number"),
        ({"scale_rewards": "groups"}, "is none of 'group', 'batch', 'none'"),
        (change_field("learning_rate", 3e-5, 1e-6), "learning_rate is 1e-05 now, not 3e-05 as the patch expects"),
        ([{"op": "remove", "path": "/beta"}], "'remove' on /beta is not allowed"),
        ([], "changes nothing"),
        ({}, "changes nothing"),
        (["beta"], "a patch is a list of operations"),
        ("RL999.1", "no firing diagnostic suggests 'RL999.1'; suggestions now: none"),
        (a_suggestion(when="checkpoint"), "takes effect from a restart from a checkpoint, not while the run trains"),
        (a_suggestion(when="code"), "takes effect from a change of code or data"),
        (a_suggestion(applicability="inspect", patch=[]), r"RL016.1 (inspect) has no patch to apply: Raise the"),
        (a_suggestion(old=128), "max_completion_length is 256 now, not 128"),
        (a_suggestion(field="num_generations", old=8, new=16), "num_generations cannot be changed"),
    ],
)  # fmt: skip
def test_what_the_trainer_would_refuse_is_refused_at_once(run, writer, change, reason):
    with pytest.raises(RequestRefused) as refused:
        run.apply(change, actor="me")
    assert reason in str(refused.value) and "\n" not in str(refused.value)
    assert os.listdir(writer.control) == []


def test_only_a_suggestion_from_an_earlier_checkpoint_asks_to_go_back(run, writer):
    run.apply({"beta": 0.1}, actor="me")
    run.apply(a_suggestion(), actor="me")
    run.apply(a_suggestion(when="earlier_checkpoint"), actor="me")
    assert [request["restore"] for request in inbox(writer)] == [False, False, True]


def test_a_plan_is_checked_and_not_sent(run, writer):
    plan = run.plan({"beta": 0.1}, actor="me")
    schemas.validate(plan)
    assert plan["patch"] == change_field("beta", 0, 0.1) and inbox(writer) == []
    with pytest.raises(RequestRefused, match="below its minimum"):
        run.plan({"beta": -1}, actor="me")


def test_bad_actors_and_expectations_are_refused(run, writer):
    with pytest.raises(RequestRefused, match="actor is ''"):
        run.apply({"beta": 0.1}, actor="")
    with pytest.raises(RequestRefused, match="expect lacks 'direction'"):
        run.apply({"beta": 0.1}, actor="me", expect={"signal": "kl", "value": 1.0, "within_steps": 3})
    assert os.listdir(writer.control) == []


def test_a_run_that_does_not_train_takes_no_changes(run, writer):
    writer.write_run(a_run(status="finished"))
    with pytest.raises(RequestRefused, match="the run is finished; only a run that trains takes changes"):
        run.apply({"beta": 0.1}, actor="me")
    writer.write_run(a_run(process={**this_process(), "pid": _dead_pid()}))
    with pytest.raises(RequestRefused, match="was interrupted without a word"):
        run.apply({"beta": 0.1}, actor="me")


def test_an_inbox_that_cannot_be_written(run, writer):
    os.rmdir(writer.control)
    with pytest.raises(RequestRefused, match=r"cannot be put into .*control"):
        run.apply({"beta": 0.1}, actor="me")


# ---------------------------------------------------------------- waiting


def later(*actions, every=0.05):
    def work():
        for action in actions:
            time.sleep(every)
            action()

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_wait_for_a_change_to_settle(run, writer):
    change_id = run.apply({"beta": 0.1}, actor="me")
    steps = [lambda s=s: writer.append_change(a_change(change_id, s)) for s in ("requested", "applied", "verified")]
    thread = later(*steps)
    assert run.wait_for(change_id, timeout=10, poll=0.01)["state"] == "verified"
    thread.join()
    assert run.wait_for(change_id, states="verified", timeout=0)["state"] == "verified"
    assert run.wait_for(change_id, ["failed", "verified"], timeout=0)["state"] == "verified"


def test_wait_for_diagnostic_step_and_verdict(run, writer):
    thread = later(
        lambda: writer.append_diagnostic(a_diagnostic("RL016", step=5)),
        lambda: observe(writer, 12, {"reward": 1.0}),
        lambda: writer.write_verdict(a_verdict("collapsing")),
    )
    assert run.wait_for(diagnostic="RL016", timeout=10, poll=0.01)["step"] == 5
    assert run.wait_for(diagnostic="run-1-RL016-1", timeout=10, poll=0.01)["code"] == "RL016"
    assert run.wait_for(step=12, timeout=10, poll=0.01)["id"] == "run-1" and run.step == 12
    assert run.wait_for(verdict=["broken", "collapsing"], timeout=10, poll=0.01)["state"] == "collapsing"
    thread.join()


def test_waiting_in_vain_says_what_was_seen(run, writer):
    with pytest.raises(TimeoutError, match=r"waited 0.05 s for change x to be verified or .*; last seen: nothing"):
        run.wait_for("x", timeout=0.05, poll=0.01)
    writer.append_change(a_change("x", "requested"))
    with pytest.raises(TimeoutError, match="change x to be applied; last seen: requested"):
        run.wait_for("x", "applied", timeout=0)
    with pytest.raises(TimeoutError, match="for step 99; last seen: step 3"):
        run.wait_for(step=99, timeout=0)
    writer.write_verdict(a_verdict("improving"))
    with pytest.raises(TimeoutError, match=r"for the verdict broken; last seen: improving \(because\)"):
        run.wait_for(verdict="broken", timeout=0)


def test_waiting_ends_when_the_run_ends(run, writer):
    thread = later(lambda: writer.write_run(a_run(status="finished", step=50)))
    with pytest.raises(TimeoutError, match="for step 99, but the run is finished; last seen: step 50"):
        run.wait_for(step=99, timeout=60, poll=0.01)
    thread.join()
    assert run.wait_for(step=50)["status"] == "finished"  # what is there is found in a dead run, too


@pytest.mark.parametrize("what", [{}, {"step": 1, "verdict": "broken"}, {"change_id": "a", "diagnostic": "RL016"}])
def test_wait_for_one_thing_at_a_time(run, what):
    with pytest.raises(ValueError, match="exactly one"):
        run.wait_for(**what)


def test_reading_a_run_loads_neither_torch_nor_pandas(writer):
    source = (
        "import sys; from outspoken.agent_api import Run; from outspoken.agent_api.gate import gate;"
        f"run = Run({str(writer.path)!r}); run.diagnostics(); run.suggestions(); run.step; gate(run.path);"
        "print([m for m in ('torch', 'transformers', 'pandas', 'numpy', 'jsonschema') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
