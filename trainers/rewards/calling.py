"""How reward functions are called: in time, apart from each other, and with one clear sentence when they fail."""

import asyncio
import concurrent.futures
import functools
import inspect
import itertools
import logging
import math
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

from outspoken.diagnostics.sinks import escaped
from outspoken.trainers.calls import CallThread, CallTimeout, awaited, event_loop, is_async, replace_if_blocked

logger = logging.getLogger(__name__)

RewardFunction = Callable[..., Any]

RETRY_WAIT = 0.5  # seconds before the first repetition of a call; doubled for each further one, up to 8 s
LOOP_GRACE = 2.0  # seconds beyond its budget after which an async call is held to block its event loop
MAX_STUCK = 8  # calls of one function that may hang at the same time, a thread each
WARN_EVERY = 100  # a failure that does not end the run is told of the first and then every so many times
SHOWN = 80  # characters of a completion that an error shows
LARGEST = (2 - 2**-23) * 2.0**127  # of float32, in which rewards are kept


@dataclass(frozen=True)
class CallPolicy:
    """How long a reward function may take, and what happens when it fails.

    Attributes:
        timeout: seconds that a call of one function on one batch may take; None: as long as it takes.
        max_retries: how often a call that raised or ran out of time is repeated.
        on_error: when it fails for good, "raise", or "none": go on as if the function did not apply to the batch.
    """

    timeout: float | None = None
    max_retries: int = 0
    on_error: str = "raise"

    @classmethod
    def of(cls, args: Any) -> "CallPolicy":
        """As a trainer's config says it, where it says anything."""
        return cls(
            timeout=getattr(args, "reward_timeout", None),
            max_retries=getattr(args, "reward_max_retries", 0),
            on_error=getattr(args, "reward_on_error", "raise"),
        )

    @property
    def budget(self) -> float | None:
        """Seconds that all attempts and the pauses between them take at most."""
        if self.timeout is None:
            return None
        return self.timeout * (self.max_retries + 1) + sum(_pause(i) for i in range(1, self.max_retries + 1))


class WrongReturn(ValueError):
    """A reward function returned something else than a sequence of one entry per completion: no repetition helps."""


def callable_name(function: RewardFunction) -> str:
    """The name a reward function is logged under: its `__name__`, through `functools.partial`, or its class."""
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)


# ---------------------------------------------------------------------- what may be returned


def checked_rewards(
    name: str,
    returned: Any,
    count: int,
    completions: Sequence[Any] | None = None,
    problem: Callable[[str], None] | None = None,
) -> list[float]:
    """What a reward function returned as `count` floats, with NaN for None.

    Lists, tuples, generators, arrays and tensors (on any device, with or without gradient) of numbers or booleans are
    taken, and a column of shape (count, 1).

    Args:
        completions: for the messages, which show the beginning of the completion in question.
        problem: called with the sentence about an entry that is no finite number, which then is NaN; without it the
            sentence is raised.

    Raises:
        WrongReturn: it is no sequence, or not of `count` entries.
        ValueError: an entry is neither None nor a finite number.
    """
    rewards = []
    for index, value in enumerate(_entries(name, returned, count)):
        reward, wrong = _number(value)
        if wrong is not None:
            said = (
                f"Reward function {name!r} returned {wrong} for {completion_at(index, completions)}; return a "
                f"{'finite ' if wrong in ('nan', 'inf', '-inf') else ''}number, or None for a completion it cannot "
                "score."
            )
            if problem is None:
                raise ValueError(said)
            problem(said)
        rewards.append(reward)
    return rewards


