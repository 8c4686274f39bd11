"""Pictures and captions that do not belong to a pair, as METER learns from."""
from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .images import Unreadable
from .pixels import picture_to_tensor, stack
from .samples import Encoding, Sample


@dataclass
class FalsePairs:
    """Batches of `encoding` and "false_images": `Images` (B, 3, H, W); with `texts` also "false_texts" (B, texts, L).

    Each is drawn uniformly from the items of all the data, the pair's own among them (Dou et al., "METER", CVPR 2022).
    From shards, whose items cannot be reached at random, a false image is that of another pair of the batch.

    Args:
        encoding: of one picture and a "caption" a sample, with a `transform` and a `tokenizer`.
        texts: how many false texts there are of each pair; shards have none.
        rows: the items, filled in where the data are built; None: they are in shards.
    """

    encoding: Encoding
    texts: int = 0
    rows: Sequence[Sample] | None = None

    @property
    def transform(self) -> Callable:
        return self.encoding.transform

    def encode(self, sample: Sample) -> tuple[Any, Tensor | None, list[str]]:
        pair = self.encoding.encode(sample)
        if self.rows is None:
            return pair, None, []
        return pair, self._image(), [self._caption() for _ in range(self.texts)]

    def _drawn(self) -> Sample:
        return self.rows[random.randrange(len(self.rows))]

    def _image(self) -> Tensor:
        while True:  # an unreadable one is reported in its own turn; one at least, the pair's own, is readable
            with suppress(Unreadable):
                return picture_to_tensor(self._drawn().images[0], self.transform)

    def _caption(self) -> str:
        caption = self._drawn().fields["caption"]
        return random.choice(caption) if isinstance(caption, list) else caption

    def collate(self, encoded: list[tuple[Any, Tensor | None, list[str]]]) -> dict[str, Any]:
        pairs, images, texts = zip(*encoded, strict=True)
        batch = self.encoding.collate(list(pairs))
        if self.rows is None:
            others = [(own + random.randrange(1, len(pairs))) % len(pairs) for own in range(len(pairs))]
            return batch | {"false_images": batch["image"]._replace(pixels=batch["image"].pixels[others])}
        batch["false_images"] = stack(images, self.transform)
        if self.texts:
            tokens = self.encoding.tokenizer([text for drawn in texts for text in drawn])
            batch["false_texts"] = tokens.unflatten(0, (len(pairs), self.texts))
        return batch
