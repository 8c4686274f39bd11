"""The trainer's options: OpenCLIP's flags with their names, meanings and defaults, and this project's own.

A `Command` says which of them a command takes; other commands than pre-training take most of them and add their own.
`parse_args` reads a command line, and YAML files named with `--config`, into one namespace. Every setting of a file
goes through the same parser as a flag, so both are checked alike and a flag wins over a file. docs/flags.md lists
what differs from OpenCLIP, and why.
"""
from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import yaml

from training.durations import Duration
from training.errors import UserError

SOURCE_SEPARATOR = "::"

# Settings that name files or folders: in a config file, `~` and environment variables are expanded in them.
_PATHS = {
    "train_data", "val_data", "imagenet_val", "imagenet_v2", "zeroshot_data",
    "cache_dir", "logs", "resume", "pretrained", "distill_pretrained", "remote_sync",
    "data", "test_data", "also", "results",
}  # fmt: skip
# Settings whose several values make one string on the command line, and may be a list in a config file.
_JOINED = {
    "train_data": SOURCE_SEPARATOR,
    "train_data_upsampling_factors": SOURCE_SEPARATOR,
    "val_data": SOURCE_SEPARATOR,
    "report_to": ",",
}
# Those of `open_clip_elip.reduction.METHODS`, whose import would make a help page wait for torch.
REDUCTION_METHODS = ("elip", "evit", "random", "tome")
# Flag -> option of the model's `token_reduction` config.
_REDUCTION_OPTIONS = {
    "stage_depths": "depths",
    "keep_ratio": "keep_ratio",
    "keep_count": "keep_count",
    "lam": "lam",
    "merge": "merge",
    "text_scale": "text_scale",
    "scoring_depth": "scoring_depth",
    "spread": "spread",
    "keep_rate": "keep_rate",
    "reduce_layers": "layers",
    "merge_per_layer": "r",
    "prop_attn": "prop_attn",
    "target_rrt": "target_rrt",
}


@dataclasses.dataclass(frozen=True)
class Command:
    """The options of one command.

    Attributes:
        usage, description: for the help page.
        sections: each adds a titled group of options to a parser, in the order of the help page.
        complete: checks what one option alone cannot tell (UserError), and fills in what depends on other options.
        refused: flags of the sections that this command does not take, and why. The namespace has their defaults.
        defaults: by flag, where the default is not the section's.
    """

    usage: str
    description: str
    sections: tuple[Callable[[Parser], None], ...]
    complete: Callable[[argparse.Namespace], None]
    refused: Mapping[str, str] = dataclasses.field(default_factory=dict)
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def parse_args(argv: list[str], command: Command | None = None) -> argparse.Namespace:
    """Options of one run, complete and checked; nothing is read but the config files.

    Args:
        argv: the words of the command line, without the program's name.
        command: whose options; without it, pre-training's.

    Raises:
        UserError: an unknown option, a value out of range, options that exclude each other, a bad config file.
        SystemExit: after `--help`.
    """
    command = command or PRETRAINING
    parser = _build_parser(command)
    # Alone first: the command line's own mistakes are then never blamed on a config file.
    files = parser.parse_words(argv, argparse.Namespace()).config or []
    settings: dict[str, _Setting] = {}
    for file in files:
        settings.update(_read_config(Path(file), parser))

    args = argparse.Namespace()
    for setting in settings.values():
        try:
            parser.parse_words(setting.words(), args)
        except UserError as error:
            raise UserError(f"{setting.file}: {error}") from None
    parser.parse_words(argv, args)
    del args.config

    command.complete(args)
    return args


def reduction_overrides(args: argparse.Namespace) -> dict[str, Any]:
    """The given token reduction options, under their names in the model's config; {} if none was given."""
    given = {option: getattr(args, flag, None) for flag, option in _REDUCTION_OPTIONS.items()}
    return {option: value for option, value in given.items() if value is not None}


def resolved_config(args: argparse.Namespace, command: Command | None = None) -> dict[str, Any]:
    """All options of a run as plain types (None, bool, int, float, str, list, dict).

    Written as YAML and given to `--config`, it makes `parse_args` return the same namespace. Attributes that are no
    options (what a program adds to the namespace for itself) are left out.
    """
    options = _build_parser(command or PRETRAINING).options
    return {dest: _plain(dest, getattr(args, dest)) for dest in options}


# --- the parser ---


class _Switch(argparse.Action):
    """`--x` and `--no-x`. Unlike argparse's own, it adds nothing to the help text on any Python version."""

    def __init__(self, option_strings: list[str], dest: str, default: bool | None = False, help: str | None = None):
        names = [*option_strings, *("--no-" + name.removeprefix("--") for name in option_strings)]
        super().__init__(names, dest, nargs=0, default=default, help=help)

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, not option_string.startswith("--no-"))


class _KeyValues(argparse.Action):
    """`--x a=1 b=[2,3] c=word` as {"a": 1, "b": [2, 3], "c": "word"}."""

    def __call__(self, parser, namespace, values, option_string=None):
        pairs = {}
        for value in values:
            key, separator, text = value.partition("=")
            if not (key and separator):
                raise argparse.ArgumentError(self, f"must be given as key=value, not {value!r}")
            pairs[key] = _literal(text)
        setattr(namespace, self.dest, pairs)


