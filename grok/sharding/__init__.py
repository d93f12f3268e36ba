"""Where arrays live: the mesh, the rules from logical to mesh axes, and the moves between them.

The rest of the code names logical axes ("embed", "heads", ...); only this package knows that a mesh
has the axes slice, data, expert and tensor. Meshes are of JAX's explicit kind: an array's type
states its sharding, and an operation that would have to guess one is an error while tracing.

Without a mesh every function here leaves arrays as they are, so the same model code runs on one
device. The ambient mesh is the one of `jax.set_mesh`, or the one the parameters live on.
"""

from grok.config import MESH_AXES
from grok.sharding.collectives import (
    all_gather,
    axis_index,
    axis_names,
    pmax,
    psum,
    psum_scatter,
    shard_map,
)
from grok.sharding.fsdp import map_matrices, pin_row_major, unshard, unshard_local
from grok.sharding.mesh import (
    abstract_arrays,
    ambient_mesh,
    make_mesh,
    use_mesh_of,
    without_trivial_mesh,
)
from grok.sharding.rules import (
    BATCH_AXES,
    RULES,
    Axes,
    axis_size,
    constrain,
    einsum,
    kv_axis,
    sequence_parallel_axes,
    spec,
    storage_axes,
    unsharded_axes,
)

__all__ = [
    "BATCH_AXES",
    "MESH_AXES",
    "RULES",
    "Axes",
    "abstract_arrays",
    "all_gather",
    "ambient_mesh",
    "axis_index",
    "axis_names",
    "axis_size",
    "constrain",
    "einsum",
    "kv_axis",
    "make_mesh",
    "map_matrices",
    "pin_row_major",
    "pmax",
    "psum",
    "psum_scatter",
    "sequence_parallel_axes",
    "shard_map",
    "spec",
    "storage_axes",
    "unshard",
    "unshard_local",
    "unsharded_axes",
    "use_mesh_of",
    "without_trivial_mesh",
]
