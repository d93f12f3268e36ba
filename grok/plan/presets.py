"""Presets for slices that have the model of a config, and the batch that would fill a slice."""

import dataclasses

from grok.config import ModelConfig, RunConfig
from grok.config.load import load_config, presets
from grok.config.mesh import batch_shards
from grok.config.model import HOW_IT_RUNS
from grok.plan.estimate import Plan

# Share of HBM that a batch is to fill: what is allocated varies with the shapes.
FILLED_SHARE = 0.95


def slice_presets(config: RunConfig) -> dict[str, RunConfig]:
    """Presets that name a slice, and have the model and the program of `config`, by name."""
    runs = {name: load_config(file) for name, file in presets().items()}
    return {
        name: run
        for name, run in runs.items()
        if run.plan.topology
        and run.plan.program == config.plan.program
        and _shape(run.model) == _shape(config.model)
    }


def made_for(plan: Plan) -> str | None:
    """A sentence on the preset for the plan's slice, if there is one of other mesh or batch."""
    for name, run in slice_presets(plan.config).items():
        same_slice = (run.plan.topology, run.mesh.slice) == (plan.slice.name, plan.slice.count)
        if same_slice and (run.mesh, run.data) != (plan.config.mesh, plan.config.data):
            batch = f"{run.data.batch_size} x {run.data.sequence_length} tokens"
            return f"{name} has a mesh and {batch} for this slice: grok plan {name}"
    return None


def filling_batch(plan: Plan) -> str | None:
    """A sentence on the batch that would fill the chips, by what a row takes here; None where the
    batch is near it."""
    if plan.config.plan.program != "train" or plan.total is None or plan.total <= plan.state:
        return None
    unit = batch_shards(plan.mesh_sizes) * plan.config.train.grad_accum_steps
    rows = plan.batch[0] // unit
    free = FILLED_SHARE * plan.slice.chip.hbm - plan.state
    # Part of the temporaries does not grow with the rows, so more may fit.
    filling = int(rows * free / (plan.total - plan.state))
    if not rows or filling < 2 * rows:
        return None
    most = 1 << (filling.bit_length() - 1)
    return (
        f"data.batch_size={most * unit}, {most} in place of {rows} rows a device, most of memory "
        "(another run, with another learning rate)"
    )


def _shape(model: ModelConfig) -> ModelConfig:
    """The model without what changes neither its weights nor what it computes."""
    same = {key: ModelConfig.default(key) for key in HOW_IT_RUNS}
    return dataclasses.replace(model, **same)
