"""Logs of other systems as they write them: the right system, method, step and units, and nothing lost.

Each sample is built in the format that the system documents; the expected numbers follow from it by the arithmetic
that stands beside them.
"""

import json
import math

import pytest

from outspoken.diagnostics import signals
from outspoken.diagnostics.rules.registry import ANY_METHOD
from outspoken.diagnostics.sources import FAMILIES, read
from outspoken.diagnostics.sources.names import choose_family
from outspoken.diagnostics.sources.settings import FIELDS, translate

BY_NAME = {family.name: family for family in FAMILIES}
MINE = ("verl", "tinker", "llama_factory", "trl", "torchtune", "nemo_rl", "open_instruct")


@pytest.fixture
def log(tmp_path):
    """Write rows as JSON lines and read them."""

    def run(rows, **options):
        path = tmp_path / "log.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        made = read(path, **options)
        assert made.account.balanced
        assert made.account.cells == sum(len(row) for row in made.rows)
        return made

    return run


def told(run, words):
    """The notes that hold these words."""
    return [note for note in run.notes if words in note]


# ---------------------------------------------------------------------- samples, one row of each


VERL_GRPO = {
    "actor/entropy": 0.22,
    "actor/pg_loss": -0.01,
    "actor/pg_clipfrac": 0.0008,
    "actor/pg_clipfrac_lower": 0.0001,
    "actor/ppo_kl": -8.2e-06,
    "actor/kl_loss": 0.0013,
    "actor/kl_coef": 0.001,
    "actor/grad_norm": 0.13,
    "actor/lr": 1e-6,
    "critic/score/mean": 0.4,
    "critic/score/max": 1.0,
    "critic/score/min": 0.0,
    "critic/rewards/mean": 0.35,
    "critic/rewards/max": 1.0,
    "critic/rewards/min": -0.1,
    "critic/advantages/mean": 0.0,
    "critic/advantages/max": 2.1,
    "critic/advantages/min": -1.9,
    "response_length/mean": 1267.0,
    "response_length/max": 3072.0,
    "response_length/min": 14.0,
    "response_length/clip_ratio": 0.25,
    "response/aborted_ratio": 0.0,
    "prompt_length/mean": 90.0,
    "rollout_corr/kl": 0.0006,
    "rollout_corr/k3_kl": 0.0007,
    "rollout_corr/rollout_is_mean": 0.99,
    "rollout_corr/rollout_is_eff_sample_size": 0.93,
    "training/rollout_probs_diff_mean": 0.004,
    "training/off_policy/trajectory_staleness/mean": 0.5,
    "training/off_policy/trajectory_staleness/max": 1,
    "training/off_policy/trajectory_staleness_worst/mean": 0.75,
    "training/off_policy/trajectory_staleness_worst/max": 2,
    "timing_s/gen": 21.5,
    "timing_s/step": 60.0,
    "timing_s/update_actor": 20.0,
    "perf/max_memory_allocated_gb": 24.5,
    "perf/throughput": 1000.0,
    "val-core/gsm8k/reward/mean@1": 0.5,
    "training/global_step": 1,
    "training/epoch": 0,
}
VERL_SFT = {"train/loss": 1.2, "train/grad_norm": 0.7, "train/lr": 1e-5, "train/global_tokens": 8192, "train/mfu": 0.3}
TINKER_RL = {
    "progress/batch": 0,
    "progress/done_frac": 0.01,
    "optim/lr": 1e-4,
    "optim/entropy": 0.77,
    "optim/kl_sample_train_v1": 0.0005,
    "optim/kl_sample_train_v2": 0.0003,
    "kl_policy_base": -0.002,
    "env/all/reward/total": 0.67,
    "env/all/ac_tokens_per_turn": 5.0,
    "env/all/turns_per_episode": 2.0,
    "env/all/total_episodes": 400,
    "env/all/total_turns": 800,
    "env/all/total_ac_tokens": 4000,
    "env/all/by_group/frac_mixed": 0.8,
    "env/all/by_group/frac_all_good": 0.15,
    "env/all/by_group/frac_all_bad": 0.05,
    "training_client/step": 12,
    "sampling_client/step_min": 9,
    "sampling_client/step_max": 12,
    "sampling_client/step_mean": 10.5,
    "time/total": 9.6,
}
TINKER_SFT = {
    "num_sequences": 4,
    "num_tokens": 930,
    "num_loss_tokens": 564,
    "learning_rate": 2e-5,
    "train_mean_nll": 2.46,
    "test/nll": 1.17,
    "progress": 0.0004,
}
TINKER_DPO = {
    "dpo_loss": 0.68,
    "accuracy": 0.6,
    "margin": 0.1,
    "chosen_reward": 0.05,
    "rejected_reward": -0.05,
    "num_pairs": 32,
    "num_tokens": 4000,
    "learning_rate": 1e-5,
}
LLAMA_DPO = {
    "current_steps": 10,
    "total_steps": 93,
    "loss": 0.6,
    "accuracy": 0.4,
    "lr": 2.25e-6,
    "epoch": 0.33,
    "percentage": 10.75,
    "elapsed_time": "0:04:02",
    "remaining_time": "0:33:29",
    "throughput": 13174.2,
    "total_tokens": 3189568,
    "vram_allocated": 20.5,
    "vram_reserved": 22.0,
}
TUNE_SFT = {
    "loss": 1.4,
    "lr": 2e-5,
    "tokens_per_second_per_gpu": 3000.0,
    "grad_norm": 0.8,
    "peak_memory_active": 10.0,
    "peak_memory_alloc": 10.5,
    "peak_memory_reserved": 12.0,
}
TUNE_PPO = {
    "scores": 0.6,
    "num_stop_tokens": 60,
    "rlhf_reward": 0.5,
    "kl": 4.0,
    "kl_reward": -0.1,
    "loss": 0.3,
    "policy_loss": 0.1,
    "value_loss": 0.2,
    "clipfrac": 0.04,
    "ratios": 1.01,
    "approx_policy_kl": 0.001,
    "response_lengths": 50.0,
}
TUNE_GRPO = {
    "rewards": 1.5,
    "successes": 0.5,
    "num_stop_tokens": 12,
    "loss": 0.01,
    "policy_loss": 0.009,
    "kl_loss": 0.02,
    "clipfrac": 0.0,
    "ratios": 1.0,
    "approx_policy_kl": 0.0,
    "response_lengths": 200.0,
}
TUNE_DPO = {  # without a GPU: no memory
    "loss": 0.69,
    "lr": 5e-7,
    "tokens_per_second_per_gpu": 100.0,
    "rewards/chosen": 0.01,
    "rewards/rejected": -0.01,
    "rewards/accuracies": 0.6,
    "rewards/margins": 0.02,
    "log_probs/chosen": -120.0,
    "log_probs/rejected": -130.0,
    "logits/chosen": -1.0,
    "logits/rejected": -1.1,
}
NEMO_GRPO = {
    "train/loss": 0.01,
    "train/reward": 0.5,
    "train/grad_norm": 0.4,
    "train/lr": 5e-6,
    "train/wd": 0.01,
    "train/kl_penalty": 0.002,
    "train/probs_ratio": 1.0,
    "train/probs_ratio_clamped": 1.0,
    "train/gen_kl_error": 0.0007,
    "train/policy_kl_error": 0.0008,
    "train/js_divergence_error": 0.0002,
    "train/token_mult_prob_error": 1.02,
    "train/sampling_importance_ratio": 0.99,
    "train/approx_entropy": 0.4,
    "train/baseline_reward/pct_0": 20.0,
    "train/baseline_reward/pct_1": 30.0,
    "train/baseline_reward/pct_mixed": 50.0,
    "train/advantages/mean": 0.0,
    "train/mean_gen_tokens_per_sample": 512.0,
    "train/gen_tokens_per_sample/max": 1024.0,
    "train/truncation_rate": 0.125,
    "train/avg_trajectory_age": 1.5,
    "train/global_valid_toks": 65536,
    "timing/train/total_step_time": 80.0,
    "timing/train/generation": 30.0,
    "performance/tokens_per_sec_per_gpu": 900.0,
    "validation/accuracy": 0.4,
}
NEMO_PAIRS = {
    "train/loss": 0.69,
    "train/accuracy": 0.55,
    "train/rewards_chosen_mean": 0.1,
    "train/rewards_rejected_mean": 0.0,
    "train/num_valid_samples": 32,
    "train/global_valid_seqs": 64,
    "train/lr": 1e-6,
    "train/grad_norm": 2.0,
}
NEMO_SFT = {
    "train/loss": 1.1,
    "train/num_unmasked_tokens": 4096,
    "train/num_valid_samples": 32,
    "train/global_valid_toks": 4096,
    "train/lr": 1e-5,
    "train/grad_norm": 1.0,
    "validation/val_loss": 1.3,
}
OPEN_GRPO = {
    "scores": 4.0,
    "objective/verifiable_reward": 3.0,
    "objective/verifiable_correct_rate": 0.3,
    "objective/kl0_avg": -0.01,
    "objective/kl1_avg": 0.02,
    "objective/kl2_avg": 0.03,
    "objective/kl3_avg": 0.04,
    "loss/policy_avg": 0.001,
    "loss/kl_avg": 0.0001,
    "loss/total_avg": 0.0011,
    "policy/clipfrac_avg": 0.01,
    "policy/entropy_avg": 0.5,
    "optim/grad_norm": 0.3,
    "lr": 1e-6,
    "val/stop_rate": 0.9,
    "val/sequence_lengths": 800.0,
    "val/sequence_lengths_min": 10.0,
    "val/sequence_lengths_max": 2048.0,
    "val/ratio": 1.0,
    "val/advantages_max": 2.0,
    "debug/vllm_vs_local_logprob_diff_mean": 0.012,
    "debug/vllm_vs_local_logprob_diff_max": 1.1,
    "debug/vllm_local_reverse_kl": 0.0003,
    "time/total": 90.0,
    "training_step": 1,
    "episode": 512,
}
OPEN_DPO = {
    "training_step": 1,
    "train_loss": 0.69,
    "learning_rate": 5e-7,
    "logps/chosen": -120.0,
    "logps/rejected": -130.0,
    "rewards/chosen": 0.01,
    "rewards/rejected": -0.01,
    "rewards/average": 0.0,
    "rewards/accuracy": 0.6,
    "rewards/margin": 0.02,
}
OPEN_SFT = {"training_step": 1, "train_loss": 1.3, "learning_rate": 2e-5, "per_device_tps": 900.0, "total_tokens": 1e6}
TRL_GRPO = {
    "loss": 0.0,
    "grad_norm": 0.1,
    "learning_rate": 3e-6,
    "num_tokens": 1000.0,
    "completions/mean_length": 237.0,
    "completions/clipped_ratio": 0.1,
    "rewards/format/mean": 0.9,
    "rewards/format/std": 0.2,
    "reward": 1.8,
    "reward_std": 0.7,
    "frac_reward_zero_std": 0.25,
    "kl": 0.0005,
    "clip_ratio/region_mean": 0.0,
    "entropy": 0.4,
    "epoch": 0.7,
}
TRL_PPO = {
    "eps": 3,
    "objective/kl": 8.5,
    "objective/entropy": 25.0,
    "objective/non_score_reward": -0.4,
    "objective/rlhf_reward": 0.2,
    "objective/scores": 0.6,
    "policy/approxkl_avg": 0.17,
    "policy/clipfrac_avg": 0.06,
    "policy/entropy_avg": 0.34,
    "loss/policy_avg": 0.01,
    "loss/value_avg": 9.0,
    "val/clipfrac_avg": 0.0,
    "val/ratio": 1.0,
    "val/ratio_var": 0.01,
    "val/num_eos_tokens": 3,
    "lr": 5e-6,
    "episode": 64,
}
AXOLOTL = {
    "loss": 1.7157,
    "grad_norm": 12.79,
    "learning_rate": 2e-5,
    "ppl": 2.046,
    "memory/max_active (GiB)": 2.98,
    "memory/max_allocated (GiB)": 2.9,
    "memory/device_reserved (GiB)": 4.12,
    "tokens/trainable": 93,
    "tokens/total": 512,
    "epoch": 0.13,
}
UNSLOTH = {
    "loss": 0.0,
    "grad_norm": 0.1,
    "learning_rate": 3e-6,
    "completion_length": 237.0,
    "rewards/format": 0.9,
    "reward": 1.8,
    "reward_std": 0.7,
    "kl": 0.0006,
    "epoch": 0.7,
}

