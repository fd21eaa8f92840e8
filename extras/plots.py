"""Plots as SVG, written with plain Python; nothing here knows what the numbers mean.

Every function returns one SVG string: a viewBox and no size of its own, a title and a description
for screen readers, `currentColor` as ink and CSS variables as colours, so that the page around it
decides between light and dark (it needs `CSS` for that). `standalone` turns the string into a file
that any viewer shows on white.

Colours after Okabe and Ito 2008, which people with colour blindness tell apart; curves differ in
their dashes too.
"""
import math
import re
import textwrap
from html import escape

WIDTH = 440   # user units; on a phone the 13-unit letters are then still 10 pixels high
LETTER = 7.0  # width of one such letter, on the generous side: labels are broken by it
LINE = 15     # height of one line of a label
TOO_SMALL = "n too small"
DASHES = ("none", "7 3", "2 2")
LIGHT = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b87a00", "#7f6bb3")
DARK = ("#56b4e9", "#ff8c42", "#2fc79a", "#e6a0c4", "#f0b429", "#b3a2e8")
CSS = ":root{%s}@media (prefers-color-scheme:dark){:root{%s}}" % tuple(
    "".join(f"--plot-{i}:{c};" for i, c in enumerate(colours)) for colours in (LIGHT, DARK))


def forest(rows, title: str, axis: str) -> str:
    """Differences with their intervals around a line at zero.

    rows: [(label, value, low, high)], None for an undefined one. A full mark's interval excludes
    zero, a hollow mark's does not.
    """
    said = [TOO_SMALL if None in row[1:] else "{} [{}, {}]".format(*map(signed, row[1:]))
            for row in rows]
    left = min(max(len(row[0]) for row in rows) * LETTER, 0.36 * WIDTH) + 10
    right = WIDTH - max(map(len, said)) * 6.6 - 10
    ends = [0.0, *(v for row in rows if None not in row[1:] for v in row[1:])]
    pad = 0.04 * (max(ends) - min(ends)) or 1.0
    low_end, high_end = min(ends) - pad, max(ends) + pad
    x_of, y, marks = scale(low_end, high_end, left, right), 0, []
    for (label, value, low, high), words in zip(rows, said):
        height = max(26, LINE * len(fit(label, left - 10)) + 11)
        middle = y + height / 2
        marks += [block(0, middle, label, left - 10), text(WIDTH, middle + 4, words, "end", 12)]
        if words != TOO_SMALL:
            fill = "var(--page, #ffffff)" if low <= 0 <= high else colour(0)
            marks.append(rule(x_of(low), middle, x_of(high), middle, colour(0), 2)
                         + f'<circle class="marker" cx="{x_of(value)}" cy="{middle}" r="5" '
                           f'fill="{fill}" stroke="{colour(0)}" stroke-width="2"/>')
        y += height
    grid = [rule(x_of(s), 2, x_of(s), y, opacity=0.15 if s else 0.8)
            + text(x_of(s), y + 16, signed(s, "g"), "middle", 12, 'class="tick"')
            for s in ticks(low_end, high_end) if low_end <= s <= high_end]
    grid.append(text((left + right) / 2, y + 34, axis, "middle"))
    return svg(y + 38, title, "; ".join(f"{r[0]}: {w}" for r, w in zip(rows, said)), grid + marks)


