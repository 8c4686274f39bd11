"""The model that is to be written, with its weights, and what its features are checked on."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..identity import Identity, ModelError, tokenizer
from ..pretrained import find

CAPTIONS = ("a photo of a cat", "two dogs, one of them asleep", "the red house by the sea in the evening light")


@dataclass
class Source:
    identity: Identity
    model: nn.Module  # float32, in eval mode
    tokenizer: Callable

    def examples(self, count: int) -> tuple[Tensor, Tensor]:
        """The same images (B, 3, H, W) and token ids (B, T) each time, up to three."""
        size = self.identity.preprocess["size"]
        image = torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(count))
        return image, self.tokenizer(list(CAPTIONS[:count]))

    def reduce_alone(self) -> None:
        """The image tower removes tokens, scored by the image alone; a ModelError if it cannot."""
        reduction = getattr(getattr(self.model, "tower", None), "reduction", None)
        if reduction is None or not reduction.works_alone:
            what = "has no token reduction" if reduction is None else "reduces tokens in training only"
            raise ModelError(f"{self.identity.name} {what}, so leave out --vision-guided-reduction.")
        self.model.tower.vision_guided = True


def open_source(name: str | None, pretrained: str | None, *, ema: bool = False, plain: bool = False) -> Source:
    """The model that a name and weights mean, see `pretrained.find`. Raises ModelError."""
    found = find(name, pretrained, ema=ema)
    identity = found.identity
    if identity.family != "clip":
        raise ModelError(f"{identity.name} is no CLIP; of models that fuse, `released` alone can be written.")
    if plain:
        config = {key: value for key, value in identity.config.items() if key != "token_reduction"}
        identity = replace(identity, config=config)
    model, _ = found._replace(identity=identity).create()
    return Source(identity, model.eval().requires_grad_(False), tokenizer(identity))
