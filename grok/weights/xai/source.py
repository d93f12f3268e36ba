"""xAI's release of Grok-1 (`ckpt-0`) as a source: a file a tensor, int8 matrices with scales.

Letters: D embed, E experts, F mlp, H head_dim, K kv heads, L layers, N heads, V vocab.
"""

import dataclasses
import math
import os
import re
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np

from grok import storage
from grok.config import AttentionConfig, ModelConfig, MoEConfig
from grok.errors import CheckpointError, ConfigError
from grok.model.param_spec import ParamSpec
from grok.model.params import param_specs
from grok.weights.source import Part, Source, TensorSpec, part_shape, read_part
from grok.weights.xai.objects import StoredTensor
from grok.weights.xai.unpickler import read_tensor

# Suffixes of the files that aria2, browsers, curl and wget leave beside or instead of the file.
UNFINISHED = (".aria2", ".crdownload", ".download", ".incomplete", ".part", ".partial", ".tmp")
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
    ("rms_norm_2/scale", "layers/pre_ffn_norm/scale_D"),
    ("rms_norm_3/scale", "layers/post_ffn_norm/scale_D"),
    ("router/w", "layers/moe/router_DE"),
)


@dataclasses.dataclass(frozen=True)
class ReleaseTensor:
    """One file of the release, and the parameter (or one layer of it) that the file holds."""

    file: str
    release_name: str
    name: str
    layer: int | None

    def __str__(self) -> str:
        layer = "" if self.layer is None else f", layer {self.layer}"
        return f"{self.file} ({self.name}{layer})"


def tensor_names(num_layers: int) -> list[ReleaseTensor]:
    """All 2 + 12 * `num_layers` tensors, in the order of the release's files: layers in that of
    their numbers as text (0, 1, 10, ..., 19, 2, 20, ...), as JAX sorts the keys of a dict."""
    rows: list[tuple[str, str, int | None]] = [
        ("language_model/in_out_embed/embeddings", "embed/table_VD", None),
        ("language_model/rms_norm/scale", "final_norm/scale_D", None),
    ]
    for layer in sorted(range(num_layers), key=str):
        for release_name, name in LAYER_TENSORS:
            rows.append((f"transformer/decoder_layer_{layer}/{release_name}", name, layer))
    return [ReleaseTensor(f"tensor{index:05d}_000", *row) for index, row in enumerate(rows)]


def file_shape(spec: ParamSpec) -> tuple[int, ...]:
    """The shape of a parameter, or of one layer of it, in a release's file."""
    return (spec.as_matrices() if spec.is_matmul else spec.shape)[spec.is_stacked :]


class ReleaseSource(Source):
    """A `ckpt-0` folder, local or at gs://. Opening it reads every file's header, and no array.
    Raises CheckpointError, with file and remedy, where files are missing, too many, damaged, or of
    another model. Files do not name their tensors: two of one shape may be swapped unnoticed."""

    format = "xai"

    def __init__(self, folder: str | os.PathLike[str], config: ModelConfig):
        self.path, self.config = os.fspath(folder), config
        tensors = tensor_names(config.num_layers)
        self._check_files([tensor.file for tensor in tensors])
        specs = param_specs(config)
        if differing := sorted(specs.keys() ^ {tensor.name for tensor in tensors}):
            raise CheckpointError(
                f"{self.path}: a release and this model's config differ: only one of them has "
                f"{', '.join(differing)}; model.norm.sandwich=true is a release's."
            )
        paths = [storage.join(self.path, tensor.file) for tensor in tensors]
        # Sixteen at a time: a remote file takes some round trips.
        with ThreadPoolExecutor(16) as pool:
            all_stored = list(pool.map(read_tensor, paths))
        self._check_shapes(tensors, all_stored)
        self._stored: dict[tuple[str, int | None], tuple[str, StoredTensor]] = {}
        groups: dict[str, int] = {}
        for tensor, path, stored in zip(tensors, paths, all_stored, strict=True):
            if stored.scales is not None:
                layer_groups = stored.scales.shape[-2]
                if groups.setdefault(tensor.name, layer_groups) != layer_groups:
                    raise CheckpointError(
                        f"{path}: {tensor.release_name} has {layer_groups} groups of scales, and "
                        f"the same tensor of other layers has {groups[tensor.name]}."
                    )
            self._stored[tensor.name, tensor.layer] = path, stored
        self.tensors = {
            name: TensorSpec(spec, np.dtype("int8" if count else "float32"), count)
            for name, spec in specs.items()
            for count in [groups.get(name)]
        }

    def read(self, name: str, part: Part) -> np.ndarray:
        """Values of a part: float32, or int8 as they are."""
        return self._read(name, part, self.tensors[name].shape, scales=False)

    def read_scales(self, name: str, part: Part) -> np.ndarray:
        """Scales of a part, bfloat16, as they are."""
        return self._read(name, part, self.tensors[name].scales_shape, scales=True)

    def _read(self, name: str, part: Part, shape: tuple[int, ...], scales: bool) -> np.ndarray:
        spec = self.tensors[name]
        out = np.empty(part_shape(part), ml_dtypes.bfloat16 if scales else spec.dtype)
        stacked = spec.param.is_stacked
        for index, layer in enumerate(range(part[0].start, part[0].stop) if stacked else (None,)):
            path, stored = self._stored[name, layer]
            array = stored.scales if scales else stored.values
            assert array is not None
            # Heads and their width are one axis in the file, and the same bytes as two.
            one = out[index] if stacked else out
            read_part(path, array.offset, shape[stacked:], part[stacked:], one)
        return out

    def _check_files(self, expected: list[str]) -> None:
        # File managers and downloaders leave hidden files.
        files = storage.list_files(self.path, CheckpointError)
        present = {name for name in files if not name.startswith(".")}
        right = (
            f"a release of {self.config.num_layers} layers has {len(expected)} files, "
            f"{expected[0]} to {expected[-1]}, and no others"
        )
        missing = [name for name in expected if name not in present]
        extra = sorted(present.difference(expected))
        for path in (storage.join(self.path, name) for name in extra):
            file, suffix = os.path.splitext(path.rpartition("/")[2])
            if suffix in UNFINISHED and file in expected:
                remedy = f"{file} has to be downloaded to its end, and {file}{suffix} to go"
                problem = "is what a download leaves while it is unfinished"
                raise CheckpointError(f"{path}: {problem}; {remedy}.")
        if missing or extra:
            others = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
            instead = f"; {extra[0]} is here instead" if extra else ""
            problem = f"is missing{others}{instead}" if missing else "does not belong here"
            path = storage.join(self.path, (missing or extra)[0])
            raise CheckpointError(f"{path}: {problem}; {right}.")

    def _check_shapes(self, tensors: list[ReleaseTensor], all_stored: list[StoredTensor]) -> None:
        pairs, specs = zip(tensors, all_stored, strict=True), param_specs(self.config)
        wrong = [(t, stored) for t, stored in pairs if not _fits(stored, specs[t.name])]
        if not wrong:
            return
        tensor, stored = wrong[0]
        expected = specs[tensor.name]
        dtype = "quantised int8" if expected.is_matmul else "float32"
        fitting = [other.file for other in tensors if _fits(stored, specs[other.name])]
        others = [other.file for other, theirs in wrong[1:] if _fits(theirs, expected)]
        swapped = [file for file in others if file in fitting]
        guess = ""
        if swapped:
            guess = f" It would fit {swapped[0]}, and that file here: were the two swapped?"
        elif fitting:
            guess = f" It would fit {fitting[0]}: was a file renamed or copied?"
        path = storage.join(self.path, tensor.file)
        raise CheckpointError(
            f"{path}: {tensor.release_name} is {_describe(stored)}; "
            f"for this model's config it should be {dtype} {file_shape(expected)}.{guess}"
        )


