"""Task vectors read from model folders, block by block, in constant memory.

`tau_d = theta_d - theta_0`, in float32 whatever the folders hold. Blocks are read into buffers that are used
again (never mapped: mapped pages count as the process's memory), each file once a pass. Memory is one block
of every model, as large as the method's unit asks for.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from common.errors import ModelError, VectorError
from server.engine import card
from server.engine.forks import in_processes
from server.engine.seen import Seen
from server.folders import FLOATS, ModelFolder, Stored
from server.merging._vectors import BLOCK_VALUES, Block, Floats, Unit, block_values, is_finite

ITEM_BYTES = {"F32": 4, "BF16": 2, "F16": 2}
MAX_STRIDE, SAMPLED_BLOCKS = 8, 64  # of every eighth block, but of that many, the norms are taken
# at least: to start one takes 2 ms, as long as some three blocks of eight models by Task Arithmetic
BLOCKS_A_WORKER = 50
RUN_VALUES = 1024  # of a sample: values that are read together
MIN_SAMPLE, MAX_SAMPLE = 1 << 16, 1 << 21
T = TypeVar("T")


class Reader:
    """Values of stored tensors as float32, and the bytes read so far. Files stay open until `close`."""

    def __init__(self) -> None:
        self.bytes_read = 0
        self._files: dict[Path, int] = {}
        self._half: npt.NDArray[np.uint16] = np.empty(0, np.uint16)

    def read(self, tensor: Stored, start: int, out_X: Floats) -> None:
        """Fill `out_X` (contiguous) with the values from flat position `start` of a float tensor."""
        position = tensor.start + start * ITEM_BYTES[tensor.dtype]
        if tensor.dtype == "F32":
            self.read_bytes(tensor, position, out_X)
            return
        if not self._half.size:
            self._half = np.empty(BLOCK_VALUES, np.uint16)
        for first in range(0, out_X.size, BLOCK_VALUES):
            part_X = out_X[first : first + BLOCK_VALUES]
            half_X = self._half[: part_X.size]
            self.read_bytes(tensor, position + 2 * first, half_X)
            if tensor.dtype == "BF16":  # the upper half of a float32
                np.left_shift(half_X, 16, out=part_X.view(np.uint32), dtype=np.uint32)
            else:
                part_X[:] = half_X.view(np.float16)

    def read_bytes(self, tensor: Stored, position: int, out: npt.NDArray[Any]) -> None:
        """Fill `out` with the bytes at `position` of the tensor's file. Raises ModelError where it ends."""
        descriptor = self._files.get(tensor.file)
        if descriptor is None:
            descriptor = self._files[tensor.file] = os.open(tensor.file, os.O_RDONLY)
        wanted = out.nbytes
        done = os.preadv(descriptor, [out.data], position)
        while 0 < done < wanted:  # one call gives 2 GiB at most
            left = out.data.cast("B")[done:]
            more = os.preadv(descriptor, [left], position + done)
            if not more:
                break
            done += more
        if done != wanted:
            raise ModelError(
                f"{tensor.file}: ends inside tensor {tensor.key!r}", next_step="obtain the file again"
            )
        self.bytes_read += wanted

    def close(self) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()


