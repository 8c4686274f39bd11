"""Fine-tuning as a person runs it: small runs on pictures of three colours."""
import csv
import json
import os
import signal
from pathlib import Path

import open_clip
import pytest
import torch
import yaml
from torchvision.transforms.functional import to_tensor

from training import checkpoint
from training.control import EXIT_INTERRUPTED
from training.data.pairs import LabelEncoding, LabelledRows
from training.data.sets.registry import load_data
from training.distributed import Ranks
from training.finetune import finetuning, main
from training.options import parse, resolved
from training.tasks.classification import FinetuningOptions
from training.trainer import Trainer

from ..processes import torchrun
from .colours import finetune_command, write_colours
from .runs import assert_equal_weights, register_models, weights


@pytest.fixture(scope="module", autouse=True)
def local_model(tmp_path_factory):
    return register_models(tmp_path_factory.mktemp("configs"))


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("pretrained") / "clip.pt"
    torch.save({"epoch": 1, "state_dict": open_clip.create_model("Tiny").state_dict()}, path)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_colours(tmp_path_factory.mktemp("data") / "colours")


@pytest.fixture(scope="module")
def shifted(tmp_path_factory):
    """The same classes, other pictures."""
    return write_colours(tmp_path_factory.mktemp("data") / "shifted", train=3, test=15)


@pytest.fixture
def run(data, pretrained, tmp_path):
    """Runs the command with more flags; returns the folder of the run."""

    def run(*flags, name="run", code=0, model="Tiny-ELIP"):
        assert main(finetune_command(data, tmp_path, pretrained, *flags, name=name, model=model)) == code
        return tmp_path / name

    return run


def rows(folder):
    with (folder / "train.csv").open() as file:
        return list(csv.DictReader(file))


