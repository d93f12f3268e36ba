"""Pieces of a source -> shard files: read ahead by threads, checksummed in order, written behind. A
piece (a tensor, or a layer of it) moves in blocks: some megabytes of rows; or a matrix, where its
scales need all of it, or its rows are not contiguous in the source's files."""

import contextlib
import dataclasses
import itertools
import math
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from grok.weights.checksums import PieceChecksum
from grok.weights.orbax.zarr import Slabs, ZarrArray, arrays, create, write_slabs
from grok.weights.source import (
    Part,
    Source,
    TensorSpec,
    blocks,
    layer_pieces,
    part_shape,
    relative_to,
    scales_part,
)

# Blocks read ahead, with at most AHEAD_BYTES; and blocks being written.
READ_AHEAD, AHEAD_BYTES, IN_FLIGHT = 4, 1 << 28, 2
BLOCK_BYTES = 1 << 24


@dataclasses.dataclass(frozen=True)
class Piece:
    """A tensor, or one layer of it, and the arrays that it is part of."""

    spec: TensorSpec
    layer: int | None
    part: Part
    values: ZarrArray
    scales: ZarrArray | None

    @property
    def key(self) -> tuple[str, int | None]:
        """The tensor's name, and the layer."""
        return self.spec.name, self.layer

    @property
    def nbytes(self) -> int:
        """Bytes of values and scales."""
        return self.spec.nbytes if self.layer is None else self.spec.nbytes // self.spec.shape[0]

    def is_in(self, folder: Path) -> bool:
        """Returns True where its files are present in full size."""
        arrays = [(self.values, self.part)]
        if self.scales is not None:
            arrays.append((self.scales, scales_part(self.spec, self.part)))
        files = [
            (array.file(folder, s), array) for array, part in arrays for s in array.shards(part)
        ]
        return all(f.is_file() and f.stat().st_size == array.file_bytes for f, array in files)


def all_pieces(source: Source) -> list[Piece]:
    """The pieces of a source, tensor by tensor."""
    return [
        Piece(spec, layer, part, *arrays(spec))
        for spec in source.tensors.values()
        for layer, part in layer_pieces(spec)
    ]


def all_arrays(pieces: Iterable[Piece]) -> list[ZarrArray]:
    """The arrays of pieces, each once, in order."""
    both = itertools.chain.from_iterable((piece.values, piece.scales) for piece in pieces)
    return list(dict.fromkeys(array for array in both if array is not None))


def stream(
    source: Source,
    pieces: Sequence[Piece],
    folder: Path,
    on_written: Callable[[str, int], None],
    on_finished: Callable[[Piece, str], None],
) -> None:
    """Writes pieces into `folder`, in order. Calls `on_written` with a tensor's name and each
    number of bytes written, and `on_finished` with each finished piece and its checksum. Raises
    OSError, and errors of `source`."""
    for array in all_arrays(pieces):
        create(folder, array)
    with (
        _Writer(folder, on_written, on_finished) as writer,
        # Else an error leaves its threads to the garbage collector, which may run in one of them.
        contextlib.closing(_read_ahead(source, pieces)) as blocks_read,
    ):
        for piece, piece_blocks in itertools.groupby(blocks_read, lambda block: block.piece):
            checksum, scales = PieceChecksum(), []
            for block in piece_blocks:
                checksum.update(block.values, block.scales)
                for slabs in block.slabs:
                    values = block.values[relative_to(block.part, slabs.part)]
                    writer.write(piece, piece.values, slabs, values)
                if block.scales is not None:
                    scales.append(block.scales)
            if piece.scales is not None:
                all_scales = np.concatenate(scales).reshape(piece.spec.scales_shape[1:])[None]
                part = scales_part(piece.spec, piece.part)
                writer.write(piece, piece.scales, Slabs(part, part, 0), all_scales)
            writer.finish(checksum.hexdigest())


@dataclasses.dataclass(frozen=True)
class _Block:
    """A part of a piece, the slabs that it is, and the scales of the matrix that it begins."""

    piece: Piece
    part: Part
    slabs: list[Slabs]
    values: np.ndarray
    scales: np.ndarray | None


def _read_ahead(source: Source, pieces: Iterable[Piece]) -> Generator[_Block, None, None]:
    pending: deque[Future[_Block]] = deque()
    with ThreadPoolExecutor(READ_AHEAD, thread_name_prefix="grok-import-read") as pool:
        for piece in pieces:
            for slabs in _cut(source, piece):
                ends = zip(slabs[0].part, slabs[-1].part, strict=True)
                part = tuple(slice(first.start, last.stop) for first, last in ends)
                pending.append(pool.submit(_read, source, piece, part, slabs))
                nbytes = math.prod(part_shape(part)) * piece.spec.dtype.itemsize
                while len(pending) > min(READ_AHEAD, AHEAD_BYTES // nbytes):
                    yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _cut(source: Source, piece: Piece) -> Iterator[list[Slabs]]:
    if source.layout(piece.spec.name).is_c_order or not piece.spec.param.is_matmul:
        for shard in piece.values.shards(piece.part):
            for slabs in piece.values.slabs(shard, BLOCK_BYTES):
                yield [slabs]
        return
    for matrix in blocks(piece.spec, piece.part):
        shards = piece.values.shards(matrix)
        yield [slabs for shard in shards for slabs in piece.values.slabs(shard, piece.nbytes)]


def _read(source: Source, piece: Piece, part: Part, slabs: list[Slabs]) -> _Block:
    spec, scales = piece.spec, None
    values = source.read(spec.name, part)
    if spec.groups is not None and slabs[0].offset == 0:
        scales = source.read_scales(spec.name, scales_part(spec, part))
    return _Block(piece, part, slabs, values, scales)


@dataclasses.dataclass
class _Write:
    piece: Piece
    nbytes: int
    future: Future[None]
    checksum: str | None = None  # of the piece, with its last write


class _Writer:
    """Writes in order in a thread of its own, and reports finished writes to the callbacks."""

    def __init__(self, folder: Path, on_written, on_finished) -> None:
        self._folder, self._on_written, self._on_finished = folder, on_written, on_finished
        self._queue: deque[_Write] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grok-import-write")

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, kind, *_: object) -> None:
        if kind is None:
            self._settle(0)
        self._thread.shutdown(cancel_futures=True)

    def write(self, piece: Piece, array: ZarrArray, slabs: Slabs, values: np.ndarray) -> None:
        self._settle(IN_FLIGHT - 1)
        future = self._thread.submit(write_slabs, self._folder, array, slabs, values)
        self._queue.append(_Write(piece, values.nbytes, future))

    def finish(self, checksum: str) -> None:
        self._queue[-1].checksum = checksum

    def _settle(self, left: int) -> None:
        while len(self._queue) > left:
            write = self._queue.popleft()
            write.future.result()
            self._on_written(write.piece.spec.name, write.nbytes)
            if write.checksum is not None:
                self._on_finished(write.piece, write.checksum)
