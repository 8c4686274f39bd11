"""Pictures and captions that do not belong to a pair: which they are, and that a resume draws the same."""
from collections import Counter

import numpy
import pytest
import torch
from PIL import Image

from training.data import build_train_data
from training.data.false_pairs import FalsePairs
from training.data.samples import PairEncoding
from training.errors import UserError
from training.tasks.meter import deal

from ..arrow_files import write_captions, write_json
from ..data_helpers import BROKEN_IMAGE, LetterTokenizer, data_args, write_shards
from .sets import layout_files

COUNT = 6


def grey(number: int, format: str = "png") -> bytes:
    return layout_files.encode(Image.new("RGB", (4, 4), (number,) * 3), format)


def level(image: Image.Image) -> torch.Tensor:
    """A picture's grey, as one pixel."""
    return torch.tensor(numpy.asarray(image)[:1, :1].transpose(2, 0, 1) / 1.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A JSON list of grey pictures, one of which is broken and one of which has two captions; an Arrow file; shards."""
    folder = tmp_path_factory.mktemp("pairs")
    for n in range(COUNT):
        (folder / f"{n}.png").write_bytes(BROKEN_IMAGE if n == 4 else grey(n))
    captions = [f"caption {n}" for n in range(COUNT - 1)] + [["caption 5", "caption 6"]]
    items = [{"image": f"{n}.png", "caption": caption} for n, caption in enumerate(captions)]
    write_json(folder / "list.json", items)
    write_shards(folder, [8, 8])
    return folder


def data(path, *, texts=0, rank=0, world_size=1, **flags):
    encoding = FalsePairs(PairEncoding(level, LetterTokenizer()), texts)
    args = data_args(train_data=str(path), image_root=None, **({"batch_size": 2} | flags))
    return build_train_data(args, encoding, rank=rank, world_size=world_size)


def of(batches, name):
    images = [batch[name].pixels[:, 0, 0, 0] for batch in batches]
    return torch.cat(images).int().tolist()


def test_false_images_and_texts_are_drawn_from_all_items(folder):
    train = data(folder / "list.json", texts=3)
    batches = [batch for epoch in range(30) for batch in train.epoch(epoch)]
    images, own = of(batches, "false_images"), of(batches, "image")
    assert set(images) == set(own) == {0, 1, 2, 3, 5}  # the broken one is drawn, and another one in its place
    assert min(Counter(images).values()) > len(images) / 20
    assert 0.05 < sum(map(int.__eq__, images, own)) / len(own) < 0.4  # a fifth are the pair's own
    texts = torch.cat([batch["false_texts"] for batch in batches])
    assert texts.shape == (len(own), 3, 12)
    said = Counter(bytes(letters).decode().strip() for letters in texts.flatten(0, 1).tolist())
    assert set(said) == {f"caption {n}" for n in range(7)}
    shares = torch.tensor([said[f"caption {n}"] for n in range(7)]) / said.total()
    expected = torch.tensor([1, 1, 1, 1, 1, 0.5, 0.5]) / 6
    torch.testing.assert_close(shares, expected, atol=0.06, rtol=0)


def test_from_shards_a_false_image_is_that_of_another_pair_of_the_batch(folder):
    train = data(f"{folder}/{{00000..00001}}.tar", batch_size=4)
    batches, other = [batch for epoch in range(12) for batch in train.epoch(epoch)], Counter()
    for batch in batches:
        assert "false_images" not in batch
        dealt = deal(batch["image"], None, torch.zeros(4))
        assert dealt["image"] is batch["image"] and not (dealt["seen"] == torch.arange(4)).any()
        other.update(((dealt["seen"] - torch.arange(4)) % 4).tolist())
    assert set(other) == {1, 2, 3} and min(other.values()) > len(batches) * 4 / 5


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["list.json", "list.arrow", "{00000..00001}.tar"])
def test_a_resume_draws_the_same(kind, workers, folder):
    if kind == "list.arrow":
        write_captions(folder / kind, [[f"caption {n}"] for n in range(COUNT)])
    texts = 0 if kind.endswith("tar") else 2
    uninterrupted, begun, resumed = (data(folder / kind, texts=texts, workers=workers) for _ in range(3))
    whole = list(uninterrupted.epoch(1))
    batches = begun.epoch(1)
    next(batches)
    resumed.load_state_dict(begun.state_dict())
    rest = list(resumed.epoch(1))
    assert len(rest) == len(whole) - 1
    for one, other in zip(rest, whole[1:], strict=True):
        assert one["key"] == other["key"] and ("false_images" in one) == (not kind.endswith("tar"))
        images = [batch.get("false_images", batch["image"]).pixels for batch in (one, other)]
        assert torch.equal(*images)
        assert not texts or torch.equal(one["false_texts"], other["false_texts"])


def test_ranks_draw_differently(folder):
    def drawn(rank):
        train = data(folder / "list.json", rank=rank, world_size=2, batch_size=1)
        return of([batch for epoch in range(8) for batch in train.epoch(epoch)], "false_images")

    assert drawn(0) != drawn(1)


def test_what_shards_do_not_have_is_refused(folder):
    for flags in ({"texts": 2}, {"batch_size": 1}):
        with pytest.raises(UserError, match="Shards have no false captions, and no false image for a batch of one"):
            data(f"{folder}/{{00000..00001}}.tar", **flags)
