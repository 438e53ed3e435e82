"""OpenRLHF, PRIME-RL, PipelineRL and OAT: logs under the names and in the units that these systems document.

The rows are made here by arithmetic of the step; what they must be read as is written down beside them.
"""

import json
import math

import pytest

from outspoken.diagnostics import signals
from outspoken.diagnostics.sources import FAMILIES, OTHER, read
from outspoken.diagnostics.sources.names import choose_family
from outspoken.diagnostics.sources.oat import OAT
from outspoken.diagnostics.sources.openrlhf import OPENRLHF, OPENRLHF_REWARD
from outspoken.diagnostics.sources.pipeline_rl import PIPELINE_RL
from outspoken.diagnostics.sources.prime_rl import PRIME_RL
from outspoken.diagnostics.sources.settings import FIELDS

OURS = (OPENRLHF, OPENRLHF_REWARD, PRIME_RL, PIPELINE_RL, OAT)
STEPS = range(1, 7)


@pytest.fixture
def log(tmp_path):
    """`log(rows)` reads rows as the JSON lines of a file; every cell must be accounted for."""

    def go(rows, **options):
        path = tmp_path / "metrics.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        run = read(path, **options)
        assert run.account.balanced
        assert run.account.cells == sum(len(row) for row in rows)
        return run

    return go


def column(run, name):
    return [o.signals.get(name) for o in run.observations]


def check(run, expected):
    """Each signal is what its function says of the step; None where it is not measured."""
    for name, value in expected.items():
        for observation in run.observations:
            seen, wanted = observation.signals.get(name), value(observation.step)
            same = seen is wanted if seen is None or wanted is None else seen == pytest.approx(wanted, rel=1e-9)
            assert same, (name, observation.step, seen, wanted)


def tell(run, *words):
    text = " ".join(run.notes)
    for word in words:
        assert word in text, (word, run.notes)


def in_wandb(row, step, prefix="train/"):
    return {prefix + name: value for name, value in row.items()} | {f"{prefix}global_step": step}


# ---------------------------------------------------------------------- OpenRLHF


def openrlhf_row(step):
    return {
        "policy_loss": -step / 512,
        "actor_lr": 5e-7,
        "actor_grad_norm": 1 / step,
        "ppo_clip_ratio": step / 128,
        "ppo_kl": -1 / 4096,
        "vllm_kl": -step / 2048,
        "kl": step / 1024,
        "logprobs_diff": step / 512,
        "entropy_loss": 1 - step / 32,
        "reward": step / 16 + 1 / 64,  # over training batches
        "return": step / 16,
        "group_reward_std": 0.25,
        "response_length": 90.0 + step,
        "total_length": 190.0 + step,
        "truncated": 0.5,
        "rollout/reward_mean": step / 16,
        "rollout/reward_std": 0.5,
        "rollout/response_length_mean": 100.0 + step,
        "rollout/truncated_rate": step / 64,
        "rollout/num_samples": 128.0,
        "timing/generation": 4.0,
        "timing/ppo_train": 3.0,
        "timing/step_total": 9.5,
        "dynamic_filtering_pass_rate": 400.0,
    }


OPENRLHF_EXPECTED = {
    "reward": lambda s: s / 16,
    "reward_std": lambda s: 0.5,
    "groups/std_mean": lambda s: 0.25,
    "completions/mean_length": lambda s: 100 + s,
    "completions/clipped_ratio": lambda s: s / 64,
    "num_completions": lambda s: 128,
    "loss": lambda s: -s / 512,
    "kl": lambda s: s / 1024,
    "entropy": lambda s: 1 - s / 32,
    "clip_ratio/region_mean": lambda s: s / 128,
    "sampling/k1": lambda s: -s / 2048,
    "grad_norm": lambda s: 1 / s,
    "learning_rate": lambda s: 5e-7,
    "time/step": lambda s: 9.5,
    # none of ours
    "policy/approx_kl": lambda s: None,
    "time/generate": lambda s: None,
}


@pytest.mark.parametrize("where", ["console", "wandb"])
def test_openrlhf(log, where):
    rows = [openrlhf_row(s) | {"step": s} if where == "console" else in_wandb(openrlhf_row(s), s) for s in STEPS]
    run = log(rows)
    assert (run.family, run.method) == ("openrlhf", "grpo")
    assert run.step_axis == ("step" if where == "console" else "train/global_step")
    assert [o.step for o in run.observations] == list(STEPS)
    check(run, OPENRLHF_EXPECTED)
    prefix = "" if where == "console" else "train/"
    # the means over training batches, and what means something else, keep their values under other names
    assert column(run, f"{prefix}ppo_kl") == [-1 / 4096] * 6
    assert column(run, f"{prefix}dynamic_filtering_pass_rate") == [400.0] * 6
    assert run.account.value == 24 * 6
    tell(run, "k1, k2 or k3", "saturates at 10", "rollout/*", "may exceed 100")
    assert not any("no rule reads them" in note for note in run.notes)


