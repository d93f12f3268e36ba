"""What `grok batch` and `grok serve` have in common in their configs: weights, mesh, defaults."""

import dataclasses
from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field

from grok.config import EngineConfig, MeshConfig
from grok.config.sampling import SamplingConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class InferConfig:
    """A model that answers: where it comes from, how it is spread, what it does by default."""

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")

    weights: Annotated[
        str, Field(description="run, import, ckpt-0, Hugging Face folder, or checkpoint of grok")
    ]
    model: Annotated[
        str, Field(description="config of that model: preset or YAML file; none: as it says itself")
    ] = ""
    tokenizer: Annotated[
        str, Field(description="SentencePiece model file; none: the one beside the weights")
    ] = ""
    param_dtype: Annotated[
        Literal["", "float32", "bfloat16", "int8"],
        Field(description="type that matrices become; none: as they are kept"),
    ] = ""
    compute_dtype: Annotated[
        Literal["", "float32", "bfloat16"],
        Field(description="type of activations and products; none: as the model's config says"),
    ] = ""
    mesh: Annotated[MeshConfig, Field(description="devices of one replica, along each axis")] = (
        dataclasses.field(default=MeshConfig())
    )
    engine: Annotated[EngineConfig, Field(description="slots, cache")] = dataclasses.field(
        default=EngineConfig()
    )
    sampling: Annotated[
        SamplingConfig, Field(description="defaults for requests that leave a parameter out")
    ] = dataclasses.field(default=SamplingConfig())
    chat_template: Annotated[
        str, Field(description="Jinja text that makes a prompt of messages; none: no chat")
    ] = ""
