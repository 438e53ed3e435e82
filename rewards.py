"""The ready-made reward functions under the name they have in TRL: `from outspoken.rewards import accuracy_reward`."""

from outspoken.trainers.rewards import (
    HTTPJudge,
    accuracy_reward,
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

__all__ = [
    "HTTPJudge",
    "accuracy_reward",
    "exact_match_reward",
    "get_cosine_scaled_reward",
    "get_exact_match_reward",
    "get_format_reward",
    "get_length_reward",
    "get_repetition_penalty_reward",
    "get_soft_overlong_punishment",
    "reasoning_accuracy_reward",
    "think_format_reward",
]