def test_openrlhf_without_rollout_statistics_and_in_its_first_versions(log):
    rows = [
        in_wandb(
            {
                "policy_loss": -0.5,
                "actor_lr": 1e-6,
                "kl": 0.01,
                "reward": s / 8,
                "return": 0.0,
                "response_length": 50.0,
                "total_length": 99.0,
                "response_clip_ratio": s / 32,
            },
            s,
        )
        for s in STEPS
    ]
    run = log(rows)
    assert (run.family, run.method) == ("openrlhf", "grpo")
    check(
        run,
        {
            "reward": lambda s: s / 8,
            "completions/mean_length": lambda s: 50,
            "completions/clipped_ratio": lambda s: s / 32,
            "kl": lambda s: 0.01,
        },
    )


def test_openrlhf_writes_a_kl_of_0_where_there_is_no_reference(log):
    run = log([in_wandb(openrlhf_row(s) | {"kl": 0.0, "logprobs_diff": 0.0}, s) for s in STEPS])
    assert "kl" not in run.signals
    assert run.account.empty == 12
    tell(run, "Always 0")
    once = log([in_wandb(openrlhf_row(s) | {"kl": 0.0 if s == 1 else 0.5}, s) for s in STEPS])
    assert column(once, "kl") == [0.0, 0.5, 0.5, 0.5, 0.5, 0.5]  # 0 at the start is a measurement


def test_openrlhf_progress_bar_and_critic(log):
    row = {
        "act_loss": 0.5,
        "reward": 0.25,
        "return": 0.125,
        "gen_len": 64.0,
        "tot_len": 128.0,
        "kl": 0.5,
        "act_lr": 1e-6,
    }
    run = log([{"step": s, **row, "ent_loss": 0.75} for s in STEPS])
    assert (run.family, run.method) == ("openrlhf", "grpo")
    check(
        run,
        {
            "loss": lambda s: 0.5,
            "reward": lambda s: 0.25,
            "completions/mean_length": lambda s: 64,
            "entropy": lambda s: 0.75,
            "learning_rate": lambda s: 1e-6,
        },
    )
    assert not any("no rule reads them" in note for note in run.notes)
    with_critic = {"critic_loss": 0.5, "values": 0.25, "critic_lr": 9e-6, "critic_grad_norm": 2.0}
    run = log([in_wandb(openrlhf_row(s) | with_critic, s) for s in STEPS])
    assert run.method == "ppo"
    check(run, {"grad_norm": lambda s: 1 / s, "learning_rate": lambda s: 5e-7})  # the actor's


def pair_row(step):
    return {
        "loss": 0.6875 - step / 64,
        "acc": 0.5 + step / 16,
        "chosen_reward": step / 8,
        "reject_reward": -step / 8,
        "lr": 1e-6,
        "grad_norm": 1 / step,
        "loss_mean": 0.5,
        "acc_mean": 0.25,
    }


def test_openrlhf_preferences(log):
    rows = [in_wandb(pair_row(s), s) for s in STEPS]
    rows.append({"eval/eval_loss": 0.5, "eval/acc_mean": 0.75, "eval/global_step": 6})
    run = log(rows)
    assert (run.family, run.method) == ("openrlhf", "dpo")
    check(
        run,
        {
            "loss": lambda s: 0.6875 - s / 64,
            "rewards/accuracies": lambda s: 0.5 + s / 16,
            "rewards/chosen": lambda s: s / 8,
            "rewards/rejected": lambda s: -s / 8,
            "rewards/margins": lambda s: s / 4,
            "learning_rate": lambda s: 1e-6,
            "grad_norm": lambda s: 1 / s,
            "eval_loss": lambda s: 0.5 if s == 6 else None,
            "eval_rewards/accuracies": lambda s: 0.75 if s == 6 else None,
        },
    )
    assert column(run, "train/loss_mean") == [0.5] * 6  # a running mean in older versions
    tell(run, "running mean that begins at 0")


