"""Options, config files and their checks; compatibility is tested against the installed `open_clip_train.params`."""

import argparse
import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from open_clip_train import params as openclip

from training.errors import UserError
from training.options import Section, TrainingOptions, option, parse, resolved
from training.options.model import reduction_of
from training.retrieval import RetrievalOptions
from training.tasks.classification import FinetuningOptions
from training.tasks.contrastive import PretrainingOptions
from training.zero_shot import ZeroShotOptions

DOCS = Path(__file__).parents[3] / "docs" / "flags.md"
SYNTHETIC = ["--dataset-type", "synthetic"]  # the shortest command line that has something to do
COCA_WEIGHTS = {"coca_caption_loss_weight", "coca_contrastive_loss_weight"}
REFUSED = {"horovod", "use_bnb_linear", "torchscript", "trace"} | COCA_WEIGHTS
CHANGED = {"local_loss": True, "gather_with_grad": True}
NEW_DEFAULTS = dict.fromkeys(
    [
        "token_reduction", "full_tokens_last", "global_batch", "zeroshot_data", "progress", "duration", "layer_decay",
        "ema_decay", "save_every_n_steps", "save_every_n_minutes", "keep_last",
    ]
) | {
    "nonfinite": "stop", "allow_elastic": False, "fsdp": False, "stall_seconds": 60.0, "shortcuts": True,
    "image_decode": "fast",
}  # fmt: skip
NEW = set(NEW_DEFAULTS)

# Each OpenCLIP option that is carried over, with a value that is not its default.
FULL_COMMAND = [
    *("--train-data", "a/{00..12}.tar::b/{00..03}.tar", "--train-data-upsampling-factors", "1::0.5"),
    *("--val-data", "v.tar", "--train-num-samples", "1000", "--val-num-samples", "100"),
    *("--dataset-type", "webdataset", "--dataset-resampled", "--csv-separator", ",", "--csv-img-key", "image"),
    *("--csv-caption-key", "caption", "--imagenet-val", "in/val", "--imagenet-v2", "in/v2", "--cache-dir", "cache"),
    *("--logs", "runs", "--log-local", "--name", "first", "--workers", "2", "--batch-size", "440", "--epochs", "30"),
    *("--epochs-cooldown", "3", "--lr", "1e-3", "--beta1", "0.85", "--beta2", "0.95", "--eps", "1e-7", "--wd", "0.1"),
    *("--momentum", "0.8", "--warmup", "2000", "--opt", "timm/lamb", "--use-bn-sync", "--skip-scheduler"),
    *("--lr-scheduler", "const-cooldown", "--lr-cooldown-end", "1e-6", "--lr-cooldown-power", "2"),
    *("--save-frequency", "5", "--save-most-recent", "--zeroshot-frequency", "3", "--val-frequency", "4"),
    *("--resume", "latest", "--precision", "amp_bf16", "--model", "ViT-B-16", "--pretrained", "openai"),
    *("--pretrained-image", "--lock-image", "--lock-image-unlocked-groups", "2", "--lock-image-freeze-bn-stats"),
    *("--image-mean", "0.5", "0.4", "0.3", "--image-std", "0.2", "0.2", "0.1", "--image-interpolation", "bilinear"),
    *("--image-resize-mode", "squash", "--aug-cfg", "scale=(0.4,1.0)", "color_jitter=[0.1, 0.2]", "use_timm=True"),
    *("--grad-checkpointing", "--local-loss", "--gather-with-grad", "--force-context-length", "32"),
    *("--force-image-size", "224", "256", "--force-quick-gelu", "--force-patch-dropout", "0.5", "--force-custom-text"),
    *("--torchcompile", "--accum-freq", "2", "--device", "cpu", "--dist-url", "env://", "--dist-backend", "gloo"),
    *("--report-to", "wandb,tensorboard", "--wandb-notes", "n", "--wandb-project-name", "p", "--debug"),
    *("--copy-codebase", "--ddp-static-graph", "--no-set-device-rank", "--seed", "7", "--grad-clip-norm", "1.0"),
    *("--lock-text", "--lock-text-unlocked-layers", "1", "--lock-text-freeze-layer-norm", "--log-every-n-steps", "10"),
    *("--remote-sync", "s3://bucket", "--remote-sync-frequency", "60", "--remote-sync-protocol", "fsspec"),
    *("--delete-previous-checkpoint", "--siglip", "--loss-dist-impl", "gather"),
]


@pytest.fixture
def openclip_parser(monkeypatch) -> argparse.ArgumentParser:
    """The parser that OpenCLIP's parse_args builds and keeps to itself."""

    class Caught(Exception):
        pass

    def catch(parser, *_):
        raise Caught(parser)

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", catch)
        with pytest.raises(Caught) as caught:
            openclip.parse_args([])
    return caught.value.args[0]


