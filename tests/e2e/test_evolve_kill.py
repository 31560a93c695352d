"""`isthmus evolve` as a process: killed by signal 9 again and again, it ends as an uninterrupted one does."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from common.config import LoraSection
from common.language.adapters import adapter_tensors, save_adapter
from tests.unit.language.conftest import build_causal

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

LORA = LoraSection(rank=2, alpha=4.0, dropout=0.0, modules=("q_proj", "v_proj"))
OPTIONS = {"ratio_iterations": 6, "scale_iterations": 10, "population": 6}
LINES = 1 + (1 + 6) + (1 + 10)  # inputs, then each stage's start and generations
KILLS = 3


def command(folder: Path, out: Path) -> list[str]:
    isthmus = Path(sys.executable).with_name("isthmus")
    line = [isthmus, "evolve", "--base", folder / "base", "--adapters", folder / "pool"]
    line += ["--samples", folder / "samples.jsonl", "--out", out, "--format", "json"]
    for key, value in OPTIONS.items():
        line += ["--option", f"{key}={value}"]
    return [str(part) for part in line]


def recorded(out: Path) -> int:
    path = out / "evo-merging" / "evolution.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_killed_searches_end_as_whole_ones_do(tmp_path: Path) -> None:
    base, generator = build_causal(tmp_path / "base"), torch.Generator().manual_seed(0)
    for label in ("tea", "toys", "garden"):
        table = adapter_tensors(base, LORA)
        adapter = {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in table.items()}
        save_adapter(base, LORA, adapter, tmp_path / "pool" / label, "")
    samples = [{"prompt": f"tea {n}\n", "answer": "cup"} for n in range(40)]
    (tmp_path / "samples.jsonl").write_text("".join(f"{json.dumps(sample)}\n" for sample in samples))

    kills, seen = 0, 0
    while kills < KILLS:
        process = subprocess.Popen(command(tmp_path, tmp_path / "killed"), stdout=subprocess.DEVNULL)
        while process.poll() is None and recorded(tmp_path / "killed") <= seen + 2:
            time.sleep(0.002)
        assert process.poll() is None, "it ended before it was killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills, seen = kills + 1, recorded(tmp_path / "killed")
        assert seen < LINES
    outs = [tmp_path / "killed", tmp_path / "whole"]
    for out in outs:
        subprocess.run(command(tmp_path, out), check=True, stdout=subprocess.DEVNULL)
    rows = [json.loads((out / "evo-merging" / "row.json").read_text()) for out in outs]
    for row in rows:
        row.pop("seconds")
    assert rows[0] == rows[1]
    files = [out / "evo-merging" / "adapter" / "adapter_model.safetensors" for out in outs]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert recorded(outs[0]) == recorded(outs[1]) == LINES
