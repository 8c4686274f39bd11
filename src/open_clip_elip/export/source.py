"""The model that is to be written, with its weights, and what its features are checked on."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from .. import identity as identities
from .. import weights
from ..identity import Identity, ModelError

CAPTIONS = ("a photo of a cat", "two dogs, one of them asleep", "the red house by the sea in the evening light")


@dataclass
class Source:
    identity: Identity
    model: nn.Module  # float32, in eval mode
    tokenizer: Callable
    warnings: list[str] = field(default_factory=list)

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


@torch.no_grad()
def features(model: nn.Module, image: Tensor, text: Tensor) -> dict[str, Tensor]:
    """OpenCLIP's output: image_features (B, embed_dim) and text_features of unit length, logit_scale, logit_bias."""
    return model(image, text)


def open_source(name: str | None, pretrained: str | None, *, ema: bool = False, plain: bool = False) -> Source:
    """The model of a name and weights; of a checkpoint or folder that tells its model, that one. A `name` of the same
    shape changes its token reduction. Raises ModelError."""
    content = weights.read(pretrained) if weights.is_file(pretrained) else {}
    trained_as, warnings = weights.told_identity(content), []
    if name is None and pretrained and not content:
        raise ModelError(f"There is no file {pretrained}, and the name of weights needs --model.")
    if name is None and trained_as is None:
        raise ModelError("--model is missing, and only a checkpoint of this trainer, or a folder, tells it by itself.")
    identity = trained_as
    if name is not None:
        other = None if trained_as is None else identities.sibling(trained_as, name)
        identity = other or identities.describe(name, pretrained=pretrained)
    if trained_as is not None and (other := identities.differences(trained_as, identity)):
        warnings.append(f"{pretrained} was trained with {', '.join(other)}; leave out --model to keep that.")
    if identity.family != "clip":
        raise ModelError(f"{identity.name} is no CLIP; of models that fuse, `released` alone can be written.")
    if plain:
        config = {key: value for key, value in identity.config.items() if key != "token_reduction"}
        identity = replace(identity, config=config)
    source = weights.find(identity.name, pretrained)
    if source is None:
        raise ModelError(f"{identity.name} brings no weights along; give them with --pretrained.")
    content = content or weights.read(source)
    if ema:
        content = content.get("ema")
        if not content:
            raise ModelError(f"{source} has no averaged weights; leave out --ema.")
    model = identities.create(identity, pretrained_text=False)
    report = weights.load(model, content, name=identity.name, source=source)
    weights.check_finite(model, source)
    model.eval().requires_grad_(False)
    return Source(identity, model, identities.tokenizer(identity), warnings + report.sentences())