def bars_with_intervals(groups, series, title: str, axis: str) -> str:
    """Lying bars from 0 to 100 with whiskers.

    groups: names; series: [(name, [(value, low, high) for each group])], None for an undefined one.
    """
    legend, y = key([name for name, _ in series], bars=True)
    left = min(max(map(len, groups)) * LETTER, 0.3 * WIDTH) + 10
    top, x_of, marks, said = y, scale(0, 100, left, WIDTH - 40), [], []
    for g, group in enumerate(groups):
        height = LINE * max(len(series), len(fit(group, left - 10))) + 9
        marks.append(block(0, y + height / 2, group, left - 10))
        for i, (name, cells) in enumerate(series):
            value, low, high = cells[g]
            middle = y + height / 2 + LINE * (i - (len(series) - 1) / 2)
            said.append(f"{group}, {name}: {TOO_SMALL if value is None else f'{value:.1f}'}")
            if value is None:
                marks.append(text(left + 5, middle + 4, TOO_SMALL, size=11))
                continue
            marks.append(f'<rect x="{left}" y="{middle - 5.5}" width="{x_of(value) - left:.2f}" '
                         f'height="11" fill="{colour(i)}" fill-opacity="0.75"/>'
                         + text(WIDTH, middle + 4, f"{value:.1f}", "end", 11))
            if None not in (low, high):
                marks.append(rule(x_of(low), middle, x_of(high), middle, width=1.4))
                marks += [rule(x_of(v), middle - 3, x_of(v), middle + 3, width=1.4)
                          for v in (low, high)]
        y += height
    grid = [rule(x_of(s), top, x_of(s), y, opacity=0.15)
            + text(x_of(s), y + 16, s, "middle", 12, 'class="tick"') for s in range(0, 101, 20)]
    grid.append(text(x_of(50), y + 34, axis, "middle"))
    return svg(y + 38, title, "; ".join(said), [legend, *grid, *marks])


def lines(series, title: str, x_axis: str, y_axis: str) -> str:
    """Curves of positive values over a logarithmic height.

    series: [(name, xs, ys)]; curves of one name share their colour; a lone name needs no legend.
    """
    names = list(dict.fromkeys(name for name, _, _ in series))
    legend, top = key(names) if len(names) > 1 else ("", 0)
    values = [v for _, _, ys in series for v in ys]
    low, high = 0.95 * min(values), 1.05 * max(values)
    decades = [10.0**e for e in range(-9, 10)]
    # as fine as there is room for; over a short range, even steps
    choices = [[m * d for d in decades for m in (1, 2, 5)], decades, ticks(low, high)]
    choices = [[v for v in choice if low <= v <= high] for choice in choices]
    heights = next((c for c in choices if 2 < len(c) < 8), choices[2])
    steps = ticks(0, max(x for _, xs, _ in series for x in xs))
    left, foot = max(len(f"{v:g}") for v in heights) * LETTER + 26, top + 200
    x_of = scale(0, steps[-1], left, WIDTH - 18)
    y_log = scale(math.log(low), math.log(high), foot, top + 4)
    parts = axes(x_of, lambda v: y_log(math.log(v)), steps, heights, (left, WIDTH - 18, top, foot),
                 x_axis, y_axis)
    parts += [path([(x_of(x), y_log(math.log(y))) for x, y in zip(xs, ys)], names.index(name),
                   2 if len(series) == len(names) else 1.2) for name, xs, ys in series]
    said = "; ".join(f"{name}: from {ys[0]:.3g} to {ys[-1]:.3g}" for name, _, ys in series)
    return svg(foot + 40, title, said, [legend, *parts])


def gains(series, title: str, x_axis: str, y_axis: str) -> str:
    """Differences with their intervals over a logarithmic width, a line at zero.

    series: [(name, [(x, value, low, high), ...])]; what shares an x stands side by side.
    """
    legend, top = key([name for name, _ in series])
    xs = sorted({row[0] for _, rows in series for row in rows})
    ends = [0.0, *(v for _, rows in series for row in rows for v in row[1:])]
    heights = ticks(min(ends), max(ends))
    left, foot = max(len(f"{v:g}") for v in heights) * LETTER + 26, top + 300
    x_log = scale(math.log(xs[0]), math.log(xs[-1]), left + 30, WIDTH - 40)
    y_of = scale(heights[0], heights[-1], foot, top + 4)
    parts = axes(lambda v: x_log(math.log(v)), y_of, xs, heights, (left, WIDTH - 8, top, foot),
                 x_axis, y_axis) + [rule(left, y_of(0), WIDTH - 8, y_of(0), opacity=0.8)]
    said = []
    for i, (name, rows) in enumerate(series):
        aside = 7 * (i - (len(series) - 1) / 2)
        points = [(x_log(math.log(x)) + aside, *map(y_of, row)) for x, *row in rows]
        parts += [path([(x, y) for x, y, _, _ in points], i, 1.2, 0.5),
                  *(rule(x, low, x, high, colour(i), 2) + f'<circle cx="{x}" cy="{y}" r="3.5" '
                    f'fill="{colour(i)}"/>' for x, y, low, high in points)]
        said.append(f"{name}: " + ", ".join(f"{row[0]:g} {signed(row[1])}" for row in rows))
    return svg(foot + 40, title, "; ".join(said), [legend, *parts])


