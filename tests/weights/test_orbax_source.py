"""Checkpoints of ours, of training runs and of imports, read part by part; and refusals."""

import dataclasses
import importlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest
from gcp_storage_emulator.server import create_server

from grok import sharding
from grok.checkpoint import file_list
from grok.checkpoint.manager import MODEL, OPTIMIZER, Checkpoints
from grok.checkpoint.retention import RetentionPolicy
from grok.config import AttentionConfig, DataConfig, ModelConfig, MoEConfig, RunConfig
from grok.config.load import to_dict
from grok.config.text import to_yaml
from grok.errors import CheckpointError, DamageError
from grok.model.build import from_arrays, to_arrays
from grok.model.decoder import Decoder
from grok.model.params import param_specs
from grok.storage import remote
from grok.weights.cast import converted
from grok.weights.detect import open_source
from grok.weights.importing.importer import import_weights
from grok.weights.orbax.metadata import HANDLERS
from grok.weights.orbax.source import OrbaxSource
from grok.weights.source import Part, layer_pieces
from tests.fixtures.random_weights import RandomSource

TINY = ModelConfig(
    vocab_size=96,
    num_layers=2,
    embed_dim=32,
    moe=MoEConfig(dim=48, num_experts=4),
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8),
)
RUN = RunConfig(model=TINY, data=DataConfig(sequence_length=32))
GATE = "layers/moe/w_gate_EDF"


@pytest.fixture(scope="module")
def model() -> Decoder:
    """On a mesh that splits every axis that meshes split."""
    source = RandomSource(TINY, dtype="float32")
    arrays = {name: source.read(name, spec.full_part) for name, spec in source.tensors.items()}
    return from_arrays(TINY, arrays, sharding.make_mesh(data=2, expert=2, tensor=2))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, model) -> Path:
    """A run's folder with checkpoints of steps 3 and 20, as training saves them."""
    folder = tmp_path_factory.mktemp("trained")
    checkpoints = Checkpoints(folder / "checkpoints", RetentionPolicy(2))
    zeros = jax.tree.map(lambda x: x * 0, model)
    for step, tree in ((3, zeros), (20, model)):
        trees, meta = {MODEL: tree, OPTIMIZER: {"step": 1}}, {"config": to_dict(RUN)}
        checkpoints.save(step, trees, meta, specs=param_specs(RUN.model))
    checkpoints.close()
    (folder / "config.yaml").write_text(to_yaml(RUN))
    return folder


