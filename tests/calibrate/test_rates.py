"""Loops that are timed, and the bytes that collectives are taken to send."""

import itertools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import grok
from grok.calibrate import timing
from grok.calibrate.collectives import bodies
from grok.calibrate.rates import COLUMNS, Devices, matmul_rate
from grok.plan.program_cost import CompiledProgram

MESH = {"slice": 1, "data": 2, "expert": 4, "tensor": 1}


@pytest.fixture
def mesh():
    return grok.make_mesh(**MESH)


@pytest.mark.parametrize("axis", ["data", "expert"])
def test_collectives_send_what_a_plan_counts(mesh, axis):
    shape = (8 * 8, COLUMNS)
    size = 4 * shape[0] * COLUMNS // mesh.size
    for kind, (body, sent) in bodies(axis, MESH[axis], size).items():
        spec = P(mesh.axis_names)
        sharded = jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
        placement = NamedSharding(mesh, spec)
        x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=placement)
        text = jax.jit(sharded).lower(x).compile().as_text()
        assert text is not None
        cost = CompiledProgram(text, MESH).cost()
        assert {axes: n for axes, n in cost.collectives.items() if axes[0] != "none"} == {
            (axis, kind): pytest.approx(sent)
        }


def test_a_loop_runs_long_enough_and_is_divided_by_its_iterations(monkeypatch):
    """A clock that says a millisecond for each of the loop's iterations so far."""
    monkeypatch.setattr(timing, "MIN_SECONDS", 0.02)
    count = 0

    def body(x):
        def add(_):
            nonlocal count
            count += 1

        jax.debug.callback(add, x)
        return x + 1

    measured = timing.time_loop(body, jnp.zeros(()), clock=lambda: 1e-3 * count)
    assert measured.median == pytest.approx(1e-3)
    assert count >= timing.REPEATS * 20


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_rates_of_products_are_each_devices(mesh, dtype, monkeypatch):
    """All devices work at once: a second for each reading of the clock."""
    monkeypatch.setattr(timing, "MIN_SECONDS", 0)
    seconds = itertools.count()
    measured = matmul_rate(Devices(mesh, lambda: next(seconds)), dtype, 8)
    assert measured.median == measured.best == 2 * 8**3
