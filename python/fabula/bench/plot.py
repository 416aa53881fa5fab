"""Plots of benchmark rows from JSON: bars of our and other engines with limits, and a roofline.

Needs matplotlib, imported only to draw. Colors are those of Okabe and Ito, which color-blind people can distinguish;
each engine also has its own hatch.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fabula.errors import InvalidArgument, Unsupported

INSTALL = "pip install matplotlib"
OURS = "Fabula"
MAX_ROWS = 200
_COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9")  # ours first
_HATCHES = ("", "///", "...", "\\\\\\", "xx")
_LIMIT = "black"
_MARKERS = "osD^vPX*<>hpd"
_LOG_FROM = 30.0  # ratio of largest to smallest bar of a panel from which its scale is logarithmic
_ROW_IN, _BAR = 0.24, 0.8  # inches per bar; share of a group's height filled by bars
_LABEL = 60  # characters of a label
_LINE = 130  # characters per line below a plot
_WIDTH_IN, _ROOF_IN, _DPI = 11.0, 5.6, 130

Json = Mapping[str, Any]


@dataclass(slots=True)
class Bars:
    """One case in a panel of bars.

    Attributes:
        values: by engine, ours first; None if not measured.
        limit: in the panel's unit; None for none.
    """

    label: str
    values: dict[str, float | None]
    limit: float | None = None


@dataclass(slots=True)
class Panel:
    """Bars of one unit."""

    unit: str
    cases: list[Bars] = field(default_factory=list)

    @property
    def is_log(self) -> bool:
        shown = [v for case in self.cases for v in (*case.values.values(), case.limit) if v]
        return bool(shown) and max(shown) / min(shown) > _LOG_FROM


@dataclass(frozen=True, slots=True)
class Point:
    """A case in the roofline: operations a byte, and 10^9 operations a second."""

    label: str
    intensity: float
    speed: float


def check(path: Path) -> None:
    """Raises before the measurement if no plot could be written there.

    Raises:
        Unsupported: matplotlib is missing.
        InvalidArgument: the name does not end in .png, or its folder is not there.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise Unsupported(f"pictures need matplotlib, which is not installed; {INSTALL}")
    if path.suffix.lower() != ".png":
        raise InvalidArgument(f"{path}: pictures are PNG files, their names end in .png")
    if not path.resolve().parent.is_dir():
        raise InvalidArgument(f"{path}: there is no folder {path.resolve().parent}")


def draw(rows: Sequence[Json], path: Path) -> None:
    """Writes a PNG of rows with the keys of `fabula.bench.row`.

    Raises:
        Unsupported: matplotlib is missing.
        InvalidArgument: there is nothing to draw, too much, or the file cannot be written.
    """
    check(path)
    if len(rows) > MAX_ROWS:
        raise InvalidArgument(f"{len(rows)} rows do not fit into a picture, at most {MAX_ROWS} do")
    shown, points, machine = panels(rows), roofline(rows), _machine(rows)
    if not shown:
        raise InvalidArgument("there is nothing to draw: no row has a value above zero")
    roofs = bool(points) and all(machine.get(name) for name in ("read_bytes_per_s", "flops_per_s", "dots_per_s"))
    heights = [_height(panel) for panel in shown] + ([_ROOF_IN] if roofs else [])

    from matplotlib.figure import Figure  # not pyplot, which needs a display

    figure = Figure(figsize=(_WIDTH_IN, sum(heights) + 0.8), dpi=_DPI, layout="constrained")
    figure.suptitle("\n".join(_plain(line, _LINE) for line in title(rows).splitlines()), fontsize=11)
    axes = figure.subplots(len(heights), 1, gridspec_kw={"height_ratios": heights}, squeeze=False)[:, 0]
    engines = list(dict.fromkeys(name for panel in shown for case in panel.cases for name in case.values))
    for panel, ax in zip(shown, axes, strict=False):
        _draw_bars(ax, panel, engines)
    if roofs:
        _draw_roofs(axes[-1], points, machine)
    try:
        figure.savefig(path, format="png")
    except OSError as error:
        raise InvalidArgument(f"{path}: cannot be written: {error.strerror or error}") from None


