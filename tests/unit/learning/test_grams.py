"""Gram matrices of layer inputs: against a BERT written out by hand, with padding and masks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from common.catalog import Catalog
from common.config import MergeMethod, RunConfig, TextSection
from common.errors import DataError, ModelError, VectorError
from common.models.base import load_tensors
from common.models.encoder import Encoder
from common.vectors import TaskVector
from server.learning.grams import LayerGrams, gram_matrices
from server.learning.layers import Layers, equal_lengths
from server.merge import run_merge
from server.merging import merge
from server.tensors import in_memory

Taus = dict[str, TaskVector]
Catalogs = dict[str, Catalog]
TEXT = TextSection()
HEADS = 2
KINDS = {
    "attention.self.query": "in",
    "attention.self.key": "in",
    "attention.self.value": "in",
    "attention.output.dense": "context",
    "intermediate.dense": "attended",
    "output.dense": "wide",
}


def weight(layer: int, kind: str) -> str:
    return f"encoder.layer.{layer}.{kind}.weight"


def layer_by_hand(p: Mapping[str, Tensor], layer: int, h_BTE: Tensor, mask_BT: Tensor) -> dict[str, Tensor]:
    """The inputs of every linear layer of one BERT layer, and its output `out`."""

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ p[f"encoder.layer.{layer}.{name}.weight"].T + p[f"encoder.layer.{layer}.{name}.bias"]

    def norm(name: str, x: Tensor) -> Tensor:
        name = f"encoder.layer.{layer}.{name}.LayerNorm"
        return nn.functional.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"], 1e-12)

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)

    q, k, v = (heads(linear(f"attention.self.{name}", h_BTE)) for name in ("query", "key", "value"))
    scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(mask_BT[:, None, None, :] == 0, float("-inf"))
    context = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    attended = norm("attention.output", linear("attention.output.dense", context) + h_BTE)
    wide = nn.functional.gelu(linear("intermediate.dense", attended))
    out = norm("output", linear("output.dense", wide) + attended)
    return {"in": h_BTE, "context": context, "attended": attended, "wide": wide, "out": out}


def stem_by_hand(p: Mapping[str, Tensor], ids_BT: Tensor) -> Tensor:
    x = p["embeddings.word_embeddings.weight"][ids_BT] + p["embeddings.token_type_embeddings.weight"][0]
    x = x + p["embeddings.position_embeddings.weight"][: ids_BT.shape[1]]
    name = "embeddings.LayerNorm"
    return nn.functional.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"], 1e-12)


def gram_by_hand(x_BTC: Tensor, mask_BT: Tensor) -> np.ndarray[Any, np.dtype[np.float64]]:
    x_NC = x_BTC[mask_BT.bool()].double()
    return np.asarray((x_NC.T @ x_NC / len(x_NC)).numpy())


class Hand:
    """Every item of every catalog in one padded batch a domain, for models written out by hand."""

    def __init__(self, base: Path, taus: Taus, catalogs: Catalogs) -> None:
        self.tensors, self.taus = load_tensors(base), taus
        encoder = Encoder.load(base)
        self.batches = {}
        for name in taus:
            tokens = encoder.tokenize_items(catalogs[name].texts(TEXT.attributes), 32)
            self.batches[name] = encoder.batch(tokens.items(TEXT.max_seq_len))

    def model(self, tau: TaskVector) -> dict[str, Tensor]:
        return {name: tensor + tau.get(name, 0.0) for name, tensor in self.tensors.items()}

    def grams(self) -> dict[str, np.ndarray[Any, np.dtype[np.float64]]]:
        """[N, C, C] of every linear weight, each domain's inputs in its own model."""
        found: dict[str, list[Any]] = {}
        for name, (ids_BT, mask_BT) in self.batches.items():
            p = self.model(self.taus[name])
            h_BTE = stem_by_hand(p, ids_BT)
            for layer in range(2):
                inputs = layer_by_hand(p, layer, h_BTE, mask_BT)
                for kind, place in KINDS.items():
                    found.setdefault(weight(layer, kind), []).append(gram_by_hand(inputs[place], mask_BT))
                h_BTE = inputs["out"]
        return {name: np.stack(of) for name, of in found.items()}


@pytest.fixture(scope="module")
def hand(base: Path, taus: Taus, catalogs: Catalogs) -> Hand:
    return Hand(base, taus, catalogs)


@pytest.fixture
def found(base: Path, taus: Taus, catalogs: Catalogs) -> LayerGrams:
    return gram_matrices(base, taus, catalogs, TEXT, seed=0)


