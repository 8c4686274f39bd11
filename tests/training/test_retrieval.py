"""Retrieval: known answers with colours, the command on files, and that two processes give what one gives."""

import json
from pathlib import Path
from types import SimpleNamespace

import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms.functional import to_tensor

from training import retrieval
from training.data.sets.captioned import CaptionOptions, load_captions
from training.distributed import Ranks, leave
from training.errors import UserError
from training.evaluation.metrics import retrieval_metrics
from training.evaluation.pairs import evaluate_captions
from training.evaluation.passes import EncodeSettings

from ..processes import spawn
from .data.sets.layout_files import encode, write_folder
from .runs import WORDS, picture, records

CPU = torch.device("cpu")
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "gray": (128, 128, 128)}


def encoded(colour, mode="RGB"):
    return encode(Image.new("RGB", (4, 4), COLOURS[colour]).convert(mode), "PNG")


def write_set(folder, images, name="set.json"):
    """images: (bytes, captions) of each. Returns the path of an ALBEF-style list."""
    write_folder(folder, {f"{number}.png": content for number, (content, _) in enumerate(images)})
    entries = [{"image": f"{number}.png", "caption": captions} for number, (_, captions) in enumerate(images)]
    path = folder / name
    path.write_text(json.dumps(entries), encoding="utf-8")
    return path


# --- known answers ---


def encode_image(images, normalize):
    """The mean colour."""
    return F.normalize(images.mean(dim=(2, 3)).float(), dim=-1)


def encode_text(tokens, normalize):
    """The colour whose number is the first token."""
    colours = torch.tensor(list(COLOURS.values()), dtype=torch.float32)
    return F.normalize(colours[tokens[:, 0]], dim=-1)


def tokenizer(texts):
    """The first colour that occurs in a text."""
    return torch.tensor([[next(i for i, c in enumerate(COLOURS) if c in text.lower())] for text in texts])


COLOUR_SET = [
    (encoded("red"), ["a red thing", "it is red", "blue sky"]),
    (encoded("green"), ["green grass", "Red\nleaves"]),
    (encoded("gray", "L"), ["gray and gray"]),
    (encoded("blue"), ["green or blue", "RED LEAVES"]),
]
# Wrong captions that are at least as near as an image's best one: red 2 (both "red leaves"), green 1 ("green or blue"),
# gray 0, blue 6 (its own are as far as green and red are, and nothing else is farther).
EXPECTED = {"image_to_text_R@1": 1 / 4, "text_to_image_R@1": 4 / 8, "num_images": 4, "num_captions": 8}


def evaluate(data, *, rank=0, world_size=1, batch_size=2, on_broken="skip", **more):
    more["settings"] = EncodeSettings(batch_size, 0, "fp32", on_broken)
    more["ranks"] = Ranks(CPU, rank, rank, world_size)
    model = SimpleNamespace(encode_image=encode_image, encode_text=encode_text)
    return evaluate_captions(data, model, tokenizer, to_tensor, **more)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_known_answers(tmp_path, batch_size):
    data = load_captions(str(write_set(tmp_path, COLOUR_SET)))
    metrics, skipped = evaluate(data, batch_size=batch_size)
    assert skipped == []
    assert EXPECTED.items() <= metrics.items()
    assert metrics["image_to_text_mean_rank"] == (3 + 2 + 1 + 7) / 4
    # "blue sky", both "red leaves", "green or blue": before their image are that of the colour, gray, and one as far
    assert metrics["text_to_image_mean_rank"] == (4 * 1 + 4 * 4) / 8


def test_equal_captions(tmp_path):
    """The two captions about red leaves are one: images 1 and 3 are right for both of them."""
    data = load_captions(str(write_set(tmp_path, COLOUR_SET)))
    metrics, _ = evaluate(data, equal_captions_are_hits=True)
    plain, _ = evaluate(data)
    # image 3, blue: one of the six is now right for it
    assert metrics["image_to_text_mean_rank"] == (3 + 2 + 1 + 6) / 4
    # "red leaves": of the three images before the right one, one is right as well
    assert metrics["text_to_image_mean_rank"] == (4 * 1 + 2 * 4 + 2 * 3) / 8
    assert metrics.keys() == plain.keys() and metrics != plain


def test_broken_images_go_with_their_captions(tmp_path, caplog):
    whole, _ = evaluate(load_captions(str(write_set(tmp_path / "whole", COLOUR_SET))))
    broken = [(b"", ["gray nothing", "red nothing"]), *COLOUR_SET, (encoded("red")[:50], ["blue nothing"])]
    data = load_captions(str(write_set(tmp_path / "broken", broken)))
    metrics, skipped = evaluate(data)
    assert metrics == whole
    assert skipped == [str(tmp_path / "broken" / name) for name in ("0.png", "5.png")]
    assert "2 of 6 images cannot be read" in caplog.text
    with pytest.raises(UserError, match="0.png cannot be read"):
        evaluate(data, on_broken="stop")


