"""How reward functions are called, what they may return, and the ready-made ones."""

import asyncio
import functools
import math

import numpy as np
import pytest
import torch

from outspoken.trainers.rewards import (
    call_reward_functions,
    callable_name,
    exact_match_reward,
    get_soft_overlong_punishment,
    is_async,
    think_format_reward,
)


def returning(value):
    return lambda **_: value


@pytest.mark.parametrize(
    "returned", [[1, 2.5, None], (1, 2.5, None), np.array([1, 2.5, None]), iter([torch.tensor(1.0), 2.5, None])]
)
def test_numbers_and_none_of_any_kind(returned):
    rewards = call_reward_functions({"f": returning(returned)}, 3)["f"]
    assert rewards[:2] == [1.0, 2.5] and math.isnan(rewards[2])


@pytest.mark.parametrize(
    "returned, words",
    [
        ([1.0], "returned 1 rewards for 2 completions"),
        ([1.0, 2.0, 3.0], "returned 3 rewards for 2 completions"),
        (1.0, "returned float; return a list"),
        (None, "returned NoneType; return a list"),
        ([1.0, math.nan], "returned nan for completion 1; return a finite number, or None"),
        ([math.inf, 1.0], "returned inf for completion 0"),
        ([1.0, "good"], "returned 'good' for completion 1; return a number, or None"),
        ([1.0, [2.0]], "returned \\[2.0\\] for completion 1"),
    ],
)
def test_wrong_answers_name_the_function(returned, words):
    with pytest.raises(ValueError, match=f"Reward function 'judge' {words}"):
        call_reward_functions({"judge": returning(returned)}, 2)


def test_an_exception_names_the_function():
    def broken(**_):
        raise KeyError("answer")

    with pytest.raises(RuntimeError, match="Reward function 'broken' raised KeyError: 'answer'") as error:
        call_reward_functions({"broken": broken}, 2)
    assert isinstance(error.value.__cause__, KeyError)

    async def broken_later(**_):
        raise KeyError("answer")

    with pytest.raises(RuntimeError, match="Reward function 'broken_later' raised KeyError"):
        call_reward_functions({"broken_later": broken_later}, 2)


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


def test_names_and_kinds_of_callables():
    class Judge:
        async def __call__(self, **_):
            return [1.0]

    async def judge(**_):
        return [1.0]

    assert callable_name(Judge()) == "Judge" and is_async(Judge())
    assert callable_name(functools.partial(judge, strict=True)) == "judge" and is_async(functools.partial(judge))
    assert not is_async(exact_match_reward) and callable_name(exact_match_reward) == "exact_match_reward"


def test_exact_match():
    texts = [" 4\n", "5", "4"]
    assert exact_match_reward(completions=texts, answer=["4", "4", None]) == [1.0, 0.0, None]
    messages = [[{"role": "assistant", "content": text}] for text in texts]
    assert exact_match_reward(completions=messages, answer=[4, 4, 4]) == [1.0, 0.0, 1.0]
    with pytest.raises(ValueError, match="needs a dataset column 'answer'"):
        exact_match_reward(completions=texts)


@pytest.mark.parametrize(
    "text",
    [
        "<think>\nbecause\n</think>\n4",
        "<think></think>",
        "<think>a</think>b</think>c",
        "<think>a\n4",
        "4",
        " <think>a</think>4",
        "<think>a<think>b</think>4",
        "<think>a</think>4<think>b</think>",
        "",
    ],
)
def test_think_format_is_trls(text):
    from trl.rewards import think_format_reward as theirs

    message = [[{"role": "assistant", "content": text}]]
    assert think_format_reward(message) == theirs(message)
    assert think_format_reward([text]) == think_format_reward(message)


def test_soft_overlong_punishment():
    """DAPO, eq. 13, with L = 100 and C = 20: free up to 80, then (80 - length) / 20, then -1."""
    punish = get_soft_overlong_punishment(max_completion_len=100, soft_punish_cache=20)
    ids = [[1] * length for length in (0, 80, 81, 90, 100, 101)]
    assert punish(completion_ids=ids) == pytest.approx([0, 0, -0.05, -0.5, -1, -1])
    assert callable_name(punish) == "soft_overlong_punishment_reward"
    hard = get_soft_overlong_punishment(max_completion_len=2, soft_punish_cache=0)
    assert hard(completion_ids=ids[:2]) == [0, -1]
    with pytest.raises(ValueError, match="soft_punish_cache is 101; choose it between 0 and max_completion_len"):
        get_soft_overlong_punishment(100, 101)


def test_soft_overlong_punishment_can_be_pickled():
    import pickle

    punish = pickle.loads(pickle.dumps(get_soft_overlong_punishment(10, 5)))
    assert punish(completion_ids=[[1] * 10]) == [-1.0]
