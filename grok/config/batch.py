"""Config of `grok batch`: where requests come from and where answers go."""

import dataclasses
from typing import Annotated, Literal

from grok.config.infer import InferConfig
from grok.config.numbers import Count, CountOrZero
from grok.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchConfig(InferConfig):
    """A job: requests in files, and where their answers go."""

    input: Annotated[
        tuple[str, ...], "files, folders or globs of JSON lines or Parquet, here or at gs://"
    ]
    output: Annotated[str, "folder that the answers go to, here or at gs://"]
    replica: Annotated[
        Literal["host", "all"],
        "hosts that one mesh spans: each alone, with its share of shards, or all",
    ] = "host"
    shard_size: Annotated[Count, "requests per file of answers"] = 1000
    seed: Annotated[CountOrZero, "seeds the requests that set no seed"] = 0

    def __post_init__(self) -> None:
        if not self.input:
            raise ConfigError("input names no files; input=[prompts.jsonl] would work.")
