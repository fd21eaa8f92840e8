"""The phantom's promises: counts, seeds, frequencies, skin, views, sizes, speed, errors."""
import time
from pathlib import Path

import numpy as np
import pytest

from datasets import phantom
from datasets.phantom import COLLECTION, EVEN, draw

EVENLY = (1, 1, 1, 1)                 # over the classes


@pytest.fixture(scope="module")
def large():
    """Many small pictures, even over types and classes."""
    return draw(2400, 16, 5, EVEN, EVENLY)


def border(images):
    """Colour of the bare skin, (N, 3) in 0..1: the median over a frame that few lesions reach."""
    n, _, s, _ = images.shape
    frame = np.ones((s, s), bool)
    frame[s // 6:-(s // 6), s // 6:-(s // 6)] = False
    return np.median(images[:, :, frame], axis=2) / 255


def shares(index, n):
    return np.bincount(index, minlength=n) / len(index)


@pytest.mark.parametrize("count", [1, 2, 37])
def test_shapes_and_dtypes(count):
    d = draw(count, 16, 0)
    assert d["images"].shape == (count, 3, 16, 16) and d["images"].dtype == np.uint8
    for key in ("labels", "groups", "subtypes"):
        assert d[key].shape == (count,) and d[key].dtype == np.int64
    assert d["lesions"].shape == (count,) and d["lesions"].dtype.kind == "U"
    assert d["lesions"][0] == "L0_00000"


def test_collect_is_the_same_draw_under_a_name():
    drawn = draw(30, 16, phantom.stream_seed(3, "val"), EVEN)
    arrays, names = phantom.collect("val", 30, 16, 3)
    for key in ("images", "labels", "groups", "subtypes"):
        assert arrays[key].tobytes() == drawn[key].tobytes()
    assert [name.removeprefix("val-") for name in arrays["lesions"]] == list(drawn["lesions"])
    assert arrays["sources"][29] == "val-000029" and len(set(arrays["sources"])) == 30
    assert len(names["malignant"]) == len(names["class_names"]) == 4
    assert len(names["subtype_names"]) == 10 and len(names["group_names"]) == 6


def test_tables_fit_together():
    assert np.allclose([phantom.SUBTYPE_SHARE[np.equal(phantom.SUBTYPE_CLASS, c)].sum(0)
                        for c in range(4)], 1)
    assert phantom.RECIPES.shape == (len(phantom.SUBTYPE_NAMES), len(phantom.COLUMNS))
    assert len(phantom.MALIGNANT) == len(phantom.CLASS_NAMES) == 4
    assert abs(sum(COLLECTION) - 1) < 1e-9


def test_same_seed_same_bytes_other_seed_other_lesions():
    a, b, c = draw(60, 32, 1), draw(60, 32, 1), draw(60, 32, 2)
    assert all(a[k].tobytes() == b[k].tobytes() for k in a)
    assert not set(a["lesions"]) & set(c["lesions"])
    per_picture = np.abs(a["images"].astype(int) - c["images"]).mean((1, 2, 3))
    assert per_picture.min() > 3


def test_a_carried_lesion_stays_itself_on_the_other_skin(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "benchmarks"))
    import truth
    d, index = draw(120, 32, 4), np.arange(120)
    there = (d["groups"] + 3) % 6
    carried, same = (truth.carry(120, 32, 4, index, g) for g in (there, d["groups"]))
    # On its own skin it is the same picture but for skin and sensor noise; any other lesion is not.
    apart = np.abs(same[:, None, ::2].astype(int) - d["images"][None, :, ::2]).mean((2, 3, 4))
    assert (apart.argmin(1) == index).mean() > 0.9
    # On the other skin its border is that of a lesion drawn there.
    drawn = draw(480, 32, 5, EVEN)
    for g in range(6):
        ours, theirs = border(carried)[there == g], border(drawn["images"])[drawn["groups"] == g]
        assert len(ours) == 0 or np.abs(ours.mean(0) - theirs.mean(0)).max() < 0.08
    assert truth.carry(120, 32, 4, [7], [2]).shape == (1, 3, 32, 32)


@pytest.mark.parametrize("weights", [EVEN, COLLECTION], ids=["even", "collection"])
def test_group_weights_within_binomial_limits(weights):
    d = draw(2500, 16, 3, weights)
    first = np.unique(d["lesions"], return_index=True)[1]       # lesions are independent, views not
    p, n = np.array(weights) / sum(weights), len(first)
    assert (np.abs(shares(d["groups"][first], 6) - p) < 4 * np.sqrt(p * (1 - p) / n)).all()
    q = np.array(phantom.LONG_TAIL) / sum(phantom.LONG_TAIL)
    assert (np.abs(shares(d["labels"][first], 4) - q) < 4 * np.sqrt(q * (1 - q) / n)).all()


def test_weights_of_zero_are_never_drawn():
    d = draw(200, 16, 0, (0, 0, 0, 0, 0, 1), (0, 0, 0, 1))
    assert set(d["groups"]) == {5} and set(d["labels"]) == {3}


def test_subtype_belongs_to_its_class_and_follows_its_share(large):
    assert (np.array(phantom.SUBTYPE_CLASS)[large["subtypes"]] == large["labels"]).all()
    for g in (0, 5):
        for s, c in enumerate(phantom.SUBTYPE_CLASS):
            of_class = (large["groups"] == g) & (large["labels"] == c)
            p, n = phantom.SUBTYPE_SHARE[s, g], of_class.sum() / 1.6      # views: fewer lesions
            found = (large["subtypes"][of_class] == s).mean()
            assert abs(found - p) < 4 * np.sqrt(p * (1 - p) / n) + .02, (s, g, found, p)


