"""Costs of a program -> times, prices, and the text of the plan."""

import dataclasses
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest

from grok.config import MESH_AXES
from grok.config.load import load_config
from grok.hardware import GIB
from grok.plan.compile import required_bytes
from grok.plan.compile_process import wiring
from grok.plan.estimate import Price, make_plan
from grok.plan.format import format_plan
from grok.plan.published import published_runs
from grok.plan.rates import Rates, published_rates, transfer_seconds
from grok.plan.topology import parse_slice

SLICE = parse_slice("v5p:4x4x4")
RATES = Rates(flops=459e12, hbm=2765e9, link=90e9, network=6.25e9, host=15e9, source="a test")
CONFIG = load_config("grok-1", ["data.sequence_length=8192", "data.batch_size=64"])
MEASURED = {
    "mesh_sizes": {"slice": 1, "data": 64, "expert": 1, "tensor": 1},
    "devices_per_chip": 1,
    "state": 55 * GIB,
    "checkpoint": 3_200_000_000_000,
    "largest_state": [["state.model.embed.table_VD.value", 3 * GIB]],
    "largest_temporaries": [["bf16[8,8]", "jit(step)/dot_general", 128]],
    "peak": 80 * GIB,
    "flops": 459e12 * 10,
    "hbm": 2765e9 * 4,
    "host": 0.0,
    "host_memory": 0,
    "collectives": [["data", "all-gather", 180e9], ["data", "reduce-scatter", 180e9]],
    "wiring": {"data": {"links": 2, "hops": 1.0, "slices": False, "shared": 1}},
    "loops": [],
    "kernels": [],
    "schedule": {
        "seconds": 12.5,
        "sent": 360e9,
        "sent_beside": 90e9,
        "exposed": 1.25,
        "longest_waits": [["all-gather over data: jit(step)/while/body/gate", 1.0]],
    },
    "compile_seconds": 190.0,
}


@pytest.fixture
def plan():
    return make_plan(CONFIG, SLICE, RATES, MEASURED, Price(3.6, "a test"))


def test_three_terms_and_what_follows_from_them(plan):
    answer = plan.to_dict()
    assert answer["fits"] is True
    assert answer["seconds"] == {
        "compute": 10,
        "hbm": 4,
        "interconnect": 2,
        "scheduled": 12.5,
        "overlapped": 10,
        "serial": 16,
    }
    rates = {"scheduled": 655.36, "overlapped": 819.2, "serial": 512}
    assert answer["tokens_per_second_per_chip"] == rates
    assert answer["usd_per_billion_tokens"] == pytest.approx(1e9 / 655.36 / 3600 * 3.6)
    assert answer["async_collective_share"] == 0.25
    # 522 GFLOP a token: facts of the model, counted elsewhere.
    assert answer["mfu"]["overlapped"] == pytest.approx(819.2 * 522e9 / 459e12, rel=2e-3)
    memory = {"state": 55, "temporaries": 25, "total": 80, "capacity": 95}
    assert answer["hbm_gib_per_chip"] == memory
    assert answer["collective_bytes_per_chip_per_step"] == {
        "data": {"all-gather": 180e9, "reduce-scatter": 180e9}
    }


def test_json_has_these_keys(plan):
    keys = """fits hbm_gib_per_chip flops_per_chip_per_step hbm_bytes_per_chip_per_step
    host_bytes_per_chip_per_step collective_bytes_per_chip_per_step async_collective_share seconds
    mfu tokens_per_second_per_chip usd_per_billion_tokens compile_seconds rates""".split()
    assert list(plan.to_dict()) == keys
    unfit = dataclasses.replace(plan, fits=False, seconds={})
    assert list(unfit.to_dict()) == keys


def test_a_decode_takes_as_long_as_the_engine_s_thread():
    config = load_config("grok-1", ["plan.program=decode", "plan.batch_size=256"])
    schedule = MEASURED["schedule"] | {"seconds": 1e-3}
    seconds = make_plan(config, SLICE, RATES, MEASURED | {"schedule": schedule}, None).to_dict()
    assert seconds["seconds"]["engine"] == pytest.approx(2.2e-3, rel=0.01)
    assert seconds["seconds"]["scheduled"] == seconds["seconds"]["engine"]


def test_two_devices_of_a_chip_are_one_chip():
    slice_ = parse_slice("7x:4x4x4")
    plan = make_plan(
        CONFIG, slice_, published_rates("7x"), MEASURED | {"devices_per_chip": 2}, None
    )
    assert (plan.state, plan.flops) == (110 * GIB, 2 * MEASURED["flops"])
    assert plan.to_dict()["usd_per_billion_tokens"] is None


