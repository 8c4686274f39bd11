"""Small runs of the tasks after pre-training: lists of a few pictures, a checkpoint to start from, the command line."""
from __future__ import annotations

import json
import re

import numpy as np
import torch
from PIL import Image

from open_clip_elip import identity as identities
from training.tasks.albef import AlbefPretraining

from .colours import COLOURS
from .fusion_runs import ALBEF, write_fusion, write_vocabulary

WORDS = "a thing is it not what colour yes no red green blue left right both round in the picture".split()
QUEUE, VAL = 24, 5


def write_pretrained(folder, seed=0, config=ALBEF, pretraining=AlbefPretraining, **changes):
    """A model's name, and a checkpoint of its pre-training, whose twin and queues are other random numbers; without
    `pretraining` it has none of these."""
    model = write_fusion(folder, config | changes)
    write_vocabulary(folder, WORDS)
    identity = identities.describe(model)
    torch.manual_seed(seed)
    bare, twin = (identities.create(identity) for _ in range(2))
    if pretraining is None:
        torch.save({"epoch": 1, "state_dict": bare.state_dict(), "model": identity.to_dict()}, folder / "pretrained.pt")
        return model, folder / "pretrained.pt"
    task = pretraining(bare, queue_size=QUEUE)
    task.twin.load_state_dict(twin.state_dict(), strict=False)
    task.queues["image"].pointer.fill_(6)
    task.queues["text"].pointer.fill_(6)
    bare.temp.data.fill_(0.05)
    state = {"epoch": 1, "state_dict": bare.state_dict(), "task": task.state_dict(), "model": identity.to_dict()}
    torch.save(state, folder / "pretrained.pt")
    return model, folder / "pretrained.pt"


def write_data(folder, count=12, broken=()):
    """Pictures of three colours and, for each task, NAME.json and NAME_val.json with `count` and `VAL` samples."""
    (folder / "images").mkdir(parents=True)
    generator = np.random.default_rng(0)
    for i in range(count):
        pixels = np.array(list(COLOURS.values())[i % 3]) + generator.normal(0, 40, (36, 40, 3))
        path = folder / "images" / f"{i:03d}.jpg"
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
        if i in broken:
            path.write_bytes(b"no picture")
    colours, labels = list(COLOURS), ("contradiction", "neutral", "entailment")
    sentences = ["it is not {}", "a thing", "a {} thing"]
    items = {
        "entailment": lambda i: {
            "image": f"{i:03d}", "sentence": sentences[i // 3 % 3].format(colours[i % 3]), "label": labels[i // 3 % 3],
        },
        "nlvr2": lambda i: {
            "images": [f"{i:03d}.jpg", f"{(i + 1 + i % 2 * 2) % count:03d}.jpg"], "sentence": "both in the picture",
            "label": str(bool(i % 2)),
        },
        "vqa": lambda i: {
            "image": f"{i:03d}.jpg", "question": "What colour is it?", "question_id": 100 + i, "dataset": "vqa",
            "answer": [colours[i % 3]] * 7 + ["yes"] * 2 + [""],
        },
        "retrieval": lambda i: {
            "image": f"{i:03d}.jpg", "caption": f"A {colours[i % 3]} thing", "image_id": f"set_{i // 2}",
        },
        "assignment": lambda i: {"image": f"{i:03d}.jpg", "caption": [f"a {colours[i % 3]} thing", "the picture"]},
    }  # fmt: skip
    for name, item in items.items():
        write_list(folder / f"{name}.json", [item(i) for i in range(count)])
        write_list(folder / f"{name}_val.json", [item(i) for i in range(VAL)])
    captions = [{"image": f"{i:03d}.jpg", "caption": [f"a {colours[i % 3]} thing", "it is round"]} for i in range(VAL)]
    write_list(folder / "retrieval_val.json", captions)
    write_list(folder / "answers.json", ["yes", "no", *colours])
    return folder


def write_list(path, items):
    path.write_text(json.dumps(items))
    return str(path)


def downstream_command(task, data, logs, model, pretrained, *more, name="run"):
    evaluated = [] if task == "assignment" else ["--val-data", str(data / f"{task}_val.json")]
    answers = ["--answers", str(data / "answers.json")] if task == "vqa" else []
    queue = ["--queue-size", str(QUEUE), "--shortlist", "10"] if task == "retrieval" else []
    return [
        "--task", task, "--train-data", str(data / f"{task}.json"), *evaluated, *answers, *queue,
        "--image-root", str(data / "images"), "--model", model, "--pretrained", str(pretrained),
        *settings(logs, name), "--epochs", "2", "--warmup", "1", "--lr", "1e-3", "--log-every-n-steps", "1", *more,
    ]  # fmt: skip


def settings(logs, name="run"):
    return [
        "--batch-size", "4", "--workers", "0", "--precision", "fp32", "--device", "cpu", "--logs", str(logs),
        "--name", name, "--no-progress",
    ]  # fmt: skip


def figures(evaluation):
    """Without the place in the run."""
    return {name: value for name, value in evaluation.items() if re.match("(ema/)?(val|test)-", name)}
