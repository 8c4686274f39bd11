"""Options of models that fuse image and text."""
from __future__ import annotations

from dataclasses import dataclass

from .kinds import FRACTION, FRACTION_BELOW_1, POSITIVE_COUNT
from .parser import Section, option

NO_FSDP = "--fsdp is for CLIP models; a fusion model is small enough for one GPU: leave it out."


@dataclass
class StartOptions(Section, title="fusion models: where they start", needs="fusion_models"):
    start_image: str | None = option(
        None, "Weights of the image tower: timm's by name (deit_base_patch16_224), or a file of DeiT's or timm's; of a "
        "METER model CLIP's, by name and tag (ViT-B-32-quickgelu:openai) or a file.",
        metavar="NAME|FILE")
    start_text: str | None = option(
        None, "Weights of the text layers: BERT's or RoBERTa's by name (bert-base-uncased), or a folder of one.",
        metavar="NAME|DIR")


@dataclass
class DrawingOptions(Section, title="fusion models: what is drawn", needs="meter_models trains"):
    whole_words: bool = option(
        True, "A METER model masks whole words within a budget, as in its release; off: each token by itself.")
    own_images: bool = option(
        True, "The false image of a caption may by chance be its own, as in METER's release; off: never.")


@dataclass
class RegularizationOptions(Section, title="fusion models: regularization", needs="fusion_models trains"):
    drop_path: float = option(
        0.0, "Of how many pictures the image tower's last layer is left out (stochastic depth); of the layers before "
        "it, evenly fewer, and of the first none.", FRACTION_BELOW_1)
    decay_norms: bool = option(
        True, "Weight decay as in the releases: of BLIP on all parameters, of METER on all but biases and the norms of "
        "BERT's layers. Off, as in ALBEF: on none that is one-dimensional.")


@dataclass
class TwinOptions(Section, title="fusion models: momentum twin", needs="fusion_models momentum_twin trains"):
    twin_momentum: float = option(0.995, "How much of itself the twin keeps in a step.", FRACTION)
    twin_weight: float = option(0.4, "Weight of the twin's answers in the targets.", FRACTION)
    twin_dropout: bool = option(True, "The twin's dropout is on, as in the released programs.")


@dataclass
class QueueOptions(Section, title="fusion models: contrast", needs="fusion_models momentum_twin trains"):
    queue_size: int = option(65536, "Features of the twin that contrast remembers.", POSITIVE_COUNT)


@dataclass
class ListOptions(Section, title="data: lists"):
    train_data: list[str] | None = option(
        None, "Lists to train on, JSON or METER's Arrow files.", metavar="FILE", path=True, nargs="+")
    val_data: str | None = option(
        None, "List to evaluate on after each epoch; it chooses the best checkpoint.", metavar="FILE", path=True)
    test_data: str | None = option(None, "List to evaluate on after each epoch too.", metavar="FILE", path=True)
    image_root: str | None = option(
        None, "Folder that paths in JSON lists count from. Without it: that of each list.", metavar="DIR", path=True)
