"""Scoring 30 titles after one prompt: keys and values of the prompt shared, against 30 whole prompts.

A Qwen2 of random weights; prompts and titles are random tokens, which cost what real ones do. Both ways give
the same scores, which is checked first and warms up. The floor is the prompt alone. On the CPU the seconds
are the process's own processor time, so that other work on the machine does not count.

    python -m benchmarks.shared_prefix
    python -m benchmarks.shared_prefix --size full --out runs/shared_prefix.json
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from benchmarks.measure import machine, medians, progress, show, take_turns, write_record
from common.language.model import CausalLM
from common.language.scoring import answer_scores, whole_log_likelihoods

SIZES = {
    "toy": {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128},
    "full": {"vocab_size": 8192, "hidden_size": 384, "num_hidden_layers": 10, "intermediate_size": 1536},
}
HEADS = {"num_attention_heads": 6, "num_key_value_heads": 2}


def make_model(size: str, device: str, dtype: torch.dtype) -> CausalLM:
    """A model of random weights, 0.1M parameters ("toy") or 25M ("full")."""
    torch.manual_seed(0)
    heads = HEADS if size == "full" else {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = Qwen2ForCausalLM(Qwen2Config(**SIZES[size], **heads, tie_word_embeddings=True))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE()), eos_token="<end>")  # noqa: S106
    return CausalLM(model.to(device, dtype).eval(), tokenizer)


def draw(lm: CausalLM, prompts: int, tokens: int, candidates: int, title: int) -> tuple[list, list]:
    """`prompts` prompts of about `tokens`, each with titles of `title` tokens, give or take half."""
    generator = torch.Generator().manual_seed(1)
    vocabulary = int(lm.model.config.vocab_size)

    def ids(count: int) -> list[int]:
        return torch.randint(2, vocabulary, (count,), generator=generator).tolist()

    lengths = torch.randint(
        title - title // 2, title + title // 2 + 1, (prompts, candidates), generator=generator
    )
    heads = [ids(tokens - n % min(8, tokens)) for n in range(prompts)]
    return heads, [[ids(int(length)) for length in row] for row in lengths]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", choices=tuple(SIZES), default="toy")
    parser.add_argument("--tokens", type=int, default=300, help="of a prompt")
    parser.add_argument("--title", type=int, nargs="+", default=[7, 20], help="tokens of a title, on average")
    parser.add_argument("--candidates", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    lm = make_model(options.size, options.device, getattr(torch, options.dtype))
    parameters = sum(parameter.numel() for parameter in lm.model.parameters())
    progress(f"{parameters / 1e6:.1f}M parameters")
    with torch.no_grad():
        rows = [measure(lm, title, options) for title in options.title]
    heads = (
        "title tokens",
        "whole / shared",
        "whole / shared, 8 at a time",
        "shared / prompt alone",
        "token ratio",
    )
    show("30 candidates of one prompt", heads, [[row[head] for head in heads] for row in rows])
    where = machine(torch=torch.__version__, device=options.device, threads=options.threads)
    write_record(options.out, {"machine": where, "parameters": parameters, "rows": rows})


def measure(lm: CausalLM, title: int, options: argparse.Namespace) -> dict[str, float]:
    """Seconds of one prompt's candidates each way, and their ratios."""
    heads, answers = draw(lm, 8, options.tokens, options.candidates, title)

    def whole() -> torch.Tensor:
        return whole_log_likelihoods(lm, heads[:1] * options.candidates, answers[0]).cpu()

    def shared() -> torch.Tensor:
        return answer_scores(lm, heads[:1], answers[:1])[0]

    off_by = float((whole() - shared()).abs().max())
    if options.dtype == "float32" and off_by > 1e-3:
        raise AssertionError(f"the two ways differ by {off_by}")
    contenders = {
        "whole": whole,
        "shared": shared,
        "eight": lambda: answer_scores(lm, heads, answers)[0],
        "prompt": lambda: answer_scores(lm, heads[:1], [[[2]]])[0],
    }
    clock = time.process_time if options.device == "cpu" else time.perf_counter
    seconds = medians(take_turns(contenders, options.repeats, warm_ups=0, clock=clock))
    tokens = sum(map(len, answers[0]))
    return {
        "title tokens": title,
        "whole / shared": seconds["whole"] / seconds["shared"],
        "whole / shared, 8 at a time": 8 * seconds["whole"] / seconds["eight"],
        "shared / prompt alone": seconds["shared"] / seconds["prompt"],
        "token ratio": (options.candidates * options.tokens + tokens) / (options.tokens + tokens),
        "off by": off_by,
        **{f"{name}_s": value for name, value in seconds.items()},
    }


if __name__ == "__main__":
    main()
