"""Runs any module with this package's models known to open_clip, as `python -m MODULE` would.

    python -m open_clip_elip.run clip_benchmark.cli eval --model ViT-B-16-ELIP --pretrained w.pt --dataset cifar10
    torchrun --nproc_per_node 8 -m open_clip_elip.run open_clip_train.main --model ViT-B-16-ELIP --train-data ...
"""
from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from importlib.util import find_spec


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 2 after one sentence on stderr; what the module raises or exits with goes on as it is."""
    module, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if module in ("-h", "--help"):
        print(__doc__)
        return 0
    if not _runs(module):
        print(f"error: There is no module {module} to run; the first argument is one's full name.", file=sys.stderr)
        return 2
    sys.argv = [module, *rest]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    return 0


def _runs(module: str) -> bool:
    if module.endswith(".py"):  # looking for it would run the file, as the parent of a module `py`
        return False
    try:
        found = find_spec(module)
        return found is not None and (found.submodule_search_locations is None or _runs(f"{module}.__main__"))
    except (ImportError, ValueError):
        return False


if __name__ == "__main__":
    sys.exit(main())
