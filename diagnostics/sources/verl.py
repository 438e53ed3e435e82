"""veRL: JSON lines of its file logger (`{"step": n, "data": {…}}`) or of its console, old and new key names.

`critic/score` is the raw reward and `critic/rewards` the one after the KL penalty, whatever the algorithm;
`response_length/clip_ratio` counts responses as long as the cap. Its writer (orjson) turns NaN into null. Its rl_insight
and Prometheus backends write "_" for "/", so each name is known in both spellings.

Not translated on purpose: `actor/ppo_kl` (k1 of the sampling against the new policy, signed; ours is k3);
`training/rollout_probs_diff_*` (differences of probabilities, not of log-probabilities);
`rollout_corr/rollout_is_eff_sample_size` (of the trainer's over the sampler's ratios, not of new over old);
`rollout_corr/rollout_is_{min,max}` (before or after the bounds, by version); `critic/advantages/*` (they tell a step
without any signal, but not the share of groups without one).
"""

from collections.abc import Callable, Collection, Mapping
from typing import TypeVar

from outspoken.diagnostics.records import Observation
from outspoken.diagnostics.sources.names import Family

T = TypeVar("T")

MONITOR = "rl_insight_monitor_"  # what its rl_insight backend puts before each name

_PHASES = {"gen": "generate", "reward": "score", "testing": "eval", "save_checkpoint": "save", "step": "step"}


def _both(table: Mapping[str, T]) -> dict[str, T]:
    """A table by veRL's names, with their spellings in Prometheus after them."""
    flat = {name.replace("/", "_"): value for name, value in table.items() if "/" in name}
    return {**table, **flat, **{MONITOR + name: value for name, value in flat.items()}}


def rewards_seen() -> Callable[[Observation], None]:
    """The largest and smallest reward so far, and how far they lie apart.

    Where the smallest is not logged, the smallest mean stands in for the range: it is then a lower bound.
    """
    highest = lowest = smallest_mean = None
    spellings = {what: list(_both({f"critic/score/{what}": None})) for what in ("max", "min", "mean")}

    def follow(observation: Observation) -> None:
        nonlocal highest, lowest, smallest_mean
        seen = observation.signals
        top, bottom, mean = (
            next((seen[name] for name in names if name in seen), None) for names in spellings.values()
        )
        mean = seen.get("reward", mean)
        if top is not None:
            highest = top if highest is None else max(highest, top)
        if bottom is not None:
            lowest = bottom if lowest is None else min(lowest, bottom)
        if mean is not None:
            smallest_mean = mean if smallest_mean is None else min(smallest_mean, mean)
        if highest is None or mean is None:
            return
        added = {"rewards/max_seen": highest}
        if lowest is not None:
            added["rewards/min_seen"] = lowest
        floor = lowest if lowest is not None else smallest_mean
        if floor is not None:
            added["rewards/range"] = highest - floor
        for name, value in added.items():
            seen.setdefault(name, value)  # type: ignore[attr-defined]

    return follow


def method_of(names: Collection[str]) -> tuple[str, str] | None:
    bare = {name.removeprefix(MONITOR).replace("/", "_") for name in names}
    if bare & {"critic_vf_loss", "critic_vf_explained_var", "critic_values_mean"}:
        return "ppo", "it logs a value function"
    if any(name.startswith(("critic_score_", "actor_pg_")) for name in bare):
        return "grpo", "it logs rewards and no value function (veRL names GRPO, RLOO and REINFORCE++ alike)"
    if "train_loss" in bare:
        return "sft", "it logs a training loss, no rewards and no actor"
    return None


