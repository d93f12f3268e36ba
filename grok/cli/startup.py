"""A quick start of commands."""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def without_gc() -> Iterator[None]:
    """Pauses the garbage collector while what stays for good is made, such as modules: it would
    look at all of that several times, a sixth of a start, and afterwards never looks at it."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
