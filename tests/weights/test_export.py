"""Parameters alone: as they are in the run's checkpoint, in a folder that everything reads."""

import numpy as np
import pytest
from click.testing import CliRunner

from grok.checkpoint.manager import MODEL, OPTIMIZER, Checkpoints
from grok.checkpoint.retention import RetentionPolicy
from grok.cli.main import main
from grok.config.load import load_config, to_dict
from grok.data.tokenizers import load_tokenizer
from grok.errors import CheckpointError
from grok.infer.loader import find_tokenizer, make_mesh
from grok.model.params import param_specs
from grok.weights.cast import converted
from grok.weights.detect import open_source
from grok.weights.importing.importer import export_params
from grok.weights.load import load, put_on_mesh
from tests.fixtures.random_weights import RandomSource


@pytest.fixture(scope="module")
def trained(tiny_run, tmp_path_factory):
    """The folder of a run with one checkpoint, of a random model, and a tokenizer."""
    folder = tmp_path_factory.mktemp("trained")
    model = put_on_mesh(RandomSource(tiny_run.model, dtype="float32"))
    checkpoints = Checkpoints(folder / "checkpoints", RetentionPolicy(1))
    state = {"moments": np.ones((64, 1024), np.float32)}
    checkpoints.save(
        7,
        {MODEL: model, OPTIMIZER: state},
        {"config": to_dict(tiny_run)},
        specs=param_specs(tiny_run.model),
    )
    checkpoints.close()
    with open(tiny_run.data.tokenizer, "rb") as file:
        (folder / "tokenizer.model").write_bytes(file.read())
    return folder


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_parameters_are_those_of_the_run(trained, tmp_path, dtype):
    done = export_params(trained, tmp_path / "out", dtype)
    stored = converted(open_source(trained), dtype or "float32")
    exported = open_source(tmp_path / "out")
    assert exported.dtype == stored.dtype
    for name, spec in stored.tensors.items():
        values = stored.read(name, spec.full_part)
        np.testing.assert_array_equal(exported.read(name, spec.full_part), values, err_msg=name)
    assert not (done.checkpoint / OPTIMIZER).exists()


def test_the_command_and_those_that_read_its_folder(trained, tmp_path):
    out = str(tmp_path / "out")
    result = CliRunner().invoke(main, ["export", "params", str(trained), out, "--dtype", "int8"])
    assert result.exit_code == 0, result.output
    assert "int8" in result.output
    for command in (["verify", out], ["inspect", out], ["export", "hf", out, f"{out}-hf"]):
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 0, result.output
    config = load_config(f"{out}/config.yaml")
    mesh = make_mesh(config.mesh, config.model)
    model = load(tmp_path / "out", config.model, mesh, config.model.param_dtype)
    assert model.config.param_dtype == "int8"
    assert load_tokenizer(find_tokenizer(str(out), None, config)).vocab_size == 320


def test_what_cannot_be_exported(trained, tmp_path):
    with pytest.raises(CheckpointError, match=r"is not empty \(it has checkpoints"):
        export_params(trained, trained)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match="has no finished checkpoint"):
        export_params(tmp_path, tmp_path / "out")
