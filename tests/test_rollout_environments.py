"""Environments and rollout functions: beside TRL's own loop, and when they hang, raise or return nonsense."""

import asyncio
import json
import threading

import pytest
import torch
from datasets import Dataset

import outspoken
from outspoken.trainers.rollouts.batch import Sampled
from outspoken.trainers.rollouts.environments import EnvironmentPool, environment_dataset
from outspoken.trainers.rollouts.rollout_func import call_rollout_func
from outspoken.trainers.rollouts.sampling import SamplingParams
from outspoken.trainers.rollouts.tools import (
    row_tools,
    run_with_tools,
    tokenize_tool_prompts,
    tool_metrics,
    tool_set,
    tool_totals,
)


def call(name, /, **arguments):
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


def add(a: int, b: int) -> int:
    """
    Adds two numbers.

    Args:
        a: The first.
        b: The second.
    """
    return a + b


class Guess:
    """A game: find the number."""

    made = 0

    def __init__(self):
        type(self).made += 1
        self.secret, self.guesses, self.thread = None, [], threading.current_thread()

    def reset(self, secret=None, **row):
        self.secret, self.guesses = secret, []
        return f" It is from 0 to {10 * secret}." if secret else None

    def guess(self, number: int) -> str:
        """
        Guesses.

        Args:
            number: The number.
        """
        self.guesses.append(number)
        return "right" if number == self.secret else "higher" if number < self.secret else "lower"

    def get_reward(self):
        return 1.0 / len(self.guesses) if self.secret in self.guesses else 0.0

    def _private(self):
        raise AssertionError


class Echo:
    """An async environment without a reward, told what to say."""

    def __init__(self):
        self.said = []

    def reset(self, **row):
        self.said = []

    async def say(self, word: str) -> str:
        """
        Says it.

        Args:
            word: The word.
        """
        await asyncio.sleep(0.001)
        self.said.append(word)
        return word * 2


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer_factory):
    return outspoken.add_response_schema(tiny_tokenizer_factory(eos_token="<|im_end|>"))


@pytest.fixture
def pool():
    """`pool(factory, ...)`: a pool that is closed afterwards."""
    made = []

    def make(*args, **kwargs):
        made.append(EnvironmentPool(*args, **kwargs))
        return made[-1]

    yield make
    for one in made:
        one.close()


def ask(question):
    return [{"role": "user", "content": question}]


# --------------------------------------------------------------------------------------------------------- beside TRL

# What the model says, by what it sees: the question's first word, and how many turns it has had.
REPLIES = {
    "plain": ["It is blue."],
    "add": [call("add", a=2, b=3), "It is 5."],
    "twice": [call("add", a=2, b=3) + call("add", a=1, b=1), "So " + call("add", a=5, b=2), "It is 7."],
    "wrong": [call("subtract", a=2) + call("add", a=1), call("add", a="x", b=1), "Hm."],
    "broken": ['<tool_call>{"name": "add", "arg</tool_call>'],
    "long": [call("add", a=10**40, b=10**40), "It is"],
    "game": [call("guess", number=5), call("guess", number=8), call("guess", number=7), "It was 7."],
    "lost": [call("guess", number=1), "I give up."],
    "echo": [call("say", word="dog"), "Done."],
}


class Model:
    """Writes `REPLIES`, `cap` tokens at most."""

    def __init__(self, tokenizer, cap):
        self.tokenizer, self.cap = tokenizer, cap
        self.seen = []

    def reply(self, ids, cap):
        text = self.tokenizer.decode(ids)
        question = text.rpartition("<|im_start|>user\n")[2].split(" ")[0]
        replies = REPLIES[question]
        turn = text.count("<|im_start|>assistant") - 1
        reply = replies[min(turn, len(replies) - 1)] + "<|im_end|>"
        return self.tokenizer.encode(reply, add_special_tokens=False)[: min(cap, self.cap)]

    def __call__(self, prompt_ids, params, *, caps=None):
        caps = caps or [params.max_new_tokens] * len(prompt_ids)
        ids = [self.reply(prompt, cap) for prompt, cap in zip(prompt_ids, caps)]
        self.seen.append(prompt_ids)
        ended = [row[-1] in params.end_ids for row in ids]
        return Sampled(ids, ended, [[-0.25] * len(row) for row in ids], [[0.5] * len(row) for row in ids])


