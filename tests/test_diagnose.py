"""From a log to a report: `outspoken.report/1`, by replay or as a run directory recorded it."""

import json
import math
import random

import pytest

from outspoken import schemas
from outspoken.diagnostics.diagnose import diagnose
from outspoken.diagnostics.engine import Engine
from outspoken.diagnostics.records import Observation
from outspoken.diagnostics.rundir import RunDirectory
from outspoken.diagnostics.sources import UnreadableLog


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def cut_run(steps=60, share=0.75):
    """A GRPO log, 64 completions a step, of which `share` hit the cap of 128 tokens from the first step on."""
    noise = random.Random(0)
    rows = []
    for step in range(1, steps + 1):
        cut = sum(noise.random() < share for _ in range(64)) / 64
        rows.append(
            {
                "step": step,
                "loss": noise.gauss(0, 0.01),
                "grad_norm": math.exp(noise.gauss(-1, 0.2)),
                "learning_rate": 1e-6,
                "reward": 0.3 + noise.gauss(0, 0.03),
                "reward_std": 0.4,
                "frac_reward_zero_std": 0.25,
                "completions/mean_length": 120 + noise.gauss(0, 1),
                "completions/clipped_ratio": cut,
                "entropy": 0.8 + noise.gauss(0, 0.02),
            }
        )
    return rows


CONFIG = {
    "max_completion_length": 128,
    "num_generations": 8,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 8,
    "beta": 0.0,
    "learning_rate": 1e-6,
}


def by_code(report):
    return {d["code"]: d for d in report["diagnostics"]}


def test_a_log_is_replayed_and_the_report_is_valid(tmp_path):
    path = write_rows(tmp_path / "log.jsonl", cut_run())
    report = diagnose(path, config=CONFIG)
    schemas.validate(report)
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert report["method"] == "grpo" and report["config_known"] and report["run"] is None
    source = report["source"]
    assert (source["path"], source["format"], source["rows"]) == (str(path), "jsonl", 60)
    assert (source["first_step"], source["last_step"]) == (1, 60)
    assert "completions/clipped_ratio" in source["signals"] and not any(s.endswith("#n") for s in source["signals"])
    truncation = by_code(report)["RL016"]
    assert truncation["state"] == "firing" and "128" in truncation["message"]
    patch = truncation["suggestions"][0]["patch"]
    assert patch[0] == {"op": "test", "path": "/max_completion_length", "value": 128}
    assert {"code", "name", "reason"} == set(report["not_checked"][0])


def test_which_settings_are_known_if_not_all(tmp_path):
    path = write_rows(tmp_path / "log.jsonl", cut_run())
    (tmp_path / "hparams.yaml").write_text("learning_rate: 1e-6\nbeta: 0.1\n")
    assert diagnose(path)["notes"] == [
        "Of the run's settings these are known: beta, learning_rate; what depends on others was not judged. Give --config."
    ]


def test_without_its_settings_the_report_says_so(tmp_path):
    path = write_rows(tmp_path / "log.jsonl", cut_run())
    report = diagnose(path)
    schemas.validate(report)
    assert not report["config_known"]
    assert any("settings of the run are not known" in note for note in report["notes"])
    # 64 completions a step are told from the fractions alone
    assert "RL016" in by_code(report)
    assert any("share is not logged; at least: completions/clipped_ratio 64" in n for n in report["source"]["notes"])


def test_a_healthy_log_has_no_alarm(tmp_path):
    noise = random.Random(1)
    rows = [
        {
            "step": s,
            "loss": 3 * math.exp(-s / 60) + 1 + noise.gauss(0, 0.05),
            "grad_norm": math.exp(noise.gauss(0, 0.2)),
        }
        for s in range(1, 151)
    ]
    report = diagnose(write_rows(tmp_path / "log.jsonl", rows), method="sft", config={"learning_rate": 1e-4})
    assert [d for d in report["diagnostics"] if d["severity"] != "info"] == []
    assert report["verdict"]["state"] in ("improving", "converged")


def test_rules_can_be_switched_off_and_their_limits_moved(tmp_path):
    path = write_rows(tmp_path / "log.jsonl", cut_run())
    assert "RL016" not in by_code(diagnose(path, config=CONFIG, ignore=["RL016"]))
    assert "RL016" not in by_code(diagnose(path, config=CONFIG, params={"RL016": {"limit": 0.95}}))
    with pytest.raises(ValueError, match="RL16"):
        diagnose(path, ignore=["RL16"])
    with pytest.raises(ValueError, match="method 'grop' is not known; choose one of grpo"):
        diagnose(path, method="grop")
    with pytest.raises(UnreadableLog, match="no such file"):
        diagnose(tmp_path / "missing.jsonl")


def test_nan_in_a_log_is_seen(tmp_path):
    rows = [{"step": s, "loss": 2.0 - 0.01 * s, "grad_norm": 1.0} for s in range(1, 40)]
    text = "".join(json.dumps(r) + "\n" for r in rows) + '{"step": 40, "loss": NaN, "grad_norm": NaN}\n'
    path = tmp_path / "log.jsonl"
    path.write_text(text)
    report = diagnose(path, method="sft")
    schemas.validate(report)
    assert by_code(report)["NUM001"]["state"] == "firing"
    assert report["verdict"]["state"] == "broken"


