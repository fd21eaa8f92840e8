"""Plots as SVG strings, with title and description; nothing here knows what the numbers mean.
Colours: Okabe and Ito 2008, to be seen on white and on black, and by the colour-blind."""
import math
import re
import textwrap
from html import escape

WIDTH = 440   # user units; on a phone the 13-unit letters are then still 10 pixels high
LETTER = 7.0  # width of one such letter, on the generous side
TOO_SMALL = "n too small"
DASHES = ("none", "7 3", "2 2")
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b87a00", "#7f6bb3")


def forest(rows, title: str, axis: str) -> str:
    """Differences with their intervals around zero; a hollow mark's interval holds it.
    rows: [(label, value, low, high)], None for an undefined one."""
    said = [TOO_SMALL if None in row[1:] else "{:+.1f} [{:+.1f}, {:+.1f}]".format(
        *(round(v, 1) + 0.0 for v in row[1:])) for row in rows]             # no -0.0
    left = min(max(len(row[0]) for row in rows) * LETTER, 0.36 * WIDTH) + 10
    right = WIDTH - max(map(len, said)) * 6.6 - 10
    first, *_, last = sorted([0.0, 0.0, *(v for row in rows for v in row[1:] if v is not None)])
    x_of, y, marks = scale(first, last, left, right), 0, []
    for (label, value, low, high), words in zip(rows, said):
        name, height = block(0, y, label, left - 10, 11)
        middle = y + height / 2
        marks += [name, text(WIDTH, middle + 4, words, "end", 12)]
        if words != TOO_SMALL:
            fill = "var(--page, #ffffff)" if low <= 0 <= high else COLOURS[0]
            marks.append(rule(x_of(low), middle, x_of(high), middle, COLOURS[0], 2)
                         + f'<circle class="marker" cx="{x_of(value)}" cy="{middle}" r="5" '
                           f'fill="{fill}" stroke="{COLOURS[0]}" stroke-width="2"/>')
        y += height
    steps = [step for step in ticks(first, last) if first <= step <= last]
    grid = axes(x_of, None, steps, [], (left, right, 2, y), axis, "")
    return svg(y + 40, title, "; ".join(f"{row[0]}: {words}" for row, words in zip(rows, said)),
               [*grid, rule(x_of(0), 2, x_of(0), y, opacity=0.8), *marks])


def curves(series, title: str, x_axis: str, y_axis: str) -> str:
    """Curves of positive values over a logarithmic height.
    series: [(name, xs, ys)]; curves of one name share their colour."""
    names = list(dict.fromkeys(name for name, _, _ in series))
    legend, top = key(names) if len(names) > 1 or names[0] not in title else ("", 0)
    ends = [end(ys) for _, _, ys in series for end in (min, max)]
    low, high = 0.95 * min(ends), 1.05 * max(ends)
    heights = [v for e in range(-9, 10) for v in (10.0**e, 3 * 10.0**e) if low < v < high]
    if len(heights) < 3:            # over a short range, even steps
        heights = [v for v in ticks(low, high) if low <= v <= high]
    steps = ticks(0, max(x for _, xs, _ in series for x in xs))
    left = max(len(f"{v:g}") for v in heights) * LETTER + 26
    right, foot = WIDTH - 18, top + 204
    x_of, y_of = scale(0, steps[-1], left, right), scale(low, high, foot, top + 4, math.log)
    parts = axes(x_of, y_of, steps, heights, (left, right, top + 4, foot), x_axis, y_axis)
    parts += [path(" ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in zip(xs, ys)),
                   names.index(name)) for name, xs, ys in series]
    return svg(foot + 40, title, "; ".join(f"{name}: from {ys[0]:.3g} to {ys[-1]:.3g}"
                                           for name, _, ys in series), [legend, *parts])


def standalone(drawing: str) -> str:
    """The drawing as a file of its own: light colours written out, on a white sheet."""
    drawing = drawing.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"')
    return re.sub(r"var\(--[\w-]+, (#\w+)\)", r"\1", drawing.replace("currentColor", "#1c2024"))


def svg(height, title, said, parts) -> str:
    sheet = '<rect x="-6" y="-6" width="100%" height="100%" fill="var(--page, #ffffff)"/>'
    return ('<svg role="img" fill="currentColor" font-family="sans-serif" '
            f'viewBox="-6 -6 {WIDTH + 12} {math.ceil(height) + 12}">'
            f"<title>{escape(title)}</title><desc>{escape(said)}</desc>"
            + "".join([sheet, *parts, "</svg>"]))


def text(x, y, words, anchor="start", size=13, extra="") -> str:
    return (f'<text x="{x:.2f}" y="{y:.2f}" text-anchor="{anchor}" font-size="{size}" {extra}>'
            f"{escape(words)}</text>")


def block(x, y, words, width, pad):
    """The words broken to the width, below y, and the height that they take with the padding."""
    broken = textwrap.wrap(words, max(int(width / LETTER), 3)) or [""]
    drawn = (text(x, y + pad / 2 + 11.5 + 15 * i, line) for i, line in enumerate(broken))
    return "".join(drawn), 15 * len(broken) + pad


def rule(x1, y1, x2, y2, stroke="currentColor", width=1, opacity=1) -> str:
    return (f'<line x1="{x1:.2f}" y1="{y1:.2f}" x2="{x2:.2f}" y2="{y2:.2f}" stroke="{stroke}" '
            f'stroke-width="{width}" stroke-opacity="{opacity}"/>')


def path(points: str, i: int) -> str:
    return (f'<polyline points="{points}" fill="none" stroke="{COLOURS[i % len(COLOURS)]}" '
            f'stroke-width="2" stroke-dasharray="{DASHES[i % len(DASHES)]}"/>')


def key(names):
    """The legend, and the height it takes."""
    drawn, y = "", 0
    for i, name in enumerate(names):
        words, height = block(34, y, name, WIDTH - 34, 3)
        drawn += words + path(f"0,{y + height / 2} 26,{y + height / 2}", i)
        y += height
    return drawn, y + 6


def axes(x_of, y_of, xs, ys, box, x_axis, y_axis) -> list[str]:
    """Grid, numbers and names of both axes around box = (left, right, top, foot)."""
    left, right, top, foot = box
    turned = f'transform="rotate(-90 10 {(top + foot) / 2})"'
    return [*(rule(x_of(v), top, x_of(v), foot, opacity=0.15)
              + text(x_of(v), foot + 17, f"{v:g}", "middle", 12, 'class="tick"') for v in xs),
            *(rule(left, y_of(v), right, y_of(v), opacity=0.15)
              + text(left - 6, y_of(v) + 4, f"{v:g}", "end", 12, 'class="tick"') for v in ys),
            text((left + right) / 2, foot + 36, x_axis, "middle"),
            text(10, (top + foot) / 2, y_axis, "middle", extra=turned)]


def scale(low, high, start, stop, bend=float):
    """The function that takes low to start and high to stop, straight or bent by math.log."""
    slope = (stop - start) / ((bend(high) - bend(low)) or 1.0)
    return lambda v: round(start + slope * (bend(v) - bend(low)), 2)


def ticks(low: float, high: float) -> list[float]:
    """At most seven round numbers, 1, 2 or 5 times a power of ten apart, around low..high."""
    span = (high - low) or 1.0
    power = 10.0 ** math.floor(math.log10(span / 5))
    step = next(m * power for m in (1, 2, 5, 10) if span <= 5 * m * power)
    return [round(k * step, 10) for k in range(math.floor(low / step), math.ceil(high / step) + 1)]