def implied_config(folder: str | os.PathLike[str]) -> ModelConfig:
    """The config that a `ckpt-0` folder implies by its shapes; else values are the release's.
    Raises CheckpointError where the shapes fit no such model."""
    files = storage.list_files(folder, CheckpointError)
    present = {name for name in files if re.fullmatch(r"tensor\d{5}_000", name)}
    num_layers = max(1, math.ceil((len(present) - 2) / 12))
    missing = [tensor.file for tensor in tensor_names(num_layers) if tensor.file not in present]
    if missing:
        raise CheckpointError(
            f"{storage.join(folder, missing[0])}: is missing; a release has 2 files and 12 for "
            f"each layer, so {2 + 12 * num_layers} and not {len(present)} here."
        )
    by_name = {tensor.name: tensor.file for tensor in tensor_names(1)}

    def shape_of(name: str, dims: int) -> tuple[int, ...]:
        path = storage.join(folder, by_name[name])
        shape = read_tensor(path).values.shape
        if len(shape) != dims:
            raise CheckpointError(f"{path}: should have {dims} dimensions, and is {shape}.")
        return shape

    vocab, embed = shape_of("embed/table_VD", 2)
    experts, _, mlp = shape_of("layers/moe/w_gate_EDF", 3)
    queries = shape_of("layers/attention/w_query_DNH", 2)[1]
    keys = shape_of("layers/attention/w_key_DKH", 2)[1]
    if queries % 128 or keys % 128:
        raise CheckpointError(
            f"{folder}: queries are {queries} wide and keys {keys}, no multiples of the release's "
            "head_dim of 128; a config must say what head_dim, num_heads and num_kv_heads are."
        )
    try:
        return ModelConfig(
            vocab_size=vocab,
            num_layers=num_layers,
            embed_dim=embed,
            moe=MoEConfig(dim=mlp, num_experts=experts, num_selected=min(2, experts)),
            attention=AttentionConfig(
                num_heads=queries // 128, num_kv_heads=keys // 128, head_dim=128
            ),
        )
    except ConfigError as error:
        raise CheckpointError(f"{folder}: has the shapes of no model: {error}") from error


def _fits(stored: StoredTensor, expected: ParamSpec) -> bool:
    dtype = np.int8 if expected.is_matmul else np.float32
    shape_fits = (stored.values.shape, stored.values.dtype) == (file_shape(expected), dtype)
    return shape_fits and (stored.scales is not None) == expected.is_matmul


def _describe(stored: StoredTensor) -> str:
    if stored.scales is not None:
        return f"quantised int8 {stored.values.shape}"
    values = stored.values
    return f"{values.dtype} {values.shape}" + " without scales" * (values.dtype == np.int8)
