"""What sources yield and whom they yield it to."""

from typing import NamedTuple

from training.data.images import ImageLike
from training.data.stalls import Status


class RawSample(NamedTuple):
    """A sample before any work was put into it.

    origin: the shard or table it comes from, for messages
    index: an order key, unique in a validation set
    """

    key: str
    image: ImageLike
    caption: str
    origin: str
    index: int


class Reader(NamedTuple):
    """Who reads: worker `worker` of `num_workers` (at least one) on rank `rank` of `world_size`.

    status: where it says what it is reading
    """

    rank: int
    world_size: int
    worker: int
    num_workers: int
    status: Status = Status()


# Stands in an endless stream where everything that the reader can get has been yielded once more.
END_OF_PASS = None
