"""Pictures and captions that do not belong to a pair, as METER learns from."""
from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..errors import UserError
from .images import Unreadable
from .pixels import picture_to_tensor, stack
from .samples import Encoding, Sample


@dataclass
class FalsePairs:
    """Batches of `encoding` and "false_images": `Images` (B, 3, H, W); with `texts` also "false_texts" (B, texts, L).

    Each is drawn uniformly from the items of all the data (Dou et al., "METER", CVPR 2022). Shards, whose items cannot
    be reached at random, have none: there other pairs of the batch will do.

    Args:
        encoding: of one picture and a "caption" a sample, with a `transform` and a `tokenizer`.
        texts: how many false texts there are of each pair.
        rows: the items, filled in where the data are built; None: they are in shards.
        same_file: draw from the pair's own file alone.
        own: the pair's own may be drawn.
        validates: the draw depends on the sample's place alone.
    """

    encoding: Encoding
    texts: int = 0
    rows: Sequence[Sample] | None = None
    same_file: bool = False
    own: bool = True
    validates: bool = False

    @property
    def transform(self) -> Callable:
        return self.encoding.transform

    def encode(self, sample: Sample) -> tuple[Any, Tensor | None, list[str]]:
        pair, draw = self.encoding.encode(sample), random.Random(sample.index) if self.validates else random
        if self.rows is None:
            return pair, None, []
        return pair, self._image(sample, draw), [self._caption(sample, draw) for _ in range(self.texts)]

    def drawn(self, sample: Sample, draw: Any) -> Sample:
        """One of the rows. Raises: UserError if there is none."""
        for _ in range(1000 * len(self.rows)):
            other = self.rows[draw.randrange(len(self.rows))]
            if (other.origin == sample.origin or not self.same_file) and (self.own or other.key != sample.key):
                return other
        raise UserError(f"{sample.origin} has one picture, so none is false: add others, or leave out --no-own-images.")

    def _image(self, sample: Sample, draw: Any) -> Tensor:
        while True:  # an unreadable one is reported in its own turn; one at least, the pair's own, is readable
            with suppress(Unreadable):
                return picture_to_tensor(self.drawn(sample, draw).images[0], self.transform)

    def _caption(self, sample: Sample, draw: Any) -> str:
        caption = self.drawn(sample, draw).fields["caption"]
        return draw.choice(caption) if isinstance(caption, list) else caption

    def collate(self, encoded: list[tuple[Any, Tensor | None, list[str]]]) -> dict[str, Any]:
        pairs, images, texts = zip(*encoded, strict=True)
        batch = self.encoding.collate(list(pairs))
        if self.rows is None:
            return batch
        batch["false_images"] = stack(images, self.transform)
        if self.texts:
            tokens = self.encoding.tokenizer([text for drawn in texts for text in drawn])
            batch["false_texts"] = tokens.unflatten(0, (len(pairs), self.texts))
        return batch
