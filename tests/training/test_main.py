"""The command as a person runs it: a run on files, its folder, and what it says to bad input."""
import os

import open_clip
import pytest
import torch
import yaml

from training.main import main

from ..processes import torchrun
from .runs import assert_equal_weights, command, evaluations, rows, weights, write_shards

pytestmark = pytest.mark.usefixtures("local_model")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"))


def test_a_run_and_what_it_leaves(shards, tmp_path):
    assert main(command(shards, tmp_path, "--val-data", shards, "--report-to", "tensorboard")) == 0
    run = tmp_path / "run"
    steps, results = rows(run), evaluations(run)
    assert [int(r["step"]) for r in steps] == list(range(8))
    assert float(steps[0]["rrt"]) == pytest.approx(1 - (17 + 16 + 3 * 12 + 8) / (6 * 17))
    assert all(float(r["loss"]) > 0 for r in steps)
    assert [r["epoch"] for r in results] == [1, 2]
    assert results[0]["num_samples"] == 32 and 0 <= results[0]["image_to_text_R@1"] <= 1
    assert "RRT" in (run / "out.log").read_text()
    assert list((run / "tensorboard").iterdir())
    state = torch.load(run / "checkpoints" / "epoch_2.pt", weights_only=True)
    assert (state["epoch"], state["step"], state["samples"]) == (2, 8, 64)
    # The checkpoint is an OpenCLIP checkpoint: it loads into the plain model.
    plain = open_clip.create_model("Tiny", pretrained=str(run / "checkpoints" / "epoch_2.pt"))
    assert_equal_weights(plain.state_dict(), state["state_dict"])
    # config.yaml starts the same run again.
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["model"] == "Tiny-ELIP"
    assert main(["--config", str(run / "config.yaml"), "--name", "again"]) == 0
    assert_equal_weights(weights(tmp_path / "again" / "checkpoints" / "epoch_2.pt"), state["state_dict"])


def test_another_seed_is_another_run(shards, tmp_path):
    assert main(command(shards, tmp_path, "--epochs", "1", name="a")) == 0
    assert main(command(shards, tmp_path, "--epochs", "1", "--seed", "1", name="b")) == 0
    a, b = (weights(tmp_path / name / "checkpoints" / "epoch_1.pt") for name in "ab")
    assert not torch.equal(a["visual.proj"], b["visual.proj"])


def test_the_last_epoch_only_and_epoch_latest(shards, tmp_path):
    flags = ["--save-frequency", "0", "--save-most-recent"]
    assert main(command(shards, tmp_path, *flags)) == 0
    assert {p.name for p in (tmp_path / "run" / "checkpoints").glob("*.pt")} == {"epoch_2.pt", "epoch_latest.pt"}


def test_an_openclip_checkpoint_is_continued(shards, tmp_path):
    """As open_clip_train writes it: DDP prefixes, no step, no data position."""
    assert main(command(shards, tmp_path, "--epochs", "1", name="first")) == 0
    state = torch.load(tmp_path / "first" / "checkpoints" / "epoch_1.pt", weights_only=True)
    foreign = {
        "epoch": 1,
        "name": "x",
        "state_dict": {f"module.{k}": v for k, v in state["state_dict"].items()},
        "optimizer": state["optimizer"],
    }
    torch.save(foreign, tmp_path / "foreign.pt")
    assert main(command(shards, tmp_path, "--resume", str(tmp_path / "foreign.pt"), name="second")) == 0
    assert [int(r["step"]) for r in rows(tmp_path / "second")] == [4, 5, 6, 7]


@pytest.mark.parametrize(
    "flags",
    [
        ["--siglip"],
        ["--accum-freq", "2", "--grad-clip-norm", "1"],
        ["--precision", "amp_bf16", "--grad-checkpointing"],
        ["--precision", "pure_bf16"],
        ["--precision", "amp"],
        ["--lock-image", "--lock-text", "--lock-text-freeze-layer-norm"],
        ["--token-reduction", "none"],
        ["--token-reduction", "lam=0.3", "keep_count=16,12,8,4", "merge=false", "text_scale=none"],
        ["--force-patch-dropout", "0.5"],
        ["--text-reduction", "post", "--text-keep", "0.5"],
        ["--lr-scheduler", "const-cooldown", "--epochs-cooldown", "1", "--opt", "timm/lamb", "--lr", "1e-3"],
        ["--distill-model", "Tiny", "--distill-pretrained", ""],
    ],
    ids=lambda flags: " ".join(flags)[:40],
)
def test_flags_run(flags, shards, tmp_path):
    if "--distill-pretrained" in flags:
        torch.save(open_clip.create_model("Tiny").state_dict(), tmp_path / "teacher.pt")
        flags = [*flags[:-1], str(tmp_path / "teacher.pt")]
    assert main(command(shards, tmp_path, "--epochs", "1", *flags)) == 0
    state = weights(tmp_path / "run" / "checkpoints" / "epoch_1.pt")
    assert all(torch.isfinite(v.float()).all() for v in state.values())
    rrt = float(rows(tmp_path / "run")[0]["rrt"])
    assert (rrt == 0) == ("none" in flags)


