"""`grok verify`: equal means equal, and one bit anywhere is found and named."""

import dataclasses
import math
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner, Result

from grok.cli.main import main
from grok.config import AttentionConfig, DataConfig, ModelConfig, MoEConfig, RunConfig
from grok.config.text import to_yaml
from grok.errors import CheckpointError
from grok.weights.array_difference import ArrayDifference, array_difference
from grok.weights.cast import FloatSource, converted
from grok.weights.huggingface.export import export_huggingface
from grok.weights.importing.importer import import_weights
from grok.weights.source import TensorSpec
from grok.weights.tools import verify as verification
from grok.weights.tools.verify import Comparison, choose_method, compare
from grok.weights.xai.source import ReleaseSource
from grok.weights.xai.unpickler import read_tensor
from tests.fixtures.array_source import ArraySource
from tests.fixtures.model_weights import MATRICES
from tests.fixtures.models import replace_keys
from tests.fixtures.random_weights import RandomSource
from tests.model import golden

RELEASE = golden.FOLDER / "pub_b" / "ckpt-0"
CONFIG = golden.config("pub_b", "float32")
BF16 = np.dtype(ml_dtypes.bfloat16)
DOWN, UP, OUT = "layers/moe/w_down_EFD", "layers/moe/w_up_EDF", "layers/attention/w_out_NHD"
TABLE, NORM = "embed/table_VD", "layers/pre_ffn_norm/scale_D"
SMALL = ModelConfig(
    vocab_size=20,
    num_layers=3,
    embed_dim=24,
    moe=MoEConfig(dim=40, num_experts=2),
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=6),
)


@pytest.fixture(scope="module")
def imported(tmp_path_factory) -> Path:
    """pub_b as it comes out of each importer and exporter, in folders by name."""
    folder = tmp_path_factory.mktemp("imported")
    run = RunConfig(model=CONFIG, data=DataConfig(sequence_length=32))
    source = ReleaseSource(RELEASE, CONFIG)
    for dtype in ("int8", "bfloat16", "float32"):
        import_weights(converted(source, dtype), folder / dtype, run)
        if dtype != "int8":
            export_huggingface(source, folder / f"hf-{dtype}", dtype)
    (folder / "config.yaml").write_text(to_yaml(run))
    return folder


@pytest.fixture
def small() -> tuple[ArraySource, ArraySource]:
    """Two sources of the same int8 weights, each with arrays of its own."""
    source = RandomSource(SMALL)
    return ArraySource.copy(source, "first"), ArraySource.copy(source, "second")


def verify(*arguments) -> Result:
    return CliRunner().invoke(main, ["verify", *map(str, arguments)])


def compared(a, b, tolerance: float = 0.0) -> dict[str, Comparison]:
    return {found.spec.name: found for found in compare(a, b, tolerance)}


def only(found: dict[str, Comparison], name: str) -> Comparison:
    """The comparison of `name`, after checking that all others are equal."""
    assert [each for each, comparison in found.items() if not comparison.equal] == [name]
    return found[name]


# ---- checkpoints on disk, through the command


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ("int8", "7 tensors, int8 with int8: values (in steps) and scales, bit for bit"),
        ("bfloat16", "7 tensors, int8 with bfloat16: dequantised to bfloat16"),
        ("float32", "7 tensors, int8 with float32: dequantised to float32"),
        ("hf-bfloat16", "7 tensors, float32 with bfloat16: rounded to bfloat16"),
        ("hf-float32", "7 tensors, float32 with float32: bit for bit"),
    ],
)
def test_what_was_imported_is_equal(imported, other, words):
    """The release alone does not say its head_dim: it is taken from the other's config."""
    assert verify(imported / other, RELEASE).exit_code == 0
    result = verify(RELEASE, imported / other)
    assert result.exit_code == 0, result.output
    assert words in result.stdout
    assert result.stdout.splitlines()[-1] == "equal"
    assert result.stdout.count("equal") == 15


