"""Counts what the hosts of a slice fetch from storage when they load Grok-1.

    python -m benchmarks.load_bytes

Writes a ckpt-0 folder of holes, with the headers and sizes of the release (318 GB that take no
disk), and lets the code that loads weights request all parts of them for every host of each slice,
from a client that counts and transfers nothing. libtpu says which host has which chip. Prints a
table and a line of JSON.
"""

import argparse
import dataclasses
import json
import os
import tempfile
from pathlib import Path

from grok.plan.compile import ENVIRONMENT

os.environ |= ENVIRONMENT

import numpy as np

from grok import sharding
from grok.config import MESH_AXES
from grok.config.load import load_config
from grok.plan.compile_process import topology_devices
from grok.plan.topology import parse_slice
from grok.weights.source import Source
from grok.weights.xai.source import ReleaseSource
from tests.fixtures.counted_reads import HostReads, host_reads
from tests.fixtures.release_writer import write_sparse_release

GB = 10**9
CONFIGS = ("train-v5p-4x4x8", "train-two-v5p-4x4x8", "decode-v5e-8x8", "decode-v6e-4x4")
CONFIGS += ("decode-v5p-2x2x2",)


def processes_of(name: str) -> np.ndarray:
    """The host of each device of a config's mesh, in the mesh's shape."""
    run = load_config(name)
    devices = topology_devices(parse_slice(run.plan.topology, run.mesh.slice))
    sizes = {axis: getattr(run.mesh, axis) for axis in MESH_AXES}
    mesh = sharding.make_mesh(**sizes, devices=devices)
    return np.vectorize(lambda device: device.process_index)(mesh.devices)


def figures(name: str, source: Source, dtype: str) -> dict:
    """Reads of a config's hosts, for the table."""
    hosts: list[HostReads] = [*host_reads(source, dtype, processes_of(name)).values()]
    read = sum(host.read for host in hosts)
    return {
        "config": f"`{name}`, {dtype}",
        "hosts": len(hosts),
        "read, of the checkpoint": read / source.nbytes,
        "GB by a host": max(host.read for host in hosts) / GB,
        "GB it holds": max(host.held for host in hosts) / GB,
        "requests by a host": max(host.requests for host in hosts),
        "MB of a batch": max(host.batch for host in hosts) / 1e6,
    }


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=64, help="of the release that is read")
    options = parser.parse_args()
    model = dataclasses.replace(load_config("grok-1").model, num_layers=options.layers)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        release = Path(folder, "ckpt-0")
        write_sparse_release(model, release)
        source = ReleaseSource(release, model)
        print(f"ckpt-0, {source.nbytes / GB:.1f} GB\n")
        for name in CONFIGS:
            rows.append(figures(name, source, load_config(name).model.param_dtype))
            if len(rows) == 1:
                print(f"| {' | '.join(rows[0])} |\n|{'---|' * len(rows[0])}")
            cells = (f"{v:,.3f}" if isinstance(v, float) else str(v) for v in rows[-1].values())
            print(f"| {' | '.join(cells)} |", flush=True)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
