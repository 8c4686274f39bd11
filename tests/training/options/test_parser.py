"""Sections, kinds and commands: what a command line says, and what it is refused for."""
from __future__ import annotations

from dataclasses import dataclass

import pytest
import yaml

from training.errors import UserError
from training.options import Section, TrainingOptions, option, parse, resolved
from training.options.finetune import FinetuningOptions
from training.options.linear_probe import ProbeOptions
from training.options.main import PretrainingOptions
from training.options.model import reduction_of
from training.options.retrieval import RetrievalOptions
from training.options.zero_shot import ZeroShotOptions

from .conftest import SYNTHETIC, complaint, parse_args


def test_aug_cfg():
    words = ["scale=(0.4, 1.0)", "re_prob=0.1", "use_timm=True", "color_jitter=None", "ratio=[0.4,", "re_count='1'"]
    expected = {"scale": [0.4, 1.0], "re_prob": 0.1, "use_timm": True, "color_jitter": None}
    assert parse_args([*SYNTHETIC, "--aug-cfg", *words]).aug_cfg == expected | {"ratio": "[0.4,", "re_count": "1"}
    assert parse_args([*SYNTHETIC, "--aug-cfg", "scale=a=b", "ratio="]).aug_cfg == {"scale": "a=b", "ratio": ""}
    assert parse_args([*SYNTHETIC, "--aug-cfg"]).aug_cfg == {}


