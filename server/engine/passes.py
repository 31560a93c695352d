"""The pass that merges and writes, by one process or by several.

Blocks do not depend on each other, so each worker reads, merges and writes a share of its own, and the files
are the same byte by byte. Threads would wait for each other: a block is some forty short calls of numpy.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from common.errors import VectorError
from common.progress import Report
from server.engine import card
from server.engine.forks import in_processes
from server.engine.seen import Seen
from server.engine.staging import CHECKPOINT_BYTES, Staging
from server.engine.stream import ITEM_BYTES, FolderVectors
from server.engine.writing import WeightWriter
from server.merging import Kernel, Method, prepare

# at least: to start the first takes 50 ms, as long as some ninety blocks of eight models by Task Arithmetic
BLOCKS_A_WORKER = 100


@dataclass(frozen=True)
class Done:
    """What a worker has done."""

    seen: Seen
    bytes_read: int
    bytes_written: int
    peak_bytes: int


def write_merge(
    method: Method,
    options: Mapping[str, Any],
    vectors: FolderVectors,
    stage: Staging,
    writer: WeightWriter,
    report: Report,
    workers: int = 1,
) -> int:
    """Merge and write, from where the journal says that an interrupted merge stopped.

    Methods that take whole tensors keep to one process, whose BLAS has threads of its own. Returns the peak
    memory of the other processes, in bytes, added up. Raises VectorError and ModelError as the source does,
    StorageError where the disk is full, IsthmusError where a worker was killed.
    """
    kernel = prepare(method, vectors, options)
    if stage.done_tensors:
        vectors.seen = Seen(**stage.state)
    peak_bytes, in_blocks = 0, method.unit == "block"
    share = partial(_share, vectors, writer, method, kernel, report)
    with threadpool_limits(1 if in_blocks else None, "blas"):
        for tensors in _rounds(vectors, writer, stage.done_tensors, CHECKPOINT_BYTES * workers):
            count = max(1, min(workers, vectors.block_count(tensors) // BLOCKS_A_WORKER)) if in_blocks else 1
            blocks_W = np.frombuffer(mmap.mmap(-1, 8 * count), np.int64)  # done by each; seen by all
            before, vectors.seen = vectors.seen, Seen.nothing(len(vectors.labels))
            mine, *others = in_processes(
                [partial(share, tensors, blocks_W, number) for number in range(count)]
            )
            vectors.seen = before.followed_by([mine.seen, *(done.seen for done in others)])
            vectors.reader.bytes_read += sum(done.bytes_read for done in others)
            writer.bytes_written += sum(done.bytes_written for done in others)
            peak_bytes = max(peak_bytes, sum(done.peak_bytes for done in others))
            if tensors.stop < len(vectors.shapes):
                writer.flush()
                stage.checkpoint(tensors.stop, asdict(vectors.seen))
    return peak_bytes


def _rounds(vectors: FolderVectors, writer: WeightWriter, first: int, round_bytes: int) -> Iterator[range]:
    """The tensors from place `first` on, so many at a time that `round_bytes` are written."""
    size_bytes = 0
    for place, (name, shape) in enumerate(vectors.shapes.items()):
        if place < first:
            continue
        size_bytes += math.prod(shape) * ITEM_BYTES[writer.places[name].dtype]
        if size_bytes >= round_bytes:
            yield range(first, place + 1)
            first, size_bytes = place + 1, 0
    if first < len(vectors.shapes):
        yield range(first, len(vectors.shapes))


def _share(
    vectors: FolderVectors,
    writer: WeightWriter,
    method: Method,
    kernel: Kernel,
    report: Report,
    tensors: range,
    blocks_W: npt.NDArray[np.int64],
    number: int,
) -> Done:
    """Merge and write share `number` of the blocks of `tensors`; the first tells how far all are."""
    read, written = vectors.reader.bytes_read, writer.bytes_written
    before = vectors.block_count(range(tensors.start), method.unit)
    total = vectors.block_count(range(len(vectors.shapes)), method.unit)
    for block in vectors.share(tensors, number, len(blocks_W), method.unit, unchecked=method.linear):
        try:
            writer.add(block.name, block.start, vectors.base_X, kernel(block).reshape(-1))
        except VectorError:  # of the merged values: it may be that a vector's are to blame
            vectors.check(block)
            raise
        blocks_W[number] += 1
        if number == 0:
            report(phase="merge", step=before + int(blocks_W.sum()), total=total)
    return Done(
        vectors.seen,
        vectors.reader.bytes_read - read,
        writer.bytes_written - written,
        card.peak_memory_bytes(),
    )
