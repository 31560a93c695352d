"""The pass that merges and writes, by one process or by several.

Blocks do not depend on each other, so each worker reads, merges and writes a share of its own, and the files
are the same byte by byte. Threads would wait for each other: a block is some forty short calls of numpy.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from common.errors import VectorError
from common.progress import Report
from server.engine.heap import keep_freed_memory
from server.engine.seen import Seen
from server.engine.staging import CHECKPOINT_BYTES, Staging
from server.engine.stream import ITEM_BYTES, FolderVectors
from server.engine.writing import WeightWriter
from server.merging import Kernel, Method, prepare


def write_merge(
    method: Method,
    options: Mapping[str, Any],
    vectors: FolderVectors,
    stage: Staging,
    writer: WeightWriter,
    report: Report,
) -> None:
    """Merge and write, from where the journal says that an interrupted merge stopped.

    Methods that take whole matrices keep to one process, whose BLAS has threads of its own. The process keeps
    the memory that it frees, from now on.
    Raises VectorError and ModelError as the source does, StorageError where the disk is full, IsthmusError
    where a worker was killed.
    """
    keep_freed_memory()
    in_small_blocks = method.unit in ("block", "rows")
    with threadpool_limits(1 if in_small_blocks else None, "blas"):
        kernel = prepare(method, vectors, options)
        if stage.done_tensors:
            vectors.seen = Seen(**stage.state)
        for tensors in _rounds(vectors, writer, stage.done_tensors, CHECKPOINT_BYTES * vectors.workers):
            count = vectors.worker_count(tensors) if in_small_blocks else 1
            blocks_W = np.frombuffer(mmap.mmap(-1, 8 * count), np.int64)  # done by each; seen by all
            share = partial(_share, vectors, writer, method, kernel, report, tensors, blocks_W)
            _, *others_bytes = vectors.share_out(share, count)
            writer.bytes_written += sum(others_bytes)
            if tensors.stop < len(vectors.shapes):
                writer.flush()
                stage.checkpoint(tensors.stop, asdict(vectors.seen))


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
    count: int,
) -> int:
    """Merge and write share `number` of the blocks: bytes written. The first tells how far all are."""
    written = writer.bytes_written
    before = vectors.block_count(range(tensors.start), method.unit)
    total = vectors.block_count(range(len(vectors.shapes)), method.unit)
    for block in vectors.share(tensors, number, count, method.unit, unchecked=method.linear):
        try:
            writer.add(block.name, block.start, vectors.base_X, kernel(block).reshape(-1))
        except VectorError:  # of the merged values: it may be that a vector's are to blame
            vectors.check(block)
            raise
        blocks_W[number] += 1
        if number == 0:
            report(phase="merge", step=before + int(blocks_W.sum()), total=total)
    return writer.bytes_written - written