def evaluations(folder):
    return [json.loads(line) for line in (folder / "checkpoints" / "results.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------------- runs


def test_a_run_learns_and_what_it_leaves(run, data, pretrained, shifted, tmp_path):
    folder = run("--also", str(shifted), "--ema-decay", "0.5", "--epochs", "3")
    losses = [float(row["loss"]) for row in rows(folder)]
    assert losses[0] == pytest.approx(1.0986, abs=1e-3) and losses[-1] < 0.9  # from ln(3)
    results = evaluations(folder)
    assert [r["epoch"] for r in results] == [1, 2, 3]
    last = results[-1]
    assert last["colours-top1"] > 0.8 and last["ema/colours-top1"] > 0.8 and last["shifted-top1"] > 0.8  # chance: 1/3
    assert last["colours-num_samples"] == 9 and last["shifted-num_samples"] == 15
    state = torch.load(folder / "checkpoints" / "epoch_3.pt", weights_only=True)
    tower = {k for k in weights(pretrained) if k.startswith("visual.") and k != "visual.proj"}
    assert set(state["state_dict"]) == set(state["ema"]) == tower | {"head.weight", "head.bias"}
    assert json.loads((folder / "checkpoints" / "best.json").read_text())["score"] == max(
        r[k] for r in results for k in ("colours-top1", "ema/colours-top1")
    )

    records = [json.loads(p.read_text()) for p in (tmp_path / "results").glob("*.json")]
    found = {(r["data"], r["settings"]["averaged"]): r for r in records}
    assert set(found) == {(name, averaged) for name in ("colours", "shifted") for averaged in (False, True)}
    for (name, averaged), record in found.items():
        prefix = "ema/" * averaged + name
        assert record["metrics"] == {
            k: last[f"{prefix}-{k}"] for k in ("top1", "top5", "mean_per_class_recall", "num_samples")
        }
        assert record["command"] == "finetune" and record["split"] == "test" and record["run"] == str(folder)
    assert len({record["weights"] for record in records}) == 2
    # config.yaml starts the same run again.
    assert main(["--config", str(folder / "config.yaml"), "--name", "again"]) == 0
    again = weights(tmp_path / "again" / "checkpoints" / "epoch_3.pt")
    assert_equal_weights(again, state["state_dict"])


def test_token_reduction_is_only_there_by_flag(run, data, pretrained, tmp_path):
    assert {float(row["rrt"]) for row in rows(run("--epochs", "1"))} == {0}
    for model in ("Tiny", "Tiny-ELIP"):
        flags = ("--epochs", "1", "--vision-guided-reduction", "--token-reduction", "scoring_depth=1")
        folder = run(*flags, model=model, name=model)
        assert float(rows(folder)[0]["rrt"]) == pytest.approx(1 - (17 + 16 + 3 * 12 + 8) / (6 * 17))
    assert_equal_weights(*(weights(tmp_path / n / "checkpoints" / "epoch_1.pt") for n in ("Tiny", "Tiny-ELIP")))


ALL = [
    "--mixup", "0.8", "--cutmix", "1", "--label-smoothing", "0.1", "--drop-path", "0.3", "--ema-decay", "0.9",
    "--random-erasing", "0.5", "--auto-augment", "rand-m9-mstd0.5-inc1", "--layer-decay", "0.65", "--beta2", "0.99",
]  # fmt: skip
RESUMED = {
    "everything": (ALL, [2, 4, 7]),
    "zero-shot head, a batch of odd length, workers": (
        [*ALL, "--head", "zero-shot", "--batch-size", "5", "--workers", "2"], [3],
    ),
    "accumulation, reduction, checkpointing": (
        [*ALL, "--batch-size", "3", "--accum-freq", "2", "--vision-guided-reduction", "--grad-checkpointing"], [5],
    ),
    "bfloat16": ([*ALL, "--precision", "amp_bf16", "--grad-clip-norm", "1"], [5]),
}  # fmt: skip


@pytest.mark.parametrize("name", RESUMED)
def test_interrupted_equals_uninterrupted(name, run, monkeypatch):
    flags, stops = RESUMED[name]
    straight = run(*flags, name="straight")
    original = Trainer.step
    for stop in stops:

        def step_and_signal(self, window, stop=stop):
            if self.steps + 1 == stop:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(self, window)

        monkeypatch.setattr(Trainer, "step", step_and_signal)
        stopped = run(*flags, "--resume", "latest", name="stopped", code=EXIT_INTERRUPTED)
        monkeypatch.undo()
        assert checkpoint.load(checkpoint.newest(stopped / "checkpoints"))["step"] == stop
    run(*flags, "--resume", "latest", name="stopped")

    a, b = (torch.load(f / "checkpoints" / "epoch_2.pt", weights_only=True) for f in (straight, stopped))
    assert_equal_weights(a["state_dict"], b["state_dict"])
    assert_equal_weights(a["ema"], b["ema"])
    assert torch.equal(a["random"][0]["cpu"], b["random"][0]["cpu"])
    assert [(r["step"], r["loss"], r["lr"]) for r in rows(straight)] == [
        (r["step"], r["loss"], r["lr"]) for r in rows(stopped)
    ]
    assert evaluations(straight) == evaluations(stopped)


def test_a_run_resumed_after_an_epoch_is_the_same_whether_that_was_evaluated_or_not(run):
    """The evaluation must not take from the random numbers that mix the batches to come."""
    straight = run(*ALL, name="straight")
    for frequency in ("0", "1"):
        resumed = run(
            *ALL, "--resume", str(straight / "checkpoints" / "epoch_1.pt"), "--val-frequency", frequency,
            name=f"resumed-{frequency}",
        )  # fmt: skip
        assert_equal_weights(
            weights(resumed / "checkpoints" / "epoch_2.pt"), weights(straight / "checkpoints" / "epoch_2.pt")
        )


def test_results_are_those_of_the_final_weights_or_none(run, tmp_path):
    run("--epochs", "1")
    run("--resume", "latest", "--val-frequency", "0")
    (record,) = (tmp_path / "results").glob("*.json")
    before = record.read_text()
    run("--resume", "latest")  # evaluated at last
    assert record.read_text() == before and len(list((tmp_path / "results").glob("*.json"))) == 2


def test_evaluation_of_a_checkpoint(run, data, shifted, tmp_path, capsys):
    """By its file alone; the same figures, those of the averages included."""
    settings = ["--head", "zero-shot", "--ema-decay", "0.99", "--vision-guided-reduction", "--lr", "5e-4"]
    folder = run(*settings, "--also", str(shifted))
    file = folder / "checkpoints" / "epoch_2.pt"
    assert evaluations(folder)[-1]["ema/colours-top1"] < evaluations(folder)[-1]["colours-top1"]  # it is young
    common = ["--workers", "0", "--device", "cpu", "--precision", "fp32", "--logs", str(tmp_path), "--results", "none"]
    flags = ["--evaluate", "--resume", str(file), "--data", str(data), "--also", str(shifted), *common]
    assert main([*flags, "--batch-size", "6", "--name", "alone"]) == 0
    (alone,) = evaluations(tmp_path / "alone")
    expected = {k: v for k, v in evaluations(folder)[-1].items() if k not in ("epoch", "step")}
    assert {k: v for k, v in alone.items() if k != "epoch"} == expected
    assert not (tmp_path / "alone" / "train.csv").exists()
    # The curve of a finished run, from the checkpoint.
    assert main([*flags, "--wise-ft", "--name", "curve"]) == 0
    curve = json.loads((tmp_path / "curve" / "wise_ft.json").read_text())
    assert curve[-1]["colours-top1"] == expected["ema/colours-top1"]
    # Other data.
    assert main(["--evaluate", "--resume", str(file), "--data", str(shifted), "--name", "other", *common]) == 0
    (other,) = evaluations(tmp_path / "other")
    assert other["shifted-top1"] == expected["shifted-top1"]
    capsys.readouterr()
    torch.save({"state_dict": {}, "epoch": 1}, tmp_path / "foreign.pt")
    assert main(["--evaluate", "--resume", str(tmp_path / "foreign.pt"), "--data", str(data), *common]) == 2
    assert "is not a checkpoint of fine-tuning" in capsys.readouterr().err


def test_the_curve_from_zero_shot_to_fine_tuned(run, data, pretrained, shifted, tmp_path):
    folder = run("--head", "zero-shot", "--wise-ft", "--also", str(shifted), "--lr", "1e-3")
    curve = json.loads((folder / "wise_ft.json").read_text())
    assert [row["alpha"] for row in curve] == [i / 10 for i in range(11)]
    last = evaluations(folder)[-1]
    assert {k: v for k, v in curve[-1].items() if k != "alpha"} == {
        k: v for k, v in last.items() if k not in ("epoch", "step")
    }
    zero_shot = run("--head", "zero-shot", "--evaluate", "--also", str(shifted), name="zero-shot")
    (start,) = evaluations(zero_shot)
    assert {k: v for k, v in curve[0].items() if k != "alpha"} == {k: v for k, v in start.items() if k != "epoch"}
    assert (folder / "wise_ft.csv").exists() and "WiSE-FT" in (folder / "out.log").read_text()
    assert start["colours-top1"] < last["colours-top1"]
    # The finished run, asked again.
    (folder / "wise_ft.json").unlink()
    run("--head", "zero-shot", "--wise-ft", "--also", str(shifted), "--lr", "1e-3", "--resume", "latest")
    assert json.loads((folder / "wise_ft.json").read_text()) == curve


def test_two_processes_train_alike_and_evaluate_the_same(run, data, pretrained, local_model, tmp_path):
    model = f"local-dir:{local_model}"
    plain = ["--crop-scale", "1", "1", "--crop-ratio", "1", "1", "--hflip", "0", "--head", "zero-shot", "--lr", "1e-4"]
    single = run(*plain, name="single", model=model)
    argv = finetune_command(data, tmp_path, pretrained, *plain, "--batch-size", "3", name="double", model=model)
    done = torchrun("-m", "training.finetune", "--", *argv)
    assert done.returncode == 0, done.stderr
    for a, b in zip(rows(single), rows(tmp_path / "double"), strict=True):
        assert float(a["loss"]) == pytest.approx(float(b["loss"]), rel=1e-4)
        assert float(a["accuracy"]) == pytest.approx(float(b["accuracy"]), abs=1e-6)
    # What two processes found is, to the last digit, what one finds; it is even known as the same work.
    written = {p.name: json.loads(p.read_text()) for p in (tmp_path / "results").glob("*.json")}
    assert len(written) == 2
    file = tmp_path / "double" / "checkpoints" / "epoch_2.pt"
    run("--evaluate", "--resume", str(file), "--head", "zero-shot", "--batch-size", "3", name="check", model=model)
    again = {p.name: json.loads(p.read_text()) for p in (tmp_path / "results").glob("*.json")}
    assert {k: r["metrics"] for k, r in again.items()} == {k: r["metrics"] for k, r in written.items()}
    assert [r["metrics"]["top1"] < 1 for r in again.values()] == [True, True]
    assert {r["run"] for r in again.values()} == {str(single), str(tmp_path / "check")}


# ---------------------------------------------------------------------- data


def test_rows_have_the_class_number_as_label(data):
    images = load_data(str(data), split="train")
    table, encoding = LabelledRows(images), LabelEncoding(to_tensor)
    assert len(table) == 24
    batch = encoding.collate([encoding.encode(table[row]) for row in (0, 23)])
    assert torch.equal(batch["label"], images.labels[[0, 23]])
    assert torch.equal(batch["image"].pixels[1], to_tensor(images.images.load(23)))
    assert table[23].key.endswith(".png") and table[23].index == 23


def test_broken_pictures_are_named_and_counted(pretrained, tmp_path, capsys):
    data = write_colours(tmp_path / "data", broken={4, 9})
    (data / "test" / "red" / "002.png").write_bytes(b"no picture")
    assert main(finetune_command(data, tmp_path, pretrained, "--epochs", "1")) == 0
    log = (tmp_path / "run" / "out.log").read_text()
    assert "2 x unreadable image" in log and "004.png" in log
    assert evaluations(tmp_path / "run")[0]["data-num_samples"] == 8
    stop = ["--epochs", "1", "--on-broken", "stop"]
    assert main(finetune_command(data, tmp_path, pretrained, *stop, name="stop")) == 2
    assert "002.png cannot be read" in capsys.readouterr().err


def test_classes_without_a_picture_are_named(run, pretrained, tmp_path):
    data = write_colours(tmp_path / "data")
    for file in (data / "train" / "green").iterdir():
        file.unlink()
    assert main(finetune_command(data, tmp_path, pretrained, "--epochs", "1")) == 0
    assert "1 of the classes have no training image: green" in (tmp_path / "run" / "out.log").read_text()


def test_other_data_in_the_middle_of_an_epoch_are_noticed(run, tmp_path, pretrained, capsys):
    folder = run("--save-every-n-steps", "2", "--epochs", "1")
    other = write_colours(tmp_path / "colours", train=27)
    capsys.readouterr()
    argv = finetune_command(other, tmp_path, pretrained, "--epochs", "1", name="other")
    assert main([*argv, "--resume", str(folder / "checkpoints" / "step_2.pt")]) == 2
    assert "whose data were read with fingerprint" in capsys.readouterr().err


# ---------------------------------------------------------------------- options


def test_what_the_flags_say_is_what_is_done(data, shifted, pretrained, tmp_path):
    flags = [
        "--mixup", "0.7", "--cutmix", "0.9", "--mixup-prob", "0.8", "--mixup-switch-prob", "0.3",
        "--label-smoothing", "0.2", "--drop-path", "0.25", "--test-data", str(shifted),
        "--crop-scale", "0.3", "0.9", "--crop-ratio", "0.8", "1.1", "--hflip", "0.4", "--color-jitter", "0.2",
        "--random-erasing", "0.6", "--erasing-mode", "rand", "--train-interpolation", "bilinear",
    ]  # fmt: skip
    args = parse(FinetuningOptions, finetune_command(data, tmp_path, pretrained, *flags))
    parts = finetuning(args, Ranks(torch.device("cpu")), None)
    mix = parts.task.mix
    assert (mix.num_classes, mix.mixup, mix.cutmix, mix.prob, mix.switch_prob, mix.smoothing) == (
        3, 0.7, 0.9, 0.8, 0.3, 0.2
    )  # fmt: skip
    blocks = parts.model.visual.transformer.resblocks
    rates = [[hook.rate for hook in block.ls_2._forward_hooks.values()] for block in blocks]
    assert rates == [[], *([pytest.approx(0.05 * i)] for i in range(1, 6))]
    assert [(d.name, len(d)) for d in parts.task.data.values()] == [("shifted", 15)]
    transform = str(parts.train_data._make_stream.keywords["encoding"].transform)
    for part in (
        "scale=(0.3, 0.9), ratio=(0.8, 1.1), interpolation=bilinear", "RandomHorizontalFlip(p=0.4)",
        "brightness=(0.8, 1.2)", "RandomErasing(p=0.6, mode=rand", "mean=tensor([0.4815, 0.4578, 0.4082])",
    ):  # fmt: skip
        assert part in transform


def test_the_global_batch_gives_way_to_the_batch_size(run):
    argv = ["--global-batch", "12", "--epochs", "1"]
    assert yaml.safe_load((run(*argv) / "config.yaml").read_text())["batch_size"] == 6


RECIPES = {
    "elip_paper.yaml": (10, 1e-3, 0.1, None, 0.0, 0.0, None, 0.0, 1024),
    "slip_vit_s.yaml": (100, 4e-3, 0.05, 0.65, 0.8, 1.0, None, 0.0, 1024),
    "slip_vit_b.yaml": (100, 4e-3, 0.05, 0.65, 0.8, 1.0, None, 0.1, 1024),
    "ft_clip.yaml": (50, 6e-4, 0.05, 0.6, 0.0, 0.0, 0.9998, 0.0, 2048),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes(recipe, run):
    path = str(Path(__file__).parents[2] / "configs" / "finetune" / recipe)
    args = parse(FinetuningOptions, ["--config", path, "--model", "a", "--pretrained", "b", "--data", "c"])
    names = ("epochs", "lr", "wd", "layer_decay", "mixup", "cutmix", "ema_decay", "drop_path", "global_batch")
    assert tuple(getattr(args, name) for name in names) == RECIPES[recipe] and args.batch_size is None
    assert run("--config", path, "--epochs", "1").is_dir()


def test_the_configuration_of_a_run_is_read_back(data):
    words = [
        "--data", "colours=$x", "--also", "a=~/$y", "b", "--model", "m", "--pretrained", "p",
        "--crop-scale", "0.5", "1", "--mixup", "0.8", "--no-download",
    ]  # fmt: skip
    args = parse(FinetuningOptions, words)
    config = resolved(args)
    assert "train_data" not in config and "siglip" not in config
    path = data / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    assert parse(FinetuningOptions, ["--config", str(path)]) == args


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--siglip"], "--siglip is an option of training.main (loss), not of training.finetune."),
        (["--token-reduction", "lam=0.5", "--vision-guided-reduction"], "lam weighs the image against its caption"),
        (["--train-data", "x.tar"], "--train-data is an option of training.main (training data)"),
        (["--wise-ft"], "--wise-ft starts from the zero-shot classifier, so it needs --head zero-shot."),
        (["--evaluate"], "--evaluate needs a checkpoint of fine-tuning in --resume, or --head zero-shot."),
        (["--wise-ft", "--evaluate", "--head", "zero-shot"], "--wise-ft needs the fine-tuned weights: give their ch"),
        (["--results", __file__], "is a file; name a folder."),
        (["--token-reduction", "keep_ratio=1,.5"], "--token-reduction needs --vision-guided-reduction"),
        (["--auto-augment", "v0", "--color-jitter", "0.4"], "--color-jitter has no effect with --auto-augment"),
        (["--auto-augment", "rand-x9"], "timm knows no augmentation policy 'rand-x9'"),
        (["--crop-scale", "1", "0.5"], "--crop-scale takes the smaller number first, not 1 0.5."),
        (["--batch-size", "25"], "colours has only 24 training images, fewer than one batch of 25 on each of 1"),
        (["--mixup", "-1"], "--mixup must be a number of at least 0"),
        (["--pretrained", ""], "--pretrained is missing: give a checkpoint file"),
        (["--model", "Tiny-ELPI"], "There is no model named 'Tiny-ELPI'; did you mean Tiny-ELIP?"),
        (["--data", "colors=/x"], "There is no data set called 'colors'"),
        (["--resume", "nowhere.pt"], "There is no checkpoint at nowhere.pt"),
        (["--mixpu", "1"], "Unknown option --mixpu; did you mean --mixup?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_flags(flags, sentence, run, capsys, tmp_path):
    run(*flags, code=2)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and sentence in error
    assert not (tmp_path / "run").exists()


def test_what_is_missing(capsys):
    for argv, sentence in (
        (["--model", "Tiny", "--pretrained", "x"], "--data is missing"),
        (["--data", "x"], "--model is missing"),
        (["--data", "x", "--evaluate", "--resume", "latest", "--head", "zero-shot"], "--evaluate needs --model"),
    ):
        assert main([*argv, "--device", "cpu"]) == 2
        assert sentence in capsys.readouterr().err


def test_data_of_other_classes_and_doubled_names_are_refused(run, data, tmp_path, capsys):
    other = write_colours(tmp_path / "elsewhere" / "shades")
    (other / "classnames.txt").write_text("navy\nolive\nred\n")
    run("--also", str(other), code=2)
    assert (
        "2 of the 3 classes of shades (test) and colours (train) differ (class 0 is 'navy' in the one and 'blue'"
        in capsys.readouterr().err
    )
    run("--also", str(data), code=2)
    assert "Two data sets to evaluate on are called colours" in capsys.readouterr().err


def test_what_the_tower_cannot_do_is_refused(data, pretrained, tmp_path, capsys):
    text = {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 1}
    config = {"embed_dim": 16, "vision_cfg": {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32}, "text_cfg": text}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    for flags, sentence in (
        (["--drop-path", "0.1"], "--drop-path needs OpenCLIP's own ViT, but this model has a ModifiedResNet"),
        (["--layer-decay", "0.5"], "--layer-decay needs OpenCLIP's own transformers"),
        (["--vision-guided-reduction"], "Token reduction needs OpenCLIP's own ViT"),
    ):
        argv = finetune_command(data, tmp_path, "", *flags, model=f"local-dir:{tmp_path}")
        assert main(argv) == 2
        assert sentence in capsys.readouterr().err
