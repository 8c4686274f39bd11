import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from torchvision.transforms.functional import to_tensor

from training.data.sets.labelled import ArrayImages, LabelledImages
from training.distributed import Ranks
from training.errors import UserError
from training.evaluation import features as module
from training.evaluation.features import extract_features, feature_encoder
from training.evaluation.passes import EncodeSettings, ImagePass

from ...processes import spawn
from ..tiny import tiny_clip

ONE = Ranks(torch.device("cpu"))
IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


# --- layers ---


@pytest.fixture(scope="module")
def clip():
    return tiny_clip(dtype=torch.float32).eval()


@torch.no_grad()
def test_layers_of_a_vit(clip):
    before = {name: value.clone() for name, value in clip.state_dict().items()}
    pooled = feature_encoder(clip, "pooled", normalize=False)(IMAGES)
    projected = feature_encoder(clip, "projected", normalize=False)(IMAGES)
    assert pooled.shape == (3, 32) and projected.shape == (3, 16)
    assert torch.equal(pooled @ clip.visual.proj, projected)
    assert torch.equal(projected, clip.encode_image(IMAGES))
    plain = SimpleNamespace(visual=clip.visual)
    torch.testing.assert_close(feature_encoder(plain, "pooled", normalize=False)(IMAGES), pooled)
    unit = feature_encoder(clip, "projected", normalize=True)(IMAGES)
    torch.testing.assert_close(unit, clip.encode_image(IMAGES, normalize=True))
    torch.testing.assert_close(feature_encoder(clip, "pooled", True)(IMAGES), F.normalize(pooled, dim=-1))
    assert all(torch.equal(value, before[name]) for name, value in clip.state_dict().items())


def timm_tower(**changes):
    torch.manual_seed(0)
    return TimmModel("resnet10t", embed_dim=16, image_size=32, **{"pool": "avg", "proj": "linear", **changes}).eval()


@torch.no_grad()
@pytest.mark.parametrize("proj", ["linear", "mlp", "", "none"])
def test_layers_of_a_timm_tower(proj):
    tower, images = timm_tower(proj=proj), torch.randn(2, 3, 32, 32)
    pooled = feature_encoder(SimpleNamespace(visual=tower), "pooled", normalize=False)(images)
    assert pooled.shape == (2, 512)
    head = tower.head if proj in ("linear", "mlp") else tower.trunk.get_classifier()
    torch.testing.assert_close(head(pooled), tower(images))


def test_towers_without_a_separate_projection():
    resnet = ModifiedResNet((1, 1, 1, 1), output_dim=16, heads=4, image_size=32, width=8)
    pool = timm_tower(pool="rot_attn", proj="")
    coca = open_clip.transformer.VisionTransformer(16, 4, 32, 1, 2, 2.0, attentional_pool="parallel", output_dim=16)
    for tower in (resnet, pool, coca):
        said = rf"\({type(tower).__name__}\) has no features before a projection; take --layer projected"
        with pytest.raises(UserError, match=said):
            feature_encoder(SimpleNamespace(visual=tower), "pooled", normalize=False)


# --- the cache ---


class Noise(ArrayImages):
    """Pictures of noise, some of which cannot be read."""

    def __init__(self, count, broken=(), seed=0):
        super().__init__(np.random.default_rng(seed).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8), "noise")
        self.broken = set(broken)

    def load(self, i):
        if i in self.broken:
            raise OSError("truncated")
        return super().load(i)


def noise_data(count=7, broken=(), seed=0, **changes):
    labels = torch.arange(count) % 3
    place = {"name": "noise", "split": "train", **changes}
    return LabelledImages(Noise(count, broken, seed), labels, ["a", "b", "c"], **place)


@pytest.fixture
def extract(clip, tmp_path):
    """`extract_features` with the projected features of a tiny model; `extract.seen` counts its pictures."""

    def run(data, *, weights="0" * 16, model=clip, ranks=ONE, spoil=lambda features: features, **changes):
        def encoder(images):
            run.seen += len(images)
            return spoil(model.encode_image(images))

        settings = {"batch_size": 2, "workers": 0, "precision": "fp32", "on_broken": "skip"}
        settings |= {name: changes.pop(name) for name in settings if name in changes}
        options = {"dtype": torch.float32, "folder": tmp_path / "cache"} | changes
        images = ImagePass(encoder, data.images, to_tensor, ranks=ranks, settings=EncodeSettings(**settings))
        return extract_features(images, data, {"weights": weights}, **options)

    run.seen = 0
    return run


@torch.no_grad()
def expected_features(clip, data):
    return torch.cat([clip.encode_image(to_tensor(data.images.load(i))[None]) for i in range(len(data))])


