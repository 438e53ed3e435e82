"""Metrics out of what a training printed, and out of notebooks, between any amount of noise."""

import contextlib
import io
import json
import math
import pprint
import sys
import types
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from outspoken.diagnostics.sources import console, notebook
from outspoken.diagnostics.sources.files import UnreadableLog, lines_of

RUNS = Path(__file__).resolve().parents[2] / "shared" / "real_runs"
RAW = sorted(p for p in RUNS.glob("*/raw_*") if p.suffix in (".log", ".out", ".txt")) if RUNS.is_dir() else []

nan, inf = float("nan"), float("inf")

# What stands around metrics in real logs; none of it is a row.
NOISE = [
    "nohup: ignoring input",
    "W0606 11:12:45.781000 12152 torch/distributed/run.py:793] *****************************************",
    "trainable params: 29,933,568 || all params: 3,115,872,256 || trainable%: 0.9607",
    "[rank0]: Traceback (most recent call last):",
    '[rank0]:   File "train.py", line 12, in <module>',
    "{'bos_token_id': None, 'pad_token_id': 151643}",
    "Target modules: {'gate_proj', 'v_proj', 'q_proj'}",
    "\x1b[36m(WorkerDict pid=123, ip=10.0.0.1)\x1b[0m INFO 08-01 12:00:00 model_runner.py:1110] Loading took 3.2 s",
    "Loading weights:   0%|          | 0/399 [00:00<?, ?it/s]\rLoading weights: 100%|█| 399/399 [00:00<00:00, 9.5it/s]",
    "Step 1: install the dependencies, see section 2.3",
    "step 4 took 12.5 s",
    "",
]


def told(text):
    """(number, text, whether it ended) of each line, as files are given to the reader."""
    lines = text.split("\n")
    return [(i, line.rstrip("\r"), i < len(lines)) for i, line in enumerate(lines, 1) if line or i < len(lines)]


def read_text(text):
    """(style, rows, notes) of a console text; the style is found out."""
    style = console.find_style([line for _, line, _ in told(text)])
    notes = []
    rows = list(console.rows(iter(told(text)), style, Path("run.log"), notes)) if style else []
    return style, rows, notes


def same(a, b):
    """Equal rows, NaN being equal to NaN, and an int never to a float of another value."""
    return len(a) == len(b) and all(
        list(x) == list(y) and all(p == q or (p != p and q != q) for p, q in zip(x.values(), y.values()))
        for x, y in zip(a, b)
    )


def among_noise(lines):
    """Metric lines with noise before, between and after them."""
    mixed = [*NOISE]
    for i, line in enumerate(lines):
        mixed += [line, NOISE[i % len(NOISE)]]
    return "\n".join([*mixed, *NOISE]) + "\n"


# ---------------------------------------------------------------------- styles of one line