def test_times_of_transfers():
    ring = {"links": 2, "hops": 4.0, "slices": False, "shared": 1}
    assert transfer_seconds(RATES, ring, "all-gather", 180e9) == 1
    assert transfer_seconds(RATES, ring, "all-to-all", 180e9) == 4
    assert transfer_seconds(RATES, ring, "collective-permute", 180e9) == 2
    assert transfer_seconds(RATES, ring | {"shared": 2}, "all-gather", 180e9) == 0.5
    assert transfer_seconds(RATES, ring | {"slices": True}, "all-reduce", 6.25e9) == 1


def test_report_says_what_it_assumes(plan):
    text = format_plan(plan)
    assert "fits: state 55.00 + temporaries 25.00 = 80.00 of 95.00 GiB a chip" in text
    assert "compute 10 s, hbm 4 s, interconnect 2 s; compute bounds it" in text
    assert "scheduled     12.5 s a step by the compiled schedule: 655.4 tokens/s/chip" in text
    assert "360 GB sent, 25.0% of it beside other work" in text
    assert "1.25 s of the schedule for communication alone" in text
    assert "1 s for all-gather over data: jit(step)/gate" in text
    assert "a chip-hour costs 3.6 USD (a test)" in text
    assert "459 TFLOP/s" in text


def test_published_runs_of_its_kind_stand_beside_a_plan(plan):
    assert "published     Mixtral 8x7B on 64 chips, measured: MFU 54.9%" in format_plan(plan)
    names = [run.model for run in published_runs(plan)]
    assert names == ["Mixtral 8x7B", "Mixtral 8x7B"]
    dense = load_config("grok-1", ["model.moe=null", "model.mlp={dim: 8}"])
    assert not published_runs(dataclasses.replace(plan, config=dense))
    decode = load_config("grok-1", ["plan.program=decode"])
    assert not published_runs(dataclasses.replace(plan, config=decode))


def test_report_says_what_the_hosts_hold():
    measured = MEASURED | {"host": 50e9, "host_memory": 24 * GIB}
    text = format_plan(make_plan(CONFIG, SLICE, RATES, measured, None))
    assert "50 GB to host memory and back, which holds 24.00 GiB a chip" in text
    assert "in a scheduled step, 4 GB/s" in text
    assert "15 GB/s to host memory and back" in text
    assert "interconnect 2 s, host 3.33 s" in text
    assert "host" not in format_plan(make_plan(CONFIG, SLICE, RATES, MEASURED, None))


@pytest.mark.parametrize(
    ("message", "gib"),
    [
        ("... total memory required for HLO temporaries (2.5G) exceeds available HBM (1G).", 3.5),
        ("Ran out of memory in memory space hbm. Used 25.17G of 15.75G hbm.", 25.17),
        ("something else", None),
    ],
)
def test_bytes_that_the_compiler_says_are_required(message, gib):
    assert required_bytes(message, GIB) == (gib and pytest.approx(gib * GIB))


def test_what_does_not_fit_says_what_would():
    slice_ = parse_slice("v5p:4x4x4")
    measured = {
        key: MEASURED[key] for key in ("mesh_sizes", "devices_per_chip", "state", "largest_state")
    }
    plan = make_plan(
        CONFIG, slice_, RATES, measured | {"compiler_message": "E1000", "required": 130 * GIB}, None
    )
    text = format_plan(plan)
    assert "does not fit: state 55.00 + temporaries 75.00 = 130.00 of 95.00 GiB a chip" in text
    assert "--topology v5p:4x8x8, with more of mesh.data" in text
    assert "optimizer.moments_dtype=bfloat16 model.param_dtype" not in text  # not enough
    assert plan.to_dict()["mfu"] is None


class Device(NamedTuple):
    """A device as wiring sees it."""

    coords: tuple[int, int, int]


@pytest.mark.parametrize(
    ("topology", "grid", "axis", "links", "shared"),
    [
        # A ring along a side; of a line one link; of chips four apart every fourth of a ring.
        ("v6e:16x16", np.array([[[[(x, y, 0)]] for y in range(16)] for x in range(16)]), 1, 2, 1),
        ("v6e:16x16", np.array([[[[(x, 0, 0)]] for x in range(4)]]), 1, 1, 1),
        ("v6e:16x16", np.array([[[[(4 * x, 0, 0)]] for x in range(4)]]), 1, 0.5, 1),
        ("7x:4x4x4", np.array([[[[(d // 2, 0, 0)]] for d in range(8)]]), 1, 2, 2),
    ],
)
def test_links_of_a_group(topology, grid, axis, links, shared):
    devices = np.empty(grid.shape[:-1], object)
    for index in np.ndindex(devices.shape):
        devices[index] = Device(tuple(grid[index]))
    mesh = SimpleNamespace(devices=devices)
    found = wiring(mesh, MESH_AXES[axis], parse_slice(topology))
    assert (found["links"], found["shared"]) == (links, shared)
