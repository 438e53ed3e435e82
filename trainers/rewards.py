"""Reward functions: how they are called, and a few ready-made ones.

A reward function takes `prompts`, `completions` and `completion_ids`, every further column of the dataset, and
`trainer_state`, `log_extra` and `log_metric`, all by keyword, and returns one number per completion, or None for a
completion it does not apply to. It may be `async`.
"""

import asyncio
import functools
import inspect
import math
import re
import threading
from collections.abc import Callable, Sequence
from typing import Any

RewardFunction = Callable[..., Any]


def callable_name(function: RewardFunction) -> str:
    """The name a reward function is logged under: its `__name__`, through `functools.partial`, or its class."""
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)


def is_async(function: RewardFunction) -> bool:
    """Whether calling the function gives a coroutine, for functions, partials and objects with an async `__call__`."""
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def checked_rewards(name: str, returned: Any, count: int) -> list[float]:
    """What a reward function returned as `count` floats, with NaN for None.

    Raises:
        ValueError: it is not a sequence of `count` finite numbers or None.
    """
    try:
        values = list(returned)
    except TypeError:
        raise ValueError(
            f"Reward function {name!r} returned {type(returned).__name__}; return a list with one number (or None) per "
            f"completion, here {count}."
        ) from None
    if len(values) != count:
        raise ValueError(
            f"Reward function {name!r} returned {len(values)} rewards for {count} completions; return exactly one "
            "number (or None) per completion."
        )
    rewards = []
    for index, value in enumerate(values):
        try:
            reward = math.nan if value is None else float(value)
        except (TypeError, ValueError):
            raise ValueError(
                f"Reward function {name!r} returned {value!r} for completion {index}; return a number, or None for a "
                "completion it does not apply to."
            ) from None
        if value is not None and not math.isfinite(reward):
            raise ValueError(
                f"Reward function {name!r} returned {reward} for completion {index}; return a finite number, or None "
                "for a completion it cannot score."
            )
        rewards.append(reward)
    return rewards


def call_reward_functions(functions: dict[str, RewardFunction], count: int, **inputs: Any) -> dict[str, list[float]]:
    """Call every function with the same inputs and return name -> `count` rewards, NaN where one gave None.

    Async functions run concurrently with each other, after the others, on one event loop that lives as long as the
    process, so clients they keep between calls stay valid.

    Raises:
        ValueError: a function returned something else than `count` numbers; see `checked_rewards`.
        RuntimeError: a function raised; the message names it, and the exception it raised is the cause.
    """
    returned: dict[str, Any] = {}
    for name, function in functions.items():
        if not is_async(function):
            try:
                returned[name] = function(**inputs)
            except Exception as error:
                raise _failed(name, error) from error

    async def call(name: str, function: RewardFunction) -> None:
        try:
            returned[name] = await function(**inputs)
        except Exception as error:
            raise _failed(name, error) from error

    async def call_all() -> None:
        await asyncio.gather(*(call(name, function) for name, function in waiting.items()))

    waiting = {name: function for name, function in functions.items() if is_async(function)}
    if waiting:
        asyncio.run_coroutine_threadsafe(call_all(), _event_loop()).result()
    return {name: checked_rewards(name, returned[name], count) for name in functions}


def _failed(name: str, error: Exception) -> RuntimeError:
    return RuntimeError(
        f"Reward function {name!r} raised {type(error).__name__}: {error}. Fix it, or return None for completions that "
        "it cannot score."
    )


@functools.cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """An event loop on a daemon thread: also usable where the caller's thread runs a loop already (notebooks)."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="outspoken-rewards", daemon=True).start()
    return loop


# Ready-made reward functions


def completion_text(completion: str | Sequence[dict[str, Any]]) -> str:
    """The text of a completion in either format: a string, or messages, of which the last one counts."""
    if isinstance(completion, str):
        return completion
    content = completion[-1]["content"] if completion else ""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content or [])


def exact_match_reward(
    completions: Sequence[Any], answer: Sequence[Any] | None = None, **_: Any
) -> list[float | None]:
    """1 where the completion equals the dataset column `answer` up to surrounding white space, else 0.

    None where the row has no answer.

    Raises:
        ValueError: the dataset has no column `answer`.
    """
    if answer is None:
        raise ValueError("exact_match_reward needs a dataset column 'answer' with the expected completion")
    return [
        None if expected is None else float(completion_text(completion).strip() == str(expected).strip())
        for completion, expected in zip(completions, answer)
    ]


_THINK_FORMAT = re.compile(r"<think>(?:(?!<think>).)*</think>(?:(?!<think>).)*", re.DOTALL)


def think_format_reward(completions: Sequence[Any], **_: Any) -> list[float]:
    """1 where the completion opens with one `<think>…</think>` block, else 0 (the format reward of arXiv 2501.12948)."""
    return [float(_THINK_FORMAT.fullmatch(completion_text(completion)) is not None) for completion in completions]


class _SoftOverlongPunishment:
    # A class and not a closure, so that it can be pickled and sent to other processes.
    __name__ = "soft_overlong_punishment"

    def __init__(self, max_completion_len: int, soft_punish_cache: int):
        self.max_completion_len = max_completion_len
        self.soft_punish_cache = soft_punish_cache

    def __call__(self, completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        free = self.max_completion_len - self.soft_punish_cache
        return [self._punish(len(ids), free) for ids in completion_ids]

    def _punish(self, length: int, free: int) -> float:
        if length <= free:
            return 0.0
        if length <= self.max_completion_len:
            return (free - length) / self.soft_punish_cache
        return -1.0


def get_soft_overlong_punishment(max_completion_len: int, soft_punish_cache: int) -> RewardFunction:
    """A reward function that punishes length before the cap does (DAPO, arXiv 2503.14476, eq. 13).

    With L = `max_completion_len` and C = `soft_punish_cache`, in tokens: 0 up to length L - C, then falling linearly to
    -1 at L, and -1 beyond.

    Raises:
        ValueError: unless 0 <= C <= L.
    """
    if not 0 <= soft_punish_cache <= max_completion_len:
        raise ValueError(
            f"soft_punish_cache is {soft_punish_cache}; choose it between 0 and max_completion_len, here "
            f"{max_completion_len}."
        )
    return _SoftOverlongPunishment(max_completion_len, soft_punish_cache)