@pytest.mark.parametrize(
    "words, expected",
    [
        ([], None),
        (["elip"], {"method": "elip"}),
        (["lam=0"], {"lam": 0}),
        (["tome", "r=8", "prop_attn=false"], {"method": "tome", "r": 8, "prop_attn": False}),
        (["keep_ratio=1,.9,.65,.4"], {"keep_ratio": [1, 0.9, 0.65, 0.4]}),
        (["method=[1]"], {"method": "[1]"}),
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
    "words, setting, instead",
    [
        ("--lam 0.5", "lam: 0.5", "lam=0.5"),
        ("--no-merge", "merge: false", "merge=false"),
        ("--prop-attn", "prop-attn: true", "prop_attn=true"),
        ("--keep-ratio 1 .5", "keep_ratio: [1, .5]", "keep_ratio=1,.5"),
        ("--stage-depths=2", "stage_depths: 2", "depths=2"),
        ("--reduce-layers 4 7", "reduce-layers: [4, 7]", "layers=4,7"),
        ("--merge-per-layer 8", "merge_per_layer: 8", "r=8"),
    ],
)
def test_what_token_reduction_took_over_says_its_new_spelling(config, words, setting, instead):
    for argv in (words.split(), config(setting)):
        assert complaint(argv).endswith(f" is written --token-reduction [METHOD] {instead} now.")
    assert complaint(words.split(), FinetuningOptions) == complaint(words.split())
    assert complaint(words.split()).startswith(words.replace("=", " ").split()[0])
    settings = {"token_reduction": "evit", "reduce_layers": [2], "lam": None}
    assert reduction_of(settings) == {"method": "evit", "layers": [2]}
    old = setting.partition(":")[0]  # where an earlier version's run has it without a value, it does no harm
    assert parse_args(config(f"val-data: v\n{old}: null\ntoken_reduction: elip\n")).val_data == "v"


def test_a_section_alone_is_enough_for_a_part_of_the_trainer():
    options = TrainingOptions(batch_size=8, lr=1e-2)
    assert (options.batch_size, options.lr, options.beta1, options.beta2, options.eps) == (8, 1e-2, 0.9, 0.999, 1e-8)
    assert options.seed == 0 and TrainingOptions().batch_size == 64


def test_checks_of_all_sections_run_and_defaults_can_be_declared_again(capsys):
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
    with pytest.raises(SystemExit):
        parse(Both, ["-h"])
    assert "one: --number TEXT A number. Default: 2. two: --many" in " ".join(capsys.readouterr().out.split())


def test_the_batch_of_a_process():
    for words, expected in (("", 64), ("--global-batch 1024", 64), ("--global-batch 8 --batch-size 6", 6)):
        args = parse_args([*SYNTHETIC, "--accum-freq", "2", *words.split()])
        args.divide_global_batch(8)
        assert args.batch_size == expected
    for batch in ("1000", "8"):
        args = parse_args([*SYNTHETIC, "--global-batch", batch])
        with pytest.raises(UserError, match=f"The global batch of {batch} cannot be divided by"):
            args.divide_global_batch(16)


def test_options_that_are_undecided_or_written_in_several_ways():
    for words, expected in (([], None), (["--progress"], True), (["--no-progress"], False)):
        assert parse_args([*SYNTHETIC, *words]).progress is expected
    for text, expected in (("csv, wandb", "csv,wandb"), ("all", "all"), ("", "")):
        assert parse_args([*SYNTHETIC, "--report-to", text]).report_to == expected
    for words, expected in ((["--torchcompile"], True), (["--compile"], True), (["--compile", "--no-compile"], False)):
        assert parse(ZeroShotOptions, ["--data", "x", *words]).torchcompile is expected


@pytest.mark.parametrize(
    "options, words, sentence",
    [
        (FinetuningOptions, "--siglip", "--siglip is an option of training.main (loss), not of training.finetune."),
        (FinetuningOptions, "--no-lock-image",
         "--no-lock-image is an option of training.main (locked towers), not of training.finetune."),
        (PretrainingOptions, "--templates=simple",
         "--templates is an option of training.zero_shot (classes and prompts), not of training.main."),
        (ZeroShotOptions, "--solver x", "Unknown option --solver; --help lists all options."),
        (PretrainingOptions, "--batch 64", "Unknown option --batch; did you mean --batch-size?"),
        (PretrainingOptions, "--no-localloss", "Unknown option --no-localloss; did you mean --no-local-loss?"),
        (PretrainingOptions, "--no-no-set-device-rank",
         "Unknown option --no-no-set-device-rank; did you mean --no-set-device-rank?"),
        (PretrainingOptions, "--konfig x", "Unknown option --konfig; did you mean --config?"),
        (PretrainingOptions, "stray", "Unexpected word 'stray' on the command line: every option starts with --."),
        (RetrievalOptions, "", "--data is missing: name the data, as in --data imagenet=/data/imagenet."),
        (PretrainingOptions, "", "There is nothing to do: give --train-data to train, or --val-data, --zeroshot-data "
         "or --imagenet-val to evaluate."),
    ],
)  # fmt: skip
def test_what_a_command_does_not_know_and_what_it_misses(options, words, sentence):
    assert complaint(words.split(), options) == sentence


TORCHCOMPILE = "is not supported: use --torchcompile instead."
COCA = "belongs to CoCa models, which this trainer does not train: leave it out."
COCA_MODEL = "is a CoCa model: this trainer trains contrastive models only, choose one."
FACTORS = "--train-data-upsampling-factors"
RESAMPLED = "--dataset-resampled --train-data a::b"
TEACHER = "ViT-B-16 --distill-pretrained openai"


@pytest.mark.parametrize(
    "words, problem",
    [
        ("--horovod", "is not supported: start several processes with torchrun instead."),
        ("--use-bnb-linear X", "is not supported: use --precision amp_bf16 to save time and memory instead."),
        ("--torchscript", TORCHCOMPILE),
        ("--trace", TORCHCOMPILE),
        ("--coca-caption-loss-weight 2.0", COCA),
        ("--coca-contrastive-loss-weight=0", COCA),
        ("--model coca_ViT-B-32", f"coca_ViT-B-32 {COCA_MODEL}"),
        ("--distill-model hf-hub:laion/CoCa-B --distill-pretrained x", f"hf-hub:laion/CoCa-B {COCA_MODEL}"),
        ("--batch-size --siglip", "needs a value."),
        ("--local-loss=true", "takes no value, but was given 'true'."),
        ("--batch-size 0", "must be a whole number from 1 to 10**15, or auto, not '0'."),
        ("--image-mean", "needs 1 or 3 values."),
        ("--token-reduction tome =8", "must be given as key=value, not '=8'."),
        ("--token-reduction tome elip", "takes one method, and settings as key=value, each once."),
        ("--epochs -1", "must be a whole number from 0 to 10**15, not '-1'."),
        ("--warmup -5", "must be a length like 500, 2ep, 1e6samples or 5%, not '-5'."),
        ("--duration 5%", "is the whole run: give it in steps, epochs (ep) or samples, not in %."),
        ("--seed 4294967296", "must be a whole number from 0 to 2**32 - 1, not '4294967296'."),
        ("--logs s3://b/x", "s3://b/x is no folder; --remote-sync copies a run to a URL."),
        ("--csv-separator=", "must be one character or more, not ''."),
        ("--force-context-length 2", "must be a whole number from 3 on, not '2'."),
        ("--eps 0", "must be a number above 0, not '0'."),
        ("--lr 0", "must be a number above 0, not '0'."),
        ("--image-std 1e-300", "must be a number above 0, not '1e-300'."),
        ("--wd 1e300", "must be a number of at least 0, not '1e300'."),
        (f"--train-num-samples {10**20}", f"must be a whole number from 1 to 10**15, not '{10**20}'."),
        ("--device meta", "must be cpu, cuda, mps, npu, xpu or hpu, with or without a number (cuda:1), not 'meta'."),
        ("--name a\0b", "must be plain text, not 'a\\x00b'."),
        ("--logs \udcff", "must be plain text, not '\\udcff'."),
        ("--image-mean nan", "must be a number, not 'nan'."),
        ("--beta2 1", "must be a number from 0 to 1, below 1, not '1'."),
        ("--layer-decay 0", "must be a number from 0 to 1, above 0, not '0'."),
        ("--lr-scheduler step",
         "must be one of cosine, const, const-cooldown, epoch-cosine, epoch-decay, linear, not 'step'."),
        ("--report-to csv,mail", "must be wandb, tensorboard, csv (joined with commas) or all, not 'csv,mail'."),
        ("--opt sgd", "must be adamw, or timm/NAME for an optimizer of timm, not 'sgd'."),
        ("--aug-cfg scale", "must be given as key=value, not 'scale'."),
        ("--lr-scheduler const-cooldown",
         "const-cooldown needs --epochs-cooldown, the number of epochs at the end to cool down in."),
        ("--epochs-cooldown 4 --epochs 3 --lr-scheduler const-cooldown", "4 is more than --epochs 3: lower it."),
        ("--opt timm/lamb --lr 1 --beta1 0.9", "timm/lamb needs both --beta1 and --beta2, or neither."),
        ("--opt timm/lamb", "timm/lamb has no default learning rate to schedule: give --lr."),
        ("--distill-model x", "and --distill-pretrained belong together: give both, or neither."),
        (f"--distill-model {TEACHER} --accum-freq 2", "cannot be used with --accum-freq: leave one out."),
        (f"--distill-model {TEACHER} --siglip", "needs the softmax loss: leave out --siglip."),
        (f"{FACTORS} 1::2 --train-data a::b", "needs --dataset-resampled."),
        (f"{FACTORS} 1::2::3 {RESAMPLED}", "has 3 factor(s) for 2 source(s) in --train-data: give one for each."),
        (f"{FACTORS} 1 --dataset-resampled", "has 1 factor(s) for 0 source(s) in --train-data: give one for each."),
        (f"{FACTORS} 0::0 {RESAMPLED}", "must not all be 0."),
        *((f"{FACTORS} 1::{wrong} {RESAMPLED}",
           f"must be a number of at least 0 for each source, joined with '::', not '1::{wrong}'.")
          for wrong in ("-1", "nan", "two", "")),
    ],
)  # fmt: skip
def test_bad_options_are_one_sentence(words, problem):
    flag = words.replace("=", " ").split()[0]
    assert complaint([*SYNTHETIC, *words.split()]) == f"{flag} {problem}"


def test_values_at_the_edge_are_taken():
    words = "--epochs 0 --workers 0 --warmup 0 --beta1 0 --layer-decay 1 --save-frequency 0 --val-frequency 0"
    words += f" --seed {2**32 - 1} --model local-dir:/home/coca/vit"  # a folder may be called anything
    assert parse_args([*SYNTHETIC, *words.split()]).seed == 2**32 - 1
    args = parse_args([*SYNTHETIC, "--lr-scheduler", "const-cooldown", "--epochs", "3", "--epochs-cooldown", "3"])
    assert args.epochs_cooldown == 3
    assert parse_args([*SYNTHETIC, "--opt", "timm/lamb", "--skip-scheduler"]).lr is None
    assert parse_args(["--val-data", "v.tar", "--opt", "timm/lamb"]).lr is None
    assert parse_args([*SYNTHETIC, "--val-data", "", "--resume="]) == parse_args(SYNTHETIC)  # a script's empty variable
    for flag in ("--train-data", "--val-data", "--zeroshot-data", "--imagenet-val", "--imagenet-v2"):  # each is enough
        assert vars(parse_args([flag, "x"]))[flag.removeprefix("--").replace("-", "_")] == "x"


@pytest.mark.parametrize(
    "options, words, told",
    [
        (PretrainingOptions, "--train-data x.tar --use-bn-sync --dist-backend gloo", [
            "--dist-backend, --use-bn-sync: no effect without several processes."]),
        (PretrainingOptions, "--dataset-type synthetic --train-data x --dataset-resampled", [
            "--train-data, --dataset-resampled: no effect with --dataset-type synthetic."]),
        (PretrainingOptions, "--val-data v.tar --lr 1 --epochs 3 --val-frequency 0 --csv-separator , --seed 3", [
            "--val-data: no effect without --val-frequency.", "--epochs, --lr: no effect without training.",
            "--csv-separator: no effect without csv data."]),
        (PretrainingOptions, "--train-data a.csv --train-num-samples 3 --csv-separator , --loss-dist-impl gather", [
            "--train-num-samples: no effect with csv training data.", "--loss-dist-impl: no effect without --siglip."]),
        (PretrainingOptions, "--train-data a.tar --siglip --no-local-loss --gather-with-grad --wandb-notes x", [
            "--local-loss: no effect with --siglip.", "--wandb-notes: no effect without --report-to wandb or all."]),
        (PretrainingOptions, "--train-data a.tar --lr 1 --report-to csv,wandb --wandb-notes x --warmup 0", []),
        (PretrainingOptions, "--train-data a.tar --zeroshot-frequency 3 --batch-size 2 --global-batch 4", [
            "--zeroshot-frequency: no effect without --zeroshot-data or --imagenet-val or --imagenet-v2.",
            "--global-batch: no effect with --batch-size."]),
        (FinetuningOptions, "--data x --model m --pretrained p --mixup-prob .5 --mixup 1 --mixup-switch-prob 0", [
            "--mixup-switch-prob: no effect without --cutmix."]),
        (ProbeOptions, "--data x --held-out .2 --regularisation 3", [
            "--held-out: no effect without --regularisation sweep."]),
        (RetrievalOptions, "--data x.csv y --csv-separator ;", []),
    ],
)  # fmt: skip
def test_options_without_effect_are_told(options, words, told, caplog, config):
    parse(options, words.split())
    assert sorted(caplog.messages) == sorted(told)
    caplog.clear()
    parse(options, config(yaml.safe_dump(resolved(parse(options, words.split())))))
    assert sorted(caplog.messages[len(told):]) == sorted(told)  # the same of a file that holds every option
