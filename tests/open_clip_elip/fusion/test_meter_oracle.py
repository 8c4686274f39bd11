"""METER, with ELIP and without, against numbers of the released programs (float64)."""
from __future__ import annotations

import pytest
import torch

from open_clip_elip.fusion.meter import Meter, MeterClassifier, MeterRetriever
from open_clip_elip.fusion.released import METER, read_released
from open_clip_elip.fusion.steps import meter_losses, ranking_losses
from training.tasks.meter_vqa import soft_loss, soft_targets

from .oracle import NO_DROPOUT, Recipe, close, oracle, resized, tensors

pytestmark = [pytest.mark.usefixtures("float64"), pytest.mark.parametrize("kind", ["elip", "plain"])]
HEADS = ("vqa_classifier", "nlvr2_classifier", "snli_classifier", "nlvr2_token_type_embeddings")
WORDS = {"visual": "vit_model", "text": "text_transformer", "mlm_head": "mlm_score", "itm_head": "itm_score"}


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return Recipe(oracle("meter"))


def built(recipe: Recipe, kind: str, image_size: int, of, *args, head: str = ""):
    """A model with the released weights, of the `head` that it has."""
    config, options = recipe.found["config"], None
    vision, text = recipe.configs(image_size)
    del vision["no_ln_pre"]
    fusion = NO_DROPOUT | {
        "num_hidden_layers": config["co_layers"], "num_attention_heads": config["co_heads"],
        "intermediate_size": config["co_intermediate_size"], "layer_norm_eps": config["co_layer_norm_eps"],
    }  # fmt: skip
    if kind == "elip":
        e = config["elip"]
        options = {
            "method": "elip", "depths": [e["begin_layer"][0], *e["num_act_layers"]],
            "keep_ratio": [1.0, *e["keep_ratio"]], "lam": e["lam"], "text_scale": e["text_scale"],
        }  # fmt: skip
    text = {"context_length": config["max_positions"], "bert": text, "fusion": fusion}
    more = {"num_images": 2} if head == "nlvr2" else {}
    model = of(*args, config["hidden_size"], vision, text, options, **more)
    state = recipe.state()
    if head == "nlvr2":
        state["token_type_embeddings.weight"] = state["nlvr2_token_type_embeddings.weight"]
    state = {n: v for n, v in state.items() if n.partition(".")[0] not in HEADS or n.startswith(f"{head}_classifier")}
    state = read_released(state, METER).model
    key = "visual.positional_embedding"
    state[key] = resized(state[key], model.visual.grid_size)
    own = model.state_dict()
    model.load_state_dict({name: state[name] for name in own})
    assert {name.partition(".")[0] for name in state.keys() - own.keys()} <= {"mlm_head", "itm_head", "rank_output"}
    return model.train()


def norms(named, head: str = "") -> dict[str, float]:
    found: dict[str, float] = {}
    for name, value in named:
        word = name.partition(".")[0]
        word = f"{head}_classifier" if word == "head" else WORDS.get(word, word)
        found[word] = found.get(word, 0.0) + value.pow(2).sum().item()
    return {word: total**0.5 for word, total in found.items()}


def check_gradients(model, expected: dict, single: dict | None = None, head: str = "") -> None:
    named = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
    found = norms(named, head)
    for word, value in expected.items():
        close(found[word], value, f"gradient of {word}")
    ours = {name: grad for name, grad in named}
    for name, value in (single or {}).items():
        close(ours[METER.ours(name)].norm(), value, f"gradient of {name}")