def test_grams_are_those_of_a_bert_written_out_by_hand(hand: Hand, found: LayerGrams) -> None:
    lengths = [mask_BT.sum(1) for _, mask_BT in hand.batches.values()]
    assert all(len(set(length.tolist())) > 1 for length in lengths)  # else padding is not tested
    for name, expected in hand.grams().items():
        gram_NCC = found.get(name)
        assert gram_NCC is not None
        assert gram_NCC.dtype == np.float64
        np.testing.assert_allclose(gram_NCC, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    for name in hand.taus["toys"].keys() - hand.grams().keys():
        assert found.get(name) is None


def test_layers_may_be_asked_for_in_any_order(found: LayerGrams) -> None:
    first = found.get(weight(0, "output.dense"))
    last = found.get(weight(1, "output.dense"))
    again = found.get(weight(0, "output.dense"))
    assert first is not None
    assert last is not None
    assert again is not None
    assert np.array_equal(first, again)
    assert not np.allclose(first, last)


def test_regmean_plus_plus_by_hand(hand: Hand, base: Path, taus: Taus, catalogs: Catalogs) -> None:
    """Layer 1's inputs come out of layer 0 as it was merged; what is no linear weight is the mean there."""
    mean = {name: torch.stack([tau[name] for tau in taus.values()]).mean(0) for name in taus["toys"]}
    merged = dict(mean)
    states = {name: stem_by_hand(hand.model(mean), ids) for name, (ids, _) in hand.batches.items()}
    for layer in range(2):
        sums: dict[str, list[Any]] = {kind: [0.0, 0.0] for kind in KINDS}
        for name, (_, mask_BT) in hand.batches.items():
            inputs = layer_by_hand(hand.model(taus[name]), layer, states[name], mask_BT)
            for kind, place in KINDS.items():
                gram_CC = gram_by_hand(inputs[place], mask_BT)
                gram_CC = 0.8 * gram_CC + 0.2 * np.diag(np.diag(gram_CC))
                sums[kind][0] += gram_CC
                sums[kind][1] += taus[name][weight(layer, kind)].double().numpy() @ gram_CC
        for kind, (left, right) in sums.items():
            merged[weight(layer, kind)] = torch.from_numpy(right @ np.linalg.inv(left)).float()
        for name, (_, mask_BT) in hand.batches.items():
            states[name] = layer_by_hand(hand.model(merged), layer, states[name], mask_BT)["out"]
    grams = gram_matrices(base, taus, catalogs, TEXT, seed=0)
    found = merge("regmean-plus-plus", in_memory(taus), {"alpha": 0.8, "ridge": 0.0}, grams)
    for name, expected in merged.items():
        np.testing.assert_allclose(found[name], expected.numpy(), rtol=1e-3, atol=1e-3, err_msg=name)
    own = merge("regmean", in_memory(taus), {"alpha": 0.8, "ridge": 0.0}, grams)
    first, second = weight(0, "output.dense"), weight(1, "output.dense")
    assert np.abs(own[first] - found[first]).max() > 1e-2  # the stems differ
    assert np.abs(own[second] - found[second]).max() > 1e-2


def test_a_seeded_draw_of_at_most_so_many_items(base: Path, taus: Taus, catalogs: Catalogs) -> None:
    def gram(seed: int, items: int) -> np.ndarray[Any, np.dtype[np.float64]]:
        found = gram_matrices(base, taus, catalogs, TEXT, seed=seed, items=items)
        gram_NCC = found.get(weight(0, "attention.self.query"))
        assert gram_NCC is not None
        return gram_NCC

    few = gram(0, 3)
    assert np.array_equal(few, gram(0, 3))
    assert not np.allclose(few, gram(1, 3))
    assert not np.allclose(few, gram(0, 100))
    assert np.array_equal(gram(0, 100), gram(1, 100))


def test_progress_and_missing_catalogs(base: Path, taus: Taus, catalogs: Catalogs) -> None:
    seen: list[tuple[str, int, int]] = []

    def report(*, phase: str, step: int = 0, total: int = 0, **_: Any) -> None:
        seen.append((phase, step, total))

    found = gram_matrices(base, taus, catalogs, TEXT, seed=0, report=report)
    assert seen == []  # nothing before it is asked for
    found.get(weight(1, "output.dense"))
    assert seen == [("layer inputs", 0, 2), ("layer inputs", 1, 2)]
    with pytest.raises(DataError, match="'toys' has a task vector but no catalog"):
        gram_matrices(
            base, taus, {"garden": catalogs["garden"], "kitchen": catalogs["kitchen"]}, TEXT, seed=0
        )


def test_vectors_that_do_not_fit_or_diverged_are_named(base: Path, taus: Taus, catalogs: Catalogs) -> None:
    name = weight(0, "intermediate.dense")
    odd = {**taus, "toys": {**taus["toys"], name: torch.zeros(3)}}
    with pytest.raises(VectorError, match=name.replace(".", r"\.")):
        gram_matrices(base, odd, catalogs, TEXT, seed=0).get(name)
    bad = {**taus, "toys": {**taus["toys"], name: taus["toys"][name] * 1e38}}
    with pytest.raises(ModelError, match=r"domain 'toys', tensor 'encoder\.layer\.1\..*not finite"):
        gram_matrices(base, bad, catalogs, TEXT, seed=0).get(weight(1, "output.dense"))


@pytest.mark.parametrize("method", ["regmean", "regmean-plus-plus"])
def test_run_merge_makes_the_grams_and_journals_what_they_follow_from(
    base: Path, taus: Taus, catalogs: Catalogs, tmp_path: Path, method: str
) -> None:
    entry = MergeMethod(method=method)

    def run(catalogs: Catalogs = catalogs, seed: int = 0) -> Any:
        return run_merge(
            entry, base, taus, catalogs, RunConfig.model_validate({"run": {"seed": seed}}), tmp_path
        )

    result = run()
    grams = gram_matrices(base, {name: taus[name] for name in sorted(taus)}, catalogs, TEXT, seed=0)
    expected = merge(method, in_memory({name: taus[name] for name in sorted(taus)}), {}, grams)
    assert all(np.array_equal(result.vector[name].numpy(), expected[name]) for name in expected)
    assert result.options == {"alpha": 0.9, "ridge": 1e-6}
    assert {"catalogs", "text", "seed", "items_per_domain"} <= result.inputs.keys()
    assert run().resumed
    assert not run(seed=1).resumed
    titles = list(reversed(catalogs["toys"].attributes["title"]))
    renamed = Catalog("toys", catalogs["toys"].item_ids, {"title": titles})
    assert not run({**catalogs, "toys": renamed}).resumed
    with pytest.raises(DataError, match="'toys' has a task vector but no catalog"):
        run({name: catalogs[name] for name in ("garden", "kitchen")})


def test_batches_are_of_one_length_and_complete() -> None:
    texts = [[1] * (length % 3 + 2) for length in range(200)]
    batches = equal_lengths(texts, torch.device("cpu"))
    assert sorted(ids for batch in batches for ids in batch.tolist()) == sorted(texts)
    assert max(len(batch) for batch in batches) <= 64
    assert len(batches) == 6


@pytest.mark.parametrize("kind", ["roberta", "mpnet"])
def test_other_encoders_can_be_taken_layer_by_layer(kind: str) -> None:
    """The constructor itself compares with the whole model."""
    from transformers import AutoConfig, AutoModel

    shape = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
    config = AutoConfig.for_model(kind, vocab_size=50, **shape)
    model = AutoModel.from_config(config).eval()
    layers = Layers(model, torch.randint(5, 50, (2, 7)))
    assert len(layers) == 3
    assert len(layers.linear(1)) == 6
    assert set(layers.base) == {n for layer in (None, 0, 1, 2) for n in layers.names(layer)}


class Odd(nn.Module):
    """A stack of linear layers that is not run as a plain stack."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.table = nn.Embedding(9, 4)
        self.layers = nn.ModuleList([OddLayer(how) for _ in range(2)])

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        h: Tensor = self.table(input_ids)
        for place, layer in enumerate(self.layers):
            h = layer(h, place if self.how == "argument" else 0)
        return h


class OddLayer(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.dense = nn.Linear(4, 4)

    def forward(self, h: Tensor, place: int) -> Tensor:
        if self.how == "rows":
            return h + self.dense(h[:, :1])
        out: Tensor = self.dense(h) + place
        return out


def test_architectures_that_are_not_plain_stacks_are_refused() -> None:
    ids_BT = torch.randint(0, 9, (2, 3))
    Layers(Odd("plain"), ids_BT)
    with pytest.raises(ModelError, match="Odd: its layers cannot be run one by one"):
        Layers(Odd("argument"), ids_BT)
    with pytest.raises(ModelError, match="Linear: its layers"):
        Layers(nn.Linear(2, 2), ids_BT)
    name = "layers.0.dense.weight"
    grams = LayerGrams(Odd("rows"), {"toys": {name: torch.zeros(4, 4)}}, [[ids_BT]])
    with pytest.raises(ModelError, match="is given 2 rows for 6 tokens"):
        grams.get(name)
