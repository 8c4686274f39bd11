"""The exact shortcuts change no number beyond rounding: float64 throughout, with gradients."""
from __future__ import annotations

import open_clip
import pytest
import torch
from torch import nn

import open_clip_elip
from open_clip_elip import TextParts, cut_text, with_shortcuts, with_token_reduction, without_token_reduction
from open_clip_elip.blocks import run_block, run_block_at_cls
from open_clip_elip.text import MIN_ROWS, can_cut

from .tiny import REDUCTION, TEXT, pairs, plain_model, random_blocks, step

CLOSE = {"rtol": 1e-9, "atol": 1e-11}
CONTEXT, END = TEXT["context_length"], TEXT["vocab_size"] - 1


def captions(*lengths: int, seed: int = 0) -> torch.Tensor:
    """(B, 12) token ids: words, the end of text as the last of `lengths` tokens, then padding."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.zeros(len(lengths), CONTEXT, dtype=torch.long)
    for row, length in zip(text, lengths, strict=True):
        row[:length] = torch.randint(1, END, (length,), generator=generator)
        row[length - 1] = END
    return text


@pytest.fixture(params=[False, True], ids=["CLIP", "CustomTextCLIP"])
def custom_text(request):
    return request.param


class TestBlocks:
    @pytest.mark.parametrize("layer_scale", [None, 0.5])
    def test_whole_block(self, layer_scale):
        (block,) = random_blocks(1, layer_scale=layer_scale)
        x = torch.randn(3, 7, 16, dtype=torch.float64)
        torch.testing.assert_close(run_block(block, x), block(x), **CLOSE)
        torch.testing.assert_close(run_block_at_cls(block, x), block(x)[:, :1], **CLOSE)


def short_model(*args, **options) -> nn.Module:
    return with_shortcuts(plain_model(*args, **options))


class TestCut:
    def test_parts(self):
        model = short_model()
        lengths = [5, 12, 2, 9, 5, 3, 7, 4] * 4  # 32 captions: four parts of eight
        text = captions(*lengths)
        cut = cut_text(text, model)
        assert [tuple(part.shape) for part in cut.parts] == [(8, 3), (8, 5), (8, 7), (8, 12)]
        whole = [row for part in cut.parts for row in part]
        for caption, length, place in zip(text, lengths, cut.place.tolist(), strict=True):
            assert whole[place].tolist() == caption[: len(whole[place])].tolist() and len(whole[place]) >= length

    def test_few_captions_stay_together(self):
        cut = cut_text(captions(*[3] * (2 * MIN_ROWS - 1)), short_model())
        assert [tuple(part.shape) for part in cut.parts] == [(2 * MIN_ROWS - 1, 3)]

    def test_multiples_and_the_way_back(self):
        text = captions(3, 5)
        cut = cut_text(text, short_model(), multiple=4)
        assert cut.parts[0].shape == (2, 8) and torch.equal(cut.whole(CONTEXT), text)
        assert isinstance(cut.to(torch.device("meta")), TextParts) and cut.to(torch.device("meta")).place.is_meta
        assert cut_text(captions(11, 11), short_model(), multiple=8).parts[0].shape == (2, CONTEXT)

    def test_other_towers_are_left_alone(self):
        text = captions(3, 5)
        for options in ({"no_causal_mask": True}, {"pool_type": "last"}, {"embed_cls": True, "pad_id": 0}):
            model = short_model(custom_text=True, text=options)
            assert not can_cut(model) and cut_text(text, model) is text

    def test_plain_models_get_what_they_expect(self):
        text, model = captions(3, 5), short_model()
        assert cut_text(text, plain_model()) is text
        model.tower.shortcuts = False
        assert cut_text(text, model) is text

    def test_an_empty_batch(self):
        assert cut_text(captions(), short_model()).shape == (0, CONTEXT)


@pytest.mark.parametrize("lengths", [(3, 9, 5), (12, 12, 12), (2, 12, 7), tuple(range(2, 13)) * 3])
@pytest.mark.parametrize("reduction", [False, True])
def test_features_and_gradients(custom_text, reduction, lengths):
    plain = plain_model(custom_text)
    model = with_token_reduction(plain, **REDUCTION) if reduction else with_shortcuts(plain)
    slow = with_token_reduction(plain, **REDUCTION) if reduction else plain
    if reduction:
        slow.tower.shortcuts = False
    image, text = pairs(len(lengths))[0], captions(*lengths)
    expected = step(slow, image, text)
    for given in (text, cut_text(text, model), cut_text(text, model, multiple=5)):
        torch.testing.assert_close(step(model, image, given), expected, **CLOSE)


def test_pooled_at_a_named_token():
    plain = plain_model(custom_text=True, text={"pool_type": "eos", "eos_id": 7})
    text = captions(9, 12, 4)
    text[0, 3], text[1, 0], text[2, 3] = 7, 7, 7
    text[2, :3] = 1
    torch.testing.assert_close(with_shortcuts(plain).encode_text(text), plain.encode_text(text), **CLOSE)


@pytest.mark.parametrize("pool", ["tok", "avg"])
def test_pooling_of_images(pool):
    plain = plain_model(vision={"pool_type": pool})
    image, _ = pairs()
    torch.testing.assert_close(with_shortcuts(plain).encode_image(image), plain.encode_image(image), **CLOSE)


def test_classes_and_weights():
    plain = plain_model()
    model = with_shortcuts(plain)
    assert isinstance(model, open_clip.CLIP) and type(plain) is open_clip.CLIP
    assert model.visual is plain.visual and model.state_dict().keys() == plain.state_dict().keys()
    assert with_shortcuts(with_token_reduction(plain)).reduction is not None
    assert type(without_token_reduction(model)) is open_clip.CLIP
    assert type(with_token_reduction(model)) is open_clip_elip.TextFirstCLIP


def test_no_recompilation_for_ever():
    """Three shapes of parts at most are compiled: the first, the changed one, and one where two lengths are equal."""
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph

    torch._dynamo.reset()
    model = with_token_reduction(plain_model(), **REDUCTION)
    compiled_model = torch.compile(model, backend=backend, fullgraph=True)
    image = pairs(2 * MIN_ROWS)[0]
    generator = torch.Generator().manual_seed(0)
    counts = []
    for _ in range(24):
        lengths = torch.randint(2, CONTEXT + 1, (2 * MIN_ROWS,), generator=generator).tolist()
        text = cut_text(captions(*lengths), model, max_parts=2, multiple=2)
        compiled_model(image, text)
        counts.append(len(compiled))
    torch._dynamo.reset()
    assert counts[-1] <= 4 and counts[11:] == [counts[-1]] * 13
