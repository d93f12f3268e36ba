"""Headers of release files: what is read, what is refused, and that nothing ever runs."""

import io
import json
import mmap
import os
import pickle
import pickletools
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from benchmarks.fuzz_release import Watch, fuzz
from grok.errors import CheckpointError
from grok.weights.xai.objects import StoredArray, StoredTensor
from grok.weights.xai.unpickler import MAX_OPCODES, parse_tensor, read_tensor

GOLDEN = Path(__file__).parents[1] / "golden"
QUANTIZED = (GOLDEN / "pub_a/ckpt-0/tensor00005_000").read_bytes()  # weight (64, 16), 1 group
PLAIN = (GOLDEN / "pub_a/ckpt-0/tensor00001_000").read_bytes()  # (64,)
PAYLOAD = slice(197, 197 + 1024)  # of the weight in QUANTIZED
HEAD = b"\x80\x04"


def parse(data: bytes) -> StoredTensor:
    return parse_tensor(io.BytesIO(data), "the-file")


def arrays_of(record: StoredTensor) -> dict[str, StoredArray]:
    if record.scales is None:
        return {"array": record.values}
    return {"weight": record.values, "scales": record.scales}


def edited(data: bytes, old: bytes, new: bytes) -> bytes:
    """`data` with the only `old` replaced, and the length of its single frame put right."""
    assert data.count(old) == 1
    data = data.replace(old, new)
    return HEAD + frame(len(data) - 11) + data[11:]


def frame(length: int) -> bytes:
    return b"\x95" + struct.pack("<Q", length)


def text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


@pytest.mark.parametrize("model", ["pub_a", "pub_b"])
def test_shapes_types_and_sizes_of_golden_files(model):
    for entry in json.loads((GOLDEN / model / "tensors.json").read_text()):
        path = GOLDEN / model / entry["file"]
        record = read_tensor(path)
        assert path.stat().st_size == entry["bytes"]
        for key, array in arrays_of(record).items():
            shape, dtype = entry[key]
            assert array.shape == tuple(shape)
            assert array.dtype == np.dtype(dtype)
            assert array.nbytes == np.prod(shape) * np.dtype(dtype).itemsize


def test_payload_is_found_where_pickletools_finds_it():
    for data in (QUANTIZED, PLAIN):
        opcodes = list(pickletools.genops(data))
        big = [arg for op, arg, _ in opcodes if "BINBYTES" in op.name and len(arg) > 1]
        arrays = arrays_of(parse(data)).values()
        assert [data[a.offset : a.offset + a.nbytes] for a in arrays] == big


@pytest.mark.parametrize("dtype", ["<f4", "i1", ml_dtypes.bfloat16])
@pytest.mark.parametrize("shape", [(5,), (300, 7), (2, 90, 400)])
def test_what_this_numpy_pickles(dtype, shape):
    array = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    data = pickle.dumps(array, protocol=4)
    record = parse(data).values
    assert (record.shape, record.dtype) == (array.shape, array.dtype)
    assert data[record.offset : record.offset + record.nbytes] == array.tobytes()


def test_an_mmap_and_binbytes8_are_read_too(tmp_path):
    head, tail = QUANTIZED[11 : PAYLOAD.start - 5], QUANTIZED[PAYLOAD.stop :]
    data = HEAD + head + b"\x8e" + struct.pack("<Q", 1024) + QUANTIZED[PAYLOAD] + tail
    path = tmp_path / "file"
    path.write_bytes(data)
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as view:
        record = parse_tensor(view, "the-file")
        assert view[record.values.offset :][: record.values.nbytes] == QUANTIZED[PAYLOAD]


class CountingFile(io.BytesIO):
    """A file that counts the bytes that it gives."""

    given = 0

    def read(self, size=-1, /):
        data = super().read(size)
        self.given += len(data)
        return data


def test_array_bytes_are_not_read():
    data = pickle.dumps(np.zeros((4000, 1000), np.float32), protocol=4)
    file = CountingFile(data)
    assert parse_tensor(file, "the-file").nbytes == 16_000_000
    assert file.given < 400


def test_a_sparse_file_of_gigabytes_is_quick(tmp_path):
    # The size of the release's token table, of which only the header takes room on disk.
    shape, nbytes = (131072, 6144), 131072 * 6144 * 4
    head = HEAD + PLAIN[11:87] + b"J" + struct.pack("<i", shape[0]) + b"M\x00\x18\x86\x94"
    head += PLAIN[91:140] + b"B" + struct.pack("<I", nbytes)
    path = tmp_path / "tensor00000_000"
    with open(path, "wb") as file:
        file.write(head)
        file.seek(nbytes, os.SEEK_CUR)
        file.write(b"\x94t\x94b.")
    stored = StoredArray(shape, np.dtype("<f4"), len(head), nbytes)
    assert read_tensor(path) == StoredTensor(stored)


