"""Task vectors and catalogs of three domains of a few items, for the pico model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from common.catalog import Catalog
from common.models.base import trainable_tensors
from common.vectors import TaskVector

WORDS = ["red", "blue", "green", "small", "large", "oak", "steel", "spoon", "lamp", "chair", "cup", "ball"]


@pytest.fixture(scope="session")
def base(pico_model: Path) -> Path:
    torch.set_num_threads(1)
    return pico_model


@pytest.fixture(scope="session")
def taus(base: Path) -> dict[str, TaskVector]:
    return {name: random_vector(base, seed) for seed, name in enumerate(("garden", "kitchen", "toys"))}


@pytest.fixture(scope="session")
def catalogs() -> dict[str, Catalog]:
    return {name: catalog(name, size) for name, size in (("garden", 9), ("kitchen", 12), ("toys", 7))}


def random_vector(base: Path, seed: int, scale: float = 0.2) -> TaskVector:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator) * scale
        for name, shape in trainable_tensors(base).items()
    }


def catalog(name: str, size: int) -> Catalog:
    shift = len(name)
    titles = [
        f"{WORDS[(i + shift) % 5]} {WORDS[5 + (i * 3 + shift) % 7]} {WORDS[(i * i) % 12]} {i % 4}"
        for i in range(size)
    ]
    return Catalog(name, [f"{name}-{i}" for i in range(size)], {"title": titles, "brand": ["acme"] * size})