def roc(curves, title: str) -> str:
    """Sensitivity over 1 - specificity.

    curves: [(name, [(fpr, tpr), ...])] in 0..1; of each name the first is drawn full, the others
    (one for each seed) faint.
    """
    legend, top = key([name for name, _ in curves])
    left, right, foot = 62, 62 + 320, top + 6 + 320
    x_of, y_of = scale(0, 1, left, right), scale(0, 1, foot, top + 6)
    fifths = [0, 0.2, 0.4, 0.6, 0.8, 1]
    parts = axes(x_of, y_of, fifths, fifths, (left, right, top + 6, foot),
                 "1 - specificity", "sensitivity")
    parts.append(rule(left, foot, right, top + 6, opacity=0.4, dash="2 4"))
    drawn = [(j > 0, i, pair) for i, (_, pairs) in enumerate(curves)
             for j, pair in enumerate(pairs)]
    for faint, i, pair in sorted(drawn, key=lambda d: not d[0]):  # the faint ones lie below
        points = [(x_of(x), y_of(y)) for x, y in zip(*pair)]
        parts.append(path(points, i, 1 if faint else 2, 0.35 if faint else 1))
    return svg(foot + 40, title, "; ".join(name for name, _ in curves), [legend, *parts])


def confusion(matrix, names, title: str) -> str:
    """Counts, and percentages of each row. Rows are the truth, columns the answers."""
    left = min(max(map(len, names)) * LETTER, 0.25 * WIDTH) + 30
    wide = min((WIDTH - left) / len(names), 88)
    head = LINE * max(len(fit(name, wide - 4)) for name in names)
    top, middle = 24 + head, 24 + head + 22 * len(names)
    parts = [text(left + len(names) * wide / 2, 14, "answer", "middle"),
             text(10, middle, "truth", "middle", extra=f'transform="rotate(-90 10 {middle})"')]
    for i, (name, row) in enumerate(zip(names, matrix)):
        y = top + 44 * i
        parts += [block(left + (i + 0.5) * wide, 21 + head / 2, name, wide - 4, "middle"),
                  block(left - 8, y + 22, name, left - 34, "end")]
        for j, count in enumerate(row):
            share, x = count / (sum(row) or 1), left + j * wide
            # half the colour at most: the ink on top stays readable on a light and on a dark page
            parts.append(f'<rect x="{x + 1:.2f}" y="{y + 1}" width="{wide - 2:.2f}" height="42" '
                         f'rx="3" fill="{colour(0)}" fill-opacity="{0.04 + 0.5 * share:.3f}"/>'
                         + text(x + wide / 2, y + 20, f"{100 * share:.0f} %", "middle")
                         + text(x + wide / 2, y + 35, f"{round(count, 1):g}", "middle", 11))
    said = "; ".join(f"{a}: " + ", ".join(f"{b} {n:g}" for b, n in zip(names, row))
                     for a, row in zip(names, matrix))
    return svg(top + 44 * len(names), title, said, parts)


def standalone(drawing: str) -> str:
    """The drawing as a file of its own: light colours written out, on a white sheet."""
    drawing = re.sub(r"var\(--[\w-]+, (#\w+)\)", r"\1", drawing).replace("currentColor", "#1c2024")
    box = re.search(r'viewBox="(\S+) (\S+) (\S+) (\S+)"', drawing).groups()
    sheet = '<rect x="{}" y="{}" width="{}" height="{}" fill="#ffffff"/>'.format(*box)
    return drawing.replace("</desc>", "</desc>" + sheet, 1)


# ------------------------------------------------------------------------------------ small parts

