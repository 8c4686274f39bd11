"""BLIP against all tensors of the released programs (float64), where `ELIP_ORACLE` names a folder that has them."""
from __future__ import annotations

import shutil

import pytest
import torch
import torch.distributed as dist

from open_clip_elip.fusion.blip import Blip, BlipAnswerer, BlipCaptioner, BlipPairClassifier
from open_clip_elip.fusion.generate import beam_search, nucleus, sample
from open_clip_elip.fusion.momentum import twin_of
from open_clip_elip.fusion.objectives import distilled, negative_weights, places_to_write
from open_clip_elip.fusion.released import BLIP, read_released, write_released
from open_clip_elip.fusion.steps import SMOOTHING, written
from open_clip_elip.fusion.tokenizer import blip_caption, blip_question
from training.distributed import Ranks
from training.evaluation.captioning import score_captions
from training.tasks.alignment import AlignmentTask
from training.tasks.blip import FLOOR, BlipPretraining
from training.tasks.vqa import VqaTask, rank_answers

from ...processes import spawn
from .oracle import NO_DROPOUT, after_first_epoch, check_shortlists, close, folder_of_tensors, load_tensors, with_queues
from .test_blip_oracle import fill, until

FOLDER = folder_of_tensors("blip", "caption_beams.pt")
pytestmark = [
    pytest.mark.skipif(FOLDER is None, reason="ELIP_ORACLE names no folder with the tensors"),
    pytest.mark.usefixtures("float64"),
]
SEP, DEC = 3, 108


def load(name: str):
    return load_tensors(FOLDER / name)


@pytest.fixture(scope="module")
def start():
    return load("weights.pt")


def parts(config: dict, image_size: int | None = None) -> tuple[dict, dict]:
    vision = {
        "image_size": image_size or config["image_size"], "layers": config["depth"], "width": config["width"],
        "head_width": config["width"] // config["heads"], "patch_size": config["patch"], "no_ln_pre": True,
        "mlp_ratio": config["mlp_ratio"], "norm_kwargs": {"eps": config["layer_norm_eps_vit"]},
    }  # fmt: skip
    bert = {
        "vocab_size": config["vocab_size"], "hidden_size": config["width"], "num_hidden_layers": config["text_layers"],
        "num_attention_heads": config["text_heads"], "intermediate_size": config["text_intermediate"],
        "max_position_embeddings": config["max_pos"], "layer_norm_eps": config["layer_norm_eps_text"],
    }  # fmt: skip
    return vision, {"bert": bert | NO_DROPOUT}


def models(start: dict, elip: bool = False, image_size: int | None = None, **more) -> tuple[Blip, Blip, dict]:
    config = start["config"]
    options = {
        "method": "elip", "depths": [config["begin"][0], *config["act"]], "keep_ratio": [1.0, *config["keep"]],
        "lam": 0.8, "text_scale": "none",
    }  # fmt: skip
    found = read_released(start["model"], BLIP)
    model = fill(Blip(config["embed_dim"], *parts(config, image_size), options if elip else None, **more), found.model)
    heads = {name: found.model[name] for name in ("temp", "itm_head.weight", "itm_head.bias")}
    return model, fill(twin_of(model), found.twin, heads).requires_grad_(False), found.rest


def task_of(start: dict, model: Blip, twin: Blip, queues: dict, kind: type = BlipPretraining, **more) -> AlignmentTask:
    size = queues["image_queue"].shape[1]
    task = kind(model, queue_size=size, momentum=start["config"]["momentum"], **more)
    with_queues(task, twin, queues, int(queues["queue_ptr"]))
    return task


def check_gradients(model, norms: dict, tensors: dict | None = None) -> None:
    """Of weights by their released names. Those of keys' biases are 0 but for rounding."""
    own = dict(model.named_parameters())

    def gradient(name: str) -> torch.Tensor:
        return own[ours(name)].grad

    for name, expected in norms.items():
        if gradient(name) is not None and "self.key.bias" not in name:
            assert gradient(name).norm().item() == pytest.approx(expected, rel=1e-8, abs=1e-10), name
    for name, expected in (tensors or {}).items():
        close(gradient(name).reshape(expected.shape), expected, name)