class _Refused(argparse.Action):
    """A flag that is recognised only to say why it is not carried over."""

    def __init__(self, option_strings: list[str], dest: str, reason: str, default: Any = argparse.SUPPRESS):
        super().__init__(option_strings, dest, nargs="?", default=default, help=argparse.SUPPRESS)
        self.reason = reason

    def __call__(self, parser, namespace, values, option_string=None):
        raise UserError(f"{self.option_strings[0]} {self.reason}.")


class Parser(argparse.ArgumentParser):
    """An argument parser whose every complaint is a `UserError`.

    Attributes:
        options: name in the namespace -> action, of everything that a config file may set.
        refused: the same for the flags that are not carried over.
    """

    def __init__(self, command: Command):
        super().__init__(
            usage=command.usage,
            description=command.description,
            epilog="docs/flags.md lists the differences from OpenCLIP's trainer.",
            # A shortened flag could change its meaning whenever a new flag is added.
            allow_abbrev=False,
        )
        self.command = command
        self.options: dict[str, argparse.Action] = {}
        self.refused: dict[str, argparse.Action] = {}

    def section(self, title: str) -> Callable[..., None]:
        """A titled group of the help page; the returned function adds one option to it."""
        group = self.add_argument_group(title)

        def add(flag: str, help: str, default: Any = None, **kwargs: Any) -> None:
            default = self.command.defaults.get(flag, default)
            if flag in self.command.refused:
                self.refuse(flag, self.command.refused[flag], default=default)
                return
            if default is True:
                help += " Default: on."
            elif default not in (None, "", {}, []) and default is not False:
                help += f" Default: {default!r}." if isinstance(default, str) else f" Default: {default}."
            if isinstance(kwargs.get("type"), _Number):
                kwargs["metavar"] = kwargs["type"].metavar
            action = group.add_argument(flag, help=help, default=default, **kwargs)
            self.options[action.dest] = action

        return add

    def refuse(self, flag: str, reason: str, **kwargs: Any) -> None:
        action = self.add_argument(flag, action=_Refused, reason=reason, **kwargs)
        self.refused[action.dest] = action

    def parse_words(self, words: list[str], into: argparse.Namespace) -> argparse.Namespace:
        """Parse into a namespace, whose attributes win over the defaults and lose to `words`."""
        args, rest = self.parse_known_args(words, into)
        for word in rest:
            if word.startswith("-"):
                name = word.partition("=")[0]
                known = [name for action in self.options.values() for name in action.option_strings]
                raise UserError(f"Unknown option {name}; {_nearest(name, [*known, '--config', '--help'])}")
        if rest:
            raise UserError(f"Unexpected word {rest[0]!r} on the command line: every option starts with --.")
        return args

    def error(self, message: str) -> NoReturn:
        about = re.fullmatch(r"argument (--[\w-]+)\S*: (.*)", message, re.DOTALL)
        if about is None:
            raise UserError(message)
        flag, problem = about.groups()
        problem = problem.replace("expected one argument", "needs a value")
        problem = problem.replace("expected at least one argument", "needs at least one value")
        problem = problem.replace("ignored explicit argument", "takes no value, but was given")
        raise UserError(f"{flag} {problem}.")


@dataclasses.dataclass(frozen=True)
class _Number:
    """A converter for argparse: finite numbers for which `allowed` holds."""

    kind: type
    allowed: Callable[[Any], bool]
    phrase: str

    @property
    def metavar(self) -> str:
        return "N" if self.kind is int else "X"

    def __call__(self, text: str) -> Any:
        try:
            value = self.kind(text)
        except ValueError:
            value = math.nan
        if not (abs(value) < math.inf and self.allowed(value)):
            raise argparse.ArgumentTypeError(f"must be {self.phrase}, not {text!r}")
        return value


COUNT = _Number(int, lambda v: v >= 0, "a whole number of at least 0")
POSITIVE_COUNT = _Number(int, lambda v: v >= 1, "a whole number of at least 1")
_SEED = _Number(int, lambda v: 0 <= v < 2**32, "a whole number from 0 to 2**32 - 1")
_ANY = _Number(float, lambda v: True, "a number")
NOT_NEGATIVE = _Number(float, lambda v: v >= 0, "a number of at least 0")
POSITIVE = _Number(float, lambda v: v > 0, "a number above 0")
FRACTION = _Number(float, lambda v: 0 <= v <= 1, "a number from 0 to 1")
FRACTION_BELOW_1 = _Number(float, lambda v: 0 <= v < 1, "a number from 0 to 1, below 1")
FRACTION_ABOVE_0 = _Number(float, lambda v: 0 < v <= 1, "a number from 0 to 1, above 0")

# Keyword arguments of an option that is off unless it is given.
OFF = {"default": False, "action": _Switch}


def one_of(*names: str) -> dict[str, Any]:
    """Keyword arguments for an option with a few possible values."""

    def convert(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"must be one of {', '.join(names)}, not {text!r}")
        return text

    return {"type": convert, "metavar": "{" + ",".join(names) + "}"}


