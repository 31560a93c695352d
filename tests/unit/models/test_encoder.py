"""The encoder against sentence-transformers, and tokenisation in pieces against the joined text."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from common.errors import DataError
from common.models.base import load_tensors, resolve_base, save_model, trainable_tensors
from common.models.encoder import Encoder, ItemTokens

PIECES = (
    "lipstick", "Super-Glue", "don't", "12.5oz", "Acme!", "(pack of 3)", "ünïcödé", "C++", "a/b", "50%",
    "L'Oréal", "5-1/2", "Men's", "e.g.", "#1", "x;y", "Wow!!!", "naïve café", "日本", "…", "½", "A&B", "'90s",
)  # fmt: skip


def catalog_texts(count: int = 40, seed: int = 0) -> list[list[str]]:
    """Item texts with the punctuation that catalogs have, at both ends too."""
    rng = random.Random(seed)  # noqa: S311
    return [
        [
            f"{key}: {' '.join(rng.choices(PIECES, k=rng.randint(1, most)))}"
            for key, most in (("title", 14), ("brand", 2))
        ]
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def minilm() -> Encoder:
    return Encoder.load(resolve_base("embedded"))


def check_histories(tokens: ItemTokens, tokenizer: Any, seed: int = 1) -> None:
    """Ids of histories are those of the joined text, for many lengths."""
    rng = random.Random(seed)  # noqa: S311
    for max_seq_len in (8, 17, 64, 120):
        for _ in range(25):
            history = [rng.randrange(len(tokens)) for _ in range(rng.randint(1, 9))]
            wanted = tokenizer(tokens.history_text(history), truncation=True, max_length=max_seq_len)[
                "input_ids"
            ]
            assert tokens.history(history, max_seq_len) == wanted
    for index in range(len(tokens)):
        assert tokens.item(index) == tokenizer(tokens.texts[index])["input_ids"] == tokens.history([index])


def test_minilm_ids_are_those_of_the_joined_text(minilm: Encoder) -> None:
    tokens = minilm.tokenize_items(catalog_texts(), max_attribute_tokens=12)
    assert tokens._splits
    check_histories(tokens, minilm.tokenizer)


def test_attributes_are_cut_to_a_number_of_tokens(minilm: Encoder) -> None:
    tokens = minilm.tokenize_items(
        [["title: one two three four five", "brand: a b c"]], max_attribute_tokens=4
    )
    assert tokens.texts == ["title: one two, brand: a b"]
    whole = minilm.tokenize_items([["title:  one\n two"]], max_attribute_tokens=4)
    assert whole.texts == ["title: one two"]
    for strings in catalog_texts(seed=3):
        cut = minilm.tokenize_items([strings[:1]], max_attribute_tokens=9)
        assert len(cut.item(0)) <= 9 + 2


def test_minilm_agrees_with_sentence_transformers(minilm: Encoder) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    other = sentence_transformers.SentenceTransformer(str(resolve_base("embedded")), device="cpu")
    other.max_seq_length = 64
    tokens = minilm.tokenize_items(catalog_texts(12), max_attribute_tokens=32)
    histories = [[index, (index + 1) % 12, (index + 5) % 12] for index in range(12)]
    for ids, texts in (
        (tokens.items(64), tokens.texts),
        ([tokens.history(h, 64) for h in histories], [tokens.history_text(h) for h in histories]),
    ):
        z_NE = minilm.encode(ids, batch_size=5)
        other_NE = other.encode(texts, convert_to_tensor=True, show_progress_bar=False)
        assert float((z_NE * other_NE).sum(dim=1).min()) > 0.9999
        assert torch.allclose(z_NE.norm(dim=1), torch.ones(len(ids)), atol=1e-5)


def test_bf16_is_close_to_fp32(minilm: Encoder) -> None:
    tokens = minilm.tokenize_items(catalog_texts(6), max_attribute_tokens=32)
    exact_NE = minilm.encode(tokens.items())
    minilm.bf16 = True
    try:
        rounded_NE = minilm.encode(tokens.items())
    finally:
        minilm.bf16 = False
    assert rounded_NE.dtype == torch.float32
    assert float((exact_NE * rounded_NE).sum(dim=1).min()) > 0.999


def byte_level_bpe(folder: Path) -> None:
    """A RoBERTa-like tokenizer, trained here on the pieces."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(strings) for strings in catalog_texts(60)], trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    wrap(tokenizer, special).save_pretrained(folder)


def wrap(tokenizer: Tokenizer, special: list[str]) -> Any:
    from transformers import PreTrainedTokenizerFast

    names = dict(
        zip(("bos_token", "pad_token", "eos_token", "unk_token", "mask_token"), special, strict=True)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, cls_token=special[0], sep_token=special[2], model_max_length=128, **names
    )


