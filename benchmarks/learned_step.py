"""One learned merging step against a re-creation of the reference loop, as N grows.

What is measured: one whole optimisation step (merge, forward, loss, gradient of the coefficients, Adam) of
the MergeRec objective on 16 one-item pseudo-users, for N task vectors, domain-wise and layer-wise.

| contender | what |
|---|---|
| ours | `server.learning`: `MergedModel` and the batched loss |
| reference | baseline: all parameters rebuilt from N dense vectors through autograd (`reference_loop`) |
| mended | baseline: the same loop with its slices of the flat vector mended |
| bare | baseline: our forward and backward pass of the base model, nothing merged, no coefficients |
| read | the N vectors read once; `bare + read` is the floor that a step cannot go below |

The two loops run the model over a padded batch, with the attention that is the faster one there; ours and
bare leave padding out (`common.models.packed`). Contenders that share memory take turns; medians count, of
seconds by the clock and of the processor's (all threads): on a machine that others use too, the second says
more. The slope is the least-squares line of the medians against N. Before anything is timed, the first three
are checked on a tiny model in float32: the same loss and the same gradients, or the script ends with an
error. A baseline that does not fit into memory, or into `--memory-gib`, is left out.

    python -m benchmarks.learned_step --size small                   # seconds: shows that it works
    python -m benchmarks.learned_step --size full --out runs/learned_step.json
    python -m benchmarks.learned_step --size full --models minilm --vectors bf16
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import psutil
import torch
from torch import Tensor

from benchmarks.learned_task import (
    Model,
    ModelName,
    make_batch,
    make_model,
    make_vectors,
)
from benchmarks.measure import (
    line,
    machine,
    medians,
    nothing,
    progress,
    ratio,
    show,
    take_turns,
    take_turns_by,
    write_record,
)
from benchmarks.our_step import INITIAL, BareStep, OurStep, read_once
from benchmarks.reference_loop import ReferenceLoop
from common.coefficients import Granularity, group_tensors
from common.models.encoder import use_bf16

TOLERANCE = 1e-4
GRANULARITIES: tuple[Granularity, ...] = ("domain", "layer")
SIZES: dict[str, dict[str, Any]] = {
    "small": {"models": ["tiny"], "n": [2, 4], "repeats": 3, "baseline_repeats": 2, "items": 50},
    "full": {
        "models": ["minilm", "roberta"],
        "n": [2, 4, 8, 16, 32],
        "repeats": 15,
        "baseline_repeats": 3,
        "items": 4000,
    },
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CONTENDERS = ("ours", "reference", "mended", "bare", "read")


def reference(
    model: Model, taus: Sequence[dict[str, Tensor]], granularity: Granularity, mended: bool
) -> ReferenceLoop:
    """The baseline loop over the same vectors and groups."""
    groups = group_tensors(model.trainable, granularity)
    return ReferenceLoop(model.padded, model.base, taus, groups, initial=INITIAL, mended=mended)


def check(folder: Path) -> list[dict[str, Any]]:
    """Compare ours with both baselines on a tiny model in float32. Raises AssertionError if they differ."""
    model = make_model("tiny", folder, "cpu", "fp32")
    taus = [
        {name: 100 * tensor for name, tensor in tau.items()}  # far from the base, so that a mistake shows
        for tau in make_vectors(model, 3, torch.float32).taus
    ]
    batch = make_batch(model, domains=3, items=20, users=5)
    rows = []
    for granularity in GRANULARITIES:
        loss, gradient_GD = OurStep(model, taus, granularity).gradient(batch)
        for mended in (False, True):
            loop = reference(model, taus, granularity, mended)
            their_loss = loop.loss(batch)
            (theirs_GD,) = torch.autograd.grad(their_loss, [loop.coefficients_GD])
            off_by = abs(loss - float(their_loss.detach())) / abs(loss)
            scale = float(theirs_GD.abs().max())
            row = {
                "granularity": granularity,
                "baseline": "mended" if mended else "reference",
                "loss": loss,
                "loss_off_by": off_by,
                "gradient_off_by": float((gradient_GD - theirs_GD).abs().max()) / scale,
            }
            assert scale > 0, row
            assert float(row["loss_off_by"]) < TOLERANCE, row
            assert float(row["gradient_off_by"]) < TOLERANCE, row
            rows.append(row)
    return rows


@dataclass(frozen=True)
class Row:
    """Median seconds of each contender at one N; None where it did not fit into memory.

    `seconds`, `fastest` and `slowest` are the clock's, `processor` medians of the processor's.
    """

    model: str
    granularity: str
    n: int
    seconds: dict[str, float | None]
    processor: dict[str, float | None]
    fastest: dict[str, float]
    slowest: dict[str, float]

    def ratios(self, *, of_processor: bool = False) -> dict[str, float | None]:
        """The ratios that are reported."""
        s = self.processor if of_processor else self.seconds
        floor = (s["bare"] or 0.0) + (s["read"] or 0.0)
        return {
            "reference / ours": ratio(s["reference"], s["ours"]),
            "mended / ours": ratio(s["mended"], s["ours"]),
            "ours / (bare + read)": ratio(s["ours"], floor),
        }


def measure(model: Model, name: str, n: int, granularity: Granularity, options: argparse.Namespace) -> Row:
    """Time all contenders at N = `n`."""
    vectors = make_vectors(model, n, DTYPES[options.vectors])
    flats = [flat_P.to(options.device) for flat_P in vectors.flats]
    batch = make_batch(model, n, options.items, options.users)
    wait = torch.cuda.synchronize if options.device == "cuda" else nothing
    clocks = (time.perf_counter, time.process_time)
    seconds: dict[str, list[float]] = {}
    processor: dict[str, list[float]] = {}

    def time_turns(calls: dict[str, Callable[[], object]], repeats: int, warm_ups: int) -> None:
        for total, found in zip(
            (seconds, processor),
            take_turns_by(clocks, calls, repeats, warm_ups=warm_ups, wait=wait),
            strict=True,
        ):
            total.update(found)

    ours, bare = OurStep(model, vectors.taus, granularity, options.vectors), BareStep(model)
    calls: dict[str, Callable[[], object]] = {
        "ours": partial(ours.step, batch),
        "bare": partial(bare.step, batch),
        "read": partial(read_once, flats),
    }
    time_turns(calls, options.repeats, 2)
    del ours, bare, calls, flats
    gc.collect()
    for mended in (False, True) if options.baseline_n is None or n in options.baseline_n else ():
        short = _short_of_bytes(model, n, granularity, options)
        label = "mended" if mended else "reference"
        if short:
            progress(f"{label} left out: {short / 2**30:.1f} GiB of memory are missing")
            continue
        loop = reference(model, vectors.taus, granularity, mended)
        time_turns({label: partial(loop.step, batch)}, options.baseline_repeats, 1)
        del loop
        gc.collect()
    middle: dict[str, float | None] = dict.fromkeys(CONTENDERS)
    middle_processor = dict(middle)
    middle.update(medians(seconds))
    middle_processor.update(medians(processor))
    lows = {contender: min(values) for contender, values in seconds.items()}
    highs = {contender: max(values) for contender, values in seconds.items()}
    return Row(name, granularity, n, middle, middle_processor, lows, highs)


def _short_of_bytes(model: Model, n: int, granularity: Granularity, options: argparse.Namespace) -> int:
    """Bytes that a baseline would lack: N vectors, domain-wise as many products, and a few flat vectors."""
    copies = n * (2 if granularity == "domain" else 1) + 6
    cuda = options.device == "cuda"
    free = torch.cuda.mem_get_info()[0] if cuda else psutil.virtual_memory().available
    if options.memory_gib is not None:
        used = torch.cuda.memory_allocated() if cuda else psutil.Process().memory_info().rss
        free = min(free, int(options.memory_gib * 2**30) - used)
    return max(0, copies * model.values * 4 - int(0.95 * free))


def rates(device: str, bf16: bool, mib: int, side: int) -> dict[str, float]:
    """What the device does at best: a copy (bytes read and written), and a product as the encoder's are."""
    source = torch.zeros(mib << 18, device=device)
    target = torch.empty_like(source)
    square = torch.randn(side, side, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
    wait = torch.cuda.synchronize if device == "cuda" else nothing
    calls = {"copy": partial(target.copy_, source), "product": partial(torch.mm, square, square)}
    found = medians(take_turns(calls, 5, wait=wait))
    return {
        "copy_gb_per_s": 2 * source.nbytes / found["copy"] / 1e9,
        f"{'bf16' if bf16 else 'fp32'}_product_tflop_per_s": 2 * side**3 / found["product"] / 1e12,
    }


def slopes(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Milliseconds a vector, and at no vector, of each contender: the line through its medians."""
    found: list[dict[str, Any]] = []
    for model, granularity in dict.fromkeys((row.model, row.granularity) for row in rows):
        mine = [row for row in rows if (row.model, row.granularity) == (model, granularity)]
        for contender in ("ours", "reference", "mended"):
            slope: dict[str, Any] = {"model": model, "granularity": granularity, "contender": contender}
            for clock in ("seconds", "processor"):
                points = [
                    (row.n, 1e3 * s) for row in mine if (s := getattr(row, clock)[contender]) is not None
                ]
                if len(points) < 2:
                    continue
                slope[f"ms_per_vector, {clock}"], slope[f"ms_at_0, {clock}"] = line(
                    *zip(*points, strict=True)
                )
            if len(slope) > 3:
                found.append(slope)
    return found


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Everything; returns the record."""
    with tempfile.TemporaryDirectory() as folder:
        torch.set_num_threads(options.threads)
        checks = check(Path(folder) / "check")
        show(
            "The same loss and gradients (float32, tiny model)",
            list(checks[0]),
            [list(c.values()) for c in checks],
        )
        bf16 = use_bf16(options.precision, options.device)
        limits = rates(options.device, bf16, *((16, 256) if options.size == "small" else (512, 2048)))
        rows: list[Row] = []
        for name in options.models:
            model = make_model(name, Path(folder) / name, options.device, options.precision)
            progress(f"{name}: {model.values:,} parameters, {model.trainable_values:,} in a vector")
            for n in options.n:
                for granularity in GRANULARITIES:
                    started_s = time.monotonic()
                    rows.append(measure(model, name, n, granularity, options))
                    progress(f"{name}, N = {n}, {granularity}-wise: {time.monotonic() - started_s:.0f} s")
                    progress(f"processor, s: {rows[-1].processor}")  # for a run that is cut off
            del model
            gc.collect()
    units = [f"{contender}, ms" for contender in CONTENDERS]
    for title, of_processor in (("One step, median", False), ("One step, median of the processor's", True)):
        steps = []
        for r in rows:
            taken = r.processor if of_processor else r.seconds
            times = [s and 1e3 * s for s in taken.values()]
            steps.append([r.model, r.granularity, r.n, *times, *r.ratios(of_processor=of_processor).values()])
        show(title, ["model", "wise", "N", *units, *rows[0].ratios()], steps)
    found = slopes(rows)
    if found:
        show("Cost against N", list(found[0]), [list(slope.values()) for slope in found])
    show("The machine", list(limits), [list(limits.values())])
    return {
        "benchmark": "learned_step",
        "machine": machine(torch=torch.__version__, threads=options.threads, **limits),
        "options": {key: str(v) if isinstance(v, Path) else v for key, v in vars(options).items()},
        "checks": checks,
        "steps": [
            {**asdict(row), "ratios": row.ratios(), "processor_ratios": row.ratios(of_processor=True)}
            for row in rows
        ],
        "slopes": found,
    }


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; what is not given comes from the size."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument(
        "--models", type=lambda text: text.split(","), help=f"of {', '.join(get_args(ModelName))}"
    )
    parser.add_argument("--n", type=lambda text: [int(n) for n in text.split(",")], help="as 2,4,8")
    parser.add_argument(
        "--baseline-n",
        type=lambda text: [int(n) for n in text.split(",")],
        help="N at which baselines run too",
    )
    parser.add_argument("--users", type=int, default=16, help="pseudo-users in the batch")
    parser.add_argument("--items", type=int, help="items of each domain")
    parser.add_argument("--repeats", type=int, help="of ours, bare and read")
    parser.add_argument("--baseline-repeats", type=int, help="of reference and mended")
    parser.add_argument(
        "--precision", choices=["auto", "fp32", "bf16"], default="auto", help="of the encoder"
    )
    parser.add_argument("--vectors", choices=list(DTYPES), default="fp32", help="how ours keeps them")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--memory-gib", type=float, help="baselines that would exceed it are left out")
    parser.add_argument("--out", type=Path, help="where the record goes, as JSON")
    options = parser.parse_args(arguments)
    for key, value in SIZES[options.size].items():
        if getattr(options, key) is None:
            setattr(options, key, value)
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    options = parse(arguments)
    write_record(options.out, run(options))


if __name__ == "__main__":
    main()
