"""GGUF files in llama.cpp, which gives our logits and splits texts as we do. Its library is that of
the package xllamacpp, installed into an environment of its own from the package index: some 100 MB.

pytest -n 0 -m prove -s tests/prove/test_llama_cpp.py
"""

import dataclasses
import json
import shutil
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grok.config import AttentionConfig, ModelConfig, MoEConfig, NormConfig
from grok.config.model import MLPConfig
from grok.data.tokenizers import load_tokenizer
from grok.data.tokenizers.gguf import gguf_keys
from grok.data.tokenizers.sentencepiece import train_tokenizer
from grok.weights.cast import converted
from grok.weights.gguf.export import NO_TOKENIZER, export_gguf
from grok.weights.huggingface.export import export_huggingface
from grok.weights.huggingface.source import HuggingFaceSource
from grok.weights.load import load, put_on_mesh
from tests.fixtures.environments import make_environment
from tests.fixtures.families import FOLDER
from tests.fixtures.random_weights import RandomSource
from tests.fixtures.tokenizers import make_release

pytestmark = pytest.mark.prove
ROOT = Path(__file__).parents[2]
RELEASE = ROOT.parent / "shared/tokenizer/grok-1.model"
SCRIPT = Path(__file__).with_name("llama_cpp_logits.py")
FAMILIES = ("llama2", "llama31", "mistral", "mixtral")
# Of logits whose deviation is 2: both round a float32 product of at most 112 terms.
TOLERANCE = 1e-4
GROK = ModelConfig(
    vocab_size=320,
    num_layers=3,
    embed_dim=64,
    moe=MoEConfig(dim=96, num_experts=4),
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=16),
)
DENSE = dataclasses.replace(
    GROK,
    moe=None,
    mlp=MLPConfig(dim=96),
    norm=NormConfig(sandwich=False),
    embedding_multiplier=1.0,
    logit_multiplier=1.0,
    attention=dataclasses.replace(GROK.attention, logit_softcap=None),
    compute_dtype="float32",
)
TEXTS = (
    "Hello world", "", " ", "  two spaces and   three\n\n\n\n\n\nnewlines\n x",
    "x = 12345\n    return y\t\ttabs", "na\u00efve caf\u00e9 \u4f60\u597d \U0001f680\u200d",
    "</s> <s> <|begin_of_text|>", "I've we'LL don't 3 33 333 3333",
    "def f(a):\n        if a:\n                b()\n\n\n    c",
)  # fmt: skip


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    """The interpreter of an environment with llama.cpp."""
    folder = tmp_path_factory.mktemp("llama_cpp")
    # A release whose layout of parameters the script knows, and checks.
    yield make_environment(folder, "numpy", "xllamacpp==2026.10.11549")
    shutil.rmtree(folder)


def run_llama_cpp(
    python: Path, file: Path, prompts: dict[str, np.ndarray], texts=()
) -> tuple[dict[str, np.ndarray], list[list[int]]]:
    """What llama.cpp computes of a file: logits by prompt, and the token ids of texts."""
    inputs, out = file.with_suffix(".inputs.npz"), file.with_suffix(".logits.npz")
    np.savez(inputs, **prompts)
    command = [python, SCRIPT, file, inputs, out]
    done = subprocess.run(command, input=json.dumps(texts).encode(), capture_output=True)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    with np.load(out) as logits:
        return dict(logits), json.loads(done.stdout.splitlines()[-1])


