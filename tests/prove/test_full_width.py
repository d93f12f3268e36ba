"""The release at its full width, with as many layers as this machine has room for: imported, killed
and resumed, loaded as int8 over eight devices, and run.

`make prove` runs these. They need 20 GB of disk for a layer, and 24 GB of memory.

Letters: D embed, E experts, F mlp, H head_dim, K kv heads, N heads, V vocab.
"""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import grok
from grok.config import ModelConfig
from grok.weights.cast import FloatSource
from grok.weights.detect import open_source
from grok.weights.source import Source
from tests.fixtures.random_weights import RandomSource
from tests.fixtures.release_writer import write_release
from tests.weights.load_processes import load_in_processes

pytestmark = pytest.mark.prove
GB = 10**9
TOKEN = 4711
# A float32 sum of n products rounds by about sqrt(n) * 2^-24; n is 32768 at most: 1.1e-5, for each
# of some ten products that follow one another.
TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=[1, 2], ids=["one layer", "two layers"])
def release(request, tmp_path_factory) -> tuple[Path, ModelConfig]:
    """A ckpt-0 folder of the released model's width, and its config."""
    layers = request.param
    # Each layer is 5 GB of files and the table 3.2 GB; an import doubles them.
    needed = 2 * (5 * layers + 4) * GB
    folder = tmp_path_factory.mktemp("full")
    if shutil.disk_usage(folder).free < needed + 2 * GB:
        pytest.skip(f"{layers} layers of full width need {needed / GB:.0f} GB of free disk")
    model = grok.load_config("grok-1").model
    config = dataclasses.replace(model, num_layers=layers, compute_dtype="float32")
    write_release(RandomSource(config), folder / "ckpt-0")
    yield folder, config
    shutil.rmtree(folder)


# What getrusage says begins with the memory of the process that started this one.
PEAK = """
def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
"""


def run_python(script: str, *arguments: object) -> tuple[int, str]:
    command = [sys.executable, "-c", PEAK + script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode not in (0, -signal.SIGKILL):
        raise AssertionError(done.stderr)
    return done.returncode, done.stdout


IMPORT = """
import json, os, signal, sys
from pathlib import Path
import grok
from grok.weights.importing.importer import import_weights
from grok.weights.xai.source import ReleaseSource
from grok.config import ModelConfig, RunConfig
from grok.config.load import from_dict

folder, config, kill_at = Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])
source = ReleaseSource(folder / "ckpt-0", from_dict(config, config_type=ModelConfig))

def progress(name, done, total):
    if kill_at and done > total * kill_at / 100:
        os.kill(os.getpid(), signal.SIGKILL)

run = RunConfig(model=source.config)
found = import_weights(source, folder / "imported", run, on_progress=progress)
print(json.dumps({"written": found.written, "bytes": found.summary["bytes"], "peak": peak()}))
"""


def test_import_survives_a_kill_in_little_memory(release):
    folder, config = release
    settings = json.dumps(dataclasses.asdict(config))
    killed, _ = run_python(IMPORT, folder, settings, 55)
    assert killed == -signal.SIGKILL
    assert not (folder / "imported" / "checkpoints").exists()
    _, report = run_python(IMPORT, folder, settings, 0)
    found = json.loads(report)
    print(
        f"\n{found['written'] / found['bytes']:.2f} of the bytes written after the kill, ", end=""
    )
    print(f"{found['bytes'] / GB:.2f} GB in all, peak memory {found['peak'] / GB:.2f} GB")
    # Finished tensors are not written again; the one that was cut, a fifth of all, is.
    assert found["written"] < 0.7 * found["bytes"]
    assert found["peak"] < 5 * GB
    source = open_source(folder / "imported")
    np.testing.assert_array_equal(
        *(
            s.read(
                "layers/moe/w_down_EFD", (slice(0, 1), slice(7, 8), slice(0, 999), slice(0, 6144))
            )
            for s in (source, RandomSource(config))
        )
    )


RUN = """
import json, sys
import jax
import numpy as np
import grok
from grok.config import ModelConfig
from grok.config.load import from_dict

path, config, token = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
model = grok.load(path, from_dict(config, config_type=ModelConfig), grok.make_mesh(1, 1, 8), "int8")
kinds = {str(leaf.dtype) for leaf in jax.tree.leaves(model.layers.moe)}
assert kinds == {"int8", "bfloat16", "float32"}, kinds
logits_V = np.asarray(model(np.full((1, 1), token)))[0, 0]
print(json.dumps({"logits": logits_V.tolist(), "peak": peak()}))
"""


@pytest.mark.parametrize("form", ["ckpt-0", "imported"])
def test_int8_over_eight_devices_gives_the_right_logits(release, form):
    folder, config = release
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if memory < (8 + 6 * config.num_layers) * GB:
        pytest.skip(f"{config.num_layers} layers on one machine need more memory than {memory} B")
    _, report = run_python(RUN, folder / form, json.dumps(dataclasses.asdict(config)), TOKEN)
    found = json.loads(report)
    expected = one_token(RandomSource(config), TOKEN)
    error = np.abs(np.array(found["logits"]) - expected).max() / np.abs(expected).max()
    print(f"\n{form}: relative error {error:.1e}, peak memory {found['peak'] / GB:.1f} GB")
    assert error < TOLERANCE


# No mesh without tensor: its eight devices, all on this machine, would hold 3.2 GB of table each.
@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="/proc/self/io is Linux's")
@pytest.mark.parametrize(("sizes", "processes"), [((1, 4, 2), 2), ((1, 2, 4), 4), ((1, 1, 8), 2)])
def test_processes_read_each_byte_once(release, sizes, processes):
    folder, config = release
    if config.num_layers > 1:
        pytest.skip("one layer says it")
    files = [*(folder / "ckpt-0").iterdir()]
    for file in files:
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    total = sum(file.stat().st_size for file in files)
    reports = load_in_processes(folder / "ckpt-0", config, sizes, processes)
    read, disk = (sum(report[key] for report in reports) / total for key in ("read", "disk"))
    beyond = max(report["memory"] - report["held"] for report in reports)
    print(f"\n{sizes}, {processes} processes: {total / GB:.3f} GB, {read:.4f} of it read, ", end="")
    print(f"{disk:.4f} fetched from disk in pages, with read-ahead; peak memory {beyond / GB:.2f} ")
    print("GB beyond the weights")
    assert 1 <= read < 1.05