@pytest.fixture
def config(tmp_path):
    """Writes a config file; returns the words that name it."""

    def write(text: str, name: str = "run.yaml") -> list[str]:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return ["--config", str(path)]

    return write


def parse_args(argv: list[str]) -> PretrainingOptions:
    return parse(PretrainingOptions, argv)


def complaint(argv: list[str], options: type[Section] = PretrainingOptions) -> str:
    with pytest.raises(UserError) as error:
        parse(options, argv)
    return str(error.value)


# --- compatibility with OpenCLIP ---


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
    assert {name: ours[name] for name in theirs if name not in REFUSED} == {
        name: value for name, value in theirs.items() if name not in REFUSED
    }
    left_out = {a.dest for a in openclip_parser._actions if not set(a.option_strings) & set(FULL_COMMAND)}
    assert left_out == {"help", "distill_model", "distill_pretrained"} | REFUSED
    args = parse_args([*SYNTHETIC, "--distill-model", "ViT-L-14", "--distill-pretrained", "openai"])
    assert (args.distill_model, args.distill_pretrained) == ("ViT-L-14", "openai")


def test_command_line_of_the_paper():
    assert parse_args(SYNTHETIC).model == "RN50"
    args = parse_args(
        "--train-data cc3m/{00000..00331}.tar::cc12m/{00000..01242}.tar --dataset-type webdataset --train-num-samples "
        "2800000 --batch-size 440 --lr 1e-3 --wd 0.1 --epochs 32 --model ViT-S-16-ELIP".split()
    )
    assert (args.train_data, args.train_num_samples) == ("cc3m/{00000..00331}.tar::cc12m/{00000..01242}.tar", 2800000)
    assert (args.batch_size, args.lr, args.wd, args.epochs, args.warmup) == (440, 1e-3, 0.1, 32, 10000)
    assert (args.model, args.beta1, args.beta2, args.eps) == ("ViT-S-16-ELIP", 0.9, 0.98, 1e-6)
    assert args.token_reduction is None


@pytest.mark.parametrize(
    "words, expected",
    [
        (["scale=[0.4, 1.0]", "re_prob=0.1"], {"scale": [0.4, 1.0], "re_prob": 0.1}),
        (["use_timm=True", "color_jitter=None"], {"use_timm": True, "color_jitter": None}),
        (["ratio=word", "scale=a=b"], {"ratio": "word", "scale": "a=b"}),
        (["ratio=[0.4,", "scale=", "re_count='1'"], {"ratio": "[0.4,", "scale": "", "re_count": "1"}),
        ([], {}),
    ],
)
def test_aug_cfg(words, expected):
    assert parse_args([*SYNTHETIC, "--aug-cfg", *words]).aug_cfg == expected


def test_last_aug_cfg_wins_as_a_whole():
    argv = [*SYNTHETIC, "--aug-cfg", "re_prob=0.1", "--aug-cfg", "re_count=2"]
    assert parse_args(argv).aug_cfg == openclip.parse_args(argv).aug_cfg == {"re_count": 2}


# --- switches, new flags ---


def test_every_openclip_switch_can_be_turned_off(openclip_parser):
    switches = {a.option_strings[0] for a in openclip_parser._actions if a.nargs == 0 and a.dest not in REFUSED}
    switches -= {"-h", "--no-set-device-rank"}
    assert len(switches) > 20
    for flag in switches:
        off = "--no-" + flag.removeprefix("--")
        dest = flag.removeprefix("--").replace("-", "_")
        assert vars(parse_args([*SYNTHETIC, flag, off]))[dest] is False
        assert vars(parse_args([*SYNTHETIC, off, flag]))[dest] is True


def test_flag_that_starts_with_no_has_no_second_form():
    assert parse_args([*SYNTHETIC, "--no-set-device-rank"]).no_set_device_rank is True
    assert complaint([*SYNTHETIC, "--no-no-set-device-rank"]) == (
        "Unknown option --no-no-set-device-rank; did you mean --no-set-device-rank?"
    )


@pytest.mark.parametrize(
    "words, expected",
    [
        ([], None),
        (["elip"], {"method": "elip"}),
        (["none"], {"method": "none"}),
        (["lam=0"], {"lam": 0}),
        (["tome", "r=8", "prop_attn=false"], {"method": "tome", "r": 8, "prop_attn": False}),
        (["keep_ratio=1,.9,.65,.4"], {"keep_ratio": [1, 0.9, 0.65, 0.4]}),
        (["keep_count=[9, 4]", "text_scale=none"], {"keep_count": [9, 4], "text_scale": "none"}),
    ],
)
def test_token_reduction(words, expected, config):
    """The same on the command line, and as a text, a list of words or a mapping in a file; and back from there."""
    argv = [*SYNTHETIC, *(["--token-reduction", *words] if words else [])]
    assert parse_args(argv).token_reduction == expected
    forms = [words, expected] + [" ".join(words)] * (" " not in "".join(words))
    for form in forms if words else ():
        file = config(yaml.safe_dump({"dataset-type": "synthetic", "token-reduction": form}))
        assert parse_args(file).token_reduction == expected
    assert parse_args(config(yaml.safe_dump(resolved(parse_args(argv))))).token_reduction == expected


