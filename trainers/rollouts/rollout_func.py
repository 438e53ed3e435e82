"""Rollouts by a function of the user's own: `rollout_func(prompts, trainer)`."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

REQUIRED_KEYS = ("prompt_ids", "completion_ids", "logprobs")


@dataclass
class CustomRollout:
    """What a `rollout_func` returned, one entry per prompt.

    Attributes:
        logps: log-probability of each completion token; None if the function has none.
        tool_mask: 1 on the model's tokens, 0 on an environment's; None: all 1.
        extra: columns for reward functions, one value per completion.
    """

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    logps: list[list[float]] | None = None
    tool_mask: list[list[int]] | None = None
    extra: dict[str, list[Any]] = field(default_factory=dict)


def call_rollout_func(
    function: Callable[[list[Any], Any], Mapping[str, Any]], prompts: Sequence[Any], trainer: Any
) -> CustomRollout:
    """Call `rollout_func(prompts, trainer)` and check what it returns.

    It gets this process's prompts, each as often as it is to be completed (a group's copies stand together), and returns
    a dict with one entry per prompt in `prompt_ids`, `completion_ids` and `logprobs` (which may be None as a whole; a
    number in it may be None or in a list of one). `env_mask` has 0 where a completion's token is not the model's. A list
    under any other key is a column for reward functions; anything else there is the same for all completions.

    Raises:
        RuntimeError: the function raised.
        TypeError, ValueError: it returned something else; the message names the key and the row.
    """
    count = len(prompts)
    try:
        output = function(list(prompts), trainer)
    except Exception as error:
        raise RuntimeError(f"rollout_func raised {type(error).__name__}: {error}.") from error
    if not isinstance(output, Mapping):
        raise TypeError(
            f"rollout_func returned a {type(output).__name__}; return a dict with {', '.join(REQUIRED_KEYS)}."
        )
    missing = [key for key in REQUIRED_KEYS if key not in output]
    if missing:
        raise ValueError(f"rollout_func returned no {missing[0]!r}; return a dict with {', '.join(REQUIRED_KEYS)}.")
    rows = {key: _rows(output[key], key, count) for key in ("prompt_ids", "completion_ids")}
    ids = {key: [_ids(row, key, index) for index, row in enumerate(several)] for key, several in rows.items()}
    completions = ids["completion_ids"]

    logps = None
    if output["logprobs"] is not None:
        logps = [
            [_logp(value, index) for value in _as_long(row, "logprobs", index, completions[index])]
            for index, row in enumerate(_rows(output["logprobs"], "logprobs", count))
        ]
    mask = None
    if output.get("env_mask") is not None:
        mask = [
            [_bit(value, index) for value in _as_long(row, "env_mask", index, completions[index])]
            for index, row in enumerate(_rows(output["env_mask"], "env_mask", count))
        ]
    extra = {
        key: list(_rows(value, key, count)) if isinstance(value, list) else [value] * count
        for key, value in output.items()
        if key not in (*REQUIRED_KEYS, "env_mask", "logprob_token_ids")
    }
    return CustomRollout(ids["prompt_ids"], completions, logps, mask, extra)


def _plain(value: Any) -> Any:
    """Lists for arrays and tensors."""
    return value.tolist() if hasattr(value, "tolist") else value


def _rows(value: Any, key: str, count: int) -> list[Any]:
    value = _plain(value)
    if not isinstance(value, (list, tuple)):
        raise TypeError(
            f"rollout_func returned a {type(value).__name__} as {key!r}; return a list with one entry per prompt."
        )
    if len(value) != count:
        raise ValueError(
            f"rollout_func returned {len(value)} entries in {key!r} for {count} prompts; return one for each (prompts "
            "that are to be completed several times come several times)."
        )
    return list(value)


def _ids(row: Any, key: str, index: int) -> list[int]:
    row = _plain(row)
    if not isinstance(row, (list, tuple)) or not all(isinstance(i, int) and not isinstance(i, bool) for i in row):
        raise TypeError(
            f"rollout_func returned {str(row)[:80]!r} in row {index} of {key!r}; return a list of token ids."
        )
    if not row:
        raise ValueError(f"rollout_func returned no tokens in row {index} of {key!r}; return at least one.")
    if min(row) < 0:
        raise ValueError(
            f"rollout_func returned the token {min(row)} in row {index} of {key!r}; token ids are from 0."
        )
    return list(row)


def _as_long(row: Any, key: str, index: int, ids: Sequence[int]) -> list[Any]:
    row = _plain(row)
    if not isinstance(row, (list, tuple)):
        raise TypeError(
            f"rollout_func returned a {type(row).__name__} in row {index} of {key!r}; return a list with one number per "
            "token of the completion."
        )
    if len(row) != len(ids):
        raise ValueError(
            f"rollout_func returned {len(row)} numbers in row {index} of {key!r} for a completion of {len(ids)} tokens; "
            "return one for each."
        )
    return list(row)


def _logp(value: Any, index: int) -> float:
    value = value[0] if isinstance(value, (list, tuple)) and value else value
    if value is None:  # vLLM's word for NaN
        return math.nan
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value > 1e-3 or value == -math.inf:
        raise ValueError(
            f"rollout_func returned {value!r} in row {index} of 'logprobs'; return log-probabilities: finite numbers "
            "up to 0, or None where one is not known."
        )
    return float(value)


def _bit(value: Any, index: int) -> int:
    if value not in (0, 1):
        raise ValueError(
            f"rollout_func returned {value!r} in row {index} of 'env_mask'; return 1 for the model's tokens and 0 for "
            "others."
        )
    return int(value)
