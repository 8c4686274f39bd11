"""A training step of ours against OpenCLIP's own: operations, time and its parts, utilisation, activations, memory.

    python benchmarks/train_step.py                                    # a CPU; under 5 minutes on 2 cores
    python benchmarks/train_step.py --precision amp_bf16 --batch-size 512 --compile          # a GPU
    python benchmarks/train_step.py --models ViT-L-14-ELIP ViT-L-14-ELIP:lam=0.5 --minutes 20
    python benchmarks/train_step.py --models ALBEF-B-16-ELIP --batch-size 4 --caption-length lengths.txt --name albef

Each model is compared with plain OpenCLIP of the same shape in the same process: its own model class, its own
`train_one_epoch`, `ClipLoss`, and AdamW as its `main` makes it, captions at the full context length. Ours is the
trainer's own step (`training.trainer.Trainer`), with the flags that the model's options stand for. Both get the same
images and captions, in the same precision, from the CPU's memory; nothing is decoded. Steps are taken in turn; the
ratio of times is the median over the rounds of ours / OpenCLIP's in the same round. Utilisation is the rate of the
step's operations to that of a large matrix product, which has its turn in each round too.

A fusion model, of which OpenCLIP has none, is compared with itself as the released program runs it: no token reduction,
`--no-shortcuts`, in our trainer too. All models of such a contest share one set of weights and one optimizer, since
memory seldom holds several; each one's peak is measured as if it were alone.
"""
from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any
from unittest import mock

import open_clip
import torch
from open_clip_train.train import train_one_epoch
from telling import common_parser, count_rounds, positive, tell
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from open_clip_elip import TextParts
from open_clip_elip.identity import ModelError
from open_clip_elip.identity import describe as describe_model
from open_clip_elip.profile.command import MEAN
from open_clip_elip.profile.compare import fusion
from open_clip_elip.profile.flops import Flops, count_flops
from open_clip_elip.profile.measure import SavedBytes, in_turn, peak_bytes, ratios, spread
from open_clip_elip.profile.models import (
    Candidate,
    ProfileError,
    caption_ids,
    caption_lengths,
    context_length,
    find_device,
)
from open_clip_elip.profile.report import describe_machine, machine, make_folder
from open_clip_elip.registry import plain_name
from training.data.pixels import Images, to_device
from training.distributed import Ranks
from training.errors import UserError
from training.models import wrap
from training.optim import create_optimizer
from training.options import parse
from training.options.main import PretrainingOptions
from training.trainer import Trainer
from training.work.main import pretraining

MODELS = [f"ViT-{size}-16{how}" for size in "SB" for how in ("-ELIP", "-ELIP:scoring_depth=1", ":shortcuts=true")]

# Ratios to OpenCLIP that are to be reached or beaten: operations, step time, saved activations.
TARGETS = {
    "ViT-S-16-ELIP": (0.70, 0.66, 0.59),
    "ViT-B-16-ELIP": (0.79, 0.75, 0.63),
    "ViT-S-16-ELIP:scoring_depth=1": (0.575, 0.57, 0.59),
    "ViT-B-16-ELIP:scoring_depth=1": (0.645, 0.66, 0.63),
    "ALBEF-B-16-ELIP": (0.77,),
    "ALBEF-B-16-ELIP:scoring_depth=1": (0.68,),
}
# torch's operations by what they do, for `busy`.
BUSY = {
    "products": ("::mm", "::addmm", "::bmm", "::baddbmm", "conv"), "attention": ("scaled_dot_product", "attention"),
}  # fmt: skip
NONE = {"method": "none"}
LR, BETAS, EPS, WEIGHT_DECAY = 1e-6, (0.9, 0.98), 1e-6, 0.1  # noise for images: nothing must be learnt from it


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 after one sentence on stderr."""
    args = _parser().parse_args(argv)
    begin, results = time.perf_counter(), []
    try:
        device = find_device(args.device)
        make_folder(args.results)
        if device.type == "cuda":  # as both trainers have it
            torch.backends.cuda.matmul.allow_tf32 = True
            torch.backends.cudnn.benchmark = True
        args.repeat = args.repeat or (1 if device.type == "cpu" else 10)
        contests = list(by_shape([Candidate.parse(name, args.image_size) for name in args.models]))
        work = [count(plain, args).total * (1 + len(ours)) for plain, ours in contests]
        for i, (plain, ours) in enumerate(contests):
            left = args.minutes * 60 - (time.perf_counter() - begin)
            results += compare(plain, ours, args, device, seconds=left * work[i] / sum(work[i:]))
    except (ModelError, UserError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    lengths = caption_lengths(args.caption_length, args.batch_size)
    setting = machine(device) | {
        "batch_size": args.batch_size,
        "precision": args.precision,
        "compile": args.compile,
        "image_size": args.image_size or "the model's",
        "caption_tokens": {"mean": sum(lengths) / len(lengths), "min": min(lengths), "max": max(lengths)},
        "steps_a_round": args.repeat,
    }
    found = {"setting": setting, "results": results}
    text = describe(setting, results)
    tell(args, f"train_step_{device.type}", "Training step", text, table(results), found)
    return 0


def by_shape(specs: Sequence[Candidate]) -> Iterator[tuple[Candidate, list[Candidate]]]:
    """Plain OpenCLIP's model of each shape (a fusion model as released), and the models of that shape."""
    for stem in dict.fromkeys(plain_name(spec.identity.name) for spec in specs):
        of_shape = [spec for spec in specs if plain_name(spec.identity.name) == stem]
        name = of_shape[0].identity.name
        label, name = (stem, stem) if stem in open_clip.list_models() else (f"plain {name}", name)
        label = f"{label} as released" if of_shape[0].fuses else f"open_clip {label}"
        size = of_shape[0].identity.config["vision_cfg"]["image_size"]
        yield Candidate(label, describe_model(name, token_reduction=NONE, force_image_size=size)), of_shape


