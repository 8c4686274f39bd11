"""Config files: what their values become, includes, refusals, and the resolved options that a file holds."""
from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from training.options import parse, resolved
from training.options.config_file import RECIPES
from training.options.zero_shot import ZeroShotOptions

from .conftest import SYNTHETIC, complaint, parse_args
from .test_openclip import FULL_COMMAND


def test_config_is_the_same_as_the_flags(config):
    text = """
        {train-data: [a.tar, b.tar], batch_size: 32, lr: 1e-3, name: 2024_01_01, csv-img-key: true, siglip: true,
        local_loss: False, gather-with-grad: off, no-set-device-rank: false, torchcompile: yes, progress: ,
        image_mean: [0.5, 0.5, -0.5], force-image-size: 96, wandb-notes: '', report_to: [csv, wandb],
        use-bnb-linear: null}
    """
    flags = "--train-data a.tar::b.tar --batch-size 32 --lr 1e-3 --name 2024_01_01 --csv-img-key true --siglip"
    flags += " --no-local-loss --no-gather-with-grad --torchcompile --image-mean 0.5 0.5 -0.5 --force-image-size 96"
    assert parse_args(config(text)) == parse_args([*flags.split(), "--wandb-notes=", "--report-to", "csv,wandb"])
    assert parse_args([*SYNTHETIC, *config("# nothing\n")]) == parse_args(SYNTHETIC)


def test_later_files_win_and_flags_wherever_they_stand(config):
    files = config("dataset-type: synthetic\nepochs: 3\nimage_mean: [0.1, 0.2, 0.3]\nlogs: a\n")
    files += config("siglip: true\nlogs: b\nwd: 0\n", "b.yaml")
    flags = ["--epochs", "5", "--no-siglip", "--image-mean", "0.5"]
    for argv in ([*files, *flags], [*flags, *files]):
        args = parse_args(argv)
        assert (args.epochs, args.siglip, args.image_mean, args.logs, args.wd) == (5, False, [0.5], "b", 0)


def test_aug_cfg_in_a_config(config):
    text = "scale: '(0.4, 1.0)', color_jitter: [0.4, '0.3', 1e-1], use_timm: true, re_prob: null, re_count: pixel"
    file = config(f"dataset-type: synthetic\naug-cfg: {{{text}}}")
    expected = {"scale": [0.4, 1.0], "color_jitter": [0.4, 0.3, 0.1], "use_timm": True, "re_prob": None}
    assert parse_args(file).aug_cfg == expected | {"re_count": "pixel"}
    assert parse_args([*file, "--aug-cfg", "re_prob=0.5"]).aug_cfg == {"re_prob": 0.5}
    assert parse_args([*file, "--aug-cfg"]).aug_cfg == {}


def test_paths_in_a_config_are_expanded(config, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("DATA", "/data")
    text = "train-data: $DATA/a/{0..3}.tar::~/b.tar::$~/c.tar\nval-data: ${DATA}_old/x$$DATA/$1.tar\nlogs: ~/runs\n"
    args = parse_args(config(f"{text}name: $DATA\nwandb-notes: ~/not a path\n"))
    assert args.train_data == "/data/a/{0..3}.tar::/home/me/b.tar::~/c.tar"
    assert (args.val_data, args.logs) == ("/data_old/x$DATA/$1.tar", "/home/me/runs")
    assert (args.name, args.wandb_notes) == ("$DATA", "~/not a path")
    assert parse_args(["--val-data", "$DATA", "--logs=~/x"]).val_data == "$DATA"  # the command line has its shell


def test_evaluation_commands_read_files_too(config, monkeypatch):
    monkeypatch.setenv("DATA", "/data")
    text = "data: [imagenet=$DATA/in, cifar10=$DATA]\ndevice: cpu\ncompile: true\nclassnames: $DATA/names.txt\n"
    args = parse(ZeroShotOptions, [*config(text), "--batch-size", "8"])
    assert (args.data, args.device, args.batch_size) == (["imagenet=/data/in", "cifar10=/data"], "cpu", 8)
    assert args.torchcompile is True and args.classnames == Path("/data/names.txt") and args.split == "test"
    assert parse(ZeroShotOptions, config(yaml.safe_dump(resolved(args)))) == args


def test_includes(config, monkeypatch, tmp_path):
    monkeypatch.setenv("RECIPES", str(tmp_path / "base"))
    config("epochs: 1\nlogs: one\nname: one\nresume: latest\nval-data: $UNSET_VARIABLE\n", "base/one.yaml")
    config("include: $RECIPES/one.yaml\nlogs: two\n", "base/two.yaml")
    config("name: three\n", "three.yaml")
    main = config("name: null\nresume: null\nbatch-size: 8\ninclude: [base/two.yaml, three.yaml]\nval-data: v\n")
    args = parse_args(main)
    assert (args.epochs, args.logs, args.batch_size, args.val_data) == (1, "two", 8, "v")
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


UNSET = "uses the variable UNSET_VARIABLE, which is not set: export it (a plain $ is written $$)."
READ = "Cannot read the config file"


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("mixup: 0.5", "--mixup in {file} is an option of training.finetune (augmentation), not of training.main."),
        ("batchsize: 3", "Unknown option batchsize in {file}; did you mean batch_size?"),
        ("no-siglip: true", "Unknown option no-siglip in {file}; did you mean siglip?"),
        ("config: a.yaml", "Unknown option config in {file}; --help lists all options."),
        ("batch-size: 0", "{file}: --batch-size must be a whole number from 1 to 10**15, or auto, not '0'."),
        ("siglip: 2", "{file}: --siglip must be true or false, not '2'."),
        ("siglip: [true]", "{file}: siglip cannot be ['true']: it takes a single value."),
        ("train-data: {a: b}", "{file}: train_data cannot be {'a': 'b'}: it takes a value or a list of values."),
        ("image-std: [1, null]", "{file}: image_std cannot be ['1', None]: it takes a value or a list of values."),
        ("image-std: []", "{file}: --image-std needs 1 or 3 values."),
        ("aug-cfg: scale", "{file}: --aug-cfg must be given as key=value, not 'scale'."),
        ("horovod: true", "{file}: --horovod is not supported: start several processes with torchrun instead."),
        ("logs: $UNSET_VARIABLE/x", f"{{file}}: '$UNSET_VARIABLE/x' {UNSET}"),
        ("include: $UNSET_VARIABLE", f"{{file}}: '$UNSET_VARIABLE' {UNSET}"),
        ("include: {a: b}", "{file}: include must be a file name or a list of file names."),
        ("include: gone.yaml", f"{READ} {{folder}}/gone.yaml: No such file or directory."),
        ("- epochs", "The config file {file} must be a mapping of options to values (batch-size: 64)."),
        ("epochs: 1\nb: c: d", f"{READ} {{file}} in line 2: mapping values are not allowed here."),
        ("batch-size: 1\n--batch-size: 2", "{file}: --batch-size is given twice, once by another spelling."),
        ("batch-size: 1\nbatch_size: 2", f"{READ} {{file}} in line 2: batch_size is given twice."),
        ("[a]: 1", f"{READ} {{file}} in line 1: found unhashable key."),
        ("wd: !!int x", f"{READ} {{file}}: invalid literal for int() with base 10: 'x'."),
        ('name: "a\\0b"', "{file}: --name must be plain text, not 'a\\x00b'."),
        ("a: \x07", f"{READ} {{file}}: unacceptable character #x0007: special characters are not allowed."),
    ],
)
def test_bad_config_is_one_sentence(config, tmp_path, monkeypatch, text, sentence):
    monkeypatch.delenv("UNSET_VARIABLE", raising=False)
    words = config(text)
    sentence = sentence.replace("{file}", words[1]).replace("{folder}", str(tmp_path))
    assert complaint([*SYNTHETIC, *words]) == sentence


