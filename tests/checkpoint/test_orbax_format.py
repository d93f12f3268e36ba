"""The checksums of the chunks of a checkpoint's arrays: any flipped bit is noticed."""

from pathlib import Path

import numpy as np
import pytest
import tensorstore as ts

from grok.checkpoint.orbax_format import SMALL_CHUNK_BYTES, codecs

VALUES = np.random.default_rng(0).standard_normal(64, np.float32)


def unnoticed(folder: Path, chunk_bytes: int, values: np.ndarray) -> list[int]:
    """The bits of a chunk of `values` that can be flipped without an error, with the codecs of a
    chunk of so many bytes. Fails where values come out that are not those written."""
    kvstore = {"driver": "file", "path": f"{folder}/"}
    metadata = {
        "shape": values.shape,
        "data_type": "float32",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": values.shape}},
        "codecs": codecs(chunk_bytes),
    }
    spec = {"driver": "zarr3", "kvstore": kvstore, "metadata": metadata}
    ts.open(spec, create=True).result().write(values).result()
    chunk, found = folder / "c" / "0", []
    written = chunk.read_bytes()
    for bit in range(8 * len(written)):
        flipped = bytearray(written)
        flipped[bit // 8] ^= 1 << bit % 8
        chunk.write_bytes(flipped)
        try:
            read = ts.open({"driver": "zarr3", "kvstore": kvstore}).result().read().result()
        except ValueError:
            continue
        np.testing.assert_array_equal(read, values)
        found.append(bit)
    return found


@pytest.mark.parametrize("values", [VALUES, np.repeat(VALUES[:4], 64)], ids=["dense", "repeats"])
def test_a_flipped_bit_of_a_chunk_is_noticed(tmp_path, values):
    assert unnoticed(tmp_path / "small", 4 * values.size, values) == []
    # The flag of the checksum in the frame's head, and a bit without use:
    # https://datatracker.ietf.org/doc/html/rfc8878#section-3.1.1.1.1
    assert unnoticed(tmp_path / "large", SMALL_CHUNK_BYTES, values) == [34, 36]
