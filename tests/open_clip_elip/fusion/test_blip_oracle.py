"""BLIP, with ELIP and without, against numbers of the released programs (float64)."""
from __future__ import annotations

import pytest
import torch

from open_clip_elip.fusion import steps
from open_clip_elip.fusion.bert import read
from open_clip_elip.fusion.blip import Blip, BlipAnswerer, BlipCaptioner, BlipPairClassifier
from open_clip_elip.fusion.generate import beam_search, sample
from open_clip_elip.fusion.momentum import twin_of
from open_clip_elip.fusion.objectives import distilled, places_to_write
from open_clip_elip.fusion.released import BLIP, read_released
from open_clip_elip.fusion.steps import SMOOTHING, written
from training.tasks.alignment import AlignmentTask
from training.tasks.blip import BlipPretraining
from training.tasks.vqa import VqaTask, rank_answers

from .oracle import Recipe, after_first_epoch, check_shortlists, close, oracle, resized, tensors, with_queues

pytestmark = pytest.mark.usefixtures("float64")


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return Recipe(oracle("blip"))


def configs(recipe: Recipe, image_size: int | None = None) -> tuple[dict, dict]:
    vision, bert = recipe.configs(image_size or recipe.found["config"]["image_size"])
    return vision, {"bert": bert}


def fill(model, state: dict, changes: dict | None = None):
    """Of a released checkpoint's weights, those that the model has; each of its own has to be there."""
    state = model.from_pretraining(dict(state)) | (changes or {})
    key = "visual.positional_embedding"
    state[key] = resized(state[key], model.visual.grid_size)
    assert not model.load_state_dict(state, strict=False).missing_keys
    return model.train()


def aligning(recipe: Recipe, elip: bool = False, image_size: int | None = None, **more) -> tuple[Blip, Blip, dict]:
    """The model, its twin, and the queues of the released checkpoint."""
    config, options = recipe.found["config"], None
    if elip:
        e = config["elip"]
        options = {
            "method": "elip", "depths": [e["begin_layer"][0], *e["num_act_layers"]],
            "keep_ratio": [1.0, *e["keep_ratio"]], "lam": e["lam"], "text_scale": e["text_scale"],
        }  # fmt: skip
    found = read_released(recipe.state(), BLIP)
    model = fill(Blip(config["embed_dim"], *configs(recipe, image_size), options, **more), found.model)
    shared = {name: found.model[name] for name in ("temp", "itm_head.weight", "itm_head.bias")}
    return model, fill(twin_of(model), found.twin, shared).requires_grad_(False), found.rest


def norms(named) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, value in named:
        word = name.split(".")[0]
        word = {"visual": "visual_encoder", "text": "text_encoder", "decoder": "text_decoder"}.get(word, word)
        word = "cls_head" if word == "head" else word
        found[word] = found.get(word, 0.0) + value.pow(2).sum().item()
    return {word: total**0.5 for word, total in found.items()}


def check_gradients(model, expected: dict) -> None:
    found = norms((name, p.grad) for name, p in model.named_parameters() if p.grad is not None)
    for word, value in expected.items():
        close(found[word], value, f"gradient of {word}")


@pytest.mark.parametrize("kind", ["elip", "plain"])
@pytest.mark.parametrize("shortcuts", [True, False])
def test_two_steps_of_pretraining(recipe, kind, shortcuts):
    found, config = recipe.found, recipe.found["config"]
    model, twin, queues = aligning(recipe, kind == "elip")
    model.tower.shortcuts = twin.tower.shortcuts = shortcuts
    task = BlipPretraining(model, queue_size=config["queue_size"], momentum=config["momentum"])
    with_queues(task, twin, queues, found["queue_ptr"])
    optimizer = torch.optim.SGD(model.parameters(), lr=config["lr"])
    for inputs, expected in zip(found["pretrain"]["inputs"], found["pretrain"][kind], strict=True):
        image = recipe.draw(inputs["image"], inputs["image_shape"])
        text, *negatives = tensors(inputs, "input_ids", "neg_image_idx", "neg_text_idx")
        batch = task.prepare({"text": text})
        task.begin()
        close(model.temp, expected["temp"], "temp")
        losses = model(
            image, batch["text"], task.step, chosen=batch["chosen"], tokens=batch["tokens"], alpha=inputs["alpha"],
            negatives=negatives,
        )  # fmt: skip
        for name in ("ita", "itm", "lm"):
            close(losses[name], expected[f"loss_{name}"], name)
        optimizer.zero_grad()
        losses["loss"].backward()
        check_gradients(model, expected["grad_norm_by_module"])
        found_twin = norms(task.twin.named_parameters())
        for word, value in expected["momentum_norm_by_module"].items():
            close(found_twin[word.removesuffix("_m")], value, word)
        assert model.tower.token_counts() == expected["vision_tokens"]
        optimizer.step()
        task.after_step(model, applied=lambda: True)
        for name, queue in task.queues.items():
            close(queue.columns.norm(dim=1), expected[f"{name}_queue_row_norms"], name)
        assert queue.pointer.item() == expected["queue_ptr"]


