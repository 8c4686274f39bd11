"""The paper's recipes, and the scripts that start them: what they hand to torchrun, SLURM left out."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import open_clip
import pytest
from braceexpand import braceexpand

import open_clip_elip  # noqa: F401  (makes the models known)
from training.options import parse, resolved
from training.options.finetune import FinetuningOptions
from training.options.linear_probe import ProbeOptions
from training.options.main import PretrainingOptions
from training.options.zero_shot import ZeroShotOptions

ROOT = Path(__file__).parents[2]
PRETRAIN = ROOT / "configs" / "pretrain"
SHARDS = {
    "cc3m": [("cc3m", 332), ("sbu", 100), ("mscoco", 60)],
    "cc12m": [("cc12m", 1243), ("sbu", 100), ("mscoco", 60)],
}
GLOBAL_BATCH = {"ViT-S-16": 1760, "ViT-B-16": 920}
SUFFIXES = ("", "-ELIP", "-EViT")
RECIPE = PRETRAIN / "cc12m_plus_vit_b_16.yaml"
RECIPES = [
    (f"{data}_plus_{(model + suffix).lower().replace('-', '_')}", data, model, suffix)
    for data in SHARDS
    for model in GLOBAL_BATCH
    for suffix in SUFFIXES
]



def test_there_are_no_other_recipes():
    assert sorted(file.stem for file in PRETRAIN.glob("*.yaml")) == sorted(name for name, *_ in RECIPES)


@pytest.mark.parametrize(("name", "data", "model", "suffix"), RECIPES)
def test_recipe(name, data, model, suffix, monkeypatch):
    """All else is the default: also what has one of its own for some models, and flags that come after the recipes."""
    monkeypatch.setenv("DATA", "/some where/data")
    args = parse(PretrainingOptions, ["--config", str(PRETRAIN / f"{name}.yaml")])
    assert args.model == model + suffix
    assert (args.batch_size, args.global_batch) == (None, GLOBAL_BATCH[model])
    assert (args.epochs, args.lr, args.wd) == (32, 1e-3, 0.1)
    assert (args.beta1, args.beta2, args.eps, args.opt) == (0.9, 0.98, 1e-6, "adamw")
    assert (args.lr_scheduler, args.precision) == ("cosine", "amp")

    sources = [list(braceexpand(source)) for source in args.train_data.split("::")]
    folders = [(f"/some where/data/{folder}", shards) for folder, shards in SHARDS[data]]
    assert [(os.path.dirname(urls[0]), len(urls)) for urls in sources] == folders
    assert all(os.path.basename(urls[0]) == "00000.tar" for urls in sources)
    recipe = resolved(args)
    default = resolved(parse(PretrainingOptions, ["--train-data", "x.tar", "--model", model]))
    own = {"train_data", "batch_size", "global_batch", "lr", "wd"} | ({"model"} if suffix else set())
    assert {key for key in recipe if recipe[key] != default[key]} == own
    assert ("token_reduction" in open_clip.get_model_config(args.model)) == bool(suffix)



@pytest.fixture
def launch(tmp_path, monkeypatch):
    """Runs a script of the repository with a torchrun that only notes the words it is given."""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    stub(bin_folder / "torchrun", f'printf "%s\\0" "$@" > "{tmp_path}/words"\n')
    for name in ("MASTER_ADDR", "MASTER_PORT", "NPROC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", f"{bin_folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("DATA", "/data")
    monkeypatch.chdir(tmp_path)

    def run(script, *words, **variables):
        environment = os.environ | {key: str(value) for key, value in variables.items()}
        command = ["bash", str(ROOT / "scripts" / script), *map(str, words)]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        noted = tmp_path / "words"
        result.torchrun = noted.read_text().split("\0")[:-1] if noted.exists() else None
        noted.unlink(missing_ok=True)
        return result

    return run


def stub(path, text):
    path.write_text("#!/usr/bin/env bash\n" + text)
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("script", "module", "options"),
    [
        ("zero_shot_imagenet.sh", "training.zero_shot", ZeroShotOptions),
        ("linear_probe.sh", "training.linear_probe", ProbeOptions),
        ("finetune.sh", "training.finetune", FinetuningOptions),
    ],
)
def test_evaluation_of_the_paper(launch, script, module, options):
    assert "name the folder of ImageNet" in launch(script, "epoch_32.pt").stderr
    more = ["--model", "ViT-S-16-ELIP"] if module == "training.finetune" else ["cifar10=/two words", "--redo"]
    words = launch(script, "epoch 32.pt", "/data/imagenet", *more, NPROC=2).torchrun
    assert words[:6] == ["--standalone", "--nproc_per_node", "2", "-m", module, "--"]
    found = parse(options, words[6:])
    data = found.data if isinstance(found.data, list) else [found.data]
    assert found.pretrained == "epoch 32.pt" and data[0] == "imagenet=/data/imagenet"
    if module == "training.finetune":
        assert (found.epochs, found.lr, found.wd, found.global_batch) == (10, 1e-3, 0.1, 1024)
    else:
        assert data[1:] == ["cifar10=/two words"]



@pytest.fixture
def slurm(launch, tmp_path, monkeypatch):
    """The variables of a job on two nodes with four GPUs each, of which srun runs node 1's part."""
    stub(tmp_path / "bin" / "srun", 'shift; SLURM_NODEID=1 exec "$@"\n')
    stub(tmp_path / "bin" / "scancel", f'[ "$*" = "--signal=TERM 42" ] && kill -TERM "$(cat "{tmp_path}/started")"\n')
    stub(
        tmp_path / "bin" / "scontrol",
        f'if [ "$1" = show ]; then printf "node7\\nnode8\\n"; else echo "$*" >> "{tmp_path}/scontrol"; fi\n',
    )
    variables = {
        "SLURM_SUBMIT_DIR": ROOT, "SLURM_NNODES": 2, "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_ID": 42,
        "SLURM_GPUS_ON_NODE": 4, "SLURM_CPUS_PER_TASK": 24,
    }  # fmt: skip
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    return tmp_path


