"""What is measured of sampled completions, the same for every trainer that samples. A trainer's `_metrics[mode][name]`
collects values until `log` averages them; its `recorder` hands the diagnostics what the logs do not say.

Axes: `N` completions of all processes, `G` completions per prompt, `K` reward functions.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from outspoken.trainers import advantages as group_advantages
from outspoken.trainers.losses import policy
from outspoken.trainers.measuring import gather_rows
from outspoken.trainers.rollouts.batch import RolloutBatch
from outspoken.trainers.rollouts.rollout import Rollouts
from outspoken.trainers.rollouts.tools import tool_metrics

REPEATED_TOKENS = 4  # a run of so many tokens that occurs again in the same completion is a repetition


def log(trainer: Any, mode: str, name: str, value: Tensor | float) -> None:
    """Add one value of a metric."""
    trainer._metrics[mode][name].append(float(value))


def log_completions(trainer: Any, mode: str, rollouts: Rollouts) -> None:
    """TRL's metrics of lengths, of all processes' completions: model tokens only."""
    lengths = [len(ids) for ids in rollouts.prompt_ids]
    rows = list(zip(lengths, rollouts.model_tokens(), rollouts.finished))
    gathered = _gathered(trainer, [list(map(int, row)) for row in rows])
    completion, done = gathered[:, 1].float(), gathered[:, 2].bool()
    if mode == "train":
        trainer.state.num_input_tokens_seen += int(gathered[:, :2].sum())
    trainer._metrics[mode]["num_tokens"] = [trainer.state.num_input_tokens_seen]
    terminated = completion[done] if done.any() else torch.zeros(1)
    for kind, values in (("", completion), ("terminated_", terminated)):
        log(trainer, mode, f"completions/mean_{kind}length", values.mean())
        log(trainer, mode, f"completions/min_{kind}length", values.min())
        log(trainer, mode, f"completions/max_{kind}length", values.max())
    log(trainer, mode, "completions/clipped_ratio", (~done).float().mean())


def log_rewards(
    trainer: Any, mode: str, per_function: Tensor, rewards: Tensor, names: Sequence[str], group_size: int
) -> None:
    """TRL's metrics of rewards.

    Args:
        per_function: (N, K), NaN where a function does not apply. rewards: (N,), their weighted sum.
    """
    for name, column in zip(names, per_function.T):
        log(trainer, mode, f"rewards/{name}/mean", torch.nanmean(column))
        log(trainer, mode, f"rewards/{name}/std", group_advantages.nan_std(column))
    log(trainer, mode, "reward", torch.nanmean(rewards))
    log(trainer, mode, "reward_std", group_advantages.nan_std(rewards))
    log(trainer, mode, "frac_reward_zero_std", no_spread(rewards, group_size).float().mean())


def no_spread(rewards: Tensor, group_size: int) -> Tensor:
    """Whether the rewards of a group are all alike, (N / G,), from the rewards themselves."""
    groups = rewards.view(-1, group_size)
    if group_size == 1:
        return torch.ones(len(groups), dtype=torch.bool, device=rewards.device)
    std = group_advantages.nan_std(groups, dim=1)
    return torch.isclose(std, torch.zeros_like(std))


def log_counts(trainer: Any, mode: str, rollouts: Rollouts) -> None:
    """TRL's metrics of tools, and ours of turns, over all processes."""
    if not rollouts.counts:
        return
    for name, value in tool_metrics(gather_object([rollouts.counts])).items():
        if name == "tools/failure_frequency" and math.isnan(value):
            value = 0.0  # as TRL has it where nothing was called
        if not math.isnan(value):
            log(trainer, mode, name, value)