@pytest.mark.parametrize(
    "words, instead",
    [
        (["--lam", "0.5"], "lam=0.5"),
        (["--no-merge"], "merge=false"),
        (["--prop-attn"], "prop_attn=true"),
        (["--keep-ratio", "1", ".5"], "keep_ratio=1,.5"),
        (["--stage-depths=2"], "depths=2"),
        (["--reduce-layers", "4", "7"], "layers=4,7"),
        (["--merge-per-layer", "8"], "r=8"),
    ],
)
@pytest.mark.parametrize("options", [PretrainingOptions, FinetuningOptions])
def test_what_token_reduction_took_over_says_its_new_spelling(options, words, instead):
    flag = words[0].partition("=")[0]
    assert complaint(words, options) == f"{flag} is written --token-reduction [METHOD] {instead} now."


@pytest.mark.parametrize(
    "config, expected",
    [
        ({}, None),
        ({"token_reduction": "none", "lam": 0.5}, {"method": "none"}),
        ({"token_reduction": "evit", "keep_rate": 0.5, "reduce_layers": [2], "lam": None},
         {"method": "evit", "keep_rate": 0.5, "layers": [2]}),
        ({"merge": False}, {"merge": False}),
        ({"token_reduction": {"lam": 0.5}, "model": "x"}, {"lam": 0.5}),
    ],
)  # fmt: skip
def test_token_reduction_of_runs_of_earlier_versions(config, expected):
    assert reduction_of(config) == expected


def test_config_of_a_run_of_an_earlier_version(config):
    """Its settings of token reduction that were not given do no harm; one that was given says its new spelling."""
    assert parse_args(config("val-data: v\nlam: null\nstage_depths:\ntoken_reduction: elip\n")).val_data == "v"
    file = config("val-data: v\nkeep_ratio: [1.0, 0.5]\n")
    assert complaint(file).endswith("--keep-ratio is written --token-reduction [METHOD] keep_ratio=1.0,0.5 now.")
    assert "--no-merge is written --token-reduction [METHOD] merge=false now." in complaint(config("merge: false"))


# --- commands ---


def test_a_section_alone_is_enough_for_a_part_of_the_trainer():
    options = TrainingOptions(batch_size=8, lr=1e-2)
    assert (options.batch_size, options.lr, options.beta1, options.beta2, options.eps) == (8, 1e-2, 0.9, 0.999, 1e-8)
    assert options.seed == 0 and TrainingOptions().batch_size == 64


def test_finetuning_has_its_own_defaults(capsys):
    args = parse(FinetuningOptions, ["--data", "x", "--model", "ViT-B-16", "--pretrained", "y"])
    assert (args.lr, args.beta1, args.beta2, args.eps, args.wd) == (1e-3, 0.9, 0.999, 1e-8, 0.1)
    assert (args.epochs, args.warmup, args.batch_size, args.force_patch_dropout) == (10, "1ep", 64, 0.0)
    with pytest.raises(SystemExit):
        parse(FinetuningOptions, ["--help"], about="Fine-tunes.")
    page = " ".join(capsys.readouterr().out.split())
    for text in ("Fine-tunes.", "Without it: 1e-3", "Without it: 0.999.", "Without it: 1e-8.", "Default: 10."):
        assert text in page
    assert "5e-4" not in page and "--siglip" not in page and "optimisation:" in page


@pytest.mark.parametrize(
    "options, words, sentence",
    [
        (FinetuningOptions, ["--siglip"], "--siglip is an option of training.main (loss), not of training.finetune."),
        (FinetuningOptions, ["--no-lock-image"],
         "--no-lock-image is an option of training.main (locked towers), not of training.finetune."),
        (PretrainingOptions, ["--mixup", "1"],
         "--mixup is an option of training.finetune (augmentation), not of training.main."),
        (PretrainingOptions, ["--templates=simple"],
         "--templates is an option of training.zero_shot (classes and prompts), not of training.main."),
        (ZeroShotOptions, ["--spilt", "val"], "Unknown option --spilt; did you mean --split?"),
    ],
)  # fmt: skip
def test_an_option_of_another_command_says_where_it_belongs(options, words, sentence):
    assert complaint(words, options) == sentence