RAY = "\x1b[36m(TaskRunner pid=222265)\x1b[0m "
ONE_LINE = {
    "dict": (
        [
            "{'loss': 0.1, 'grad_norm': nan, 'learning_rate': '1e-05', 'epoch': 0.33}",
            "{'loss': '0.0943', 'grad_norm': '-inf', 'learning_rate': '9.9e-07', 'num_tokens': '4.02e+04', 'epoch': '1'}",
            "  1%| | 10/1875 [13:37<41:01:52, 79.20s/it]{'loss': inf, 'epoch': 0.02}  1%| | 11/1875 [14:37<37:50:33]",
            "  1%| | 10/1875 [13:37<41:01:52]\r{'eval_loss': np.float64(0.5), 'eval_runtime': 44.0, 'epoch': 1.0}",
            "[2026-01-01 10:00:00] [rank0]: {'loss': tensor(0.25, device='cuda:0'), 'epoch': 1}",
            "{'loss': 1.5, 'epoch': 2}{'loss': 1.25, 'epoch': 3}",
            '{"loss": NaN, "grad_norm": null, "epoch": 4.0}',
            "{'train_runtime': 12.5, 'train_loss': 0.5, 'epoch': 4.0}",
        ],
        [
            {"loss": 0.1, "grad_norm": nan, "learning_rate": 1e-5, "epoch": 0.33},
            {"loss": 0.0943, "grad_norm": -inf, "learning_rate": 9.9e-7, "num_tokens": 40200.0, "epoch": 1},
            {"loss": inf, "epoch": 0.02},
            {"eval_loss": 0.5, "eval_runtime": 44.0, "epoch": 1.0},
            {"loss": 0.25, "epoch": 1},
            {"loss": 1.5, "epoch": 2},
            {"loss": 1.25, "epoch": 3},
            {"loss": nan, "grad_norm": None, "epoch": 4.0},
            {"train_runtime": 12.5, "train_loss": 0.5, "epoch": 4.0},
        ],
    ),
    "verl": (
        [
            "step:0 - timing/gen:21.470 - critic/lr(1e-4):0.100 - actor/pg_loss:-0.005",
            f"{RAY}step:34 - actor/entropy:0.22266578674316406 - actor/ppo_kl:-8.163164312320433e-06",
            f"{RAY}step:35 - training/global_step:35 - critic/score/mean:np.float64(0.5) - actor/kl_loss:nan",
            " 10%|█ | 1/10 [00:10<01:30]step:36 - val-core/openai/gsm8k/reward/mean@1:0.25\x1b[32m [repeated 2x]\x1b[0m",
        ],
        [
            {"step": 0, "timing/gen": 21.47, "critic/lr(1e-4)": 0.1, "actor/pg_loss": -0.005},
            {"step": 34, "actor/entropy": 0.22266578674316406, "actor/ppo_kl": -8.163164312320433e-06},
            {"step": 35, "training/global_step": 35, "critic/score/mean": 0.5, "actor/kl_loss": nan},
            {"step": 36, "val-core/openai/gsm8k/reward/mean@1": 0.25},
        ],
    ),
    "openrlhf": (
        [
            "(PPOTrainer pid=7) INFO 05-01 10:00:00 ppo_trainer.py:210] ✨ Global step 1: {'policy_loss': 0.5, 'kl': nan}",
            "INFO 05-01 10:00:09 ppo_trainer_async.py:99] Global step 2: {'policy_loss': -inf, 'reward': 0.25, 'lr': 5e-07}",
            "✨ Global step 3: {'reward': 1.0, 'generated_samples': [\"it's {odd}, 'x': 1\", 0.5], 'kl': 0.0}",
        ],
        [
            {"step": 1, "policy_loss": 0.5, "kl": nan},
            {"step": 2, "policy_loss": -inf, "reward": 0.25, "lr": 5e-07},
            {"step": 3, "reward": 1.0, "generated_samples": "[\"it's {odd}, 'x': 1\", 0.5]", "kl": 0.0},
        ],
    ),
    "pipeline_rl": (
        [
            "[finetune]: 2026-01-01 10:00:00,123 - INFO - pipelinerl - Completed steps 4: {'rl/loss': '0.123', 'rl/kl': '1.000e-05'}",
            "Completed steps 5: {'rl/loss': 'nan', 'stats/lag': '128'}",
        ],
        [
            {"step": 4, "rl/loss": 0.123, "rl/kl": 1e-05},
            {"step": 5, "rl/loss": nan, "stats/lag": 128},
        ],
    ),
    "prime_rl": (
        [
            "\x1b[32m19:01:02\x1b[0m SUCCESS Step 3 | Time: 98.02s | Reward: 0.4353 | Val. Reward: 0.5000 |"
            " Throughput: 1234.5 tokens/s | Seq. Length: 2069.9 tokens/sample | Async Level: 1 | Max. Off-Policy Level: 2",
            "SUCCESS Step 3 | Time: 289.52s | Loss: -0.0036 | Entropy: 1.0338 | Mismatch KL: 0.3523 | Grad. Norm: 0.0560"
            " | LR: 1.00e-06 | Throughput: 8712 tokens/s | MFU: 5.4% | Peak Mem.: 89.6 GiB | Max Vio: 6.0787",
            "SUCCESS Step 4 | 18m 23s | Loss nan | Entropy 0.3717 | Mismatch KL 0.0249 | Routing Conf. 0.0992",
            "SUCCESS Step 4 | 1h 2m 3s | Reward 0.7812 | Trainable 32/64 (50.0%) | Turns 31.1 | Error 0.5% | Truncation 0.0%",
            "Step 7 | Time: 1.20s | Loss: 0.1234 | Grad. Norm: 0.5 | Peak Mem.: 12.3/79.1 GiB (15.5%)",
        ],
        [
            {
                "step": 3,
                "time/step": 98.02,
                "reward/mean": 0.4353,
                "val_reward": 0.5,
                "perf/throughput": 1234.5,
                "seq_length_tokens_sample": 2069.9,
                "async_level": 1,
                "max_off_policy_level": 2,
            },
            {
                "step": 3,
                "time/step": 289.52,
                "loss/mean": -0.0036,
                "entropy/mean": 1.0338,
                "mismatch_kl/mean": 0.3523,
                "optim/grad_norm": 0.056,
                "optim/lr": 1e-06,
                "perf/throughput": 8712,
                "perf/mfu": 5.4,
                "perf/peak_memory": 89.6,
                "max_vio/mean": 6.0787,
            },
            {
                "step": 4,
                "time/step": 18 * 60 + 23,
                "loss/mean": nan,
                "entropy/all/mean": 0.3717,
                "mismatch_kl/all/mean": 0.0249,
                "routing_confidence/mean": 0.0992,
            },
            {
                "step": 4,
                "time/step": 3600 + 2 * 60 + 3,
                "reward": 0.7812,
                "trainable": 32,
                "trainable_of": 64,
                "turns": 31.1,
                "error_percent": 0.5,
                "truncation_percent": 0.0,
            },
            {
                "step": 7,
                "time/step": 1.2,
                "loss/mean": 0.1234,
                "optim/grad_norm": 0.5,
                "perf/peak_memory": 12.3,
                "peak_mem_of_gib": 79.1,
            },
        ],
    ),
    "torchtune": (
        [
            "1|1|Loss: 2.1:   0%|   | 1/880 [00:01<17:00,  1.2s/it]\rStep 1 | loss:2.5 lr:2e-05 grad_norm:nan ",
            "Step 2 | loss:tensor(2.25) rewards/chosen:tensor(0.125, device='cuda:0') tokens_per_second_per_gpu:123.4 ",
            "Step 3 | val_loss:2.0",
        ],
        [
            {"step": 1, "loss": 2.5, "lr": 2e-05, "grad_norm": nan},
            {"step": 2, "loss": 2.25, "rewards/chosen": 0.125, "tokens_per_second_per_gpu": 123.4},
            {"step": 3, "val_loss": 2.0},
        ],
    ),
    "pairs": (
        [
            "[2026-01-01 10:00:00] step 100 | loss 2.31 | lr 1e-4 | mfu 3.5%",
            "[2026-01-01 10:00:09] step 200 | loss nan | lr 1e-4 | mfu 3.5%",
            "INFO:root:Epoch 1/3 Step 300: loss=0.5, grad norm=1,234.5 time=12ms",
            "INFO:root:Epoch 1/3 Step 301: loss=0.25, grad norm=2.5 time=13ms",
            "[titan] INFO - step: 302  loss:  8.1309  grad_norm:  1.5  memory:  0.90GiB(1.00%)  tps: 1,234",
            "[titan] INFO - step: 312  loss:  7.1309  grad_norm:  1.5  memory:  0.90GiB(1.00%)  tps: 1,234",
            " iteration      313/     500 | consumed samples:  16 | learning rate: 1.0E-05 | lm loss: 1.0E+01 |",
            " iteration      314/     500 | consumed samples:  32 | learning rate: 1.0E-05 | lm loss: 9.0E+00 |",
        ],
        [
            {"step": 100, "loss": 2.31, "lr": 1e-4, "mfu (%)": 3.5},
            {"step": 200, "loss": nan, "lr": 1e-4, "mfu (%)": 3.5},
            {"step": 300, "epoch": 1, "loss": 0.5, "grad norm": 1234.5, "time (ms)": 12},
            {"step": 301, "epoch": 1, "loss": 0.25, "grad norm": 2.5, "time (ms)": 13},
            {"step": 302, "loss": 8.1309, "grad_norm": 1.5, "memory (GiB)": 0.9, "tps": 1234},
            {"step": 312, "loss": 7.1309, "grad_norm": 1.5, "memory (GiB)": 0.9, "tps": 1234},
            {"step": 313, "consumed samples": 16, "learning rate": 1e-05, "lm loss": 10.0},
            {"step": 314, "consumed samples": 32, "learning rate": 1e-05, "lm loss": 9.0},
        ],
    ),
}