def test_openrlhf_reward_model(log):
    rows = [in_wandb(pair_row(s), s) for s in STEPS]
    rows.append(
        {
            "eval/eval_loss": 0.5,
            "eval/acc_mean": 0.75,
            "eval/reward_mean": 1.5,
            "eval/reward_std": 2.5,
            "eval/global_step": 6,
        }
    )
    run = log(rows)
    assert (run.family, run.method) == ("openrlhf_reward", "reward")
    check(
        run,
        {
            "accuracy": lambda s: 0.5 + s / 16,
            "margin": lambda s: s / 4,
            "mean_reward": lambda s: 0,
            "eval_accuracy": lambda s: 0.75 if s == 6 else None,
            "eval_mean_reward": lambda s: 1.5 if s == 6 else None,
            "eval_scores/std": lambda s: 2.5 if s == 6 else None,
        },
    )
    assert "eval_reward" not in run.signals and "rewards/chosen" not in run.signals


def test_openrlhf_pairs_without_an_evaluation_may_be_either(log):
    run = log([in_wandb(pair_row(s), s) for s in STEPS])
    assert run.method == "unknown"
    assert "--method" in run.method_reason
    assert log([in_wandb(pair_row(s), s) for s in STEPS], method="dpo").method == "dpo"


def test_openrlhf_sft(log):
    rows = [in_wandb({"gpt_loss": 2 / (1 + s), "loss_mean": 0.25, "lr": 1e-5, "grad_norm": 1.0}, s) for s in STEPS]
    rows.append({"eval/eval gpt_loss": 1.5, "eval/global_step": 6})
    run = log(rows)
    assert (run.family, run.method) == ("openrlhf", "sft")
    check(
        run,
        {
            "loss": lambda s: 2 / (1 + s),
            "learning_rate": lambda s: 1e-5,
            "eval_loss": lambda s: 1.5 if s == 6 else None,
        },
    )


# ---------------------------------------------------------------------- PRIME-RL


def prime_trainer(step, began=0.0):
    """The rows of a step; what is not finite is left out of its row."""
    rows = [
        {"perf/throughput": 2048.0, "perf/throughput_per_gpu": 256.0, "perf/mfu": 12.5, "perf/peak_memory": 40.5},
        {"optim/lr": 1e-6, "optim/grad_norm": 1 / step, "optim/zero_grad_ratio": 0.5},
        {
            "loss/mean": -step / 512,
            "loss/std": 0.5,
            "entropy/all/mean": 1 - step / 32,
            "entropy/gsm8k/mean": 0.75,
            "mismatch_kl/all/mean": step / 4096,
            "mismatch_kl/gsm8k/mean": 0.25,
            "is_masked/mean": 1 / 64,
            "is_masked_low/mean": 1 / 128,
            "kl_ent_ratio/mean": 0.5,
        },
        {"time/step": 12.0, "time/wait_for_batch": 3.0, "time/forward_backward": 6.0, "time/save_ckpt": 0.0},
    ]
    return [{"step": step, "time": 1.78e9 + began + 20 * step + i, **row} for i, row in enumerate(rows)]


def rollouts(scope, agent, step, bias=0.0):
    return {
        f"{scope}/{agent}{name}": value
        for name, value in {
            "reward/mean": step / 16 + bias,
            "reward/max": 1.0,
            "reward/min": 0.0,
            "num_output_tokens/mean": 100.0 + step,
            "num_output_tokens/max": 256.0,
            "num_turns/mean": 2.0,
            "is_truncated/mean": step / 64,
            "is_completed/mean": 1.0,
            "stop_condition/generation_truncated": step / 64,
        }.items()
    }


def prime_orchestrator(step, agent="agent/", lowest=0.0):
    return {
        "step": step,
        "time": 1.78e9 + 20 * step,
        **rollouts("train/agg/all", agent, step),
        **rollouts("train/agg/effective", agent, step, bias=0.25),
        **rollouts("train/gsm8k/all", agent, step, bias=0.125),
        f"train/agg/all/{agent}reward/min": lowest,
        f"train/agg/all/{agent}solved_none": 0.5 - step / 32,
        f"train/agg/all/{agent}solved_all": step / 32,
        f"train/agg/all/{agent}solved_some": 0.5,
        "off_policy/mean": 1.5,
        "off_policy/max": 3.0,
        "off_policy/dropped": 0.0,
        "progress/rollouts": 128.0,
        "progress/tasks": 16.0,
        "time/step": 20.0,
        "time/save_ckpt": 0.5,
        "time/wait_for_policy": 1.0,
    }


