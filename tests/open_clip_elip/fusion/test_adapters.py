"""Adapters in fusion models: each step and its gradients are those of weights written out, in float64."""
from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

from open_clip_elip.adapters import Bottleneck, adapt, is_adapter, train_new
from open_clip_elip.fusion.momentum import Queue, follow, twin_of
from open_clip_elip.fusion.objectives import mask_tokens, places_to_write
from open_clip_elip.fusion.start import start_task
from open_clip_elip.fusion.steps import albef_losses, blip_losses, meter_losses, teach
from open_clip_elip.identity import Identity, create
from open_clip_elip.weights import tensors

from ...training.fusion_runs import ALBEF, BLIP, METER
from ..adapted import CLOSE, adapted, assert_same_step
from ..tiny import seeded


def fusion(config: dict, task: str = "pretraining", reduces: bool = True) -> nn.Module:
    config = json.loads(json.dumps(config)) | {"task": task}
    config["text_cfg"]["bert"] |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    if "fusion" in config["text_cfg"]:
        config["text_cfg"]["fusion"] |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    if not reduces:
        del config["token_reduction"]
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = create(Identity(config["family"], "x", config, {"size": (32, 32)})).double()
        with torch.no_grad():
            for p in model.parameters():
                if p.ndim > 1:
                    p.mul_(8)  # BERT's own are so small that nothing hangs on attention
    return model.train()


def texts(*lengths: int) -> Tensor:
    ids = torch.randint(5, 62, (len(lengths), max(lengths)))
    ids[:, 0] = 2
    return ids * (torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None])


def pretraining_loss(config: dict):
    torch.manual_seed(1)
    image, text, order = torch.randn(4, 3, 32, 32, dtype=torch.float64), texts(6, 4, 9, 5), torch.arange(4).roll(1)
    masked, chosen, labels = mask_tokens(text, 4, 64, torch.tensor([0, 2]))
    queues = nn.ModuleDict({name: Queue(16, 8) for name in ("image", "text")}).double()
    twin = None if config is METER else twin_of(fusion(config))

    def loss(model: nn.Module) -> Tensor:
        tokens = model.tokens_in(text)
        if config is METER:
            seen, matches = torch.tensor([0, 1, 3, 2]), torch.tensor([1, 1, 0, 0])
            words = {"masked": masked, "chosen": chosen, "labels": labels}
            return sum(meter_losses(model, image, text, **words, seen=seen, matches=matches, tokens=tokens).values())
        more = {"negatives": [order, order], "alpha": 0.4, "tokens": tokens}
        if config is BLIP:
            places = places_to_write(model.mask(text))
            taught = teach(twin, image, text, tokens=tokens)
            return sum(blip_losses(model, taught, queues, image, text, chosen=places, **more).values())
        taught = teach(twin, image, text, tokens=tokens, masked=masked, chosen=chosen)
        words = {"masked": masked, "chosen": chosen, "labels": labels}
        return sum(albef_losses(model, taught, queues, image, text, **words, **more).values())

    return loss


@pytest.mark.parametrize("shortcuts", [True, False])
@pytest.mark.parametrize("config", [ALBEF, BLIP, METER], ids=["albef", "blip", "meter"])
def test_pretraining_of_fusion_models(kind, config, shortcuts, float64):
    model, plain = adapted(fusion(config), kind), fusion(config)
    model.tower.shortcuts = plain.tower.shortcuts = shortcuts
    assert_same_step(model, plain, kind, pretraining_loss(config))


@pytest.mark.parametrize("shortcuts", [True, False])
@pytest.mark.parametrize("config", [ALBEF, BLIP, METER], ids=["albef", "blip", "meter"])
def test_tasks_of_fusion_models(kind, config, shortcuts, float64):
    """One sentence about two images, whose layers share weights, and a question whose states a decoder looks at."""
    torch.manual_seed(1)
    image, text = torch.randn(4, 3, 32, 32, dtype=torch.float64), texts(6, 4)

    def answer(m: nn.Module) -> Tensor:
        memory = m.read_questions(image[:2], text)
        return m.answer_states(text, memory).square().sum()

    losses = {"nlvr2": lambda m: m(image, text).square().sum()} | ({} if config is METER else {"vqa": answer})
    for task, loss in losses.items():
        model, plain = (fusion(config, task, reduces=False) for _ in range(2))
        model.tower.shortcuts = plain.tower.shortcuts = shortcuts
        assert_same_step(adapted(model, kind), plain, kind, loss)


