"""Models as their arrays alone."""

import jax
import numpy as np

from grok.model.build import init, to_arrays
from grok.model.flat import flat, modules_of


def test_a_flat_model_is_the_same_model(tiny_run):
    model = init(tiny_run.model, jax.random.key(1))
    same = modules_of(flat(model))
    assert jax.tree.structure(same) == jax.tree.structure(model)
    for name, array in to_arrays(model).items():
        np.testing.assert_array_equal(to_arrays(same)[name], array)
    assert flat(model).config == model.config
    assert modules_of(model) is model
    # Two of one structure share a compiled program.
    assert jax.tree.structure(flat(model)) == jax.tree.structure(flat(same))
    assert hash(flat(model).structure) == hash(flat(same).structure)
