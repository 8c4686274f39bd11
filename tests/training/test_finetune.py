"""Fine-tuning as a person runs it: small runs on pictures of three colours."""
import json
import shutil
from pathlib import Path

import open_clip
import pytest
import torch
from torchvision.transforms.functional import to_tensor

from training import checkpoint
from training.control import EXIT_INTERRUPTED
from training.data.samples import LabelEncoding
from training.data.sets.registry import load_data
from training.data.sources import LabelledRows
from training.distributed import Ranks
from training.finetune import main
from training.options import parse
from training.options.finetune import FinetuningOptions
from training.work.finetune import finetuning

from .. import processes
from .colours import finetune_command, write_colours
from .runs import assert_equal_weights, evaluations, interrupted, losses, records, rows, weights, write_model


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory, local_model):
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


def metrics(figures):
    return {name: value for name, value in figures.items() if name not in ("epoch", "step", "alpha")}


# ---------------------------------------------------------------------- runs


def test_a_run_learns_and_what_it_leaves(run, data, pretrained, shifted, tmp_path):
    folder = run("--also", str(shifted), "--ema-decay", "0.5", "--epochs", "3")
    steps = rows(folder)
    assert float(steps[0]["loss"]) == pytest.approx(1.0986, abs=1e-3) and float(steps[-1]["loss"]) < 0.9  # from ln(3)
    results = evaluations(folder)
    assert [r["epoch"] for r in results] == [1, 2, 3]
    last = results[-1]
    assert last["colours-top1"] > 0.8 and last["ema/colours-top1"] > 0.8 and last["shifted-top1"] > 0.8  # chance: 1/3
    assert last["colours-num_samples"] == 9 and last["shifted-num_samples"] == 15
    state = torch.load(folder / "checkpoints" / "epoch_3.pt", weights_only=True)
    tower = {k for k in weights(pretrained) if k.startswith("visual.") and k != "visual.proj"}
    assert set(state["state_dict"]) == set(state["ema"]) == tower | {"head.weight", "head.bias"}
    best = max(results, key=lambda r: max(r["colours-top1"], r["ema/colours-top1"]))
    assert torch.load(folder / "checkpoints" / "best.pt", weights_only=True)["epoch"] == best["epoch"]

    found = {(r["data"], r["settings"]["averaged"]): r for r in records(tmp_path / "results")}
    assert set(found) == {(name, averaged) for name in ("colours", "shifted") for averaged in (False, True)}
    for (name, averaged), record in found.items():
        names = ("top1", "top5", "mean_per_class_recall", "num_samples")
        assert record["metrics"] == {k: last[f"{'ema/' * averaged}{name}-{k}"] for k in names}
        label = f"| {name}{', averaged weights' * averaged}: {json.dumps(record['metrics'])}"
        assert label in (folder / "out.log").read_text()
        assert record["command"] == "finetune" and record["split"] == "test" and record["run"] == str(folder)
        assert len(record["identity"]) == 16 and record["settings"]["head"] == "random"
    assert len({record["weights"] for record in found.values()}) == 2
    # config.yaml starts the same run again.
    assert main(["--config", str(folder / "config.yaml"), "--name", "again"]) == 0
    assert_equal_weights(weights(tmp_path / "again" / "checkpoints" / "epoch_3.pt"), state["state_dict"])


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
def test_interrupted_equals_uninterrupted(name, run):
    flags, stops = RESUMED[name]
    straight = run(*flags, name="straight")
    for stop in stops:
        with interrupted(stop):
            stopped = run(*flags, "--resume", "latest", name="stopped", code=EXIT_INTERRUPTED)
        assert checkpoint.load(checkpoint.newest(stopped / "checkpoints"))["step"] == stop
    run(*flags, "--resume", "latest", name="stopped")

    a, b = (torch.load(f / "checkpoints" / "epoch_2.pt", weights_only=True) for f in (straight, stopped))
    assert_equal_weights(a["state_dict"], b["state_dict"])
    assert_equal_weights(a["ema"], b["ema"])
    assert torch.equal(a["random"][0]["cpu"], b["random"][0]["cpu"])
    assert losses(straight) == losses(stopped) and evaluations(straight) == evaluations(stopped)


def test_a_run_resumed_after_an_epoch_is_the_same_whether_that_was_evaluated_or_not(run):
    """The evaluation must not take from the random numbers that mix the batches to come."""
    straight = run(*ALL, name="straight")
    for frequency in ("0", "1"):
        flags = ("--resume", str(straight / "checkpoints" / "epoch_1.pt"), "--val-frequency", frequency)
        resumed = run(*ALL, *flags, name=f"resumed-{frequency}")
        assert_equal_weights(*(weights(folder / "checkpoints" / "epoch_2.pt") for folder in (resumed, straight)))


