#!/usr/bin/env python
"""The study of configs/study: train what it lists, evaluate, and write tables and plots.

    python scripts/make_study_data.py --out data/study-64      # once: the pictures
    python scripts/study.py --list                             # what there is to run, and what it costs
    python scripts/study.py --jobs 2                           # all of it; run it again and it goes on where it was
    python scripts/study.py --cell steps/elip --seed 0         # one run; its numbers are those of the table
    python scripts/study.py --report                           # tables and plots of what is finished

Finished runs are kept in --out; a changed setting is another run. On a GPU, larger:
`--data data/study-224 --model ViT-S-16-ELIP --budget 100 --device cuda`.
"""
from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "study", ROOT / "docs" / "results.md"


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0; 1 if a run failed; 2 after one sentence on stderr."""
    args = vars(_parser().parse_args(argv))
    # Before torch is imported, here and in the processes of the runs.
    os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE", TOKENIZERS_PARALLELISM="false")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    sys.path.insert(0, str(ROOT))
    from training.errors import EXIT_USER_ERROR, UserError

    try:
        if args["jobs"] < 1:
            raise UserError(f"--jobs must be at least 1, not {args['jobs']}.")
        return _work(**args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR


def _work(*, configs, results, jobs, cell, seed, list, report, **settings) -> int:
    from benchmarks.study.cells import choose, count_operations, expand, load_study
    from benchmarks.study.report import as_table, fill_page, read_runs, write_report
    from benchmarks.study.run import describe, finished, run_all

    logging.getLogger().setLevel(logging.WARNING)
    study, failed = load_study(configs, **settings), []
    if report and not any(study.out.glob("*.json")):
        table = read_runs(results / "runs.csv")
    else:
        chosen = choose(study, cell, seed)
        runs = expand(study, count_operations(study))
        wanted = [run for run in runs if chosen & {(name, run.seed) for name in run.cells}]
        if not (list or report):
            failed = run_all(wanted, study, jobs=jobs, show=lambda line: print(line, flush=True))
        if list or cell and not report:
            print(*(describe(run, finished(run, study)) for run in wanted), sep="\n")
            print(f"{len(wanted)} runs, {sum(run.flops * run.samples for run in wanted) / 1e15:.3f} PFLOP")
            return 1 if failed else 0
        table = as_table((run, finished(run, study)) for run in runs)
    print(write_report(study, table, results))
    if len(table) and results == RESULTS:
        PAGE.write_text(fill_page(PAGE.read_text(encoding="utf-8"), study, table), encoding="utf-8")
    if failed:
        print(f"{len(failed)} runs failed: {', '.join(f'{run.cells[0]} seed {run.seed}' for run in failed)}")
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    add = parser.add_argument
    add("--configs", type=Path, default=ROOT / "configs" / "study", metavar="DIR", help="default: configs/study")
    add("--data", type=Path, metavar="DIR", help="pictures, of scripts/make_study_data.py (default: the study's)")
    add("--model", metavar="NAME", help="another model, such as ViT-S-16-ELIP with pictures of 224 px")
    add("--budget", type=float, default=1.0, metavar="X", help="factor for the samples of all runs (default: 1)")
    add("--out", type=Path, default=Path("logs/study"), metavar="DIR", help="finished runs (default: logs/study)")
    add("--results", type=Path, default=RESULTS, metavar="DIR", help="tables and plots (default: those of the page)")
    add("--jobs", type=int, default=1, help="runs side by side (default: 1)")
    add("--cell", metavar="NAME", help="only the runs of this cell, such as steps/elip")
    add("--seed", type=int, help="only the runs with this seed")
    add("--device", help="of training and evaluation (default: CUDA where there is any, else the CPU)")
    add("--fashion-mnist", type=Path, metavar="DIR", help="also probe the runs on Fashion-MNIST")
    add("--keep-weights", action="store_true", help="keep the last checkpoint of each run, about 120 MB")
    add("--list", action="store_true", help="only show the runs and their cost")
    add("--report", action="store_true", help="only write tables and plots: of the finished runs, or of runs.csv")
    return parser


if __name__ == "__main__":
    sys.exit(main())
