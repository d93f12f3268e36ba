"""One host of several: prints a hash of every row of the global batches that its devices hold.

Run as `python host.py NUMBER OF_HOSTS ADDRESS PACKING LENGTH FIRST STOP FOLDER...`, where
each FOLDER is a prepared dataset; each host has two simulated devices.
"""

import hashlib
import sys

import jax

WEIGHTS = (0.5, 0.3, 0.2)


def main() -> None:
    number, hosts, address, packing, length, first, stop, *folders = sys.argv[1:]
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)
    if int(hosts) > 1:
        jax.distributed.initialize(address, int(hosts), int(number))

    from grok import sharding
    from grok.data.batch_schedule import BatchSchedule, Mixture
    from grok.data.dataset import TokenDataset
    from grok.data.device_feed import global_batches
    from grok.data.packed_batches import PackedBatches

    # Eight rows of the length, then sixteen of half of it, then eight of a quarter.
    changes = [(6, 16, int(length) // 2), (9, 8, int(length) // 4)]
    batches = PackedBatches(
        {folder: TokenDataset(folder) for folder in folders},
        Mixture(WEIGHTS[: len(folders)]),
        BatchSchedule(int(length), 8, changes),
        seed=3,
        packing=packing,
    )
    asked = []
    batch, batches.batch = batches.batch, lambda step, rows: asked.append(rows) or batch(step, rows)
    steps = range(int(first), int(stop))
    mesh = sharding.make_mesh()
    for step, arrays in zip(steps, global_batches(batches, mesh, steps, 2), strict=True):
        for shards in zip(*(array.addressable_shards for array in arrays.values()), strict=True):
            rows = shards[0].index[0]
            for row in range(rows.stop - rows.start):
                data = b"".join(jax.device_get(shard.data[row]).tobytes() for shard in shards)
                digest = hashlib.sha256(data).hexdigest()
                print(step, rows.start + row, digest)
    rows_made = sum(rows.stop - rows.start for rows in asked)
    assert rows_made == sum(batches.shape(step)[0] for step in steps) // int(hosts)


main()