def mine(tokenizer, rows, tools, cap, limit, environments=None):
    model = Model(tokenizer, cap)
    if environments is None:
        prompts, each = [row["prompt"] for row in rows], tool_set(tools)
    else:
        episodes = environments.start(rows)
        prompts, each = episodes.prompts, episodes.tools
    ids = tokenize_tool_prompts(tokenizer, prompts, each)
    params = SamplingParams(cap, end_ids=(tokenizer.eos_token_id,))
    rollout = run_with_tools(model, prompts, ids, tokenizer=tokenizer, tools=each, params=params, max_iterations=limit)
    return prompts, ids, rollout


@pytest.fixture(scope="module")
def theirs(tmp_path_factory, tokenizer, tiny_model_factory):
    """`theirs(rows, tools, cap, limit, factory)`: what TRL's trainer sampled in one step, and what it logged."""
    import trl

    class Scripted(trl.GRPOTrainer):
        def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
            ids = [self.script.reply(prompt, self.max_completion_length) for prompt in prompt_ids]
            return ids, [[-0.25] * len(row) for row in ids]

        def _generate(self, prompts):
            self.sampled = super()._generate(prompts)
            self.given = prompts
            return self.sampled

    def run(rows, tools, cap, limit, factory=None):
        args = trl.GRPOConfig(
            str(tmp_path_factory.mktemp("trl")),
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            gradient_checkpointing=False,
            per_device_train_batch_size=2 * len(rows),
            num_generations=2,
            max_completion_length=cap,
            max_tool_calling_iterations=limit,
            max_steps=1,
            shuffle_dataset=False,
            disable_tqdm=True,
        )
        torch.set_num_threads(1)
        trainer = Scripted(
            tiny_model_factory(),
            lambda completion_ids, **_: [float(len(ids)) for ids in completion_ids],
            args,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            tools=tools,
            environment_factory=factory,
        )
        trainer.script = Model(tokenizer, cap)
        trainer.train()
        return trainer

    return run


def same(tokenizer, prompts, ids, rollout, trainer):
    prompt_ids, completion_ids, tool_mask, completions, logprobs, *_ = trainer.sampled
    assert [list(row) for row in ids] == [list(row) for row in prompt_ids]
    assert rollout.completions == completions
    assert rollout.completion_ids == completion_ids
    assert rollout.tool_mask == tool_mask
    assert rollout.logps == logprobs
    logged = trainer.state.log_history[0]
    metrics = tool_metrics([tool_totals(rollout)])
    for name in ("tools/call_frequency", "tools/failure_frequency"):
        assert metrics[name] == pytest.approx(logged[name])
    assert prompts == trainer.given


@pytest.mark.parametrize(("cap", "limit"), [(800, None), (800, 1), (70, None)])
def test_conversations_are_trls(tokenizer, theirs, cap, limit):
    names = ("plain", "add", "twice", "wrong", "broken", "long")
    rows = [{"prompt": ask(f"{name} question")} for name in names for _ in range(2)]
    trainer = theirs(rows[::2], [add], cap, limit)
    prompts, ids, rollout = mine(tokenizer, rows, [add], cap, limit)
    same(tokenizer, prompts, ids, rollout, trainer)
    if cap == 800:
        assert rollout.turns == [
            n for n in (1, 2, 3 if limit is None else 2, 3 if limit is None else 2, 1, 2) for _ in "ab"
        ]
    else:
        assert any(rollout.overflowed)


