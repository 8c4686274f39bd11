"""Image-text retrieval: pairs in training, and data sets with several captions an image. No image sees a caption."""
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from open_clip import get_input_dtype
from torch import Tensor, nn

from open_clip_elip import cut_text

from ..data.pixels import to_device
from ..data.sets.captioned import CaptionedImages
from ..distributed import Ranks
from ..errors import UserError
from .every_pair import evaluate_every_pair
from .metrics import contrastive_loss, retrieval_metrics
from .passes import (
    EncodeSettings,
    ImagePass,
    collect,
    encode_places,
    evaluation_mode,
    gather_rows,
    image_encoder,
    run_pass,
)  # fmt: skip
from .rerank import rerank


def evaluate_pairs(
    model: nn.Module, val_data: Iterable[dict], options: Any, ranks: Ranks, rerank_best: int | None = None
) -> dict[str, float]:
    """Retrieval metrics, `clip_val_loss` and `num_samples` over all processes' pairs; the same dict on every process.

    val_data: this process's batches {"image": (B, 3, H, W), "text": (B, T), "index": (B,) int64, "key": names}, if any;
    "index" is the sample's place in the whole set, and every sample occurs on one process only. `clip_val_loss` is that
    of consecutive batches of `options.batch_size` in this order, whatever the number of processes. A collective call.
    rerank_best: also those of `rerank`, of shortlists of so many; val_data is then gone through twice.

    Raises, on all processes, UserError: reading fails with one, or there is no pair; NotFinite: features that are none.
    """
    input_dtype = get_input_dtype(options.precision)
    keys: dict[int, str] = {}  # of the current batch
    tokens: list[tuple[Tensor, Tensor]] = []

    def batches(again: bool = False) -> Iterator[tuple[Tensor, Sequence[Tensor]]]:
        for batch in val_data:
            places = batch["index"].cpu()
            keys.clear()
            keys.update(zip(places.tolist(), batch["key"], strict=True))
            image = to_device(batch["image"], ranks.device, input_dtype)
            if not again and rerank_best is not None:
                tokens.append((places, batch["text"].cpu()))
            yield places, (image,) if again else (image, batch["text"])

    with evaluation_mode(model) as encoder:

        def encode(image: Tensor, text: Tensor) -> Tensor:
            """(B, 2, D): image and text."""
            text = cut_text(text, encoder).to(device=ranks.device, non_blocking=True)
            features = encoder.encode_image(image, normalize=True), encoder.encode_text(text, normalize=True)
            return torch.stack([x.float() for x in features], dim=1)

        more = {"ranks": ranks, "precision": options.precision}
        named = more | {"name": lambda place: f"the features of the pair {keys[place]}"}
        found, features = gather_rows(run_pass(encode, batches(), **named), ranks)
        if features is None:
            raise UserError("The validation data has no readable image-text pair; check what --val-data points to.")
        metrics = None
        if ranks.is_main:  # only there: on another kind of device the last digits could differ
            image, text = (features[:, i].contiguous().to(ranks.device) for i in range(2))
            scale, bias = encoder.logit_scale.exp().mean().item(), getattr(encoder, "logit_bias", None)
            bias = None if bias is None else bias.mean().item()
            loss = contrastive_loss(image, text, scale, bias, options.siglip, batch_size=options.batch_size)
            metrics = {**retrieval_metrics(image, text), "clip_val_loss": loss, "num_samples": len(image)}
        metrics = ranks.broadcast(metrics)
        if rerank_best is not None:
            states = run_pass(encoder.image_states, batches(again=True), **named)
            metrics |= rerank(
                encoder, features.unbind(dim=1), gather_rows(tokens, ranks)[1],
                ((torch.searchsorted(found, places), rows) for places, rows in states),
                best=rerank_best, image_of=torch.arange(len(found)), **more,
                name=lambda image, text: f"the matching scores of the pair {keys[int(found[image])]}",
            )  # fmt: skip
    return metrics


def evaluate_captions(
    data: CaptionedImages,
    model: nn.Module,
    tokenizer: Callable[[list[str]], Tensor],
    preprocess: Callable,
    *,
    ranks: Ranks,
    settings: EncodeSettings,
    equal_captions_are_hits: bool = False,
    compiled: bool = False,
    rerank_best: int | None = None,
) -> tuple[dict[str, float], list[str]]:
    """Retrieval in both directions, the same on every process and for every number of processes; collective.

    model: in eval mode, with `encode_image` and `encode_text`; without, see `evaluate_every_pair`.
    equal_captions_are_hits: a caption is right for every image that has one with the same text.
    compiled: compile the image tower.
    rerank_best: also what `rerank` makes of shortlists of so many. The pictures are then read and encoded twice, so
        that no more than a batch of their tokens are ever kept.

    Returns `retrieval_metrics`, `num_images` and `num_captions`, and the names of the images that cannot be read, which
    are left out with their captions. Raises as `collect` and `rerank`.
    """
    if not hasattr(model, "encode_image"):
        more = {"ranks": ranks, "settings": settings, "equal_captions_are_hits": equal_captions_are_hits}
        return evaluate_every_pair(data, model, tokenizer, preprocess, **more)
    images, texts, again = (
        replace(settings, description=f"{settings.description} {x}") for x in ("images", "captions", "images again")
    )
    encode_image = image_encoder(model, compiled)
    image, kept, skipped = collect(ImagePass(encode_image, data.images, preprocess, ranks=ranks, settings=images))
    text = encode_places(
        lambda places: model.encode_text(
            tokenizer([data.captions[i] for i in places]).to(ranks.device), normalize=True
        ).float(),
        len(data.captions), lambda place: f"the features of the text {data.captions[place]!r}", ranks, texts,
    )  # fmt: skip
    row_of = torch.full((len(data),), -1)
    row_of[kept] = torch.arange(len(kept))
    image_of = row_of[data.image_of]
    good = image_of >= 0
    text, image_of = text[good], image_of[good]
    same_text = data.same_text()[good] if equal_captions_are_hits else None
    metrics = None
    if ranks.is_main:  # only there: on another kind of device the last digits could differ
        features = (image, text, image_of, same_text)
        metrics = retrieval_metrics(*(None if rows is None else rows.to(ranks.device) for rows in features))
        metrics |= {"num_images": len(image), "num_captions": len(text)}
    metrics = ranks.broadcast(metrics)
    if rerank_best is not None:
        pictures, captions = data.images.subset(kept), [data.captions[i] for i in good.nonzero().squeeze(1)]
        again = replace(again, on_broken="stop")
        metrics |= rerank(
            model, (image, text), tokenizer(captions),
            ImagePass(model.image_states, pictures, preprocess, ranks=ranks, settings=again),
            best=rerank_best, ranks=ranks, precision=settings.precision, image_of=image_of, same_text=same_text,
            name=lambda image, text: f"the matching scores of {pictures.name(image)} and {captions[text]!r}",
        )  # fmt: skip
    return metrics, skipped
