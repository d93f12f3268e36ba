"""Damaged, hostile and mistaken releases: what each is refused with, and that nothing runs."""

import builtins
import gzip
import io
import os
import pickle
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from grok import storage
from grok.config import AttentionConfig, ModelConfig, MoEConfig
from grok.errors import CheckpointError
from grok.weights.xai.source import ReleaseSource
from tests.fixtures.models import replace_keys
from tests.fixtures.pickles import pickled, pickled_object, pickled_weight
from tests.fixtures.random_weights import RandomSource
from tests.fixtures.release_writer import write_release

CONFIG = ModelConfig(
    vocab_size=50,
    num_layers=2,
    embed_dim=24,
    moe=MoEConfig(dim=40, num_experts=3),
    attention=AttentionConfig(num_heads=6, num_kv_heads=2, head_dim=8),
)
TABLE, NORM, GATE, DOWN, UP, KEY, OUT, QUERY, VALUE = (f"tensor{i:05d}_000" for i in range(9))
OUT_OF_1 = "tensor00018_000"  # attention's output of layer 1
ROUTER = "tensor00025_000"  # the last file

# What may happen inside Python while a folder is opened.
HARMLESS = {"open", "os.scandir", "os.listdir", "_thread.start_new_thread"}
HARMLESS |= {"_thread.start_joinable_thread", "_thread._get_main_thread_ident"}
EVENTS: list[tuple[str, tuple]] = []
WATCHED: list[bool] = []


def audit(event: str, arguments: tuple) -> None:
    if WATCHED:
        EVENTS.append((event, arguments))


sys.addaudithook(audit)


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sound") / "ckpt-0"
    write_release(RandomSource(CONFIG), folder)
    ReleaseSource(folder, CONFIG)  # it is right, and all that is imported late is there now
    return folder


def refusal(folder: Path) -> str:
    """The message for a folder, with nothing else happening than reading its files."""
    EVENTS.clear()
    WATCHED.append(True)
    try:
        ReleaseSource(folder, CONFIG)
    except CheckpointError as error:
        message = str(error)
    else:
        message = "accepted"
    finally:
        WATCHED.clear()
    assert {event for event, _ in EVENTS} <= HARMLESS
    for event, arguments in EVENTS:
        if event == "open":
            path, _, flags = arguments
            assert Path(path).parent == folder
            assert not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    return message


# Ways to damage a folder. Each is given the folder, and is the rest of a row of DAMAGES.


def put(name: str, data: bytes):
    return lambda folder: (folder / name).write_bytes(data)


def edit(name: str, change):
    def damage(folder: Path) -> None:
        (folder / name).write_bytes(change((folder / name).read_bytes()))

    return damage


def replaced(old: bytes, new: bytes):
    def change(data: bytes) -> bytes:
        assert old in data
        data = data.replace(old, new, 1)
        return data[:3] + struct.pack("<Q", len(data) - 11) + data[11:]  # its only frame

    return change


def flipped(place: int, bit: int):
    return lambda data: data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]


def swap(one: str, other: str):
    def damage(folder: Path) -> None:
        (folder / one).rename(folder / "kept")
        (folder / other).rename(folder / one)
        (folder / "kept").rename(folder / other)

    return damage


def remove(*files: str):
    return lambda folder: [(folder / name).unlink() for name in files]


