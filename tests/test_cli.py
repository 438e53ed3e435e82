"""The commands that read runs: what they print for people and for programs, and how they exit."""

import json
import threading
import time
from pathlib import Path

import pytest

from outspoken import schemas
from outspoken.cli import common, main
from outspoken.diagnostics.records import Observation, change_field
from outspoken.diagnostics.rundir import BadRequest, RunDirectory

CONFIG = {"learning_rate": 1e-4, "max_completion_length": 8, "loss_type": "dapo", "output_dir": "out"}
LIVE = {
    "learning_rate": {"minimum": 0.0, "maximum": 1.0, "choices": None},
    "max_completion_length": {"minimum": 1, "maximum": 1000, "choices": None},
    "loss_type": {"minimum": None, "maximum": None, "choices": ["dapo", "grpo"]},
}


def run_record(**more):
    return {
        "schema": "outspoken.run/1",
        "id": "run-1",
        "parent": None,
        "method": "grpo",
        "trainer": "outspoken.GRPOTrainer",
        "status": "running",
        "started": time.time() - 60,
        "heartbeat": time.time(),
        "step": 240,
        "total_steps": 400,
        "config": dict(CONFIG),
        "live": LIVE,
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


def verdict_record(state="improving", **more):
    return {
        "schema": "outspoken.verdict/1",
        "state": state,
        "confidence": "high",
        "step": 240,
        "since_step": 100,
        "time": 1.0,
        "run": "run-1",
        "segment": 0,
        "reason": "because of the numbers",
        "evidence": [],
        "runner_up": None,
        "would_change": "",
        "firing": [],
        "suppressed": [],
        "pending": [],
        **more,
    }


def suggestion_record(**more):
    return {
        "id": "raise-cap",
        "title": "Raise max_completion_length from 8 to 24",
        "applicability": "suggest",
        "when": "live",
        "patch": change_field("max_completion_length", 8, 24),
        "formula": "",
        "inputs": {},
        "preconditions": [],
        "side_effects": [],
        "risk": "low",
        "expect": {
            "signal": "completions/clipped_ratio",
            "direction": "below",
            "value": 0.1,
            "within_steps": 20,
            "min_n": 5,
        },
        "on_failure": "revert",
        **more,
    }


def diagnostic_record(code="RL016", state="firing", severity="warning", step=210, **more):
    return {
        "schema": "outspoken.diagnostic/1",
        "id": f"run-1-{code}-1",
        "fingerprint": f"{code}|run-1",
        "code": code,
        "name": "truncation-saturation",
        "doc": "",
        "severity": severity,
        "state": state,
        "confidence": "high",
        "category": "online_rl",
        "step": step,
        "first_step": 200,
        "fired_step": 205,
        "onset_step": 200,
        "last_step": step,
        "count": 5,
        "run": "run-1",
        "segment": 0,
        "config_rev": "sha256:0",
        "time": 1.0,
        "message": "31% of completions reached max_completion_length=8.",
        "advice": "Consider raising max_completion_length from 8 to 24.",
        "evidence": [],
        "not_checked": [],
        "impact": "",
        "causes": [],
        "inhibits": [],
        "suggestions": [suggestion_record()],
        **more,
    }


def change_record(change_id, state, **more):
    return {
        "schema": "outspoken.change/1",
        "id": change_id,
        "state": state,
        "step": 212,
        "time": 1.0,
        "actor": "tester",
        "patch": change_field("max_completion_length", 8, 24),
        "fields": {"max_completion_length": {"old": 8, "new": 24}},
        "reason": "",
        "suggestion": None,
        "diagnostic": None,
        "segment": 0,
        "config_rev": "sha256:0",
        "expect": None,
        "observed": {},
        "rollback_on_failure": True,
        "run": "run-1",
        **more,
    }


@pytest.fixture
def writer(tmp_path):
    """A run directory that this process writes: it counts as alive while its status is "running"."""
    directory = RunDirectory(tmp_path / "out" / "outspoken")
    for record in (run_record(), diagnostic_record(), verdict_record()):
        schemas.validate(record)
    directory.write_run(run_record())
    for step in range(1, 31):
        directory.append_observation(Observation(step, {"reward": 0.5, "loss": 0.1}), 0)
    yield directory
    directory.close()


def finish(writer, verdict="improving", status="finished", **more):
    writer.write_verdict(verdict_record(verdict, **more))
    writer.write_run(run_record(status=status))


@pytest.fixture
def run_dir(writer):
    return str(writer.path.parent)


@pytest.fixture
def cli(capsys, monkeypatch):
    """`cli(*arguments)` -> (exit code, standard output, standard error)."""
    monkeypatch.delenv("OUTSPOKEN_DEBUG", raising=False)

    def call(*arguments):
        capsys.readouterr()
        code = main.main([str(a) for a in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


# ---------------------------------------------------------------------- the whole


def test_version_and_help(cli):
    import outspoken

    assert cli("--version") == (0, f"outspoken {outspoken.__version__}\n", "")
    for arguments in ((), ("--help",), ("-h",)):
        code, out, _ = cli(*arguments)
        assert code == 0
        for command in ("sft", "grpo", "diagnose", "watch", "explain", "rules", "apply", "gate"):
            assert f" {command} " in out


@pytest.mark.parametrize("command", ["sft", "grpo", "diagnose", "watch", "explain", "rules", "apply", "gate"])
def test_every_command_has_help(cli, command):
    code, out, err = cli(command, "--help")
    assert code == 0 and err == "" and "--json" in out


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["gat"], "No such command 'gat'"),
        (["gate"], "Missing argument 'RUN'"),
        (["gate", "x", "--nope"], "No such option"),
        (["watch", "x", "--interval", "fast"], "Invalid value for '--interval'"),
        (["explain", "RL016", "RL017"], "unexpected extra argument"),
    ],
)
def test_wrong_usage_is_one_sentence(cli, arguments, said):
    code, out, err = cli(*arguments)
    assert (code, out) == (2, "") and said in err
    assert err.startswith("outspoken: ") and err.count("\n") == 1
    code, out, err = cli(*arguments, "--json")
    assert (code, err) == (2, "") and said in json.loads(out)["error"]


