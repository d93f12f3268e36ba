"""Grok-2's release, whose files of eight ranks repeat the same names: whatever is wrong with a rank
is refused by the name of its file, and never taken for a narrower model."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

from grok import storage
from grok.cli.main import main
from grok.errors import CheckpointError
from grok.weights.huggingface.source import HuggingFaceSource
from tests.fixtures.families import FOLDER, tree

GATE, DOWN, UP = 6, 7, 8
EXPERT = "model.layers.0.block_sparse_moe.experts.0.w1.weight"


@pytest.fixture
def release(tmp_path) -> Path:
    """A copy of the golden release, for tests to damage."""
    shutil.copytree(FOLDER / "grok2", tmp_path / "grok2", copy_function=shutil.copyfile)
    return tmp_path / "grok2"


def file(number: int, rank: int | str) -> str:
    suffix = rank if isinstance(rank, str) else f"{rank:03d}"
    return f"pytorch_model-{number:05d}-TP-{suffix}.safetensors"


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        HuggingFaceSource(folder)
    return str(error.value).removeprefix(f"{folder}").removeprefix("/")


@pytest.mark.parametrize("number", [GATE, DOWN, UP])
@pytest.mark.parametrize("rank", [0, 3, 7])
def test_a_rank_that_is_missing(release, number, rank):
    (release / file(number, rank)).unlink()
    assert refusal(release) == (
        f"{file(number, rank)}: is missing; its tensors are split over 8 ranks."
    )
    result = CliRunner().invoke(main, ["inspect", str(release)])
    assert result.exit_code == 2
    assert f"{file(number, rank)}: is missing" in " ".join(result.stdout.split())


def test_the_last_rank_missing_everywhere(release):
    """The names say nothing then: seven eighths of the width do."""
    for number in (GATE, DOWN, UP):
        (release / file(number, 7)).unlink()
    assert refusal(release) == (
        f"{file(GATE, 7)}: is missing; {EXPERT} should have a width of 48, which 8 ranks of 6 "
        "have, and 7 are here."
    )


def test_a_rank_too_many(release):
    shutil.copyfile(release / file(DOWN, 2), release / file(DOWN, 8))
    assert refusal(release) == (
        f"{file(DOWN, 8)}: is a rank too many, or other tensors lack it, which are split over 8 "
        "ranks."
    )
    for number in (GATE, UP):
        shutil.copyfile(release / file(number, 2), release / file(number, 8))
    message = refusal(release)
    assert message.startswith(f"{file(GATE, 8)}: ")
    assert file(GATE, 2) in message  # whose copy it is


def test_one_rank_too_many_everywhere_of_other_values(release):
    for number in (GATE, DOWN, UP):
        tensors = load_file(release / file(number, 7))
        save_file({name: t[::-1].copy() for name, t in tensors.items()}, release / file(number, 8))
    assert refusal(release) == (
        f"{file(GATE, 8)}: is a rank too many; {EXPERT} should have a width of 48, which 8 ranks "
        "of 6 have, and 9 are here."
    )


@pytest.mark.parametrize("number", [GATE, DOWN, UP])
def test_a_rank_that_is_a_copy_of_another(release, number):
    shutil.copyfile(release / file(number, 3), release / file(number, 4))
    assert refusal(release) == (
        f"{file(number, 4)}: begins with the values of {release / file(number, 3)}; it is that "
        "rank once more."
    )


def test_experts_of_equal_numbers_are_no_copies(release):
    for rank in range(8):
        tensors = load_file(release / file(GATE, rank))
        save_file({n: np.zeros_like(t) for n, t in tensors.items()}, release / file(GATE, rank))
    source = HuggingFaceSource(release)
    spec = source.tensors["layers/moe/w_gate_EDF"]
    assert not source.read(spec.name, spec.full_part).any()


@pytest.mark.parametrize(
    "name", ["pytorch_model-00006-TP-3.safetensors", "rank-3.safetensors", "a.safetensors"]
)
def test_a_rank_that_was_renamed(release, name):
    (release / file(GATE, 3)).rename(release / name)
    assert refusal(release) == (
        f"{file(GATE, 3)}: is missing; its tensors are split over 8 ranks; {name} has tensors of "
        "the same names."
    )


def test_a_rank_that_was_renamed_to_another_number(release):
    (release / file(GATE, 3)).rename(release / file(18, 3))
    assert refusal(release).startswith(f"{file(GATE, 3)}: is missing; ")
    (release / file(18, 3)).rename(release / file(5, 3))
    assert refusal(release) == (
        f"{file(5, 3)}: stands beside {file(5, 'common')}, which has whole tensors; one of them is "
        "too many."
    )


def test_a_rank_that_is_there_under_two_numbers(release):
    shutil.copyfile(release / file(GATE, 3), release / file(18, 3))
    message = refusal(release)
    assert message.startswith(f"{file(18, 3)}: '{EXPERT}' is in ")
    assert message.endswith("too; the files of a tensor's ranks have one number.")


@pytest.mark.parametrize("number", [3, GATE])
def test_a_group_that_is_there_twice(release, number):
    for path in release.glob(f"pytorch_model-{number:05d}-*"):
        shutil.copyfile(path, release / path.name.replace(f"{number:05d}", "00018"))
    assert re.match(
        rf"{file(18, 'common' if number == 3 else 0)}: '.*' is in .* too", refusal(release)
    )


@pytest.mark.parametrize("cut", [100, 4000, 52_000])
def test_a_rank_that_was_cut_short(release, cut):
    path = release / file(UP, 5)
    path.write_bytes(path.read_bytes()[:-cut])
    assert refusal(release).startswith(f"{file(UP, 5)}: is cut short")


def test_a_rank_that_lacks_a_tensor_or_has_another_shape(release):
    tensors = load_file(release / file(GATE, 5))
    save_file({n: t for n, t in tensors.items() if n != EXPERT}, release / file(GATE, 5))
    assert refusal(release).startswith(
        f"{file(GATE, 5)}: has no '{EXPERT}', which {file(GATE, 0)} has."
    )
    save_file(tensors | {EXPERT: tensors[EXPERT][:3].copy()}, release / file(GATE, 5))
    assert refusal(release).startswith(
        f"{file(GATE, 5)}: '{EXPERT}' is bfloat16 (3, 128), and in {file(GATE, 0)} bfloat16 "
    )
    save_file(tensors | {"other": tensors[EXPERT]}, release / file(GATE, 5))
    assert refusal(release).startswith(f"{file(GATE, 5)}: has 'other', which {file(GATE, 0)} lacks")
    save_file({}, release / file(GATE, 5))
    assert refusal(release).startswith(f"{file(GATE, 5)}: has no 'model.layers.0.block_sparse_moe")


def test_whole_tensors_missing_or_renamed(release):
    common = release / file(4, "common")
    common.rename(release / "pytorch_model-00004.safetensors")
    assert refusal(release) == (
        "pytorch_model-00004.safetensors: does not belong here; the files of a release in ranks "
        f"are called like {file(0, 'common')} and {file(6, 0)}."
    )
    (release / "pytorch_model-00004.safetensors").unlink()
    assert refusal(release) == (
        ": model.layers.0.mlp.down_proj.weight is missing; this folder's config.json has 4 layers "
        "of 8 experts."
    )


def test_other_tensors_in_the_files_of_ranks(release):
    attention = load_file(release / file(11, "common"))
    (release / file(11, "common")).unlink()
    rng = np.random.default_rng(0)
    for rank in range(8):
        part = {
            name: t[16 * rank : 16 * (rank + 1)] + rng.random(1).astype(t.dtype)
            for name, t in attention.items()
        }
        save_file(part, release / file(11, rank))
    assert refusal(release).endswith(
        "is in the files of ranks, and only experts are split over them."
    )


def test_a_part_reads_its_own_bytes_of_the_ranks_that_have_them(release, monkeypatch):
    source = HuggingFaceSource(release)
    reads: list[tuple[str, int]] = []

    def count(path, starts, out, error):
        reads.append((Path(path).name, len(out)))
        return read_ranges(path, starts, out, error)

    read_ranges = storage.read_ranges
    monkeypatch.setattr(storage, "read_ranges", count)
    # Of rank r's six columns, or rows, 6 r to 6 r + 5: the last of rank 2, all of 3, two of 4.
    one, width, rows = slice(1, 2), slice(17, 26), slice(3, 8)
    source.read("layers/moe/w_gate_EDF", (one, one, slice(0, 128), width))
    assert reads == [(file(GATE, 2), 256), (file(GATE, 3), 6 * 256), (file(GATE, 4), 2 * 256)]
    reads.clear()
    source.read("layers/moe/w_down_EFD", (one, one, width, rows))
    assert reads == [(file(DOWN, 2), 10), (file(DOWN, 3), 60), (file(DOWN, 4), 20)]


def test_another_number_of_ranks(release):
    """Four ranks of twice the width, as a conversion may have them."""
    for number in (GATE, DOWN, UP):
        for rank in range(4):
            parts = [load_file(release / file(number, 2 * rank + i)) for i in range(2)]
            joined = {
                n: np.concatenate([p[n] for p in parts], int(number == DOWN)) for n in parts[0]
            }
            save_file(joined, release / file(number, rank))
        for rank in range(4, 8):
            (release / file(number, rank)).unlink()
    source = HuggingFaceSource(release)
    expected = tree("grok2", source.config)
    for name, spec in source.tensors.items():
        np.testing.assert_array_equal(source.read(name, spec.full_part), expected[name])


def test_a_config_of_narrower_experts_does_not_hide_a_rank(release):
    data = json.loads((release / "config.json").read_text())
    (release / "config.json").write_text(json.dumps(data | {"moe_intermediate_size": 6}))
    assert "should have a width of 6, which 1 ranks of 6 have, and 8 are here." in refusal(release)
