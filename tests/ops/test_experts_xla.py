"""The tiled experts against the reference that runs every expert on every row.

Letters: R rows, C chosen experts of a row, D embed, F mlp, E experts.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grok.ops.moe.cpu import for_each_tile
from grok.ops.moe.experts_xla import (
    activate,
    expert_mlp,
    experts_reference,
    experts_xla,
)
from grok.ops.moe.tiling import training_tile_rows, xla_tile_rows

R, C, D, F, E = 37, 2, 8, 12, 4  # an odd number of rows, of which tiles of 8 leave a rest
TILE = 8

# Sums of at most 37 products, in another order: some units of 2^-24 = 6e-8.
TOLERANCE = 2e-6


def routing(kind: str) -> np.ndarray:
    """Experts of each row, expert_ids_RC: two different ones, as top-k gives."""
    rng = np.random.default_rng(3)
    ids_RC = np.stack([rng.permutation(E)[:C] for _ in range(R)])
    match kind:
        case "random":
            return ids_RC
        case "all to the same two":
            return np.tile([2, 0], (R, 1))
        case "one row to an expert":
            return np.where(np.arange(R)[:, None] == 5, [1, 3], [2, 0])
        case "empty first and last":
            return np.where(ids_RC == 0, [1, 2], np.where(ids_RC == E - 1, [2, 1], ids_RC))
        case "some absent":
            return ids_RC * 3 - 4  # -4, -1, 2, 5
        case "all absent":
            return np.where(ids_RC < 2, -1 - ids_RC, E + ids_RC)
        case "far outside":
            return np.where(ids_RC == 1, 2**30, np.where(ids_RC == 2, -(2**30), ids_RC))
    raise AssertionError(kind)


ROUTINGS = [
    "random",
    "all to the same two",
    "one row to an expert",
    "empty first and last",
    "some absent",
    "all absent",
    "far outside",
]


def arrays(rows: int, dtype=jnp.float32) -> list[jax.Array]:
    """x, gates and the three weights."""
    keys = jax.random.split(jax.random.key(4), 5)
    shapes = (rows, D), (rows, C), (E, D, F), (E, D, F), (E, F, D)
    x, topk_weights, *weights = (jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True))
    return [x.astype(dtype), jax.nn.sigmoid(topk_weights), *(w.astype(dtype) for w in weights)]


def one_size(x, topk_weights, expert_ids, *weights):
    return experts_xla(x, topk_weights, expert_ids, *weights, TILE)


def two_sizes(x, topk_weights, expert_ids, *weights):
    return experts_xla(x, topk_weights, expert_ids, *weights, TILE, (16, 4))


def value_and_gradients(experts):
    """The values, and gradients by x, gates and weights of a sum of them with random factors."""

    def loss(x, topk_weights, w_gate, w_up, w_down, expert_ids):
        y = experts(x, topk_weights, expert_ids, w_gate, w_up, w_down)
        factor = jax.random.normal(jax.random.key(5), y.shape)
        return jnp.sum(y.astype(jnp.float32) * factor), y

    run = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3, 4), has_aux=True))

    def named(arrays, expert_ids) -> dict[str, np.ndarray]:
        gradients, y = run(*arrays, jnp.asarray(expert_ids, jnp.int32))
        names = "x gate w_gate w_up w_down".split()
        actual = {"y": y} | {f"d {name}": g for name, g in zip(names, gradients, strict=True)}
        return jax.tree.map(np.asarray, actual)

    return named


run_one_size, run_reference = value_and_gradients(one_size), value_and_gradients(experts_reference)
run_two_sizes = value_and_gradients(two_sizes)


def assert_near(actual: dict, expected: dict, tolerance: float) -> None:
    for name in expected:
        assert actual[name].dtype == expected[name].dtype, name
        ours, theirs = (np.asarray(x[name], np.float32) for x in (actual, expected))
        error = np.abs(ours - theirs).max()
        assert error <= tolerance * np.abs(theirs).max(), (name, error)


@pytest.mark.parametrize("run", [run_one_size, run_two_sizes], ids=["tiles", "two sizes"])
@pytest.mark.parametrize("kind", ROUTINGS)
def test_values_and_gradients_equal_the_references(kind, run):
    expert_ids = routing(kind)
    assert_near(run(arrays(R), expert_ids), run_reference(arrays(R), expert_ids), TOLERANCE)


def test_one_row():
    expert_ids = [[3, 1]]
    assert_near(
        run_one_size(arrays(1), expert_ids), run_reference(arrays(1), expert_ids), TOLERANCE
    )


def test_bfloat16_rounds_where_the_reference_does():
    inputs, expert_ids = arrays(R, jnp.bfloat16), routing("random")
    actual, expected = run_one_size(inputs, expert_ids), run_reference(inputs, expert_ids)
    np.testing.assert_allclose(actual["y"], expected["y"], rtol=0, atol=1e-5 * 20)
    # Gradients are rounded to 8 bits at each product and once more at the end.
    assert_near(actual, expected, 2**-6)


def test_absent_experts_add_nothing_and_have_no_gradient():
    actual = run_one_size(arrays(R), routing("all absent"))
    assert not any(array.any() for array in actual.values())


def test_an_expert_without_rows_has_no_gradient():
    actual = run_one_size(arrays(R), routing("empty first and last"))
    for name in ("d w_gate", "d w_up", "d w_down"):
        assert not actual[name][[0, E - 1]].any()
        assert actual[name][1:3].any(axis=(1, 2)).all()


def test_a_rows_result_does_not_depend_on_the_other_rows():
    """Bit for bit, though its place in a tile is another."""
    inputs, expert_ids = arrays(R), routing("random")
    alone = np.asarray(run_one_size(inputs, expert_ids)["y"])
    order = np.random.default_rng(6).permutation(R)
    shuffled = run_one_size([inputs[0][order], inputs[1][order], *inputs[2:]], expert_ids[order])
    np.testing.assert_array_equal(shuffled["y"], alone[order])


def test_tile_size_changes_no_value():
    inputs, expert_ids = arrays(R), jnp.asarray(routing("random"), jnp.int32)
    x, topk_weights, *weights = inputs
    expected = one_size(x, topk_weights, expert_ids, *weights)
    for tile in (1, 16, 512):
        actual = experts_xla(x, topk_weights, expert_ids, *weights, tile)
        np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE * abs(expected).max())


@pytest.mark.parametrize(
    ("assignments", "experts", "rows"),
    [(2, 8, 8), (128, 8, 8), (1024, 8, 64), (1040, 8, 72), (8192, 8, 512), (2**20, 8, 512)],
)
def test_tiles_are_half_a_fair_share_in_eights_between_8_and_512(assignments, experts, rows):
    assert xla_tile_rows(assignments, 1, experts) == rows


@pytest.mark.parametrize(
    ("assignments", "experts", "rows"),
    [
        (2, 8, (8,)),
        (128, 8, (16,)),
        (512, 8, (64, 8)),
        (1040, 8, (128, 16)),
        (4096, 8, (512, 64)),
        (2**20, 8, (512, 64)),
    ],
)
def test_tiles_in_training_are_a_fair_share_and_an_eighth_of_it(assignments, experts, rows):
    assert training_tile_rows(assignments, 1, experts) == rows


def test_an_expert_is_gelu_of_one_branch_times_the_other():
    x, _, w_gate, w_up, w_down = (np.asarray(a, np.float64) for a in arrays(R))
    branch = x @ w_gate[0]
    inner = np.sqrt(2 / np.pi) * (branch + 0.044715 * branch**3)
    exact = (0.5 * branch * (1 + np.tanh(inner)) * (x @ w_up[0])) @ w_down[0]
    actual = jax.jit(expert_mlp)(
        *(jnp.asarray(a, jnp.float32) for a in (x, w_gate[0], w_up[0])),
        jnp.asarray(w_down[0], jnp.float32),
    )
    np.testing.assert_allclose(actual, exact, rtol=0, atol=TOLERANCE * np.abs(exact).max())


@pytest.mark.parametrize(
    ("activation", "at_one"), [("gelu_tanh", 0.8411920), ("gelu", 0.8413447), ("silu", 0.7310586)]
)
def test_activations(activation, at_one):
    actual = activate(jnp.asarray(1.0), activation)
    np.testing.assert_allclose(actual, at_one, rtol=0, atol=2e-7)
    tiles, ids = (TILE, training_tile_rows(R, C, E)), routing("random")
    options = {"tile": tiles[0], "training_tiles": tiles[1], "activation": activation}
    ours = value_and_gradients(functools.partial(experts_xla, **options))
    plain = value_and_gradients(functools.partial(experts_reference, activation=activation))
    assert_near(ours(arrays(R), ids), plain(arrays(R), ids), TOLERANCE)


def test_little_of_a_tile_is_empty():
    """Each pair of an expert is multiplied once, and little else: up to half of a large tile in
    small ones, and more in a large one, which takes no longer."""
    start, most = 3, 50
    order = jnp.concatenate([jnp.arange(most), jnp.full((16,), most)])

    def body(slot, assignments, carry):
        seen, rows = carry
        return seen.at[assignments].add(1, mode="drop"), rows + len(assignments)

    for count in range(most - start):
        seen, rows = for_each_tile(body, (jnp.zeros(most, int), 0), order, start, count, (16, 4))
        np.testing.assert_array_equal(seen, [start <= pair < start + count for pair in range(most)])
        left = count % 16
        assert rows == count - left + (16 if left > 8 else -(-left // 4) * 4)
