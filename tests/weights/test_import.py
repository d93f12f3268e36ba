"""Weights -> a checkpoint of ours: every bit, and again after being ended at any moment."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner

from grok import sharding
from grok.checkpoint.manager import MODEL, Checkpoints
from grok.cli.import_ import import_
from grok.config import AttentionConfig, DataConfig, ModelConfig, MoEConfig, RunConfig
from grok.config.load import from_dict, load_config, to_dict
from grok.config.text import to_yaml
from grok.errors import CheckpointError
from grok.model.build import abstract, to_arrays
from grok.weights.cast import (
    MeasuredQuantizedSource,
    QuantizedSource,
    converted,
    per_channel,
    release_groups,
)
from grok.weights.checksums import piece_checksum
from grok.weights.importing import importer
from grok.weights.importing.importer import import_weights
from grok.weights.orbax.source import OrbaxSource
from grok.weights.source import Source, layer_pieces, scales_part
from grok.weights.xai.source import ReleaseSource
from tests.fixtures.model_weights import MATRICES
from tests.fixtures.models import replace_keys
from tests.fixtures.random_weights import RandomSource
from tests.model import golden

DTYPES = ("int8", "bfloat16", "float32")
STORED = ("int4_all", "int4", *DTYPES)
TINY = ModelConfig(
    vocab_size=96,
    num_layers=2,
    embed_dim=32,
    moe=MoEConfig(dim=48, num_experts=4),
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8),
)


def run_of(config: ModelConfig) -> RunConfig:
    return RunConfig(model=config, data=DataConfig(sequence_length=32))


def golden_source(name: str, dtype: str = "int8") -> Source:
    release = ReleaseSource(golden.FOLDER / name / "ckpt-0", golden.config(name, "float32"))
    return converted(release, dtype)


class Watched(Source):
    """A source that notes what is read of it, and fails at read number `fail_at`."""

    def __init__(self, source: Source, fail_at: int | None = None):
        self._source, self._fail_at = source, fail_at
        self.format, self.path, self.config = source.format, source.path, source.config
        self.tensors, self.layout = source.tensors, source.layout
        self.reads: list[tuple[str, tuple]] = []

    def read(self, name, part):
        if len(self.reads) == self._fail_at:
            raise CheckpointError("the disk with the weights was pulled out.")
        self.reads.append((name, tuple((s.start, s.stop) for s in part)))
        return self._source.read(name, part)

    def read_scales(self, name, part):
        return self._source.read_scales(name, part)

    @property
    def matrices(self) -> list[tuple[str, tuple]]:
        """Reads of matrices: a few rows of the rest are looked at again to know the weights."""
        return [read for read in self.reads if read[0] in MATRICES]


def interrupt(source: Source, folder: Path, after: int = 60) -> None:
    with pytest.raises(CheckpointError, match="pulled out"):
        import_weights(Watched(source, after), folder, run_of(source.config))


def journaled(folder: Path) -> list[tuple[str, int | None]]:
    lines = (folder / ".import" / "journal.jsonl").read_bytes().split(b"\n")[1:-1]
    return [(line["name"], line["layer"]) for line in map(json.loads, lines)]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def same_weights(a: Source, b: Source) -> None:
    assert dict(a.tensors) == dict(b.tensors)
    for name, spec in a.tensors.items():
        values = [source.read(name, spec.full_part) for source in (a, b)]
        if spec.groups is not None:
            whole = tuple(slice(0, size) for size in spec.scales_shape)
            values += [source.read_scales(name, whole) for source in (a, b)]
        for x, y in zip(values[::2], values[1::2], strict=True):
            assert (x.dtype, x.tobytes()) == (y.dtype, y.tobytes()), name


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("name", golden.NAMES)
def test_every_bit_arrives(tmp_path, name, dtype):
    source = golden_source(name, dtype)
    imported = import_weights(source, tmp_path / "run", run_of(source.config))
    stored = OrbaxSource(tmp_path / "run")
    same_weights(source, stored)
    assert stored.config == dataclasses.replace(source.config, param_dtype=dtype)
    assert imported.written == imported.summary["bytes"]
    assert imported.written == sum(spec.nbytes for spec in source.tensors.values())
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "checkpoints",
        "config.yaml",
    ]


@pytest.mark.parametrize("dtype", STORED)
def test_large_matrices_are_cut(tmp_path, monkeypatch, dtype):
    """Several shards a matrix, several slabs a shard; read by rows, and whole, of any format."""
    monkeypatch.setattr("grok.weights.orbax.zarr.SHARD_BYTES", 1500)
    monkeypatch.setattr("grok.weights.importing.streaming.BLOCK_BYTES", 700)
    source = converted(RandomSource(TINY), dtype)
    for step, name in enumerate(("by rows", "whole")):
        import_weights(source, tmp_path / name, run_of(TINY))
        gate = tmp_path / name / "checkpoints" / "0" / "model" / "layers.moe.w_gate_EDF"
        matrices = 2 * TINY.moe.num_experts
        is_float = "int" not in dtype
        shards = len(list(gate.glob("c.*"))) if is_float else matrices
        assert shards == matrices * {"bfloat16": 4, "float32": 8}.get(dtype, 1)
        assert source.format == ("random", "orbax")[step]
        same_weights(OrbaxSource(tmp_path / name), converted(RandomSource(TINY), dtype))
        source = OrbaxSource(tmp_path / name)


def test_int8_is_the_files_own(tmp_path):
    """Against the bytes of the release, with nothing of ours between."""
    source = golden_source("pub_a")
    import_weights(source, tmp_path / "run", run_of(source.config))
    stored = OrbaxSource(tmp_path / "run")
    spec = stored.tensors["layers/moe/w_down_EFD"]
    values = stored.read(spec.name, (slice(2, 3), *spec.full_part[1:]))
    files = [p.read_bytes() for p in (golden.FOLDER / "pub_a" / "ckpt-0").iterdir()]
    assert sum(values.tobytes() in file for file in files) == 1


@pytest.mark.parametrize("dtype", STORED)
def test_checksums_are_kept(tmp_path, dtype):
    source = golden_source("pub_a", dtype)
    imported = import_weights(source, tmp_path / "run", run_of(source.config))
    stored = OrbaxSource(tmp_path / "run")
    assert len(stored.checksums) == 2 + 12 * source.config.num_layers
    for name, spec in source.tensors.items():
        for layer, part in layer_pieces(spec):
            assert stored.checksums[name, layer] == piece_checksum(source, spec, part)
            assert stored.checksums[name, layer] == piece_checksum(stored, spec, part)
    assert imported.summary["checksum"] == "xxh3_128"
    assert imported.summary["path"] == str(golden.FOLDER / "pub_a" / "ckpt-0")


@pytest.mark.parametrize("dtype", DTYPES)
def test_orbax_restores_it_onto_a_mesh(tmp_path, dtype):
    source = golden_source("pub_a", dtype)
    import_weights(source, tmp_path / "run", run_of(source.config))
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints")
    assert checkpoints.latest() == 0
    groups = {name: spec.groups for name, spec in source.tensors.items() if spec.groups}
    config = load_config(tmp_path / "run" / "config.yaml").model
    # What is stored has two groups of rows, which more devices would have to divide.
    data, expert, tensor = (4, 1, 2) if dtype == "int8" else (2, 2, 2)
    mesh = sharding.make_mesh(data=data, expert=expert, tensor=tensor)
    wanted = abstract(config, mesh, groups)
    model = checkpoints.restore(0, {MODEL: wanted})[MODEL]
    checkpoints.close()
    for want, have in zip(jax.tree.leaves(wanted), jax.tree.leaves(model), strict=True):
        assert (have.sharding, have.dtype) == (want.sharding, want.dtype)
    arrays = to_arrays(model)
    for name, spec in source.tensors.items():
        values = arrays[name if spec.groups is None else f"{name}/values"]
        np.testing.assert_array_equal(values, source.read(name, spec.full_part))


# What ends the import: at a read, half-way through a line of the journal, and around the rename.
KILLS = {
    "the first read": "Source.read = killing_at(0)",
    "a later read": "Source.read = killing_at(75)",
    "a line of the journal": """
