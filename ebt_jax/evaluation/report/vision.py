"""The sections of a report on images and video: samples, and what was measured."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ebt_jax.evaluation.report.markup import (
    DASH,
    Section,
    chart_figure,
    number,
    run_name,
    table,
)
from ebt_jax.evaluation.report.runs import Run, Seen

Chart = dict[str, Any]

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
ABOUT = {
    "probe": "Labels told from the model's features: accuracy of a linear probe and of "
    "nearest neighbours.",
    "fid": "Frechet distance to the true pictures, by DINOv2.",
    "retrieval": "How often the right caption has the lowest energy.",
}
OTHERS = {"top_1": "top 1", "top_5": "top 5", "neighbours": "k-NN"}


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


def passes_chart(runs: Sequence[Run]) -> Chart:
    """PSNR of denoised pictures against forward passes, by run, data and noise."""
    curves: dict[str, Chart] = {}
    for run in runs:
        for data, seen in run.seen.items():
            for row in seen.denoising:
                label = f"{data}, noise {row['noise_level']:g}"
                if row["passes"]:
                    label = f"{run.name}: {label}"
                    curve = {"kind": "thick", "x": {"passes": []}, "y": []}
                    curve = curves.setdefault(label, {"label": label, **curve})
                    curve["x"]["passes"].append(row["passes"])
                    curve["y"].append(row["psnr"])
                elif row["what"] != "noised":
                    label = f"{row['what']}: {label}"
                    level = {"kind": "level", "y": row["psnr"]}
                    curves.setdefault(label, {"label": label, **level})
    return _chart("passes", "forward passes", "PSNR, dB", list(curves.values()))


def horizons_chart(runs: Sequence[Run]) -> Chart:
    """Errors of continued clips by frames ahead, and of copying the last frame."""
    curves: dict[str, Chart] = {}
    for run in runs:
        for data, seen in run.seen.items():
            for of, label in (
                ("model", f"{run.name}: {data}"),
                ("copying", f"copying: {data}, of {len(seen.horizons)} frames"),
            ):
                x = {"ahead": [row["ahead"] for row in seen.horizons]}
                y = [row[of]["smooth_l1"] for row in seen.horizons]
                if y:
                    curve = {"label": label, "kind": "thick", "x": x, "y": y}
                    curves.setdefault(label, curve)
    return _chart("ahead", "frames ahead", "smooth L1", list(curves.values()))


def measured(runs: Sequence[Run], drawn: dict[str, Any]) -> list[Section]:
    """What `ebt evaluate` has kept: charts, and tables of the same and more.

    Args:
      runs: in the order of the page.
      drawn: charts that there are.
    """
    parts = [
        f"<h3>{run_name(i, run)}: {html.escape(data)}</h3>{_tables(seen)}"
        for i, run in enumerate(runs)
        for data, seen in run.seen.items()
    ]
    if not parts:
        return []
    abouts = {
        "passes": "Quality of denoised pictures against what it costs. A line across: "
        "a Gaussian filter, its width in pixels.",
        "horizons": "Frames that are predicted one after the other.",
    }
    figures = [chart_figure(n, about) for n, about in abouts.items() if n in drawn]
    charts = f'<div class="charts">{"".join(figures)}</div>' if figures else ""
    return [("vision", "Images and video", "\n".join([charts, *parts]))]


def _tables(seen: Seen) -> str:
    """The tables of what was scored."""
    made = []
    if seen.denoising:
        names = ("psnr", "mse", "ssim", "l1")
        rows = [
            [
                number(row["noise_level"]),
                html.escape(row["what"]),
                number(row["passes"]),
                *(number(row[name]) for name in names),
            ]
            for row in seen.denoising
        ]
        head = ["noise", "what", "passes", *(MEASURES[name] for name in names)]
        about = "Denoised pictures; MSE of values up to 255, L1 of those in [-1, 1]."
        made.append(table(head, rows, about))
    if seen.horizons:
        names = [name for name in MEASURES if name in seen.horizons[0]["model"]]
        rows = [
            [number(row["ahead"])]
            + [number(row[of][name]) for of in ("model", "copying") for name in names]
            for row in seen.horizons
        ]
        shown = [MEASURES[name] for name in names]
        head = ["frames ahead", *shown, *(f"{name}, copying" for name in shown)]
        about = "Frames predicted one after the other, and the last given one copied."
        made.append(table(head, rows, about))
    for part, rows in seen.others.items():
        names = dict.fromkeys(name for row in rows.values() for name in row)
        cells = [
            [of, *(number(row[name]) if name in row else DASH for name in names)]
            for of, row in rows.items()
        ]
        head = ["", *(OTHERS[name] if name in OTHERS else name for name in names)]
        made.append(table(head, cells, ABOUT[part]))
    return "\n".join(made)


def _chart(name: str, x: str, y: str, curves: list[Chart]) -> Chart:
    """Noise levels and data, not runs alone, are told apart by colour."""
    series = [{**curve, "run": i} for i, curve in enumerate(curves)]
    axes = [{"name": name, "label": x, "integer": True}]
    return {"axes": axes, "y": y, "log": True, "cut": False, "series": series}


def _as_url(file: Path) -> str:
    """A picture as the page holds it."""
    kind = file.suffix.removeprefix(".")
    return f"data:image/{kind};base64,{base64.b64encode(file.read_bytes()).decode()}"