PRIME_TRAINER = {
    "loss": lambda s: -s / 512,
    "entropy": lambda s: 1 - s / 32,
    "sampling/k3": lambda s: s / 4096,
    "grad_norm": lambda s: 1 / s,
    "learning_rate": lambda s: 1e-6,
    "memory/peak_reserved": lambda s: 40.5,
    "time/forward_backward": lambda s: 6,
    "clip_ratio/region_mean": lambda s: None,
    "grad/zero_share": lambda s: None,
    "time/data": lambda s: None,
}
PRIME_ROLLOUTS = {
    "reward": lambda s: s / 16,
    "completions/mean_length": lambda s: 100 + s,
    "completions/max_length": lambda s: 256,
    "completions/clipped_ratio": lambda s: s / 64,
    "rollout/turns_mean": lambda s: 2,
    "groups/all_failed": lambda s: 0.5 - s / 32,
    "groups/all_passed": lambda s: s / 32,
    "groups/zero_std": lambda s: 0.5,
    "groups/count": lambda s: 16,
    "num_completions": lambda s: 128,
    "sample/staleness_mean": lambda s: 1.5,
    "sample/staleness_max": lambda s: 3,
}


def test_prime_trainer_writes_several_rows_a_step(log):
    run = log([row for s in STEPS for row in prime_trainer(s)])
    assert (run.family, run.method, run.step_axis) == ("prime_rl", "grpo", "step")
    assert [o.step for o in run.observations] == list(STEPS) and len(run.segments) == 1
    check(run, PRIME_TRAINER | {"time/step": lambda s: 12})
    assert column(run, "is_masked/mean") == [1 / 64] * 6
    assert column(run, "perf/mfu") == [12.5] * 6
    tell(run, "is_masked", "no clip ratio", "cannot be told from a gap")
    assert not any("no rule reads them" in note for note in run.notes)


@pytest.mark.parametrize("agent", ["agent/", "solver/", ""])
def test_prime_orchestrator_takes_all_rollouts_and_not_the_effective(log, agent):
    run = log([prime_orchestrator(s, agent) for s in STEPS])
    assert (run.family, run.method) == ("prime_rl", "grpo")
    check(run, PRIME_ROLLOUTS)
    assert column(run, f"train/agg/effective/{agent}reward/mean") == [s / 16 + 0.25 for s in STEPS]
    assert not any("no rule reads them" in note for note in run.notes)
    tell(run, "biased by what was left out")


def test_prime_effective_rollouts_where_there_are_no_others(log):
    rows = [{k: v for k, v in prime_orchestrator(s).items() if not k.startswith("train/agg/all/")} for s in STEPS]
    run = log(rows)
    check(run, {"reward": lambda s: s / 16 + 0.25, "groups/all_failed": lambda s: None})
    tell(run, "biased by what was left out")


def test_prime_several_agents_keep_their_names(log):
    run = log([prime_orchestrator(s, "solver/") | rollouts("train/agg/all", "judge/", s) for s in STEPS])
    assert run.method == "grpo"
    assert "reward" not in run.signals and "completions/mean_length" not in run.signals
    assert column(run, "train/agg/all/judge/reward/mean") == [s / 16 for s in STEPS]


def test_prime_solved_none_is_no_failure_where_rewards_may_be_negative(log):
    run = log([prime_orchestrator(s, lowest=-1.0) for s in STEPS])
    check(run, {"groups/all_failed": lambda s: None, "groups/zero_std": lambda s: None, "reward": lambda s: s / 16})
    assert column(run, "train/agg/all/agent/solved_none") == [0.5 - s / 32 for s in STEPS]


@pytest.mark.parametrize("stamped", [False, True])
def test_prime_both_processes_in_one_file(log, stamped):
    """The orchestrator is two steps ahead, both write time/step, and rows of the servers have no step."""
    rows = []
    for step in range(1, 9):
        if step <= 6:
            stamp = {"producer": "orchestrator"} if stamped else {}
            rows.append(prime_orchestrator(step) | stamp)
            rows.append({"step": None, "time": 1.78e9 + step, "inference/agg/num_requests_running/mean": step / 2})
            rows.append({"step": None, "time": 1.78e9 + step, "inference/agg/num_requests_running/mean": step / 4})
        if step > 2:
            rows += [row | ({"producer": "trainer"} if stamped else {}) for row in prime_trainer(step - 2)]
    run = log(rows)
    assert (run.family, run.method, run.step_axis) == ("prime_rl", "grpo", "step")
    assert [o.step for o in run.observations] == list(STEPS)
    assert len(run.segments) == 1
    check(run, PRIME_TRAINER | PRIME_ROLLOUTS)
    assert set(column(run, "time/step")) <= {12.0, 20.0}
    # a restart of the trainer alone is still one
    again = log([*rows, *prime_trainer(5, began=900.0)])
    assert [(s.first, s.step) for s in again.segments] == [(0, 1), (6, 5)]