def test_results_are_those_of_the_final_weights_or_none(run, tmp_path):
    run("--epochs", "1")
    run("--resume", "latest", "--val-frequency", "0")
    (record,) = (tmp_path / "results").glob("*.json")
    before = record.read_text()
    run("--resume", "latest")  # evaluated at last
    assert record.read_text() == before and len(list((tmp_path / "results").glob("*.json"))) == 2


def test_evaluation_of_a_checkpoint(run, data, pretrained, shifted, tmp_path, capsys):
    """By its file alone (what it began from may be gone); the same figures, those of the averages included."""
    settings = ["--head", "zero-shot", "--ema-decay", "0.99", "--vision-guided-reduction", "--lr", "5e-4"]
    folder = run(*settings, "--also", str(shifted))
    file = folder / "checkpoints" / "epoch_2.pt"
    assert evaluations(folder)[-1]["ema/colours-top1"] < evaluations(folder)[-1]["colours-top1"]  # it is young
    common = ["--workers", "0", "--device", "cpu", "--precision", "fp32", "--logs", str(tmp_path), "--results", "none"]
    flags = ["--evaluate", "--data", str(data), "--also", str(shifted), *common]
    written = sorted(tmp_path.rglob("*"))
    expected = metrics(evaluations(folder)[-1])
    pretrained.rename(tmp_path / "gone.pt")
    for resume in (["--resume", str(file)], ["--resume", "latest", "--name", "run"]):
        assert main([*flags, *resume, "--batch-size", "6", "--results", str(tmp_path / "results2")]) == 0
        assert "Evaluation: epoch 2, " in "".join(capsys.readouterr())
        found = records(tmp_path / "results2")
        kinds = {(record["data"], record["settings"]["averaged"]): record["metrics"] for record in found}
        for (name, averaged), values in kinds.items():
            assert values == {k: expected[f"{'ema/' * averaged}{name}-{k}"] for k in values}
        assert len(kinds) == len(found) == 4
        shutil.rmtree(tmp_path / "results2")
    (tmp_path / "gone.pt").rename(pretrained)
    assert sorted(tmp_path.rglob("*")) == written  # no run folder
    # The curve of a finished run, from the checkpoint.
    assert main([*flags, "--resume", str(file), "--wise-ft", "--name", "curve"]) == 0
    curve = json.loads((tmp_path / "curve" / "wise_ft.json").read_text())
    assert curve[-1]["colours-top1"] == expected["ema/colours-top1"]
    capsys.readouterr()
    torch.save({"state_dict": {}, "epoch": 1}, tmp_path / "foreign.pt")
    assert main(["--evaluate", "--resume", str(tmp_path / "foreign.pt"), "--data", str(data), *common]) == 2
    assert "is not a checkpoint of fine-tuning" in capsys.readouterr().err


def test_the_curve_from_zero_shot_to_fine_tuned(run, data, pretrained, shifted, tmp_path):
    flags = ("--head", "zero-shot", "--also", str(shifted), "--lr", "1e-3")
    folder = run(*flags, "--wise-ft", "--wise-ft-save", "0", "0.3")
    curve = json.loads((folder / "wise_ft.json").read_text())
    assert [row["alpha"] for row in curve] == [i / 10 for i in range(11)]
    last = evaluations(folder)[-1]
    assert metrics(curve[-1]) == metrics(last) and curve[0]["colours-top1"] < last["colours-top1"]
    assert "WiSE-FT" in (folder / "out.log").read_text()
    for resume, row in ((), 0), (("wise_ft_0.pt",), 0), (("wise_ft_0.3.pt",), 3):
        resume = [word for name in resume for word in ("--resume", str(folder / name))]
        run(*flags, "--evaluate", *resume, "--results", str(tmp_path / "mixed"))
        found = {r["data"]: r["metrics"]["top1"] for r in records(tmp_path / "mixed")}
        assert found == {name: curve[row][f"{name}-top1"] for name in ("colours", "shifted")}
        shutil.rmtree(tmp_path / "mixed")
    # The finished run, asked again.
    (folder / "wise_ft.json").unlink()
    run(*flags, "--wise-ft", "--resume", "latest")
    assert json.loads((folder / "wise_ft.json").read_text()) == curve