def svg(height, title, description, parts) -> str:
    return (f'<svg xmlns="http://www.w3.org/2000/svg" role="img" fill="currentColor" '
            f'font-family="system-ui, sans-serif" '
            f'viewBox="-6 -6 {WIDTH + 12} {math.ceil(height) + 12}"><title>{escape(title)}</title>'
            f"<desc>{escape(description)}</desc>{''.join(parts)}</svg>")


def text(x, y, words, anchor="start", size=13, extra="") -> str:
    return (f'<text x="{x:.2f}" y="{y:.2f}" text-anchor="{anchor}" font-size="{size}" {extra}>'
            f"{escape(str(words))}</text>")


def fit(words, width) -> list[str]:
    return textwrap.wrap(words, max(int(width / LETTER), 3)) or [""]


def block(x, middle, words, width, anchor="start") -> str:
    """The words broken to the width, centred on a height."""
    broken = fit(words, width)
    return "".join(text(x, middle + 4 + LINE * (i - (len(broken) - 1) / 2), line, anchor)
                   for i, line in enumerate(broken))


def rule(x1, y1, x2, y2, stroke="currentColor", width=1, opacity=1, dash="none") -> str:
    return (f'<line x1="{x1:.2f}" y1="{y1:.2f}" x2="{x2:.2f}" y2="{y2:.2f}" stroke="{stroke}" '
            f'stroke-width="{width}" stroke-opacity="{opacity}" stroke-dasharray="{dash}"/>')


def path(points, i, width=2, opacity=1) -> str:
    return (f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}" fill="none" '
            f'stroke="{colour(i)}" stroke-width="{width}" stroke-linejoin="round" '
            f'stroke-opacity="{opacity}" stroke-dasharray="{DASHES[i % len(DASHES)]}"/>')


def key(names, bars=False):
    """The legend, and the height it takes."""
    parts, y = [], 0
    for i, name in enumerate(names):
        height = LINE * len(fit(name, WIDTH - 34)) + 3
        middle = y + height / 2
        parts.append(f'<rect x="0" y="{middle - 5.5}" width="26" height="11" fill="{colour(i)}" '
                     'fill-opacity="0.75"/>' if bars else path([(0, middle), (26, middle)], i))
        parts.append(block(34, middle, name, WIDTH - 34))
        y += height
    return "".join(parts), y + 6


def axes(x_of, y_of, xs, ys, box, x_axis, y_axis) -> list[str]:
    """Grid, numbers and names of both axes around box = (left, right, top, foot)."""
    left, right, top, foot = box
    return [*(rule(x_of(v), top, x_of(v), foot, opacity=0.15)
              + text(x_of(v), foot + 17, f"{v:g}", "middle", 12, 'class="tick"') for v in xs),
            *(rule(left, y_of(v), right, y_of(v), opacity=0.15)
              + text(left - 6, y_of(v) + 4, f"{v:g}", "end", 12, 'class="tick"') for v in ys),
            text((left + right) / 2, foot + 36, x_axis, "middle"),
            text(10, (top + foot) / 2, y_axis, "middle",
                 extra=f'transform="rotate(-90 10 {(top + foot) / 2})"')]


def colour(i: int) -> str:
    return f"var(--plot-{i % len(LIGHT)}, {LIGHT[i % len(LIGHT)]})"


def scale(low, high, start, stop):
    """The straight line that takes low to start and high to stop."""
    return lambda v: round(start + (v - low) / ((high - low) or 1.0) * (stop - start), 2)


def ticks(low: float, high: float) -> list[float]:
    """At most seven round numbers, 1, 2 or 5 times a power of ten apart, around low..high."""
    span = (high - low) or 1.0
    power = 10.0 ** math.floor(math.log10(span / 5))
    step = next(m * power for m in (1, 2, 5, 10) if span <= 5 * m * power)
    return [round(k * step, 10) for k in range(math.floor(low / step), math.ceil(high / step) + 1)]


def signed(value: float, form: str = ".1f") -> str:
    words = format(abs(value), form)
    return words if float(words) == 0 else ("+" if value > 0 else "\N{MINUS SIGN}") + words