def test_evaluation_commands_read_files_too(config, monkeypatch):
    monkeypatch.setenv("DATA", "/data")
    text = "data: [imagenet=$DATA/in, cifar10=$DATA]\ndevice: cpu\ncompile: true\nclassnames: $DATA/names.txt\n"
    args = parse(ZeroShotOptions, [*config(text), "--batch-size", "8"])
    assert (args.data, args.device, args.batch_size) == (["imagenet=/data/in", "cifar10=/data"], "cpu", 8)
    assert args.torchcompile is True and args.classnames == Path("/data/names.txt") and args.split == "test"
    assert parse(ZeroShotOptions, config(yaml.safe_dump(resolved(args)))) == args
    for words, expected in ((["--torchcompile"], True), (["--compile"], True), (["--compile", "--no-compile"], False)):
        assert parse(ZeroShotOptions, ["--data", "x", *words]).torchcompile is expected
    assert complaint([], RetrievalOptions).startswith("--data is missing")


def test_the_batch_of_a_process():
    assert parse_args(SYNTHETIC).batch_size == 64
    args = parse_args([*SYNTHETIC, "--global-batch", "1024", "--accum-freq", "2"])
    args.divide_global_batch(8)
    assert args.batch_size == 64
    args = parse_args([*SYNTHETIC, "--global-batch", "1024", "--batch-size", "6"])
    args.divide_global_batch(8)
    assert args.batch_size == 6
    for world_size, accum_freq in ((3, 1), (1024, 2)):
        args = parse_args([*SYNTHETIC, "--global-batch", "1024", "--accum-freq", str(accum_freq)])
        with pytest.raises(UserError, match="The global batch of 1024 cannot be divided by"):
            args.divide_global_batch(world_size)


def test_checks_of_all_sections_run_and_defaults_can_be_declared_again():
    ran = []

    @dataclass
    class One(Section, title="one"):
        number: int = option(1, "A number.")

        def check(self):
            ran.append("one")

    @dataclass
    class Both(One, title="two"):
        number: int = 2
        many: list[str] = option([], "Many.", nargs="+")

        def check(self):
            ran.append("both")

    assert parse(Both, []) == Both(2, []) and ran == ["both", "one"]
    assert parse(Both, [], given={"many": ["a"]}) == Both(2, ["a"]) and Both().many is not Both().many


def test_progress_is_undecided_unless_given_and_reports_are_named():
    progress = [parse_args([*SYNTHETIC, *words]).progress for words in ([], ["--progress"], ["--no-progress"])]
    assert progress == [None, True, False]
    assert parse_args([*SYNTHETIC, "--report-to", "csv, wandb"]).report_to == "csv,wandb"
    assert parse_args([*SYNTHETIC, "--report-to", "all"]).report_to == "all"


