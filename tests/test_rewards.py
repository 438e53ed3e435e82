"""The ready-made reward functions, beside TRL's, and what a model may write to fool or to stop them."""

import json
import math
import pickle
import random
import subprocess
import sys
import threading
import time
from importlib.util import find_spec

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outspoken.trainers.rewards import (
    accuracy_reward,
    callable_name,
    completion_text,
    exact_match_reward,
    get_cosine_scaled_reward,
    get_exact_match_reward,
    get_format_reward,
    get_length_reward,
    get_repetition_penalty_reward,
    get_soft_overlong_punishment,
    math_check,
    reasoning_accuracy_reward,
    think_format_reward,
)

needs_math_verify = pytest.mark.skipif(find_spec("math_verify") is None, reason="math-verify is not installed")


def messages(texts):
    return [[{"role": "assistant", "content": text}] for text in texts]


def test_names():
    import trl.rewards
    from trl.rewards import _import_structure

    import outspoken.rewards

    for name in (name for names in _import_structure.values() for name in names):
        assert getattr(outspoken.rewards, name) is getattr(outspoken, name)
        assert callable_name(getattr(outspoken, name)) == callable_name(getattr(trl.rewards, name))
    made = {
        "get_soft_overlong_punishment": (9, 3),
        "get_repetition_penalty_reward": (),
        "get_cosine_scaled_reward": (9,),
    }
    for name, arguments in made.items():  # the metrics are called like this
        ours, theirs = (callable_name(getattr(library, name)(*arguments)) for library in (outspoken, trl.rewards))
        assert ours == theirs


def test_reward_functions_are_there_without_torch():
    code = "import sys, outspoken.rewards; assert not {'torch', 'transformers', 'math_verify'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_text_of_a_completion():
    assert completion_text("text") == "text"
    assert completion_text([{"content": "no role"}]) == "no role"
    turns = [{"role": "assistant", "content": "first"}, {"role": "tool", "content": r"\boxed{4}"}]
    assert completion_text(turns) == ""  # what a tool prints is not the answer
    assert completion_text([*turns, {"role": "assistant", "content": [{"type": "text", "text": "last"}]}]) == "last"
    assert completion_text([{"role": "assistant", "content": None, "tool_calls": []}]) == completion_text([]) == ""


# ---------------------------------------------------------------------- exact answers


def test_exact_match():
    texts = [" 4\n", "5", "4"]
    assert exact_match_reward(completions=texts, answer=["4", "4", None]) == [1.0, 0.0, None]
    assert exact_match_reward(completions=messages(texts), answer=[4, 4, 4]) == [1.0, 0.0, 1.0]
    with pytest.raises(ValueError, match="needs a dataset column 'answer'"):
        exact_match_reward(completions=texts)


def test_exact_match_of_a_part():
    gsm8k = get_exact_match_reward("gold", r"####\s*(-?[\d,.]+)")
    texts = ["so #### 4", "#### 4 no, #### 5", "4", "#### ", "#### 1,000"]
    assert gsm8k(completions=texts, gold=["4", 4, "4", "4", "1,000"], prompts=texts) == [1.0, 0.0, 0.0, 0.0, 1.0]
    assert gsm8k(completions=messages(texts[:2]), gold=["4", None]) == [1.0, None]
    assert get_exact_match_reward()(completions=[" a "], answer=["a"]) == [1.0]
    assert get_exact_match_reward(pattern="[ab]")(completions=["xa-b"], answer=["b"]) == [1.0]
    assert get_exact_match_reward(pattern="x|(y)")(completions=["x"], answer=["x"]) == [
        0.0
    ]  # a group that is not there
    with pytest.raises(ValueError, match="needs the dataset column 'gold' that it was given"):
        gsm8k(completions=texts)
    assert pickle.loads(pickle.dumps(gsm8k))(completions=["#### 4"], gold=["4"]) == [1.0]


# ---------------------------------------------------------------------- format


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
        "</think><think></think>",
        "",
    ],
)
def test_think_format_is_trls(text):
    from trl.rewards import think_format_reward as theirs

    assert think_format_reward(messages([text])) == theirs(messages([text]))
    assert think_format_reward([text]) == think_format_reward(messages([text]))


