"""Count the samples in webdataset shards and note them in the sizes.json beside them, where training looks for them.

    python -m training.count_shards data/cc12m data/sbu data/mscoco
    python -m training.count_shards 'data/cc12m/{00000..01242}.tar::data/sbu/{00000..00099}.tar' --workers 16
    python -m training.count_shards data/cc12m --verify

A sample counts if it has an image and a caption, as in training. Only the headers of the tar files are read; with
--verify the pictures are decoded as well, and neither those that cannot be nor those with a blank caption are counted.
Captions that are not UTF-8 are used with replacement characters, as in training, and told.
A shard that breaks off counts up to there and is named.

Shards that are in sizes.json and have not changed since are not read again, unless --force or --verify is given. What
an interrupted count has found is kept.
"""
from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from .errors import EXIT_USER_ERROR, UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 130 if it was interrupted, or 2 after one sentence on stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m training.count_shards", description=__doc__.partition("\n")[0], allow_abbrev=False
    )
    parser.add_argument("names", nargs="+", metavar="PATTERN_OR_FOLDER", help="shards, as for --train-data, or folders")
    parser.add_argument(
        "--workers", type=int, default=min(8, os.cpu_count() or 1), help="shards read at once (default: %(default)s)"
    )
    parser.add_argument("--force", action="store_true", help="read unchanged shards again, too")
    parser.add_argument("--verify", action="store_true", help="decode the pictures; reads all shards again")
    args = parser.parse_args(argv)
    from .data.counting import run

    try:
        return run(**vars(args))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
