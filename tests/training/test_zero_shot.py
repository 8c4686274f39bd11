import io
import json
import os
import socket
import tarfile
from argparse import Namespace
from pathlib import Path

import open_clip
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision.transforms.functional import to_tensor

from training import zero_shot
from training.errors import UserError
from training.zero_shot import LabelledImages, load_zero_shot_data, run_zero_shot_suite, zero_shot_classification

CPU = torch.device("cpu")
COLOURS = {
    "red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255),
    "yellow": (255, 255, 0), "cyan": (0, 255, 255), "violet": (255, 0, 255),
}  # fmt: skip
BROKEN = b"\x89PNG\r\n\x1a\n and no picture"


def encoded(colour: str | tuple[int, ...], format: str = "PNG") -> bytes:
    colour = COLOURS.get(colour, colour)
    buffer = io.BytesIO()
    Image.new("RGBA" if len(colour) == 4 else "RGB", (4, 4), colour).save(buffer, format, **_lossless(format))
    return buffer.getvalue()


def _lossless(format: str) -> dict:
    return {"WEBP": {"lossless": True}, "JPEG": {"quality": 95}}.get(format, {})


def write_folder(root: Path, pictures: dict[str, bytes], **texts: str) -> Path:
    for name, content in pictures.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    for name, text in texts.items():
        (root / f"{name}.txt").write_text(text, encoding="utf-8")
    return root