@pytest.mark.parametrize("style", ONE_LINE)
def test_a_line_of_metrics_is_found_in_noise(style):
    lines, expected = ONE_LINE[style]
    found, rows, notes = read_text(among_noise(lines))
    assert found == style
    assert same(rows, expected)
    # Lines that are not blank, less those of metrics.
    others = sum(bool(text.strip()) for _, text, _ in told(among_noise(lines))) - len(lines)
    assert notes[0].endswith(f"; {others} other lines held no metrics.")


@pytest.mark.parametrize("style", ONE_LINE)
def test_windows_line_ends_change_nothing(style):
    lines, expected = ONE_LINE[style]
    found, rows, _ = read_text(among_noise(lines).replace("\n", "\r\n"))
    assert found == style
    assert same(rows, expected)


@pytest.mark.parametrize("style", sorted(set(ONE_LINE) - {"pairs"}))
def test_one_row_is_enough_to_tell_a_specific_style(style):
    lines, expected = ONE_LINE[style]
    found, rows, _ = read_text(lines[0] + "\n")
    assert found == style
    assert same(rows, expected[:1])


PRINTED = {
    "step 1 loss 1.9531 grad_norm 1.594": {"step": 1, "loss": 1.9531, "grad_norm": 1.594},
    "step 4 loss 2.3 tokens 1,024,000 dt 0.1s": {"step": 4, "loss": 2.3, "tokens": 1024000, "dt (s)": 0.1},
    "step=10,loss=2.3,lr=1e-4": {"step": 10, "loss": 2.3, "lr": 1e-4},
    "Step 0/500 | train loss: 2.8 | val loss: 2.9 | 0.8s/it": {"step": 0, "train loss": 2.8, "val loss": 2.9},
    "step 5: loss 2.3 | ETA 0:10:03 | 12.3k tok/s": {"step": 5, "loss": 2.3},
    "2026-01-01 12:00:01 INFO [train.py:33] [20/500] loss=1.9, lr=1e-4": {"step": 20, "loss": 1.9, "lr": 1e-4},
    "Train Epoch: 1 [640/60000 (1%)]\tLoss: 2.301": {"step": 640, "epoch": 1, "Loss": 2.301},
    "epoch 1 batch 20 loss 2.3": {"step": 20, "epoch": 1, "loss": 2.3},
    "Loss: 2.31 | lr: 1e-4 | Step: 10": {"step": 10, "Loss": 2.31, "lr": 1e-4},
    "step 3 loss tensor(2.25, device='cuda:0', grad_fn=<NllLossBackward0>) lr 0.1": {
        "step": 3,
        "loss": 2.25,
        "lr": 0.1,
    },
}


@pytest.mark.parametrize("line", PRINTED)
def test_what_home_made_loops_print(line):
    style, rows, _ = read_text(f"{line}\n" * 2)
    assert style == "pairs"
    assert same(rows, [PRINTED[line]] * 2)


def test_steps_that_begin_anew_in_each_epoch_count_on():
    text = "".join(
        f"Epoch {epoch}/3 | Step {step}/100 | loss {1 / epoch}\n" for epoch in (1, 2, 3) for step in (50, 100)
    )
    _, rows, notes = read_text(text)
    assert [row["step"] for row in rows] == [50, 100, 150, 200, 250, 300]
    assert any("counted on" in note for note in notes)


def test_steps_that_run_through_the_epochs_stay():
    text = "".join(f"Epoch {1 + step // 100}/3 | Step {step}/300 | loss 0.5\n" for step in range(0, 300, 50))
    _, rows, _ = read_text(text)
    assert [row["step"] for row in rows] == [0, 50, 100, 150, 200, 250]


