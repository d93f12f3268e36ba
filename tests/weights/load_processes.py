"""Processes that load weights together, as if each were a host, and count what that costs."""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from grok.config import AttentionConfig, ModelConfig, MoEConfig
from tests.fixtures.network import free_port

ROOT = Path(__file__).parents[2]
# 61 MB as int8.
WIDE = ModelConfig(
    vocab_size=4096,
    num_layers=2,
    embed_dim=512,
    moe=MoEConfig(dim=2048),
    attention=AttentionConfig(num_heads=8, num_kv_heads=8, head_dim=64),
)


def load_in_processes(
    folder: str | os.PathLike[str],
    config: ModelConfig,
    sizes: Sequence[int],
    count: int,
    devices: int = 8,
    compare: bool = False,
    dtype: str = "int8",
    stored: str = "int8",
) -> list[dict[str, int]]:
    """Of each of `count` processes, which have `devices` together: the bytes that it read, those of
    them from disk, those that its devices hold, and its growth at the peak. With `compare`, each
    checks its values bit for bit against a `RandomSource` of type `stored`, which the files must be
    of."""
    settings = [dataclasses.asdict(config), list(sizes), compare, dtype, stored]
    arguments = [str(folder), f"127.0.0.1:{free_port()}", str(count), json.dumps(settings)]
    environment = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices // count)}
    with contextlib.ExitStack() as stack:
        processes = []
        for number in range(count):
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.weights.load_processes", *arguments, str(number)],
                env=os.environ | environment,
                cwd=ROOT,
                stdout=subprocess.PIPE,
                text=True,
            )
            processes.append(stack.enter_context(process))
            stack.callback(process.kill)
        reports = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * count
    return [json.loads(report.splitlines()[-1]) for report in reports]


def counters() -> dict[str, int]:
    """Counts of the operating system for this process."""
    read = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM"))
    return {"read": int(read["rchar"]), "disk": int(read["read_bytes"]), "memory": peak}


def main() -> None:
    """One of the processes."""
    import jax
    import numpy as np

    import grok
    from grok.config.load import from_dict
    from grok.model.build import to_arrays
    from grok.weights.cast import converted
    from grok.weights.load import put_on_mesh
    from grok.weights.source import relative_to
    from grok.weights.tensor_reads import tensor_reads
    from grok.weights.transfer import MeshDevices
    from tests.fixtures.random_weights import RandomSource

    folder, address, count, settings, number = sys.argv[1:]
    model, sizes, compare, dtype, stored = json.loads(settings)
    config = from_dict(model, config_type=ModelConfig)
    jax.distributed.initialize(address, int(count), int(number))
    mesh = grok.make_mesh(*sizes)
    small = dataclasses.replace(
        config, vocab_size=64, embed_dim=64, moe=dataclasses.replace(config.moe, dim=64)
    )
    put_on_mesh(RandomSource(small), mesh)  # what is imported on first use
    before = counters()
    arrays = to_arrays(grok.load(folder, config, mesh, dtype))
    report = {name: value - before[name] for name, value in counters().items()}
    report["held"] = sum(
        sum({str(s.index): s.data.nbytes for s in array.addressable_shards}.values())
        for array in arrays.values()
    )
    source = converted(RandomSource(config, dtype=stored), dtype)
    for tensor in tensor_reads(source, arrays, MeshDevices(mesh).processes) if compare else ():
        array = arrays[tensor.names[0]]
        for shard in array.addressable_shards:
            indices = zip(shard.index, array.shape, strict=True)
            part = tuple(slice(*cut.indices(size)[:2]) for cut, size in indices)
            box, values = tensor.read(part)[0]
            expected = np.ascontiguousarray(values[relative_to(box, part)])
            bits = f"u{expected.itemsize}"
            loaded = np.asarray(shard.data).view(bits)
            np.testing.assert_array_equal(loaded, expected.view(bits), tensor.names[0])
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
