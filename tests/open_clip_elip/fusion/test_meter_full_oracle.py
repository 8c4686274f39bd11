"""METER against all tensors of the released programs (float64), where `ELIP_ORACLE` names a folder that has them."""
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from open_clip_elip.fusion.bert import Tokens
from open_clip_elip.fusion.meter import Meter, MeterClassifier, MeterRetriever
from open_clip_elip.fusion.objectives import choose_words
from open_clip_elip.fusion.released import METER, read_released
from open_clip_elip.fusion.start import start_task
from open_clip_elip.fusion.steps import meter_losses, ranking_losses
from training.optim import linear
from training.tasks.meter_vqa import soft_loss
from training.tasks.momentum import DistilledTask

from ...training.tiny import run_options
from .oracle import NO_DROPOUT, close, folder_of_tensors, load_tensors

FOLDER = folder_of_tensors("meter", "weights_roberta.pt")
pytestmark = [
    pytest.mark.skipif(FOLDER is None, reason="ELIP_ORACLE names no folder with the tensors"),
    pytest.mark.usefixtures("float64"),
]
HEADS = {"vqa": (11, 50), "snli": (3, 10), "nlvr2": (2, 10)}
VARIANTS = {
    "bert": ("plain", "elip_released", "elip_counted", "elip_counted_noeps"),
    "roberta": ("plain", "elip_counted_noeps"),
}
BOTH = pytest.mark.parametrize("encoder", list(VARIANTS))


def load(name: str):
    return load_tensors(FOLDER / f"{name}.pt")


@pytest.fixture(scope="module")
def start():
    return {encoder: load(f"weights_{encoder}") for encoder in VARIANTS}


def parts(config: dict, image: int, reduction: dict | None) -> tuple:
    vision = {
        "image_size": image, "layers": 11, "width": config["vision_width"], "patch_size": config["patch_size"],
        "head_width": config["vision_width"] // config["vision_heads"],
    }  # fmt: skip
    names = {
        "width": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads",
        "intermediate_size": "intermediate_size", "layer_norm_eps": "layer_norm_eps", "vocab_size": "vocab_size",
        "max_position_embeddings": "max_position_embeddings", "type_vocab_size": "type_vocab_size",
        "pad_token_id": "pad_token_id",
    }  # fmt: skip
    text, fusion = (
        NO_DROPOUT | {own: config[f"{of}_{name}"] for name, own in names.items() if f"{of}_{name}" in config}
        for of in ("text", "co")
    )
    text = {"context_length": 12, "model_type": config["text_model"], "bert": text, "fusion": fusion}
    return config["hidden_size"], vision, text, reduction


def reduction_of(config: dict) -> dict | None:
    if "keep_counts" not in config:
        return None
    keep = {"keep_count": [config["num_patches"], *config["keep_counts"]]}
    return {"method": "elip", "depths": [2, 2, 5, 2], "lam": config["lam"], "text_scale": "none", **keep}


def built(start: dict, of, *args, reduction: dict | None = None, head: str = "", image: int = 64, **more):
    model = of(*args, *parts(start["config"], image, reduction), **more)
    state = start["state_dict"]
    if head == "nlvr2":
        state = state | {"token_type_embeddings.weight": state["nlvr2_token_type_embeddings.weight"]}
    named = {n: v for n, v in state.items() if "_classifier" not in n or n.startswith(f"{head}_")}
    found = read_released(named, METER).model
    model.load_state_dict({name: found[name] for name in model.state_dict()})
    return model.train()


def check(found, expected, what: str, loose: bool = False) -> None:
    """loose: the release adds 1e-6 to the sum of merge weights."""
    rtol = 1e-3 if loose else 1e-9
    torch.testing.assert_close(found.detach(), expected, rtol=0, atol=rtol * float(expected.abs().max()), msg=what)