def count(spec: Candidate, args: argparse.Namespace, text: Tensor | TextParts | None = None) -> Flops:
    """Operations of a step, on `text` or captions as they are."""
    model = spec.build("meta")
    image = torch.empty(args.batch_size, 3, *model.visual.image_size, device="meta")
    if spec.fuses:
        return fusion().count_fusion(model, image, captions(spec, model, args))
    return count_flops(model, image, (captions(spec, model, args) if text is None else text).to("meta"))


def captions(spec: Candidate, model: torch.nn.Module, args: argparse.Namespace) -> Tensor:
    if not spec.fuses:
        return caption_ids(model, caption_lengths(args.caption_length, args.batch_size, context_length(model)))
    context = spec.identity.config["text_cfg"]["context_length"]
    return fusion().words(caption_lengths(args.caption_length, args.batch_size, context), model)


def compare(
    plain: Candidate, ours: Sequence[Candidate], args: argparse.Namespace, device: torch.device, seconds: float
) -> list[dict[str, Any]]:
    """OpenCLIP's model and several of ours of the same shape; one result for each of ours."""
    begin = time.perf_counter()
    shape = plain.build("meta")
    if not (plain.fuses or type(shape) in (open_clip.CLIP, open_clip.CustomTextCLIP)):
        raise ProfileError(f"{plain.label} is a {type(shape).__name__}; only CLIP models are compared.")
    image = torch.randn(args.batch_size, 3, *shape.visual.image_size, generator=torch.Generator().manual_seed(0))
    text = captions(plain, shape, args)
    if device.type == "cuda":
        image, text = image.pin_memory(), text.pin_memory()

    sides, figures = {}, {}
    for label, spec in {"": plain, **{spec.label: spec for spec in ours}}.items():
        own_side = partial(OurSide, like=sides.get("") if spec.fuses else None)
        sides[label] = side = (own_side if label or spec.fuses else OpenClipSide)(spec, image, text, args, device)
        flops = count(spec, args, side.text()).total
        figures[label] = memory(side, [image, text], device) | {"flops": flops}
    product = MatrixProduct(args.precision, device)
    times = in_turn(
        {"a product": product, **{label: partial(side, args.repeat) for label, side in sides.items()}},
        device=device,
        rounds=args.rounds,
        warmup=3 if device.type == "cuda" or args.compile else 0,
        seconds=seconds - (time.perf_counter() - begin),
    )
    for label, found in figures.items():
        found["step_seconds"] = spread([t / args.repeat for t in times[label]])
        found["seconds_apart"] = apart(sides[label], device)
        found["busy_shares"] = busy(sides[label], device)
        rates = ratios(times["a product"], [t / args.repeat for t in times[label]])
        found["utilisation"] = median(rates) * found["flops"] / product.flops
    base, results = figures[""], []
    for spec in ours:
        own, target = figures[spec.label], TARGETS.get(spec.label)
        rounds = ratios(times[spec.label], times[""])
        results.append(
            {
                "model": spec.label,
                "against": plain.label,
                "pairs": args.batch_size,
                "flops_ratio": own["flops"] / base["flops"],
                "time_ratio": spread(rounds),
                "time_ratio_of_each_round": rounds,
                "saved_ratio": own["saved_bytes"] / base["saved_bytes"],
                "peak_ratio": own["peak_bytes"] / base["peak_bytes"],
                "targets": target and dict(zip(("flops", "time", "saved"), target, strict=False)),
                "ours": own,
                "open_clip": base,
            }
        )
    return results