# (system, method, sample)
SAMPLES = {
    "verl grpo": ("verl", "grpo", VERL_GRPO),
    "verl ppo": ("verl", "ppo", VERL_GRPO | {"critic/vf_loss": 0.1, "critic/vf_explained_var": 0.3}),
    "verl sft": ("verl", "sft", VERL_SFT),
    "tinker rl": ("tinker", "grpo", TINKER_RL),
    "tinker sft": ("tinker", "sft", TINKER_SFT),
    "tinker dpo": ("tinker", "dpo", TINKER_DPO),
    "tinker distillation": ("tinker", "distillation", TINKER_RL | {"teacher_kl": 0.3, "teacher_kl/dataset_0": 0.3}),
    "llama_factory dpo": ("llama_factory", "dpo", LLAMA_DPO),
    "llama_factory ppo": (
        "llama_factory",
        "ppo",
        {k: v for k, v in LLAMA_DPO.items() if k != "accuracy"} | {"reward": 0.4},
    ),
    "torchtune sft": ("torchtune", "sft", TUNE_SFT),
    "torchtune ppo": ("torchtune", "ppo", TUNE_PPO),
    "torchtune grpo": ("torchtune", "grpo", TUNE_GRPO),
    "torchtune dpo": ("torchtune", "dpo", TUNE_DPO),
    "nemo_rl grpo": ("nemo_rl", "grpo", NEMO_GRPO),
    "nemo_rl ppo": ("nemo_rl", "ppo", NEMO_GRPO | {"train/critic/loss": 0.2}),
    "nemo_rl reward": ("nemo_rl", "reward", NEMO_PAIRS),
    "nemo_rl dpo": ("nemo_rl", "dpo", NEMO_PAIRS | {"train/preference_loss": 0.69, "train/sft_loss": 0.0}),
    "nemo_rl sft": ("nemo_rl", "sft", NEMO_SFT),
    "open_instruct grpo": ("open_instruct", "grpo", OPEN_GRPO),
    "open_instruct ppo": ("open_instruct", "ppo", OPEN_GRPO | {"loss/value_avg": 0.2, "lr_value": 1e-6}),
    "open_instruct dpo": ("open_instruct", "dpo", OPEN_DPO),
    "open_instruct sft": ("open_instruct", "sft", OPEN_SFT),
    "trl grpo": ("trl", "grpo", TRL_GRPO),
    "trl ppo": ("trl", "ppo", TRL_PPO),
    "axolotl": ("trl", "sft", AXOLOTL),
    "unsloth": ("trl", "grpo", UNSLOTH),
}

