"""The paper's recipes, and the scripts that start them: what they hand to torchrun, SLURM left out."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import open_clip
import pytest
from braceexpand import braceexpand

import open_clip_elip  # noqa: F401  (makes the models known)
from training.options import parse, resolved
from training.tasks.contrastive import PretrainingOptions

ROOT = Path(__file__).parents[2]
PRETRAIN = ROOT / "configs" / "pretrain"
SHARDS = {
    "cc3m": [("cc3m", 332), ("sbu", 100), ("mscoco", 60)],
    "cc12m": [("cc12m", 1243), ("sbu", 100), ("mscoco", 60)],
}
GLOBAL_BATCH = {"ViT-S-16": 1760, "ViT-B-16": 920}
SUFFIXES = ("", "-ELIP", "-EViT")
RECIPES = [
    (f"{data}_plus_{(model + suffix).lower().replace('-', '_')}", data, model, suffix)
    for data in SHARDS
    for model in GLOBAL_BATCH
    for suffix in SUFFIXES
]


# --- the configs ---


def test_there_are_no_other_recipes():
    assert sorted(file.stem for file in PRETRAIN.glob("*.yaml")) == sorted(name for name, *_ in RECIPES)


@pytest.mark.parametrize(("name", "data", "model", "suffix"), RECIPES)
def test_recipe(name, data, model, suffix, monkeypatch):
    monkeypatch.setenv("DATA", "/some where/data")
    args = parse(PretrainingOptions, ["--config", str(PRETRAIN / f"{name}.yaml")])
    assert args.model == model + suffix
    assert 4 * args.batch_size * args.accum_freq == GLOBAL_BATCH[model]
    assert (args.epochs, args.lr, args.wd) == (32, 1e-3, 0.1)
    assert (args.beta1, args.beta2, args.eps, args.opt) == (0.9, 0.98, 1e-6, "adamw")
    assert (args.lr_scheduler, args.precision) == ("cosine", "amp")

    sources = [list(braceexpand(source)) for source in args.train_data.split("::")]
    folders = [(f"/some where/data/{folder}", shards) for folder, shards in SHARDS[data]]
    assert [(os.path.dirname(urls[0]), len(urls)) for urls in sources] == folders
    assert all(os.path.basename(urls[0]) == "00000.tar" for urls in sources)


@pytest.mark.parametrize(("name", "data", "model", "suffix"), RECIPES)
def test_all_else_is_the_default(name, data, model, suffix, monkeypatch):
    """Also what has a default of its own for some models, and flags that come later than the recipes."""
    monkeypatch.setenv("DATA", "/data")
    recipe = resolved(parse(PretrainingOptions, ["--config", str(PRETRAIN / f"{name}.yaml")]))
    default = resolved(parse(PretrainingOptions, ["--train-data", "x.tar", "--model", model]))
    own = {"train_data", "batch_size", "lr", "wd"} | ({"model"} if suffix else set())
    assert {key for key in recipe if recipe[key] != default[key]} == own


@pytest.mark.parametrize("model", [name + suffix for name in GLOBAL_BATCH for suffix in SUFFIXES])
def test_models_are_known(model):
    config = open_clip.get_model_config(model)
    assert config["vision_cfg"]["patch_size"] == 16
    assert ("token_reduction" in config) == model.endswith(SUFFIXES[1:])


# --- the launchers ---


@pytest.fixture
def launch(tmp_path, monkeypatch):
    """Runs a script of the repository with a torchrun that only notes the words it is given."""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    stub(bin_folder / "torchrun", f'printf "%s\\0" "$@" > "{tmp_path}/words"\n')
    for name in ("NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "NPROC", "GLOBAL_BATCH", "SLURM_NODEID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", f"{bin_folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHON", sys.executable)
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


def recipe(name):
    return PRETRAIN / f"{name}.yaml"


def trained(result):
    """torchrun's own words, and the options that the trainer parses from the rest."""
    assert result.returncode == 0, result.stderr
    at = result.torchrun.index("training.main")
    assert result.torchrun[at - 1] == "-m"
    assert result.torchrun[at + 1] == "--"
    return result.torchrun[: at - 1], parse(PretrainingOptions, result.torchrun[at + 2 :])


@pytest.mark.parametrize("script", ["train.sh", "train_multinode.sh", "train_slurm.sbatch"])
def test_syntax(script):
    subprocess.run(["bash", "-n", str(ROOT / "scripts" / script)], check=True)
    assert os.access(ROOT / "scripts" / script, os.X_OK)


