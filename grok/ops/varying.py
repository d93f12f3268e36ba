"""Types of arrays inside `shard_map`: over which mesh axes their values may differ."""

import jax


def pvary(x: jax.Array) -> jax.Array:
    """`x` typed as possibly different on every device, so that its gradient is summed over all."""
    return pvary_over(x, tuple(jax.sharding.get_abstract_mesh().manual_axes))


def pvary_over(x: jax.Array, names: tuple[str, ...]) -> jax.Array:
    """As `pvary`, along these mesh axes alone."""
    invariant = tuple(name for name in names if name not in jax.typeof(x).mat.varying)
    return jax.lax.pcast(x, invariant, to="varying") if invariant else x


def shape_like(x: jax.Array, shape: tuple[int, ...], dtype) -> jax.ShapeDtypeStruct:
    """Shape and type of a result that varies over the devices that `x` varies over."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(x).mat)