# ---------------------------------------------------------------------- styles of several lines


def test_pretty_printed_dicts_between_lines_of_other_processes():
    metrics = {"train/pg_loss": 0.0123456789, "train/kl3": nan, "misc/global_step": 4, "actor/rewards": 0.5}
    printed = pprint.pformat(metrics)  # sorted, one name a line where it is longer than 80
    assert printed.count("\n") == 3
    rich = "{\n│   'train/pg_loss': 0.5,\n[actor/0] [INFO] generated 8\n│   'misc/global_step': 8,\n│   'train/kl3': -inf\n}\n"
    config = "{'actor': {'lr': 1e-06,\n           'optim': 'adam'},\n 'critic': None,\n 'epochs': 3}\n"
    style, rows, notes = read_text(config + "\n\n" + printed + "\n\n[actor/0] hello\n" + rich + "bye\n")
    assert style == "oat"
    assert same(
        rows,
        [
            {"actor/rewards": 0.5, "misc/global_step": 4, "train/kl3": nan, "train/pg_loss": 0.0123456789},
            {"train/pg_loss": 0.5, "misc/global_step": 8, "train/kl3": -inf},
        ],
    )
    assert not any("could not be read" in note for note in notes)


def test_a_pretty_printed_dict_that_never_ends_is_told_of():
    whole = "{'misc/global_step': 1,\n 'train/pg_loss': 0.5}\n"
    style, rows, notes = read_text(whole + whole + "{'misc/global_step': 2,\n 'train/pg_loss': 0.25,\n" + "x\n" * 9000)
    assert style == "oat"
    assert len(rows) == 2
    assert any("could not be read in full" in note and ": 5." in note for note in notes)


NEMO = """
========================= Epoch 2/3 =========================

========================= Step 3/10 =========================
▶ Preparing batch...
(pid=12) some worker - step 3: fine

📊 Validation Results:
    • Accuracy: 0.2500
    • Average response length: 300.0 tokens

  ⏱️  Validation Timing:
    • Total validation time: 12.34s

📊 Training Results:
  • Loss: 0.0123
  • Generation KL Error: 0.0010
  • Avg Reward: 0.5000
  • Mean Generation Length: 123.4000
  • Training FLOPS: 12.30 TFLOPS (1.00 TFLOPS per rank)

⏱️  Timing:
  • Total step time: 12.34s
  • policy_training: 3.21s (26.0%)

========================= Step 4/10 =========================

📊 Training Results:
  • Loss: nan
"""


def test_nemo_rl_blocks():
    style, rows, _ = read_text(NEMO)
    assert style == "nemo_rl"
    # Epoch 2 of 10 steps each: step 3 of it is the 13th.
    assert same(
        rows,
        [
            {
                "step": 13,
                "validation/accuracy": 0.25,
                "validation/avg_length": 300.0,
                "timing/validation/total_validation_time": 12.34,
                "train/loss": 0.0123,
                "train/gen_kl_error": 0.001,
                "train/reward": 0.5,
                "train/mean_gen_tokens_per_sample": 123.4,
                "train/training_flops_tflops": 12.3,
                "timing/train/total_step_time": 12.34,
                "timing/train/policy_training": 3.21,
            },
            {"step": 14, "train/loss": nan},
        ],
    )


TABLES = {
    "tabs": "Step\tTraining Loss\tValidation Loss\n10\t1.5\tNo log\n20\t1.25\t1.75\n",
    "markdown": (
        "| Step | Training Loss | Validation Loss |\n|:----:|:-------------:|:---------------:|\n"
        "| 10   | 1.5           | No log          |\n| 20   | 1.25          | 1.75            |\n"
    ),
    "aligned": (
        "  Step   Training Loss   Validation Loss\n    10            1.50            No log\n    20            1.25              1.75\n"
    ),
    "boxes": (
        "┏━━━━━━┳━━━━━━━━━━━━━━━┳━━━━━━━━━━━━━━━━━┓\n┃ Step ┃ Training Loss ┃ Validation Loss ┃\n"
        "┡━━━━━━╇━━━━━━━━━━━━━━━╇━━━━━━━━━━━━━━━━━┩\n│ 10   │ 1.5           │ No log          │\n"
        "│ 20   │ 1.25          │ 1.75            │\n└──────┴───────────────┴─────────────────┘\n"
    ),
    "data frame": (
        "   Step  Training Loss  Validation Loss\n0    10           1.50              NaN\n1    20           1.25             1.75\n"
    ),
}


@pytest.mark.parametrize("form", TABLES)
def test_tables_as_text(form):
    style, rows, _ = read_text("Results so far:\n\n" + TABLES[form] + "\nThe run was 20 steps long.\n")
    assert style == "table"
    assert rows == [{"Step": 10, "Training Loss": 1.5}, {"Step": 20, "Training Loss": 1.25, "Validation Loss": 1.75}]


def test_what_is_missing_in_a_data_frame_is_no_nan_and_said():
    """pandas fills with NaN what a row does not have; an alarm for each evaluation would be wrong."""
    assert any("NaN stands for what was not logged" in note for note in read_text(TABLES["data frame"])[2])
    assert not any("NaN" in note for note in read_text(TABLES["aligned"])[2])
    plain = "Step  Training Loss\n1  nan\n2  0.5\n"  # no index: a number that is none
    assert same(read_text(plain)[1], [{"Step": 1, "Training Loss": nan}, {"Step": 2, "Training Loss": 0.5}])