def test_slurm(slurm, launch, monkeypatch):
    monkeypatch.chdir(ROOT)
    result = launch("train_slurm.sbatch", "configs/pretrain/cc12m_plus_vit_b_16_elip.yaml", "--lr", "2e-3")
    assert result.returncode == 0, result.stderr
    launcher = "--nnodes 2 --node_rank 1 --master_addr node7 --master_port 20042 --nproc_per_node 4 -m training.main --"
    assert result.torchrun[:13] == launcher.split()
    found = parse(PretrainingOptions, result.torchrun[13:])
    assert (found.name, found.resume, found.lr) == ("cc12m_plus_vit_b_16_elip", "latest", 2e-3)
    assert found.global_batch == 920
    words = launch("train_slurm.sbatch", RECIPE, "--name", "mine").torchrun
    assert parse(PretrainingOptions, words[13:]).name == "mine"  # flags win
    assert launch("train_slurm.sbatch", "nowhere.yaml").stderr == "train_slurm: there is no config file nowhere.yaml.\n"
    stub(slurm / "bin" / "torchrun", "exit 3\n")
    assert launch("train_slurm.sbatch", RECIPE).returncode == 3
    assert not (slurm / "scontrol").exists()  # a failure is not queued again
    directives = re.findall(r"^#SBATCH --(\S+)$", (ROOT / "scripts" / "train_slurm.sbatch").read_text(), re.MULTILINE)
    assert {"signal=B:USR1@120", "requeue", "open-mode=append", "ntasks-per-node=1"} <= set(directives)


@pytest.mark.parametrize(
    ("sent", "code", "queued"),
    [
        (signal.SIGUSR1, 1, "requeue 42\n"),  # the time is up
        (signal.SIGUSR1, 0, None),  # and so was the training
        (signal.SIGTERM, 1, None),  # scancel, or a preemption, which SLURM queues again by itself
    ],
)
def test_slurm_stops(slurm, sent, code, queued):
    """The processes get SIGTERM and the time to save; only what the time limit has ended is queued again."""
    stub(
        slurm / "bin" / "torchrun",
        f'trap \'sleep 0.2; echo saved > "{slurm}/saved"; exit {code}\' TERM\n'
        f'echo $$ > "{slurm}/pid" && mv "{slurm}/pid" "{slurm}/started"; for _ in $(seq 600); do sleep 0.1; done\n',
    )
    command = ["bash", str(ROOT / "scripts" / "train_slurm.sbatch"), str(RECIPE)]
    # SLURM sends SIGTERM to the processes as well as to the job's shell: here, to the whole group.
    job = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        deadline = time.monotonic() + 60
        while not (slurm / "started").exists():
            assert job.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        if sent == signal.SIGTERM:
            os.killpg(job.pid, sent)
        else:
            job.send_signal(sent)
        assert job.wait(60) == code
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
            job.wait()
    assert (slurm / "saved").exists()
    requeued = slurm / "scontrol"
    assert (requeued.read_text() if requeued.exists() else None) == queued