def test_prime_before_agents_and_effective_batches(log):
    rows = [
        {
            "step": s,
            "reward/all/mean": s / 16,
            "reward/gsm8k/mean": 0.75,
            "solve_none/all": 0.5,
            "solve_all/all": 0.25,
            "decode_len/all/mean": 64.0 + s,
            "decode_len/all/max": 99.0,
            "is_truncated/all/mean": 0.125,
            "num_turns/all/mean": 1.0,
            "progress/samples": 64.0,
            "progress/problems": 8.0,
            "time/step": 5.0,
        }
        for s in STEPS
    ]
    run = log(rows)
    assert (run.family, run.method) == ("prime_rl", "grpo")
    check(
        run,
        {
            "reward": lambda s: s / 16,
            "completions/mean_length": lambda s: 64 + s,
            "completions/max_length": lambda s: None,  # 99 is the largest mean of a problem
            "completions/clipped_ratio": lambda s: 0.125,
            "groups/count": lambda s: 8,
            "num_completions": lambda s: 64,
            "groups/all_failed": lambda s: None,
        },
    )


def test_prime_supervised(log):
    rows = []
    for s in STEPS:
        rows.append({"step": s, "loss/mean": 2 / s, "loss/perplexity": math.exp(2 / s), "loss/nan_count": 0})
        rows.append({"step": s, "optim/lr": 1e-5, "optim/grad_norm": 1.0})
        rows.append({"step": s, "perf/throughput_per_gpu": 9.0, "perf/peak_memory": 20.5, "perf/mfu": 40.0})
    rows.append({"step": 6, "val/loss": 0.5, "val/perplexity": math.exp(0.5)})
    run = log(rows)
    assert (run.family, run.method) == ("prime_rl", "sft")
    check(
        run,
        {
            "loss": lambda s: 2 / s,
            "eval_loss": lambda s: 0.5 if s == 6 else None,
            "memory/peak_reserved": lambda s: 20.5,
        },
    )


def test_prime_distillation(log):
    """ref_kl is log reference minus log policy: its negative is the divergence."""
    rows = [
        prime_orchestrator(s) | {"ref_kl/mean": -s / 32, "entropy/all/mean": 0.5, "loss/mean": 0.25} for s in STEPS
    ]
    run = log(rows)
    assert (run.family, run.method) == ("prime_rl", "distillation")
    check(run, {"distillation/reverse_kl": lambda s: s / 32, "kl": lambda s: None})
    tell(run, "its negative was read")
    mixed = log([row | {"is_masked/mean": 0.0} for row in rows])
    assert mixed.method == "grpo"


def test_prime_console(tmp_path):
    path = tmp_path / "orchestrator.log"
    path.write_text(
        "".join(
            f"10:0{s}:00 SUCCESS Step {s} | 1m 12s | Reward {s / 8:.4f} | Trainable 64/128 (50.0%) | Turns 3.0 | "
            f"Branches 1.0 | Max Off-Policy 2 | Error 0.0% | Cancelled 0.0% | Truncation {100 * s / 8:.1f}%\n"
            for s in STEPS
        )
    )
    run = read(path)
    assert (run.family, run.method) == ("prime_rl", "grpo")
    check(
        run,
        {
            "reward": lambda s: s / 8,
            "time/step": lambda s: 72,
            "completions/clipped_ratio": lambda s: s / 8,
            "sample/staleness_max": lambda s: 2,
            "rollout/turns_mean": lambda s: 3,
        },
    )
    tell(run, "trained on, biased")
    assert not any("no rule reads them" in note for note in run.notes)


# ---------------------------------------------------------------------- PipelineRL


def pipeline_trainer(step):
    return {
        "stats/lr": 1e-6,
        "stats/grad_norm": 1 / step,
        "stats/samples": 512 * step,
        "stats/tokens": 1000.0 * step,
        "stats/passes": 64 * step,
        "stats/completed_steps": step,
        "stats/epoch": 0,
        "stats/lag": 1024,
        "stats/min_actor_version": 0,
        "stats/max_actor_version": 512,
        "stats/time_waiting_for_data": 1.5,
        "throughput/tokens_perGPU_per_sec": 10.0,
        "rl/loss": -step / 64,
        "rl/reward": step / 32,
        "rl/entropy": 1 - step / 32,
        "rl/kl": step / 256,
        "rl/max_kl": 2.5,
        "rl/kl_new_old": step / 4096,
        "rl/mean_abs_log_ratio_new_old": step / 128,
        "rl/ratio_new_old": 1.0,
        "rl/ratio_ref_old": 0.96875,
        "rl/clamp_log_ratio_new_old_indicator": 0.25,
        "rl/ess": 0.75,
        "rl/entropy_bonus_coef": 0.0,
    }