@given(st.lists(st.sampled_from(["<think>", "</think>", "a", "\n", "<", "think>", ""]), max_size=8).map("".join))
def test_think_format_is_trls_on_anything(text):
    from trl.rewards import think_format_reward as theirs

    assert think_format_reward(messages([text])) == theirs(messages([text]))


def test_think_format_of_a_million_characters():
    """A backtracking pattern would take hours on this one."""
    texts = ["<think>" + "</think>" * 125_000 + "<think>", "<think>" * 140_000, "<think>" + "a" * 10**6 + "</think>"]
    assert think_format_reward(texts) == [0.0, 0.0, 1.0]


def test_format():
    answer = get_format_reward(r"<answer>.*</answer>\s*")
    assert answer(completions=["<answer>4\n</answer>\n", "<answer>4", "x<answer>4</answer>"]) == [1.0, 0.0, 0.0]
    assert answer(completions=messages(["<answer>4</answer>"])) == [1.0]
    assert callable_name(pickle.loads(pickle.dumps(answer))) == "format_reward"


# ---------------------------------------------------------------------- length and repetition


def test_soft_overlong_punishment():
    """DAPO, eq. 13, with L = 100 and C = 20: free up to 80, then (80 - length) / 20, then -1."""
    punish = get_soft_overlong_punishment(max_completion_len=100, soft_punish_cache=20)
    ids = [[1] * length for length in (0, 80, 81, 90, 100, 101)]
    assert punish(completion_ids=ids) == pytest.approx([0, 0, -0.05, -0.5, -1, -1])
    hard = get_soft_overlong_punishment(max_completion_len=2, soft_punish_cache=0)
    assert hard(completion_ids=ids[:2]) == [0, -1]
    with pytest.raises(ValueError, match="soft_punish_cache is 101; choose it between 0 and max_completion_len"):
        get_soft_overlong_punishment(100, 101)
    assert pickle.loads(pickle.dumps(punish))(completion_ids=[[1] * 90]) == [-0.5]


@given(st.lists(st.integers(0, 60), min_size=1, max_size=9), st.integers(0, 50), st.integers(0, 50))
def test_soft_overlong_punishment_is_trls(lengths, cap, cache):
    from trl.rewards import get_soft_overlong_punishment as theirs

    cache = min(cap, cache)
    ids = [[1] * length for length in lengths]
    ours = get_soft_overlong_punishment(cap, cache)(ids)
    assert ours == theirs(max_completion_len=cap, soft_punish_cache=cache)(ids)


def test_length():
    """L1, eq. 1, without its first term: -0.0003 * |target - length|."""
    ids = [[1] * 100, [1] * 300]
    assert get_length_reward(200)(completion_ids=ids) == pytest.approx([-0.03, -0.03])
    by_column = get_length_reward("wanted", alpha=0.01)
    assert by_column(completion_ids=ids, wanted=[100, None]) == [0.0, None]
    with pytest.raises(ValueError, match="get_length_reward needs the dataset column 'wanted'"):
        by_column(completion_ids=ids)
    assert callable_name(by_column) == "length_reward"


def test_repetition():
    """Of the 4 bigrams of 5 5 5 5 5 one is new: 3/4 are repeated."""
    penalty = get_repetition_penalty_reward(ngram_size=2, max_penalty=-2.0)
    assert penalty(completion_ids=[[1, 2, 3, 4], [5] * 5, [1], []]) == [0.0, -1.5, 0.0, 0.0]
    with pytest.raises(ValueError, match="ngram_size is 0; choose 1 or more"):
        get_repetition_penalty_reward(0)
    with pytest.raises(ValueError, match="max_penalty is 1; choose 0 or less"):
        get_repetition_penalty_reward(max_penalty=1)


@given(st.lists(st.lists(st.integers(0, 3), max_size=12), max_size=5), st.integers(1, 5), st.floats(-3, 0))
def test_repetition_is_trls(ids, size, worst):
    from trl.rewards import get_repetition_penalty_reward as theirs

    ours = get_repetition_penalty_reward(size, worst)(ids)
    assert ours == pytest.approx(theirs(size, worst)(ids))


# ---------------------------------------------------------------------- mathematics

