from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import to_tensor

import open_clip_elip  # noqa: F401
from training import zero_shot
from training.data.sets.imagenet import imagenet_synsets
from training.data.sets.registry import load_data
from training.distributed import Ranks, leave
from training.errors import UserError
from training.evaluation import prompts
from training.evaluation.loaded import hash_weights
from training.evaluation.passes import EncodeSettings, NotFinite
from training.evaluation.prompts import load_zero_shot_data, run_zero_shot_suite, zero_shot_classifier
from training.work import zero_shot as zero_shot_work

from ..processes import spawn
from .data.sets import layout_files
from .data.sets.layout_files import write_folder
from .runs import picture, records, write_model

ONE = Ranks(torch.device("cpu"))
COLOURS = {
    "red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255),
    "yellow": (255, 255, 0), "cyan": (0, 255, 255), "violet": (255, 0, 255),
}  # fmt: skip
BROKEN = b"\x89PNG\r\n\x1a\n and no picture"


def encoded(colour: str | tuple[int, int, int]) -> bytes:
    return layout_files.encoded(COLOURS.get(colour, colour))


class ColourModel(nn.Module):
    """The image feature is the mean colour, the text feature the colour whose number is the only token."""

    images = 0

    def encode_image(self, image, normalize=False):
        self.images += len(image)
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


def classify(data, model=None, tokenizer=None, preprocess=to_tensor, ranks=ONE, **settings):
    settings = EncodeSettings(**{"batch_size": 2, "workers": 0, "precision": "fp32", **settings})
    model, tokenizer = model or ColourModel(), tokenizer or ColourTokenizer()
    classifier = zero_shot_classifier(model, tokenizer, data, ranks=ranks, precision=settings.precision)
    return prompts.classify(model, classifier, data, preprocess, ranks=ranks, settings=settings)


def colour_folder(root: Path) -> Path:
    """Red: 3 of 4 right; green: 1 of 2; blue: 1 of 1; six classes, three of them without images."""
    pictures = {
        "a/1.png": "red", "a/2.png": "red", "a/3.png": "red", "a/4.png": "green",
        "b/1.png": "green", "b/2.png": "blue", "c/1.png": "blue",
    }  # fmt: skip
    for empty in "def":
        (root / empty).mkdir(parents=True)
    return write_folder(root, {k: encoded(v) for k, v in pictures.items()}, classnames="\n".join(COLOURS))


class TestClassification:
    recall = (3 / 4 + 1 / 2 + 1) / 3
    expected = {
        "top1": 5 / 7, "top5": 1, "mean_per_class_recall": recall, "num_samples": 7, "classes": 6, "skipped": 0,
    }  # fmt: skip

    @pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 100])
    def test_known_answers(self, tmp_path, batch_size):
        data = load_data(str(colour_folder(tmp_path)))
        assert classify(data, batch_size=batch_size) == pytest.approx(self.expected, rel=1e-12)

    def test_broken_images_are_skipped_and_counted(self, tmp_path, caplog):
        root = colour_folder(tmp_path)
        write_folder(root, {"a/0.png": BROKEN, "c/0.png": b"", "c/00.png": encoded("blue")[:40], "d/9.png": BROKEN})
        assert classify(load_data(str(root))) == pytest.approx({**self.expected, "skipped": 4}, rel=1e-12)
        assert "4 of 11 images cannot be read" in caplog.text

    def test_text_features_that_are_no_numbers_are_refused(self, tmp_path):
        model = ColourModel()
        model.encode_text = lambda text, normalize: torch.full((len(text), 3), torch.nan)
        with pytest.raises(NotFinite, match="The text features of the class 'red' are not finite"):
            classify(load_data(str(colour_folder(tmp_path))), model)

    @pytest.mark.parametrize(
        "names, more, expected",
        [
            # Violet is the least like green, sixth: equal similarities (red's and blue's) go to the lower class.
            (list(COLOURS), {"5/1.png": encoded("green")}, (6 / 7, 6 / 7)),
            # More than fit a text batch.
            ([f"{colour} {i}" for i in range(4) for colour in COLOURS], {}, (6 / 24, 1)),
        ],
    )
    def test_the_first_of_equal_classes_wins(self, tmp_path, names, more, expected):
        pictures = {f"{i}/0.png": encoded(name.split()[0]) for i, name in enumerate(names)} | more
        result = classify(load_data(str(write_folder(tmp_path, pictures, classnames="\n".join(names)))))
        assert (result["top1"], result["top5"], result["classes"]) == (*expected, len(names))

    def test_templates_make_the_prompts(self, tmp_path):
        (colour_folder(tmp_path) / "templates.txt").write_text("{}\na {} thing")
        tokenizer = ColourTokenizer()
        classify(load_data(str(tmp_path)), tokenizer=tokenizer)
        assert tokenizer.texts == [text for colour in COLOURS for text in (colour, f"a {colour} thing")]


