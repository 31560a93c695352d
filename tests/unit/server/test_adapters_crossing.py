"""An adapter of another rank, module or base, with more in it, or NaN, passes neither gate nor server."""

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from crossing import RUN, Owner, Shore, make_vector
from safetensors.numpy import load_file, save_file

from common.errors import GateError, RefusedError
from common.parcels import Parcel
from server.intake import Upload

LAYER = "base_model.model.model.layers.0.self_attn.{}.lora_{}.weight"
A, B = LAYER.format("q_proj", "A"), LAYER.format("q_proj", "B")
TABLE = {A: (2, 8), B: (6, 2)}
WRONG = {
    "rank": {A: (3, 8), B: (6, 3)},
    "base": {A: (2, 9), B: (6, 2)},
    "module": {name.replace("q_proj", "v_proj"): shape for name, shape in TABLE.items()},
    "one more module": {**TABLE, LAYER.format("v_proj", "A"): (2, 8), LAYER.format("v_proj", "B"): (6, 2)},
    "words": {**TABLE, "base_model.model.model.embed_tokens.lora_embedding_A": (2, 9)},
    "half": {A: (2, 8)},
}


@pytest.fixture
def toys(tmp_path: Path) -> Owner:
    return Owner(tmp_path / "toys", Shore(tmp_path / "server", TABLE))


def begun(owner: Owner, parcel: Parcel) -> Upload:
    upload = owner.shore.intake.begin(parcel.envelope, owner.member.certificate_fingerprint)
    assert isinstance(upload, Upload)
    return upload


def test_the_runs_adapter_passes(toys: Owner) -> None:
    parcel = toys.vector()
    with closing(begun(toys, parcel)) as upload:
        upload.write(parcel.payload.read_bytes())
        upload.finish()
    assert toys.shore.store.find(run=RUN)


@pytest.mark.parametrize("table", WRONG.values(), ids=WRONG)
def test_another_table_passes_neither(toys: Owner, tmp_path: Path, table: dict) -> None:
    vector = make_vector(tmp_path / "v", tensors=table)
    with pytest.raises(GateError, match=r"may be trained|missing|shape|embedding table"):
        toys.gate.release(toys.draft(vector), vector)
    with pytest.raises(RefusedError) as caught:
        begun(toys, toys.ungated(vector))
    assert caught.value.reason == "tensor-table"


def test_nan_passes_neither(toys: Owner, tmp_path: Path) -> None:
    vector = make_vector(tmp_path / "v", tensors=TABLE)
    save_file({**load_file(vector), B: np.full(TABLE[B], np.nan, np.float32)}, vector)
    with pytest.raises(GateError, match="NaN"):
        toys.gate.release(toys.draft(vector), vector)
    parcel = toys.ungated(vector)
    with closing(begun(toys, parcel)) as upload:
        upload.write(vector.read_bytes())
        with pytest.raises(RefusedError) as caught:
            upload.finish()
    assert caught.value.reason == "not-finite"
