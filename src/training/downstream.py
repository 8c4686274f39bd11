"""What comes after the pre-training of a fusion model: retrieval, entailment, VQA, NLVR2; training and evaluation.

One process:      python -m training.downstream --task entailment --model ALBEF-B-16 --pretrained ALBEF.pth \\
                      --config configs/albef/snli_ve.yaml --train-data ve_train.json --val-data ve_dev.json \\
                      --image-root /data/flickr30k-images
Four GPUs:        torchrun --nproc_per_node 4 -m training.downstream -- --config configs/albef/vqa.yaml --name vqa
Evaluation:       python -m training.downstream --evaluate --resume logs/vqa/checkpoints/epoch_8.pt \\
                      --test-data vqa_test.json --answers answer_list.json --submission vqa_result.json
"""
from __future__ import annotations

from functools import partial

from .command import run_command
from .launch import end
from .options.downstream import DownstreamOptions

main = partial(run_command, DownstreamOptions, about=__doc__)  # of an argv; returns the exit code

if __name__ == "__main__":
    end(main())