# Names of systems whose tables are tested elsewhere.
OTHERS = {
    "openrlhf": "train/policy_loss train/ppo_clip_ratio train/ppo_kl train/kl train/reward train/return "
    "train/group_reward_std train/response_length train/total_length train/truncated rollout/reward_mean "
    "rollout/reward_std rollout/truncated_rate train/actor_lr train/actor_grad_norm timing/make_experience "
    "timing/ppo_train timing/broadcast timing/generation",
    "prime_rl": "time mismatch_kl/all/mean entropy/all/mean optim/lr optim/grad_norm perf/throughput perf/mfu "
    "perf/peak_memory is_masked/mean train/agg/effective/all/reward/mean off_policy/mean time/step "
    "time/wait_for_batch progress/total_tokens loss/mean",
    "pipeline_rl": "rl/loss rl/reward rl/entropy rl/kl rl/kl_new_old rl/ess rl/ratio_new_old stats/lr stats/grad_norm "
    "stats/lag stats/samples actor/reward_mean actor/success_mean actor/overlong_mean actor/output_tokens_mean",
    "oat": "train/pg_loss train/kl3 train/entropy train/policy_grad_norm train/pg_clipfrac train/kl_sample_train_v1 "
    "actor/rewards actor/no_eos_count actor/num_data actor/response_tok_len misc/lr misc/pi_beta_version "
    "misc/vram_allocated eval/accuracy",
}


