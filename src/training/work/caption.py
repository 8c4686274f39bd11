"""The work of `training.caption`."""
from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..data.sets import annotations, folders
from ..data.sets.captioned import CaptionOptions, load_captions
from ..data.sets.labelled import ImageFiles, Images, picture_endings
from ..distributed import Ranks, seed_everything
from ..errors import UserError, reason
from ..evaluation.captioning import Writer, check_tools, image_ids, people_of, score_captions
from ..evaluation.loaded import load_model
from ..evaluation.passes import EncodeSettings
from ..files import written_whole
from ..options.caption import CaptionCommandOptions


def pictures_of(spec: str, options: CaptionCommandOptions) -> tuple[Images, dict[int, list[str]]]:
    """The images that `spec` names, and people's captions of them by place; {}: there are none."""
    path = Path(spec).expanduser()
    if path.suffix.lower() in picture_endings():
        if not path.is_file():
            raise UserError(f"There is no picture {path}; correct --image.")
        return ImageFiles(path.parent, [path.name]), {}
    if path.is_dir() and not annotations.find_annotations(path):
        if found := folders.list_pictures(path)[0]:
            return ImageFiles(path, found), {}
        if not any(path.rglob("*.tar")):
            raise UserError(f"There is no picture in {path}; correct --image.")
    if (path.is_dir() or path.suffix == ".tar" or "{" in spec) and not options.score:
        shards = folders.list_shards(path) if path.is_dir() else _shards(spec)
        if shards:
            images, _ = folders.read_shards(shards, (), lambda *sample: None)
            if not len(images):
                raise UserError(f"There is no picture in {spec}; correct --image.")
            return images, {}
    data = load_captions(spec, CaptionOptions(split=options.split, images=options.images))
    return data.images, people_of(data)


def _shards(spec: str) -> list[Path]:
    from ..data.shards import check_present, expand_shards

    sets = expand_shards(spec, "--image")
    for shards in sets:
        check_present(shards, "--image")
    return [Path(url) for shards in sets for url in shards.urls]


def work(options: CaptionCommandOptions, ranks: Ranks, argv: Sequence[str]) -> str:
    """Writes the captions; returns what is printed: scores, or the captions where there is no `--out`."""
    with ranks.agree():
        if options.score:
            check_tools()
        if options.out is not None:
            if not (folder := Path(options.out).parent).is_dir():
                raise UserError(f"There is no folder {folder}; correct --out.")
            if Path(options.out).is_dir():
                raise UserError(f"{options.out} is a folder; name a file in --out.")
        sets = [pictures_of(spec, options) for spec in options.data]
        if options.score and not all(people for _, people in sets):
            raise UserError("--score compares with people's captions, and some of --image has none: leave it out.")
        loaded = load_model(options, ranks, task="captioning")
        seed_everything(options.seed + ranks.rank)
    how: dict[str, Any] = {"longest": options.longest, "shortest": options.shortest}
    how["repetition"] = options.repetition_penalty
    if options.nucleus is not None:
        how |= {"sampled": True, "top_p": options.nucleus}
    elif options.beams == 1:
        how |= {"sampled": True, "top_k": 1}
    else:
        how["beams"] = options.beams
    writer = Writer(loaded.tokenizer.pieces, options.prompt, how)
    prompt = len(writer.start(loaded.model.decode_id))
    if prompt >= options.longest:
        raise UserError(f"--longest {options.longest} leaves no room behind a prompt of {prompt} tokens: raise it.")
    words = loaded.model.decoder.config.vocab_size
    if 2 * how.get("beams", 0) > words:
        raise UserError(f"--beams {options.beams} is more than half of the vocabulary's {words} words: lower it.")

    captions, written, people = [], {}, {}
    for images, truth in sets:
        settings = EncodeSettings.of(options, "captions")
        found, _ = writer.captions(loaded.model, images, loaded.preprocess, ranks, settings)
        first = len(people)
        for place, text in found.items():
            captions.append((images.name(place), text))
            if options.score:
                written[first + place], people[first + place] = text, truth[place]
        people |= {first + place: texts for place, texts in truth.items()}
    lines = [f"{name}\t{text}" for name, text in captions]
    with ranks.agree():
        if ranks.is_main and options.out is not None:
            write(Path(options.out), captions)
            lines = [f"{len(captions)} captions in {options.out}"]
        if ranks.is_main and options.score:
            lines += [f"{name} {value:.4f}" for name, value in score_captions(written, people, options.spice).items()]
    return "\n".join(lines)


def write(path: Path, captions: list[tuple[str, str]]) -> None:
    """A table of image and caption, or a list of {"image_id", "image", "caption"}, see `image_ids`."""
    if path.suffix.lower() == ".csv":
        text = io.StringIO(newline="")
        rows = csv.writer(text)
        rows.writerow(("image", "caption"))
        rows.writerows(captions)
        content = text.getvalue()
    else:
        numbered = zip(image_ids([name for name, _ in captions]), captions, strict=True)
        items = [{"image_id": number, "image": name, "caption": caption} for number, (name, caption) in numbered]
        content = json.dumps(items, ensure_ascii=False, indent=1) + "\n"
    try:
        with written_whole(path) as file:
            file.write(content.encode())
    except OSError as error:
        raise UserError(f"--out cannot be written ({reason(error)}); name another file.") from error
