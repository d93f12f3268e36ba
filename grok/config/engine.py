"""Config of a served model, which `grok batch` and `grok serve` extend: weights, mesh, defaults."""

import dataclasses
from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field

from grok.config import EngineConfig, MeshConfig
from grok.config.sampling import SamplingConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class InferConfig:
    """A served model: weights, sharding, and defaults for requests."""

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")

    weights: Annotated[
        str, Field(description="run, import, ckpt-0, Hugging Face folder, or checkpoint of grok")
    ]
    model: Annotated[
        str, Field(description="preset or YAML file of that model; none: what the weights say")
    ] = ""
    tokenizer: Annotated[
        str, Field(description="SentencePiece model file; none: the one beside the weights")
    ] = ""
    param_dtype: Annotated[
        Literal["", "float32", "bfloat16", "int8"],
        Field(description="dtype that matrices are converted to; none: as stored"),
    ] = ""
    compute_dtype: Annotated[
        Literal["", "float32", "bfloat16"],
        Field(description="dtype of activations and products; none: as the model's config says"),
    ] = ""
    mesh: Annotated[MeshConfig, Field(description="devices of one replica, along each axis")] = (
        dataclasses.field(default=MeshConfig())
    )
    engine: Annotated[EngineConfig, Field(description="concurrent sequences, paged cache")] = (
        dataclasses.field(default=EngineConfig())
    )
    sampling: Annotated[
        SamplingConfig, Field(description="defaults for requests that leave a parameter out")
    ] = dataclasses.field(default=SamplingConfig())
    chat_template: Annotated[
        str, Field(description="Jinja text that makes a prompt of messages; none: no chat")
    ] = ""
