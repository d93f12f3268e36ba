"""Models by name, from a stand-in of the hub on this machine."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from grok import storage
from grok.cli.main import main
from grok.config.infer import InferConfig
from grok.config.load import load_config
from grok.data.chat.template import find_template
from grok.data.tokenizers import load_tokenizer
from grok.errors import CheckpointError
from grok.infer.loader import ServedModel, config_of, find_tokenizer
from grok.train.init_from import open_initial
from grok.weights.detect import open_source
from grok.weights.huggingface.export import export_huggingface
from grok.weights.source import Source
from tests.fixtures.hub_server import TOKEN, HubServer, forget, hub_server, hub_settings
from tests.fixtures.random_weights import RandomSource

FILES = {
    "config.json": b"{}",
    "tokenizer.model": b"pieces",
    "chat_template.jinja": b"{{ messages }}",
    "model-1.safetensors": b"1" * 100,
    "model-2.safetensors": b"2" * 200,
    "consolidated.safetensors": b"3" * 300,
    "modeling.py": b"import os",
    "pytorch_model.bin": b"pickle",
    "onnx/config.json": b"{}",
    "README.md": b"# A model",
}


@pytest.fixture(autouse=True)
def _no_token(monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)


@pytest.fixture
def running():
    with hub_server() as pair:
        yield pair


@pytest.fixture
def hub(running, tmp_path) -> HubServer:
    server, address = running
    with hub_settings(address, str(tmp_path / "cache")):
        yield server


@pytest.fixture(scope="module")
def exported(tiny_run, tmp_path_factory) -> Path:
    """A model's folder with a tokenizer."""
    folder = tmp_path_factory.mktemp("exported") / "model"
    source = RandomSource(tiny_run.model, dtype="float32")
    export_huggingface(source, folder, "float32", shard_bytes=200_000)
    shutil.copyfile(tiny_run.data.tokenizer, folder / "tokenizer.model")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def values(source: Source) -> dict[str, np.ndarray]:
    return {name: source.read(name, spec.full_part) for name, spec in source.tensors.items()}


def test_what_is_listed_and_what_is_fetched(hub):
    hub.add("org/model", FILES)
    listed = storage.list_files("hf://org/model")
    assert listed["model-2.safetensors"] == 200
    assert listed["onnx"] is None
    small = {"config.json", "tokenizer.model", "chat_template.jinja"}
    assert hub.fetched() == small
    assert storage.read_bytes("hf://org/model/model-1.safetensors") == b"1" * 100
    storage.prefetch("hf://org/model", ["model-1.safetensors", "model-2.safetensors"])
    out = np.zeros(4, np.uint8)
    storage.read_ranges("hf://org/model/model-2.safetensors", [10, 20], memoryview(out))
    assert bytes(out) == b"2222"
    assert hub.fetched() == small | {"model-1.safetensors", "model-2.safetensors"}
    assert storage.exists("hf://org/model/modeling.py")
    for name in ("modeling.py", "pytorch_model.bin", "onnx/config.json", "README.md"):
        with pytest.raises(CheckpointError, match=r"only weights .*are fetched"):
            storage.read_bytes(f"hf://org/model/{name}", CheckpointError)
    assert hub.fetched() == small | {"model-1.safetensors", "model-2.safetensors"}


def test_a_file_is_fetched_once(hub):
    hub.add("org/model", FILES)
    for _ in range(2):
        storage.read_bytes("hf://org/model/model-1.safetensors")
        forget()
    assert sum(text.startswith("GET") and "model-1" in text for text in hub.requests) == 1


def test_revisions(hub):
    first = hub.add("org/model", {"config.json": b'{"a": 1}'})
    hub.repositories["org/model"].refs |= {"v1": first, "refs/pr/7": first}
    second = hub.add("org/model", {"config.json": b'{"a": 2}'})
    for revision, content in {"": 2, "@main": 2, "@v1": 1, f"@{first}": 1, "@refs/pr/7": 1}.items():
        data = storage.read_bytes(f"hf://org/model{revision}/config.json")
        assert data == b'{"a": %d}' % content, revision
    assert storage.pinned("hf://org/model") == f"hf://org/model@{second}"
    assert storage.pinned("hf://org/model@v1") == f"hf://org/model@{first}"
    assert storage.pinned("gs://bucket/x") == "gs://bucket/x"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hf://org/none", "has no model org/none, or it is private: `hf auth login`"),
        ("hf://org/private", "has no model org/private, or it is private: `hf auth login`"),
        ("hf://org/gated", "must be granted at http.*/org/gated by its owners.*`hf auth login`"),
        ("hf://org/model@v9", "org/model has no revision v9; a branch, a tag or a commit"),
        ("hf://org", "no name on the hub; hf://ORG/NAME or hf://ORG/NAME@REVISION is one"),
        ("hf://a b/c", "no name on the hub"),
        ("hf://org/model--x", "--"),
        ("hf://org/model/nothing.json", "No such file or directory|Not a directory"),
    ],
)
def test_what_cannot_be_fetched_is_one_sentence(hub, name, message):
    hub.add("org/model", FILES)
    hub.add("org/private", FILES, private=True)
    hub.add("org/gated", FILES, gated=True)
    result = CliRunner().invoke(main, ["inspect", name])
    assert result.exit_code == 2, result.output
    with pytest.raises(CheckpointError, match=message) as error:
        open_source(name)
    assert str(error.value).startswith(name)
    assert "\n" not in str(error.value)