def memory(side: OpenClipSide | OurSide, inputs: Sequence[Tensor], device: torch.device) -> dict[str, int]:
    """Bytes that a step keeps for its backward pass, and the most in use; then the side is compiled if it is to be.

    What a compiled model keeps is not seen from outside; on CUDA its peak is.
    """
    if device.type == "cuda":  # they stay on the CPU, and what goes to the device is seen there
        inputs = ()
    saved = SavedBytes(getattr(side, "resident", side.model))
    with saved:
        peak = peak_bytes(side, inputs)
    if side.compile() and device.type == "cuda":
        side()
        peak = peak_bytes(side, inputs)
    side.optimizer.zero_grad(set_to_none=True)
    return {"saved_bytes": saved.bytes, "peak_bytes": peak}


class MatrixProduct:
    """A large one, in the number format of the step's own."""

    def __init__(self, precision: str, device: torch.device):
        dtype, cpu = torch.bfloat16, device.type == "cpu"
        if precision == "fp32":
            dtype = torch.float32
        elif precision in ("fp16", "pure_fp16") or precision == "amp" and not cpu:
            dtype = torch.float16
        size = 2048 if cpu else 8192
        self.flops = 2 * size**3
        self.factors = torch.randn(2, size, size, device=device, dtype=dtype).unbind()

    def __call__(self) -> None:
        self.factors[0] @ self.factors[1]


def apart(side: OpenClipSide | OurSide, device: torch.device, steps: int = 3) -> dict[str, float]:
    """Median seconds of a step in its backward pass, in the optimizer, and forward, which is all else. Between them the
    program waits for the device."""
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    seconds: dict[str, list[float]] = {"forward": [], "backward": [], "optimizer": []}

    def timed(name: str, function: Callable) -> Callable:
        def run(*args: Any, **more: Any) -> Any:
            wait()
            begin = time.perf_counter()
            out = function(*args, **more)
            wait()
            seconds[name].append(time.perf_counter() - begin)
            return out

        return run

    backward, step = timed("backward", Tensor.backward), timed("optimizer", side.optimizer.step)
    with mock.patch.object(Tensor, "backward", backward), mock.patch.object(side.optimizer, "step", step):
        for number in range(steps):
            timed("forward", side)()
            seconds["forward"][number] -= seconds["backward"][number] + seconds["optimizer"][number]
    return {name: median(found) for name, found in seconds.items()}


def busy(side: OpenClipSide | OurSide, device: torch.device) -> dict[str, float]:
    """Shares of the device's busy time in matrix products and in attention, of a step under torch's profiler. The rest
    goes once more over activations (norms, GELU, sums, copies) or weights (the optimizer)."""
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu], acc_events=True) as trace:
        side()
    seconds = {name: 0.0 for name in BUSY} | {"all": 0.0}
    for event in trace.key_averages():
        spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        seconds["all"] += spent
        kind = next((kind for kind, names in BUSY.items() if any(name in event.key for name in names)), None)
        if kind is not None:
            seconds[kind] += spent
    return {kind: seconds[kind] / seconds["all"] for kind in BUSY}