def test_the_report_is_the_same_whenever_it_is_made(tmp_path):
    rows = [{**row, "timestamp": 1767323045 + row["step"]} for row in cut_run()]
    path = write_rows(tmp_path / "log.jsonl", rows)
    assert diagnose(path, config=CONFIG) == diagnose(path, config=CONFIG)
    assert diagnose(path, config=CONFIG)["verdict"]["time"] == 1767323045 + 60


def test_a_restart_in_the_log_opens_a_segment(tmp_path):
    rows = cut_run(30)
    path = write_rows(tmp_path / "log.jsonl", rows + [{**r, "reward": r["reward"] + 0.01} for r in cut_run(40)[19:]])
    report = diagnose(path, config=CONFIG)
    assert report["verdict"]["segment"] == 1
    assert any("went back from 30 to 20" in n for n in report["source"]["notes"])


# ---------------------------------------------------------------------- run directories


@pytest.fixture
def recorded_run(tmp_path):
    """A run directory whose run raised its cap from 64 to 128 at step 31, then 30 steps more."""
    out = tmp_path / "out"
    directory = RunDirectory(out / "outspoken")
    config = {**CONFIG, "max_completion_length": 64}
    engine = Engine(method="grpo", config=config, run_id="r1", total_steps=60)
    for row in cut_run(60):
        step = row.pop("step")
        if step == 31:
            engine.open_segment(step, "change c1", CONFIG)
            directory.append_change(
                {
                    "schema": "outspoken.change/1",
                    "id": "c1",
                    "state": "applied",
                    "step": 30,
                    "time": 0.0,
                    "actor": "test",
                    "patch": [],
                    "fields": {"max_completion_length": {"old": 64, "new": 128}},
                    "reason": "",
                    "suggestion": None,
                    "diagnostic": None,
                    "segment": 1,
                    "config_rev": engine.config_rev,
                    "expect": None,
                    "observed": {},
                    "rollback_on_failure": False,
                    "run": "r1",
                }
            )
        observation = Observation.from_raw(step, row, time=1000.0 + step)
        directory.append_observation(observation, engine.view.segment)
        for transition in engine.observe(observation):
            directory.append_diagnostic(transition.record)
    for transition in engine.finish():
        directory.append_diagnostic(transition.record)
    directory.write_verdict(engine.verdict())
    directory.write_run(
        {"schema": "outspoken.run/1", "id": "r1", "method": "grpo", "status": "finished", "config": CONFIG}
    )
    directory.close()
    return out, engine


def test_a_run_directory_is_reported_as_recorded(recorded_run):
    out, engine = recorded_run
    report = diagnose(out)
    schemas.validate(report)
    assert diagnose(out / "outspoken") == report
    assert report["run"] == "r1" and report["source"]["format"] == "run_directory"
    assert (report["source"]["first_step"], report["source"]["last_step"], report["source"]["rows"]) == (1, 60, 60)
    assert report["verdict"] == json.loads((out / "outspoken" / "verdict.json").read_text())
    fired = {code: d["state"] for code, d in engine.diagnostics().items() if d["state"] in ("firing", "suppressed")}
    assert {code: d["state"] for code, d in by_code(report).items() if d["state"] in ("firing", "suppressed")} == fired
    assert "RL016" in fired and any("As the run recorded it" in n for n in report["notes"])


def test_a_replay_knows_the_settings_of_each_segment(recorded_run):
    out, engine = recorded_run
    report = diagnose(out, replay=True)
    schemas.validate(report)
    assert report["run"] == "r1" and report["config_known"]
    assert any(n["code"] for n in report["not_checked"])
    assert report["verdict"]["state"] == engine.verdict()["state"] and report["verdict"]["segment"] == 1
    mine, theirs = by_code(report), engine.diagnostics()
    assert {c: (d["state"], d["fired_step"], d["message"]) for c, d in mine.items()} == {
        c: (d["state"], d["fired_step"], d["message"]) for c, d in theirs.items()
    }
    # at the end of the first segment the cap was still 64
    lines = (out / "outspoken" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "outspoken" / "metrics.jsonl").write_text("".join(lines[:30]))
    early = by_code(diagnose(out, replay=True))["RL016"]
    assert "max_completion_length=64" in early["message"] and early["suggestions"][0]["patch"][0]["value"] == 64
    # what is given wins over what was recorded
    given = by_code(diagnose(out, replay=True, config={"max_completion_length": 96}))["RL016"]
    assert "max_completion_length=96" in given["message"]


def test_given_settings_make_a_replay(recorded_run):
    out, _ = recorded_run
    assert "RL016" not in by_code(diagnose(out, ignore=["RL016"]))


def test_a_run_directory_that_a_crash_left(recorded_run):
    out, _ = recorded_run
    folder = out / "outspoken"
    (folder / "verdict.json").unlink()  # killed before the first verdict: judged from the metrics
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"schema": "outspoken.observation/1", "step": 61, "sig')
    report = diagnose(out)
    schemas.validate(report)
    assert report["source"]["rows"] == 60 and "RL016" in by_code(report)
    assert any("cut off" in n for n in report["source"]["notes"])
    (folder / "run.json").write_text("{")
    with pytest.raises(UnreadableLog, match=r"run\.json"):
        diagnose(out)
