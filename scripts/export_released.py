"""Writes a checkpoint of ALBEF's or BLIP's pre-training in the form of the authors' release, with twin and queues.

    python scripts/export_released.py logs/my-run/checkpoints/epoch_20.pt albef.pth
"""
from __future__ import annotations

import argparse
import sys

import torch

from open_clip_elip.fusion.released import BLIP, albef, write_released
from training import checkpoint
from training.errors import UserError


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 after one sentence on stderr."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("checkpoint", help="of training.main")
    parser.add_argument("out", help="file to write")
    args = parser.parse_args(argv)
    try:
        state = checkpoint.load(args.checkpoint)
        task = state.get("task")
        family = state.get("model", {}).get("family")
        if family not in ("albef", "blip") or not {"twin", "queues"} <= task.keys():
            raise UserError(f"{args.checkpoint} is not of ALBEF's or BLIP's pre-training, which alone have this form.")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    names = BLIP if family == "blip" else albef(state["model"]["config"]["text_cfg"]["fusion_layer"])
    released = write_released(state["state_dict"], task["twin"], names)
    released |= {f"{name}_queue": task["queues"][f"{name}.columns"] for name in ("image", "text")}
    released["queue_ptr"] = task["queues"]["image.pointer"]
    torch.save({"model": released}, args.out)
    print(f"{len(released)} tensors in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
