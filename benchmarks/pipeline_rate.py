"""Times the packed data pipeline without a model, and how fast it resumes at a step.

    python benchmarks/pipeline_rate.py data/python=0.5 data/docs=0.3 data/reference=0.2

Each argument is the folder of a prepared dataset and its weight. For both ways of packing it
prints the packing efficiency, the share of rows of each dataset over the first 10,000, the tokens
per second of batches on the mesh, the ratio of that rate to what a host of four v5p chips consumes
at 500 tokens per second each, and the seconds from opened datasets to the first batch at near and
far steps. Ends with a line of JSON.
"""

import argparse
import json
import time
from collections import Counter

import jax

from grok import sharding
from grok.data.batch_schedule import BatchSchedule, Mixture
from grok.data.dataset import TokenDataset
from grok.data.device_feed import global_batches
from grok.data.packed_batches import PackedBatches
from grok.data.packing import make_packer, packing_efficiency
from grok.hardware import configure_devices

V5P_HOST_RATE = 4 * 500  # tokens a second
STEPS_TO_RESTORE = (10, 1_000_000)


def main() -> None:
    """Measures both packings and prints the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("datasets", nargs="+", metavar="FOLDER=WEIGHT")
    parser.add_argument("--length", type=int, default=2048, help="tokens a row")
    parser.add_argument("--batch", type=int, default=32, help="rows a batch")
    parser.add_argument("--steps", type=int, default=200, help="batches to time")
    parser.add_argument("--prefetch", type=int, default=2, help="batches made ahead")
    options = parser.parse_args()
    configure_devices(simulated=0)
    weighted = [dataset.rpartition("=") for dataset in options.datasets]
    datasets = {folder: TokenDataset(folder) for folder, _, _ in weighted}
    mixture = Mixture([float(weight) for _, _, weight in weighted])
    rows = Counter(mixture.locate(row)[0] for row in range(10_000))
    results = {"rows": {name: rows[d] for d, name in enumerate(datasets)}}
    print(f"rows of the first 10,000: {results['rows']}")
    for packing in ("concat_then_split", "best_fit"):
        results[packing] = measure(packing, datasets, mixture, options)
    print(json.dumps(results))


def measure(
    packing: str, datasets: dict[str, TokenDataset], mixture: Mixture, options: argparse.Namespace
) -> dict:
    """Measurements of one packing."""
    shape = (options.batch, options.length)
    filled = {
        name: packing_efficiency(
            make_packer(packing, documents.lengths, options.length, "0"), shape[1]
        )
        for name, documents in datasets.items()
    }

    def start(first: int, steps: int):
        batches = PackedBatches(
            datasets,
            mixture,
            BatchSchedule(shape[1], shape[0]),
            seed=0,
            packing=packing,
        )
        mesh = sharding.make_mesh()
        return global_batches(batches, mesh, range(first, first + steps), options.prefetch)

    seconds_to = {}
    for step in STEPS_TO_RESTORE:
        begin = time.perf_counter()
        jax.block_until_ready(next(start(step, 1)))
        seconds_to[step] = time.perf_counter() - begin
    running = start(0, options.steps + 1)
    jax.block_until_ready(next(running))
    begin = time.perf_counter()
    for batch in running:
        jax.block_until_ready(batch)
    rate = options.steps * shape[0] * shape[1] / (time.perf_counter() - begin)
    print(f"{packing}: filled {', '.join(f'{share:.2%} {name}' for name, share in filled.items())}")
    print(f"{packing}: {rate:,.0f} tokens/s, {rate / V5P_HOST_RATE:,.0f} times a v5p host's")
    for step, seconds in seconds_to.items():
        print(f"{packing}: first batch at step {step:,} after {seconds:.3f} s")
    return {"filled": filled, "tokens_per_second": rate, "seconds_to_first_batch": seconds_to}


if __name__ == "__main__":
    main()
