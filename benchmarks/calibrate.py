"""Plans by the rates of a calibration beside the steps that they predict, in one run.

The devices are calibrated as by `grok calibrate`, on its own preset; then steps of other widths,
lengths, batches and depths are planned with its rates and the ratio of its own step, and timed.
The rung's own step is timed again at the end: what it differs by is how much the machine varied.

    python benchmarks/calibrate.py
    python benchmarks/calibrate.py --cpu-time  # on a busy machine: seconds of this process alone
"""

import argparse
import time

import jax

import grok
from grok.calibrate.run import calibrate
from grok.calibrate.rungs import CPU_RUNG, decode_config, step_config
from grok.calibrate.steps import make_step, time_step
from grok.config import RunConfig
from grok.config.load import load_config
from grok.hardware import configure_devices
from grok.plan.calibration import with_ratio
from grok.plan.local import CompiledStep

CHANGES = (
    (),
    ("data.batch_size=16",),
    ("data.sequence_length=256",),
    ("model.num_layers=8",),
    ("model.embed_dim=256",),
    ("model.embed_dim=256", "data.batch_size=16"),
    ("model.embed_dim=256", "model.moe.dim=1376"),
    ("model.embed_dim=192", "model.moe.dim=1032"),
)
DECODE_CHANGES = (
    (),
    ("plan.batch_size=16",),
    ("plan.tokens=512",),
    ("model.num_layers=8",),
    ("model.embed_dim=256",),
    ("model.embed_dim=256", "model.moe.dim=1376"),
)


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--decode-only", action="store_true")
    asked = parser.parse_args()
    configure_devices(1)
    clock = time.process_time if asked.cpu_time else time.perf_counter
    mesh = grok.make_mesh()
    calibration = calibrate(None, (), ("rates", "steps"), asked.cpu_time, lambda phase: None)
    print("\n".join(calibration.verdict))

    def compare(config: RunConfig, changes: tuple[str, ...]) -> None:
        compiled = CompiledStep(config, mesh)
        plan = with_ratio(compiled.plan(calibration.rates(config)), calibration)
        planned = plan.step_seconds()
        measured = time_step(make_step(config, mesh), clock).median
        times = planned["scheduled"], planned["calibrated"], measured
        cells = [f"{1e3 * seconds:.1f}" for seconds in times]
        name = f"{config.plan.program}, {', '.join(changes) or CPU_RUNG}"
        ratio = planned["calibrated"] / measured
        print(f"| {name} | {' | '.join(cells)} | {ratio:.2f} |", flush=True)

    print(f"{jax.devices()[0].device_kind}, milliseconds of a step")
    print("| step | scheduled | calibrated | measured | calibrated / measured |")
    print("|---|---|---|---|---|")
    for changes in () if asked.decode_only else (*CHANGES, ()):
        compare(step_config(CPU_RUNG, changes, True, 1), changes)
    for changes in (*DECODE_CHANGES, ()):
        compare(decode(changes), changes)


def decode(changes: tuple[str, ...]) -> RunConfig:
    """The decode step that `grok calibrate` times, with these changes."""
    model = [change for change in changes if not change.startswith("plan.")]
    config = decode_config(step_config(CPU_RUNG, model, True, 1), True, 1)
    sizes = [f"plan.{key}={getattr(config.plan, key)}" for key in ("batch_size", "tokens")]
    types = ["model.compute_dtype=float32", "model.remat=none", "plan.program=decode"]
    return load_config(CPU_RUNG, [*types, *sizes, *changes])


if __name__ == "__main__":
    main()
