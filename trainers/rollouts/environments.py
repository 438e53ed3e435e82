"""Environments: objects with a state, one for each conversation, whose public methods are the model's tools.

An environment is any object with a method `reset(**row)`, which begins an episode and may return text for the model. Its
other public methods are tools, sync or async. `get_reward()`, if it has one, scores the episode; `close()`, if it has one,
is called at the end. Each instance is made and used on a thread of its own, so that one that hangs holds up nothing else.
"""

import asyncio
import inspect
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset

from outspoken.trainers.calls import CallThread, CallTimeout, Pending, TooManyStuckCalls, is_async, side_by_side
from outspoken.trainers.data.formats import is_messages
from outspoken.trainers.rollouts.tools import TOOL_TIMEOUT, TOOL_WORKERS, Tool, ToolSet, tool_schema

logger = logging.getLogger(__name__)

EnvironmentFactory = Callable[[], Any]

# Methods that the trainer calls, and the model cannot.
_NO_TOOLS = ("reset", "get_reward", "close")
_EMPTY_PROMPT = [{"role": "user", "content": ""}]


@dataclass
class _Seat:
    """An instance and the thread that it lives on; neither is used again once a call hangs."""

    kind: str | None
    instance: Any
    thread: CallThread


@dataclass
class Episodes:
    """Environments that were reset for a batch, one entry per row.

    Attributes:
        environments: the instances, for reward functions.
        prompts: the rows' prompts, with what `reset` returned at the end of the last message.
        tools: what each conversation can call.
        seconds: what the run waited for `reset`.
    """

    environments: list[Any] = field(default_factory=list)
    prompts: list[Any] = field(default_factory=list)
    tools: list[ToolSet] = field(default_factory=list)
    seconds: float = 0.0