def test_a_data_frame_in_a_notebook(tmp_path):
    html = page(["", "step", "loss", "eval_loss"], [["0", "10", "1.5", "NaN"], ["1", "10", "NaN", "1.75"]])
    rows, notes = read_notebook(write_notebook(tmp_path / "f.ipynb", [shown(html)]))
    assert rows == [{"step": 10, "loss": 1.5}, {"step": 10, "eval_loss": 1.75}]
    assert any("NaN stands for what was not logged" in note for note in notes)


def test_a_file_that_is_one_table_with_tabs_is_left_to_the_reader_of_csv():
    assert read_text("step\tloss\n1\t0.5\n2\t0.4\n")[0] is None


def test_what_progress_bars_say():
    def bar(epoch, done, loss):
        return f"Train step of epoch {epoch}:  {done * 25}%|█  | {done}/4 [00:01<00:02,  1.0it/s, gpt_loss={loss}, lr=1e-6]"

    drawn = [bar(0, 1, 4.0), bar(0, 2, 4.0), bar(0, 2, 3.0), bar(0, 3, 2.5), bar(0, 4, 2.0), bar(1, 1, 1.5)]
    evaluation = "Eval stage of steps 4: 50%|█ | 1/2 [00:01<00:02,  1.0it/s, eval gpt_loss=9]"
    style, rows, _ = read_text("\r".join(drawn) + f"\n{evaluation}\n")
    assert style == "bar"
    # Twice at step 2: the later word counts. The second epoch of 4 steps begins at step 5.
    assert rows == [
        {"step": step, "gpt_loss": loss, "lr": 1e-6}
        for step, loss in [(1, 4.0), (2, 3.0), (3, 2.5), (4, 2.0), (5, 1.5)]
    ]


def test_a_specific_style_wins_over_prints_of_the_same_log():
    lines = ["{'loss': 0.5, 'grad_norm': 1.0, 'epoch': 0.5}", *("step 5 | reward 0.5" for _ in range(3))]
    assert read_text("\n".join(lines) + "\n")[0] == "dict"


# ---------------------------------------------------------------------- torn, glued, cut


def test_torn_dicts_are_skipped_and_told_of_by_line():
    text = (
        "{'loss': 0.5, 'epoch': 1.0}\n"
        "{'loss': 0.25, 'grad_norm': 1.0, 'lear\n"
        "{'loss': 0.25, 'epoch': {'loss': 0.125, 'epoch': 2.0}\n"
        "{'loss': 0.0625, 'epoch': 3.0}\n"
    )
    style, rows, notes = read_text(text)
    assert style == "dict"
    assert rows == [{"loss": 0.5, "epoch": 1.0}, {"loss": 0.125, "epoch": 2.0}, {"loss": 0.0625, "epoch": 3.0}]
    assert any(
        "2 lines looked like metrics but could not be read in full; what could not was skipped: 2, 3." in n
        for n in notes
    )


def test_what_another_process_wrote_into_a_row_costs_only_that_value():
    _, rows, notes = read_text("step:1 - actor/pg_loss:0.5(pid=3) hello - actor/lr:1e-6 - critic/score/mean:0.5\n")
    assert rows == [{"step": 1, "actor/lr": 1e-6, "critic/score/mean": 0.5}]
    assert any(": 1." in note for note in notes)


@pytest.mark.parametrize("style", ["verl", "torchtune", "pairs"])
def test_a_number_that_may_be_cut_at_the_end_of_the_file_is_left_out(style):
    line = {
        "verl": "step:{} - actor/pg_loss:0.5 - actor/lr:1.25e-06",
        "torchtune": "Step {} | loss:0.5 lr:1.25e-06",
        "pairs": "step {} | loss 0.5 | lr 1.25e-06",
    }[style]
    text = "".join(line.format(i) + "\n" for i in (1, 2, 3))
    cut = text[: -len("e-06\n")]  # the last learning rate now reads 1.25
    found, rows, notes = read_text(cut)
    assert found == style
    assert [len(row) for row in rows] == [3, 3, 2]
    assert 1.25 not in rows[-1].values()
    assert any("may be cut and was left out" in note for note in notes)


def test_a_dict_at_the_end_of_the_file_is_whole_or_not_a_row():
    text = "{'loss': 0.5, 'epoch': 1.0}\n{'loss': 0.25, 'epoch': 2.0}"
    assert len(read_text(text)[1]) == 2
    _, rows, notes = read_text(text[:-1])
    assert len(rows) == 1
    assert any(": 2." in note for note in notes)


def test_a_line_that_comes_in_pieces_is_put_together():
    whole = "\r".join(f"  {i}%| | {i}/9 [00:01<00:01]{{'loss': 0.{i}, 'epoch': {i}}}" for i in range(1, 9))
    pieces = [(1, whole[i : i + 37], False) for i in range(0, len(whole), 37)]
    rows = list(console.rows(iter([*pieces[:-1], (1, pieces[-1][1], True)]), "dict", Path("x"), []))
    assert rows == [{"loss": i / 10, "epoch": i} for i in range(1, 9)]


def test_an_unknown_style_is_named():
    with pytest.raises(UnreadableLog, match=r"run\.log: console style 'loud' is not known"):
        list(console.rows(iter([]), "loud", Path("run.log"), []))


# ---------------------------------------------------------------------- what is no log of metrics

