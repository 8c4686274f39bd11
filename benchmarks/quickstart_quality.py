"""What token reduction costs in quality, at the smallest scale: the quick start's run with and without it.

    bash scripts/quickstart.sh                      # once, for the pictures
    python benchmarks/quickstart_quality.py         # 9 runs of about a minute on two cores

Everything but the reduction is the same: model, initial weights, pictures in the same order, steps. The figures are of
the last epoch, on 268 pictures whose names training never sees. It is a tiny model on 1,600 pictures: differences
smaller than the spread over the seeds say nothing.
"""
from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from open_clip_elip.profile.machine import describe_machine, machine
from open_clip_elip.profile.report import save

ROOT = Path(__file__).resolve().parent.parent
VARIANTS = {
    "no reduction": ("--token-reduction", "none"),
    "ELIP": (),
    "ELIP, scoring_depth 1": ("--scoring-depth", "1"),
}
# Of the trainer's evaluation: its names, and ours. Means of both directions for retrieval.
METRICS = {
    "zero-shot top-1": ("zeroshot-val-top1",),
    "zero-shot mean of classes": ("zeroshot-val-mean_per_class_recall",),
    "R@1": ("image_to_text_R@1", "text_to_image_R@1"),
    "R@10": ("image_to_text_R@10", "text_to_image_R@10"),
    "mean rank": ("image_to_text_mean_rank", "text_to_image_mean_rank"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 after one sentence on stderr."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "openmoji-64", help="default: the quick start's")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each kind (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--markdown", type=Path, help="write the table to this file")
    args = parser.parse_args(argv)
    if not (args.data / "train").is_dir():
        print(f"error: There are no shards in {args.data}; run scripts/quickstart.sh first.", file=sys.stderr)
        return 2
    found = {name: [] for name in VARIANTS}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(args.seeds):
            for number, (name, flags) in enumerate(VARIANTS.items()):
                found[name].append(run(args.data, Path(folder), f"{number}-{seed}", seed, flags))
                print(f"seed {seed}, {name}: {found[name][-1]}", flush=True)
    setting = machine("cpu")
    heading = f"{describe_machine(setting)}  \nQuick start, {args.seeds} seeds: mean (standard deviation)."
    text = f"{heading}\n\n{table(found)}"
    print(text)
    if args.json is not None:
        save(args.json, json.dumps({"setting": setting, "runs": found}, indent=2) + "\n")
    if args.markdown is not None:
        save(args.markdown, "# Quality of the quick start's model\n\n" + text)
    return 0


def run(data: Path, logs: Path, name: str, seed: int, flags: Sequence[str]) -> dict[str, float]:
    """Trains once and returns what `METRICS` names, of the last epoch."""
    def shards(part: str) -> str:
        return f"{data / part}/{{00000..{len(list((data / part).glob('*.tar'))) - 1:05d}}}.tar"

    command = [
        sys.executable, "-m", "training.main", "--config", str(ROOT / "configs" / "quickstart.yaml"),
        "--train-data", shards("train"), "--val-data", shards("val"), "--zeroshot-data", str(data / "val"),
        "--val-frequency", "100", "--zeroshot-frequency", "100", "--save-frequency", "0",
        "--seed", str(seed), "--logs", str(logs), "--name", name, "--no-progress", *flags,
    ]  # fmt: skip
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    last = json.loads((logs / name / "checkpoints" / "results.jsonl").read_text().splitlines()[-1])
    return {ours: statistics.fmean(last[key] for key in keys) for ours, keys in METRICS.items()}


def table(found: dict[str, list[dict[str, float]]]) -> str:
    lines = [["", *METRICS], ["---", *["---:"] * len(METRICS)]]
    for name, runs in found.items():
        lines.append([name, *(_spread([figures[metric] for figures in runs], metric) for metric in METRICS)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _spread(values: Sequence[float], metric: str) -> str:
    scale, unit = (1, "") if metric == "mean rank" else (100, " %")
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{scale * statistics.fmean(values):.1f}{unit} ({scale * spread:.1f})"


if __name__ == "__main__":
    sys.exit(main())
