"""What Python's own pickler writes for the objects of a release, and for others."""

import pickle
import sys

import numpy as np
import pytest


def pickled(value) -> bytes:
    """`value` in protocol 4 with NumPy 1's name of the function that makes arrays."""
    make_array = np.zeros(1).__reduce__()[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make_array, "__module__", "numpy.core.multiarray")
        return pickle.dumps(value, protocol=4)


def pickled_object(module: str, name: str, **state) -> bytes:
    """An instance of a class of this name, with these attributes."""
    kind = type(name, (), {"__module__": module})
    value = kind()
    vars(value).update(state)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[module], name, kind, raising=False)
        return pickled(value)


def pickled_weight(weight, scales, **more) -> bytes:
    """A file of the release."""
    return pickled_object("__main__", "QuantizedWeight8bit", weight=weight, scales=scales, **more)