def write_shard(path: Path, members: dict[str, bytes | str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            content = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def contents(data: LabelledImages) -> list[tuple[str, bytes]]:
    """(class name, encoded image) of each picture."""
    return [(data.classnames[picture.label], picture.read()) for picture in data.pictures]


class ColourModel(nn.Module):
    """The image feature is the mean colour, the text feature the colour whose number is the only token."""

    def __init__(self):
        super().__init__()
        self.images, self.colours = [], []

    def encode_image(self, image, normalize=False):
        self.images.append((len(image), self.training, torch.is_grad_enabled()))
        self.colours += image.mean(dim=(2, 3)).tolist()
        assert normalize
        return F.normalize(image.mean(dim=(2, 3)), dim=-1)

    def encode_text(self, text, normalize=False):
        assert normalize
        colours = torch.tensor(list(COLOURS.values()), dtype=torch.float32)
        return F.normalize(colours[text[:, 0] % len(COLOURS)], dim=-1)


class ColourTokenizer:
    def __init__(self):
        self.texts = []

    def __call__(self, texts):
        self.texts += texts
        return torch.tensor([[next((i for i, c in enumerate(COLOURS) if c in text), 0)] for text in texts])


def classify(data, model=None, tokenizer=None, **kwargs):
    options = {"device": CPU, "precision": "fp32", "batch_size": 2, "workers": 0, **kwargs}
    return zero_shot_classification(model or ColourModel(), tokenizer or ColourTokenizer(), data, to_tensor, **options)


def colour_folder(root: Path) -> Path:
    """Red: 3 of 4 right; green: 1 of 2; blue: 1 of 1; six classes, three of them without images."""
    pictures = {
        "a/1.png": "red", "a/2.png": "red", "a/3.png": "red", "a/4.png": "green",
        "b/1.png": "green", "b/2.png": "blue", "c/1.png": "blue",
    }  # fmt: skip
    for empty in "def":
        (root / empty).mkdir(parents=True)
    return write_folder(root, {k: encoded(v) for k, v in pictures.items()}, classnames="\n".join(COLOURS))


class TestFolders:
    def test_names_in_sorted_order(self, tmp_path):
        pictures = {"zebra/x.png": encoded("red"), "ant/deep/y.JPG": encoded("blue", "JPEG"), "ant/a.webp": b"w"}
        root = write_folder(tmp_path, pictures, classnames="an ant\na zebra\n\n")
        data = LabelledImages.from_folder(root)
        assert data.classnames == ["an ant", "a zebra"]
        assert data.templates == ("a photo of a {}.",)
        assert contents(data) == [
            ("an ant", b"w"),
            ("an ant", pictures["ant/deep/y.JPG"]),
            ("a zebra", pictures["zebra/x.png"]),
        ]

    def test_numbered_folders_are_in_numeric_order(self, tmp_path):
        pictures = {f"{i}/x.png": f"picture {i}".encode() for i in range(12)}
        root = write_folder(tmp_path, pictures, classnames="\n".join(f"name {i}" for i in range(12)))
        assert contents(LabelledImages.from_folder(root)) == [(f"name {i}", b"picture %d" % i) for i in range(12)]

    def test_names_by_folder(self, tmp_path):
        pictures = {"n01/x.png": b"1", "n02/x.png": b"2", "10/x.png": b"3"}
        root = write_folder(tmp_path, pictures, classnames="n02\ttwo of them\n10\tten\nn01\tone\n")
        data = LabelledImages.from_folder(root)
        assert sorted(contents(data)) == [("one", b"1"), ("ten", b"3"), ("two of them", b"2")]

    def test_hidden_and_other_files_are_no_pictures(self, tmp_path):
        pictures = {"a/x.png": b"1", "a/._x.png": b"2", "a/notes.md": b"3", ".cache/x.png": b"4", "x.png": b"5"}
        root = write_folder(tmp_path, pictures, classnames="\ufeffonly")
        assert contents(LabelledImages.from_folder(root)) == [("only", b"1")]

    def test_templates(self, tmp_path):
        root = write_folder(tmp_path, {"a/x.png": b""}, classnames="a", templates="a {}.\n\n")
        assert LabelledImages.from_folder(root).templates == ["a {}."]

    @pytest.mark.parametrize(
        "texts,message",
        [
            ({}, "has no classnames.txt"),
            ({"classnames": "one\ntwo\nthree"}, "has 2 class folders, but its classnames.txt names 3"),
            ({"classnames": "one"}, "has 2 class folders, but its classnames.txt names 1"),
            ({"classnames": "one\n\ntwo"}, "nothing on line 2"),
            ({"classnames": " \n"}, "is empty"),
            ({"classnames": "a\tone\nc\ttwo"}, "class folder b"),
            ({"classnames": "a\tone\nb"}, "class folder b"),
            ({"classnames": "a\tone\na\ttwo"}, "class folder b"),
            ({"classnames": "one\ntwo", "templates": "a photo"}, "'a photo' must have {}"),
            ({"classnames": "one\ntwo", "templates": "a {name}"}, "'a {name}' must have {}"),
            ({"classnames": "one\ntwo", "templates": "a {"}, "'a {' must have {}"),
        ],
    )
    def test_mistakes(self, tmp_path, texts, message):
        root = write_folder(tmp_path, {"a/x.png": b"", "b/x.png": b""}, **texts)
        with pytest.raises(UserError) as error:
            LabelledImages.from_folder(root)
        assert message in str(error.value) and "\n" not in str(error.value)

    def test_no_folder_no_classes_no_images(self, tmp_path):
        with pytest.raises(UserError, match="There is no folder"):
            LabelledImages.from_folder(tmp_path / "missing")
        with pytest.raises(UserError, match="neither class folders nor .tar shards"):
            LabelledImages.from_folder(tmp_path)
        with pytest.raises(UserError, match="hold no images"):
            LabelledImages.from_folder(write_folder(tmp_path, {"a/x.txt": b""}, classnames="a"))

    def test_names_that_are_not_utf8(self, tmp_path):
        write_folder(tmp_path, {"a/x.png": b""})
        (tmp_path / "classnames.txt").write_bytes("façade".encode("latin-1"))
        with pytest.raises(UserError, match="UTF-8"):
            LabelledImages.from_folder(tmp_path)


class TestImageNet:
    def synsets(self, root, count=1000):
        names = [f"n{(i * 7919 + 1440764) % 10**8:08d}" for i in range(count)]
        for name in names:
            (root / name).mkdir(parents=True)
        return sorted(names)

    def test_val_is_in_the_order_of_its_synsets(self, tmp_path):
        names = self.synsets(tmp_path)
        write_folder(tmp_path, {f"{names[i]}/ILSVRC_{i}.JPEG": b"%d" % i for i in (999, 0, 11)})
        for data in (LabelledImages.imagenet_val(tmp_path), LabelledImages.from_folder(tmp_path)):
            expected = [(open_clip.IMAGENET_CLASSNAMES[i], b"%d" % i) for i in (0, 11, 999)]
            assert contents(data) == expected
            assert data.templates is open_clip.OPENAI_IMAGENET_TEMPLATES

    def test_val_with_classes_missing(self, tmp_path):
        self.synsets(tmp_path, 998)
        with pytest.raises(UserError, match="has 998 class folders, but ImageNet has 1000 classes"):
            LabelledImages.imagenet_val(tmp_path)

    def v2(self, root):
        for i in range(1000):
            (root / str(i)).mkdir(parents=True)
        return write_folder(root, {f"{i}/x.jpeg": b"%d" % i for i in (2, 10, 100, 999)})

    def test_v2_folders_are_class_numbers(self, tmp_path):
        root = self.v2(tmp_path / "ImageNetV2-matched-frequency")
        for data in map(LabelledImages.imagenet_v2, (root, root.parent)):
            assert [(picture.label, picture.read()) for picture in data.pictures] == [
                (i, b"%d" % i) for i in (2, 10, 100, 999)
            ]
            assert data.classnames is open_clip.IMAGENET_CLASSNAMES
        assert LabelledImages.from_folder(root) == LabelledImages.imagenet_v2(root)

    def test_v2_with_a_wrong_folder(self, tmp_path):
        root = self.v2(tmp_path)
        (root / "1000").mkdir()
        with pytest.raises(UserError, match="1001 class folders, but ImageNet has 1000"):
            LabelledImages.imagenet_v2(root)
        (root / "999" / "x.jpeg").unlink()
        (root / "999").rmdir()
        with pytest.raises(UserError, match="named 0 to 999, but there is 1000"):
            LabelledImages.imagenet_v2(root)


class TestShards:
    def test_samples(self, tmp_path):
        write_folder(tmp_path, {}, classnames="zero\none\ntwo", templates="{}")
        write_shard(tmp_path / "00000.tar", {"a.png": b"1", "a.cls": "2", "a.json": "", "b.cls": "0\n", "b.jpg": b"2"})
        write_shard(tmp_path / "00001.tar", {"x/a.cls": "1", "x/a.WEBP": b"333", "y/a.jpeg": b"4", "y/a.cls": "0"})
        data = LabelledImages.from_folder(tmp_path)
        assert contents(data) == [("two", b"1"), ("zero", b"2"), ("one", b"333"), ("zero", b"4")]
        assert (data.classnames, data.templates) == (["zero", "one", "two"], ["{}"])

    @pytest.mark.parametrize(
        "members,message",
        [
            ({"a.png": b"1", "a.cls": "3"}, "class 3, but classnames.txt names 3 classes"),
            ({"a.png": b"1", "a.cls": "-1"}, "class -1, but classnames.txt names 3 classes"),
            ({"a.png": b"1", "a.cls": "cat"}, "a.cls must hold a class number, but holds b'cat'"),
            ({"a.png": b"1"}, "the sample a needs a .cls file and an image"),
            ({"a.gif": b"1", "a.cls": "0"}, "the sample a needs a .cls file and an image"),
            ({}, "hold no sample"),
        ],
    )
    def test_mistakes(self, tmp_path, members, message):
        write_folder(tmp_path, {}, classnames="zero\none\ntwo")
        write_shard(tmp_path / "0.tar", members)
        with pytest.raises(UserError) as error:
            LabelledImages.from_folder(tmp_path)
        assert message in str(error.value)

    def test_not_a_tar(self, tmp_path):
        write_folder(tmp_path, {"0.tar": b"\x1f\x8b something else" * 100}, classnames="zero")
        with pytest.raises(UserError, match="0.tar is not a readable tar file"):
            LabelledImages.from_folder(tmp_path)

    def test_no_classnames(self, tmp_path):
        write_shard(tmp_path / "0.tar", {"a.png": b"1", "a.cls": "0"})
        with pytest.raises(UserError, match="has no classnames.txt"):
            LabelledImages.from_folder(tmp_path)

    # Each member takes 1024 bytes: cut between samples, in a header, between cls and image, and in the image.
    @pytest.mark.parametrize("size,readable", [(4096, 2), (4300, 2), (5120, 2), (5632, 3), (5640, 3), (6144, 3)])
    def test_cut_off_shard_gives_what_is_left_and_a_warning(self, tmp_path, caplog, size, readable):
        write_folder(tmp_path, {}, classnames="zero\none\ntwo")
        members = {f"{key}.{kind}": value for key in "abc" for kind, value in (("cls", "1"), ("png", b"1" * 300))}
        shard = write_shard(tmp_path / "0.tar", members)
        shard.write_bytes(shard.read_bytes()[:size])
        data = LabelledImages.from_folder(tmp_path)
        assert [label for label, _ in contents(data)] == ["one"] * readable
        assert "0.tar is cut off or damaged" in caplog.text

    def test_whole_shard_gives_no_warning(self, tmp_path, caplog):
        write_folder(tmp_path, {}, classnames="zero")
        write_shard(tmp_path / "0.tar", {"a.png": b"1", "a.cls": "0"})
        assert len(LabelledImages.from_folder(tmp_path).pictures) == 1
        assert caplog.text == ""


class TestClassification:
    expected = {
        "top1": 5 / 7,
        "top5": 1.0,
        "mean_per_class_recall": (3 / 4 + 1 / 2 + 1) / 3,
        "num_samples": 7,
        "classes": 6,
        "skipped": 0,
    }

    @pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 100])
    def test_known_answers(self, tmp_path, batch_size):
        data = LabelledImages.from_folder(colour_folder(tmp_path))
        assert classify(data, batch_size=batch_size) == pytest.approx(self.expected, rel=1e-12)

    def test_shards_and_folders_agree(self, tmp_path):
        folder = LabelledImages.from_folder(colour_folder(tmp_path / "folder"))
        write_folder(tmp_path / "shards", {"readme.md": b""}, classnames="\n".join(COLOURS))
        members = {}
        for i, picture in enumerate(folder.pictures):
            members |= {f"{i}.png": picture.read(), f"{i}.cls": str(picture.label)}
        write_shard(tmp_path / "shards" / "0.tar", members)
        assert classify(LabelledImages.from_folder(tmp_path / "shards")) == classify(folder)

    def test_workers(self, tmp_path):
        data = LabelledImages.from_folder(colour_folder(tmp_path))
        assert classify(data, workers=2) == classify(data)

    def test_broken_images_are_skipped_and_counted(self, tmp_path, caplog):
        root = colour_folder(tmp_path)
        write_folder(root, {"a/0.png": BROKEN, "c/0.png": b"", "c/00.png": encoded("blue")[:40], "d/9.png": BROKEN})
        result = classify(LabelledImages.from_folder(root))
        assert result == pytest.approx({**self.expected, "skipped": 4}, rel=1e-12)
        assert "skipped 4 images" in caplog.text

    def test_only_broken_images(self, tmp_path):
        root = write_folder(tmp_path, {"a/0.png": BROKEN, "a/1.png": b""}, classnames="red")
        with pytest.raises(UserError, match="None of the 2 images"):
            classify(LabelledImages.from_folder(root))

    def test_fewer_than_five_classes(self, tmp_path):
        root = write_folder(tmp_path, {"a/0.png": encoded("blue"), "b/1.png": encoded("red")}, classnames="red\nblue")
        result = classify(LabelledImages.from_folder(root))
        assert (result["top1"], result["top5"], result["classes"]) == (0.0, 1.0, 2)

    def test_top5_of_six(self, tmp_path):
        # violet is the least like green: sixth
        pictures = {f"{i}/0.png": encoded(c) for i, c in enumerate(COLOURS)} | {"5/1.png": encoded("green")}
        root = write_folder(tmp_path, pictures, classnames="\n".join(COLOURS))
        result = classify(LabelledImages.from_folder(root))
        # equal similarities (green is as far from red and blue as from violet) go to the lower class
        assert (result["top1"], result["top5"]) == (6 / 7, 6 / 7)

    def test_transparent_pixels_are_white(self, tmp_path):
        pictures = {"a/0.png": encoded((255, 0, 0, 0)), "b/0.png": encoded((255, 0, 0, 255))}
        model = ColourModel()
        classify(LabelledImages.from_folder(write_folder(tmp_path, pictures, classnames="red\nblue")), model)
        assert model.colours == [[1, 1, 1], [1, 0, 0]]

    def test_templates_make_the_prompts(self, tmp_path):
        root = colour_folder(tmp_path)
        (root / "templates.txt").write_text("{}\na {} thing")
        tokenizer = ColourTokenizer()
        classify(LabelledImages.from_folder(root), tokenizer=tokenizer)
        assert tokenizer.texts == [text for colour in COLOURS for text in (colour, f"a {colour} thing")]

    def test_more_classes_than_fit_a_text_batch(self, tmp_path):
        names = [f"{colour} {i}" for i in range(4) for colour in COLOURS]  # the first of equal names wins
        pictures = {f"{i}/0.png": encoded(name.split()[0]) for i, name in enumerate(names)}
        root = write_folder(tmp_path, pictures, classnames="\n".join(names))
        result = classify(LabelledImages.from_folder(root))
        assert (result["top1"], result["num_samples"], result["classes"]) == (6 / 24, 24, 24)

    def test_eval_mode_without_gradients(self, tmp_path):
        model = ColourModel().train()
        classify(LabelledImages.from_folder(colour_folder(tmp_path)), model, batch_size=4)
        assert model.images == [(4, False, False), (3, False, False)]
        assert model.training