def _duration(text: str) -> int | str:
    if text.isascii() and text.isdigit():
        return int(text)
    try:
        Duration.parse(text, "steps")
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be a length like 500, 2ep, 1e6samples or 5%, not {text!r}") from error
    return text


def _optimizer_name(text: str) -> str:
    if text.lower() != "adamw" and not re.fullmatch("timm/.+", text.lower()):
        raise argparse.ArgumentTypeError(f"must be adamw, or timm/NAME for an optimizer of timm, not {text!r}")
    return text


def _reporters(text: str) -> str:
    names = [name.strip() for name in text.split(",")] if text.strip() else []
    for name in names:
        if name not in ("wandb", "tensorboard", "csv", "all"):
            raise argparse.ArgumentTypeError(f"must name wandb, tensorboard, csv or all, not {name!r}")
    return ",".join(names)


def _literal(text: str) -> Any:
    """A Python literal if the text is one, else the text itself, so that words need no quotes."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError):
        return text


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {close[0]}?" if close else "--help lists all options."


# --- the options ---


def _build_parser(command: Command) -> Parser:
    parser = Parser(command)
    parser.add_argument_group("configuration").add_argument(
        "--config",
        metavar="FILE.yaml",
        action="append",
        help="Read options from a YAML file, under the same names as the flags. Flags win over the file; of several "
        "--config, later ones win.",
    )
    for section in command.sections:
        section(parser)
    _refuse(parser)
    return parser


def _add_data(parser: Parser) -> None:
    add = parser.section("training data")
    add(
        "--train-data",
        "Training data: webdataset shards (shards/{000..999}.tar; several sources are joined with '::'), or a CSV "
        "file. Without it nothing is trained: the model is evaluated.",
        metavar="SHARDS|FILE.csv",
    )
    add(
        "--train-data-upsampling-factors",
        "One weight for each source of --train-data, joined with '::' (1::2::0.5): how likely a shard of the source "
        "is drawn, compared with the others. Needs --dataset-resampled. Without it all shards are equally likely.",
        metavar="F::F",
    )
    add(
        "--train-num-samples",
        "Training samples in one epoch. Needed for shards whose sizes are not noted beside them (sizes.json or "
        "__len__), and to set the epoch's length with --dataset-resampled.",
        type=POSITIVE_COUNT,
    )
    add(
        "--dataset-type",
        "Format of the data; auto tells it from the file names. synthetic makes up its pairs and needs no "
        "--train-data.",
        default="auto",
        **one_of("webdataset", "csv", "synthetic", "auto"),
    )
    add("--dataset-resampled", "Draw shards with replacement instead of reading each once an epoch.", **OFF)
    add("--csv-separator", "What separates the columns of a CSV file.", default="\t", metavar="TEXT")
    add("--csv-img-key", "Name of the CSV column with the image files.", default="filepath", metavar="COLUMN")
    add("--csv-caption-key", "Name of the CSV column with the captions.", default="title", metavar="COLUMN")
    add("--workers", "Processes that load data, for each training process.", default=4, type=COUNT)
    add(
        "--stall-seconds",
        "Say which worker and shard is waited for when a batch takes longer than this; 0: never.",
        default=60.0,
        type=NOT_NEGATIVE,
    )
    add("--seed", "Seed of everything that is drawn at random.", default=0, type=_SEED)


def _add_evaluation(parser: Parser) -> None:
    add = parser.section("evaluation")
    add(
        "--val-data",
        "Image-caption pairs, in the formats of --train-data, for the validation loss and retrieval.",
        metavar="SHARDS|FILE.csv",
    )
    add("--val-num-samples", "Samples in --val-data, where that is not noted beside its shards.", type=POSITIVE_COUNT)
    add("--val-frequency", "Validate every N epochs and after the last; 0: never.", default=1, type=COUNT)
    add(
        "--zeroshot-data",
        "Labelled images for zero-shot classification: shards, or a folder with one sub-folder of images a class; "
        "with a classnames.txt beside them.",
        metavar="DIR",
    )
    add("--imagenet-val", "ImageNet's validation images (a folder with one sub-folder a class).", metavar="DIR")
    add("--imagenet-v2", "ImageNet-V2: one folder a class, named 0 to 999.", metavar="DIR")
    add(
        "--zeroshot-frequency",
        "Classify zero-shot every N epochs and after the last; 0: never.",
        default=2,
        type=COUNT,
    )


def _add_model(parser: Parser) -> None:
    add = parser.section("model")
    add(
        "--model",
        "Model, by its name in OpenCLIP's registry, which holds the ELIP models too (ViT-S-16-ELIP, ...).",
        default="RN50",
        metavar="NAME",
    )
    add("--pretrained", "Weights to start from: a tag that OpenCLIP knows, or a file.", default="", metavar="TAG|FILE")
    add("--pretrained-image", "Start the image tower from ImageNet weights, where timm has them.", **OFF)
    add("--cache-dir", "Where downloaded weights and tokenizers are kept.", metavar="DIR")
    add("--force-context-length", "Text length in tokens, instead of the model's.", type=POSITIVE_COUNT)
    add(
        "--force-image-size",
        "Image size in pixels (one number, or height and width), instead of the model's.",
        type=POSITIVE_COUNT,
        nargs="+",
    )
    add("--force-quick-gelu", "Use the QuickGELU activation, as OpenAI's weights need.", **OFF)
    add(
        "--force-patch-dropout",
        "Share of patches dropped at random in training, instead of the model's; 0 for a last stretch at full length.",
        type=FRACTION_BELOW_1,
    )
    add("--force-custom-text", "Build the text tower as a module of its own (CustomTextCLIP).", **OFF)
    add("--lock-image", "Do not train the image tower.", **OFF)
    add("--lock-image-unlocked-groups", "With --lock-image: train its last N groups of layers.", default=0, type=COUNT)
    add("--lock-image-freeze-bn-stats", "With --lock-image: keep the BatchNorm statistics of locked layers.", **OFF)
    add("--lock-text", "Do not train the text tower.", **OFF)
    add("--lock-text-unlocked-layers", "With --lock-text: train its last N groups of layers.", default=0, type=COUNT)
    add("--lock-text-freeze-layer-norm", "With --lock-text: lock the LayerNorms of locked layers too.", **OFF)


def _add_token_reduction(parser: Parser) -> None:
    add = parser.section("token reduction (what is not given is as in the model's config)")
    add(
        "--token-reduction",
        "Method of token reduction: elip; adaptive (ELIP with as many tokens as an image's attention asks for, within "
        "a budget of the batch); evit; tome; random (patches dropped at the input, as in FLIP); or none.",
        **one_of(*REDUCTION_METHODS, "none"),
    )
    add(
        "--target-rrt",
        "Of evit, tome and random: the ratio of removed tokens that the schedule is to meet, for matched comparisons.",
        type=FRACTION_BELOW_1,
    )
    add(
        "--full-tokens-last",
        "Train with all tokens in the last part of the run (FLIP's unmasked tuning): steps, or with a unit: 1ep, 10%%.",
        type=_duration,
        metavar="N|NUNIT",
    )
    add("--stage-depths", "Layers in each stage of ELIP, first to last.", type=POSITIVE_COUNT, nargs="+")
    add(
        "--keep-ratio",
        "Share of the image's patches that each stage keeps, counted from the patches at the start; with random "
        "dropping, one number.",
        type=FRACTION_ABOVE_0,
        nargs="+",
    )
    add(
        "--keep-count",
        "Number of patches that each stage keeps; instead of --keep-ratio.",
        type=POSITIVE_COUNT,
        nargs="+",
    )
    add(
        "--lam",
        "Weight of the image against the text when tokens are scored: 1 image only, 0 text only.",
        type=FRACTION,
    )
    add("--merge", "Merge the dropped tokens into one instead of leaving them out.", action=_Switch)
    add(
        "--text-scale",
        "Rescale the text feature to the norm of the token that it is fused with (match), or leave it (none).",
        **one_of("match", "none"),
    )
    add(
        "--scoring-depth",
        "Score with the N-th layer of a stage instead of its last: cheaper, and an approximation.",
        type=POSITIVE_COUNT,
    )
    add("--spread", "Adaptive: an image keeps from 1 - SPREAD to 1 + SPREAD times the mean.", type=FRACTION)
    add("--keep-rate", "EViT: share of the present patches that each reducing layer keeps.", type=FRACTION_ABOVE_0)
    add("--reduce-layers", "EViT: the reducing layers, from 1.", type=POSITIVE_COUNT, nargs="+")
    add("--merge-per-layer", "ToMe: tokens that each layer merges away.", type=COUNT)
    add("--prop-attn", "ToMe: attention in proportion to the patches that a token stands for.", action=_Switch)


def _add_images(parser: Parser) -> None:
    add = parser.section("image preprocessing (what is not given is as in the model's config)")
    add("--image-mean", "Mean that is subtracted, one or three numbers.", type=_ANY, nargs="+")
    add("--image-std", "Deviation that is divided by, one or three numbers.", type=POSITIVE, nargs="+")
    add("--image-interpolation", "How images are resized.", **one_of("bicubic", "bilinear", "random"))
    add(
        "--image-resize-mode",
        "In evaluation, what is brought to the model's image size: the shortest side (then cropped), the longest "
        "(then padded), or both (squashed).",
        **one_of("shortest", "longest", "squash"),
    )
    add(
        "--image-decode",
        "How images are decoded and resized for training and validation. fast: as uint8 pixels, normalised on the "
        "device; what OpenCLIP's transform makes, but for rounding. reduced: also, JPEGs that are much larger than "
        "needed are decoded at a fraction of their size, an approximation. plain: OpenCLIP's transform itself.",
        default="fast",
        **one_of("plain", "fast", "reduced"),
    )
    add(
        "--aug-cfg",
        "Training augmentation as key=value words, for instance scale=(0.4,1.0) color_jitter=0.4 use_timm=True.",
        default={},
        nargs="*",
        action=_KeyValues,
        metavar="KEY=VALUE",
    )


def _add_loss(parser: Parser) -> None:
    add = parser.section("loss")
    add("--siglip", "Train with SigLIP's pairwise sigmoid loss.", **OFF)
    add(
        "--loss-dist-impl",
        "How SigLIP's loss exchanges features between processes. Without it: bidir.",
        **one_of("bidir", "shift", "reduce", "gather"),
    )
    add(
        "--local-loss",
        "Compute only this process's rows of the similarity matrix: the same loss for less memory. Belongs together "
        "with --gather-with-grad; turn both off, or neither.",
        default=True,
        action=_Switch,
    )
    add("--gather-with-grad", "Let gradients flow through features of other processes.", default=True, action=_Switch)
    add("--distill-model", "Teacher model for distillation; needs --distill-pretrained.", metavar="NAME")
    add("--distill-pretrained", "Weights of the teacher: a tag or a file.", metavar="TAG|FILE")


def _add_optimization(parser: Parser) -> None:
    add = parser.section("optimisation")
    add("--epochs", "Epochs in all.", default=32, type=COUNT)
    add(
        "--duration",
        "Length of the run instead of --epochs: optimizer steps, or with a unit: 2.5ep, 1e7samples.",
        type=_duration,
        metavar="N|NUNIT",
    )
    add("--batch-size", "Samples of a batch, for each training process.", default=64, type=POSITIVE_COUNT)
    add(
        "--accum-freq",
        "Batches that make one optimizer step, with negatives from all of them.",
        default=1,
        type=POSITIVE_COUNT,
    )
    add(
        "--opt",
        "Optimizer: adamw, or any of timm's as timm/NAME.",
        default="adamw",
        type=_optimizer_name,
        metavar="NAME",
    )
    add("--lr", "Highest learning rate. Without it: 5e-4 (timm optimizers have no default).", type=POSITIVE)
    add("--beta1", "Adam's first beta. Without it: 0.9.", type=FRACTION_BELOW_1)
    add("--beta2", "Adam's second beta. Without it: 0.98 for ViTs, else 0.999.", type=FRACTION_BELOW_1)
    add("--eps", "Adam's epsilon. Without it: 1e-6 for ViTs, else 1e-8.", type=NOT_NEGATIVE)
    add("--wd", "Weight decay; never applied to biases, norms and the temperature.", default=0.2, type=NOT_NEGATIVE)
    add("--momentum", "Momentum, for timm optimizers that have one.", type=NOT_NEGATIVE)
    add("--grad-clip-norm", "Clip the gradient to this norm. Without it: no clipping.", type=POSITIVE)
    add(
        "--warmup",
        "How long the learning rate rises from 0: optimizer steps, or with a unit: 2ep, 1e6samples, 5%%.",
        default=10000,
        type=_duration,
        metavar="N|NUNIT",
    )
    add(
        "--lr-scheduler",
        "Learning rate after the warm-up: a cosine to 0, constant, or constant with a cooldown at the end.",
        default="cosine",
        **one_of("cosine", "const", "const-cooldown"),
    )
    add("--epochs-cooldown", "Length of the cooldown, the last N of --epochs.", type=COUNT)
    add("--layer-decay", "Multiply the learning rate by this for each layer below the last.", type=FRACTION_ABOVE_0)
    add("--ema-decay", "Also keep a moving average of the weights with this decay.", type=FRACTION_BELOW_1)
    add(
        "--nonfinite",
        "What to do after a step whose loss or gradient is not finite (it is never applied): stop, or skip it.",
        default="stop",
        **one_of("stop", "skip"),
    )
    add("--lr-cooldown-end", "Learning rate at the end of the cooldown.", default=0.0, type=NOT_NEGATIVE)
    add("--lr-cooldown-power", "Power of the cooldown's polynomial; 1 is linear.", default=1.0, type=NOT_NEGATIVE)
    add("--skip-scheduler", "Keep the learning rate at --lr throughout.", **OFF)


def _add_speed_and_memory(parser: Parser) -> None:
    add = parser.section("precision, speed and memory")
    add(
        "--precision",
        "Number format. amp: mixed float16 with loss scaling; amp_bf16: mixed bfloat16; bf16 and fp16: weights in "
        "that format but for norms; pure_*: all weights; fp32.",
        default="amp",
        **one_of("amp", "amp_bf16", "amp_bfloat16", "bf16", "fp16", "pure_bf16", "pure_fp16", "fp32"),
    )
    add(
        "--device",
        "Where to train: cuda, cpu, ... Where there is no CUDA, cuda means cpu.",
        default="cuda",
        metavar="NAME",
    )
    add("--grad-checkpointing", "Recompute activations in the backward pass: less memory, more time.", **OFF)
    add("--torchcompile", "Compile the model with torch.compile.", **OFF)
    add(
        "--shortcuts",
        "Leave out what changes no number: captions are cut behind their end, and of the last layers only the row that "
        "is pooled is computed. --no-shortcuts runs the towers as OpenCLIP does.",
        default=True,
        action=_Switch,
    )


def _add_distributed(parser: Parser) -> None:
    add = parser.section("several processes (started by torchrun)")
    add("--dist-url", "Address at which the processes meet. Without it: torchrun's.", metavar="URL")
    add("--dist-backend", "nccl, gloo, hccl, ... Without it: what fits the device.", metavar="NAME")
    add(
        "--no-set-device-rank",
        "Do not choose the device by local rank, where each process sees one device only.",
        default=False,
        action="store_true",
    )
    add("--use-bn-sync", "Compute BatchNorm statistics over all processes.", **OFF)
    add("--fsdp", "Split weights, gradients and optimizer states over the processes (FSDP2), for large towers.", **OFF)
    add("--ddp-static-graph", "Tell DistributedDataParallel that the graph never changes.", **OFF)


def _add_checkpoints(parser: Parser) -> None:
    add = parser.section("run folder and checkpoints")
    add("--logs", "Folder of all runs; 'none' keeps nothing.", default="./logs/", metavar="DIR")
    add("--name", "Name of the run's folder in --logs. Without it: from the time and the main options.", metavar="NAME")
    add("--resume", "Continue from this checkpoint, or from the newest of --name with 'latest'.", metavar="FILE|latest")
    add("--save-frequency", "Save every N epochs and after the last; 0: only after the last.", default=1, type=COUNT)
    add("--save-every-n-steps", "Also save in the middle of an epoch, every N optimizer steps.", type=POSITIVE_COUNT)
    add("--save-every-n-minutes", "Also save in the middle of an epoch, every N minutes.", type=POSITIVE)
    add(
        "--keep-last",
        "Keep the newest N checkpoints and the best. Without it: every epoch's, and the two newest in the middle of an "
        "epoch.",
        type=POSITIVE_COUNT,
    )
    add(
        "--allow-elastic",
        "Let --resume go on with another number of processes or another batch size, by samples seen.",
        **OFF,
    )
    add("--save-most-recent", "Also save every epoch to epoch_latest.pt.", **OFF)
    add("--delete-previous-checkpoint", "Delete the checkpoint before, once a new one is saved.", **OFF)
    add(
        "--remote-sync",
        "Copy the run folder to this URL (s3://..., or any that fsspec knows) as it grows.",
        metavar="URL",
    )
    add("--remote-sync-frequency", "Seconds between two copies.", default=300, type=POSITIVE_COUNT)
    add("--remote-sync-protocol", "Program that copies.", default="s3", **one_of("s3", "fsspec"))
    add("--copy-codebase", "Keep a copy of the code in the run folder.", **OFF)


def _add_logging(parser: Parser) -> None:
    add = parser.section("logging")
    add("--log-every-n-steps", "Optimizer steps between two lines of the log.", default=100, type=POSITIVE_COUNT)
    add(
        "--report-to",
        "Where metrics are written besides the console: wandb, tensorboard, csv (joined with commas), or all.",
        default="",
        type=_reporters,
        metavar="NAMES",
    )
    add("--progress", "Show a progress bar. Without it: on a terminal only.", action=_Switch)
    add("--wandb-project-name", "Project in wandb.", default="open-clip", metavar="NAME")
    add("--wandb-notes", "Notes on the run in wandb.", default="", metavar="TEXT")
    add("--log-local", "Write a log file on every machine, not only on the first.", **OFF)
    add("--debug", "Log more.", **OFF)


def _refuse(parser: Parser) -> None:
    parser.refuse("--horovod", "is not supported: start several processes with torchrun instead")
    parser.refuse("--use-bnb-linear", "is not supported: use --precision amp_bf16 to save time and memory instead")
    parser.refuse("--torchscript", "is not supported: use --torchcompile instead")
    parser.refuse("--trace", "is not supported: use --torchcompile instead")
    coca = "belongs to CoCa models, which this trainer does not train: leave it out"
    parser.refuse("--coca-caption-loss-weight", coca, default=2.0)
    parser.refuse("--coca-contrastive-loss-weight", coca, default=1.0)


# --- what one option alone cannot tell ---


def _forbid(wrong: bool, sentence: str) -> None:
    if wrong:
        raise UserError(sentence)


def check_training(args: argparse.Namespace, trains: bool) -> None:
    """Raise UserError for the first combination of options that makes no sense, whatever is trained.

    Args:
        trains: the command is to train, not only to evaluate.
    """
    timm = args.opt.lower().startswith("timm/")
    _forbid(
        _is_coca(args.model),
        f"--model {args.model} is a CoCa model: this trainer trains contrastive models only, choose one.",
    )
    if args.lr_scheduler == "const-cooldown":
        _forbid(
            args.epochs_cooldown is None,
            "--lr-scheduler const-cooldown needs --epochs-cooldown, the number of epochs at the end to cool down in.",
        )
        _forbid(
            args.epochs_cooldown > args.epochs,
            f"--epochs-cooldown {args.epochs_cooldown} is more than --epochs {args.epochs}: lower it.",
        )
    if timm:
        _forbid(
            (args.beta1 is None) != (args.beta2 is None),
            f"--opt {args.opt} needs both --beta1 and --beta2, or neither.",
        )
        _forbid(
            trains and args.lr is None and not args.skip_scheduler,
            f"--opt {args.opt} has no default learning rate to schedule: give --lr.",
        )
    _forbid(
        str(args.duration).endswith("%"),
        "--duration is the whole run: give it in steps, epochs (ep) or samples, not in %.",
    )
    _forbid(len(args.image_mean or [0]) not in (1, 3), "--image-mean takes one number, or three (red, green, blue).")
    _forbid(len(args.image_std or [1]) not in (1, 3), "--image-std takes one number, or three (red, green, blue).")
    _forbid(len(args.force_image_size or []) > 2, "--force-image-size takes one number, or two (height, width).")
    _forbid(
        args.keep_ratio is not None and args.keep_count is not None,
        "--keep-ratio and --keep-count say the same thing in two ways: give only one.",
    )
    _forbid(
        args.full_tokens_last is not None and args.token_reduction == "none",
        "--full-tokens-last has nothing to end with --token-reduction none: leave one out.",
    )


def _complete_pretraining(args: argparse.Namespace) -> None:
    trains = bool(args.train_data) or args.dataset_type == "synthetic"
    evaluates = any((args.val_data, args.zeroshot_data, args.imagenet_val, args.imagenet_v2))
    distills = args.distill_model is not None
    _forbid(
        not trains and not evaluates,
        "There is nothing to do: give --train-data to train, or --val-data, --zeroshot-data or --imagenet-val to "
        "evaluate.",
    )
    check_training(args, trains)
    _forbid(
        _is_coca(args.distill_model),
        f"--distill-model {args.distill_model} is a CoCa model: this trainer trains contrastive models only, choose "
        "one.",
    )
    _forbid(
        distills != (args.distill_pretrained is not None),
        "--distill-model and --distill-pretrained belong together: give both, or neither.",
    )
    _forbid(distills and args.accum_freq > 1, "--distill-model cannot be used with --accum-freq: leave one out.")
    _forbid(distills and args.siglip, "--distill-model needs the softmax loss: leave out --siglip.")
    _check_upsampling_factors(args)
    _check_augmentation(args)
    # The hyper-parameters of the CLIP paper, which has other ones for ViTs.
    vit = "vit" in args.model.lower()
    fill_optimizer_defaults(args, lr=5e-4, beta1=0.9, beta2=0.98 if vit else 0.999, eps=1e-6 if vit else 1e-8)


def _is_coca(model: str | None) -> bool:
    # A folder on the way to a `local-dir:` model may be called anything.
    return model is not None and "coca" in model.rsplit("/", 1)[-1].lower()


def _check_upsampling_factors(args: argparse.Namespace) -> None:
    if args.train_data_upsampling_factors is None:
        return
    if not args.dataset_resampled:
        raise UserError("--train-data-upsampling-factors needs --dataset-resampled.")
    factors = args.train_data_upsampling_factors.split(SOURCE_SEPARATOR)
    for factor in factors:
        try:
            POSITIVE(factor)
        except argparse.ArgumentTypeError as error:
            raise UserError(f"Every one of --train-data-upsampling-factors {error}.") from None
    sources = args.train_data.split(SOURCE_SEPARATOR) if args.train_data else []
    if len(factors) != len(sources):
        raise UserError(
            f"--train-data-upsampling-factors has {len(factors)} factor(s) for {len(sources)} source(s) in "
            "--train-data: give one for each."
        )


def _check_augmentation(args: argparse.Namespace) -> None:
    if not args.aug_cfg:
        return
    from open_clip import AugmentationCfg  # takes seconds: only for those who need it

    known = [field.name for field in dataclasses.fields(AugmentationCfg)]
    for key in args.aug_cfg:
        if key not in known:
            raise UserError(f"--aug-cfg has no setting {key!r}: it knows {', '.join(known)}.")


def fill_optimizer_defaults(args: argparse.Namespace, **defaults: float) -> None:
    """Gives the options that were not given these values; timm's optimizers bring their own."""
    if args.opt.lower().startswith("timm/"):
        return
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