@pytest.mark.parametrize(
    ("name", "processes", "flags", "batch_size"),
    [
        ("cc3m_plus_vit_s_16", 4, [], 440),
        ("cc3m_plus_vit_s_16_elip", 1, [], 1760),
        ("cc3m_plus_vit_s_16_elip", 8, [], 220),
        ("cc12m_plus_vit_b_16", 8, [], 115),
        ("cc12m_plus_vit_b_16_elip", 2, ["--accum-freq", "2"], 230),
        ("cc12m_plus_vit_b_16_elip", 1, ["--accum-freq=4"], 230),
    ],
)
def test_batch_size_follows_the_number_of_processes(launch, name, processes, flags, batch_size):
    result = launch("train.sh", recipe(name), *flags, NPROC=processes)
    launcher, args = trained(result)
    assert launcher == ["--standalone", "--nproc_per_node", str(processes)]
    assert args.batch_size == batch_size
    assert args.batch_size * processes * args.accum_freq == GLOBAL_BATCH[args.model.removesuffix("-ELIP")]
    assert re.fullmatch(rf"train: {processes} process.* {batch_size} samples.* = global batch \d+\n", result.stderr)


def test_flags_reach_the_trainer_as_they_are(launch):
    name = "two words, $HOME and *"
    flags = ["--name", name, "--logs", "l", "--lr=5e-4"]
    _, args = trained(launch("train.sh", recipe("cc3m_plus_vit_s_16"), *flags, NPROC=4))
    assert (args.name, args.logs, args.lr) == (name, "l", 5e-4)


@pytest.mark.parametrize(("gpus", "processes"), [(0, 1), (8, 8)])
def test_processes_default_to_the_gpus_or_one(launch, tmp_path, gpus, processes):
    (tmp_path / "torch.py").write_text(f"class cuda:\n    device_count = staticmethod(lambda: {gpus})\n")
    launcher, args = trained(launch("train.sh", recipe("cc3m_plus_vit_s_16"), PYTHONPATH=tmp_path))
    assert launcher == ["--standalone", "--nproc_per_node", str(processes)]
    assert args.batch_size == 1760 // processes


def test_global_batch_can_be_set(launch):
    _, args = trained(launch("train.sh", recipe("cc3m_plus_vit_s_16"), "--accum-freq", 2, NPROC=3, GLOBAL_BATCH=96))
    assert args.batch_size == 16


def test_a_batch_size_that_is_given_is_taken(launch):
    result = launch("train.sh", recipe("cc3m_plus_vit_s_16"), "--batch-size", 7, NPROC=3)
    assert trained(result)[1].batch_size == 7
    assert "global batch 21" in result.stderr


def test_accumulation_of_the_config_is_part_of_its_global_batch(launch, tmp_path):
    (tmp_path / "own.yaml").write_text("train-data: x.tar\nbatch-size: 10\naccum-freq: 3\n")
    assert trained(launch("train.sh", "own.yaml", NPROC=4))[1].batch_size == 10
    _, args = trained(launch("train.sh", "own.yaml", "--accum-freq", 1, NPROC=4))
    assert (args.batch_size, args.accum_freq) == (30, 1)


INDIVISIBLE = "train: The global batch of 920 cannot be divided by"


@pytest.mark.parametrize(
    ("words", "variables", "said"),
    [
        ([], {}, "train: name a config"),
        (["nowhere.yaml"], {}, "train: there is no config file nowhere.yaml."),
        (["RECIPE"], {"NPROC": 3}, f"{INDIVISIBLE} 3 process(es) x --accum-freq 1 = 3"),
        (["RECIPE", "--accum-freq=4"], {"NPROC": 4}, f"{INDIVISIBLE} 4 process(es) x --accum-freq 4 = 16"),
        (["RECIPE"], {"NPROC": "four"}, "train: NPROC must be a whole number of at least 1, not 'four'."),
        (["RECIPE"], {"NPROC": 4, "GLOBAL_BATCH": "0"}, "train: GLOBAL_BATCH must be"),
        (["RECIPE", "--epoch", "3"], {"NPROC": 4}, "train: Unknown option --epoch; did you mean --epochs?"),
        (["RECIPE"], {"NPROC": 4, "NNODES": 2}, "train: NNODES is 2: use scripts/train_multinode.sh"),
    ],
)
def test_refusals(launch, words, variables, said):
    config = str(recipe("cc12m_plus_vit_b_16"))
    result = launch("train.sh", *(config if word == "RECIPE" else word for word in words), **variables)
    assert result.returncode == 2
    assert result.torchrun is None
    assert result.stderr.startswith(said)
    assert result.stderr.count("\n") == 1