class TestSuite:
    def args(self, **kwargs):
        flags = {"imagenet_val": None, "imagenet_v2": None, "zeroshot_data": None}
        return Namespace(**{**flags, "precision": "fp32", "batch_size": 2, "workers": 0, **kwargs})

    def run(self, args, tokenizer=None, **kwargs):
        place = {"device": CPU, "rank": 0, "world_size": 1}
        return run_zero_shot_suite(ColourModel(), tokenizer or ColourTokenizer(), to_tensor, args, **place, **kwargs)

    def test_nothing_asked_for(self):
        assert self.run(self.args()) == {}

    def test_own_data(self, tmp_path):
        assert self.run(self.args(zeroshot_data=str(colour_folder(tmp_path)))) == pytest.approx(
            {f"zeroshot-val-{k}": v for k, v in TestClassification.expected.items() if k != "skipped"}, rel=1e-12
        )

    def test_imagenet_names_and_one_classifier_for_both(self, tmp_path):
        for i in range(1000):
            (tmp_path / "v2" / str(i)).mkdir(parents=True)
            (tmp_path / "val" / f"n{i:08d}").mkdir(parents=True)
        # The tokenizer knows colours only: classes with one in their name ("red fox") and all others, which are red.
        names = open_clip.IMAGENET_CLASSNAMES
        first = {c: next(i for i, n in enumerate(names) if c in n and not any(o in n for o in COLOURS if o != c))
                 for c in ("green", "blue")}  # fmt: skip
        write_folder(tmp_path / "val", {f"n{first['green']:08d}/x.png": encoded("green")})
        write_folder(tmp_path / "v2", {f"{first['blue']}/x.png": encoded("blue"), "999/x.png": encoded("blue")})
        tokenizer = ColourTokenizer()
        metrics = self.run(self.args(imagenet_val=tmp_path / "val", imagenet_v2=tmp_path / "v2"), tokenizer)
        assert metrics == {
            "imagenet-zeroshot-val-top1": 1.0,
            "imagenet-zeroshot-val-top5": 1.0,
            "imagenetv2-zeroshot-val-top1": 0.5,
            "imagenetv2-zeroshot-val-top5": 0.5,
        }
        assert len(tokenizer.texts) == 1000 * len(open_clip.OPENAI_IMAGENET_TEMPLATES)

    def test_data_can_be_checked_before_training(self, tmp_path):
        with pytest.raises(UserError, match="There is no folder"):
            load_zero_shot_data(self.args(imagenet_v2=str(tmp_path / "missing")))
        args = self.args(zeroshot_data=str(colour_folder(tmp_path / "data")))
        data = load_zero_shot_data(args)
        (tmp_path / "data" / "classnames.txt").unlink()
        assert self.run(args, data=data)["zeroshot-val-num_samples"] == 7