def test_a_token_opens_what_is_gated_or_private(hub, monkeypatch):
    hub.add("org/private", FILES, private=True)
    hub.add("org/gated", FILES, gated=True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for name in ("private", "gated"):
        assert storage.read_bytes(f"hf://org/{name}/model-1.safetensors") == b"1" * 100


def test_without_the_hub_the_cache_answers(running, tmp_path):
    server, address = running
    server.add("org/model", FILES)
    with hub_settings(address, str(tmp_path)):
        storage.read_bytes("hf://org/model/model-1.safetensors")
    count = len(server.requests)
    for endpoint, offline in ((address, True), ("http://127.0.0.1:1", False)):
        with hub_settings(endpoint, str(tmp_path), offline):
            assert storage.list_files("hf://org/model")["model-2.safetensors"] == 200
            assert storage.read_bytes("hf://org/model/model-1.safetensors") == b"1" * 100
    with hub_settings(address, str(tmp_path), offline=True):
        with pytest.raises(CheckpointError, match=r"HF_HUB_OFFLINE is set, and the cache .* not"):
            storage.read_bytes("hf://org/model/model-2.safetensors", CheckpointError)
        with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE is set"):
            open_source("hf://org/other")
    with (
        hub_settings("http://127.0.0.1:1", str(tmp_path)),
        pytest.raises(CheckpointError, match=r"127.0.0.1:1 cannot be reached .*and the cache"),
    ):
        open_source("hf://org/other")
    assert len(server.requests) == count


def test_weights_config_and_tokenizer_by_name(hub, exported, tiny_run, tmp_path):
    commit = hub.add("org/model", contents(exported))
    name = "hf://org/model"
    there, here = open_source(name), open_source(exported)
    for tensor, array in values(here).items():
        np.testing.assert_array_equal(values(there)[tensor], array, err_msg=tensor)
    config = config_of(name, None, ())
    assert config.model == config_of(str(exported), None, ()).model
    file = find_tokenizer(name, None, config)
    assert storage.read_bytes(file) == (exported / "tokenizer.model").read_bytes()
    initial = open_initial(name, here.config)
    assert initial.identity["path"] == f"hf://org/model@{commit}"
    out = str(tmp_path / "imported")
    for command in (
        ["inspect", name],
        ["verify", name, str(exported)],
        ["import", "hf", name, out, "--dtype", "float32"],
        ["verify", out, name],
        ["export", "hf", name, str(tmp_path / "again"), "--dtype", "float32"],
        ["verify", str(tmp_path / "again"), name],
    ):
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 0, (command, result.output)
    assert load_config(f"{out}/config.yaml").model.vocab_size == tiny_run.model.vocab_size
    assert not any(file.endswith((".py", ".md")) for file in hub.fetched())


def test_nothing_is_written_to_a_name(hub, exported):
    result = CliRunner().invoke(main, ["export", "hf", str(exported), "hf://org/model"])
    assert result.exit_code == 2
    assert "goes to a local folder" in result.output
    with pytest.raises(OSError, match="only read; `grok export hf SRC DST --push ORG/NAME`"):
        storage.write_bytes("hf://org/model/config.json", b"{}")


READ = """
import sys
from grok import storage
storage.prefetch(sys.argv[1], ["model-1.safetensors", "model-2.safetensors"])
print(len(storage.read_bytes(sys.argv[1] + "/model-2.safetensors")))
"""


def test_two_processes_with_the_environment_of_a_user(running, tmp_path):
    server, address = running
    server.add("org/model", FILES)
    environment = {name: text for name, text in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-c", READ, "hf://org/model"]
    options = {"env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    processes = [subprocess.Popen(command, text=True, **options) for _ in range(2)]
    for process in processes:
        out, error = process.communicate(timeout=120)
        assert out == "200\n", error
    for file in ("model-1.safetensors", "model-2.safetensors"):
        assert sum(text.startswith("GET") and file in text for text in server.requests) == 1


# The hub's client hands the HTTP library a file in a way that the library is giving up.
uploads = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


def push(source: Path, folder: Path, *options: str):
    command = ["export", "hf", str(source), str(folder), "--dtype", "float32", *options]
    return CliRunner().invoke(main, [*command, "--push", "org/mine"])


@uploads
def test_push_makes_a_private_model_that_reads_back(hub, exported, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    result = push(exported, folder)
    assert result.exit_code == 2
    assert "hf://org/mine: cannot be uploaded" in result.output
    assert "`hf auth login`" in result.output
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.failing = r"POST /api/models/org/mine/commit"
    assert push(exported, folder).exit_code == 2
    hub.failing = ""
    uploads = [text for text in hub.requests if text.startswith("PUT")]
    result = push(exported, folder)
    assert result.exit_code == 0, result.output
    assert "org/mine: uploaded" in result.output
    assert hub.repositories["org/mine"].private
    # The second call found the large files there.
    assert [text for text in hub.requests if text.startswith("PUT")] == uploads
    np.testing.assert_equal(values(open_source("hf://org/mine")), values(open_source(exported)))


@uploads
def test_push_of_other_weights_does_not_take_the_folder_for_theirs(
    hub, exported, tiny_run, tmp_path, monkeypatch
):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    other = tmp_path / "other"
    export_huggingface(RandomSource(tiny_run.model, dtype="float32", seed=9), other, "float32")
    result = push(exported, other, "--public")
    assert result.exit_code == 2
    assert "is not empty" in result.output
    result = push(exported, tmp_path / "out", "--public")
    assert result.exit_code == 0, (result.output, hub.requests)
    assert not hub.repositories["org/mine"].private


@pytest.mark.parametrize("name", ["mine", "org/mine/x", "org/mine@v1", "hf://org/mine"])
def test_push_to_a_bad_name_is_refused_before_anything_is_written(hub, exported, tmp_path, name):
    command = ["export", "hf", str(exported), str(tmp_path / "out"), "--push", name]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 2
    assert "ORG/NAME is one" in result.output
    assert not (tmp_path / "out").exists()


def test_data_is_prepared_by_the_tokenizer_and_template_of_a_name(hub, exported, tmp_path):
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    hub.add("org/model", {**contents(exported), "chat_template.jinja": template.encode()})
    talk = [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"m": talk}))
    out = tmp_path / "out"
    command = ["data", "prepare", str(tmp_path / "rows.jsonl"), "--out", str(out), "--workers", "1"]
    command += ["--tokenizer", "hf://org/model", "--messages-field", "m"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    assert (out / "chat_template.jinja").read_text() == template
    tokenizer = load_tokenizer("hf://org/model")
    assert find_template("hf://org/model", tokenizer).text == template
    # Only the tokenizer was needed.
    assert not any(name.endswith(".safetensors") for name in hub.fetched())


def test_a_template_goes_into_imports_and_exports(hub, exported, tmp_path):
    files = {**contents(exported), "chat_template.jinja": b"{{ messages }}"}
    hub.add("org/model", files)
    steps = {
        "imported": ["import", "hf", "hf://org/model", "--dtype", "float32"],
        "params": ["export", "params", str(tmp_path / "imported")],
        "again": ["export", "hf", str(tmp_path / "params"), "--dtype", "float32"],
    }
    for name, (command, kind, source, *options) in steps.items():
        folder = tmp_path / name
        result = CliRunner().invoke(main, [command, kind, source, str(folder), *options])
        assert result.exit_code == 0, result.output
        assert (folder / "chat_template.jinja").read_bytes() == b"{{ messages }}", name
        assert (folder / "tokenizer.model").read_bytes() == files["tokenizer.model"]


@uploads
def test_a_model_in_files_of_ranks_is_fetched_and_pushed(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    golden = Path(__file__).parent / "golden" / "families" / "grok2"
    hub.add("org/model", contents(golden))
    command = ["export", "hf", "hf://org/model", str(tmp_path / "out"), "--dtype", "bfloat16"]
    hub.failing = r"POST /api/models/org/mine/commit"
    assert CliRunner().invoke(main, [*command, "--push", "org/mine"]).exit_code == 2
    hub.failing = ""
    result = CliRunner().invoke(main, [*command, "--push", "org/mine"])
    assert result.exit_code == 0, result.output
    ranks = {name for name in contents(golden) if name.endswith(".safetensors")}
    assert ranks <= hub.fetched()
    for names in (["hf://org/mine", str(golden)], ["hf://org/mine", "hf://org/model"]):
        result = CliRunner().invoke(main, ["verify", *names])
        assert result.exit_code == 0, result.output


def test_a_model_is_served_and_sampled_by_name(hub, exported):
    hub.add("org/model", contents(exported))
    there = ServedModel(InferConfig(weights="hf://org/model", chat_template="grok-1"))
    here = ServedModel(InferConfig(weights=str(exported), chat_template="grok-1"))
    assert there.identity() == here.identity()
    command = ["sample", "--prompt", "The number", "--max-tokens", "4", "--temperature", "0"]
    texts = []
    for weights in ("hf://org/model", str(exported)):
        result = CliRunner().invoke(main, [*command, weights])
        assert result.exit_code == 0, result.output
        texts.append(result.output)
    assert texts[0] == texts[1]
