"""Five hundred requests of mixed lengths and parameters, together and one at a time."""

import dataclasses

import jax
import pytest

import grok
from grok.infer.engine import Engine
from tests.infer.test_engine import OPTIONS, answers, requests

pytestmark = pytest.mark.prove


def test_500_requests_get_together_what_each_gets_alone(tiny_run):
    """Also where the pages are half of those that eight requests need on average: about 24."""
    mesh = grok.make_mesh(devices=jax.devices()[:1])
    model = grok.init(tiny_run.model, jax.random.key(3), mesh)
    asked = requests(500)
    single = Engine(model, None, mesh, OPTIONS)
    alone = {key: each for request in asked for key, each in answers(single, [request]).items()}
    for pages in (64, 12):
        engine = Engine(model, None, mesh, dataclasses.replace(OPTIONS, num_pages=pages))
        assert answers(engine, asked) == alone
        stats = engine.stats
        print(f"\n{pages} pages: {stats}")
        assert (stats.pages_used, stats.pages_cached + stats.pages_free) == (0, pages)
        assert bool(stats.preempted) == (pages == 12)