def in_place_of(name: str, make):
    """Something that `make` puts at the path of a file."""

    def damage(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return damage


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("data.pkl", b"")
    return file.getvalue()


def npy() -> bytes:
    file = io.BytesIO()
    np.save(file, np.ones(24, np.float32))
    return file.getvalue()


class Call:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def norm(**changes) -> bytes:
    return pickled(np.ones(**{"shape": 24, "dtype": np.float32} | changes))


def out(weight=(48, 24), scales=(8, 24), dtype=np.int8, kind=ml_dtypes.bfloat16, **more) -> bytes:
    return pickled_weight(np.ones(weight, dtype), np.ones(scales, kind), **more)


def text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


HEAD = b"\x80\x04"
SYSTEM = text("os") + text("system") + b"\x93"
FILES = "a release of 2 layers has 26 files, tensor00000_000 to tensor00025_000, and no others."
DAMAGES = {
    # The folder
    "missing file": (remove(KEY), KEY, f"is missing; {FILES}"),
    "two missing files": (remove(KEY, ROUTER), KEY, f"is missing, and 1 more; {FILES}"),
    "renamed file": (
        lambda folder: (folder / KEY).rename(folder / "tensor5"),
        KEY,
        f"is missing; tensor5 is here instead; {FILES}",
    ),
    "stray file": (
        put("tensor00026_000", b""),
        "tensor00026_000",
        f"does not belong here; {FILES}",
    ),
    "unfinished download": (
        put(f"{KEY}.aria2", b""),
        f"{KEY}.aria2",
        f"is what a download leaves while it is unfinished; {KEY} has to be downloaded to its "
        f"end, and {KEY}.aria2 to go.",
    ),
    "partial file": (
        lambda folder: (folder / KEY).rename(folder / f"{KEY}.part"),
        f"{KEY}.part",
        "is what a download leaves while it is unfinished",
    ),
    "no folder": (shutil.rmtree, "", "cannot be read: No such file or directory."),
    "empty folder": (
        lambda folder: [path.unlink() for path in folder.iterdir()],
        TABLE,
        f"is missing, and 25 more; {FILES}",
    ),
    "swapped files": (
        swap(GATE, KEY),
        GATE,
        "transformer/decoder_layer_0/moe/linear/w is quantised int8 (24, 16); for this model's "
        "config it should be quantised int8 (3, 24, 40). It would fit tensor00005_000, and that "
        "file here: were the two swapped?",
    ),
    "copied file": (
        lambda folder: shutil.copy(folder / OUT, folder / QUERY),
        QUERY,
        "is quantised int8 (48, 24); for this model's config it should be quantised int8 "
        "(24, 48). It would fit tensor00006_000: was a file renamed or copied?",
    ),
    # What is no file, or cannot be read
    "folder for a file": (in_place_of(KEY, Path.mkdir), KEY, "cannot be read: Not a regular file."),
    "pipe": (in_place_of(KEY, os.mkfifo), KEY, "cannot be read: Not a regular file."),
    "link to itself": (
        in_place_of(KEY, lambda path: path.symlink_to(path)),
        KEY,
        "cannot be read: Too many levels of symbolic links.",
    ),
    "link to nothing": (
        in_place_of(KEY, lambda path: path.symlink_to("blob")),
        KEY,
        "cannot be read: No such file or directory.",
    ),
    # Other files
    "empty file": (put(KEY, b""), KEY, "is empty."),
    "git-lfs pointer": (
        put(KEY, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 6293814\n"),
        KEY,
        "is a git-lfs pointer, which stands for a file that was not downloaded; `git lfs pull` ",
    ),
    "web page": (
        put(KEY, b"\n<!DOCTYPE html><html>404</html>"),
        KEY,
        "is HTML or XML, as a server",
    ),
    "error in JSON": (put(KEY, b'{"error": "Repository not found"}'), KEY, "is JSON, as a server"),
    "torrent": (put(KEY, b"d8:announce35:udp://tracker.example"), KEY, "is a torrent, which says"),
    "gzip": (edit(KEY, gzip.compress), KEY, "is compressed by gzip, and has to be unpacked first."),
    "zip": (put(KEY, zipped()), KEY, "is a zip archive (as PyTorch writes, too), and should"),
    "npy": (put(NORM, npy()), NORM, "is an .npy file, and should be a pickled array."),
    "zeros": (edit(KEY, lambda data: bytes(len(data))), KEY, "begins with zeros, as a file does "),
    "text": (put(KEY, b"hello"), KEY, "does not begin as a pickle of protocol 4"),
    "protocol 2": (
        put(NORM, pickle.dumps(np.ones(24, np.float32), protocol=2)),
        NORM,
        "is a pickle of protocol 2; the release's are of protocol 4.",
    ),
    # Damage
    "cut in the header": (edit(KEY, lambda data: data[:100]), KEY, "is cut short: "),
    "cut in an array": (
        edit(TABLE, lambda data: data[:1000]),
        TABLE,
        "is cut short: 4,941 bytes should follow, and 989 do (opcode at byte 2).",
    ),
    "last byte missing": (
        edit(KEY, lambda data: data[:-1]),
        KEY,
        "is cut short: 700 bytes should ",
    ),
    "byte too many": (edit(KEY, lambda data: data + b"."), KEY, "has 1 byte after the end of its"),
    "two files in one": (
        edit(KEY, lambda data: data * 2),
        KEY,
        "has 711 bytes after the end of its",
    ),
    "bit in a name": (edit(NORM, flipped(54, 0)), NORM, "names the global 'oumpy.ndarray'; only "),
    "bit in a type": (edit(NORM, flipped(106, 1)), NORM, "has an array of dtype 'f6'; float32, "),
    "bit in a size": (
        edit(NORM, flipped(88, 2)),
        NORM,
        "has an array of shape (28,) and dtype float32, which takes 112 bytes, and 96 are there",
    ),
    "bit in an opcode": (
        edit(NORM, flipped(93, 3)),
        NORM,
        "has the opcode EXT4, which no release file needs",
    ),
    "bit in a length": (edit(NORM, flipped(4, 5)), NORM, "is cut short: "),
    # Other arrays
    "float16": (put(NORM, norm(dtype=np.float16)), NORM, "has an array of dtype 'f2'; float32, "),
    "float64": (put(NORM, norm(dtype=np.float64)), NORM, "has an array of dtype 'f8'; float32, "),
    "big-endian": (put(NORM, norm(dtype=">f4")), NORM, "has a big-endian array of float32; a "),
    "Fortran order": (
        put(TABLE, pickled(np.ones((50, 24), np.float32, order="F"))),
        TABLE,
        "has an array in Fortran order; the release's are in C order",
    ),
    "objects": (put(NORM, norm(dtype=object)), NORM, "has an array of dtype 'O8'; float32, "),
    "text values": (put(NORM, norm(dtype="S4")), NORM, "has an array of dtype 'S4'; float32, "),
    "fields": (put(NORM, norm(dtype=[("x", "f4")])), NORM, "has an array of dtype 'V4'; float32, "),
    "no values": (put(NORM, norm(shape=0)), NORM, "not of 1 to 3 positive dimensions"),
    "no dimensions": (put(NORM, norm(shape=())), NORM, "not of 1 to 3 positive dimen"),
    "four dimensions": (put(NORM, norm(shape=(2, 3, 2, 2))), NORM, "not of 1 to 3 "),
    "negative size": (
        edit(NORM, replaced(b"K\x18\x85", b"J\xe8\xff\xff\xff\x85")),
        NORM,
        "not of 1 to 3 positive dimensions",
    ),
    "other width": (
        put(NORM, norm(shape=32)),
        NORM,
        "language_model/rms_norm/scale is float32 (32,); for this model's config it should be "
        "float32 (24,).",
    ),
    "bfloat16": (
        put(NORM, norm(dtype=ml_dtypes.bfloat16)),
        NORM,
        "is bfloat16 (24,); for this model's config it should be float32 (24,).",
    ),
    "number": (put(NORM, pickled(7)), NORM, "holds no complete NumPy array and no complete"),
    "list of arrays": (put(NORM, pickled([np.ones(3)])), NORM, "has the opcode EMPTY_LIST, which "),
    # Other weights
    "matrix without scales": (
        put(OUT, norm(shape=(48, 24), dtype=np.int8)),
        OUT,
        "is int8 (48, 24) without scales; for this model's config it should be quantised int8 ",
    ),
    "norm with scales": (
        put(NORM, out(weight=(1, 24), scales=(1, 24))),
        NORM,
        "is quantised int8 (1, 24); for this model's config it should be float32 (24,).",
    ),
    "groups that do not divide": (
        put(OUT, out(scales=(5, 24))),
        OUT,
        "has scales (5, 24) for a weight (48, 24); only the last dimension but one may differ",
    ),
    "scales of other columns": (put(OUT, out(scales=(8, 48))), OUT, "has scales (8, 48) for a "),
    "float32 scales": (put(OUT, out(kind=np.float32)), OUT, "has int8 weight and float32 scales;"),
    "float32 weight": (put(OUT, out(dtype=np.float32)), OUT, "has float32 weight and bfloat16 "),
    "groups of one layer alone": (
        put(OUT_OF_1, out(scales=(4, 24))),
        OUT_OF_1,
        "transformer/decoder_layer_1/multi_head_attention/linear/w has 4 groups of scales, and "
        "the same tensor of other layers has 8.",
    ),
    "other key": (put(OUT, out(bias=0)), OUT, "has a QuantizedWeight8bit with other keys than "),
    "missing scales": (
        put(OUT, pickled_object("__main__", "QuantizedWeight8bit", weight=np.ones(2, np.int8))),
        OUT,
        "has the opcode SETITEM, which no release file needs",
    ),
    "other class": (
        put(OUT, pickled_object("__main__", "QuantizedWeight4bit", weight=1, scales=2)),
        OUT,
        "names the global '__main__.QuantizedWeight4bit'; only NumPy arrays of float32, int8 and ",
    ),
    "class of another module": (
        put(OUT, pickled_object("os", "QuantizedWeight8bit", weight=1, scales=2)),
        OUT,
        "names the global 'os.QuantizedWeight8bit'; only ",
    ),
    # Code
    "os.system": (
        put(KEY, pickled(Call(os.system, "exit 1"))),
        KEY,
        f"names the global '{os.system.__module__}.system'; only ",
    ),
    "eval": (put(KEY, pickled(Call(eval, "1/0"))), KEY, "names the global 'builtins.eval'; only "),
    "exec": (put(KEY, pickled(Call(exec, "1/0"))), KEY, "names the global 'builtins.exec'; only "),
    "getattr": (put(KEY, pickled(Call(getattr, 1, "real"))), KEY, "global 'builtins.getattr'; "),
    "process": (
        put(KEY, pickled(Call(subprocess.Popen, "true"))),
        KEY,
        "names the global 'subprocess.Popen'; only ",
    ),
    "memory map": (put(KEY, pickled(Call(np.memmap, "x"))), KEY, "names the global 'numpy.memmap'"),
    "call of ndarray": (
        put(KEY, pickled(Call(np.ndarray, 1 << 20))),
        KEY,
        "calls by REDUCE what no array and no QuantizedWeight8bit needs",
    ),
    "GLOBAL": (put(KEY, HEAD + b"cos\nsystem\n."), KEY, "has the opcode GLOBAL, which no release "),
    "INST": (put(KEY, HEAD + b"(ios\nsystem\n."), KEY, "has the opcode INST, which no release "),
    "OBJ": (put(KEY, HEAD + b"(No."), KEY, "has the opcode OBJ, which no release file needs"),
    "EXT1": (put(KEY, HEAD + b"\x82\x01."), KEY, "has the opcode EXT1, which no release file "),
    "persistent id": (put(KEY, HEAD + b"Px\n."), KEY, "has the opcode PERSID, which no release "),
    "state of a function": (
        put(KEY, HEAD + text("numpy") + text("ndarray") + b"\x93}b."),
        KEY,
        "completes an object by another state than NumPy's or a release's",
    ),
    "extra call in a file": (
        edit(NORM, replaced(b"b.", b"b" + SYSTEM + text("true") + b"\x85R0.")),
        NORM,
        "names the global 'os.system'; only ",
    ),
    # Size
    "long name": (
        put(KEY, HEAD + text("a" * 255) + text("b" * 255) + b"\x93."),
        KEY,
        f"names the global '{'a' * 57}...'; only ",
    ),
    "nested tuples": (put(KEY, HEAD + b")" + b"\x85" * 300 + b"."), KEY, "nests tuples more than "),
    "tuples of tuples": (put(KEY, HEAD + b")" + b"2\x86" * 90 + b"."), KEY, "has the opcode DUP, "),
    "memo of tuples": (
        put(KEY, HEAD + b")" + b"".join(b"\x94h%c\x86" % i for i in range(90)) + b"."),
        KEY,
        "nests tuples more than two deep",
    ),
    "endless opcodes": (put(KEY, HEAD + b"N0" * 99_999), KEY, "has the opcode POP, which no "),
    "endless memo": (put(KEY, HEAD + b"N" + b"\x94" * 99_999), KEY, "has more than 512 opcodes"),
    "huge frame": (
        put(KEY, HEAD + b"\x95" + b"\xff" * 8 + b"N."),
        KEY,
        "is cut short: 18,446,744,073,709,551,615 bytes should follow, and 2 do",
    ),
    "huge array": (
        put(KEY, HEAD + b"\x8e" + struct.pack("<Q", 1 << 62) + b"."),
        KEY,
        "is cut short: 4,611,686,018,427,387,904 bytes should follow, and 1 do",
    ),
    "huge shape": (
        edit(NORM, replaced(b"K\x18\x85", b"J\xff\xff\xff\x7f" * 3 + b"\x87")),
        NORM,
        "has an array of shape (2147483647, 2147483647, 2147483647) and dtype float32, which takes",
    ),
    "huge number": (
        put(KEY, HEAD + b"\x8b\xff\xff\xff\x7f1."),
        KEY,
        "has the opcode LONG4, which ",
    ),
}


@pytest.mark.parametrize(("damage", "file", "words"), DAMAGES.values(), ids=DAMAGES)
def test_refusals(sound, tmp_path, damage, file, words):
    folder = tmp_path / "ckpt-0"
    shutil.copytree(sound, folder)
    damage(folder)
    message = refusal(folder)
    print(message)
    place = folder / file if file else folder
    assert message.startswith(f"{place}: ")
    assert words in message
    assert message.endswith((".", "?")) and message.isprintable()
    assert len(message) - len(str(place)) < 300


def test_a_file_that_may_not_be_read(sound, monkeypatch):
    # Root may read everything, so the system is asked to say otherwise.
    def refuse(path, mode):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(storage, "open", refuse, raising=False)
    with pytest.raises(CheckpointError) as error:
        ReleaseSource(sound, CONFIG)
    assert str(error.value) == f"{sound}/{TABLE}: cannot be read: Permission denied."


@pytest.mark.parametrize(
    ("changes", "file", "right"),
    [
        ({"num_layers": 1}, "tensor00014_000", "a release of 1 layers has 14 files"),
        ({"num_layers": 3}, "tensor00026_000", "tensor00000_000 to tensor00037_000"),
        ({"vocab_size": 51}, TABLE, "should be float32 (51, 24)"),
        ({"embed_dim": 32}, TABLE, "should be float32 (50, 32)"),
        ({"moe.dim": 48}, GATE, "should be quantised int8 (3, 24, 48)"),
        ({"attention.num_heads": 4}, OUT, "should be quantised int8 (32, 24)"),
        ({"attention.num_kv_heads": 3}, KEY, "should be quantised int8 (24, 24)"),
        ({"moe.num_experts": 4}, GATE, "should be quantised int8 (4, 24, 40)"),
    ],
)
def test_other_models(sound, changes, file, right):
    with pytest.raises(CheckpointError) as error:
        ReleaseSource(sound, replace_keys(CONFIG, changes))
    assert str(error.value).startswith(f"{sound}/{file}: ")
    assert right in str(error.value)


def test_files_that_shrink_after_they_were_opened(sound, tmp_path):
    folder = tmp_path / "ckpt-0"
    shutil.copytree(sound, folder)
    source = ReleaseSource(folder, CONFIG)
    (folder / TABLE).write_bytes(b"")
    (folder / NORM).unlink()
    with pytest.raises(CheckpointError, match=f"{TABLE}: .* became shorter while it was read"):
        source.read("embed/table_VD", source.tensors["embed/table_VD"].full_part)
    with pytest.raises(CheckpointError, match=f"{NORM}: cannot be read: No such file"):
        source.read("final_norm/scale_D", source.tensors["final_norm/scale_D"].full_part)


def test_the_hook_sees_what_is_executed(tmp_path):
    """The control: Python's own unpickler is caught at once."""
    EVENTS.clear()
    WATCHED.append(True)
    try:
        pickle.loads(pickled(Call(eval, "40 + 2")))
    finally:
        WATCHED.clear()
    assert {"pickle.find_class", "compile", "exec"} <= {event for event, _ in EVENTS}
    assert builtins.eval("40 + 2") == 42
