"""int4 folders in the compressed-tensors library, which reads their config and unpacks them to our
values; and a matrix that it packed itself. It is installed into an environment of its own, from the
package index: some 5 GB of disk with torch, on the CPU.

pytest -n 0 -m prove -s tests/prove/test_compressed_tensors.py
"""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from grok.weights.cast import converted
from grok.weights.huggingface.compressed import is_packed
from grok.weights.huggingface.export import export_huggingface
from grok.weights.huggingface.source import HuggingFaceSource
from tests.fixtures.environments import make_environment
from tests.fixtures.models import model_config
from tests.fixtures.random_weights import RandomSource

pytestmark = pytest.mark.prove
SIZES = {
    "vocab_size": 64,
    "num_layers": 2,
    "embed_dim": 256,
    "attention.num_heads": 4,
    "attention.num_kv_heads": 2,
    "attention.head_dim": 64,
}
GROK_1 = model_config(SIZES | {"moe.dim": 384, "moe.num_experts": 2})
PLAIN = {
    "norm.sandwich": False,
    "embedding_multiplier": 1.0,
    "logit_multiplier": 1.0,
    "tie_embeddings": False,
    "attention.logit_softcap": None,
}
LLAMA = model_config(SIZES | PLAIN | {"mlp.dim": 384})
MIXTRAL = model_config(
    SIZES
    | PLAIN
    | {
        "moe.dim": 384,
        "moe.num_experts": 2,
        "moe.activation": "silu",
        "moe.normalize": True,
    }
)
SCRIPT = """
import json, re, sys
import numpy as np
import torch
from safetensors.torch import load_file
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig

folder, out = sys.argv[1:]
stated = json.load(open(f"{folder}/config.json"))["quantization_config"]
config = QuantizationConfig.model_validate(stated)
scheme = config.config_groups["group_0"]
files = set(json.load(open(f"{folder}/model.safetensors.index.json"))["weight_map"].values())
tensors = {name: t for file in files for name, t in load_file(f"{folder}/{file}").items()}
weights = {}
for name in tensors:
    if name.endswith(".weight_packed"):
        module = name.removesuffix(".weight_packed")
        parts = ("weight_packed", "weight_scale", "weight_shape")
        state = {part: tensors[f"{module}.{part}"] for part in parts}
        dense = PackedQuantizationCompressor.decompress(state, scheme)["weight"]
        weights[module] = dense.to(torch.float32).numpy()
        # The other way: of the dense matrix the library makes the same words again.
        again = PackedQuantizationCompressor.compress(
            {"weight": dense, "weight_scale": state["weight_scale"]}, scheme
        )
        assert torch.equal(again["weight_packed"], state["weight_packed"]), name
        assert torch.equal(again["weight_shape"], state["weight_shape"]), name
        assert again["weight_shape"].dtype == state["weight_shape"].dtype
patterns = [p.removeprefix("re:") for p in config.ignore if p.startswith("re:")]
linear = [n.removesuffix(".weight") for n, t in tensors.items() if t.ndim == 2 and "embed" not in n]
for module in linear:
    if not module.endswith(("weight_packed", "weight_scale")):
        assert module in config.ignore or any(re.match(p, module) for p in patterns), module
np.savez(out, **weights)
print(len(weights))
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    """The interpreter of an environment with the library."""
    folder = tmp_path_factory.mktemp("compressed_tensors")
    yield make_environment(folder, "compressed-tensors==0.20.1", "safetensors", "torch")
    shutil.rmtree(folder)


@pytest.mark.parametrize("dtype", ["int4", "int4_all"])
@pytest.mark.parametrize("model", [LLAMA, MIXTRAL, GROK_1], ids=["llama", "mixtral", "grok-1"])
def test_the_library_unpacks_our_values(python, tmp_path, model, dtype):
    source = converted(RandomSource(model, dtype="float32"), dtype)
    export_huggingface(source, tmp_path / "hf", dtype, shard_bytes=400_000)
    (tmp_path / "unpack.py").write_text(SCRIPT)
    command = [python, tmp_path / "unpack.py", tmp_path / "hf", tmp_path / "out.npz"]
    done = subprocess.run(command, capture_output=True)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    folder = HuggingFaceSource(tmp_path / "hf")
    # What a product of an int4 and a bfloat16 is in bfloat16.
    floats = converted(folder, "bfloat16")
    tensors = folder.adapter.tensors(folder.adapter.export_layout, folder.config)
    packed = {t.name.removesuffix(".weight"): t for t in tensors if is_packed(t.param, dtype)}
    with np.load(tmp_path / "out.npz") as theirs:
        assert theirs.keys() == packed.keys()
        for module, tensor in packed.items():
            ours = floats.read(tensor.param.name, tensor.part).reshape(tensor.shape[::-1]).T
            np.testing.assert_array_equal(theirs[module], ours.astype(np.float32), module)
