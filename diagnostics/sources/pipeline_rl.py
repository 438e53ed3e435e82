"""PipelineRL: the metrics of its trainer (`rl/`, `stats/`), its actor (`actor/`) and its preprocessor.

Each process writes for itself: to W&B under these prefixes, to the console as a dict of texts, the actor also to a
stream of JSON lines without its prefix. Means are taken over the tokens of a sequence first, then over sequences.

A maximum, minimum and variance are left out where the variance is 0: a reward that is the same for all shows as
`reward_mean` alone. Lag is counted in samples. Not translated on purpose: `clamp_log_ratio_new_old_indicator` (ratios
out of bounds, whatever the advantage's sign), `success` (a metric of its own, no reward).
"""

import math
from collections.abc import Callable, Collection

from outspoken.diagnostics.records import Observation
from outspoken.diagnostics.sources.names import Derived, Family

# The means of what a window of rollouts was like, under the actor's prefix in W&B and without it in its stream.
_ACTOR = {
    "reward_mean": "reward",
    "output_tokens_mean": "completions/mean_length",
    "output_tokens_min": "completions/min_length",
    "output_tokens_max": "completions/max_length",
    "overlong_mean": "completions/clipped_ratio",
    "num_turns_mean": "rollout/turns_mean",
    "num_turns_max": "rollout/turns_max",
    "always_success": "groups/all_passed",
    "never_success": "groups/all_failed",
    "reward_var": "reward_variance",
}
# Metrics of which it writes mean, max, min and var, also of each data set and domain.
_SUMMED_UP = (
    *("reward_", "success_", "no_error_", "no_answer_", "overlong_", "num_turns_", "prompt_tokens_", "output_tokens_"),
    *("penalty_delta_", "latency_", "model_version_"),
)


def _method(names: Collection[str]) -> tuple[str, str] | None:
    if any(name.startswith("rl/value_") for name in names):
        return "ppo", "it logs a value function's loss"
    if any(name.startswith("rl/") or name in ("actor/reward_mean", "reward_mean") for name in names):
        return "grpo", "it logs rewards of groups of samples and no critic"
    return None


def _unsaid() -> Callable[[Observation], None]:
    """What a row says without naming it: the spread of rewards where it was left out because it is 0, the age of the
    oldest sample in updates, and whether there is a reference model.

    Without one the sampler's log-probabilities stand in for the reference's, and the ratio of the two is exactly 1.
    """

    def follow(observation: Observation) -> None:
        seen: dict[str, float] = observation.signals  # type: ignore[assignment]
        if "reward" in seen and "groups/all_passed" in seen and "reward_variance" not in seen:
            seen.setdefault("reward_std", 0.0)
        lag, samples = seen.get("stats/lag"), seen.get("stats/samples")
        steps = seen.get("stats/completed_steps", float(observation.step))
        if lag is not None and samples and steps > 0:
            seen.setdefault("sample/staleness_max", lag * steps / samples)
        if "rl/kl" in seen and abs(seen.get("rl/ratio_ref_old", math.inf) - 1) > 1e-6:
            seen.setdefault("kl", seen["rl/kl"])

    return follow