# (right answer, completion): numbers, fractions, units, sets, intervals, matrices, equations, text, and what is none.
ANSWERS = [
    (r"\frac{1}{3}", r"My answer is \boxed{\frac{1}{3}}"),
    (r"\frac{1}{3}", r"My answer is \boxed{\frac{1}{2}}"),
    (r"$\frac{1}{3}$", r"\boxed{\frac{2}{6}}"),
    ("0.5", r"\boxed{\frac12}"),
    ("1/2", "the answer is $0.5$"),
    ("4", "4"),
    ("4", "The answer is 4."),
    ("4", "$4$"),
    ("4", r"\boxed{5} or rather \boxed{4}"),
    ("4", r"\boxed{4} or rather \boxed{5}"),
    ("4", r"\boxed{4, 5}"),
    ("4", r"\boxed{}"),
    ("4", r"\boxed{\boxed{4}}"),
    ("4", r"\boxed{{{4}}}"),
    ("4", r"\boxed{4"),
    ("", r"\boxed{4}"),
    ("no number here", r"\boxed{4}"),
    (r"$\{1, 2, 3\}$", r"\boxed{\{3, 2, 1\}}"),
    (r"$(1, 2)$", r"\boxed{(1, 2)}"),
    (r"$[0, \infty)$", r"\boxed{[0,\infty)}"),
    (r"$x^2 + 2x + 1$", r"\boxed{(x+1)^2}"),
    (r"$x = 3$", r"\boxed{3}"),
    ("3", r"\boxed{x = 3}"),
    (r"$\sqrt{8}$", r"\boxed{2\sqrt{2}}"),
    (r"$\pi$", r"\boxed{3.14159}"),
    ("1000", r"\boxed{1,000}"),
    ("10 cm", r"\boxed{10\text{ cm}}"),
    ("10", r"\boxed{10\%}"),
    ("50%", r"\boxed{0.5}"),
    (r"$\begin{pmatrix}1 & 2\\3 & 4\end{pmatrix}$", r"\boxed{\begin{pmatrix}1 & 2\\3 & 4\end{pmatrix}}"),
    (r"$\text{Monday}$", r"\boxed{\text{Monday}}"),
    ("-7", r"so $-7$ it is"),
    ("2^{10}", r"\boxed{1024}"),
    (r"$10^{30}$", r"\boxed{1" + "0" * 30 + "}"),
    (r"$\frac{a}{b}$", r"\boxed{a/b}"),
    ("4", "<think>4</think>"),
    ("4", ""),
]


@pytest.fixture(scope="module")
def warm():
    """The worker that checks answers takes seconds to start on a busy machine."""
    math_check.check_answers([("1", r"\boxed{1}")])


def beside_trl(ours, theirs, texts, solutions, **options):
    """Rewards and logged columns of both."""
    logged = {"ours": {}, "theirs": {}}
    found = [
        function(messages(texts), solution=solutions, log_extra=logged[name].__setitem__, **options)
        for name, function in (("ours", ours), ("theirs", theirs))
    ]
    assert logged["ours"] == logged["theirs"]
    return found


@needs_math_verify
def test_accuracy_is_trls(warm):
    from trl.rewards import accuracy_reward as theirs

    solutions, texts = zip(*ANSWERS)
    ours, trls = beside_trl(accuracy_reward, theirs, texts, solutions)
    assert ours == trls
    assert {0.0, 1.0, None} == set(ours)
    assert accuracy_reward(completions=list(texts), solution=solutions) == ours  # plain text


@needs_math_verify
@pytest.mark.parametrize("delimiters", [None, ["</think>"], ["</reasoning>", "</think>"]])
def test_reasoning_accuracy_is_trls(warm, delimiters):
    from trl.rewards import reasoning_accuracy_reward as theirs

    texts = [f"<think> maybe \\boxed{{7}} {end} {answer}" for answer in (r"\boxed{4}", "4", "") for end in ENDS]
    ours, trls = beside_trl(
        reasoning_accuracy_reward, theirs, texts, ["4"] * len(texts), reasoning_delimiters=delimiters
    )
    assert ours == trls and {0.0, 1.0} == set(ours)