def rows_of(sample, n=4):
    """A run of `n` steps like the sample: numbers that count steps go on, and losses fall a little."""
    axis = next((name for name in ("training/global_step", "current_steps", "training_step") if name in sample), None)
    rows = []
    for i in range(1, n + 1):
        row = dict(sample) if axis else {"step": i, **sample}
        if axis:
            row[axis] = i
        for name in row:
            if name.endswith(("loss", "mean_nll", "pg_loss", "time/total", "scores", "objective/kl", "successes")):
                row[name] -= 1e-6 * (i - 1)
        rows.append(row)
    return rows, axis or "step"


@pytest.mark.parametrize("name", SAMPLES)
def test_a_system_is_told_by_its_names(log, name):
    """System, method and step axis; every known name is known, and no cell is lost."""
    system, method, sample = SAMPLES[name]
    rows, axis = rows_of(sample)
    run = log([*rows, {**rows[-1], axis: 5, "my/own_metric": 3.0}])
    assert (run.family, run.method, run.step_axis) == (system, method, axis)
    assert [o.step for o in run.observations] == [1, 2, 3, 4, 5]
    assert method in ANY_METHOD
    (kept,) = told(run, "Kept under their own names")
    assert kept == "Kept under their own names, no rule reads them: my/own_metric."
    assert run.observations[4].signals["my/own_metric"] == 3.0


@pytest.mark.parametrize("name", OTHERS)
def test_names_of_other_systems_are_not_taken_for_these(name):
    chosen = choose_family(OTHERS[name].split(), FAMILIES)
    assert chosen is None or chosen.name not in MINE or (name in BY_NAME and chosen.name == name)
    mine = [BY_NAME[own] for own in MINE]
    taken = choose_family(OTHERS[name].split(), mine)
    if taken is not None and name in BY_NAME:  # a single sign may be shared, never as many as its own
        assert choose_family(OTHERS[name].split(), [taken, BY_NAME[name]]).name == name


@pytest.mark.parametrize("system", MINE)
def test_a_table_holds_together(system):
    """Each alias leads to a signal of ours or to a name that derives one, and each sentence is one."""
    family = BY_NAME[system]
    inputs = {name for derived in family.derived.values() for name in derived.inputs}
    for theirs, ours in family.aliases.items():
        known = signals.lookup(ours) is not None or ours in inputs or ours in family.known or ours == theirs
        assert known or ours == "num_tokens_of_step", (theirs, ours)
    assert all(signals.lookup(ours) is not None for ours in family.derived)
    for theirs, sentence in family.meanings.items():
        assert sentence.endswith(".") and sentence.count(". ") == 0, (theirs, sentence)
    assert set(family.scale) <= set(family.aliases)
    assert family.title


CONFIGS = {
    "verl": (
        {
            "actor_rollout_ref": {
                "rollout": {"n": 8, "temperature": 0.7},
                "actor": {
                    "optim": {"lr": "1e-6"},
                    "clip_ratio_low": 0.2,
                    "clip_ratio_high": 0.28,
                    "ppo_epochs": 1,
                    "use_kl_loss": False,
                    "kl_loss_coef": 0.001,
                },
            },
            "data": {"train_batch_size": 128, "max_response_length": 1024},
            "trainer": {"total_training_steps": 250},
        },
        {
            "num_generations": 8,
            "temperature": 0.7,
            "learning_rate": 1e-6,
            "epsilon": 0.2,
            "epsilon_high": 0.28,
            "num_iterations": 1,
            "max_completion_length": 1024,
            "max_steps": 250,
            "beta": None,  # a coefficient of a term that is not used
        },
    ),
    "tinker": (
        {"learning_rate": 1e-4, "max_tokens": 512, "kl_penalty_coef": 0.01, "dataset_builder": {"group_size": 4}},
        {"learning_rate": 1e-4, "max_completion_length": 512, "beta": 0.01, "num_generations": 4},
    ),
    "torchtune": (
        {
            "optimizer": {"lr": 2e-5},
            "batch_size": 64,
            "epochs": 2,
            "clip_grad_norm": 1.0,
            "log_every_n_steps": 5,
            "tokenizer": {"max_seq_len": 4096},
            "lr_scheduler": {"num_warmup_steps": 100},
        },
        {
            "learning_rate": 2e-5,
            "num_train_epochs": 2,
            "max_grad_norm": 1.0,
            "logging_steps": 5,
            "max_length": 4096,
            "warmup_steps": 100,
            "per_device_train_batch_size": None,  # its meaning depends on the recipe
        },
    ),
    "nemo_rl": (
        {
            "grpo": {"num_generations_per_prompt": 16, "max_num_steps": 500, "num_prompts_per_step": 32},
            "loss_fn": {"reference_policy_kl_penalty": 0.01, "ratio_clip_min": 0.2, "ratio_clip_max": 0.28},
            "policy": {"optimizer": {"kwargs": {"lr": 5e-6}}, "generation": {"max_new_tokens": 2048}},
        },
        {
            "num_generations": 16,
            "max_steps": 500,
            "beta": 0.01,
            "epsilon": 0.2,
            "epsilon_high": 0.28,
            "learning_rate": 5e-6,
            "max_completion_length": 2048,
        },
    ),
    "open_instruct": (
        {"num_samples_per_prompt_rollout": 8, "response_length": 2048, "clip_higher": 0.272, "beta": 0.0},
        {"num_generations": 8, "max_completion_length": 2048, "epsilon_high": 0.272, "beta": 0.0},
    ),
}


