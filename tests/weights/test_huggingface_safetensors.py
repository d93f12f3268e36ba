"""The reader of safetensors files: what it agrees on with the format's library, what it refuses."""

import json
import random
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors
from safetensors.numpy import save_file

from grok.errors import CheckpointError
from grok.weights.huggingface.safetensors import header_bytes, read_header

TENSORS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.arange(4).astype(ml_dtypes.bfloat16),
    "c": np.zeros((), np.float16),
}


def test_reads_what_the_library_wrote(tmp_path):
    file = tmp_path / "x.safetensors"
    save_file(TENSORS, file, {"format": "pt"})
    data = file.read_bytes()
    entries = read_header(str(file), len(data))
    assert entries.keys() == TENSORS.keys()
    for name, array in TENSORS.items():
        entry = entries[name]
        assert (entry.path, entry.dtype, entry.shape) == (str(file), array.dtype, array.shape)
        assert data[entry.offset : entry.offset + entry.nbytes] == array.tobytes()


def test_the_library_reads_what_was_written():
    header = header_bytes((name, array.dtype, array.shape) for name, array in TENSORS.items())
    data = header + b"".join(array.tobytes() for array in TENSORS.values())
    assert len(header) % 8 == 0
    found = dict(safetensors.deserialize(data))
    assert {name: bytes(tensor["data"]) for name, tensor in found.items()} == {
        name: array.tobytes() for name, array in TENSORS.items()
    }
    assert [found[name]["dtype"] for name in "abc"] == ["F32", "BF16", "F16"]


def file_with(tmp_path: Path, header, data: bytes = bytes(16)) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file = tmp_path / "x.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return file


def refusal(file: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        read_header(str(file), file.stat().st_size)
    return str(error.value).removeprefix(f"{file}: ")


def entry(dtype="F32", shape=(2, 2), offsets=(0, 16)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


FORM = (
    "'w' has a header entry of another form: shape should be a list of sizes, and data_offsets the "
    "bytes where it begins and ends."
)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{", "the header cannot be read as JSON: Expecting property name enclosed in double "),
        (b"\xff\xfe", "the header cannot be read as JSON: 'utf-8' codec can't decode byte 0xff"),
        (b"1" * 5000, "the header cannot be read as JSON: Exceeds the limit"),
        (b"[" * 100_000, "the header is nested too deeply."),
        (b"[]", "the header should be a JSON object, and is a list."),
        (b'{"w": 1, "w": 1}', "the header cannot be read as JSON: 'w' is there twice."),
        ({"w": 1}, "'w' should have dtype, shape and data_offsets in the header."),
        ({"w": entry() | {"x": 1}}, "'w' should have dtype, shape and data_offsets in the header."),
        ({"w": entry(shape=4)}, FORM),
        ({"w": entry(shape=[4.0])}, FORM),
        ({"w": entry(shape=[-2, -2])}, FORM),
        ({"w": entry(shape=[True, 4])}, FORM),
        ({"w": entry(shape=[1] * 9)}, FORM),
        ({"w": entry(shape=[1 << 63])}, FORM),
        ({"w": entry(offsets=[0])}, FORM),
        ({"w": entry(offsets=[0, -16])}, FORM),
        ({"w": entry("I64")}, "'w' has dtype 'I64'; it should be one of F32, BF16, F16."),
        ({"w": entry(["F32"])}, "'w' has dtype ['F32']; it should be one of F32, BF16, F16."),
        ({"w": entry("BF16")}, "'w' has 16 bytes, and BF16 of shape [2, 2] takes 8."),
        ({"w": entry(offsets=[16, 0])}, "'w' has -16 bytes, and F32 of shape [2, 2] takes 16."),
        ({"w": entry(offsets=[8, 24])}, "'w' leaves a gap after the header; tensors lie end to "),
        (
            {"w": entry(), "x\x1b[2J": entry(shape=[2], offsets=[8, 16])},
            "'x\\x1b[2J' overlaps 'w'; tensors lie end to end.",
        ),
        ({"w": entry(shape=[3], offsets=[0, 12])}, "has more data than its header names: it has"),
        (
            {"w": entry(shape=[5], offsets=[0, 20])},
            "is cut short: it has 86 bytes and should have 90.",
        ),
        ({}, "has more data than its header names: it has 26 bytes and should have 10."),
    ],
)
def test_damaged_headers(tmp_path, header, message):
    assert refusal(file_with(tmp_path, header)).startswith(message)


def test_files_of_another_kind(tmp_path):
    file = tmp_path / "x.safetensors"
    file.write_bytes(b"\x08\0\0")
    assert refusal(file) == (
        "is cut short, or no safetensors file: it has 3 bytes, and its first 8 say that a header "
        "of 8 follows them."
    )
    file.write_bytes(b"PK\x03\x04 some archive")
    assert refusal(file).startswith("is cut short, or no safetensors file: it has 17 bytes, and")
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert refusal(file) == "is a Git LFS pointer, not the file itself; `git lfs pull` gets it."
    with file.open("wb") as out:
        out.write((100_000_001).to_bytes(8, "little"))
        out.truncate(200_000_000)
    assert refusal(file) == (
        "says that its header has 100000001 bytes; a safetensors file has at most 100000000."
    )


def test_random_damage_is_refused_or_harmless(tmp_path):
    file = tmp_path / "x.safetensors"
    save_file(TENSORS, file)
    whole = file.read_bytes()
    draw = random.Random(0)
    refused = 0
    for _ in range(1000):
        damaged = bytearray(whole)
        for _ in range(draw.randint(1, 3)):
            place = draw.randrange(len(damaged))
            match draw.randrange(3):
                case 0:
                    damaged[place] = draw.randrange(256)
                case 1:
                    del damaged[place]
                case 2:
                    damaged.insert(place, draw.choice(b'0129"{}[],:-eF'))
        file.write_bytes(damaged)
        try:
            entries = read_header(str(file), len(damaged))
        except CheckpointError:
            refused += 1
        else:
            assert all(0 <= e.offset <= len(damaged) - e.nbytes for e in entries.values())
    assert refused > 600
