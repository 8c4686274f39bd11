"""What training costs: floating-point operations, tokens, memory; a device's peak; the summary of a run.

All counts are sums over OpenCLIP's own ViT and text transformer, plain or text-first; for other towers they are None.
An operation is a multiplication or an addition, in matrix products only.
"""
from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import open_clip
import torch
from open_clip.transformer import QuickGELU, TextTransformer, VisionTransformer
from torch import nn

from open_clip_elip import Elip

# ---------------------------------------------------------------------- operations


@dataclass(frozen=True)
class StepCost:
    """Operations and tokens of one image-text pair in a training step.

    Attributes:
        forward, backward: of the towers; a locked tower has no backward.
        scoring: the passes without gradient that choose the tokens, guidance included.
        recompute: what is run a second time to save memory: gradient checkpointing, accumulation.
        image_tokens: patches that enter the image tower.
        text_tokens: tokens that enter the text tower.
    """

    forward: int
    backward: int
    scoring: int
    recompute: int
    image_tokens: int
    text_tokens: int

    @property
    def model(self) -> int:
        """What the method needs: all but `recompute`. Utilisation (MFU) is counted with this."""
        return self.forward + self.backward + self.scoring

    @property
    def total(self) -> int:
        """What the device computes."""
        return self.model + self.recompute

    @property
    def tokens(self) -> int:
        return self.image_tokens + self.text_tokens


def step_cost(model: nn.Module, text_length: int | None = None, accumulate: bool = False) -> StepCost | None:
    """The cost of one pair in training; None where a tower is not OpenCLIP's own. The loss is not counted.

    Args:
        model: the bare model, locked and checkpointed as it is trained.
        text_length: columns of the token ids, if not the model's context length.
        accumulate: with `--accum-freq` above 1, when each micro-batch runs once more without gradient.
    """
    if not _is_counted(model):
        return None
    visual, text = model.visual, getattr(model, "text", model)
    count, scoring = _Operations(), 0

    length = text_length or text.context_length
    cls_emb = getattr(text, "cls_emb", None)
    count.through(text.token_embedding, text.positional_embedding, cls_emb)
    for block in text.transformer.resblocks:
        count.block(block, length + (cls_emb is not None), text.transformer.grad_checkpointing)
    count.through(text.ln_final)
    if text.text_projection is not None:
        count.product(1, getattr(text.text_projection, "weight", text.text_projection))

    count.needs_gradient = False
    count.product(visual.grid_size[0] * visual.grid_size[1], visual.conv1.weight)
    count.through(visual.class_embedding, visual.positional_embedding, visual.ln_pre)
    reduction = getattr(model, "reduction", None)
    if reduction is not None and visual.proj is not None:
        scoring += 2 * visual.proj.numel()  # brings the text to the image tower's width
    for stage in _stages(model):
        if stage.reduced_from:
            scored = stage.blocks[: reduction.config.scoring_depth or len(stage.blocks)]
            scoring += sum(_block_forward(block, stage.reduced_from) for block in scored[:-1])
            scoring += _row_forward(scored[-1], stage.reduced_from)
        for block in stage.blocks:
            count.block(block, stage.tokens, visual.transformer.grad_checkpointing)
    count.through(visual.ln_post)
    if visual.proj is not None:
        count.product(1, visual.proj)

    again = count.forward + scoring if accumulate else 0
    return StepCost(count.forward, count.backward, scoring, count.recompute + again, _num_patches(visual), length)


class _Operations:
    """Adds up what a tensor costs on its way through a tower, forward and back."""

    def __init__(self):
        self.forward = self.backward = self.recompute = 0
        self.needs_gradient = False  # of the tensor, where it is now

    def through(self, *parts: nn.Module | nn.Parameter | None) -> None:
        """Parts without a matrix product."""
        self.needs_gradient |= any(_is_trained(part) for part in parts)

    def product(self, rows: int, weight: nn.Parameter) -> None:
        """rows x weight; the gradients of the input and of the weight cost as much, each where it is needed."""
        self.forward += 2 * rows * weight.numel()
        self.backward += 2 * rows * weight.numel() * (self.needs_gradient + weight.requires_grad)
        self.through(weight)

    def block(self, block: nn.Module, tokens: int, checkpointed: bool) -> None:
        attn, mlp = block.attn, block.mlp
        self.through(block.ln_1)
        self.product(tokens, attn.in_proj_weight)
        self.through(attn.in_proj_bias)
        between_tokens = 4 * tokens**2 * _width(block)
        self.forward += between_tokens
        self.backward += 2 * between_tokens * self.needs_gradient
        self.product(tokens, attn.out_proj.weight)
        self.through(attn.out_proj, block.ls_1, block.ln_2)
        self.product(tokens, mlp.c_fc.weight)
        self.through(mlp)
        self.product(tokens, mlp.c_proj.weight)
        self.through(block.ls_2)
        if checkpointed and self.needs_gradient:
            # Recomputing stops at the last tensor that is needed: the input of the last product, unless it is scaled.
            unneeded = 2 * tokens * mlp.c_proj.weight.numel() if isinstance(block.ls_2, nn.Identity) else 0
            self.recompute += _block_forward(block, tokens) - unneeded


