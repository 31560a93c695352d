"""Train a small causal model from scratch on public catalogs; a folder in Hugging Face layout comes of it.

    out/data/<domain>/     prepared domains, of which only the catalogs are read
    out/checkpoints/       the newest step, complete
    out/metrics.jsonl      one line an evaluation on held-back items
    out/model/             what `AutoModelForCausalLM` and `AutoTokenizer` load

Step s draws its documents from `[seed, s]` and nothing else, and there is no dropout: killed and started
again it goes on from the newest checkpoint to the same weights.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from clients.data.domain import Domain
from clients.training.checkpoint import (
    newest_checkpoint,
    read_state,
    read_weights,
    restore_optimizer,
    write_checkpoint,
)
from common.catalog import Catalog
from common.digests import json_digest
from common.errors import ConfigError
from common.files import replace_folder, write_atomic
from common.language.prompts import Template
from common.progress import NO_REPORT, Report
from simulations.language.config import LanguageConfig, PretrainingSection
from simulations.language.start import ROPE_THETA, co_occurrence, induction, near_identity
from simulations.language.text import PseudoUsers, document, lines, split_catalogs
from simulations.simulate import prepare_source

PHASE = "pretrain"
MODEL, METRICS = "model", "metrics.jsonl"
END = "<|endoftext|>"
IGNORED = -100
_FIRST_CANDIDATES = 3
_README = """# A small language model of catalogs

Made by Isthmus from scratch on public catalogs: titles, and prompts of pseudo-users made of them. It knows
nothing else, and is meant for trying adapters where no pretrained model can be had.
"""
Ids = list[int]


@dataclass(frozen=True)
class HeldBack:
    """On prompts of held-back items: mean loss of an answer token, share of answers named greedily."""

    loss: float
    named: float


def pretrain(config: LanguageConfig, out: Path, report: Report = NO_REPORT) -> Path:
    """Train (or go on training) in `out`; returns the model's folder. Raises ConfigError, DataError."""
    settings, seed = config.pretraining, config.run.seed
    key = json_digest(config.model_dump(mode="json", include={"run", "pretraining", "domain"}))
    if (out / MODEL).is_dir():
        _check_key(out / MODEL / "pretraining.json", key)
        return out / MODEL
    catalogs = {
        source.name: Domain.load(prepare_source(config, source.name, out)).catalog()
        for source in config.domain
    }
    trainer = Pretrainer(catalogs, settings, seed)
    folder = out / "checkpoints"
    begun = newest_checkpoint(folder)
    best, since_best = math.inf, 0
    if begun is not None:
        state = read_state(begun)
        _check_key(begun / "state.json", key)
        trainer.model.load_state_dict(read_weights(begun), strict=False)
        restore_optimizer(begun, trainer.optimizer)
        trainer.step, best, since_best = state["step"], state["best"], state["since_best"]
    _forget_after(out / METRICS, trainer.step)
    started_s = time.monotonic()
    while trainer.step < settings.steps and since_best < settings.patience:
        loss = trainer.take_step()
        report(phase=PHASE, step=trainer.step, total=settings.steps, loss=loss)
        last = trainer.step == settings.steps
        if trainer.step % settings.evaluate_every_steps == 0 or last:
            held = trainer.evaluate()
            best, since_best = (held.loss, 0) if held.loss < best else (best, since_best + 1)
            line = {"step": trainer.step, "loss": loss, "held_back_loss": held.loss, "named": held.named}
            _append(out / METRICS, {**line, "seconds": round(time.monotonic() - started_s, 1)})
        if trainer.step % settings.checkpoint_every_steps == 0 or last or since_best >= settings.patience:
            write_checkpoint(
                folder,
                trainer.step,
                weights=trainer.weights(),
                optimizer=trainer.optimizer,
                trainer_state={},
                state={"key": key, "step": trainer.step, "best": best, "since_best": since_best},
            )
    trainer.save(out / MODEL, {"key": key, "steps": trainer.step, "held_back_loss": best})
    return out / MODEL


