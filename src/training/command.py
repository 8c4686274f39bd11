"""How every command begins and ends: its options, the process group, one sentence for what a person can mend.

What a command does is `training.work.NAME`, which is imported once its options are right: they need no torch.
"""
from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Sequence
from contextlib import ExitStack

from .errors import EXIT_USER_ERROR, Stopped, UserError
from .launch import launch_rank
from .log import setup_logging
from .options import Section, TrainingOptions, parse
from .options.evaluation import EvaluationOptions


def run_command(options: type[Section], argv: Sequence[str] | None = None, about: str = "") -> int:
    """Reads the options, starts the process group, works, and prints the text that `work` returns, if any.

    The exit code is 0, that of `Stopped`, or 2 after one sentence on stderr. `about`: the command, for its help page.
    """
    argv = sys.argv[1:] if argv is None else argv
    shown = main = launch_rank() == 0
    setup_logging(logging.INFO, None, console=main)
    with ExitStack() as stack:
        try:
            args = parse(options, argv, about=about)
            from .distributed import choose_device, init_ranks, leave

            stack.callback(leave)
            if isinstance(args, EvaluationOptions):
                choose_device(args)
            place = (getattr(args, name, None) for name in ("dist_backend", "dist_url", "no_set_device_rank"))
            shown = True  # a process that cannot join in is the only one to know why
            ranks = init_ranks(args.device, *place)
            shown = main
            if isinstance(args, TrainingOptions):
                args.divide_global_batch(ranks.world_size)
            text = importlib.import_module(options.command.replace(".", ".work.")).work(args, ranks, argv)
        except Stopped as stopped:
            logging.warning(str(stopped))
            return stopped.code
        except UserError as error:
            if shown:
                print(f"error: {error}", file=sys.stderr)
            return EXIT_USER_ERROR
    if main and text is not None:
        print(text)
    return 0