# --- refusals ---


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--horovod"], "--horovod is not supported: start several processes with torchrun instead."),
        (["--use-bnb-linear", "SwitchBackLinearGlobal"],
         "--use-bnb-linear is not supported: use --precision amp_bf16 to save time and memory instead."),
        (["--torchscript"], "--torchscript is not supported: use --torchcompile instead."),
        (["--trace"], "--trace is not supported: use --torchcompile instead."),
        (["--coca-caption-loss-weight", "2.0"],
         "--coca-caption-loss-weight belongs to CoCa models, which this trainer does not train: leave it out."),
        (["--coca-contrastive-loss-weight=0"],
         "--coca-contrastive-loss-weight belongs to CoCa models, which this trainer does not train: leave it out."),
        (["--model", "coca_ViT-B-32"],
         "--model coca_ViT-B-32 is a CoCa model: this trainer trains contrastive models only, choose one."),
        (["--distill-model", "hf-hub:laion/CoCa-ViT-B-32", "--distill-pretrained", "x"],
         "--distill-model hf-hub:laion/CoCa-ViT-B-32 is a CoCa model: this trainer trains contrastive models only, "
         "choose one."),
        (["--batchsize", "64"], "Unknown option --batchsize; did you mean --batch-size?"),
        (["--batch", "64"], "Unknown option --batch; did you mean --batch-size?"),
        (["--no-localloss"], "Unknown option --no-localloss; did you mean --no-local-loss?"),
        (["--konfig", "x"], "Unknown option --konfig; did you mean --config?"),
        (["--qqqq"], "Unknown option --qqqq; --help lists all options."),
        (["stray"], "Unexpected word 'stray' on the command line: every option starts with --."),
        (["--batch-size", "0"], "--batch-size must be a whole number of at least 1, not '0'."),
        (["--batch-size"], "--batch-size needs a value."),
        (["--image-mean"], "--image-mean needs at least one value."),
        (["--token-reduction", "tome", "8"], "--token-reduction must be given as key=value, not '8'."),
        (["--local-loss=true"], "--local-loss takes no value, but was given 'true'."),
        (["--epochs", "-1"], "--epochs must be a whole number of at least 0, not '-1'."),
        (["--warmup", "-5"], "--warmup must be a length like 500, 2ep, 1e6samples or 5%, not '-5'."),
        (["--duration", "5%"], "--duration is the whole run: give it in steps, epochs (ep) or samples, not in %."),
        (["--seed", "4294967296"], "--seed must be a whole number from 0 to 2**32 - 1, not '4294967296'."),
        (["--lr", "0"], "--lr must be a number above 0, not '0'."),
        (["--wd", "inf"], "--wd must be a number of at least 0, not 'inf'."),
        (["--beta2", "1"], "--beta2 must be a number from 0 to 1, below 1, not '1'."),
        (["--layer-decay", "0"], "--layer-decay must be a number from 0 to 1, above 0, not '0'."),
        (["--image-std", "0"], "--image-std must be a number above 0, not '0'."),
        (["--image-mean", "0", "0"], "--image-mean takes one number, or three (red, green, blue)."),
        (["--image-std", "1", "1"], "--image-std takes one number, or three (red, green, blue)."),
        (["--force-image-size", "3", "3", "3"], "--force-image-size takes one number, or two (height, width)."),
        (["--lr-scheduler", "step"], "--lr-scheduler must be one of cosine, const, const-cooldown, not 'step'."),
        (["--precision", "fp8"],
         "--precision must be one of amp, amp_bf16, amp_bfloat16, bf16, fp16, pure_bf16, pure_fp16, fp32, "
         "not 'fp8'."),
        (["--report-to", "csv,mail"], "--report-to must name wandb, tensorboard, csv or all, not 'mail'."),
        (["--opt", "sgd"], "--opt must be adamw, or timm/NAME for an optimizer of timm, not 'sgd'."),
        (["--aug-cfg", "scale"], "--aug-cfg must be given as key=value, not 'scale'."),
        (["--aug-cfg", "scales=1"],
         "--aug-cfg has no setting 'scales': it knows scale, ratio, color_jitter, re_prob, re_count, use_timm, "
         "color_jitter_prob, gray_scale_prob."),
        (["--lr-scheduler", "const-cooldown"],
         "--lr-scheduler const-cooldown needs --epochs-cooldown, the number of epochs at the end to cool down in."),
        (["--lr-scheduler", "const-cooldown", "--epochs", "3", "--epochs-cooldown", "4"],
         "--epochs-cooldown 4 is more than --epochs 3: lower it."),
        (["--opt", "timm/lamb", "--lr", "1", "--beta1", "0.9"],
         "--opt timm/lamb needs both --beta1 and --beta2, or neither."),
        (["--opt", "timm/lamb"], "--opt timm/lamb has no default learning rate to schedule: give --lr."),
        (["--distill-model", "ViT-B-16"],
         "--distill-model and --distill-pretrained belong together: give both, or neither."),
        (["--distill-pretrained", "openai"],
         "--distill-model and --distill-pretrained belong together: give both, or neither."),
        (["--distill-model", "ViT-B-16", "--distill-pretrained", "openai", "--accum-freq", "2"],
         "--distill-model cannot be used with --accum-freq: leave one out."),
        (["--distill-model", "ViT-B-16", "--distill-pretrained", "openai", "--siglip"],
         "--distill-model needs the softmax loss: leave out --siglip."),
    ],
)  # fmt: skip
def test_bad_options_are_one_sentence(words, sentence):
    assert complaint([*SYNTHETIC, *words]) == sentence


def test_values_at_the_edge_are_taken():
    local = "local-dir:/home/coca/vit"  # a folder may be called anything
    assert parse_args([*SYNTHETIC, "--model", local]).model == local
    words = "--epochs 0 --workers 0 --warmup 0 --beta1 0 --layer-decay 1 --save-frequency 0 --val-frequency 0"
    assert parse_args([*SYNTHETIC, *words.split(), "--seed", str(2**32 - 1)]).seed == 2**32 - 1
    args = parse_args([*SYNTHETIC, "--lr-scheduler", "const-cooldown", "--epochs", "3", "--epochs-cooldown", "3"])
    assert args.epochs_cooldown == 3
    assert parse_args([*SYNTHETIC, "--opt", "timm/lamb", "--skip-scheduler"]).lr is None
    assert parse_args(["--val-data", "v.tar", "--opt", "timm/lamb"]).lr is None


