"""Losses of reward models that learn from pairs of answers.

Axes: `B` pairs, `S` scores that each answer gets. `chosen` and `rejected` are the scores of the two answers of a pair,
of equal shape, (B,) or (B, S).
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def bradley_terry_loss(
    chosen: Tensor, rejected: Tensor, margin: Tensor | float = 0.0, preference: Tensor | None = None
) -> Tensor:
    """Negative log-likelihood of the pair's order (arXiv 2203.02155, eq. 1), for each pair and score:

        -log sigmoid(chosen - rejected - margin)

    Args:
        margin: by how much the better answer should be ahead (arXiv 2307.09288, section 3.2.2), broadcast to the scores.
        preference: p in [-1, 1], broadcast to the scores. Where it is negative the rejected answer is the better one
            under this score; the loss is weighed with |p|, so 0 leaves the pair out. None: 1 everywhere.
    """
    ahead = chosen - rejected
    if preference is None:
        return -logsigmoid(ahead - margin)
    return -preference.abs() * logsigmoid(preference.sign() * ahead - margin)


def centering_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """`(chosen + rejected)^2` for each pair and score, which draws the scores' mean to 0 (arXiv 2312.09244, eq. 2).

    The order of answers fixes scores only up to a constant for each prompt; this fixes the constant.
    """
    return torch.square(chosen + rejected)