def torn(self, entry, append=Journal.append):
    if entry["name"] == "layers/moe/w_gate_EDF":
        self._file.write(b'{"name": "layers/moe/w_ga')
        die()
    append(self, entry)
Journal.append = torn
""",
    "writing the last files": "importer.write_files = lambda *_: die()",
    "before the rename": "os.rename = lambda *_: die()",
    "after the rename": "shutil.rmtree = lambda *_: die()",
}
CHILD = """
import json, os, shutil, signal, sys
from grok.weights.importing import importer
from grok.resumable import Journal
from grok.weights.xai.source import ReleaseSource as Source
from grok.config.load import from_dict

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def killing_at(number, read=Source.read):
    count = iter(range(1_000_000))
    def killing(self, name, part):
        if next(count) == number:
            die()
        return read(self, name, part)
    return killing

release, folder, run = sys.argv[1:]
run = from_dict(json.loads(run))
source = Source(release, run.model)
{kill}
importer.import_weights(source, folder, run)
"""


@pytest.mark.parametrize("kill", KILLS)
def test_a_killed_import_goes_on(tmp_path, kill):
    """The same files in the end as of an import that nothing ended, and nothing read twice."""
    plain = to_dict(run_of(golden.config("pub_a", "float32")))
    run, folder = from_dict(plain), tmp_path / "run"
    source = ReleaseSource(golden.FOLDER / "pub_a" / "ckpt-0", run.model)
    import_weights(source, folder, run)
    undisturbed = files_of(folder)
    shutil.rmtree(folder)

    args = [source.path, str(folder), json.dumps(plain)]
    code = CHILD.replace("{kill}", KILLS[kill])
    child = subprocess.run([sys.executable, "-c", code, *args], check=False)
    assert child.returncode == -signal.SIGKILL
    finished = journaled(folder) if (folder / ".import").exists() else []
    again = Watched(source)
    import_weights(again, folder, run)
    assert files_of(folder) == undisturbed
    assert not [(n, p) for n, p in again.matrices if (n, p[0][0]) in finished]
    assert bool(finished) == (kill != "the first read")


def test_a_piece_whose_files_are_not_whole_is_done_again(tmp_path):
    source, folder = golden_source("pub_a"), tmp_path / "run"
    import_weights(source, folder, run_of(source.config))
    undisturbed = files_of(folder)
    shutil.rmtree(folder)
    interrupt(source, folder)
    finished = [name for name, layer in journaled(folder) if name in MATRICES and layer == 0]
    model = folder / ".import" / "0" / "model"
    arrays = [model / f"{name.replace('/', '.')}.values" for name in finished[:2]]
    files = [next(array.glob("c.0.*")) for array in arrays]
    files[0].unlink()
    os.truncate(files[1], 100)
    again = Watched(source)
    import_weights(again, folder, run_of(source.config))
    assert files_of(folder) == undisturbed
    redone = {
        name for name, part in again.matrices if (name, part[0][0]) in {(n, 0) for n in finished}
    }
    assert redone == set(finished[:2])


def test_progress_counts_what_an_earlier_try_did(tmp_path):
    source, folder = golden_source("pub_a"), tmp_path / "run"
    interrupt(source, folder)
    told: list[tuple[str, int, int]] = []
    imported = import_weights(
        source, folder, run_of(source.config), on_progress=lambda *each: told.append(each)
    )
    total = sum(spec.nbytes for spec in source.tensors.values())
    assert {each[2] for each in told} == {total}
    counts = [each[1] for each in told]
    assert 0 < counts[0] == total - imported.written
    assert counts == sorted(counts) and counts[-1] == total


def test_other_weights_are_refused(tmp_path):
    source, folder = RandomSource(TINY, seed=1), tmp_path / "run"
    interrupt(source, folder, after=30)
    for other, differing in (
        (RandomSource(TINY, seed=2), r"\(values was "),
        (RandomSource(replace_keys(TINY, {"moe.dim": 64}), seed=1), r"\(tensors\.layers/moe/w"),
        (converted(source, "float32"), r'\(dtype was "int8" and is "float32"\)'),
        (
            RandomSource(TINY, seed=1, groups=per_channel),
            r"\(tensors\.layers/attention/w_out_NHD\.groups was 8 and is 1",
        ),
    ):
        with pytest.raises(CheckpointError, match=differing) as caught:
            import_weights(other, folder, run_of(other.config))
        assert str(caught.value).startswith(f"{folder / '.import'}: has an unfinished job")
        assert str(caught.value).endswith("; delete it, or name another folder.")
    import_weights(source, folder, run_of(TINY))
    same_weights(OrbaxSource(folder), source)


def test_two_imports_into_one_folder_are_refused(tmp_path):
    source = RandomSource(TINY)

    def second(name, done, total):
        with pytest.raises(CheckpointError, match="another process is writing here"):
            import_weights(source, tmp_path / "run", run_of(TINY))

    import_weights(source, tmp_path / "run", run_of(TINY), on_progress=second)


def test_folders_with_something_else_are_refused(tmp_path):
    source = RandomSource(TINY)
    import_weights(source, tmp_path / "run", run_of(TINY))
    before = files_of(tmp_path)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").touch()
    for folder, message in (
        ("run", r"is not empty \(it has checkpoints\); name another folder"),
        ("run/checkpoints", r"is not empty \(it has 0\)"),
        ("notes", r"is not empty \(it has a\.txt\)"),
        ("notes/a.txt", "cannot be read: Not a directory"),
    ):
        with pytest.raises(CheckpointError, match=message):
            import_weights(source, tmp_path / folder, run_of(TINY))
    with pytest.raises(CheckpointError, match="the output goes to a local folder"):
        import_weights(source, "gs://bucket/run", run_of(TINY))
    assert files_of(tmp_path) == before | {"notes/a.txt": b""}


def test_a_folder_that_cannot_be_written_says_so_and_goes_on(tmp_path):
    source, folder = RandomSource(TINY), tmp_path / "run"
    interrupt(source, folder, after=10)
    in_the_way = folder / ".import" / "0" / "model" / "layers.moe.w_up_EDF.values" / "c.1.0.0.0"
    in_the_way.mkdir()
    with pytest.raises(
        CheckpointError, match=r"cannot be written: .*the same command continues"
    ) as error:
        import_weights(source, folder, run_of(TINY))
    # Even while the error is held, with all that it refers to.
    assert not [t for t in threading.enumerate() if t.name.startswith("grok-import")], error
    assert ("layers/moe/w_up_EDF", 0) in journaled(folder)
    in_the_way.rmdir()
    import_weights(source, folder, run_of(TINY))
    same_weights(OrbaxSource(folder), source)


def test_a_disk_too_small_is_refused_at_once(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(importer.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(CheckpointError, match=r"[\d,]+ bytes will be written, and .* 1,000 free"):
        import_weights(RandomSource(TINY), tmp_path / "run", run_of(TINY))


@pytest.mark.parametrize("groups", [release_groups, per_channel])
def test_rounding_is_measured_in_one_reading(tmp_path, groups):
    floats = Watched(RandomSource(TINY, dtype="float32"))
    measured = MeasuredQuantizedSource(floats, groups)
    imported = import_weights(measured, tmp_path / "run", run_of(TINY))
    assert len(floats.matrices) == len(set(floats.matrices))
    plain, stored = QuantizedSource(floats, groups), OrbaxSource(tmp_path / "run")
    same_weights(plain, stored)
    back = converted(stored, "float32")
    assert imported.summary["rounding_errors"].keys() == MATRICES.keys()
    for name, error in imported.summary["rounding_errors"].items():
        w = floats.read(name, floats.tensors[name].full_part)
        off = back.read(name, floats.tensors[name].full_part) - w
        assert error["relative"] == pytest.approx(np.abs(off).max() / np.abs(w).max(), rel=1e-5)
        rms = np.sqrt(np.mean(off**2) / np.mean(w**2))
        assert error["relative_rms"] == pytest.approx(rms, rel=1e-4)
        assert rms < 0.02


def test_wide_matrices_are_quantised_in_stripes(monkeypatch):
    monkeypatch.setattr("grok.weights.cast.STRIPE_BYTES", 1000)
    floats = RandomSource(TINY, dtype="float32")
    measured, plain = MeasuredQuantizedSource(floats), QuantizedSource(floats)
    for name in MATRICES:
        spec = plain.tensors[name]
        part = (slice(1, 2),) * (len(spec.shape) - 2 - ("attention" in name)) + spec.full_part[
            len(spec.shape) - 2 - ("attention" in name) :
        ]
        np.testing.assert_array_equal(measured.read(name, part), plain.read(name, part))
        scales = scales_part(spec, part)
        np.testing.assert_array_equal(
            measured.read_scales(name, scales), plain.read_scales(name, scales)
        )


def test_values_that_are_not_finite_are_refused(tmp_path):
    class Broken(Watched):
        def read(self, name, part):
            values = super().read(name, part)
            if name == "layers/moe/w_up_EDF":
                values[..., 3] = np.nan
            return values

    source = MeasuredQuantizedSource(Broken(RandomSource(TINY, dtype="float32")))
    with pytest.raises(CheckpointError, match="w_up_EDF has values that are not finite"):
        import_weights(source, tmp_path / "run", run_of(TINY))


def grok_import(*args) -> tuple[int, str]:
    result = CliRunner().invoke(import_, [str(arg) for arg in args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        return 1, str(result.exception)
    return result.exit_code, result.output


@pytest.fixture
def config_file(tmp_path) -> Path:
    (tmp_path / "pub_a.yaml").write_text(to_yaml(run_of(golden.config("pub_a", "float32"))))
    return tmp_path / "pub_a.yaml"


def test_the_command(tmp_path, config_file, tiny_run):
    tokenizer = tiny_run.data.tokenizer
    code, output = grok_import(
        "xai", golden.FOLDER / "pub_a" / "ckpt-0", tmp_path / "run",
        "--config", config_file, "--tokenizer", tokenizer,
    )  # fmt: skip
    assert code == 0, output
    assert "14 tensors, 1,651,008 parameters, int8" in output
    assert "xxh3_128" in output
    run = load_config(tmp_path / "run" / "config.yaml")
    assert (run.model.param_dtype, run.folder) == ("int8", str(tmp_path / "run"))
    assert run.data.tokenizer == str(tmp_path / "run" / "tokenizer.model")
    assert Path(run.data.tokenizer).read_bytes() == Path(tokenizer).read_bytes()
    same_weights(OrbaxSource(tmp_path / "run"), golden_source("pub_a"))


def test_the_command_converts(tmp_path, config_file):
    source = golden.FOLDER / "pub_a" / "ckpt-0"
    code, output = grok_import(
        "xai", source, tmp_path / "run", "--config", config_file, "--dtype", "bfloat16"
    )
    assert code == 0, output
    stored = OrbaxSource(tmp_path / "run")
    assert {spec.dtype for spec in stored.tensors.values()} == {np.dtype(ml_dtypes.bfloat16)}
    same_weights(stored, golden_source("pub_a", "bfloat16"))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ("hf", "{ckpt}", "{out}", "--config", "{yaml}"),
            "is in the release's (ckpt-0) format; `grok import xai` takes it",
        ),
        (("xai", "{ckpt}", "{out}", "--config", "{yaml}", "--scales", "per-channel"), "--scales"),
        (("xai", "{ckpt}", "{out}"), "head_dim"),
        (("xai", "{yaml}", "{out}"), "is a file, and weights are a folder"),
    ],
)
def test_the_command_refuses(tmp_path, config_file, args, message):
    places = {
        "ckpt": golden.FOLDER / "pub_a" / "ckpt-0",
        "out": tmp_path / "run",
        "yaml": config_file,
    }
    code, output = grok_import(*(arg.format(**places) for arg in args))
    assert code != 0
    assert message in output
    assert not (tmp_path / "run").exists()