SECTIONS = (
    _add_data, _add_evaluation, _add_model, _add_token_reduction, _add_images, _add_loss, _add_optimization,
    _add_speed_and_memory, _add_distributed, _add_checkpoints, _add_logging,
)  # fmt: skip
PRETRAINING = Command(
    usage="torchrun --nproc_per_node N -m training.main [options]\n       python -m training.main [options]",
    description="Train a CLIP model, with ELIP token reduction or without, or evaluate one (no --train-data).",
    sections=SECTIONS,
    complete=_complete_pretraining,
)


# --- config files ---


@dataclasses.dataclass(frozen=True)
class _Setting:
    """One value of a config file, as it stands there."""

    action: argparse.Action
    value: Any
    file: Path

    def words(self) -> list[str]:
        """The words of a command line that say the same; none for null."""
        action, value = self.action, self.value
        flag = action.option_strings[0]
        if value is None:
            return []
        if isinstance(action, _Refused):
            return [] if value is False else [flag]
        if action.nargs == 0:
            if self._truth():
                return [flag]
            return [f"--no-{flag.removeprefix('--')}"] if isinstance(action, _Switch) else []
        if isinstance(action, _KeyValues):
            if not isinstance(value, dict):
                raise UserError(f"{action.dest} must be a mapping, not {value!r}.")
            return [flag, *(f"{key}={_revive(item)!r}" for key, item in value.items())]
        if isinstance(value, list) and action.dest in _JOINED:
            value = _JOINED[action.dest].join(self._text(item) for item in value)
        elif isinstance(value, list) and action.nargs is not None:
            return [flag, *(self._expanded(item) for item in value)]
        return [f"{flag}={self._expanded(value)}"]

    def _expanded(self, value: Any) -> str:
        text = self._text(value)
        return _expand(text) if self.action.dest in _PATHS else text

    def _truth(self) -> bool:
        words = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
        truth = words.get(str(self.value).lower())
        if truth is None:
            raise UserError(f"{self.action.dest} must be true or false, not {self.value!r}.")
        return truth

    def _text(self, value: Any) -> str:
        if not isinstance(value, (str, int, float)) or isinstance(value, bool):
            raise UserError(f"{self.action.dest} cannot be {value!r}: it takes {self._expects()}.")
        return str(value)

    def _expects(self) -> str:
        if self.action.dest in _JOINED or self.action.nargs is not None:
            return "a value or a list of values"
        return "a single value (true, false and null need quotes where they are text)"