@pytest.mark.parametrize(("encoder", "variant"), [(e, one) for e, variants in VARIANTS.items() for one in variants])
def test_pretraining(start, encoder, variant):
    found = load(f"pretrain_{encoder}_{variant}")
    loose = variant in ("elip_released", "elip_counted")
    model = built(start[encoder], Meter, reduction=reduction_of(found["config"]))
    inputs, text, matches = found["inputs"], found["inputs"]["text_ids"], found["inputs"]["itm_labels"]
    labels = inputs["text_labels_mlm"].flatten()
    chosen, tokens = (labels >= 0).nonzero().squeeze(1), model.tokens_in(text)
    assert torch.equal(tokens.mask, inputs["text_masks"] > 0)
    losses = meter_losses(
        model, torch.cat([inputs["image"], inputs["false_image"]]), text, masked=inputs["text_ids_mlm"], chosen=chosen,
        labels=labels[chosen], seen=torch.arange(4) + 4 * (1 - matches), matches=matches, tokens=tokens,
    )  # fmt: skip
    for name in ("mlm", "itm"):
        check(losses[name], found[name]["loss"], name, loose)
        if "grad" not in found[name]:
            continue
        model.zero_grad()
        losses[name].backward(retain_graph=True)
        own = dict(model.named_parameters())
        for official, value in found[name]["grad_norm"].items():
            ours = METER.ours(official)
            if value > 1e-9 and ours in own:
                norm = torch.tensor(value, dtype=torch.float64)
                torch.testing.assert_close(own[ours].grad.norm(), norm, rtol=1e-2 if loose else 1e-6, atol=1e-9)
    masked, image = inputs["text_ids_mlm"], inputs["image"]
    states = model.text_states(masked, Tokens(model.mask(text)))
    found = found["mlm"]
    torch.testing.assert_close(states[:, 0], found["guidance"], rtol=1e-9, atol=1e-9)
    seen = model.image_states(image, states[:, 0], reduce=True)
    assert seen.shape[1] == found["tokens_per_layer"][-1]
    torch.testing.assert_close(seen, found["vit_out"].double(), rtol=0, atol=1e-3 if loose else 1e-5)
    pooled = model.pooled(states, Tokens(model.mask(text)), model.image_stream(seen))
    check(pooled, found["cls_feats"], "pooled", loose)


@pytest.mark.parametrize("head", list(HEADS))
def test_classifiers(start, head):
    found = load(f"{head}_bert")
    inputs = found["inputs"]
    names = [name for name in ("image", "image_0", "image_1") if name in inputs]
    image = torch.cat([inputs[name] for name in names])
    for variant, expected in found["variants"].items():
        reduction = reduction_of(expected["config"])
        more = {"num_images": 2} if head == "nlvr2" else {}
        model = built(start["bert"], MeterClassifier, *HEADS[head], reduction=reduction, head=head, **more)
        logits = model(image, inputs["text_ids"], reduce=reduction is not None)
        loose = variant in ("elip_released", "elip_counted")
        check(logits, expected["logits"], variant, loose)
        if head == "vqa":
            loss = soft_loss(logits, expected["targets"])
        else:
            loss = F.cross_entropy(logits, torch.as_tensor(inputs.get("labels", inputs.get("answers"))).long())
        check(loss, expected["loss"], variant, loose)


@BOTH
def test_retrieval_training(start, encoder):
    found = load(f"irtr_{encoder}")
    inputs = found["inputs"]
    for variant, expected in found["variants"].items():
        matches = expected["itm"]["labels"].long()
        reduction = reduction_of(expected["config"])
        model = built(start[encoder], MeterRetriever, reduction=reduction)
        false = inputs["false_text_ids"].masked_fill(inputs["false_text_masks"] == 0, model.pad)
        texts = torch.cat([inputs["text_ids"][:, None], false], dim=1).flatten(0, 1)
        losses = ranking_losses(
            model, torch.cat([inputs["image"], inputs["false_image"]]), texts, matches=matches,
            seen=torch.arange(4) + 4 * (1 - matches), tokens=model.tokens_in(texts), reduce=reduction is not None,
        )  # fmt: skip
        for name in ("rank", "itm"):
            check(losses[name], expected[name]["loss"], variant, variant in ("elip_released", "elip_counted"))


@torch.no_grad()
def test_retrieval_evaluation(start):
    found = load("retrieval_bert")
    inputs = found["inputs"]
    for variant, expected in found["variants"].items():
        reduction = reduction_of(expected["config"])
        model = built(start["bert"], MeterRetriever, reduction=reduction).eval()
        model.tower.vision_guided = reduction is not None
        states, images = model.text_states(inputs["text_ids"]), model.to_match(inputs["images"])
        scores = [model.match(states, inputs["text_ids"], model.read(one[None]))[:, 1] for one in images]
        check(torch.stack(scores), expected["scores"], variant, variant in ("elip_released", "elip_counted"))


@pytest.mark.parametrize("task", ["pretrain", "vqa", "nlvr2", "snli", "irtr"])
@BOTH
def test_rates_and_decay(start, encoder, task):
    found = load("optimizer")
    expected = {METER.ours(name): tuple(value) for name, value in found["groups"][f"{encoder}/{task}"].items()}
    if task in HEADS:
        more = {"num_images": 2} if task == "nlvr2" else {}
        model = built(start[encoder], MeterClassifier, *HEADS[task], head=task, **more)
    else:
        model = built(start[encoder], Meter if task == "pretrain" else MeterRetriever)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = DistilledTask(model, alpha=0).parameters(model, run_options(wd=0.01))
    own = {names[id(p)]: (group["lr_scale"], group["weight_decay"], True) for group in groups for p in group["params"]}
    for name, p in model.named_parameters():
        assert own.get(name, (*expected[name][:2], p.requires_grad)) == expected[name], name
    left = expected.keys() - dict(model.named_parameters()).keys()
    assert all(name.startswith(("vit_model.", "text.pooler.", "text_transformer.pooler")) for name in left), left
    rates = [linear(step, peak=1.0, warmup=2, total=20) for step in range(23)]
    assert rates == pytest.approx(found["schedule"])


