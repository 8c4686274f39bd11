"""Files of weights, whatever their format: what they hold, without running any code of theirs."""
from __future__ import annotations

import argparse
import pickle
import re
import zipfile
from contextlib import nullcontext
from pathlib import Path, PosixPath
from typing import Any

import fsspec
import numpy
import safetensors.torch as safetensors
import torch

from .identity import ModelError
from .lightning import read_state_dict

_LIGHTNING = re.compile(r"GLOBAL (pytorch_)?lightning")
BIG_VISION = "big_vision"  # what stands for the content of its files, which open_clip reads by itself
# What is no file of weights, by its first bytes.
_OTHERS = {
    b"<": "it is a web page",
    b"version https://git-lfs": "it is a pointer of Git LFS, whose file `git lfs pull` fetches",
    b"\x1f\x8b": "it is compressed: unpack it", b"PK": "it is cut off, or an archive of other files: unpack that",
}  # fmt: skip
_PART = re.compile(r"-\d{5}-of-(\d{5})(?=\.)")  # of weights that transformers has divided
_MADE_BY = {"scalar": numpy.float64(0), "_reconstruct": numpy.zeros(0)}  # of numpy's, by either name of its module
_PLAIN = (  # what trainers keep beside the weights
    argparse.Namespace, PosixPath, numpy.dtype, *(type(numpy.dtype(kind)) for kind in ("f4", "f8", "i8")),
    numpy.ndarray,
    *((value.__reduce__()[0], f"numpy.{core}.multiarray.{name}")
      for name, value in _MADE_BY.items() for core in ("core", "_core")),
)  # fmt: skip


def read_file(source: str) -> dict[str, Any]:
    """Of one file, or a URL. ModelError: it is no checkpoint."""
    try:
        with fsspec.open(source, "rb") if "://" in source else nullcontext(source) as file:
            content = _parse(file, source)
            if not isinstance(content, dict):
                raise TypeError(f"it holds a {type(content).__name__}, not a dictionary")
    except FileNotFoundError:
        raise ModelError(f"There is no checkpoint at {source}; check the path.") from None
    except Exception as error:  # a damaged file raises anything from EOFError to UnpicklingError
        text = str(error) or type(error).__name__
        if held := re.search(r"GLOBAL (\S+) was not an allowed", text):
            raise ModelError(
                f"{source} holds a Python object ({held[1]}), which is not read, for it could run code; save its "
                "weights alone, with torch.save(model.state_dict(), FILE)."
            ) from error
        reason = text.splitlines()[0][:160]
        if isinstance(error, pickle.UnpicklingError | LookupError):
            reason = "it is neither torch's nor in safetensors' format"
        raise ModelError(f"{source} cannot be read as a checkpoint ({reason}); take another.") from error
    return content


def parts(path: Path) -> list[str]:
    """All files of what one is a part of; of a whole, itself. ModelError: some are missing."""
    part = _PART.search(path.name)
    if part is None or not path.is_file():
        return [str(path)]
    found = sorted(map(str, path.parent.glob(_PART.sub(f"-*-of-{part[1]}", path.name))))
    if len(found) != int(part[1]):
        raise ModelError(f"{path} is one of {int(part[1])} files, of which {len(found)} are there; add the others.")
    return found


def _parse(file: Any, source: str) -> Any:
    """Of an open file, or of the path, which is mapped into memory."""
    is_path = isinstance(file, str)
    if source.endswith((".npz", ".npy")):
        return {BIG_VISION: source}
    with open(file, "rb") if is_path else nullcontext(file) as opened:
        head = opened.read(64)
        is_zip = head.startswith(b"PK") and zipfile.is_zipfile(opened)
        names = zipfile.ZipFile(opened).namelist() if is_zip else []
        opened.seek(0)
    is_torch, is_script = (any(name.endswith(end) for name in names) for end in ("/data.pkl", "/constants.pkl"))
    other = next((what for start, what in _OTHERS.items() if head.startswith(start) and not is_torch), None)
    if other or not head:
        raise ValueError(other or "it is empty")
    if head[8:9] == b"{":  # whatever it is called
        return safetensors.load_file(file) if is_path else safetensors.load(file.read())
    if is_script:  # as OpenAI's are
        return torch.jit.load(file, map_location="cpu").state_dict()
    try:
        with torch.serialization.safe_globals([*_PLAIN]):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=is_path and is_zip)
    except pickle.UnpicklingError as error:
        if not _LIGHTNING.search(str(error)):
            raise
        if not is_path:
            file.seek(0)
        return read_state_dict(file)
