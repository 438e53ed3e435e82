"""PRIME-RL: `metrics.jsonl` of its orchestrator and its trainer, in one file or one each; its W&B run; its SFT.

A step has several rows, for each process logs in parts. Rollouts are summed up as
`<train/agg | train/<env> | eval/<env>>/<all | effective>/[<agent>/]<metric>/<statistic>`: `all` are all that came
back, `effective` those that are trained on, so that a mean over them is biased by what was left out. Before, it was
`reward/<all | env>/mean`. Where one agent is rewarded (most often it is called "agent"), its rollouts are the policy's;
where there are several, the log does not tell which of them is trained, and they keep their names.

Not translated on purpose: `is_masked` (tokens outside a trust region of probabilities, no clip of a ratio),
`optim/zero_grad_ratio` (of elements, ours is of tensors), `time/wait_for_batch` (waiting for rollouts, no data loader),
`perf/mfu` and the use of the cache (percent and shares that no signal of ours is).
"""

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from outspoken.diagnostics.records import Observation
from outspoken.diagnostics.sources.names import Family

# its metric of rollouts -> ours
_ROLLOUTS = {
    "reward/mean": "reward",
    "num_output_tokens/mean": "completions/mean_length",
    "num_output_tokens/min": "completions/min_length",
    "num_output_tokens/max": "completions/max_length",
    "is_truncated/mean": "completions/clipped_ratio",
    "num_turns/mean": "rollout/turns_mean",
    "num_turns/max": "rollout/turns_max",
}
_SUBSETS = ("train/agg/all/", "train/agg/effective/")
_REWARD = re.compile(r"^train/agg/(?:all|effective)/(|[^/]+/)reward/(?:mean|min|max)$")

# Names that only the orchestrator writes, of those that stand in a row beside one that the trainer writes as well.
_ORCHESTRATOR = ("train/", "eval/", "batch/", "off_policy/", "curriculum/", "dispatcher/", "reward/", "progress/tasks")


def _method(names: Collection[str]) -> tuple[str, str] | None:
    def has(*prefixes: str) -> bool:
        return any(name.startswith(prefixes) for name in names)

    if has("ref_kl/") and not has("is_masked/"):
        return (
            "distillation",
            "it logs the divergence from a reference that teaches, and no policy gradient of rewards",
        )
    if has("train/agg/", "reward/all/", "mismatch_kl/", "is_masked", "off_policy/"):
        return "grpo", "it logs rollouts and their policy gradient; PRIME-RL has no critic"
    if has("loss/"):
        return "sft", "it logs a loss and no rollouts"
    return None


def _rollouts() -> Callable[[Observation], None]:
    """What becomes known of the policy's rollouts where one agent alone is rewarded, whatever its name."""
    agents: set[str] = set()  # "" in versions that knew none, else with a slash behind

    def follow(observation: Observation) -> None:
        seen: dict[str, float] = observation.signals  # type: ignore[assignment]
        agents.update(match[1] for name in seen if (match := _REWARD.match(name)) is not None)
        if len(agents) > 1:
            return
        for agent in agents:
            for subset in _SUBSETS:
                for theirs, ours in _ROLLOUTS.items():
                    value = seen.get(f"{subset}{agent}{theirs}")
                    if value is not None:
                        seen.setdefault(ours, value)
            _add_solved(seen, agent)
        count = seen.get("progress/rollouts", seen.get("progress/samples"))
        if count is not None and "reward" in seen:
            seen.setdefault("num_completions", count)

    return follow


def _add_solved(seen: dict[str, float], agent: str) -> None:
    """Groups that failed or passed as a whole, where rewards lie between 0 and 1.

    `solved_none` counts groups whose rewards add up to 0, `solved_all` those where they add up to the group's size:
    that is the lowest and the highest reward only there.
    """
    none, every, lowest, highest = (
        seen.get(f"train/agg/all/{agent}{name}") for name in ("solved_none", "solved_all", "reward/min", "reward/max")
    )
    if none is None or every is None or lowest is None or highest is None or lowest < 0 or highest > 1:
        return
    seen.setdefault("groups/all_failed", none)
    seen.setdefault("groups/all_passed", every)
    seen.setdefault("groups/zero_std", min(1.0, none + every))


def _writer(row: Mapping[str, Any]) -> str:
    """Which process wrote a row: newer versions say it, else the names do. Rows about the servers have no step."""
    if row.get("step") is None:
        return "servers"
    producer = row.get("producer")
    if isinstance(producer, str):
        return producer
    return "orchestrator" if any(name.startswith(_ORCHESTRATOR) for name in row) else "trainer"


_BIASED = (
    "Rewards, lengths and truncation were read over all rollouts (…/all/…) where the log has them; a mean over the "
    "effective ones alone is biased by what was left out."
)

