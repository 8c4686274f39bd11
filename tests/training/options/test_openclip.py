"""Compatibility with the installed `open_clip_train.params`, the help page, and docs/flags.md."""
from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest
from open_clip_train import params as openclip

from training.options import parse
from training.options.finetune import FinetuningOptions

from .conftest import SYNTHETIC, parse_args

DOCS = Path(__file__).parents[3] / "docs" / "flags.md"
COCA_WEIGHTS = {"coca_caption_loss_weight", "coca_contrastive_loss_weight"}
REFUSED = {"horovod", "use_bnb_linear", "torchscript", "trace"} | COCA_WEIGHTS
CHANGED = {"local_loss": True, "gather_with_grad": True}
NEW_DEFAULTS = dict.fromkeys(
    "adapter adapter_rank "
    "token_reduction full_tokens_last global_batch zeroshot_data progress duration layer_decay ema_decay "
    "save_every_n_steps save_every_n_minutes keep_last val_rerank start_image start_text text_tokenizer "
    "image_root".split()
)
NEW_DEFAULTS |= {"allow_elastic": False, "fsdp": False, "shortcuts": True, "stall_seconds": 60.0}
NEW_DEFAULTS |= {"nonfinite": "stop", "image_decode": "fast", "shard_img_key": None, "shard_caption_key": "txt"}
NEW_DEFAULTS |= {"queue_size": 65536, "twin_momentum": 0.995, "twin_weight": 0.4, "twin_dropout": True}
NEW_DEFAULTS |= {"drop_path": 0.0, "visualize_frequency": 0}
NEW_DEFAULTS |= {"lr_start": 0.0, "lr_end": 0.0, "lr_decay": 0.9}
NEW_DEFAULTS |= {"whole_words": True, "own_images": True, "decay_norms": True}
NEW_DEFAULTS |= {"text_reduction": None, "text_keep": 0.6, "memory": None, "lr_base_batch": None}
NEW = set(NEW_DEFAULTS)

# Each OpenCLIP option that is carried over, with a value that is not its default.
FULL_COMMAND = """
    --train-data a/{00..12}.tar::b/{00..03}.tar --train-data-upsampling-factors 1::0.5 --val-data v.tar
    --train-num-samples 1000 --val-num-samples 100 --dataset-type webdataset --dataset-resampled --csv-separator ,
    --csv-img-key image --csv-caption-key caption --imagenet-val in/val --imagenet-v2 in/v2 --cache-dir cache
    --logs runs --log-local --name first --workers 2 --batch-size 440 --epochs 30 --epochs-cooldown 3 --lr 1e-3
    --beta1 0.85 --beta2 0.95 --eps 1e-7 --wd 0.1 --momentum 0.8 --warmup 2000 --opt timm/lamb --use-bn-sync
    --skip-scheduler --lr-scheduler const-cooldown --lr-cooldown-end 1e-6 --lr-cooldown-power 2 --save-frequency 5
    --save-most-recent --zeroshot-frequency 3 --val-frequency 4 --resume latest --precision amp_bf16 --model ViT-B-16
    --pretrained openai --pretrained-image --lock-image --lock-image-unlocked-groups 2 --lock-image-freeze-bn-stats
    --image-mean 0.5 0.4 0.3 --image-std 0.2 0.2 0.1 --image-interpolation bilinear --image-resize-mode squash
    --aug-cfg scale=[0.4,1.0] color_jitter=[0.1,0.2] use_timm=True --grad-checkpointing --local-loss --gather-with-grad
    --force-context-length 32 --force-image-size 224 256 --force-quick-gelu --force-patch-dropout 0.5
    --force-custom-text --torchcompile --accum-freq 2 --device cpu --dist-url env:// --dist-backend gloo
    --report-to wandb,tensorboard --wandb-notes n --wandb-project-name p --debug --copy-codebase --ddp-static-graph
    --no-set-device-rank --seed 7 --grad-clip-norm 1.0 --lock-text --lock-text-unlocked-layers 1
    --lock-text-freeze-layer-norm --log-every-n-steps 10 --remote-sync s3://bucket --remote-sync-frequency 60
    --remote-sync-protocol fsspec --delete-previous-checkpoint --siglip --loss-dist-impl gather
""".split()


@pytest.fixture
def openclip_parser(monkeypatch) -> argparse.ArgumentParser:
    """The parser that OpenCLIP's parse_args builds and keeps to itself."""

    def catch(parser, *_):
        raise LookupError(parser)

    with monkeypatch.context() as patch, pytest.raises(LookupError) as caught:
        patch.setattr(argparse.ArgumentParser, "parse_args", catch)
        openclip.parse_args([])
    return caught.value.args[0]


