"""Tiny causal language models in Hugging Face layout: random weights, a byte-level BPE trained here."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from common.language.records import Ranking
from tests.conftest import WORDS


def build_bpe(folder: Path) -> int:
    """Train a byte-level BPE of some 400 tokens on `WORDS` and save it; returns its size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<pad>", "<end>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    lines = [f"- {word} {other}\n" for word, other in itertools.pairwise(WORDS)]
    tokenizer.train_from_iterator(lines, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")
    fast.save_pretrained(folder)
    return len(fast)


def build_causal(folder: Path, kind: str = "qwen2", *, seed: int = 0, **overrides: Any) -> Path:
    """Write a tiny Qwen2 or Llama with random weights and its tokenizer, as `save_pretrained` does."""
    import torch
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        MistralConfig,
        MistralForCausalLM,
        Qwen2Config,
        Qwen2ForCausalLM,
    )

    folder.mkdir(parents=True, exist_ok=True)
    settings: dict[str, Any] = {
        "vocab_size": build_bpe(folder), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 64, "max_position_embeddings": 1024,
        "initializer_range": 0.2, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0,
    }  # fmt: skip
    config, model = {
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "llama": (LlamaConfig, LlamaForCausalLM),
        "mistral": (MistralConfig, MistralForCausalLM),
    }[kind]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model(config(**{**settings, **overrides})).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", params=["qwen2", "llama"])
def tiny_causal(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a tiny causal model, of either architecture."""
    return build_causal(tmp_path_factory.mktemp("causal") / request.param, request.param)


@pytest.fixture
def lm(tiny_causal: Path) -> Any:
    from common.language.model import load_causal

    return load_causal(tiny_causal, precision="fp32")


@pytest.fixture
def rankings() -> list[Ranking]:
    """Three rankings whose prompts differ in length and in number of candidates."""
    return [
        Ranking("a", ("red cup", "green tea pot"), ("lamp", "small oak table", "tea", "tea cup"), 2),
        Ranking("b", ("bike",), ("train", "car", "boat 9"), 0),
        Ranking("c", tuple(f"toy {n}" for n in range(9)), ("duck", "drum and ball of orbit"), None),
    ]
