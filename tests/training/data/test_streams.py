"""Shards that are not plain files here: commands, http, fsspec; and that each source is tried before any work."""

import functools
import http.server
import json
import os
import shutil
import threading

import fsspec
import pytest

from training.data.samples import DataReport
from training.data.shards import read_shard
from training.data.streams import open_stream
from training.errors import UserError

from ..data_helpers import (
    BROKEN_IMAGE,
    encode,
    key_of,
    keys,
    sample,
    train_data,
    truncate,
    val_data,
    write_shard,
    write_shards,
)  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

ALL = sorted(key_of(shard, n) for shard in range(2) for n in range(4))


def read(url) -> tuple[list[str], DataReport]:
    report = DataReport()
    return [sample.key for sample in read_shard(url, report)], report


# Files and commands


@pytest.mark.parametrize("prefix", ["file:", "file://"])
def test_file_urls_are_files(prefix, tmp_path):
    pattern = write_shards(tmp_path, [4, 4])
    data = train_data(prefix + pattern)
    assert data.num_samples == 8
    assert sorted(keys(data.epoch(0))) == ALL
    with pytest.raises(UserError, match=f"1 of the 3 shards .* {tmp_path}/00002.tar"):
        train_data(f"{prefix}{tmp_path}/{{00000..00002}}.tar")


def test_a_command_that_fails_is_told_and_what_it_gave_is_used(tmp_path):
    write_shards(tmp_path, [4])
    url = f"pipe:cat {tmp_path}/00000.tar; exit 3"
    for _ in range(5):  # whether its end is noticed is no matter of luck
        found, report = read(url)
        assert len(found) == 4 and report.examples == [f"{url}: its command ended with status 3"]
    found, report = read(f"pipe:gzip < {tmp_path}/00000.tar; exit 3")
    assert len(found) == 4 and report.skipped == {"broken shard": 1}
    assert read("pipe:exit 4")[1].examples == ["pipe:exit 4: its command ended with status 4"]
    found, report = read(f"pipe:head -c 3000 {tmp_path}/00000.tar")
    assert found == [key_of(0, 0)] and report.skipped == {"broken shard": 1}


def test_closing_a_stream_ends_its_command(tmp_path):
    pid = tmp_path / "pid"
    with open_stream(f"pipe:echo $$ > {pid}; echo text; sleep 60 & wait") as stream:
        assert stream.read(5) == b"text\n"
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


# http