ENDS = ["</think>", "", "</think> no </think>", "</reasoning>", "</think></reasoning>", "</reasoning></think>"]


@needs_math_verify
def test_cosine_scaled_is_trls(warm):
    from trl.rewards import get_cosine_scaled_reward as theirs

    rng = random.Random(0)
    texts = [r"\boxed{4}", r"\boxed{5}"] * 20
    ids = [[1] * rng.choice([0, 1, 50, 99, 100, 101, 500]) for _ in texts]
    solutions = ["4"] * 38 + ["?", "?"]
    for values in ((), (-2.0, -0.1, 0.2, 3.0)):
        ours = get_cosine_scaled_reward(100, *values)(messages(texts), solutions, ids, prompts=texts)
        assert ours == pytest.approx(theirs(100, *values)(messages(texts), solutions, ids))


def test_cosine_scaled_by_hand():
    """Half a cosine from 1 down to 0.5 where right, from -1 up to -0.5 where wrong."""
    by_match = get_cosine_scaled_reward(max_len=90, is_correct=get_exact_match_reward("gold"))
    texts, gold = ["4", "4", "4", "5", "5", "4"], ["4", "4", "4", "4", "4", None]
    ids = [[1] * length for length in (0, 30, 200, 0, 30, 5)]
    found = by_match(completions=texts, completion_ids=ids, gold=gold)
    assert found[:5] == pytest.approx([1.0, 0.5 + 0.25 * 1.5, 0.5, -1.0, -0.5 - 0.25 * 1.5]) and found[5] is None
    assert math.isclose(math.cos(math.pi / 3), 0.5)  # which the second and the fifth go by
    assert pickle.loads(pickle.dumps(by_match))(completions=["4"], completion_ids=[[]], gold=["4"]) == [1.0]
    with pytest.raises(ValueError, match="max_len is 0"):
        get_cosine_scaled_reward(0)


@needs_math_verify
def test_accuracy_on_a_thread(warm):
    """Where math-verify's own time limit, a signal, fails."""
    found = []
    thread = threading.Thread(target=lambda: found.append(accuracy_reward([r"\boxed{\frac{1}{2}}"], ["1/2"])))
    thread.start()
    thread.join(60)
    assert found == [[1.0]]


@needs_math_verify
def test_what_accuracy_logs(warm):
    extra, metrics = {}, {}
    found = accuracy_reward(
        [r"\boxed{4}", "four"], ["4", None], log_extra=extra.__setitem__, log_metric=metrics.__setitem__
    )
    assert found == [1.0, None]
    assert extra == {
        "solution": ["4", None],
        "gold_parsed": ["[4, '4']", "[unparseable]"],
        "answer_parsed": ["[4, '4']", "[skipped]"],
    }
    assert metrics == {"accuracy_reward/timed_out": 0.0}
    with pytest.raises(ValueError, match="accuracy_reward needs a dataset column 'solution'"):
        accuracy_reward([r"\boxed{4}"])


def test_without_math_verify(monkeypatch):
    monkeypatch.setattr(math_check, "find_spec", lambda name: None)
    with pytest.raises(
        ImportError, match=r"reasoning_accuracy_reward needs math-verify; install it with `pip install"
    ):
        reasoning_accuracy_reward(["a"], ["b"])


@needs_math_verify
@pytest.mark.slow
def test_answers_made_to_stop_the_checker(warm):
    """None of these is right, and none may take much longer than its limit, or the machine's memory."""
    nasty = [
        r"\boxed{9^{9^{9^{9^9}}}}",
        r"\boxed{" + "9" * 20_000 + "^{" + "9" * 20_000 + "}}",
        r"\boxed{(10^{10^{8}})!}",
        r"\boxed{\sum_{i=1}^{10^{12}} \sin(i^{i})}",
        r"\boxed{" * 3000 + "4" + "}" * 3000,
        r"\boxed{" + "{" * 5000 + "4" + "}" * 5000 + "}",
        r"\boxed{" + r"\frac{1}{" * 400 + "4" + "}" * 400 + "}",
        r"\boxed{" + "(" * 2000 + "4" + ")" * 2000 + "}",
        "$" * 100_000,
        r"\boxed{" + "4+" * 20_000 + "4}",
        "a" * 10**6,
        "\x00\ud800 \\boxed{\x00}",
    ]
    began = time.monotonic()
    found = accuracy_reward(nasty, ["3"] * len(nasty))
    assert found == [0.0] * len(nasty)
    assert time.monotonic() - began < 2 * len(nasty) * math_check.SECONDS
    assert accuracy_reward([r"\boxed{3}", r"\boxed{4}"], ["3", "3"]) == [1.0, 0.0]  # and it goes on


