"""A growing log, looked at again and again, is judged as the finished one is."""

import csv
import io
import json
import random
import threading
import time

import pytest

from outspoken.cli.main import main
from outspoken.diagnostics.diagnose import diagnose
from outspoken.diagnostics.follow import Follower
from outspoken.diagnostics.sources import UnreadableLog


def grpo_rows(steps=80, cut_from=30):
    """A GRPO run whose completions are cut from a step on, with an evaluation every ten steps."""
    draw = random.Random(3)
    rows = []
    for step in range(1, steps + 1):
        rows.append(
            {
                "step": step,
                "loss": round(draw.gauss(0, 0.01), 5),
                "grad_norm": round(draw.uniform(0.4, 0.6), 5),
                "reward": round(0.3 + 0.004 * step + draw.gauss(0, 0.02), 5),
                "reward_std": round(draw.uniform(0.3, 0.4), 5),
                "frac_reward_zero_std": 0.125,
                "num_completions": 64,
                "completions/mean_length": round(draw.uniform(180, 220), 2),
                "completions/clipped_ratio": 0.015625 if step < cut_from else 0.4375,
            }
        )
        if step % 10 == 0:
            rows.append({"step": step, "eval_reward": round(0.3 + 0.004 * step, 5)})
    return rows


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def told(transitions):
    return [(t.record["code"], t.record["state"], t.record["step"]) for t in transitions if t.kind == "transition"]


def firing(report):
    return {d["code"]: (d["state"], d["fired_step"], d["message"]) for d in report["diagnostics"]}


def follow_to_the_end(path, contents, **how):
    """Look after each piece was written; then once more, and at last."""
    follower, news = Follower(path, **how), []
    for content in contents:
        path.write_text(content)
        news += follower.look()
    news += follower.look() + follower.look(last=True)
    return follower, news


def as_csv(rows):
    out = io.StringIO()
    writer = csv.DictWriter(out, list(dict.fromkeys(name for row in rows for name in row)))
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def as_state(rows):
    return json.dumps({"log_history": rows, "global_step": rows[-1]["step"]}, indent=2)


def as_console(rows):
    return "".join(
        f"step:{r.pop('step')} - " + " - ".join(f"{k}:{v}" for k, v in r.items()) + "\n" for r in map(dict, rows)
    )


@pytest.mark.parametrize("write", [lines, as_csv, as_state], ids=["jsonl", "csv", "trainer_state"])
@pytest.mark.parametrize("pieces", [[1, 40, 41, 88], [33, 34, 35, 36, 88], list(range(5, 89, 7))])
def test_a_growing_log_is_judged_as_the_finished_one(tmp_path, write, pieces):
    rows, path = grpo_rows(), tmp_path / "log.jsonl"
    # A CSV file names all its columns in its first line; here the evaluation's name is known from the start.
    first = [{**rows[0], "eval_reward": None}, *rows[1:]] if write is as_csv else rows
    follower, news = follow_to_the_end(path, [write(first[:n]) for n in pieces])
    finished = diagnose(path)
    assert finished["diagnostics"], "the run has nothing wrong with it, so this tests nothing"
    assert firing({"diagnostics": follower.engine.diagnostics().values()}) == firing(finished)
    assert follower.engine.verdict()["state"] == finished["verdict"]["state"]
    assert len(told(news)) == len(set(told(news))), "something was told twice"
    assert any(code == "RL016" and state == "firing" for code, state, _ in told(news))


def test_news_comes_when_it_happens_and_once(tmp_path):
    rows, path = grpo_rows(), tmp_path / "log.jsonl"
    follower = Follower(path)
    path.write_text(lines(rows[:25]))
    assert told(follower.look()) == []
    with path.open("a") as log:
        log.write(lines(rows[25:60]))
    assert [code for code, _, _ in told(follower.look())] == ["RL016"]
    assert follower.look() == []
    assert follower.look() == []


def test_the_newest_step_waits_for_further_values(tmp_path):
    path = tmp_path / "log.jsonl"
    follower = Follower(path)
    path.write_text(lines([{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.9}]))
    follower.look()
    assert follower.engine.view.step == 1
    with path.open("a") as log:
        log.write(lines([{"step": 2, "eval_loss": 0.95}]))
    follower.look()
    follower.look()  # nothing was written since
    assert follower.engine.view.step == 2
    assert follower.engine.view.points == 2
    assert follower.engine.view.last("eval_loss") == 0.95


