import json
import shutil
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from safetensors.torch import load_file
from torchvision.transforms.functional import to_tensor

from open_clip_elip import TextFirstCLIP
from training.distributed import Ranks
from training.errors import UserError
from training.evaluation import features as module
from training.evaluation.loaded import LoadedModel
from training.evaluation.passes import EncodeSettings
from training.evaluation.features import extract_features, feature_encoder
from training.data.sets.labelled import ArrayImages, LabelledImages

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
@pytest.mark.parametrize(("proj", "width"), [("linear", 512), ("mlp", 512), ("", 512), ("none", 512)])
def test_layers_of_a_timm_tower(proj, width):
    tower = timm_tower(proj=proj)
    images = torch.randn(2, 3, 32, 32)
    pooled = feature_encoder(SimpleNamespace(visual=tower), "pooled", normalize=False)(images)
    assert pooled.shape == (2, width)
    head = tower.head if proj in ("linear", "mlp") else tower.trunk.get_classifier()
    torch.testing.assert_close(head(pooled), tower(images))


def test_towers_without_a_separate_projection():
    resnet = ModifiedResNet((1, 1, 1, 1), output_dim=16, heads=4, image_size=32, width=8)
    with pytest.raises(UserError, match=r"\(ModifiedResNet\) has no features before a projection; take --layer projec"):
        feature_encoder(SimpleNamespace(visual=resnet), "pooled", normalize=False)
    pool = SimpleNamespace(visual=timm_tower(pool="rot_attn", proj=""))
    with pytest.raises(UserError, match="TimmModel"):
        feature_encoder(pool, "pooled", normalize=False)
    coca = open_clip.transformer.VisionTransformer(16, 4, 32, 1, 2, 2.0, attentional_pool="parallel", output_dim=16)
    with pytest.raises(UserError, match="VisionTransformer"):
        feature_encoder(SimpleNamespace(visual=coca), "pooled", normalize=False)


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


class Counted:
    """A model that counts the images that its `encode_image` has seen."""

    def __init__(self, clip):
        self.visual, self.clip, self.seen = clip.visual, clip, 0

    def encode_image(self, images):
        self.seen += len(images)
        return self.clip.encode_image(images)


@pytest.fixture
def extract(clip, tmp_path):
    model = Counted(clip)

    def run(data, *, weights="0" * 16, transform="to tensor", name="tiny", ranks=ONE, model=model, **changes):
        loaded = LoadedModel(model, None, to_tensor, transform, weights, name, None)
        settings = {"batch_size": 2, "workers": 0, "precision": "fp32", "on_broken": "skip"}
        settings |= {name: changes.pop(name) for name in settings if name in changes}
        options = {"layer": "projected", "normalize": False, "dtype": torch.float32, "cache": tmp_path / "cache"}
        return extract_features(loaded, data, ranks=ranks, settings=EncodeSettings(**settings), **options | changes)

    run.model = model
    return run


@torch.no_grad()
def expected_features(clip, data):
    return torch.cat([clip.encode_image(to_tensor(data.images.load(i))[None]) for i in range(len(data))])


def test_extracts_once(extract, clip, tmp_path):
    data = noise_data()
    first = extract(data)
    torch.testing.assert_close(first.features, expected_features(clip, data))
    assert torch.equal(first.labels, data.labels) and first.places.tolist() == list(range(7)) and first.skipped == []
    assert extract.model.seen == 7
    again = extract(noise_data())
    assert extract.model.seen == 7
    assert torch.equal(again.features, first.features)
    # For people and other programs: one safetensors file, and a JSON that says what it is.
    stored = load_file(first.path)
    assert torch.equal(stored["features"], first.features) and torch.equal(stored["labels"], data.labels)
    described = json.loads(first.path.with_suffix(".json").read_text())
    assert (described["data"], described["images"], described["skipped"]) == ("noise", 7, [])
    assert sorted(p.suffix for p in (tmp_path / "cache").iterdir()) == [".json", ".safetensors"]


def test_everything_that_matters_is_in_the_key(extract):
    paths = [
        extract(noise_data()).path,
        extract(noise_data(), weights="1" * 16).path,
        extract(noise_data(), name="other").path,
        extract(noise_data(), transform="another").path,
        extract(noise_data(), normalize=True).path,
        extract(noise_data(), layer="pooled").path,
        extract(noise_data(), dtype=torch.bfloat16).path,
        extract(noise_data(), precision="amp_bf16").path,
        extract(noise_data(seed=1)).path,
        extract(noise_data(split="val")).path,
        extract(noise_data().subset(torch.tensor([0, 1, 2, 4]))).path,
    ]
    assert len(set(paths)) == len(paths)
    assert extract(noise_data(), batch_size=5).path == paths[0]  # that only changes rounding
    assert extract(noise_data(), transform="f at 0x7f01").path == extract(noise_data(), transform="f at 0x7f02").path


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_smaller_types(extract, dtype):
    data = noise_data()
    stored = extract(data, dtype=dtype, normalize=True)
    assert stored.features.dtype == dtype
    assert torch.equal(stored.features, extract(data, normalize=True).features.to(dtype))
    assert load_file(stored.path)["features"].dtype == dtype