NOTHING = {
    "prose": "In step 3 we have loss 0.5 and lr 0.1. In step 4 the loss was 0.4.\nEpoch 3 took long.\n" * 5,
    "recipe": "Step 1/10 : FROM python\nStep 2/10 : RUN pip install\nStep 3 | wait 5 min\nStep 4 | wait 5 min\n",
    "config dict": "{'learning_rate': 1e-05, 'max_grad_norm': 1.0, 'num_train_epochs': 3, 'loss_type': 'dapo', 'epoch': 3}\n"
    * 3,
    "pretty config": pprint.pformat({"kl_loss_coef": 0.001, "entropy_coeff": 0, "epochs": 3, "loss": "mse" * 40})
    + "\n",
    "sample": "{'role': 'user', 'content': 'hi', 'reward': 0.5, 'score': 1}\n" * 9,
    "model config": json.dumps({"hidden_size": 64, "attention_dropout": 0.0, "architectures": ["A"]}, indent=2) + "\n",
    "model config on one line": json.dumps({"hidden_size": 64, "initializer_range": 0.02, "epoch": 1}) + "\n",
    "pip": "Collecting torch==2.1\n  Downloading torch.whl (1.2 MB)\n     |████████| 1.2/1.2 MB 3.4 MB/s eta 0:00:00\n"
    * 5,
    "bars": "\r".join(f" {i}%| | {i}/100 [00:10<00:20,  1.2it/s]" for i in range(99)) + "\n",
    "vllm bars": "Processed: 10%|█ | 1/10 [00:01<00:09, 1.2it/s, est. speed input: 27.07 toks/s]\n" * 5,
    "results": "  Execution success:     58/100 (58.0%)\n  Avg generation time:   1.84s\n" * 3,
    "table of no run": "name\tsize\tscore\na.bin\t10\t0.5\nb.bin\t20\t0.5\n",
    "yaml": "train:\n  epochs: 3\n  step: 10\n  loss: dpo\n  lr: 1e-5\n",
    "python": "for step in range(10):\n    loss = model(batch)\n    print(f'step {step} | loss {loss}')\n",
    "shards": "[1/3] Loading shard, loss 3\n[2/3] Loading shard, loss 3\n",
    "said": "Step 10, saving the model with loss 2.3\nStep 20, saving the model with loss 2.2\n",
    "empty": "\n\n\n",
}


@pytest.mark.parametrize("what", NOTHING)
def test_no_style_for_what_is_no_log_of_metrics(what):
    assert read_text(NOTHING[what])[0] is None


LINE_LIKE = st.one_of(
    st.text(max_size=80),
    st.lists(
        st.sampled_from(
            [
                *(
                    "step:1 - ",
                    "Step 3 | ",
                    "Global step 4: ",
                    "Completed steps 2: ",
                    "{",
                    "}",
                    "'loss': ",
                    '"loss": ',
                    "0.5",
                ),
                *(
                    "nan",
                    ", ",
                    "'epoch': 1",
                    "a:1 ",
                    " | ",
                    "\t",
                    "\r",
                    "\x1b[0m",
                    "np.float64(",
                    ")",
                    "tensor(",
                    "Loss 0.5",
                ),
                *(
                    "Step\tTraining Loss",
                    "| Step | loss |",
                    "10\t0.5",
                    "=====",
                    " Step 1/2 ",
                    "Training Results:",
                    "• Loss: 1",
                ),
                *(
                    "1/2 [00:01<00:01, 1it/s, loss=0.5]",
                    "Epoch 1/2 ",
                    "[",
                    "]",
                    "(",
                    "'",
                    "\\",
                    "-",
                    "9" * 400,
                    "1e999",
                    "Time: 1s",
                ),
            ]
        ),
        max_size=12,
    ).map("".join),
)


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(LINE_LIKE, max_size=12), st.booleans())
@example(["{'a': {'a': {'a': {'a': {'a': {'a': 1}}}}}}", "{'loss': [[[[", "step:1 - :"], True)
def test_any_text_is_read_without_a_crash(lines, ended):
    console.find_style(lines)
    notes = []
    for style in console.STYLES:
        given_lines = [(i, line, ended or i < len(lines)) for i, line in enumerate(lines, 1)]
        for row in console.rows(iter(given_lines), style.name, Path("x"), notes):
            assert row
            assert all(isinstance(name, str) for name in row)
            assert any(isinstance(value, int | float | str) for value in row.values())
    assert all(isinstance(note, str) for note in notes)


@pytest.mark.parametrize(
    "line",
    ["{'a':[" * 20_000, "{'a':{" * 20_000, "=" * 200_000, "(" * 100_000, "Step 1 | " * 20_000, " " * 200_000 + "=x"],
)
def test_hostile_lines_end(line):
    console.find_style([line] * 3)
    for style in console.STYLES:
        list(console.rows(iter([(1, line, True)]), style.name, Path("x"), []))


# ---------------------------------------------------------------------- really printed