def test_two_imports_of_two_formats_are_equal(imported):
    result = verify(imported / "bfloat16", imported / "hf-float32")
    assert result.exit_code == 0
    assert "14 tensors, bfloat16 with float32: rounded to bfloat16" in result.stdout


@pytest.mark.parametrize(
    ("file", "array", "number", "name", "place"),
    [
        # Layer 1; its files begin at 14. Two of eight groups of 64 rows come first.
        (15, "values", (3, 140, 9), DOWN, "  at layer 1 [3,140,9]"),
        (15, "scales", (3, 2, 9), DOWN, "  at layer 1 [3,2,9]"),
        # 16 heads of 6: row 13 is row 1 of head 2.
        (6, "values", (13, 95), OUT, "  at layer 0 [2,1,95]"),
        (6, "scales", (7, 0), OUT, "  at layer 0 [7,0]"),
        (0, "array", (383, 95), TABLE, "  at [383,95]"),
        (24, "array", (0,), "layers/post_ffn_norm/scale_D", "  at layer 1 [0]"),
    ],
)
def test_one_bit_is_found_and_named(imported, tmp_path, file, array, number, name, place):
    shutil.copytree(RELEASE, tmp_path / "ckpt-0")
    path = tmp_path / "ckpt-0" / f"tensor{file:05d}_000"
    record = read_tensor(path)
    found = record.values if array == "array" else getattr(record, array)
    data = bytearray(path.read_bytes())
    data[found.offset + np.ravel_multi_index(number, found.shape) * found.dtype.itemsize] ^= 1
    path.write_bytes(data)

    result = verify(RELEASE, tmp_path / "ckpt-0", "--config", imported / "config.yaml")
    assert result.exit_code == 1
    *_, last = lines = result.stdout.splitlines()
    assert last == "differ: 1 of 14 tensors"
    (row,) = (line for line in lines if line.startswith(name))
    assert "equal" not in row
    following = lines[lines.index(row) + 1 :]
    if array == "scales":
        assert row.split() == [name, "0"]
        assert following[0].split()[:2] == ["scales", "1"]
        following = following[1:]
    else:
        assert row.split()[1] == "1"
    assert following[0].rstrip() == place
    # Against what was imported before, in any type, it is the same tensor.
    for other in ("int8", "hf-bfloat16"):
        result = verify(imported / other, tmp_path / "ckpt-0")
        assert result.exit_code == (0 if "hf" in other and array == "array" else 1)


def test_other_models_cannot_be_compared(imported):
    other = golden.FOLDER / "pub_a" / "ckpt-0"
    result = verify(imported / "int8", other)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"error: {other}")
    assert verify(imported / "int8", imported / "nowhere").exit_code == 2


def test_a_release_alone_needs_a_config():
    result = verify(RELEASE, RELEASE)
    assert result.exit_code == 2
    assert "head_dim" in result.stderr


# ---- the checksums of an import


def test_checksums_of_an_import_are_counted_again(imported, tmp_path):
    result = verify(imported / "int8")
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1] == "equal"

    shutil.copytree(imported / "int8", tmp_path / "run")
    (path,) = (tmp_path / "run").rglob("layers.moe.w_up_EDF.values/c.1.5.*")
    data = bytearray(path.read_bytes())
    data[100] ^= 8
    path.write_bytes(data)
    result = verify(tmp_path / "run")
    assert result.exit_code == 1
    *_, last = lines = result.stdout.splitlines()
    assert last == "differ: 1 of 14 tensors"
    assert [line.split() for line in lines if "layer 1" in line] == [[UP, "2", "layer", "1"]]


def test_without_checksums_there_is_a_sentence(imported):
    result = verify(imported / "hf-bfloat16")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "keeps no checksums" in result.stderr
    assert "name a second one" in result.stderr


# ---- sources in memory


