"""Reward functions: how they are called, and ready-made ones.

A reward function takes `prompts`, `completions` and `completion_ids`, every further column of the dataset, and
`trainer_state`, `log_extra(column, values)`, `log_metric(name, value)` and, where there are some, `environments`, all by
keyword, and returns one number per completion, or None for a completion it does not apply to. It may be `async`.
"""

from typing import TYPE_CHECKING, Any

from outspoken.trainers.calls import is_async
from outspoken.trainers.rewards.calling import (
    CallPolicy,
    RewardCalls,
    RewardFunction,
    callable_name,
    checked_rewards,
)
from outspoken.trainers.rewards.judge import HTTPJudge
from outspoken.trainers.rewards.ready_made import (
    accuracy_reward,
    completion_text,
    exact_match_reward,
    get_cosine_scaled_reward,
    get_exact_match_reward,
    get_format_reward,
    get_length_reward,
    get_repetition_penalty_reward,
    get_soft_overlong_punishment,
    reasoning_accuracy_reward,
    think_format_reward,
)

if TYPE_CHECKING:
    from outspoken.trainers.rewards.reward_set import RewardFunc, RewardSet

__all__ = [
    "CallPolicy",
    "HTTPJudge",
    "RewardCalls",
    "RewardFunc",
    "RewardFunction",
    "RewardSet",
    "accuracy_reward",
    "callable_name",
    "checked_rewards",
    "completion_text",
    "exact_match_reward",
    "get_cosine_scaled_reward",
    "get_exact_match_reward",
    "get_format_reward",
    "get_length_reward",
    "get_repetition_penalty_reward",
    "get_soft_overlong_punishment",
    "is_async",
    "reasoning_accuracy_reward",
    "think_format_reward",
]


def __getattr__(name: str) -> Any:
    if name in ("RewardFunc", "RewardSet"):  # they load torch, the functions do not
        from outspoken.trainers.rewards import reward_set

        return getattr(reward_set, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
