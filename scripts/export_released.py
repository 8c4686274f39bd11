"""Writes a checkpoint of a fusion model's pre-training in the form of the authors' release, with twin and queues.

    python scripts/export_released.py logs/my-run/checkpoints/epoch_20.pt albef.pth
"""
from __future__ import annotations

import argparse
import sys

import torch

from open_clip_elip.adapters import merged
from open_clip_elip.fusion.released import BLIP, METER, albef, write_released
from training import checkpoint
from training.errors import UserError, reason


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 after one sentence on stderr."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("checkpoint", help="of training.main")
    parser.add_argument("out", help="file to write")
    args = parser.parse_args(argv)
    try:
        state = checkpoint.load(args.checkpoint)
        task, model = state.get("task"), state.get("model", {})
        family, parts = model.get("family"), () if model.get("family") == "meter" else ("twin", "queues")
        if family not in ("albef", "blip", "meter") or "task" in model["config"] or not {*parts} <= task.keys():
            what = "which alone has this form"
            raise UserError(f"{args.checkpoint} is not of the pre-training of ALBEF, BLIP or METER, {what}.")
        if model["config"].get("adapter", {}).get("kind") == "bottleneck":
            raise UserError(f"{args.checkpoint} has bottleneck adapters, for which this form has no place.")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    weights = merged(state["state_dict"])
    if family == "meter":  # its files are Lightning's
        content = {"state_dict": write_released(weights, {}, METER)}
    else:
        names = BLIP if family == "blip" else albef(model["config"]["text_cfg"]["fusion_layer"])
        released = write_released(weights, merged(task["twin"]), names)
        released |= {f"{name}_queue": task["queues"][f"{name}.columns"] for name in ("image", "text")}
        content = {"model": released | {"queue_ptr": task["queues"]["image.pointer"]}}
    try:
        torch.save(content, args.out)
    except (OSError, RuntimeError) as error:
        print(f"error: {args.out} cannot be written ({reason(error)}); name another file.", file=sys.stderr)
        return 2
    print(f"{sum(map(len, content.values()))} tensors in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
