"""What the benchmarks against OpenCLIP ask for, and tell, in the same way."""
from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from open_clip_elip.profile.command import PRECISIONS
from open_clip_elip.profile.report import Rows, markdown_table, save, text_table


def positive(text: str) -> int:
    """The type of an option: a number above 0."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return int(text)


def common_parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--precision", default="fp32", choices=PRECISIONS, help="default: %(default)s")
    add("--device", metavar="cpu|cuda[:N]", help="default: cuda if there is one")
    add("--rounds", type=positive, default=10, metavar="N", help="at most; default: %(default)s")
    add("--minutes", type=float, default=4.5, metavar="M", help="no more rounds after that; default: %(default)s")
    add("--results", type=Path, default=Path(__file__).parent / "results", metavar="DIR", help="where results go")
    add("--name", help="added to the names of the files of results")
    return parser


def tell(args: argparse.Namespace, stem: str, title: str, text: str, rows: Rows, found: dict[str, Any]) -> None:
    """Prints `text` and the table, and writes them to `stem`_NAME.md, and all that was found to the JSON file."""
    print(text + "\n\n" + text_table(rows))
    path = args.results / "_".join([stem, *filter(None, [args.name])])
    save(path.with_suffix(".json"), json.dumps(found, indent=2) + "\n")
    paragraph = text.replace("\n", "  \n")
    save(path.with_suffix(".md"), f"# {title}\n\n{paragraph}\n\n{markdown_table(rows)}")


def count_rounds(spreads: Iterable[Mapping[str, float]]) -> str:
    """How many measurements there were, of several `spread`s: "5 rounds", or "3 to 5 rounds"."""
    counts = {spread["count"] for spread in spreads}
    return f"{min(counts)} rounds" if len(counts) == 1 else f"{min(counts)} to {max(counts)} rounds"
