"""Logs too large to be kept in memory are read in passes, with the same result as small ones."""

import gzip
import json
import subprocess
import sys
import textwrap

import pytest

from outspoken.diagnostics import sources
from outspoken.diagnostics.diagnose import diagnose
from outspoken.diagnostics.sources import formats, read
from outspoken.diagnostics.sources.again import Again

assemble = sys.modules["outspoken.diagnostics.sources.assemble"]
STEPS = 300


def value(step, which):
    """Numbers without a pattern, the same at each call."""
    return ((step * 7919 + which * 104729) % 10007) / 10007


def grpo_rows():
    """A GRPO run with evaluations (one of them late), a restart, a repeated row, a NaN, and completions that are cut."""
    rows = []
    for step in [*range(1, 201), *range(181, STEPS + 1)]:
        again = len(rows) > 220
        row = {
            "step": step,
            "loss": value(step, 1) / 50 + again,
            "grad_norm": 0.5 + value(step, 2) / 10,
            "reward": 0.2 + step / 1000 + value(step, 3) / 20,
            "reward_std": 0.3 + value(step, 4) / 20,
            "frac_reward_zero_std": 0.125,
            "num_completions": 64,
            "completions/mean_length": 200 + 40 * value(step, 5),
            "completions/clipped_ratio": 0.4375 if step > 120 else 0.015625,
        }
        rows.append(row)
        if step % 20 == 0:
            rows.append({"step": step - (5 if step == 100 else 0), "eval_reward": 0.2 + step / 1000})
    rows[150]["loss"] = float("nan")
    rows.insert(60, dict(rows[59]))
    return rows


def write(path, rows):
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif path.suffix == ".json":
        path.write_text(json.dumps({"log_history": rows, "max_steps": STEPS}, indent=1))
    elif path.suffix == ".csv":
        names = list(dict.fromkeys(name for row in rows for name in row))
        text = [",".join(names), *(",".join(str(row.get(name, "")) for name in names) for row in rows)]
        path.write_text("\n".join(text) + "\n")
    elif path.suffix == ".out":
        path.write_text(
            "".join(
                f"noise {i}\n" + "step:" + " - ".join(f"{k}:{v}" for k, v in row.items())[5:] + "\n"
                for i, row in enumerate(rows)
            )
        )
    else:
        path.write_text(lines)
    return path


@pytest.mark.parametrize("name", ["log.jsonl", "log.jsonl.gz", "state.json", "log.csv", "console.out"])
def test_what_is_read_in_passes_is_read_the_same(tmp_path, monkeypatch, name):
    path = write(tmp_path / name, grpo_rows())
    whole, judged = read(path), diagnose(path)
    assert whole.rows.kept is not None and list(whole.observations) == whole.observations.kept
    assert judged["diagnostics"] and whole.segments[1:]
    for module in (formats, assemble, sources):
        monkeypatch.setattr(module, "KEPT_CELLS", 40)
    passes = read(path)
    assert passes.rows.kept is None and passes.observations.kept is None
    for name in ("segments", "account", "columns", "signals", "notes", "method", "step_axis", "config"):
        assert getattr(passes, name) == getattr(whole, name)
    assert len(passes.rows) == len(whole.rows) and len(passes.observations) == len(whole.observations)
    for a, b in zip(passes.observations, whole.observations, strict=True):
        assert repr(a) == repr(b)
    assert repr(passes.observations[-1]) == repr(whole.observations[-1])
    assert repr(passes.observations[7]) == repr(whole.observations[7])
    again = diagnose(path)
    for report in (judged, again):
        report["verdict"].pop("time")
        for record in report["diagnostics"]:
            record.pop("time")
    assert again == judged