def test_a_step_of_captioning(recipe):
    found = recipe.found["caption"]
    inputs, expected = found["inputs"], found["expected"]
    text, targets = tensors(inputs, "input_ids", "targets")
    model = captioner(recipe)
    chosen = places_to_write(model.mask(text), inputs["prompt_length"])
    assert torch.equal(text.flatten()[chosen + 1], targets[:, 1:][targets[:, 1:] >= 0])
    loss = written(model(recipe.draw(inputs["image"], inputs["image_shape"]), text, chosen), text, chosen)
    close(loss, expected["loss"])
    loss.backward()
    check_gradients(model, expected["grad_norm_by_module"])


def captioner(recipe: Recipe) -> BlipCaptioner:
    state = recipe.state()
    for name, change in recipe.found["caption"]["changed_weights"].items():
        for n in range(recipe.found["config"]["text_layers"] if ".N." in name else 1):
            value = state[name.replace(".N.", f".{n}.")]
            if "multiply" in change:
                value *= change["multiply"]
            else:
                value[change["index"]] = change["set"]
    return fill(BlipCaptioner(*configs(recipe)), read_released(state, BLIP).model)


def test_captions_by_beams_and_greedily(recipe):
    found, sep = recipe.found["caption"], recipe.found["config"]["special_tokens"]["sep"]
    model, inputs = captioner(recipe).eval(), found["generate_inputs"]
    images = recipe.draw(inputs["image"], inputs["image_shape"])
    for part in (slice(None), slice(6, 7)):  # by itself as in a batch
        memory = model.read(model.image_states(images[part]))
        for case in found["expected_generate"]:
            settings = case["settings"]
            limits = {"longest": settings["max_length"], "shortest": settings["min_length"]}
            prompt = torch.tensor(case["prompt_ids"]) if "prompt_ids" in case else None
            prompt = prompt if prompt.ndim == 1 else prompt[0]
            if settings["num_beams"] > 1:
                ids = beam_search(model.decoder, memory, prompt, sep, beams=settings["num_beams"], **limits)
            else:
                ids = sample(model.decoder, memory, prompt, sep, top_k=1, repetition=1.0, **limits)
            assert [until(sep, one) for one in ids.tolist()] == case["ids"][part], settings


def until(end: int, ids: list[int]) -> list[int]:
    return ids[: ids.index(end) + 1] if end in ids else ids


def batch_of(recipe: Recipe, inputs: dict, size: str = "image_shape") -> torch.Tensor:
    return recipe.draw(inputs["image"], inputs[size])


def downstream(recipe: Recipe, model_of, inputs: dict, changes: dict | None = None):
    model = model_of(*configs(recipe, inputs["image_shape"][-1]))
    return fill(model, read_released(recipe.state(), BLIP).model, changes)


def test_a_step_of_vqa_ranking_and_generation(recipe):
    found, special = recipe.found["vqa"], recipe.found["config"]["special_tokens"]
    inputs, expected, rank = found["inputs"], found["expected"], found["rank_inputs"]
    model = downstream(recipe, BlipAnswerer, inputs)
    image = batch_of(recipe, inputs)
    text, answers, n, weights = tensors(inputs, "question_ids", "answer_ids", "n", "weights")
    which = torch.arange(len(text)).repeat_interleave(n)
    task = VqaTask(model, alpha=0, smoothing=SMOOTHING)
    batch = {"image": image, "text": text, "answers": answers, "which": which, "weights": weights}
    close(model(task.step, image, text, answers, which, alpha=0), expected["loss_per_answer"])
    loss = task.losses(model, batch, after_first_epoch())["loss"]
    close(loss, expected["loss"])
    loss.backward()
    check_gradients(model, expected["grad_norm_by_module"])
    model.eval()
    with torch.no_grad():
        memory = model.read_questions(image, text)
        ids, _, first = rank_answers(
            model, memory, torch.tensor(rank["answer_ids"]), rank["k_test"], count_first_twice=False,
            smoothing=SMOOTHING,
        )  # fmt: skip
        ones = read(model.decoder.bert.encoder.layer, model.look(text, model.read(model.image_states(image))))
    expected = found["expected_rank"]
    assert ids[:, 0].tolist() == expected["answer"]
    close(first.topk(rank["k_test"]).values, expected["topk_probs"])
    assert first.topk(rank["k_test"]).indices.tolist() == expected["topk_ids"]
    settings = found["expected_generate"]["settings"]
    generated = beam_search(
        model.decoder, ones, torch.tensor([special["dec"]]), special["sep"], beams=settings["num_beams"],
        longest=settings["max_length"], shortest=settings["min_length"],
    )  # fmt: skip
    assert [until(special["sep"], one) for one in generated.tolist()] == found["expected_generate"]["ids"]