VERL = Family(
    "verl",
    title="veRL",
    signs=(
        *("critic/score/", "critic/rewards/", "critic/advantages/", "critic/returns/", "critic/values/"),
        *("actor/pg_loss", "actor/pg_clipfrac", "actor/pg_clipfrac_lower", "actor/ppo_kl", "actor/kl_loss"),
        *("actor/entropy_loss", "actor/grad_norm", "actor/lr", "actor/lr(1e-4)", "actor/reward_kl_penalty"),
        *("response_length/", "response_length_non_aborted/", "prompt_length/", "timing_s/", "timing_per_token/"),
        *("timing_per_token_ms/", "global_seqlen/", "rollout_corr/", "training/rollout_probs_diff_", "fully_async/"),
        *("training/off_policy/", "val-core/", "val-aux/", "actor/perf/", "perf/max_memory_allocated_gb"),
        *("train/global_tokens", "train/total_tokens(B)", "train/mfu"),
        *(MONITOR, "critic_score_mean", "critic_rewards_mean", "actor_pg_loss", "actor_pg_clipfrac", "actor_ppo_kl"),
        *("response_length_clip_ratio", "critic_advantages_max"),
    ),
    aliases=_both(
        {
            "critic/score/mean": "reward",
            "actor/entropy": "entropy",
            "actor/entropy_loss": "entropy",
            "actor/kl_loss": "kl",
            "actor/reward_kl_penalty": "kl",
            "critic/kl": "kl",  # the same before 0.3
            "actor/grad_norm": "grad_norm",
            "actor/lr": "learning_rate",
            "actor/lr(1e-4)": "learning_rate",
            "actor/pg_clipfrac": "clip_ratio/region_mean",
            "actor/pg_loss": "loss",
            "response_length/mean": "completions/mean_length",
            "response_length/min": "completions/min_length",
            "response_length/max": "completions/max_length",
            "response_length/clip_ratio": "completions/clipped_ratio",
            "rollout_corr/kl": "sampling/k1",
            "mismatch/mismatch_kl": "sampling/k1",  # the same in older versions
            "rollout_corr/k3_kl": "sampling/k3",
            "mismatch/mismatch_k3_kl": "sampling/k3",
            "rollout_corr/rollout_is_mean": "sampling/importance_sampling_ratio/mean",
            "training/off_policy/trajectory_staleness_worst/mean": "sample/staleness_mean",
            "training/off_policy/trajectory_staleness_worst/max": "sample/staleness_max",
            "training/off_policy/trajectory_staleness/mean": "sample/staleness_mean",
            "training/off_policy/trajectory_staleness/max": "sample/staleness_max",
            **{
                f"{prefix}/{theirs}": f"time/{ours}"
                for theirs, ours in _PHASES.items()
                for prefix in ("timing_s", "timing")
            },
            "perf/time_per_step": "time/step",
            "perf/max_memory_allocated_gb": "memory/peak_allocated",
            "actor/perf/max_memory_allocated_gb": "memory/peak_allocated",
            "perf/max_memory_reserved_gb": "memory/peak_reserved",
            "actor/perf/max_memory_reserved_gb": "memory/peak_reserved",
        }
    ),
    scale={"actor/lr(1e-4)": 1e-4, "actor_lr(1e-4)": 1e-4},
    meanings=_both(
        {
            "critic/rewards/mean": "critic/score is the reward as scored and was read as reward; critic/rewards is the same after the KL penalty.",
            "actor/kl_loss": "actor/kl_loss was taken for k3 in nats per token, as kl_loss_type=low_var_kl logs it; some versions of veRL divide it by the number of micro-batches, so trust its course more than its size.",
            "actor/reward_kl_penalty": "actor/reward_kl_penalty is k1 (mean difference of log-probabilities to the reference), which may be negative.",
            "critic/kl": "critic/kl is k1 (mean difference of log-probabilities to the reference), which may be negative.",
            "actor/pg_clipfrac": "actor/pg_clipfrac counts tokens whose clip is active, as clip_ratio/region_mean does; actor/pg_clipfrac_lower counts those held by the dual clip and stays apart.",
            "actor/ppo_kl": "actor/ppo_kl is the signed mean difference of log-probabilities of the sampling and the new policy (k1) and stays apart from policy/approx_kl, which is k3.",
            "actor/lr(1e-4)": "actor/lr(1e-4) is the learning rate in units of 1e-4.",
            "critic/advantages/max": "where critic/advantages/max and min are both 0, no group of the step carried a signal; veRL does not log which share of groups does.",
            "response_length/clip_ratio": "response_length/clip_ratio counts responses as long as the cap, one that ends exactly there too, and was read as completions/clipped_ratio.",
            "response/aborted_ratio": "aborted responses have length 0: they count in response_length and not in critic/score.",
            "training/rollout_probs_diff_mean": "training/rollout_probs_diff is a difference of probabilities, which no factor turns into nats.",
            "training/off_policy/trajectory_staleness_worst/mean": "staleness was taken from the oldest weights that a response was sampled with (trajectory_staleness_worst).",
            "perf/max_memory_allocated_gb": "memory named _gb is in GiB.",
            "actor/perf/max_memory_allocated_gb": "memory named _gb is in GiB.",
        }
    ),
    zero_if_off=frozenset(_both({"actor/reward_kl_penalty": 0, "critic/kl": 0})),  # without a reference policy
    steps=("step", "training/global_step", "training_global_step", MONITOR + "training_global_step"),
    clocks=frozenset({"training/epoch", "training_epoch", MONITOR + "training_epoch"}),
    known=(
        *("actor/", "critic/", "response_length/", "response_length_non_aborted/", "response/", "prompt_length/"),
        *("timing/", "timing_s/", "timing_per_token/", "timing_per_token_ms/", "perf/", "global_seqlen/", "val/"),
        *("val-core/", "val-aux/", "rollout_corr/", "mismatch/", "training/", "num_turns/", "tool_call_counts/"),
        *("agent_loop/", "fully_async/", "rollout/", "variance_proxy/", "distillation/", "train/global_tokens"),
        *("train/total_tokens(B)", "train/mfu", "train/time(s)", "train/lr(1e-3)", "train_mfu"),
        *(MONITOR, "actor_", "critic_", "response_length_", "prompt_length_", "timing_s_", "timing_per_token_ms_"),
        *("perf_", "global_seqlen_", "rollout_corr_", "training_", "num_turns_", "val_core_", "val_aux_"),
    ),
    method_of=method_of,
    follow=rewards_seen,
    null_is_nan=True,
    # Not here: data.train_batch_size counts prompts, kl_loss_coef says nothing unless use_kl_loss is set.
    settings={
        "actor_rollout_ref.rollout.n": "num_generations",
        "actor_rollout_ref.rollout.temperature": "temperature",
        "actor_rollout_ref.rollout.top_p": "top_p",
        "actor_rollout_ref.actor.optim.lr": "learning_rate",
        "actor_rollout_ref.actor.clip_ratio_low": "epsilon",
        "actor_rollout_ref.actor.clip_ratio_high": "epsilon_high",
        "actor_rollout_ref.actor.ppo_epochs": "num_iterations",
        "actor_rollout_ref.actor.grad_clip": "max_grad_norm",
        "actor_rollout_ref.actor.entropy_coeff": "entropy_coef",
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": "per_device_train_batch_size",
        "data.max_response_length": "max_completion_length",
        "trainer.total_training_steps": "max_steps",
        "trainer.total_epochs": "num_train_epochs",
        # its supervised trainer
        "optim.lr": "learning_rate",
        "data.micro_batch_size_per_gpu": "per_device_train_batch_size",
        "data.max_length": "max_length",
    },
)  # fmt: skip