def test_extracts_once(extract, clip, tmp_path):
    data = noise_data()
    first = extract(data)
    torch.testing.assert_close(first.features, expected_features(clip, data))
    assert torch.equal(first.labels, data.labels) and first.rows.tolist() == list(range(7)) and first.skipped == []
    assert extract.seen == 7
    again = extract(noise_data())
    assert extract.seen == 7
    assert torch.equal(again.features, first.features)
    extract(noise_data(), redo=True)
    assert extract.seen == 14
    # For people and other programs: one file of NumPy's, and a JSON that says what it is.
    stored = np.load(first.path)
    assert stored.dtype == np.float32 and np.array_equal(stored, first.features.numpy())
    described = json.loads(first.path.with_suffix(".json").read_text())
    assert (described["data"], described["labels"], described["skipped"]) == ("noise", data.labels.tolist(), [])
    assert sorted(p.suffix for p in (tmp_path / "cache").iterdir()) == [".json", ".npy"]


def test_everything_that_matters_is_in_the_key(extract):
    paths = [
        extract(noise_data()).path,
        extract(noise_data(), weights="1" * 16).path,
        extract(noise_data(), dtype=torch.bfloat16).path,
        extract(noise_data(seed=1)).path,
        extract(noise_data(split="val")).path,
        extract(noise_data().subset(torch.tensor([0, 1, 2, 4]))).path,
    ]
    assert len(set(paths)) == len(paths)
    assert extract(noise_data(), batch_size=5).path == paths[0]  # that only changes rounding


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_smaller_types(extract, dtype):
    stored = extract(noise_data(), dtype=dtype)
    assert torch.equal(stored.features, extract(noise_data()).features.to(dtype))
    assert stored.path.stat().st_size < 128 + 7 * 16 * 2 + 1


def test_broken_pictures(extract, caplog):
    data = noise_data(8, broken=(0, 5))
    found = extract(data)
    assert found.rows.tolist() == [1, 2, 3, 4, 6, 7]
    assert torch.equal(found.labels, data.labels) and not found.features[[0, 5]].any()
    assert found.skipped == ["noise, row 0", "noise, row 5"]
    whole = noise_data(8)
    torch.testing.assert_close(found.features[found.rows], extract(whole, weights="1" * 16).features[found.rows])
    assert extract(data).skipped == found.skipped  # from the cache
    with pytest.raises(UserError, match="noise, row 0 cannot be read; mend it, or take --on-broken skip"):
        extract(data, on_broken="stop")
    with pytest.raises(UserError, match="None of the 2 images can be read"):
        extract(noise_data(2, broken=(0, 1)))


def test_what_breaks_off_is_not_used(extract, tmp_path):
    def failing(features):
        if extract.seen >= 4:
            raise RuntimeError("killed")
        return features

    with pytest.raises(RuntimeError, match="killed"):
        extract(noise_data(), spoil=failing)
    assert list((tmp_path / "cache").iterdir()) == []
    whole = extract(noise_data())
    description, seen = whole.path.with_suffix(".json"), extract.seen
    content = whole.path.read_bytes()
    whole.path.unlink()  # the old mapping stays readable
    # Features cut off; a description cut off, of other work, or missing: it is written last.
    damages = [
        lambda: whole.path.write_bytes(content[:-8]),
        lambda: description.write_text("{"),
        lambda: description.write_text("[]"),
        description.unlink,
    ]
    for damage in damages:
        damage()
        seen += 7
        assert torch.equal(extract(noise_data()).features, whole.features) and extract.seen == seen


def test_features_that_are_not_finite(extract):
    def wrong(features):
        features[-1, 3] = float("inf") if extract.seen > 4 else 1e5
        return features

    with pytest.raises(UserError, match="The features of noise, row 5 are not finite; take --precision fp32"):
        extract(noise_data(), spoil=wrong)
    extract.seen = 0
    with pytest.raises(UserError, match="noise, row 1 are too large for this --feature-dtype; take float32"):
        extract(noise_data(), spoil=wrong, dtype=torch.float16)


def test_no_room(extract, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written to .*file"):
        extract(noise_data(), folder=tmp_path / "file")

    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "written_whole", full)
    with pytest.raises(UserError, match=r"cannot be written to .*cache \(No space left on device\); give another"):
        extract(noise_data())
    monkeypatch.undo()
    extract(noise_data())  # what is left of the failed one is no result


def test_two_processes_fill_one_file(extract, tmp_path):
    """One of the two has broken pictures only."""
    data = noise_data(5, broken=(2, 3))
    expected = extract(data).path.read_bytes()
    spawn(rank_main, str(tmp_path / "two"))
    (path,) = (tmp_path / "two").glob("*.npy")
    assert path.read_bytes() == expected
    assert path.with_suffix(".json").read_bytes() == (tmp_path / "cache" / path.name).with_suffix(".json").read_bytes()


def rank_main(rank, folder):
    clip, ranks = tiny_clip(dtype=torch.float32).eval(), Ranks(torch.device("cpu"), rank, rank, 2)
    data, what = noise_data(5, broken=(2, 3)), {"weights": "0" * 16}
    for redo in (False, True):
        settings = EncodeSettings(2, 0, "fp32")
        images = ImagePass(clip.encode_image, data.images, to_tensor, ranks=ranks, settings=settings)
        found = extract_features(images, data, what, dtype=torch.float32, folder=Path(folder), redo=redo)
        assert found.rows.tolist() == [0, 1, 4]
