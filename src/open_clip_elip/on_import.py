"""Something to do once another package is imported, by whomever, without importing it."""
from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def call(package: str, what: Callable[[], object]) -> None:
    """Calls `what` behind each run of the code of `package`; at once if it is imported already."""
    if package in sys.modules:
        what()
    else:
        sys.meta_path.insert(0, _Finder(package, what))


class _Finder(MetaPathFinder):
    """Lets the other finders find the package, and its loader call `what` in the end."""

    def __init__(self, package: str, what: Callable[[], object]):
        self.package, self.what = package, what

    def find_spec(self, name: str, path: object = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != self.package:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is not None:
            run = spec.loader.exec_module

            def run_and_call(module: ModuleType) -> None:
                run(module)
                self.what()

            spec.loader.exec_module = run_and_call
        return spec