def our_logits(folder: Path, tokens: np.ndarray) -> np.ndarray:
    config = dataclasses.replace(HuggingFaceSource(folder).config, compute_dtype="float32")
    return np.asarray(load(folder, config, dtype="float32")(tokens[None]))[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_an_exported_file_gives_our_logits(python, tmp_path, family):
    source = HuggingFaceSource(FOLDER / family)
    with np.load(FOLDER / family / "inputs.npz") as inputs:
        # Beyond a sliding window, which llama.cpp does not have, files promise nothing.
        window = source.config.attention.window or 1 << 20
        prompts = {name: tokens[:window] for name, tokens in inputs.items()}
    ours = {name: our_logits(FOLDER / family, tokens) for name, tokens in prompts.items()}
    for dtype, most in (("float32", TOLERANCE), ("q8_0", None), ("q4_0", None)):
        done = export_gguf(source, tmp_path / f"{dtype}.gguf", dtype)
        theirs, _ = run_llama_cpp(python, tmp_path / f"{dtype}.gguf", prompts)
        largest, relative = differences(ours, theirs)
        print(f"\n{family} ({done.architecture}), {dtype}: {largest:.1e}, r.m.s. {relative:.1e}")
        assert most is None or largest < most


def differences(ours: dict, theirs: dict) -> tuple[float, float]:
    """The largest difference of logits, and the root mean square one, of their deviation."""
    a, b = (np.concatenate([arrays[name] for name in ours]) for arrays in (ours, theirs))
    return float(np.abs(a - b).max()), float(np.sqrt(((a - b) ** 2).mean()) / a.std())


def test_grok_1s_form(python, tmp_path, monkeypatch):
    """llama.cpp takes GELU from a table of float16 values on a CPU; with this table in our place,
    logits agree up to roundings that meet another entry of it."""
    source = RandomSource(GROK, dtype="float32")
    export_huggingface(source, tmp_path / "hf", "float32")
    prompts = {"prompt": np.random.default_rng(0).integers(0, GROK.vocab_size, 48)}
    ours = {"prompt": our_logits(tmp_path / "hf", prompts["prompt"])}
    exact = jax.nn.gelu

    def from_table(x, *arguments, **keys):
        inner = exact(x.astype(jnp.float16).astype(jnp.float32), *arguments, **keys)
        inner = inner.astype(jnp.float16).astype(jnp.float32)
        return jnp.where(x <= -10, 0, jnp.where(x >= 10, x, inner))

    monkeypatch.setattr(jax.nn, "gelu", from_table)
    jax.clear_caches()
    with_table = {"prompt": our_logits(tmp_path / "hf", prompts["prompt"])}
    for dtype in ("float32", "bfloat16", "q8_0", "q4_0"):
        export_gguf(source, tmp_path / f"{dtype}.gguf", dtype)
        theirs, _ = run_llama_cpp(python, tmp_path / f"{dtype}.gguf", prompts)
        largest, relative = differences(ours, theirs)
        print(f"\ngrok, {dtype}: {largest:.1e}, r.m.s. {relative:.1e}")
        if dtype == "float32":
            assert largest < 1e-2
            largest, relative = differences(with_table, theirs)
            print(f"with its GELU: {largest:.1e}, r.m.s. {relative:.1e}")
            assert largest < 1e-3
            assert relative < 1e-4
    jax.clear_caches()


def test_int4_of_a_checkpoint_is_q4_0(python, tmp_path):
    """With the same int4 values there and here, no more is left than what rounding the rows of each
    product to int8 makes, which llama.cpp does for q8_0 too. Without experts, which rounding may
    choose otherwise."""
    floats = RandomSource(DENSE, dtype="float32")
    prompts = {"prompt": np.random.default_rng(0).integers(0, GROK.vocab_size, 48)}
    errors = {}
    for dtype, kind in (("int8", "q8_0"), ("int4", "q4_0")):
        source = converted(floats, dtype)
        export_gguf(source, tmp_path / f"{kind}.gguf", kind)
        theirs, _ = run_llama_cpp(python, tmp_path / f"{kind}.gguf", prompts)
        model = put_on_mesh(converted(source, "float32"))
        ours = {"prompt": np.asarray(model(prompts["prompt"][None]))[0]}
        _, errors[kind] = differences(ours, theirs)
    print(f"\nr.m.s. of logits, of the same values: {errors}")
    assert errors["q4_0"] < 1.5 * errors["q8_0"] + 0.01


@pytest.mark.parametrize("family", ["llama31", "llama2", "mixtral", "grok-1", "own"])
def test_texts_become_the_same_tokens(python, tmp_path, family):
    if family == "own":
        (tmp_path / "text.txt").write_text("\n".join(TEXTS) * 50 + (ROOT / "README.md").read_text())
        tokenizer = train_tokenizer([tmp_path / "text.txt"], tmp_path / "own.model", 700)
    elif family == "grok-1":
        if not RELEASE.exists():
            pytest.skip("needs the release's tokenizer in shared/")
        tokenizer = load_tokenizer(RELEASE)
    else:
        tokenizer = load_tokenizer(make_release(tmp_path / "t", family))
    config = dataclasses.replace(GROK, vocab_size=tokenizer.vocab_size + 5, num_layers=1)
    keys = gguf_keys(tokenizer, config.vocab_size)
    export_gguf(RandomSource(config, dtype="float32"), tmp_path / "a.gguf", "float32", keys)
    _, ids = run_llama_cpp(python, tmp_path / "a.gguf", {"prompt": np.array([1])}, TEXTS)
    assert ids == [tokenizer.encode(text) for text in TEXTS]


def test_a_file_without_a_tokenizer(python, tmp_path):
    export_gguf(RandomSource(GROK), tmp_path / "a.gguf", "float16", NO_TOKENIZER)
    logits, _ = run_llama_cpp(python, tmp_path / "a.gguf", {"prompt": np.array([1, 2, 3])})
    assert logits["prompt"].shape == (3, GROK.vocab_size)
