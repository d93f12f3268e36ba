"""Files of tensor-parallel ranks, as xAI released Grok-2: `pytorch_model-000NN-TP-common` has whole
tensors, and `pytorch_model-000NN-TP-00R` rank R's part of some, under the same names in every
rank's file. There is no index, so the names of the files must say that all of them are there."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from grok import storage
from grok.errors import CheckpointError
from grok.weights.huggingface.safetensors import TensorInfo, read_header
from grok.weights.source import quoted, read_part

FILE = re.compile(r"pytorch_model-(\d{5})-TP-(common|\d{3})\.safetensors")
# Bytes at the beginning of a rank's data that tell it from another's.
SAMPLE_BYTES = 4096
Header = dict[str, TensorInfo]


def file_name(number: int, rank: int | None) -> str:
    """The file of the `number`-th group of tensors: that of a rank, or of whole tensors."""
    return (
        f"pytorch_model-{number:05d}-TP-{'common' if rank is None else f'{rank:03d}'}.safetensors"
    )


def has_ranks(present: Iterable[str]) -> bool:
    """Returns True for the file names of such a folder, complete or not."""
    return any(FILE.fullmatch(name) for name in present)


def find_ranked_tensors(
    folder: str, present: Mapping[str, int | None]
) -> dict[str, tuple[TensorInfo, ...]]:
    """The parts of every tensor in the order of the ranks, or the one of a whole tensor. Raises
    CheckpointError, with the file, where a rank is missing, too many, a copy of another, or other
    than the rest of its group, and for files that are cut short or do not belong here."""
    files = sorted(f for f in present if f.endswith(".safetensors") and not f.startswith("."))
    storage.prefetch(folder, files, CheckpointError)
    # Sixteen at a time: a remote file takes some round trips.
    with ThreadPoolExecutor(16) as pool:
        sizes = [present[file] or 0 for file in files]
        headers = dict(
            zip(
                files,
                pool.map(read_header, [storage.join(folder, f) for f in files], sizes),
                strict=True,
            )
        )
    groups: dict[int, dict[str, Header]] = defaultdict(dict)
    strangers = []
    for file in files:
        if match := FILE.fullmatch(file):
            groups[int(match[1])][match[2]] = headers[file]
        else:
            strangers.append(file)
    split = [max(map(int, ranks)) + 1 for ranks in groups.values() if "common" not in ranks]
    num_ranks = Counter(split).most_common(1)[0][0] if split else 1
    tensors: dict[str, tuple[TensorInfo, ...]] = {}
    for number, group in groups.items():
        ranks = _ranks(folder, number, group, num_ranks, strangers, headers)
        for name, tensor in ranks[0].items():
            if name in tensors:
                path, other = tensor.path, tensors[name][0].path
                raise CheckpointError(
                    f"{path}: {quoted(name)} is in {other} too; the files of a tensor's ranks "
                    "have one number."
                )
            tensors[name] = tuple(rank[name] for rank in ranks)
    if strangers:
        raise CheckpointError(
            f"{storage.join(folder, strangers[0])}: does not belong here; the files of a release "
            f"in ranks are called like {file_name(0, None)} and {file_name(6, 0)}."
        )
    _check_copies(groups)
    return tensors


def _ranks(
    folder: str,
    number: int,
    group: dict[str, Header],
    num_ranks: int,
    strangers: list[str],
    headers: dict[str, Header],
) -> list[Header]:
    """The headers of a group, in the order of its ranks."""
    if "common" in group:
        if len(group) > 1:
            path = storage.join(folder, file_name(number, int(min(group))))
            raise CheckpointError(
                f"{path}: stands beside {file_name(number, None)}, which has whole tensors; one of "
                "them is too many."
            )
        return [group["common"]]
    ranks = {int(rank): header for rank, header in group.items()}
    names = next(iter(ranks.values())).keys()
    missing = [rank for rank in range(num_ranks) if rank not in ranks]
    if missing:
        mine = {file_name(number, rank) for rank in ranks}
        others = [f for f, h in headers.items() if f not in mine and h.keys() & names]
        hint = f"; {others[0]} has tensors of the same names" if others else ""
        if others and FILE.fullmatch(others[0]) and len(ranks) <= num_ranks // 2:
            path = storage.join(folder, file_name(number, min(ranks)))
            raise CheckpointError(
                f"{path}: {quoted(min(names))} is in {others[0]} too; the files of a tensor's "
                "ranks have one number."
            )
        raise CheckpointError(
            f"{storage.join(folder, file_name(number, missing[0]))}: is missing; its tensors are "
            f"split over {num_ranks} ranks{hint}."
        )
    if extra := [rank for rank in ranks if rank >= num_ranks]:
        raise CheckpointError(
            f"{storage.join(folder, file_name(number, extra[0]))}: is a rank too many; the other "
            f"tensors are split over {num_ranks} ranks."
        )
    ordered = [ranks[rank] for rank in range(num_ranks)]
    for header in ordered[1:]:
        _check_alike(ordered[0], header)
    return ordered


def _check_alike(first: Header, other: Header) -> None:
    path, first_path = next(iter(other.values())).path, next(iter(first.values())).path
    if differing := sorted(first.keys() ^ other.keys()):
        problem = "has no" if differing[0] in first else "has"
        end = "which the first rank has" if differing[0] in first else "which the first rank lacks"
        raise CheckpointError(f"{path}: {problem} {quoted(differing[0])}, {end} ({first_path}).")
    for name, tensor in other.items():
        right = first[name]
        if (tensor.dtype, tensor.shape) != (right.dtype, right.shape):
            raise CheckpointError(
                f"{path}: {quoted(name)} is {tensor.dtype} {tensor.shape}, and that of the first "
                f"rank {right.dtype} {right.shape}; all ranks have equal parts."
            )


def _check_copies(groups: Mapping[int, Mapping[str, Header]]) -> None:
    """Names and sizes of ranks are the same, so that the values alone show a file put in twice."""

    def sample(header: Header) -> tuple[str, bytes]:
        first = min(header.values(), key=lambda tensor: tensor.offset)
        count = min(SAMPLE_BYTES, sum(tensor.nbytes for tensor in header.values()))
        values = np.empty(count, np.uint8)
        read_part(first.path, first.offset, (count,), (slice(0, count),), values)
        return first.path, values.tobytes()

    for group in groups.values():
        ranks = [header for rank, header in sorted(group.items()) if header and rank != "common"]
        with ThreadPoolExecutor(16) as pool:
            samples = list(pool.map(sample, ranks))
        paths: dict[bytes, str] = {}
        for path, values in samples:
            # Zeros, and the like, are no sign of a copy.
            if len(set(values)) > 2 and values in paths:
                raise CheckpointError(
                    f"{path}: begins with the values of {paths[values]}; it is that rank once more."
                )
            paths[values] = path
