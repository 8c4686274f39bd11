"""Graphs of image tower, text tower or both, for any number of images and texts: ONNX and torch.export."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim

from .source import Source

PARTS = {"image": ("image",), "text": ("text",), "both": ("image", "text")}
LIMIT = 1.5e9  # bytes of weights within an ONNX file, which can hold 2 GB; of more they are beside it, in OUT.data
Reader = Callable[[Tensor, Tensor], dict[str, Tensor]]


class Features(nn.Module):
    """Of what it is given: image (B, 3, H, W), text (B, T), to features of unit length; of both also the model's
    logit_scale and logit_bias."""

    def __init__(self, model: nn.Module, inputs: Sequence[str]):
        super().__init__()
        self.model, self.inputs = model, inputs
        self.outputs = [f"{one}_features" for one in inputs]
        if len(inputs) == 2:
            self.outputs += ["logit_scale"] + ["logit_bias"] * (model.logit_bias is not None)

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        found = self.model(**dict(zip(self.inputs, given, strict=True)))
        return tuple(found[name] for name in self.outputs)

    def example(self, image: Tensor, text: Tensor) -> tuple[tuple[Tensor, ...], dict]:
        """Inputs to trace with, and which of their sizes are free: numbers of images and of texts each by itself."""
        given = {"image": image, "text": text[:2]}
        free = tuple({0: Dim(f"{name}s", min=1)} for name in self.inputs)
        return tuple(given[name] for name in self.inputs), {"given": free}


def write_torch(source: Source, out: Path, parts: Sequence[str]) -> Reader:
    """What `torch.export.load(OUT).module()` runs."""
    graph = Features(source.model, parts).eval()
    given, free = graph.example(*source.examples(3))
    with out.open("wb") as file:
        torch.export.save(torch.export.export(graph, given, dynamic_shapes=free), file)
    with out.open("rb") as file:
        program = torch.export.load(file).module()
    return lambda image, text: _named(graph, program(*_chosen(parts, image, text)))


def write_onnx(source: Source, out: Path, parts: Sequence[str]) -> Reader:
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise ValueError(f"{' and '.join(missing)} are missing: pip install 'open_clip_elip[export]' brings them")
    import onnxruntime

    graph = Features(source.model, parts).eval().requires_grad_()  # torch 2.8 fixes the batch size of frozen weights
    given, free = graph.example(*source.examples(3))
    size = sum(p.numel() * p.element_size() for p in source.model.parameters())
    torch.onnx.export(
        graph, given, out, dynamo=True, dynamic_shapes=free, input_names=parts, output_names=graph.outputs,
        external_data=size > LIMIT, verbose=False,
    )  # fmt: skip
    session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])

    def read(image: Tensor, text: Tensor) -> dict[str, Tensor]:
        arrays = (one.numpy() for one in _chosen(parts, image, text))
        return _named(graph, map(torch.from_numpy, session.run(None, dict(zip(parts, arrays, strict=True)))))

    return read


def _chosen(parts: Sequence[str], image: Tensor, text: Tensor) -> list[Tensor]:
    return [{"image": image, "text": text}[name] for name in parts]


def _named(graph: Features, found) -> dict[str, Tensor]:
    return dict(zip(graph.outputs, found, strict=True))
