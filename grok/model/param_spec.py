"""A weight on one line: `ParamSpec`, which every module declares for each of its weights.

All else that the code knows of a weight is derived from its spec: how it is drawn and sharded, what
it counts in parameters and FLOPs, which adapters, int8 scales and factored moments it can have, and
in which pieces checkpoints keep it. `grok.model.params` collects the specs of a model in one table.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding

from grok import sharding
from grok.config import ModelConfig
from grok.sharding import Axes

Use = Literal["matmul", "embed", "router", "norm", "adapter"]


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """Shape, logical axes and use of a weight.

    The axes of a matrix are leading ones (layers, experts), then `contract_dims` that a product
    sums over, then `output_dims` of its result; a vector has neither. A `matmul` may be int8, have
    an adapter, and be made orthogonal by Muon; the others stay floats. `fan_in` is the number of
    terms of a sum that the weight enters, None for a weight that starts as ones. Of a lookup a
    token reads one row, and multiplies by none. `module` and `name` are filled in when the specs of
    a model are collected.
    """

    shape: tuple[int, ...]
    axes: Axes
    use: Use = "matmul"
    contract_dims: int = 0
    output_dims: int = 0
    fan_in: int | None = None
    is_lookup: bool = False
    module: str = ""
    name: str = ""

    @classmethod
    def matmul(cls, shape: tuple[int, ...], axes: Axes, contract: int, output: int) -> "ParamSpec":
        """A matrix, or one for each entry of the leading axes."""
        return cls._matrix(shape, axes, "matmul", contract, output)

    @classmethod
    def router(cls, shape: tuple[int, ...], axes: Axes) -> "ParamSpec":
        """A router's matrix, small and used in float32."""
        return cls._matrix(shape, axes, "router", 1, 1)

    @classmethod
    def _matrix(cls, shape, axes, use: Use, contract: int, output: int) -> "ParamSpec":
        lead = len(shape) - contract - output
        fan_in = math.prod(shape[lead : lead + contract])
        return cls(shape, axes, use, contract, output, fan_in)

    @classmethod
    def embed(cls, shape: tuple[int, ...], axes: Axes) -> "ParamSpec":
        """A token table (V, D): it embeds tokens, and scores the residual stream, D terms a sum."""
        return cls(shape, axes, "embed", 1, 1, shape[-1])

    @classmethod
    def norm(cls, dim: int) -> "ParamSpec":
        """The scale of a norm."""
        return cls((dim,), ("embed",), "norm")

    def stacked(self, num_layers: int) -> "ParamSpec":
        """The same weight of every layer, on a leading axis."""
        return dataclasses.replace(
            self, shape=(num_layers, *self.shape), axes=("layers", *self.axes)
        )

    @property
    def is_stacked(self) -> bool:
        """True where the first axis is that of the layers."""
        return self.axes[:1] == ("layers",)

    @property
    def is_per_expert(self) -> bool:
        """True of weights of which each expert has its own."""
        return "experts" in self.axes and self.use != "router"

    @property
    def is_wide(self) -> bool:
        """True of the matrices of MLP and experts, most of a layer."""
        return "mlp" in self.axes

    @property
    def is_matmul(self) -> bool:
        """True of matrices that may be int8 or int4, and have adapters."""
        return self.use == "matmul"

    def quantized_dtype(self, param_dtype: str) -> Literal["int8", "int4"]:
        """Type of the values of a matrix in a model of this type: int4 leaves attention's in
        int8, int4_all leaves none."""
        is_int4 = param_dtype == "int4_all" or (param_dtype == "int4" and self.is_wide)
        return "int4" if is_int4 else "int8"

    @property
    def is_row_parallel(self) -> bool:
        """True of a matrix whose rows, not columns, are split over the devices that share heads."""
        return any(self.axes[axis] in ("heads", "mlp") for axis in self.contract_axes)

    @property
    def short_name(self) -> str:
        """The weight's word alone, as in LoRA targets: `query` of
        `layers/attention/w_query_DNH`."""
        leaf = self.name.rpartition("/")[2]
        return leaf.removeprefix("w_").rpartition("_")[0]

    @property
    def size(self) -> int:
        """Number of parameters."""
        return math.prod(self.shape)

    @property
    def contract_axes(self) -> range:
        """The axes that a product sums over."""
        stop = len(self.shape) - self.output_dims
        return range(stop - self.contract_dims, stop)

    @property
    def output_axes(self) -> range:
        """The axes of a product's result."""
        return range(len(self.shape) - self.output_dims, len(self.shape))

    @property
    def lead_dims(self) -> int:
        """Number of axes before those of one matrix; of a tensor that is none, of its layers."""
        if self.contract_dims:
            return self.contract_axes.start
        return int(self.is_stacked)

    @property
    def contract_size(self) -> int:
        """Rows of one matrix, its contracted axes taken together."""
        return math.prod(self.shape[axis] for axis in self.contract_axes)

    @property
    def output_size(self) -> int:
        """Columns of one matrix, its output axes taken together."""
        return math.prod(self.shape[axis] for axis in self.output_axes)

    def split[T](self, axes: tuple[T, ...]) -> tuple[tuple[T, ...], tuple[T, ...], tuple[T, ...]]:
        """One entry for each axis, in three parts: of leading axes, of rows, of columns."""
        columns = len(axes) - self.output_dims
        rows = columns - self.contract_dims
        return axes[:rows], axes[rows:columns], axes[columns:]

    def as_matrices(self) -> tuple[int, ...]:
        """The shape with rows and columns as one axis each."""
        return (*self.shape[: self.lead_dims], self.contract_size, self.output_size)

    def scales_shape(self, num_groups: int) -> tuple[int, ...]:
        """Shape of scales: one for each column and group of consecutive rows."""
        columns = (self.shape[axis] for axis in self.output_axes)
        return (*self.shape[: self.lead_dims], num_groups, *columns)

    def lora_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of an adapter's factors a (..., rows, rank) and b (..., rank, columns)."""
        columns = len(self.shape) - self.output_dims
        return (*self.shape[:columns], rank), (
            *self.shape[: self.lead_dims],
            rank,
            *self.shape[columns:],
        )

    def storage_axes(self, param_dtype: str) -> Axes:
        """Logical axes that the weight is stored in, on the ambient mesh, ZeRO-3 where it pays.

        Beside quantised matrices, which only serve, nothing is gathered for each token.
        """
        return sharding.storage_axes(self.axes, self.shape, param_dtype)

    def abstract(self, dtype: str, param_dtype: str) -> jax.ShapeDtypeStruct:
        """Shape and `dtype`, and the placement on the ambient mesh."""
        mesh, axes = sharding.ambient_mesh(), self.storage_axes(param_dtype)
        placement = None if mesh is None else NamedSharding(mesh, sharding.spec(*axes))
        return jax.ShapeDtypeStruct(self.shape, jnp.dtype(dtype), sharding=placement)

    def initialize(self, key: jax.Array, dtype: str, param_dtype: str) -> jax.Array:
        """Ones, or a normal cut at two sigma of standard deviation 1/sqrt(fan_in), in `dtype`."""
        axes = self.storage_axes(param_dtype)
        if self.fan_in is None:
            return sharding.constrain(jnp.ones(self.shape, dtype), *axes)
        # Without a placement of its own, every device would draw the whole tensor and keep a part.
        spec = None if sharding.ambient_mesh() is None else sharding.spec(*axes)
        values = jax.random.truncated_normal(key, -2, 2, self.shape, out_sharding=spec)
        # 0.8796 is the standard deviation of a unit normal cut at two sigma.
        return (values / (0.87962566 * math.sqrt(self.fan_in))).astype(dtype)