@pytest.mark.parametrize("shortcuts", [True, False])
def test_two_steps_of_pretraining(recipe, kind, shortcuts):
    found, config = recipe.found, recipe.found["config"]
    model = built(recipe, kind, config["image_size"], Meter)
    model.tower.shortcuts = shortcuts
    optimizer = torch.optim.SGD(model.parameters(), lr=config["lr"])
    for inputs, expected in zip(found["pretrain"]["inputs"], found["pretrain"][kind], strict=True):
        text, mask, masked, labels, matches = tensors(
            inputs, "text_ids", "text_masks", "text_ids_mlm", "text_labels_mlm", "itm_labels"
        )
        assert torch.equal(model.mask(text), mask > 0)
        chosen, own = (labels.flatten() >= 0).nonzero().squeeze(1), torch.arange(len(text))
        images = [recipe.draw(inputs[name], inputs["image_shape"]) for name in ("image", "false_image")]
        fields = {
            "masked": masked, "chosen": chosen, "labels": labels.flatten()[chosen], "matches": matches,
            "seen": own + len(text) * (1 - matches), "tokens": model.tokens_in(text),
        }  # fmt: skip
        losses = model(torch.cat(images), text, meter_losses, **fields)
        for name in ("mlm", "itm"):
            close(losses[name], expected[name]["loss"], name)
            optimizer.zero_grad()
            losses[name].backward(retain_graph=True)
            check_gradients(model, expected[name]["grad_norm_by_module"], expected[name]["grad_norm"])
            assert model.tower.token_counts() == expected[name]["vision_tokens"]
        optimizer.zero_grad()
        (losses["mlm"] + losses["itm"]).backward()
        check_gradients(model, expected["total_grad_norm_by_module"])
        optimizer.step()
        after = norms(model.named_parameters())
        for word, value in expected.get("param_norm_by_module_after_sgd", {}).items():
            if word in after:  # but what has no use
                close(after[word], value, f"{word} after the step")


@pytest.mark.parametrize(
    "head, args", [("vqa", ["vqa_labels", 50]), ("snli", [3, 10]), ("nlvr2", [2, 10])], ids=["vqa", "snli", "nlvr2"]
)
def test_a_step_of_a_classifier(recipe, kind, head, args):
    found, config = recipe.found[head], recipe.found["config"]
    inputs, expected = found["inputs"], found[kind]
    args = [config.get(one, one) for one in args]
    model = built(recipe, kind, config["downstream_image_size"], MeterClassifier, *args, head=head)
    names = [name for name in ("image", "image_0", "image_1") if name in inputs]
    image = torch.cat([recipe.draw(inputs[name], inputs["image_shape"]) for name in names])
    logits = model(image, torch.tensor(inputs["text_ids"]), reduce=kind == "elip")
    close(logits, expected["logits"])
    if head == "vqa":
        pairs = zip(inputs["vqa_labels"], inputs["vqa_scores"], strict=True)
        answers = [dict(zip(*pair, strict=True)) for pair in pairs]
        targets = soft_targets(answers, args[0])
        loss = soft_loss(logits, targets)
        close(targets.gather(1, logits.argmax(dim=1, keepdim=True)).mean(), expected["score"])
    else:
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(inputs.get("labels", inputs.get("answers"))))
    close(loss, expected["loss"])
    loss.backward()
    check_gradients(model, expected["grad_norm_by_module"], expected["grad_norm"], head)


def test_a_step_of_retrieval(recipe, kind):
    found, config = recipe.found["irtr"], recipe.found["config"]
    inputs, expected = found["inputs"], found[kind]
    model = built(recipe, kind, config["downstream_image_size"], MeterRetriever)
    text, false, matches = tensors(inputs, "text_ids", "false_text_ids", "itm_labels")
    image = torch.cat([recipe.draw(inputs[name], inputs["image_shape"]) for name in ("image", "false_image")])
    texts = torch.cat([text[:, None], false], dim=1).flatten(0, 1)
    seen = torch.arange(len(text)) + len(text) * (1 - matches)
    losses = ranking_losses(
        model, image, texts, seen=seen, matches=matches, tokens=model.tokens_in(texts), reduce=kind == "elip"
    )
    close(losses["rank"], expected["rank_loss"])
    close(losses["itm"], expected["itm_loss"])
    (losses["rank"] + losses["itm"]).backward()
    check_gradients(model, expected["grad_norm_by_module"], expected["grad_norm"])


@torch.no_grad()
def test_every_caption_is_ranked_for_every_image(recipe, kind):
    found, config = recipe.found["retrieval"], recipe.found["config"]
    inputs, expected = found["inputs"], found[kind]
    model = built(recipe, kind, config["downstream_image_size"], MeterRetriever).eval()
    model.tower.vision_guided = kind == "elip"
    image, text = recipe.draw(inputs["image"], inputs["image_shape"]), torch.tensor(inputs["text_ids"])
    states, images = model.text_states(text), model.to_match(image)
    scores = [model.match(states, text, model.read(one[None]))[:, 1] for one in images]
    close(torch.stack(scores), expected["scores"])