def ours(name: str) -> str:
    """Of a weight by its released name, the twin's too."""
    model, twin, _ = read_released({name: torch.zeros(1, 1, 1), "text_encoder.": torch.zeros(1)}, BLIP)
    return next(iter(twin or model))


def step(task: AlignmentTask, inputs: dict, negatives: dict, **more) -> dict[str, torch.Tensor]:
    text = inputs["input_ids"]
    if isinstance(task, BlipPretraining):
        more |= {"chosen": places_to_write(task.model.mask(text))}
    task.begin()
    drawn = [negatives[name] for name in ("image_for_text", "text_for_image")]
    losses = task.model(inputs["image"], text, task.step, alpha=inputs["alpha"], negatives=drawn, **more)
    losses["loss"].backward()
    return losses


def test_released_names_are_written_as_they_were_read(start):
    model, twin, rest = models(start)
    written_ = write_released(model.state_dict(), twin.state_dict(), BLIP) | rest
    assert written_.keys() == start["model"].keys()
    for name, value in start["model"].items():
        assert torch.equal(written_[name], value), name


@pytest.mark.parametrize("file", ["pretrain_plain.pt", "pretrain_elip_exact_merge.pt"])
def test_pretraining(start, file):
    found, elip = load(file), "elip" in file
    inputs = load("pretrain_elip.pt")["steps"]
    model, twin, queues = models(start, elip)
    task = task_of(start, model, twin, queues)
    for expected, one in zip(found["steps"], inputs, strict=True):
        model.zero_grad()
        losses = step(task, one["inputs"], expected["negatives"])
        for name in ("ita", "itm", "lm"):
            close(losses[name], expected["losses"][name], name)
        check_gradients(model, expected["grad_norm"], expected["grad"])
        task.after_step(model, applied=lambda: True)
        for p in model.parameters():
            p.data -= found["sgd_lr"] * p.grad
        if "after" in expected:
            for name, queue in task.queues.items():
                close(queue.columns, expected["after"][f"{name}_queue"])
            own = dict(twin.named_parameters())
            for name, value in expected["after"]["momentum"].items():
                close(own[ours(name)].reshape(value.shape), value, name)
    weights = negative_weights(torch.zeros(2, 2), torch.eye(2) > 0, FLOOR)
    assert weights.tolist() == [[0, 0.5 + FLOOR], [0.5 + FLOOR, 0]]


def test_a_queue_that_wraps_and_a_temperature_out_of_bounds(start):
    found = load("pretrain_elip_wrap.pt")
    model, twin, queues = models(start, elip=True)
    model.temp.data.fill_(found["before"]["temp"])
    task, (expected,) = task_of(start, model, twin, queues | found["before"]), found["steps"]
    losses = step(task, expected["inputs"], expected["negatives"])
    for name in ("ita", "itm", "lm"):  # the release adds 1e-6 to what merge weights are divided by
        assert losses[name].item() == pytest.approx(expected["losses"][name], rel=1e-4), name
    assert model.temp.grad.norm().item() == pytest.approx(expected["grad_norm"]["temp"], rel=1e-3)
    task.after_step(model, applied=lambda: True)
    for name, queue in task.queues.items():
        close(queue.columns, expected["after"][f"{name}_queue"])
        assert queue.pointer == expected["after"]["queue_ptr"] == 2


def test_two_processes():
    spawn(rank_main)


