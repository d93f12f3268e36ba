"""Exported folders in the transformers library, which loads them, gives our logits and splits texts
alike; folders that it saved itself, read here; and adapters in the peft library. Each version is
installed into an environment of its own, from the package index: some 5 GB of disk with torch, on
the CPU.

pytest -n 0 -m prove -s tests/prove/test_transformers.py
"""

import dataclasses
import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from grok.config import LoraConfig
from grok.data.chat.encoder import ChatEncoder
from grok.data.chat.template import built_in
from grok.data.tokenizers.hub_files import hub_files
from grok.data.tokenizers.sentencepiece import train_tokenizer
from grok.errors import DONE
from grok.train.loop import run_training
from grok.weights.detect import open_source
from grok.weights.huggingface.export import export_huggingface
from grok.weights.huggingface.peft import export_peft
from grok.weights.huggingface.source import HuggingFaceSource
from grok.weights.load import load
from tests.fixtures.environments import make_environment
from tests.fixtures.families import FOLDER, tree
from tests.fixtures.models import replace_keys
from tests.fixtures.random_weights import RandomSource
from tests.train.test_families import run_of

pytestmark = pytest.mark.prove
ROOT = Path(__file__).parents[2]
FAMILIES = ("llama2", "llama31", "mistral", "mixtral")
# Of logits whose deviation is 2: both round a float32 product of at most 112 terms.
TOLERANCE = 2e-4


@pytest.fixture(scope="module", params=["transformers<5", "transformers>=5"])
def python(request, tmp_path_factory) -> Path:
    """The interpreter of an environment with this version of transformers."""
    folder = tmp_path_factory.mktemp("transformers")
    yield make_environment(folder, "torch", "peft", "sentencepiece", "protobuf", request.param)
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


PEFT_SCRIPT = """
import sys, warnings
import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

base, adapters, prompts, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(
    base, dtype=torch.float32, attn_implementation="eager"
)
with warnings.catch_warnings():
    warnings.simplefilter("error", UserWarning)  # such as of missing adapter keys
    model = PeftModel.from_pretrained(model, adapters)
model.eval()
with torch.no_grad(), np.load(prompts) as tokens:
    rows = torch.from_numpy(tokens["prompt_0"][None].astype(np.int64))
    np.savez(out, prompt_0=model(rows).logits[0].numpy())
"""
# Version 5 of transformers keeps experts in one tensor, which adapters of single ones do not fit.
TARGETS = {"llama31": ("query", "value", "out", "gate", "down"), "mixtral": ("query", "out")}


@pytest.mark.parametrize("family", TARGETS)
def test_adapters_alone(python, tiny_run, tmp_path, family):
    lora = LoraConfig(rank=3, alpha=6, targets=TARGETS[family])
    config = run_of(tiny_run, family, tmp_path / "run", str(FOLDER / family), lora=lora)
    config = dataclasses.replace(
        config, optimizer=dataclasses.replace(config.optimizer, peak_lr=1e-1)
    )
    assert run_training(config) == DONE
    export_huggingface(HuggingFaceSource(FOLDER / family), tmp_path / "base", "float32")
    export_huggingface(open_source(config.folder), tmp_path / "merged", "float32")
    export_peft(config.folder, tmp_path / "peft")
    prompts, out = FOLDER / family / "inputs.npz", tmp_path / "out.npz"
    words = [python, "-c", PEFT_SCRIPT, tmp_path / "base", tmp_path / "peft", prompts, out]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with np.load(prompts) as tokens, np.load(out) as logits:
        prompt, theirs = tokens["prompt_0"], logits["prompt_0"]
    without, merged = (our_logits(tmp_path / name, prompt) for name in ("base", "merged"))
    difference = np.abs(merged - theirs).max()
    moved = np.abs(merged - without).max()
    print(
        f"\n{family}: adapters in peft, largest difference {difference:.1e}; they move {moved:.1f}"
    )
    assert difference < TOLERANCE < 0.1 < moved


TOKENIZER_SCRIPT = """
import json, sys
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
texts, messages = json.load(sys.stdin)
print(json.dumps({
    "ids": [tokenizer.encode(text, add_special_tokens=False) for text in texts],
    "chat": tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True),
    "eos": tokenizer.eos_token_id,
}))
"""
TEXTS = (
    "Hello world", "", "  two spaces and   three\n\n\n\n\nnewlines\n x",
    "x = 12345\n    return y\t\ttabs", "na\u00efve caf\u00e9 \u4f60\u597d",
    "def f(a):\n        if a:\n                b()\n\n\n    c",
)  # fmt: skip


def test_a_tokenizer_of_our_own(python, tmp_path):
    """It comes without a tokenizer_config.json, which the export writes."""
    (tmp_path / "text.txt").write_text("\n".join(TEXTS) * 50 + (ROOT / "README.md").read_text())
    special = ("<|separator|>",)
    tokenizer = train_tokenizer([tmp_path / "text.txt"], tmp_path / "t.model", 700, special)
    template = built_in("grok-1")
    folder = tmp_path / "files"
    folder.mkdir()
    for name, data in hub_files(tokenizer, 512, template.text).items():
        (folder / name).write_bytes(data)
    messages = [{"role": "user", "content": "A question."}]
    words = [python, "-c", TOKENIZER_SCRIPT, folder]
    given = json.dumps([TEXTS, messages])
    done = subprocess.run(words, input=given, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["ids"] == [tokenizer.encode(text) for text in TEXTS]
    assert report["chat"] == ChatEncoder(template, tokenizer).prompt(messages)[1]
    assert report["eos"] == tokenizer.eos_id
