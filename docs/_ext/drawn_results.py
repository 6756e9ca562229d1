"""Bars and a table of what is quoted of the benchmarks, drawn before each build.

``results.json`` is written by ``python -m benchmarks quote``. No number of it stands
anywhere else.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

if TYPE_CHECKING:
    from sphinx.application import Sphinx

Row = dict[str, Any]
REACHED, MISSED, FREE, AIM = "#2a7f62", "#c8792b", "#6d7f92", "#b3123b"
SHOWN = ("products", "spectra", "directions", "inverses", "quantities")


def reached(row: Row) -> bool | None:
    """Whether a row is what was aimed at; None without an aim."""
    if row["aim"] is None:
        return None
    gap = row["aim"] - row["value"]
    return gap >= 0 if row["at_most"] else gap <= 0


def bars(rows: Sequence[Row], title: str, path: Path) -> None:
    """Draw a bar for each ratio, from 1, and a line at what was aimed at."""
    colours = {True: REACHED, False: MISSED, None: FREE}
    figure = plt.figure(figsize=(7.2, 0.9 + 0.34 * len(rows)), layout="constrained")
    ax = figure.add_subplot()
    places = range(len(rows))[::-1]
    for place, row in zip(places, rows, strict=True):
        value = row["value"]
        ax.barh(place, value - 1, 0.62, left=1, color=colours[reached(row)])
        away = (4, "left") if value >= 1 else (-4, "right")
        aim = row["aim"] or value
        # Not on the line of an aim that is little further.
        end = aim if value >= 1 and value <= aim <= 1.3 * value else value
        ax.annotate(
            f"{value:.3g}",
            (end, place),
            (away[0], 0),
            textcoords="offset points",
            ha=away[1],
            va="center",
            fontsize=8,
        )
        if row["aim"] is not None:
            ax.plot([row["aim"]] * 2, [place - 0.42, place + 0.42], color=AIM, lw=2)
    values = [row["value"] for row in rows] + [row["aim"] or 1 for row in rows]
    ax.set(xscale="log", xlim=(min(0.5, *values) / 1.8, max(2, *values) * 2.2))
    ax.set_yticks(list(places), [row["label"] for row in rows], fontsize=8)
    ax.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    ax.xaxis.set_minor_formatter(lambda x, _: "")
    ax.tick_params(axis="x", labelsize=8)
    ax.axvline(1, color="0.3", lw=0.8)
    ax.set_title(f"{title} (red line: the aim)", fontsize=9)
    ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
    plt.close(figure)


def table(rows: Sequence[Row]) -> str:
    """The same numbers in Markdown, a table for each suite with its nets."""
    suites = dict[str, list[Row]]()
    for row in rows:
        suites.setdefault(row["suite"], []).append(row)
    return "\n".join(map(_table, suites.values()))


def _table(rows: Sequence[Row]) -> str:
    nets = list(dict.fromkeys(row["net"] for row in rows))
    lines = dict[str, dict[str, Row]]()
    for row in rows:
        lines.setdefault(row["label"], {})[row["net"]] = row
    heads = [f"`{rows[0]['suite']}`", *(f"on `{net}`" for net in nets)]
    text = [_line(heads), _line(["---"] * len(heads))]
    for label, found in lines.items():
        text.append(_line([label, *(_cell(found.get(net)) for net in nets)]))
    return "\n".join(text) + "\n"


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    sign = "≤" if row["at_most"] else "≥"
    aim = f" (aim {sign} {row['aim']:g})" if row["aim"] else ""
    return f"{row['value']:.3g}{aim}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def draw(app: Sphinx) -> None:
    source = Path(app.srcdir)
    folder = source / "_generated"
    folder.mkdir(exist_ok=True)
    rows = json.loads((source / "results.json").read_text(encoding="utf-8"))["rows"]
    shown = [row for row in rows if row["suite"] in SHOWN]
    for net in ("mlp", "3c3d"):
        of_net = [row for row in shown if row["net"] == net]
        larger = [row for row in of_net if not row["at_most"]]
        smaller = [row for row in of_net if row["at_most"]]
        bars(larger, f"{net}: peer ÷ ours, larger is better", folder / f"{net}.svg")
        bars(smaller, f"{net}: smaller is better", folder / f"{net}-at-most.svg")
    (folder / "results.md").write_text(table(rows), encoding="utf-8")


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("builder-inited", draw)
    return {"parallel_read_safe": True}