def test_an_evaluation_that_comes_late_is_fed_on_its_own(tmp_path):
    path = tmp_path / "log.jsonl"
    follower = Follower(path)
    path.write_text(lines([{"step": s, "loss": 1.0 / s} for s in range(1, 6)]))
    follower.look()
    follower.look()
    with path.open("a") as log:
        log.write(lines([{"step": 5, "eval_loss": 0.5}, {"step": 6, "loss": 0.1}]))
    follower.look()
    follower.look()
    assert follower.engine.view.last("eval_loss") == 0.5
    assert follower.engine.view.last("loss") == 0.1
    assert follower.engine.view.segment == 0


def test_a_log_begun_anew_is_judged_from_its_beginning(tmp_path):
    rows, path = grpo_rows(), tmp_path / "log.jsonl"
    path.write_text(lines(rows))
    follower = Follower(path)
    assert "RL016" in [code for code, _, _ in told(follower.look())]
    healthy = grpo_rows(steps=40, cut_from=999)
    path.write_text(lines(healthy))
    assert told(follower.look()) == []
    assert any("judged again from its beginning" in note for note in follower.notes)
    assert told(follower.look()) == [] and follower.engine.view.step == 40
    assert follower.engine.diagnostics() == {}


def test_a_note_is_told_once_however_its_numbers_grow(tmp_path):
    path, said = tmp_path / "train.log", []
    follower, text = Follower(path), ""
    for step in range(1, 40):
        text += f"step {step} loss {1 / step:.4f} lr 0.1\n" + "a line of another kind\n" * (step > 5)
        path.write_text(text)
        follower.look()
        said += follower.notes
    assert [note.split()[0] for note in said] == ["Read", "Taken", "Read"]  # the console, the method, the names


def test_each_segment_is_told_of(tmp_path):
    path, said, rows = tmp_path / "log.jsonl", [], []
    follower = Follower(path)
    for first in (1, 10, 20):
        rows += [{"step": k, "loss": 1 / (k + first)} for k in range(first, first + 20)]
        path.write_text(lines(rows))
        follower.look()
        said += [note for note in follower.notes if "segment" in note]
    assert len(said) == 2


