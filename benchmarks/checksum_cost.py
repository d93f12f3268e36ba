"""Cost of the checksums of checkpoints: saves and restores with them beside such without.

    python -m benchmarks.checksum_cost --repeats 11 --megabytes 512

Random float32 arrays on simulated CPU devices are saved into a folder, by default in memory, where
the share of checksums is largest, and restored, with and without checksums in turn. Prints the
shortest times in seconds, by the clock and of all processors together, which the noise of a machine
changes least, and their ratios.
"""

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from grok import sharding
from grok.checkpoint import file_list, orbax_format
from grok.checkpoint.manager import MODEL, Checkpoints
from grok.checkpoint.retention import RetentionPolicy
from grok.hardware import configure_devices
from grok.weights.orbax.zarr import TO_BYTES

ARRAYS, DEVICES = 8, 4
# Of a save and a restore: seconds by the clock, and of processors.
Figures = tuple[np.ndarray, np.ndarray]


def make_arrays(megabytes: int) -> dict[str, jax.Array]:
    """Arrays of so many bytes together, each split over all devices."""
    mesh, rng = sharding.make_mesh(data=DEVICES), np.random.default_rng(0)
    rows = megabytes * (1 << 20) // (ARRAYS * 1024 * 4)
    place = NamedSharding(mesh, PartitionSpec("data"))
    return {
        f"w_{number}": jax.device_put(rng.standard_normal((rows, 1024), np.float32), place)
        for number in range(ARRAYS)
    }


def seconds() -> np.ndarray:
    """The time by the clock, and by the processors."""
    return np.array([time.perf_counter(), time.process_time()])


def save_and_restore(folder: Path, arrays: dict[str, jax.Array]) -> Figures:
    """Seconds of a save, and of a search and restore."""
    begin = seconds()
    checkpoints = Checkpoints(folder, RetentionPolicy(1))
    checkpoints.save(1, {MODEL: arrays}, {})
    checkpoints.close()
    saved = seconds()
    expected = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), arrays
    )
    checkpoints = Checkpoints(folder, RetentionPolicy(1))
    assert checkpoints.newest_good(print) == 1
    jax.block_until_ready(checkpoints.restore(1, {MODEL: expected}))
    restored = seconds()
    checkpoints.close()
    shutil.rmtree(folder)
    return saved - begin, restored - saved


def without_checksums(measure: Callable[[], Figures]) -> Figures:
    """The same, with nothing computed or compared."""
    zstd = {"name": "zstd", "configuration": {"level": 1}}
    with (
        mock.patch.object(orbax_format, "codecs", return_value=[TO_BYTES, zstd]),
        mock.patch.object(file_list, "_checksums", return_value={}),
    ):
        return measure()


def main() -> None:
    """Measures in turn and prints."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--megabytes", type=int, default=512)
    parser.add_argument("--folder", default="/dev/shm", help="where a temporary folder is made")
    arguments = parser.parse_args()
    configure_devices(DEVICES)
    arrays, results = make_arrays(arguments.megabytes), []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as parent:

        def measure() -> Figures:
            return save_and_restore(Path(parent, "run"), arrays)

        measure()
        for _ in range(arguments.repeats):
            results.append((measure(), without_checksums(measure)))
    for number, name in enumerate(("save", "restore")):
        pairs = np.array([[side[number] for side in pair] for pair in results])
        with_them, without = np.min(pairs, axis=0)
        ratios = with_them / without
        for time_of, figures in zip(
            ("clock", "processors"), zip(with_them, without, ratios, strict=True), strict=True
        ):
            print(
                f"{name:8} {time_of:10} with {{:.3f}} s, without {{:.3f}} s: {{:.3f}}".format(
                    *figures
                )
            )


if __name__ == "__main__":
    main()
