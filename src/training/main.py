"""Contrastive pre-training with token reduction. An OpenCLIP training command line works here unchanged.

One process:      python -m training.main --model ViT-S-16-ELIP --train-data '/data/cc3m/{00000..00331}.tar' ...
Four GPUs:        torchrun --nproc_per_node 4 -m training.main ...
Two nodes:        torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 \
                      -m training.main ...
From a recipe:    torchrun --nproc_per_node 4 -m training.main --config configs/NAME.yaml --name my-run
"""
from __future__ import annotations

from open_clip_elip import identity as identities

from .command import run_command
from .data import build_train_data, build_val_data
from .data.pairs import PairEncoding
from .data.transforms import with_decoding
from .distributed import Ranks, end, seed_everything
from .evaluation.prompts import load_zero_shot_data
from .models import build_model, build_teacher, lock
from .run import Parts, run
from .tasks.contrastive import ContrastiveTask, PretrainingOptions


def main(argv: list[str] | None = None) -> int:
    """Runs one training (or, without training data, one evaluation) and returns the exit code."""
    return run_command(PretrainingOptions, lambda options, ranks: run(options, ranks, pretraining), argv, __doc__)


def pretraining(options: PretrainingOptions, ranks: Ranks, resume: str | None) -> Parts:
    """Contrastive training on image-text pairs; see `run.Build`."""
    with ranks.agree():
        seed_everything(options.seed)
        identity, model, transform, tokenizer = build_model(options, ranks.device)
        lock(model, options)
        train_transform = identities.transform(identity, train=True, aug_cfg=options.aug_cfg)
        train_transform, transform = (with_decoding(t, options.image_decode) for t in (train_transform, transform))
        seed_everything(options.seed + ranks.rank)
        place = {"rank": ranks.rank, "world_size": ranks.world_size}
        train_data = build_train_data(options, PairEncoding(train_transform, tokenizer), **place)
        val_data = build_val_data(options, PairEncoding(transform, tokenizer), **place)
        zero_shot_data = load_zero_shot_data(options)
        teacher = build_teacher(options, identity, ranks.device)
        task = ContrastiveTask(options, ranks, model, tokenizer, transform, val_data, zero_shot_data, teacher)
    return Parts(identity, model, task, train_data)


if __name__ == "__main__":
    end(main())
