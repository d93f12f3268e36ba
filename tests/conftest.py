"""Every test sees eight simulated CPU devices, and an implicit broadcast is an error."""

import os
from pathlib import Path

# Before JAX is imported, here and in the processes that tests start. What is compiled is kept from
# test to test; each worker has a folder of its own, since they may write the same program at once.
WORKER = os.environ.get("PYTEST_XDIST_WORKER", "main")
CACHE = Path(__file__).resolve().parents[1] / ".pytest_cache" / f"grok-{WORKER}"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
os.environ["XDG_CACHE_HOME"] = str(CACHE)
# Most programs of tests run for less time than it would take to optimise them.
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=1"

import jax
import pytest

from grok.config import (
    AttentionConfig,
    CheckpointConfig,
    DataConfig,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
)
from grok.data.tokenizers.sentencepiece import train_tokenizer

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_compilation_cache_dir", str(CACHE / "compiled"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)

TEXT = "".join(
    f"The number {i} comes after {i - 1}, and {i * i} is its square.\n" for i in range(400)
)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run that takes seconds, on a 2x2x2 mesh; tests give it a folder of its own."""
    folder: Path = tmp_path_factory.mktemp("tiny")
    (folder / "train.txt").write_text(TEXT[:-2000])
    (folder / "held_out.txt").write_text(TEXT[-2000:])
    train_tokenizer([folder / "train.txt"], folder / "tokenizer.model", 320)
    return RunConfig(
        model=ModelConfig(
            vocab_size=320,
            num_layers=2,
            embed_dim=32,
            moe=MoEConfig(dim=64),
            attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8),
            context_length=128,
            compute_dtype="float32",
        ),
        folder=str(folder / "run"),
        mesh=MeshConfig(data=2, expert=2, tensor=2, simulated_devices=8),
        data=DataConfig(
            train=(str(folder / "train.txt"),),
            validation=(str(folder / "held_out.txt"),),
            tokenizer=str(folder / "tokenizer.model"),
            sequence_length=32,
            batch_size=8,
        ),
        optimizer=OptimizerConfig(peak_lr=1e-2, warmup_steps=2),
        train=TrainConfig(steps=20, router_balance_loss=0.01, log_every=1),
        checkpoint=CheckpointConfig(every=10, keep=3),
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest file comes first, lest one worker be left alone with it at the end."""
    items.sort(key=lambda item: "quickstart/test_tour.py" not in item.nodeid)
