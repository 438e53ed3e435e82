"""A few lines by which other systems' training runs write our run directory while they train.

Each module serves one system and imports nothing of it before it is used.
"""

import functools
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from typing import Any


class _Waiting:
    """Finds one module by what else finds it, and does something right after its first import."""

    def __init__(self, name: str, then: Callable[[Any], None]):
        self.name, self.then = name, then

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                run(module)
                self.then(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def when_imported(name: str, then: Callable[[Any], None]) -> None:
    """Call `then` with a module: now if it is imported already, else right after its import."""
    if name in sys.modules:
        then(sys.modules[name])
    else:
        sys.meta_path.insert(0, _Waiting(name, then))


def after_init(cls: Any, then: Callable[[Any], None]) -> None:
    """Call `then` with each new instance of a class, after its constructor; only once for each class.

    What it raises is told, and training goes on.
    """
    begin = cls.__init__
    if getattr(begin, "followed", False):
        return

    @functools.wraps(begin)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs)
        try:
            then(self)
        except Exception as error:
            print(f"[outspoken] note: this run is not recorded ({type(error).__name__}: {error})", file=sys.stderr)

    init.followed = True  # type: ignore[attr-defined]
    cls.__init__ = init
