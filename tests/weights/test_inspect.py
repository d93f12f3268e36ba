"""`grok inspect`: what is at a path, the same keys for every format, and what is missing."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from grok.cli.main import main
from grok.config import AttentionConfig, DataConfig, ModelConfig, MoEConfig, RopeConfig, RunConfig
from grok.config.load import flatten, from_dict, load_config
from grok.config.text import to_yaml
from grok.errors import CheckpointError
from grok.model.params import num_active_parameters, num_parameters
from grok.weights.huggingface.export import export_huggingface
from grok.weights.importing.importer import import_weights
from grok.weights.tools import inspection
from grok.weights.tools.inspection import preset_of
from grok.weights.xai.source import ReleaseSource
from tests.fixtures.model_weights import MATRICES, shapes_of
from tests.fixtures.random_weights import RandomSource
from tests.fixtures.release_writer import write_release
from tests.model import golden

RELEASE = golden.FOLDER / "pub_b" / "ckpt-0"
CONFIG = golden.config("pub_b", "float32")
RUN = RunConfig(model=CONFIG, data=DataConfig(sequence_length=32))
KEYS = [
    *("path", "format", "dtype", "complete", "problems", "tensors", "parameters", "bytes"),
    *("config", "assumed", "preset", "step", "checksums", "imported_from", "origin"),
    "adapters",
]
# Heads as wide as the release's, so that the files alone tell all sizes.
WIDE = ModelConfig(
    vocab_size=24,
    num_layers=2,
    embed_dim=16,
    moe=MoEConfig(dim=24, num_experts=3),
    attention=AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=128),
)


@pytest.fixture(scope="module")
def formats(tmp_path_factory) -> Path:
    """pub_b as an int8 checkpoint of ours and as a Hugging Face folder, and its config."""
    folder = tmp_path_factory.mktemp("formats")
    source = ReleaseSource(RELEASE, CONFIG)
    import_weights(source, folder / "orbax", RUN)
    export_huggingface(source, folder / "huggingface", "bfloat16", 200_000)
    (folder / "config.yaml").write_text(to_yaml(RUN))
    return folder


@pytest.fixture
def release(tmp_path) -> Path:
    """A release of WIDE, for tests to damage."""
    write_release(RandomSource(WIDE), tmp_path / "ckpt-0")
    return tmp_path / "ckpt-0"


def inspect(*arguments) -> Result:
    return CliRunner().invoke(main, ["inspect", *map(str, arguments)])


def as_json(*arguments, code: int = 0) -> dict:
    result = inspect(*arguments, "--json")
    assert (result.exit_code, result.stderr) == (code, "")
    found = json.loads(result.stdout)
    assert list(found) == KEYS
    assert found["complete"] == (not found["problems"]) == (code == 0)
    for tensor in found["tensors"]:
        assert list(tensor) == ["name", "shape", "dtype", "groups", "bytes"]
    return found


# ---- what is complete


@pytest.mark.parametrize("form", ["xai", "orbax", "huggingface"])
def test_every_format_has_the_same_tensors(formats, form):
    if form == "xai":
        found = as_json(RELEASE, "--config", formats / "config.yaml")
    else:
        found = as_json(formats / form)
    assert found["format"] == form
    assert {t["name"]: tuple(t["shape"]) for t in found["tensors"]} == shapes_of(CONFIG)
    kind = "bfloat16" if form == "huggingface" else "int8"
    assert found["dtype"] == kind
    groups = {t["name"]: t["groups"] for t in found["tensors"]}
    kinds = {t["name"]: t["dtype"] for t in found["tensors"]}
    if kind == "int8":
        assert kinds == {n: "int8" if n in MATRICES else "float32" for n in kinds}
        assert groups["layers/moe/w_down_EFD"] == 8
        assert groups["layers/moe/w_up_EDF"] == 1
        assert groups["layers/moe/router_DE"] is None
        # Values, and scales of two bytes: 2 layers, 8 experts, 8 groups, 96 columns.
        sizes = {t["name"]: t["bytes"] for t in found["tensors"]}
        assert sizes["layers/moe/w_down_EFD"] == 2 * 8 * 512 * 96 + 2 * (2 * 8 * 8 * 96)
    else:
        assert set(kinds.values()) == {"bfloat16"}
        assert set(groups.values()) == {None}
        assert found["bytes"] == 2 * num_parameters(CONFIG)
    assert found["bytes"] == sum(t["bytes"] for t in found["tensors"])
    assert found["parameters"] == {
        "total": num_parameters(CONFIG),
        "active": num_active_parameters(CONFIG),
        "active_without_embedding": num_active_parameters(CONFIG) - 384 * 96,
    }
    stored = dataclasses.replace(
        from_dict(found["config"], config_type=ModelConfig), param_dtype="float32"
    )
    how = {name: getattr(stored, name) for name in ("compute_dtype", "remat")}
    assert stored == dataclasses.replace(CONFIG, **how)


def test_what_an_import_kept(formats):
    found = as_json(formats / "orbax")
    assert found["step"] == 0
    assert found["checksums"] == 2 + 12 * CONFIG.num_layers
    assert found["imported_from"] == str(RELEASE)
    assert found["assumed"] == []
    assert as_json(formats / "orbax" / "checkpoints" / "0")["config"] == found["config"]
    text = inspect(formats / "orbax").stdout
    assert f"imported    from {RELEASE}, 26 checksums" in text


def test_what_a_release_does_not_say(release):
    found = as_json(release)
    fields = {name for name, _ in flatten(found["config"]) if name not in found["assumed"]}
    assert fields == {"vocab_size", "num_layers", "embed_dim", "moe.dim", "moe.num_experts"}
    assert from_dict(found["config"], config_type=ModelConfig) == WIDE
    text = inspect(release).stdout
    origins = {line.split()[0]: line for line in text.splitlines() if line.split()}
    assert origins["moe.dim"].split() == ["moe.dim", "24", "files"]
    assert origins["attention.head_dim"].split() == ["attention.head_dim", "128", "assumed"]
    assert origins["attention.num_heads"].endswith("files, with this head_dim")


def test_fields_that_were_given(formats):
    text = inspect(RELEASE, "--config", formats / "config.yaml").stdout
    origins = {line.split()[0]: line.split()[-1] for line in text.splitlines() if line.split()}
    assert (origins["moe.dim"], origins["attention.head_dim"]) == ("files", "--config")
    assert as_json(RELEASE, "--config", formats / "config.yaml")["assumed"] == []


def test_fields_that_config_json_does_not_have(formats, tmp_path):
    shutil.copytree(formats / "huggingface", tmp_path / "hf")
    file = tmp_path / "hf" / "config.json"
    data = json.loads(file.read_text())
    del data["rope_theta"]
    file.write_text(json.dumps(data))
    found = as_json(tmp_path / "hf")
    assumed = ["param_dtype", "embedding_dtype", "compute_dtype", "matmul_dtype", "remat"]
    assert found["assumed"] == ["attention.rope.theta", *assumed]
    assert found["step"] is found["checksums"] is found["imported_from"] is None


def test_presets(release, tmp_path, monkeypatch):
    configs = tmp_path / "configs"
    configs.mkdir()
    files = lambda: {file.stem: file for file in configs.glob("*.yaml")}  # noqa: E731
    monkeypatch.setattr(inspection, "presets", files)
    assert as_json(release)["preset"] is None
    run = RunConfig(model=WIDE, data=DataConfig(sequence_length=32))
    (configs / "wide.yaml").write_text(to_yaml(run))
    # As many numbers in queries and keys, in other heads.
    narrow = dataclasses.replace(
        WIDE,
        attention=dataclasses.replace(
            WIDE.attention,
            num_heads=4,
            num_kv_heads=2,
            head_dim=64,
            logit_scale=1 / 8,
        ),
    )
    (configs / "narrow.yaml").write_text(to_yaml(dataclasses.replace(run, model=narrow)))
    assert as_json(release)["preset"] == "wide"
    text = inspect(release).stdout
    assert "preset      wide\n" in text
    assert "shapes are those of preset narrow (--config narrow)" in text
    assert "are those of preset wide" not in text
    # Of what has arrived in part the files may be those of several; a config says of which.
    for path in sorted(release.iterdir())[2:]:
        path.unlink()
    text = inspect(release).stdout
    assert "shapes are those of preset wide (--config wide)" in text
    assert "12 of 14 files are missing" in text
    text = inspect(release, "--config", configs / "wide.yaml").stdout
    assert "24 of 26 files are missing" in text


def test_grok_1_is_known_by_its_config():
    model = load_config("grok-1").model
    assert preset_of(model) == "grok-1"
    # A release says no multipliers: these are computed, and differ in the last bit.
    implied = ModelConfig(
        **{name: getattr(model, name) for name in ("vocab_size", "num_layers", "embed_dim")},
        moe=MoEConfig(dim=model.moe.dim),
        attention=AttentionConfig(num_heads=48, num_kv_heads=8, head_dim=128),
    )
    assert preset_of(implied) == "grok-1"
    assert (
        preset_of(
            dataclasses.replace(
                model, attention=dataclasses.replace(model.attention, rope=RopeConfig(theta=5000.0))
            )
        )
        is None
    )


def test_text_is_the_same_in_a_pipe_and_in_no_color(release, monkeypatch):
    plain = inspect(release).stdout
    assert "\x1b" not in plain
    assert plain.startswith(f"{release}\n  format      xai (ckpt-0)\n")
    rows = [line.split() for line in plain.splitlines()]
    assert ["layers/moe/w_down_EFD", "2x3x24x16", "int8,", "8", "groups", "3.8", "KiB"] in rows
    monkeypatch.setenv("COLUMNS", "40")
    assert inspect(release).stdout == plain


# ---- what is not


def test_missing_files_of_a_release(release):
    for number in (5, 16, 25):
        (release / f"tensor{number:05d}_000").unlink()
    (release / "tensor00003_000").write_bytes(b"\x80\x04.")
    found = as_json(release, code=2)
    assert found["format"] == "xai"
    assert found["config"] is found["parameters"] is found["preset"] is None
    _, missing, damaged = found["problems"]
    assert missing == (
        "3 of 26 files are missing: tensor00005_000 (layers/attention/w_key_DKH, layer 0), "
        "tensor00016_000 (layers/moe/w_up_EDF, layer 1), "
        "tensor00025_000 (layers/moe/router_DE, layer 1)."
    )
    assert damaged.startswith(f"{release}/tensor00003_000: ")
    layers = {t["name"]: t["shape"][0] for t in found["tensors"] if t["name"].startswith("layers")}
    assert {name for name, count in layers.items() if count == 1} == {
        "layers/attention/w_key_DKH",
        "layers/moe/w_up_EDF",
        "layers/moe/w_down_EFD",
        "layers/moe/router_DE",
    }
    text = inspect(release)
    assert text.exit_code == 2
    assert missing in text.stdout


def test_a_release_that_has_just_begun_to_arrive(release):
    for path in sorted(release.iterdir())[2:]:
        path.unlink()
    found = as_json(release, code=2)
    assert [t["name"] for t in found["tensors"]] == ["embed/table_VD", "final_norm/scale_D"]
    assert found["dtype"] is None


def test_a_release_that_no_config_can_be_told_of():
    found = as_json(RELEASE, code=2)
    assert len(found["problems"]) == 1
    assert "head_dim" in found["problems"][0]
    assert len(found["tensors"]) == 14


def test_missing_files_of_a_hugging_face_folder(formats, tmp_path):
    shutil.copytree(formats / "huggingface", tmp_path / "hf")
    files = sorted((tmp_path / "hf").glob("*.safetensors"))
    for path in files[1:8]:
        path.unlink()
    found = as_json(tmp_path / "hf", code=2)
    assert found["format"] == "huggingface"
    listed = ", ".join(path.name for path in files[1:6])
    assert found["problems"][1] == (f"7 of {len(files)} files are missing: {listed}, and 2 more.")


def test_an_import_that_was_not_finished(tmp_path):
    class Failing(RandomSource):
        def read(self, name, part):
            if name == "layers/moe/w_up_EDF" and part[0].start == 1:
                raise CheckpointError("the disk is gone.")
            return super().read(name, part)

    run = RunConfig(model=WIDE, data=DataConfig(sequence_length=32))
    with pytest.raises(CheckpointError, match="the disk is gone"):
        import_weights(Failing(WIDE, dtype="float32"), tmp_path / "run", run)
    found = as_json(tmp_path / "run", code=2)
    assert found["format"] == "orbax"
    total = 4 * num_parameters(WIDE)
    assert found["problems"][-1] == f"{found['bytes']:,} of {total:,} bytes are imported."
    assert 0 < found["bytes"] < total
    shapes = {t["name"]: tuple(t["shape"]) for t in found["tensors"]}
    assert shapes["embed/table_VD"] == (24, 16)
    assert "layers/moe/w_down_EFD" not in shapes


def test_a_checkpoint_that_is_damaged(formats, tmp_path):
    shutil.copytree(formats / "orbax", tmp_path / "run")
    (tmp_path / "run/checkpoints/0/model/layers.moe.router_DE/zarr.json").unlink()
    found = as_json(tmp_path / "run", code=2)
    assert found["format"] == "orbax"
    assert "lacks the file model/layers.moe.router_DE/zarr.json" in found["problems"][0]


def test_a_file_in_place_of_a_folder(formats, tmp_path):
    (tmp_path / "notes.txt").touch()
    file = next((formats / "huggingface").glob("*.safetensors"))
    for path, right in ((tmp_path / "notes.txt", "that of a run, a ckpt-0 folder"), (file, "lies")):
        result = inspect(path)
        assert result.exit_code == 2
        assert f"{path}: is a file, and weights are a folder" in result.stderr
        assert right in result.stderr


def test_runs_beside_a_path_that_is_not_there_are_named(tmp_path):
    for name in ("quickstart", "tuned"):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
    (tmp_path / "notes").mkdir()
    problem = "cannot be read: No such file or directory"
    assert f"{problem}; {tmp_path}/tuned would work." in inspect(tmp_path / "tunned").stderr
    here = f"{tmp_path}/quickstart and {tmp_path}/tuned, which may be what you mean."
    assert here in inspect(tmp_path).stderr


def test_nothing_at_all(tmp_path):
    result = inspect(tmp_path / "nowhere")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == (
        f"error: {tmp_path}/nowhere: cannot be read: No such file or directory; the folder of a "
        "run, ckpt-0, a Hugging Face folder or hf://ORG/NAME would work.\n"
    )
    found = as_json(tmp_path / "nowhere", code=2)
    assert found["format"] is None
    assert found["problems"] == [result.stderr.removeprefix("error: ").rstrip()]
    (tmp_path / "notes.txt").touch()
    assert "is neither" in inspect(tmp_path).stderr