def test_two_processes_train_alike_and_evaluate_the_same(run, data, pretrained, local_model, tmp_path):
    model = f"local-dir:{local_model}"
    plain = ["--crop-scale", "1", "1", "--crop-ratio", "1", "1", "--hflip", "0", "--head", "zero-shot", "--lr", "1e-4"]
    single = run(*plain, name="single", model=model)
    argv = finetune_command(data, tmp_path, pretrained, *plain, "--batch-size", "3", name="double", model=model)
    processes.run(main, argv)
    for a, b in zip(rows(single), rows(tmp_path / "double"), strict=True):
        assert float(a["loss"]) == pytest.approx(float(b["loss"]), rel=1e-4)
        assert float(a["accuracy"]) == pytest.approx(float(b["accuracy"]), abs=1e-6)
    # What two processes found is, to the last digit, what one finds; it is even known as the same work.
    written = records(tmp_path / "results")
    file = tmp_path / "double" / "checkpoints" / "epoch_2.pt"
    run("--evaluate", "--resume", str(file), "--head", "zero-shot", "--batch-size", "3", name="check", model=model)
    again = records(tmp_path / "results")
    assert [r["metrics"] for r in again] == [r["metrics"] for r in written]
    assert {r["run"]: r["metrics"]["top1"] < 1 for r in again} == {str(single): True, None: True}


# ---------------------------------------------------------------------- data


def test_rows_have_the_class_number_as_label(data):
    images = load_data(str(data), split="train")
    table, encoding = LabelledRows(images), LabelEncoding(to_tensor)
    batch = encoding.collate([encoding.encode(table[row]) for row in (0, 23)])
    assert torch.equal(batch["label"], images.labels[[0, 23]])
    assert torch.equal(batch["image"].pixels[1], to_tensor(images.images.load(23)))
    assert table[23].key.endswith(".png") and table[23].index == 23


