"""Calls of other people's code, each bounded in time: reward functions, tools, environments.

A Python thread cannot be stopped from outside. So a call runs on a daemon thread, is waited for no longer than its limit,
and is left behind if it takes longer: the run goes on, and the process can end. How many may be left behind is limited.
Async functions run on one event loop that lives as long as the process.
"""

import asyncio
import concurrent.futures
import contextvars
import functools
import inspect
import logging
import queue
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")

# Threads left behind that still run; beyond that something is broken, and training on would only hide it.
MAX_STUCK_THREADS = 128

_stuck: list["CallThread"] = []
_stuck_lock = threading.Lock()


class CallTimeout(Exception):
    """A call did not return within its limit."""


class TooManyStuckCalls(RuntimeError):
    """More calls than `MAX_STUCK_THREADS` were left behind and still run."""


# ---------------------------------------------------------------------- threads


class CallThread(threading.Thread):
    """A daemon thread that makes the calls it is given one after the other; it starts with the first.

    What has to be used from one thread only (an SQLite connection, a browser) can be made and used by calls of one
    `CallThread`. It begins with the context variables and the CUDA device of the thread that gives it its first call.

    Attributes:
        stuck: whether a call was left behind; later calls are refused with `CallTimeout`.
    """

    def __init__(self, name: str):
        super().__init__(name=name, daemon=True)
        self.stuck = False
        self._calls: queue.SimpleQueue[tuple[concurrent.futures.Future, Callable[[], Any]] | None]
        self._calls = queue.SimpleQueue()

    def submit(self, function: Callable[..., Any], /, **kwargs: Any) -> concurrent.futures.Future:
        """Call `function(**kwargs)` when the calls before it are done."""
        if self.stuck:
            raise CallTimeout("an earlier call has not returned yet")
        future: concurrent.futures.Future = concurrent.futures.Future()
        self._calls.put((future, lambda: function(**kwargs)))
        if self.ident is None:
            self._context, self._use_device = contextvars.copy_context(), _device_here()
            self.start()
        return future

    def stop(self) -> None:
        """Let the thread end once the calls it has are done. It may not be given others."""
        self._calls.put(None)

    def leave_behind(self) -> None:
        """Mark the thread as stuck, and let it end should its call ever return.

        Raises:
            TooManyStuckCalls: there are too many of those.
        """
        self.stuck = True
        self.stop()
        with _stuck_lock:
            _stuck[:] = [thread for thread in _stuck if thread.is_alive()]
            _stuck.append(self)
            if len(_stuck) > MAX_STUCK_THREADS:
                raise TooManyStuckCalls(
                    f"{len(_stuck)} calls of tools and environments have not returned and still run, the newest being "
                    f"{self.name}; find out what they wait for, and give it a time limit of its own."
                )

    def run(self) -> None:
        self._use_device()
        self._context.run(self._make_calls)

    def _make_calls(self) -> None:
        while (call := self._calls.get()) is not None:
            future, function = call
            if not future.set_running_or_notify_cancel():
                continue
            try:
                result = function()
            except BaseException as error:  # SystemExit of a tool must end neither the thread nor the run
                future.set_exception(error)
            else:
                future.set_result(result)
            del future, function, call  # an idle thread keeps nothing alive


def _device_here() -> Callable[[], None]:
    """What lets a new thread use this one's CUDA device; it begins with the first, which is another process's."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return lambda: None
    return functools.partial(torch.cuda.set_device, torch.cuda.current_device())


def side_by_side(function: Callable[[T], R], items: Sequence[T], workers: int) -> list[R]:
    """`function` of each item, `workers` at the same time; with one worker, in the caller's thread.

    The function has to be bounded in time. The first exception, in the order of the items, is raised, once what has begun
    is done.
    """
    if workers <= 1 or len(items) <= 1:
        return [function(item) for item in items]
    with concurrent.futures.ThreadPoolExecutor(min(workers, len(items)), "outspoken-calls", _device_here()) as pool:
        return list(pool.map(function, items))


# ---------------------------------------------------------------------- the event loop


def is_async(function: Callable[..., Any]) -> bool:
    """Whether calling the function gives a coroutine, for functions, partials and objects with an async `__call__`."""
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


@functools.cache
def event_loop() -> asyncio.AbstractEventLoop:
    """An event loop on a daemon thread: also usable where the caller's thread runs a loop already (notebooks)."""
    loop = asyncio.new_event_loop()
    thread = CallThread("outspoken-rewards")
    thread.submit(loop.run_forever)
    return loop