def test_a_log_that_grows_between_two_passes_is_read_as_far_as_it_was(tmp_path, monkeypatch):
    for module in (formats, assemble, sources):
        monkeypatch.setattr(module, "KEPT_CELLS", 40)
    rows = grpo_rows()
    path = write(tmp_path / "log.jsonl", rows[:100])
    run = read(path)
    count = len(run.observations)
    with path.open("a") as log:
        log.write(json.dumps({"step": 500, "loss": 1.0, "a_new_name": 2.0}) + "\n")
    assert len(list(run.observations)) == count
    assert all("a_new_name" not in o.signals for o in run.observations)


def test_a_late_evaluation_finds_its_step_within_the_window(tmp_path, monkeypatch):
    monkeypatch.setattr(assemble, "WINDOW", 10)
    rows = [{"step": s, "loss": 1.0 / s} for s in range(1, 31)]
    near, far = {"step": 22, "eval_loss": 0.5}, {"step": 3, "eval_loss": 0.7}
    run = read(write(tmp_path / "log.jsonl", [*rows, near, far]))
    assert [o.step for o in run.observations if "eval_loss" in o.signals] == [3, 22]
    assert next(o for o in run.observations if o.step == 22).signals == {"loss": 1.0 / 22, "eval_loss": 0.5}
    # Too late to join its step, which was given out: it stands alone, and nothing is lost.
    assert [o.signals for o in run.observations if o.step == 3] == [{"loss": 1.0 / 3}, {"eval_loss": 0.7}]
    assert run.account.balanced and len(run.segments) == 1


# ---------------------------------------------------------------------- several writers


def test_rows_of_two_processes_by_their_rank(tmp_path):
    rows = [{"step": s, "rank": r, "loss": 1.0 / s + r, "grad_norm": 0.5} for s in range(1, 11) for r in (1, 0)]
    run = read(write(tmp_path / "log.jsonl", rows))
    assert [o.step for o in run.observations] == list(range(1, 11)) and len(run.segments) == 1
    assert all(o.signals["loss"] == 1.0 / o.step for o in run.observations), "the lowest rank counts"
    assert run.account.other_process == 10 * 4 and run.account.balanced
    assert "Rows of other processes (by 'rank') were left out, one row a step counts: 10." in run.notes


def test_a_metric_that_is_called_rank_is_none_of_a_process(tmp_path):
    """Of a matrix, say: each step has one row, so no row is another process's."""
    for ranks in (
        [3, 5, 4, 3, 7, 6, 3, 4, 5, 9],
        [3.5, 3.25, 3.75, 3.0, 2.5, 4.0, 3.5, 3.25, 3.0, 2.75],
        [16] * 5 + [32] * 5,
    ):
        rows = [{"step": s, "rank": r, "loss": 1.0 / s} for s, r in enumerate(ranks, start=1)]
        run = read(write(tmp_path / "log.jsonl", rows))
        assert [o.signals["loss"] for o in run.observations] == [1.0 / s for s in range(1, 11)]
        assert run.account.other_process == 0


def test_files_of_two_processes_one_behind_the_other(tmp_path):
    rows = [{"step": s, "rank": r, "loss": 1.0 / s + r} for r in (0, 1) for s in range(1, 11)]
    run = read(write(tmp_path / "log.jsonl", rows))
    assert [o.signals["loss"] for o in run.observations] == [1.0 / s for s in range(1, 11)]
    assert len(run.segments) == 1 and run.account.other_process == 30


def test_a_log_filled_forward_is_thinned_in_every_pass(tmp_path, monkeypatch):
    """A share whose trials are not logged gets a bound beside it, which must not hide that a row is repeated."""
    monkeypatch.setattr(sys.modules["outspoken.diagnostics.sources.trials"], "LOOKED_AT", 50)
    for module in (formats, assemble, sources):
        monkeypatch.setattr(module, "KEPT_CELLS", 40)
    rows = []
    for step in range(1, 201):
        measured = (step - 1) // 2
        shares = {"frac_reward_zero_std": (measured % 8) / 8, "completions/clipped_ratio": (measured % 16) / 64}
        rows.append(
            {"step": step, "loss": value(measured, 1), "reward": value(measured, 2), "reward_std": 0.3} | shares
        )
    run = read(write(tmp_path / "log.jsonl", rows))
    for _ in range(2):
        seen = list(run.observations)
        assert [o.step for o in seen] == list(range(1, 201, 2)) and len(run.observations) == 100
        assert all("completions/clipped_ratio#n" in o.signals for o in seen)


