"""What a model in training keeps of a few validation pictures, as `open_clip_elip.visualize` draws it."""
from __future__ import annotations

import io
from collections.abc import Callable
from importlib.util import find_spec

import numpy as np
import torch
from numpy import ndarray
from PIL import Image
from torch import nn

from open_clip_elip.visualize.draw import sheet, views
from open_clip_elip.visualize.trace import trace

from ..data import ValData
from ..data.images import Unreadable
from ..data.pixels import picture_to_tensor, stack, to_device
from ..data.samples import DataReport, Reader
from ..distributed import Ranks
from ..errors import UserError
from ..plan import is_due
from .passes import evaluation_mode

COUNT = 6


class KeptPatches:
    """Draws the first readable pictures of `data` every `frequency` epochs.

    Raises UserError: the model keeps all tokens, nothing can be drawn here, or there is no picture.
    """

    def __init__(
        self, frequency: int, ranks: Ranks, model: nn.Module, data: ValData, transform: Callable, tokenizer: Callable
    ):
        if getattr(getattr(model, "tower", None), "reduction", None) is None:
            raise UserError("--visualize-frequency needs a model with token reduction; leave it out.")
        if find_spec("matplotlib") is None:
            raise UserError("--visualize-frequency needs matplotlib; pip install 'open_clip_elip[profile]' brings it.")
        self.frequency, self.ranks, self.transform, self.tokenizer = frequency, ranks, transform, tokenizer
        self.names, self.images, self.captions = [], [], []
        everything = Reader(0, 1, 0, 1, DataReport(), lambda _: None)
        for sample in next(iter(data.source.validation(everything))):
            try:
                self.images.append(picture_to_tensor(sample.images[0], transform))
            except Unreadable:
                continue
            caption = sample.fields["caption"]
            self.captions.append(caption if isinstance(caption, str) else caption[0])
            self.names.append(sample.key)
            if len(self.names) == COUNT:
                break
        if not self.names:
            raise UserError("--visualize-frequency needs a picture, but not one of --val-data can be read.")

    def __call__(self, model: nn.Module, epoch: int, last: bool) -> ndarray | None:
        """See `Task.picture`. Collective."""
        if not is_due(epoch, self.frequency, last):
            return None
        image = to_device(stack(self.images, self.transform), self.ranks.device)
        # The rest of the run must not depend on it.
        drawn_on = [image.device] if image.device.type == "cuda" else []
        with evaluation_mode(model) as bare, torch.random.fork_rng(drawn_on):
            found = trace(bare, image, self.tokenizer(self.captions))
            if not self.ranks.is_main:
                return None
            shown = views(bare, image, self.names, self.captions, found)
        sheet(shown, f"epoch {epoch}").savefig(drawn := io.BytesIO(), format="png", dpi=100)
        return np.asarray(Image.open(drawn).convert("RGB"))