@pytest.fixture(scope="module")
def imported(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("imported") / "run"
    import_weights(RandomSource(TINY), folder, RUN)
    return folder


@pytest.fixture
def copy(tmp_path, imported) -> Path:
    """An imported run to be damaged."""
    shutil.copytree(imported, tmp_path / "copy")
    return tmp_path / "copy"


def random_parts(shape: tuple[int, ...], count: int = 12) -> list[Part]:
    rng = np.random.default_rng(0)
    bounds = (
        [np.sort(rng.choice(size + 1, 2, replace=False)) for size in shape] for _ in range(count)
    )
    return [tuple(slice(int(a), int(b)) for a, b in each) for each in bounds]


def test_what_training_saved_is_read_part_by_part(trained, model):
    source = OrbaxSource(trained)
    arrays = to_arrays(model)
    assert list(source.tensors) == list(RandomSource(TINY).tensors)
    assert (source.dtype, source.checksums) == ("float32", {})
    for name, spec in source.tensors.items():
        whole = np.asarray(arrays[name])
        assert (spec.dtype, spec.shape, spec.groups) == (whole.dtype, whole.shape, None)
        for part in random_parts(spec.shape):
            np.testing.assert_array_equal(source.read(name, part), whole[part])


def test_what_was_imported_is_read_part_by_part(imported):
    source, wanted = OrbaxSource(imported), RandomSource(TINY)
    assert dict(source.tensors) == dict(wanted.tensors)
    for name, spec in source.tensors.items():
        for part in random_parts(spec.shape):
            np.testing.assert_array_equal(source.read(name, part), wanted.read(name, part))
        for part in random_parts(spec.scales_shape) if spec.groups is not None else ():
            read, right = source.read_scales(name, part), wanted.read_scales(name, part)
            assert (read.dtype, read.tobytes()) == (right.dtype, right.tobytes())


def test_training_saves_matrices_apart(trained):
    """What one layer and expert costs to read does not grow with their number."""
    source = OrbaxSource(trained)
    for name, spec in source.tensors.items():
        lead = len(spec.shape) - (len(name.rpartition("_")[2]) - ("moe/w_" in name))
        chunk = source._arrays._stores[name].chunk_layout.read_chunk.shape
        assert chunk[:lead] == (1,) * lead


def test_threads_may_read_at_once(trained, imported):
    for folder in (trained, imported):
        source = OrbaxSource(folder)
        jobs = [
            (n, part) for n, spec in source.tensors.items() for _, part in layer_pieces(spec)
        ] * 4
        with ThreadPoolExecutor(8) as pool:
            read = list(pool.map(source.read, *zip(*jobs, strict=True)))
        for job, values in zip(jobs, read, strict=True):
            np.testing.assert_array_equal(values, source.read(*job))


@pytest.mark.parametrize("inside", ["", "checkpoints", "checkpoints/20"])
def test_a_run_its_checkpoints_and_a_step_are_all_opened(trained, model, inside):
    source = open_source(trained / inside)
    assert isinstance(source, OrbaxSource)
    assert source.step == str(trained / "checkpoints" / "20")
    norm = np.asarray(to_arrays(model)["final_norm/scale_D"])
    np.testing.assert_array_equal(source.read("final_norm/scale_D", (slice(0, 32),)), norm)


@pytest.fixture
def bucket(monkeypatch):
    """The client of an emulated gs://bucket."""
    server = create_server("127.0.0.1", 0, in_memory=True, default_bucket="bucket")
    server.start()
    url = f"http://127.0.0.1:{server._api._httpd.server_port}"
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", url)
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", url)
    monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")
    yield remote("gs://bucket")[0]
    server.stop()


def test_a_copy_in_a_bucket_is_read(bucket, imported):
    files = [path for path in imported.rglob("*") if path.is_file()]
    last = Path("checkpoints", "0", "commit_success.txt")
    for path in files:
        inside = path.relative_to(imported)
        if inside != last:
            bucket.pipe_file(f"bucket/run/{inside}", path.read_bytes())
    with pytest.raises(CheckpointError, match=r"run/checkpoints: has no finished checkpoint"):
        OrbaxSource("gs://bucket/run")
    bucket.pipe_file(f"bucket/run/{last}", (imported / last).read_bytes())
    source, local = OrbaxSource("gs://bucket/run"), OrbaxSource(imported)
    assert (source.step, source.config) == ("gs://bucket/run/checkpoints/0", local.config)
    for name in (GATE, "embed/table_VD"):
        part = local.tensors[name].full_part
        np.testing.assert_array_equal(source.read(name, part), local.read(name, part))


def test_an_older_step_is_opened_by_its_folder(trained):
    source = OrbaxSource(trained / "checkpoints" / "3")
    assert not source.read("final_norm/scale_D", (slice(0, 32),)).any()


def test_the_config_is_the_given_one_or_the_runs_or_the_kept_one(copy):
    edited = dataclasses.replace(TINY, logit_multiplier=0.5)
    (copy / "config.yaml").write_text(to_yaml(dataclasses.replace(RUN, model=edited)))
    given = dataclasses.replace(TINY, logit_multiplier=0.25)
    assert OrbaxSource(copy, given).config == given
    assert OrbaxSource(copy / "checkpoints" / "0").config == edited
    (copy / "config.yaml").unlink()
    assert OrbaxSource(copy).config == dataclasses.replace(TINY, param_dtype="int8")
    (copy / "checkpoints" / "0" / "meta" / "metadata").write_text("{}")
    file_list.commit(copy / "checkpoints" / "0", 0)
    with pytest.raises(CheckpointError, match=r"checkpoints/0: does not say .* --config"):
        OrbaxSource(copy)
    assert OrbaxSource(copy, TINY).checksums == {}


def test_a_training_checkpoint_can_be_imported_again(tmp_path, trained):
    source = converted(OrbaxSource(trained), "bfloat16")
    import_weights(source, tmp_path / "run", RUN)
    stored = OrbaxSource(tmp_path / "run")
    for name, spec in source.tensors.items():
        assert (
            stored.read(name, spec.full_part).tobytes()
            == source.read(name, spec.full_part).tobytes()
        )


def edit_tree(folder: Path, edit) -> None:
    file = folder / "checkpoints" / "0" / "model" / "_METADATA"
    data = json.loads(file.read_text())
    edit(data["tree_metadata"])
    file.write_text(json.dumps(data))


def rename_entry(tree: dict, old: str, new: str) -> None:
    entry = tree.pop(str(tuple(old.split("/"))))
    entry["key_metadata"] = [{"key": key, "key_type": 2} for key in new.split("/")]
    tree[new] = entry


def swap(folder: Path) -> None:
    model = folder / "checkpoints" / "0" / "model"
    gate, down = model / "layers.moe.w_gate_EDF.values", model / "layers.moe.w_down_EFD.values"
    gate.rename(model / "away")
    down.rename(gate)
    (model / "away").rename(down)


MODEL_FOLDER = "checkpoints/0/model"
DAMAGE = {
    "no _METADATA": (
        lambda run: (run / MODEL_FOLDER / "_METADATA").unlink(),
        r"model/_METADATA: cannot be read: No such file",
    ),
    "_METADATA cut": (
        lambda run: os.truncate(run / MODEL_FOLDER / "_METADATA", 100),
        r"model/_METADATA: cannot be read as JSON",
    ),
    "_METADATA of another kind": (
        lambda run: (run / MODEL_FOLDER / "_METADATA").write_text('{"tree_metadata": {"a": 1}}'),
        r"model/_METADATA: is not as Orbax writes it",
    ),
    "meta cut": (
        lambda run: (run / "checkpoints/0/meta/metadata").write_text("{"),
        r"meta/metadata: cannot be read as JSON",
    ),
    "tensor not listed": (
        lambda run: edit_tree(run, lambda tree: tree.pop("('embed', 'table_VD')")),
        r"model: tensor embed/table_VD is missing",
    ),
    "scales not listed": (
        lambda run: edit_tree(
            run, lambda tree: tree.pop("('layers', 'moe', 'w_up_EDF', 'scales')")
        ),
        r"model: tensor layers/moe/w_up_EDF/scales is missing",
    ),
    "tensor too many": (
        lambda run: (
            shutil.copytree(run / MODEL_FOLDER / "embed.table_VD", run / MODEL_FOLDER / "lm.head"),
            edit_tree(
                run, lambda tree: tree.update(x={"key_metadata": [{"key": "lm"}, {"key": "head"}]})
            ),
        ),
        r"model: tensor lm/head is no parameter of this model",
    ),
    "array's folder missing": (
        lambda run: shutil.rmtree(run / MODEL_FOLDER / "embed.table_VD"),
        r"embed/table_VD is not as it was saved: .*embed.table_VD/zarr.json\" does not exist",
    ),
    "arrays swapped": (
        swap,
        r"tensor layers/moe/w_gate_EDF/values is \(2, 4, 48, 32\) there and \(2, 4, 32, 48\)",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_refused(copy, damage):
    do, message = DAMAGE[damage]
    do(copy)
    with pytest.raises(CheckpointError, match=r"copy/checkpoints/0: (lacks|has)"):
        OrbaxSource(copy)
    # Also where the list says nothing of it.
    file_list.commit(copy / "checkpoints" / "0", 0)
    with pytest.raises(CheckpointError, match=message):
        OrbaxSource(copy)


def test_damaged_shards_are_refused_when_read(copy):
    source = OrbaxSource(copy)
    array = copy / MODEL_FOLDER / "layers.moe.w_gate_EDF.values"
    (array / "c.1.2.0.0").unlink()
    os.truncate(array / "c.1.3.0.0", 1000)
    source.read(GATE, (slice(0, 1), *source.tensors[GATE].full_part[1:]))
    for expert in (2, 3):
        part = (slice(1, 2), slice(expert, expert + 1), slice(0, 32), slice(0, 48))
        message = rf"w_gate_EDF/values is not as it was saved: .*c\.1\.{expert}\.0\.0"
        with pytest.raises(DamageError, match=message):
            source.read(GATE, part)


def test_any_bit_of_a_chunk_is_noticed(copy, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "trained")
    rng = np.random.default_rng(1)
    for file in (
        copy / MODEL_FOLDER / "layers.moe.w_gate_EDF.values" / "c.1.2.0.0",
        *(tmp_path / "trained" / "checkpoints" / "20" / "model").glob("*/values/*"),
    ):
        source, content = (
            OrbaxSource(tmp_path / file.relative_to(tmp_path).parts[0]),
            file.read_bytes(),
        )
        for bit in rng.choice(8 * len(content), 8, replace=False):
            damaged = bytearray(content)
            damaged[bit // 8] ^= 1 << bit % 8
            file.write_bytes(damaged)
            with pytest.raises(DamageError, match=r"tensor .* is not as it was saved: "):
                [source.read(name, spec.full_part) for name, spec in source.tensors.items()]
        file.write_bytes(content)


def test_lost_data_of_a_training_checkpoint_is_refused(tmp_path, trained):
    shutil.copytree(trained, tmp_path / "copy")
    for file in (tmp_path / "copy" / "checkpoints" / "20" / "model").glob("**/d/*"):
        file.unlink()
    with pytest.raises(CheckpointError, match=r"20: lacks the file model/d/"):
        OrbaxSource(tmp_path / "copy")


def test_another_model_is_refused(imported, trained):
    with pytest.raises(CheckpointError, match=r"tensor layers/moe/w_\w+/values is .* there and"):
        OrbaxSource(imported, dataclasses.replace(TINY, moe=dataclasses.replace(TINY.moe, dim=96)))
    with pytest.raises(CheckpointError, match=r"20/model: tensor embed/table_VD is \(96, 32\)"):
        OrbaxSource(trained, dataclasses.replace(TINY, vocab_size=128))


def test_unfinished_checkpoints_are_no_checkpoints(tmp_path, copy):
    (copy / "checkpoints" / "0").rename(copy / "checkpoints" / "0.orbax-checkpoint-tmp-1")
    with pytest.raises(CheckpointError, match=r"copy/checkpoints: has no finished checkpoint"):
        OrbaxSource(copy)
    with pytest.raises(CheckpointError, match=r"tmp-1: is a checkpoint that was not finished"):
        OrbaxSource(copy / "checkpoints" / "0.orbax-checkpoint-tmp-1")
    (tmp_path / "started" / ".import").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"started: is an unfinished import"):
        OrbaxSource(tmp_path / "started")
    with pytest.raises(CheckpointError, match=r"nowhere: cannot be read: No such file"):
        OrbaxSource(tmp_path / "nowhere")


@pytest.mark.parametrize("name", HANDLERS.values())
def test_handlers_that_imports_name_are_classes_of_the_installed_orbax(name):
    module, _, cls = name.rpartition(".")
    assert isinstance(getattr(importlib.import_module(module), cls), type)
