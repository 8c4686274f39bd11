"""What goes wrong in silence when BLIP is built from ready-made parts."""
from __future__ import annotations

import copy
import json
from types import SimpleNamespace

import open_clip
import pytest
import torch
import torch.nn.functional as F
from transformers import BertConfig, BertForMaskedLM

from open_clip_elip.fusion.generate import beam_search
from open_clip_elip.fusion.momentum import twin_of
from open_clip_elip.fusion.released import BLIP as NAMES
from open_clip_elip.fusion.released import read_released, write_released
from open_clip_elip.fusion.start import start_task, start_text
from open_clip_elip.fusion.tokenizer import blip_caption, blip_question
from open_clip_elip.identity import Identity, ModelError, create, describe, tokenizer
from training.optim import epoch_decay
from training.tasks.base import Progress
from training.tasks.blip import BlipPretraining

from ...training.fusion_runs import BLIP, write_fusion, write_vocabulary


def blip(reduction: dict | None = None, task: str = "pretraining", **text: object) -> torch.nn.Module:
    config = copy.deepcopy(BLIP) | {"token_reduction": reduction, "task": task}
    config["text_cfg"]["bert"] |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, **text}
    return create(Identity("blip", "x", config, {"size": (32, 32)}))


def texts(*lengths: int) -> torch.Tensor:
    ids = torch.randint(5, 62, (len(lengths), max(lengths)))
    ids[:, 0] = 2
    return ids * (torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None])


def test_encoder_and_decoder_share_all_but_self_attention():
    model = blip()
    own = {name for name, _ in model.named_parameters() if name.startswith("decoder.")}
    assert all(".attention." in name or name.startswith("decoder.cls.predictions") for name in own)
    head, words = model.decoder.cls.predictions, model.text.embeddings.word_embeddings.weight
    assert head.decoder.weight is words and head.decoder.bias is head.bias
    assert not hasattr(twin := twin_of(model), "decoder") and len(list(twin.parameters()))
    copied = copy.deepcopy(model)
    assert copied.decoder.cls.predictions.decoder.weight is copied.text.embeddings.word_embeddings.weight
    state = model.state_dict()
    assert torch.equal(state["decoder.bert.embeddings.word_embeddings.weight"], words)


def test_first_tokens_are_encode_and_decode_and_the_decoder_does_not_look_ahead():
    model, text, image = blip().eval(), texts(6, 6), torch.randn(2, 3, 32, 32)
    memory, states = model.read(model.image_states(image)), model.text_states(text)
    begun = text.clone()
    begun[:, 0] = 63
    assert torch.equal(model.match(states, text, memory), model.match(states, begun, memory))
    own = model.text.encoder(
        model.text.embeddings(begun), attention_mask=torch.zeros(2, 1, 1, 6), encoder_hidden_states=
        model.image_states(image),
    )[0]  # fmt: skip
    torch.testing.assert_close(model.match(states, text, memory), model.itm_head(own[:, 0]), rtol=1e-4, atol=1e-5)
    begun[:, 0] = 62
    places = torch.arange(12)
    logits = model.next_words(text, places, memory).view(2, 6, -1)
    torch.testing.assert_close(logits, model.decoder(
        begun, attention_mask=torch.ones(2, 6), encoder_hidden_states=model.image_states(image)).logits, rtol=1e-4,
        atol=1e-5)  # fmt: skip
    other = text.clone()
    other[:, 4] = (text[:, 4] - 5 + 1) % 57 + 5
    changed = model.next_words(other, places, memory).view(2, 6, -1)
    assert torch.equal(logits[:, :4], changed[:, :4]) and not torch.equal(logits[:, 4], changed[:, 4])


def test_padding_does_not_change_a_thing():
    model, text, image = blip().eval(), texts(6, 4), torch.randn(2, 3, 32, 32)
    memory = model.read(model.image_states(image))
    for run in (lambda t: model.match(None, t, memory), lambda t: model.encode_text(t)):
        torch.testing.assert_close(run(text), run(F.pad(text, (0, 5))), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["elip", "evit", "tome", "random"])
