from types import SimpleNamespace

import open_clip
import pytest
import torch
from open_clip.loss import SigLipLoss
from torch.nn.parallel import DistributedDataParallel

from training.data.pixels import Images
from training.distributed import Ranks
from training.errors import UserError
from training.evaluation.pairs import evaluate_pairs
from training.evaluation.passes import NotFinite, evaluation_mode, unwrap

from ...processes import spawn

PAIRS = 23
ONE = Ranks(torch.device("cpu"))


def tiny_clip(**kwargs):
    torch.manual_seed(0)
    vision = {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 4, "mlp_ratio": 2}
    text = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1}
    return open_clip.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text, output_dict=True, **kwargs).train()


def batches(sizes, order=None):
    """The same `sum(sizes)` pairs in batches of these sizes; `order` picks which batches, and in which order."""
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(sum(sizes), 3, 32, 32, generator=generator)
    text = torch.randint(1, 50, (sum(sizes), 8), generator=generator)
    index = torch.arange(sum(sizes))
    parts = zip(image.split(sizes), text.split(sizes), index.split(sizes), strict=True)
    made = [{"image": i, "text": t, "index": n, "key": [str(k) for k in n.tolist()]} for i, t, n in parts]
    return [made[k] for k in (range(len(made)) if order is None else order)]


def evaluate(model, data, siglip=False, ranks=ONE):
    options = SimpleNamespace(precision="fp32", batch_size=10, siglip=siglip)
    return evaluate_pairs(model, [{**batch, "image": Images(batch["image"])} for batch in data], options, ranks)


def test_equals_open_clip():
    from open_clip_train.train import get_clip_metrics

    model = tiny_clip().eval()
    data = batches([10, 10, 3])
    with torch.no_grad():
        outputs = [model(batch["image"], batch["text"]) for batch in data]
    image, text = (torch.cat([output[f"{kind}_features"] for output in outputs]) for kind in ("image", "text"))
    scale = outputs[0]["logit_scale"]
    expected = {name: float(value) for name, value in get_clip_metrics(image, text, scale).items()}
    loss = open_clip.ClipLoss()
    expected["clip_val_loss"] = sum(
        loss(output["image_features"], output["text_features"], scale).item() * len(batch["image"])
        for output, batch in zip(outputs, data, strict=True)
    ) / PAIRS

    metrics = evaluate(model, data)
    assert metrics.pop("num_samples") == PAIRS
    assert metrics == pytest.approx(expected, rel=1e-5)
    assert 0 < metrics["image_to_text_R@10"] < 1  # so that there was something to compare


def test_siglip():
    model = tiny_clip(init_logit_scale=2.0, init_logit_bias=-3.0).eval()
    data = batches([10, 10, 3])
    loss = SigLipLoss()
    with torch.no_grad():
        expected = sum(loss(**model(b["image"], b["text"])).item() * len(b["image"]) for b in data) / PAIRS
    assert evaluate(model, data, siglip=True)["clip_val_loss"] == pytest.approx(expected, rel=1e-5)


def test_order_of_arrival_does_not_matter():
    model = tiny_clip()
    sizes = [5, 8, 6, 4]
    assert evaluate(model, batches(sizes, [2, 0, 3, 1])) == evaluate(model, batches(sizes))


def test_the_image_tower_never_sees_the_caption():
    from open_clip_elip.clip import with_token_reduction

    plain = tiny_clip()
    # The caption alone chooses one of sixteen patches: whoever gives it to the image tower gets other features.
    model = with_token_reduction(plain, lam=0.0, merge=False, depths=[2, 2], keep_ratio=[1 / 16, 1 / 16]).train()
    data = batches([10, 10, 3])
    guided = model(data[0]["image"], data[0]["text"])["image_features"]
    assert not torch.allclose(guided, plain(data[0]["image"], data[0]["text"])["image_features"], atol=1e-2)

    reduced = []
    model.reduction.register_forward_pre_hook(lambda module, inputs: reduced.append(inputs))
    seen = []
    encode_image = model.encode_image
    model.encode_image = lambda *args, **kwargs: seen.append((args, kwargs)) or encode_image(*args, **kwargs)
    model.forward = None  # it would pair image and caption
    metrics = evaluate(model, data)
    del model.forward
    assert metrics == pytest.approx(evaluate(plain, data), rel=1e-5)
    assert reduced == []
    assert [(len(args), kwargs) for args, kwargs in seen] == [(1, {"normalize": True})] * 3
    assert all(args[0].shape[1:] == (3, 32, 32) for args, _ in seen)


def test_modes_and_gradients_are_as_before():
    model = tiny_clip()
    model.visual.eval()  # a locked tower
    before = [module.training for module in model.modules()]
    seen = []
    model.visual.register_forward_hook(lambda module, *_: seen.append((module.training, torch.is_grad_enabled())))
    model.transformer.register_forward_hook(lambda module, *_: seen.append((module.training, torch.is_grad_enabled())))
    evaluate(model, batches([3]))
    assert seen == [(False, False)] * 2
    assert [module.training for module in model.modules()] == before
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    model(torch.randn(1, 3, 32, 32), torch.ones(1, 8, dtype=torch.int64))["image_features"].sum().backward()


def test_features_that_are_no_numbers_are_refused():
    model = tiny_clip()
    model.text_projection.data[0, 0] = torch.nan
    with pytest.raises(NotFinite, match="The features of the pair 0 are not finite"):
        evaluate(model, batches([10, 10, 3]))
    assert model.training


def test_unwrap():
    model = tiny_clip()
    for wrapped in (model, torch.compile(model), torch.compile(torch.nn.DataParallel(torch.compile(model)))):
        assert unwrap(wrapped) is model
    with evaluation_mode(torch.compile(model)) as inner:
        assert inner is model and not model.training
    assert model.training


def test_two_processes():
    spawn(rank_main)


def rank_main(rank: int) -> None:
    """Two processes with the same batches as one must give exactly its numbers, on both."""
    model, ranks = tiny_clip(), Ranks(torch.device("cpu"), rank, rank, 2)
    wrapped = DistributedDataParallel(tiny_clip())
    assert unwrap(wrapped) is wrapped.module
    sizes = [5, 8, 6, 4]
    alone = evaluate(model, batches(sizes))
    for shares in ([[0, 2], [1, 3]], [[3, 0, 1], [2]], [[0, 1, 2, 3], []], [[], [1, 3, 0, 2]]):
        assert evaluate(wrapped, batches(sizes, shares[rank]), ranks=ranks) == alone, shares
        assert wrapped.training and wrapped.module.visual.training
    with pytest.raises(UserError, match="--val-data"):
        evaluate(wrapped, [], ranks=ranks)
