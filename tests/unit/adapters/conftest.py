"""Adapter folders written by hand: what PEFT writes, without PEFT."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

SHAPES = {"encoder.layer.0.query": (6, 5), "encoder.layer.0.value": (4, 5), "encoder.layer.1.query": (6, 5)}
Factors = dict[str, tuple[np.ndarray, np.ndarray]]


def random_factors(seed: int, rank: int = 2, scale: float = 0.1) -> Factors:
    """Random (B, A) of float32 for every layer of `SHAPES`."""
    generator = np.random.default_rng(seed)
    return {
        path: (
            (scale * generator.standard_normal((rows, rank))).astype(np.float32),
            (scale * generator.standard_normal((rank, columns))).astype(np.float32),
        )
        for path, (rows, columns) in SHAPES.items()
    }


def write_folder(folder: Path, factors: Factors, **changes: Any) -> Path:
    """An adapter folder of these factors; `changes` go into its configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for path, (B_RK, A_KC) in factors.items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = np.ascontiguousarray(A_KC)
        tensors[f"base_model.model.{path}.lora_B.weight"] = np.ascontiguousarray(B_RK)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": "acme/base",
        "r": next(iter(factors.values()))[1].shape[0],
        "lora_alpha": 4,
        "target_modules": ["query", "value"],
        "bias": "none",
        "use_dora": False,
        "modules_to_save": None,
        **changes,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def build_adapters() -> Callable[[Path, int, int], dict[str, Path]]:
    """`build_adapters(folder, seed, count)` writes random adapters d0, d1, ... of rank 2 below `folder`."""

    def build(folder: Path, seed: int, count: int) -> dict[str, Path]:
        return {f"d{n}": write_folder(folder / f"d{n}", random_factors(seed + n)) for n in range(count)}

    return build


@pytest.fixture
def make_adapter(tmp_path: Path) -> Callable[..., Path]:
    """`make_adapter(name, seed=0, rank=2, **configuration)` writes a random adapter."""

    def make(
        name: str, *, seed: int = 0, rank: int = 2, factors: Factors | None = None, **changes: Any
    ) -> Path:
        return write_folder(tmp_path / name, factors or random_factors(seed, rank), **changes)

    return make