@pytest.mark.parametrize("system", CONFIGS)
def test_settings_under_our_names(system):
    written, expected = CONFIGS[system]
    found, _ = translate(written, BY_NAME[system])
    assert {name: found.get(name) for name in expected} == expected


@pytest.mark.parametrize("system", MINE)
def test_settings_lead_to_fields(system):
    assert set(BY_NAME[system].settings.values()) <= set(FIELDS)


# ---------------------------------------------------------------------- veRL


def test_verl_names_units_and_what_is_left_alone(log):
    rows, _ = rows_of(VERL_GRPO)
    run = log([{"step": row["training/global_step"], "data": row} for row in rows])
    seen = run.observations[0].signals
    expected = {
        "reward": 0.4,  # critic/score: before the KL penalty
        "critic/rewards/mean": 0.35,  # after it
        "entropy": 0.22,
        "kl": 0.0013,
        "grad_norm": 0.13,
        "learning_rate": 1e-6,
        "clip_ratio/region_mean": 0.0008,
        "completions/mean_length": 1267.0,
        "completions/max_length": 3072.0,
        "completions/clipped_ratio": 0.25,
        "sampling/k1": 0.0006,
        "sampling/k3": 0.0007,
        "sampling/importance_sampling_ratio/mean": 0.99,
        "sample/staleness_mean": 0.75,  # of the oldest weights
        "sample/staleness_max": 2.0,
        "training/off_policy/trajectory_staleness/mean": 0.5,
        "time/generate": 21.5,
        "time/step": 60.0,
        "memory/peak_allocated": 24.5,
        "rewards/range": 1.0,  # 1 - 0
        "val-core/gsm8k/reward/mean@1": 0.5,
    }
    assert {name: seen.get(name) for name in expected} == expected
    assert "policy/approx_kl" not in seen and seen["actor/ppo_kl"] == -8.2e-06  # k1, signed
    assert "ratio/ess" not in seen  # of other ratios
    assert "sampling/abs_mean" not in seen and seen["training/rollout_probs_diff_mean"] == 0.004  # probabilities
    for words in ("kl_loss_type", "k1", "dual clip", "trajectory_staleness_worst", "GiB", "no factor turns into nats"):
        assert told(run, words), words


def test_verl_step_without_any_advantage_makes_no_share_of_groups(log):
    """A step where all advantages are 0 tells a share of 1, the others none: a mean of these would be a lie."""
    rows, _ = rows_of(VERL_GRPO)
    rows[2] |= {"critic/advantages/max": 0.0, "critic/advantages/min": 0.0}
    run = log([{"step": row["training/global_step"], "data": row} for row in rows])
    assert "groups/zero_std" not in run.signals and "frac_reward_zero_std" not in run.signals
    assert told(run, "no group of the step carried a signal")


def test_verl_of_old_and_of_nan(log):
    def data(i):
        return {
            "critic/kl": 0.0,
            "critic/score/mean": None if i == 2 else 0.1,
            "actor/entropy_loss": 0.4,
            "actor/lr(1e-4)": 0.01,
            "actor/pg_loss": 0.1,
            "timing/gen": 20.0,
            "actor/perf/max_memory_allocated_gb": 24.0,
            "mismatch/mismatch_k3_kl": 0.001,
        }

    run = log([{"step": i, "data": data(i)} for i in (1, 2, 3)])
    first = run.observations[0].signals
    assert run.family == "verl" and run.step_axis == "step"
    assert first["learning_rate"] == pytest.approx(1e-6)  # 0.01 in units of 1e-4
    assert first["entropy"] == 0.4 and first["time/generate"] == 20.0 and first["memory/peak_allocated"] == 24.0
    assert first["sampling/k3"] == 0.001
    assert "kl" not in run.signals  # 0 throughout: there is no reference policy
    assert run.observations[1].nonfinite == {"reward": "nan"}  # its writer turns NaN into null


def test_verl_penalty_in_the_reward_is_k1(log):
    run = log([{"step": i, "critic/score/mean": 0.1, "actor/reward_kl_penalty": -0.002 * i} for i in (1, 2)])
    assert run.observations[0].signals["kl"] == -0.002 and told(run, "may be negative")