@contextlib.contextmanager
def everything_printed():
    """stdout and stderr of a block in one text, as a terminal shows them."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        yield text


def as_printed(history):
    """The rows that a Trainer prints of its log history: floats with four digits, the sum of operations left out."""
    return [
        {
            name: float(f"{value:.4g}") if isinstance(value, float) else value
            for name, value in row.items()
            if name not in ("total_flos", "step")
        }
        for row in history
    ]


@pytest.mark.parametrize("bars", [False, True])
def test_what_transformers_prints(tmp_path, tiny_model_factory, short_run, fast_collection, bars):
    import torch
    from transformers import Trainer, TrainingArguments

    items = [{"input_ids": torch.tensor([5, 6, 7]), "labels": torch.tensor([5, 6, 7])}] * 6
    args = TrainingArguments(
        output_dir=str(tmp_path),
        **{**short_run, "disable_tqdm": not bars},
        max_steps=6,
        per_device_train_batch_size=2,
        eval_strategy="steps",
        eval_steps=3,
    )
    trainer = Trainer(model=tiny_model_factory(), args=args, train_dataset=items, eval_dataset=items)
    with everything_printed() as printed:
        trainer.train()
    text = printed.getvalue()
    assert ("it/s" in text) == bars
    style, rows, _ = read_text(text)
    assert style == "dict"
    history = as_printed(trainer.state.log_history)
    assert len(history) == 6 + 2 + 1  # steps, evaluations, the summary
    assert same(rows, history)


def test_what_trl_prints(tmp_path, tiny_model_factory, tiny_tokenizer_factory, short_run, fast_collection):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    args = SFTConfig(output_dir=str(tmp_path), **short_run, max_steps=3, per_device_train_batch_size=2)
    data = Dataset.from_list([{"text": "The sky is blue and the grass is green."}] * 8)
    trainer = SFTTrainer(
        model=tiny_model_factory(), args=args, train_dataset=data, processing_class=tiny_tokenizer_factory()
    )
    with everything_printed() as printed:
        trainer.train()
    style, rows, _ = read_text(printed.getvalue())
    assert style == "dict"
    history = as_printed(trainer.state.log_history)
    assert len(history) == 3 + 1
    assert "mean_token_accuracy" in rows[0]
    assert same(rows, history)


@pytest.mark.parametrize("path", RAW, ids=lambda path: path.parent.name)
def test_logs_of_public_runs(path):
    """The rows were cut from the log by others; each dict of it is one, with the same values."""
    lines = [(number, text, ended) for number, text, ended in lines_of(path, [], strict=False)]
    assert console.find_style([text for _, text, _ in lines]) == "dict"
    rows = list(console.rows(iter(lines), "dict", path, notes := []))
    expected = [json.loads(line) for line in (path.parent / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert same(rows, expected)
    assert not any("could not" in note for note in notes)


def test_a_bar_before_a_dict_is_no_step():
    """In a file the bar runs ahead of the dicts: as long as this holds of public logs, no step is taken from it."""
    path = next((p for p in RAW if p.parent.name == "kyler_sft_starcoder2_3b"), None)
    if path is None:
        pytest.skip("no recorded runs beside this checkout")
    before, _, after = path.read_text(encoding="utf-8").partition("{'loss': ")
    assert "301/903" in before
    assert "'epoch': 0.03}" in after.splitlines()[0]  # of 3 epochs: step 10
    rows = list(console.rows(lines_of(path, [], strict=False), "dict", path, []))
    assert not any("step" in row for row in rows)


# ---------------------------------------------------------------------- notebooks


def page(header, lines):
    cells = "".join("<tr>" + "".join(f"<td>{c}</td>" for c in line) + "</tr>" for line in lines)
    head = "".join(f"<th>{name}</th>" for name in header)
    return f'<div><progress value="3" max="3"></progress> [3/3 00:01, Epoch 1/1]</div><table border="1"><thead><tr>{head}</tr></thead><tbody>{cells}</tbody></table><p>'


def shown(html):
    return {
        "output_type": "display_data",
        "data": {"text/html": html.splitlines(keepends=True), "text/plain": ["<HTML>"]},
    }


def stream(text):
    return {"output_type": "stream", "name": "stdout", "text": text.splitlines(keepends=True)}


def write_notebook(path, *cells):
    book = {
        "cells": [{"cell_type": "code", "source": ["x"], "outputs": outputs} for outputs in cells],
        "metadata": {},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    path.write_text(json.dumps(book), encoding="utf-8")
    return path


def read_notebook(path):
    notes = []
    return list(notebook.rows(path, notes)), notes


def test_a_table_that_a_trainer_showed(tmp_path):
    html = page(
        ["Step", "Training Loss", "completions / mean_length"],
        [["10", "1.500000", "No log"], ["20", "nan", "1,024.5"]],
    )
    path = write_notebook(tmp_path / "run.ipynb", [stream("hello\n")], [shown(html)])
    assert notebook.is_notebook(path.read_text())
    rows, notes = read_notebook(path)
    assert same(
        rows,
        [
            {"Step": 10, "Training Loss": 1.5},
            {"Step": 20, "Training Loss": nan, "completions / mean_length": 1024.5},
        ],
    )
    assert notes == []


def test_of_several_runs_the_longest_is_read(tmp_path):
    names = ["Step", "Training Loss"]
    short = shown(page(names, [["1", "9.0"], ["2", "8.0"]]))
    long = shown(page(names, [["1", "3.0"], ["2", "2.0"], ["3", "1.0"]]))
    frame = shown(page(["", "name", "size"], [["0", "a", "1"]]))
    rows, notes = read_notebook(write_notebook(tmp_path / "n.ipynb", [short], [frame], [long]))
    assert [row["Training Loss"] for row in rows] == [3.0, 2.0, 1.0]
    assert notes == [
        "The notebook shows 2 runs; the longer one, at cell 3, was read, and the one at cell 1 was left out."
    ]


def test_a_table_that_goes_on_in_another_output_is_one_run(tmp_path):
    names = ["Step", "Training Loss"]
    first, rest = page(names, [["1", "3.0"], ["2", "2.0"]]), page(names, [["3", "1.0"]])
    other = page(names, [["1", "7.0"], ["2", "7.0"]])
    rows, notes = read_notebook(write_notebook(tmp_path / "n.ipynb", [shown(first), shown(rest)], [shown(other)]))
    assert [row["Step"] for row in rows] == [1, 2, 3]
    assert len(notes) == 1


def test_printed_lines_and_tables_as_text_of_a_notebook(tmp_path):
    printed = "".join(f"{{'loss': {1 / i}, 'epoch': {i}}}\n" for i in (1, 2, 4))
    rows, _ = read_notebook(write_notebook(tmp_path / "a.ipynb", [stream("loading\n"), stream(printed)]))
    assert rows == [{"loss": 1.0, "epoch": 1}, {"loss": 0.5, "epoch": 2}, {"loss": 0.25, "epoch": 4}]
    plain = {"output_type": "execute_result", "data": {"text/plain": "   step  loss\n0    10   1.5\n1    20   1.25"}}
    rows, _ = read_notebook(write_notebook(tmp_path / "b.ipynb", [plain]))
    assert rows == [{"step": 10, "loss": 1.5}, {"step": 20, "loss": 1.25}]


def test_notebooks_of_the_older_format(tmp_path):
    html = page(["Epoch", "Training Loss", "Validation Loss"], [["1", "0.5", "0.75"]])
    cell = {"cell_type": "code", "outputs": [{"output_type": "display_data", "html": [html], "text": ["<HTML>"]}]}
    path = tmp_path / "old.ipynb"
    path.write_text(json.dumps({"metadata": {}, "nbformat": 3, "worksheets": [{"cells": [cell]}]}))
    assert notebook.is_notebook(path.read_text())
    assert read_notebook(path)[0] == [{"Epoch": 1, "Training Loss": 0.5, "Validation Loss": 0.75}]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ('{"cells": [{"cell_type": "code", "outp', "breaks off"),
        ('{"cells": [], "nbformat": 4}', "no output of the notebook holds metrics"),
        ('{"cells": [1, {"outputs": [2, {"data": {"text/html": 3}, "text": 4}]}], "nbformat": 4}', "no output"),
        ("[1]", "is no notebook"),
    ],
)
def test_a_notebook_that_cannot_be_read_is_named_in_one_sentence(tmp_path, content, why):
    path = tmp_path / "bad.ipynb"
    path.write_text(content)
    with pytest.raises(UnreadableLog, match=why) as error:
        read_notebook(path)
    assert str(error.value).startswith(f"{path}: ")


def test_other_json_is_no_notebook():
    assert not notebook.is_notebook('{"cells": 3, "loss": 0.5}')
    assert not notebook.is_notebook('{"step": 1, "text": "\\"cell_type\\""}')
    assert not notebook.is_notebook("step 1 | loss 0.5")


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(
        st.sampled_from(
            ["<table>", "<tr>", "<td>", "</td>", "<th>Step", "<th>loss", "1", "&lt;", "</table>", "<", "nan"]
        )
    )
)
def test_any_html_is_read_without_a_crash(tmp_path_factory, parts):
    path = write_notebook(tmp_path_factory.getbasetemp() / "fuzz.ipynb", [shown("".join(parts))])
    try:
        rows, _ = read_notebook(path)
    except UnreadableLog:
        return
    assert all(isinstance(name, str) for row in rows for name in row)


class Shown:
    """Stands in for IPython's display: what is shown last under each handle."""

    def __init__(self):
        self.pages = []

    def display(self, html, display_id=False):
        at = len(self.pages)
        self.pages.append(html)
        return types.SimpleNamespace(update=lambda newer: self.pages.__setitem__(at, newer))