def test_a_roberta_like_model_end_to_end(tmp_path: Path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from transformers import RobertaConfig, RobertaModel

    folder = tmp_path / "roberta"
    byte_level_bpe(folder)
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=400, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=130, type_vocab_size=1, pad_token_id=1, initializer_range=0.2,
    )  # fmt: skip
    RobertaModel(config).save_pretrained(folder)
    encoder = Encoder.load(folder)
    assert encoder.max_tokens == 128
    tokens = encoder.tokenize_items(catalog_texts(), max_attribute_tokens=24)
    assert tokens._splits
    check_histories(tokens, encoder.tokenizer)
    save_model(folder, {}, tmp_path / "saved", readme="")
    other = sentence_transformers.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    texts = [text for text in tokens.texts if len(encoder.tokenizer(text)["input_ids"]) <= 128]
    z_NE = encoder.encode([encoder.tokenizer(text)["input_ids"] for text in texts])
    other_NE = other.encode(texts, convert_to_tensor=True, show_progress_bar=False)
    assert float((z_NE * other_NE).sum(dim=1).min()) > 0.9999


def test_a_sentencepiece_like_tokenizer_splits_too() -> None:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator([" ".join(strings) for strings in catalog_texts(60)], trainer)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", None, [("<s>", 0), ("</s>", 2)])
    wrapped = wrap(tokenizer, special)
    texts = [", ".join(strings) for strings in catalog_texts()]
    check_histories(ItemTokens(wrapped, texts, 128), wrapped)


def test_a_tokenizer_that_joins_across_spaces_is_noticed_and_still_exact() -> None:
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    vocabulary = {token: index for index, token in enumerate([*special, ";", " ", "; ", "a", "b", " a"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [(";", " "), (" ", "a")], unk_token="<unk>"))
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", None, [("<s>", 0), ("</s>", 2)])
    wrapped = wrap(tokenizer, special)
    tokens = ItemTokens(wrapped, ["a", "b", "ab"], 128)
    assert not tokens._splits
    check_histories(tokens, wrapped)


def test_given_parameters_replace_the_models_own(pico_model: Path) -> None:
    encoder = Encoder.load(pico_model)
    names = trainable_tensors(pico_model)
    assert set(names) <= dict(encoder.model.named_parameters()).keys()
    batch = encoder.batch([[2, 60, 61, 3], [2, 70, 3]])
    plain_BE = encoder.forward(*batch)
    base = load_tensors(pico_model, names)
    assert torch.equal(encoder.forward(*batch, params=base), plain_BE)
    scale = torch.tensor(0.5, requires_grad=True)
    moved = {name: tensor + scale * 0.1 for name, tensor in base.items()}
    encoder.forward(*batch, params=moved)[0, 0].backward()
    assert scale.grad is not None and float(scale.grad.abs()) > 0
    assert torch.equal(encoder.forward(*batch), plain_BE)


def test_padding_and_order_do_not_matter(pico_model: Path, pico_sentence_model: Path) -> None:
    for folder in (pico_model, pico_sentence_model):
        encoder = Encoder.load(folder)
        ids = [[2, *range(50, 50 + length), 3] for length in (5, 1, 9, 3)]
        together_NE = encoder.encode(ids, batch_size=3)
        alone_NE = torch.cat([encoder.encode([one]) for one in ids])
        assert torch.allclose(together_NE, alone_NE, atol=1e-5)
    assert Encoder.load(pico_sentence_model).pooling == "cls"
    assert Encoder.load(pico_sentence_model, pooling="mean").pooling == "mean"


def test_encoding_leaves_training_mode_and_dropout_can_be_set(pico_model: Path) -> None:
    encoder = Encoder.load(pico_model, dropout=0.0)
    encoder.model.train()
    first = encoder.forward(*encoder.batch([[2, 60, 3]]))
    assert torch.equal(first, encoder.forward(*encoder.batch([[2, 60, 3]])))
    encoder.encode([[2, 60, 3]])
    assert encoder.model.training
    noisy = Encoder.load(pico_model, dropout=0.5)
    noisy.model.train()
    assert not torch.equal(*(noisy.forward(*noisy.batch([[2, 60, 3]])) for _ in range(2)))


def test_items_without_text_are_refused(pico_model: Path) -> None:
    encoder = Encoder.load(pico_model)
    with pytest.raises(DataError, match="item 1"):
        encoder.tokenize_items([["title: red"], []], 8)
    with pytest.raises(DataError, match="no items"):
        encoder.tokenize_items([], 8)
