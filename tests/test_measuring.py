"""What trainers measure: correlations, sums and rows over processes, ends of rows."""

import json
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from outspoken.trainers.measuring import (
    EndTokens,
    RecentCorrelation,
    end_token_ids,
    ends_with,
    gather_rows,
    sum_over_processes,
)

NUMBERS = st.floats(-1e6, 1e6, allow_subnormal=False)


# ---------------------------------------------------------------------------------------------------- correlation


def test_correlation_by_hand():
    """x = 0..7, y = x^2: means 3.5 and 17.5; Sxy = 294, Sxx = 42, Syy = 2226, so r = 294 / sqrt(42 * 2226)."""
    r = RecentCorrelation()
    r.add(range(7), [x * x for x in range(7)])
    assert r.value() is None  # 7 pairs are too few
    r.add([7], [49])
    value, n = r.value()
    assert n == 8
    assert value == pytest.approx(294 / (42 * 2226) ** 0.5, rel=1e-12)


@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=60), st.integers(8, 20), st.data())
def test_only_the_newest_pairs_count(pairs, size, data):
    """However the pairs arrive, the value is that of the newest `size` of them alone."""
    r = RecentCorrelation(size)
    rest = pairs
    while rest:
        cut = data.draw(st.integers(1, len(rest)))
        r.add([x for x, _ in rest[:cut]], [y for _, y in rest[:cut]])
        rest = rest[cut:]
    x, y = np.array(pairs[-size:]).T
    if len(x) < 8 or np.ptp(x) == 0 or np.ptp(y) == 0:
        assert r.value() is None
        return
    value, n = r.value()
    assert n == len(x) and -1 <= value <= 1
    if min(np.ptp(x) / np.abs(x).max(), np.ptp(y) / np.abs(y).max()) > 1e-6:  # else rounding decides
        assert value == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-6)


def test_a_number_that_does_not_vary_has_no_correlation():
    r = RecentCorrelation()
    r.add([0.1] * 20, np.arange(20))
    assert r.value() is None
    r.add(torch.tensor([0.2]), torch.tensor([3.0]))
    assert r.value() is not None


def test_a_spread_that_is_rounding_says_nothing():
    r = RecentCorrelation(min_spread=1e-4)
    r.add(1e-6 * np.arange(10), np.arange(10))  # of standard deviation 2.9e-6
    assert r.value() is None
    r.add([0.1], [11])
    assert r.value() is not None


def test_pairs_that_are_not_finite_are_left_out():
    r, clean = RecentCorrelation(), RecentCorrelation()
    x, y = np.arange(12.0), np.arange(12.0) ** 2
    clean.add(x, y)
    r.add([*x, np.nan, 1.0], [*y, 0.0, np.inf])
    assert r.value() == clean.value()


# ------------------------------------------------------------------------------------------------ over processes


class Alone:
    """An accelerator of one process."""

    num_processes = 1

    @staticmethod
    def gather(tensor):
        return tensor


def test_sums_of_one_process():
    values = {"a/count": torch.tensor(2**24 + 1), "b": 0.25, "c": torch.tensor(True), "d": torch.tensor([1.5])}
    summed = sum_over_processes(Alone, torch.device("cpu"), **values)
    assert summed == {"a/count": 2**24 + 1, "b": 0.25, "c": 1.0, "d": 1.5}  # 2^24 + 1 is no float32


def test_rows_of_one_process_lose_their_gradient():
    rows = torch.ones(3, requires_grad=True)
    assert not gather_rows(Alone, rows).requires_grad


TWO = """
import json, sys, torch
from accelerate import Accelerator
from outspoken.trainers.measuring import gather_rows, sum_over_processes

accelerator = Accelerator(cpu=True)
rank = accelerator.process_index
sums = sum_over_processes(accelerator, accelerator.device, k=torch.tensor(2**24 + rank), n=10 * rank, x=0.5)
rows = gather_rows(accelerator, torch.arange(1.0, 1 + [2, 0][rank]))
pairs = gather_rows(accelerator, torch.full(([1, 3][rank], 2), rank + 1))
flags = gather_rows(accelerator, torch.tensor([[True], [False, False, True]][rank]))
if rank == 1:
    found = [sums, rows.tolist(), pairs.tolist(), flags.tolist()]
    open(sys.argv[1], "w").write(json.dumps(found))
accelerator.end_training()
"""


@pytest.mark.slow
def test_two_processes(tmp_path):
    """Sums are exact beyond float32; rows of unequal number, also none, stand in the order of the ranks."""
    (tmp_path / "two.py").write_text(textwrap.dedent(TWO))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    command += [str(tmp_path / "two.py"), str(tmp_path / "found")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    sums, rows, pairs, flags = json.loads((tmp_path / "found").read_text())
    assert sums == {"k": 2**25 + 1, "n": 10.0, "x": 1.0}
    assert rows == [1.0, 2.0]
    assert pairs == [[1, 1], [2, 2], [2, 2], [2, 2]]
    assert flags == [True, False, False, True]


# --------------------------------------------------------------------------------------------------- ends of rows


def test_the_last_token_with_loss_decides():
    end = EndTokens(ends=(9,), blanks=(1,))
    ids = torch.tensor(
        [
            [5, 6, 9],  # ends
            [5, 9, 6],  # goes on
            [5, 9, 1],  # a newline behind the end
            [9, 1, 1],  # two
            [5, 6, 1],  # a newline behind a word
            [5, 6, 9],  # the end carries no loss
            [9, 5, 5],  # padding behind the end
            [1, 1, 1],  # nothing but newlines
            [9, 9, 9],  # no loss at all
        ]
    )
    mask = torch.tensor(
        [[0, 1, 1], [1, 1, 1], [1, 1, 1], [1, 1, 1], [1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1], [0, 0, 0]]
    )
    expected = [True, False, True, True, False, False, True, False, False]
    assert ends_with(ids, mask, end).tolist() == expected
    assert ends_with(torch.where(mask == 1, ids, -100), mask.bool(), end).tolist() == expected
    assert ends_with(ids, mask, [9]).tolist() == [True, False, False, False, False, False, True, False, False]
    assert ends_with(ids[:, :0], mask[:, :0], end).tolist() == [False] * 9


@given(st.lists(st.tuples(st.sampled_from([1, 5, 9]), st.booleans()), min_size=1, max_size=8))
def test_ends_with_is_the_plain_reading(row):
    ids, mask = (torch.tensor([column]) for column in zip(*row))
    written = [token for token, loss in row if loss and token != 1]
    assert ends_with(ids, mask, EndTokens((9,), (1,))).tolist() == [written[-1:] == [9]]


def test_end_tokens_of_a_tokenizer(tiny_tokenizer):
    end = end_token_ids(tiny_tokenizer)
    assert {tiny_tokenizer.eos_token_id, tiny_tokenizer.convert_tokens_to_ids("<|im_end|>")} <= {*end.ends}
    newline = tiny_tokenizer.encode("\n", add_special_tokens=False)
    assert {*newline} <= {*end.blanks}
    assert all(not tiny_tokenizer.decode([token]).strip() for token in end.blanks)


@pytest.mark.parametrize(("cut", "expected"), [(0, True), (1, True), (2, False)])
def test_a_chat_ends_before_its_last_newline(tiny_tokenizer, cut, expected):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "It is blue."}]
    ids = torch.tensor(tiny_tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"])
    assert tiny_tokenizer.decode(ids[-2:]) == "<|im_end|>\n"
    ids = ids[None, : len(ids) - cut]
    assert ends_with(ids, torch.ones_like(ids), end_token_ids(tiny_tokenizer)).tolist() == [expected]