class TestSuite:
    def args(self, **kwargs):
        flags = {"imagenet_val": None, "imagenet_v2": None, "zeroshot_data": None}
        return Namespace(**{**flags, "precision": "fp32", "batch_size": 2, "workers": 0, **kwargs})

    def run(self, args, tokenizer=None, **kwargs):
        tokenizer, data = tokenizer or ColourTokenizer(), kwargs.get("data") or load_zero_shot_data(args)
        return run_zero_shot_suite(ColourModel(), tokenizer, to_tensor, args, ranks=ONE, data=data)

    def test_own_data(self, tmp_path):
        assert self.run(self.args(zeroshot_data=str(colour_folder(tmp_path)))) == pytest.approx(
            {f"zeroshot-val-{k}": v for k, v in TestClassification.expected.items() if k != "skipped"}, rel=1e-12
        )

    def test_imagenet_names_and_one_classifier_for_both(self, tmp_path):
        synsets = imagenet_synsets()
        for i, synset in enumerate(synsets):
            (tmp_path / "v2" / str(i)).mkdir(parents=True)
            (tmp_path / "val" / synset).mkdir(parents=True)
        # The tokenizer knows colours only: classes with one in their name ("red fox") and all others, which are red.
        names = open_clip.IMAGENET_CLASSNAMES
        first = {c: next(i for i, n in enumerate(names) if c in n and not any(o in n for o in COLOURS if o != c))
                 for c in ("green", "blue")}  # fmt: skip
        write_folder(tmp_path / "val", {f"{synsets[first['green']]}/x.png": encoded("green")})
        write_folder(tmp_path / "v2", {f"{first['blue']}/x.png": encoded("blue"), "999/x.png": encoded("blue")})
        tokenizer = ColourTokenizer()
        metrics = self.run(self.args(imagenet_val=tmp_path / "val", imagenet_v2=tmp_path / "v2"), tokenizer)
        shares = {"imagenet-zeroshot": 1.0, "imagenetv2-zeroshot": 0.5}
        assert metrics == {f"{name}-val-{top}": share for name, share in shares.items() for top in ("top1", "top5")}
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
    """The same weights as a trainer's and as a bare OpenCLIP checkpoint."""
    folder = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    weights = open_clip.create_model(MODEL).state_dict()
    torch.save({"epoch": 1, "state_dict": weights, "step": 10}, folder / "trainer.pt")
    torch.save(weights, folder / "bare.pt")
    return folder