# ---- Data ----------------------------------------------------------------------------------------------------------


def panels(rows: Sequence[Json]) -> list[Panel]:
    """Panels of bars by unit, in the order of the rows; rows of one case with several peers form a group."""
    found: dict[str, Panel] = {}
    groups: dict[tuple[str, str], Bars] = {}
    for row, label in zip(rows, labels(rows), strict=True):
        if not row["ours"] and not row["peer"]:
            continue
        panel = found.setdefault(row["unit"], Panel(row["unit"]))
        key = (row["unit"], label)
        if key not in groups:
            groups[key] = Bars(label, {OURS: row["ours"]}, row["limit"])
            panel.cases.append(groups[key])
        if row["peer_name"] is not None:
            groups[key].values[row["peer_name"]] = row["peer"]
    return list(found.values())


def roofline(rows: Sequence[Json]) -> list[Point]:
    """A point for each case with known operations."""
    points: dict[str, Point] = {}
    for row, label in zip(rows, labels(rows), strict=True):
        intensity, speed = row.get("operations_per_byte"), row.get("gop_per_s")
        if intensity and speed:
            points.setdefault(label, Point(label, intensity, speed))
    return list(points.values())


def labels(rows: Sequence[Json]) -> list[str]:
    """A label for each row: its case, and what differs between rows."""
    differing = [key for key in ("model", "weights", "kv", "threads") if len({row[key] for row in rows}) > 1]
    return [", ".join([row["case"], *(str(row[key]) for key in differing if row[key] is not None)]) for row in rows]


def title(rows: Sequence[Json]) -> str:
    """The title: models, precision if it is the same for all, and machine."""
    machine = _machine(rows)
    what = ["fabula bench"]
    for key, form in (("model", "{}"), ("weights", "weights {}"), ("kv", "kv {}"), ("threads", "{} threads")):
        values = list(dict.fromkeys(row[key] for row in rows if row[key] is not None))
        if key == "model" and len(values) > 2:
            what.append(f"{len(values)} models")
        elif len(values) == 1 or (key == "model" and values):
            what.append(form.format(" and ".join(map(str, values))))
    where = [str(machine[key]) for key in ("cpu", "isa") if machine.get(key)]
    return f"{', '.join(what)}\n{', '.join(where)}" if where else ", ".join(what)


def _machine(rows: Iterable[Json]) -> Json:
    return next((row["machine"] for row in rows if row.get("machine")), {})


# ---- Drawi----------------------------------------------------------------------------------------------------------


def _height(panel: Panel) -> float:
    return 1.1 + _ROW_IN * sum(max(1, len(case.values)) + 0.6 for case in panel.cases)


def _draw_bars(ax: Any, panel: Panel, engines: Sequence[str]) -> None:
    """Draws horizontal bars, which leave room for labels."""
    y, ticks, drawn = 0.0, [], set()
    shown = [v for case in panel.cases for v in (*case.values.values(), case.limit) if v]
    if panel.is_log:
        ax.set_xscale("log")
        ax.set_xlim(min(shown) / 2, max(shown) * 4)
    else:
        ax.set_xlim(0, max(shown) * 1.18)
    for case in panel.cases:
        top = y
        for name, value in case.values.items():
            i = engines.index(name) % len(_COLORS)
            if value:
                ax.barh(
                    y, value, height=_BAR, color=_COLORS[i], hatch=_HATCHES[i], edgecolor="white", linewidth=0.5,
                    label=None if name in drawn else _plain(name),
                )  # fmt: skip
                drawn.add(name)
            # To the right of the limit's mark if that would cross the number.
            at = value or ax.get_xlim()[0]
            ax.annotate(
                f" {number(value)}", (at, y), va="center", fontsize=8, zorder=4,
                bbox={"boxstyle": "square,pad=0.05", "facecolor": "white", "edgecolor": "none", "alpha": 0.9},
                xytext=(3, 0), textcoords="offset points",
            )  # fmt: skip
            y += 1.0
        if case.limit:
            label = None if "limit" in drawn else "limit"
            ax.vlines(case.limit, top - 0.5, y - 0.5, color=_LIMIT, linewidth=2.5, label=label, zorder=3)
            drawn.add("limit")
        ticks.append((top + y - 1.0) / 2)
        y += 0.6
    ax.set_ylim(y - 0.6 - 0.5 + 0.3, -0.8)
    ax.set_yticks(ticks, [_plain(case.label) for case in panel.cases], fontsize=9)
    ax.set_xlabel(_plain(panel.unit) + (", logarithmic" if panel.is_log else ""))
    ax.grid(axis="x", color="0.88", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=_columns(drawn), fontsize=9, frameon=False)


