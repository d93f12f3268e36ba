"""Files by byte range: on this machine and in a bucket, exact in what is read and in refusals."""

import contextlib
import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from gcp_storage_emulator.server import create_server

from grok import storage
from grok.errors import CheckpointError
from grok.storage import remote
from grok.weights.source import part_shape, read_part
from grok.weights.xai.source import ReleaseSource
from tests.model import golden

DTYPES = (np.dtype("i1"), np.dtype("<f4"), np.dtype(ml_dtypes.bfloat16))
MISSING = "cannot be read: No such file or directory"


def random_parts(count: int):
    """(dtype, shape, part) at random, with whole axes and single indices among them."""
    rng = np.random.default_rng(count)
    for _ in range(count):
        shape = tuple(int(size) for size in rng.integers(1, 9, rng.integers(1, 5)))
        part = []
        for size in shape:
            low = int(rng.integers(size)) if rng.random() < 0.6 else 0
            high = int(rng.integers(low, size)) + 1 if rng.random() < 0.6 else size
            part.append(slice(low, high))
        yield DTYPES[rng.integers(len(DTYPES))], shape, tuple(part)


def random_array(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    count = int(np.prod(shape)) * dtype.itemsize
    return np.random.default_rng(1).integers(0, 63, count, np.uint8).view(dtype).reshape(shape)


def read_new(path, offset: int, shape, dtype: np.dtype, part) -> np.ndarray:
    """A part in an array of its own."""
    return read_part(path, offset, shape, part, np.empty(part_shape(part), dtype))


@pytest.fixture(scope="module")
def bucket():
    """A bucket of an emulator in this process: gs://bucket, and the client that writes to it."""
    server = create_server("127.0.0.1", 0, in_memory=True, default_bucket="bucket")
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        # Port 0 took a free one.
        port = server._api._httpd.server_port
        patch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
        yield remote("gs://bucket")[0]
    server.stop()


@pytest.fixture
def put(tmp_path, bucket):
    """A function that writes a file here or in the bucket, and gives its path."""

    def write(where: str, name: str, data: bytes) -> str:
        if where == "bucket":
            bucket.pipe_file(f"bucket/{name}", data)
            return f"gs://bucket/{name}"
        (tmp_path / name).write_bytes(data)
        return str(tmp_path / name)

    return write


@pytest.mark.parametrize(("where", "count"), [("here", 300), ("bucket", 20)])
def test_parts_are_as_numpy_cuts_them(put, where, count):
    for number, (dtype, shape, part) in enumerate(random_parts(count)):
        array = random_array(shape, dtype)
        path = put(where, f"array{number}", b"head" + array.tobytes() + b"tail")
        cut = read_new(path, 4, shape, dtype, part)
        np.testing.assert_array_equal(cut, array[part], strict=True)
        assert cut.flags.c_contiguous and cut.flags.writeable


def bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().partition("rchar: ")[2].split()[0])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="the kernel counts no bytes here")
def test_a_local_part_costs_its_bytes(tmp_path):
    shape = (8, 96, 256)
    array = random_array(shape, np.dtype("<f4"))
    (tmp_path / "array").write_bytes(array.tobytes())
    before = bytes_read()
    counting = bytes_read() - before  # what reading the counter itself adds to it
    for part in (
        (slice(0, 8), slice(0, 96), slice(0, 256)),
        (slice(2, 3), slice(0, 96), slice(0, 256)),
        (slice(0, 8), slice(0, 96), slice(64, 128)),
        (slice(1, 7), slice(24, 48), slice(255, 256)),
    ):
        before = bytes_read()
        cut = read_new(tmp_path / "array", 0, shape, np.dtype("<f4"), part)
        count = bytes_read() - before - counting
        np.testing.assert_array_equal(cut, array[part])
        # The counter's own text grows by a digit now and then.
        assert cut.nbytes <= count + 8 <= cut.nbytes + 16


def test_reading_into_a_part_of_an_array(tmp_path):
    array = random_array((4, 6), np.dtype("<f4"))
    (tmp_path / "array").write_bytes(array.tobytes())
    out = np.zeros((3, 2, 6), np.float32)
    read_part(tmp_path / "array", 0, (4, 6), (slice(1, 3), slice(0, 6)), out[1])
    np.testing.assert_array_equal(out, [np.zeros((2, 6)), array[1:3], np.zeros((2, 6))])


@pytest.mark.parametrize("where", ["here", "bucket"])
def test_a_file_that_is_too_short(put, where):
    path = put(where, "short", bytes(99))
    for start in (0, 90):
        part = (slice(start, 100),)
        with pytest.raises(CheckpointError, match=r"/short: .* became shorter while it was read"):
            read_new(path, 0, (100,), np.dtype("i1"), part)