def rank_main(rank: int) -> None:
    torch.set_default_dtype(torch.float64)
    start, ranks = load("weights.pt"), Ranks(torch.device("cpu"), rank=rank, world_size=2)
    for file, elip, tolerance in (("pretrain_elip_2ranks.pt", True, 1e-3), ("retrieval_train_2ranks.pt", False, 1e-8)):
        found = load(file)
        expected, more, decoder = found["ranks"][rank], {}, elip
        model, twin, queues = models(start, elip, None if elip else 96, decoder=decoder)
        queues |= {"queue_ptr": found["before"].get("queue_ptr", 0)}
        if elip:
            task = task_of(start, model, twin, queues, gather=ranks.gather_tensor)
        else:
            everywhere = ranks.gather_with_gradient
            task = task_of(
                start, model, twin, queues, AlignmentTask, gather=ranks.gather_tensor, everywhere=everywhere
            )
            more = {"numbers": expected["inputs"]["idx"].flatten()}
        losses = step(task, expected["inputs"], expected["negatives"], **more)
        for name in ("ita", "itm"):
            assert losses[name].item() == pytest.approx(expected["losses"][name], rel=tolerance / 10), name
        for p in model.parameters():
            dist.all_reduce(p.grad)
            p.grad /= 2
        if elip:
            for name, value in found["mean_grad"].items():
                own = dict(model.named_parameters())[ours(name)].grad
                torch.testing.assert_close(own.reshape(value.shape), value, rtol=1e-2, atol=1e-3 * value.abs().max())
        else:
            check_gradients(model, found["mean_grad_norm"], found["mean_grad"])
        task.after_step(model, applied=lambda: True)
        for name, queue in task.queues.items():
            close(queue.columns, found["after"][f"{name}_queue"])


def test_retrieval(start):
    found = load("retrieval_train.pt")
    model, twin, queues = models(start, image_size=96, decoder=False)
    close(model.visual.positional_embedding, found["before"]["pos_embed"][0])
    task = task_of(start, model, twin, queues | {"queue_ptr": 0}, AlignmentTask, everywhere=lambda rows: rows)
    for expected in found["steps"]:
        model.zero_grad()
        losses = step(
            task, expected["inputs"], expected["negatives"], numbers=expected["inputs"]["idx"].flatten()
        )
        for name in ("ita", "itm"):
            close(losses[name], expected["losses"][name], name)
        check_gradients(model, expected["grad_norm"], expected["grad"])
        task.after_step(model, applied=lambda: True)
        for p in model.parameters():
            p.data -= found["sgd_lr"] * p.grad
        for name, queue in task.queues.items():
            close(queue.columns, expected["after"][f"{name}_queue"])


def test_ranking_again(start):
    found = load("retrieval_eval.pt")
    model, *_ = models(start, image_size=96, decoder=False)
    image_of = torch.arange(3).repeat_interleave(torch.tensor(found["captions_per_image"]))
    assert [blip_caption(one) for one in found["captions_raw"]] == found["captions"]
    text = found["text_ids"].clone()
    text[:, 0] = 2
    expected = found | {"itc_scores": found["sims"]}
    recalls = check_shortlists(model.eval(), found["image"], text, image_of, found["k_test"], expected)
    assert 100 * recalls["reranked_image_to_text_R@1"] == found["result"]["txt_r1"]
    states = model.image_states(found["image"][:1])
    close(model.match(None, text, model.read(states))[:, 1], found["itm_logits_all_pairs"][0, :, 1])


@pytest.fixture
def captioner(start):
    changed = start["model"] | load("caption.pt")["changed_weights"]
    return fill(BlipCaptioner(*parts(start["config"])), read_released(changed, BLIP).model)