def _draw_roofs(ax: Any, points: Sequence[Point], machine: Json) -> None:
    reads, flops, dots = (machine[key] / 1e9 for key in ("read_bytes_per_s", "flops_per_s", "dots_per_s"))
    pairs = (machine.get("pairs_per_s") or 0.0) / 1e9
    low = min(0.05, *(p.intensity for p in points)) / 1.5
    high = max(4 * dots / reads, *(p.intensity for p in points)) * 2
    ax.loglog()
    ax.set_xlim(low, high)
    ax.set_ylim(min(low * reads, *(p.speed for p in points)) / 2, max(dots, flops, *(p.speed for p in points)) * 2.5)
    ridge = max(flops, dots) / reads
    ax.plot([low, ridge], [low * reads, ridge * reads], color="black", linewidth=1.6)
    above = 1.25 * reads  # raised, so that the label does not cross the memory line
    ax.text(
        low * 1.3, low * 1.3 * above, f"memory: {number(reads)} GB/s", fontsize=9,
        rotation=math.degrees(math.atan(above)), rotation_mode="anchor", transform_rotates_text=True,
    )  # fmt: skip
    peaks = [(flops, "f32 multiply-adds", "--"), (dots, "products of bytes", "-.")]
    if pairs > 1.3 * flops:  # else the instruction set has no bf16 kernel
        peaks.append((pairs, "products of bf16", ":"))
    for peak, name, style in peaks:
        ax.plot([peak / reads, high], [peak, peak], color="black", linewidth=1.6, linestyle=style)
        # Labels at the left end of each peak: points are to the right or below.
        ax.annotate(
            f"{name}: {number(peak)} GOP/s", (peak / reads, peak), xytext=(22, 4), fontsize=9,
            textcoords="offset points", ha="left", va="bottom",
        )  # fmt: skip
    for i, point in enumerate(points):
        ax.plot(
            point.intensity, point.speed, linestyle="", marker=_MARKERS[i % len(_MARKERS)], markersize=8,
            color=_COLORS[i % len(_COLORS)], markeredgecolor="black", markeredgewidth=0.6, label=_plain(point.label),
        )  # fmt: skip
    ax.set_xlabel("operations per byte, logarithmic")
    ax.set_ylabel("GOP/s, logarithmic")
    ax.set_title("roofline of this machine, and what Fabula reaches", fontsize=10)
    ax.grid(which="major", color="0.88", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(
        loc="upper center",
        bbox_to_anchor=(0.5, -0.12),
        ncols=_columns(p.label for p in points),
        fontsize=8,
        frameon=False,
    )


def _columns(names: Iterable[str]) -> int:
    """How many legend entries fit in a row."""
    return max(1, _LINE // (min(_LABEL, max(map(len, names))) + 8))


def _plain(text: str, most: int = _LABEL) -> str:
    """Text without matplotlib's math markup, truncated."""
    short = text if len(text) <= most else text[: most - 1] + "…"
    return "".join(c if c.isprintable() else "?" for c in short).replace("$", r"\$")


def number(value: float | None) -> str:
    """A number with three significant digits."""
    if not value:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
