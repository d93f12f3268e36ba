"""Configs of inference: a served model, and the jobs of `grok batch` and `grok serve`."""

import dataclasses
import ipaddress
from typing import Annotated, Literal

from grok.config.mesh import MeshConfig
from grok.config.run import EngineConfig
from grok.config.sampling import SamplingConfig
from grok.config.section import Bytes, Count, CountOrZero, PathText, Positive, Section, Seed, Share
from grok.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class InferConfig(Section):
    """A served model: weights, sharding, and defaults for requests."""

    weights: Annotated[
        PathText, "run, import, ckpt-0, Hugging Face folder or hf://ORG/NAME, checkpoint"
    ]
    model: Annotated[PathText, "preset or YAML file of that model; none: what the weights say"] = ""
    tokenizer: Annotated[PathText, "tokenizer file or its folder; none: beside the weights"] = ""
    allow_special_tokens: Annotated[bool, "read special tokens in prompts' text as such"] = False
    param_dtype: Annotated[
        Literal["", "float32", "bfloat16", "int8", "int4", "int4_all"],
        "dtype of matrices; int4: attention's are int8; none: as stored",
    ] = ""
    embedding_dtype: Annotated[
        Literal["", "float", "int8"],
        "dtype of the token tables beside int8 or int4 matrices; int8: with a scale for each "
        "token; none: as the model's config says",
    ] = ""
    compute_dtype: Annotated[
        Literal["", "float32", "bfloat16"], "dtype of activations; none: as the model's config says"
    ] = ""
    matmul_dtype: Annotated[
        Literal["compute", "int8"],
        "type that int8 and int4 matrices are multiplied in; int8: with int8 activations (W8A8), "
        "for TPU v5e, v5p, v6e, but for attention's in int4; compute: compute_dtype",
    ] = "compute"
    mesh: Annotated[MeshConfig, "devices of one replica, along each axis"] = MeshConfig()
    engine: Annotated[EngineConfig, "concurrent sequences, paged cache"] = EngineConfig()
    sampling: Annotated[SamplingConfig, "defaults for requests"] = SamplingConfig()
    chat_template: Annotated[
        PathText, "grok-1, grok-2, file or Jinja text; none: the one beside the tokenizer"
    ] = ""
    compile_cache: Annotated[
        PathText,
        "folder of compiled programs that all hosts share, or gs://; none: `compiled` in a job's "
        "output where that is at gs:// or hosts are several, else the user's cache",
    ] = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchConfig(InferConfig):
    """A job: requests in files, and where their answers go."""

    input: Annotated[
        tuple[PathText, ...], "files, folders or globs of JSON lines or Parquet; or gs://"
    ]
    output: Annotated[PathText, "folder that the answers go to, here or at gs://"]
    replica: Annotated[
        Literal["host", "all"], "hosts of one mesh: each alone, with its share of shards, or all"
    ] = "host"
    shard_size: Annotated[Count, "requests per file of answers"] = 1000
    seed: Annotated[Seed, "seeds the requests that set no seed"] = 0
    max_record_bytes: Annotated[Bytes, "longest request in a file, decompressed"] = 256_000_000
    max_repeated_ids: Annotated[Share, "share of requests that may have an earlier one's id"] = 1.0

    def __post_init__(self) -> None:
        if not self.input:
            raise ConfigError("input names no files; input=[prompts.jsonl] would work.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class HttpConfig(Section):
    """Limits of a server's connections."""

    max_connections: Annotated[
        Count, "connections at a time; one more closes the one that idles longest"
    ] = 1000
    header_timeout_seconds: Annotated[Positive, "time for the headers of a request"] = 30.0
    body_timeout_seconds: Annotated[Positive, "time for the body of a request"] = 60.0
    idle_timeout_seconds: Annotated[Count, "time between two requests of a connection"] = 60
    write_timeout_seconds: Annotated[
        Positive, "time in which a client must take something of its answer"
    ] = 30.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeConfig(InferConfig):
    """A server: its address, keys and limits."""

    host: Annotated[str, "address to listen on"] = "127.0.0.1"
    port: Annotated[CountOrZero, "port to listen on; 0: any that is free"] = 8000
    name: Annotated[str, "the model's name in requests; none: that of the weights' folder"] = ""
    api_keys_file: Annotated[
        PathText, "file of keys, one per line, besides those in GROK_API_KEYS"
    ] = ""
    allow_anyone: Annotated[bool, "let other machines in without keys"] = False
    max_body_bytes: Annotated[Bytes, "longest body of a request"] = 1 << 20
    max_prompt_tokens: Annotated[CountOrZero, "longest prompt; 0: the context length"] = 0
    max_choices: Annotated[Count, "answers that one request may ask for"] = 16
    max_queue: Annotated[Count, "live requests; more are refused with 429"] = 256
    max_seconds: Annotated[Positive, "time limit of a request"] = 600.0
    http: Annotated[HttpConfig, "limits of connections"] = HttpConfig()
    start_timeout_seconds: Annotated[
        CountOrZero, "end when the engine is not ready so long after the start; 0: never"
    ] = 3600
    hang_timeout_seconds: Annotated[
        CountOrZero, "end when a step of the engine takes so long; 0: never"
    ] = 300
    heartbeat_timeout_seconds: Annotated[
        Count, "of several hosts: end all when one is silent for so long"
    ] = 30

    def __post_init__(self) -> None:
        if self.port > 65535:
            raise ConfigError(f"port={self.port} is no port; port=8000 would work.")

    @property
    def local(self) -> bool:
        """True where only this machine can reach it."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