# --- the command ---

@pytest.fixture
def noise_set(tmp_path):
    """Twelve images of noise, some with several captions, all different; Karpathy's form."""
    folder = tmp_path / "flickr30k"
    write_folder(folder / "images", {f"{i}.png": picture(i) for i in range(12)})
    items = []
    for i in range(12):
        captions = [f"a {WORDS[i % 8]} {WORDS[k]}\nthing {i}" for k in range(1 + i % 3)]
        items.append({"filename": f"{i}.png", "split": "test", "sentences": [{"raw": c} for c in captions]})
    items.append({"filename": "absent.png", "split": "train", "sentences": [{"raw": "absent"}]})
    (folder / "dataset_flickr30k.json").write_text(json.dumps({"images": items}))
    return folder


def command(model, data, results, *more):
    return ["--model", f"local-dir:{model}", "--data", str(data), "--results", str(results), "--batch-size", "5",
            "--workers", "0", "--device", "cpu", "--precision", "fp32", *more]  # fmt: skip


def test_command(model, noise_set, tmp_path, capsys):
    """Equal to the model's own features; written, shown, and not done again."""
    words = command(model, f"flickr30k={noise_set}", tmp_path / "results")
    assert retrieval.main(words) == 0
    (record,) = records(tmp_path / "results")
    assert (record["command"], record["data"], record["split"]) == ("retrieval", "flickr30k", "test")
    assert record["settings"]["equal_captions_are_hits"] is False

    clip, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{model}")
    tokenize = open_clip.get_tokenizer(f"local-dir:{model}")
    clip.eval()
    data = load_captions(str(noise_set))
    with torch.inference_mode():
        image = clip.encode_image(torch.stack([preprocess(data.images.load(i)) for i in range(12)]), normalize=True)
        text = clip.encode_text(tokenize(data.captions), normalize=True)
    expected = retrieval_metrics(image, text, data.image_of)
    assert record["metrics"] == {**expected, "num_images": 12, "num_captions": 24}
    assert len(set(expected.values())) > 4

    shown = capsys.readouterr().out
    assert f"{expected['image_to_text_R@5']:.2%}" in shown and f"{expected['text_to_image_R@10']:.2%}" in shown

    assert retrieval.main(words) == 0
    (path,) = (tmp_path / "results").glob("*.json")
    assert capsys.readouterr().out == f"{shown}found, not evaluated again (--redo does it): {path}\n"
    assert records(tmp_path / "results") == [record]  # the date too
    assert retrieval.main([*words, "--equal-captions-are-hits"]) == 0
    assert len(records(tmp_path / "results")) == 2
    assert "equal captions are hits" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("data", "flags", "message"),
    [
        ("flickr30k", ["--split", "val"], "has no split 'val', only test, train; choose with --split"),
        ("flickr30k", ["--split", "train"], "1 of the 1 images"),
        ("nowhere", [], "does not exist"),
        ("odd.json", [], "has a shape that is not known here"),
        ("mute.json", [], "has no caption for any of 1 images"),
        ("flickr30k", ["--images", "nowhere"], "There is no folder nowhere; correct --images"),
        ("flickr30k", ["--images", ".", "--data", "a", "b"], "--data names 2; run each"),
        ("flickr30k", ["--download"], "--download fetches no captioned images"),
    ],
)
def test_mistakes(model, noise_set, tmp_path, monkeypatch, capsys, data, flags, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("training.work.retrieval.load_model", lambda *args, **more: pytest.fail("loaded too early"))
    Path("odd.json").write_text('{"files": []}')
    Path("mute.json").write_text('[{"image": "x.jpg", "caption": " "}]')
    assert retrieval.main([*command(model, data, "results"), *flags]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and message in err and err.count("\n") == 1, err
    assert not Path("results").exists()


# --- two processes ---


def test_two_processes(model, noise_set, tmp_path):
    """The command writes in two processes what it writes in one; more cases are in `rank_main`."""
    (noise_set / "images" / "7.png").write_bytes(b"broken")
    write_set(tmp_path / "colours", COLOUR_SET)
    spawn(rank_main, str(tmp_path), command(model, noise_set, tmp_path / "two"))
    assert retrieval.main(command(model, noise_set, tmp_path / "one")) == 0
    (one,), (two,) = (records(tmp_path / name) for name in ("one", "two"))
    assert {**one, "date": ""} == {**two, "date": ""}
    assert one["metrics"]["num_images"] == 11 and len(one["skipped"]) == 1


def rank_main(rank, folder, words):
    data = load_captions(f"{folder}/colours/set.json", CaptionOptions())
    for batch_size in (1, 3, 100):  # with 100, the second process has neither images nor captions
        assert evaluate(data, rank=rank, world_size=2, batch_size=batch_size) == evaluate(data, batch_size=batch_size)
    leave()
    assert retrieval.main(words) == 0
    missing = [word + "-missing" if word.endswith("flickr30k") else word for word in words]
    assert retrieval.main(missing) == 2