def test_every_method_reduces_the_image_in_training(method):
    model = blip({"method": method}).train()
    states = model.image_states(torch.randn(2, 3, 32, 32), torch.randn(2, 32), reduce=True)
    assert states.shape[1] == model.tower.token_counts()[-1] < 17
    assert model.eval().image_states(torch.randn(2, 3, 32, 32)).shape[1] == 17


def test_widths_of_image_and_text_may_differ():
    """As those of the large model do."""
    config = copy.deepcopy(BLIP)
    config["vision_cfg"]["width"] = 48
    found = {task: Identity("blip", "x", config | {"task": task}, {"size": (32, 32)}) for task in ("vqa", "captioning")}
    with pytest.raises(ModelError, match=r"at its own width \(32\), and vision_cfg has another \(48\)"):
        create(found["vqa"])  # which has no projections
    create(found["captioning"])
    model = create(Identity("blip", "x", config, {"size": (32, 32)}))
    assert model.text.encoder.layer[0].crossattention.self.key.in_features == 48
    states = torch.randn(2, 5, 32)
    feature = F.normalize(model.text_proj(states[:, 0]), dim=-1)
    guidance = model.guidance(states)
    torch.testing.assert_close(guidance, feature @ model.vision_proj.weight)
    assert guidance.shape == (2, 48) and not guidance.requires_grad
    assert torch.equal(blip().guidance(states), states[:, 0])
    assert model.image_states(torch.randn(2, 3, 32, 32), guidance).shape[1] < 17
    found["vqa"].config["token_reduction"] = None
    answerer = create(found["vqa"])
    start = start_task(answerer, {"model": write_released(model.state_dict(), {}, NAMES)}, "large.pth")
    assert len(start.new) == 8 and all("decoder" in n and n.endswith(("key.weight", "value.weight")) for n in start.new)
    assert not start_task(create(found["vqa"]), {"state_dict": answerer.state_dict()}, "vqa.pt").new


def test_the_large_model():
    model = create(describe("BLIP-L-16-ELIP"), device="meta")
    assert sum(p.numel() for p in model.visual.parameters()) == 303_301_632  # timm's vit_large_patch16_224, no head
    assert len(model.text.encoder.layer) == 12 and model.text.config.encoder_hidden_size == 1024
    assert model.tower.token_counts() == [197] * 4 + [178] * 4 + [129] * 12 + [80] * 4


@pytest.mark.usefixtures("float64")
def test_drop_path_leaves_layers_out_where_there_is_a_gradient():
    plain, image, guidance = blip({"method": "elip"}), torch.randn(4, 3, 32, 32), torch.randn(4, 32)
    model, full = copy.deepcopy(plain), copy.deepcopy(plain)
    plain.set_drop_path(0.0)
    model.set_drop_path(0.5)
    assert plain.state_dict().keys() == model.state_dict().keys()
    assert type(plain.visual.transformer.resblocks[5].ls_2) is torch.nn.Identity
    rates = [getattr(block.ls_1, "drop_prob", 0) for block in model.visual.transformer.resblocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])
    ways = {}
    for way in ("shortcuts", "as released", "checkpointing"):
        model.tower.shortcuts = way != "as released"
        model.set_grad_checkpointing(way == "checkpointing")
        torch.manual_seed(0)
        model.zero_grad()
        states = model.image_states(image, guidance)
        states.square().sum().backward()
        ways[way] = [states.detach(), *(p.grad.clone() for p in model.visual.parameters())]
    for found in ways.values():
        torch.testing.assert_close(found, ways["shortcuts"], rtol=1e-8, atol=1e-9)
    assert not torch.allclose(ways["shortcuts"][0], plain.image_states(image, guidance).detach())
    for one in (torch.no_grad(), torch.enable_grad()):  # a pass without gradient in training, and evaluation
        with one:
            assert torch.equal(model.image_states(image), full.image_states(image))
        model.eval()
    model.train().visual.transformer.resblocks[5].ls_1.drop_prob = 1.0
    model.visual.transformer.resblocks[5].ls_2.drop_prob = 1.0
    model.zero_grad()
    model.encode_image(image).sum().backward()
    assert not any(p.grad.any() for p in model.visual.transformer.resblocks[5].parameters())