def test_a_mistake_is_told_where_it_is(config, tmp_path):
    assert complaint([*config("dataset-type: synthetic"), "--lr", "0"]) == "--lr must be a number above 0, not '0'."
    assert "maximum recursion depth exceeded" in complaint(config("a: " + "[" * 2000))
    (tmp_path / "latin.yaml").write_bytes(b"name: \xe9")
    assert complaint(["--config", f"{tmp_path}/latin.yaml"]) == (
        f"Cannot read the config file {tmp_path}/latin.yaml: 'utf-8' codec can't decode byte 0xe9 in position 6: "
        "unexpected end of data."
    )


@pytest.mark.parametrize(
    "argv",
    [
        SYNTHETIC,
        FULL_COMMAND,
        [*SYNTHETIC, "--no-local-loss", "--no-gather-with-grad", "--token-reduction", "keep_ratio=0.3"],
        [*SYNTHETIC, "--lr", "1e-16", "--eps", "1e-9",
         "--name", "2024_01", "--token-reduction", "elip", "keep_count=9,4"],
        [*SYNTHETIC, "--name", "true", "--wandb-notes", "null", "--csv-separator", "\t", "--model", "~", "--opt=adamW"],
        [*SYNTHETIC, "--name=-x --y", "--wandb-notes", "a: b # c\n- d", "--csv-img-key", "1e3", "--dist-url", "no"],
        ["--train-data", "$A/~/{0..1}.tar::~/b$$.tar::~$~", "--logs=~", "--resume", "${B}", "--val-data=$~/x"],
        [*SYNTHETIC, "--aug-cfg", "scale=(0.4,1)", "ratio=1", "re_prob=1e-9", "use_timm=True", "re_count=None"],
    ],
)
def test_resolved_config_gives_the_same_options_back(argv, config):
    args = parse_args(argv)
    plain = resolved(args)
    assert parse_args(config(yaml.safe_dump(plain))) == args
    assert json.loads(json.dumps(plain)) == plain and set(plain) == set(vars(args))  # plain types, every option


def test_a_recipe_is_found_by_its_name(config, monkeypatch, tmp_path):
    monkeypatch.setenv("DATA", "/data")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cc12m_plus_vit_s_16_elip").mkdir()  # a run's folder, say
    args = parse_args(["--config", "cc12m_plus_vit_s_16_elip"])
    for other in ("pretrain/cc12m_plus_vit_s_16_elip", "cc12m_plus_vit_s_16_elip.yaml"):
        assert args == parse_args(["--config", other])
    assert args == parse_args(["--config", str(RECIPES / "pretrain/cc12m_plus_vit_s_16_elip.yaml")])
    assert args.model == "ViT-S-16-ELIP" and args.train_data.startswith("/data/cc12m/")
    (tmp_path / "quickstart").write_text("dataset-type: synthetic\nepochs: 77")
    assert parse_args(["--config", "quickstart"]).epochs == 77  # a file there is


@pytest.mark.parametrize(
    "name, hint",
    [
        ("cc12m_plus_vit_s_16_elpi", "did you mean .*pretrain/cc12m_plus_vit_s_16_elip.*"),
        ("nlvr2", "did you mean albef/nlvr2 or blip/nlvr2 or meter/nlvr2?"),
        ("albef/nlvr", "did you mean albef/nlvr2"),
        ("xyzzy", "the recipes are in "),
    ],
)
def test_a_recipe_that_there_is_not_is_one_sentence(name, hint):
    assert re.match(f"There is neither a file nor a recipe {name}; {hint}", complaint(["--config", name]))