class OpenClipSide:
    """OpenCLIP's model in OpenCLIP's training loop."""

    def __init__(self, spec: Candidate, image: Tensor, text: Tensor, args: argparse.Namespace, device: torch.device):
        torch.manual_seed(0)
        self.model = spec.build(device, args.precision)
        self.runnable = self.model
        self.loss = open_clip.ClipLoss(local_loss=False, gather_with_grad=False, cache_labels=True)
        named = list(self.model.named_parameters())  # OpenCLIP's groups, and its optimizer as its main makes it
        exempt = [p for n, p in named if p.ndim < 2 or any(part in n for part in ("bn", "ln", "bias", "logit_scale"))]
        others = [p for n, p in named if not any(p is q for q in exempt)]
        self.optimizer = torch.optim.AdamW(
            [{"params": exempt, "weight_decay": 0.0}, {"params": others, "weight_decay": WEIGHT_DECAY}],
            lr=LR,
            betas=BETAS,
            eps=EPS,
        )
        self.scaler = torch.amp.GradScaler(device=device) if args.precision == "amp" else None
        self.batch, self.compiles = (image, text), args.compile
        self.args = SimpleNamespace(
            device=str(device), precision=args.precision, distill=False, accum_freq=1, skip_scheduler=True,
            horovod=False, grad_clip_norm=None, world_size=1, batch_size=args.batch_size, wandb=False,
            log_every_n_steps=10**9, rank=1, local_rank=1,  # the main process alone logs, which would take time
        )  # fmt: skip

    def text(self) -> Tensor:
        return self.batch[1]

    def compile(self) -> bool:
        if self.compiles:
            self.runnable = torch.compile(self.model)
        return self.compiles

    def __call__(self, number: int = 1) -> None:
        loader = _Batches([self.batch] * number)
        data = {"train": SimpleNamespace(set_epoch=lambda epoch: None, dataloader=loader)}
        train_one_epoch(self.runnable, data, self.loss, 0, self.optimizer, self.scaler, None, None, self.args)


class _Batches(list):
    """What OpenCLIP's loop wants of a loader."""

    @property
    def num_batches(self) -> int:
        return len(self)

    @property
    def num_samples(self) -> int:
        return sum(len(image) for image, _ in self)


class OurSide:
    """Our model in our trainer, as the flags make them; `like`: with the weights and the optimizer of this one."""

    def __init__(
        self, spec: Candidate, image: Tensor, text: Tensor, args: argparse.Namespace, device: torch.device,
        like: OurSide | None = None,
    ):  # fmt: skip
        pairs = str(args.batch_size)
        words = ["--model", spec.identity.name, "--dataset-type", "synthetic", "--train-num-samples", pairs]
        words += ["--workers", "0"]
        words += ["--batch-size", pairs, "--precision", args.precision, "--logs", "none"]
        words += ["--skip-scheduler", "--lr", str(LR), "--wd", str(WEIGHT_DECAY), "--eps", str(EPS)]
        words += ["--beta1", str(BETAS[0]), "--beta2", str(BETAS[1]), "--device", str(device)]
        words += ["--force-image-size", str(args.image_size)] if args.image_size else []
        words += ["--torchcompile"] if args.compile else []
        if spec.fuses:
            words += ["--text-tokenizer", vocabulary(int(text[0, 0])).name]
        options, ranks = parse(PretrainingOptions, words), Ranks(device)
        options.token_reduction = spec.identity.token_reduction or NONE
        options.shortcuts = spec.takes_shortcuts
        parts = pretraining(options, ranks, None)
        self.model = parts.model.train()
        if like is not None:
            for name, parameter in like.model.named_parameters(remove_duplicate=False):
                module, _, own = name.rpartition(".")
                setattr(self.model.get_submodule(module), own, parameter)
        self.batch = {"image": Images(image), "text": text, "key": [str(i) for i in range(args.batch_size)]}
        if spec.fuses:
            models = [one for one in (self.model, parts.task.twin) if one is not None]
            self.resident = torch.nn.ModuleList([*models, getattr(parts.task, "queues", torch.nn.ModuleDict())])
            self.towers = [one.tower for one in models]
            self.set_compiles(False)
        if spec.identity.family == "meter":  # whose data draw as many
            self.batch["false_images"] = Images(image.flip(0))
        self.optimizer = create_optimizer(self.model, options) if like is None else like.optimizer
        self.trainer = Trainer(
            options, ranks, self.model, self.model, parts.task, parts.train_data, self.optimizer, None, {}
        )

    def set_compiles(self, compiles: bool) -> None:
        for tower in self.towers:
            tower.compiles = compiles

    def text(self) -> Tensor | TextParts:
        """As the model gets it."""
        return self.trainer.task.prepare(self.batch)["text"]

    def compile(self) -> bool:
        options = self.trainer.options
        if hasattr(self, "towers"):
            self.set_compiles(options.torchcompile)
        elif options.torchcompile:
            self.trainer.engine.model = wrap(self.model, options, self.trainer.ranks)
        return options.torchcompile

    def __call__(self, number: int = 1) -> None:
        for _ in range(number):
            batch = self.trainer.task.prepare(self.batch)
            self.trainer.step([to_device(batch, self.trainer.ranks.device, self.trainer.input_dtype)])


