"""What the tasks after pre-training are made of, without a run."""
import copy
import json
from dataclasses import replace

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from open_clip_elip.identity import Identity, create
from training.distributed import Ranks
from training.errors import UserError
from training.tasks import entailment, nlvr2, vqa
from training.tasks.alignment import AlignmentTask
from training.tasks.base import Engine, Progress
from training.tasks.entailment import SentenceTask
from training.tasks.fused import ListEvaluation, ListSuite
from training.tasks.retrieval import numbered
from training.tasks.vqa import VqaTask

from ...processes import spawn
from ..fusion_runs import ALBEF

AFTER_FIRST_EPOCH = Progress(epoch=1, epoch_steps=0, steps=0, samples=0, plan=None)


def model_of(task):
    torch.manual_seed(0)
    config = json.loads(json.dumps(ALBEF)) | {"task": task, "token_reduction": None}
    config["text_cfg"]["bert"] |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return create(Identity("albef", "x", config, {"size": (32, 32)})).double().train()


def batch_of(count):
    torch.manual_seed(1)
    text = torch.randint(5, 40, (count, 6))
    text[:, 0] = 2
    return {
        "image": torch.randn(count, 3, 32, 32, dtype=torch.float64), "text": text, "label": torch.arange(count) % 3,
        "numbers": 10 + torch.arange(count), "answers": text.roll(1, 0).repeat_interleave(2, 0)[:, :4],
        "which": torch.arange(count).repeat_interleave(2), "weights": torch.arange(2.0 * count).double() / 7,
    }  # fmt: skip


def half(batch, rank):
    rows, answers = slice(2 * rank, 2 * rank + 2), slice(4 * rank, 4 * rank + 4)
    found = {k: v[answers if k in ("answers", "which", "weights") else rows] for k, v in batch.items()}
    return found | {"which": found["which"] - 2 * rank}


def gradients_of(task, run, batch):
    task.gradients([task.prepare(batch)], Engine(run, "fp32", torch.device("cpu")), AFTER_FIRST_EPOCH)
    return {name: p.grad.clone() for name, p in task.model.named_parameters() if p.grad is not None}


def _two_processes(rank):
    ranks = Ranks(torch.device("cpu"), rank, rank, 2)
    for name, kind in (("entailment", SentenceTask), ("vqa", VqaTask)):
        model = model_of(name)
        other = kind(copy.deepcopy(model))
        alone = gradients_of(other, other.model, batch_of(4))
        task = kind(model)
        together = gradients_of(task, DistributedDataParallel(model), half(batch_of(4), rank))
        torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-12)
    model = model_of("retrieval")
    task = AlignmentTask(model, queue_size=6, gather=ranks.gather_tensor)
    task.queues.double()
    gradients_of(task, DistributedDataParallel(model), half(batch_of(4), rank))
    task.after_step(model, applied=lambda: False)
    assert set(task.numbers.tolist()) == {-100}
    task.after_step(model, applied=lambda: True)
    assert task.numbers.tolist() == [10, 11, 12, 13, -100, -100] and int(task.queues["text"].pointer) == 4


def test_two_processes_have_the_gradients_of_one_and_queues_in_the_order_of_ranks():
    spawn(_two_processes)


def test_items():
    assert entailment.read_item({"image": "12", "sentence": "a", "label": "neutral"})[0] == ("12.jpg",)
    assert entailment.read_item({"image": "a.b/12.png", "sentence": "a", "label": "neutral"})[0] == ("a.b/12.png",)
    assert nlvr2.read_item({"images": ["a", "b"], "sentence": "a", "label": True})[1]["label"] == 1
    people = ["red"] * 3 + ["blue"] + [""]
    _, fields = vqa.read_item({"image": "a", "question": "b", "answer": people}, train=True)
    assert fields["answers"] == {"red": pytest.approx(0.6), "blue": 0.2} and fields["people"] == people
    _, fields = vqa.read_item({"image": "a", "question": "b", "answer": "red"}, train=True)
    assert fields["answers"] == {"red": 0.5} and fields["people"] == ["red"]
    read = numbered()
    ids = [7, "7", "b", None, 7]
    assert [read({"image": "x", "caption": "a", "image_id": one})[1]["numbers"] for one in ids] == [0, 0, 1, 2, 0]


def test_text_assignment_draws_what_its_label_says():
    features = torch.nn.functional.normalize(torch.randn(60, 4), dim=1)
    labels, own = torch.arange(60) % 3, torch.arange(60)
    first, second = nlvr2.choose(features, labels)
    assert (first[labels == 0] == own[labels == 0]).all() and (second[labels == 1] == own[labels == 1]).all()
    assert (first != second).all() and ((first != own) & (second != own))[labels == 2].all()
    close = (features * features[torch.where(labels == 0, second, first)]).sum(1)
    assert close.mean() > 0.8  # similar ones


def test_a_batch_that_does_not_fit_is_told():
    def rows(model, batch):
        raise RuntimeError("CUDA out of memory")

    class Data(list):
        def report(self):
            return None

    batch = {"image": torch.zeros(4), "index": torch.arange(4)}
    evaluate = ListEvaluation(Data([batch]), rows, None, Ranks(torch.device("cpu")), "fp32")
    with pytest.raises(UserError, match="does not fit into the memory; lower --batch-size"):
        evaluate(torch.nn.Linear(1, 1))


def test_what_is_due_and_what_is_best():
    suite = ListSuite({"val": lambda model: {"accuracy": 0.5}, "test": lambda model: {"accuracy": 0.7}}, 2, "accuracy")
    assert suite(None, 1, False) == {} and suite(None, 1, True) == {"val-accuracy": 0.5, "test-accuracy": 0.7}
    assert suite.score({"test-accuracy": 0.7}) is None
    assert suite.score({"val-accuracy": 0.5, "ema/val-accuracy": 0.6}) == 0.6
    assert replace(suite, frequency=0)(None, 1, True) == {}