def _block_forward(block: nn.Module, tokens: int) -> int:
    count = _Operations()
    count.block(block, tokens, checkpointed=False)
    return count.forward


def _row_forward(block: nn.Module, tokens: int) -> int:
    """`reduction.scoring.cls_attention`: one query, the key weights moved onto it, one row of logits for each head."""
    width = _width(block)
    return 2 * width**2 + 2 * width**2 + 2 * block.attn.num_heads * tokens * width


def _width(block: nn.Module) -> int:
    return block.attn.in_proj_weight.shape[1]


# ---------------------------------------------------------------------- what there is to count


def _is_counted(model: nn.Module) -> bool:
    visual, text = getattr(model, "visual", None), getattr(model, "text", None)
    return (
        isinstance(visual, VisionTransformer)
        and visual.attn_pool is None
        and (isinstance(text, TextTransformer) if text is not None else isinstance(model, open_clip.CLIP))
        and isinstance(getattr(model, "reduction", None), (Elip, type(None)))
    )


def _num_patches(visual: VisionTransformer) -> int:
    """Patch tokens that enter the first layer in training, after patch dropout."""
    patches = visual.grid_size[0] * visual.grid_size[1]
    dropout = getattr(visual.patch_dropout, "prob", 0.0)
    return max(1, int(patches * (1 - dropout))) if dropout else patches


@dataclass(frozen=True)
class _Stage:
    """Blocks that run on `tokens` tokens, `[CLS]` included; on more, `reduced_from`, before (0: nothing is chosen)."""

    blocks: Sequence[nn.Module]
    tokens: int
    reduced_from: int = 0


def _stages(model: nn.Module) -> list[_Stage]:
    """Of the image tower in training."""
    blocks = list(model.visual.transformer.resblocks)
    patches = _num_patches(model.visual)
    length = 1 + patches
    if getattr(model, "reduction", None) is None:
        return [_Stage(blocks, length)]
    stages, lengths = [], model.reduction.token_counts(patches)
    for stage in model.reduction.stages:
        reduced_from = length if length - 1 > stage.keep(patches) else 0
        length = lengths[stage.first]
        stages.append(_Stage(blocks[stage.first : stage.first + stage.depth], length, reduced_from))
    return stages


def _is_trained(part: nn.Module | nn.Parameter | None) -> bool:
    if part is None:
        return False
    return any(p.requires_grad for p in ([part] if isinstance(part, nn.Parameter) else part.parameters()))


# ---------------------------------------------------------------------- memory