@cache
def vocabulary(start: int) -> tempfile.TemporaryDirectory:
    """A folder with no more words than masking needs, for captions of `profile.fusion.words`, which begin with the id
    `start`: that before it pads, that behind it is a word. As long as the program runs."""
    folder = tempfile.TemporaryDirectory()
    words = ["[PAD]", "[CLS]", "a", "[SEP]", "[MASK]"]
    words.insert(0 if start > 1 else len(words), "[UNK]")  # BERT pads with 0, RoBERTa with 1
    (Path(folder.name) / "vocab.txt").write_text("\n".join(words))
    (Path(folder.name) / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    return folder


# ---------------------------------------------------------------------- what is told


def describe(setting: dict[str, Any], results: Sequence[dict[str, Any]]) -> str:
    tokens = setting["caption_tokens"]
    compiled = ", both compiled" if setting["compile"] else ""
    return (
        f"{describe_machine(setting)}.\n"
        f"Batch {setting['batch_size']}, {setting['precision']}{compiled}; captions of {tokens['min']}-{tokens['max']} "
        f"tokens, {tokens['mean']:.1f} on average; {count_rounds(result['time_ratio'] for result in results)}.\n"
        f"Ratios to {', '.join(dict.fromkeys(result['against'] for result in results))} (in brackets: to be reached; "
        "quartiles over the rounds)."
    )


def table(results: Sequence[dict[str, Any]]) -> list[list[str]]:
    rows = [
        ["", "FLOPs", "step time", "quartiles", "saved activations", "peak memory", "s a step", "the other's",
         "GFLOPs a pair", "the other's", "forward + backward + optimizer, s", "the other's", "utilisation",
         "the other's", "busy with products + attention", "the other's",
         "to plain with shortcuts: FLOPs / time / saved"],
    ]  # fmt: skip
    plain = {found["against"]: found for found in results if found["model"].endswith(":shortcuts=true")}
    for found in results:
        targets, time_ratio = found["targets"] or {}, found["time_ratio"]
        sides = (found["ours"], found["open_clip"])

        def cell(value: float, name: str, targets: dict[str, float] = targets) -> str:
            return f"{value:.3f}" + (f" ({targets[name]:g})" if name in targets else "")

        rows.append(
            [
                found["model"],
                cell(found["flops_ratio"], "flops"),
                cell(time_ratio["median"], "time"),
                f"{time_ratio['low']:.3f} - {time_ratio['high']:.3f}",
                cell(found["saved_ratio"], "saved"),
                f"{found['peak_ratio']:.3f}",
                *(f"{side['step_seconds']['median']:.3g}" for side in sides),
                *(f"{side['flops'] / found['pairs'] / 1e9:.2f}" for side in sides),
                *(" + ".join(f"{part:.3g}" for part in side["seconds_apart"].values()) for side in sides),
                *(f"{side['utilisation']:.2f}" for side in sides),
                *(" + ".join(f"{share:.0%}" for share in side["busy_shares"].values()) for side in sides),
                " / ".join(f"{ratio:.3f}" for ratio in _between(found, plain.get(found["against"]))) or "-",
            ]
        )
    return rows


def _between(found: dict[str, Any], other: dict[str, Any] | None) -> list[float]:
    """FLOPs, time and saved activations of one of our models to those of another; [] if there is none."""
    if other is None:
        return []
    times = ratios(found["time_ratio_of_each_round"], other["time_ratio_of_each_round"])
    flops, saved = (found[name] / other[name] for name in ("flops_ratio", "saved_ratio"))
    return [flops, spread(times)["median"], saved]


def _parser() -> argparse.ArgumentParser:
    parser = common_parser(__doc__)
    add = parser.add_argument
    add("--models", nargs="+", default=MODELS, metavar="MODEL", help="NAME or NAME:option=value,...")
    add("--batch-size", type=positive, default=16, metavar="N", help="default: %(default)s")
    add("--compile", "--torchcompile", action="store_true", help="torch.compile both sides")
    add("--image-size", type=int, metavar="PIXELS", help="instead of the models' own")
    lengths = "a mean number of tokens (default: %(default)s), or a file with one a line"
    add("--caption-length", default=str(MEAN), metavar="MEAN|FILE", help=lengths)
    add("--repeat", type=positive, metavar="N", help="steps in a round; default: 1 on a CPU, 10 on a GPU")
    return parser


if __name__ == "__main__":
    sys.exit(main())
