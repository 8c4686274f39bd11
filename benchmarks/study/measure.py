"""What the weights of a run are worth: zero-shot, retrieval and probes from one pass over the pictures."""
from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from training.data.sets.captioned import load_captions
from training.data.sets.labelled import LabelledImages
from training.data.sets.registry import load_data
from training.distributed import Ranks
from training.errors import UserError
from training.evaluation.command import LoadedModel, add_common_options, load_model
from training.evaluation.feature_rows import FeatureRows, Part
from training.evaluation.features import feature_encoder
from training.evaluation.logistic import SolverSettings, all_logits, fit
from training.evaluation.metrics import contrastive_loss, retrieval_metrics
from training.evaluation.passes import STOP, EncodeSettings, ImagePass, collect, encode_texts
from training.evaluation.prompts import zero_shot_classifier
from training.evaluation.scores import score
from training.evaluation.sweep import stratified_sample

# Pictures that the probes are trained on; the same ones for all runs. Regularisation is fixed: a sweep would cost more
# than the training. It is scikit-learn's C, on standardized features.
CATEGORY_TRAIN, FASHION_TRAIN, FASHION_TEST = 1000, 2000, 2000
PROBE_C = 0.1


def measure(
    weights: Path, data: Path, *, reduced: bool = False, fashion_mnist: Path | None = None, device: str | None = None
) -> dict[str, float | str]:
    """Figures by name; accuracies and recalls are fractions.

    Args:
        weights: a checkpoint of the trainer.
        data: folder of scripts/make_study_data.py.
        reduced: encode images with the tokens that they pick themselves (`--vision-guided-reduction`).
        fashion_mnist: also train a probe on Fashion-MNIST, which is in this folder.
        device: default: CUDA if there is any.

    Raises:
        UserError: data or weights that cannot be read.
    """
    parser = argparse.ArgumentParser()
    add_common_options(parser, data_help="")
    line = ["--pretrained", str(weights), "--data", str(data), "--image-decode", "fast", "--precision", "fp32"]
    line += ["--vision-guided-reduction"] * reduced + (["--device", device] if device else [])
    args = parser.parse_args(line)
    ranks = Ranks(torch.device(args.device))
    with torch.inference_mode():
        return _Measurement(load_model(args, ranks), ranks, data).figures(fashion_mnist)


class _Measurement:
    def __init__(self, loaded: LoadedModel, ranks: Ranks, data: Path):
        self.loaded, self.ranks, self.data = loaded, ranks, data
        self.model = loaded.model
        self.settings = EncodeSettings(128, 0, "fp32", STOP)

    def figures(self, fashion_mnist: Path | None) -> dict[str, float | str]:
        pooled, figures = {}, {"weights": self.loaded.weights_hash}
        for name in ("seen", "heldout"):
            images = load_data(f"webdataset={self.data / name}")
            features = self.encode(images)
            pooled |= dict(zip(images.images.names, features, strict=True))
            projected = F.normalize(features @ self.model.visual.proj, dim=-1)
            figures |= {f"{name}_{key}": value for key, value in self.zero_shot(images, projected).items()}
            if name == "heldout":
                figures |= self.retrieval(images, projected)

        train = load_data(f"webdataset={self.data / 'categories'}", split="train")
        test = load_data(f"webdataset={self.data / 'categories'}", split="test")
        rows = torch.stack([pooled[name] for name in test.images.names])  # encoded above: the same pictures
        figures["category_top1"] = self.probe(_sample(train, CATEGORY_TRAIN), test, rows)
        if fashion_mnist is not None:
            train, test = (load_data(f"fashion-mnist={fashion_mnist}", split=split) for split in ("train", "test"))
            test = _sample(test, FASHION_TEST)
            figures["fashion_top1"] = self.probe(_sample(train, FASHION_TRAIN), test, self.encode(test))
        return figures

    def encode(self, data: LabelledImages) -> Tensor:
        """(n, D) features before the projection, in the data's order."""
        encoder = feature_encoder(self.model, "pooled", normalize=False)
        images = ImagePass(encoder, data.images, self.loaded.preprocess, ranks=self.ranks, settings=self.settings)
        return collect(images)[0].to(self.ranks.device)

    def zero_shot(self, data: LabelledImages, features: Tensor) -> dict[str, float]:
        """As `training.zero_shot`, from normalized features (n, D)."""
        classifier = zero_shot_classifier(self.model, self.loaded.tokenizer, data, ranks=self.ranks, precision="fp32")
        found = score(features.cpu() @ classifier, data, torch.arange(len(data)))
        return {"top1": found["top1"], "top5": found["top5"], "mean_per_class": found["mean_per_class_recall"]}

    def retrieval(self, data: LabelledImages, features: Tensor) -> dict[str, float]:
        """Images and captions of the held-out names; the loss is that of one batch of all of them."""
        pairs = load_captions(str(self.data / "heldout"))
        if list(pairs.images.names) != list(data.images.names) or len(pairs.captions) != len(data):
            raise UserError(f"{self.data / 'heldout'} must have one caption for each picture; make it anew.")
        text = encode_texts(
            lambda tokens: self.model.encode_text(tokens, normalize=True).float(),
            self.loaded.tokenizer, pairs.captions, ranks=self.ranks, settings=self.settings,
        ).to(features.device)  # fmt: skip
        found = retrieval_metrics(features, text)
        kept = {key: found[key] for key in found if key.endswith(("R@1", "R@5", "R@10", "mean_rank"))}
        scale = self.model.logit_scale.exp().item()
        return {"val_loss": contrastive_loss(features, text, scale, None, False, batch_size=len(text)), **kept}

    def probe(self, train: LabelledImages, test: LabelledImages, test_features: Tensor) -> float:
        """Top-1 on `test` of a linear classifier trained on `train`."""
        classes, device = len(train.classnames), self.ranks.device
        rows = FeatureRows([_part(self.encode(train), train.labels)], classes, device).standardized()
        with torch.inference_mode(False):
            classifier = fit(rows, PROBE_C, SolverSettings(iterations=300))
        rows = FeatureRows([_part(test_features, test.labels)], classes, device)
        return score(all_logits(classifier, rows), test, torch.arange(len(test)))["top1"]


def _part(features: Tensor, labels: Tensor) -> Part:
    return Part(features, labels, torch.arange(len(labels)))


def _sample(data: LabelledImages, count: int) -> LabelledImages:
    return data if count >= len(data) else data.subset(stratified_sample(data.labels, count, seed=0))
