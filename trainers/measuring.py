"""What trainers measure beside the loss: sums and rows over processes, whether a row ends, how two numbers correlate."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from numpy.typing import ArrayLike
from torch import Tensor
from transformers import PreTrainedTokenizerBase

T = TypeVar("T")

# Implicit rewards of less spread than this, in nats, are the rounding of log-probabilities of some hundred nats.
REWARD_ROUNDING = 1e-4


class RecentCorrelation:
    """Pearson's correlation of two numbers over the newest `size` pairs. Pairs that are not finite are left out.

    Args:
        min_spread: a standard deviation of the first number below which it says nothing, being rounding.
    """

    MIN_PAIRS = 8

    def __init__(self, size: int = 512, min_spread: float = 0.0):
        self.min_spread = min_spread
        self._pairs = np.empty((size, 2))
        self._next = 0  # where the next pair goes
        self._filled = 0

    def add(self, xs: ArrayLike, ys: ArrayLike) -> None:
        """Take in N pairs; `xs` and `ys` are numbers of shape (N,), tensors on the CPU included."""
        pairs = np.stack([np.asarray(xs, dtype=np.float64), np.asarray(ys, dtype=np.float64)], axis=1)
        size = len(self._pairs)
        pairs = pairs[np.isfinite(pairs).all(axis=1)][-size:]
        self._pairs[(self._next + np.arange(len(pairs))) % size] = pairs
        self._next = (self._next + len(pairs)) % size
        self._filled = min(self._filled + len(pairs), size)

    def value(self) -> tuple[float, int] | None:
        """The correlation and the number of pairs; None below 8 pairs, or where a number does not vary."""
        pairs = self._pairs[: self._filled]
        if self._filled < self.MIN_PAIRS or (pairs == pairs[0]).all(axis=0).any():
            return None
        if pairs[:, 0].std() < self.min_spread:
            return None
        pairs = pairs / np.abs(pairs).max(axis=0)  # squares of large and small numbers stay in range
        x, y = (pairs - pairs.mean(axis=0)).T
        r = float(x @ y / np.sqrt((x @ x) * (y @ y)))
        return min(max(r, -1.0), 1.0), self._filled


def sum_over_processes(
    accelerator: Accelerator, device: torch.device, **values: Tensor | float | bool
) -> dict[str, float]:
    """Each value summed over all processes, in one transfer. Every process has to name the same values.

    Args:
        device: where the processes exchange tensors.
        values: scalar tensors on any device, or numbers. Counts stay exact (float64; float32 on Apple's GPU).
    """
    dtype = torch.float32 if device.type == "mps" else torch.float64
    local = torch.stack([torch.as_tensor(v, device=device).detach().to(dtype).reshape(()) for v in values.values()])
    gathered: Any = accelerator.gather(local)
    return dict(zip(values, gathered.view(-1, len(values)).sum(0).tolist()))


def raise_together(accelerator: Accelerator, error: Exception | None) -> None:
    """Raise on every process if one of them has an error; do nothing if none has.

    A process that raised alone would leave the others waiting for it. Every process has to call this. Where the error
    happened it is raised as it is; the others name the process and the error.

    Raises:
        Exception: the error of this process.
        RuntimeError: an error of another process.

    What is raised is known to `is_raised_together`.
    """
    if accelerator.num_processes > 1:
        failed: Any = accelerator.gather(torch.tensor([error is not None], device=accelerator.device))
        if failed.any():
            told = None if error is None else f"{type(error).__name__}: {str(error)[:2000]}"
            texts = gather_object([told])
            if error is None:
                rank, text = next((rank, text) for rank, text in enumerate(texts) if text is not None)
                error = RuntimeError(f"Process {rank} failed, so this one stops too. There: {text}")
    if error is not None:
        setattr(error, _TOGETHER, True)
        raise error


def together(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """`work()` of this process; where it fails on one, all raise, as `raise_together` says."""
    error = None
    try:
        done = work()
    except Exception as problem:
        error = problem
    raise_together(accelerator, error)
    return done


def on_any_process(accelerator: Accelerator, here: bool) -> bool:
    """Whether any process says so. Every process has to call it."""
    if accelerator.num_processes == 1:
        return here
    return bool(accelerator.gather(torch.tensor([here], device=accelerator.device)).any())


_TOGETHER = "_outspoken_raised_together"


def is_raised_together(error: BaseException) -> bool:
    """Whether all processes raise an error at the same point, so that they can still do something together."""
    return getattr(error, _TOGETHER, False)


def gather_rows(accelerator: Accelerator, rows: Tensor) -> Tensor:
    """The rows of all processes in the order of their ranks, without gradient: (N, ...) -> (sum of N, ...).

    N may differ from process to process, and be 0.
    """
    rows = rows.detach()
    if accelerator.num_processes == 1:
        return rows
    gathered: Any = accelerator.gather(torch.tensor([len(rows)], device=rows.device))
    sizes = gathered.tolist()
    padded = rows.new_zeros((max(sizes), *rows.shape[1:]))  # Accelerate's padding would change the type of flags
    padded[: len(rows)] = rows
    gathered = accelerator.gather(padded)
    blocks = gathered.view(len(sizes), *padded.shape)
    return torch.cat([block[:size] for block, size in zip(blocks, sizes)])


class EndTokens(NamedTuple):
    """Token ids with which a model stops, and ids of whitespace that a chat template puts behind one of them."""

    ends: tuple[int, ...]
    blanks: tuple[int, ...]


def end_token_ids(tokenizer: PreTrainedTokenizerBase) -> EndTokens:
    """What `ends_with` looks for: the end-of-sequence token and the added tokens, one of which ends a turn."""
    ends = {tokenizer.eos_token_id, *tokenizer.get_added_vocab().values()} - {None}
    blanks = {
        token
        for text in ("\n", "\n\n", "\r\n", " ", " \n", "\n ")
        for token in tokenizer(text=text, add_special_tokens=False)["input_ids"]
        if not str(tokenizer.decode([token])).strip()
    }
    return EndTokens(tuple(sorted(ends)), tuple(sorted(blanks - ends)))


def ends_with(ids: Tensor, mask: Tensor, end: EndTokens | Sequence[int]) -> Tensor:
    """Whether the last token with loss of each row is an end token: (B,) bool, False for a row without any.

    Whitespace behind the end token does not hide it.

    Args:
        ids: (B, T) tokens, or labels.
        mask: (B, T), true or 1 where a token carries loss.
        end: from `end_token_ids`; or plain ids, and then no whitespace is looked through.
    """
    if ids.size(1) == 0:
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    ends, blanks = end if isinstance(end, EndTokens) else (tuple(end), ())
    written = mask.bool() & ~torch.isin(ids, torch.tensor(blanks, device=ids.device, dtype=ids.dtype))
    position = torch.arange(ids.size(1), device=ids.device)
    last = (written * position).argmax(dim=1, keepdim=True)  # 0 also where nothing is written
    is_end = torch.isin(ids, torch.tensor(ends, device=ids.device, dtype=ids.dtype)) & written
    return is_end.gather(1, last).squeeze(1)