def test_the_base_model_has_the_size_of_the_released_one():
    model = create(describe("BLIP-B-16-ELIP"), device="meta")
    sizes = [round(sum(p.numel() for p in one.parameters()) / 1e5) for one in (model, twin_of(model))]
    assert sizes == [2524, 2235]
    assert model.tower.token_counts()[::4] == [197, 129, 129] and model.tower.token_counts()[-1] == 80
    assert {"BLIP-B-16", "BLIP-Nano-8-64", "BLIP-Nano-8-64-ELIP"} <= set(open_clip.list_models())


def test_texts_end_with_sep_and_the_vocabulary_need_not_have_the_two_words(tmp_path):
    write_fusion(tmp_path / "model")
    found = describe(f"local-dir:{tmp_path / 'model'}")
    pieces = tokenizer(found)
    assert pieces("A red, round THING!").tolist()[0] == [2, 5, 7, 1, 13, 6, 3, 0, 0, 0, 0, 0]
    assert pieces("a " * 20).tolist()[0] == [2, *[5] * 10, 3]
    words = [f"word{n}" for n in range(57)]
    write_vocabulary(tmp_path / "model", [*words, "zebra"])
    with pytest.raises(ModelError, match=r"Token 62 of the vocabulary is 'zebra', where the model has \[DEC\]"):
        tokenizer(found)
    write_vocabulary(tmp_path / "model", [*words, "[DEC]", "[ENC]"])
    assert tokenizer(found)("word1").tolist()[0][:4] == [2, 6, 3, 0]


def test_cleaning_differs_between_captions_and_questions():
    text = 'A "dog-house", (no. 3):  it\'s big!\n'
    assert blip_caption(text) == "a dog-house , no 3 it's big"
    assert blip_caption(text, 2) == "a dog-house"
    assert blip_question("Is it (a)  dog's house?  ") == "is it a  dog's house?"


def test_bert_fills_encoder_and_decoder_and_new_words_are_drawn(tmp_path):
    bert = BertConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64, vocab_size=62,
        max_position_embeddings=40,
    )  # fmt: skip
    source = BertForMaskedLM(bert)
    source.save_pretrained(tmp_path)
    model = blip()
    left, own = start_text(model, str(tmp_path)), source.state_dict()
    assert left and all(".crossattention." in name for name in left)
    words = model.text.embeddings.word_embeddings.weight
    assert torch.equal(words[:62], own["bert.embeddings.word_embeddings.weight"])
    assert 0 < words[62:].std() < 0.05 and words[62:].mean().abs() < 0.02
    for place in (model.text, model.decoder.bert):
        name = "encoder.layer.1.attention.self.key.weight"
        assert torch.equal(place.state_dict()[name], own[f"bert.{name}"])
    assert torch.equal(model.decoder.cls.predictions.bias[:62], own["cls.predictions.bias"])
    small = tmp_path / "small"
    BertForMaskedLM(BertConfig(**bert.to_dict() | {"hidden_size": 16})).save_pretrained(small)
    with pytest.raises(ModelError, match="does not fit this model"):
        start_text(model, str(small))


def test_released_names_both_ways():
    model = blip({"method": "elip"})
    twin = twin_of(model)
    written = write_released(model.state_dict(), twin.state_dict(), NAMES)
    assert {
        "visual_encoder.patch_embed.proj.bias", "text_encoder.embeddings.position_ids", "vision_proj_m.weight", "temp",
        "text_encoder_m.embeddings.position_ids", "text_decoder.bert.embeddings.position_ids",
        "text_decoder.cls.predictions.decoder.bias",
    } <= written.keys()  # fmt: skip
    assert not {"temp_m", "itm_head_m.weight"} & written.keys()
    found = read_released(written | {"image_queue": torch.zeros(1)}, NAMES)
    assert found.model.keys() == model.state_dict().keys() and list(found.rest) == ["image_queue"]
    assert twin.state_dict().keys() - found.twin.keys() == {"temp", "itm_head.weight", "itm_head.bias"}
    for name, value in model.state_dict().items():
        assert torch.equal(found.model[name], value), name


