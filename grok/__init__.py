"""Grok-1 on TPUs: training and inference of xAI's open mixture-of-experts model in JAX.

The few public names below are imported on first use, so that importing the package is free.
"""

import importlib

__version__ = "0.1.0"

_PUBLIC = {
    "ModelConfig": "grok.config.ModelConfig",
    "RunConfig": "grok.config.RunConfig",
    "load_config": "grok.config.load.load_config",
    "make_mesh": "grok.sharding.make_mesh",
    "Grok": "grok.model.decoder.Decoder",
    "init": "grok.model.build.init",
    "load": "grok.weights.load.load",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'grok' has no attribute {name!r}")
    module, _, attribute = _PUBLIC[name].rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def __dir__():
    return __all__
