"""How every command begins and ends: its options, the process group, one sentence for what a person can mend."""
from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

from .control import Stopped
from .distributed import Ranks, init_ranks, launch_rank, leave
from .errors import EXIT_USER_ERROR, UserError
from .log import setup_logging
from .options import Section, TrainingOptions, parse

T = TypeVar("T", bound=Section)


def run_command(
    options: type[T], work: Callable[[T, Ranks], str | None], argv: Sequence[str] | None = None, about: str = ""
) -> int:
    """Reads the options, starts the process group, works, and prints the text that `work` returns, if any.

    The exit code is 0, that of `Stopped`, or 2 after one sentence on stderr. `about`: the command, for its help page.
    """
    shown = main = launch_rank() == 0
    setup_logging(logging.INFO, None, console=main)
    try:
        args = parse(options, sys.argv[1:] if argv is None else argv, about=about)
        place = (getattr(args, name, None) for name in ("dist_backend", "dist_url", "no_set_device_rank"))
        shown = True  # a process that cannot join in is the only one to know why
        ranks = init_ranks(args.device, *place)
        shown = main
        if isinstance(args, TrainingOptions):
            args.divide_global_batch(ranks.world_size)
        text = work(args, ranks)
    except Stopped as stopped:
        logging.warning(str(stopped))
        return stopped.code
    except UserError as error:
        if shown:
            print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    finally:
        leave()
    if main and text is not None:
        print(text)
    return 0
