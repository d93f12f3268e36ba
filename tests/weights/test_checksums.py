"""Checksums of a save, an import, or a publisher: one bit in any file is found and named."""

import hashlib
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner, Result

from grok.checkpoint.manager import MODEL, OPTIMIZER, Checkpoints
from grok.checkpoint.retention import RetentionPolicy
from grok.cli.main import main
from grok.errors import CheckpointError
from grok.weights.orbax.source import OrbaxSource
from grok.weights.tools.checksums import verify_checkpoint
from tests.model import golden

RELEASE = golden.FOLDER / "pub_b" / "ckpt-0"


def flip_last(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def verify(*arguments) -> Result:
    return CliRunner().invoke(main, ["verify", *map(str, arguments)])


def test_damage_of_a_checkpoint_is_found_also_beside_the_model(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, RetentionPolicy(1))
    model = {"embed": {"table_VD": np.ones((20, 24), np.float32)}}
    state = {"count": np.arange(6), "nu": np.random.default_rng(0).random((64, 64))}
    checkpoints.save(7, {MODEL: model, OPTIMIZER: state}, {})
    checkpoints.close()
    step = tmp_path / "7"
    spec = SimpleNamespace(nbytes=0)
    monkeypatch.setattr(OrbaxSource, "__init__", lambda *_: None)
    source = OrbaxSource(step)
    source.step, source.checksums, source.tensors = str(step), {}, {"embed/table_VD": spec}
    results = list(verify_checkpoint(source))
    names = ["model/embed/table_VD", "optimizer/count", "optimizer/nu"]
    assert [(result.name, result.equal) for result in results] == [(name, True) for name in names]
    flip_last(next(step.glob("optimizer/*/values/*")))
    (differing,) = [result for result in verify_checkpoint(source) if not result.equal]
    assert differing.name.startswith("optimizer/")
    assert differing.differing[0].startswith("at [0")
    flip_last(step / "optimizer" / "_METADATA")
    with pytest.raises(CheckpointError, match="has other bytes in optimizer/_METADATA than were"):
        list(verify_checkpoint(source))


def published(file: Path, *more: str) -> Path:
    """A file with the checksums of a release, and more lines."""
    names = sorted(path.name for path in RELEASE.iterdir())
    lines = [f"{hashlib.sha256((RELEASE / n).read_bytes()).hexdigest()}  {n}" for n in names]
    file.write_text("\n".join([*lines, *more]) + "\n")
    return file


def test_files_are_compared_with_published_checksums(tmp_path):
    release, sums = shutil.copytree(RELEASE, tmp_path / "ckpt-0"), published(tmp_path / "sums")
    result = verify(release, "--checksums", sums)
    assert (result.exit_code, result.stdout.splitlines()[-1]) == (0, "equal")
    name = sorted(path.name for path in release.iterdir())[2]
    flip_last(release / name)
    result = verify(release, "--checksums", sums)
    assert result.exit_code == 1
    assert "differ: 1 of " in result.stdout
    arguments = ["import", "xai", str(release), str(tmp_path / "run"), "--checksums", str(sums)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert f"have other bytes than {sums} says: {name}; nothing was imported" in result.stderr
    assert not (tmp_path / "run").exists()
    (release / name).unlink()
    assert f"{release}/{name}: is missing" in verify(release, "--checksums", sums).stderr


@pytest.mark.parametrize(
    "line", ["0123  short", f"{'0' * 64}  ../x", f"{'0' * 64}  /x", f"{'g' * 64}  x", "0" * 64]
)
def test_a_file_that_sha256sum_did_not_write_is_refused(tmp_path, line):
    sums = published(tmp_path / "sums", line)
    result = verify(RELEASE, "--checksums", sums)
    assert result.exit_code == 2
    assert f"{sums}:{len(list(RELEASE.iterdir())) + 1}: " in result.stderr
