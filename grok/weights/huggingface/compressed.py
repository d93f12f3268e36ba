"""int4 matrices in safetensors, as the compressed-tensors library stores them in its format
"pack-quantized", and vLLM reads them: of a module NAME with a matrix [out, in], `weight_packed`
[out, in/8] has eight values in an int32, the first in its lowest four bits, each plus 8;
`weight_scale` [out, groups] a bfloat16 for each group of inputs; `weight_shape` the two sizes.
https://github.com/vllm-project/compressed-tensors"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from grok.config import ModelConfig
from grok.errors import CheckpointError, ConfigError
from grok.model.param_spec import ParamSpec
from grok.weights.cast import INT4_GROUP, QuantizedSource
from grok.weights.huggingface.adapters.adapter import HEAD_NAME, Adapter, HuggingFaceTensor
from grok.weights.huggingface.safetensors import TensorInfo
from grok.weights.int4 import INT4
from grok.weights.source import Part, Source, TensorSpec, part_shape, read_part

KEY, METHOD, FORMAT = "quantization_config", "compressed-tensors", "pack-quantized"
PACKED, SCALE, SHAPE = "weight_packed", "weight_scale", "weight_shape"
PER_INT32, OFFSET = 8, 8
PACKED_DTYPES = ("int4", "int4_all")  # of exports that are packed
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
# What is read, of a group's `weights`.
WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True}
Array = tuple[str, np.dtype, tuple[int, ...]]  # name, type, shape


class Int4Source(QuantizedSource):
    """A source as an export in `dtype`, one of PACKED_DTYPES, has it: what is packed in int4, all
    else in bfloat16. Raises ConfigError where INT4_GROUP does not divide a matrix's rows."""

    def __init__(self, source: Source, dtype: str):
        super().__init__(source, dtype=dtype)
        self._dtype = BFLOAT16
        for name, spec in self.tensors.items():
            if not is_packed(spec.param, dtype):
                self.tensors[name] = TensorSpec(spec.param, BFLOAT16)
            elif spec.groups is None or spec.param.contract_size != INT4_GROUP * spec.groups:
                raise ConfigError(
                    f"{name} has {spec.param.contract_size} rows in {spec.groups} groups, and in "
                    f"such a folder {INT4_GROUP} rows share a scale; --dtype bfloat16 would work."
                )


def is_packed(param: ParamSpec, dtype: str) -> bool:
    """True of what an export in `dtype` packs: in int4 the matrices of MLP and experts, in int4_all
    attention's too, of others nothing."""
    return dtype in PACKED_DTYPES and param.is_matmul and param.quantized_dtype(dtype) == "int4"