def test_rows_of_two_processes_that_share_a_gradient_norm(tmp_path):
    rows = [
        {"step": s, "loss": value(s, r), "grad_norm": 0.5 + value(s, 9), "learning_rate": 1e-5}
        for s in range(1, 21)
        for r in (0, 1)
    ]
    run = read(write(tmp_path / "log.jsonl", rows))
    assert [o.step for o in run.observations] == list(range(1, 21)) and len(run.segments) == 1
    assert [o.signals["loss"] for o in run.observations] == [value(s, 0) for s in range(1, 21)]
    assert run.account.balanced and run.account.other_process == 20 * 4
    assert any("they agree in what all processes share" in note for note in run.notes)


def test_micro_batches_of_a_step_are_not_taken_for_processes(tmp_path):
    rows = [
        {"step": s, "loss": value(s, r), "grad_norm": value(s, 9 + r), "learning_rate": 1e-5}
        for s in range(1, 21)
        for r in (0, 1)
    ]
    run = read(write(tmp_path / "log.jsonl", rows))
    assert len(run.observations) == 40 and run.step_axis == "row number"
    assert any("rows were numbered instead" in note for note in run.notes)


def test_a_row_without_a_step_belongs_to_the_one_before_and_is_no_restart(tmp_path):
    rows = []
    for s in range(1, 11):
        rows += [{"step": s, "loss": 1.0 / s}, {"queue/waiting": value(s, 1)}, {"queue/waiting": value(s, 2)}]
    # More rows without a step than with one would leave no axis, so the metrics come twice as often.
    rows += [{"step": s, "loss": 1.0 / s} for s in range(11, 31)]
    run = read(write(tmp_path / "log.jsonl", rows))
    assert run.step_axis == "step" and len(run.segments) == 1 and len(run.observations) == 30
    assert run.observations[0].signals == {"loss": 1.0, "queue/waiting": value(1, 2)}
    assert run.account.superseded == 10 and run.account.balanced


# ---------------------------------------------------------------------- the container


def test_items_are_gone_through_again():
    made = []

    def make():
        made.append(1)
        return iter(range(10))

    few, many = Again(make, lambda _: 1, 100), Again(make, lambda _: 1, 5)
    assert few[0] == many[0] == 0
    assert list(few) == list(few) == list(many) == list(many) == list(range(10))
    assert (few.kept, many.kept) == (list(range(10)), None)
    assert (len(many), many[-1], many[3], many[-2]) == (10, 9, 3, 8)
    assert Again.of([1, 2])[-1] == 2
    with pytest.raises(IndexError):
        many[10]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_log(tmp_path):
    """Twice the rows take no more memory, where neither fits into what is kept."""
    script = textwrap.dedent(
        """
        import sys, tracemalloc
        from outspoken.diagnostics import sources
        from outspoken.diagnostics.sources import formats, read
        for module in (formats, sys.modules["outspoken.diagnostics.sources.assemble"], sources):
            module.KEPT_CELLS = 10_000
        tracemalloc.start()
        assert sum(1 for _ in read(sys.argv[1]).observations) == int(sys.argv[2])
        print(tracemalloc.get_traced_memory()[1])
        """
    )
    peaks = []
    for count in (220_000, 440_000):  # both fill the memory of rows that come again
        path = tmp_path / f"{count}.jsonl"
        with path.open("w") as log:
            for step in range(count):
                log.write(json.dumps({"step": step, "loss": value(step, 1), "grad_norm": value(step, 2)}) + "\n")
        done = subprocess.run(
            [sys.executable, "-c", script, path, str(count)], capture_output=True, text=True, check=True
        )
        peaks.append(int(done.stdout))
    assert peaks[1] < 1.25 * peaks[0] < 60 * 2**20