def test_an_int8_is_told_in_steps(small):
    a, b = small
    b.values[UP][1, 0, 5, 7] = 100
    b.values[UP][2, 1, 23, 39] = -100
    a.values[UP][1, 0, 5, 7] = a.values[UP][2, 1, 23, 39] = 50
    found = only(compared(a, b), UP)
    assert found.values.differing == 2
    assert found.values.size == 3 * 2 * 24 * 40
    assert (found.values.largest_absolute, found.values.largest_relative) == (150, 1.5)
    assert found.farthest() == (2, (1, 23, 39))
    assert found.scales == ArrayDifference(3 * 2 * 40)


def test_a_scale_is_told_apart_from_values(small):
    a, b = small
    a.scales[DOWN][0, 1, 3, 11] = 1
    b.scales[DOWN][0, 1, 3, 11] = 1.5
    found = only(compared(a, b), DOWN)
    assert found.values.differing == 0
    assert found.scales is not None
    assert (found.scales.differing, found.scales.largest_absolute) == (1, 0.5)
    assert found.farthest(of_scales=True) == (0, (1, 3, 11))


def test_other_groups_are_compared_dequantised(small):
    a, b = small
    axis = 2
    b.scales[DOWN] = b.scales[DOWN].repeat(5, axis)
    found = compared(a, b)
    assert all(each.equal for each in found.values())
    assert found[DOWN].method.words == "int8 with int8 in other groups: dequantised to float32"
    assert found[OUT].method.dtype == np.int8
    b.scales[DOWN][2, 0, 17, 4] *= 2
    found = only(compared(a, b), DOWN)
    assert found.values.differing == np.count_nonzero(a.values[DOWN][2, 0, 17:18, 4])
    assert found.farthest() == (2, (0, 17, 4))


@pytest.mark.parametrize("kind", ["bfloat16", "float32"])
def test_int8_with_floats(small, kind):
    a, b = small
    b = ArraySource.copy(converted(b, kind))
    assert all(each.equal for each in compared(a, b).values())
    assert all(each.equal for each in compared(b, a).values())
    b.values[UP][0, 1, 2, 3] += 10
    found = only(compared(a, b), UP)
    assert found.farthest() == (0, (1, 2, 3))
    assert found.values.differing == 1
    assert found.values.largest_absolute == pytest.approx(10, rel=0.01)


def test_the_error_of_quantisation():
    floats = ArraySource.copy(RandomSource(SMALL, dtype="float32"))
    quantized = ArraySource.copy(converted(floats, "int8"))
    back = converted(quantized, "float32")
    for sources in ((floats, quantized), (quantized, floats)):
        found = compared(*sources)
        assert {name for name, each in found.items() if not each.equal} == MATRICES.keys()
        for name in MATRICES:
            w = floats.values[name].astype(np.float64)
            error = back.read(name, back.tensors[name].full_part) - w
            assert found[name].method.quantization
            assert found[name].values.largest_absolute == np.abs(error).max()
            expected = math.sqrt((error**2).sum() / (w**2).sum())
            assert found[name].values.relative_rms == pytest.approx(expected, rel=1e-5)


def test_two_float_types_are_compared_in_the_coarser(small):
    a = ArraySource.copy(converted(small[0], "float32"))
    for kind in (BF16, np.dtype(np.float16)):
        b = ArraySource.copy(FloatSource(a, kind))
        found = compared(a, b)
        assert all(each.equal for each in found.values())
        assert found[UP].method.words == f"float32 with {kind}: rounded to {kind}"
    a.values[TABLE][7, 8] = 1
    b.values[TABLE][7, 8] = 1.001
    assert only(compared(a, b), TABLE).farthest() == (None, (7, 8))
    assert choose_method(b.tensors[TABLE], TensorSpec(b.tensors[TABLE].param, BF16)).dtype == BF16