@needs_math_verify
def test_a_check_that_is_broken_off(warm, monkeypatch, tmp_path):
    """A worker that hangs on some answers: those are wrong, a right answer that hangs scores nobody, others go on."""
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import json, sys, time\n"
        "print(json.dumps('ready'), flush=True)\n"
        "for line in sys.stdin:\n"
        "    gold, answer = json.loads(line)\n"
        "    if answer == 'dies': sys.exit(1)\n"
        "    if 'hangs' in (gold, answer): time.sleep(60)\n"
        "    print(json.dumps([float(gold == answer), gold, answer]), flush=True)\n"
    )
    idle, math_check._idle[:] = math_check._idle[:], []
    monkeypatch.setattr(math_check, "WORKER", worker)
    monkeypatch.setattr(math_check, "SECONDS", 0.3)
    monkeypatch.setattr(math_check, "_slow", set())
    try:
        metrics = {}
        found = accuracy_reward(
            ["4", "hangs", "4", "dies", "5", "4"],
            ["4", "4", "hangs", "4", "4", "hangs"],
            log_metric=metrics.__setitem__,
        )
        assert found == [1.0, 0.0, None, 0.0, 0.0, None]
        assert metrics == {"accuracy_reward/timed_out": 4 / 6}
        (worker,) = math_check._idle
        worker.process.kill()
        worker.process.wait()
        assert accuracy_reward(["4"], ["4"]) == [1.0]  # killed from outside while it had nothing to do
    finally:
        math_check._close_idle()
        math_check._idle[:] = idle


def test_a_checker_that_does_not_start(monkeypatch, tmp_path):
    worker = tmp_path / "worker.py"
    worker.write_text("print('\"ImportError: no sympy\"')\n")
    monkeypatch.setattr(math_check, "WORKER", worker)
    monkeypatch.setattr(math_check, "_idle", [])
    with pytest.raises(RuntimeError, match="math-verify does not start: ImportError: no sympy"):
        math_check.check_answers([("4", "4")])


@needs_math_verify
def test_many_answers_are_checked_by_several_processes(warm, monkeypatch):
    monkeypatch.setattr(math_check, "_cpus", lambda: 2)
    monkeypatch.setattr(math_check, "PER_WORKER", 4)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    answers = [rf"\boxed{{{i % 3}}}" for i in range(24)]
    assert accuracy_reward(answers, ["1"] * 24) == [float(i % 3 == 1) for i in range(24)]
    assert 1 <= len(math_check._idle) <= 2


@needs_math_verify
@pytest.mark.slow
def test_no_process_is_left_behind(tmp_path):
    """Neither when a script ends, which is not run again by its workers, nor when it is killed."""
    code = (
        "import os, signal, sys\nprint('began', flush=True)\n"
        "from outspoken.trainers.rewards import accuracy_reward, math_check\n"
        "assert accuracy_reward([r'\\boxed{4}'], ['4']) == [1.0]\n"
        "print(math_check._idle[0].process.pid, flush=True)\n"
        "if sys.argv[1] == 'killed': os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    script = tmp_path / "script.py"
    script.write_text(code)
    import psutil

    for how in ("ends", "killed"):
        done = subprocess.run([sys.executable, str(script), how], capture_output=True, text=True, timeout=120)
        began, pid = done.stdout.split()
        assert began == "began", json.dumps(done.stderr)
        deadline = time.monotonic() + 30
        while psutil.pid_exists(int(pid)) and time.monotonic() < deadline:
            if psutil.Process(int(pid)).status() == psutil.STATUS_ZOMBIE:
                break
            time.sleep(0.05)
        else:
            assert not psutil.pid_exists(int(pid)), how
