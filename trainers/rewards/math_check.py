"""Whether two mathematical answers are equal, by math-verify, in bounded time and memory.

What a model writes can keep a computer algebra system busy for ever (`9^{9^{9^9}}`), and math-verify's own time limit
uses a signal: it does not reach into a long operation in C, and fails on a thread. So the checks are done by worker
processes that can be killed (math_worker.py).
"""

import atexit
import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

SECONDS = 15.0  # for one answer; math-verify gives up after 5 s of parsing and 5 s of each comparison by itself
MEMORY = 4 * 2**30  # bytes that a worker may take
STARTUP_SECONDS = 120.0
MAX_WORKERS = 4
PER_WORKER = 64  # answers for which it pays to start a further worker: a second or so, and some 150 MB

WORKER = Path(__file__).with_name("math_worker.py")


class Checked(NamedTuple):
    """What came of one check.

    Attributes:
        reward: 1.0 equal, 0.0 not, None if the right answer cannot be read.
        gold, answer: what was read, for people.
        timed_out: the check was broken off.
    """

    reward: float | None
    gold: str
    answer: str
    timed_out: bool = False


def require_math_verify(name: str) -> None:
    """Raise ImportError, naming the reward function, unless math-verify is installed."""
    if find_spec("math_verify") is None:
        raise ImportError(f"{name} needs math-verify; install it with `pip install 'outspoken[math]'`.")


def check_answers(pairs: Sequence[tuple[str, str]]) -> list[Checked]:
    """Compare each (right answer, completion), on as many processes as pays.

    Raises:
        RuntimeError: the worker process cannot be started.
    """
    share = max(1, _cpus() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    workers = min(MAX_WORKERS, share, -(-len(pairs) // PER_WORKER))
    if workers <= 1:
        return [_check(pair) for pair in pairs]
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(_check, pairs))


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check(pair: tuple[str, str]) -> Checked:
    gold, answer = pair
    unreadable = Checked(None, "[timed out]", "[skipped]", timed_out=True)
    if gold in _slow:
        return unreadable
    reply = _asked(gold, answer)
    if reply is None and _asked(gold, "") is None:  # no completion's fault, and no completion is scored by it
        _slow.add(gold)
        return unreadable
    return Checked(0.0, gold[:500], "[timed out]", timed_out=True) if reply is None else Checked(*reply)


def _asked(gold: str, answer: str) -> Any:
    """A worker's reply, None if there is none in time."""
    while True:
        worker = _idle.pop() if _idle else _Worker()
        if worker.process.poll() is None:
            break
        worker.close()  # killed from outside
    reply = worker.ask([gold, answer], SECONDS)
    if reply is not None:
        _idle.append(worker)
    return reply


class _Worker:
    def __init__(self) -> None:
        # By path, without its folder on the import path: nothing of this package is loaded, and a script without
        # `if __name__ == "__main__"` is not run again.
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(WORKER), str(MEMORY), str(SECONDS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        greeting = self.ask(None, STARTUP_SECONDS)
        if greeting != "ready":
            self.close()
            raise RuntimeError(f"The process that checks answers with math-verify does not start: {greeting}")

    def ask(self, question: Any, seconds: float) -> Any:
        """The reply to a question; None, and the process is gone, if there is none in time."""
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None and stdout is not None
        watch = threading.Timer(seconds, self.process.kill)
        watch.start()
        try:
            if question is not None:
                stdin.write(json.dumps(question).encode() + b"\n")
                stdin.flush()
            line = stdout.readline()
        except OSError:
            line = b""
        finally:
            watch.cancel()
        if not line.endswith(b"\n"):
            self.close()
            return None
        return json.loads(line)

    def close(self) -> None:
        self.process.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):  # what was not written yet goes nowhere
                    pipe.close()
        self.process.wait()


_idle: list[_Worker] = []  # append and pop are atomic
_slow: set[str] = set()  # right answers that cannot be read in time


@atexit.register
def _close_idle() -> None:
    while _idle:
        _idle.pop().close()