class TestCommand:
    def command(self, data, out, checkpoint, *more):
        return ["--model", MODEL, "--pretrained", str(checkpoint), "--data", str(data), "--results", str(out),
                "--batch-size", "2", "--workers", "0", "--device", "cpu", *more]  # fmt: skip

    def test_equals_the_functions(self, tmp_path, checkpoints, capsys):
        data = colour_folder(tmp_path / "data")
        assert zero_shot.main(self.command(data, tmp_path / "out", checkpoints / "trainer.pt")) == 0
        model, _, preprocess = open_clip.create_model_and_transforms(MODEL, str(checkpoints / "bare.pt"))
        result = classify(load_data(str(data)), model, open_clip.get_tokenizer(MODEL), preprocess)
        assert record_in(tmp_path / "out")["metrics"] == result
        assert result["num_samples"] == 7 and result["classes"] == 6
        table = capsys.readouterr().out
        assert f"{result['top1']:.2%}" in table and "16.67%" in table

    def test_a_plain_model_gives_the_same(self, tmp_path, checkpoints):
        """No caption and no reduction at evaluation: the ELIP model is its plain twin. The twin comes by local-dir."""
        data = colour_folder(tmp_path / "data")
        config = open_clip.get_model_config(MODEL)
        del config["token_reduction"]
        write_model(tmp_path / "twin", config, torch.load(checkpoints / "bare.pt", weights_only=True))
        plain = self.command(data, tmp_path / "plain", "")
        plain[plain.index(MODEL)] = f"local-dir:{tmp_path / 'twin'}"
        del plain[plain.index("--pretrained") : plain.index("--data")]
        assert zero_shot.main(plain) == 0
        assert zero_shot.main(self.command(data, tmp_path / "elip", checkpoints / "trainer.pt")) == 0
        records = [record_in(tmp_path / name) for name in ("plain", "elip")]
        assert records[0]["metrics"] == records[1]["metrics"]
        assert records[0]["weights"] == records[1]["weights"]

    def test_a_checkpoint_of_a_model_from_a_folder(self, tmp_path, checkpoints):
        """The weights are the checkpoint's; those in the folder, if any, are what the run started from."""
        data, new = colour_folder(tmp_path / "data"), open_clip.create_model(MODEL).state_dict()
        folder = write_model(tmp_path / "model", open_clip.get_model_config(MODEL), new)
        weights = torch.load(checkpoints / "bare.pt", weights_only=True)
        file = tmp_path / "run.pt"
        torch.save({"epoch": 1, "state_dict": weights, "config": {"model": f"local-dir:{folder}"}}, file)
        command = self.command(data, tmp_path / "out", file)
        assert zero_shot.main(command[command.index("--pretrained") :]) == 0
        assert record_in(tmp_path / "out")["weights"] == hash_weights(weights)

    def test_finished_work_is_not_done_again(self, tmp_path, checkpoints, monkeypatch, capsys):
        data, out = colour_folder(tmp_path / "data"), tmp_path / "out"
        made, evaluated, make, evaluate = [], [], zero_shot_work.zero_shot_classifier, zero_shot_work.classify
        monkeypatch.setattr(zero_shot_work, "zero_shot_classifier", lambda *a, **k: made.append(1) or make(*a, **k))
        monkeypatch.setattr(zero_shot_work, "classify", lambda *a, **k: evaluated.append(1) or evaluate(*a, **k))

        def again(*flags):
            """How many classifiers and evaluations one more call takes, and what it prints."""
            before = len(made), len(evaluated)
            assert zero_shot.main(self.command(data, out, checkpoints / "trainer.pt", *flags)) == 0
            return len(made) - before[0], len(evaluated) - before[1], capsys.readouterr().out

        *done, table = again()
        assert done == [1, 1]
        (path,) = out.glob("*.json")
        assert again() == (0, 0, f"{table}found, not evaluated again (--redo does it): {path}\n")
        assert again("--redo") == (1, 1, table)
        assert again("--templates", "simple")[:2] == (1, 1)
        names = tmp_path / "names.txt"
        names.write_text("\n".join(["scarlet", *list(COLOURS)[1:]]))
        assert again("--classnames", str(names))[:2] == (1, 1)
        write_folder(data, {"c/2.png": encoded("blue")})  # the classifier is that of before
        assert again()[:2] == (0, 1)
        for classifier in (out / "classifiers").glob("*.pt"):
            classifier.write_bytes(b"cut off")
        write_folder(data, {"c/3.png": encoded("blue")})
        assert again()[:2] == (1, 1)

    def test_weights_that_are_no_numbers_are_refused(self, tmp_path, checkpoints, capsys):
        weights = torch.load(checkpoints / "bare.pt", weights_only=True)
        weights["visual.proj"][0, 0] = torch.inf
        torch.save(weights, tmp_path / "bad.pt")
        assert zero_shot.main(self.command(colour_folder(tmp_path / "d"), tmp_path / "out", tmp_path / "bad.pt")) == 2
        assert "bad.pt are not finite (the first is visual.proj)" in capsys.readouterr().err

    def test_vision_guided_reduction(self, tmp_path, checkpoints, capsys, monkeypatch):
        data, lengths, reduce = colour_folder(tmp_path / "data"), [], open_clip_elip.Elip.forward
        command = self.command(data, tmp_path / "out", checkpoints / "bare.pt", "--vision-guided-reduction")
        monkeypatch.setattr(open_clip_elip.Elip, "forward", lambda *a, **k: lengths.append(a[3]) or reduce(*a, **k))
        assert zero_shot.main(command) == 0
        assert lengths == [None] * 4  # every batch was reduced, without a caption
        assert record_in(tmp_path / "out")["settings"]["vision_guided_reduction"] is True
        command[command.index(MODEL)] = "ViT-S-16"
        assert zero_shot.main(command) == 2
        assert "ViT-S-16" in capsys.readouterr().err

    @pytest.mark.parametrize(
        "change,message",
        [
            ({"--data": "missing"}, "missing"),
            ({"--data": "cifar11=x"}, "did you mean cifar10?"),
            ({"--model": None}, "--model is missing"),
            ({"--pretrained": None}, "brings no weights along; give them with --pretrained"),
            ({"--model": None, "--pretrained": "missing.pt"}, "--pretrained missing.pt is not a file"),
            ({"--model": "local-dir:x"}, "The model local-dir:x cannot be created: [Errno 2] No such file"),
            ({"--model": "hf-hub:"}, "The model hf-hub: cannot be created: Empty identifier"),
            ({"--model": "file:x"}, "There is no model named 'file:x'"),
            ({"--results": "bare.pt"}, "--results bare.pt: bare.pt is a file; name a folder"),
            ({"--results": "bare.pt/x"}, "bare.pt is a file; name a folder"),
            ({"--results": ""}, "--results is empty"),
            ({"--device": "abacus"}, "There is no device 'abacus'"),
            ({"--device": "meta"}, "There is no device 'meta'"),
            ({"--device": "cuda"}, "--device cuda is not available"),
            ({"--templates": "mine"}, "--templates mine is neither a file nor one of openai, simple"),
            ({"--classnames": "mine"}, "There is no file mine"),
        ],
    )
    def test_mistakes(self, tmp_path, checkpoints, capsys, monkeypatch, change, message):
        monkeypatch.chdir(checkpoints)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        flags = {"--model": MODEL, "--pretrained": "bare.pt", "--data": str(colour_folder(tmp_path)), "--device": "cpu"}
        flags = {**flags, "--results": str(tmp_path / "results"), **change}
        code = zero_shot.main([part for flag, value in flags.items() if value is not None for part in (flag, value)])
        out, err = capsys.readouterr()
        assert code == 2 and out == ""
        *warnings, error = err.splitlines()
        assert message in error and error.startswith("error: ")
        assert all("has no picture of 3 of its 6 classes" in line for line in warnings)
        assert not (tmp_path / "results").exists()


