import numpy as np
import pytest
import torch
from torchvision.transforms.functional import to_tensor

from training.distributed import Ranks
from training.errors import UserError
from training.evaluation.passes import EncodeSettings, Halving, ImagePass, collect, out_of_memory
from training.data.sets.labelled import ArrayImages, ImageFiles

ONE = Ranks(torch.device("cpu"))


def noise(count: int) -> ArrayImages:
    return ArrayImages(np.random.default_rng(0).integers(0, 256, (count, 4, 4, 3), dtype=np.uint8), "noise")


def mean_colour(images):
    return images.mean(dim=(2, 3))


def image_pass(images, function=mean_colour, ranks=ONE, rows=None, **settings):
    settings = EncodeSettings(**{"batch_size": 3, "workers": 0, "precision": "fp32", **settings})
    return ImagePass(function, images, to_tensor, ranks=ranks, settings=settings, rows=rows)


@pytest.mark.parametrize("batch_size,workers", [(1, 0), (3, 2), (100, 0)])
def test_outputs_in_order(batch_size, workers):
    images = noise(7)
    outputs, index, skipped = collect(image_pass(images, batch_size=batch_size, workers=workers))
    expected = torch.from_numpy(images.pixels).float().mean(dim=(1, 2)) / 255
    assert index.tolist() == list(range(7)) and skipped == []
    torch.testing.assert_close(outputs, expected)


def test_some_rows():
    images, rows = noise(7), torch.tensor([5, 0, 6])
    outputs, index, _ = collect(image_pass(images, rows=rows))
    assert index.tolist() == [0, 1, 2]
    assert torch.equal(outputs, collect(image_pass(images))[0][rows])


def test_each_process_has_whole_batches():
    images = noise(11)
    whole = list(image_pass(images))
    parts = [list(image_pass(images, ranks=Ranks(torch.device("cpu"), rank, rank, 3))) for rank in range(3)]
    assert [len(part) for part in parts] == [2, 1, 1]
    for k, (index, outputs) in enumerate(whole):
        assert torch.equal(parts[k % 3][k // 3][0], index) and torch.equal(parts[k % 3][k // 3][1], outputs)


def test_no_gradients():
    weight = torch.ones(3, requires_grad=True)
    outputs, _, _ = collect(image_pass(noise(2), lambda images: mean_colour(images) * weight))
    assert not outputs.requires_grad


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

    def test_one_row_that_does_not_fit(self):
        function, sizes = self.limited(0)
        with pytest.raises(RuntimeError, match="out of memory"):
            Halving(function)(torch.arange(3), torch.arange(3))
        assert sizes == [3, 2, 1]

    def test_what_torch_says(self):
        assert out_of_memory(torch.cuda.OutOfMemoryError("CUDA out of memory"))
        with pytest.raises(RuntimeError) as error:
            torch.empty(1 << 60)
        assert out_of_memory(error.value)