@pytest.mark.parametrize("prefix", ["", "rl_insight_monitor_"])
def test_verl_as_its_monitors_spell_it(log, prefix):
    rows = [
        {prefix + name.replace("/", "_"): value for name, value in VERL_GRPO.items()} | {"step": i}
        for i in range(1, 4)
    ]
    for i, row in enumerate(rows, start=1):
        row[prefix + "training_global_step"] = i
    run = log(rows)
    seen = run.observations[0].signals
    assert run.family == "verl" and run.method == "grpo"
    names = ("reward", "kl", "completions/clipped_ratio", "sample/staleness_max", "time/step", "learning_rate")
    assert [seen[name] for name in names] == [0.4, 0.0013, 0.25, 2.0, 60.0, 1e-6]


def test_verl_supervised(log):
    run = log([{"step": i, "data": VERL_SFT | {"val/loss": 1.3}} for i in (1, 2)])
    seen = run.observations[0].signals
    assert [seen[n] for n in ("loss", "eval_loss", "learning_rate", "grad_norm")] == [1.2, 1.3, 1e-5, 0.7]


# ---------------------------------------------------------------------- Tinker


def test_tinker_estimates_and_staleness(log):
    run = log(rows_of(TINKER_RL)[0])
    seen = run.observations[0].signals
    assert seen["entropy"] == 0.77 and told(run, "estimate of the entropy")
    assert seen["kl"] == -0.002 and seen["sampling/k1"] == 0.0005
    assert "sampling/k3" not in seen and seen["optim/kl_sample_train_v2"] == 0.0003 and told(run, "(k2)")
    assert seen["completions/mean_length"] == 4000 / 400 == 5.0 * 2.0  # tokens a turn times turns an episode
    assert seen["groups/all_passed"] == 0.15 and seen["groups/all_failed"] == 0.05
    assert seen["groups/zero_std"] == pytest.approx(0.15 + 0.05) == pytest.approx(1 - 0.8)
    assert seen["sample/staleness_mean"] == 12 - 10.5 and seen["sample/staleness_max"] == 12 - 9
    assert seen["num_completions"] == 400 and seen["time/step"] == 9.6
    assert "grad_norm" not in run.signals


def test_tinker_counts_tokens_of_a_step(log):
    run = log(rows_of(TINKER_SFT)[0])
    seen = run.observations[0].signals
    assert seen["loss"] == 2.46 and seen["eval_loss"] == 1.17 and seen["learning_rate"] == 2e-5
    assert "num_tokens" not in run.signals and seen["num_tokens_of_step"] == 930
    assert told(run, "not all since the start")


def test_tinker_nan_is_a_nan(log):
    rows, _ = rows_of(TINKER_SFT)
    rows[1]["train_mean_nll"] = math.nan
    assert log(rows).observations[1].nonfinite == {"loss": "nan"}


def test_tinker_preferences(log):
    seen = log(rows_of(TINKER_DPO)[0]).observations[0].signals
    names = ("loss", "rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected")
    assert [seen[n] for n in names] == [0.68, 0.6, 0.1, 0.05, -0.05]


# ---------------------------------------------------------------------- LLaMA-Factory


def test_llama_factory_columns_and_an_appended_restart(log):
    rows, _ = rows_of(LLAMA_DPO, 6)
    again = [{**row, "loss": 0.55, "elapsed_time": "0:00:01"} for row in rows[3:]]
    run = log([*rows, *again])
    seen = run.observations[0].signals
    assert seen["rewards/accuracies"] == 0.4 and seen["learning_rate"] == 2.25e-6 and seen["num_tokens"] == 3189568
    assert seen["memory/peak_allocated"] == 20.5 and seen["memory/peak_reserved"] == 22.0  # GiB
    assert "grad_norm" not in run.signals and run.total_steps == 93
    assert [s.first for s in run.segments] == [0, 6] and run.segments[1].step == 4
    assert told(run, "reward-model stage does not") and "ORPO and SimPO look alike" in run.method_reason


def test_llama_factory_without_a_device_and_without_a_stage(log):
    row = {k: v for k, v in LLAMA_DPO.items() if k != "accuracy"} | {"vram_allocated": 0.0, "vram_reserved": -0.0}
    run = log([{**row, "current_steps": i, "loss": 2.0 - 0.1 * i} for i in range(1, 5)])
    assert "memory/peak_allocated" not in run.signals and "memory/peak_reserved" not in run.signals
    assert run.method == "sft" and "low confidence" in run.method_reason  # its reward models write the same columns


def test_llama_factory_rewritten(log):
    """The rewrite writes the Trainer's own names, with `step` and `total_steps`."""
    row = {"epoch": 0.1, "loss": 1.2, "grad_norm": 0.4, "learning_rate": 1e-5, "total_steps": 30}
    run = log([{**row, "step": i, "loss": 1.2 - 0.01 * i} for i in range(1, 5)])
    assert run.step_axis == "step" and run.total_steps == 30
    assert {"loss", "grad_norm", "learning_rate"} <= set(run.signals) and not told(run, "Kept under their own")


# ---------------------------------------------------------------------- torchtune


