"""Options of fine-tuning for classification."""
from __future__ import annotations

from dataclasses import dataclass

from ..errors import UserError
from .kinds import COUNT, FRACTION, FRACTION_BELOW_1, NOT_NEGATIVE, POSITIVE, SHARE, one_of
from .model import AdapterOptions, ImageOptions, ModelOptions, TokenReductionOptions
from .parser import Section, forbid, option
from .run import TrainingOptions


@dataclass
class LabelledDataOptions(Section, title="labelled data"):
    data: str | None = option(
        None, "Data set to train on (its training split) and to evaluate on (its test split): NAME=PATH, or PATH where "
        "the files tell which it is.", metavar="[NAME=]PATH", path=True)
    test_data: str | None = option(
        None, "Another place for the test split of --data.", metavar="[NAME=]PATH", path=True)
    also: list[str] = option(
        [], "More data sets to evaluate on, with the classes of --data or, for ImageNet, some of them (imagenet-v2, "
        "imagenet-r, ...).", metavar="[NAME=]PATH", nargs="*", path=True)
    download: bool = option(False, "Let torchvision download a data set that is not there.")
    on_broken: str = option("skip", "A test image that cannot be read: leave it out, or stop.", one_of("skip", "stop"))
    evaluate: bool = option(
        False, "Train nothing: evaluate the checkpoint of --resume, or the zero-shot head without one.")
    val_frequency: int = option(1, "Evaluate every N epochs and after the last; 0: never.", COUNT)
    results: str = option(
        "results", "Folder of the final results, one file a data set, with a summary of all; 'none' keeps none.",
        metavar="DIR", path=True)


@dataclass
class ClassificationOptions(Section, title="classifier"):
    head: str = option(
        "random", "How the linear head begins: at random, on the pooled features before the projection; or as the "
        "zero-shot classifier, on the projected features.", one_of("random", "zero-shot"))
    drop_path: float = option(
        0.0, "Stochastic depth: the rate at which the last block's branches are dropped; less before it.",
        FRACTION_BELOW_1, needs="trains")
    vision_guided_reduction: bool = option(
        False, "Reduce tokens in fine-tuning and its evaluation too, guided by the image alone.")
    wise_ft: bool = option(
        False, "At the end, evaluate the weights between the zero-shot classifier and the fine-tuned one (0 to 1 by "
        "0.1). Needs --head zero-shot.")
    wise_ft_save: list[float] = option(
        [], "With --wise-ft: also save the weights at these shares of the fine-tuned ones, as checkpoints "
        "wise_ft_SHARE.pt in the run's folder.", FRACTION, nargs="*")


@dataclass
class AugmentationOptions(Section, title="augmentation", needs="trains"):
    crop_scale: list[float] = option(
        [0.08, 1.0], "Smallest and largest area of the random crop, as a share of the picture.",
        SHARE, nargs=(2,))
    crop_ratio: list[float] = option(
        [3 / 4, 4 / 3], "Smallest and largest width / height of the random crop.", POSITIVE, nargs=(2,))
    hflip: float = option(0.5, "How often a picture is mirrored.", FRACTION)
    auto_augment: str | None = option(
        None, "A policy by timm's name: rand-m9-mstd0.5-inc1 is RandAugment as most recipes have it.", metavar="POLICY")
    color_jitter: float = option(0.0, "Strength of random changes of colour; not with a policy.", NOT_NEGATIVE)
    random_erasing: float = option(0.0, "How often a rectangle of a picture is erased.", FRACTION)
    erasing_mode: str = option(
        "pixel", "What a rectangle is filled with: noise, one random colour, or the mean colour.",
        one_of("pixel", "rand", "const"), needs="trains random_erasing")
    train_interpolation: str = option(
        "bicubic", "How pictures are resized in training.", one_of("bicubic", "bilinear", "random"))
    mixup: float = option(0.0, "Mixup's alpha; 0: none.", NOT_NEGATIVE)
    cutmix: float = option(0.0, "Cutmix's alpha; 0: none.", NOT_NEGATIVE)
    mixup_prob: float = option(1.0, "How often a batch is mixed at all.", FRACTION, needs="mixup|cutmix")
    mixup_switch_prob: float = option(0.5, "With both: how often it is cutmix.", FRACTION, needs="mixup cutmix")
    label_smoothing: float = option(0.0, "Share of the target that is spread over all classes.", FRACTION_BELOW_1)

    def check(self) -> None:
        useless = "--color-jitter has no effect with --auto-augment, which changes colours itself: leave one out."
        forbid(self.auto_augment is not None and self.color_jitter > 0, useless)
        for flag, (low, high) in (("--crop-scale", self.crop_scale), ("--crop-ratio", self.crop_ratio)):
            forbid(low > high, f"{flag} takes the smaller number first, not {low:g} {high:g}.")


@dataclass
class FinetuningOptions(
    LabelledDataOptions, ClassificationOptions, AugmentationOptions, ModelOptions, AdapterOptions,
    TokenReductionOptions, ImageOptions, TrainingOptions,
    command="training.finetune",
):  # fmt: skip
    model: str | None = None
    force_patch_dropout: float | None = 0.0
    epochs: int = 10
    lr: float | None = option(None, "Highest learning rate. Without it: 1e-3 (timm's have no default).", POSITIVE)
    beta2: float | None = option(None, "Adam's second beta. Without it: 0.999.", FRACTION_BELOW_1)
    eps: float | None = option(None, "Adam's epsilon. Without it: 1e-8.", NOT_NEGATIVE)
    wd: float = 0.1
    warmup: int | str = "1ep"

    @property
    def trains(self) -> bool:
        return not self.evaluate

    def adam_defaults(self) -> dict[str, float]:
        return {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8}

    def check(self) -> None:
        forbid(self.data is None, "--data is missing: name the labelled images, as in --data cifar10=/data/cifar10.")
        named, loads = self.model is not None, self.evaluate and self.resume is not None
        missing = "--model is missing: give the model's name, and its checkpoint with --pretrained."
        forbid(not named and not loads, missing)
        missing = "--evaluate needs a checkpoint of fine-tuning in --resume, or --head zero-shot."
        forbid(self.evaluate and not loads and self.head != "zero-shot", missing)
        own_weights = not named or ":" in self.model  # local-dir:... and hf-hub:... bring them along
        has_weights = own_weights or self.pretrained or self.pretrained_image or (loads and not self.wise_ft)
        missing = "--pretrained is missing: give a checkpoint file of pre-training, or the name of pretrained weights."
        forbid(not has_weights, missing)
        missing = "--wise-ft starts from the zero-shot classifier, so it needs --head zero-shot."
        forbid(self.wise_ft and named and self.head != "zero-shot", missing)
        forbid(self.wise_ft and self.adapter, "--wise-ft mixes whole weights, not --adapter's: leave one out.")
        missing = "--wise-ft needs the fine-tuned weights: give their checkpoint in --resume."
        forbid(self.wise_ft and self.evaluate and not loads, missing)
        missing = "--wise-ft-save needs --wise-ft, and a run folder in --logs."
        forbid(bool(self.wise_ft_save) and not (self.wise_ft and self.logs.lower() != "none"), missing)
        reduction = self.token_reduction or {}
        missing = "--token-reduction needs --vision-guided-reduction: else no token is removed."
        forbid(bool(reduction) and named and not self.vision_guided_reduction, missing)
        for name in sorted(reduction.keys() & {"lam", "text_scale"}):
            raise UserError(f"{name} weighs the image against its caption, and fine-tuning has none: leave it out.")