@pytest.fixture
def server(tmp_path, monkeypatch):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    handler = functools.partial(Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("workers", [0, 2])
def test_commands_and_http(workers, server, tmp_path):
    write_shards(tmp_path, [4, 4])
    flags = {"dataset_type": "webdataset", "train_num_samples": 8, "workers": workers}
    by_command = train_data(f"pipe:cat {tmp_path}/{{00000..00001}}.tar", **flags)
    by_http = train_data(f"{server}/{{00000..00001}}.tar", workers=workers)  # with the sizes.json beside them
    for data in (by_command, by_http):
        assert data.num_samples == 8
        assert sorted(keys(data.epoch(0))) == ALL
        assert data.report().skipped == {}


def test_http_without_sizes_or_shards(server, tmp_path):
    write_shards(tmp_path, [4, 4], info=False)
    pattern = f"{server}/{{00000..00001}}.tar"
    for _ in range(2):  # without sizes.json, and with one that lacks a shard
        with pytest.raises(UserError, match="not on this machine.*give --train-num-samples"):
            train_data(pattern)
        (tmp_path / "sizes.json").write_text(json.dumps({"00000.tar": 4}))
    with pytest.raises(UserError, match=rf"first shard {server}/00007.tar .*\(curl ended with status 22\)"):
        train_data(f"{server}/00007.tar", train_num_samples=8)
    (tmp_path / "00001.tar").unlink()
    data = train_data(pattern, train_num_samples=8)
    list(data.epoch(0))
    assert data.report().examples[0] == f"{server}/00001.tar: curl ended with status 22"


# fsspec


@pytest.fixture
def memory(tmp_path):
    """A file system that fsspec alone knows; it lives in this process."""
    files = fsspec.filesystem("memory")
    write_shards(tmp_path, [4, 4])
    files.put(f"{tmp_path}/", "/bucket/", recursive=True)
    yield "memory://bucket"
    files.rm("/bucket", recursive=True)


def test_other_schemes_go_through_fsspec(memory):
    data = train_data(f"{memory}/{{00000..00001}}.tar")
    assert data.num_samples == 8
    assert sorted(keys(data.epoch(0))) == ALL
    assert data.report().skipped == {}
    assert sorted(keys(val_data(f"{memory}/{{00000..00001}}.tar"))) == ALL


def test_fsspec_where_the_client_is_missing(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(shutil, "which", lambda name: asked.append(name))
    monkeypatch.setattr(fsspec, "open", lambda url, mode: fsspec.core.open_files(str(tmp_path / "x"), mode)[0])
    (tmp_path / "x").write_text("text")
    for url, client in [("http://x/y.tar", "curl"), ("gs://x/y.tar", "gsutil")]:
        with open_stream(url) as stream:
            assert stream.read() == b"text"
        assert asked[-1] == client


# Tried before any work


def broken_off(folder, first=None):
    """Breaks off in its first sample, or in the second good one after `first`."""
    write_shard(folder / "0.tar", {"a": first or sample(0), **{str(n): sample(n) for n in range(4)}})
    truncate(folder / "0.tar", keep=2 if first else 0)
    return f"{folder}/0.tar"


APART = [("a", {"jpg": encode(0)}), ("b", {"jpg": encode(1)}), ("a", {"txt": b"x"}), ("b", {"txt": b"y"})]
UNUSABLE = {"a": {"jpg": encode(0)}, "b": {"txt": b"x"}, "c": {"cls": b"1"}}
FIRST_SHARDS = {
    "has no sample": (
        lambda folder: str(write_shard(folder / "0.tar", UNUSABLE)),
        r"/0.tar in {flag} has not one usable sample \(1 x no caption, 2 x no image \(for example .*/0.tar: a: no "
        r"caption; .*/0.tar: b: no image\); its files are a.jpg, b.txt, c.cls, ...\): each needs an image \(jpg, jpeg, "
        r"png, webp\) and a caption \(txt\) of the same name up to its first dot; for other endings give --shard-img",
    ),
    "is empty": (
        lambda folder: str(write_shard(folder / "0.tar", {})),
        r"/0.tar in {flag} has not one usable sample \(it is empty\)",
    ),
    "breaks off": (broken_off, r"/0.tar in {flag} cannot be read \(unexpected end of data\): give"),
    "has an unknown scheme": (lambda _: "zip2://{0..3}.tar", r"zip2://0.tar in {flag} .*\(Protocol not known: zip2\)"),
    "fails": (
        lambda folder: f"pipe:cat {folder}/nothing/{{0..3}}.tar 2>&-",
        r"nothing/0.tar 2>&- in {flag} cannot be read \(its command ended with",
    ),
    "is a folder": (str, r"/bad in {flag} is a folder: name the shards in it with braces, such as .*{00000..00099}"),
    "is a wildcard": (
        lambda bad: f"{bad}/../good/*.tar", "wildcards and ~ are not expanded; .* such as .*/{00000..00099}.tar",
    ),
    "has other endings": (
        lambda bad: str(write_shard(bad / "0.tar", {"a": {"input.jpg": encode(0), "outputs.txt": b"x"}})),
        "its files are a.input.jpg, a.outputs.txt, .* --shard-img-key and --shard-caption-key",
    ),
    "has all pictures before all captions": (
        lambda bad: str(write_shard(bad / "0.tar", APART)), "next to each other in the tar, so sort it by name",
    ),
    "is damaged later": (lambda folder: broken_off(folder, first={"jpg": encode(0)}), None),
    "has no picture that can be decoded": (
        lambda folder: str(write_shard(folder / "0.tar", {"a": {"jpg": BROKEN_IMAGE, "txt": b"x"}})),
        r"not one usable sample \(1 x unreadable image \(for example .*0.tar: a: not an image\)",
    ),
    "has a broken picture": (
        lambda folder: str(write_shard(folder / "0.tar", {"a": {"jpg": BROKEN_IMAGE, "txt": b"x"}, "b": sample(0)})),
        None,
    ),
    "is read no further": (lambda bad: f"pipe:cat {bad}/../good/00000.tar; sleep 60; touch {bad}/end", None),
}  # fmt: skip


@pytest.mark.parametrize("build, flag", [(train_data, "--train-data"), (val_data, "--val-data")])
@pytest.mark.parametrize("case", FIRST_SHARDS)
def test_the_first_shard_of_each_source_is_tried(case, build, flag, tmp_path):
    make, refusal = FIRST_SHARDS[case]
    (tmp_path / "bad").mkdir()
    sources = f"{write_shards(tmp_path / 'good', [4, 4])}::{make(tmp_path / 'bad')}"
    flags = {"dataset_type": "webdataset", "train_num_samples": 8}
    if refusal is None:
        assert build(sources, **flags) is not None
        assert not (tmp_path / "bad/end").exists()
    else:
        with pytest.raises(UserError, match=refusal.replace("{flag}", flag)):
            build(sources, **flags)
