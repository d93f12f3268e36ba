"""Config of a served model, which `grok batch` and `grok serve` extend: weights, mesh, defaults."""

import dataclasses
from typing import Annotated, Literal

from grok.config.engine import EngineConfig
from grok.config.mesh import MeshConfig
from grok.config.sampling import SamplingConfig
from grok.config.section import Section


@dataclasses.dataclass(frozen=True, kw_only=True)
class InferConfig(Section):
    """A served model: weights, sharding, and defaults for requests."""

    weights: Annotated[str, "run, import, ckpt-0, Hugging Face folder, or checkpoint of grok"]
    model: Annotated[str, "preset or YAML file of that model; none: what the weights say"] = ""
    tokenizer: Annotated[str, "SentencePiece model file; none: the one beside the weights"] = ""
    param_dtype: Annotated[
        Literal["", "float32", "bfloat16", "int8"],
        "dtype that matrices are converted to; none: as stored",
    ] = ""
    compute_dtype: Annotated[
        Literal["", "float32", "bfloat16"],
        "dtype of activations and products; none: as the model's config says",
    ] = ""
    mesh: Annotated[MeshConfig, "devices of one replica, along each axis"] = MeshConfig()
    engine: Annotated[EngineConfig, "concurrent sequences, paged cache"] = EngineConfig()
    sampling: Annotated[SamplingConfig, "defaults for requests that leave a parameter out"] = (
        SamplingConfig()
    )
    chat_template: Annotated[str, "Jinja text that makes a prompt of messages; none: no chat"] = ""
