"""Decoders of language models: templates, prompts, TALLRec's questions, adapters, candidates and answers."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from clients.data.instructions import read_tallrec
from common.language.adapters import adapter_digest, load_adapter
from common.language.generation import read_generation, write_generation
from common.language.pool import Candidate
from common.language.prompts import FOLDER, Template
from common.language.records import Ranking, YesNo
from common.language.samples import read_samples
from common.payloads import CANDIDATES, check_fitness, decode_values, encode_values
from fuzz.decoders import DECODERS, Decoder, Make, as_text, decoder, encoded
from fuzz.models import ADAPTER, adapter_files

RANKING = Ranking("u", ("oak {spoon}", "tea"), ("pot", "{title}", "cup"), target=1)


@decoder
def language_template(folder: Path) -> Decoder:
    path = folder / "template.toml"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        found = Template.load(path)
        assert found.ranking.model_dump().items() >= tomllib.loads(data.decode())["ranking"].items()
        prompt = found.ranking_prompt(RANKING)
        assert all(title in prompt for title in (*RANKING.history, *RANKING.candidates))
        assert "question {text}" in found.yes_no_prompt(YesNo("u", "question {text}", None))

    return Decoder(tuple(path.read_bytes() for path in sorted(FOLDER.glob("*.toml"))), read)


@decoder
def language_samples(folder: Path) -> Decoder:
    path = folder / "samples.jsonl"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        found = read_samples(path)
        lines = [json.loads(line) for line in as_text(data).split("\n") if line.strip()]
        assert found == [(line["prompt"], line["answer"], tuple(line.get("others", []))) for line in lines]

    samples = [{"prompt": f"rank\n- oak \u2028 {n}", "answer": "oak"} for n in range(3)]
    choices = [{**sample, "others": ["elm", "ash"]} for sample in samples]
    both = tuple(b"\n".join(map(encoded, some)) for some in (samples, choices))
    return Decoder((*both, b'{"prompt":"a\xe2\x80\xa8b","answer":"b"}\n\n'), read)


@decoder
def candidate_numbers(folder: Path) -> Decoder:
    path, candidates = folder / "generation.safetensors", [Candidate.of([1, 0.5], [0.25, -1.5])] * 2
    write_generation(path, candidates)
    whole = path.read_bytes()

    def read(data: bytes) -> None:
        path.write_bytes(data)
        for found in read_generation(path, 2):
            assert found == Candidate.of(found.ratios, found.scales)
            assert len(found.ratios) == len(found.scales) == 2

    return Decoder((whole,), read)


@decoder
def fitness_values(_folder: Path) -> Decoder:
    def read(data: bytes) -> None:
        values = decode_values(data)
        check_fitness(values)
        assert len(values) > 1 and all(type(values[name]) is int for name in values if name != CANDIDATES)

    answers = {CANDIDATES: "c" * 64, "0000/loss_e3": 1999, "0001/loss_e3": 0}
    return Decoder((encode_values(answers),), read)


@decoder
def tallrec_questions(folder: Path) -> Decoder:
    path = folder / "movie.test.json"
    asked = [
        {"instruction": "Will the user like it?", "input": f"They liked {n}.\nNow?", "output": answer}
        for n, answer in enumerate(("Yes.", "No."))
    ]

    def read(data: bytes) -> None:
        path.write_bytes(data)
        found = read_tallrec(path)
        assert [one.answer for one in found] == [
            row["output"].strip().lower().startswith("y") for row in json.loads(data)
        ]

    return Decoder((encoded(asked),), read)


def _adapter_file(name: str) -> Make:
    def make(folder: Path) -> Decoder:
        files = adapter_files(2)
        for other, content in files.items():
            (folder / other).write_bytes(content)

        def read(data: bytes) -> None:
            (folder / name).write_bytes(data)
            lora, found = load_adapter(folder)
            stored = load_file(folder / ADAPTER)
            config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
            assert (lora.rank, lora.alpha) == (config["r"], config["lora_alpha"])
            assert found.keys() == stored.keys()
            for key, tensor in found.items():
                np.testing.assert_array_equal(tensor.numpy(), stored[key].astype(np.float32))
            assert len(adapter_digest(folder)) == 64

        return Decoder((files[name],), read)

    return make


for _name in adapter_files(2):
    DECODERS[f"lora-folder-{_name.split('.')[0]}"] = _adapter_file(_name)