@pytest.mark.parametrize("where", ["here", "bucket"])
def test_what_is_in_a_folder(put, bucket, tmp_path, where):
    if where == "here":
        (tmp_path / "inner").mkdir()
    else:
        put(where, "listed/inner/file", b"xyz")
    path = put(where, "listed/one" if where == "bucket" else "one", b"12345")
    folder = path.removesuffix("/one")
    assert (
        storage.list_files(folder, CheckpointError)
        == storage.list_files(folder + "/", CheckpointError)
        == {"one": 5, "inner": None}
    )
    put(where, "listed/two" if where == "bucket" else "two", b"")
    assert storage.list_files(folder, CheckpointError) == {"one": 5, "two": 0, "inner": None}
    assert storage.exists(folder) and storage.exists(storage.join(folder, "inner"))
    assert storage.exists(path, CheckpointError) and not storage.exists(path + "s", CheckpointError)
    assert storage.read_bytes(path, CheckpointError) == b"12345"
    for wrong, cause in ((path, "Not a directory"), (path + "s", "No such file or directory")):
        with pytest.raises(CheckpointError) as error:
            storage.list_files(wrong, CheckpointError)
        assert str(error.value) == f"{wrong}: cannot be read: {cause}."


def test_links_in_a_folder(tmp_path):
    (tmp_path / "file").write_bytes(b"123")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "broken").symlink_to("nothing")
    (tmp_path / "loop").symlink_to("loop")
    assert storage.list_files(tmp_path).keys() == {"file", "link", "broken", "loop"}
    assert storage.list_files(tmp_path, CheckpointError)["link"] == 3
    for name, cause in (("broken", "No such file"), ("loop", "Too many levels")):
        with pytest.raises(CheckpointError, match=f"{name}: cannot be read: {cause}"):
            storage.read_bytes(tmp_path / name, CheckpointError)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="pipe: cannot be read: Not a regular file"):
        storage.read_bytes(tmp_path / "pipe", CheckpointError)


@pytest.mark.parametrize(
    ("path", "cause"),
    [
        ("gs://bucket/none", MISSING),
        ("gs://no-such-bucket/ckpt-0", MISSING),
        ("http://example.org/ckpt-0", "cannot be read: it is neither on this machine nor at gs://"),
    ],
)
def test_places_that_are_not_there(bucket, path, cause):
    for read in (storage.list_files, storage.read_bytes):
        with pytest.raises(CheckpointError) as error:
            read(path, CheckpointError)
        assert str(error.value) == f"{path}: {cause}."


def test_what_a_client_raises_is_a_sentence(bucket, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("the account has no access")

    monkeypatch.setattr(bucket, "ls", refuse)
    with pytest.raises(CheckpointError) as error:
        storage.list_files("gs://bucket/x", CheckpointError)
    assert str(error.value) == "gs://bucket/x: cannot be read: the account has no access."
    # On this machine the same is a bug, and keeps its trace.
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(RuntimeError):
        storage.list_files("/", CheckpointError)


def test_no_account_is_looked_for_with_an_emulator(bucket):
    assert bucket.credentials.credentials is None


@pytest.fixture(scope="module")
def release(bucket) -> str:
    """pub_a in the bucket."""
    folder = golden.FOLDER / "pub_a/ckpt-0"
    for path in folder.iterdir():
        bucket.pipe_file(f"bucket/release/ckpt-0/{path.name}", path.read_bytes())
    return "gs://bucket/release/ckpt-0"


def test_a_release_in_a_bucket_is_as_on_this_machine(release):
    config = golden.config("pub_a", "float32")
    ours = ReleaseSource(release, config)
    local = ReleaseSource(golden.FOLDER / "pub_a/ckpt-0", config)
    assert ours.tensors == local.tensors
    for name, spec in ours.tensors.items():
        # Everything, and from the middle of the last axis.
        for part in (spec.full_part, (*spec.full_part[:-1], slice(2, 5))):
            np.testing.assert_array_equal(ours.read(name, part), local.read(name, part))
        if spec.groups:
            every = tuple(slice(0, size) for size in spec.scales_shape)
            np.testing.assert_array_equal(
                ours.read_scales(name, every), local.read_scales(name, every)
            )


def test_a_damaged_release_in_a_bucket(release, bucket):
    config = golden.config("pub_a", "float32")
    sound = bucket.cat_file("bucket/release/ckpt-0/tensor00020_000")
    for data, cause in (
        (sound[:300], "is cut short: "),
        (b"<html>", "is HTML or XML, as a server sends"),
        (
            sound.replace(b"numpy", b"posix"),
            "names the global 'posix.core.multiarray._reconstruct'",
        ),
        (None, "is missing; a release of 3 layers has 38 files"),
    ):
        with contextlib.ExitStack() as after:
            after.callback(bucket.pipe_file, "bucket/release/ckpt-0/tensor00020_000", sound)
            if data is None:
                bucket.rm_file("bucket/release/ckpt-0/tensor00020_000")
            else:
                bucket.pipe_file("bucket/release/ckpt-0/tensor00020_000", data)
            with pytest.raises(CheckpointError) as error:
                ReleaseSource(release, config)
        assert str(error.value).startswith(f"{release}/tensor00020_000: {cause}")
