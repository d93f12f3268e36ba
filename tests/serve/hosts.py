"""`grok serve` of a random tiny model in several processes, as if each had a host of its own."""

import json
import time
from pathlib import Path

import httpx

from grok.config import AttentionConfig, ModelConfig, MoEConfig
from grok.data.tokenizers.sentencepiece import train_tokenizer
from grok.weights.huggingface.export import export_huggingface
from tests.fixtures.network import free_port
from tests.fixtures.random_weights import RandomSource
from tests.train.several_hosts import Hosts

MODEL = ModelConfig(
    vocab_size=320,
    num_layers=2,
    embed_dim=32,
    moe=MoEConfig(dim=64),
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8),
    context_length=512,
    compute_dtype="float32",
)
TEXT = "".join(f"{i} comes after {i - 1}, its square is {i * i}.\n" for i in range(400))
MESH = "mesh={data: 2, expert: 2, tensor: 2, simulated_devices: 8}"


def write_model(folder: Path) -> Path:
    """Writes weights and tokenizer in `folder`/tiny, and returns it."""
    weights, text = folder / "tiny", folder / "text.txt"
    text.write_text(TEXT)
    export_huggingface(RandomSource(MODEL, dtype="float32"), weights, "float32")
    train_tokenizer([text], weights / "tokenizer.model", 320)
    return weights


class Server:
    """The processes of one server; process 0 answers at `url`."""

    def __init__(self, weights: Path, count: int, logs: Path, *overrides: str):
        """Starts them; `count` is the number of processes that share eight devices."""
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        command = [str(weights), f"port={port}", MESH, *overrides]
        environment = {"JAX_PLATFORMS": "cpu"}
        self.hosts = Hosts([command] * count, logs, environment, "serve")
        self.began = time.monotonic()

    def wait_until_answers(self) -> float:
        """Waits until it is healthy; returns the seconds since its start."""

        def healthy() -> bool:
            try:
                return httpx.get(f"{self.url}/health", timeout=5).status_code == 200
            except httpx.HTTPError:
                return False

        numbers = range(len(self.hosts.logs))
        assert self.hosts.wait_until(healthy), "\n".join(map(self.hosts.output, numbers))
        return time.monotonic() - self.began

    def complete(self, **body) -> dict:
        """The response to one request of completions."""
        response = httpx.post(f"{self.url}/v1/completions", json=body, timeout=120)
        return json.loads(response.raise_for_status().text)