def record_in(folder: Path) -> dict:
    """The only result in a folder, without what differs from run to run."""
    (record,) = records(folder)
    del record["date"]
    return record


def test_equals_clip_benchmark(tmp_path):
    """Top-1, top-5 and mean per-class recall of a random model on random pictures, to the last digit."""
    theirs = pytest.importorskip("clip_benchmark.metrics.zeroshot_classification")
    torch.manual_seed(0)
    model, _, preprocess = open_clip.create_model_and_transforms(MODEL)
    tokenizer, names = open_clip.get_tokenizer(MODEL), [f"{word} thing" for word in "abcdefg"]
    pictures = {f"{i % 7}/{i:02d}.png": picture(i) for i in range(60)}
    dataset = ImageFolder(write_folder(tmp_path / "test", pictures, classnames="\n".join(names)), preprocess)
    ours = classify(load_data(str(tmp_path / "test")), model, tokenizer, preprocess, batch_size=16)
    # Its own `accuracy` fails with NumPy 2, so scikit-learn counts the hits among its logits.
    classifier = theirs.zero_shot_classifier(model.eval(), tokenizer, names, ["a photo of a {c}."], "cpu", amp=False)
    logits, target = theirs.run_classification(model, classifier, DataLoader(dataset, 16), "cpu", amp=False)
    assert ours["top1"] == top_k_accuracy_score(target, logits, k=1)
    assert ours["top5"] == top_k_accuracy_score(target, logits, k=5)
    recall = balanced_accuracy_score(target, logits.argmax(dim=1))
    assert ours["mean_per_class_recall"] == pytest.approx(recall, rel=1e-12)
    assert 0 < ours["top1"] < 1


def test_two_processes(tmp_path, checkpoints):
    """The command under two processes writes what it writes in one; more cases are in `rank_main`."""
    data = colour_folder(tmp_path / "data")
    write_folder(data, {"b/0.png": BROKEN, "f/0.png": encoded("red")})
    (data / "templates.txt").write_text("{}\na {} thing\nthe {} one")
    one, two = (TestCommand().command(data, tmp_path / n, checkpoints / "trainer.pt") for n in ("one", "two"))
    spawn(rank_main, str(tmp_path), two)
    assert zero_shot.main(one) == 0
    record = record_in(tmp_path / "two")
    assert record == record_in(tmp_path / "one")
    assert (record["metrics"]["num_samples"], record["metrics"]["skipped"]) == (8, 1)


def rank_main(rank: int, folder: str, command: list[str]) -> None:
    root = Path(folder)
    place = Ranks(torch.device("cpu"), rank, rank, 2)
    data = load_data(str(root / "data"))
    for batch_size in (1, 2, 3, 100):  # with 100, the second process has no images, and never a class
        model = ColourModel()
        assert classify(data, model, ranks=place, batch_size=batch_size) == classify(data, batch_size=batch_size)
        share = sum(len(range(9)[i : i + batch_size]) for i in range(rank * batch_size, 9, 2 * batch_size))
        assert share - 1 <= model.images <= share  # one of the nine is broken
    # More classes than one text batch, so that both processes make a part of the classifier.
    many = replace(data, classnames=[f"{colour} {i}" for i in range(4) for colour in COLOURS])
    tokenizer = ColourTokenizer()
    assert classify(many, tokenizer=tokenizer, ranks=place) == classify(many)
    assert len(tokenizer.texts) == (14 * 3, 10 * 3)[rank]
    with pytest.raises(UserError, match="b/0.png cannot be read"):
        classify(data, ranks=place, on_broken="stop")
    leave()
    assert zero_shot.main(command) == 0
    bad = [part if part != str(root / "data") else str(root / "missing") for part in command]
    assert zero_shot.main(bad) == 2
