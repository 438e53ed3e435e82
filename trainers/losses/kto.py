"""Losses of learning from answers that are desirable or not, one at a time instead of in pairs.

Axis: `B` answers. `log_ratios` are log pi(y|x) - log pi_ref(y|x) of whole answers, in nats, (B,); `desirable` is true
where an answer is wanted, (B,). `beta` times a log-ratio is the answer's implicit reward.
"""

import torch
from torch import Tensor


def kto_loss(
    log_ratios: Tensor,
    desirable: Tensor,
    z0: Tensor | float,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Kahneman-Tversky optimization (arXiv 2402.01306, eq. 7), a loss for each answer, (B,):

        w_D (1 - sigmoid(beta (log_ratio - z0)))    of a desirable answer
        w_U (1 - sigmoid(beta (z0 - log_ratio)))    of an undesirable one

    Args:
        z0: the reference point, from `reference_point`; no gradient flows through it.
        desirable_weight, undesirable_weight: w_D and w_U, the paper's lambdas.
    """
    gain = torch.where(desirable, log_ratios - z0, z0 - log_ratios)
    loss = torch.sigmoid(-beta * gain)  # 1 - sigmoid(x) = sigmoid(-x), which keeps its digits near 0
    return torch.where(desirable, desirable_weight * loss, undesirable_weight * loss)


def apo_zero_unpaired_loss(
    log_ratios: Tensor,
    desirable: Tensor,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """The terms of APO-zero (arXiv 2408.06266), each for an answer by itself, (B,):

        w_D (1 - sigmoid(beta log_ratio))    of a desirable answer, made likelier
        w_U sigmoid(beta log_ratio)          of an undesirable one, made less likely

    It is `kto_loss` with z0 = 0: no other answer of the batch plays a part.
    """
    return kto_loss(log_ratios, desirable, 0.0, beta, desirable_weight, undesirable_weight)


def reference_point(total: Tensor, count: Tensor) -> Tensor:
    """KTO's z0 = max(0, mean of log pi(y'|x) - log pi_ref(y'|x)), where y' is an answer to another prompt than x.

    An estimate of KL(pi || pi_ref) over all prompts, biased but of low variance (arXiv 2402.01306).

    Args:
        total: sum of the log-ratios of the mismatched pairs of all processes, a scalar.
        count: how many they are.
    """
    return (total / count).clamp(min=0.0).detach()