def _entries(name: str, returned: Any, count: int) -> list[Any]:
    """The `count` entries of what a reward function returned, as a list."""

    def wrong(what: str) -> WrongReturn:
        return WrongReturn(
            f"Reward function {name!r} returned {what}; return a list with one number (or None) per completion, here "
            f"{count}."
        )

    if inspect.isawaitable(returned):
        if inspect.iscoroutine(returned):
            returned.close()  # or Python warns that it was never awaited
        raise wrong("something to be awaited, but is not declared with `async def`")
    if isinstance(returned, (str, bytes, Mapping, Set)):
        raise wrong(f"a {type(returned).__name__}")
    if hasattr(returned, "detach"):
        returned = returned.detach().cpu()
    dimensions = getattr(returned, "ndim", None)
    if dimensions is not None:  # an array, tensor or series
        shape = tuple(returned.shape)
        if dimensions != 1 and shape != (count, 1):
            raise wrong(f"a {type(returned).__name__} of shape {shape}")
        returned = returned.reshape(-1).tolist() if dimensions == 2 else returned.tolist()
    try:
        iterator = iter(returned)
    except TypeError:
        raise wrong(type(returned).__name__) from None
    values = list(returned) if hasattr(returned, "__len__") else list(itertools.islice(iterator, count + 1))
    if len(values) != count:
        number = f"{len(values)}" if hasattr(returned, "__len__") or len(values) < count else f"more than {count}"
        raise WrongReturn(
            f"Reward function {name!r} returned {number} rewards for {count} completions; return exactly one "
            "number (or None) per completion."
        )
    return values


def _number(value: Any) -> tuple[float, str | None]:
    """An entry as a float, NaN for None; and if it is neither, what it is."""
    if value is None:
        return math.nan, None
    try:
        if isinstance(value, (str, bytes)):
            raise TypeError
        if hasattr(value, "detach"):
            value = value.detach().cpu()
        if getattr(value, "ndim", 0) and math.prod(value.shape) == 1:
            value = value.reshape(()).tolist()
        number = float(value)
    except OverflowError:
        return math.nan, "a number too large for float32"
    except (TypeError, ValueError, RuntimeError):
        return math.nan, escaped(repr(value), SHOWN)
    if not math.isfinite(number):
        return math.nan, str(number)
    if abs(number) > LARGEST:
        return math.nan, f"{number}, too large for float32,"
    return number, None


def completion_at(index: int, completions: Sequence[Any] | None) -> str:
    """`completion 3 ('The answer…')`: its number and its beginning, on one line, without control characters."""
    if completions is None or index >= len(completions):
        return f"completion {index}"
    completion = completions[index]
    if not isinstance(completion, str):
        completion = (completion[-1].get("content") or "") if completion else ""
    return f"completion {index} ('{escaped(completion, SHOWN)}')"


# ---------------------------------------------------------------------- one call


@dataclass
class _Attempt:
    """What one call sees: lists of its own, and logs that count only if it comes back."""

    inputs: dict[str, Any]
    logged: list[tuple[str, tuple[Any, ...]]] = field(default_factory=list)

    @classmethod
    def of(cls, inputs: Mapping[str, Any]) -> "_Attempt":
        attempt = cls({name: _copied(value) for name, value in inputs.items()})

        def log_extra(column: str, values: Any) -> None:
            attempt.logged.append(("log_extra", (column, list(values) if isinstance(values, Iterable) else [values])))

        def log_metric(name: str, value: Any) -> None:
            attempt.logged.append(("log_metric", (name, value)))

        for log in (log_extra, log_metric):
            if inputs.get(log.__name__) is not None:
                attempt.inputs[log.__name__] = log
        return attempt


def _copied(value: Any) -> Any:
    """Lists and mappings anew, what they hold as it is: a function that changes its inputs changes them for itself."""
    if type(value) is list:
        # Most lists hold token ids.
        return value[:] if value and type(value[0]) is int else [_copied(held) for held in value]
    if type(value) is dict:
        return {key: _copied(held) for key, held in value.items()}
    return value


