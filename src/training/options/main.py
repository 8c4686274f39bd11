"""Options of pre-training on image-text pairs."""
from __future__ import annotations

from dataclasses import dataclass

from .data import PairOptions
from .fusion import DrawingOptions, QueueOptions, RegularizationOptions, StartOptions, TwinOptions
from .kinds import COUNT, POSITIVE_COUNT, one_of
from .model import (
    AdapterOptions,
    ImageOptions,
    LockingOptions,
    ModelOptions,
    TextReductionOptions,
    TokenReductionOptions,
    forbid_coca,
)
from .parser import Section, forbid, option
from .run import DURATION, TrainingOptions

_COCA = "belongs to CoCa models, which this trainer does not train: leave it out"


@dataclass
class ContrastiveOptions(Section, title="loss", needs="!fusion_models"):
    siglip: bool = option(False, "Train with SigLIP's pairwise sigmoid loss.")
    loss_dist_impl: str | None = option(
        None, "How SigLIP's loss exchanges features between processes. Without it: bidir.",
        one_of("bidir", "shift", "reduce", "gather"), needs="siglip !fusion_models")
    local_loss: bool = option(
        True, "Compute only this process's rows of the similarity matrix: the same loss for less memory. Belongs "
        "together with --gather-with-grad; turn both off, or neither.", needs="!siglip !fusion_models")
    gather_with_grad: bool = option(
        True, "Let gradients flow through features of other processes.", needs="!siglip !fusion_models")
    distill_model: str | None = option(
        None, "Teacher model for distillation; needs --distill-pretrained.", metavar="NAME")
    distill_pretrained: str | None = option(
        None, "Weights of the teacher: a tag or a file.", metavar="TAG|FILE", path=True)
    full_tokens_last: int | str | None = option(
        None, "Train with all tokens in the last part of the run (FLIP's unmasked tuning): steps, or with a unit: 1ep, "
        "10%.", DURATION, needs="trains !fusion_models")
    gone = dict.fromkeys(("coca_caption_loss_weight", "coca_contrastive_loss_weight"), _COCA)

    def check(self) -> None:
        forbid_coca("--distill-model", self.distill_model)
        distills, accumulates = self.distill_model is not None, self.accum_freq > 1
        both = "--distill-model and --distill-pretrained belong together: give both, or neither."
        forbid(distills != (self.distill_pretrained is not None), both)
        forbid(distills and accumulates, "--distill-model cannot be used with --accum-freq: leave one out.")
        forbid(distills and self.siglip, "--distill-model needs the softmax loss: leave out --siglip.")


@dataclass
class ValidationOptions(Section, title="evaluation"):
    val_data: str | None = option(
        None, "Image-caption pairs, in the formats of --train-data, for the validation loss and retrieval.",
        metavar="SHARDS|FILE", path=True, joined="::", needs="val_frequency")
    val_num_samples: int | None = option(
        None, "Samples in --val-data, where that is not noted beside its shards.", POSITIVE_COUNT, needs="val_data")
    val_frequency: int = option(1, "Validate every N epochs and after the last; 0: never.", COUNT, needs="val_data")
    visualize_frequency: int = option(
        0, "Draw what is kept of a few pictures of --val-data every N epochs and after the last, for TensorBoard or "
        "wandb; 0: never.", COUNT, needs="trains val_data report_to=tensorboard|wandb|all")
    val_rerank: int | None = option(
        None, "Of each picture and caption in --val-data, rank the K nearest again by the fusion layers.",
        POSITIVE_COUNT, metavar="K", needs="val_data fusion_models")
    zeroshot_data: str | None = option(
        None, "Labelled images for zero-shot classification: shards, or a folder with one sub-folder of images a "
        "class; with a classnames.txt beside them.", metavar="DIR", path=True, needs="zeroshot_frequency")
    imagenet_val: str | None = option(
        None, "ImageNet's validation images (a folder with one sub-folder a class).", metavar="DIR", path=True,
        needs="zeroshot_frequency")
    imagenet_v2: str | None = option(
        None, "ImageNet-V2: one folder a class, named 0 to 999.", metavar="DIR", path=True, needs="zeroshot_frequency")
    zeroshot_frequency: int = option(
        2, "Classify zero-shot every N epochs and after the last; 0: never.", COUNT,
        needs="zeroshot_data|imagenet_val|imagenet_v2")


@dataclass
class PretrainingOptions(
    PairOptions, ValidationOptions, ModelOptions, AdapterOptions, LockingOptions, TokenReductionOptions,
    TextReductionOptions, ImageOptions, ContrastiveOptions, StartOptions, TwinOptions, QueueOptions, DrawingOptions,
    RegularizationOptions, TrainingOptions,
    command="training.main",
):  # fmt: skip
    @property
    def trains(self) -> bool:
        return bool(self.train_data) or self.dataset_type == "synthetic"

    @property
    def fusion_models(self) -> bool:
        """Whether the model is one."""
        return self.family != "clip"

    def check(self) -> None:
        evaluates = any((self.val_data, self.zeroshot_data, self.imagenet_val, self.imagenet_v2))
        data = "--train-data to train, or --val-data, --zeroshot-data or --imagenet-val to evaluate"
        forbid(not (self.trains or evaluates), f"There is nothing to do: give {data}.")
        starts = self.pretrained or self.start_image or self.start_text or self.pretrained_image or ":" in self.model
        given = "--pretrained, or --start-image and --start-text"
        forbid(self.adapter and not starts, f"--adapter adapts weights that are there: give {given}.")
