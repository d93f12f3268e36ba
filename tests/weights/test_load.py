"""`grok.load`: the right numbers on every mesh, in every type, with nothing read in vain.

Letters: B rows, T tokens, V vocab.
"""

import dataclasses
import functools
from pathlib import Path

import jax
import numpy as np
import pytest

import grok
from grok.config import AttentionConfig, DataConfig, ModelConfig, MoEConfig, RunConfig
from grok.errors import CheckpointError, ConfigError
from grok.model.build import to_arrays
from grok.weights import cast
from grok.weights.cast import converted, per_channel, release_groups
from grok.weights.importing.importer import import_weights
from grok.weights.load import put_on_mesh
from grok.weights.read_plan import MeshProcesses
from grok.weights.xai.source import ReleaseSource
from tests.fixtures.random_weights import RandomSource
from tests.fixtures.release_writer import write_release
from tests.model import golden
from tests.weights.load_processes import WIDE, load_in_processes

MESHES = [None, (8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4), (1, 1, 8)]
each_mesh = pytest.mark.parametrize("sizes", MESHES, ids=str)

# Groups that fit neither the heads nor each other nor the mesh, and more than ten layers.
ODD = ModelConfig(
    vocab_size=48,
    num_layers=12,
    embed_dim=24,
    moe=MoEConfig(dim=48, num_experts=4),
    attention=AttentionConfig(num_heads=6, num_kv_heads=2, head_dim=4),
    compute_dtype="float32",
)
ODD_GROUPS = {"layers/attention/w_out_NHD": 4, "layers/moe/w_down_EFD": 3}
ODD_GROUPS |= {"layers/attention/w_query_DNH": 3, "layers/moe/w_gate_EDF": 2}


def odd_groups(spec) -> int:
    return ODD_GROUPS.get(spec.name, 1)


TOKENS = np.random.default_rng(0).integers(1, 48, (8, 16))


def logits(name: str, dtype: str, sizes, compute_dtype: str = "float32") -> np.ndarray:
    """Logits of a golden set's prompts with weights straight from its ckpt-0, (B, T, V)."""
    mesh = sizes and grok.make_mesh(*sizes)
    folder, config = golden.FOLDER / name / "ckpt-0", golden.config(name, compute_dtype)
    model = grok.load(folder, config, mesh, dtype)
    # Four prompts; a mesh may want eight rows.
    tokens = np.concatenate([golden.arrays(name)["tokens"]] * 2)
    return np.asarray(model(tokens, segment_ids=tokens > 0))[:4]


@each_mesh
@pytest.mark.parametrize("dtype", ["int8", "float32"])
@pytest.mark.parametrize("name", golden.NAMES)
def test_release_gives_the_golden_logits(name, dtype, sizes):
    error = golden.relative_error(name, "logits_exact", logits(name, dtype, sizes))
    print(f"\n{name} {dtype} {sizes}: {error:.2e}")
    assert error < golden.TOLERANCE["logits_exact"]


@pytest.fixture(scope="module")
def imported(tmp_path_factory) -> dict[tuple[str, str], Path]:
    """Checkpoints that imports made of the golden sets, by name and type."""
    folders = {}
    for name in golden.NAMES:
        config = golden.config(name, "float32")
        release = ReleaseSource(golden.FOLDER / name / "ckpt-0", config)
        run = RunConfig(model=config, data=DataConfig(sequence_length=32))
        for dtype in ("int8", "float32"):
            folder = folders[name, dtype] = tmp_path_factory.mktemp("imports") / "run"
            import_weights(converted(release, dtype), folder, run)
    return folders


@each_mesh
@pytest.mark.parametrize("dtype", ["int8", "float32"])
@pytest.mark.parametrize("name", golden.NAMES)
def test_an_import_is_loaded_as_the_release_is(imported, name, dtype, sizes):
    mesh = sizes and grok.make_mesh(*sizes)
    config = golden.config(name, "float32")
    straight = grok.load(golden.FOLDER / name / "ckpt-0", config, mesh, dtype)
    found = to_arrays(grok.load(imported[name, dtype], mesh=mesh))
    for tensor, array in to_arrays(straight).items():
        assert found[tensor].sharding == array.sharding
        np.testing.assert_array_equal(found[tensor], array)


@pytest.mark.parametrize("sizes", [None, (2, 2, 2)], ids=str)
@pytest.mark.parametrize("dtype", ["int8", "bfloat16"])
@pytest.mark.parametrize("name", golden.NAMES)
def test_bfloat16_is_as_near_to_exact_as_the_release(name, dtype, sizes):
    real = golden.arrays(name)["tokens"] > 0
    exact = golden.arrays(name, "exact")["logits_exact"][real]
    released = golden.rms(golden.arrays(name, "golden_eager")["logits_bf16"][real], exact)
    error = golden.rms(logits(name, dtype, sizes, "bfloat16")[real], exact)
    print(f"\n{name} {dtype} {sizes}: {error:.4f}, the release's {released:.4f}")
    # Rounding noise of one set of weights; see test_golden.NOISE.
    assert error < released * 1.1


@functools.cache
def odd_logits(dtype: str, sizes) -> np.ndarray:
    mesh = sizes and grok.make_mesh(*sizes)
    return np.asarray(
        put_on_mesh(
            converted(RandomSource(ODD, groups=odd_groups), dtype),
            mesh,
        )(TOKENS)
    )