def test_environments_are_trls(tokenizer, theirs, pool):
    rows = [
        {"prompt": ask("game on"), "secret": 7, "environment": "guess"},
        {"prompt": ask("echo this"), "secret": 0, "environment": "echo"},
        {"prompt": ask("lost it"), "secret": 3, "environment": "guess"},
        {"prompt": ask("add these"), "secret": 0, "environment": "echo"},
    ]
    factory = {"guess": Guess, "echo": Echo}
    trainer = theirs(rows, [add], 800, None, factory)
    rows = [row for row in rows for _ in range(2)]
    environments = pool(factory, tool_set([add]))
    prompts, ids, rollout = mine(tokenizer, rows, None, 800, None, environments)
    same(tokenizer, prompts, ids, rollout, trainer)
    assert prompts[0] == ask("game on It is from 0 to 70.") and prompts[2] == ask("echo this")
    logged = trainer.state.log_history[0]
    episodes = [seat.instance for seat in environments._seats["guess"]]
    ((name, reward),) = environments.reward_functions().items()
    scores = reward(environments=episodes)
    assert name == "Guess" and sum(scores) / len(scores) == pytest.approx(logged["rewards/Guess/mean"])
    assert scores == [pytest.approx(1 / 3)] * 2 + [0.0] * 2


# ------------------------------------------------------------------------------------------------------- environments


def test_instances_are_kept_and_have_a_thread_each(tokenizer, pool):
    Guess.made = 0
    environments = pool(Guess)
    rows = [{"prompt": ask("game on"), "secret": 7}] * 3
    first = environments.start(rows)
    assert Guess.made == 3 and len({id(e) for e in first.environments}) == 3
    again = environments.start(rows[:2])
    assert Guess.made == 3 and [id(e) for e in again.environments] == [id(e) for e in first.environments[:2]]
    threads = [e.thread for e in first.environments]
    assert len(set(threads)) == 3 and threading.current_thread() not in threads
    assert sorted(first.tools[0]) == ["guess"] and first.tools[0]["guess"].thread is not first.tools[1]["guess"].thread
    # The state is the conversation's own, and lasts over its turns.
    _, _, rollout = mine(tokenizer, [*rows, {"prompt": ask("lost it"), "secret": 1}], None, 800, None, environments)
    states = [seat.instance.guesses for seat in environments._seats[None]]
    assert states == [[5, 8, 7]] * 3 + [[1]]
    assert [m["content"] for m in rollout.completions[0] if m["role"] == "tool"] == ["higher", "lower", "right"]


def test_a_thread_bound_object_can_be_used(pool):
    """SQLite refuses another thread than the one that connected."""
    import sqlite3

    class Table:
        def __init__(self):
            self.connection = sqlite3.connect(":memory:")

        def reset(self, **row):
            self.connection.execute("create table if not exists t (x)")

        def count(self) -> int:
            """Counts the rows."""
            return self.connection.execute("select count(*) from t").fetchone()[0]

        def get_reward(self):
            return float(self.count())

        def close(self):
            self.connection.close()
            closed.append(self)

    closed = []
    environments = pool(Table)
    episodes = environments.start([{"prompt": ask("x")}] * 2)
    tool = episodes.tools[0]["count"]
    assert sorted(episodes.tools[0]) == ["count"]  # `close` is not the model's to call
    assert tool.thread.submit(tool.function).result(10) == 0
    (reward,) = environments.reward_functions().values()
    assert reward(environments=episodes.environments) == [0.0, 0.0]
    environments.close()
    assert {*map(id, closed)} == {*map(id, episodes.environments)} and len(closed) == 2
    environments.close()  # again is fine


def test_without_a_limit_everything_happens_here(pool):
    environments = pool(Guess, timeout=None)
    episodes = environments.start([{"prompt": ask("x"), "secret": 3}] * 2)
    assert {e.thread for e in episodes.environments} == {threading.current_thread()}