def packed_arrays(tensor: HuggingFaceTensor) -> list[Array]:
    """The arrays of a packed tensor in order."""
    module, (columns, rows) = tensor.name.removesuffix("weight"), tensor.shape
    return [
        (f"{module}{PACKED}", np.dtype(np.int32), (columns, rows // PER_INT32)),
        (f"{module}{SCALE}", BFLOAT16, (columns, rows // INT4_GROUP)),
        (f"{module}{SHAPE}", np.dtype(np.int64), (2,)),
    ]


def quantization_config(adapter: Adapter, config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The `quantization_config` of an export in one of PACKED_DTYPES. Linear layers that are not
    packed are named by patterns, and the output layer by its name."""
    layout = adapter.layouts[adapter.export_layout]
    plain = []
    for tensor in adapter.tensors(adapter.export_layout, config):
        if tensor.transposed and not is_packed(tensor.param, dtype):
            parts = map(re.escape, layout.names[tensor.param.name].split("{layer}"))
            plain.append(f"re:{r'\d+'.join(parts).removesuffix(r'\.weight')}$")
    weights = WEIGHTS | {
        "strategy": "group",
        "group_size": INT4_GROUP,
        "dynamic": False,
        "actorder": None,
        "block_structure": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }
    group: dict[str, Any] = {"targets": ["Linear"], "weights": weights}
    group |= {"input_activations": None, "output_activations": None}
    return {
        "quant_method": METHOD,
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": [HEAD_NAME.removesuffix(".weight"), *dict.fromkeys(plain)],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def without_quantization(path: str, data: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json without what it says of packed int4 weights, which the tensors show. Raises
    CheckpointError for another quantisation of this library."""
    stated = data.get(KEY)
    if not isinstance(stated, dict) or stated.get("quant_method") != METHOD:
        return dict(data)
    problem = None
    if stated.get("format") != FORMAT:
        problem = f"format is {stated.get('format')!r:.40}"
    elif stated.get("kv_cache_scheme") or stated.get("sparsity_config"):
        problem = "it has a kv_cache_scheme or a sparsity_config"
    groups = stated.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ({},):
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict) or any(weights.get(k) != v for k, v in WEIGHTS.items()):
            problem = f"weights are {weights!r:.100}"
        elif group.get("input_activations") or group.get("output_activations"):
            problem = "activations are quantised"
    if problem:
        raise CheckpointError(
            f"{path}: {KEY} is not of a kind that is read, symmetric int4 weights alone "
            f"({FORMAT}): {problem}; a copy of the model in bfloat16 would work."
        )
    return {key: value for key, value in data.items() if key != KEY}


def pack(values: np.ndarray) -> np.ndarray:
    """int8 values (n, 8k) from -8 to 7 as int32 (n, k)."""
    unsigned = (values + OFFSET).astype(np.uint32).reshape(len(values), -1, PER_INT32)
    shifts = np.arange(0, 32, 4, dtype=np.uint32)
    return np.bitwise_or.reduce(unsigned << shifts, axis=-1).view(np.int32)


def unpack(packed: np.ndarray) -> np.ndarray:
    """The inverse of `pack`, int4."""
    shifts = np.arange(0, 32, 4, dtype=np.uint32)
    unsigned = packed.view(np.uint32)[..., None] >> shifts & np.uint32(0xF)
    # Plus 8 or minus 8 is the same in four bits: the highest is another.
    return (unsigned.astype(np.uint8) ^ np.uint8(OFFSET)).reshape(len(packed), -1).view(INT4)


@dataclasses.dataclass(frozen=True)
class PackedTensor:
    """A matrix [out, in] of a folder in int4: the arrays of its values and scales."""

    packed: TensorInfo
    scales: TensorInfo
    shape: tuple[int, int]

    @property
    def path(self) -> str:
        """The file of its values."""
        return self.packed.path

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        """Its arrays."""
        return self.packed, self.scales

    @property
    def dtype(self) -> np.dtype:
        """Type of the values."""
        return INT4

    @property
    def groups(self) -> int:
        """Groups of inputs with a scale each."""
        return self.scales.shape[1]

    def read(self, sizes: tuple[int, ...], part: Part) -> Iterator[tuple[np.ndarray, Part]]:
        """Yields a `part` and its place in that, as `StoredTensor.read`."""
        columns = next(n for n in range(len(sizes)) if np.prod(sizes[:n]) == self.shape[0])
        out, rows = (_flat(sizes[s], part[s]) for s in (slice(columns), slice(columns, None)))
        words = slice(rows[0] // PER_INT32, rows[-1] // PER_INT32 + 1)
        box = slice(int(out[0]), int(out[-1]) + 1), words
        values = unpack(self._read(self.packed, box))
        values = values[out - out[0]][:, rows - words.start * PER_INT32]
        yield values.reshape(part_shape(part)), tuple(slice(0, n) for n in part_shape(part))

    def read_scales(self, sizes: tuple[int, ...], columns: Part, groups: slice) -> np.ndarray:
        """Scales of some columns, of `sizes` all together: (groups, columns)."""
        out = _flat(sizes, columns)
        box = slice(int(out[0]), int(out[-1]) + 1), groups
        return self._read(self.scales, box)[out - out[0]].T

    def _read(self, array: TensorInfo, box: Part) -> np.ndarray:
        out = np.empty(part_shape(box), array.dtype)
        return read_part(array.path, array.offset, array.shape, box, out)


def _flat(sizes: tuple[int, ...], part: Part) -> np.ndarray:
    """The indices of a part of some axes, taken together."""
    return np.arange(int(np.prod(sizes))).reshape(sizes)[part].reshape(-1)


def find_packed(
    name: str, shape: tuple[int, ...], entries: Mapping[str, tuple[TensorInfo, ...]]
) -> PackedTensor | None:
    """The packed form of the tensor `name` of this shape; None where it is not there. Raises
    CheckpointError for arrays of other shapes or types."""
    module = name.removesuffix("weight")
    if f"{module}{PACKED}" not in entries:
        return None
    (packed,) = entries[f"{module}{PACKED}"]
    if f"{module}{SCALE}" not in entries:
        raise CheckpointError(f"{packed.path}: {module}{SCALE} is missing, beside {PACKED}.")
    (scales,) = entries[f"{module}{SCALE}"]
    columns, rows = shape
    right = (columns, -(-rows // PER_INT32))
    if packed.shape != right:
        problem = f"{module}{PACKED} has shape {packed.shape}, which should be {right}"
    elif scales.dtype != BFLOAT16:
        problem = f"{module}{SCALE} is {scales.dtype}, and scales of bfloat16 are read"
    elif len(scales.shape) != 2 or scales.shape[0] != columns or rows % max(1, scales.shape[1]):
        problem = f"{module}{SCALE} has shape {scales.shape}, for {columns} rows of {rows}"
    else:
        return PackedTensor(packed, scales, (columns, rows))
    raise CheckpointError(f"{packed.path}: {problem}.")


def packed_names(name: str) -> set[str]:
    """The arrays of a packed tensor."""
    module = name.removesuffix("weight")
    return {f"{module}{part}" for part in (PACKED, SCALE, SHAPE)}
