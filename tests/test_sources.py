"""Reading logs: formats told apart by content, names, steps, states, and every cell accounted for."""

import csv
import gzip
import io
import json
import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from outspoken.diagnostics.engine import Engine
from outspoken.diagnostics.records import Observation
from outspoken.diagnostics.sources import UnreadableLog, read
from outspoken.diagnostics.sources.trials import denominator, least_trials


@pytest.fixture
def write(tmp_path):
    """`write(content, name)` puts a file there: bytes and text as they are, a list of rows as JSON lines."""

    def put(content, name="log.jsonl"):
        path = tmp_path / name
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return put


def values(run, name):
    return [o.signals.get(name) for o in run.observations]


GRPO_ROWS = [{"step": i, "loss": 0.01 * i, "reward": 0.5, "reward_std": 0.1, "kl": 0.001 * i} for i in range(1, 6)]


# ---------------------------------------------------------------------- formats


def as_csv(rows):
    out = io.StringIO()
    writer = csv.DictWriter(out, list(dict.fromkeys(k for row in rows for k in row)))
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


@pytest.mark.parametrize(
    ("content", "format"),
    [
        ("".join(json.dumps(r) + "\n" for r in GRPO_ROWS), "jsonl"),
        (json.dumps({"log_history": GRPO_ROWS, "global_step": 5}, indent=2), "trainer_state"),
        (json.dumps({"log_history": GRPO_ROWS}), "trainer_state"),
        (json.dumps(GRPO_ROWS), "json"),
        (json.dumps({"history": GRPO_ROWS, "model": "m"}), "json"),
        (json.dumps({k: [r[k] for r in GRPO_ROWS] for k in GRPO_ROWS[0]}), "json"),
        (as_csv(GRPO_ROWS), "csv"),
        (as_csv(GRPO_ROWS).replace(",", "\t"), "csv"),
        (as_csv(GRPO_ROWS).replace(",", ";"), "csv"),
        ("\ufeff" + as_csv(GRPO_ROWS), "csv"),
        ("# exported\n\n" + as_csv(GRPO_ROWS), "csv"),
    ],
)
@pytest.mark.parametrize("packed", ["plain", "gzip", "utf-16"])
def test_the_same_run_in_any_format_under_any_name(write, content, format, packed):
    data = content.encode("utf-16") if packed == "utf-16" else content.encode()
    run = read(write(gzip.compress(data) if packed == "gzip" else data, "whatever.txt"))
    assert run.format == format
    assert run.method == "grpo"
    assert [o.step for o in run.observations] == [1, 2, 3, 4, 5]
    assert values(run, "kl") == pytest.approx([0.001, 0.002, 0.003, 0.004, 0.005], abs=0)
    assert values(run, "loss") == [0.01 * i for i in range(1, 6)]
    assert run.account.cells == 25 and run.account.clock == 5 and run.account.value == 20 and run.account.balanced


def test_the_format_can_be_forced(write):
    path = write('{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 0.9}\n', "metrics.csv")
    assert len(read(path, format="jsonl").observations) == 2
    with pytest.raises(UnreadableLog, match="line 1"):
        read(path, format="csv")
    with pytest.raises(UnreadableLog, match=r"format 'parquet' is not known; choose one of trainer_state"):
        read(path, format="parquet")
    with pytest.raises(UnreadableLog, match="log_history"):
        read(write(json.dumps(GRPO_ROWS), "rows.json"), format="trainer_state")


def test_directories(tmp_path, write):
    for step in (9, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        state = {"log_history": GRPO_ROWS[: step - 7]}
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps(state))
    assert len(read(tmp_path).observations) == 3  # of the newest checkpoint
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": GRPO_ROWS}))
    assert len(read(tmp_path).observations) == 5
    (tmp_path / "empty").mkdir()
    with pytest.raises(UnreadableLog, match="no log of a usual name"):
        read(tmp_path / "empty")


# ---------------------------------------------------------------------- what cannot be read