def test_a_row_without_a_prompt(pool):
    environments = pool({"guess": Guess})
    episodes = environments.start([{"secret": 2, "environment": "guess"}])
    assert episodes.prompts == [ask(" It is from 0 to 20.")]
    with pytest.raises(
        ValueError, match=r"'environment' of row 1 of the batch is 'chess'; it has to be one of .*: guess"
    ):
        environments.start([{"environment": "guess"}, {"environment": "chess"}])
    with pytest.raises(ValueError, match="prompt of row 0 of the batch is a str"):
        environments.start([{"environment": "guess", "prompt": "text"}])


def test_observations_join_the_last_message(pool):
    class Says:
        def reset(self, what=None, **row):
            return what

    environments = pool(Says)
    image = {"type": "image"}
    blocks = [{"role": "user", "content": [image]}]
    rows = [
        {"prompt": ask("a"), "what": " b"},
        {"prompt": blocks, "what": "b"},
        {"prompt": ask("a"), "what": [image]},
        {"prompt": ask("a"), "what": None},
    ]
    text_a, text_b = ({"type": "text", "text": t} for t in "ab")
    assert [p[0]["content"] for p in environments.start(rows).prompts] == [
        "a b",
        [image, text_b],
        [text_a, image],
        "a",
    ]
    assert rows[0]["prompt"] == ask("a") and blocks[0]["content"] == [image]
    with pytest.raises(TypeError, match="reset of environment 'Says' returned a int for row 0"):
        environments.start([{"prompt": ask("a"), "what": 3}])


def test_rewards_of_two_classes_of_one_name(pool):
    class Other(Guess):
        async def get_reward(self):
            return 5.0

    Other.__name__ = "Guess"
    environments = pool({"a": Guess, "b": Other, "c": Guess})
    episodes = environments.start([{"environment": name, "secret": 1} for name in "abc"])
    functions = environments.reward_functions()
    assert [*functions] == ["Guess", "Guess_2"]
    assert functions["Guess"](environments=episodes.environments) == [0.0, None, 0.0]
    assert asyncio.run(functions["Guess_2"](environments=episodes.environments)) == [None, 5.0, None]


class NoReset:
    pass


class Undescribed:
    def reset(self, **row): ...

    def move(self, x):
        return x


class NoWay:
    def __init__(self):
        raise OSError("no docker")

    def reset(self, **row): ...


@pytest.mark.parametrize(
    ("factory", "tools", "error", "match"),
    [
        (NoReset, [], TypeError, "made a NoReset, which has no method `reset`"),
        (Undescribed, [], ValueError, "'move' cannot be described to the model"),
        (NoWay, [], RuntimeError, "Making an environment with `environment_factory` raised OSError: no docker"),
        ({"no": NoWay}, [], RuntimeError, "Making an environment 'no' with"),
        ({}, [], ValueError, "`environment_factory` is an empty dict"),
    ],
)
def test_what_is_no_environment(factory, tools, error, match):
    with pytest.raises(error, match=match):
        EnvironmentPool(factory, tool_set(tools))


def test_a_tool_and_a_method_of_one_name():
    def guess() -> int:
        """Guesses."""
        return 1

    with pytest.raises(ValueError, match="'guess' is both in `tools` and a method of Guess"):
        EnvironmentPool(Guess, tool_set([guess]))


class Stuck:
    """Hangs where its row says."""

    release = threading.Event()

    def reset(self, where="", **row):
        self.where = where
        self._maybe("reset")

    def step(self) -> str:
        """Goes on."""
        self._maybe("step")
        return "stepped"

    def get_reward(self):
        self._maybe("get_reward")
        return 1.0

    def close(self):
        self._maybe("close")

    def _maybe(self, place):
        if self.where == place:
            self.release.wait(20)
        elif self.where == f"raise {place}":
            raise KeyError("gone")


@pytest.fixture
def release():
    Stuck.release.clear()
    yield
    Stuck.release.set()