def test_acral_melanoma_is_the_dark_skins_melanoma(large):
    melanoma = large["labels"] == phantom.CLASS_NAMES.index("mel")
    acral = large["subtypes"] == phantom.SUBTYPE_NAMES.index("acral melanoma")
    light = acral[melanoma & (large["groups"] <= 1)].mean()
    dark = acral[melanoma & (large["groups"] >= 4)].mean()
    assert light < .10 and dark > .40


def test_skin_darkens_from_type_to_type(large):
    luminance = border(large["images"]) @ (.299, .587, .114)
    by_type = [luminance[large["groups"] == g].mean() for g in range(6)]
    assert (np.diff(by_type) < -.02).all(), by_type
    assert by_type[5] < .6 * by_type[0]


def test_skin_types_are_no_channel_gain_of_each_other():
    """Bring every picture's skin to the same colour by a channel gain, as recolouring would: type
    VI still differs in the texture of bare skin, and in how far a lesion stands out."""
    texture, contrast = [], []
    for g in (0, 5):
        d = draw(200, 32, 4, np.eye(6)[g], EVENLY)
        x = (d["images"] / 255 / border(d["images"])[:, :, None, None]).mean(1)      # skin is 1
        x = x[~np.isin(d["subtypes"], phantom.ACRAL)]
        corner = x[:, 2:9, 2:9]
        change = corner[:, :, 2:] - corner[:, :, :-2]
        # What a row shares with the next is texture; sensor noise is independent and drops out.
        texture.append(np.median((change[:, :-1] * change[:, 1:]).mean((1, 2))))
        contrast.append(np.median(np.abs(x[:, 12:20, 12:20].mean((1, 2)) - 1)))
    assert texture[1] > 6 * texture[0], texture
    assert contrast[1] < .85 * contrast[0], contrast


def test_views_of_a_lesion_agree_in_truth_and_differ_in_pixels():
    d = draw(500, 16, 6, EVEN)
    names, first, views = np.unique(d["lesions"], return_index=True, return_counts=True)
    assert .18 < (views == 2).mean() < .32 and views.max() == 2
    for i in first[views == 2]:
        assert d["lesions"][i] == d["lesions"][i + 1]
        assert all(d[k][i] == d[k][i + 1] for k in ("labels", "groups", "subtypes"))
        assert np.abs(d["images"][i].astype(int) - d["images"][i + 1]).mean() > 2


def test_a_scopes_ring_goes_with_a_class_if_told_to_and_changes_nothing_else():
    """Its share by class, within four standard errors; where there is one, dark corners alone."""
    bare, tied = (draw(800, 16, 4, EVEN, EVENLY, ring) for ring in (0, (.05, .5, 0, .95)))
    assert all((bare[k] == tied[k]).all() for k in ("labels", "groups", "subtypes", "lesions"))
    seen = (bare["images"] != tied["images"]).any((1, 2, 3))
    for label, share in enumerate((.05, .5, 0, .95)):
        of = tied["labels"] == label
        assert abs(seen[of].mean() - share) <= 4 * (share * (1 - share) / of.sum()) ** .5
    corner, middle = (np.index_exp[:, :, a, a] for a in (0, 8))
    assert (tied["images"][corner][seen] < .35 * bare["images"][corner][seen] + 8).all()
    assert np.abs(tied["images"][middle].astype(int) - bare["images"][middle])[seen].max() <= 1


@pytest.mark.parametrize("size", [16, 31, 64, 128])
def test_same_lesions_at_every_size(size):
    """Averaged down to 8 pixels, where noise is small, a draw looks like the draw at 32 pixels."""
    a, b = draw(24, size, 8, EVEN), draw(24, 32, 8, EVEN)
    assert a["images"].shape == (24, 3, size, size)
    assert all((a[k] == b[k]).all() for k in ("labels", "groups", "subtypes", "lesions"))
    if size % 8:
        return
    small = [x["images"].reshape(24, 3, 8, s // 8, 8, s // 8).mean((3, 5))
             for x, s in ((a, size), (b, 32))]
    for one, other in zip(*small):
        assert np.corrcoef(one.ravel(), other.ravel())[0, 1] > .97


def test_pictures_do_not_depend_on_the_chunk(monkeypatch):
    a = draw(40, 32, 9)["images"]
    monkeypatch.setattr(phantom, "CHUNK", 3 * 64 * 64)
    assert (np.abs(a.astype(int) - draw(40, 32, 9)["images"]) <= 1).all()    # rounding apart


def test_speed():
    start = time.process_time()
    draw(1000, 32, 0)
    assert time.process_time() - start < 5            # 1.3 s on a quiet core


@pytest.mark.parametrize("change, word", [
    ({"count": 0}, "count"), ({"size": 8}, "size"), ({"size": 129}, "size"),
    ({"group_weights": (1, 1, 1, 1, 1, -1)}, "group_weights"),
    ({"group_weights": (1, 1)}, "group_weights"),
    ({"class_weights": (0, 0, 0, 0)}, "class_weights"),
    ({"class_weights": (1, 1, 1, np.nan)}, "class_weights")])
def test_bad_arguments_are_one_clear_line(change, word):
    with pytest.raises(ValueError, match=word) as error:
        draw(**{"count": 4, "size": 16, "seed": 0, **change})
    assert "\n" not in str(error.value)
