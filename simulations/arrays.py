"""Arrays that take long to make, each made once and kept on disk."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from common.files import write_atomic

ScalarT = TypeVar("ScalarT", bound=np.generic)


def kept(path: Path, make: Callable[[], npt.NDArray[ScalarT]]) -> npt.NDArray[ScalarT]:
    """The array in `path`, or what `make` returns, which is then there. Raises StorageError."""
    if path.is_file():
        found: npt.NDArray[Any] = np.load(path, allow_pickle=False)
        return found
    made = make()
    content = io.BytesIO()
    np.save(content, made, allow_pickle=False)
    write_atomic(path, content.getvalue())
    return made
