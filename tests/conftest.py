"""Fixtures that every test may use: pico models in Hugging Face layout, and pico domains.

A pico model is a BertModel of 2 layers and 32 dimensions with random weights and a WordPiece
vocabulary of some 200 words: real in every file, made in milliseconds, the same in every run.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.config import RunConfig

WORDS = """
red blue green black white gold silver small large tiny soft hard sweet salty fresh warm cold light dark
old new fine raw pure wild calm bold slim wide deep spoon fork knife bowl plate cup glass pan pot lamp
chair table sofa bed desk shelf box bag shoe boot sock hat scarf glove coat shirt dress skirt ring watch
soap cream oil brush comb mask balm scent tea coffee sugar salt pepper rice pasta bean corn nut bread
cake toy ball doll kite drum puzzle robot train truck car bike boat plane horse bear duck lion fox owl
pen ink paper book map globe scale tube filter pump valve wire lens probe acme zeta nova orbit delta
prime atlas vega lyra title brand category kitchen beauty garden office travel sport music game for with
of and the pack set
""".split()  # noqa: SIM905 - a list of 150 literals reads worse


def build_tokenizer(folder: Path) -> int:
    """Write a WordPiece tokenizer of `WORDS` and single characters to `folder`; returns its size."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    characters = [chr(code) for code in range(ord("a"), ord("z") + 1)] + list("0123456789")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *list(",;:.-!"), *characters]
    vocabulary += [f"##{character}" for character in characters] + list(dict.fromkeys(WORDS))
    tokenizer = Tokenizer(
        models.WordPiece({word: index for index, word in enumerate(vocabulary)}, unk_token="[UNK]")
    )
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "BertTokenizer",
        "do_lower_case": True,
        "model_max_length": 128,
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    return len(vocabulary)


def build_pico(folder: Path, *, sentence_transformers: bool = False, seed: int = 0, **overrides: Any) -> Path:
    """Write a pico BertModel to `folder`, as `save_pretrained` does, or in sentence-transformers layout."""
    import torch
    from transformers import BertConfig, BertModel

    folder.mkdir(parents=True, exist_ok=True)
    settings: dict[str, Any] = {
        "vocab_size": build_tokenizer(folder),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = BertModel(BertConfig(**{**settings, **overrides}))
    model.save_pretrained(folder)
    if sentence_transformers:
        names = ("Transformer", "Pooling", "Normalize")
        paths = ("", "1_Pooling", "2_Normalize")
        modules = [
            {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{name}"}
            for index, (name, path) in enumerate(zip(names, paths, strict=True))
        ]
        (folder / "modules.json").write_text(json.dumps(modules))
        (folder / "1_Pooling").mkdir()
        (folder / "2_Normalize").mkdir()
        pooling = {"word_embedding_dimension": 32, "pooling_mode_cls_token": True}
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
        (folder / "sentence_bert_config.json").write_text(
            json.dumps({"max_seq_length": 64, "do_lower_case": False})
        )
    return folder


def build_domain(
    name: str = "pico", *, users: int = 40, items: int = 30, seed: int = 0, random: bool = False
) -> Any:
    """A `clients.data.domain.Domain` whose users walk along items in steps that the texts do not tell.

    `random`: each takes eight items at random, so that a model can only learn its users by heart.
    """
    from clients.data.domain import Domain

    rng = np.random.default_rng(seed)
    words = np.array(WORDS[:120])
    titles = [f"{' '.join(rng.choice(words, size=3, replace=False))} {index}" for index in range(items)]
    walks = []
    for _ in range(users):
        if random:
            walks.append([int(item) for item in rng.permutation(items)[:8]])
            continue
        start, length = int(rng.integers(items)), int(rng.integers(4, 8))
        walks.append([(start + 7 * position) % items for position in range(length)])
    return Domain(
        name=name,
        item_ids=[f"i{index:03d}" for index in range(items)],
        attributes={"title": titles, "brand": [str(rng.choice(words)) for _ in range(items)]},
        user_ids=[f"u{user:03d}" for user in range(users)],
        train=[np.array(walk[:-2], dtype=np.int32) for walk in walks],
        valid=np.array([walk[-2] for walk in walks], dtype=np.int32),
        test=np.array([walk[-1] for walk in walks], dtype=np.int32),
        public_attributes=("title", "brand"),
        synthetic=True,
    )


@pytest.fixture(scope="session")
def pico_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pico model as `save_pretrained` writes it (mean pooling by default)."""
    return build_pico(tmp_path_factory.mktemp("models") / "pico")


@pytest.fixture(scope="session")
def pico_sentence_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another pico model, in sentence-transformers layout with cls pooling."""
    return build_pico(tmp_path_factory.mktemp("models") / "pico-st", sentence_transformers=True, seed=1)


@pytest.fixture(scope="session")
def make_pico() -> Callable[..., Path]:
    """`build_pico`, for tests that need a model of their own."""
    return build_pico


@pytest.fixture(scope="session")
def make_domain() -> Callable[..., Any]:
    """`build_domain`, for tests that need a domain of their own."""
    return build_domain


@pytest.fixture(scope="session")
def pico_domain() -> Any:
    """A domain of 40 users and 30 items."""
    return build_domain()


@pytest.fixture(scope="session")
def by_heart() -> dict[str, Any]:
    """Training settings under which a pico model learns eight users of a random domain by heart."""
    return {
        "batch_size": 8, "max_steps": 120, "eval_every_steps": 120, "checkpoint_every_steps": 120,
        "warmup_steps": 10, "learning_rate": 2e-3, "dropout": 0.0,
    }  # fmt: skip


@pytest.fixture
def pico_config() -> RunConfig:
    """A run of 12 steps in fp32: a second on one core."""
    return RunConfig.model_validate(
        {
            "text": {"max_seq_len": 32},
            "training": {
                "batch_size": 8, "max_steps": 12, "warmup_steps": 2, "learning_rate": 1e-3,
                "eval_every_steps": 4, "checkpoint_every_steps": 3,
                "precision": "fp32", "vector_codec": "fp32",
            },
        }
    )  # fmt: skip