def test_an_error_of_ours_is_one_sentence_too(cli, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("first\nsecond \x1b[31m")

    monkeypatch.setattr("outspoken.agent_api.gate.gate", fail)
    code, out, err = cli("gate", "x")
    assert (code, out) == (2, "")
    assert err == "outspoken: RuntimeError: first second \\x1b[31m (OUTSPOKEN_DEBUG=1 shows where)\n"
    monkeypatch.setenv("OUTSPOKEN_DEBUG", "1")
    with pytest.raises(RuntimeError):
        main.main(["gate", "x"])


@pytest.mark.parametrize("error, code", [(KeyboardInterrupt, 130)])
def test_interrupted(cli, monkeypatch, error, code):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("outspoken.agent_api.gate.gate", fail)
    assert cli("gate", "x") == (code, "", "")


def test_what_is_printed_inside_clean_stdout_goes_to_standard_error(capfd):
    import os

    with common.clean_stdout():
        print("from python")
        os.system("echo from a child")
    print("the document")
    out, err = capfd.readouterr()
    assert out == "the document\n"
    assert "from python" in err and "from a child" in err


# ---------------------------------------------------------------------- gate


@pytest.mark.parametrize("verdict, code, word", [("improving", 0, "PASS"), ("broken", 1, "FAIL")])
def test_gate(cli, writer, run_dir, verdict, code, word):
    finish(writer, verdict)
    got, out, _ = cli("gate", run_dir)
    assert got == code and out.startswith(word) and verdict in out
    got, out, _ = cli("gate", run_dir, "--json")
    document = json.loads(out)
    assert got == document["exit_code"] == code and document["verdict"] == verdict and "error" not in document


def test_a_person_gets_the_first_notes_and_a_program_all(cli):
    log = Path(__file__).parent / "peer_logs" / "verl" / "gsm8k.jsonl"
    notes = json.loads(cli("diagnose", log, "--json")[1])["source"]["notes"]
    _, out, _ = cli("diagnose", log)
    shown = [line.removeprefix("  note: ") for line in out.splitlines() if line.startswith("  note: ")]
    assert len(notes) > 10 and shown[:8] == notes[:8] and len(shown) == 9
    assert shown[8].startswith(f"{len(notes) - 8} further notes")
    # Of the names with several meanings, those that are judged come first.
    meanings = [i for i, note in enumerate(notes) if note.startswith(("actor/ppo_kl", "response_length/clip"))]
    assert notes[meanings[0]].startswith("response_length/clip")
    # One more line would say as much as the note itself.
    assert common.most_important(["a", "b", "c"], 2) == ["a", "b", "c"]
    assert common.most_important(["a", "b", "c", "d"], 2)[:2] == ["a", "b"]


def test_gate_options(cli, writer, run_dir):
    writer.append_diagnostic(diagnostic_record())
    assert cli("gate", run_dir)[0] == 2  # it still trains
    writer.write_verdict(verdict_record("drifting"))
    assert cli("gate", run_dir, "--allow-running")[0] == 0
    assert cli("gate", run_dir, "--allow-running", "--fail-on", "drifting,broken")[0] == 1
    code, out, _ = cli("gate", run_dir, "--allow-running", "--fail-on", "warning")
    assert code == 1 and "RL016" in out
    writer.append_diagnostic(diagnostic_record(state="resolved", step=230))
    assert cli("gate", run_dir, "--allow-running", "--fail-on", "warning")[0] == 0
    assert cli("gate", run_dir, "--allow-running", "--fail-on", "warning", "--ever-fired")[0] == 1
    assert cli("gate", run_dir, "--allow-running", "--fail-on", "RL016")[0] == 1
    assert cli("gate", run_dir, "--allow-running", "--fail-on", "RL016", "--unresolved-only")[0] == 0


def test_gate_that_cannot_judge(cli, tmp_path):
    code, out, _ = cli("gate", tmp_path, "--json")
    assert code == 2 and "no run.json" in json.loads(out)["error"]
    code, out, _ = cli("gate", tmp_path)
    assert code == 2 and out.startswith("CANNOT JUDGE")


# ---------------------------------------------------------------------- rules, explain


def test_rules(cli):
    code, out, _ = cli("rules")
    assert code == 0
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert "nonfinite-loss" in lines["NUM001"] and " error " in lines["NUM001"] and " any " in lines["NUM001"]
    code, out, _ = cli("rules", "--json")
    rules = {rule["code"]: rule for rule in json.loads(out)}
    assert rules.keys() == lines.keys() - {"code"}
    assert rules["NUM001"]["severity"] == "error" and "grpo" in rules["NUM001"]["methods"]


def test_rules_of_a_method(cli):
    rules = json.loads(cli("rules", "--method", "sft", "--json")[1])
    assert rules and all("sft" in rule["methods"] for rule in rules)
    code, _, err = cli("rules", "--method", "grop")
    assert code == 2 and "method 'grop' is not known" in err and "grpo" in err


@pytest.mark.parametrize("name", ["RL016", "rl016", "truncation-saturation"])
def test_explain_a_rule(cli, name):
    code, out, _ = cli("explain", name)
    assert code == 0 and out.startswith("RL016 truncation-saturation")
    for heading in ("Why it hurts", "How it is decided", "When it is fine", "What to change", "Sources"):
        assert heading in out
    record = json.loads(cli("explain", name, "--json")[1])
    assert record["code"] == "RL016" and record["name"] == "truncation-saturation"
    assert {"severity", "methods", "needs", "params", "page"} <= record.keys()
    assert "## Why it hurts" in record["page"]


def test_explain_a_signal(cli):
    code, out, _ = cli("explain", "kl")
    assert code == 0 and "beta=0" in out and "nats/token" in out
    assert "in kto it is something else:" in out and "nats/sequence" in out
    record = json.loads(cli("explain", "kl", "--json")[1])
    assert record["of_method"]["kto"]["unit"] == "nats/sequence" and record["unit"] == "nats/token"
    assert record["signal"] == "kl" and record["low"] is None and record["impossible_when"].startswith("beta=0")
    assert json.loads(cli("explain", "eval_loss", "--json")[1])["signal"] == "eval_loss"
    assert json.loads(cli("explain", "rewards/mine/mean", "--json")[1])["signal"] == "rewards/<function>/mean"


@pytest.mark.parametrize("name, near", [("RL999", "RL"), ("truncation-saturatoin", "truncation-saturation?")])
def test_explain_what_is_unknown(cli, name, near):
    code, out, err = cli("explain", name)
    assert (code, out) == (2, "") and f"{name!r} is neither a rule nor a signal" in err and near in err


# ---------------------------------------------------------------------- diagnose


@pytest.fixture
def log(tmp_path):
    """`log(rows)` writes a JSON lines log."""

    def write(rows):
        path = tmp_path / "log.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


def test_diagnose_a_log(cli, log):
    path = log([{"step": i, "loss": 2.0 - 0.01 * i, "learning_rate": 1e-5} for i in range(1, 101)])
    code, out, _ = cli("diagnose", path)
    assert code == 0
    assert "100 rows, steps 1 to 100, method sft" in out
    assert any(line.startswith("verdict ") and "improving" in line for line in out.splitlines())
    assert "Not checked:" in out and "Give --config" in out
    assert "  NUM005 grad-spike, NUM008 zero-gradient: grad_norm is not measured" in out.splitlines()
    code, out, _ = cli("diagnose", path, "--json")
    report = json.loads(out)
    schemas.validate(report)
    assert code == 0 and report["verdict"]["state"] == "improving"


def test_diagnose_a_bad_log(cli, log):
    rows = [{"step": i, "loss": 2.0 - 0.01 * i} for i in range(1, 60)]
    path = log([*rows, *({"step": i, "loss": "nan"} for i in range(60, 70))])
    code, out, _ = cli("diagnose", path)
    assert code == 1
    assert len([line for line in out.splitlines() if line.startswith("ERROR NUM001 step ")]) == 1
    assert "verdict" in out and "broken" in out
    assert json.loads(cli("diagnose", path, "--json")[1])["verdict"]["state"] == "broken"
    code, out, _ = cli("diagnose", path, "--ignore", "NUM001", "--json")
    assert "NUM001" not in [d["code"] for d in json.loads(out)["diagnostics"]]


def test_diagnose_with_a_config(cli, log, tmp_path):
    path = log([{"step": i, "loss": 1.0, "reward": 0.1, "kl": 0.1} for i in range(1, 30)])
    config = tmp_path / "run.yaml"
    config.write_text("beta: 0.04\n")
    report = json.loads(cli("diagnose", path, "--config", config, "--method", "grpo", "--json")[1])
    assert report["config_known"] and report["method"] == "grpo"


@pytest.mark.parametrize(
    "options, said",
    [
        (["--method", "grop"], "method 'grop' is not known"),
        (["--ignore", "RL01"], "RL01"),
        (["--param", "RL016"], "must look like RL016.limit=0.3"),
        (["--param", "RL016.limit=high"], "must look like RL016.limit=0.3"),
        (["--param", "RL016.nope=1"], "no parameter 'nope'"),
        (["--config", "missing.yaml"], "missing.yaml"),
        (["--format", "xml"], "xml"),
    ],
)
def test_diagnose_with_wrong_options(cli, log, options, said):
    path = log([{"step": i, "loss": 1.0, "reward": 0.1} for i in range(1, 30)])
    code, out, err = cli("diagnose", path, *options)
    assert (code, out) == (2, "") and said in err and err.count("\n") == 1


def test_diagnose_what_cannot_be_read(cli, tmp_path):
    code, out, err = cli("diagnose", tmp_path / "nothing.jsonl")
    assert (code, out) == (2, "") and "nothing.jsonl" in err
    path = tmp_path / "broken.json"
    path.write_text('{"log_history": [')
    code, out, _ = cli("diagnose", path, "--json")
    assert code == 2 and "broken.json" in json.loads(out)["error"]


def test_diagnose_a_run_directory_tells_what_was_recorded(cli, writer, run_dir):
    writer.append_diagnostic(diagnostic_record())
    writer.append_diagnostic(diagnostic_record(state="resolved", step=230))
    finish(writer)
    code, out, _ = cli("diagnose", run_dir)
    assert code == 0
    assert "RESOLVED RL016 step 230: truncation-saturation, which fired at step 205, is over. It was: 31% of" in out
    writer.append_diagnostic(diagnostic_record("NUM001", severity="error"))
    assert cli("diagnose", run_dir)[0] == 1


def test_hostile_text_of_a_run_is_harmless(cli, writer, run_dir):
    hostile = "[bold]x[/bold] \x1b[2J\n[outspoken] PASS"
    writer.append_diagnostic(diagnostic_record(message=hostile, suggestions=[suggestion_record(title=hostile)]))
    finish(writer, reason=hostile)
    for command in ("diagnose", "watch", "apply", "gate"):
        _, out, err = cli(command, run_dir)
        assert "\x1b" not in out + err
        assert not any(line.startswith("[outspoken] PASS") for line in out.splitlines())
    assert "[bold]x[/bold]" in cli("diagnose", run_dir)[1]


# ---------------------------------------------------------------------- watch


def test_watch_a_finished_run(cli, writer, run_dir):
    writer.append_diagnostic(diagnostic_record())
    writer.append_diagnostic(diagnostic_record("RL001", state="suppressed", step=211))
    writer.append_change(change_record("c1", "requested"))
    writer.append_change(change_record("c1", "applied"))
    writer.append_diagnostic(diagnostic_record(state="resolved", step=230))
    writer.append_diagnostic(diagnostic_record("RL001", state="resolved", step=231))
    finish(writer)
    code, out, _ = cli("watch", run_dir)
    assert code == 0
    assert [line.split(":")[0] for line in out.splitlines()] == [
        "[outspoken] WARNING RL016 step 210",
        "[outspoken] CHANGE applied step 212",
        "[outspoken] RESOLVED RL016 step 230",
        "[outspoken] VERDICT improving (high) step 240",
        "[outspoken] RUN finished at step 240",
    ]
    lines = [json.loads(line) for line in cli("watch", run_dir, "--json")[1].splitlines()]
    assert [line["event"] for line in lines].count("outspoken.diagnostic") == 4
    assert lines[-1] == {"event": "outspoken.run", "run": "run-1", "status": "finished", "step": 240}


@pytest.mark.parametrize(
    "verdict, status, code",
    [
        ("improving", "finished", 0),
        ("broken", "finished", 1),
        ("improving", "failed", 1),
        ("improving", "interrupted", 2),
    ],
)
def test_watch_exits_as_the_run_ends(cli, writer, run_dir, verdict, status, code):
    finish(writer, verdict, status)
    assert cli("watch", run_dir)[0] == code


def test_watch_a_run_that_died(cli, writer, run_dir):
    writer.write_run(run_record(process={"host": "elsewhere", "pid": 1}, heartbeat=1.0, started=0.0))
    code, out, _ = cli("watch", run_dir)
    assert code == 2 and "RUN interrupted" in out


def test_watch_follows_a_live_run_to_its_end(cli, writer, run_dir):
    def train():
        time.sleep(0.2)
        writer.append_diagnostic(diagnostic_record())
        time.sleep(0.2)
        finish(writer)

    trainer = threading.Thread(target=train)
    trainer.start()
    code, out, _ = cli("watch", run_dir, "--interval", "0.05")
    trainer.join()
    assert code == 0
    assert [line.split()[1] for line in out.splitlines()] == ["WARNING", "VERDICT", "RUN"]


def test_watch_once(cli, writer, run_dir):
    writer.append_diagnostic(diagnostic_record())
    code, out, _ = cli("watch", run_dir, "--once")
    assert code == 0 and out.splitlines()[-1] == "[outspoken] RUN running at step 240"


def test_watch_skips_a_torn_line_with_a_note(cli, writer, run_dir):
    with open(writer.path / "diagnostics.jsonl", "a") as file:
        file.write("{torn\n")
    writer.append_diagnostic(diagnostic_record())
    finish(writer)
    code, out, err = cli("watch", run_dir)
    assert code == 0 and "RL016" in out and "diagnostics.jsonl line 1: skipped" in err


def test_watch_nothing(cli, tmp_path):
    code, out, err = cli("watch", tmp_path)
    assert (code, out) == (2, "") and "no run.json" in err


# ---------------------------------------------------------------------- apply


class FakeTrainer(threading.Thread):
    """Takes the first request and takes a change through the given states."""

    def __init__(self, writer, *states):
        super().__init__(daemon=True)
        self.writer, self.states, self.request = writer, states, None

    def run(self):
        deadline = time.monotonic() + 30
        while self.request is None and time.monotonic() < deadline:
            for request in self.writer.requests():
                assert not isinstance(request, BadRequest), request.reason
                self.request = request
                for state in self.states:
                    self.writer.append_change(
                        change_record(request["id"], state, actor=request["actor"], reason=state)
                    )
                    time.sleep(0.05)
            time.sleep(0.01)


def test_apply_lists_suggestions(cli, writer, run_dir):
    assert cli("apply", run_dir) == (0, "No diagnostic that fires now suggests a change.\n", "")
    writer.append_diagnostic(diagnostic_record())
    code, out, _ = cli("apply", run_dir)
    assert code == 0 and "raise-cap" in out and "Raise max_completion_length from 8 to 24" in out
    (suggestion,) = json.loads(cli("apply", run_dir, "--json")[1])["suggestions"]
    assert suggestion["id"] == "raise-cap" and suggestion["code"] == "RL016"


@pytest.mark.parametrize("name", ["raise-cap", "RL016", "rl016"])
def test_apply_asks_for_a_suggestion(cli, writer, run_dir, name):
    writer.append_diagnostic(diagnostic_record())
    code, out, _ = cli("apply", run_dir, name, "--actor", "me", "--json")
    document = json.loads(out)
    assert code == 0 and document["state"] == "requested"
    (request,) = writer.requests()
    assert request["id"] == document["id"] and request["actor"] == "me" and request["suggestion"] == "raise-cap"
    assert request["patch"] == change_field("max_completion_length", 8, 24) and request["rollback_on_failure"] is True


def test_apply_values(cli, writer, run_dir):
    options = ("--set", "learning_rate=5e-5", "--set", "loss-type=grpo", "--no-rollback")
    assert cli("apply", run_dir, *options)[0] == 0
    (request,) = writer.requests()
    assert request["patch"] == change_field("learning_rate", 1e-4, 5e-5) + change_field("loss_type", "dapo", "grpo")
    assert request["rollback_on_failure"] is False and request["actor"].startswith("cli")


def test_apply_dry_run_asks_for_nothing(cli, writer, run_dir):
    writer.append_diagnostic(diagnostic_record())
    code, out, _ = cli("apply", run_dir, "raise-cap", "--dry-run")
    assert code == 0
    assert out.splitlines() == [
        "would change max_completion_length: 8 -> 24",
        "expecting completions/clipped_ratio below 0.1 within 20 steps",
    ]
    document = json.loads(cli("apply", run_dir, "--set", "learning_rate=1e-5", "--dry-run", "--json")[1])
    assert document["dry_run"] and document["request"]["patch"] == change_field("learning_rate", 1e-4, 1e-5)
    assert list(writer.requests()) == []


@pytest.mark.parametrize(
    "states, code, last",
    [
        (["applied", "verified"], 0, "verified"),
        (["rejected"], 1, "rejected"),
        (["applied", "failed", "rolled_back"], 1, "rolled_back"),
    ],
)
def test_apply_waits_for_the_effect(cli, writer, run_dir, states, code, last):
    trainer = FakeTrainer(writer, *states)
    trainer.start()
    got, out, err = cli("apply", run_dir, "--set", "max_completion_length=24", "--wait", "--actor", "me", "--json")
    trainer.join()
    assert got == code and json.loads(out)["state"] == last
    assert "waiting for its effect" in err


def test_apply_prints_the_change(cli, writer, run_dir):
    trainer = FakeTrainer(writer, "applied", "verified")
    trainer.start()
    code, out, _ = cli("apply", run_dir, "--set", "max_completion_length=24", "--wait", "--actor", "me")
    trainer.join()
    assert code == 0
    assert out == "[outspoken] CHANGE verified step 212: max_completion_length 8 -> 24 (asked by me): verified\n"


def test_apply_gives_up_waiting(cli, writer, run_dir):
    code, out, err = cli("apply", run_dir, "--set", "max_completion_length=24", "--wait", "--timeout", "0.1")
    assert (code, out) == (2, "") and "waited 0.1 s" in err


@pytest.mark.parametrize(
    "options, said",
    [
        (["--set", "learning_rat=1"], "did you mean 'learning_rate'?"),
        (["--set", "learning_rate=5"], "above its maximum 1.0"),
        (["--set", "learning_rate=fast"], "must be a number"),
        (["--set", "output_dir=x"], "cannot be changed while the run trains"),
        (["--set", "loss_type=foo"], "is none of"),
        (["--set", "learning_rate"], "must look like learning_rate=1e-5"),
        (["--set", "=5"], "must look like learning_rate=1e-5"),
        (["--set", "learning_rate=1e-5", "--set", "learning_rate=1e-6"], "names learning_rate twice"),
        (["--set", "learning_rate=1e-4"], "already"),
        (["nothing-like-it"], "no firing diagnostic suggests 'nothing-like-it'"),
        (["raise-cap", "--set", "learning_rate=1e-5"], "not both"),
    ],
)
def test_apply_refuses_what_is_wrong(cli, writer, run_dir, options, said):
    for more in ([], ["--dry-run"]):
        code, out, err = cli("apply", run_dir, *options, *more)
        assert (code, out) == (2, "") and said in err and err.count("\n") == 1
    assert list(writer.requests()) == []


def test_a_suggestion_that_goes_back_to_a_checkpoint(cli, writer, run_dir):
    back = suggestion_record(when="earlier_checkpoint", expect=None)
    writer.append_diagnostic(
        diagnostic_record(suggestions=[suggestion_record(id="code", patch=[], when="code"), back])
    )
    code, out, _ = cli("apply", run_dir, "RL016", "--dry-run")
    assert code == 0 and out.splitlines()[1] == "after going back to the newest good checkpoint"


def test_apply_to_a_run_that_is_over(cli, writer, run_dir):
    finish(writer)
    code, _, err = cli("apply", run_dir, "--set", "learning_rate=1e-5")
    assert code == 2 and "only a run that trains takes changes" in err


def test_a_rule_with_several_live_suggestions_asks_which(cli, writer, run_dir):
    lower = suggestion_record(id="lower-lr", patch=change_field("learning_rate", 1e-4, 5e-5))
    later = suggestion_record(id="later", when="checkpoint")
    writer.append_diagnostic(diagnostic_record(suggestions=[suggestion_record(), lower, later]))
    code, _, err = cli("apply", run_dir, "RL016")
    assert code == 2 and "raise-cap, lower-lr" in err
    writer.append_diagnostic(diagnostic_record(suggestions=[later, lower]))
    assert cli("apply", run_dir, "RL016")[0] == 0
    (request,) = writer.requests()
    assert request["suggestion"] == "lower-lr"
