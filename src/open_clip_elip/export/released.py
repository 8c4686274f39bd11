"""A checkpoint of a fusion model's pre-training in the form of the authors' release, with twin and queues."""
from __future__ import annotations

from pathlib import Path

import torch

from .. import weights
from ..adapters import merged
from ..identity import ModelError


def write_released_form(source: str, out: Path) -> str:
    """Writes the file; what was written, in words. Raises ModelError: it is no such checkpoint."""
    from ..fusion.released import BLIP, METER, albef, write_released

    state = weights.read(source)
    task, model = state.get("task"), state.get("model", {})
    family, parts = model.get("family"), () if model.get("family") == "meter" else ("twin", "queues")
    if family not in ("albef", "blip", "meter") or "task" in model["config"] or not {*parts} <= task.keys():
        raise ModelError(f"{source} is not of the pre-training of ALBEF, BLIP or METER, which alone has this form.")
    if model["config"].get("adapter", {}).get("kind") == "bottleneck":
        raise ModelError(f"{source} has bottleneck adapters, for which this form has no place.")
    own = merged(state["state_dict"])
    if family == "meter":  # its files are Lightning's
        content = {"state_dict": write_released(own, {}, METER)}
    else:
        names = BLIP if family == "blip" else albef(model["config"]["text_cfg"]["fusion_layer"])
        released = write_released(own, merged(task["twin"]), names)
        released |= {f"{name}_queue": task["queues"][f"{name}.columns"] for name in ("image", "text")}
        content = {"model": released | {"queue_ptr": task["queues"]["image.pointer"]}}
    torch.save(content, out)
    return f"{sum(map(len, content.values()))} tensors in {out.name}"
