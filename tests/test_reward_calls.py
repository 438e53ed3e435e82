"""How rewards are called: what functions get and may return, what happens when they fail or hang, reward models."""

import asyncio
import functools
import json
import logging
import math
import subprocess
import sys
import textwrap
import threading
import time
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st

from outspoken.trainers.calls import event_loop
from outspoken.trainers.measuring import raise_together
from outspoken.trainers.rewards import callable_name, calling, checked_rewards, is_async
from outspoken.trainers.rewards.calling import CallPolicy, RewardCalls
from outspoken.trainers.rewards.reward_set import RewardSet, chunks_by_length


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(calling, "RETRY_WAIT", 0.001)


@pytest.fixture
def gate():
    """An event that ends the hanging of a test's threads."""
    opened = threading.Event()
    yield opened
    opened.set()


def call_reward_functions(functions, count, **inputs):
    return RewardCalls(functions)(count, inputs, CallPolicy())


def returning(value):
    return lambda **_: value


def settings(**own):
    """What `RewardSet` reads of a config."""
    return SimpleNamespace(
        **{
            "model_init_kwargs": None,
            "trust_remote_code": False,
            "reward_weights": None,
            "chat_template_kwargs": None,
            **own,
        }
    )


def reward_set(functions, tokenizers=None, environments=None, **own):
    return RewardSet(functions, tokenizers, settings(**own), Accelerator(cpu=True), environments)


def score(functions, completions=("first text", "second text"), columns=None, tokenizers=None, more=None, **own):
    completions = list(completions)
    rewards = functions if isinstance(functions, RewardSet) else reward_set(functions, tokenizers, **own)
    ids = [[1] * len(completion) for completion in completions]
    prompts = ["p"] * len(completions)
    return rewards.score(prompts, completions, ids, columns or {}, **(more or {}))


# ---------------------------------------------------------------------- what may be returned


@pytest.mark.parametrize(
    "returned",
    [
        [1, 2.5, None],
        (1, 2.5, None),
        iter([torch.tensor(1.0), 2.5, None]),
        (value for value in (1, 2.5, None)),
        np.array([1, 2.5, None]),
        np.array([[1.0], [2.5], [None]]),
        np.ma.masked_array([1.0, 2.5, 9.0], [False, False, True]),
        pd.Series([1.0, 2.5, None], dtype=object),
        [np.float32(1), np.array([2.5]), None],
        [torch.tensor(1.0, requires_grad=True), torch.tensor([2.5], dtype=torch.bfloat16), None],
        [True, torch.tensor(2.5), None],
    ],
    ids=lambda value: type(value).__name__,
)
def test_numbers_and_none_of_any_kind(returned):
    rewards = call_reward_functions({"f": returning(returned)}, 3)["f"]
    assert rewards[:2] == [1.0, 2.5] and math.isnan(rewards[2])


@pytest.mark.parametrize(
    "returned",
    [
        torch.tensor([0.0, 1.0], requires_grad=True) * 2,
        torch.tensor([[0.0], [2.0]], dtype=torch.float16),
        torch.tensor([0, 2]),
        np.array([0, 2], dtype=np.uint8),
        pd.Series([0, 2], index=[7, 8]),
        range(0, 4, 2),
        {0: 0.0, 1: 2.0}.values(),
    ],
    ids=lambda value: type(value).__name__,
)
def test_arrays_of_any_kind(returned):
    assert call_reward_functions({"f": returning(returned)}, 2) == {"f": [0.0, 2.0]}
    assert call_reward_functions({"f": returning(np.array([False, True]))}, 2) == {"f": [0.0, 1.0]}


def endless():
    while True:
        yield 1.0


async def forgotten():
    return [1.0, 2.0]


