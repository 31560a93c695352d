"""Pages of a cocktail's learning: weights and held-back loss over steps, several runs in one chart."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from common.learning_state import read_trajectory
from common.pages import Html, join, page, tag
from server import reporting
from server.reporting.charts import Points, chart, legend

STYLE = Path(reporting.__file__).with_name("report.css")


def weights_page(trajectories: Mapping[str, Path], title: str = "Cocktail") -> str:
    """An HTML page (nothing is loaded from anywhere) of `trajectory.jsonl` files by name, e.g. warm and cold.

    One line for each adapter of each run: its weight after each step; of a layer-wise cocktail the mean over
    layers. Files that are missing or empty leave their lines out.
    """
    weights: dict[str, Points] = {}
    held_back: dict[str, Points] = {}
    for name, path in trajectories.items():
        for line in read_trajectory(path):
            groups = list(line["coefficients"].values())
            for label in groups[0]:
                mean = sum(group[label] for group in groups) / len(groups)
                weights.setdefault(f"{label}, {name}", []).append((float(line["step"]), mean))
            if "held_back" in line:
                held_back.setdefault(name, []).append((float(line["step"]), line["held_back"]))
    parts: list[Html] = [tag("h1", title)]
    for what, curves in (("Weights by step", weights), ("Held-back loss by step", held_back)):
        if drawn := chart(what, curves, list(curves)):
            parts += [legend(list(curves), set(curves)), drawn]
    if len(parts) == 1:
        parts.append(tag("p", "No steps to draw."))
    return page(title, STYLE.read_text(encoding="utf-8"), tag("main", join(*parts)))
