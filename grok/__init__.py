"""Grok-1 on TPUs: training and inference of xAI's open mixture-of-experts model in JAX.

The few public names below (docs/python.md) are imported on first use, so that importing the package
is free.
"""

import importlib
import sys

__version__ = "0.1.0"

_PUBLIC = {
    "LLM": "grok.api.llm.LLM",
    "SamplingParams": "grok.config.sampling.SamplingParams",
    "CompletionOutput": "grok.api.llm.CompletionOutput",
    "TokenLogprobs": "grok.infer.request.TokenLogprobs",
    "TextScore": "grok.api.llm.TextScore",
    "Tokenizer": "grok.data.tokenizers.Tokenizer",
    "load_tokenizer": "grok.data.tokenizers.load_tokenizer",
    "load_config": "grok.config.load.load_config",
    "RunConfig": "grok.config.RunConfig",
    "ModelConfig": "grok.config.ModelConfig",
    "make_mesh": "grok.sharding.make_mesh",
    "Grok": "grok.model.decoder.Decoder",
    "init": "grok.model.build.init",
    "load": "grok.weights.load.load",
    "mesh_for": "grok.api.training.mesh_for",
    "make_optimizer": "grok.optim.optimizer.make_optimizer",
    "init_state": "grok.api.training.init_state",
    "TrainState": "grok.train.state.TrainState",
    "train_step": "grok.train.step.train_step",
    "jit": "grok.compiler.jit",
    "batches": "grok.api.training.batches",
    "save_checkpoint": "grok.api.training.save_checkpoint",
    "GrokError": "grok.errors.GrokError",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'grok' has no attribute {name!r}")
    module, _, attribute = _PUBLIC[name].rpartition(".")
    value = getattr(importlib.import_module(module), attribute)
    if "jax" in sys.modules:
        # Before JAX starts, and searches for a TPU where there is none.
        importlib.import_module("grok.hardware").choose_platform(simulated=0)
    globals()[name] = value
    return value


def __dir__():
    return __all__
