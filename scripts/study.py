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
import hashlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "study"
PAGE = ROOT / "docs" / "results.md"


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0; 1 if a run failed; 2 after one sentence on stderr."""
    args = _parser().parse_args(argv)
    # Before torch is imported, here and in the processes of the runs.
    os.environ.update(OMP_NUM_THREADS=str(args.threads), OMP_WAIT_POLICY="PASSIVE", TOKENIZERS_PARALLELISM="false")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    sys.path.insert(0, str(ROOT))
    from training.errors import EXIT_USER_ERROR, UserError

    try:
        return _work(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR


def _work(args: argparse.Namespace) -> int:
    import logging

    from benchmarks.study.cells import expand, find_cell, load_study
    from benchmarks.study.costs import Costs
    from benchmarks.study.report import read_rows
    from benchmarks.study.run import Setting, describe, run_all

    from training.errors import UserError

    for name in ("jobs", "threads"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} must be at least 1, not {getattr(args, name)}.")
    logging.getLogger().setLevel(logging.WARNING)
    overrides = {} if args.model is None else {"model": args.model}
    study = load_study(args.configs, budget=args.budget, data=args.data, overrides=overrides)
    if args.report and not any(args.out.glob("*.json")):
        return _report(study, read_rows(args.results / "runs.csv"), args.results)
    marker = study.data / "dataset.json"
    if not marker.is_file():
        raise UserError(f"There are no pictures in {study.data}; make them with scripts/make_study_data.py --out DIR.")
    if args.fashion_mnist is not None and not args.fashion_mnist.is_dir():
        raise UserError(f"There is no folder {args.fashion_mnist}; check --fashion-mnist.")
    cell = None if args.cell is None else find_cell(study, args.cell)
    if args.seed is not None and args.seed not in study.seeds:
        raise UserError(f"--seed must be one of {', '.join(map(str, study.seeds))}, not {args.seed}.")

    costs = Costs(study)
    key = hashlib.sha256(marker.read_bytes()).hexdigest()[:12]
    runs, of_cell = expand(study, costs.flops, costs.rrt, data_key=key, threads=args.threads)
    setting = Setting(study, args.out, args.device, args.fashion_mnist, args.keep_weights)
    if cell is not None:
        runs = [of_cell[cell.full_name, seed] for seed in study.seeds if args.seed in (None, seed)]
    elif args.seed is not None:
        runs = [run for run in runs if run.seed == args.seed]
    if args.list:
        _list(runs, setting)
        for problem in dict.fromkeys(costs.problems.values()):
            print(f"refused by the trainer: {problem}")
        return 0

    failed = []
    if not args.report:
        failed = run_all(runs, setting, jobs=args.jobs, minutes=args.minutes, show=lambda line: print(line, flush=True))
        if cell is not None:
            for run in runs:
                if row := setting.finished(run):
                    print(describe(run, row))
                    print(f"    {setting.row_file(run)}")
            return 1 if failed else 0
    rows = {name: row for name, run in of_cell.items() if (row := setting.finished(run)) is not None}
    _report(study, rows, args.results)
    if failed:
        print(f"{len(failed)} runs failed: {', '.join(f'{run.name} seed {run.seed}' for run in failed)}")
    return 1 if failed else 0


def _report(study, rows, folder: Path) -> int:
    """Into `folder` and, if that is the committed one, into the tables of docs/results.md."""
    from benchmarks.study.report import fill_page, write_report

    print(write_report(study, rows, folder))
    if rows and folder == RESULTS:
        PAGE.write_text(fill_page(PAGE.read_text(encoding="utf-8"), study, rows), encoding="utf-8")
    return 0


def _list(runs: Sequence, setting) -> None:
    total = 0.0
    for run in runs:
        cost = (run.flops or 0.0) * run.samples / 1e15
        total += cost
        known = f"{run.flops / 1e9:.3f} GFLOP/pair, {cost:.4f} PFLOP" if run.flops else "cost unknown"
        state = "done" if setting.finished(run) else "    "
        print(f"{state} {run.id} seed {run.seed} {run.samples:>8} samples, {known}  {' = '.join(run.cells)}")
    print(f"{len(runs)} runs, {total:.3f} PFLOP")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--configs", type=Path, default=ROOT / "configs" / "study", metavar="DIR", help="default: configs/study")
    add("--data", type=Path, metavar="DIR", help="pictures, of scripts/make_study_data.py (default: the study's)")
    add("--model", metavar="NAME", help="another model, such as ViT-S-16-ELIP with pictures of 224 px")
    add("--budget", type=float, default=1.0, metavar="X", help="factor for the samples of all runs (default: 1)")
    add("--out", type=Path, default=Path("logs/study"), metavar="DIR", help="finished runs (default: logs/study)")
    add("--results", type=Path, default=RESULTS, metavar="DIR",
        help="tables and plots (default: benchmarks/results/study)")  # fmt: skip
    add("--jobs", type=int, default=1, help="runs side by side (default: 1)")
    add("--threads", type=int, default=1,
        help="of a run, on the CPU; part of the setting, for the last digits depend on it (default: 1)")  # fmt: skip
    add("--minutes", type=float, metavar="M", help="start no further run after so many minutes")
    add("--cell", metavar="NAME", help="only the runs of this cell, such as steps/elip")
    add("--seed", type=int, help="only the runs with this seed")
    add("--device", help="of training and evaluation (default: CUDA where there is any, else the CPU)")
    add("--fashion-mnist", type=Path, metavar="DIR", help="also probe the methods' runs on Fashion-MNIST")
    add("--keep-weights", action="store_true", help="keep the last checkpoint of each run, about 120 MB")
    add("--list", action="store_true", help="only show the runs and their cost")
    add("--report", action="store_true",
        help="only write tables and plots: of the finished runs or, without any, of runs.csv in --results")  # fmt: skip
    return parser


if __name__ == "__main__":
    sys.exit(main())