BAD_FILES = {
    "empty": (b"", "is empty"),
    "blank": (b"\n \n\n", "is empty"),
    "binary": (bytes(range(256)) * 10, "binary"),
    "pickle": (b"\x80\x02}q\x00.", "never opened"),
    "zip": (b"PK\x03\x04rest", "zip"),
    "prose": (b"Training started at noon\nloss went down\n", "line 1"),
    "latin-1 jsonl": (b'{"step": 1, "loss": 1}\n{"step": 2, "note": "caf\xe9"}\n{"step": 3}\n', "line 2 is not UTF-8"),
    "latin-1 json": (b'{"log_history": [\n{"step": 1, "note": "caf\xe9"}]}', "line 2 is not UTF-8"),
    "huge line": (
        b'{"step": 1, "loss": 1}\n{"text": "' + b"x" * (11 * 2**20) + b'"}\n',
        "line 2 is longer than 10 MiB",
    ),
    "cut json": (json.dumps({"log_history": GRPO_ROWS}, indent=1).encode()[:300], "not valid JSON"),
    "only torn": (b'{"step": 1, "lo', "line 1"),
    "no rows": (b'{"log_history": []}', "no logged row"),
    "json number": (b"[1, 2, 3]", "no list of logged rows"),
    "deep": (b'{"a": ' * 5000 + b"1" + b"}" * 5000, "JSON"),
    "deep document": (b"[" * 100000, "not readable JSON"),
    "only clocks": (b'{"step": 1, "epoch": 0.1}\n{"step": 2, "epoch": 0.2}\n', "no row holds a metric"),
    "csv of words": (b"name,colour\nann,red\nbob,blue\n", "no column of numbers"),
    "csv header only": (b"step,loss\n", "no logged row"),
    "csv without header": (b"1,0.5\n2,0.4\n", "line 1"),
    "damaged gzip": (b"\x1f\x8b\x08\x00garbage", "damaged gzip"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_what_cannot_be_read_gets_one_sentence_that_names_the_file(write, case):
    data, expected = BAD_FILES[case]
    path = write(data, "run.jsonl")
    with pytest.raises(UnreadableLog, match=expected) as caught:
        read(path)
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message and message.count(". ") <= 1
    assert len(message) < len(str(path)) + 200


def test_missing_file(tmp_path):
    with pytest.raises(UnreadableLog, match="there is no such file"):
        read(tmp_path / "nowhere.jsonl")


def test_a_torn_last_line_is_skipped_with_a_note(write):
    text = "".join(json.dumps(r) + "\n" for r in GRPO_ROWS)
    for cut in (3, 20):
        run = read(write(text[:-cut]))
        assert len(run.observations) == 4
        assert any("Line 5, the last, was cut off" in note for note in run.notes)
    whole = read(write(text[:-1]))  # only the newline is missing
    assert len(whole.observations) == 5 and not any("cut off" in n for n in whole.notes)


def test_a_line_cut_within_a_character_and_nul_padding_after_a_crash(write):
    rows = "".join(json.dumps(r) + "\n" for r in GRPO_ROWS).encode()
    run = read(write(rows + '{"step": 6, "note": "é'.encode()[:-1]))
    assert len(run.observations) == 5
    run = read(write(rows + b"\0" * 500))
    assert len(run.observations) == 5


def test_a_bad_line_in_the_middle_is_named(write):
    lines = [json.dumps(r) for r in GRPO_ROWS]
    lines.insert(2, '{"step": 3, "lo' + json.dumps(GRPO_ROWS[2]))  # killed, then appended to
    run = read(write("\n".join(lines) + "\n"))
    assert len(run.observations) == 5
    assert any("1 line could not be parsed and was skipped: 3" in n for n in run.notes)


def test_a_gzip_file_that_ends_early(write):
    data = gzip.compress("".join(json.dumps({"step": i, "loss": i * 0.37}) + "\n" for i in range(5000)).encode())
    run = read(write(data[: len(data) * 3 // 4], "log.jsonl.gz"))
    assert 1000 < len(run.observations) < 5000
    assert any("ends early" in n for n in run.notes)


def test_a_torn_csv(write):
    run = read(write("step,loss,reward\n1,0.5,0.1\n2,0.4,0.2\n3,0.", "log.csv"))
    assert [o.step for o in run.observations] == [1, 2]
    assert any("cut off" in n for n in run.notes)


def test_csv_oddities(write):
    run = read(write(',step,loss,loss,"rewards/a,b/mean"\n0,1,0.5,0.6,1\n1,2,,nan,2,9\n', "log.csv"))
    assert values(run, "loss") == [0.5, None]
    assert values(run, "loss_again") == [0.6, None] and run.observations[1].nonfinite == {"loss_again": "nan"}
    assert values(run, "rewards/a,b/mean") == [1.0, 2.0]
    assert values(run, "column_6") == [None, 9.0]
    assert run.account.empty == 1 and run.account.balanced


# ---------------------------------------------------------------------- the four states


def test_values_in_every_state(write):
    text = (
        '{"step": 1, "a": NaN, "b": Infinity, "c": -Infinity, "d": 1e400, "e": "0.5", "f": "oops", "g": [1, 2], '
        '"h": null, "i": true, "j": "nan", "k": -1e400, "l": 3, "m": {"n": 4, "o": {}}}\n'
        f'{{"step": 2, "f": 1, "g": 1, "o": {"9" * 400}, "p": {"9" * 5000}}}\n'
    )
    run = read(write(text))
    first, second = run.observations
    assert first.signals == {"e": 0.5, "i": 1.0, "l": 3.0, "m/n": 4.0}
    assert first.nonfinite == {"a": "nan", "b": "inf", "c": "-inf", "d": "inf", "j": "nan", "k": "-inf"}
    assert first.unreadable == {"f": "'oops'", "g": "[1, 2]"}
    assert second.nonfinite == {"o": "inf", "p": "inf"}
    assert (run.account.value, run.account.nonfinite, run.account.unreadable) == (6, 8, 2)
    assert run.account.empty == 1 and run.account.clock == 2 and run.account.text == 1  # m/o never is a number
    assert run.account.cells == 20 and run.account.balanced


def test_a_known_metric_that_is_no_number_is_unreadable_and_a_text_column_is_not(write):
    run = read(write([{"step": i, "loss": "n/a", "model": "small", "reward": 0.1} for i in (1, 2)]))
    assert run.observations[0].unreadable == {"loss": "'n/a'"}
    assert run.account.text == 2
    assert any("Text, not metrics: model" in n for n in run.notes)


def test_a_name_twice_in_one_row(write):
    run = read(write('{"step": 1, "loss": 1, "loss": 2}\n'))
    assert values(run, "loss") == [2.0]
    assert any("held a name twice" in n for n in run.notes)


# ---------------------------------------------------------------------- steps


def test_evaluation_rows_join_the_training_row_of_their_step(write):
    run = read(
        write(
            [
                {"step": 10, "loss": 1.0, "epoch": 0.5},
                {"step": 10, "eval_loss": 1.1, "eval_runtime": 3.0, "epoch": 0.5},
                {"step": 20, "loss": 0.9, "epoch": 1.0},
                {"eval_loss": 1.0},
                {"step": 10, "eval_accuracy": 0.7},  # a late evaluation of an earlier checkpoint
            ]
        )
    )
    assert [(o.step, o.epoch) for o in run.observations] == [(10, 0.5), (20, 1.0)]
    assert values(run, "eval_loss") == [1.1, 1.0]
    assert values(run, "eval_accuracy") == [0.7, None]
    assert len(run.segments) == 1 and run.account.balanced


@pytest.mark.parametrize(
    "axis",
    [
        "step",
        "global_step",
        "current_steps",
        "training/global_step",
        "train/global_step",
        "Step",
        "_step",
        "iteration",
    ],
)
def test_names_of_the_step(write, axis):
    run = read(write([{axis: 5 * i, "loss": 1 / i} for i in (1, 2, 3)]))
    assert [o.step for o in run.observations] == [5, 10, 15]
    assert run.step_axis == axis


def test_without_steps_rows_are_numbered(write):
    run = read(write([{"loss": 1.0, "grad_norm": 1}, {"eval_loss": 1.0}, {"loss": 0.9, "grad_norm": 1}]))
    assert [o.step for o in run.observations] == [1, 2]
    assert run.observations[0].signals == {"loss": 1.0, "grad_norm": 1, "eval_loss": 1.0}
    assert run.step_axis == "row number"
    assert any("rows were numbered" in n for n in run.notes)


def test_a_restart_opens_a_segment_and_nothing_is_lost(write):
    rows = [{"step": s, "loss": loss} for s, loss in [(1, 9), (2, 8), (3, 7), (2, 6), (3, 5), (4, 4)]]
    run = read(write(rows))
    assert values(run, "loss") == [9, 8, 7, 6, 5, 4]
    assert [(s.first, s.step) for s in run.segments] == [(0, 1), (3, 2)]
    assert "went back from 3 to 2" in run.segments[1].reason
    # the very first step logged again with another loss is a restart too
    again = read(write([{"step": 1, "loss": 9.0}, {"step": 1, "loss": 8.5}, {"step": 2, "loss": 8.0}]))
    assert values(again, "loss") == [9.0, 8.5, 8.0] and len(again.segments) == 2


@pytest.mark.parametrize("wrapped", [True, False])
def test_rows_before_the_first_step_are_settings(write, wrapped):
    told = {"learning_rate": 1e-4, "batch_size": 8, "max_steps": 40, "model": "tiny", "note": 1}
    rows = [{"config": told} if wrapped else told, *({"step": k, "loss": 1 / (k + 1)} for k in range(20))]
    run = read(write(rows))
    assert run.config == {"learning_rate": 1e-4, "max_steps": 40} and run.config_known and run.total_steps == 40
    assert run.notes[0] == "Settings were read from the log itself."
    assert not any("tiny" in n or "note" in n or "model" in n for n in run.notes)  # no columns of the run


def test_rows_before_the_first_step_that_tell_nothing_are_counted(write):
    run = read(write([{"host": "a", "pid": 7}, *({"step": k, "loss": 1.0} for k in range(20))]))
    assert "Before the first step stood 1 row without a setting that is known here." in run.notes
    assert not run.config_known and run.config == {}


def test_a_name_without_its_prefix_needs_no_mention(write):
    rows = [{"step": k, "train/loss": 1.0, "train/lr": 0.1, "eval/loss": 2.0} for k in range(20)]
    run = read(write(rows))
    assert run.signals == ["loss", "learning_rate", "eval_loss"]
    assert "Read under our names: train/lr as learning_rate." in run.notes


def test_identical_rows_count_once(write):
    rows = [r for r in GRPO_ROWS for _ in range(2)]
    run = read(write(rows))
    assert len(run.observations) == 5 and len(run.segments) == 1
    assert run.account.duplicate == 25 and run.account.balanced
    assert any("just the same were dropped: 5" in n for n in run.notes)
    nan = '{"step": 1, "loss": NaN}\n'
    assert read(write(nan + nan)).account.duplicate == 2


def test_a_second_evaluation_at_the_same_step_supersedes_the_first(write):
    run = read(
        write(
            [
                {"step": 5, "loss": 1.0},
                {"step": 5, "eval_loss": 0.9, "eval_runtime": 1.0},
                {"step": 5, "eval_loss": 0.9, "eval_runtime": 1.2},
            ]
        )
    )
    assert values(run, "eval_runtime") == [1.2] and len(run.segments) == 1
    assert run.account.superseded == 1 and run.account.duplicate == 1 and run.account.balanced


def test_a_step_column_that_does_not_count_steps_gives_way_to_row_numbers(write):
    rows = [{"step": s, "loss": s + 0.1 * rank} for s in range(1, 6) for rank in range(4)]  # four ranks write
    run = read(write(rows))
    assert len(run.observations) == 20 and [o.step for o in run.observations] == list(range(1, 21))
    assert any("rows were numbered instead" in n for n in run.notes)


def test_newest_row_first(write):
    run = read(write(as_csv(GRPO_ROWS[::-1]), "log.csv"))
    assert [o.step for o in run.observations] == [1, 2, 3, 4, 5] and len(run.segments) == 1


def test_a_logger_that_repeats_its_last_values_counts_once(write):
    rows = [{"step": s, "loss": 0.1234567 / (s // 10 + 1), "reward": s // 10, "kl": 0.1} for s in range(60)]
    run = read(write(rows))
    assert len(run.observations) == 6 and run.account.balanced
    assert any("54 rows only repeat the row before" in n for n in run.notes)
    # a dead run repeats itself too, but its loss is zero: every row of it was measured
    dead = read(write([{"step": s, "loss": 0.0, "reward": -0.1, "grad_norm": 0.0} for s in range(60)]))
    assert len(dead.observations) == 60


def test_rows_that_describe_the_run_are_no_metrics(write):
    run = read(write([{"type": "config", "args": {"lr": 0.1, "steps": 5}}, *GRPO_ROWS]))
    assert len(run.observations) == 5 and not any(n.startswith("args") for n in run.signals)
    assert run.account.balanced


def test_the_closing_row_is_kept_apart(write):
    run = read(
        write(
            [
                {"loss": 1.0, "grad_norm": 1.0, "epoch": 0.5, "step": 1},
                {"train_runtime": 9.0, "train_loss": 0.7, "total_flos": 1e9, "reward": 0.3, "epoch": 1.0, "step": 2},
            ]
        )
    )
    assert run.summary == {"train_runtime": 9.0, "train_loss": 0.7, "total_flos": 1e9}
    assert values(run, "reward") == [None, 0.3] and "train_loss" not in run.signals
    assert run.account.summary == 3 and run.account.balanced
    # elsewhere `train_loss` is the loss
    assert values(read(write([{"step": 1, "train_loss": 2.0, "val_loss": 2.5}])), "loss") == [2.0]


def test_times_and_epochs(write):
    run = read(
        write(
            [
                {"step": 1, "loss": 1, "timestamp": "2026-01-02T03:04:05Z", "epoch": "0.5"},
                {"step": 2, "loss": 2, "timestamp": 1767323046},
                {"step": 3, "loss": 3, "timestamp": 1767323047000},
            ]
        )
    )
    assert [o.time for o in run.observations] == [1767323045, 1767323046, 1767323047]
    assert run.observations[0].epoch == 0.5
    assert run.account.clock == 7


# ---------------------------------------------------------------------- names


def test_trl_before_its_renaming(write):
    row = {"step": 1, "loss": 0.0, "grad_norm": 0.1, "completion_length": 237.3, "rewards/format": 0.9, "reward": 1.8}
    run = read(write([{**row, "reward_std": 0.7, "kl": 0.0005, "clip_ratio": 0.02}]))
    seen = run.observations[0].signals
    assert seen["completions/mean_length"] == 237.3 and seen["rewards/format/mean"] == 0.9
    assert seen["clip_ratio"] == 0.02 and "clip_ratio/region_mean" not in seen  # another comparison than today's
    assert run.family == "trl" and run.method == "grpo"


def test_a_name_of_ours_wins_over_an_alias_beside_it(write):
    run = read(write([{"step": 1, "completion_length": 5.0, "completions/mean_length": 6.0, "reward": 1, "kl": 0}]))
    assert values(run, "completions/mean_length") == [6.0] and values(run, "completion_length") == [5.0]


def test_trl_ppo(write):
    row = {"step": 1, "objective/kl": 8.5, "objective/entropy": 25.0, "objective/scores": -0.1, "val/ratio": 1.0}
    row |= {"objective/rlhf_reward": 0.2, "policy/approxkl_avg": 0.17, "policy/clipfrac_avg": 0.06, "lr": 5e-6}
    run = read(write([{**row, "policy/entropy_avg": 0.34, "loss/value_avg": 9.0, "episode": 4, "eps": 0}]))
    seen = run.observations[0].signals
    assert run.method == "ppo"
    assert "kl" not in seen and seen["objective/kl"] == 8.5  # summed over the sequence
    assert seen["entropy"] == 0.34 and seen["objective/entropy"] == 25.0
    assert seen["reward"] == -0.1 and seen["learning_rate"] == 5e-6
    assert seen["policy/approx_kl"] == 0.17 and seen["clip_ratio/region_mean"] == 0.06


def test_dpo_reward_names_are_not_reward_functions(write):
    run = read(
        write([{"step": 1, "loss": 0.69, "rewards/chosen": 0.1, "rewards/rejected": 0.0, "rewards/margins": 0.1}])
    )
    assert run.method == "dpo" and "rewards/chosen" in run.signals


def test_verl_file_logger(write):
    def data(i):
        return {
            "critic/score/mean": 0.1 * i,
            "critic/rewards/mean": 0.05 * i,
            "actor/entropy_loss": 0.4,
            "actor/kl_loss": None if i == 2 else 0.001,
            "actor/grad_norm": 0.1,
            "actor/lr(1e-4)": 0.01,
            "actor/pg_clipfrac": 0.0,
            "response_length/mean": 100,
            "response_length/clip_ratio": 0.25,
            "timing/gen": 21.5,
            "training/global_step": i,
        }

    run = read(write([{"step": i, "data": data(i)} for i in (1, 2, 3)]))
    assert run.family == "verl" and run.method == "grpo" and run.step_axis == "step"
    first = run.observations[0].signals
    assert first["reward"] == 0.1 and first["critic/rewards/mean"] == 0.05
    assert first["learning_rate"] == pytest.approx(1e-6)  # printed in units of 1e-4
    assert first["completions/clipped_ratio"] == 0.25 and first["time/generate"] == 21.5
    assert run.observations[1].nonfinite == {"kl": "nan"}  # its writer turns NaN into null
    assert run.account.nonfinite == 1 and run.account.balanced


def test_null_in_rows_of_other_writers_is_missing(write):
    run = read(write([{"step": i, "critic/score/mean": 0.1, "actor/kl_loss": None} for i in (1, 2)]))
    assert run.family == "verl" and not run.observations[0].nonfinite and run.account.empty == 2


def test_tinker(write):
    row = {"progress/batch": 0, "optim/lr": 1e-4, "env/all/reward/total": 0.67, "env/all/total_episodes": 400}
    row |= {"env/all/total_ac_tokens": 1968, "optim/entropy": 0.77, "optim/kl_sample_train_v1": 0.0005}
    row |= {"env/all/by_group/frac_mixed": 0.8, "env/all/by_group/frac_all_good": 0.19}
    run = read(write([{"step": 0, **row, "env/all/by_group/frac_all_bad": 0.01, "env/all/ac_tokens_per_turn": 4.92}]))
    seen = run.observations[0].signals
    assert run.family == "tinker" and run.method == "grpo"
    assert seen["groups/all_passed"] == 0.19 and seen["groups/all_failed"] == 0.01
    assert seen["groups/zero_std"] == pytest.approx(0.2)  # no group with equal rewards is mixed
    assert seen["num_completions"] == 400 and seen["completions/mean_length"] == pytest.approx(4.92)
    assert "kl" not in seen  # between sampler and trainer, not from a reference
    sft = read(
        write([{"step": 0, "train_mean_nll": 1.8, "num_tokens": 1010, "num_loss_tokens": 567, "test/nll": 1.2}])
    )
    assert sft.method == "sft" and values(sft, "loss") == [1.8] and values(sft, "eval_loss") == [1.2]
    assert "num_tokens" not in sft.signals  # theirs counts one step, ours the whole run


def test_llama_factory(write):
    row = {"current_steps": 10, "total_steps": 93, "loss": 4.2, "lr": 2e-6, "epoch": 0.3, "percentage": 10.75}
    row |= {"elapsed_time": "0:04:02", "remaining_time": "0:33:29", "total_tokens": 3189568}
    closing = {k: row[k] for k in ("total_steps", "epoch", "percentage", "elapsed_time")} | {"current_steps": 93}
    run = read(write([row, {**row, "current_steps": 20, "accuracy": 0.4}, closing]))
    assert run.family == "llama_factory" and run.total_steps == 93 and run.method == "dpo"
    assert values(run, "learning_rate") == [2e-6, 2e-6] and values(run, "rewards/accuracies") == [None, 0.4]
    assert not run.observations[0].unreadable and run.account.balanced


def test_a_chart_exported_from_wandb(write):
    header = '"Step","calm-sun-7 - train/loss","calm-sun-7 - train/loss__MIN","calm-sun-7 - train/loss__MAX"'
    run = read(write(header + "\n10,0.5,0.4,0.6\n20,0.4,0.3,0.5\n", "chart.csv"))
    assert values(run, "loss") == [0.5, 0.4]
    assert "calm-sun-7 - train/loss__MIN" in run.signals


def test_train_and_eval_prefixes(write):
    row = {"train/global_step": 5, "train/loss": 1.0, "train/rewards/format/mean": 0.5, "train/reward": 0.2}
    run = read(write([{**row, "eval/loss": 1.2, "eval/custom": 3, "train/odd": 7, "train/epoch": 0.1}]))
    seen = run.observations[0]
    assert seen.signals["loss"] == 1.0 and seen.signals["eval_loss"] == 1.2 and seen.signals["reward"] == 0.2
    assert seen.signals["rewards/format/mean"] == 0.5 and seen.epoch == 0.1
    assert seen.signals["train/odd"] == 7 and seen.signals["eval_custom"] == 3


def test_the_table_of_a_notebook(write):
    run = read(write([{"Step": 1, "Training Loss": 0.5, "completions / mean_length": 10, "reward": 1, "kl": 0.1}]))
    assert values(run, "loss") == [0.5] and values(run, "completions/mean_length") == [10]


def test_unknown_names_are_kept_and_listed(write):
    run = read(write([{"step": 1, "loss": 1.0, "lr": 1e-3, "wibble": 7, "step_ratio": 2}]))
    assert values(run, "wibble") == [7.0] and values(run, "learning_rate") == [1e-3]
    assert any("Kept under their own names" in n and "wibble, step_ratio" in n for n in run.notes)


# What TRL 1.16's trainers of these methods log.
TRL_REWARD = ("min_reward", "mean_reward", "max_reward", "accuracy", "margin", "num_tokens")
TRL_ANSWERS = [f"{what}/{which}" for what in ("rewards", "logps", "logits") for which in ("chosen", "rejected")]
TRL_KTO = (*TRL_ANSWERS, "rewards/margins", "kl", "entropy", "num_tokens")
TRL_DPO = (*TRL_ANSWERS, "rewards/margins", "rewards/accuracies", "entropy", "mean_token_accuracy", "num_tokens")


def test_a_reward_models_mean_is_no_reward_of_a_policy(write):
    run = read(write([{"step": i, "loss": 0.6, **dict.fromkeys(TRL_REWARD, 0.1 * i)} for i in (1, 2)]))
    assert values(run, "mean_reward") == [0.1, 0.2] and "reward" not in run.signals
    assert not any("Kept under their own names" in note for note in run.notes)
    policy = read(write([{"step": i, "loss": 0.6, "mean_reward": 0.1 * i} for i in (1, 2)]))
    assert values(policy, "reward") == [0.1, 0.2]


def test_the_trials_behind_logged_accuracies(write):
    """8 pairs a device, 2 accumulated, 2 devices, 5 steps a point: 160 pairs; an evaluation's are not known."""
    settings = {
        "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "world_size": 2, "logging_steps": 5,
    }  # fmt: skip
    rows = [{"step": 5 * i, "rewards/accuracies": 0.75, "rewards/margins": 0.1} for i in range(1, 4)]
    run = read(write(rows), config=settings)
    engine = Engine(method=run.method, config=run.config, rules={})
    for observation in run.observations:
        engine.observe(observation)
    assert engine.view.trials("rewards/accuracies", 3).tolist() == [160] * 3
    assert engine.view.pooled("rewards/accuracies", 300).k == 240
    assert engine.view.trials("eval_rewards/accuracies", 3) is None


@pytest.mark.parametrize(
    ("row", "method"),
    [
        ({"loss": 2.3, "grad_norm": 1.0}, "sft"),
        ({"loss": 0.6934, "grad_norm": 1.0}, "unknown"),  # ln 2: it may be a preference run
        ({"loss": 2.3, "mean_token_accuracy": 0.5}, "sft"),
        ({"loss": 0.5, "log_odds_chosen": 0.1, "rewards/chosen": 0.1}, "orpo"),
        ({"loss": 0.5, "kl": 0.1, "rewards/chosen": 0.1}, "kto"),
        ({"loss": 0.5, "min_reward": 0.1, "accuracy": 0.6}, "reward"),
        ({"loss": 0.5, **dict.fromkeys(TRL_REWARD, 0.1)}, "reward"),
        ({f"train/{name}": 0.1 for name in TRL_REWARD}, "reward"),
        ({f"eval_{name}": 0.1 for name in TRL_REWARD}, "reward"),
        ({"loss": 0.5, **dict.fromkeys(TRL_KTO, 0.1)}, "kto"),
        ({f"eval_{name}": 0.1 for name in TRL_KTO}, "kto"),
        ({"loss": 0.5, **dict.fromkeys(TRL_DPO, 0.1)}, "dpo"),
        ({"loss": 0.5, "kl": 0.1, **dict.fromkeys(TRL_DPO, 0.1)}, "dpo"),
        ({"mean_reward": 0.5, "min_reward": 0.1, "max_reward": 0.9, "accuracy": 0.6}, "grpo"),  # no margin: a policy's
        ({"teacher_kl": 0.5, "env/all/reward/total": 0.0}, "distillation"),
        ({"grad_norm": 1.0}, "unknown"),
    ],
)
def test_the_method_is_told_from_the_signals(write, row, method):
    path = write([{"step": 1, **row}])
    assert read(path).method == method
    assert read(path, method="cpo").method == "cpo"


# ---------------------------------------------------------------------- trials behind a share


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        (0.8125, 16),  # 13/16
        (1.0, 1),
        (0.0, 1),
        (0.8999999761581421, 10),  # 9/10 as a float32
        (1 / 3, 3),
        (0.3333, None),  # 1/3 as it was printed: no fraction with a small denominator is that near
        (math.pi / 4, None),
    ],
)
def test_a_share_tells_how_many_trials_it_needs(share, expected):
    assert denominator(share) == expected


def test_least_trials_of_a_run():
    assert least_trials([12 / 80, 8 / 80, 5 / 80, 33 / 80, 7 / 80, 9 / 80, 1.0]) == 80
    assert least_trials([0.25, 0.5, 1.0, 0.75]) == 1  # too few points need 4
    assert least_trials([k / 7 for k in range(1, 7)] + [k / 11 for k in range(1, 11)]) == 1  # no common denominator
    assert least_trials([1.0] * 50) == 1


def test_shares_without_their_counts_get_a_lower_bound(write):
    rows = [{"step": k, "reward": 0.1, "reward_std": 0.1, "completions/clipped_ratio": k / 32} for k in range(1, 20)]
    run = read(write(rows))
    assert {o.signals["completions/clipped_ratio#n"] for o in run.observations} == {32.0}
    assert any("at least: completions/clipped_ratio 32" in n for n in run.notes) and run.account.balanced
    # not where the log or the settings count them
    counted = read(write([{**row, "num_completions": 64} for row in rows]))
    assert not any(name.endswith("#n") for o in counted.observations for name in o.signals)
    known = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 8}
    assert not any(n.endswith("#n") for o in read(write(rows), config=known).observations for n in o.signals)
    # a group has two completions at least
    all_cut = read(write([{**row, "completions/clipped_ratio": 1.0} for row in rows]))
    assert all_cut.observations[0].signals["completions/clipped_ratio#n"] == 2.0


def test_the_range_of_verl_rewards(write):
    rows = [(0.3, 0.5, 0.1), (0.2, 1.0, 0.1), (0.4, 0.9, -0.5)]
    data = [
        {"critic/score/mean": m, "critic/score/max": a, "critic/score/min": i, "actor/pg_loss": 0} for m, a, i in rows
    ]
    run = read(write([{"step": i, **row} for i, row in enumerate(data)]))
    assert values(run, "rewards/max_seen") == [0.5, 1.0, 1.0]
    assert values(run, "rewards/min_seen") == [0.1, 0.1, -0.5]
    assert values(run, "rewards/range") == pytest.approx([0.4, 0.9, 1.5])
    without = read(write([{k: v for k, v in {"step": i, **r}.items() if "min" not in k} for i, r in enumerate(data)]))
    assert values(without, "rewards/range") == pytest.approx([0.2, 0.8, 0.8])  # from the smallest mean: a lower bound
    assert "rewards/min_seen" not in without.signals and without.account.balanced


# ---------------------------------------------------------------------- settings


def test_settings_of_trainer_state_and_of_a_file(write, tmp_path):
    state = {
        "log_history": GRPO_ROWS,
        "max_steps": 500,
        "train_batch_size": 4,
        "logging_steps": 10,
        "num_train_epochs": 1,
    }
    path = write(json.dumps({**state, "eval_steps": 0.5, "save_steps": 500}), "trainer_state.json")
    (tmp_path / "training_args.bin").write_bytes(b"\x80\x02never read")
    run = read(path)
    assert run.config["per_device_train_batch_size"] == 4 and run.total_steps == 500 and not run.config_known
    assert any("training_args.bin" in n for n in run.notes)
    write(
        "learning_rate: 1e-5\nlogging_steps: 5\ngradient_accumulation_steps: 8\nsteps_per_generation: 4\n", "run.yaml"
    )
    run = read(path, config=tmp_path / "run.yaml")
    assert run.config["learning_rate"] == 1e-5  # which YAML 1.1 reads as text
    # 5 logged steps of 8 micro-batches; 4 micro-batches a generation
    assert run.config["points_per_log"] == 10
    assert run.config_known and run.config["per_device_train_batch_size"] == 4
    assert read(path, config={"max_steps": 77}).total_steps == 77


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a: [1, 2\nb: }", "line 2"), ("- 1\n- 2\n", "must hold settings"), ('{"a": 1,}', "line 1"), ("", "must hold")],
)
def test_a_wrong_config_file(write, tmp_path, text, expected):
    path = write(GRPO_ROWS)
    write(text, "run.yaml")
    with pytest.raises(UnreadableLog, match=expected) as caught:
        read(path, config=tmp_path / "run.yaml")
    assert "run.yaml" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UnreadableLog, match=r"missing\.yaml: the configuration cannot be read"):
        read(path, config=tmp_path / "missing.yaml")


# ---------------------------------------------------------------------- our own run directory


def test_a_run_directory_comes_back_as_it_was_written(tmp_path):
    from outspoken.diagnostics.rundir import RunDirectory

    written = [
        Observation(1, {"loss": 1.5, "reward": 0.1}, {}, {}, 1767323045.0, 0.1),
        Observation(2, {"reward": 0.2}, {"loss": "nan", "kl": "-inf"}, {"note": "'x'"}, 1767323046.0, 0.2),
        Observation(3, {"loss": 1.2, "odd/name": 5.0}, {}, {}, None, None),
    ]
    directory = RunDirectory(tmp_path / "outspoken")
    for observation, segment in zip(written, (0, 0, 1)):
        assert directory.append_observation(observation, segment)
    directory.close()
    card = {"id": "r1", "method": "grpo", "config": {"beta": 0.0}, "facts": {"world_size": 2}, "total_steps": 9}
    (tmp_path / "outspoken" / "run.json").write_text(json.dumps(card))
    for path in (tmp_path, tmp_path / "outspoken", tmp_path / "outspoken" / "metrics.jsonl"):
        run = read(path)
        assert list(run.observations) == written
        assert run.format == "run_directory" and run.method == "grpo" and run.config == {"beta": 0.0}
        assert run.facts == {"world_size": 2} and run.total_steps == 9 and run.config_known
        assert [(s.first, s.step) for s in run.segments] == [(0, 1), (2, 3)]
        assert run.account.cells == 8 and run.account.balanced


# ---------------------------------------------------------------------- anything at all

NUMBERS = st.one_of(st.floats(), st.integers(-(10**20), 10**20), st.booleans(), st.none(), st.text(max_size=5))
NAMES = st.sampled_from(
    ["loss", "eval_loss", "reward", "kl", "step", "epoch", "time", "lr", "x/y", "train_runtime", "é"]
)
ROWS = st.lists(st.dictionaries(NAMES, NUMBERS, min_size=1, max_size=6), min_size=1, max_size=30)
QUICK = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@QUICK
@given(rows=ROWS)
def test_any_rows_are_accounted_for(write, rows):
    path = write(rows, "any.jsonl")
    try:
        run = read(path)
    except UnreadableLog:
        return
    assert run.account.balanced
    assert run.account.cells == sum(len(row) for row in rows)
    kept = [v for o in run.observations for v in o.signals.values()]
    assert len(kept) == run.account.value and all(math.isfinite(v) for v in kept)
    for segment, following in zip(run.segments, [*run.segments[1:], None]):
        end = following.first if following else len(run.observations)
        steps = [o.step for o in run.observations[segment.first : end]]
        assert steps == sorted(set(steps))  # each step once and in order


@QUICK
@given(data=st.one_of(st.binary(max_size=400), st.text(max_size=400).map(str.encode)))
def test_any_bytes_are_read_or_refused(write, data):
    path = write(data, "any.bin")
    for format in (None, "csv", "jsonl", "json"):
        try:
            run = read(path, format=format)
        except UnreadableLog as error:
            assert "\n" not in str(error)
        else:
            assert run.account.balanced and run.observations


@pytest.mark.parametrize(
    ("text", "method"),
    [
        ("Starting DPO LoRA", "dpo"),
        ("trl/trainer/sft_trainer.py: SFTTrainer(args=SFTConfig)", "sft"),
        ("first SFT, then DPO", "unknown"),
        ("a run of dpo_lora_mixed_sft", "unknown"),
        ("DPOS and MYGRPO are no methods", "unknown"),
    ],
)
def test_the_method_that_a_console_names(write, text, method):
    """Where the metrics do not tell: only a loss, which begins near ln 2."""
    rows = "".join(f"{{'loss': {0.69 - i / 100}, 'grad_norm': 1.5, 'epoch': {i / 10}}}\n" for i in range(8))
    run = read(write(f"{text}\n{rows}", "train.log"))
    assert (run.format, run.method) == ("console", method)


def test_a_restart_of_a_log_without_steps_shows_in_its_epochs(write):
    rows = [{"loss": 1.0 / i, "grad_norm": 0.5 + i / 100, "epoch": i / 10} for i in (1, 2, 3, 4, 3, 4, 5)]
    run = read(write(rows))
    assert [o.step for o in run.observations] == [1, 2, 3, 4, 5, 6, 7]
    assert [(s.first, s.step) for s in run.segments] == [(0, 1), (4, 5)]
    assert "the epoch went back" in run.segments[1].reason


@pytest.mark.parametrize("prefix", ["", "train/"])
def test_the_closing_row_is_kept_apart_under_a_tracker_s_names_too(write, prefix):
    rows = [{"step": s, f"{prefix}loss": 1.0 / s} for s in (1, 2, 3)]
    rows.append({"step": 3, f"{prefix}train_runtime": 12.5, f"{prefix}train_loss": 0.6, f"{prefix}total_flos": 1e9})
    run = read(write(rows))
    assert run.summary == {"train_runtime": 12.5, "train_loss": 0.6, "total_flos": 1e9}
    assert [o.signals for o in run.observations] == [{"loss": 1.0}, {"loss": 0.5}, {"loss": 1 / 3}]
    assert run.account.summary == 3 and run.account.balanced