class EnvironmentPool:
    """Makes environments, as many as a batch needs, resets them for each batch, and closes them.

    Attributes:
        tools: all tools of all environments and those beside them, to tell whether there are any.
    """

    def __init__(
        self,
        factory: EnvironmentFactory | Mapping[str, EnvironmentFactory],
        tools: ToolSet | None = None,
        timeout: float | None = TOOL_TIMEOUT,
        workers: int = TOOL_WORKERS,
    ):
        """
        Args:
            factory: makes an environment; or several by name, of which a row's column `environment` picks one.
            tools: functions that every conversation can call besides.
            timeout: seconds for making, resetting, scoring and closing one, each; None: no limit, and everything happens
                in the caller's thread, one after the other.
            workers: environments that are made, reset, scored or closed at the same time.

        Raises:
            TypeError, ValueError: one is no environment, or a method cannot be described to the model.
            RuntimeError: one cannot be made.
        """
        self.by_name = isinstance(factory, Mapping)
        self._factories: dict[str | None, EnvironmentFactory] = {}
        if isinstance(factory, Mapping):
            self._factories.update(factory)
        else:
            self._factories[None] = factory
        if not self._factories:
            raise ValueError("`environment_factory` is an empty dict; give it an environment, or leave it out.")
        self.timeout = timeout
        self.workers = 1 if timeout is None else workers
        self._shared = dict(tools or {})
        self._schemas: dict[str | None, dict[str, dict[str, Any]]] = {}
        self._seats: dict[str | None, list[_Seat]] = {}
        self.tools: ToolSet = dict(self._shared)
        self._types: list[Any] = []  # classes of environments that score themselves
        for kind in self._factories:
            seat = self._make(kind)
            self._schemas[kind] = self._check(kind, seat.instance)
            self._seats[kind] = [seat]
            self.tools |= self._tools_of(seat, f"environment {_name(seat)!r}")
            own = type(seat.instance)
            if callable(getattr(own, "get_reward", None)) and own not in self._types:
                self._types.append(own)

    def _check(self, kind: str | None, instance: Any) -> dict[str, dict[str, Any]]:
        """The schemas of an environment's tools by name."""
        name = type(instance).__name__
        if not callable(getattr(type(instance), "reset", None)):
            raise TypeError(
                f"`environment_factory` made a {name}, which has no method `reset`; define `reset(self, **row)`, which "
                "begins an episode and returns text for the model, or None."
            )
        # Looked up on the class: looking at the instance would evaluate properties.
        methods = [
            method
            for method, _ in inspect.getmembers(type(instance), inspect.isfunction)
            if method not in _NO_TOOLS and not method.startswith("_")
        ]
        for method in methods:
            if method in self._shared:
                raise ValueError(f"{method!r} is both in `tools` and a method of {name}; rename one.")
        return {
            method: tool_schema(getattr(instance, method), f"method (to the model a tool) of {name},")
            for method in methods
        }

    # Episodes

    def start(self, rows: Sequence[Mapping[str, Any]]) -> Episodes:
        """Begin an episode for each row: all are reset at the same time, each with its row's columns as keywords.

        A row without a `prompt` has an empty message of the user. What `reset` returns, text or content blocks, goes to
        the end of the prompt's last message.

        Raises:
            ValueError: a row's `environment` is none of those there are, or its prompt is no conversation.
            RuntimeError: an environment could not be made, `reset` raised, or did not return in time; the message names
                environment and row.
            TypeError: `reset` returned something else.
        """
        begin = time.perf_counter()
        kinds = [self._kind(index, row) for index, row in enumerate(rows)]
        seats = self._seated(kinds)
        episodes = Episodes()
        for index, (row, seat, observation) in enumerate(zip(rows, seats, self._reset(rows, seats))):
            episodes.environments.append(seat.instance)
            episodes.prompts.append(_observed(index, seat, row.get("prompt", _EMPTY_PROMPT), observation))
            owner = f"environment {_name(seat)!r} of row {index} of the batch"
            episodes.tools.append(self._shared | self._tools_of(seat, owner))
        episodes.seconds = time.perf_counter() - begin
        return episodes

    def _reset(self, rows: Sequence[Mapping[str, Any]], seats: Sequence[_Seat]) -> list[Any]:
        def reset(index: int) -> Any:
            seat, kwargs = seats[index], dict(rows[index])
            if self.by_name:
                kwargs.pop("environment", None)
            if not _accepts(seat.instance.reset, _SEED):
                kwargs.pop(_SEED, None)
            what = f"The reset of environment {_name(seat)!r} for row {index} of the batch"
            return _result(what, seat.instance.reset, kwargs, self.timeout, seat.thread)

        return side_by_side(reset, range(len(rows)), self.workers)

    def _kind(self, index: int, row: Mapping[str, Any]) -> str | None:
        kind = row.get("environment") if self.by_name else None
        if kind not in self._factories:
            raise ValueError(
                f"'environment' of row {index} of the batch is {kind!r}; it has to be one of those in "
                f"`environment_factory`: {', '.join(map(str, self._factories))}."
            )
        return kind

    def _seated(self, kinds: Sequence[str | None]) -> list[_Seat]:
        """An environment for each row: the first of its kind that is free. Those that hang are replaced."""
        given: dict[str | None, int] = dict.fromkeys(self._factories, 0)
        places = []
        for kind in kinds:
            places.append((kind, given[kind]))
            given[kind] += 1
        hanging = [
            (kind, place)
            for kind, needed in given.items()
            for place, seat in enumerate(self._seats[kind][:needed])
            if seat.thread.stuck
        ]
        missing = [(kind, None) for kind, needed in given.items() for _ in range(needed - len(self._seats[kind]))]
        wanted: list[tuple[str | None, int | None]] = [*hanging, *missing]
        made = side_by_side(self._make, [kind for kind, _ in wanted], self.workers)
        for (kind, place), seat in zip(wanted, made):
            if place is None:
                self._seats[kind].append(seat)
            else:
                self._seats[kind][place] = seat
        return [self._seats[kind][place] for kind, place in places]

    def _make(self, kind: str | None) -> _Seat:
        named = "" if kind is None else f" {kind!r}"
        thread = CallThread(f"environment{named}")
        what = f"Making an environment{named} with `environment_factory`"
        return _Seat(kind, _result(what, self._factories[kind], {}, self.timeout, thread), thread)

    def _tools_of(self, seat: _Seat, owner: str) -> ToolSet:
        return {
            name: Tool(name, getattr(seat.instance, name), schema, seat.thread, owner)
            for name, schema in self._schemas[seat.kind].items()
        }

    # Rewards

    def reward_functions(self) -> dict[str, Callable[..., Any]]:
        """One reward function for each class of environments with `get_reward`, under the name of the class.

        It scores conversations whose environment is of exactly that class; others are not scorable (None), and so is
        one whose environment hangs.
        """
        functions: dict[str, Callable[..., Any]] = {}
        for kind in self._types:
            name, number = kind.__name__, 2
            while name in functions:
                name, number = f"{kind.__name__}_{number}", number + 1
            functions[name] = self._reward_function(kind)
            functions[name].__name__ = name
        return functions

    def _reward_function(self, kind: Any) -> Callable[..., Any]:
        async def score_async(environments: Sequence[Any], **_: Any) -> list[float | None]:
            async def score(environment: Any) -> float | None:
                return await environment.get_reward() if type(environment) is kind else None

            return list(await asyncio.gather(*map(score, environments)))

        def score_all(environments: Sequence[Any], **_: Any) -> list[float | None]:
            threads = {id(seat.instance): seat.thread for seats in self._seats.values() for seat in seats}

            def score(index: int) -> float | None:
                environment = environments[index]
                thread = threads.get(id(environment))
                if type(environment) is not kind or (thread is not None and thread.stuck):
                    return None
                what = f"The get_reward of environment {kind.__name__!r} for row {index} of the batch"
                try:
                    return Pending(what, environment.get_reward, {}, self.timeout, thread).result()
                except CallTimeout as error:
                    logger.warning(f"{error}; the conversation counts as not scorable.")
                    return None

            return side_by_side(score, range(len(environments)), self.workers)

        return score_async if is_async(kind.get_reward) else score_all

    # The end

    def close(self) -> None:
        """Close all environments that have a `close`, and end their threads. Failures are logged."""
        seats = [seat for several in self._seats.values() for seat in several if not seat.thread.stuck]
        self._seats = {kind: [] for kind in self._factories}

        def close(seat: _Seat) -> None:
            what = f"The close of environment {_name(seat)!r}"
            try:
                Pending(what, seat.instance.close, {}, self.timeout, seat.thread).result()
            except Exception as error:
                logger.warning(f"{what} failed ({type(error).__name__}: {error}).")

        closable = [seat for seat in seats if callable(getattr(type(seat.instance), "close", None))]
        side_by_side(close, closable, self.workers)
        for seat in seats:
            seat.thread.stop()


