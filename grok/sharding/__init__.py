"""The mesh, the rules from logical to mesh axes, and the moves of arrays between them.

The rest of the code names logical axes ("embed", "heads", ...); only this package knows that a mesh
has the axes slice, data, expert and tensor. Meshes are of JAX's explicit kind: an array's type
states its sharding, and an operation that would have to guess one is an error while tracing.

Without a mesh every function here leaves arrays as they are, so the same model code runs on one
device. The ambient mesh is the one of `jax.set_mesh`, or the one the parameters live on.
"""

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
