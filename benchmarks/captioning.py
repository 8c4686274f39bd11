"""Captions a second: ours against transformers' BlipForConditionalGeneration, on equal weights.

    python benchmarks/captioning.py                                       # a CPU; a few minutes on 2 cores
    python benchmarks/captioning.py --batch-size 64 --precision amp_bf16  # a GPU

Pictures are random and at hand as tensors, weights too; all captions have `--length` tokens, so both do as much. They
take turns; the ratio is the median over the rounds of (our rate / theirs in the same round). Greedy captions are
compared.
"""
from __future__ import annotations

import re
import sys
import time

import torch
import transformers
from open_clip_train.precision import get_autocast
from telling import common_parser, count_rounds, tell
from transformers import BlipConfig, BlipForConditionalGeneration

from open_clip_elip.fusion.blip import BlipCaptioner
from open_clip_elip.fusion.released import BLIP, write_released
from open_clip_elip.identity import describe
from open_clip_elip.profile.measure import in_turn, ratios, spread
from open_clip_elip.profile.models import find_device
from open_clip_elip.profile.report import describe_machine, machine

PROMPT = [1037, 3861, 1997]  # "a picture of" in BERT's vocabulary
_THEIRS = (
    (r"^visual_encoder\.", "vision_model."), (r"cls_token", "embeddings.class_embedding"),
    (r"\.norm\.", ".post_layernorm."), (r"pos_embed", "embeddings.position_embedding"),
    (r"patch_embed\.proj", "embeddings.patch_embedding"),
    (r"\.blocks\.", ".encoder.layers."), (r"\.attn\.qkv", ".self_attn.qkv"), (r"\.attn\.proj", ".self_attn.projection"),
    (r"\.norm(\d)", r".layer_norm\1"),
)  # fmt: skip


def theirs(model: BlipCaptioner, vision: dict, bert: dict, size: int, end: int) -> BlipForConditionalGeneration:
    """The same model in transformers."""
    config = BlipConfig(
        vision_config={
            "hidden_size": vision["width"], "intermediate_size": 4 * vision["width"], "image_size": size,
            "num_hidden_layers": vision["layers"], "patch_size": vision["patch_size"], "layer_norm_eps": 1e-6,
            "num_attention_heads": vision["width"] // vision.get("head_width", 64),
        },
        text_config=bert | {
            "encoder_hidden_size": vision["width"], "bos_token_id": model.decode_id, "sep_token_id": end,
            "eos_token_id": end,
        },
    )  # fmt: skip
    state = {}
    for name, value in write_released(model.state_dict(), {}, BLIP).items():
        if not name.endswith("position_ids"):
            for ours, their in _THEIRS:
                name = re.sub(ours, their, name)
            state[name] = value
    found = BlipForConditionalGeneration(config)
    found.load_state_dict(state)
    return found.eval()


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = common_parser(__doc__)
    parser.add_argument("--model", default="BLIP-B-16", help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="default: %(default)s")
    parser.add_argument("--beams", type=int, default=3, metavar="N", help="default: %(default)s")
    parser.add_argument("--length", type=int, default=20, metavar="N", help="tokens; default: %(default)s")
    args = parser.parse_args(argv)
    device, config = find_device(args.device), describe(args.model).config
    vision, bert = config["vision_cfg"], config["text_cfg"]["bert"]
    torch.manual_seed(0)
    ours = BlipCaptioner(vision, config["text_cfg"]).eval()
    for p in ours.parameters():  # or all words would be as likely
        p.data.mul_(3 if p.ndim > 1 else 1)
    end = 102 if bert["vocab_size"] > 30000 else 3
    other = theirs(ours, vision, bert, vision["image_size"], end).to(device)
    image = torch.randn(args.batch_size, 3, vision["image_size"], vision["image_size"], device=device)
    ours, start = ours.to(device), torch.tensor([ours.decode_id, *PROMPT], device=device)
    prompt, autocast = start.expand(args.batch_size, -1), get_autocast(args.precision, device_type=device.type)

    def write(beams: int, length: int = args.length) -> torch.Tensor:
        how = {"beams": beams} if beams > 1 else {"sampled": True, "top_k": 1, "repetition": 1.0}
        with torch.inference_mode(), autocast():
            return ours.write(image, start, end, longest=length, shortest=length, **how)

    def generate(beams: int, length: int = args.length) -> torch.Tensor:
        with torch.inference_mode(), autocast():  # which leaves the last of the ids that it is given out
            ids = torch.cat([prompt, prompt[:, :1]], dim=1)
            return other.generate(
                pixel_values=image, input_ids=ids, num_beams=beams, do_sample=False,
                max_new_tokens=length - len(start), min_new_tokens=length - len(start),
            )  # fmt: skip

    same = (write(1)[:, len(start) :] == generate(1)[:, -(args.length - len(start)) :]).all(dim=1).sum().item()

    def timed(function) -> float:
        begin = time.perf_counter()
        function(args.beams)[0].tolist()  # waits for the device
        return time.perf_counter() - begin

    steps = {"ours": lambda: timed(write), "transformers": lambda: timed(generate)}
    found = in_turn(steps, device=device, rounds=args.rounds, seconds=60 * args.minutes)
    faster = spread(ratios(found["transformers"], found["ours"]))
    rates = {name: args.batch_size / spread(seconds)["median"] for name, seconds in found.items()}
    rows = [["", "captions a second"], *([name, f"{rate:.2f}"] for name, rate in rates.items())]
    text = (
        f"{describe_machine(machine(device))}, transformers {transformers.__version__}.\n"
        f"{args.model}, {args.precision}, batch {args.batch_size}, {args.beams} beams, {args.length} tokens, "
        f"{count_rounds([faster])}.\nOurs is {faster['median']:.2f} times as fast. "
        f"Greedy captions that are the same: {same} of {args.batch_size}."
    )
    tell(args, "captioning", "Captions a second", text, rows, {"rates": rates, "ratio": faster, "same": same})
    return 0


if __name__ == "__main__":
    sys.exit(main())
