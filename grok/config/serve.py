"""Config of `grok serve`: address, API keys and limits."""

import dataclasses
import ipaddress
from typing import Annotated

from grok.config.infer import InferConfig
from grok.config.numbers import Count, CountOrZero, Positive
from grok.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeConfig(InferConfig):
    """A server: its address, keys and limits."""

    host: Annotated[str, "address to listen on"] = "127.0.0.1"
    port: Annotated[CountOrZero, "port to listen on; 0: any that is free"] = 8000
    name: Annotated[str, "the model's name in requests; none: that of the weights' folder"] = ""
    api_keys_file: Annotated[str, "file of keys, one per line, besides those in GROK_API_KEYS"] = ""
    allow_anyone: Annotated[bool, "let other machines in without keys"] = False
    max_body_bytes: Annotated[Count, "longest body of a request"] = 1 << 20
    max_prompt_tokens: Annotated[
        CountOrZero, "tokens of a prompt at most; 0: the context length"
    ] = 0
    max_choices: Annotated[Count, "answers that one request may ask for"] = 16
    max_queue: Annotated[Count, "live requests; more are refused with 429"] = 256
    max_seconds: Annotated[Positive, "time limit of a request"] = 600.0

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