def _name(seat: _Seat) -> str:
    return type(seat.instance).__name__ if seat.kind is None else seat.kind


def _result(
    what: str, function: Callable[..., Any], kwargs: dict[str, Any], timeout: float | None, thread: CallThread
) -> Any:
    """What a call of an environment's code returns; `what` it is stands in the error if it fails."""
    try:
        return Pending(what, function, kwargs, timeout, thread).result()
    except CallTimeout as error:
        raise RuntimeError(f"{error}; find out what it waits for, or raise the time limit.") from None
    except TooManyStuckCalls:
        raise
    except Exception as error:
        raise RuntimeError(f"{what} raised {type(error).__name__}: {error}; fix the environment.") from error


def _observed(index: int, seat: _Seat, prompt: Any, observation: Any) -> list[dict[str, Any]]:
    """The prompt with what `reset` returned behind the content of its last message."""
    if not is_messages(prompt):
        raise ValueError(
            f"The prompt of row {index} of the batch is a {type(prompt).__name__}, but environments need conversations: "
            "make it a list of messages with role and content."
        )
    if observation is None:
        return prompt
    if not isinstance(observation, (str, list)):
        raise TypeError(
            f"The reset of environment {_name(seat)!r} returned a {type(observation).__name__} for row {index} of the batch; "
            "return text for the model, a list of content blocks, or None."
        )
    content = prompt[-1].get("content") or ""
    if isinstance(content, list) or isinstance(observation, list):
        content, observation = (
            [{"type": "text", "text": part}] if isinstance(part, str) else part for part in (content, observation)
        )
    return [*prompt[:-1], {**prompt[-1], "content": content + observation}]


# Training without a dataset

_SEED = "seed"


def environment_dataset(prompts: int) -> Dataset:
    """Rows for an environment that brings its own tasks: an empty prompt, and a `seed` of the row's own.

    All completions of a group have the same seed, and `reset(seed=...)` gets it if it takes it: completions can only be
    compared if they begin with the same task.

    Args:
        prompts: how many rows: prompts of a generation batch times generation batches, so that none comes twice.
    """
    return Dataset.from_dict({"prompt": [_EMPTY_PROMPT] * prompts, _SEED: list(range(prompts))})


def _accepts(function: Callable[..., Any], name: str) -> bool:
    parameters = inspect.signature(function).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