def replace_if_blocked(loop: asyncio.AbstractEventLoop) -> None:
    """Let later calls have a new event loop if an async function blocks this one."""
    answered = threading.Event()
    loop.call_soon_threadsafe(answered.set)
    if not answered.wait(1.0) and event_loop.cache_info().currsize and event_loop() is loop:
        logger.warning(
            "An async function blocks the event loop of tools and rewards (time.sleep instead of asyncio.sleep, say); "
            "later calls get a new one."
        )
        event_loop.cache_clear()


async def awaited(function: Callable[..., Awaitable[T]], kwargs: Mapping[str, Any], timeout: float | None = None) -> T:
    """What an async function gives, on the event loop.

    Raises:
        CallTimeout: it gave nothing within `timeout` seconds, and was cancelled.
        RuntimeError: it was cancelled by what it called, or would exit, which would end the loop's thread.
    """

    async def guarded() -> T:
        try:
            return await function(**kwargs)
        except (KeyboardInterrupt, SystemExit) as error:
            raise RuntimeError(f"{type(error).__name__}: {error}") from error

    # Not `wait_for`, which waits on for a task that does not let itself be cancelled.
    task = asyncio.ensure_future(guarded())
    try:
        await asyncio.wait({task}, timeout=timeout)
        if not task.done():
            raise CallTimeout
        if task.cancelled():
            raise RuntimeError("it was cancelled")
        return task.result()
    finally:
        task.cancel()
        task.add_done_callback(_look_at_result)


def _look_at_result(task: asyncio.Task) -> None:
    """Take note of how a task ended, or asyncio complains that nobody did."""
    if not task.cancelled():
        task.exception()


# ---------------------------------------------------------------------- one call


class Pending:
    """A call under way; `result` waits for it."""

    def __init__(
        self,
        what: str,
        function: Callable[..., Any],
        kwargs: dict[str, Any],
        timeout: float | None,
        thread: CallThread | None = None,
    ):
        """Start `function(**kwargs)`.

        Async functions run on the event loop of async reward functions. Others run on `thread`, or on one of their own;
        without a `timeout` they are called right here, in the caller's thread.

        Args:
            what: what is called, for messages: "tool 'search'".
            timeout: seconds; None: no limit.

        Raises:
            CallTimeout: `thread` is stuck.
        """
        self.what, self.timeout, self.start = what, timeout, time.perf_counter()
        self.seconds = 0.0
        self._thread: CallThread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._future: concurrent.futures.Future
        if is_async(function):
            self._loop = event_loop()
            self._future = asyncio.run_coroutine_threadsafe(awaited(function, kwargs), self._loop)
        elif timeout is None:
            self._future = concurrent.futures.Future()
            try:
                self._future.set_result(function(**kwargs))
            except Exception as error:
                self._future.set_exception(error)
            self.seconds = time.perf_counter() - self.start
        else:
            own = thread is None
            self._thread = CallThread(what) if thread is None else thread
            self._future = self._thread.submit(function, **kwargs)
            if own:
                self._thread.stop()

    def result(self) -> Any:
        """What the call returned.

        Raises:
            CallTimeout: it has not returned in time.
            TooManyStuckCalls: nor have many others.
            BaseException: what it raised.
        """
        left = None if self.timeout is None else max(0.0, self.start + self.timeout - time.perf_counter())
        concurrent.futures.wait([self._future], timeout=left)
        self.seconds = self.seconds or time.perf_counter() - self.start
        if self._future.done():
            return self._future.result()
        self._future.cancel()
        if self._loop is not None:
            replace_if_blocked(self._loop)
        elif self._thread is not None:
            self._thread.leave_behind()
        raise CallTimeout(f"{self.what} did not return within {self.timeout:g} s")