class Pretrainer:
    """Tokenizer, model, optimizer and documents; `step` steps are done."""

    def __init__(self, catalogs: Mapping[str, Catalog], settings: PretrainingSection, seed: int) -> None:
        self._settings, self._seed = settings, seed
        self._template = Template.load(settings.template)
        learned, held_back = split_catalogs(catalogs, settings.held_back, seed)
        self._users = PseudoUsers(learned, settings.title_words)
        self._held_back = PseudoUsers(held_back, settings.title_words)
        self.tokenizer = train_tokenizer(self._users, self._template, settings.vocabulary)
        self._end = int(self.tokenizer.convert_tokens_to_ids(END))
        torch.manual_seed(seed)
        self.model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(
                settings.architecture, **_architecture(settings, len(self.tokenizer), self._end)
            ),
            dtype=torch.float32,
        )
        self._begin()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=settings.learning_rate,
            betas=(0.9, 0.95),
            weight_decay=settings.weight_decay,
        )
        self.step = 0

    def take_step(self) -> float:
        """One step of AdamW on fresh shelves, copies and prompts; returns the prompts' loss."""
        rng = np.random.default_rng([self._seed, self.step])
        for group in self.optimizer.param_groups:
            group["lr"] = self._settings.learning_rate * self._rate()
        self.model.train()
        prompt_loss = self._loss(self._prompts(rng))
        torch.autograd.backward(prompt_loss + self._loss(self._shelves(rng)) + self._loss(self._copies(rng)))
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return float(prompt_loss.detach())

    @torch.no_grad()
    def evaluate(self) -> HeldBack:
        """Prompts of held-back items with as many candidates as there will be in the end, always the same."""
        self.model.eval()
        rng = np.random.default_rng([self._seed, 0, 0])
        documents = [
            self._prompt(self._held_back, rng, self._settings.candidates)
            for _ in range(self._settings.held_back_prompts)
        ]
        losses, tokens, named = 0.0, 0, 0
        for start in range(0, len(documents), 8):
            hidden_BTE, target_BT = self._run(documents[start : start + 8])
            known_BT = target_BT != IGNORED
            logits_NV = self.model.lm_head(hidden_BTE[known_BT])
            target_N = target_BT[known_BT]
            losses += float(torch.nn.functional.cross_entropy(logits_NV, target_N, reduction="sum"))
            tokens += len(target_N)
            right = (logits_NV.argmax(dim=1) == target_N).split(known_BT.sum(dim=1).tolist())
            named += sum(bool(own.all()) for own in right)
        return HeldBack(losses / tokens, named / len(documents))

    def weights(self) -> dict[str, Tensor]:
        """The trained tensors; a tied output matrix is named once."""
        return {name: parameter.detach() for name, parameter in self.model.named_parameters()}

    def save(self, folder: Path, facts: Mapping[str, Any]) -> None:
        """Write model, tokenizer, a README and `pretraining.json`; the folder appears whole."""
        stage = folder.with_name(f".{folder.name}.tmp")
        self.model.save_pretrained(stage)
        self.tokenizer.save_pretrained(stage)
        (stage / "README.md").write_text(_README, encoding="utf-8")
        record = {**facts, "settings": self._settings.model_dump(mode="json"), "seed": self._seed}
        (stage / "pretraining.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        replace_folder(stage, folder)

    @torch.no_grad()
    def _begin(self) -> None:
        """Embeddings from what shares a theme, attention near identity and with an induction head."""
        embeddings = self.model.get_input_embeddings().weight
        titles = list(dict.fromkeys(self._users.titles()))
        ids = dict(zip(titles, self.tokenizer([f" {title}" for title in titles])["input_ids"], strict=True))
        groups = ([ids[title] for title in group] for group in self._users.groups())
        embeddings.copy_(co_occurrence(groups, *embeddings.shape))
        near_identity(self.model)
        if min(self._settings.layers, self._settings.heads) > 1:
            induction(self.model)

    def _rate(self) -> float:
        """Linear warm-up, then half a cosine down to a twentieth."""
        settings = self._settings
        if self.step < settings.warmup_steps:
            return (self.step + 1) / settings.warmup_steps
        done = (self.step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
        return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done))

    def _prompts(self, rng: np.random.Generator) -> list[tuple[Ids, int]]:
        """Prompts of about `prompt_tokens` tokens in all, with as many candidates each."""
        settings = self._settings
        grown = min(1.0, self.step / max(1.0, settings.growth * settings.steps))
        least = min(_FIRST_CANDIDATES, settings.candidates)
        most = least + grown * (settings.candidates - least)
        candidates = round(math.exp(rng.uniform(math.log(least), math.log(most))))
        documents, tokens = [], 0
        while tokens < settings.prompt_tokens:
            documents.append(self._prompt(self._users, rng, candidates))
            tokens += len(documents[-1][0])
        return documents

    def _prompt(self, users: PseudoUsers, rng: np.random.Generator, candidates: int) -> tuple[Ids, int]:
        """Ids of a prompt with its answer and the end, and where the answer begins."""
        settings = self._settings
        history = int(rng.integers(1, settings.history + 1))
        ranking = users.ranking(rng, history, candidates, settings.noise, settings.informed)
        prompt, answer = document(self._template, ranking)
        head, tail = self._encode(prompt), self._encode(answer)
        return [*head, *tail, self._end], len(head)

    def _shelves(self, rng: np.random.Generator) -> list[tuple[Ids, int]]:
        documents, tokens = [], 0
        while tokens < self._settings.shelf_tokens:
            ids = self._encode(lines(self._template, self._users.shelf(rng, self._settings.history + 1)))
            documents.append(([*ids, self._end], 1))
            tokens += len(ids)
        return documents

    def _copies(self, rng: np.random.Generator) -> list[tuple[Ids, int]]:
        documents, tokens = [], 0
        while tokens < self._settings.copy_tokens:
            copy = self._users.copy(rng, int(rng.integers(2, self._settings.copied + 1)))
            documents.append((self._encode(self._template.ranking_prompt(copy)), 1))
            tokens += len(documents[-1][0])
        return documents

    def _loss(self, documents: Sequence[tuple[Ids, int]]) -> Tensor:
        hidden_BTE, target_BT = self._run(documents)
        known_BT = target_BT != IGNORED
        return torch.nn.functional.cross_entropy(
            self.model.lm_head(hidden_BTE[known_BT]), target_BT[known_BT]
        )

    def _run(self, documents: Sequence[tuple[Ids, int]]) -> tuple[Tensor, Tensor]:
        """`(hidden_BTE, target_BT)`: the next token where it is learned, else IGNORED.

        Padding is on the right, so that causal attention never reaches it: no mask, and only the positions
        that count go through the output matrix.
        """
        longest = max(len(ids) for ids, _ in documents)
        ids_BT = torch.full((len(documents), longest), self._end)
        target_BT = torch.full((len(documents), longest), IGNORED)
        for row, (ids, first) in enumerate(documents):
            ids_BT[row, : len(ids)] = torch.tensor(ids)
            target_BT[row, first - 1 : len(ids) - 1] = torch.tensor(ids[first:])
        hidden_BTE: Tensor = self.model.model(input_ids=ids_BT, use_cache=False).last_hidden_state
        return hidden_BTE, target_BT

    def _encode(self, text: str) -> Ids:
        return list(self.tokenizer(text, return_attention_mask=False, split_special_tokens=True)["input_ids"])