def test_captions(captioner):
    found, model = load("caption.pt"), captioner
    chosen = places_to_write(found["attention_mask"].bool(), found["prompt_length"])
    loss = written(model(found["image"], found["input_ids"], chosen), found["input_ids"], chosen)
    close(loss, found["loss"])
    loss.backward()
    check_gradients(model, found["grad_norm"], found["grad"])
    memory = model.eval().read(model.image_states(found["image"]))
    cases = [(memory, found["generated"].values())]
    more = load("caption_beams.pt")
    cases.append((model.read(model.image_states(more["image"])), more["cases"]))
    for memory, group in cases:
        for case in group:
            settings = case["settings"]
            limits = {"longest": settings["max_length"], "shortest": settings["min_length"]}
            limits["repetition"], prompt = settings.get("repetition_penalty", 1.0), case["prompt_ids"][0]
            if settings["num_beams"] == 1:
                ids = sample(model.decoder, memory, prompt, SEP, top_k=1, **limits)
            else:
                ids = beam_search(model.decoder, memory, prompt, SEP, beams=settings["num_beams"], **limits)
            expected = [until(SEP, one) for one in case["ids"].tolist()]
            assert [until(SEP, one)[: len(e)] for one, e in zip(ids.tolist(), expected, strict=True)] == expected


def test_nucleus(captioner):
    found = load("caption.pt")["nucleus"]
    prompt = load("caption.pt")["generated"]["greedy"]["prompt_ids"]
    scores = torch.where(found["logits_first"] < 0, 1.1, 1 / 1.1)
    penalised = found["logits_first"].scatter(1, prompt, (found["logits_first"] * scores).gather(1, prompt))
    close(nucleus(penalised, 0.9, 50), found["probs_first"])


def test_answers(start):
    found = load("vqa.pt")
    model = fill(BlipAnswerer(*parts(start["config"], 80)), read_released(start["model"], BLIP).model)
    assert [blip_question(one) for one in found["questions_raw"]] == found["questions"]
    which = torch.arange(3).repeat_interleave(torch.tensor(found["n"]))
    task = VqaTask(model, alpha=0, smoothing=SMOOTHING)
    text, answers = found["question_ids"], found["answer_ids"]
    close(model(task.step, found["image"], text, answers, which, alpha=0), found["loss_per_answer"])
    batch = {"image": found["image"], "text": text, "answers": answers, "which": which}
    loss = task.losses(model, batch | {"weights": found["answer_weights"]}, after_first_epoch())["loss"]
    close(loss, found["loss"])
    loss.backward()
    check_gradients(model, found["grad_norm"])
    memory, rank = model.eval().read_questions(found["image"], text), found["rank"]
    for best in (4, 10):
        expected = rank[f"k{best}"]
        ids, _, first = rank_answers(model, memory, rank["ids"], best, count_first_twice=False, smoothing=SMOOTHING)
        close(first.topk(best).values, expected["topk_probs"])
        assert ids[:, 0].tolist() == torch.as_tensor(expected["answer"]).tolist()


def test_pairs_of_images(start):
    found = load("nlvr2.pt")
    new = read_released({**found["new_weights"], "visual_encoder.cls_token": torch.zeros(1, 1, 32)}, BLIP).model
    del new["visual.class_embedding"]
    model = BlipPairClassifier(2, *parts(start["config"]))
    fill(model, read_released(start["model"], BLIP).model, new)
    logits = model(torch.cat([found["image0"], found["image1"]]), found["input_ids"])
    close(logits, found["logits"])
    loss = distilled(logits, found["targets"], None, 0)
    close(loss, found["loss"])
    loss.backward()
    check_gradients(model, found["grad_norm"])


def test_cleaning():
    found = load("text_cleaning.pt")
    columns = (found[name] for name in ("raw", "caption30", "caption50", "question50"))
    for raw, short, long, question in zip(*columns, strict=True):
        assert (blip_caption(raw), blip_caption(raw, 50), blip_question(raw)) == (short, long, question)


def test_scores_of_captions():
    if shutil.which("java") is None:
        pytest.skip("there is no java")
    pytest.importorskip("pycocoevalcap")
    found = load("caption_metrics.pt")
    scores = score_captions(found["captions"], found["references"])
    for name, value in found["scores"].items():
        assert scores[name.replace("Bleu_", "BLEU-").replace("_", "-")] == pytest.approx(value, abs=1e-9), name