def test_a_reset_that_hangs_or_raises(pool, release):
    environments = pool(Stuck, timeout=0.2)
    rows = [{}, {"where": "reset"}, {}]
    with pytest.raises(
        RuntimeError, match=r"The reset of environment 'Stuck' for row 1 of the batch did not return within 0\.2 s"
    ):
        environments.start(rows)
    with pytest.raises(
        RuntimeError, match="The reset of environment 'Stuck' for row 2 of the batch raised KeyError: 'gone'"
    ):
        environments.start([{}, {}, {"where": "raise reset"}])
    with pytest.raises(RuntimeError, match="environment 'me' for row 0"):
        pool({"me": Stuck}, timeout=0.2).start([{"environment": "me", "where": "raise reset"}])


def test_a_step_that_hangs_costs_one_conversation(tokenizer, pool, release, caplog):
    environments = pool(Stuck, timeout=0.2)
    rows = [{"where": "step"}, {}, {"where": "raise step"}]
    episodes = environments.start(rows)
    ids = tokenize_tool_prompts(tokenizer, episodes.prompts, episodes.tools)
    replies = [call("step"), call("step"), "Done."]

    def generate(prompt_ids, params, *, caps=None):
        turns = [tokenizer.decode(p).count("<|im_start|>assistant") - 1 for p in prompt_ids]
        out = [tokenizer.encode(replies[t] + "<|im_end|>", add_special_tokens=False) for t in turns]
        return Sampled(out, [True] * len(out))

    params = SamplingParams(500, end_ids=(tokenizer.eos_token_id,))
    rollout = run_with_tools(
        generate, episodes.prompts, ids, tokenizer=tokenizer, tools=episodes.tools, params=params, timeout=0.2
    )
    answers = [[m["content"] for m in messages if m["role"] == "tool"] for messages in rollout.completions]
    assert answers[1:] == [["stepped"] * 2, ["{'error': \"'gone'\"}"] * 2]
    assert answers[0] == [
        "{'error': 'step did not return within 0.2 seconds.'}",
        "{'error': 'step cannot be called: an earlier call has not returned yet.'}",
    ]
    assert rollout.logps is None and rollout.failures == [2, 0, 2] and rollout.timeouts == [2, 0, 0]
    assert "the first of tool 'step' of environment 'Stuck' of row 0 of the batch" in caplog.text
    # What hangs is not scored, and gives way to a new one.
    (reward,) = environments.reward_functions().values()
    assert reward(environments=episodes.environments) == [None, 1.0, 1.0]
    after = environments.start([{}, {}, {}])
    same_one = [a is b for a, b in zip(after.environments, episodes.environments)]
    assert same_one == [False, True, True]
    assert reward(environments=after.environments) == [1.0, 1.0, 1.0]


def test_a_score_and_a_close_that_hang(pool, release, caplog):
    environments = pool(Stuck, timeout=0.2)
    episodes = environments.start([{"where": "get_reward"}, {"where": "close"}, {"where": "raise close"}, {}])
    (reward,) = environments.reward_functions().values()
    assert reward(environments=episodes.environments) == [None, 1.0, 1.0, 1.0]
    assert "The get_reward of environment 'Stuck' for row 0 of the batch did not return within 0.2 s" in caplog.text
    environments.close()
    assert "The close of environment 'Stuck' failed (CallTimeout" in caplog.text
    assert "The close of environment 'Stuck' failed (KeyError: 'gone')" in caplog.text


def test_a_group_begins_with_the_same_task(pool):
    """Without a dataset each row has a seed, which its copies share; environments that take none get none."""

    class Task:
        def reset(self, seed, **row):
            return f"task {seed}"

    class NoSeed:
        def reset(self, prompt):
            return "task"

    rows = environment_dataset(3)
    assert rows.column_names == ["prompt", "seed"] and len(set(rows["seed"])) == 3
    group = [row for row in rows for _ in range(2)]
    prompts = pool(Task).start(group).prompts
    assert prompts[0] == prompts[1] != prompts[2] == prompts[3]
    assert pool(NoSeed).start(group).prompts == [ask("task")] * 6