PRIME_RL = Family(
    "prime_rl",
    title="PRIME-RL",
    signs=(
        *(
            "train/agg/",
            "mismatch_kl/",
            "masked_mismatch_kl/",
            "unmasked_mismatch_kl/",
            "is_masked/",
            "is_masked_low/",
        ),
        *("is_masked_high/", "masked_advantage_", "kl_ent_ratio/", "ref_kl/", "entropy/all/", "loss/mean", "loss/std"),
        *(
            "loss/nan_count",
            "loss/perplexity",
            "max_vio/",
            "routing_confidence/",
            "perf/throughput_per_gpu",
            "perf/mfu",
        ),
        *("perf/peak_memory", "optim/zero_grad_ratio", "time/wait_for_batch", "time/wait_for_policy", "off_policy/"),
        *("time/broadcast_weights", "dispatcher/", "inference/agg/", "curriculum/", "reward/all/", "solve_none/"),
        *("solve_all/", "decode_len/", "is_truncated/all/", "effective_batch_size/", "stop_condition/all/"),
        *("progress/total_tokens", "progress/total_rollouts", "progress/total_samples", "progress/total_tasks"),
        # the lines of its console
        *("max_off_policy", "max_off_policy_level", "async_level", "trainable_of", "truncation_percent"),
        *("cancelled_percent", "mfu_percent"),
    ),
    aliases={
        # of the usual agent; of one with another name see `_rollouts`
        **{f"{subset}agent/{theirs}": ours for subset in _SUBSETS for theirs, ours in _ROLLOUTS.items()},
        "reward/all/mean": "reward",
        "decode_len/all/mean": "completions/mean_length",
        "is_truncated/all/mean": "completions/clipped_ratio",
        "num_turns/all/mean": "rollout/turns_mean",
        "progress/tasks": "groups/count",
        "progress/problems": "groups/count",
        "loss/mean": "loss",
        "val/loss": "eval_loss",
        "entropy/all/mean": "entropy",
        "entropy/mean": "entropy",
        "mismatch_kl/all/mean": "sampling/k3",
        "mismatch_kl/mean": "sampling/k3",
        "ref_kl/mean": "distillation/reverse_kl",
        "off_policy/mean": "sample/staleness_mean",
        "off_policy/max": "sample/staleness_max",
        "optim/lr": "learning_rate",
        "optim/grad_norm": "grad_norm",
        "perf/peak_memory": "memory/peak_reserved",
        # the console's line of a step
        "truncation_percent": "completions/clipped_ratio",
        "max_off_policy": "sample/staleness_max",
        "turns": "rollout/turns_mean",
    },
    scale={"ref_kl/mean": -1.0, "truncation_percent": 0.01},
    meanings={
        # whatever the agent is called
        **dict.fromkeys(
            ("train/agg/all/reward/mean", "train/agg/effective/agent/reward/mean", "off_policy/mean"), _BIASED
        ),
        "mismatch_kl/all/mean": "mismatch_kl is the k3 estimate of trainer against sampler, staleness included.",
        "ref_kl/mean": "ref_kl is the mean of log reference minus log policy at sampled tokens; its negative was read as the "
        "divergence from the model that teaches.",
        "is_masked/mean": "is_masked counts tokens outside a trust region of probabilities; it keeps its name and is no "
        "clip ratio here.",
        "train/agg/all/agent/is_truncated/mean": "is_truncated counts rollouts that anything cut: the length, the context or "
        "the number of turns.",
        "train/agg/all/agent/solved_none": "solved_none and solved_all were read as groups that failed or passed as a whole "
        "in steps whose rewards lie between 0 and 1, where that is what they mean.",
        "train/agg/all/agent/num_output_tokens/mean": "num_output_tokens counts what the model wrote in all turns.",
        "off_policy/max": "off_policy counts updates since the oldest weights that wrote a part of the rollout.",
        "truncation_percent": "The console's reward, turns and truncation are means over the rollouts that are trained on, "
        "biased by what was left out; metrics.jsonl has those over all.",
        "perf/peak_memory": "peak_memory is what torch's allocator held at most, tensors and its reserve.",
        "time/forward_backward": "time/forward_backward includes the optimizer's step here.",
    },
    steps=("step",),
    clocks=frozenset(("progress/epoch", "progress/step")),
    known=(
        *(
            "train/",
            "eval_",
            "val/",
            "reward/",
            "seq_len/",
            "prefill_len/",
            "decode_len/",
            "is_truncated/",
            "num_turns/",
        ),
        *("solve_none/", "solve_all/", "effective_batch_size/", "samples_per_rollout/", "stop_condition/", "filters/"),
        *("pre_filters/", "metrics/", "timing/", "batch/", "off_policy/", "curriculum/", "dispatcher/", "inference/"),
        *("progress/", "perf/", "time/", "optim/", "loss/", "entropy/", "mismatch_kl/", "masked_mismatch_kl/"),
        *(
            "unmasked_mismatch_kl/",
            "is_masked/",
            "is_masked_low/",
            "is_masked_high/",
            "masked_advantage_",
            "kl_ent_ratio/",
        ),
        *("ref_kl/", "nll/", "max_vio/", "routing_confidence/", "system/", "producer"),
        *("trainable", "trainable_of", "branches", "error_percent", "cancelled_percent", "async_level"),
        *("max_off_policy_level", "seq_length_tokens_sample"),
    ),
    follow=_rollouts,
    writer=_writer,
    method_of=_method,
    drops_nan=True,
    settings={
        "max_steps": "max_steps",
        "trainer.max_steps": "max_steps",
        "trainer.optim.lr": "learning_rate",
        "optim.lr": "learning_rate",
        "trainer.optim.max_norm": "max_grad_norm",
        "optim.max_norm": "max_grad_norm",
        "orchestrator.train.group_size": "num_generations",
        "orchestrator.group_size": "num_generations",
        "orchestrator.rollouts_per_example": "num_generations",
        "train.group_size": "num_generations",
        "group_size": "num_generations",
        "rollouts_per_example": "num_generations",
        "orchestrator.sampling.max_tokens": "max_completion_length",
        "sampling.max_tokens": "max_completion_length",
        "orchestrator.sampling.temperature": "temperature",
        "sampling.temperature": "temperature",
    },
)