@dataclass(frozen=True)
class Memory:
    """Bytes that one process needs at the peak of a step. An estimate from below: kernels' workspaces, communication
    buffers and fragmentation come on top.

    Attributes:
        weights: parameters, their copies in half precision where autocast makes them, and the weight average.
        gradients, optimizer: of what is trained; the optimizer is taken to keep two values a parameter, as AdamW does.
        activations: what the forward pass of a micro-batch keeps for the backward pass.
        loss: the similarities of the loss.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    loss: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.loss

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {getattr(self, name) / 1e9:.2f}" for name in self.__dataclass_fields__)
        return f"{self.total / 1e9:.2f} GB ({parts})"


def memory_estimate(
    model: nn.Module,
    args: argparse.Namespace,
    *,
    world_size: int = 1,
    ema: bool = False,
    sharded: bool = False,
    text_length: int | None = None,
) -> Memory | None:
    """What a training step needs, on CUDA; None where `step_cost` is None.

    Args:
        model: the bare model, locked and checkpointed as it is trained.
        args: batch_size, accum_freq, precision and local_loss are read.
        world_size: number of processes.
        ema: a weight average is kept.
        sharded: weights, gradients and optimizer are spread over the processes (FSDP).
        text_length: as for `step_cost`.
    """
    if not _is_counted(model):
        return None
    trained = [p for p in model.parameters() if p.requires_grad]
    weights = _bytes(model.parameters())
    if ema:
        weights += sum(v.numel() * max(v.element_size(), 4) for v in model.state_dict().values())
    if args.precision.startswith("amp"):
        weights += 2 * sum(p.numel() for name, p in model.named_parameters() if p.ndim > 1 and "embedding" not in name)
    share = world_size if sharded else 1
    rows, columns = args.batch_size * args.accum_freq, args.batch_size * args.accum_freq * world_size
    return Memory(
        weights=weights // share,
        gradients=_bytes(trained) // share,
        optimizer=2 * _bytes(trained) // share,
        activations=args.batch_size * activation_bytes(model, args.precision, text_length),
        loss=4 * 4 * (rows if args.local_loss else columns) * columns,  # logits and their log-softmax, both ways, fp32
    )


def activation_bytes(model: nn.Module, precision: str, text_length: int | None = None) -> int:
    """Bytes that the forward pass of one pair keeps for the backward pass, for a model that `step_cost` counts.

    With gradient checkpointing: the inputs of all blocks and the inside of the largest.
    """
    visual, text = model.visual, getattr(model, "text", model)
    wide = max(p.element_size() for p in model.parameters())  # what normalisations work in
    narrow = wide if precision == "fp32" else 2
    autocast = precision.startswith("amp")
    size = 0

    stem = (visual.conv1, visual.class_embedding, visual.positional_embedding, visual.ln_pre)
    if _is_trained(visual):
        pixels = 3 * visual.image_size[0] * visual.image_size[1]
        size += pixels * (narrow + wide * autocast)  # the images, and autocast's copy
        stages, width = _stages(model), visual.transformer.width
        if any(map(_is_trained, stem)) and not isinstance(visual.ln_pre, nn.Identity):
            size += _norm_bytes(width, 1 + _num_patches(visual), wide)
        size += _tower_bytes(visual.transformer, stages, any(map(_is_trained, stem)), wide, narrow, stream=narrow)
        size += _norm_bytes(width, stages[-1].tokens, wide)
        size += stages[-1].tokens * width * narrow  # ln_post's output: the pooled token is a view of it

    stem = (text.token_embedding, text.positional_embedding, getattr(text, "cls_emb", None))
    if any(map(_is_trained, (*stem, text.transformer, text.ln_final, text.text_projection))):
        tokens = (text_length or text.context_length) + (stem[-1] is not None)
        stages = [_Stage(text.transformer.resblocks, tokens)]
        stream = wide if autocast else narrow  # autocast leaves embeddings as they are
        size += _tower_bytes(text.transformer, stages, any(map(_is_trained, stem)), wide, narrow, stream)
        size += _norm_bytes(text.transformer.width, tokens, wide) + 8 * tokens  # ln_final, ids
    return size


def _tower_bytes(
    transformer: nn.Module, stages: Sequence[_Stage], needs_gradient: bool, wide: int, narrow: int, stream: int
) -> int:
    kept = largest = 0
    for stage in stages:
        if needs_gradient and stage.reduced_from:
            # Kept: all that the gather chooses from, its indices, the weights of the merge.
            kept += stage.reduced_from * transformer.width * stream + 8 * stage.tokens + 4 * stage.reduced_from
        for block in stage.blocks:
            needs_gradient |= _is_trained(block)
            if needs_gradient:
                inside = _block_bytes(block, stage.tokens, wide, narrow)
                kept += stage.tokens * transformer.width * stream if transformer.grad_checkpointing else inside
                largest = max(largest, inside)
    return kept + (largest if transformer.grad_checkpointing else 0)


def _block_bytes(block: nn.Module, tokens: int, wide: int, narrow: int) -> int:
    """What a block of width D keeps: the inputs of both normalisations; the input, queries, keys, values and output of
    the attention; the MLP's input and its hidden values before and after the activation; one number a softmax."""
    width, hidden = _width(block), block.mlp.c_fc.out_features
    values = 6 * width + (3 if isinstance(block.mlp.gelu, QuickGELU) else 2) * hidden
    if not isinstance(block.ls_1, nn.Identity):
        values += 2 * width
    return 2 * _norm_bytes(width, tokens, wide) + tokens * (values * narrow + 4 * block.attn.num_heads)


def _norm_bytes(width: int, tokens: int, wide: int) -> int:
    return tokens * (width * wide + 2 * 4)  # the input, its mean and deviation


def _bytes(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)


# ---------------------------------------------------------------------- what the device can do

