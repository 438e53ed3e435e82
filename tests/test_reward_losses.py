"""Losses of reward models, against arithmetic written out."""

import math

import pytest
import torch

from outspoken.trainers.losses.reward import bradley_terry_loss, centering_loss


def test_bradley_terry_is_the_negative_log_of_the_probability_that_the_chosen_wins():
    chosen, rejected = torch.tensor([2.0, 0.0, -1.0]), torch.tensor([1.0, 0.0, 1.0])
    loss = bradley_terry_loss(chosen, rejected)
    # p = e^r_w / (e^r_w + e^r_l)
    expected = [-math.log(math.exp(w) / (math.exp(w) + math.exp(r))) for w, r in ((2, 1), (0, 0), (-1, 1))]
    assert loss.tolist() == pytest.approx(expected, rel=1e-6)
    assert expected[1] == pytest.approx(math.log(2))


def test_a_margin_is_how_far_the_better_answer_must_be_ahead():
    loss = bradley_terry_loss(torch.tensor([2.0, 2.0]), torch.tensor([1.0, 1.0]), torch.tensor([1.0, 3.0]))
    assert loss.tolist() == pytest.approx([math.log(2), math.log(1 + math.exp(2))], rel=1e-6)


def test_several_scores_each_have_their_own_order_and_weight():
    chosen = torch.tensor([[1.0, 3.0, 5.0], [0.0, 1.0, 0.5]])
    rejected = torch.tensor([[0.0, 1.0, 0.0], [2.0, 0.0, 0.5]])
    preference = torch.tensor([[1.0, -1.0, 0.0], [-0.5, 1.0, 1.0]])
    loss = bradley_terry_loss(chosen, rejected, torch.tensor([[0.0], [1.0]]), preference)

    def softplus(x):
        return math.log(1 + math.exp(x))

    expected = [[softplus(-1), softplus(2), 0.0], [0.5 * softplus(-1), softplus(0), softplus(1)]]
    for row, wanted in zip(loss.tolist(), expected):
        assert row == pytest.approx(wanted, rel=1e-6)


def test_gradients_and_extremes():
    chosen = torch.tensor([1.0, -1e4, 1e4], requires_grad=True)
    rejected = torch.tensor([0.0, 0.0, 0.0], requires_grad=True)
    loss = bradley_terry_loss(chosen, rejected)
    assert loss.tolist()[1:] == [1e4, 0.0]
    loss.sum().backward()
    wrong = 1 / (1 + math.exp(1))  # the probability that the rejected one wins
    assert chosen.grad.tolist() == pytest.approx([-wrong, -1.0, 0.0], rel=1e-6)
    assert rejected.grad.tolist() == pytest.approx([wrong, 1.0, 0.0], rel=1e-6)


def test_centering_squares_the_sum():
    assert centering_loss(torch.tensor([2.0, -1.0]), torch.tensor([1.0, 1.0])).tolist() == [9.0, 0.0]
