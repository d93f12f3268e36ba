"""What a run is: frozen dataclasses, checked before anything slow starts.

The sections are the whole list of keys; `grok.config.load` reads them from YAML. Nothing here
imports JAX. A refusal is a `ConfigError`: one sentence with the key, the numbers, and a value that
would work.
"""

from grok.config.data import DataConfig, DatasetConfig, MixtureChange, ShapeChange
from grok.config.mesh import MESH_AXES, MeshConfig, check_model_fits, resolve_mesh
from grok.config.model import GrokConfig
from grok.config.optimizer import OptimizerConfig, ParamGroup
from grok.config.run import EngineConfig, PlanConfig, RunConfig, check_fits, check_trainable
from grok.config.train import CheckpointConfig, LoraConfig, TrainConfig

__all__ = [
    "MESH_AXES",
    "CheckpointConfig",
    "DataConfig",
    "DatasetConfig",
    "EngineConfig",
    "GrokConfig",
    "LoraConfig",
    "MeshConfig",
    "MixtureChange",
    "OptimizerConfig",
    "ParamGroup",
    "PlanConfig",
    "RunConfig",
    "ShapeChange",
    "TrainConfig",
    "check_fits",
    "check_model_fits",
    "check_trainable",
    "resolve_mesh",
]
