"""Pre-training with token reduction, of CLIP and fusion models. An OpenCLIP command line works here unchanged.

One process:      python -m training.main --model ViT-S-16-ELIP --train-data '/data/cc3m/{00000..00331}.tar' ...
Four GPUs:        torchrun --nproc_per_node 4 -m training.main ...
Two nodes:        torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 \
                      -m training.main ...
From a recipe:    torchrun --nproc_per_node 4 -m training.main --config configs/NAME.yaml --name my-run
"""
from __future__ import annotations

from functools import partial

from .command import run_command
from .launch import end
from .options.main import PretrainingOptions

main = partial(run_command, PretrainingOptions, about=__doc__)  # of an argv; returns the exit code

if __name__ == "__main__":
    end(main())