def init_params(
    module: nnx.Module,
    key: jax.Array | None,
    specs: dict[str, ParamSpec],
    config: ModelConfig,
    num_layers: int | None = None,
) -> None:
    """Sets fresh parameters of `module`, with `num_layers` stacked on a first axis if given;
    without a key, their shapes."""
    keys = [key] if len(specs) == 1 else split_key(key, len(specs))
    for key, (name, spec) in zip(keys, specs.items(), strict=True):
        stacked = spec if num_layers is None else spec.stacked(num_layers)
        dtypes = config.float_dtype, config.param_dtype
        values = stacked.abstract(*dtypes) if key is None else stacked.initialize(key, *dtypes)
        setattr(module, name, nnx.Param(values))


def split_key(key: jax.Array | None, count: int) -> Any:
    """So many keys, or None as often."""
    return [None] * count if key is None else jax.random.split(key, count)


def prefixed(prefix: str, specs: dict[str, ParamSpec]) -> dict[str, ParamSpec]:
    """The specs of a submodule, under its attribute's name."""
    return {
        f"{prefix}/{name}": dataclasses.replace(spec, module=spec.module or prefix)
        for name, spec in specs.items()
    }


def name_of(path) -> str:
    """The path in a tree of modules as a name, without the field of a parameter that holds it."""
    return "/".join(key.name for key in path if key.name != "value")


def map_params(f: Callable, module: Any) -> Any:
    """`jax.tree.map` over the parameters of a module, each a leaf with its path, `f(path,
    param)`."""
    return jax.tree_util.tree_map_with_path(
        f, module, is_leaf=lambda node: isinstance(node, nnx.Param)
    )
