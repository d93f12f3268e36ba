"""A layer of Grok-2's full width in the files of its release, exported, imported and compared, each
in a process of its own whose memory is measured. It needs 18 GB of disk; the table is small.

pytest -n 0 -m prove -s tests/prove/test_grok_2_width.py
"""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from grok.config import ModelConfig
from grok.config.load import load_config
from grok.weights.cast import converted
from grok.weights.detect import open_source
from tests.fixtures.random_weights import RandomSource
from tests.prove.test_full_width import GB, run_python

pytestmark = pytest.mark.prove
# A matrix of an expert is 268 MB, one of the dense MLP 537 MB; the largest file is 2.1 GB.
EXPERT_BYTES, MLP_BYTES = 2 * 8192 * 16384, 2 * 8192 * 32768
PROCESS_BYTES = GB // 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("grok_2")
    if shutil.disk_usage(folder).free < 20 * GB:
        pytest.skip("a layer of full width needs 20 GB of free disk")
    yield folder
    shutil.rmtree(folder)


def config() -> ModelConfig:
    return dataclasses.replace(load_config("grok-2").model, num_layers=1, vocab_size=1024)


EXPORT = """
import dataclasses, json, sys
from grok.weights.huggingface.export import export_huggingface
from tests.fixtures.random_weights import RandomSource
from tests.prove.test_grok_2_width import config

done = export_huggingface(RandomSource(config(), dtype="float32"), sys.argv[1])
print(json.dumps(dataclasses.asdict(done) | {"peak": peak()}))
"""
IMPORT = """
import json, sys
from grok.config import RunConfig
from grok.weights.cast import converted
from grok.weights.detect import open_source
from grok.weights.importing.importer import import_weights

source = converted(open_source(sys.argv[1]), sys.argv[3], measure=True)
done = import_weights(source, sys.argv[2], RunConfig(model=source.config))
print(json.dumps({"written": done.written, "seconds": done.seconds, "peak": peak()}))
"""


def test_export_in_little_memory(folder):
    _, report = run_python(EXPORT, folder / "hf")
    done = json.loads(report)
    print(f"\nexport: {done['nbytes'] / GB:.2f} GB in {done['files']} files", end="")
    print(f", {done['seconds']:.0f} s, peak memory {done['peak'] / GB:.2f} GB")
    assert done["files"] == 39
    # Random weights are float32; a few matrices at a time, and the pools that they are drawn from.
    assert done["peak"] < 8 * MLP_BYTES + PROCESS_BYTES


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_import_in_little_memory(folder, dtype):
    run = folder / dtype
    _, report = run_python(IMPORT, folder / "hf", run, dtype)
    done = json.loads(report)
    print(f"\nimport as {dtype}: {done['written'] / GB:.2f} GB written in {done['seconds']:.0f} s,")
    print(
        f"peak memory {done['peak'] / GB:.2f} GB; a matrix of an expert is 0.27 GB, of the MLP 0.54"
    )
    # A matrix that is read, its transpose, and what is being written; of the largest kind.
    assert done["peak"] < 4 * MLP_BYTES + PROCESS_BYTES
    imported, random = (
        open_source(run),
        converted(RandomSource(config(), dtype="float32"), "bfloat16"),
    )
    if dtype == "bfloat16":
        for name in ("layers/moe/w_gate_EDF", "layers/moe/w_down_EFD"):
            # Rows and columns on both sides of the boundaries of ranks, of the last expert.
            part = (slice(0, 1), slice(7, 8), slice(2040, 2056), slice(6136, 6152))
            np.testing.assert_array_equal(imported.read(name, part), random.read(name, part))
    shutil.rmtree(run)
