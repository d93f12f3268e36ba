"""Programs that a search would compile, and how it ranks what was found."""

import dataclasses

import pytest

from grok.config.load import load_config
from grok.errors import ConfigError
from grok.model.mesh_fit import check_fits
from grok.plan.estimate import make_plan
from grok.plan.rates import published_rates
from grok.plan.search import candidates, ranking
from grok.plan.topology import parse_slice
from tests.plan.test_estimate import MEASURED

OVERRIDES = ["data.sequence_length=8192"]


def test_every_candidate_is_legal_and_leaves_room_for_its_step():
    slice_ = parse_slice("v5p:4x4x8")
    found = candidates(load_config("grok-1", OVERRIDES), slice_)
    assert len(found) > 20
    assert len({candidate.overrides for candidate in found}) == len(found)
    for candidate in found:
        check_fits(candidate.config, 128)
        assert load_config("grok-1", [*OVERRIDES, *candidate.overrides]) == candidate.config


def test_candidates_for_decoding_are_meshes():
    overrides = ["plan.program=decode", "plan.batch_size=64", "model.param_dtype=int8"]
    found = candidates(load_config("grok-1", overrides), parse_slice("v6e:4x4"))
    assert {len(candidate.overrides) for candidate in found} == {4}


def test_a_slice_that_holds_no_candidate():
    with pytest.raises(ConfigError, match=r"no mesh on v5p:2x2x1 has room"):
        candidates(load_config("grok-1", OVERRIDES), parse_slice("v5p:2x2x1"))


def test_ranking_puts_the_fastest_first_and_what_does_not_fit_last():
    slice_ = parse_slice("v5p:4x4x8")
    slow, fast, unfit = candidates(load_config("grok-1", OVERRIDES), slice_)[:3]
    plan = make_plan(slow.config, slice_, published_rates("v5p"), MEASURED, None)
    faster = dataclasses.replace(plan, scheduled=11.0)
    text = ranking([(slow, plan), (unfit, dataclasses.replace(plan, fits=False)), (fast, faster)])
    lines = text.splitlines()
    order = zip((fast, slow, unfit), lines[:3], strict=True)
    assert all(str(candidate) in line for candidate, line in order)
    assert lines[-len(fast.overrides) :] == list(fast.overrides)
