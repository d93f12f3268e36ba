"""Two and four processes load weights together: of each format, on disk and in a bucket, each byte
leaves storage once, and every device has the right bits."""

from collections.abc import Callable
from pathlib import Path

import pytest
from fsspec.asyn import sync

from grok.config import RunConfig
from grok.weights.huggingface.export import export_huggingface
from grok.weights.importing.importer import import_weights
from tests import emulator
from tests.fixtures.random_weights import RandomSource
from tests.fixtures.release_writer import write_release
from tests.weights.load_processes import WIDE, load_in_processes

pytestmark = [
    pytest.mark.prove,
    pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="/proc/self/io is Linux's"),
]


def write_import(source: RandomSource, folder: Path) -> None:
    import_weights(source, folder, RunConfig(model=source.config))


def write_huggingface(source: RandomSource, folder: Path) -> None:
    export_huggingface(source, folder, "float32")


# Format, the type in the files, and the type as which they are loaded.
KINDS: dict[str, tuple[Callable, str, str]] = {
    "ckpt-0": (write_release, "int8", "int8"),
    "import": (write_import, "int8", "int8"),
    "float import": (write_import, "float32", "float32"),
    "float import to int8": (write_import, "float32", "int8"),
    "hugging face": (write_huggingface, "float32", "float32"),
    "hugging face to int8": (write_huggingface, "float32", "int8"),
}


@pytest.fixture(scope="module", params=KINDS)
def weights(request, tmp_path_factory) -> tuple[Path, str, str]:
    """A folder, the type in its files, and that to load."""
    write, stored, dtype = KINDS[request.param]
    folder = tmp_path_factory.mktemp("weights") / "weights"
    write(RandomSource(WIDE, dtype=stored), folder)
    return folder, stored, dtype


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("sizes", "processes"), [((1, 8, 1), 2), ((2, 2, 2), 2), ((1, 1, 8), 4), ((2, 1, 4), 4)]
)
def test_files_are_read_once(weights, sizes, processes):
    folder, stored, dtype = weights
    reports = load_in_processes(folder, WIDE, sizes, processes, 8, True, dtype, stored)
    reads = [report["read"] / size(folder) for report in reports]
    beyond = max(report["memory"] - report["held"] for report in reports) / 1e6
    print(f"\n{sizes}: {', '.join(f'{read:.3f}' for read in reads)} of {size(folder):,} bytes; ")
    print(f"{beyond:.0f} MB beyond the weights")
    assert 1 <= sum(reads) < 1.1
    assert max(reads) < 1.1 / processes


@pytest.mark.filterwarnings("ignore:Sending a large body")
def test_a_bucket_is_read_once(weights):
    folder, stored, dtype = weights
    with emulator.bucket() as client:
        from gcsfs.core import simple_upload  # after grok.storage, which configures it

        for path in (path for path in folder.rglob("*") if path.is_file()):
            # The client would send large files in several requests, which the emulator lacks.
            key = f"weights/{path.relative_to(folder).as_posix()}"
            sync(client.loop, simple_upload, client, "bucket", key, path.read_bytes())
        emulator.DOWNLOADED.clear()
        load_in_processes("gs://bucket/weights", WIDE, (2, 2, 2), 2, 8, True, dtype, stored)
    share = sum(emulator.DOWNLOADED) / size(folder)
    print(f"\n{share:.3f} of {size(folder):,} bytes")
    assert 1 <= share < 1.1