PIPELINE_RL = Family(
    "pipeline_rl",
    title="PipelineRL",
    signs=(
        *(
            "rl/kl_new_old",
            "rl/ratio_",
            "rl/clamp_log_ratio_",
            "rl/token_weight",
            "rl/old_logprobs",
            "rl/new_logprobs",
        ),
        *(
            "rl/ref_logprobs",
            "rl/ess",
            "rl/max_advantage",
            "rl/min_advantage",
            "rl/entropy_bonus_coef",
            "rl/input_size",
        ),
        *("stats/completed_steps", "stats/samples_too_old_to_", "stats/lag", "stats/time_waiting_for_data"),
        *("stats/min_actor_version", "stats/max_actor_version", "stats/passes", "preprocessor/published_samples"),
        *("throughput/tokens_perGPU_per_sec", "throughput/tokens_per_micro_batch"),
        *("actor/reward_mean", "actor/success_mean", "actor/no_error_mean", "actor/no_answer_mean"),
        *("actor/overlong_mean", "actor/output_tokens_mean", "actor/prompt_tokens_mean", "actor/num_turns_mean"),
        *("actor/latency_", "actor/model_version_", "actor/problem_queue_size", "actor/result_queue_size"),
        *("actor/finished_groups", "actor/domain_mix_", "no_error_mean", "no_answer_mean", "trainer_model_version"),
        *(prefix + name for prefix in ("actor/", "") for name in ("always_success", "never_success")),
        *(prefix + name for prefix in ("actor/", "") for name in ("sometimes_success", "published_samples")),
    ),
    aliases={
        **{f"actor/{theirs}": ours for theirs, ours in _ACTOR.items()},
        **_ACTOR,
        "rl/reward": "reward",
        "rl/loss": "loss",
        "rl/entropy": "entropy",
        "rl/kl_new_old": "policy/approx_kl",
        "rl/mean_abs_log_ratio_new_old": "log_ratio/abs_mean",
        "rl/ess": "ratio/ess",
        "rl/entropy_bonus_coef": "entropy_coef",
        "stats/grad_norm": "grad_norm",
        "stats/lr": "learning_rate",
        "stats/tokens": "num_tokens",
    },
    meanings={
        "rl/kl": "rl/kl is the k3 estimate against the reference, its log-ratio cut at clamp_log_ratio_ref_new_value; "
        "where rl/ratio_ref_old is exactly 1 there is no reference model, and it is no kl.",
        "rl/kl_new_old": "rl/kl_new_old is the k3 estimate of the policy against the one that sampled: staleness and the "
        "difference of engines together.",
        "rl/clamp_log_ratio_new_old_indicator": "rl/clamp_log_ratio_new_old_indicator counts ratios out of bounds, "
        "whatever the advantage's sign; it keeps its name and is no clip ratio here.",
        "rl/ess": "rl/ess is computed from ratios that policy_loss=reinforce has capped before.",
        "stats/lag": "stats/lag counts samples; the staleness in updates was taken as lag / (samples / completed steps).",
        "actor/reward_mean": "reward is the mean over rollouts as they come (actor/reward_mean); a mean without a variance "
        "was read as a variance of 0, for that is when it is left out.",
        "reward_mean": "reward is the mean over rollouts as they come; a mean without a variance was read as a variance of "
        "0, for that is when it is left out.",
        "actor/always_success": "always_success and never_success speak of success, which may differ from the reward; the "
        "share of groups without spread was not derived from them.",
        "actor/output_tokens_mean": "output_tokens counts each call of the model by itself, not whole conversations.",
    },
    not_measured={"stats/grad_norm": -1.0},
    steps=("stats/completed_steps", "step", "_step", "actor/trainer_model_version", "trainer_model_version"),
    clocks=frozenset(("stats/epoch", "actor/time_since_start", "time_since_start")),
    known=(
        *("rl/", "stats/", "throughput/", "preprocessor/", "actor/", "test_", "dataset_", "reward_variance"),
        *_SUMMED_UP,
        *("always_success", "never_success", "sometimes_success", "success_given_overlong", "published_samples"),
        *("problem_queue_size", "result_queue_size", "finished_groups", "domain_mix_", "samples_per_second"),
        *("tokens_per_second", "prompt_tokens_per_second", "output_tokens_per_second", "trainer_model_version"),
    ),
    derived={
        "reward_std": Derived(
            ("reward_variance",), lambda variance: math.sqrt(variance) if variance >= 0 else math.nan
        ),
    },
    follow=_unsaid,
    method_of=_method,
    settings={
        "attempts": "num_generations",
        "llm.parameters.max_tokens": "max_completion_length",
        "llm.parameters.temperature": "temperature",
        "llm.parameters.top_p": "top_p",
        "finetune.learning_rate": "learning_rate",
        "finetune.max_train_steps": "max_steps",
        "finetune.gradient_clipping_threshold": "max_grad_norm",
        "finetune.lr_scheduler_type": "lr_scheduler_type",
        "finetune.num_warmup_steps": "warmup_steps",
        "finetune.log_each_n_steps": "logging_steps",
        "finetune.rl.kl_coef": "beta",
        "finetune.rl.epsilon_low": "epsilon",
        "finetune.rl.epsilon_high": "epsilon_high",
    },
)
