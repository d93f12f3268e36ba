"""Seconds of saves, restores and preemptions of a planned run."""

import dataclasses

import pytest

from grok.config.load import load_config
from grok.plan.estimate import Price, make_plan
from grok.plan.format import format_plan
from grok.plan.saves import RESTART_SECONDS, num_hosts, saves_of
from grok.plan.topology import parse_slice
from tests.plan.test_estimate import CONFIG, MEASURED, RATES, SLICE


def plan_of(*overrides: str):
    config = load_config("grok-1", ["data.sequence_length=8192", "data.batch_size=64", *overrides])
    return make_plan(config, SLICE, RATES, MEASURED, Price(3.6, "a test"))


def test_a_save_is_shared_by_hosts_and_a_preemption_costs_half_an_interval_and_more():
    saves = saves_of(plan_of("checkpoint.every=100"))
    assert saves is not None
    assert (saves.hosts, saves.seconds, saves.interval) == (16, 200, 1250)  # steps of 12.5 s
    assert saves.lost == 1250 / 2 + 200
    assert saves.preemption == saves.lost + RESTART_SECONDS + 200


def test_as_often_as_saves_end():
    saves = saves_of(plan_of("checkpoint.every=0"), bandwidth=4e9)
    assert saves is not None
    assert (saves.seconds, saves.interval) == (50, 50)
    assert saves.preemption == 25 + 50 + RESTART_SECONDS + 50


def test_the_text_says_what_was_assumed():
    plan = plan_of("checkpoint.every=10")
    text = format_plan(plan, saves_of(plan))
    assert "3,200 GB, saved beside the steps, or restored, in 200 s by 16 hosts at 1 GB/s" in text
    assert "(assumed in November 2026)" in text
    assert "saves take longer than the steps between them" in text
    assert "a preemption costs 800 s on average: 300 s of work, 300 s to start" in text
    assert "; 51.2 USD" in text  # 64 chips at 3.6 USD an hour


@pytest.mark.parametrize(
    ("name", "count", "hosts"),
    [("v5e:2x4", 1, 1), ("v5e:4x4", 1, 4), ("v5p:2x2x1", 1, 1), ("v5p:4x4x8", 2, 64)],
)
def test_hosts_of_slices(name, count, hosts):
    plan = make_plan(CONFIG, parse_slice(name, count), RATES, MEASURED, None)
    assert num_hosts(plan) == hosts


def test_only_training_that_fits_has_checkpoints():
    plan = plan_of()
    assert saves_of(dataclasses.replace(plan, fits=False)) is None
