"""The contact sheets in a run's pictures/: which images to show beside which."""
import numpy as np
from PIL import Image, ImageDraw, ImageFont

import data
from data import ImageSet
from engine.run import Run, save_picture
from guidance import synthesise


def draw(run: Run, name: str, picture, *args) -> None:
    """pictures/name.png = picture(*args), unless it is there or there is nothing to show (None)."""
    path = run.folder / "pictures" / f"{name}.png"
    if not run.team.rank and not path.exists() and (drawn := picture(*args)) is not None:
        save_picture(path, drawn)


def draw_all(run: Run, train: ImageSet, made: dict, generator, students: list,
             probs: np.ndarray, reasons: tuple) -> None:
    """The pictures of the report but for data.png. made: candidates by arm and round."""
    margin = data.margins(probs, train)
    if not made.get("guided"):
        return
    m = made["guided"][-1]
    draw(run, "children", children, train, m.parents, m.children.images, m.targets, m.judge,
         [reasons[i] for i in m.rejected_by])
    draw(run, "types", every_type, run, train, margin, generator, students)


def contact_sheet(images: np.ndarray, captions=None, columns: int = 8, scale: int = 0,
                  row_labels=None) -> Image.Image:
    """A grid of images, row by row, as one RGB picture; cells widen to the longest caption.
    images: uint8 (N, 3, H, W), N = 0 allowed; captions: N strings below them, with newlines or not;
    columns: of images; scale: screen pixels a pixel, 0: a fitting one; row_labels: left of it."""
    count, rows = len(images), -(-len(images) // columns)
    captions, row_labels = captions or [""] * count, row_labels or [""] * rows
    font, pen = ImageFont.load_default(), ImageDraw.Draw(Image.new("RGB", (1, 1)))

    def measured(texts):        # and the width and height of the largest
        # what the font can draw: PIL's fallback without FreeType knows Latin-1 alone
        texts = [(text or "").encode("latin-1", "replace").decode("latin-1") for text in texts]
        boxes = [pen.multiline_textbbox((0, 0), text, font) for text in texts if text]
        return texts, *(max([0, *(int(box[side]) + 5 for box in boxes)]) for side in (2, 3))

    (row_labels, left, _), (captions, wide, below) = measured(row_labels), measured(captions)
    scale = scale or max(1, round(min(96, 800 / columns) / images.shape[3]))
    height, width = images.shape[2] * scale, images.shape[3] * scale
    cell_width, cell_height = max(width, wide) + 2, height + below + 2
    size = (2 + left + cell_width * min(columns, count), 2 + cell_height * rows)
    sheet = Image.new("RGB", size if count else (80, 16), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((2, 0), "" if count else "(no images)", "black", font)
    for i, image in enumerate(images):
        x, y = 2 + left + cell_width * (i % columns), 2 + cell_height * (i // columns)
        sheet.paste(one(image.repeat(scale, axis=1).repeat(scale, axis=2)), (x, y))
        draw.multiline_text((x, y + height), captions[i], "black", font)
        if i % columns == 0:
            draw.multiline_text((2, y), row_labels[i // columns], "black", font)
    return sheet


def one(image: np.ndarray) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))


def grid(cells: list, columns: int, labels: list[str]) -> Image.Image:
    """The contact sheet of cells (images, captions, how many to fill up to with light grey)."""
    tiles, captions = [], []
    for images, words, count in cells:
        tiles += [images, np.full((count - len(images), *images.shape[1:]), 235, np.uint8)]
        captions += [*words, *[""] * (count - len(words))]
    return contact_sheet(np.concatenate(tiles), captions, columns, row_labels=labels)


def group_of(image_set: ImageSet, group: int) -> str:
    return image_set.group_names[group] if group >= 0 else ""


def by_class_and_group(*sets: ImageSet, each: int = 2, words=("",), seed: int = 0) -> Image.Image:
    """A row a class: `each` random images a group (4 x each without) of each set, and how many."""
    rng, cells, names = np.random.default_rng(seed), [], sets[0].group_names
    groups = list(enumerate(names))
    groups += [(-1, "unknown" if names else "all")] * bool((sets[0].groups == -1).any())
    each = each if names else 4 * each
    for label in range(len(sets[0].class_names)):
        for group, name in groups:
            for some, word in zip(sets, words):
                cell = np.flatnonzero((some.labels == label) & (some.groups == group))
                picked = some.images[rng.permutation(cell)[:each]]
                cells.append((picked, [f"{name}: {len(cell)} {word}"], each))
    return grid(cells, each * len(groups) * len(sets), list(sets[0].class_names))


def children(train: ImageSet, parents, images, targets, judge, rejected_by) -> Image.Image:
    """Parents (N,) in train, each with its child below: 8 pairs to a double row, 16 at most.
    targets: (N,) groups asked for, or -1; judge: (N,) its probability of the class; rejected_by: N
    words, "kept" or why not."""
    wide = min(8, len(images)) or 1
    above = [f"{train.class_names[train.labels[i]]}\n{group_of(train, train.groups[i])}"
             for i in parents[:16]]
    below = [f"{group_of(train, target)} {sure:.2f}\n{'rejected: ' * (why != 'kept')}{why}"
             for target, sure, why in zip(targets[:16], judge, rejected_by)]
    cells = []
    for some in (slice(0, 8), slice(8, 16))[:-(-len(images) // 8)]:
        cells += [(train.images[parents[some]], above[some], wide),
                  (images[some], below[some], wide)]
    return grid(cells or [(images, [], 0)], wide, ["parents", "children"] * (len(cells) // 2))


def every_type(run: Run, train: ImageSet, margin: np.ndarray, generator, students: list):
    """The two hardest lesions of each malignant class: the photograph, then it on every group."""
    groups, c = len(train.group_names), run.config.guidance
    if groups < 2 or c.sampler == "ddpm":       # fresh noise would forget the parent
        return None
    order, names = np.argsort(margin, kind="stable"), train.class_names
    chosen = np.concatenate([order[train.labels[order] == sick][:2]
                             for sick in np.flatnonzero(train.malignant)[::-1]])
    row, group = np.divmod(np.arange(len(chosen) * groups), groups)
    images = synthesise(generator, students, train.subset(chosen[row]), group, row, c,
                        start="counterfactual", objectives=c.objectives).images
    cells = [(np.concatenate([train.images[[i]], images[row == k]]),
              [f"real {group_of(train, train.groups[i])}", *train.group_names], 1 + groups)
             for k, i in enumerate(chosen)]
    return grid(cells, 1 + groups, [names[train.labels[i]] for i in chosen])