@pytest.mark.parametrize("sizes", [None, (4, 2, 1), (1, 4, 2), (4, 1, 2)], ids=str)
def test_groups_of_any_size_come_out_right(sizes):
    expected = odd_logits("float32", None)
    error = np.abs(odd_logits("int8", sizes) - expected).max() / np.abs(expected).max()
    print(f"\n{sizes}: {error:.2e}")
    assert error < 1e-5


def test_every_device_has_its_part_of_values_and_scales():
    mesh = grok.make_mesh(1, 2, 4)
    config = golden.config("pub_a", "float32")
    model = grok.load(golden.FOLDER / "pub_a/ckpt-0", config, mesh, "int8")
    parts = {
        name: array.sharding.shard_shape(array.shape) for name, array in to_arrays(model).items()
    }
    # 344 rows of each of 8 experts over 2 x 4; the release's two groups became eight.
    assert parts["layers/moe/w_down_EFD/values"] == (3, 8, 43, 64)
    assert parts["layers/moe/w_down_EFD/scales"] == (3, 8, 1, 64)
    assert parts["layers/moe/w_gate_EDF/values"] == (3, 8, 64, 43)
    assert parts["layers/moe/w_gate_EDF/scales"] == (3, 8, 1, 43)
    assert model.config.param_dtype == "int8"
    assert model.layers.moe.w_up_EDF.get_value().values.dtype == np.int8


def test_large_parts_arrive_in_blocks(monkeypatch):
    source = RandomSource(ODD)
    whole = to_arrays(put_on_mesh(source, grok.make_mesh(2, 2, 2)))
    monkeypatch.setattr("grok.weights.read_plan.DEVICE_BYTES", 100)
    progress = []
    mesh = grok.make_mesh(2, 2, 2)
    batches = to_arrays(put_on_mesh(source, mesh, lambda *figures: progress.append(figures)))
    for name, array in whole.items():
        np.testing.assert_array_equal(array, batches[name])
    total = sum(array.nbytes for array in whole.values())
    assert progress[0] == ("", 0, total)
    assert progress[-1][1:] == (total, total)
    assert len(progress) > 100


def bits(array) -> np.ndarray:
    values = np.asarray(array)
    return values.view(f"u{values.itemsize}")


@pytest.mark.parametrize("dtype", ["int8", "float32", "float32 to int8", "int8 to int4_all"])
@pytest.mark.parametrize(
    ("sizes", "devices", "batch_bytes"),
    [((1, 4, 2), 4, 1 << 26), ((2, 1, 2, 2), 2, 1 << 26), ((4, 1, 2), 1, 5000)],
)
def test_what_processes_read_is_exchanged_bit_for_bit(
    monkeypatch, sizes, devices, batch_bytes, dtype
):
    """Eight devices of one process, planned as if every few of them were of another."""
    stored, _, to = dtype.partition(" to ")
    source = converted(RandomSource(ODD, dtype=stored, groups=odd_groups), to or stored)
    mesh = grok.make_mesh(*sizes)
    expected = to_arrays(put_on_mesh(source, mesh))
    monkeypatch.setattr("grok.weights.read_plan.DEVICE_BYTES", batch_bytes)
    processes = MeshProcesses(dict(mesh.shape), np.arange(8).reshape(mesh.devices.shape) // devices)
    monkeypatch.setattr("grok.weights.transfer.MeshProcesses", lambda *_: processes)
    for name, array in to_arrays(put_on_mesh(source, mesh)).items():
        assert array.sharding == expected[name].sharding
        np.testing.assert_array_equal(bits(array), bits(expected[name]), name)


@pytest.mark.parametrize("dtype", ["int8", "int4", "int4_all"])
def test_floats_are_quantised_on_a_mesh(dtype, monkeypatch):
    monkeypatch.setattr(cast, "INT4_GROUP", 8)
    source = RandomSource(ODD, dtype="float32")
    for groups in (release_groups, per_channel):
        quantized = converted(source, dtype, groups)
        here, there = put_on_mesh(quantized), put_on_mesh(quantized, grok.make_mesh(1, 4, 2))
        for name, array in to_arrays(here).items():
            if not name.endswith("scales"):
                np.testing.assert_array_equal(array, to_arrays(there)[name])


def test_config_of_another_model_is_refused():
    config = golden.config("pub_b", "float32")
    with pytest.raises(CheckpointError, match="a release of 2 layers has 26 files"):
        grok.load(golden.FOLDER / "pub_a/ckpt-0", config)


def test_unknown_dtype_is_refused():
    with pytest.raises(ConfigError, match="dtype='int3' is none of int4_all, int4, int8, bfloat16"):
        grok.load(golden.FOLDER / "pub_a/ckpt-0", dtype="int3")


def test_mesh_that_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match="heads=6 cannot be split over"):
        put_on_mesh(RandomSource(ODD), grok.make_mesh(1, 1, 8))


@pytest.mark.parametrize("dtype", ["int8", "int4", "int4_all"])
def test_fresh_quantised_parameters_are_refused(dtype):
    config = golden.config("pub_a", "float32")
    with pytest.raises(ConfigError, match=f"{dtype} is for weights that are loaded"):
        grok.init(dataclasses.replace(config, param_dtype=dtype), jax.random.key(0))


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="/proc/self/io is Linux's")
def test_two_processes_read_each_byte_once(tmp_path):
    """Rows, columns, experts and copies: together they read the files once, and little else."""
    write_release(RandomSource(WIDE), tmp_path)
    total = sum(file.stat().st_size for file in tmp_path.iterdir())
    reports = load_in_processes(tmp_path, WIDE, (2, 2, 2), 2, compare=True)
    assert 1 <= sum(report["read"] for report in reports) / total < 1.05
    assert max(report["read"] for report in reports) / total < 0.55
