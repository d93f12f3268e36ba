"""Exported folders in the transformers library, which loads them and gives our logits; and folders
that it saved itself, read here. Each version is installed into an environment of its own, from the
package index: some 5 GB of disk with torch, on the CPU.

pytest -n 0 -m prove -s tests/prove/test_transformers.py
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from grok.weights.detect import open_source
from grok.weights.huggingface.export import export_huggingface
from grok.weights.huggingface.source import HuggingFaceSource
from grok.weights.load import load
from tests.fixtures.families import FOLDER, tree
from tests.fixtures.models import replace_keys
from tests.fixtures.random_weights import RandomSource

pytestmark = pytest.mark.prove
ROOT = Path(__file__).parents[2]
FAMILIES = ("llama2", "llama31", "mistral", "mixtral")
# Of logits whose deviation is 2: both round a float32 product of at most 112 terms.
TOLERANCE = 2e-4


@pytest.fixture(scope="module", params=["transformers<5", "transformers>=5"])
def python(request, tmp_path_factory) -> Path:
    """The interpreter of an environment with this version of transformers."""
    uv = shutil.which("uv", path=f"{os.environ['PATH']}:{ROOT / '.uv' / 'bin'}")
    if uv is None:
        pytest.skip("uv is not there; `make env` puts it into .uv/")
    folder = tmp_path_factory.mktemp("transformers")
    python = folder / "bin" / "python"
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, folder], check=True)
    packages = ["torch", request.param]
    subprocess.run([uv, "pip", "install", "--quiet", "--python", python, *packages], check=True)
    yield python
    shutil.rmtree(folder)


SCRIPT = """
import json, sys
import numpy as np
import torch, transformers
from transformers import AutoModelForCausalLM

folder, prompts, out = sys.argv[1:]
model, info = AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
)
model.eval()
logits = {}
with torch.no_grad(), np.load(prompts) as tokens:
    for name, prompt in tokens.items():
        rows = torch.from_numpy(prompt[None].astype(np.int64))
        logits[name] = model(rows).logits[0].numpy()
np.savez(f"{out}/logits.npz", **logits)
model.to(torch.bfloat16).save_pretrained(f"{out}/saved")
keys = {name: sorted(map(str, found)) for name, found in info.items() if found}
print(json.dumps({"version": transformers.__version__, "problems": keys}))
"""


def run_transformers(python: Path, folder: Path, prompts: Path, out: Path) -> dict:
    """What transformers computes of the model in `folder`: logits by prompt."""
    out.mkdir()
    env = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [python, "-c", SCRIPT, folder, prompts, out], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["problems"] == {}, report
    with np.load(out / "logits.npz") as logits:
        return dict(logits) | {"version": report["version"]}


def our_logits(folder: Path, tokens: np.ndarray) -> np.ndarray:
    config = open_source(folder).config
    model = load(folder, dataclasses.replace(config, compute_dtype="float32"), dtype="float32")
    return np.asarray(model(tokens[None]))[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_an_exported_folder_gives_our_logits(python, tmp_path, family):
    source = HuggingFaceSource(FOLDER / family)
    export_huggingface(source, tmp_path / "hf", source.dtype)
    prompts = FOLDER / family / "inputs.npz"
    theirs = run_transformers(python, tmp_path / "hf", prompts, tmp_path / "out")
    errors = []
    with np.load(prompts) as tokens, np.load(FOLDER / family / "outputs.npz") as golden:
        for name, prompt in tokens.items():
            ours = our_logits(tmp_path / "hf", prompt)
            errors.append(np.abs(ours - theirs[name]).max())
            stored = golden[name.replace("prompt", "logits")]
            np.testing.assert_allclose(theirs[name], stored, atol=TOLERANCE, rtol=0)
    print(f"\n{family}: transformers {theirs['version']}, largest difference {max(errors):.1e}")
    assert max(errors) < TOLERANCE

    saved = HuggingFaceSource(tmp_path / "out" / "saved")
    assert (saved.config, saved.adapter) == (source.config, source.adapter)
    if source.dtype == "bfloat16":
        for name, values in tree(family, saved.config).items():
            spec = saved.tensors[name]
            assert saved.read(name, spec.full_part).tobytes() == values.tobytes(), name


def test_a_tied_head(python, tmp_path):
    config = replace_keys(HuggingFaceSource(FOLDER / "llama31").config, {"tie_embeddings": True})
    export_huggingface(RandomSource(config, dtype="float32"), tmp_path / "hf", "float32")
    prompts = FOLDER / "llama31" / "inputs.npz"
    theirs = run_transformers(python, tmp_path / "hf", prompts, tmp_path / "out")
    with np.load(prompts) as tokens:
        for name, prompt in tokens.items():
            ours = our_logits(tmp_path / "hf", prompt)
            np.testing.assert_allclose(ours, theirs[name], atol=TOLERANCE, rtol=0)
    assert HuggingFaceSource(tmp_path / "out" / "saved").config == config
