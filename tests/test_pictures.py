"""Contact sheets: every pixel in its place, no text cut, and what stands beside what."""
from dataclasses import replace

import numpy as np
import pytest

import data
from extras import pictures


def made(count: int, side: int = 2) -> data.ImageSet:
    """Random images of two classes and three groups, some of them unknown."""
    rng = np.random.default_rng(0)
    names = np.array([f"i{i}" for i in range(count)], str)
    return data.ImageSet(
        rng.integers(0, 200, (count, 3, side, side), np.uint8), rng.integers(0, 2, count),
        rng.integers(-1, 3, count), names, np.full(count, -1), names, ("nv", "mel"),
        ("I", "II", "III"), (False, True))


def test_contact_sheet_places_every_pixel():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (5, 3, 6, 4), np.uint8)
    sheet = pictures.contact_sheet(images, columns=3, scale=2)
    assert sheet.size == (2 + 3 * (4 * 2 + 2), 2 + 2 * (6 * 2 + 2)) and sheet.mode == "RGB"
    pixels = np.asarray(sheet)
    for i, image in enumerate(images):
        y, x = 2 + 14 * (i // 3), 2 + 10 * (i % 3)
        tile = pixels[y:y + 12, x:x + 8]
        assert np.array_equal(tile[::2, ::2], image.transpose(1, 2, 0))
        assert np.array_equal(tile[1::2, 1::2], tile[::2, ::2])
    assert (pixels[16:, 22:] == 255).all()   # the empty sixth cell


def test_contact_sheet_text():
    images = np.zeros((4, 3, 8, 8), np.uint8)
    bare = pictures.contact_sheet(images, columns=2, scale=2)
    full = pictures.contact_sheet(images, ["a", "wider than its image", None, "x\ny \u2192 z"],
                                  columns=2, scale=2, row_labels=["first", "second"])
    assert full.width > bare.width and full.height > bare.height
    ink = (np.asarray(full).sum(2) < 200).sum()
    assert ink > 4 * 16 * 16   # the four black images, and some letters
    empty = pictures.contact_sheet(images[:0], [])
    assert (np.asarray(empty) < 128).any()   # it says that there are none


def test_by_class_and_group_with_and_without_groups():
    whole = made(60)
    with_groups = pictures.by_class_and_group(whole)
    none = replace(whole, groups=np.full(len(whole), -1), group_names=())
    assert pictures.by_class_and_group(none).width > 0 < with_groups.width
    few = whole.subset([int(np.flatnonzero(whole.groups == -1)[0])])   # nearly every cell is empty
    assert pictures.by_class_and_group(few).size[1] == with_groups.size[1]
    pairs = pictures.by_class_and_group(whole, none, each=1, words=("real", "made"))
    assert pairs.width > 0


@pytest.mark.parametrize("count", [0, 1, 8, 11, 40])
def test_children_stand_below_their_parents(count):
    """Eight pairs to a double row, 16 at most: found again by their pixels."""
    train, rng = made(50, side=8), np.random.default_rng(1)
    parents, images = rng.permutation(50)[:count], made(count, side=8).images + 50
    sheet = pictures.children(train, parents, images, rng.integers(-1, 3, count), rng.random(count),
                              ["kept", "judge", "copy", "nonfinite", "kept"] * (count // 5 + 1))
    pixels = np.asarray(sheet)

    def place(image):
        """Left upper corner of the image's enlargement; every tile is 96 pixels wide."""
        tile = image.transpose(1, 2, 0).repeat(12, 0).repeat(12, 1)
        found = [(y, x) for y, x in np.argwhere((pixels == tile[0, 0]).all(2))
                 if np.array_equal(pixels[y:y + 96, x:x + 96], tile)]
        assert len(found) <= 1
        return found[0] if found else None

    shown = min(count, 16)
    above, below = ([place(image) for image in some]
                    for some in (train.images[parents], images))
    assert [p is not None for p in above] == [p is not None for p in below] == [
        i < shown for i in range(count)]
    for (y, x), (child_y, child_x) in zip(above[:shown], below[:shown]):
        assert x == child_x and 96 < child_y - y < 150
    rows = [y for y, _ in above[:shown]]
    assert rows == sorted(rows) and all(rows.count(y) <= 8 for y in rows)