def test_refusal_names_the_numbers_that_fit(launch):
    result = launch("train.sh", recipe("cc12m_plus_vit_b_16"), NPROC=3)
    assert "so that this number is one of 1, 2, 4, 5, 8, 10, 20, 23, 40, 46, or set GLOBAL_BATCH." in result.stderr


def test_unset_data_is_told(launch, monkeypatch):
    monkeypatch.delenv("DATA")
    result = launch("train.sh", recipe("cc3m_plus_vit_s_16"), NPROC=4)
    assert result.returncode == 2
    assert "uses the variable DATA, which is not set" in result.stderr


def test_several_machines(launch):
    variables = {"NNODES": 2, "NODE_RANK": 1, "MASTER_ADDR": "node0", "NPROC": 4}
    result = launch("train_multinode.sh", recipe("cc12m_plus_vit_b_16_elip"), "--name", "x", **variables)
    launcher, args = trained(result)
    assert " ".join(launcher) == "--nnodes 2 --node_rank 1 --master_addr node0 --master_port 29500 --nproc_per_node 4"
    assert (args.batch_size, args.name) == (115, "x")


def test_rank_of_the_machine_comes_from_slurm(launch):
    variables = {"NNODES": 2, "SLURM_NODEID": 0, "MASTER_ADDR": "node0", "MASTER_PORT": 1234, "NPROC": 4}
    launcher, _ = trained(launch("train_multinode.sh", recipe("cc12m_plus_vit_b_16"), **variables))
    assert launcher[2:8] == ["--node_rank", "0", "--master_addr", "node0", "--master_port", "1234"]


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"NODE_RANK": 0, "MASTER_ADDR": "a"}, "NNODES must be the number of machines, not ''."),
        ({"NNODES": 2, "MASTER_ADDR": "a"}, "NODE_RANK must be the number of this machine, from 0, not ''."),
        ({"NNODES": 2, "NODE_RANK": 2, "MASTER_ADDR": "a"}, "NODE_RANK is 2, but with NNODES=2 it must be below 2."),
        ({"NNODES": 2, "NODE_RANK": 1}, "set MASTER_ADDR to the address of machine 0."),
        ({"NNODES": 2, "NODE_RANK": 1, "MASTER_ADDR": "a", "MASTER_PORT": "x"}, "MASTER_PORT must be"),
    ],
)
def test_refusals_of_several_machines(launch, variables, said):
    result = launch("train_multinode.sh", recipe("cc12m_plus_vit_b_16"), NPROC=4, **variables)
    assert (result.returncode, result.torchrun) == (2, None)
    assert result.stderr.startswith(f"train_multinode: {said}")


# --- SLURM ---


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
    launcher, args = trained(result)
    assert " ".join(launcher) == "--nnodes 2 --node_rank 1 --master_addr node7 --master_port 20042 --nproc_per_node 4"
    assert (args.name, args.resume, args.lr) == ("cc12m_plus_vit_b_16_elip", "latest", 2e-3)
    assert args.batch_size == 115
    assert not (slurm / "scontrol").exists()


def test_slurm_flags_win(slurm, launch):
    _, args = trained(launch("train_slurm.sbatch", recipe("cc12m_plus_vit_b_16"), "--name", "mine"))
    assert args.name == "mine"


def test_slurm_directives():
    directives = re.findall(r"^#SBATCH --(\S+)$", (ROOT / "scripts" / "train_slurm.sbatch").read_text(), re.MULTILINE)
    assert {"signal=B:USR1@120", "requeue", "open-mode=append", "ntasks-per-node=1"} <= set(directives)


def test_slurm_failure_is_not_queued_again(slurm, launch):
    stub(slurm / "bin" / "torchrun", "exit 3\n")
    assert launch("train_slurm.sbatch", recipe("cc12m_plus_vit_b_16")).returncode == 3
    assert not (slurm / "scontrol").exists()


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
    command = ["bash", str(ROOT / "scripts" / "train_slurm.sbatch"), str(recipe("cc12m_plus_vit_b_16"))]
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