def test_something_has_to_be_asked_for():
    assert complaint([]) == (
        "There is nothing to do: give --train-data to train, or --val-data, --zeroshot-data or --imagenet-val to "
        "evaluate."
    )
    for flag in ("--train-data", "--val-data", "--zeroshot-data", "--imagenet-val", "--imagenet-v2"):
        assert vars(parse_args([flag, "x"]))[flag.removeprefix("--").replace("-", "_")] == "x"


@pytest.mark.parametrize(
    "words, factors, sentence",
    [
        (["--train-data", "a::b"], "1::2", "--train-data-upsampling-factors needs --dataset-resampled."),
        (["--train-data", "a::b::c", "--dataset-resampled"], "1::2",
         "--train-data-upsampling-factors has 2 factor(s) for 3 source(s) in --train-data: give one for each."),
        ([*SYNTHETIC, "--dataset-resampled"], "1::2",
         "--train-data-upsampling-factors has 2 factor(s) for 0 source(s) in --train-data: give one for each."),
        *((["--train-data", "a::b", "--dataset-resampled"], f"1::{wrong}",
           f"Every one of --train-data-upsampling-factors must be a number of at least 0, not {wrong!r}.")
          for wrong in ("-1", "nan", "two", "")),
        (["--train-data", "a::b", "--dataset-resampled"], "0::0",
         "--train-data-upsampling-factors must not all be 0."),
    ],
)  # fmt: skip
def test_upsampling_factors_need_resampling_and_a_number_for_each_source(words, factors, sentence):
    assert complaint([*words, "--train-data-upsampling-factors", factors]) == sentence


# --- help and documentation ---


def test_help_is_grouped_and_complete(capsys, openclip_parser):
    with pytest.raises(SystemExit) as exit_:
        parse_args(["--help"])
    assert exit_.value.code == 0
    page = capsys.readouterr().out
    for title in ("training data:", "model:", "token reduction", "optimisation:", "logging:", "several processes"):
        assert re.search(f"^{re.escape(title)}", page, re.MULTILINE), title
    shown = set(re.findall(r"--[a-z][\w-]*", page))
    theirs = {flag for action in openclip_parser._actions for flag in action.option_strings if flag != "-h"}
    hidden = {"--" + dest.replace("_", "-") for dest in REFUSED}
    assert theirs - hidden <= shown
    assert {"--" + dest.replace("_", "-") for dest in NEW} | {"--config", "--no-local-loss"} <= shown
    assert not hidden & shown


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
    assert (args.model, args.resume, args.epochs, args.batch_size) == ("ViT-S-16-ELIP", None, 3, 440)
    assert args.aug_cfg == {"scale": [0.4, 1.0], "use_timm": True}
    assert args.token_reduction == {"merge": False, "keep_ratio": [1.0, 0.9, 0.65, 0.4]}


# --- config files ---


def test_config_values_become_options(config):
    text = """
        dataset-type: synthetic
        batch_size: 32
        lr: 1e-3
        wd: 0
        name: 2024_01_01
        wandb-notes: "true"
        report_to: [csv, wandb]
        siglip: true
        local_loss: false
        gather-with-grad: off
        no-set-device-rank: false
        torchcompile: yes
        progress:
        image_mean: [0.5, 0.5, -0.5]
        force-image-size: 96
        device: ''
        csv-separator: "\\t"
    """
    args = parse_args(config(text))
    assert (args.batch_size, args.lr, args.wd, args.name, args.wandb_notes) == (32, 1e-3, 0.0, "2024_01_01", "true")
    assert (args.report_to, args.siglip, args.local_loss, args.gather_with_grad) == ("csv,wandb", True, False, False)
    assert (args.no_set_device_rank, args.torchcompile, args.progress) == (False, True, None)
    assert (args.image_mean, args.force_image_size) == ([0.5, 0.5, -0.5], [96])
    assert (args.device, args.csv_separator) == ("", "\t")
    assert not hasattr(args, "config")


def test_config_is_the_same_as_the_flags(config):
    text = "train-data: [a.tar, b.tar]\nval_data: c.tar\nno-set-device-rank: true\ndebug: on\n"
    text += "force_image_size: [9, 4]\n"
    flags = "--train-data a.tar::b.tar --val-data c.tar --no-set-device-rank --debug --force-image-size 9 4".split()
    assert parse_args(config(text)) == parse_args(flags)


def test_flags_win_wherever_they_stand(config):
    file = config("dataset-type: synthetic\nepochs: 3\nsiglip: true\nimage_mean: [0.1, 0.2, 0.3]\nlogs: a\n")
    flags = ["--epochs", "5", "--no-siglip", "--image-mean", "0.5"]
    for argv in ([*file, *flags], [*flags, *file]):
        args = parse_args(argv)
        assert (args.epochs, args.siglip, args.image_mean, args.logs) == (5, False, [0.5], "a")