@pytest.fixture
def notebook_callback(monkeypatch):
    """transformers' callback for notebooks, and what it showed."""
    screen = Shown()
    display = types.ModuleType("IPython.display")
    display.HTML, display.display = str, screen.display
    package = types.ModuleType("IPython")
    package.display = display
    monkeypatch.setitem(sys.modules, "IPython", package)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.delitem(sys.modules, "transformers.utils.notebook", raising=False)
    from transformers.utils.notebook import NotebookProgressCallback

    yield NotebookProgressCallback, screen
    sys.modules.pop("transformers.utils.notebook", None)


def test_what_transformers_shows_in_a_notebook(
    tmp_path, tiny_model_factory, short_run, fast_collection, notebook_callback
):
    import torch
    from transformers import Trainer, TrainingArguments

    callback, screen = notebook_callback
    items = [{"input_ids": torch.tensor([5, 6, 7]), "labels": torch.tensor([5, 6, 7])}] * 6
    args = TrainingArguments(
        output_dir=str(tmp_path),
        **short_run,
        max_steps=4,
        per_device_train_batch_size=2,
        eval_strategy="steps",
        eval_steps=2,
    )
    trainer = Trainer(
        model=tiny_model_factory(), args=args, train_dataset=items, eval_dataset=items, callbacks=[callback]
    )
    with everything_printed():
        trainer.train()
    rows, _ = read_notebook(write_notebook(tmp_path / "run.ipynb", [shown(html) for html in screen.pages]))
    history = trainer.state.log_history
    assert [row["Step"] for row in rows] == [2, 4]
    for row in rows:
        logged = {name: entry[name] for entry in history if entry["step"] == row["Step"] for name in entry}
        assert row["Training Loss"] == pytest.approx(logged["loss"], abs=1e-6)
        assert row["Validation Loss"] == pytest.approx(logged["eval_loss"], abs=1e-6)
        assert math.isfinite(row["Training Loss"])