class FolderVectors:
    """The `Vectors` of `server.merging` over folders: N models on one base.

    models: label -> where that model has each tensor of the base (`folders.match_model`). weights: a factor
    on each task vector. `base_X` holds the base's values of the block that was given last. `workers`: how
    many processes may share the blocks; `others_bytes` is what they took beside this one, at most.
    """

    def __init__(
        self, base: ModelFolder, models: Mapping[str, Mapping[str, Stored]], weights: Sequence[float]
    ) -> None:
        self._base = [tensor for tensor in base.tensors.values() if tensor.dtype in FLOATS]
        self._models = [[model[tensor.name] for tensor in self._base] for model in models.values()]
        self._labels = list(models)
        self.weight_N = list(weights)
        self.reader = Reader()
        self.base_X: Floats = np.empty(0, np.float32)
        self.workers = 1
        self.others_bytes = 0
        self.seen = Seen.nothing(len(models))
        self._stride = max(1, min(MAX_STRIDE, self.block_count(range(len(self._base))) // SAMPLED_BLOCKS))

    def __enter__(self) -> FolderVectors:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.reader.close()

    @property
    def labels(self) -> Sequence[str]:
        return self._labels

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {tensor.name: tensor.shape for tensor in self._base}

    def blocks(self, unit: Unit = "block") -> Iterator[Block]:
        return self.share(range(len(self._base)), 0, 1, unit)

    def block_count(self, tensors: range, unit: Unit = "block") -> int:
        """How many blocks the tensors at these places have."""
        return sum(-(-self._base[place].size // self._step(place, unit)) for place in tensors)

    def _step(self, place: int, unit: Unit) -> int:
        return block_values(unit, self._base[place].name, self._base[place].shape)

    def share(
        self, tensors: range, number: int, of: int, unit: Unit = "block", *, unchecked: bool = False
    ) -> Iterator[Block]:
        """The blocks of the tensors at these places, cut into `of` equal shares of neighbours: one share.

        `unchecked`: values that are not finite may be among them; the caller does `check` where it matters.
        """
        steps = {place: self._step(place, unit) for place in tensors}
        widest = max(steps.values(), default=1)
        count = len(self._labels)
        buffer = np.empty(count * widest, np.float32)
        base_buffer = np.empty(widest, np.float32)
        parts = (
            (place, start) for place in tensors for start in range(0, self._base[place].size, steps[place])
        )
        total = self.block_count(tensors, unit)
        for place, start in islice(parts, number * total // of, (number + 1) * total // of):
            tensor = self._base[place]
            width = min(steps[place], tensor.size - start)
            self.base_X = base_buffer[:width]
            tau_NX = buffer[: count * width].reshape(count, width)
            self._fill(place, start, tau_NX, unchecked)
            yield Block(tensor.name, tensor.shape, start, tau_NX, self._labels)

    def shares(self, look: Callable[[Iterator[Block]], T]) -> list[T]:
        """What `look` finds in each share of all blocks; shares are looked at by processes of their own."""
        everything = range(len(self._base))
        return self.share_out(
            lambda number, of: look(self.share(everything, number, of)), self.worker_count(everything)
        )

    def each(self, look: Callable[[int], T]) -> list[T]:
        """What `look` finds in each vector; several processes deal them out among themselves."""
        count = len(self._labels)
        of = min(count, self.worker_count(range(len(self._base))))
        found_W = self.share_out(lambda number, of: [look(n) for n in range(number, count, of)], of)
        return [found_W[vector % of][vector // of] for vector in range(count)]

    def worker_count(self, tensors: range) -> int:
        """How many processes the blocks of these tensors are worth."""
        return max(1, min(self.workers, self.block_count(tensors) // BLOCKS_A_WORKER))

    def share_out(self, work: Callable[[int, int], T], count: int) -> list[T]:
        """`work(number, count)` for each number, in a process of its own; what they read is counted here."""

        def one(number: int) -> tuple[T, Seen, int, int]:
            read_bytes = self.reader.bytes_read
            found = work(number, count)
            return found, self.seen, self.reader.bytes_read - read_bytes, card.peak_memory_bytes()

        before, self.seen = self.seen, Seen.nothing(len(self._labels))
        found_W, seen_W, read_W, peak_W = zip(
            *in_processes([partial(one, number) for number in range(count)]), strict=True
        )
        self.seen = before.followed_by(seen_W)
        self.reader.bytes_read += sum(read_W[1:])
        self.others_bytes = max(self.others_bytes, sum(peak_W[1:]))
        return list(found_W)

    def values(self, vector: int) -> Iterator[tuple[str, Floats]]:
        base_buffer = np.empty(BLOCK_VALUES, np.float32)
        for place, tensor in enumerate(self._base):
            for start in range(0, tensor.size, BLOCK_VALUES):
                width = min(BLOCK_VALUES, tensor.size - start)
                tau_X = np.empty(width, np.float32)
                self._subtract(
                    place, vector, start, tau_X, self._read_base(place, start, base_buffer[:width])
                )
                yield tensor.name, tau_X

    def sample(self) -> Floats | None:
        """Values of every vector at even distances, in runs of neighbours: [N, runs, values].

        Much less is read than in a pass. None where the tensors are too small for it.
        """
        places = [place for place, tensor in enumerate(self._base) if tensor.size >= RUN_VALUES]
        sizes = np.array([self._base[place].size - RUN_VALUES + 1 for place in places], np.int64)
        total = int(sizes.sum())
        runs = min(max(total // 64, MIN_SAMPLE), MAX_SAMPLE) // RUN_VALUES
        if total < 16 * MIN_SAMPLE:
            return None
        ends = np.cumsum(sizes)
        found = np.empty((len(self._labels), runs, RUN_VALUES), np.float32)
        base_X = np.empty(RUN_VALUES, np.float32)
        for run in range(runs):
            position = run * total // runs
            index = int(np.searchsorted(ends, position, side="right"))
            start = position - int(ends[index] - sizes[index])
            self._read_base(places[index], start, base_X)
            for vector in range(len(self._labels)):
                self._subtract(places[index], vector, start, found[vector, run], base_X)
        return found

    def check(self, block: Block) -> None:
        """Raises VectorError where a vector of the block that was given last is not finite.

        The vectors are read again, since the kernel may have written to the block.
        """
        place = next(place for place, tensor in enumerate(self._base) if tensor.name == block.name)
        for vector, tau_X in enumerate(block.tau_NX):
            self._subtract(place, vector, block.start, tau_X, self.base_X)
            if not is_finite(tau_X):
                raise self._not_finite(place, vector)

    def _fill(self, place: int, start: int, tau_NX: Floats, unchecked: bool) -> None:
        """Read a block of every vector, and look at each while it is still in the processor's cache."""
        self._read_base(place, start, self.base_X)
        in_sample = (place + start // BLOCK_VALUES) % self._stride == 0
        if in_sample:
            self.seen.base_squares += float(np.dot(self.base_X, self.base_X))
        looks = in_sample or not unchecked or not self.seen.is_settled
        for vector, tau_X in enumerate(tau_NX):
            self._subtract(place, vector, start, tau_X, self.base_X)
            if looks:
                squares = float(np.dot(tau_X, tau_X))
                if not math.isfinite(squares) and not is_finite(tau_X):
                    raise self._not_finite(place, vector)
                self.seen.add(vector, tau_X, squares, in_sample)

    def _read_base(self, place: int, start: int, base_X: Floats) -> Floats:
        self.reader.read(self._base[place], start, base_X)
        return base_X

    def _subtract(self, place: int, vector: int, start: int, tau_X: Floats, base_X: Floats) -> None:
        self.reader.read(self._models[vector][place], start, tau_X)
        np.subtract(tau_X, base_X, out=tau_X)
        if self.weight_N[vector] != 1:
            tau_X *= np.float32(self.weight_N[vector])

    def _not_finite(self, place: int, vector: int) -> VectorError:
        """The base is to blame where it is not finite itself."""
        base_is_finite = bool(np.isfinite(self.base_X).all())
        tensor = self._models[vector][place] if base_is_finite else self._base[place]
        return VectorError(
            f"{tensor.file}: tensor {tensor.key!r} holds NaN or infinite values",
            next_step="fine-tune again; that training diverged"
            if base_is_finite
            else "use a sound base model",
        )
