"""Plot errors along depth as SVG, in colours that are readable on light and dark backgrounds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

GREY = "#808890"
WIDTH, HEIGHT = 1100, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 72, 16, 40, 46
_MOST_LABELS = 10


@dataclass(frozen=True)
class Series:
    """Points `(x, y)` with y > 0. `marker` is dot, square, triangle or line."""

    label: str
    colour: str
    marker: str
    points: Sequence[tuple[float, float]]


def log_plot(series: Sequence[Series], *, count: int, lines: Sequence[tuple[str, float]], x: str, y: str) -> str:
    """Draw an SVG element with a logarithmic vertical axis. `count` is the number of positions on the horizontal axis.

    `lines` are horizontal lines, `(label, height)`. `x` and `y` label the axes.
    """
    import jinja2

    values = [height for each in series for _, height in each.points] + [height for _, height in lines]
    low = math.floor(math.log10(min(values, default=1e-8)))
    high = max(math.ceil(math.log10(max(values, default=1.0))), low + 1)

    def across(place: float) -> float:
        return _LEFT + (WIDTH - _LEFT - _RIGHT) * (place + 0.5) / max(count, 1)

    def up(height: float) -> float:
        share = (math.log10(height) - low) / (high - low)
        return HEIGHT - _BOTTOM - (HEIGHT - _TOP - _BOTTOM) * share

    step = max(1, math.ceil((high - low) / _MOST_LABELS))
    every = max(1, math.ceil(count / _MOST_LABELS))
    template = resources.files("porting.reports").joinpath("plot.svg").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string(template).render(
        width=WIDTH,
        height=HEIGHT,
        left=_LEFT,
        right=WIDTH - _RIGHT,
        top=_TOP,
        bottom=HEIGHT - _BOTTOM,
        grey=GREY,
        x=x,
        y=y,
        powers=[(power, up(10.0**power)) for power in range(low, high + 1, step)],
        places=[(place, across(place)) for place in range(0, count, every)],
        lines=[(label, up(height)) for label, height in lines],
        series=[
            (each, [(round(across(place), 1), round(up(height), 1)) for place, height in each.points])
            for each in series
            if each.points
        ],
    )
