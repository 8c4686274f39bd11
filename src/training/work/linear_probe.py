"""The work of `training.linear_probe`."""
from __future__ import annotations

from collections.abc import Sequence

from ..distributed import Ranks
from ..evaluation.loaded import load_model
from ..evaluation.probe import Probe, load_jobs
from ..evaluation.results import Results
from ..evaluation.sweep import patient
from ..options.linear_probe import ProbeOptions


def work(options: ProbeOptions, ranks: Ranks, argv: Sequence[str]) -> str:
    """Everything the command does; the table. A collective call."""
    with ranks.agree():
        results = Results(options.results, ranks, options.redo)
        jobs = load_jobs(options)
        loaded = load_model(options, ranks, image_tower=True)
    waiting = patient(ranks)
    rows = [("data", "top-1", "top-5", "mean per class", "regularisation")]
    for splits in jobs:
        for record in Probe(options, loaded, splits, results, waiting).run():
            metrics = record["metrics"]
            numbers = [f"{metrics[name]:.2%}" for name in ("top1", "top5", "mean_per_class_recall")]
            rows.append((f"{record['data']} ({record['split']})", *numbers, f"{record['regularisation']:.4g}"))
    return results.shown(rows)