def test_aug_cfg_in_a_config(config):
    text = """
        dataset-type: synthetic
        aug-cfg:
          scale: (0.4, 1.0)
          color_jitter: [0.4, '0.3', 1e-1]
          use_timm: true
          re_prob: null
          ratio: "'1'"
          re_count: pixel
    """
    expected = {
        "scale": (0.4, 1.0),
        "color_jitter": [0.4, 0.3, 0.1],
        "use_timm": True,
        "re_prob": None,
        "ratio": "1",
        "re_count": "pixel",
    }
    assert parse_args(config(text)).aug_cfg == expected
    assert parse_args([*config(text), "--aug-cfg", "re_prob=0.5"]).aug_cfg == {"re_prob": 0.5}
    assert parse_args([*config(text), "--aug-cfg"]).aug_cfg == {}


def test_paths_in_a_config_are_expanded(config, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("DATA", "/data")
    text = """
        train-data: $DATA/a/{0..3}.tar::~/b.tar::$~/c.tar
        val-data: ${DATA}_old/x$$DATA/$1.tar
        logs: ~/runs
        name: $DATA
        wandb-notes: ~/not a path
    """
    args = parse_args(config(text))
    assert args.train_data == "/data/a/{0..3}.tar::/home/me/b.tar::~/c.tar"
    assert (args.val_data, args.logs) == ("/data_old/x$DATA/$1.tar", "/home/me/runs")
    assert (args.name, args.wandb_notes) == ("$DATA", "~/not a path")
    assert parse_args(["--val-data", "$DATA", "--logs=~/x"]).val_data == "$DATA"  # the command line has its shell


def test_includes(config, monkeypatch, tmp_path):
    monkeypatch.setenv("RECIPES", str(tmp_path / "base"))
    config("epochs: 1\nlogs: one\nname: one\nresume: latest\n", "base/one.yaml")
    config("include: $RECIPES/one.yaml\nlogs: two\n", "base/two.yaml")
    config("name: three\n", "three.yaml")
    main = config("name: null\nresume: null\nbatch-size: 8\ninclude: [base/two.yaml, three.yaml]\nval-data: v\n")
    args = parse_args(main)
    assert (args.epochs, args.logs, args.batch_size) == (1, "two", 8)
    assert (args.name, args.resume) == (None, None)


def test_a_file_may_be_included_twice_but_not_by_itself(config, tmp_path):
    config("epochs: 4\nval-data: v\n", "base.yaml")
    config("include: base.yaml\n", "left.yaml")
    config("include: base.yaml\n", "right.yaml")
    assert parse_args(config("include: [left.yaml, right.yaml]\n")).epochs == 4
    config("include: run.yaml\n", "left.yaml")
    assert complaint(config("include: left.yaml\n")) == (
        f"The config files include each other in a circle: {tmp_path}/left.yaml includes {tmp_path}/run.yaml again."
    )


def test_of_several_configs_the_later_one_wins(config):
    first = config("dataset-type: synthetic\nepochs: 1\nsiglip: true\n", "a.yaml")
    args = parse_args([*first, *config("epochs: 2\nsiglip: false\n", "b.yaml")])
    assert (args.epochs, args.siglip) == (2, False)


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("mixup: 0.5", "--mixup in {file} is an option of training.finetune (augmentation), not of training.main."),
        ("batchsize: 3", "Unknown option batchsize in {file}; did you mean batch_size?"),
        ("no-siglip: true", "Unknown option no-siglip in {file}; did you mean siglip?"),
        ("config: a.yaml", "Unknown option config in {file}; --help lists all options."),
        ("7: 3", "Unknown option 7 in {file}; --help lists all options."),
        ("batch-size: 0", "{file}: --batch-size must be a whole number of at least 1, not '0'."),
        ("batch-size: 1.0", "{file}: --batch-size must be a whole number of at least 1, not '1.0'."),
        ("siglip: 2", "{file}: siglip must be true or false, not '2'."),
        ("siglip: [true]", "{file}: siglip must be true or false, not [True]."),
        ("name: true",
         "{file}: name cannot be True: it takes a single value (true, false and null need quotes where they are "
         "text)."),
        ("train-data: {a: b}", "{file}: train_data cannot be {'a': 'b'}: it takes a value or a list of values."),
        ("image-std: [1, null]", "{file}: image_std cannot be None: it takes a value or a list of values."),
        ("image-std: []", "{file}: --image-std needs at least one value."),
        ("aug-cfg: scale", "{file}: --aug-cfg must be given as key=value, not 'scale'."),
        ("horovod: true", "{file}: --horovod is not supported: start several processes with torchrun instead."),
        ("coca-caption-loss-weight: 2.0",
         "{file}: --coca-caption-loss-weight belongs to CoCa models, which this trainer does not train: leave it "
         "out."),
        ("logs: $UNSET_VARIABLE/x",
         "{file}: '$UNSET_VARIABLE/x' uses the variable UNSET_VARIABLE, which is not set: export it (a plain $ is "
         "written $$)."),
        ("include: {a: b}", "{file}: include must be a file name or a list of file names."),
        ("include: $UNSET_VARIABLE", "{file}: '$UNSET_VARIABLE' uses the variable UNSET_VARIABLE, which is not set: "
         "export it (a plain $ is written $$)."),
        ("include: gone.yaml", "Cannot read the config file {folder}/gone.yaml: No such file or directory."),
        ("- epochs", "The config file {file} must be a mapping of options to values (batch-size: 64)."),
        ("epochs: 1\nb: c: d", "The config file {file} is not valid in line 2: mapping values are not allowed here."),
        ("batch-size: 1\nbatch_size: 2", "The config file {file} is not valid in line 2: batch_size is given twice."),
        ("[a]: 1", "The config file {file} is not valid in line 1: found unhashable key."),
        ("a: \x07", "The config file {file} is not valid: special characters are not allowed."),
    ],
)  # fmt: skip
def test_bad_config_is_one_sentence(config, tmp_path, monkeypatch, text, sentence):
    monkeypatch.delenv("UNSET_VARIABLE", raising=False)
    words = config(text)
    sentence = sentence.replace("{file}", words[1]).replace("{folder}", str(tmp_path))
    assert complaint([*SYNTHETIC, *words]) == sentence


