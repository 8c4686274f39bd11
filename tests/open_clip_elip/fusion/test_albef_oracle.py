"""ALBEF, with ELIP and without, against numbers of the released programs (float64)."""
from __future__ import annotations

import copy

import pytest
import torch

from open_clip_elip.fusion.albef import Albef, AlbefAnswerer, AlbefClassifier
from open_clip_elip.fusion.released import albef, read_released
from training.tasks.albef import AlbefPretraining
from training.tasks.alignment import AlignmentTask
from training.tasks.entailment import SentenceTask
from training.tasks.vqa import VqaTask, rank_answers

from .oracle import Recipe, after_first_epoch, check_shortlists, close, oracle, resized, tensors, with_queues

pytestmark = pytest.mark.usefixtures("float64")

HEADS = ("temp", "vision_proj", "text_proj", "itm_head")


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return Recipe(oracle("albef"))


def configs(recipe: Recipe, image_size: int | None = None) -> tuple[dict, dict]:
    config = recipe.found["config"]
    vision, bert = recipe.configs(image_size or config["image_res"])
    bert |= {"pad_token_id": config["special_tokens"]["pad"]}
    return vision, {"bert": bert, "fusion_layer": config["fusion_layer"]}


def released_word(name: str) -> str:
    """The first word of a weight's released name."""
    word = name.split(".")[0]
    own = word if word in HEADS else "text_encoder"
    return {"visual": "visual_encoder", "head": "cls_head"}.get(word, own)


def norms(named, decoder: tuple[str, ...] = ()) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, value in named:
        word = "text_decoder" if name.split(".")[0] in decoder else released_word(name)
        found[word] = found.get(word, 0.0) + value.pow(2).sum().item()
    return {word: total**0.5 for word, total in found.items()}


def check_gradients(model, expected: dict, decoder: tuple[str, ...] = ()) -> None:
    named = ((name, p.grad) for name, p in model.named_parameters() if p.grad is not None)
    found = norms(named, decoder)
    for word, value in expected.items():
        close(found[word], value, f"gradient of {word}")


def check_twin(twin, expected: dict, decoder: tuple[str, ...] = ()) -> None:
    found = norms(twin.named_parameters(), decoder)
    for word, value in expected.items():
        close(found[word.removesuffix("_m")], value, f"twin's {word}")


def pretrained(recipe: Recipe, elip: bool = False, image_size: int | None = None, **more) -> tuple[Albef, Albef, dict]:
    """The model, its twin, and the queues of the released checkpoint."""
    options = None
    if elip:
        e = recipe.found["config"]["elip"] if "elip" in recipe.found["config"] else recipe.found["elip"]
        options = {
            "method": "elip", "depths": [e["begin_layer"][0], *e["num_act_layers"]],
            "keep_ratio": [1.0, *e["keep_ratio"]], "lam": e["lam"], "text_scale": e["text_scale"],
        }  # fmt: skip
    config = recipe.found["config"]
    model = Albef(config["embed_dim"], *configs(recipe, image_size), options, **more).train()
    found = read_released(recipe.state(), albef(config["fusion_layer"]))
    twin = copy.deepcopy(model).requires_grad_(False)
    for one, state in ((model, found.model), (twin, found.twin)):
        fill(one, state)
    return model, twin, found.rest


def fill(model, state: dict) -> None:
    state = dict(state)
    key = "visual.positional_embedding"
    state[key] = resized(state[key], model.visual.grid_size)
    unused = model.load_state_dict(state, strict=False).unexpected_keys
    assert not [name for name in unused if name.split(".")[0] not in (*HEADS, "mlm_head")]


@pytest.mark.parametrize("kind", ["elip", "plain"])
def test_two_steps_of_pretraining(recipe, kind):
    found, config = recipe.found, recipe.found["config"]
    model, twin, queues = pretrained(recipe, kind == "elip")
    task = AlbefPretraining(model, queue_size=config["queue_size"], momentum=config["momentum"])
    with_queues(task, twin, queues, found["queue_ptr"])
    optimizer = torch.optim.SGD(model.parameters(), lr=config["lr"])
    for inputs, expected in zip(found["pretrain"]["inputs"], found["pretrain"][kind], strict=True):
        image = recipe.draw(inputs["image"], inputs["image_shape"])
        text, masked, labels, *negatives = tensors(
            inputs, "input_ids", "mlm_input_ids", "mlm_labels", "neg_image_idx", "neg_text_idx"
        )
        task.begin()
        close(model.temp, expected["temp"], "temp")
        chosen = (labels.flatten() >= 0).nonzero().squeeze(1)
        losses = model(
            image, text, task.step, masked=masked, chosen=chosen, labels=labels.flatten()[chosen],
            alpha=inputs["alpha"], negatives=negatives,
        )  # fmt: skip
        for name in ("ita", "itm", "mlm"):
            close(losses[name], expected[f"loss_{name}"], name)
        optimizer.zero_grad()
        losses["loss"].backward()
        check_gradients(model, expected["grad_norm_by_module"])
        check_twin(task.twin, expected["momentum_norm_by_module"])
        assert model.tower.token_counts() == expected["vision_tokens"]
        optimizer.step()
        task.after_step(model, applied=lambda: True)
        for name, queue in task.queues.items():
            close(queue.columns.norm(dim=1), expected[f"{name}_queue_row_norms"], name)
        assert queue.pointer.item() == expected["queue_ptr"]


