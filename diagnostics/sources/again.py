"""What can be gone through again and again, in bounded memory."""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Generic, TypeVar

T = TypeVar("T")


class Again(Generic[T]):
    """Items that are kept in memory while they are few, and made anew for each pass where they are many.

    Passes after the first one give as many items as the first did, also if the file behind them has grown since.

    Args:
        make: begins a pass.
        size: how many cells an item holds. keep: cells that are kept in memory.
        length: how many items there are, where that is known; else the first pass tells.
    """

    def __init__(
        self, make: Callable[[], Iterator[T]], size: Callable[[T], int], keep: int, length: int | None = None
    ):
        self._make, self._size, self._keep = make, size, keep
        self._kept: list[T] | None = None
        self._length = length
        self._passed = False  # whether a whole pass was made
        self._last: T | None = None

    @classmethod
    def of(cls, items: list[T]) -> "Again[T]":
        """What is in memory already."""
        made = cls(lambda: iter(items), lambda item: 0, 0)
        made._kept, made._length, made._passed = items, len(items), True
        return made

    @property
    def kept(self) -> list[T] | None:
        """All items, if they are in memory."""
        return self._kept

    def __iter__(self) -> Iterator[T]:
        if self._kept is not None:
            return iter(self._kept)
        return islice(self._make(), self._length) if self._passed else self._first_pass()

    def _first_pass(self) -> Iterator[T]:
        kept: list[T] | None = []
        cells = count = 0
        item: T | None = None
        for item in islice(self._make(), self._length):
            count += 1
            if kept is not None:
                cells += self._size(item)
                kept.append(item)
                if cells > self._keep:
                    kept = None
            yield item
        self._kept, self._length, self._last, self._passed = kept, count, item, True

    def __len__(self) -> int:
        if self._length is None:
            for _ in self:
                pass
        assert self._length is not None
        return self._length

    def __getitem__(self, index: int) -> T:
        """One item; without going through all of them for the first and, after a pass, the last."""
        if self._kept is not None:
            return self._kept[index]
        if index == 0:
            for item in self:
                return item
        number = range(len(self))[index]
        if number == len(self) - 1 and self._last is not None:
            return self._last
        return next(islice(iter(self), number, None))
