"""Nucleus and sampling against the released code's, and against exact arithmetic where it rounds.

Letters: B rows, V vocab, P values of top_p.
"""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grok.infer.sampling import REMOVED, nucleus, sample

FOLDER = Path(__file__).parents[1] / "golden" / "sampler"
INFO = json.loads((FOLDER / "sampler.json").read_text())
DRAWS = 4096

# A float32 sum of probabilities lies within about 1e-6 of the exact one (eight units in the last
# place of 1, for up to 1000 terms). Where an exact cumulative sum is nearer than that to 1 - p, the
# count kept is an accident of rounding in any arithmetic: at p = 0, where the sum of all may fall
# short of 1, and where a probability is that small. p = 0 and p = 1 have tests of their own.
DECIDED = 1e-6


@functools.cache
def stored() -> dict[str, np.ndarray]:
    with np.load(FOLDER / "sampler.npz") as file:
        return dict(file)


def logits_of(row: str) -> jax.Array:
    return jnp.asarray(stored()[f"{row}.logits"], "bfloat16" if row.endswith("bf16") else "float32")


def kept_by_ours(row: str) -> np.ndarray:
    """Which of the row's logits ours keeps at each p, kept_PV."""
    top_p = jnp.asarray(stored()["top_p"])
    logits_PV = jnp.tile(logits_of(row)[None, :], (len(top_p), 1))
    return np.asarray(jax.jit(nucleus)(logits_PV, top_p)) > REMOVED


def largest(logits, count: int) -> np.ndarray:
    """Mask of the `count` largest; `count` takes ties in whole or not at all."""
    mask = logits >= np.sort(logits)[-count]
    assert mask.sum() == count
    return mask


@pytest.mark.parametrize("row", INFO["rows"])
def test_keeps_what_exact_arithmetic_keeps(row):
    facts, ours = INFO["rows"][row], kept_by_ours(row)
    logits = np.asarray(logits_of(row), np.float32)
    distances = facts["nearest_cumsum_distance"]
    decided = [p for p, distance in enumerate(distances) if distance > DECIDED]
    # All twelve rows have eleven p; all equal logits have sums that are exactly 1 - p, thrice.
    assert len(decided) >= (8 if row.startswith("allequal") else 9)
    for p in decided:
        expected = largest(logits, facts["kept_exact_float64"][p])
        np.testing.assert_array_equal(ours[p], expected, err_msg=f"top_p={stored()['top_p'][p]}")


@pytest.mark.parametrize("row", [row for row in INFO["rows"] if row.endswith("f32")])
def test_keeps_what_the_release_keeps_in_float32(row):
    theirs = np.unpackbits(stored()[f"{row}.kept"], axis=1)[:, : len(logits_of(row))]
    decided = np.asarray(INFO["rows"][row]["nearest_cumsum_distance"]) > DECIDED
    np.testing.assert_array_equal(kept_by_ours(row)[decided], theirs[decided])


@pytest.mark.parametrize("row", INFO["rows"])
def test_p_of_0_keeps_the_likeliest_and_its_ties_and_p_of_1_keeps_all(row):
    logits, ours = np.asarray(logits_of(row), np.float32), kept_by_ours(row)
    assert (stored()["top_p"][0], stored()["top_p"][-1]) == (0, 1)
    np.testing.assert_array_equal(ours[0], logits == logits.max())
    assert ours[-1].all()


def test_kept_logits_are_unchanged():
    logits = logits_of("big1000.bf16")[None, :]
    filtered = np.asarray(nucleus(logits, jnp.asarray([0.5])))
    assert filtered.dtype == np.float32
    mask = filtered > REMOVED
    assert 0 < mask.sum() < mask.size
    np.testing.assert_array_equal(filtered[mask], np.asarray(logits, np.float32)[mask])


@pytest.fixture(scope="module")
def rows():
    """The release's six rows of sampling: logits_BV (what it masks out removed), heat, top_p."""
    data = stored()
    logits_BV = np.where(data["sample.mask"] > 0, data["sample.logits"][:, 0], REMOVED)
    return (
        jnp.asarray(logits_BV),
        jnp.asarray(data["sample.temperature"]),
        jnp.asarray(data["sample.nucleus_p"]),
    )


@pytest.fixture(scope="module")
def draws(rows):
    """DRAWS tokens of each row, draws_SB, drawn for all rows at once."""
    keys_SB = jax.random.split(jax.random.key(0), (DRAWS, rows[0].shape[0]))
    return np.asarray(jax.jit(jax.vmap(sample, (0, None, None, None)))(keys_SB, *rows))


def test_draws_follow_the_releases_probabilities(draws):
    """Chi-square over the tokens that are expected five times or more, the others as one."""
    for row, expected_V in enumerate(stored()["sample.f32.probs"].astype(np.float64) * DRAWS):
        seen_V = np.bincount(draws[:, row], minlength=len(expected_V))
        assert not seen_V[expected_V == 0].any(), f"row {row} drew a token of probability 0"
        often = expected_V >= 5
        seen = np.append(seen_V[often], seen_V[~often].sum())
        expected = np.append(expected_V[often], expected_V[~often].sum())
        seen, expected = seen[expected > 0], expected[expected > 0]
        if len(expected) == 1:
            continue
        statistic = float(((seen - expected) ** 2 / expected).sum())
        # Mean k and variance 2k for k degrees of freedom; the seed is fixed, so it never flickers.
        freedom = len(expected) - 1
        assert statistic < freedom + 4 * np.sqrt(2 * freedom), f"row {row}: {statistic}, {freedom}"


def test_a_rows_token_does_not_depend_on_its_neighbours(rows, draws):
    keys_SB = jax.random.split(jax.random.key(0), (DRAWS, rows[0].shape[0]))
    draw = jax.jit(jax.vmap(sample, (0, None, None, None)))
    for row in (0, 3):
        one = [array[row : row + 1] for array in rows]
        tokens = np.asarray(draw(keys_SB[:, row : row + 1], *one))[:, 0]
        np.testing.assert_array_equal(tokens, draws[:, row])


def test_temperature_of_0_takes_the_likeliest(rows):
    logits_BV, heat_B, top_p_B = rows
    keys_B = jax.random.split(jax.random.key(1), len(heat_B))
    cold = heat_B.at[::2].set(0)
    tokens = np.asarray(jax.jit(sample)(keys_B, logits_BV, cold, top_p_B))
    assert tokens.dtype == np.int32
    np.testing.assert_array_equal(tokens[::2], np.argmax(logits_BV, axis=-1)[::2])
    np.testing.assert_array_equal(tokens[1::2], np.asarray(jax.jit(sample)(keys_B, *rows))[1::2])


def test_rows_of_different_settings_each_follow_their_own():
    """Side by side: greedy, nothing but the likeliest, and everything."""
    logits_BV = jnp.tile(jnp.asarray([0.0, 1.0, 0.5, -1.0])[None, :], (3, 1))
    keys_SB = jax.random.split(jax.random.key(2), (256, 3))
    settings = jnp.asarray([0.0, 1.0, 50.0]), jnp.asarray([1.0, 0.0, 1.0])
    tokens = jax.jit(jax.vmap(sample, (0, None, None, None)))(keys_SB, logits_BV, *settings)
    assert [len(set(row)) for row in np.asarray(tokens).T.tolist()] == [1, 1, 4]
