"""Retrieval from the command line: the pairs for fine-tuning, its recipes, and the script that evaluates."""

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import make_caption_shards as script
import open_clip
import pandas
import pytest
import torch
from PIL import Image

import open_clip_elip  # noqa: F401  (makes the models known)
from tests.training.runs import picture, register_models
from training.data import DataReport
from training.data.sets.captioned import CaptionOptions, load_captions
from training.data.shards import read_shard
from training.main import main as train
from training.options import parse, resolved
from training.options.main import PretrainingOptions

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs" / "finetune"


def make(*words):
    return script.main([*map(str, words), "--workers", "1"])


@pytest.fixture
def coco(tmp_path):
    """Karpathy's form: 3 images for training, 2 in restval, 1 each in val and test, two or three captions each."""
    folder = tmp_path / "coco"
    (folder / "val2014").mkdir(parents=True)
    items = []
    for i, split in enumerate(["train", "train", "restval", "val", "train", "test", "restval"]):
        (folder / "val2014" / f"{i}.png").write_bytes(picture(i))
        sentences = [{"raw": f'{split} "{i}",\n{k}'} for k in range(2 + i % 2)]
        items.append({"filepath": "val2014", "filename": f"{i}.png", "split": split, "sentences": sentences})
    (folder / "dataset_coco.json").write_text(json.dumps({"images": items}))
    return folder


TRAINING = {f"{i}.png": 2 + i % 2 for i in (0, 1, 4, 2, 6)}  # train, then restval


def captions_of(data):
    return [(Path(data.images.name(i)).name, c) for c, i in zip(data.captions, data.image_of.tolist(), strict=True)]



def test_table(coco, capsys, tmp_path):
    out = coco / "retrieval_train.csv"
    assert make("--data", f"coco={coco}", "--out", out) == 0
    assert "11 captions of 5 images (coco, train+restval)" in capsys.readouterr().out
    table = pandas.read_csv(out, sep="\t")  # as the trainer reads it
    assert list(table.columns) == ["filepath", "title"]
    assert list(table.filepath) == [f"val2014/{name}" for name, count in TRAINING.items() for _ in range(count)]
    assert list(table.title)[:2] == ['train "0", 0', 'train "0", 1']
    original = load_captions(str(coco), CaptionOptions(split="train+restval"))
    assert captions_of(load_captions(str(out))) == captions_of(original)
    # Elsewhere, and one caption of each picture.
    out = tmp_path / "tables" / "val.tsv"
    assert make("--data", coco, "--split", "val", "--captions-per-image", 1, "--out", out) == 0
    assert out.read_text() == f'filepath\ttitle\n{coco}/val2014/3.png\t"val ""3"", 0"\n'
    assert [path.name for path in out.parent.iterdir()] == ["val.tsv"]


def samples(folder):
    """What the trainer reads of the shards in the order of their names."""
    report = DataReport()
    found = [sample for path in sorted(folder.glob("*.tar")) for sample in read_shard(str(path), report)]
    assert not report.skipped
    return found


def test_shards(coco, tmp_path):
    out = tmp_path / "shards"
    words = ["--data", coco, "--shard-size", 5, "--out"]
    assert make(*words, out) == 0
    assert json.loads((out / "sizes.json").read_text()) == {"00000.tar": 5, "00001.tar": 5, "00002.tar": 1}
    found = samples(out)
    wanted = load_captions(str(coco), CaptionOptions(split="train+restval"))
    pairs = [(Path(wanted.images.name(i)).read_bytes(), wanted.captions[n]) for n, i in enumerate(wanted.image_of)]
    assert sorted((sample.images[0], sample.fields["caption"]) for sample in found) == sorted(pairs)
    assert [sample.fields["caption"] for sample in found] != wanted.captions  # shuffled
    assert make(*words, tmp_path / "again") == 0 and make(*words, tmp_path / "other", "--seed", 1) == 0
    content = {path.name: path.read_bytes() for path in out.iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()} == content
    assert (tmp_path / "other" / "00000.tar").read_bytes() != content["00000.tar"]
    # Shards are a set to evaluate on, too.
    assert sorted(load_captions(str(out)).captions) == sorted(wanted.captions)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "coco", "other", "shards"]


def test_smaller_pictures_and_broken_ones(coco, tmp_path, capsys):
    Image.new("L", (80, 50), 77).save(coco / "val2014" / "0.png")
    (coco / "val2014" / "6.png").write_bytes(picture(6)[:60])
    assert make("--data", coco, "--image-size", 25, "--out", tmp_path / "shards") == 0
    assert f"without those of 1 images that cannot be read, the first of them {coco}/val2014/6.png" in (
        capsys.readouterr().out
    )
    found = samples(tmp_path / "shards")
    assert json.loads((tmp_path / "shards" / "sizes.json").read_text()) == {"00000.tar": 9} and len(found) == 9
    sizes = {sample.fields["caption"][:9]: Image.open(io.BytesIO(sample.images[0])).size for sample in found}
    assert sizes.pop('train "0"') == (40, 25)
    assert set(sizes.values()) == {(25, 25)}  # of 40
    with tarfile.open(tmp_path / "shards" / "00000.tar") as tar:
        assert {Path(name).suffix for name in tar.getnames()} == {".jpg", ".txt"}


