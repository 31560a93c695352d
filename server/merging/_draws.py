"""Generators of random numbers that depend on words alone: the same words, the same numbers.

numpy seeds by mixing 32-bit words, which takes half as long as the numbers that a whole block needs. The
words' hash is as good a state, and takes a fourth of that.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.random.bit_generator import ISeedSequence


class _Hashed(ISeedSequence):
    """A state for numpy's bit generators: BLAKE2b of a key."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> npt.NDArray[Any]:
        """`n_words` words, 64 bytes at most."""
        word = np.dtype(dtype)
        digest = hashlib.blake2b(self._key, digest_size=n_words * word.itemsize).digest()
        return np.frombuffer(digest, word.newbyteorder("<")).astype(word, copy=False)


def generator(*words: object) -> np.random.Generator:
    """A generator for these words, told apart where their texts are (which hold no NUL)."""
    state: Any = _Hashed("\0".join(map(str, words)).encode())  # numpy's stubs know its own seeds alone
    return np.random.Generator(np.random.SFC64(state))
