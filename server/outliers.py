"""Norms and cosines of the task vectors of a run, and which of them stand out from the rest.

Read from the files block by block, one block of each vector at a time, so memory does not grow with the
model. From the Gram matrix of the vectors, summed up by transformer layer:

    norm     L2, in all and by layer
    cosine   between any two; and of each with the mean direction of the others (`sum_e tau_e / |tau_e|` over
             e != d), in which a large vector counts no more than a small one
    score    modified z-score (Iglewicz and Hoaglin 1993), 0.6745 (x - median) / MAD, of the log norms and of
             the cosines with the others; where the MAD is 0, by the mean absolute deviation

A vector stands out by `norm` (also `norm:LAYER`) or `cosine` where its score is beyond 3.5 *and* the
difference is one that matters, and by `opposed` where it points away from the others. With fewer than
`MIN_DOMAINS` the median says nothing, and nothing is marked. This finds a scaled or sign-flipped vector among
several domains. It does not find a backdoor in a vector that was made to look like the others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from common.coefficients import layer_of
from common.errors import VectorError
from common.tensorfile import Floats, TensorEntry, as_float32, read_index, tensor_blocks

Doubles = npt.NDArray[np.float64]

MIN_DOMAINS = 4  # fewer: nothing is marked
SCORE = 3.5
NORM_FACTOR = 2.0  # a norm that stands out is at least so many times the median, or so small a part of it
COSINE_DROP = 0.2  # a cosine that stands out is at least so far below the median
OPPOSED = -0.1
NOTE = (
    "A mark is a reason to look; no mark is no clean bill. With few domains norms and cosines tell little, "
    "and a vector that was made to look like the others passes."
)


def survey(vectors: Mapping[str, Path]) -> dict[str, Any]:
    """`vectors` (domain -> tensor file), `cosines` (domain -> domain -> value) and `note`, as plain JSON.

    A vector of one domain alone has no cosine with others (None). Raises VectorError where the files do not
    hold the same tensors.
    """
    names = sorted(vectors)
    grams = _grams({name: vectors[name] for name in names})
    total_DD: Doubles = np.sum(list(grams.values()), axis=0)
    norms, cosines_DD = _norms(total_DD), _cosines(total_DD)
    to_others = _to_others(cosines_DD)
    norm_scores, cosine_scores = scores(_logs(norms)), scores(to_others) if len(names) > 1 else [None]
    by_group = {group: _norms(gram_DD) for group, gram_DD in grams.items()}
    group_scores = {group: scores(_logs(found)) for group, found in by_group.items()}
    table = {}
    for d, name in enumerate(names):
        marks = []
        if len(names) >= MIN_DOMAINS:
            marks += ["norm"] if _norm_stands_out(norms, norm_scores, d) else []
            marks += [
                f"norm:{group}"
                for group in grams
                if _norm_stands_out(by_group[group], group_scores[group], d)
            ]
            marks += ["cosine"] if _cosine_stands_out(to_others, d) else []
            marks += ["opposed"] if to_others[d] < OPPOSED else []
        table[name] = {
            "norm": norms[d],
            "norm_score": norm_scores[d],
            "cosine_to_others": to_others[d] if len(names) > 1 else None,
            "cosine_score": cosine_scores[d],
            "norms": {group: found[d] for group, found in by_group.items()},
            "stands_out": marks,
        }
    rows = {a: {b: float(cosines_DD[i, j]) for j, b in enumerate(names)} for i, a in enumerate(names)}
    return {"vectors": table, "cosines": rows, "note": NOTE}


def scores(values: list[float]) -> list[float]:
    """The modified z-score of each value; 0 where all are equal.

    >>> [round(z, 2) for z in scores([1.0, 2.0, 3.0, 4.0, 100.0])]
    [-1.35, -0.67, 0.0, 0.67, 65.43]
    """
    apart = np.asarray(values) - np.median(values)
    spread = float(np.median(np.abs(apart))) / 0.6745
    spread = spread or float(np.mean(np.abs(apart))) * 1.253314
    return [float(z) for z in apart / spread] if spread else [0.0] * len(values)


def _grams(files: Mapping[str, Path]) -> dict[str, Doubles]:
    """Layer (or `rest`) -> inner products of the vectors' tensors there, [D, D]."""
    tables = {name: {entry.name: entry for entry in read_index(path)} for name, path in files.items()}
    first_name, first = next(iter(tables.items()))
    for name, table in tables.items():
        if {n: e.shape for n, e in table.items()} != {n: e.shape for n, e in first.items()}:
            raise VectorError(
                f"the vectors of {first_name} and {name} have other tensors", next_step="use one base model"
            )
    grams: dict[str, Doubles] = {}
    with ExitStack() as stack:
        sources = {name: stack.enter_context(path.open("rb")) for name, path in files.items()}
        for tensor in sorted(first, key=lambda n: (layer_of(n) is None, layer_of(n) or 0, n)):
            layer = layer_of(tensor)
            group = "rest" if layer is None else f"layer-{layer}"
            gram_DD = grams.setdefault(group, np.zeros((len(files), len(files))))
            streams = [_values(sources[name], tables[name][tensor]) for name in files]
            for blocks in zip(*streams, strict=True):
                tau_DX = np.stack(blocks)
                gram_DD += tau_DX @ tau_DX.T
    return grams


def _values(source: BinaryIO, entry: TensorEntry) -> Iterator[Floats]:
    """A tensor in blocks of as many values, whatever its dtype."""
    for block in tensor_blocks(source, entry):
        yield as_float32(block, entry.dtype)


def _norms(gram_DD: Doubles) -> list[float]:
    return [math.sqrt(max(0.0, float(square))) for square in np.diag(gram_DD)]


def _cosines(gram_DD: Doubles) -> Doubles:
    norm_D = np.maximum(np.sqrt(np.maximum(np.diag(gram_DD), 0)), 1e-300)
    cosine_DD: Doubles = np.clip(gram_DD / np.outer(norm_D, norm_D), -1.0, 1.0)
    return cosine_DD


def _to_others(cosine_DD: Doubles) -> list[float]:
    """Of each vector, the cosine with the sum of the others' directions; 0 where there is none."""
    found = []
    for d in range(len(cosine_DD)):
        others = [e for e in range(len(cosine_DD)) if e != d]
        length = math.sqrt(max(0.0, float(cosine_DD[np.ix_(others, others)].sum())))
        found.append(float(cosine_DD[d, others].sum()) / length if length > 1e-9 else 0.0)
    return found


def _logs(norms: list[float]) -> list[float]:
    return [math.log(max(norm, 1e-300)) for norm in norms]


def _norm_stands_out(norms: list[float], found: list[float], d: int) -> bool:
    factor = math.exp(abs(_logs(norms)[d] - float(np.median(_logs(norms)))))
    return abs(found[d]) > SCORE and factor >= NORM_FACTOR


def _cosine_stands_out(cosines: list[float], d: int) -> bool:
    return scores(cosines)[d] < -SCORE and float(np.median(cosines)) - cosines[d] >= COSINE_DROP
