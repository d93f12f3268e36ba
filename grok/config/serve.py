"""How `grok serve` listens, whom it answers, and what is too much for it."""

import dataclasses
import ipaddress
from typing import Annotated

from pydantic import Field

from grok.config.engine import InferConfig
from grok.config.numbers import Count, CountOrZero, Positive
from grok.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeConfig(InferConfig):
    """A server: its address, keys and limits."""

    host: Annotated[str, Field(description="address to listen on; default: this machine alone")] = (
        "127.0.0.1"
    )
    port: Annotated[CountOrZero, Field(description="port to listen on; 0: any that is free")] = 8000
    name: Annotated[
        str, Field(description="the model's name in requests; none: that of the weights' folder")
    ] = ""
    api_keys_file: Annotated[
        str, Field(description="file of keys, one a line, besides those in GROK_API_KEYS")
    ] = ""
    allow_anyone: Annotated[
        bool, Field(description="listen to other machines although there are no keys")
    ] = False
    max_body_bytes: Annotated[Count, Field(description="bytes of a request's body at most")] = (
        1 << 20
    )
    max_prompt_tokens: Annotated[
        CountOrZero, Field(description="tokens of a prompt at most; 0: what the context holds")
    ] = 0
    max_choices: Annotated[Count, Field(description="answers that one request may ask for")] = 16
    max_queue: Annotated[
        Count, Field(description="requests under way or waiting, above which more are sent away")
    ] = 256
    max_seconds: Annotated[
        Positive, Field(description="time that a request may take, after which it is ended")
    ] = 600.0

    def __post_init__(self) -> None:
        if self.port > 65535:
            raise ConfigError(f"port={self.port} is no port; port=8000 would work.")

    @property
    def local(self) -> bool:
        """Whether none but this machine can reach it."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