@pytest.mark.parametrize("task", ["retrieval", "captioning", "vqa", "nlvr2"])
def test_tasks_start_from_bottlenecks_of_pretraining(task):
    """Also where a task has no use for a part of pre-training that has some, as BLIP's retrieval for the decoder."""
    start, model = adapted(fusion(BLIP), "bottleneck"), adapted(fusion(BLIP, task, reduces=False), "bottleneck")
    start_task(model, {"state_dict": start.state_dict()}, "here")
    found, own = start.state_dict(), {name: value for name, value in model.state_dict().items() if is_adapter(name)}
    shared = [name for name in own if name in found]
    assert any(name.startswith("visual.") for name in shared) and any(not n.startswith("visual.") for n in shared)
    assert all(torch.equal(own[name], found[name]) for name in shared)


def test_layers_that_share_weights_share_adapters(kind):
    model = adapted(fusion(ALBEF, "nlvr2", reduces=False), kind)
    first, second = (layer.crossattention for layer in model.fusion[:2])
    assert first.self.key is second.self.key and first.output is not second.output
    model = adapted(fusion(BLIP), kind)
    one, other = model.text.encoder.layer[0], model.decoder.bert.encoder.layer[0]
    assert one.crossattention is other.crossattention and one.attention is not other.attention


def test_heads_are_trained_and_what_has_no_weights_to_start_from(kind):
    model = fusion(ALBEF)
    adapt(model, kind, 3)
    parts = {name.partition(".")[0] for name, p in model.named_parameters() if p.requires_grad and not is_adapter(name)}
    assert parts == {"vision_proj", "text_proj", "itm_head", "temp", "mlm_head"}
    train_new(model)
    parts = {name.partition(".")[0] for name, p in model.named_parameters() if p.requires_grad and not is_adapter(name)}
    assert parts == {"vision_proj", "text_proj", "itm_head", "temp", "mlm_head", "fusion"}
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad and name.startswith("fusion.")]
    assert not any("crossattention" in name for name in frozen)


def test_lora_is_merged_where_it_is_read():
    pytest.importorskip("peft")
    model, plain = adapted(fusion(BLIP), "lora"), fusion(BLIP)
    plain.load_state_dict(tensors({"state_dict": model.state_dict()}, "here"))
    loss = pretraining_loss(BLIP)
    torch.testing.assert_close(seeded(loss, plain), seeded(loss, model), **CLOSE)


def test_a_twin_follows(kind):
    model = adapted(fusion(ALBEF), kind)
    twin = twin_of(model)
    before = {name: p.clone() for name, p in twin.named_parameters()}
    with torch.no_grad():
        for name, p in model.named_parameters():
            if is_adapter(name):
                p.add_(1)
    follow(twin, model, 0.75)
    for name, p in twin.named_parameters():
        torch.testing.assert_close(p, before[name] + 0.25 * is_adapter(name), **CLOSE)
    twin.load_state_dict(model.state_dict())
    assert all(value.equal(model.state_dict()[name]) for name, value in twin.state_dict().items())


def test_depth_is_stochastic_behind_the_adapter():
    plain, model = fusion(ALBEF), adapted(fusion(ALBEF), "bottleneck")
    for one in (plain, model):
        one.set_drop_path(0.9)
    image, blocks = torch.randn(2, 3, 32, 32, dtype=torch.float64), model.visual.transformer.resblocks
    assert all(isinstance(block.ls_1, Bottleneck) for block in blocks)
    x = torch.randn(64, 3, 32, dtype=torch.float64)
    out = seeded(blocks[-1].ls_1, x)
    dropped = (out == 0).flatten(1).all(dim=1)
    assert 0.6 < dropped.double().mean() < 1 and model.image_states(image).shape == plain.image_states(image).shape