def one_token(source: Source, token: int) -> np.ndarray:
    """Logits after a single token, (V,), in NumPy, reading only the experts that it chooses.

    With one token every head attends to it alone, and rotary position 0 turns nothing.
    """
    config, weights = source.config, FloatSource(source, np.dtype(np.float32))

    def read(name: str, *index: int) -> np.ndarray:
        shape = weights.tensors[name].shape
        part = [slice(i, i + 1) for i in index] + [slice(0, n) for n in shape[len(index) :]]
        return weights.read(name, tuple(part)).reshape(shape[len(index) :])

    def norm(x_D: np.ndarray, name: str, *layer: int) -> np.ndarray:
        return x_D / np.sqrt(np.mean(x_D**2) + config.norm.eps) * read(f"{name}/scale_D", *layer)

    x_D = read("embed/table_VD", token) * config.embedding_multiplier
    group = config.attention.num_heads // config.attention.num_kv_heads
    for layer in range(config.num_layers):
        h_D = norm(x_D, "layers/pre_attn_norm", layer)
        v_KH = np.einsum("d,dkh->kh", h_D, read("layers/attention/w_value_DKH", layer))
        w_out_NHD = read("layers/attention/w_out_NHD", layer)
        a_D = np.einsum("nh,nhd->d", np.repeat(v_KH, group, axis=0), w_out_NHD)
        x_D = x_D + norm(a_D, "layers/post_attn_norm", layer)
        h_D = norm(x_D, "layers/pre_ffn_norm", layer)
        logits_E = h_D @ read("layers/moe/router_DE", layer)
        probs_E = np.exp(logits_E - logits_E.max())
        probs_E /= probs_E.sum()
        m_D = np.zeros_like(x_D)
        for expert in np.argsort(-probs_E)[: config.moe.num_selected]:
            gate_F = h_D @ read("layers/moe/w_gate_EDF", layer, expert)
            up_F = h_D @ read("layers/moe/w_up_EDF", layer, expert)
            gelu_F = (
                gate_F * 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate_F + 0.044715 * gate_F**3)))
            )
            down_FD = read("layers/moe/w_down_EFD", layer, expert)
            m_D += probs_E[expert] * ((gelu_F * up_F) @ down_FD)
        x_D = x_D + norm(m_D, "layers/post_ffn_norm", layer)
    x_D = norm(x_D, "final_norm")
    return read("embed/table_VD") @ x_D * config.logit_multiplier