def test_a_run_that_goes_back_opens_a_segment(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text(lines([{"step": s, "loss": 1.0 / s} for s in range(1, 21)]))
    follower = Follower(path)
    follower.look()
    follower.look()
    with path.open("a") as log:
        log.write(lines([{"step": s, "loss": 1.1 / s} for s in range(11, 31)]))
    follower.look()
    assert follower.engine.view.segment == 1
    assert follower.engine.view.points == 20 + 19


def test_names_that_tell_the_system_come_later(tmp_path):
    """The first row has a loss only; what follows is veRL's, and means other things."""
    path = tmp_path / "log.jsonl"
    follower = Follower(path)
    path.write_text(lines([{"step": 0, "loss": 0.0}, {"step": 1, "loss": 0.0}]))
    follower.look()
    assert follower.run.family == "other"
    more = [{"step": s, "data": {"actor/pg_loss": 0.1, "critic/score/mean": 0.5}} for s in range(2, 8)]
    with path.open("a") as log:
        log.write(lines(more))
    follower.look()
    follower.look()
    assert follower.run.family == "verl"
    assert follower.engine.view.last("reward") == 0.5


def test_checkpoints_of_an_output_directory(tmp_path):
    """The Trainer writes its whole history into each checkpoint; the newest is read."""
    rows = grpo_rows()
    follower, codes = Follower(tmp_path), []
    for step in (20, 40, 80):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text(as_state([r for r in rows if r["step"] <= step]))
        codes += [code for code, _, _ in told(follower.look())]
    codes += [code for code, _, _ in told(follower.look())]
    assert codes.count("RL016") == 1
    assert follower.engine.view.step == 80


def test_waiting_for_the_first_row(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text("")
    follower = Follower(path)
    assert follower.look() == [] and "empty" in follower.waiting
    path.write_text(lines([{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}]))
    follower.look()
    assert follower.waiting == "" and follower.engine.view.step == 1


def test_a_log_that_becomes_unreadable(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text(lines([{"step": 1, "loss": 1.0}]))
    follower = Follower(path)
    follower.look()
    path.write_bytes(b"\x80\x02pickle")
    with pytest.raises(UnreadableLog, match="pickle"):
        follower.look()
    path.write_text(lines([{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}]))
    follower.look()
    follower.look()
    assert follower.engine.view.step == 2


def test_the_closing_row_ends_it(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text(lines([{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}]))
    follower = Follower(path)
    follower.look()
    assert not follower.over
    with path.open("a") as log:
        log.write(lines([{"step": 2, "train_runtime": 12.5, "train_loss": 0.75}]))
    follower.look()
    assert follower.over and follower.engine.view.step == 2


# ---------------------------------------------------------------------- the command


@pytest.fixture
def cli(capfd):
    def run(*arguments):
        code = main([str(a) for a in arguments])
        out, err = capfd.readouterr()
        return code, out, err

    return run


def test_watch_follows_a_log_to_its_end(cli, tmp_path):
    rows, path = grpo_rows(), tmp_path / "log.jsonl"
    path.write_text(lines(rows[:20]))

    def train():
        for first in range(20, len(rows), 20):
            time.sleep(0.15)
            with path.open("a") as log:
                log.write(lines(rows[first : first + 20]))
        with path.open("a") as log:
            log.write(lines([{"step": 80, "train_runtime": 1.0, "train_loss": 0.0}]))

    trainer = threading.Thread(target=train)
    trainer.start()
    code, out, err = cli("watch", path, "--interval", "0.05")
    trainer.join()
    said = out.splitlines()
    assert sum("WARNING RL016" in line for line in said) == 1
    assert said[-1] == "[outspoken] LOG finished at step 80"
    assert code == 0, "a warning does not make a run bad"
    assert "Taken for grpo" in err


def test_watch_once_and_for_programs(cli, tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text(lines([*grpo_rows(), {"step": 81, "loss": float("nan"), "grad_norm": float("nan")}]))
    code, out, _ = cli("watch", path, "--once", "--json")
    events = [json.loads(line) for line in out.splitlines()]
    assert events[-1] == {"event": "outspoken.run", "run": None, "status": "read", "step": 81}
    assert {e["record"]["code"] for e in events if e["event"] == "outspoken.diagnostic"} >= {"RL016", "NUM001"}
    assert code == 1, "a loss that is not a number is an error"
    assert code == cli("diagnose", path)[0]


def test_watch_left_before_a_row_came_is_told_to_programs_too(cli, tmp_path, monkeypatch):
    def interrupt(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr("outspoken.cli.watch.time.sleep", interrupt)
    (tmp_path / "train.log").touch()
    code, out, _ = cli("watch", tmp_path / "train.log", "--json")
    assert code == 2 and json.loads(out) == {"event": "outspoken.run", "run": None, "status": "left", "step": None}
    assert cli("watch", tmp_path / "train.log")[:2] == (2, "[outspoken] LOG left before a row came\n")


def test_watch_stops_when_nothing_comes(cli, tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text(lines(grpo_rows(20, 99)))
    code, out, _ = cli("watch", path, "--timeout", "0.2", "--interval", "0.05")
    assert code == 0 and out.splitlines()[-1] == "[outspoken] LOG silent for 0.2 seconds at step 20"


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["missing.jsonl"], "missing.jsonl: there is no such file or directory"),
        (["{log}", "--format", "vrel"], "--format 'vrel' is not known"),
        (["{log}", "--method", "gpro"], "--method 'gpro' is not known"),
        (["{log}", "--param", "RL016"], "must look like RL016.limit=0.3"),
        (["{log}", "--ignore", "XX999", "--once"], "no rule"),
        (["{log}", "--config", "nowhere.yaml", "--once"], "nowhere.yaml"),
        (["{empty}", "--once"], "is empty"),
        (["{folder}"], "no log that `outspoken diagnose` reads"),
    ],
)
def test_watch_refuses_wrong_input_in_one_sentence(cli, tmp_path, arguments, sentence):
    (tmp_path / "log.jsonl").write_text(lines(grpo_rows(5)))
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "folder").mkdir()
    places = {
        name: tmp_path / file
        for name, file in {"log": "log.jsonl", "empty": "empty.jsonl", "folder": "folder"}.items()
    }
    code, out, err = cli("watch", *(a.format(**places) for a in arguments))
    assert code == 2 and sentence in err + out and "Traceback" not in err


def test_watch_options_for_logs_do_not_fit_a_run_of_ours(cli, tmp_path):
    folder = tmp_path / "outspoken"
    folder.mkdir()
    (folder / "run.json").write_text(
        json.dumps({"schema": "outspoken.run/1", "id": "r", "status": "finished", "method": "sft", "step": 3})
    )
    code, _, err = cli("watch", tmp_path, "--method", "dpo")
    assert code == 2 and "--method is for logs of other systems" in err
