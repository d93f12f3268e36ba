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
from grok.weights.huggingface.safetensors import TensorInfo, read_headers
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
    headers = read_headers(folder, files, present)
    # By number, then "common" or the rank: the file's name.
    groups: dict[int, dict[str, str]] = defaultdict(dict)
    for file in files:
        if match := FILE.fullmatch(file):
            groups[int(match[1])][match[2]] = file
    counts = Counter(max(map(int, g)) + 1 for g in groups.values() if "common" not in g)
    num_ranks = counts.most_common(1)[0][0] if counts else 1
    tensors: dict[str, tuple[TensorInfo, ...]] = {}
    split: list[list[str]] = []
    for number, group in groups.items():
        ranks = _files_of_group(folder, number, group, num_ranks, headers)
        first, *others = [headers[file] for file in ranks]
        for file, header in zip(ranks[1:], others, strict=True):
            _check_alike(folder, ranks[0], first, file, header)
        for name, tensor in first.items():
            if name in tensors:
                raise _twice(tensor.path, name, tensors[name][0].path)
            tensors[name] = tuple(headers[file][name] for file in ranks)
        split += [ranks] if len(ranks) > 1 and first else []
    if strangers := [file for file in files if not FILE.fullmatch(file)]:
        raise CheckpointError(
            f"{storage.join(folder, strangers[0])}: does not belong here; the files of a release "
            f"in ranks are called like {file_name(0, None)} and {file_name(6, 0)}."
        )
    for ranks in split:
        _check_copies([headers[file] for file in ranks])
    return tensors


def _files_of_group(
    folder: str, number: int, group: dict[str, str], num_ranks: int, headers: dict[str, Header]
) -> list[str]:
    """The files of a group of tensors, in the order of their ranks."""
    if "common" in group:
        if len(group) > 1:
            raise CheckpointError(
                f"{storage.join(folder, group[min(group)])}: stands beside {group['common']}, "
                "which has whole tensors; one of them is too many."
            )
        return [group["common"]]
    ranks = {int(rank): file for rank, file in group.items()}
    missing = [rank for rank in range(num_ranks) if rank not in ranks]
    if missing:
        mine = [headers[file] for file in ranks.values()]
        names = set().union(*mine)
        others = [f for f, h in headers.items() if f not in ranks.values() and h.keys() & names]
        if others and FILE.fullmatch(others[0]) and len(ranks) <= num_ranks // 2:
            # A few ranks of a group that is there under another number.
            raise _twice(storage.join(folder, ranks[min(ranks)]), min(names), others[0])
        hint = f"; {others[0]} has tensors of the same names" if others else ""
        raise CheckpointError(
            f"{storage.join(folder, file_name(number, missing[0]))}: is missing; its tensors are "
            f"split over {num_ranks} ranks{hint}."
        )
    if max(ranks) >= num_ranks:
        raise CheckpointError(
            f"{storage.join(folder, ranks[max(ranks)])}: is a rank too many, or other tensors lack "
            f"it, which are split over {num_ranks} ranks."
        )
    return [ranks[rank] for rank in range(num_ranks)]


def _twice(path: str, name: str, other: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: {quoted(name)} is in {other} too; the files of a tensor's ranks have one number."
    )


def _check_alike(folder: str, first_file: str, first: Header, file: str, header: Header) -> None:
    path = storage.join(folder, file)
    if differing := sorted(first.keys() ^ header.keys()):
        name = quoted(differing[0])
        if differing[0] in first:
            raise CheckpointError(f"{path}: has no {name}, which {first_file} has.")
        raise CheckpointError(f"{path}: has {name}, which {first_file} lacks.")
    for name, tensor in header.items():
        right = first[name]
        if (tensor.dtype, tensor.shape) != (right.dtype, right.shape):
            raise CheckpointError(
                f"{path}: {quoted(name)} is {tensor.dtype} {tensor.shape}, and in {first_file} "
                f"{right.dtype} {right.shape}; all ranks have equal parts."
            )


def _check_copies(ranks: list[Header]) -> None:
    """Names and sizes of ranks are the same, so that the values alone show a file put in twice."""

    def sample(header: Header) -> tuple[str, bytes]:
        first = min(header.values(), key=lambda tensor: tensor.offset)
        count = min(SAMPLE_BYTES, sum(tensor.nbytes for tensor in header.values()))
        values = np.empty(count, np.uint8)
        read_part(first.path, first.offset, (count,), (slice(0, count),), values)
        return first.path, values.tobytes()

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
