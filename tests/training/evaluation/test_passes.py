import numpy as np
import pytest
import torch
from torchvision.transforms.functional import to_tensor

from training.data.sets.labelled import ArrayImages, ImageFiles
from training.distributed import Ranks
from training.errors import UserError
from training.evaluation.passes import (
    EncodeSettings,
    Halving,
    ImagePass,
    NotFinite,
    collect,
    encode_places,
    gather_rows,
)

from ...processes import spawn

ONE = Ranks(torch.device("cpu"))


def noise(count: int) -> ArrayImages:
    return ArrayImages(np.random.default_rng(0).integers(0, 256, (count, 4, 4, 3), dtype=np.uint8), "noise")


def mean_colour(images):
    return images.mean(dim=(2, 3))


def image_pass(images, function=mean_colour, ranks=ONE, **settings):
    settings = EncodeSettings(**{"batch_size": 3, "workers": 0, "precision": "fp32", **settings})
    return ImagePass(function, images, to_tensor, ranks=ranks, settings=settings)


@pytest.mark.parametrize("batch_size,workers", [(1, 0), (3, 2), (100, 0)])
def test_outputs_in_order(batch_size, workers):
    images = noise(7)
    outputs, index, skipped = collect(image_pass(images, batch_size=batch_size, workers=workers))
    expected = torch.from_numpy(images.pixels).float().mean(dim=(1, 2)) / 255
    assert index.tolist() == list(range(7)) and skipped == []
    torch.testing.assert_close(outputs, expected)
    with pytest.raises(NotFinite, match="The features of noise, row 0 are not finite"):
        collect(image_pass(images, lambda images: mean_colour(images) / 0))


def test_places_in_order():
    settings = EncodeSettings(3, 0, "fp32")
    numbers = encode_places(lambda places: places[:, None] + 0.5, 7, "the features of {}".format, ONE, settings)
    assert numbers[:, 0].tolist() == [i + 0.5 for i in range(7)]
    with pytest.raises(NotFinite, match="The features of 0 are not finite; take --precision fp32"):
        encode_places(lambda places: 1 / places, 7, "the features of {}".format, ONE, settings)


def test_each_process_has_whole_batches():
    images = noise(11)
    whole = list(image_pass(images))
    parts = [list(image_pass(images, ranks=Ranks(torch.device("cpu"), rank, rank, 3))) for rank in range(3)]
    assert [len(part) for part in parts] == [2, 1, 1]
    for k, (index, outputs) in enumerate(whole):
        assert torch.equal(parts[k % 3][k // 3][0], index) and torch.equal(parts[k % 3][k // 3][1], outputs)


def test_broken_pictures(tmp_path, caplog):
    for i, picture in enumerate([b"no picture", None, b""]):
        if picture is None:
            noise(1).load(0).save(tmp_path / f"{i}.png")
        else:
            (tmp_path / f"{i}.png").write_bytes(picture)
    images = ImageFiles(tmp_path, ["0.png", "1.png", "2.png"])
    outputs, index, skipped = collect(image_pass(images, batch_size=1))
    assert index.tolist() == [1] and len(outputs) == 1
    assert skipped == [str(tmp_path / "0.png"), str(tmp_path / "2.png")]
    assert "2 of 3 images cannot be read" in caplog.text
    with pytest.raises(UserError, match="0.png cannot be read .*--on-broken skip"):
        collect(image_pass(images, on_broken="stop"))
    with pytest.raises(UserError, match="None of the 1 images can be read"):
        collect(image_pass(images.subset(torch.tensor([0]))))


class TestHalving:
    def limited(self, most, message="CUDA out of memory. Tried to allocate"):
        sizes = []

        def function(x, y):
            sizes.append(len(x))
            if len(x) > most:
                raise RuntimeError(message)
            return x + y

        return function, sizes

    def test_halves_until_it_fits_and_stays_there(self, caplog):
        function, sizes = self.limited(3)
        halving, x = Halving(function), torch.arange(10)
        assert torch.equal(halving(x, x), 2 * x)
        assert sizes == [10, 5, 3, 3, 3, 1]
        assert "Out of memory with a batch of 10; going on with 5." in caplog.text
        assert torch.equal(halving(x, x), 2 * x)
        assert sizes[6:] == [3, 3, 3, 1]

    def test_what_is_no_lack_of_memory_is_not_hidden(self):
        function, sizes = self.limited(3, "shapes do not fit")
        with pytest.raises(RuntimeError, match="shapes"):
            Halving(function)(torch.arange(10), torch.arange(10))
        assert sizes == [10]

    @pytest.mark.parametrize("of_torch", [True, False])
    def test_a_single_row_is_not_halved(self, of_torch, caplog):
        function, _ = self.limited(0)
        with pytest.raises(RuntimeError, match="out of memory|can't allocate memory"):
            Halving((lambda x, y: torch.empty(1 << 60)) if of_torch else function)(torch.arange(2), torch.arange(2))
        assert "Out of memory with a batch of 2; going on with 1." in caplog.text


class TestGathering:
    def test_one_process_sorts(self):
        parts = [(torch.tensor([2, 0]), torch.tensor([[1.0], [2.0]])), (torch.tensor([1]), torch.tensor([[3.0]]))]
        places, rows = gather_rows(parts, ONE)
        assert places.tolist() == [0, 1, 2] and rows.tolist() == [[2.0], [3.0], [1.0]]
        assert gather_rows([], ONE)[1] is None

    def test_two_processes(self):
        spawn(rank_main)


def rank_main(rank: int) -> None:
    """Each case: the places of the rows that each of the two processes has."""
    whole, ranks = torch.arange(84).reshape(7, 3, 4), Ranks(torch.device("cpu"), rank, rank, 2)
    for shares in ([[0, 2, 4, 6], [1, 3, 5]], [[6, 1], [5, 0, 4, 3, 2]], [list(range(7)), []], [[], list(range(7))]):
        mine = torch.tensor(shares[rank], dtype=torch.int64)
        places, rows = gather_rows([(mine, whole[mine])] if len(mine) else [], ranks)
        assert places.tolist() == list(range(7)) and torch.equal(rows, whole), shares
    assert gather_rows([], ranks)[1] is None
    # What one process finds is raised on both, as what it is.
    for name, problem in (("wrong", NotFinite("row 3")), ("broken", UserError("row 3"))):
        def failing(problem=problem):
            if rank:
                raise problem
            yield torch.tensor([0]), torch.zeros(1, 1)

        with pytest.raises(UserError, match="row 3") as caught:
            gather_rows(failing(), ranks)
        assert type(caught.value) is type(problem), name