MODEL = "ViT-Ti-8-64-ELIP"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """The same weights as a trainer, a bare OpenCLIP and a DDP checkpoint, and files that are none of them."""
    import open_clip_elip  # noqa: F401

    folder = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    weights = open_clip.create_model(MODEL).state_dict()
    torch.save({"epoch": 1, "state_dict": weights, "step": 10}, folder / "trainer.pt")
    torch.save(weights, folder / "bare.pt")
    ddp = {f"module.{k}": v for k, v in weights.items()}
    torch.save({"epoch": 1, "name": "x", "state_dict": ddp}, folder / "ddp.pt")
    torch.save({"state_dict": {k: v for k, v in weights.items() if "visual" in k}}, folder / "half.pt")
    torch.save({"state_dict": {**weights, "ln_final.weight": torch.ones(3)}}, folder / "shape.pt")
    (folder / "garbage.pt").write_bytes(b"not a checkpoint")
    return folder


class TestCommand:
    def command(self, data, out, checkpoint, *more):
        return ["--model", MODEL, "--pretrained", str(checkpoint), "--data", str(data), "--json", str(out),
                "--batch-size", "2", "--workers", "0", "--device", "cpu", *more]  # fmt: skip

    def test_checkpoints_of_every_kind(self, tmp_path, checkpoints, capsys):
        data = colour_folder(tmp_path / "data")
        results = []
        for name in ("trainer.pt", "bare.pt", "ddp.pt"):
            assert zero_shot.main(self.command(data, tmp_path / "out.json", checkpoints / name)) == 0
            results.append(json.loads((tmp_path / "out.json").read_text()))
            assert results[-1].pop("pretrained") == str(checkpoints / name)
        assert results[0] == results[1] == results[2]
        assert results[0]["num_samples"] == 7 and results[0]["classes"] == 6
        table = capsys.readouterr().out
        assert f"{results[0]['top1']:.2%}" in table and "chance 16.67%" in table

    def test_equals_the_functions(self, tmp_path, checkpoints):
        data = colour_folder(tmp_path / "data")
        assert zero_shot.main(self.command(data, tmp_path / "out.json", checkpoints / "trainer.pt")) == 0
        written = json.loads((tmp_path / "out.json").read_text())
        model, _, preprocess = open_clip.create_model_and_transforms(MODEL, str(checkpoints / "bare.pt"))
        tokenizer = open_clip.get_tokenizer(MODEL)
        result = zero_shot_classification(
            model, tokenizer, LabelledImages.from_folder(data), preprocess,
            device=CPU, precision="fp32", batch_size=2, workers=0,
        )  # fmt: skip
        assert {key: written[key] for key in result} == result

    def test_a_plain_model_gives_the_same(self, tmp_path, checkpoints):
        """No caption and no reduction at evaluation: the ELIP model is its plain twin. The twin comes by local-dir."""
        data = colour_folder(tmp_path / "data")
        config = open_clip.get_model_config(MODEL)
        del config["token_reduction"]
        (tmp_path / "plain").mkdir()
        (tmp_path / "plain" / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
        weights = torch.load(checkpoints / "bare.pt", weights_only=True)
        torch.save(weights, tmp_path / "plain" / "open_clip_pytorch_model.bin")
        plain = self.command(data, tmp_path / "plain.json", "")
        plain[plain.index(MODEL)] = f"local-dir:{tmp_path / 'plain'}"
        del plain[plain.index("--pretrained") : plain.index("--data")]
        assert zero_shot.main(plain) == 0
        assert zero_shot.main(self.command(data, tmp_path / "elip.json", checkpoints / "trainer.pt")) == 0
        results = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("plain", "elip")]
        for result in results:
            del result["model"], result["pretrained"]
        assert results[0] == results[1]

    @pytest.mark.parametrize(
        "change,message",
        [
            ({"--data": "missing"}, "There is no folder"),
            ({"--model": "ViT-Ti-8-64-ELIPS"}, "did you mean ViT-Ti-8-64-ELIP?"),
            ({"--pretrained": "missing.pt"}, "neither a file nor a name of weights"),
            ({"--pretrained": None}, "--pretrained is missing"),
            ({"--pretrained": "garbage.pt"}, "garbage.pt"),
            ({"--pretrained": "half.pt"}, MODEL),
            ({"--pretrained": "shape.pt"}, "ln_final.weight"),
            ({"--json": "missing/out.json"}, "--json missing/out.json cannot be written"),
            ({"--json": "."}, "--json . cannot be written"),
            ({"--batch-size": "0"}, "--batch-size must be at least 1"),
            ({"--device": "abacus"}, "There is no device 'abacus'"),
        ],
    )
    def test_mistakes(self, tmp_path, checkpoints, capsys, monkeypatch, change, message):
        monkeypatch.chdir(checkpoints)
        flags = {"--model": MODEL, "--pretrained": "bare.pt", "--data": str(colour_folder(tmp_path)), "--device": "cpu"}
        flags = {**flags, **change}
        code = zero_shot.main([part for flag, value in flags.items() if value is not None for part in (flag, value)])
        out, err = capsys.readouterr()
        assert code == 2 and out == ""
        assert message in err and err.startswith("error: ") and err.count("\n") == 1

    def test_cuda_where_there_is_none(self, tmp_path, checkpoints, capsys, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        command = self.command(colour_folder(tmp_path / "data"), tmp_path / "out.json", checkpoints / "bare.pt")
        assert zero_shot.main([*command, "--device", "cuda"]) == 2
        assert "--device cuda is not available" in capsys.readouterr().err


def test_two_processes(tmp_path, checkpoints):
    """The command under two processes writes what it writes in one; more cases are in `rank_main`."""
    data = colour_folder(tmp_path / "data")
    write_folder(data, {"b/0.png": BROKEN, "f/0.png": encoded("red")})
    (data / "templates.txt").write_text("{}\na {} thing\nthe {} one")
    one, two = (TestCommand().command(data, tmp_path / f"{n}.json", checkpoints / "trainer.pt") for n in ("one", "two"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(rank_main, (str(tmp_path), two, port), nprocs=2)
    assert zero_shot.main(one) == 0
    result = json.loads((tmp_path / "two.json").read_text())
    assert result == json.loads((tmp_path / "one.json").read_text())
    assert (result["num_samples"], result["skipped"]) == (8, 1)


def rank_main(rank: int, folder: str, command: list[str], port: int) -> None:
    torch.set_num_threads(1)
    root = Path(folder)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    data = LabelledImages.from_folder(root / "data")
    for batch_size in (1, 2, 3, 100):  # with 100, the second process has no images, and never a class
        model = ColourModel()
        place = {"batch_size": batch_size, "rank": rank, "world_size": 2}
        assert classify(data, model, **place) == classify(data, batch_size=batch_size)
        share = sum(len(range(9)[i : i + batch_size]) for i in range(rank * batch_size, 9, 2 * batch_size))
        assert share - 1 <= sum(images for images, _, _ in model.images) <= share  # one of the nine is broken
    # More classes than one text batch, so that both processes make a part of the classifier.
    many = LabelledImages(data.pictures, [f"{colour} {i}" for i in range(4) for colour in COLOURS])
    tokenizer = ColourTokenizer()
    assert classify(many, tokenizer=tokenizer, rank=rank, world_size=2) == classify(many)
    assert len(tokenizer.texts) == (14, 10)[rank]
    only_broken = LabelledImages([p for p in data.pictures if p.read() == BROKEN], data.classnames)
    try:
        classify(only_broken, rank=rank, world_size=2)
        raise AssertionError("a data set without readable images was accepted")
    except UserError:
        pass
    dist.destroy_process_group()

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    assert zero_shot.main(command) == 0
    bad = [part if part != str(root / "data") else str(root / "missing") for part in command]
    assert zero_shot.main(bad) == 2