def record_completions(
    trainer: Any,
    rollouts: Rollouts,
    rewards: Tensor | None,
    per_function: Tensor | None,
    names: Sequence[str],
    group_size: int,
    cap: int,
    weights: Tensor | None = None,
) -> None:
    """Hand the diagnostics the rewards of each group and what is worth knowing of this generation batch.

    Args:
        rewards: (N,); per_function: (N, K); weights: (K,); None where nothing is rewarded.
    """
    recorder = trainer.recorder
    if rewards is not None and per_function is not None:
        columns = {name: column.view(-1, group_size).tolist() for name, column in zip(names, per_function.T)}
        recorder.rewards(rewards.view(-1, group_size).tolist(), columns)
        if weights is not None and len(names) > 1:
            shares = group_advantages.variance_shares(per_function, weights, group_size)
            for name, share in zip(names, shares.tolist()):
                if not math.isnan(share):
                    recorder.set(f"rewards/{name}/variance_share", share)

    completion_ids = gather_object(rollouts.completion_ids)
    lengths = torch.tensor([len(ids) for ids in completion_ids], dtype=torch.float32)
    prompt_lengths = torch.tensor([len(ids) for ids in gather_object(rollouts.prompt_ids)], dtype=torch.float32)
    done = torch.tensor(gather_object(rollouts.finished))
    n = len(completion_ids)
    groups = [completion_ids[start : start + group_size] for start in range(0, n, group_size)]

    recorder.set("num_completions", n)
    recorder.set("num_prompts", len(groups))
    recorder.set("prompts/p95_length", float(torch.quantile(prompt_lengths, 0.95)))
    if done.any():
        for share in (0.50, 0.90, 0.99):
            name = f"completions/p{round(100 * share)}_terminated_length"
            recorder.set(name, float(torch.quantile(lengths[done], share)))
    if rewards is not None:
        for name, chosen in (("truncated", ~done), ("terminated", done)):
            some = rewards.cpu()[chosen]
            if not torch.isnan(some).all():
                recorder.set(f"completions/{name}_reward", float(torch.nanmean(some)))
    recorder.count("completions/at_cap", int((lengths >= cap).sum()), n)
    recorder.count("completions/duplicate_share", sum(len(ids) - len(set(map(tuple, ids))) for ids in groups), n)
    repeated, runs = map(sum, zip(*map(repetitions, completion_ids)))
    if runs:
        recorder.count("completions/repetition_share", repeated, runs)


def record_speed(trainer: Any) -> None:
    """Tokens sampled per second of sampling since the last call, all processes together."""
    worker = trainer.rollouts
    tokens, seconds = map(sum, zip(*gather_object([(worker.sampled_tokens, worker.sampling_seconds)])))
    if seconds:
        # Processes sample at the same time, so their speeds add up.
        trainer.recorder.set("generate/tokens_per_second", tokens / seconds * trainer.accelerator.num_processes)
    worker.sampled_tokens, worker.sampling_seconds = 0, 0.0


def repetitions(ids: Sequence[int], length: int = REPEATED_TOKENS) -> tuple[int, int]:
    """(runs of `length` tokens that occurred before in this completion, all its runs of that length)."""
    runs = Counter(tuple(ids[i : i + length]) for i in range(len(ids) - length + 1))
    total = sum(runs.values())
    return total - len(runs), total


def record_advantages(trainer: Any, advantages: Tensor) -> None:
    """How large the advantages are, (N,) or (N, T), and of how many completions they are zero."""
    of_completions = advantages if advantages.ndim == 1 else advantages.abs().amax(1)
    trainer.recorder.count("advantages/zero_share", int((of_completions.abs() < 1e-8).sum()), len(of_completions))
    trainer.recorder.set("advantages/abs_mean", float(of_completions.abs().mean()))


def log_sampler_gap(trainer: Any, mode: str, batch: RolloutBatch) -> None:
    """How far the trainer's log-probabilities are from the sampler's, TRL's metrics and ours.

    The batch has `old_logps` and `sampler_logps`.
    """
    assert batch.old_logps is not None and batch.sampler_logps is not None
    accelerator = trainer.accelerator
    if batch.old_logps is batch.sampler_logps:
        return
    names = {
        "abs_mean": "sampling/sampling_logp_difference/mean",
        "abs_max": "sampling/sampling_logp_difference/max",
        "k1": "sampling/k1",
        "k3": "sampling/k3",
    }
    gap = _sampler_gap(accelerator, batch.old_logps, batch.sampler_logps, batch.loss_mask)
    for name, value in gap.items():
        log(trainer, mode, names[name], value)
    if batch.sampler_weights is not None:
        weights = batch.sampler_weights
        flat = weights.flatten() if weights.size(1) == 1 else weights[batch.loss_mask.bool()]
        flat = gather_rows(accelerator, flat)
        if flat.numel():
            log(trainer, mode, "sampling/importance_sampling_ratio/min", flat.min())
            log(trainer, mode, "sampling/importance_sampling_ratio/mean", flat.mean())
            log(trainer, mode, "sampling/importance_sampling_ratio/max", flat.max())


def _sampler_gap(accelerator: Any, logps: Tensor, sampler_logps: Tensor, mask: Tensor) -> dict[str, float]:
    """`policy.sampler_gap` over the tokens of all processes, without their number."""
    pairs = gather_rows(accelerator, torch.stack([logps, sampler_logps], -1)[mask.bool()].float())
    gap = policy.sampler_gap(pairs[:, 0], pairs[:, 1], torch.ones_like(pairs[:, 0]))
    return {name: value for name, value in gap.items() if name != "n"}