def test_config_that_cannot_be_read(tmp_path):
    assert complaint([*SYNTHETIC, "--config"]) == "--config needs a value."
    assert complaint(["--config", str(tmp_path)]) == f"Cannot read the config file {tmp_path}: Is a directory."
    (tmp_path / "latin.yaml").write_bytes(b"name: \xe9")
    assert complaint(["--config", f"{tmp_path}/latin.yaml"]) == (
        f"Cannot read the config file {tmp_path}/latin.yaml: it is not UTF-8 text."
    )


def test_mistake_on_the_command_line_is_not_blamed_on_the_config(config):
    assert complaint([*config("dataset-type: synthetic"), "--lr", "0"]) == "--lr must be a number above 0, not '0'."


def test_empty_config_and_unused_refused_flags_change_nothing(config):
    expected = parse_args(SYNTHETIC)
    assert parse_args([*SYNTHETIC, *config("# nothing\n")]) == expected
    assert parse_args([*SYNTHETIC, *config("horovod: false\nuse-bnb-linear: null\n", "b.yaml")]) == expected


# --- the resolved configuration ---


@pytest.mark.parametrize(
    "argv",
    [
        SYNTHETIC,
        FULL_COMMAND,
        [*SYNTHETIC, "--no-local-loss", "--no-gather-with-grad", "--token-reduction", "keep_ratio=0.3"],
        [*SYNTHETIC, "--lr", "1e-16", "--eps", "0", "--name", "2024_01", "--token-reduction", "elip", "keep_count=9,4"],
        [*SYNTHETIC, "--name", "true", "--wandb-notes", "null", "--csv-separator", "\t", "--model", "~", "--device="],
        [*SYNTHETIC, "--name=-x --y", "--wandb-notes", "a: b # c\n- d", "--csv-img-key", "1e3", "--dist-url", "no"],
        ["--train-data", "$A/~/{0..1}.tar::~/b$$.tar::~$~", "--logs=~", "--resume", "${B}", "--val-data=$~/x"],
        [*SYNTHETIC, "--aug-cfg", "scale=(0.4,(1,'2'))", "ratio=1", "re_prob=1e-9", "color_jitter=[(1,), 'x', '2']"],
        [*SYNTHETIC, "--aug-cfg", "scale='1'", "ratio=True", "re_prob=None", "re_count='None'", "use_timm={1: 'a'}"],
        [*SYNTHETIC, "--opt", "timm/lamb", "--lr", "1"],
    ],
)
def test_resolved_config_gives_the_same_options_back(argv, config):
    args = parse_args(argv)
    plain = resolved(args)
    assert parse_args(config(yaml.safe_dump(plain))) == args
    assert json.loads(json.dumps(plain)) == plain and set(plain) == set(vars(args))  # plain types, every option


def test_resolved_config_does_not_share_its_lists():
    args = parse_args([*SYNTHETIC, "--image-mean", "1", "--aug-cfg", "scale=[0.4, 1.0]"])
    plain = resolved(args)
    plain["image_mean"].append(0.1)
    plain["aug_cfg"]["scale"].append(0.1)
    assert (args.image_mean, args.aug_cfg) == ([1.0], {"scale": [0.4, 1.0]})
