"""external.py: images made elsewhere come in with their class and group, or with one clear line."""
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from extras import external
from data import DataError, ImageSet

NOTHING = np.zeros(0, np.int64)
LIKE = ImageSet(np.zeros((0, 3, 8, 8), np.uint8), NOTHING, NOTHING, NOTHING.astype(str), NOTHING,
                NOTHING.astype(str), ("nv", "mel"), ("I", "VI"), (False, True))
PLACES = {"nv/a.png": ("nv", ""), "nv/VI/b.JPG": ("nv", "VI"), "mel/I/c.png": ("mel", "I")}


def made(root):
    """Three flat images of grey 0, 40 and 80 in the places of PLACES, and a csv that names them."""
    lines = ["image,class,group,note"]
    for i, (place, (name, group)) in enumerate(PLACES.items()):
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 16), (40 * i,) * 3).save(root / place)
        lines.append(f"{place},{name},{group},x")
    (root / "made.csv").write_text("\n".join(lines))
    return root


@pytest.mark.parametrize("what", ["", "made.csv"])
def test_a_folder_and_a_csv_give_the_same_images(tmp_path, what):
    found = external.load_made(str(made(tmp_path) / what), LIKE, 8)
    assert found.images.shape == (3, 3, 8, 8) and (found.class_names, found.group_names) == (
        LIKE.class_names, LIKE.group_names)
    grey = found.images.mean((1, 2, 3))
    for (place, (name, group)), value in zip(PLACES.items(), (0, 40, 80)):
        i = found.sources.tolist().index(f"external/{place}")
        assert abs(grey[i] - value) < 3 and found.class_names[found.labels[i]] == name
        assert (found.group_names[found.groups[i]] if group else found.groups[i]) == (group or -1)
    assert len(LIKE.extend(found)) == 3                     # fits beside the run's own


def test_every_problem_stands_in_one_line(tmp_path):
    root = made(tmp_path / "set")
    (root / "nv/X").mkdir()
    (root / "nv/broken.png").write_bytes(b"\x89PNG")
    (tmp_path / "outside.png").write_bytes((root / "nv/a.png").read_bytes())
    for place in ("loose.png", "bkl/d.png", "nv/X/e.png"):
        (root / place).parent.mkdir(exist_ok=True)
        (root / place).write_bytes((root / "nv/a.png").read_bytes())
    (root / "bad.csv").write_text("image,class,group\nnv/a.png,nv,X\nabsent.png,nv,\n"
                                  "../outside.png,nv,\nmel/I/c.png,,I\n")
    (root / "twice.csv").write_text("image,class,group\nnv/a.png,nv,\nnv/a.png,nv,\n")
    (root / "short.csv").write_text("image,class\nnv/a.png,nv\n")
    (tmp_path / "empty").mkdir()
    for path, words in (
            (root, ["guidance.external", "4 problem(s)", "loose.png has class ''", "'bkl'", "'X'",
                    "nv/broken.png cannot be decoded"]),
            (root / "bad.csv", ["4 problem(s)", "absent.png is no file", "../outside.png is no",
                                "group 'X': write one of I, VI", "class ''"]),
            (root / "twice.csv", ["1 problem(s)", "nv/a.png stands twice"]),
            (root / "short.csv", ["short.csv", "group"]),
            (tmp_path / "empty", ["guidance.external", "holds no .jpg"]),
            (tmp_path / "absent", ["guidance.external", "is no folder"])):
        with pytest.raises(DataError) as error:
            external.load_made(str(path), LIKE, 8)
        assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_names_are_matched_in_any_case():
    assert external.matched(["MEL", "SCC", "nv"], ["nv", "mel"]).tolist() == [1, -1, 0]
    assert external.matched([], ["nv"]).tolist() == []


def test_no_finished_run_is_one_line(tmp_path):
    with pytest.raises(external.RunError, match=re.escape(f"{tmp_path}: no finished run")):
        external.Finished(tmp_path)
    tiny = Path(__file__).parents[1] / "configs/tiny.yaml"
    (tmp_path / "config.yaml").write_text(f"extends: {tiny}\n")
    np.savez(tmp_path / "predictions.npz", class_names=["nv"], arms=["real"])
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(external.RunError, match="not one of this version"):
        external.Finished(tmp_path)
