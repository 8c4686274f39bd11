"""Which tokens cheaper scorings keep, against the exact ones."""
from __future__ import annotations

import pytest
import torch
from compare_scoring import Compared, main

from open_clip_elip import Elip, ElipConfig
from open_clip_elip.reduction.elip import cls_attention

from ..training.tiny import pairs, tiny_clip


def kept_in_common(first: torch.Tensor, second: torch.Tensor, keep: int) -> float:
    sets = [[set(row.topk(keep).indices.tolist()) for row in scores] for scores in (first, second)]
    return sum(len(a & b) / keep for a, b in zip(*sets, strict=True)) / len(first)


def test_shares_of_each_stage():
    model, batch = tiny_clip(), pairs(4)
    config = ElipConfig(depths=(1, 2, 3), keep_ratio=(1.0, 0.75, 0.25))
    model.tower.reduction = Elip(config, 6)
    compared = Compared(model.tower.reduction, model.visual.transformer.resblocks)
    with torch.no_grad():
        guidance = compared.guidance = model.encode_text_and_guidance(batch["text"])[1]
        compared_tokens = model.tower.tokens(batch["image"], guidance, reduce=True)
        model.tower.reduction = Elip(config, 6)
        assert torch.equal(compared_tokens, model.tower.tokens(batch["image"], guidance, reduce=True))
        blocks, x = model.visual.transformer.resblocks, model.visual._embeds(batch["image"])
        x = blocks[0](x)
        exact, cheap = (
            Elip(ElipConfig(scoring_depth=depth, depths=(1, 2, 3), keep_ratio=(1, 0.75, 0.25)), 6).score(
                blocks[1:3], x, guidance, lambda block, x: block(x)
            )
            for depth in (None, 1)
        )
    shares = {name: {k: torch.cat(v).mean().item() for k, v in of.items()} for name, of in compared.shares.items()}
    assert shares["`scoring_depth` 1"][2] == pytest.approx(kept_in_common(exact, cheap, 12))
    assert shares["`scoring_depth` 2"][2] == 1 and shares["by chance"] == pytest.approx({2: 12 / 16, 4: 4 / 13})
    fused = model.tower.reduction.fuse(x, guidance)[:, :1]
    before = torch.cat([fused, model.visual._embeds(batch["image"])[:, 1:]], dim=1)
    keys = kept_in_common(exact, cls_attention(blocks[0], before), 12)
    assert shares["keys of the layer before"][2] == pytest.approx(keys)
    assert [row[0] for row in compared.table()][1:3] == ["`scoring_depth` 1", "`scoring_depth` 2"]


def test_what_is_no_model_of_elip_is_one_sentence(tmp_path, capsys):
    assert main([str(tmp_path / "nothing.pt"), "shards"]) == 2
    assert "correct the path" in capsys.readouterr().err