def test_what_there_is_to_train_on(coco, tmp_path):
    """Where there is no restval; where nothing is divided; and never the test split."""
    lists = tmp_path / "lists"
    lists.mkdir()
    (lists / "0.png").write_bytes(picture(0))
    for split in ("train", "test"):
        (lists / f"flickr30k_{split}.json").write_text(json.dumps([{"image": "0.png", "caption": split}]))
    (lists / "mine.json").write_text(json.dumps([{"image": "0.png", "caption": "mine"}]))
    for spec, caption in ((lists, "train"), (lists / "mine.json", "mine"), (lists / "flickr30k_train.json", "train")):
        assert make("--data", spec, "--out", tmp_path / "out.csv") == 0
        assert load_captions(str(tmp_path / "out.csv"), CaptionOptions(images=lists)).captions == [caption]
    (tmp_path / "out.csv").unlink()
    assert make("--data", lists / "flickr30k_test.json", "--out", tmp_path / "out.csv") == 2
    (lists / "flickr30k_train.json").unlink()
    assert make("--data", lists, "--out", tmp_path / "out.csv") == 2
    assert not (tmp_path / "out.csv").exists()


def test_refusals(coco, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("precious")
    shards = tmp_path / "shards"
    assert make("--data", coco, "--out", shards) == 0
    capsys.readouterr()
    for words, message in (
        (["--data", coco, "--out", tmp_path / "full"], "is there already"),
        (["--data", coco, "--out", shards, "--shard-size", 0], "--shard-size must be at least 1, not 0"),
        (["--data", shards, "--out", tmp_path / "table.csv"], "which a table cannot name"),
        (["--data", coco, "--split", "dev", "--out", tmp_path / "x.csv"], "has no split 'dev'"),
    ):
        assert make(*words) == 2
        error = capsys.readouterr().err
        assert error.startswith("make_caption_shards.py: ") and message in error and error.count("\n") == 1
    assert (tmp_path / "full" / "mine").read_text() == "precious"


def test_by_itself_with_two_processes(coco, tmp_path):
    command = [sys.executable, script.__file__, "--data", str(coco), "--shard-size", "4", "--workers", "2", "--out"]
    result = subprocess.run([*command, str(tmp_path / "two")], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert make("--data", coco, "--shard-size", 4, "--out", tmp_path / "one") == 0
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / n).iterdir()} for n in ("one", "two"))
    assert one == two and len(one) == 4



@pytest.mark.parametrize(("name", "epochs"), [("coco", 5), ("flickr30k", 10)])
def test_recipe(name, epochs, monkeypatch):
    """ALBEF's settings, a global batch of 256; all else is the default."""
    monkeypatch.setenv("DATA", "/some where")
    monkeypatch.setenv("PRETRAINED", "epoch_32.pt")
    args = parse(PretrainingOptions, ["--config", str(CONFIGS / f"retrieval_{name}.yaml")])
    assert (args.epochs, args.lr, args.wd, args.warmup, args.global_batch) == (epochs, 1e-5, 0.02, 0, 256)
    assert args.train_data == f"/some where/{name}/retrieval_train.csv"
    assert args.val_data == f"/some where/{name}/retrieval_val.csv"
    assert (args.pretrained, args.token_reduction) == ("epoch_32.pt", {"method": "none"})
    assert args.model in open_clip.list_models()
    recipe = resolved(args)
    default = resolved(parse(PretrainingOptions, ["--train-data", "x.csv", "--model", args.model]))
    own = {"batch_size", "global_batch", "epochs", "lr", "wd", "warmup"}
    own |= {"train_data", "val_data", "pretrained", "token_reduction"}
    assert {key for key in recipe if recipe[key] != default[key]} == own


def test_fine_tuning_runs(coco, tmp_path, monkeypatch):
    """The ordinary trainer on the recipe, from a checkpoint of the ELIP model to one for retrieval."""
    (tmp_path / "models").mkdir()
    register_models(tmp_path / "models")
    weights = open_clip.create_model("Tiny-ELIP").state_dict()
    torch.save({"state_dict": weights}, tmp_path / "start.pt")
    monkeypatch.setenv("DATA", str(tmp_path))
    monkeypatch.setenv("PRETRAINED", str(tmp_path / "start.pt"))
    assert make("--data", coco, "--out", coco / "retrieval_train.csv") == 0
    one_each = ["--captions-per-image", 1, "--out", coco / "retrieval_val.csv"]
    assert make("--data", coco, "--split", "val+test", *one_each) == 0
    words = ["--config", str(CONFIGS / "retrieval_coco.yaml"), "--model", "Tiny-ELIP", "--batch-size", "4"]
    words += ["--workers", "1", "--precision", "fp32", "--device", "cpu", "--epochs", "1"]
    assert train([*words, "--logs", str(tmp_path / "logs"), "--name", "run", "--no-progress"]) == 0
    checkpoints = tmp_path / "logs" / "run" / "checkpoints"
    state = torch.load(checkpoints / "epoch_1.pt", weights_only=True)
    assert state["step"] == 2 and state["state_dict"].keys() == weights.keys()
    assert any(not torch.equal(state["state_dict"][name], weights[name]) for name in weights)
    (result,) = [json.loads(line) for line in (checkpoints / "results.jsonl").read_text().splitlines()]
    assert result["num_samples"] == 2