@pytest.mark.parametrize("model", ["RN50", "ViT-B-16", "ViT-S-16-ELIP", "hf-hub:someone/VIT"])
@pytest.mark.parametrize("optimizer", [[], ["--opt", "timm/lamb", "--lr", "0.1"], ["--lr", "1e-3", "--eps", "1e-5"]])
def test_defaults_are_openclips_but_for_the_listed_ones(model, optimizer):
    argv = [*SYNTHETIC, "--model", model, *optimizer]
    theirs, ours = vars(openclip.parse_args(argv)), vars(parse_args(argv))
    expected = {name: value for name, value in theirs.items() if name not in REFUSED} | CHANGED
    assert {name: value for name, value in ours.items() if name not in NEW} == expected
    assert {name: ours[name] for name in NEW} == NEW_DEFAULTS


def test_full_openclip_command_line_gives_openclips_values(openclip_parser):
    theirs, ours = vars(openclip.parse_args(FULL_COMMAND)), vars(parse_args(FULL_COMMAND))
    assert {name: ours.get(name) for name in theirs if name not in REFUSED}.items() <= theirs.items()
    left_out = {a.dest for a in openclip_parser._actions if not set(a.option_strings) & set(FULL_COMMAND)}
    assert left_out == {"help", "distill_model", "distill_pretrained"} | REFUSED


@pytest.mark.parametrize(
    "words",
    [
        ["--image-mean", "-0.5", "-.1", "-1", "--name", "a b"],  # what argparse takes for a value
        ["--image-mean=-0.5", "--name=-x --y", "--wandb-notes", "-x y", "--csv-separator", "-"],
        ["--siglip", "--lr=1", "--lr", "1e-3", "--aug-cfg", "re_prob=0.1", "--aug-cfg", "re_count=2"],  # the last wins
    ],
)
def test_words_are_taken_as_openclip_takes_them(words):
    theirs, ours = vars(openclip.parse_args([*SYNTHETIC, *words])), vars(parse_args([*SYNTHETIC, *words]))
    for name in ("image_mean", "name", "wandb_notes", "csv_separator", "siglip", "lr", "aug_cfg"):
        assert ours[name] == theirs[name]


def test_every_openclip_switch_can_be_turned_off(openclip_parser):
    switches = {a.option_strings[0] for a in openclip_parser._actions if a.nargs == 0 and a.dest not in REFUSED}
    switches -= {"-h", "--no-set-device-rank"}
    assert len(switches) > 20
    for flag in switches:
        off, dest = "--no-" + flag.removeprefix("--"), flag.removeprefix("--").replace("-", "_")
        assert vars(parse_args([*SYNTHETIC, flag, off]))[dest] is False
        assert vars(parse_args([*SYNTHETIC, off, flag]))[dest] is True
    assert parse_args([*SYNTHETIC, "--no-set-device-rank"]).no_set_device_rank is True


def test_help_is_grouped_and_complete(capsys, openclip_parser):
    with pytest.raises(SystemExit) as exit_:
        parse_args(["--help"])
    page = capsys.readouterr().out
    assert exit_.value.code == 0 and re.search("^optimisation:", page, re.MULTILINE)
    shown = set(re.findall(r"--[a-z][\w-]*", page))
    theirs = {flag for action in openclip_parser._actions for flag in action.option_strings if flag != "-h"}
    hidden = {"--" + dest.replace("_", "-") for dest in REFUSED}
    new = {"--" + dest.replace("_", "-") for dest in NEW} | {"--config", "--no-local-loss"}
    assert (theirs - hidden) | new <= shown and not hidden & shown


def test_finetuning_has_its_own_defaults(capsys):
    args = parse(FinetuningOptions, ["--data", "x", "--model", "ViT-B-16", "--pretrained", "y"])
    assert (args.lr, args.beta1, args.beta2, args.eps, args.wd) == (1e-3, 0.9, 0.999, 1e-8, 0.1)
    assert (args.epochs, args.warmup, args.batch_size, args.force_patch_dropout) == (10, "1ep", 64, 0.0)
    with pytest.raises(SystemExit):
        parse(FinetuningOptions, ["--help"], about="Fine-tunes.")
    page = " ".join(capsys.readouterr().out.split())
    assert "Fine-tunes." in page and "Without it: 1e-3" in page and "Default: 10." in page and "5e-4" not in page


def test_docs_name_every_difference():
    page = DOCS.read_text(encoding="utf-8")
    for dest in NEW | REFUSED | set(CHANGED) | {"config"}:
        assert f"`--{dest.replace('_', '-')}" in page, dest


def test_example_in_the_docs_is_valid(config, monkeypatch):
    monkeypatch.setenv("DATA", "/data")
    monkeypatch.setenv("HOME", "/home/me")
    config("model: RN50\nresume: latest\nepochs: 3\n", "base.yaml")
    example = re.search("```yaml\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)[1]
    args = parse_args(config(example))
    assert args.train_data == "/data/cc3m/{00000..00331}.tar::/home/me/cc12m/{00000..01242}.tar"
    assert (args.model, args.resume, args.epochs, args.aug_cfg["use_timm"]) == ("ViT-S-16-ELIP", None, 3, True)
    assert args.token_reduction == {"merge": False, "keep_ratio": [1.0, 0.9, 0.65, 0.4]}
