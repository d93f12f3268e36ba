"""xAI's release of Grok-1 (`ckpt-0`) -> our tree of parameters.

The release is one folder of files `tensor00000_000`, `tensor00001_000`, ..., each with one whole
tensor: the token table, the final norm, then twelve tensors a layer. Layers come in the order of
their numbers as text (0, 1, 10, 11, ..., 19, 2, 20, ...), as JAX sorts the keys of a dict.

Matrices are int8 with bfloat16 scales, (..., groups, columns) for (..., rows, columns), where rows
are the contracted axis. Some have several groups because the released code split rows over eight
devices; that split ties nothing here to a mesh.

Shape letters: D embed, E experts, F mlp, H head_dim, K kv heads, L layers, N heads, V vocab.
"""

import dataclasses
import os
from pathlib import Path

import numpy as np

from grok.checkpoint.release_pickle import read_record
from grok.checkpoint.release_records import ArrayRecord, QuantizedRecord, Record
from grok.config import GrokConfig
from grok.errors import CheckpointError

# A layer's tensors in the order of their files: the released code's name, and ours.
LAYER_TENSORS = (
    ("moe/linear/w", "layers/moe/w_gate_EDF"),  # the branch that goes through GELU
    ("moe/linear_1/w", "layers/moe/w_down_EFD"),
    ("moe/linear_v/w", "layers/moe/w_up_EDF"),
    ("multi_head_attention/key/w", "layers/attention/w_key_DKH"),
    ("multi_head_attention/linear/w", "layers/attention/w_out_NHD"),
    ("multi_head_attention/query/w", "layers/attention/w_query_DNH"),
    ("multi_head_attention/value/w", "layers/attention/w_value_DKH"),
    ("rms_norm/scale", "layers/pre_attn_norm/scale_D"),
    ("rms_norm_1/scale", "layers/post_attn_norm/scale_D"),
    ("rms_norm_2/scale", "layers/pre_moe_norm/scale_D"),
    ("rms_norm_3/scale", "layers/post_moe_norm/scale_D"),
    ("router/w", "layers/moe/router_DE"),
)


@dataclasses.dataclass(frozen=True)
class ReleaseTensor:
    """One file of the release, and the parameter (or one layer of it) that the file holds."""

    file: str
    release_name: str
    name: str
    layer: int | None


@dataclasses.dataclass(frozen=True)
class TensorShape:
    """How the release keeps one layer of a parameter, and the shape that it has in our tree."""

    in_file: tuple[int, ...]
    in_tree: tuple[int, ...]
    quantized: bool


def tensor_names(num_layers: int) -> list[ReleaseTensor]:
    """All 2 + 12 * `num_layers` tensors, in the order of the release's files."""
    rows: list[tuple[str, str, int | None]] = [
        ("language_model/in_out_embed/embeddings", "embed/table_VD", None),
        ("language_model/rms_norm/scale", "final_norm/scale_D", None),
    ]
    for layer in sorted(range(num_layers), key=str):
        for release_name, name in LAYER_TENSORS:
            rows.append((f"transformer/decoder_layer_{layer}/{release_name}", name, layer))
    return [ReleaseTensor(f"tensor{index:05d}_000", *row) for index, row in enumerate(rows)]


def tensor_shapes(config: GrokConfig) -> dict[str, TensorShape]:
    """Shapes by the names of our tree; those of `layers/` are one layer's, without the axis L."""
    d, f, e = config.embed_dim, config.mlp_dim, config.num_experts
    n, k, h = config.num_heads, config.num_kv_heads, config.head_dim
    norms = [name for _, name in LAYER_TENSORS if name.endswith("norm/scale_D")]
    plain = {
        "embed/table_VD": (config.vocab_size, d),
        **dict.fromkeys(["final_norm/scale_D", *norms], (d,)),
        "layers/moe/router_DE": (d, e),
    }
    quantized = {
        "layers/moe/w_gate_EDF": ((e, d, f), (e, d, f)),
        "layers/moe/w_up_EDF": ((e, d, f), (e, d, f)),
        "layers/moe/w_down_EFD": ((e, f, d), (e, f, d)),
        # Columns of queries, keys and values, and rows of the output, run over heads first.
        "layers/attention/w_query_DNH": ((d, n * h), (d, n, h)),
        "layers/attention/w_key_DKH": ((d, k * h), (d, k, h)),
        "layers/attention/w_value_DKH": ((d, k * h), (d, k, h)),
        "layers/attention/w_out_NHD": ((n * h, d), (n, h, d)),
    }
    return {name: TensorShape(shape, shape, False) for name, shape in plain.items()} | {
        name: TensorShape(*shapes, True) for name, shapes in quantized.items()
    }