def test_torchtune_ppo_sums_over_a_response(log):
    run = log(rows_of(TUNE_PPO)[0])
    seen = run.observations[0].signals
    assert seen["kl"] == 4.0 / 50.0 and seen["kl_of_sequence"] == 4.0 and told(run, "divided by response_lengths")
    assert seen["reward"] == 0.6 and seen["rlhf_reward"] == 0.5 and seen["completions/mean_length"] == 50.0
    assert seen["clip_ratio/region_mean"] == 0.04
    assert "policy/approx_kl" not in seen and seen["approx_policy_kl"] == 0.001  # padding counts in it
    assert "completions/clipped_ratio" not in seen and told(run, "size is not logged")


def test_torchtune_kl_of_unknown_length_is_no_kl(log):
    rows = [{k: v for k, v in row.items() if k != "response_lengths"} for row in rows_of(TUNE_PPO)[0]]
    run = log(rows)
    assert "kl" not in run.signals and run.observations[0].signals["kl_of_sequence"] == 4.0


def test_torchtune_constants_of_its_linear_loss(log):
    run = log(rows_of(TUNE_GRPO)[0])
    seen = run.observations[0].signals
    assert "clip_ratio/region_mean" not in run.signals and told(run, "0 by construction")
    assert seen["ratios"] == 1.0 and seen["kl"] == 0.02 and seen["reward"] == 1.5
    rows, _ = rows_of(TUNE_GRPO)
    rows[3]["clipfrac"] = 0.1
    assert [o.signals["clip_ratio/region_mean"] for o in log(rows).observations] == [0.0, 0.0, 0.0, 0.1]


def test_torchtune_preferences_and_memory(log):
    seen = log(rows_of(TUNE_DPO)[0]).observations[0].signals
    names = ("logps/chosen", "logps/rejected", "rewards/margins", "rewards/accuracies", "learning_rate")
    assert [seen[n] for n in names] == [-120.0, -130.0, 0.02, 0.6, 5e-7]
    run = log(rows_of(TUNE_SFT)[0])
    seen = run.observations[0].signals
    assert seen["memory/peak_allocated"] == 10.5 and seen["memory/peak_reserved"] == 12.0 and told(run, "GiB")


def test_torchtune_asynchronous(log):
    row = {
        "train_worker_training/loss": 0.01,
        "train_worker_training/kl_loss": 0.02,
        "train_worker_training/clipfrac": 0.0,
        "train_worker_training/ratios": 1.0,
        "train_worker_performance/total_step_time (s)": 12.0,
        "train_worker_performance/pct_time_waiting_buffer (%)": 40.0,
        "queues/train_worker_policy_age_mean": 2.0,
        "postprocessing_worker_rewards/rewards_mean": 0.7,
    }
    run = log([{"step": i, **row} for i in (1, 2, 3)])
    seen = run.observations[0].signals
    assert (run.family, run.method) == ("torchtune", "grpo")
    names = ("loss", "kl", "time/step", "sample/staleness_mean", "reward")
    assert [seen[n] for n in names] == [0.01, 0.02, 12.0, 2.0, 0.7]
    assert seen["train_worker_performance/pct_time_waiting_buffer (%)"] == 40.0  # a percentage, left as it is
    assert "clip_ratio/region_mean" not in run.signals


# ---------------------------------------------------------------------- NeMo-RL


def test_nemo_percentages_and_estimates(log):
    run = log(rows_of(NEMO_GRPO)[0])
    seen = run.observations[0].signals
    expected = {
        "loss": 0.01,
        "reward": 0.5,
        "grad_norm": 0.4,
        "learning_rate": 5e-6,
        "kl": 0.002,
        "entropy": 0.4,
        "sampling/k3": 0.0007,
        "sampling/importance_sampling_ratio/mean": 0.99,
        "completions/mean_length": 512.0,
        "completions/max_length": 1024.0,
        "completions/clipped_ratio": 0.125,
        "sample/staleness_mean": 1.5,
        "time/step": 80.0,
        "time/generate": 30.0,
        "groups/all_failed": 0.2,  # 20 %
        "groups/all_passed": 0.3,
        "groups/zero_std": 0.5,
        "token_mult_prob_error": 1.02,
        "validation/accuracy": 0.4,
    }
    assert {name: seen.get(name) for name in expected} == pytest.approx(expected)
    assert "sampling/sampling_logp_difference/mean" not in seen  # a mean of exponentials only bounds it
    for words in ("percentages", "not of the policy against a reference", "compare it within a run only"):
        assert told(run, words), words


@pytest.mark.parametrize("reward", [-0.4, 3.0])
def test_nemo_baselines_of_0_and_1_mean_nothing_on_another_scale(log, reward):
    run = log(rows_of(NEMO_GRPO | {"train/reward": reward})[0])
    assert not {"groups/all_failed", "groups/all_passed", "groups/zero_std"} & set(run.signals)
    assert run.observations[0].signals["baseline_reward/pct_0"] == 20.0


def test_nemo_without_a_reference(log):
    assert "kl" not in log(rows_of(NEMO_GRPO | {"train/kl_penalty": 0})[0]).signals