def test_the_learning_rate_falls_by_the_epoch_and_the_warm_up_is_counted_in_steps():
    def rate(step):
        return epoch_decay(step, peak=1e-4, start=1e-6, end=7e-5, warmup=15, epoch=10, factor=0.9)

    assert rate(0) == 1e-6 and rate(5) == pytest.approx(1e-6 + 99e-6 / 3)
    assert rate(12) == pytest.approx(1e-6 + 99e-6 * 12 / 15)  # goes on in the second epoch
    assert [rate(step) for step in (15, 20, 35, 90)] == pytest.approx([9e-5, 8.1e-5, 7.29e-5, 7e-5])
    assert json.dumps(rate(90)) == "7e-05"


def test_padded_questions_are_answered_as_by_themselves():
    """transformers' BLIP drops the mask of what is looked at."""
    model, image = blip(task="vqa").eval(), torch.randn(2, 3, 32, 32)
    text, answers, start = texts(6, 4), texts(3, 3), torch.tensor([62])
    memory = model.read_questions(image, text)
    apart = [model.read_questions(image[i : i + 1], text[i : i + 1, :length]) for i, length in ((0, 6), (1, 4))]
    states = model.answer_states(answers, memory)
    written = beam_search(model.decoder, memory, start, 3, longest=8, shortest=1)
    for i, alone in enumerate(apart):
        torch.testing.assert_close(states[i : i + 1], model.answer_states(answers[i : i + 1], alone))
        assert torch.equal(written[i : i + 1], beam_search(model.decoder, alone, start, 3, longest=8, shortest=1))


def test_greedy_captions_are_those_of_the_decoder_without_caches():
    model, image = blip(task="captioning").eval(), torch.randn(3, 3, 32, 32)
    ids = model.write(image, torch.tensor([62, 5, 6]), 3, sampled=True, top_k=1, repetition=1.0, longest=10)
    memory, rows = model.read(model.image_states(image)), torch.arange(3)
    text = torch.tensor([[62, 5, 6]]).expand(3, -1)
    for place in range(3, 10):
        logits = model.next_words(text, rows * place + place - 1, memory)
        logits[:, 3] = -torch.inf if place < 5 else logits[:, 3]
        over = (text[:, 3:] == 3).any(dim=1)
        text = torch.cat([text, logits.argmax(dim=1, keepdim=True).masked_fill(over[:, None], 0)], dim=1)
    assert torch.equal(ids, text)


def test_alpha_rises_over_two_epochs_and_all_is_decayed():
    model = blip()
    task = BlipPretraining(model, queue_size=8, alpha=0.4)
    plan = SimpleNamespace(steps_per_epoch=10)
    steps = ((0, 0), (0, 5), (1, 0), (1, 5), (2, 0))
    rises = [task.weight(Progress(epoch, step, 0, 0, plan)) for epoch, step in steps]
    assert rises == pytest.approx([0, 0.1, 0.2, 0.3, 0.4]) and task.floor == 1e-4
    options = SimpleNamespace(layer_decay=None, wd=0.05, decay_norms=True)
    (group,) = task.parameters(model, options)
    assert group["weight_decay"] == 0.05 and len(group["params"]) == len(list(model.parameters()))
    options.decay_norms = False
    free, decayed = task.parameters(model, options)
    assert (free["weight_decay"], decayed["weight_decay"]) == (0, 0.05)
    assert len(free["params"]) + len(decayed["params"]) == len(group["params"])
    assert any(p is model.temp for p in free["params"]) and all(p.ndim < 2 for p in free["params"])