PIPELINE_TRAINER = {
    "loss": lambda s: -s / 64,
    "entropy": lambda s: 1 - s / 32,
    "kl": lambda s: s / 256,
    "policy/approx_kl": lambda s: s / 4096,
    "log_ratio/abs_mean": lambda s: s / 128,
    "ratio/ess": lambda s: 0.75,
    "grad_norm": lambda s: 1 / s,
    "learning_rate": lambda s: 1e-6,
    "sample/staleness_max": lambda s: 2,  # 1024 samples of 512 each
    "clip_ratio/region_mean": lambda s: None,
    "sampling/k3": lambda s: None,
}


@pytest.mark.parametrize("text", [False, True])
def test_pipeline_trainer(log, text):
    """Its console shows the numbers as texts."""
    rows = [pipeline_trainer(s) for s in STEPS]
    if text:
        rows = [{name: repr(float(value)) for name, value in row.items()} for row in rows]
    run = log(rows)
    assert (run.family, run.method, run.step_axis) == ("pipeline_rl", "grpo", "stats/completed_steps")
    check(run, PIPELINE_TRAINER | {"reward": lambda s: s / 32})
    tell(run, "counts samples", "whatever the advantage's sign")
    assert not any("no rule reads them" in note for note in run.notes)


def test_pipeline_gradient_norm_that_is_not_available(log):
    run = log([pipeline_trainer(s) | {"stats/grad_norm": -1.0} for s in STEPS])
    assert "grad_norm" not in run.signals and run.account.empty == 6


def test_pipeline_without_a_reference_model(log):
    run = log([pipeline_trainer(s) | {"rl/ratio_ref_old": 1.0} for s in STEPS])
    assert "kl" not in run.signals
    assert column(run, "rl/kl") == [s / 256 for s in STEPS]
    assert log([pipeline_trainer(s) | {"rl/value_loss": 0.5, "rl/value_mean": 0.5} for s in STEPS]).method == "ppo"


def pipeline_actor(step, prefix):
    """A maximum, minimum and variance are left out where the variance is 0, as from step 4 on here."""
    spread = {"reward_max": 1.0, "reward_min": 0.0, "reward_var": 0.0625} if step < 4 else {}
    row = {
        "reward_mean": step / 8,
        **spread,
        "success_mean": 0.5,
        "no_error_mean": 1.0,
        "no_answer_mean": 0.0,
        "overlong_mean": step / 16,
        "num_turns_mean": 2.0,
        "prompt_tokens_mean": 50.0,
        "output_tokens_mean": 100.0 + step,
        "output_tokens_max": 300.0,
        "output_tokens_min": 10.0,
        "gsm8k/reward_mean": 0.75,
        "always_success": step / 32,
        "never_success": 0.25,
        "sometimes_success": 0.75 - step / 32,
        "latency_mean": 3.5,
        "model_version_mean": 512.0,
        "published_samples": 64.0 * step,
        "finished_groups": 8 * step,
        "time_since_start": 10.0 * step,
        "trainer_model_version": 512 * step,
    }
    return {prefix + name: value for name, value in row.items()}


@pytest.mark.parametrize("prefix", ["actor/", ""])
def test_pipeline_actor(log, prefix):
    run = log([pipeline_actor(s, prefix) for s in STEPS])
    assert (run.family, run.method) == ("pipeline_rl", "grpo")
    assert [o.step for o in run.observations] == [512 * s for s in STEPS]
    check(
        run,
        {
            "reward": lambda s: s / 512 / 8,
            "reward_std": lambda s: 0.25 if s / 512 < 4 else 0,
            "completions/mean_length": lambda s: 100 + s / 512,
            "completions/max_length": lambda s: 300,
            "completions/min_length": lambda s: 10,
            "completions/clipped_ratio": lambda s: s / 512 / 16,
            "rollout/turns_mean": lambda s: 2,
            "groups/all_passed": lambda s: s / 512 / 32,
            "groups/all_failed": lambda s: 0.25,
            "groups/zero_std": lambda s: None,  # success is not the reward
        },
    )
    tell(run, "a variance of 0")