def test_nemo_accuracy_by_method(log):
    """Its reward models and its DPO log the same names; the preference loss tells them apart."""
    scores = log(rows_of(NEMO_PAIRS)[0]).observations[0].signals
    assert scores["accuracy"] == 0.55 and "rewards/accuracies" not in scores
    run = log(rows_of(NEMO_PAIRS | {"train/preference_loss": 0.69, "train/sft_loss": 0.0})[0])
    seen = run.observations[0].signals
    assert seen["rewards/accuracies"] == 0.55 and "rewards/chosen" not in seen  # without beta
    assert told(run, "without beta")


# ---------------------------------------------------------------------- open-instruct


def test_open_instruct_counts_its_estimates_from_0(log):
    run = log(rows_of(OPEN_GRPO)[0])
    seen = run.observations[0].signals
    expected = {
        "reward": 3.0,  # of all completions, not of those left after filtering
        "kl": 0.03,  # kl2: k3
        "objective/kl0_avg": -0.01,
        "clip_ratio/region_mean": 0.01,
        "entropy": 0.5,
        "grad_norm": 0.3,
        "loss": 0.0011,
        "completions/clipped_ratio": 1 - 0.9,
        "completions/mean_length": 800.0,
        "completions/max_length": 2048.0,
        "sampling/sampling_logp_difference/mean": 0.012,
        "sampling/sampling_logp_difference/max": 1.1,
        "scores": 4.0,
    }
    assert {name: seen.get(name) for name in expected} == pytest.approx(expected)
    assert "sampling/k1" not in seen
    for words in ("counted from 0", "left after filtering", "1 - val/stop_rate", "weighted by the sampler"):
        assert told(run, words), words


def test_open_instruct_before_it_counted_from_0(log):
    """`kl2` was k2 and `kl3` k3; only the plain `kl`, k1, is taken."""
    old = {k: v for k, v in OPEN_GRPO.items() if not k.startswith("objective/kl")}
    old |= {"objective/kl_avg": 0.01, "objective/kl2_avg": 0.02, "objective/kl3_avg": 0.03, "objective/kl4_avg": 0.04}
    run = log(rows_of(old)[0])
    assert run.observations[0].signals["kl"] == 0.01 and told(run, "objective/kl_avg is k1")


def test_open_instruct_without_a_reference(log):
    rows, _ = rows_of(OPEN_GRPO | {f"objective/kl{i}_avg": 0.0 for i in range(4)})
    assert "kl" not in log(rows).signals


def test_open_instruct_preferences(log):
    seen = log(rows_of(OPEN_DPO)[0]).observations[0].signals
    assert [seen[n] for n in ("rewards/accuracies", "rewards/margins", "loss")] == [0.6, 0.02, 0.69]
    assert seen["logps/chosen"] == -120.0 and seen["rewards/average"] == 0.0


# ---------------------------------------------------------------------- TRL and its kin


def test_trl_ppo_sums_are_no_means(log):
    run = log(rows_of(TRL_PPO)[0])
    seen = run.observations[0].signals
    assert "kl" not in seen and seen["objective/kl"] == 8.5 and told(run, "length is not logged")
    assert seen["entropy"] == 0.34 and seen["objective/entropy"] == 25.0 and told(run, "padding included")
    assert seen["reward"] == 0.6 and seen["clip_ratio/region_mean"] == 0.06 and seen["learning_rate"] == 5e-6
    assert seen["val/clipfrac_avg"] == 0.0  # the value function's


def test_unsloth_and_older_trl(log):
    run = log(rows_of(UNSLOTH | {"clip_ratio": 0.02})[0])
    seen = run.observations[0].signals
    assert seen["completions/mean_length"] == 237.0 and seen["rewards/format/mean"] == 0.9 and seen["kl"] == 0.0006
    assert "clip_ratio/region_mean" not in seen and told(run, "counts other tokens")


def test_axolotl_memory(log):
    run = log(rows_of(AXOLOTL | {"memory/max_alloc": 7.0})[0])
    seen = run.observations[0].signals
    assert seen["memory/peak_allocated"] == 2.9 and seen["memory/device_reserved (GiB)"] == 4.12
    assert "memory/peak_reserved" not in seen  # what is reserved now is no peak
    assert seen["memory/max_alloc"] == 7.0 and told(run, "the unit of memory/max_alloc is not known")


def test_a_notebook_table_of_preferences(log):
    """The Trainer's table in a notebook: an evaluation's names without `eval_`, each word capitalised."""
    row = {"Training Loss": 0.6, "Validation Loss": 0.62, "Rewards/chosen": 0.1, "Rewards/rejected": -0.1}
    row |= {"Rewards/accuracies": 0.7, "Rewards/margins": 0.2, "Logps/chosen": -90.0, "Logits/rejected": -1.0}
    run = log([{"Step": 10 * i, **row} for i in (1, 2, 3)])
    seen = run.observations[0].signals
    assert (run.family, run.method, run.step_axis) == ("trl", "dpo", "Step")
    expected = {
        "loss": 0.6,
        "eval_loss": 0.62,
        "eval_rewards/chosen": 0.1,
        "eval_rewards/accuracies": 0.7,
        "eval_rewards/margins": 0.2,
        "eval_logps/chosen": -90.0,
        "eval_logits/rejected": -1.0,
    }
    assert {name: seen.get(name) for name in expected} == expected
