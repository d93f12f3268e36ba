"""Configs: frozen dataclasses, checked before anything slow starts, without JAX. A refusal is a
`ConfigError`: one sentence with the key, the numbers, and a value that would work."""

from grok.config.data import BatchChange, DataConfig, DatasetConfig, MixtureChange
from grok.config.mesh import MESH_AXES, MeshConfig, resolve_mesh
from grok.config.model import AttentionConfig, ModelConfig, MoEConfig, NormConfig, RopeConfig
from grok.config.optimizer import OptimizerConfig, ParamGroup
from grok.config.run import EngineConfig, PlanConfig, RunConfig, check_servable, check_trainable
from grok.config.train import CheckpointConfig, LoraConfig, TrainConfig