def test_pipeline_trainer_and_actor_in_one_log(log):
    """The actor's rows have no step of the trainer: they belong to the one before."""
    run = log([row for s in STEPS for row in (pipeline_trainer(s), pipeline_actor(s, "actor/"))])
    assert (run.family, run.step_axis) == ("pipeline_rl", "stats/completed_steps")
    assert [o.step for o in run.observations] == list(STEPS) and len(run.segments) == 1
    check(run, PIPELINE_TRAINER | {"reward": lambda s: s / 8, "groups/all_failed": lambda s: 0.25})
    assert column(run, "rl/reward") == [s / 32 for s in STEPS]


# ---------------------------------------------------------------------- OAT


def oat_row(step):
    return {
        "train/epoch": 1,
        "train/learning_round": step,
        "train/pg_loss": -step / 512,
        "train/kl3": 64 * step / 1024,  # summed over responses of 64 tokens
        "train/reg_loss": 0.0,
        "train/entropy": 1 - step / 32,
        "train/policy_grad_norm": 1 / step,
        "train/pg_clipfrac": 1 / 64,
        "train/pg_clipfrac_nan": 0.0,
        "train/kl_sample_train_v1": -1 / 1024,
        "train/kl_sample_train_v2": step / 2048,
        "train/all_zero_rewards_count": 2.0,
        "train/all_one_rewards_count": 1.0,
        "train/adv_mean": 0.0,
        "actor/rewards": step / 16,
        "actor/no_eos_count": 8.0,
        "actor/num_data": 32.0,
        "actor/response_tok_len": 64.0,
        "actor/generate_time": 4.0,
        "actor/verify_time": 1.0,
        "misc/lr": 1e-6,
        "misc/global_step": 16 * step,
        "misc/policy_sgd_step": step,
        "misc/pi_beta_version": step,
        "misc/query_step": 128 * step,
        "misc/vram_allocated": 2048.0,
    }


def test_oat(log):
    rows = [oat_row(s) for s in STEPS]
    rows[-1] |= {"eval/accuracy": 0.25, "eval/score": 0.5}
    run = log(rows)
    assert (run.family, run.method, run.step_axis) == ("oat", "grpo", "misc/policy_sgd_step")
    assert [o.step for o in run.observations] == list(STEPS)
    check(
        run,
        {
            "reward": lambda s: s / 16,
            "loss": lambda s: -s / 512,
            "kl": lambda s: s / 1024,
            "entropy": lambda s: 1 - s / 32,
            "grad_norm": lambda s: 1 / s,
            "clip_ratio/region_mean": lambda s: 1 / 64,
            "sampling/k1": lambda s: -1 / 1024,
            "sampling/k3": lambda s: s / 2048,
            "completions/mean_length": lambda s: 64,
            "completions/clipped_ratio": lambda s: 0.25,
            "time/generate": lambda s: 4,
            "time/score": lambda s: 1,
            "learning_rate": lambda s: 1e-6,
            # counts of one rank's prompts, memory of the moment
            "groups/all_failed": lambda s: None,
            "memory/peak_allocated": lambda s: None,
        },
    )
    assert signals.lookup("eval_score_accuracy") is None and column(run, "eval_score_accuracy")[-1] == 0.25
    tell(run, "summed over a response", "largest of the step's updates", "prompts of one rank", "not the peak")
    assert not any("no rule reads them" in note for note in run.notes)
    assert log([row | {"train/critic_loss": 0.5, "train/vf_clipfrac": 0.0} for row in rows]).method == "ppo"


def test_oat_preferences_and_sft(log):
    rows = [
        {
            "train/learning_round": s,
            "train/loss_mean": 0.6875 - s / 64,
            "train/acc_mean": 0.5 + s / 16,
            "train/chosen_reward": s / 8,
            "train/rejected_reward": -s / 8,
            "train/reward_margin": s / 4 + 1 / 64,  # a mean over the round, not the difference of the last two
            "train/learn_batch_time": 1.0,
            "actor/generate_time": 4.0,
            "misc/policy_sgd_step": s,
            "misc/lr": 1e-6,
            "eval/rm_win_rate": 0.5,
        }
        for s in STEPS
    ]
    run = log(rows)
    assert (run.family, run.method) == ("oat", "dpo")
    check(
        run,
        {
            "loss": lambda s: 0.6875 - s / 64,
            "rewards/accuracies": lambda s: 0.5 + s / 16,
            "rewards/chosen": lambda s: s / 8,
            "rewards/rejected": lambda s: -s / 8,
            "rewards/margins": lambda s: s / 4 + 1 / 64,
        },
    )
    supervised = (
        "train/loss_mean",
        "train/learning_round",
        "train/learn_batch_time",
        "misc/policy_sgd_step",
        "misc/lr",
    )
    run = log([{name: row[name] for name in supervised} for row in rows])
    assert (run.family, run.method) == ("oat", "sft")


