"""Which log of a directory is read, and how far a directory is looked through."""

import json
import os

import pytest

from outspoken.diagnostics.sources import UnreadableLog, discover
from outspoken.diagnostics.sources.discover import find_log


def write(path, text="x\n", at=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    if at is not None:
        os.utime(path, (at, at))
    return path


def test_the_newest_of_several_logs_is_read_and_all_others_are_named(tmp_path):
    # torchtune begins a new file with each start.
    for i in range(3):
        write(tmp_path / f"log_{i}.txt", at=1000 + i)
    write(tmp_path / "train.log")
    notes = []
    assert find_log(tmp_path, notes) == tmp_path / "log_2.txt"
    assert notes == ["Read log_2.txt; also there: log_1.txt, log_0.txt, train.log."]


def test_of_many_others_some_are_named_and_the_rest_is_counted(tmp_path):
    for i in range(8):
        write(tmp_path / f"log_{i}.txt", at=1000 + i)
    notes = []
    find_log(tmp_path, notes)
    assert notes == ["Read log_7.txt; also there: log_6.txt, log_5.txt, log_4.txt, log_3.txt, log_2.txt and 2 more."]


def test_of_checkpoints_only_the_last_counts(tmp_path):
    for step in (50, 100, 1000):
        write(tmp_path / f"checkpoint-{step}" / "trainer_state.json", json.dumps({"log_history": []}))
    notes = []
    assert find_log(tmp_path, notes) == tmp_path / "checkpoint-1000" / "trainer_state.json"
    assert notes == []


def test_a_link_to_a_run_is_no_other_log(tmp_path):
    run = write(tmp_path / "wandb" / "run-1-a" / "run-a.wandb").parent
    (tmp_path / "wandb" / "latest-run").symlink_to(run.name)
    notes = []
    assert find_log(tmp_path, notes) == tmp_path / "wandb" / "latest-run"
    assert notes == []


def test_event_files_are_looked_for_within_bounds(tmp_path, monkeypatch):
    events = write(tmp_path / "a" / "b" / "events.out.tfevents.1.host.1.0")
    for i in range(30):
        write(tmp_path / "z" / f"{i}.bin")
    assert find_log(tmp_path, []) == tmp_path
    monkeypatch.setattr(discover, "MAX_ENTRIES", 20)  # a and b come before the many
    assert find_log(tmp_path, []) == tmp_path
    events.rename(write(tmp_path / "z" / "late" / "x").parent / events.name)
    with pytest.raises(UnreadableLog, match=r"holds no log of a usual name .*; give the file itself"):
        find_log(tmp_path, [])


def test_what_belongs_to_no_run_is_not_looked_into(tmp_path):
    for folder in (".git", "node_modules", ".venv/lib/site-packages"):
        write(tmp_path / folder / "deep" / "events.out.tfevents.1.host.1.0")
    with pytest.raises(UnreadableLog):
        find_log(tmp_path, [])


def test_a_folder_that_goes_away_meanwhile_is_passed_over(tmp_path, monkeypatch):
    log = write(tmp_path / "train.log")

    def glob(self, pattern):
        if pattern == "*/metrics.jsonl":
            raise FileNotFoundError(2, "No such file or directory", "gone")
        return iter([log]) if pattern == "*.log" else iter(())

    monkeypatch.setattr(type(tmp_path), "glob", glob)
    assert find_log(tmp_path, []) == log
