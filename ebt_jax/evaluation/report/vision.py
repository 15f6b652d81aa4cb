"""The sections of a report on images and video: samples, and what was measured."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ebt_jax.evaluation.report.markup import DASH, Section, number, run_name, table
from ebt_jax.evaluation.report.runs import Run

# Files of a workdir, and what they show.
PICTURES = {
    "samples.gif": "Held-out clips: the true ones above, below them the model's",
    "samples.png": "Held-out examples, stage by stage",
    "energy_map.png": "Energies of the patches: dark is low, bright is high",
}
MEASURES = {
    "psnr": "PSNR, dB",
    "mse": "MSE",
    "ssim": "SSIM",
    "l1": "L1",
    "smooth_l1": "smooth L1",
}


def samples(runs: Sequence[Run]) -> list[Section]:
    """The pictures that lie in the workdirs."""
    figures = []
    for i, run in enumerate(runs):
        for name, about in PICTURES.items():
            file = run.path / name
            if file.is_file():
                figures.append(
                    f"<figure><h3>{run_name(i, run)}</h3>"
                    f'<img src="{_as_url(file)}" alt="{about}, run '
                    f'{html.escape(run.name)}" style="max-width:100%;height:auto">'
                    f"<figcaption>{about}.</figcaption></figure>"
                )
    content = f'<div class="charts">{"".join(figures)}</div>'
    return [("samples", "Samples", content)] if figures else []


def measured(runs: Sequence[Run]) -> list[Section]:
    """What `ebt evaluate` has kept: tables against passes and horizons, and numbers."""
    parts = []
    for i, run in enumerate(runs):
        for file in sorted((run.path / "vision").glob("*.json")):
            name = f"<h3>{run_name(i, run)}: {html.escape(file.stem)}</h3>"
            try:
                parts.append(name + _tables(json.loads(file.read_text())))
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                parts.append(
                    f'{name}<p class="note">vision/{html.escape(file.name)} cannot be '
                    f"read ({html.escape(str(error))}).</p>"
                )
    content = "\n".join(parts)
    return [("vision", "Images and video", content)] if content else []


def _tables(found: dict[str, Any]) -> str:
    """The tables of a file."""
    made = []
    if "denoising" in found:
        names = ("psnr", "mse", "ssim", "l1")
        rows = [
            [
                number(row["noise_level"]),
                html.escape(row["what"]),
                number(row["passes"]),
                *(number(row[name]) for name in names),
            ]
            for row in found["denoising"]
        ]
        head = ["noise", "what", "passes", *(MEASURES[name] for name in names)]
        about = "Denoised pictures; MSE of values up to 255, L1 of those in [-1, 1]."
        made.append(table(head, rows, about))
    if "horizons" in found:
        names = list(found["horizons"][0]["model"])
        rows = [
            [number(row["ahead"])]
            + [number(row[of][name]) for of in ("model", "copying") for name in names]
            for row in found["horizons"]
        ]
        shown = [MEASURES[name] for name in names]
        head = ["frames ahead", *shown, *(f"{name}, copying" for name in shown)]
        about = "Frames predicted one after the other, and the last given one copied."
        made.append(table(head, rows, about))
    if "probe" in found:
        names = ("top_1", "top_5", "neighbours")
        rows = [
            [of, *(number(own[name]) if name in own else DASH for name in names)]
            for of, own in found["probe"].items()
        ]
        about = "Accuracy of a linear probe and of nearest neighbours."
        made.append(table(["features", "top 1", "top 5", "k-NN"], rows, about))
    for name, about in (
        ("fid", "Frechet distance by DINOv2 features."),
        ("retrieval", "The caption with the lowest energy is the right one."),
    ):
        if name in found:
            rows = [[key, number(value)] for key, value in found[name].items()]
            made.append(table(["", "value"], rows, about))
    return "\n".join(made)


def _as_url(file: Path) -> str:
    """A picture as the page holds it."""
    kind = file.suffix.removeprefix(".")
    return f"data:image/{kind};base64,{base64.b64encode(file.read_bytes()).decode()}"