def clip_ratios(
    ratio: Tensor, advantages: Tensor, epsilon_low: float, epsilon_high: float, centre: float = 1.0
) -> dict[str, Tensor]:
    """`policy.clip_fractions` under the names that `log_update` knows."""
    found = policy.clip_fractions(ratio.detach(), advantages, epsilon_low, epsilon_high, centre)
    return dict(zip(("clip_ratio/low", "clip_ratio/high", "clip_ratio/region"), found))


def with_aux_loss(trainer: Any, mode: str, loss: Tensor, aux_loss: Tensor | None, micro_batches: float) -> Tensor:
    """A loss and the load-balancing loss of a mixture of experts, if there is one."""
    if aux_loss is None:
        return loss
    log(trainer, mode, "aux_loss", trainer.accelerator.gather_for_metrics(aux_loss.detach()).mean())
    return loss + trainer.aux_loss_coef * aux_loss / micro_batches


def log_update(
    trainer: Any,
    mode: str,
    mask: Tensor,
    entropies: Tensor,
    known: Tensor,
    kl: Tensor | None,
    per_token: dict[str, Tensor],
) -> None:
    """TRL's metrics of an update: entropy, KL term, and what the objective says of each token or completion.

    Args:
        mask, entropies, kl: (n, T) of this process.
        known: (n,), whose entropies are known: of a completion that did not go through the model they may not be.
        per_token: name -> (n, T), or (n, 1) for one number a completion.
    """
    accelerator = trainer.accelerator

    def mean(values: Tensor, mask: Tensor) -> Tensor:
        sums = accelerator.reduce(torch.stack(policy.masked_mean(values, mask)), reduction="sum")
        return sums[0] / sums[1].clamp(min=1.0)

    if kl is not None:
        log(trainer, mode, "kl", mean(kl, mask))
    log(trainer, mode, "entropy", mean(entropies, mask * known.unsqueeze(1)))
    for name, values in per_token.items():
        if not name.startswith("clip_ratio/"):
            log(trainer, mode, name, mean(values, mask))
            continue
        log(trainer, mode, f"{name}_mean", mean(values, mask))
        if name == "clip_ratio/region":
            continue
        # A completion that is masked out has no share of clipped tokens.
        shares = accelerator.gather(policy.masked_mean_by_sequence(values, mask))
        shares = shares[~shares.isnan()].tolist()
        if name == "clip_ratio/low":
            log(trainer, mode, "clip_ratio/low_min", min(shares, default=math.nan))
        else:
            log(trainer, mode, "clip_ratio/high_max", max(shares, default=math.nan))


def record_update(trainer: Any, batch: RolloutBatch, logps: Tensor, mask: Tensor) -> None:
    """Hand the diagnostics how far the policy has moved from the one that sampled, over all processes, and how old that
    one is.

    Args:
        logps: (n, T) of the completions of this process that went through the model, without gradient.
        mask: (n, T), zero for the others.
    """
    recorder, accelerator = trainer.recorder, trainer.accelerator
    if batch.old_logps is not None:
        moved = gather_rows(accelerator, (logps - batch.old_logps)[mask.bool()].float())
        statistics = policy.log_ratio_statistics(moved, torch.ones_like(moved))
        names = {
            "p01": "log_ratio/p01",
            "p99": "log_ratio/p99",
            "abs_mean": "log_ratio/abs_mean",
            "ess": "ratio/ess",
            "approx_kl": "policy/approx_kl",
        }
        for statistic, name in names.items():
            if statistic in statistics:
                recorder.set(name, statistics[statistic])
    if batch.sampler_logps is not None and batch.old_logps is None:
        # On-policy, the training pass itself shows how far the sampler is off.
        for name, value in _sampler_gap(accelerator, logps, batch.sampler_logps, mask).items():
            recorder.set(f"sampling/{name}", value)
    age = gather_rows(accelerator, (trainer.state.global_step - batch.versions).float())
    recorder.set("sample/staleness_mean", float(age.mean()))
    recorder.set("sample/staleness_max", float(age.max()))


def entropy_limit(accelerator: Any, entropies: Tensor, mask: Tensor, top_quantile: float) -> Tensor:
    """The entropy from which on a token belongs to the `top_quantile` share of all processes' tokens; a scalar."""
    return policy.entropy_limit(gather_rows(accelerator, entropies[mask.bool()].float()), top_quantile)


def _gathered(trainer: Any, rows: list[list[int]]) -> Tensor:
    return trainer.accelerator.gather(torch.tensor(rows, device=trainer.accelerator.device)).cpu()