def scan_release(
    folder: str | os.PathLike[str], config: GrokConfig
) -> list[tuple[ReleaseTensor, Path, Record]]:
    """Every tensor of the release with its file and where in it the arrays lie, in file order.

    Reads headers, no array. Raises CheckpointError, with the file and what would be right, where
    files are missing or too many, are damaged, or have shapes of another model.
    """
    tensors = tensor_names(config.num_layers)
    _check_files(Path(folder), [tensor.file for tensor in tensors], config.num_layers)
    shapes = tensor_shapes(config)
    found = []
    for tensor in tensors:
        path = Path(folder, tensor.file)
        record = read_record(path)
        _check_record(path, tensor, record, shapes[tensor.name])
        found.append((tensor, path, record))
    return found


def read_release(folder: str | os.PathLike[str], config: GrokConfig) -> dict[str, np.ndarray]:
    """The release's parameters as float32 arrays by name, layers stacked on a leading axis L.

    Names and shapes are those of `tensor_shapes`, with L before the shapes of `layers/`. An int8
    value times a bfloat16 scale is exact in float32. `folder` is the one with the tensor files.
    Needs host memory for all parameters in float32, and little beside it. Raises CheckpointError
    before any array is read, as `scan_release` does.
    """
    found = scan_release(folder, config)
    shapes = tensor_shapes(config)
    tree = {
        name: np.empty(
            ((config.num_layers,) if name.startswith("layers/") else ()) + shape.in_tree, np.float32
        )
        for name, shape in shapes.items()
    }
    for tensor, path, record in found:
        whole = tree[tensor.name]
        target = whole if tensor.layer is None else whole[tensor.layer]
        if isinstance(record, ArrayRecord):
            target[...] = _map(path, record)
        else:
            values, scales = _read_quantized(path, record)
            _dequantize(values, scales, target.reshape(record.weight.shape))
    return tree


def read_quantized(path: str | os.PathLike[str]) -> tuple[np.ndarray, np.ndarray]:
    """A quantised file as it is: int8 (..., rows, columns), bfloat16 (..., groups, columns).

    The values are a read-only map of the file, read when touched. Raises CheckpointError where
    the file is damaged or not quantised.
    """
    record = read_record(path)
    if not isinstance(record, QuantizedRecord):
        raise CheckpointError(f"{path}: holds {_describe(record)}, not a quantised tensor.")
    return _read_quantized(Path(path), record)


def _read_quantized(path: Path, record: QuantizedRecord) -> tuple[np.ndarray, np.ndarray]:
    # Scales are copied: they lie at any offset, and a bfloat16 should lie at an even address.
    return _map(path, record.weight), np.array(_map(path, record.scales))


def _map(path: Path, record: ArrayRecord) -> np.ndarray:
    """The array as a read-only map of its file."""
    try:
        return np.memmap(
            path, dtype=record.dtype, mode="r", offset=record.offset, shape=record.shape
        )
    except (OSError, ValueError) as error:  # ValueError: shorter than when its header was read
        raise CheckpointError(f"{path}: cannot be read: {error}.") from error


def _dequantize(values: np.ndarray, scales: np.ndarray, out: np.ndarray) -> None:
    """Write values * scales to float32 `out` (..., rows, columns) without another such array."""
    *lead, rows, columns = values.shape
    groups = scales.shape[-2]
    split = (*lead, groups, rows // groups, columns)
    np.multiply(
        values.reshape(split), scales.astype(np.float32)[..., :, None, :], out=out.reshape(split)
    )


def _check_files(folder: Path, expected: list[str], num_layers: int) -> None:
    try:
        # Hidden files are the droppings of file managers and downloaders.
        present = {entry.name for entry in folder.iterdir() if not entry.name.startswith(".")}
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read: {error.strerror}.") from error
    right = (
        f"a release of {num_layers} layers has {len(expected)} files, "
        f"{expected[0]} to {expected[-1]}, and no others"
    )
    missing = [name for name in expected if name not in present]
    extra = sorted(present.difference(expected))
    if missing:
        others = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
        strangers = f"; {extra[0]} is here instead" if extra else ""
        raise CheckpointError(f"{folder / missing[0]}: is missing{others}{strangers}; {right}.")
    if extra:
        raise CheckpointError(f"{folder / extra[0]}: does not belong here; {right}.")


def _check_record(path: Path, tensor: ReleaseTensor, record: Record, right: TensorShape) -> None:
    if isinstance(record, QuantizedRecord):
        fits = right.quantized and record.weight.shape == right.in_file
    else:
        fits = (record.dtype, record.shape, False) == (np.float32, right.in_file, right.quantized)
    if not fits:
        form = "quantised int8" if right.quantized else "float32"
        raise CheckpointError(
            f"{path}: {tensor.release_name} is {_describe(record)}; for this model's config it "
            f"should be {form} {right.in_file}."
        )


def _describe(record: Record) -> str:
    if isinstance(record, QuantizedRecord):
        return f"quantised int8 {record.weight.shape}"
    return f"{record.dtype} {record.shape}"
