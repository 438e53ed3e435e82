"""Losses of supervised fine-tuning, from the log-probabilities of the labels.

Every function takes `logps` of any shape, zero where nothing is supervised, and `num_tokens`, the count of supervised
tokens of the whole optimizer step (not of this micro-batch): so gradient accumulation weighs every token the same,
however uneven the micro-batches are. A step without any supervised token gives 0, not 0 / 0.
"""

import torch
from torch import Tensor


def nll_loss(logps: Tensor, num_tokens: Tensor | int) -> Tensor:
    """Negative log-likelihood: `-sum_t log p(y_t) / num_tokens`, a scalar in nats per token."""
    return -logps.sum() / _at_least_one(num_tokens, logps)


def dft_loss(logps: Tensor, num_tokens: Tensor | int) -> Tensor:
    """Dynamic fine-tuning: `-sum_t sg[p(y_t)] log p(y_t) / num_tokens`, where sg stops the gradient.

    Weighing each token by its own probability cancels the inverse-probability factor that makes the gradient of the
    plain likelihood a badly scaled policy gradient (arXiv 2508.05629).
    """
    return -(logps.detach().exp() * logps).sum() / _at_least_one(num_tokens, logps)


def smoothed_nll_loss(logps: Tensor, mean_logps: Tensor, epsilon: float, num_tokens: Tensor | int) -> Tensor:
    """Label smoothing: the target is `1 - epsilon` on the label and `epsilon / V` on each of the V tokens
    (arXiv 1512.00567).

    Args:
        mean_logps: mean over the vocabulary of the log-probabilities, zero where nothing is supervised.
    """
    return -((1 - epsilon) * logps + epsilon * mean_logps).sum() / _at_least_one(num_tokens, logps)


def _at_least_one(num_tokens: Tensor | int, like: Tensor) -> Tensor:
    return torch.as_tensor(num_tokens, device=like.device).clamp(min=1)