def test_evaluation_alone(shards, tmp_path):
    assert main(command(shards, tmp_path, name="trained")) == 0
    trained = str(tmp_path / "trained" / "checkpoints" / "epoch_2.pt")
    flags = [
        "--val-data", shards, "--dataset-type", "webdataset", "--model", "Tiny-ELIP", "--precision", "fp32",
        "--device", "cpu", "--workers", "0", "--logs", str(tmp_path),
    ]  # fmt: skip
    assert main([*flags, "--name", "a", "--pretrained", trained]) == 0
    assert main([*flags, "--name", "b", "--resume", trained]) == 0
    (a,), (b,) = (evaluations(tmp_path / name) for name in "ab")
    assert a["num_samples"] == 32 and a["clip_val_loss"] == b["clip_val_loss"]


def test_broken_samples_are_counted_at_the_end_of_the_epoch(tmp_path):
    shards = write_shards(tmp_path / "shards", broken={3, 20})
    with (tmp_path / "shards" / "00001.tar").open("r+b") as file:
        file.truncate(os.path.getsize(tmp_path / "shards" / "00001.tar") * 2 // 3)
    assert main(command(shards, tmp_path / "logs", "--epochs", "1")) == 0
    log = (tmp_path / "logs" / "run" / "out.log").read_text()
    warning = next(line for line in log.splitlines() if "WARNING" in line and "unreadable image" in line)
    assert "broken shard" in warning


# ---------------------------------------------------------------------- bad input


def refuse(capsys, argv, *words):
    """The command ends with code 2 and one sentence that has these words."""
    assert main(argv) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    for word in words:
        assert word in lines[0], lines[0]


BAD = {
    "unknown model": (["--model", "ViT-B-16-ELPI"], ["ViT-B-16-ELPI", "did you mean ViT-B-16-ELIP?"]),
    "no ViT tower": (["--model", "RN50", "--token-reduction", "elip"], ["needs OpenCLIP's own ViT"]),
    "knob without reduction": (["--model", "Tiny", "--token-reduction", "lam=0.5"], ["--token-reduction elip"]),
    "stages of another depth": (["--token-reduction", "depths=2,2,6,2"], ["12 layers", "has 6"]),
    "increasing ratio": (["--token-reduction", "keep_ratio=.5,.9,.4,.4"], ["must not increase"]),
    "unknown method": (["--token-reduction", "tomes"], ["tomes"]),
    "all tokens without reduction": (["--model", "Tiny", "--full-tokens-last", "10%"], ["needs a model with token"]),
    "all tokens, no reduction": (["--token-reduction", "none", "--full-tokens-last", "10%"], ["needs a model with"]),
    "knob of another method": (["--token-reduction", "tome", "lam=0.5"], ["Unknown token_reduction option 'lam'"]),
    "two rates": (["--token-reduction", "evit", "keep_rate=0.5", "target_rrt=0.3"], ["either keep_rate or target_rrt"]),
    "missing shards": (["--train-data", "nowhere/{00000..00003}.tar"], ["nowhere/00000.tar"]),
    "empty source": (["--train-data", "::"], ["--train-data"]),
    "too many workers": (["--workers", "7"], ["2 shards", "--dataset-resampled"]),
    "missing resume": (["--resume", "nowhere.pt"], ["nowhere.pt"]),
    "missing pretrained": (["--pretrained", "nowhere.pt"], ["nowhere.pt"]),
    "missing zero-shot": (["--zeroshot-data", "nowhere"], ["nowhere"]),
    "window larger than epoch": (["--accum-freq", "9"], ["--accum-freq"]),
    "augmentation with an unknown setting": (["--aug-cfg", "scales=1"], ["'scales': it knows scale, ratio,"]),
    "augmentation": (["--aug-cfg", "scale=(2,1)"], ["--aug-cfg {'scale': [2, 1]} does not work"]),
    "augmentation now and then": (["--aug-cfg", "use_timm=True", "re_prob=.5", "re_count=x"], ["--aug-cfg"]),
    "unknown timm optimizer": (["--opt", "timm/nothing"], ["timm"]),
    "unknown flag": (["--bach-size", "8"], ["--batch-size"]),
    "no contrast": (["--batch-size", "1"], ["A step of one pair has no contrast", "raise --batch-size"]),
    "no patch": (["--force-image-size", "7"], ["7 pixels", "--force-image-size"]),
    "no name": (["--model", "local-dir:"], ["The model local-dir: cannot be created"]),
    "no name of a teacher": (["--distill-model", "hf-hub:", "--distill-pretrained", __file__], ["hf-hub: cannot"]),
    "no such device": (["--device", "npu"], ["--device npu cannot be used here"]),
    "no driver for it": (["--device", "hpu"], ["--device hpu cannot be used here"]),
    "no weights for the tower": (["--pretrained-image"], ["needs an image tower of timm's"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_leaves_nothing(case, shards, tmp_path, capsys):
    flags, words = BAD[case]
    refuse(capsys, command(shards, tmp_path / "logs", *flags), *words)
    assert not (tmp_path / "logs").exists()


def test_a_process_that_cannot_join_in_says_so_itself(shards, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("training.command.launch_rank", lambda: 1)
    refuse(capsys, command(shards, tmp_path / "logs", "--device", "npu"), "--device npu cannot be used here")


def test_an_allocation_of_slurm_without_srun(shards, tmp_path, capsys, monkeypatch):
    slurm = {"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    set_by_openclip = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}  # which are to be gone afterwards
    for name, value in (slurm | set_by_openclip).items():
        monkeypatch.setenv(name, value)
    refuse(capsys, command(shards, tmp_path / "logs"), "cannot meet", "srun", "unset SLURM_NTASKS")
    assert not (tmp_path / "logs").exists()


def test_a_folder_that_cannot_be_written(shards, tmp_path, capsys):
    (tmp_path / "logs").write_text("a file where the folder should be")
    refuse(capsys, command(shards, tmp_path / "logs"), "Cannot write to the folder", "choose another --logs")


def test_an_existing_run_is_never_overwritten(shards, tmp_path, capsys):
    assert main(command(shards, tmp_path, "--epochs", "1")) == 0
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    refuse(capsys, command(shards, tmp_path), "exists already", "--resume latest")
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before


def test_a_checkpoint_of_another_shape(shards, tmp_path, capsys):
    assert main(command(shards, tmp_path, "--epochs", "1", name="small")) == 0
    small = str(tmp_path / "small" / "checkpoints" / "epoch_1.pt")
    refuse(capsys, command(shards, tmp_path, "--resume", small, model="ViT-Ti-8-64-ELIP"), "does not fit", "192")
    refuse(capsys, command(shards, tmp_path, "--pretrained", small, model="ViT-Ti-8-64-ELIP"), "does not fit", "192")


def test_two_processes_end_alike(local_model, shards, tmp_path):
    """Through torchrun: a run on two processes; then bad input, which ends both with the same code and one sentence."""

    def run(*more, name):
        argv = command(shards, tmp_path, *more, name=name, model=f"local-dir:{local_model}")
        return torchrun("-m", "training.main", "--", *argv)

    good = run("--val-data", shards, "--epochs", "1", name="good")
    assert good.returncode == 0, good.stderr
    assert evaluations(tmp_path / "good")[0]["num_samples"] == 32
    bad = run("--workers", "2", name="bad")
    assert bad.returncode != 0
    assert bad.stderr.count("error: ") == 1 and "2 shards" in bad.stderr, bad.stderr
    assert "exitcode  : 2" in bad.stderr and "training/main.py" not in bad.stderr  # torchrun's own report only
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize("method", ["elip", "random"])
def test_pictures_of_what_is_kept_change_nothing_else(method, shards, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    more = ["--val-data", shards, "--token-reduction", method, "--epochs", "3", "--report-to", "tensorboard"]
    assert main(command(shards, tmp_path, *more, name="plain")) == 0
    assert main(command(shards, tmp_path, *more, "--visualize-frequency", "2", name="seen")) == 0
    plain, seen = (weights(tmp_path / name / "checkpoints" / "epoch_3.pt") for name in ("plain", "seen"))
    assert_equal_weights(plain, seen)
    events = EventAccumulator(str(tmp_path / "seen" / "tensorboard")).Reload()
    pictures = events.Images("kept")
    assert [picture.step for picture in pictures] == [8, 12]
    assert pictures[0].width > 200 and pictures[0].height > 500


def test_pictures_need_token_reduction(shards, tmp_path, capsys):
    more = ["--val-data", shards, "--report-to", "tensorboard", "--visualize-frequency", "1"]
    assert main(command(shards, tmp_path, *more, model="Tiny")) == 2
    assert "--visualize-frequency needs a model with token reduction" in capsys.readouterr().err