@pytest.mark.parametrize("alpha", [True, False])
def test_a_step_of_retrieval(recipe, alpha):
    found, config = recipe.found["retrieval_train"], recipe.found["config"]
    model, twin, queues = pretrained(recipe, image_size=config["downstream_image_res"], language_head=False)
    inputs = found["inputs"]
    expected = found["expected"] if alpha else found["expected_no_distill"]
    task = AlignmentTask(model, queue_size=config["queue_size"], momentum=config["momentum"])
    with_queues(task, twin, queues, recipe.found["queue_ptr"])
    task.numbers.copy_(torch.tensor(inputs["idx_queue"]))
    task.begin()
    text, numbers, *negatives = tensors(inputs, "input_ids", "idx", "neg_image_idx", "neg_text_idx")
    losses = model(
        recipe.draw(inputs["image"], inputs["image_shape"]), text, task.step, numbers=numbers, negatives=negatives,
        alpha=inputs["alpha"] if alpha else 0.0,
    )  # fmt: skip
    close(losses["ita"], expected["loss_ita"], "ita")
    close(losses["itm"], expected["loss_itm"], "itm")
    if alpha:
        losses["loss"].backward()
        check_gradients(model, expected["grad_norm_by_module"])
        check_twin(task.twin, expected["momentum_norm_by_module"])
        task.after_step(model, applied=lambda: True)
        assert task.numbers.tolist() == expected["idx_queue"]
        close(task.queues["image"].columns.norm(dim=1), expected["image_queue_row_norms"])


def test_retrieval_by_shortlist(recipe):
    found = recipe.found["retrieval_eval"]
    model, *_ = pretrained(recipe, image_size=recipe.found["config"]["downstream_image_res"])
    inputs, expected = found["inputs"], found["expected"]
    image, text = recipe.draw(inputs["image"], inputs["image_shape"]), torch.tensor(inputs["input_ids"])
    metrics = check_shortlists(model, image, text, torch.tensor(inputs["text_to_image"]), inputs["k_test"], expected)
    recalls = {"reranked_image_to_text_R@1": expected["txt_r1"], "reranked_text_to_image_R@1": expected["img_r1"]}
    assert metrics == {name: value / 100 for name, value in recalls.items()}


@pytest.mark.parametrize("name, images", [("ve", 1), ("nlvr2", 2)])
def test_a_step_of_sentence_tasks(recipe, name, images):
    found, config = recipe.found[name], recipe.found["config"]
    inputs, expected = found["inputs"], found["expected"]
    image = recipe.draw(inputs["image"], inputs["image_shape"])
    text, labels = tensors(inputs, "input_ids", "targets")
    head = recipe.shapes(found["new_parameters"])
    classes = head["cls_head.2.bias"][0]
    model, twin, _ = pretrained(recipe)
    of_task = configs(recipe, config["downstream_image_res"])
    model, twin = (
        downstream(recipe, AlbefClassifier(classes, images, *of_task), one, head) for one in (model, twin)
    )
    for key, value in twin.named_parameters():
        if key.startswith("head."):
            official = key.replace("head.", "cls_head_m.")
            value.data.mul_(0.7).add_(recipe.parameter(official, value.shape), alpha=0.3)
    close(model(image, text), found["expected_eval"]["prediction"])
    for alpha in (True, False):
        task = SentenceTask(model, momentum=config["downstream_momentum"], alpha=inputs["alpha"] if alpha else 0)
        if alpha:
            task.twin = twin.requires_grad_(False)
        task.begin()
        loss = task.losses(model, {"image": image, "text": text, "label": labels}, after_first_epoch())["loss"]
        close(loss, (expected if alpha else found["expected_no_distill"])["loss"], name)
        if alpha:
            loss.backward()
            check_gradients(model, expected["grad_norm_by_module"])
            check_twin(task.twin, expected["momentum_norm_by_module"])


def downstream(recipe: Recipe, model, albef, new: dict | None = None):
    state = model.from_pretraining(albef.state_dict())
    for name, shape in (new or {}).items():
        state[name.replace("cls_head.", "head.")] = recipe.parameter(name, shape)
    fill(model, state)
    return model.train()


def test_a_step_of_vqa_and_ranking(recipe):
    found, config = recipe.found["vqa"], recipe.found["config"]
    inputs, expected = found["inputs"], found["expected"]
    model, twin, _ = pretrained(recipe)
    of_task = configs(recipe, config["downstream_image_res"])
    model, twin = (downstream(recipe, AlbefAnswerer(*of_task), one) for one in (model, twin))
    image = recipe.draw(inputs["image"], inputs["image_shape"])
    text, answers, k, weights = tensors(inputs, "question_ids", "answer_ids", "k", "weights")
    which = torch.arange(len(text)).repeat_interleave(k)
    batch = {"image": image, "text": text, "answers": answers, "which": which, "weights": weights}
    rank = found["rank_inputs"]
    with torch.no_grad():
        memory = model.read_questions(image, text)
    ids, probabilities, first = rank_answers(model, memory, torch.tensor(rank["answer_ids"]), rank["k_test"])
    close(first, found["expected_rank"]["prob_first_token"])
    assert ids.tolist() == found["expected_rank"]["topk_ids"]
    close(probabilities, found["expected_rank"]["topk_probs"])
    for alpha in (True, False):
        task = VqaTask(model, momentum=config["downstream_momentum"], alpha=inputs["alpha"] if alpha else 0)
        if alpha:
            task.twin = twin.requires_grad_(False)
        task.begin()
        loss = task.losses(model, batch, after_first_epoch())["loss"]
        close(loss, (expected if alpha else found["expected_no_distill"])["loss"])
        if alpha:
            loss.backward()
            decoder = ("decoder", "embeddings", "lm_head")
            check_gradients(model, expected["grad_norm_by_module"], decoder)
            check_twin(task.twin, expected["momentum_norm_by_module"], decoder)
