"""Plot errors along depth as SVG, in colours that are readable on light and dark backgrounds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

GREY = "#808890"
WIDTH, HEIGHT = 1100, 420
_LEFT, _RIGHT, _BOTTOM = 72, 16, 46
# The room of one entry of the legend, and of one label of the horizontal axis.
_ENTRY, _LABEL = 215, 100
_MOST_LABELS = 10


@dataclass(frozen=True)
class Series:
    """Points `(x, y)` with y > 0. `marker` is dot, square, triangle or line, which may be `dashed`."""

    label: str
    colour: str
    marker: str
    points: Sequence[tuple[float, float]]
    dashed: bool = False


def log_plot(
    series: Sequence[Series],
    *,
    names: Sequence[str],
    lines: Sequence[tuple[str, float]],
    x: str,
    y: str,
    width: int = WIDTH,
) -> str:
    """Draw an SVG element with a logarithmic vertical axis.

    `names` are those of the positions on the horizontal axis, which count from 1. `lines` are horizontal lines,
    `(label, height)`. `x` and `y` label the axes. Points have their position in `data-index`, from 0.
    """
    import jinja2

    count, drawn = len(names), [each for each in series if each.points]
    columns = max(1, (width - _LEFT - _RIGHT) // _ENTRY)
    top = 22 + 18 * math.ceil(len(drawn) / columns)
    values = [height for each in series for _, height in each.points] + [height for _, height in lines]
    low = math.floor(math.log10(min(values, default=1e-8)))
    high = max(math.ceil(math.log10(max(values, default=1.0))), low + 1)

    def across(place: float) -> float:
        return _LEFT + (width - _LEFT - _RIGHT) * (place + 0.5) / max(count, 1)

    def up(height: float) -> float:
        share = (math.log10(height) - low) / (high - low)
        return HEIGHT - _BOTTOM - (HEIGHT - top - _BOTTOM) * share

    step = max(1, math.ceil((high - low) / _MOST_LABELS))
    every = max(1, math.ceil(count / max(2, min(_MOST_LABELS, width // _LABEL))))
    template = resources.files("porting.reports").joinpath("plot.svg").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string(template).render(
        names=names,
        columns=columns,
        size=2.5 if width >= WIDTH else 2,
        width=width,
        height=HEIGHT,
        left=_LEFT,
        right=width - _RIGHT,
        top=top,
        bottom=HEIGHT - _BOTTOM,
        grey=GREY,
        x=x,
        y=y,
        powers=[(power, up(10.0**power)) for power in range(low, high + 1, step)],
        places=[(place + 1, across(place)) for place in range(0, count, every)],
        lines=[(label, up(height)) for label, height in lines],
        series=[
            (each, [(round(across(place), 1), round(up(height), 1), int(place)) for place, height in each.points])
            for each in drawn
        ],
    )