@pytest.mark.parametrize(
    "returned, words",
    [
        ([1.0], "returned 1 rewards for 2 completions; return exactly one number (or None) per completion."),
        ([1.0, 2.0, 3.0], "returned 3 rewards for 2 completions"),
        (endless(), "returned more than 2 rewards for 2 completions"),
        (1.0, "returned float; return a list with one number (or None) per completion, here 2."),
        (None, "returned NoneType; return a list"),
        ("12", "returned a str; return a list"),
        ({"a": 1, "b": 2}, "returned a dict; return a list"),
        ({1.0, 2.0}, "returned a set; return a list"),
        (torch.tensor(1.0), "returned a Tensor of shape (); return a list"),
        (np.ones((2, 2)), "returned a ndarray of shape (2, 2); return a list"),
        (torch.ones(1, 2), "returned a Tensor of shape (1, 2); return a list"),
        (pd.DataFrame({"a": [1, 2], "b": [1, 2]}), "returned a DataFrame of shape (2, 2)"),
        ([1.0, math.nan], "returned nan for completion 1 ('b\\x1b[31m c'); return a finite number, or None"),
        ([math.inf, 1.0], "returned inf for completion 0 ('a')"),
        (torch.tensor([1.0, -math.inf]), "returned -inf for completion 1"),
        (
            [1.0, "good"],
            "returned 'good' for completion 1 ('b\\x1b[31m c'); return a number, or None for a completion it",
        ),
        ([1.0, "2.5"], "returned '2.5' for completion 1"),
        ([1.0, [2.0]], "returned [2.0] for completion 1"),
        ([1.0, torch.ones(2)], "returned tensor([1., 1.]) for completion 1"),
        ([1.0, 1j], "returned 1j for completion 1"),
        ([1.0, 10**400], "returned a number too large for float32 for completion 1"),
        ([1.0, 1e39], "returned 1e+39, too large for float32, for completion 1"),
        ([1.0, object], "returned <class 'object'> for completion 1"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else type(value).__name__,
)
def test_wrong_answers_name_the_function_and_the_completion(returned, words):
    with pytest.raises(ValueError) as error:
        call_reward_functions({"judge": returning(returned)}, 2, completions=["a", "b\x1b[31m\nc"])
    assert f"Reward function 'judge' {words}" in str(error.value)
    assert "\n" not in str(error.value) and "\x1b" not in str(error.value)


def test_a_coroutine_from_a_plain_function():
    with pytest.raises(
        ValueError, match="'judge' returned something to be awaited, but is not declared with `async def`"
    ):
        call_reward_functions({"judge": lambda **_: forgotten()}, 2)


@given(st.text(), st.integers(0, 3))
def test_what_is_shown_of_a_completion_is_one_short_line(text, index):
    completions = [""] * index + [[{"role": "assistant", "content": text}]]
    with pytest.raises(ValueError) as error:
        checked_rewards("f", [0.0] * index + [math.nan], index + 1, completions)
    said = str(error.value)
    assert said.isprintable() and len(said) < 300 and f"completion {index} (" in said


@given(
    st.lists(
        st.one_of(
            st.none(),
            st.booleans(),
            st.integers(-(2**60), 2**60),
            st.floats(width=32, allow_nan=False, allow_infinity=False),
        )
    )
)
def test_every_finite_number_is_taken(values):
    rewards = checked_rewards("f", values, len(values))
    assert len(rewards) == len(values)
    for value, reward in zip(values, rewards):
        assert math.isnan(reward) if value is None else reward == float(value)


# ---------------------------------------------------------------------- failing


def test_an_exception_names_the_function():
    def broken(**_):
        raise KeyError("answer")

    with pytest.raises(RuntimeError, match="Reward function 'broken' raised KeyError: 'answer'; fix it") as error:
        call_reward_functions({"broken": broken}, 2)
    assert isinstance(error.value.__cause__, KeyError)

    async def broken_later(**_):
        raise KeyError("answer")

    with pytest.raises(RuntimeError, match="Reward function 'broken_later' raised KeyError") as error:
        call_reward_functions({"broken_later": broken_later}, 2)
    assert isinstance(error.value.__cause__, KeyError)


def helper(text):
    return float(text.split("=")[1])


def as_a_loop(completions, **_):
    return [helper(completion) for completion in completions]


def as_a_generator(completions, **_):
    return (helper(completion) for completion in completions)


def of_the_message(completions, **_):
    rewards = []
    for completion in completions:
        rewards.append(float(completion[-1]["content"].split("=")[1]))
    return rewards


async def awaited(completions, **_):
    return [helper(completion) for completion in completions]


@pytest.mark.parametrize("function", [as_a_loop, as_a_generator, of_the_message, awaited])
@pytest.mark.parametrize("timeout", [None, 30])
def test_the_completion_at_hand_is_named(function, timeout):
    texts = ["x=1", "no number", "x=2", "nor here"]
    if function is of_the_message:
        texts = [[{"role": "assistant", "content": text}] for text in texts]
    said = (
        f"'{function.__name__}' raised IndexError: list index out of range at completion 1 \\('no number'\\); fix it"
    )
    with pytest.raises(RuntimeError, match=said):
        RewardCalls({function.__name__: function})(4, {"completions": texts}, CallPolicy(timeout=timeout))


def test_no_completion_is_named_where_none_was_at_hand():
    def broken(completions, **_):
        raise ValueError("not about a completion")

    with pytest.raises(RuntimeError) as error:
        call_reward_functions({"broken": broken}, 2, completions=["first one", "second one"])
    assert "completion 0" not in str(error.value) and "completion 1" not in str(error.value)


def test_what_an_exception_says_is_shortened_and_escaped():
    def broken(**_):
        raise ValueError("\x1b[31m" + "x" * 10_000 + "\n")

    with pytest.raises(RuntimeError) as error:
        call_reward_functions({"broken": broken}, 1)
    assert str(error.value).isprintable() and len(str(error.value)) < 600


class Flaky:
    """Fails `failures` times, then works."""

    def __init__(self, failures):
        self.left = failures
        self.calls = 0

    def __call__(self, completions, log_extra=None, log_metric=None, **_):
        self.calls += 1
        if log_extra is not None:
            log_extra("seen", [self.calls] * len(completions))
            log_metric("calls", self.calls)
        if self.left:
            self.left -= 1
            raise ConnectionError("try later")
        return [1.0] * len(completions)


class FlakyLater(Flaky):
    async def __call__(self, **inputs):
        return super().__call__(**inputs)


@pytest.mark.parametrize("kind", [Flaky, FlakyLater])
@pytest.mark.parametrize("timeout", [None, 30.0])
def test_failed_calls_are_repeated(kind, timeout):
    extra, metrics = [], []
    logs = {"log_extra": lambda *a: extra.append(a), "log_metric": lambda *a: metrics.append(a)}
    function = kind(2)
    found = score(function, reward_max_retries=2, reward_timeout=timeout, more=logs)
    assert found.tolist() == [[1.0], [1.0]] and function.calls == 3
    assert extra == [("seen", [3, 3])] and metrics == [("calls", 3)]  # of the call that worked, once

    function = kind(3)
    with pytest.raises(RuntimeError, match=f"'{kind.__name__}' raised ConnectionError: try later, tried 3 times"):
        score(function, reward_max_retries=2, reward_timeout=timeout)
    assert function.calls == 3


def test_wrong_answers_are_not_asked_for_again():
    calls = []
    with pytest.raises(ValueError, match="returned 1 rewards for 2"):
        score(lambda **_: calls.append(1) or [1.0], reward_max_retries=5, reward_on_error="none")
    assert len(calls) == 1


def test_going_on_without_what_failed(caplog):
    def broken(**_):
        raise ConnectionError("down")

    def fine(completions, **_):
        return [2.0, math.nan]

    rewards = reward_set([broken, fine], reward_on_error="none")
    with caplog.at_level(logging.WARNING):
        for _ in range(calling.WARN_EVERY + 1):
            found = score(rewards)
    assert found[0, 1] == 2.0 and torch.isnan(found).tolist() == [[True, False], [True, True]]
    assert rewards.calls.failures == {"broken": 101, "fine": 101}
    said = [record.getMessage() for record in caplog.records if "reward_on_error" in record.getMessage()]
    assert len(said) == 4  # the first and the 101st time of each
    assert said[0].startswith("Reward function 'broken' raised ConnectionError: down;")
    assert said[0].endswith("Since reward_on_error is 'none', its rewards for 2 completions are left out.")
    assert "returned nan for completion 1 ('second text')" in said[1] and "this reward is left out." in said[1]
    assert "(101 times so far; told every 100)" in said[2]


def test_how_errors_are_handled_may_change_in_flight():
    rewards = reward_set(Flaky(10**6))
    with pytest.raises(RuntimeError):
        score(rewards)
    rewards.args.reward_on_error = "none"
    assert torch.isnan(score(rewards)).all()
    rewards.args.reward_on_error = "raise"
    with pytest.raises(RuntimeError):
        score(rewards)


# ---------------------------------------------------------------------- hanging


def test_a_function_that_hangs(gate):
    def hangs(**_):
        gate.wait(60)

    began = time.monotonic()
    with pytest.raises(RuntimeError) as error:
        score(hangs, reward_timeout=0.1, reward_max_retries=1)
    assert str(error.value) == (
        "Reward function 'hangs' did not return within reward_timeout=0.1 seconds, tried 2 times; make it faster, raise "
        "reward_timeout, or set reward_on_error='none' to go on without its rewards."
    )
    assert time.monotonic() - began < 30


def test_an_async_function_that_hangs_and_will_not_be_cancelled():
    async def hangs(**_):
        while True:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                stubborn.append(1)
                if len(stubborn) > 5:
                    raise

    stubborn = []

    async def fine(completions, **_):
        return [1.0] * len(completions)

    with pytest.raises(RuntimeError, match=r"'hangs' did not return within reward_timeout=0\.1 seconds;"):
        score([hangs, fine], reward_timeout=0.1)
    found = score([hangs, fine], reward_timeout=0.1, reward_on_error="none")
    assert torch.isnan(found[:, 0]).all() and found[:, 1].tolist() == [1.0, 1.0]


def test_an_async_function_that_blocks_the_loop(monkeypatch, gate):
    monkeypatch.setattr(calling, "LOOP_GRACE", 0.2)

    async def blocks(**_):
        gate.wait(60)

    with pytest.raises(
        RuntimeError, match=r"'blocks' did not return within .* \(it blocks the event loop: `await` what"
    ):
        score(blocks, reward_timeout=0.1)

    async def fine(completions, **_):
        return [1.0] * len(completions)

    assert score(fine, reward_timeout=30).tolist() == [[1.0], [1.0]]  # on a new loop


def test_a_generator_that_hangs(gate):
    def hangs(**_):
        yield 1.0
        gate.wait(60)

    with pytest.raises(RuntimeError, match="'hangs' did not return within"):
        score(hangs, reward_timeout=0.1)


def test_calls_that_hang_do_not_pile_up(gate):
    def hangs(**_):
        started.append(1)
        gate.wait(60)

    started = []
    rewards = reward_set(hangs, reward_timeout=0.01, reward_on_error="none")
    for _ in range(calling.MAX_STUCK + 4):
        assert torch.isnan(score(rewards)).all()
    assert len(started) == calling.MAX_STUCK
    rewards.args.reward_on_error = "raise"
    with pytest.raises(RuntimeError, match="8 earlier calls still hang, so it is not called again"):
        score(rewards)
    gate.set()
    for thread in rewards.calls._stuck["hangs"]:
        thread.join(10)
    with pytest.raises(ValueError, match="returned NoneType"):  # called again
        score(rewards)


def test_what_a_late_call_says_does_not_count(gate):
    """A call that was given up goes on in the background, with lists of its own, and logs into the void."""
    finished = threading.Event()

    def late(completions, log_extra, **_):
        first = not called
        called.append(1)
        if first:
            gate.wait(60)
            completions.clear()
            log_extra("late", [1, 1])
            finished.set()
        return [1.0] * 2

    called, extra, texts = [], [], ["a", "b"]
    logs = {"log_extra": lambda *args: extra.append(args)}
    assert score(late, texts, reward_timeout=0.1, reward_max_retries=1, more=logs).tolist() == [[1.0], [1.0]]
    gate.set()
    assert finished.wait(30)
    assert texts == ["a", "b"] and extra == []


def test_a_timeout_of_the_function_itself_is_an_error_of_it():
    def gives_up(**_):
        raise TimeoutError("the server is slow")

    with pytest.raises(RuntimeError, match="raised TimeoutError: the server is slow"):
        score(gives_up, reward_timeout=30)


def test_a_call_on_a_thread_sees_the_callers_context():
    import contextvars

    variable = contextvars.ContextVar("variable", default=0.0)
    variable.set(5.0)
    assert score(lambda **_: [variable.get()] * 2, reward_timeout=30).tolist() == [[5.0], [5.0]]


def test_an_async_function_that_exits_does_not_end_the_loop():
    async def exits(**_):
        raise SystemExit(3)

    with pytest.raises(RuntimeError, match="'exits' raised RuntimeError: SystemExit: 3"):
        score(exits)
    with pytest.raises(RuntimeError, match="'exits' raised RuntimeError: SystemExit: 3"):
        score(exits)

    async def cancelled(**_):
        raise asyncio.CancelledError

    with pytest.raises(RuntimeError, match="'cancelled' raised RuntimeError: it was cancelled"):
        score(cancelled)


# ---------------------------------------------------------------------- what functions get


def test_inputs_reach_every_function():
    seen = {}

    def sync(**inputs):
        seen["sync"] = inputs
        return [0.0]

    async def asynchronous(**inputs):
        seen["asynchronous"] = inputs
        return [1.0]

    found = call_reward_functions({"sync": sync, "asynchronous": asynchronous}, 1, prompts=["p"], answer=["4"])
    assert found == {"sync": [0.0], "asynchronous": [1.0]}
    assert seen["sync"] == seen["asynchronous"] == {"prompts": ["p"], "answer": ["4"]}


def test_everything_a_function_gets():
    def function(**inputs):
        seen.update(inputs)
        inputs["log_extra"]("length", [4, 5])
        inputs["log_metric"](name="share", value=0.5)
        return [1, 2]

    seen, extra, metrics = {}, [], []
    rewards = reward_set(function)
    columns = {"answer": ["x", "y"], "completion": ["gold", "gold"], "prompt": ["p", "p"], "prompts": ["no", "no"]}
    found = rewards.score(
        ["p", "q"],
        ["text", "texts"],
        [[1, 2], [3]],
        columns,
        trainer_state="state",
        log_extra=lambda column, values: extra.append((column, values)),
        log_metric=lambda name, value: metrics.append((name, value)),
        environments=["one", "two"],
    )
    assert found.dtype == torch.float32 and found.tolist() == [[1.0], [2.0]]
    assert {key: value for key, value in seen.items() if not key.startswith("log_")} == {
        "prompts": ["p", "q"],
        "completions": ["text", "texts"],
        "completion_ids": [[1, 2], [3]],
        "answer": ["x", "y"],
        "trainer_state": "state",
        "environments": ["one", "two"],
    }
    assert extra == [("length", [4, 5])] and metrics == [("share", 0.5)]
    score(rewards, ["ab", "cd"])
    assert "environments" in seen  # from before: without environments there is no such keyword
    seen.clear()
    score(rewards, ["ab", "cd"])
    assert "environments" not in seen


def test_a_function_changes_its_inputs_for_itself_only():
    def vandal(prompts, completions, completion_ids, answer, **_):
        completions[0][0]["content"] = "changed"
        completions.reverse()
        completion_ids[0].append(9)
        prompts.clear()
        answer[0]["parts"].append(1)
        return [0.0, 0.0]

    def witness(prompts, completions, completion_ids, answer, **_):
        seen.append((prompts, completions, completion_ids, answer))
        return [0.0, 0.0]

    seen = []
    prompts = [[{"role": "user", "content": "?"}] for _ in range(2)]
    completions = [[{"role": "assistant", "content": text}] for text in "ab"]
    ids, columns = [[1], [2, 3]], {"answer": [{"parts": [7]}, {"parts": []}]}
    before = json.dumps([prompts, completions, ids, columns["answer"]])
    reward_set([vandal, witness]).score(prompts, completions, ids, columns)
    assert json.dumps(seen[0]) == before
    assert json.dumps([prompts, completions, ids, columns["answer"]]) == before


def test_a_slip_in_a_log_is_told_once_and_does_not_end_the_run(caplog):
    def function(completions, log_extra, **_):
        log_extra("short", [1])
        log_extra("no list", 5)
        log_extra("right", (value for value in "ab"))
        return [0.0] * 2

    extra = []
    rewards = reward_set(function)
    for _ in range(3):
        score(rewards, more={"log_extra": lambda *args: extra.append(args)})
    assert extra == [("right", ["a", "b"])] * 3
    said = [record.getMessage() for record in caplog.records]
    assert sum("logged 1 values in the column 'short' for 2 completions" in text for text in said) == 1
    assert sum("in the column 'no list'" in text for text in said) == 1


def test_async_functions_run_at_the_same_time():
    """Each waits for the other, so one after the other would never end."""
    first_started, second_started = asyncio.Event(), asyncio.Event()

    async def first(**_):
        first_started.set()
        await asyncio.wait_for(second_started.wait(), 30)
        return [1.0]

    async def second(**_):
        second_started.set()
        await asyncio.wait_for(first_started.wait(), 30)
        return [2.0]

    assert call_reward_functions({"first": first, "second": second}, 1) == {"first": [1.0], "second": [2.0]}


def test_async_functions_run_beside_the_others():
    """The plain one waits for the async one to begin, which comes behind it."""
    began = threading.Event()

    def plain(**_):
        return [float(began.wait(30))]

    async def asynchronous(**_):
        began.set()
        return [2.0]

    assert call_reward_functions({"plain": plain, "asynchronous": asynchronous}, 1) == {
        "plain": [1.0],
        "asynchronous": [2.0],
    }


def test_async_functions_keep_their_loop_between_calls():
    """A client made in one call must be usable in the next; also while the caller's own loop runs, as in notebooks."""
    loops = []

    async def judge(**_):
        loops.append(asyncio.get_running_loop())
        return [1.0]

    call_reward_functions({"judge": judge}, 1)

    async def notebook():
        return call_reward_functions({"judge": judge}, 1)

    assert asyncio.run(notebook()) == {"judge": [1.0]}
    assert loops[0] is loops[1]


def test_an_error_of_one_ends_the_others():
    """A plain function that fails does not leave an async one running."""
    ended = threading.Event()

    async def slow(**_):
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    def broken(**_):
        time.sleep(0.05)  # until the other one sleeps
        raise ValueError("no")

    with pytest.raises(RuntimeError, match="'broken' raised ValueError: no"):
        call_reward_functions({"slow": slow, "broken": broken}, 1)
    assert ended.wait(30)


def test_names_and_kinds_of_callables():
    class Judge:
        async def __call__(self, **_):
            return [1.0]

    async def judge(**_):
        return [1.0]

    assert callable_name(Judge()) == "Judge" and is_async(Judge())
    assert callable_name(functools.partial(judge, strict=True)) == "judge" and is_async(functools.partial(judge))
    assert not is_async(as_a_loop) and callable_name(as_a_loop) == "as_a_loop"
    assert score([Judge(), functools.partial(judge, strict=True), Flaky(0)], ["a"]).tolist() == [[1.0, 1.0, 1.0]]


# ---------------------------------------------------------------------- the set


def test_names_and_weights():
    functions = [returning([1.0, 1.0]), returning([2.0, 2.0]), as_a_loop]
    rewards = reward_set(functions, reward_weights=[0.5, 2, 0], environments={"Game": returning([3.0, None])})
    assert rewards.names == ["<lambda>", "<lambda>_2", "as_a_loop", "Game"]
    assert rewards.weights(rewards.args).tolist() == [0.5, 2.0, 0.0, 1.0]
    assert rewards.weights(settings()).tolist() == [1.0] * 4
    with pytest.raises(
        ValueError, match="reward_weights has 2 entries for 3 reward functions \\(<lambda>, <lambda>_2, as"
    ):
        rewards.weights(settings(reward_weights=[1.0, 1.0]))
    with pytest.raises(ValueError, match="reward_weights has 1 entries for 3"):
        reward_set(functions, reward_weights=[1.0])
    found = score(rewards, ["x=4", "x=5"])
    assert found[:, :3].tolist() == [[1.0, 2.0, 4.0], [1.0, 2.0, 5.0]]
    assert found[0, 3] == 3.0 and torch.isnan(found[1, 3])


def test_rewards_of_environments_alone():
    rewards = reward_set(None, environments={"Game": lambda environments, **_: [e * 2 for e in environments]})
    assert score(rewards, more={"environments": [1, 2]}).tolist() == [[2.0], [4.0]]
    assert rewards.weights(rewards.args).tolist() == [1.0]


@pytest.mark.parametrize("functions", [None, [], [None]])
def test_no_reward_at_all(functions):
    with pytest.raises(ValueError, match="`reward_funcs` is empty; pass at least one reward function"):
        reward_set(functions)


def test_what_is_no_reward():
    with pytest.raises(TypeError, match="`reward_funcs` holds a int; pass functions, sequence classifiers or paths"):
        reward_set([as_a_loop, 3])
    with pytest.raises(ValueError, match="`reward_processing_classes` has 2 entries for 1 reward functions"):
        reward_set(as_a_loop, [None, None])


def test_no_completions():
    rewards = reward_set([as_a_loop, as_a_generator])
    assert rewards.score([], [], [], {}).shape == (0, 2)


def test_completions_that_nothing_scores(caplog):
    found = score([returning([None, 1.0]), returning([None, None])])
    assert torch.isnan(found).tolist() == [[True, True], [False, True]]
    assert "1 of 2 completions got None from every reward function (<lambda>, <lambda>_2)" in caplog.text


def test_seconds_are_measured():
    rewards = reward_set([lambda **_: time.sleep(0.05) or [1.0, 1.0], awaited])
    score(rewards, ["x=1", "x=2"])
    assert rewards.calls.seconds["<lambda>"] >= 0.05 and set(rewards.calls.seconds) == {"<lambda>", "awaited"}


# ---------------------------------------------------------------------- reward models


@pytest.fixture(scope="module")
def classifier(tiny_tokenizer):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.set_num_threads(1)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        config = LlamaConfig(
            vocab_size=len(tiny_tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.2,
            num_labels=1,
            pad_token_id=None,
        )
        return LlamaForSequenceClassification(config).eval()


def alone(model, tokenizer, text):
    """The score of one text, without padding: what the head says of its last token."""
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        return model.score(model.model(ids).last_hidden_state[:, -1]).item()


TEXTS = ["the sky", "is blue " * 30, "green grass", "seven", "it is " * 9]


def test_a_reward_model_scores_each_text_by_its_last_token(classifier, tiny_tokenizer_factory):
    tokenizer = tiny_tokenizer_factory(padding_side="left")  # what the policy samples with
    rewards = reward_set([classifier, returning([0.0] * 5)], [tokenizer, None])
    assert rewards.names == ["LlamaForSequenceClassification", "<lambda>"]
    found = score(rewards, TEXTS)
    assert found[:, 0].tolist() == pytest.approx(
        [alone(classifier, tokenizer, "p" + text) for text in TEXTS], abs=1e-5
    )
    assert len({round(x, 4) for x in found[:, 0].tolist()}) == 5  # they are not all alike
    assert not classifier.training and not found.requires_grad


def test_conversations_go_through_the_reward_tokenizers_template(classifier, tiny_tokenizer_factory):
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if loud %}!{% endif %}{% endfor %}"
    tokenizer = tiny_tokenizer_factory(chat_template=template)
    rewards = reward_set(classifier, tokenizer)
    prompts = [[{"role": "user", "content": "sky?"}]] * 2
    completions = [[{"role": "assistant", "content": text}] for text in ("blue", "green grass")]
    for options, mark in ((None, ""), ({"loud": True}, "!")):
        rewards.args.chat_template_kwargs = options
        found = rewards.score(prompts, completions, [[1], [2]], {})
        texts = [f"<user>sky?{mark}<assistant>{text}{mark}" for text in ("blue", "green grass")]
        assert found[:, 0].tolist() == pytest.approx([alone(classifier, tokenizer, text) for text in texts], abs=1e-5)


def test_a_reward_model_reads_a_bounded_number_of_tokens_at_a_time(classifier, tiny_tokenizer, monkeypatch):
    from outspoken.trainers.rewards import reward_set as module

    monkeypatch.setattr(module, "REWARD_MODEL_TOKENS", 128)
    rewards = reward_set(classifier, tiny_tokenizer)
    shapes = []
    hook = classifier.register_forward_pre_hook(
        lambda model, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    completions = [("sky " * (i + 1)).strip() for i in range(40)]
    found = score(rewards, completions)
    hook.remove()
    assert all(rows * length <= 128 or rows == 1 for rows, length in shapes) and len(shapes) > 3
    assert sum(rows for rows, _ in shapes) == 40 and shapes[0][1] == max(length for _, length in shapes)
    assert found[:, 0].tolist() == pytest.approx(
        [alone(classifier, tiny_tokenizer, "p" + t) for t in completions], abs=1e-5
    )


@given(st.lists(st.integers(0, 50), max_size=40), st.integers(1, 200))
def test_chunks_hold_every_row_once_within_the_budget(lengths, budget):
    chunks = chunks_by_length(lengths, budget)
    assert sorted(i for chunk in chunks for i in chunk) == [i for i, length in enumerate(lengths) if length]
    for chunk in chunks:
        assert len(chunk) == 1 or len(chunk) * max(lengths[i] for i in chunk) <= budget


def test_a_text_without_tokens_has_no_reward(classifier, tiny_tokenizer):
    rewards = reward_set(classifier, tiny_tokenizer)
    found = rewards.score(["", ""], ["", "sky"], [[], [1]], {})
    assert torch.isnan(found[0, 0]) and torch.isfinite(found[1, 0])


def test_a_reward_model_that_gives_nan(classifier, tiny_tokenizer):
    rewards = reward_set(classifier, tiny_tokenizer)
    hook = classifier.score.register_forward_hook(lambda module, args, output: output * torch.nan)
    try:
        with pytest.raises(
            ValueError, match="'LlamaForSequenceClassification' returned nan for completion 0 \\('the sky'\\)"
        ):
            score(rewards, TEXTS)
    finally:
        hook.remove()


def test_a_reward_model_by_its_path(classifier, tiny_tokenizer_factory, tmp_path):
    path = tmp_path / "my-judge"
    classifier.save_pretrained(path)
    tiny_tokenizer_factory(pad_token=None).save_pretrained(path)
    rewards = reward_set([f"{path}/", str(path)], model_init_kwargs={"device_map": None})
    assert rewards.names == ["my-judge", "my-judge_2"]
    found = score(rewards, TEXTS)
    expected = [alone(classifier, rewards.tokenizers["my-judge"], "p" + text) for text in TEXTS]
    assert found[:, 0].tolist() == found[:, 1].tolist() == pytest.approx(expected, abs=1e-5)


def test_a_classifier_of_several_labels_is_refused(tiny_tokenizer):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, num_labels=3
    )
    with pytest.raises(ValueError, match="'LlamaForSequenceClassification' has 3 labels, so which one is the reward"):
        reward_set(LlamaForSequenceClassification(config), tiny_tokenizer)


def test_the_reward_matrix_is_trls(classifier, tiny_tokenizer, tmp_path):
    """TRL's own loop over functions, None, async ones, partials and a model, on the same completions."""
    from trl import GRPOTrainer

    functions = [functools.partial(as_a_loop, strict=True), awaited, returning([None, 2.0, None]), classifier]
    texts = ["x=1 sky", "x=2", "x=3.5 blue grass"]
    texts = [text.split()[0] for text in texts]
    rewards = reward_set(functions, [None, None, None, tiny_tokenizer])
    found = score(rewards, texts)

    class Theirs(GRPOTrainer):
        def __init__(self):  # only what scoring reads
            self.accelerator = Accelerator(cpu=True)
            self.args = SimpleNamespace(device=torch.device("cpu"), past_index=-1, report_to=[])
            self.is_deepspeed_enabled = False
            self.reward_funcs, self.reward_func_names = functions, rewards.names
            self.reward_processing_classes = [None, None, None, tiny_tokenizer]
            self.chat_template_kwargs, self.environments = {}, None
            self.state, self.async_loop = SimpleNamespace(global_step=1), event_loop()

    rows = [{"prompt": "p"}] * 3
    theirs = Theirs()._calculate_rewards(rows, ["p"] * 3, texts, [[1]] * 3)
    torch.testing.assert_close(found, theirs, equal_nan=True, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------- several processes


def test_one_process_raises_its_own_error():
    accelerator = Accelerator(cpu=True)
    raise_together(accelerator, None)
    error = KeyError("mine")
    with pytest.raises(KeyError) as raised:
        raise_together(accelerator, error)
    assert raised.value is error


TWO = """
import json, sys
from types import SimpleNamespace
from accelerate import Accelerator
from outspoken.trainers.measuring import raise_together
from outspoken.trainers.rewards.reward_set import RewardSet

accelerator = Accelerator(cpu=True)
rank = accelerator.process_index
found = []

def attempt(call):
    try:
        found.append(["returned", call()])
    except Exception as error:
        found.append([type(error).__name__, str(error), type(error.__cause__).__name__])

attempt(lambda: raise_together(accelerator, None))
attempt(lambda: raise_together(accelerator, KeyError("here") if rank else None))
attempt(lambda: raise_together(accelerator, ValueError(f"error of {rank}")))

def reward(completions, **_):
    return [float(completion) for completion in completions]

args = SimpleNamespace(model_init_kwargs=None, trust_remote_code=False, reward_weights=None, chat_template_kwargs=None)
rewards = RewardSet(reward, None, args, accelerator)
score = lambda texts: rewards.score(["p"] * len(texts), texts, [[1]] * len(texts), {}).tolist()
attempt(lambda: score(["10", "11"] if rank else []))
attempt(lambda: score(["twelve" if rank else "12"]))
attempt(lambda: score(["13"]))
json.dump(found, open(f"{sys.argv[1]}-{rank}", "w"))
accelerator.end_training()
"""


@pytest.mark.slow
def test_two_processes_fail_together(tmp_path):
    (tmp_path / "two.py").write_text(textwrap.dedent(TWO))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    command += [str(tmp_path / "two.py"), str(tmp_path / "found")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = (json.loads((tmp_path / f"found-{rank}").read_text()) for rank in (0, 1))
    assert first[0] == second[0] == ["returned", None]
    assert second[1][:2] == ["KeyError", "'here'"]
    assert first[1][:2] == ["RuntimeError", "Process 1 failed, so this one stops too. There: KeyError: 'here'"]
    assert (first[2][1], second[2][1]) == ("error of 0", "error of 1")
    assert (first[3], second[3]) == (["returned", []], ["returned", [[10.0], [11.0]]])  # with unequal numbers of rows
    assert second[4][0] == "RuntimeError" and second[4][2] == "ValueError"
    assert "Reward function 'reward' raised ValueError" in second[4][1] and "completion 0 ('twelve')" in second[4][1]
    assert first[4][1].startswith(
        "Process 1 failed, so this one stops too. There: RuntimeError: Reward function 'reward'"
    )
    assert first[5] == second[5] == ["returned", [[13.0]]]  # and they can go on