def test_a_step_of_nlvr2(recipe):
    found = recipe.found["nlvr2"]
    inputs, expected = found["inputs"], found["expected"]
    changes, names = {}, recipe.shapes(found["new_parameters"])
    changes |= {BLIP.ours(name): recipe.parameter(name, shape) for name, shape in names.items()}
    model = downstream(recipe, lambda *of: BlipPairClassifier(2, *of), inputs, changes)
    own = dict(model.named_parameters())
    for name, shape in recipe.shapes(found["blended_parameters"]).items():
        own[BLIP.ours(name)].data.mul_(0.7).add_(recipe.parameter(name, shape), alpha=0.3)
    text, labels = tensors(inputs, "input_ids", "targets")
    logits = model(batch_of(recipe, inputs), text)
    close(logits, expected["logits"])
    loss = distilled(logits, labels, None, 0)
    close(loss, expected["loss"])
    loss.backward()
    check_gradients(model, expected["grad_norm_by_module"])


def test_a_step_of_retrieval(recipe):
    found, config = recipe.found["retrieval_train"], recipe.found["config"]
    inputs, expected = found["inputs"], found["expected"]
    model, twin, queues = aligning(recipe, image_size=inputs["image_shape"][-1], decoder=False)
    task = AlignmentTask(
        model, queue_size=config["queue_size"], momentum=config["momentum"], everywhere=lambda rows: rows
    )
    with_queues(task, twin, queues, inputs["queue_ptr"])
    task.numbers.copy_(torch.tensor(inputs["idx_queue"]))
    task.begin()
    text, numbers, *negatives = tensors(inputs, "input_ids", "idx", "neg_image_idx", "neg_text_idx")
    more = {"numbers": numbers, "negatives": negatives, "alpha": inputs["alpha"]}
    losses = model(batch_of(recipe, inputs), text, task.step, **more)
    close(losses["ita"], expected["loss_ita"], "ita")
    close(losses["itm"], expected["loss_itm"], "itm")
    losses["loss"].backward()
    check_gradients(model, expected["grad_norm_by_module"])
    task.after_step(model, applied=lambda: True)
    assert task.numbers.tolist() == expected["idx_queue"]
    for name, queue in task.queues.items():
        close(queue.columns.norm(dim=1), expected[f"{name}_queue_row_norms"], name)


def test_negatives_of_retrieval_are_drawn_by_the_models_own_features(recipe, monkeypatch):
    found = recipe.found["retrieval_train"]
    inputs, expected, drawn = found["inputs"], found["expected"], []
    model, twin, queues = aligning(recipe, image_size=inputs["image_shape"][-1], decoder=False)
    task = AlignmentTask(model, queue_size=16, everywhere=lambda rows: rows)
    with_queues(task, twin, queues, 0)
    text, numbers = tensors(inputs, "input_ids", "idx")
    monkeypatch.setattr(steps, "draw", lambda weights: drawn.append(weights[0]) or torch.full((len(weights),), -1))
    task.model.temp.data.clamp_(0.001, 0.5)
    model(batch_of(recipe, inputs), text, task.step, numbers=numbers, alpha=0.0)
    for weights, name in zip(drawn, ("image", "text"), strict=True):
        torch.testing.assert_close(
            weights, torch.tensor(expected[f"neg_weights_{name}_row0"]), rtol=0, atol=2 * steps.FLOOR
        )


def test_retrieval_by_shortlist(recipe):
    found = recipe.found["retrieval_eval"]
    inputs, expected = found["inputs"], found["expected"]
    model, *_ = aligning(recipe, image_size=inputs["image_shape"][-1], decoder=False)
    text, image_of = tensors(inputs, "input_ids", "text_to_image")
    recalls = check_shortlists(model.eval(), batch_of(recipe, inputs), text, image_of, inputs["k_test"], expected)
    for way, name in (("image_to_text", "txt_r1"), ("text_to_image", "img_r1")):
        assert 100 * recalls[f"reranked_{way}_R@1"] == pytest.approx(expected[name], abs=1e-9)
