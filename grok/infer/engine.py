"""Generation: a prompt goes through the model once, then each new token goes through alone.

Letters: B rows, T tokens of a prompt, S places of the cache.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from grok import sharding
from grok.errors import DataError
from grok.infer.sampling import sample
from grok.model.cache import KVCache, init_cache
from grok.model.grok import Grok


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """How tokens are chosen. Temperature 0 takes the likeliest token."""

    max_tokens: int = 128
    temperature: float = 0.7
    top_p: float = 0.95
    seed: int = 0


class Engine:
    """A model on its mesh with compiled steps: prompts in, tokens out."""

    def __init__(self, model: Grok, mesh: Mesh):
        self._model, self._mesh = model, mesh
        self._advance = jax.jit(_advance, donate_argnums=1)

    def generate(
        self, prompts: Sequence[Sequence[int]], options: SamplingOptions, eos_id: int = -1
    ) -> Iterator[list[int | None]]:
        """Yields, for each new place, one token a prompt; None where a prompt is finished.

        A row ends with `eos_id` (which is not yielded) or after `max_tokens`. Its tokens depend
        on its prompt, its place in the list and the seed. Raises DataError for a prompt that is
        empty, or longer with its answer than the model's context.
        """
        config = self._model.config
        for prompt in prompts:
            _check_prompt(prompt, options, config.context_length, config.vocab_size)
        longest = max(len(prompt) for prompt in prompts)
        with jax.set_mesh(self._mesh):
            rows = sharding.size("batch")
            B = -(-len(prompts) // rows) * rows
            # Powers of two: prompts of many lengths share a few compiled programs.
            tokens_BT = np.zeros((B, _power_of_two(longest)), np.int32)
            count_B = np.ones((B,), np.int32)
            for row, prompt in enumerate(prompts):
                tokens_BT[row, : len(prompt)] = prompt
                count_B[row] = len(prompt)
            cache = init_cache(config, B, _power_of_two(longest + options.max_tokens))
            advance = functools.partial(
                self._advance,
                keys_B=jax.random.split(jax.random.key(options.seed), B),
                temperature_B=jnp.full((B,), options.temperature, jnp.float32),
                top_p_B=jnp.full((B,), options.top_p, jnp.float32),
            )
            alive = [True] * len(prompts)
            for _ in range(options.max_tokens):
                tokens_B, cache = advance(self._model, cache, tokens_BT, count_B)
                new = np.asarray(tokens_B)
                alive = [on and new[row] != eos_id for row, on in enumerate(alive)]
                if not any(alive):
                    return
                yield [int(new[row]) if on else None for row, on in enumerate(alive)]
                tokens_BT, count_B = tokens_B[:, None], np.ones((B,), np.int32)


def _advance(model: Grok, cache: KVCache, tokens_BT, count_B, keys_B, temperature_B, top_p_B):
    """Runs new tokens and chooses the one after them, tokens_B."""
    logits_BV, cache = model.step(tokens_BT, cache, sharding.shard(count_B, "batch"))

    def local(keys_B, length_B, logits_BV, temperature_B, top_p_B):
        keys_B = jax.vmap(jax.random.fold_in)(keys_B, length_B)
        return sample(keys_B, logits_BV, temperature_B, top_p_B)

    row, rows = ("batch",), ("batch", None)
    form = sharding.shard_map(local, (row, row, rows, row, row), row)
    keys_B, temperature_B, top_p_B = (
        sharding.shard(a, "batch") for a in (keys_B, temperature_B, top_p_B)
    )
    logits_BV = sharding.shard(logits_BV, "batch", None)
    return form(keys_B, cache.length_B, logits_BV, temperature_B, top_p_B), cache


def _power_of_two(number: int, least: int = 16) -> int:
    return max(least, 1 << (number - 1).bit_length())


def _check_prompt(prompt, options: SamplingOptions, context_length: int, vocab_size: int) -> None:
    if not prompt:
        raise DataError("the prompt is empty; one token at least is needed to continue from.")
    if max(prompt) >= vocab_size:
        raise DataError(
            f"the prompt has token {max(prompt)} and the model's vocabulary {vocab_size} tokens; "
            "the tokenizer must be the one the model was trained with."
        )
    if len(prompt) + options.max_tokens > context_length:
        raise DataError(
            f"a prompt of {len(prompt)} tokens with {options.max_tokens} new ones is longer than "
            f"the model's context of {context_length}; at most "
            f"{max(0, context_length - len(prompt))} new tokens fit."
        )
