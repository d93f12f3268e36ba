"""The devices' side of a step's inputs: what they keep of the sequences in slots, so that a step is
sent little and the next can begin before the host has seen its tokens.

B groups of devices, each with S slots; U chunks of a step of Q tokens (a decode: one of each slot),
M pages of the longest sequence, N tokens of it, W bytes of V bits of the vocabulary, F words of
sampling parameters, X of biases. Inside `map_groups` arrays are those of one group and have no B.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from grok import sharding
from grok.config.sampling import MAX_LOGIT_BIAS, SamplingParams
from grok.infer.sampling import SamplingBatch, has_penalties

# Sampling parameters as words of 32 bits, with the values that change no logits.
INTS = {"seed_low": 0, "seed_high": 0, "choice": 0, "top_k": 0, "prompt_length": 0}
INTS |= {"top_logprobs": 0, "biased": 0}
FLOATS = {"temperature": 0.0, "top_p": 1.0, "min_p": 0.0}
PENALTIES = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
FLOATS |= PENALTIES
NUM_WORDS = len(INTS) + len(FLOATS)


def pack_words(ints: dict[str, int], floats: dict[str, float]) -> np.ndarray:
    """Values of INTS and FLOATS as int32 words, (F,)."""
    int_words = np.array([ints[name] for name in INTS], np.uint32).view(np.int32)
    float_words = np.array([floats[name] for name in FLOATS], np.float32).view(np.int32)
    return np.concatenate([int_words, float_words])


def floats_of(words: np.ndarray) -> np.ndarray:
    """The float32 of which `words` are the bits."""
    return np.ascontiguousarray(words).view(np.float32)


def sampling_words(
    params: SamplingParams, choice: int, prompt_length: int, vocab_size: int
) -> np.ndarray:
    """The words of one completion of a request, (F,)."""
    ints = {
        "seed_low": params.seed & 0xFFFFFFFF,
        "seed_high": params.seed >> 32,
        "choice": choice,
        "top_k": min(params.top_k, vocab_size),
        "prompt_length": prompt_length,
        "top_logprobs": int(bool(params.logprobs)),
        "biased": int(bool(params.logit_bias)),
    }
    return pack_words(ints, {name: getattr(params, name) for name in FLOATS})


def bias_words(biases: Mapping[int, float], vocab_size: int) -> np.ndarray:
    """Tokens, `vocab_size` where there are no more, and after them the bits of their biases, int32
    (X,)."""
    tokens, values = np.full(MAX_LOGIT_BIAS, vocab_size, np.int32), np.zeros(MAX_LOGIT_BIAS)
    tokens[: len(biases)], values[: len(biases)] = list(biases), list(biases.values())
    return np.concatenate([tokens, values.astype(np.float32).view(np.int32)])


NEUTRAL_WORDS = pack_words(INTS, FLOATS)


def map_groups(f: Callable, *trees: Any) -> Any:
    """`f` run by each group of devices on its part of `trees`, whose arrays are (B, ...)."""
    results = sharding.without_trivial_mesh(functools.partial(_map_groups, f))(*trees)
    return jax.tree.map(_by_group, results)


def _by_group(array: jax.Array) -> jax.Array:
    return sharding.constrain(array, "batch", *(None,) * (array.ndim - 1))


def _map_groups(f: Callable, *trees: Any) -> Any:
    def local(*trees):
        results = f(*jax.tree.map(lambda array: array[0], trees))
        return jax.tree.map(lambda array: array[None], results)

    trees = jax.tree.map(_by_group, trees)
    return sharding.shard_map(local, [("batch",)] * len(trees), ("batch",))(*trees)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class SlotState:
    """Sequences in slots, as the devices know them; donated from step to step."""

    token_BS: Any  # the last one that was sampled
    table_BSM: Any  # pages
    words_BSF: Any  # sampling parameters
    history_BSN: Any  # prompt and answer of sequences with penalties
    banned_BSW: Any  # a bit for each token of the vocabulary, the lowest first
    bias_BSX: Any  # of sequences with logit_bias, as `bias_words`


class StepRows(NamedTuple):
    """The chunks of a step, (U, ...): what the model reads, and what sampling does."""

    tokens_UQ: Any
    table_UM: Any
    start_U: Any
    count_U: Any
    words_UF: Any
    history_UN: Any
    banned_UW: Any
    bias_UX: Any

    def sampling(self) -> SamplingBatch:
        """Sampling parameters for the token after each chunk."""
        values = unpack_words(self.words_UF)
        seed_U2 = jnp.stack([values.pop("seed_low"), values.pop("seed_high")], axis=1)
        return SamplingBatch(
            seed_B2=jax.lax.bitcast_convert_type(seed_U2, jnp.uint32),
            position_B=self.start_U + self.count_U,
            top_logprobs_B=values.pop("top_logprobs") > 0,
            tokens_BN=self.history_UN,
            banned_BW=self.banned_UW,
            biased_B=values.pop("biased") > 0,
            bias_BX=self.bias_UX,
            **{f"{name}_B": value for name, value in values.items()},
        )


def unpack_words(words_UF: jax.Array) -> dict[str, jax.Array]:
    """Values of INTS and FLOATS by name, (U,)."""
    ints = dict(zip(INTS, words_UF[:, : len(INTS)].T, strict=True))
    floats = jax.lax.bitcast_convert_type(words_UF[:, len(INTS) :], jnp.float32)
    return ints | dict(zip(FLOATS, floats.T, strict=True))


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class DecodeInputs:
    """A token of each slot, as words: the token (-1: the one that was sampled last), its position,
    1 (0: padding), the index of its page in the sequence, and that page."""

    words: Any  # (B, S, 5)

    def rows(self, slots: SlotState) -> tuple[StepRows, SlotState]:
        """The chunks of this step, and the slots with their new pages and tokens."""
        token_S, start_S, count_S, index_S, page_S = self.words.T
        live_S1 = count_S[:, None] > 0
        token_S = jnp.where(token_S < 0, slots.token_BS, token_S)
        words_SF = jnp.where(live_S1, slots.words_BSF, NEUTRAL_WORDS[None, :])
        table_SM = _put(slots.table_BSM, index_S, page_S, live_S1)
        history_SN = jax.lax.cond(
            jnp.any(_has_penalties(words_SF)),
            lambda history_SN: _put(history_SN, start_S, token_S, live_S1),
            lambda history_SN: history_SN,
            slots.history_BSN,
        )
        slots = dataclasses.replace(slots, table_BSM=table_SM, history_BSN=history_SN)
        rows = (token_S[:, None], table_SM, start_S, count_S, words_SF, history_SN)
        return StepRows(*rows, slots.banned_BSW, slots.bias_BSX), slots

    def store(self, slots: SlotState, token_S: jax.Array) -> SlotState:
        """The slots with the tokens that were sampled."""
        token_S = jnp.where(self.words[:, 2] > 0, token_S, slots.token_BS)
        return dataclasses.replace(slots, token_BS=token_S)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class PrefillInputs:
    """Chunks of prompts, as words: the slot that a prompt ends in (S where none does), the position
    and number of tokens, sampling parameters (F), pages (M), tokens (Q)."""

    words: Any  # (B, U, 3 + F + M + Q)

    def rows(self, slots: SlotState) -> tuple[StepRows, SlotState]:
        """The chunks of this step, and the slots with the sequences whose prompts end in it."""
        head, F, M = 3, NUM_WORDS, slots.table_BSM.shape[1]
        slot_U, start_U, count_U = self.words[:, :head].T
        words_UF = self.words[:, head : head + F]
        table_UM = self.words[:, head + F : head + F + M]
        slots = dataclasses.replace(
            slots,
            table_BSM=slots.table_BSM.at[slot_U].set(table_UM, mode="drop"),
            words_BSF=slots.words_BSF.at[slot_U].set(words_UF, mode="drop"),
        )
        rows_of_slots = (
            state.at[slot_U].get(mode="clip")
            for state in (slots.history_BSN, slots.banned_BSW, slots.bias_BSX)
        )
        tokens_UQ = self.words[:, head + F + M :]
        return StepRows(tokens_UQ, table_UM, start_U, count_U, words_UF, *rows_of_slots), slots

    def store(self, slots: SlotState, token_U: jax.Array) -> SlotState:
        """The slots with the tokens that were sampled at the ends of prompts."""
        token_S = slots.token_BS.at[self.words[:, 0]].set(token_U, mode="drop")
        return dataclasses.replace(slots, token_BS=token_S)


def _has_penalties(words_UF: jax.Array) -> jax.Array:
    values = unpack_words(words_UF)
    return has_penalties(*(values[name] for name in PENALTIES))


@functools.partial(jax.jit, donate_argnums=0)
def set_history(slots: SlotState, group, slot, tokens_N) -> SlotState:
    """The slots with the tokens of a sequence with penalties in one of them."""
    return dataclasses.replace(
        slots, history_BSN=_set_slot(slots.history_BSN, group, slot, tokens_N)
    )


@functools.partial(jax.jit, donate_argnums=0)
def set_banned(slots: SlotState, group, slot, banned_W) -> SlotState:
    """The slots with the tokens that are not to be chosen in one of them."""
    return dataclasses.replace(slots, banned_BSW=_set_slot(slots.banned_BSW, group, slot, banned_W))


@functools.partial(jax.jit, donate_argnums=0)
def set_bias(slots: SlotState, group, slot, bias_X) -> SlotState:
    """The slots with the biases of a sequence with logit_bias in one of them."""
    return dataclasses.replace(slots, bias_BSX=_set_slot(slots.bias_BSX, group, slot, bias_X))


def _set_slot(state_BSX: jax.Array, group, slot, row_X) -> jax.Array:
    at_BS = jnp.arange(state_BSX.shape[0])[:, None] == group
    at_BS &= jnp.arange(state_BSX.shape[1])[None, :] == slot
    at_BS1 = sharding.constrain(at_BS[:, :, None], "batch", None, None)
    return jnp.where(at_BS1, row_X[None, None, :], state_BSX)


def _put(state_SX: jax.Array, index_S, value_S, live_S1) -> jax.Array:
    """`state_SX` with a value at an index of each live row: no scatter, which TPUs do in turn."""
    at_SX = jnp.arange(state_SX.shape[1])[None, :] == index_S[:, None]
    return jnp.where(at_SX & live_S1, value_S[:, None], state_SX)
