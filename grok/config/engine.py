"""What `grok batch` and `grok serve` have in common in their configs: weights, mesh, defaults."""

import dataclasses
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field

from grok.config import EngineConfig, MeshConfig
from grok.config.numbers import Count, CountOrZero, Positive, PositiveOrZero, Share
from grok.errors import ConfigError
from grok.infer.request import RequestError, SamplingParams


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """What holds for a request that does not say otherwise."""

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")

    max_tokens: Annotated[Count, Field(description="new tokens at most")] = 128
    min_tokens: Annotated[CountOrZero, Field(description="tokens before it may end")] = 0
    temperature: Annotated[
        PositiveOrZero, Field(description="divides logits; 0: the likeliest token")
    ] = 1.0
    top_k: Annotated[CountOrZero, Field(description="draw from the likeliest so many; 0: all")] = 0
    top_p: Annotated[Share, Field(description="share of probability that the nucleus keeps")] = 1.0
    min_p: Annotated[Share, Field(description="least probability beside the likeliest's")] = 0.0
    repetition_penalty: Annotated[
        Positive, Field(description="divides logits of tokens that were there; 1: none")
    ] = 1.0
    presence_penalty: Annotated[
        float, Field(description="taken off logits of tokens of the answer; 0: none")
    ] = 0.0
    frequency_penalty: Annotated[
        float, Field(description="the same for each time that they were there; 0: none")
    ] = 0.0
    stop: Annotated[
        tuple[str, ...], Field(description="texts that end the answer, and are cut from it")
    ] = ()

    def __post_init__(self) -> None:
        try:
            self.params()
        except RequestError as error:
            raise ConfigError(f"sampling.{error}") from None

    def params(self, **changes: Any) -> SamplingParams:
        """The parameters of a request that asks for these changes."""
        return SamplingParams(**{**dataclasses.asdict(self), **changes})


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
        SamplingConfig, Field(description="what holds where a request says nothing else")
    ] = SamplingConfig()
    chat_template: Annotated[
        str, Field(description="Jinja text that makes a prompt of messages; none: no chat")
    ] = ""