class Hostile:
    """Pickles as a call of os.system."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("protocol", range(6))
def test_code_in_a_pickle_does_not_run(tmp_path, protocol):
    witness = tmp_path / "witness"
    data = pickle.dumps(Hostile(f"touch {witness}"), protocol=protocol)
    path = tmp_path / "tensor00000_000"
    path.write_bytes(data)
    wrong = "system" if protocol == 4 else "protocol 4"
    with pytest.raises(CheckpointError, match=wrong) as refusal:
        read_tensor(path)
    assert str(path) in str(refusal.value)
    assert not witness.exists()
    pickle.loads(data)  # the control: this file is dangerous
    assert witness.exists()


F4 = b"\x8c\x02f4"
WEIGHT_DIMS = b"K\x40K\x10\x86"
SCALE_DIMS = b"K\x01K\x10\x86"
SCALES = QUANTIZED[1249:1344]  # from their shape to their last byte
THREE_GROUPS = b"K\x01K\x03K\x08\x86" + QUANTIZED[1256:1310] + b"C\x30" + bytes(48)
SWAPPED = QUANTIZED.replace(b"weight", b"?").replace(b"scales", b"weight").replace(b"?", b"scales")
REFUSED = {
    "empty file": (b"", "is empty"),
    "protocol 2": (b"\x80\x02" + PLAIN[2:], "protocol 4"),
    "protocol 5": (b"\x80\x05" + PLAIN[2:], "protocol 4"),
    "GLOBAL opcode": (HEAD + b"cos\nsystem\n.", "opcode GLOBAL"),
    "EXT opcode": (HEAD + b"\x82\x01.", "opcode EXT1"),
    "persistent id": (HEAD + b"Pname\n.", "opcode PERSID"),
    "no opcode": (HEAD + b"\xff", "0xff, which is no opcode"),
    "second PROTO": (HEAD + PLAIN, "opcode PROTO"),
    "other global": (edited(PLAIN, text("ndarray"), text("memmap")), "global 'numpy.memmap'"),
    "other class": (
        edited(QUANTIZED, text("QuantizedWeight8bit"), text("QuantizedWeight4bit")),
        "'__main__.QuantizedWeight4bit'",
    ),
    "global by numbers": (HEAD + b"K\x01K\x02\x93.", "other than text"),
    "control characters": (HEAD + text("a\x1b[31m") + text("b") + b"\x93.", r"'a\\x1b\[31m.b'"),
    "not ASCII": (HEAD + b"\x8c\x02\xc3\x28", "a text of 2 bytes that is not ASCII"),
    "call of ndarray": (HEAD + text("numpy") + text("ndarray") + b"\x93)R.", "calls by REDUCE"),
    "NEWOBJ of dtype": (HEAD + text("numpy") + text("dtype") + b"\x93)\x81.", "calls by NEWOBJ"),
    "array of a dtype": (edited(PLAIN, text("ndarray"), text("dtype")), "calls by REDUCE"),
    "object array": (edited(PLAIN, b"C\x01b", b"C\x01O"), "calls by REDUCE"),
    "REDUCE for NEWOBJ": (edited(QUANTIZED, b")\x81", b")R"), "calls by REDUCE"),
    "float64": (edited(PLAIN, F4, b"\x8c\x02f8"), "dtype 'f8'; float32, int8 or bfloat16"),
    "big-endian": (edited(PLAIN, text("<"), text(">")), "big-endian"),
    "dtype with fields": (edited(PLAIN, b"<\x94NNN", b"<\x94N)N"), "fields or a layout"),
    "bfloat16 of objects": (edited(QUANTIZED, b"K\x40t", b"K\x41t"), "fields or a layout"),
    "wide bfloat16": (edited(QUANTIZED, b"NK\x02K\x02", b"NK\x04K\x02"), "fields or a layout"),
    "Fortran order": (edited(PLAIN, b"\x94b\x89B", b"\x94b\x88B"), "Fortran order"),
    "shape too large": (edited(PLAIN, b"K\x40\x85", b"K\x41\x85"), "takes 260 bytes, and 256"),
    "shape too small": (edited(QUANTIZED, WEIGHT_DIMS, b"K\x3fK\x10\x86"), "takes 1,008 bytes"),
    "negative": (edited(PLAIN, b"K\x40\x85", b"J\xc0\xff\xff\xff\x85"), "positive dimensions"),
    "zero": (edited(PLAIN, b"K\x40\x85", b"K\x00\x85"), "positive dimensions"),
    "a truth for a size": (edited(PLAIN, b"K\x40\x85", b"\x88\x85"), "positive dimensions"),
    "a truth for a number": (edited(PLAIN, b"K\x00\x85", b"\x89\x85"), "calls by REDUCE"),
    "no dimensions": (edited(PLAIN, b"K\x40\x85", b")"), "positive dimensions"),
    "four dimensions": (edited(PLAIN, b"K\x40\x85", b"(K\x40K\x01K\x01K\x01t"), "1 to 3"),
    "huge dimensions": (edited(PLAIN, b"K\x40\x85", b"J\xff\xff\xff\x7f" * 3 + b"\x87"), "takes"),
    "trailing bytes": (PLAIN + b"x", "1 byte after the end"),
    "length over the end": (HEAD + b"B\xff\xff\xff\xff.", "4,294,967,295 bytes should follow"),
    "huge length": (HEAD + b"\x8e" + b"\xff" * 8, "is cut short: 18,446,744,073,709,551,615 bytes"),
    "huge frame": (HEAD + frame(2**64 - 1), "cut short"),
    "nested frames": (HEAD + frame(12) + frame(2) + b"N..", "frame inside another"),
    "over the frame's end": (HEAD + frame(1) + b"K\x01.", "end of its frame"),
    "unknown memo": (edited(PLAIN, b"h\x03", b"h\x7f"), "memo 127, and has 11"),
    "empty memo": (HEAD + b"h\x00.", "memo 0, and has 0"),
    "empty stack": (HEAD + b"\x94.", "empty stack"),
    "pop below the mark": (HEAD + b"N(\x85.", "empty stack"),
    "no mark": (HEAD + b"Nt.", "mark that is not there"),
    "deep tuples": (HEAD + b"N" + b"\x85" * 400 + b".", "nests tuples"),
    "wide tuples": (HEAD + b"N" + b"\x94h\x00\x86" * 3 + b".", "nests tuples"),
    "many opcodes": (HEAD + b"N" * 1000 + b".", f"more than {MAX_OPCODES} opcodes"),
    "many marks": (HEAD + b"(" * 100_000, f"more than {MAX_OPCODES} opcodes"),
    "two objects": (HEAD + b"NN.", "exactly one object"),
    "a None": (HEAD + b"N.", "no complete NumPy array"),
    "array without state": (HEAD + PLAIN[11:84] + b".", "no complete NumPy array"),
    "state twice": (HEAD + PLAIN[11:-1] + b"h\x13b.", "completes an object"),
    "dtype twice": (edited(PLAIN, b"\x94b\x89B", b"\x94bh\x11b\x89B"), "completes an object"),
    "weights twice": (HEAD + QUANTIZED[11:-1] + b"h\x04b.", "completes an object"),
    "dtype without state": (edited(PLAIN, PLAIN[114:139], b""), "completes an object"),
    "missing key": (HEAD + QUANTIZED[11:1225] + b"ub.", "completes an object"),
    "other key": (edited(QUANTIZED, text("scales"), text("scale")), "other keys"),
    "same key twice": (edited(QUANTIZED, text("scales"), text("weight")), "other keys"),
    "dict in the state": (HEAD + b"}\x94(" + text("weight") + b"h\x00u.", "is not an array"),
    "odd items": (HEAD + b"}(Nu.", "other than a dict"),
    "items of a tuple": (HEAD + b")(u.", "other than a dict"),
    "swapped types": (SWAPPED, "bfloat16 weight and int8 scales"),
    "groups that do not divide": (
        edited(edited(QUANTIZED, WEIGHT_DIMS, b"K\x80K\x08\x86"), SCALES, THREE_GROUPS),
        r"scales \(3, 8\) for a weight \(128, 8\); .* has to divide",
    ),
    "other columns": (QUANTIZED.replace(SCALE_DIMS, b"K\x02K\x08\x86"), "last dimension but one"),
    "flat scales": (edited(QUANTIZED, SCALE_DIMS, b"K\x10\x85"), "has to divide"),
}


@pytest.mark.parametrize(("data", "cause"), REFUSED.values(), ids=REFUSED)
def test_refusals_name_the_file_and_the_cause(tmp_path, data, cause):
    path = tmp_path / "tensor00000_000"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=cause) as refusal:
        read_tensor(path)
    message = str(refusal.value)
    assert message.startswith(f"{path}: ")
    assert message.isprintable()
    assert len(message) - len(str(path)) < 300


def test_paths_that_are_no_files_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, cause in {"": "regular file", "pipe": "regular file", "none": "No such file"}.items():
        with pytest.raises(CheckpointError, match=cause):
            read_tensor(tmp_path / name)


def parsed_or_refused(data: bytes) -> bool:
    """Whether `data` was taken for a release file; any error but CheckpointError escapes."""
    try:
        record = parse(data)
    except CheckpointError:
        return False
    for array in arrays_of(record).values():
        assert 0 <= array.offset <= array.offset + array.nbytes <= len(data)
        assert array.nbytes == np.prod(array.shape) * array.dtype.itemsize
    return True


def test_every_cut_is_refused():
    for data in (PLAIN, QUANTIZED):
        assert not any(parsed_or_refused(data[:length]) for length in range(len(data)))


def test_fuzzed_files():
    """A small run of benchmarks/fuzz_release.py."""
    counts = fuzz(cases=4000, seed=20240317)
    assert counts.cases == 4000 == counts.accepted + counts.refused.total()
    assert not counts.unhandled
    assert not counts.events  # nothing imported, opened, executed or started
    assert 20 < counts.accepted < 1000  # most cases hit something that matters, and not all
    assert len(counts.refused) > 25


def test_the_watch_of_fuzzed_files_sees_what_is_executed():
    watch = Watch()
    with watch:
        pickle.loads(pickle.dumps(Hostile("true"), protocol=4))
    assert {"pickle.find_class", "os.system"} <= watch.events.keys()