# ---------------------------------------------------------------------- all of them

SAMPLES = {
    "openrlhf": [*openrlhf_row(1)],
    "openrlhf in W&B": [*in_wandb(openrlhf_row(1), 1)],
    "openrlhf dpo": [*in_wandb(pair_row(1), 1)],
    "prime_rl trainer": [name for row in prime_trainer(1) for name in row],
    "prime_rl orchestrator": [*prime_orchestrator(1)],
    "prime_rl sft": ["step", "loss/mean", "loss/nan_count", "optim/lr", "optim/grad_norm", "perf/peak_memory"],
    "pipeline_rl trainer": [*pipeline_trainer(1)],
    "pipeline_rl actor": [*pipeline_actor(1, "actor/")],
    "pipeline_rl stream": [*pipeline_actor(1, "")],
    "oat": [*oat_row(1)],
    "verl": [
        *("step", "actor/entropy", "actor/kl_loss", "actor/pg_loss", "actor/pg_clipfrac", "actor/ppo_kl", "actor/lr"),
        *("actor/grad_norm", "actor/reward_kl_penalty", "critic/score/mean", "critic/rewards/mean", "perf/mfu/actor"),
        *("critic/advantages/max", "response_length/mean", "response_length/clip_ratio", "prompt_length/mean"),
        *("timing_s/gen", "timing_s/step", "perf/throughput", "global_seqlen/mean", "training/global_step"),
    ],
    "tinker": [
        *("step", "progress/batch", "progress/done_frac", "optim/lr", "optim/entropy", "optim/kl_sample_train_v1"),
        *("optim/kl_sample_train_v2", "env/all/reward/total", "env/all/by_group/frac_all_good", "time/total"),
    ],
    "trl grpo": [
        *("loss", "grad_norm", "learning_rate", "reward", "reward_std", "kl", "entropy", "completions/mean_length"),
        *("completions/clipped_ratio", "clip_ratio/region_mean", "rewards/f/mean", "frac_reward_zero_std", "step"),
    ],
    "trl in W&B": ["train/loss", "train/grad_norm", "train/learning_rate", "train/global_step", "eval/loss"],
    "trl dpo": ["loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "logps/chosen", "step", "epoch"],
    "trl reward": ["loss", "accuracy", "margin", "mean_reward", "min_reward", "max_reward", "eval_accuracy", "step"],
    "trl ppo": ["objective/kl", "objective/scores", "policy/approxkl_avg", "loss/policy_avg", "loss/value_avg", "lr"],
    "llama_factory": ["current_steps", "total_steps", "loss", "lr", "epoch", "percentage", "elapsed_time"],
    "torchtune": ["Step", "loss", "lr", "tokens_per_second_per_gpu", "grad_norm", "peak_memory_active"],
    "home-made": ["step", "loss", "reward_mean", "success_rate", "latency_ms", "kl", "entropy", "acc", "lr"],
}


@pytest.mark.parametrize("sample", SAMPLES)
def test_no_system_is_taken_for_another(sample):
    family = choose_family(SAMPLES[sample], FAMILIES) or OTHER
    ours = {family.name for family in OURS}
    of = sample.split()[0]
    assert family.name == of if of in ours else family.name not in ours


@pytest.mark.parametrize("row", [openrlhf_row, pipeline_trainer, oat_row], ids=["openrlhf", "pipeline_rl", "oat"])
def test_what_no_table_knows_is_named(log, row):
    run = log([row(s) | {"train/my_reward": s / 4, "mystery": 1.0, "step": s} for s in STEPS])
    tell(run, "no rule reads them", "my_reward", "mystery")
    assert column(run, "mystery") == [1.0] * 6


def test_what_prime_does_not_know_is_named(log):
    run = log([row | {"mystery": 1.0} for s in STEPS for row in prime_trainer(s)])
    tell(run, "no rule reads them", "mystery")


@pytest.mark.parametrize("family", OURS, ids=lambda family: family.name)
def test_the_tables_agree_with_the_signals_and_with_themselves(family):
    for ours in {*family.aliases.values(), *family.derived}:
        known = signals.lookup(ours) is not None
        # a name of neither is one that keeps something apart
        assert known or ours in {"reward_variance", "eval_score_accuracy", "chosen_score", "rejected_score"}, ours
    assert set(family.scale) <= set(family.aliases)
    assert {*family.settings.values()} <= set(FIELDS)
    assert len(set(family.signs)) == len(family.signs)
    for sentence in family.meanings.values():
        assert sentence.endswith(".") and sentence[:1].strip() and "\n" not in sentence
