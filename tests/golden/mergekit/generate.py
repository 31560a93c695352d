"""Golden merges by mergekit 0.1.4 on small tensors, for `tests/unit/merging/test_against_mergekit.py`.

mergekit pins older packages than ours, so it has an environment of its own, and is never imported here:

    python3.11 -m venv peers
    peers/bin/pip install mergekit==0.1.4 torch==2.13.0
    peers/bin/python tests/golden/mergekit/generate.py

It writes `merges.safetensors` beside this file: `vector/<model>/<tensor>` are the inputs (task vectors; the
base is zero, so that no rounding of a base comes in between), `<case>/<tensor>` what mergekit makes of them,
and `<case>/mask/<model>/<tensor>` which entries a random case kept. Its metadata hold the versions and the
settings of each case. Everything follows from seeds: a second run gives the same tensors.

Each merge is mergekit's own task for one tensor (`make_task(...).execute(...)`), as its planner runs it.
"""

import json
from importlib.metadata import version
from pathlib import Path

import torch
from mergekit.architecture import WeightInfo
from mergekit.common import ImmutableMap, ModelReference
from mergekit.io.tasks import GatherTensors
from mergekit.merge_methods.registry import REGISTERED_MERGE_METHODS
from mergekit.sparsify import sparsify
from safetensors.torch import save_file

SHAPES = {"bias": (40,), "matrix": (12, 25), "tiny": (4, 5)}
MODELS = ["a", "b", "c"]
SEED = 20240611

CASES = {
    "linear": {"method": "linear", "normalize": True},
    "task-arithmetic": {"method": "task_arithmetic", "lambda": 0.3},
    "ties": {"method": "ties", "density": 0.2},
    "ties-half": {"method": "ties", "density": 0.5, "lambda": 0.7},
    "dare": {"method": "dare_linear", "density": 0.3, "lambda": 0.3},
    "dare-not-rescaled": {"method": "dare_linear", "density": 0.3, "rescale": False},
    "dare-ties-sum": {"method": "dare_ties", "density": 0.5, "rescale": False},
    "dare-ties-mean": {"method": "dare_ties", "density": 0.5, "rescale": False, "normalize": True},
    "dare-ties": {"method": "dare_ties", "density": 0.5, "normalize": True},
    "della-flat": {"method": "della", "density": 0.3, "epsilon": 0.0, "rescale": False},
    "della": {"method": "della", "density": 0.3, "epsilon": 0.05},
    "breadcrumbs": {"method": "breadcrumbs", "density": 0.7, "gamma": 0.1, "lambda": 0.3},
    "breadcrumbs-top": {"method": "breadcrumbs", "density": 0.12, "gamma": 0.04},
}
RANDOM = ("dare", "della")


def vectors() -> dict[str, dict[str, torch.Tensor]]:
    """Normal values; two models disagree at some places by the same amount, so that a sum of zero occurs."""
    generator = torch.Generator().manual_seed(SEED)
    taus = {m: {n: 0.01 * torch.randn(s, generator=generator) for n, s in SHAPES.items()} for m in MODELS}
    for name in SHAPES:
        taus["b"][name].view(-1)[:2] = -taus["a"][name].view(-1)[:2]
        taus["c"][name].view(-1)[:2] = 0.0
    return taus


def references() -> dict[str, ModelReference]:
    return {model: ModelReference.model_validate(model) for model in ["base", *MODELS]}


def merge(case: dict, tensor: str, taus: dict[str, dict[str, torch.Tensor]]) -> torch.Tensor:
    """One tensor by mergekit's method, each model with weight 1; random methods draw from `SEED`."""
    method, models = REGISTERED_MERGE_METHODS[case["method"]], references()
    given = {key: value for key, value in case.items() if key != "method"}
    defaults = {p.name: p.default_value for p in method.parameters()}
    per_tensor = {p.name: p.default_value for p in method.tensor_parameters()} | {"weight": 1.0}
    per_tensor = {key: given.get(key, value) for key, value in per_tensor.items()}
    task = method.make_task(
        output_weight=WeightInfo(name=tensor),
        tensors=GatherTensors(weight_info=ImmutableMap(data={})),
        base_model=models["base"],
        parameters=ImmutableMap(data={key: given.get(key, value) for key, value in defaults.items()}),
        tensor_parameters=ImmutableMap(
            data={models[model]: ImmutableMap(data=dict(per_tensor)) for model in MODELS}
        ),
    )
    tensors = {models[model]: taus[model][tensor].clone() for model in MODELS}
    if case["method"] != "linear":  # the mean of models, which mergekit takes without the base
        tensors = {models["base"]: torch.zeros(SHAPES[tensor]), **tensors}
    torch.manual_seed(SEED)
    return task.execute(tensors=tensors)


def masks(case: dict, tensor: str, taus: dict[str, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """What a random case keeps: the draws of `merge` again, model by model, on ones of the same order."""
    method = REGISTERED_MERGE_METHODS[case["method"]].sparsification_method
    torch.manual_seed(SEED)
    kept = {}
    for model in MODELS:
        nonzero = taus[model][tensor] + (taus[model][tensor] == 0) * 1e-9  # zeros: the smallest, but seen
        out = sparsify(nonzero, case["density"], method, epsilon=case.get("epsilon", 0.0))
        kept[model] = out != 0
    return kept


def main() -> None:
    taus = vectors()
    out = {f"vector/{m}/{n}": tensor for m, tau in taus.items() for n, tensor in tau.items()}
    for name, case in CASES.items():
        for tensor in SHAPES:
            out[f"{name}/{tensor}"] = merge(case, tensor, taus).contiguous()
            if name.startswith(RANDOM):
                for model, mask in masks(case, tensor, taus).items():
                    out[f"{name}/mask/{model}/{tensor}"] = mask
    metadata = {package: version(package) for package in ("mergekit", "torch")} | {"cases": json.dumps(CASES)}
    save_file(out, Path(__file__).with_name("merges.safetensors"), metadata=metadata)


if __name__ == "__main__":
    main()