class RewardCalls:
    """Calls reward functions and remembers how they behave.

    Args:
        functions: by name.

    Attributes:
        failures: name -> calls or single rewards that failed for good and were left out (`on_error="none"`).
        seconds: name -> how long its last call took, repetitions included.
    """

    def __init__(self, functions: dict[str, RewardFunction]):
        self.functions = functions
        self.failures: Counter[str] = Counter()
        self.seconds: dict[str, float] = {}
        self._stuck: dict[str, list[CallThread]] = {name: [] for name in functions}
        self._told: set[tuple[str, str]] = set()

    def __call__(self, count: int, inputs: Mapping[str, Any], policy: CallPolicy) -> dict[str, list[float]]:
        """Call every function with the same inputs: name -> `count` rewards, NaN where one gave None or failed.

        Async functions run at the same time as each other and as the others, on one event loop that lives as long as
        the process, so clients they keep between calls stay valid. The others run one after the other: on the caller's
        thread, or with a timeout on one of their own. Each call gets copies of the lists in `inputs`; what it hands to
        `log_extra` and `log_metric` is passed on when it has come back.

        Raises:
            WrongReturn, ValueError: see `checked_rewards`.
            RuntimeError: a function raised or ran out of time, as often as it was tried; the message names it and, as
                far as the traceback tells, the completion, and the exception it raised is the cause.
        """
        futures: dict[str, concurrent.futures.Future] = {}
        outcomes: dict[str, tuple[_Attempt, list[Any]] | Exception] = {}
        started = time.monotonic()
        try:
            for name, function in self.functions.items():
                if is_async(function):
                    call = self._call_async(name, function, count, inputs, policy)
                    futures[name] = asyncio.run_coroutine_threadsafe(call, event_loop())
            for name, function in self.functions.items():
                if name not in futures:
                    outcomes[name] = self._call_sync(name, function, count, inputs, policy)
                    if isinstance(outcomes[name], Exception) and policy.on_error == "raise":
                        raise self._failed(name, outcomes[name], inputs, policy)
            outcomes |= self._collect(futures, started, policy)
        finally:
            for future in futures.values():
                future.cancel()
        return {name: self._rewards(name, outcomes[name], count, inputs, policy) for name in self.functions}

    def _rewards(self, name: str, outcome: Any, count: int, inputs: Mapping[str, Any], policy: CallPolicy) -> list:
        if isinstance(outcome, Exception):
            error = self._failed(name, outcome, inputs, policy)
            if policy.on_error == "raise":
                raise error
            self._left_out(name, f"{error}", f"its rewards for {count} completions are left out")
            return [math.nan] * count
        attempt, values = outcome
        self._pass_on(name, attempt, count, inputs)
        leave_out = functools.partial(self._left_out, name, what="this reward is left out")
        problem = leave_out if policy.on_error == "none" else None
        return checked_rewards(name, values, count, inputs.get("completions"), problem)

    def _call_sync(
        self, name: str, function: RewardFunction, count: int, inputs: Mapping[str, Any], policy: CallPolicy
    ) -> tuple[_Attempt, list[Any]] | Exception:
        started = time.monotonic()
        for number in range(policy.max_retries + 1):
            if number:
                time.sleep(_pause(number))
            attempt = _Attempt.of(inputs)
            # A generator does its work while it is read, so that belongs to the call.
            call = functools.partial(_call_and_read, name, function, count, attempt.inputs)
            try:
                values = call() if policy.timeout is None else self._on_a_thread(name, call, policy.timeout)
                self.seconds[name] = time.monotonic() - started
                return attempt, values
            except WrongReturn:
                raise
            except Exception as error:
                failure = error
        self.seconds[name] = time.monotonic() - started
        return failure

    def _on_a_thread(self, name: str, call: Callable[[], Any], timeout: float) -> Any:
        """Run the call on a thread that can be left behind: no Python code can be stopped from outside."""
        stuck = self._stuck[name] = [thread for thread in self._stuck[name] if thread.is_alive()]
        if len(stuck) >= MAX_STUCK:
            raise CallTimeout(f"{len(stuck)} earlier calls still hang, so it is not called again")
        thread = CallThread(f"reward-{name}")
        future = thread.submit(call)
        thread.stop()
        concurrent.futures.wait([future], timeout)
        if not future.done():
            stuck.append(thread)
            raise CallTimeout
        return future.result()

    async def _call_async(
        self, name: str, function: RewardFunction, count: int, inputs: Mapping[str, Any], policy: CallPolicy
    ) -> tuple[_Attempt, list[Any]] | Exception:
        started = time.monotonic()
        for number in range(policy.max_retries + 1):
            if number:
                await asyncio.sleep(_pause(number))
            attempt = _Attempt.of(inputs)

            async def call(own: dict[str, Any] = attempt.inputs) -> list[Any]:
                return _entries(name, await function(**own), count)

            try:
                values = await awaited(call, {}, policy.timeout)
                self.seconds[name] = time.monotonic() - started
                return attempt, values
            except WrongReturn:
                raise
            except Exception as error:
                failure = error
        self.seconds[name] = time.monotonic() - started
        return failure

    def _collect(
        self, futures: dict[str, concurrent.futures.Future], started: float, policy: CallPolicy
    ) -> dict[str, tuple[_Attempt, list[Any]] | Exception]:
        """Wait for the async functions; for those whose event loop does not come back, in vain."""
        limit = None if policy.budget is None else started + policy.budget + LOOP_GRACE - time.monotonic()
        _, running = concurrent.futures.wait(futures.values(), limit if limit is None else max(limit, 0.0))
        if running:
            replace_if_blocked(event_loop())
        return {
            name: CallTimeout("it blocks the event loop: `await` what takes long")
            if future in running
            else future.result()
            for name, future in futures.items()
        }

    def _pass_on(self, name: str, attempt: _Attempt, count: int, inputs: Mapping[str, Any]) -> None:
        """Hand over what the function logged. A slip in a log must not end a run."""
        for log, args in attempt.logged:
            if log == "log_extra":
                column, values = args
                if len(values) != count:
                    if (name, column) not in self._told:
                        self._told.add((name, column))
                        logger.warning(
                            f"Reward function {name!r} logged {len(values)} values in the column {column!r} for {count} "
                            "completions; they are left out, since a column has one value per completion."
                        )
                    continue
            inputs[log](*args)

    def _failed(self, name: str, error: Any, inputs: Mapping[str, Any], policy: CallPolicy) -> RuntimeError:
        """The sentence about a function that raised or did not come back, caused by what it raised."""
        tried = f", tried {policy.max_retries + 1} times" if policy.max_retries else ""
        if isinstance(error, CallTimeout):
            why = f" ({error})" if str(error) else ""
            return RuntimeError(
                f"Reward function {name!r} did not return within reward_timeout={policy.timeout:g} seconds{tried}{why}; "
                "make it faster, raise reward_timeout, or set reward_on_error='none' to go on without its rewards."
            )
        index = _completion_in(error, inputs.get("completions") or [])
        at = "" if index is None else f" at {completion_at(index, inputs['completions'])}"
        told = RuntimeError(
            f"Reward function {name!r} raised {type(error).__name__}: {escaped(error, 300)}{at}{tried}; fix it, or return "
            "None for completions that it cannot score."
        )
        told.__cause__ = error
        return told

    def _left_out(self, name: str, why: str, what: str) -> None:
        number = self.failures[name]
        self.failures[name] += 1
        if number % WARN_EVERY == 0:
            times = f" ({number + 1} times so far; told every {WARN_EVERY})" if number else ""
            logger.warning(f"{why} Since reward_on_error is 'none', {what}{times}.")