# Dense peaks in 10**12 operations a second, from the makers' data sheets: float16 and bfloat16 on tensor cores with
# float32 accumulation, TF32, float32. None: the device has no units for it. The first name that fits is taken.
_PEAKS: tuple[tuple[str, float, float | None, float | None, float], ...] = (
    # name, float16, bfloat16, TF32, float32
    ("B200", 2250, 2250, 1125, 75),
    ("H200 NVL", 835, 835, 417, 60),
    ("H200", 989, 989, 494, 67),
    ("H100 NVL", 835, 835, 417, 60),
    ("H100 PCIe", 756, 756, 378, 51),
    ("H100", 989, 989, 494, 67),
    ("A100", 312, 312, 156, 19.5),
    ("L40S", 362, 362, 183, 91.6),
    ("L4", 121, 121, 60, 30.3),
    ("RTX 4090", 165.2, 165.2, 82.6, 82.6),
    ("RTX 3090", 71.2, 71.2, 35.6, 35.6),
    ("RTX A6000", 154.8, 154.8, 77.4, 38.7),
    ("RTX A5000", 111.2, 111.2, 55.6, 27.8),
    ("V100S", 130, None, None, 16.4),
    ("V100-PCIE", 112, None, None, 14),
    ("V100", 125, None, None, 15.7),
    ("T4", 65, None, None, 8.1),
)


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Dense peak of one device in operations a second for a `--precision`; None where it is not known."""
    return _peak(torch.cuda.get_device_name(device), precision) if device.type == "cuda" else None


def _peak(name: str, precision: str) -> float | None:
    if re.search("MIG|Laptop", name):  # a part of the device, or another one of the same name
        return None
    for known, float16, bfloat16, tf32, float32 in _PEAKS:
        if re.search(rf"\b{known}\b", name, re.IGNORECASE):
            if "bf" in precision:
                peak = bfloat16
            elif precision == "fp32":
                uses_tf32 = tf32 is not None and torch.get_float32_matmul_precision() != "highest"
                peak = tf32 if uses_tf32 else float32
            else:
                peak = float16
            return None if peak is None else peak * 1e12
    return None


# ---------------------------------------------------------------------- the summary of a run


def summary(
    *,
    seconds: float,
    samples: int,
    waited: float,
    losses: Sequence[float],
    evaluations: Sequence[Mapping[str, float]],
    cost: StepCost | None,
    peak: float | None,
    rrt: float,
    peak_memory_gb: float,
    folder: Path | None,
) -> str:
    """What a run (or what was left of it after a resume) came to, in a few lines.

    Args:
        seconds: of training, evaluation and saving left out.
        samples: trained on in that time, by all processes.
        waited: seconds of it without data, mean over the processes.
        losses: training losses in their order; the first and the last are told.
        evaluations: metrics by name, with `epoch`, in their order.
        cost: of one pair.
        peak: of all devices together, in operations a second.
        rrt: ratio of removed tokens in training.
        peak_memory_gb: the highest of all processes.
        folder: where the run is; None if nothing was kept.
    """
    rate = samples / seconds if seconds > 0 else 0.0
    whole = round(seconds)
    clock = f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
    lines = [f"trained    {samples:,} samples in {clock}, {rate:.4g} samples/s"]
    if seconds > 0:
        lines[0] += f", data wait {waited / seconds:.1%}"
    if cost is not None:
        used = f", {cost.model * rate / peak:.1%} of the peak" if peak else ""
        lines.append(
            f"compute    {cost.model * rate / 1e12:.4g} TFLOP/s{used}, {cost.tokens * rate:.4g} tokens/s, "
            f"{cost.model / 1e9:.4g} GFLOP a pair ({cost.scoring / cost.model:.1%} scoring)"
        )
    lines.append(f"memory     {peak_memory_gb:.2f} GB at the peak; RRT {rrt:.1%}")
    if losses:
        lines.append(f"loss       {losses[0]:.4f} at first, {losses[-1]:.4f} at last")
    lines += _best_and_last(evaluations)
    if folder is not None:
        lines.append(f"run        {folder}")
    return "\n".join(lines)


def _best_and_last(evaluations: Sequence[Mapping[str, float]]) -> list[str]:
    lines = []
    for name in dict.fromkeys(k for metrics in evaluations for k in metrics if k not in ("epoch", "step")):
        rows = [m for m in evaluations if isinstance(m.get(name), float)]
        if rows:
            lower = any(part in name for part in ("loss", "rank"))
            best = (min if lower else max)(rows, key=lambda m: m[name])
            lines.append(f"{name}: best {best[name]:.4f} (epoch {best['epoch']}), last {rows[-1][name]:.4f}")
    return lines