@BOTH
def test_five_steps(start, encoder):
    for variant, expected in load("steps")[encoder].items():
        inputs = load(f"pretrain_{encoder}_{variant}")
        model = built(start[encoder], Meter, reduction=reduction_of(inputs["config"]))
        inputs, rate = inputs["inputs"], 1e-3
        groups = DistilledTask(model, alpha=0).parameters(model, run_options(wd=0.01))
        for group in groups:
            group["lr"] = rate
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-8)
        labels, tokens = inputs["text_labels_mlm"].flatten(), model.tokens_in(inputs["text_ids"])
        chosen = (labels >= 0).nonzero().squeeze(1)
        for number, step in enumerate(expected["steps"]):
            matches = torch.tensor(step["itm_labels"])
            factor = linear(number, peak=rate, warmup=2, total=8)
            assert factor == pytest.approx(step["lr"])
            losses = meter_losses(
                model, torch.cat([inputs["image"], inputs["false_image"]]), inputs["text_ids"], chosen=chosen,
                masked=inputs["text_ids_mlm"], labels=labels[chosen], seen=torch.arange(4) + 4 * (1 - matches),
                matches=matches, tokens=tokens,
            )  # fmt: skip
            for name in ("mlm", "itm"):  # torch's AdamW decays before the update, the release's after it
                assert losses[name].item() == pytest.approx(step[f"{name}_loss"], rel=5e-4), (variant, number)
            for group in optimizer.param_groups:
                group["lr"] = factor * group["lr_scale"]
            optimizer.zero_grad()
            (losses["mlm"] + losses["itm"]).backward()
            optimizer.step()


@pytest.mark.parametrize("case", ["vqa_96", "vqa_48", "snli_96", "irtr_96", "nlvr2_64"])
def test_what_a_task_begins_with(start, case):
    expected, (task, image) = load("init")[case], case.split("_")
    kinds = {"irtr": (MeterRetriever,), **{name: (MeterClassifier, *HEADS[name]) for name in HEADS}}
    of, *args = kinds[task]
    more = {"num_images": 2} if task == "nlvr2" else {}
    model = of(*args, *parts(start["bert"]["config"], int(image), None), **more)
    pretraining = ("_classifier", "rank_output", "nlvr2_token_type")
    state = {name: v for name, v in start["bert"]["state_dict"].items() if not any(one in name for one in pretraining)}
    found = start_task(model, {"state_dict": state}, "meter.ckpt")
    own = model.state_dict()
    close(own["visual.positional_embedding"], expected["positional_embedding"])
    close(own["token_type_embeddings.weight"], expected["token_type_embeddings"])
    for name in ("weight", "bias") if task == "irtr" else ():
        close(own[f"rank_output.{name}"], expected[f"rank_output.{name}"])
    official = {METER.ours(name) for name in expected["not_in_checkpoint"] if "classifier" in name}
    assert set(found.new) == official and not found.unknown
    assert set(found.idle) == {METER.ours(name) for name in expected["not_in_model"]}


@BOTH
def test_masking(encoder):
    found = load("masking")[encoder]
    words, text = found["vocab"], found["input_ids"]
    continues = torch.tensor([word.startswith("##") for word in words])
    outside = torch.tensor([number for number, word in enumerate(words) if word in ("[CLS]", "[SEP]")])
    special = torch.tensor([0, 1, 2, 3] + [number for number, word in enumerate(words) if "mask" in word.lower()])
    torch.manual_seed(0)
    for length, expected in found["statistics"].items():
        row = next((row for row in text if int((~torch.isin(row, special)).sum()) == length), None)
        if row is None:
            continue
        rows = row.repeat(3000, 1)
        chosen = choose_words(rows, torch.rand(rows.shape), continues, outside) & ~torch.isin(rows, special)
        counts = chosen.sum(dim=1)
        assert (counts.double().mean() / length).item() == pytest.approx(expected["mean_share"], abs=0.012)
        if encoder == "roberta":  # where each token is a word, whatever the words of a caption are
            none = expected["share_of_captions_without_mask"]
            assert (counts == 0).double().mean().item() == pytest.approx(none, abs=0.035)
        assert counts.max() <= 8