def test_rows_choose_among_an_environments_tools(pool):
    episodes = pool(Guess, tool_set([add])).start([{"tools": ["add"]}, {"tools": None}])
    chosen = [row_tools(tools, [row])[0] for tools, row in zip(episodes.tools, [{"tools": ["add"]}, {"tools": None}])]
    assert [sorted(tools) for tools in chosen] == [["add"], ["add", "guess"]]


# -------------------------------------------------------------------------------------------------- rollout functions

PROMPTS = ["a", "b"]


def output(**changes):
    good = {"prompt_ids": [[1], [2, 3]], "completion_ids": [[4, 5], [6]], "logprobs": [[-0.5, -1.0], [-2.0]]}
    return {key: value for key, value in (good | changes).items() if value != "left out"}


def test_a_rollout_function():
    seen = []

    def rollout_func(prompts, trainer):
        seen.append((prompts, trainer))
        return output(
            prompt_ids=[torch.tensor([1]), [2, 3]],
            logprobs=[[[-0.5], None], [-2.0]],
            env_mask=[[1, 0], [True]],
            score=[0.5, 0.25],
            game="chess",
        )

    rollout = call_rollout_func(rollout_func, PROMPTS, "trainer")
    assert seen == [(PROMPTS, "trainer")]
    assert rollout.prompt_ids == [[1], [2, 3]] and rollout.completion_ids == [[4, 5], [6]]
    assert rollout.logps[0][0] == -0.5 and rollout.logps[0][1] != rollout.logps[0][1] and rollout.logps[1] == [-2.0]
    assert rollout.tool_mask == [[1, 0], [1]]
    assert rollout.extra == {"score": [0.5, 0.25], "game": ["chess", "chess"]}
    plain = call_rollout_func(lambda prompts, trainer: output(logprobs=None), PROMPTS, None)
    assert plain.logps is None and plain.tool_mask is None and plain.extra == {}
    tensors = call_rollout_func(
        lambda *_: output(completion_ids=torch.tensor([[4, 5], [6, 7]]), logprobs=torch.full((2, 2), -1.0)),
        PROMPTS,
        None,
    )
    assert tensors.completion_ids == [[4, 5], [6, 7]] and tensors.logps == [[-1.0, -1.0]] * 2


@pytest.mark.parametrize(
    ("returned", "match"),
    [
        ([1], "returned a list; return a dict"),
        (output(logprobs="left out"), "returned no 'logprobs'"),
        (output(prompt_ids=[[1]]), "1 entries in 'prompt_ids' for 2 prompts"),
        (output(completion_ids="ab"), "returned a str as 'completion_ids'"),
        (output(completion_ids=[[4, 5], []]), "no tokens in row 1 of 'completion_ids'"),
        (output(completion_ids=[[4, 5.5], [6]]), r"returned '\[4, 5.5\]' in row 0 of 'completion_ids'"),
        (output(completion_ids=[[4, -5], [6]]), "the token -5 in row 0 of 'completion_ids'"),
        (output(logprobs=[[-1.0], [-2.0]]), "1 numbers in row 0 of 'logprobs' for a completion of 2 tokens"),
        (output(logprobs=[[-1.0, 0.7], [-2.0]]), "returned 0.7 in row 0 of 'logprobs'"),
        (output(logprobs=[[-1.0, -1.0], 3]), "returned a int in row 1 of 'logprobs'"),
        (output(env_mask=[[1, 1], [2]]), "returned 2 in row 1 of 'env_mask'"),
        (output(env_mask=[[1, 1]]), "1 entries in 'env_mask'"),
        (output(score=[1.0]), "1 entries in 'score' for 2 prompts"),
    ],
)
def test_what_a_rollout_function_may_not_return(returned, match):
    with pytest.raises((ValueError, TypeError), match=match):
        call_rollout_func(lambda prompts, trainer: returned, PROMPTS, None)


def test_a_rollout_function_that_raises():
    def broken(prompts, trainer):
        raise ConnectionError("gone")

    with pytest.raises(RuntimeError, match="rollout_func raised ConnectionError: gone"):
        call_rollout_func(broken, PROMPTS, None)