def test_broken_pictures(extract, caplog):
    data = noise_data(8, broken=(0, 5))
    found = extract(data)
    assert found.places.tolist() == [1, 2, 3, 4, 6, 7]
    assert torch.equal(found.labels, data.labels[found.places])
    assert found.skipped == ["noise, row 0", "noise, row 5"]
    whole = noise_data(8)
    torch.testing.assert_close(found.features, extract(whole, weights="1" * 16).features[found.places])
    assert extract(data).skipped == found.skipped  # from the cache
    with pytest.raises(UserError, match="noise, row 0 cannot be read; mend it, or take --on-broken skip"):
        extract(data, on_broken="stop")
    with pytest.raises(UserError, match="None of the 2 images can be read"):
        extract(noise_data(2, broken=(0, 1)))


def test_what_breaks_off_is_not_used(extract, tmp_path):
    data = noise_data()

    class Failing(Counted):
        def encode_image(self, images):
            if self.seen >= 4:
                raise RuntimeError("killed")
            return super().encode_image(images)

    with pytest.raises(RuntimeError, match="killed"):
        extract(data, model=Failing(extract.model.clip))
    assert list((tmp_path / "cache").iterdir()) == []
    whole = extract(data)
    content = whole.path.read_bytes()
    whole.path.unlink()  # the old mapping stays readable
    whole.path.write_bytes(content[:-8])
    assert torch.equal(extract(data).features, whole.features) and extract.model.seen == 14
    whole.path.with_suffix(".json").write_text("{")
    extract(data)
    assert extract.model.seen == 21
    whole.path.with_suffix(".json").unlink()  # written last: without it the features may be half-written
    extract(data)
    extract(data)
    assert extract.model.seen == 28


def test_features_that_are_not_finite(extract, clip):
    class Wrong(Counted):
        def encode_image(self, images):
            features = super().encode_image(images)
            features[-1, 3] = float("inf") if self.seen > 4 else 1e5
            return features

    with pytest.raises(UserError, match="noise, row 5 are not finite; take --precision fp32"):
        extract(noise_data(), model=Wrong(clip))
    with pytest.raises(UserError, match="noise, row 1 are not finite"):  # 1e5 is too large for fp16
        extract(noise_data(), model=Wrong(clip), dtype=torch.float16)


def test_no_room(extract, monkeypatch, tmp_path):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(UserError, match="The features need 0.0 GB in .*cache while they are written"):
        extract(noise_data())
    monkeypatch.undo()
    assert list((tmp_path / "cache").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written to .*file"):
        extract(noise_data(), cache=tmp_path / "file")

    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "written_whole", full)
    with pytest.raises(UserError, match=r"cannot be written to .*cache \(No space left on device\); give another"):
        extract(noise_data())
    assert list((tmp_path / "cache").iterdir()) == []


def test_rows_of_all_processes_are_put_in_order(tmp_path, monkeypatch):
    """Parts of three processes, one without rows; a few rows in memory at a time."""
    monkeypatch.setattr(module, "_ASSEMBLED_ROWS", 2)
    features = torch.randn(9, 4)
    places = [torch.tensor([0, 1, 4, 8]), torch.empty(0, dtype=torch.int64), torch.tensor([2, 3, 6])]
    labels = torch.arange(9) % 2
    path = tmp_path / "set.safetensors"
    module._assemble(path, [features[part] for part in places], places, labels)
    stored = load_file(path)
    everything = torch.tensor([0, 1, 2, 3, 4, 6, 8])
    assert torch.equal(stored["features"], features[everything])
    assert torch.equal(stored["places"], everything) and torch.equal(stored["labels"], labels[everything])


def test_the_elip_model_encodes_with_all_tokens(extract, clip):
    assert isinstance(clip, TextFirstCLIP)
    data = noise_data(3)
    plain = open_clip.CLIP(
        16, {"image_size": 16, "patch_size": 4, "layers": 6, "width": 32, "head_width": 16},
        {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 2},
    )  # fmt: skip
    plain.load_state_dict(clip.state_dict())
    expected = expected_features(plain.eval(), data)
    torch.testing.assert_close(extract(data, model=clip).features, expected)