def test_broken_pictures_and_classes_without_one_are_named_and_counted(pretrained, tmp_path, capsys):
    data = write_colours(tmp_path / "data", broken={3, 9})
    for file in (data / "train" / "green").iterdir():
        file.unlink()
    (data / "test" / "red" / "002.png").write_bytes(b"no picture")
    flags = ["--epochs", "1", "--batch-size", "4"]
    assert main(finetune_command(data, tmp_path, pretrained, *flags)) == 0
    log = (tmp_path / "run" / "out.log").read_text()
    assert "x unreadable image" in log and "003.png" in log and "009.png" in log
    assert "1 of the classes have no training image: green" in log
    assert evaluations(tmp_path / "run")[0]["data-num_samples"] == 8
    assert main(finetune_command(data, tmp_path, pretrained, *flags, "--on-broken", "stop", name="stop")) == 2
    assert "002.png cannot be read" in capsys.readouterr().err


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
        "--mixup", "0.7", "--label-smoothing", "0.2", "--drop-path", "0.25", "--test-data", str(shifted),
        "--crop-scale", "0.3", "0.9", "--crop-ratio", "0.8", "1.1", "--hflip", "0.4", "--color-jitter", "0.2",
        "--random-erasing", "0.6", "--erasing-mode", "rand", "--train-interpolation", "bilinear",
    ]  # fmt: skip
    args = parse(FinetuningOptions, finetune_command(data, tmp_path, pretrained, *flags))
    parts = finetuning(args, Ranks(torch.device("cpu")), None)
    assert parts.task.mix.num_classes == 3 and parts.task.mix.options == args
    blocks = parts.model.visual.transformer.resblocks
    rates = [[hook.keywords["rate"] for hook in block.ls_2._forward_hooks.values()] for block in blocks]
    assert rates == [[], *([pytest.approx(0.05 * i)] for i in range(1, 6))]
    assert [(d.name, len(d)) for d in parts.task.data.values()] == [("shifted", 15)]
    transform = str(parts.train_data.encoding.transform)
    shown = "scale=(0.3, 0.9), ratio=(0.8, 1.1), interpolation=bilinear; RandomHorizontalFlip(p=0.4); "
    shown += "brightness=(0.8, 1.2); RandomErasing(p=0.6, mode=rand; mean=tensor([0.4815, 0.4578, 0.4082])"
    assert [part for part in shown.split("; ") if part not in transform] == []


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


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--siglip"], "--siglip is an option of training.main (loss), not of training.finetune."),
        (["--token-reduction", "lam=0.5", "--vision-guided-reduction"], "lam weighs the image against its caption"),
        (["--train-data", "x.tar"], "training.main (training data)"),
        (["--wise-ft"], "--wise-ft starts from the zero-shot classifier, so it needs --head zero-shot."),
        (["--evaluate"], "--evaluate needs a checkpoint of fine-tuning in --resume, or --head zero-shot."),
        (["--wise-ft", "--evaluate", "--head", "zero-shot"], "--wise-ft needs the fine-tuned weights: give their ch"),
        (["--wise-ft-save", "0.5"], "--wise-ft-save needs --wise-ft, and a run folder in --logs."),
        (["--evaluate", "--resume", "latest"], "There is no checkpoint in"),
        (["--mixup", "1", "--batch-size", "1"], "A batch of one picture has none to mix it with"),
        (["--force-image-size", "32", "7"], "Pictures of [32, 7] pixels are smaller than one patch"),
        (["--pretrained-image", "--pretrained", ""], "--pretrained-image needs an image tower of timm's; Tiny-ELIP"),
        (["--results", __file__], "is a file; name a folder."),
        (["--token-reduction", "keep_ratio=1,.5"], "--token-reduction needs --vision-guided-reduction"),
        (["--auto-augment", "v0", "--color-jitter", "0.4"], "--color-jitter has no effect with --auto-augment"),
        (["--auto-augment", "rand-x9"], "timm knows no augmentation policy 'rand-x9'"),
        (["--crop-scale", "1", "0.5"], "--crop-scale takes the smaller number first, not 1 0.5."),
        (["--batch-size", "25"], "colours has only 24 usable samples, fewer than one batch of 25 on each of 1"),
        (["--mixup", "-1"], "--mixup must be a number of at least 0"),
        (["--pretrained", ""], "--pretrained is missing: give a checkpoint file"),
        (["--model", "Tiny-ELPI"], "There is no model named 'Tiny-ELPI'; did you mean Tiny-ELIP?"),
        (["--data", "colors=/x"], "There is no data set called 'colors'"),
        (["--resume", "nowhere.pt"], "There is no checkpoint at nowhere.pt"),
        (["--mixpu", "1"], "Unknown option --mixpu; did you mean --mixup?"),
        (["--data", ""], "--data is missing"),
        (["--evaluate", "--resume", "latest", "--name", ""], "give the --name of a run, or a file in"),
        (["--resume", "{pretrained}"], "one of them has a classifier's head (training.finetune) and the other"),
        (["--also", "{data}"], "Two data sets to evaluate on are called colours"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_flags(flags, sentence, run, data, pretrained, capsys, tmp_path):
    run(*(flag.format(data=data, pretrained=pretrained) for flag in flags), code=2)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and sentence in error
    assert not (tmp_path / "run").exists()


def test_a_model_is_needed(capsys):
    assert main(["--data", "x", "--device", "cpu"]) == 2
    assert "--model is missing" in capsys.readouterr().err


def test_one_class_teaches_nothing(pretrained, tmp_path, capsys):
    data = write_colours(tmp_path / "data", train=1, test=1)
    (data / "classnames.txt").write_text("blue\n")
    assert main(finetune_command(data, tmp_path, pretrained, "--batch-size", "1")) == 2
    assert "data has one class, so there is nothing to tell apart" in capsys.readouterr().err


def test_data_of_other_classes_are_refused(run, tmp_path, capsys):
    other = write_colours(tmp_path / "elsewhere" / "shades")
    (other / "classnames.txt").write_text("navy\nolive\nred\n")
    run("--also", str(other), code=2)
    sentence = "2 of the 3 classes of shades (test) and colours (train) differ (class 0 is 'navy' in the one and 'blue'"
    assert sentence in capsys.readouterr().err


def test_what_the_tower_cannot_do_is_refused(data, pretrained, tmp_path, capsys):
    text = {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 1}
    config = {"embed_dim": 16, "vision_cfg": {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32}, "text_cfg": text}
    write_model(tmp_path, config)
    for flags, sentence in (
        (["--drop-path", "0.1"], "--drop-path needs OpenCLIP's own ViT, but this model has a ModifiedResNet"),
        (["--layer-decay", "0.5"], "--layer-decay needs OpenCLIP's own transformers"),
        (["--vision-guided-reduction"], "Token reduction needs OpenCLIP's own ViT"),
    ):
        argv = finetune_command(data, tmp_path, "", *flags, model=f"local-dir:{tmp_path}")
        assert main(argv) == 2
        assert sentence in capsys.readouterr().err
