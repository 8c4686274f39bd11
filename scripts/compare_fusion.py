#!/usr/bin/env python
"""ELIP against no reduction in the fusion models: their quick starts with three seeds each.

    python scripts/compare_fusion.py --family albef --jobs 2   # run it again and it goes on where it was

Rows go to benchmarks/results/fusion.csv, and tables of all rows into docs/results.md. Both runs of a seed begin with
the same weights and see the same pictures in the same order, each on one thread.
"""
from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas

ROOT = Path(__file__).resolve().parent.parent
RUNS, PAGE = ROOT / "benchmarks" / "results" / "fusion.csv", ROOT / "docs" / "results.md"
SEEDS, REDUCTIONS, WAYS = (0, 1, 2), ("none", "elip"), ("image_to_text", "text_to_image")
PERCENT = {  # figures of a row by the name that a run gives them, and what the tables call them
    "recall": "features alone, mean recall", "reranked_recall": "re-ranked, mean recall",
    "matched_recall": "every pair, mean recall", "val-itm_accuracy": "matching right",
    "val-mlm_accuracy": "masked words right",
}  # fmt: skip
OTHERS = {"CIDEr": "CIDEr", "loss": "loss, last epoch", "gflops_per_sample": "GFLOP a pair"}


def train(family: str, reduction: str, seed: int) -> dict[str, float | str]:
    """Trains one run, goes on with it or finds it finished, and returns its row."""
    name = f"compare-{family}-{reduction}-{seed}"
    folder, log = ROOT / "logs" / name, ROOT / "logs" / f"{name}.txt"
    folder.mkdir(parents=True, exist_ok=True)
    command = ["bash", "scripts/quickstart.sh", "--seed", str(seed), "--no-progress"]
    command += ["--token-reduction", "none"] * (reduction == "none")
    environment = os.environ | {"FAMILY": family, "RUN": name, "OMP_NUM_THREADS": "1"}
    with log.open("w") as file:
        subprocess.run(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, check=True)
    last = (folder / "checkpoints" / "results.jsonl").read_text(encoding="utf-8").splitlines()[-1]
    found, steps = json.loads(last), pandas.read_csv(folder / "train.csv")
    means = steps[steps["epoch"] == steps["epoch"].max()].mean()
    row = {"family": family, "reduction": reduction, "seed": seed, "epochs": found["epoch"]}
    row |= {key: means[key] for key in ("rrt", "loss", "gflops_per_sample")}
    if (summary := folder / "results" / "summary.csv").is_file():
        found |= {f"matched_{key}": value for key, value in pandas.read_csv(summary).iloc[-1].items()}
    for kind in ("", "reranked_", "matched_"):
        if f"{kind}{WAYS[0]}_R@1" in found:
            row |= {f"{kind}{way}_R@1": found[f"{kind}{way}_R@1"] for way in WAYS}
            row[f"{kind}recall"] = statistics.fmean(found[f"{kind}{way}_R@{k}"] for way in WAYS for k in (1, 5, 10))
    row |= {key: found[key] for key in PERCENT if key in found}
    scored = re.search(r"^CIDEr (\S+)$", log.read_text(encoding="utf-8"), re.M)
    return row | ({"CIDEr": float(scored[1])} if scored else {})


def tables(rows: pandas.DataFrame) -> Iterator[str]:
    """One a family: mean ± standard deviation over the seeds, and of the differences of equal seeds."""
    for family, found in rows.groupby("family", sort=False):
        columns = [key for key in (*PERCENT, *OTHERS) if key in found and found[key].notna().any()]
        scaled = found.assign(**{key: found[key] * 100 for key in PERCENT if key in columns}).set_index("seed")
        none, elip = (scaled[scaled["reduction"] == name][columns] for name in REDUCTIONS)
        lines = [["", *((PERCENT | OTHERS)[key] for key in columns)], ["---", *["--:"] * len(columns)]]
        for name, part, sign in (("`none`", none, ""), ("`elip`", elip, ""), ("difference", elip - none, "+")):
            lines.append([name, *(f"{part[key].mean():{sign}.2f} ± {part[key].std():.2f}" for key in columns)])
        head = f"**{family.upper()}**, {len(none)} seeds, {found['epochs'].max()} epochs"
        yield f"{head}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--family", required=True, choices=("albef", "blip", "meter"))
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side (default: 1)")
    options = parser.parse_args(argv)
    with ThreadPoolExecutor(options.jobs) as pool:
        runs = [pool.submit(train, options.family, name, seed) for seed in SEEDS for name in REDUCTIONS]
        rows = pandas.DataFrame([run.result() for run in runs])
    if RUNS.is_file():
        others = pandas.read_csv(RUNS)
        rows = pandas.concat([others[others["family"] != options.family], rows]).sort_values("family", kind="stable")
    rows.to_csv(RUNS, index=False)
    fill = "<!-- fusion -->\n" + "\n".join(tables(rows)) + "<!-- end -->"
    page = re.sub(r"<!-- fusion -->\n.*?<!-- end -->", lambda _: fill, PAGE.read_text(encoding="utf-8"), flags=re.S)
    PAGE.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
