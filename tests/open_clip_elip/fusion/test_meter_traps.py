"""What goes wrong in silence when METER is built from ready-made parts."""
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from open_clip.transformer import QuickGELU
from transformers import BertConfig
from transformers.masking_utils import create_bidirectional_mask

from open_clip_elip.fusion.bert import Tokens
from open_clip_elip.fusion.start import start_task
from open_clip_elip.identity import ModelError, create, describe

from ...training.tasks.test_meter import meter
from .test_albef_traps import texts


def test_the_streams_are_those_of_transformers_layers_in_parallel_and_not_causal():
    """The private parts of transformers that `fusion.bert` drives from outside, driven by their own forward."""
    model, text, image = meter().eval().double(), texts(6, 4), torch.randn(2, 17, 24, dtype=torch.float64)
    states, tokens = model.text_states(text), Tokens(model.mask(text))
    config = BertConfig(attn_implementation="sdpa")
    t, v = model.cross_modal_text_transform(states) + model.token_type_embeddings.weight[0], image
    mask = {"config": config, "attention_mask": model.mask(text)}
    own = create_bidirectional_mask(inputs_embeds=t, **mask)
    cross = create_bidirectional_mask(inputs_embeds=v, encoder_hidden_states=t, **mask)
    for of_text, of_image in zip(model.cross_modal_text_layers, model.cross_modal_image_layers, strict=True):
        for layer in (of_text, of_image):
            layer.attention.self.is_causal = False  # else it is wherever no mask reaches it
            for part in (layer.attention, layer.crossattention):
                part.self.config._attn_implementation = "sdpa"  # else no mask is made, and padding is seen
        t, v = (
            of_text(t, attention_mask=own, encoder_hidden_states=v),
            of_image(v, encoder_hidden_states=t, encoder_attention_mask=cross),
        )
    expected = torch.cat([model.cross_modal_text_pooler(t), model.cross_modal_image_pooler(v)], dim=1)
    torch.testing.assert_close(model.pooled(states, tokens, image), expected, rtol=1e-10, atol=1e-12)
    long = F.pad(text, (0, 5))
    padded = model.pooled(model.text_states(long), Tokens(model.mask(long)), image)
    torch.testing.assert_close(padded, expected, rtol=1e-10, atol=1e-12)


def test_the_image_tower_has_clips_parts_without_its_last_layer():
    model, image = meter().eval(), torch.randn(2, 3, 32, 32)
    visual = model.visual
    assert all(isinstance(block.mlp.gelu, QuickGELU) for block in visual.transformer.resblocks)
    assert visual.conv1.bias is None and visual.proj is None and not isinstance(visual.ln_pre, torch.nn.Identity)
    expected = visual.ln_post(visual.transformer(visual._embeds(image)))
    torch.testing.assert_close(model.image_states(image), expected, rtol=1e-5, atol=1e-6)


def test_positions_are_resized_without_smoothing():
    large, small = meter(), meter(task="entailment")
    torch.nn.init.normal_(large.visual.positional_embedding)
    state, key = large.state_dict(), "visual.positional_embedding"
    wide = state[key][1:].view(1, 4, 4, 32).permute(0, 3, 1, 2)
    wide = F.interpolate(wide, (8, 8), mode="nearest").flatten(2)[0].t()
    state[key] = torch.cat([state[key][:1], wide + torch.arange(64)[:, None] % 2])
    found = start_task(small, {"state_dict": state}, "large")
    grid = state[key][1:].view(1, 8, 8, 32).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, (4, 4), mode="bicubic", align_corners=False).flatten(2)[0].t()
    torch.testing.assert_close(small.visual.positional_embedding[1:], expected, rtol=0, atol=1e-5)
    assert found.resized == [f"{key} (65 to 17)"] and all(name.startswith("head.") for name in found.new)


def test_heads_and_norms_are_the_releases():
    model = create(describe("METER-B-16-ELIP"), device="meta")
    assert model.mlm_head[1].weight is not model.text.embeddings.word_embeddings.weight
    assert model.mlm_head[1].bias is not None and model.mlm_head[0].LayerNorm.eps == 1e-12
    assert model.text.encoder.layer[0].output.LayerNorm.eps == 1e-5 and model.pad == 1
    assert model.cross_modal_image_layers[0].crossattention.output.LayerNorm.eps == 1e-12
    assert sum(p.numel() for p in model.parameters()) == 357_899_099
    assert model.tower.token_counts() == [325] * 2 + [293] * 2 + [228] * 5 + [147] * 2
    released = describe("METER-B-16-ELIP", token_reduction={"keep_count": [324, 44, 34, 22]})
    assert create(released, device="meta").tower.token_counts()[-1] == 24  # the release's, whatever the picture
    assert sum(p.numel() for p in create(describe("METER-B-32"), device="meta").parameters()) == 329_111_612


def test_a_text_of_another_width_cannot_guide():
    wide = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    with pytest.raises(ModelError, match=r"at its own width \(64\), and vision_cfg has another \(32\)"):
        meter({"method": "elip"}, bert=wide)
    assert meter(bert=wide).width == 64
