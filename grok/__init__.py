"""Grok-1 on TPUs: training and inference of xAI's open mixture-of-experts model in JAX.

The few public names below are imported on first use, so that importing the package is free.
"""

import importlib

__version__ = "0.1.0"

_PUBLIC = {
    "GrokConfig": "grok.config",
    "RunConfig": "grok.config",
    "load_config": "grok.config.load",
    "make_mesh": "grok.sharding",
    "Grok": "grok.model.decoder",
    "init": "grok.model.decoder",
    "load": "grok.weights.load",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'grok' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__():
    return __all__