def train_tokenizer(users: PseudoUsers, template: Template, vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of all titles and of the template's own words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    titles = list(users.titles())
    frame = template.ranking.prompt.format(history="", candidates="")
    shown = [lines(template, [title]) for title in titles]
    tokenizer.train_from_iterator([*titles, *shown, *([frame] * max(2, len(titles) // 100))], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


def _architecture(settings: PretrainingSection, vocabulary: int, end: int) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": settings.hidden_size,
        "intermediate_size": settings.intermediate_size,
        "num_hidden_layers": settings.layers,
        "num_attention_heads": settings.heads,
        "num_key_value_heads": settings.key_value_heads,
        "max_position_embeddings": settings.positions,
        "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETA},
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": end,
        "pad_token_id": end,
    }


def _check_key(path: Path, key: str) -> None:
    if json.loads(path.read_text(encoding="utf-8")).get("key") != key:
        raise ConfigError(
            f"{path.parent}: was made with another configuration", next_step="choose another --out folder"
        )


def _forget_after(path: Path, step: int) -> None:
    """Leave out what an evaluation said after the checkpoint that training goes on from."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    kept = [line for line in lines if json.loads(line)["step"] <= step]
    write_atomic(path, "".join(f"{line}\n" for line in kept).encode())


def _append(path: Path, record: Mapping[str, Any]) -> None:
    before = path.read_bytes() if path.exists() else b""
    write_atomic(path, before + (json.dumps(record) + "\n").encode())
