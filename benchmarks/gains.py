"""Gains over a growing amount of data, as SVG: a chart beside those of extras/plots.py."""
import math

from extras.plots import COLOURS, LETTER, WIDTH, axes, key, path, rule, scale, svg, ticks


def gains(series, title: str, x_axis: str, y_axis: str) -> str:
    """Differences with their intervals over a logarithmic width, a line at zero.

    series: [(name, [(x, value, low, high), ...])]; what shares an x stands side by side.
    """
    legend, top = key([name for name, _ in series])
    xs = sorted({row[0] for _, rows in series for row in rows})
    ends = [0.0, *(v for _, rows in series for row in rows for v in row[1:])]
    heights = ticks(min(ends), max(ends))
    left, foot = max(len(f"{v:g}") for v in heights) * LETTER + 26, top + 300
    x_of = scale(xs[0], xs[-1], left + 30, WIDTH - 40, math.log)
    y_of = scale(heights[0], heights[-1], foot, top + 4)
    parts = axes(x_of, y_of, xs, heights, (left, WIDTH - 8, top, foot), x_axis, y_axis)
    parts.append(rule(left, y_of(0), WIDTH - 8, y_of(0), opacity=0.8))
    said = []
    for i, (name, rows) in enumerate(series):
        aside, colour = 7 * (i - (len(series) - 1) / 2), COLOURS[i % len(COLOURS)]
        points = [(x_of(x) + aside, *map(y_of, row)) for x, *row in rows]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y, _, _ in points)
        parts += [path(line, i),
                  *(rule(x, low, x, high, colour, 2)
                    + f'<circle cx="{x}" cy="{y}" r="3.5" fill="{colour}"/>'
                    for x, y, low, high in points)]
        said.append(f"{name}: " + ", ".join(f"{row[0]:g} {row[1]:+.1f}" for row in rows))
    return svg(foot + 40, title, "; ".join(said), [legend, *parts])