def _call_and_read(name: str, function: RewardFunction, count: int, inputs: dict[str, Any]) -> list[Any]:
    return _entries(name, function(**inputs), count)


def _pause(number: int) -> float:
    """Seconds before repetition `number`, which counts from 1."""
    return min(RETRY_WAIT * 2 ** (number - 1), 8.0)


def _completion_in(error: BaseException, completions: Sequence[Any]) -> int | None:
    """The index of the completion that a function had at hand when it raised, as far as its local variables tell."""
    index_of: dict[int, int] = {}
    for index, completion in enumerate(completions):
        for text in _texts(completion):
            if isinstance(text, str) and len(text) > 1:  # Python has single characters only once
                index_of.setdefault(id(text), index)
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    for frame in reversed(frames):
        for value in list(frame.f_locals.values()):
            # Lists and messages are the call's own copies, but the strings in them are the same.
            found = {index_of[id(text)] for text in _texts(value) if id(text) in index_of}
            if len(found) == 1:
                return found.pop()
    return None


def _texts(value: Any) -> list[Any]:
    """A completion's texts: itself, or the contents of its messages."""
    if isinstance(value, str):
        return [value]
    messages = value if isinstance(value, list) else [value]
    return [message.get("content") for message in messages if isinstance(message, dict)]