def test_bits_count_without_a_tolerance(small):
    a, b = small
    for source in small:
        source.values[NORM][2, 3] = np.nan
    assert all(each.equal for each in compared(a, b).values())
    a.values[NORM][1, 5], b.values[NORM][1, 5] = 0.0, -0.0
    found = only(compared(a, b), NORM)
    assert (found.values.differing, found.values.largest_absolute) == (1, 0)
    assert found.values.largest_relative == 0
    assert found.farthest() == (1, (5,))
    assert compared(a, b, tolerance=1e-9)[NORM].equal
    # A number instead of NaN is farther away than any number.
    b.values[NORM][2, 3] = 1
    for tolerance in (0, 1.9):
        found = only(compared(a, b, tolerance), NORM)
        assert found.values.largest_absolute == found.values.largest_relative == math.inf
        assert found.farthest() == (2, (3,))


def test_tolerance_is_relative_and_for_floats_alone(small):
    a, b = small
    a.values[TABLE][3, 4], b.values[TABLE][3, 4] = 1000, 1001
    found = only(compared(a, b, 0.9e-3), TABLE)
    assert found.values.largest_relative == pytest.approx(1 / 1001)
    assert compared(a, b, 1.1e-3)[TABLE].equal
    b.values[UP][0, 0, 0, 0] ^= 1
    only(compared(a, b, 1.1e-3), UP)


@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_chunks_make_no_difference(small, monkeypatch, chunk):
    a, b = small
    rng = np.random.default_rng(1)
    for source in (a, b):
        source.values[TABLE][rng.random((20, 24)) < 0.1] = rng.random()
        source.values[DOWN][2] = rng.permutation(source.values[DOWN][2], axis=1)
    whole = list(compare(a, b))
    monkeypatch.setattr(verification, "CHUNK_VALUES", chunk)
    for one, other in zip(whole, compare(a, b), strict=True):
        assert one.spec == other.spec
        assert one.scales == other.scales
        assert without_sums(one.values) == without_sums(other.values)


def without_sums(found: ArrayDifference) -> tuple:
    return found.size, found.differing, found.largest_absolute, found.largest_relative, found.index


def test_the_first_of_equal_differences_is_named():
    a, b = np.zeros(9, np.float32), np.zeros(9, np.float32)
    b[[2, 5, 8]] = 1, 3, -3
    assert array_difference(a, b).index == 5
    parts = [array_difference(a[i : i + 3], b[i : i + 3]) for i in range(0, 9, 3)]
    assert sum(parts, ArrayDifference()) == array_difference(a, b)


def test_progress_counts_every_byte(small):
    told: list[tuple[str, int, int]] = []
    for _ in compare(*small, 0.0, lambda *progress: told.append(progress)):
        pass
    total = 2 * sum(spec.nbytes for spec in small[0].tensors.values())
    assert told[0] == ("", 0, total)
    assert told[-1] == ("layers/post_ffn_norm/scale_D", total, total)
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)
    assert {each for _, _, each in told} == {total}


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        (
            {"moe.dim": 48},
            "layers/moe/w_gate_EDF is (3, 2, 24, 40) in the first and (3, 2, 24, 48)",
        ),
        (
            {"attention.rope.theta": 5000.0},
            "attention.rope.theta is 10000.0 in the first and 5000.0 in the second.",
        ),
        ({"moe.num_selected": 1}, "moe.num_selected is 2 in the first and 1 in the second"),
    ],
)
def test_other_configs_are_named(changed, sentence):
    other = RandomSource(replace_keys(SMALL, changed))
    with pytest.raises(CheckpointError) as refused:
        compared(RandomSource(SMALL), other)
    assert sentence in str(refused.value)


def test_how_a_model_is_run_makes_no_difference():
    changed = dataclasses.replace(SMALL, context_length=64, compute_dtype="float32", remat="none")
    found = compared(RandomSource(SMALL), RandomSource(changed))
    assert all(each.equal for each in found.values())


def test_what_cannot_be_read_ends_the_comparison(small):
    a, b = small

    def fail(name, part):
        raise CheckpointError("second: the disk is gone.")

    b.read = fail
    with pytest.raises(CheckpointError, match="the disk is gone"):
        compared(a, b)