class _Loader(yaml.SafeLoader):
    """YAML whose plain scalars stay text, but for true, false and null.

    The options know their own types, and YAML's guesses harm: it takes 1e-3 for text and 2024_01_01 for a number.
    """

    yaml_implicit_resolvers: dict = {}

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            name = _key(key.value)
            if name in seen:
                raise yaml.constructor.ConstructorError(problem=f"{name} is given twice", problem_mark=key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile("^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile("^(|~|null|Null|NULL)$"), ["", "~", "n", "N"])


def _read_config(file: Path, parser: Parser, includers: tuple[Path, ...] = ()) -> dict[str, _Setting]:
    """Settings of a config file by option name; its own win over those of the files it includes."""
    if file.resolve() in includers:
        raise UserError(f"The config files include each other in a circle: {includers[-1]} includes {file} again.")
    content = _load_yaml(file)
    settings: dict[str, _Setting] = {}
    includes = content.pop("include", None)
    for other in includes if isinstance(includes, list) else [includes] if includes else []:
        if not isinstance(other, str):
            raise UserError(f"{file}: include must be a file name or a list of file names.")
        try:
            path = file.parent / _expand(other)
        except UserError as error:
            raise UserError(f"{file}: {error}") from None
        settings.update(_read_config(path, parser, (*includers, file.resolve())))

    for key, value in content.items():
        action = parser.options.get(_key(key)) or parser.refused.get(_key(key))
        if action is None:
            raise UserError(f"Unknown option {key} in {file}; {_nearest(_key(key), [*parser.options, 'include'])}")
        settings[action.dest] = _Setting(action, value, file)
    return settings


def _load_yaml(file: Path) -> dict[Any, Any]:
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise UserError(f"Cannot read the config file {file}: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise UserError(f"Cannot read the config file {file}: it is not UTF-8 text.") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or getattr(error, "reason", "")
        where = f" in line {mark.line + 1}" if mark else ""
        raise UserError(f"The config file {file} is not valid{where}: {problem}.") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"The config file {file} must be a mapping of options to values (batch-size: 64).")
    return content


def _key(name: Any) -> str:
    return str(name).replace("-", "_")


_VARIABLE = re.compile(r"\$(?:([$~])|([A-Za-z_]\w*)|\{([A-Za-z_]\w*)\})")


def _expand(text: str) -> str:
    """Put in environment variables, and the home folder for `~` at the start of a source; `$$` and `$~` are literal."""

    def value(match: re.Match) -> str:
        if match[1]:
            return match[1]
        name = match[2] or match[3]
        if name not in os.environ:
            raise UserError(
                f"{text!r} uses the variable {name}, which is not set: export it (a plain $ is written $$)."
            )
        return os.environ[name]

    sources = (os.path.expanduser(source) for source in text.split(SOURCE_SEPARATOR))
    return _VARIABLE.sub(value, SOURCE_SEPARATOR.join(sources))


def _unexpand(text: str) -> str:
    """The text of which `_expand` makes `text`."""
    sources = (re.sub("^~", "$~", source.replace("$", "$$")) for source in text.split(SOURCE_SEPARATOR))
    return SOURCE_SEPARATOR.join(sources)


def _revive(value: Any) -> Any:
    """A value of a key=value mapping in a config file, read as it would be on the command line."""
    if isinstance(value, list):
        return [_revive(item) for item in value]
    if isinstance(value, dict):
        return {key: _revive(item) for key, item in value.items()}
    return _literal(value) if isinstance(value, str) else value


def _plain(dest: str, value: Any) -> Any:
    """What a config file has to hold for the option to get this value."""
    if dest in _PATHS and isinstance(value, str):
        return _unexpand(value)
    if dest in _PATHS and isinstance(value, list):
        return [_unexpand(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain_literal(item) for key, item in value.items()}
    return list(value) if isinstance(value, list) else value


def _plain_literal(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain_literal(item) for item in value]
    if isinstance(value, str):
        return value if _literal(value) == value else repr(value)
    # What YAML has no type for (a tuple, mostly) is written as Python writes it, which `_revive` reads.
    return value if isinstance(value, (bool, int, float, type(None))) else repr(value)
