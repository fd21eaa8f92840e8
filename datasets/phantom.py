"""Dermoscopy phantom: procedural pictures of skin lesions whose truth is known. NumPy only.

Four classes on skin of the six Fitzpatrick types, with ten hidden subtypes that no model is told.
A picture is painted in pigment, not in RGB: maps of melanin, blood, deep melanin and white scatter
go through one small optical model (`reflect`). What lies deep (erythema, vessels, blue veil) fades
under dark skin by itself, and no channel gain turns one skin type into another. A teaching toy, no
model of disease: class and skin type are drawn independently; frequencies "raised" exceed the
clinic's, so that a few thousand pictures hold enough of every subtype.

Sources: the ABCD rule, Stolz et al. 1994, Eur J Dermatol 4:521; pattern analysis, Pehamberger et
al. 1987, J Am Acad Dermatol 17:571; Zalaudek et al. 2007, Arch Dermatol 143:351; Gloster & Neal
2006, J Am Acad Dermatol 55:741; Koch & Lange 2000, ibid. 42:731; Bradford et al. 2009, Arch
Dermatol 145:427; Saida et al. 2004, ibid. 140:1233; Jacques 2013, Phys Med Biol 58:R37."""
import numpy as np

from datasets.layouts import DataError

DRAWS = ("train", "val", "test", "oracle")      # independent streams of one seed
CLASS_NAMES = ("nv", "bkl", "bcc", "mel")
MALIGNANT = (False, False, True, True)
GROUP_NAMES = ("I", "II", "III", "IV", "V", "VI")      # Fitzpatrick skin types
SUBTYPE_NAMES = ("common nevus", "Spitz nevus", "acral nevus",
                 "seborrheic keratosis", "irritated keratosis", "pink bcc", "pigmented bcc",
                 "superficial spreading melanoma", "amelanotic melanoma", "acral melanoma")
SUBTYPE_CLASS = (0, 0, 0, 1, 1, 2, 2, 3, 3, 3)         # the class that each subtype belongs to

COLLECTION = (.22, .38, .25, .09, .043, .017)   # mostly light skin, as in public collections
EVEN = (1, 1, 1, 1, 1, 1)           # the test population
LONG_TAIL = (.52, .20, .11, .17)    # nevi lead, as in HAM10000, where they are two of three

# Share of each subtype within its class (a column sums to 1 over a class), by skin type I-VI.
SUBTYPE_SHARE = np.array([
    # nv. Spitz: about 1 % of nevi in the clinic, raised. Acral nevi: commoner on dark skin.
    (.90, .90, .89, .86, .82, .80), (.07, .07, .06, .06, .06, .06), (.03, .03, .05, .08, .12, .14),
    # bkl. Irritated keratosis: raised; inflamed, it can pass for melanoma.
    (.85, .85, .85, .85, .85, .85), (.15, .15, .15, .15, .15, .15),
    # bcc. Pigmented in over half on dark skin, about 6 % on white skin (Gloster & Neal 2006).
    (.93, .92, .85, .65, .45, .40), (.07, .08, .15, .35, .55, .60),
    # mel. Amelanotic: 2-8 % (Koch & Lange 2000). Acral: 1, 9, 18, 36 % of melanomas in white,
    # Hispanic white, Asian, black Americans (Bradford et al. 2009), more of those of known type.
    (.91, .90, .85, .75, .46, .34), (.07, .07, .06, .05, .04, .04), (.02, .03, .09, .20, .50, .62)])

# One row a subtype; the values are ours. Quantities are means (optical densities, lengths in half
# picture widths); the columns from `network` on are the probability that a lesion shows that.
COLUMNS = ("radius", "atypia", "melanin", "blood", "bleach", "sharp", "network", "globules",
           "cysts", "vessels", "dotted", "nests", "veil", "regression", "ridges", "furrows")
RECIPES = np.array([
    (.46, .27, .85, .02, .0, .3, .75, .40, .03, .03, .03, .02, .03, .03, .0, .0),   # common nevus
    (.40, .25, .25, .30, .1, .5, .10, .35, .02, .05, .75, .02, .05, .02, .0, .0),   # Spitz nevus
    (.46, .28, .80, .02, .0, .3, .00, .20, .00, .00, .00, .00, .02, .02, .06, .90),  # acral nevus
    (.52, .35, .75, .05, .1, .9, .12, .10, .85, .05, .05, .03, .03, .03, .0, .0),   # seborrheic k.
    (.52, .60, 1.0, .30, .1, .7, .10, .20, .45, .10, .50, .08, .25, .15, .0, .0),   # irritated k.
    (.48, .40, .08, .22, .3, .4, .02, .03, .06, .80, .10, .12, .02, .10, .0, .0),   # pink bcc
    (.48, .45, .35, .15, .3, .5, .03, .10, .06, .60, .05, .90, .15, .08, .0, .0),   # pigmented bcc
    (.58, .71, 1.2, .08, .0, .4, .60, .50, .04, .05, .12, .06, .55, .40, .0, .0),   # superficial
    (.54, .74, .24, .32, .3, .3, .04, .08, .02, .15, .80, .03, .25, .55, .0, .0),   # amelanotic
    (.62, .65, 1.1, .03, .0, .2, .00, .20, .00, .00, .03, .00, .30, .15, .86, .10)])  # acral mel.
# Parallel ridges: sensitivity 86 %, specificity 99 % for early acral melanoma (Saida et al. 2004).
ACRAL, SPITZ = (2, 9), 1
SKIN_MELANIN = np.array((.10, .19, .34, .62, 1.02, 1.60))   # density by type I-VI
SKIN_NET = np.array((.0, .0, .05, .10, .15, .18))           # melanin's net around the follicles
SKIN_BLOOD = np.array((.16, .15, .14, .13, .12, .12))       # visible redness
SKIN_FRECKLES = np.array((.30, .20, .05, .0, .0, .0))       # share with freckles
# Absorption of R, G, B per unit density (shapes after Jacques 2013)
MELANIN_RGB, BLOOD_RGB = (.72, 1.0, 1.3), (.10, 1.0, .80)
DERMIS_RGB, DEEP_RGB = (.96, .87, .80), (.32, .37, .44)  # deep melanin looks blue (Tyndall)
MELANIN_GLOW, SURFACE = (.09, .07, .06), .03             # light that never passed the pigment
CHUNK = 2 ** 18       # picture elements painted at a time: one map is 1 MB and stays in cache


def draw(count: int, size: int, seed: int, group_weights=COLLECTION,
         class_weights=LONG_TAIL, ring=.15) -> dict:
    """`count` pictures of `size` x `size` pixels (16 to 128), the same lesions at every size; about
    a quarter in two views, side by side. ring: how many are seen through a scope's dark ring, one
    share or (4,) by class. Returns images uint8 (N, 3, size, size); labels, groups, subtypes int64
    (N,), indices into the names above; lesions (N,) such as "L7_00012", seed first. Raises
    ValueError for a wrong count, size or weights."""
    lesion_of, p = _parameters(count, seed, group_weights, class_weights, ring)
    names = np.array([f"L{seed}_{i:05d}" for i in lesion_of])
    return {"images": _photograph(p, size, np.random.default_rng([seed, 2])), "lesions": names,
            **{k: p[k] for k in ("labels", "groups", "subtypes")}}


def collect(name: str, count: int, size: int, seed: int, **how) -> tuple[dict, dict]:
    """draw() as images.read gives it, from the stream of `name` (see DRAWS), which opens every id.
    "train" is mostly light skin, all others even over the types, like the deployment. DataError."""
    weights = COLLECTION if name == "train" else EVEN
    try:
        arrays = draw(count, size, stream_seed(seed, name), weights, **how)
    except ValueError as error:
        raise DataError(f"data.{name} {count}, data.size {size}: {error}") from None
    arrays["lesions"] = np.array([f"{name}-{lesion}" for lesion in arrays["lesions"]])
    arrays["sources"] = np.array([f"{name}-{i:06d}" for i in range(count)])
    return arrays, {"class_names": CLASS_NAMES, "group_names": GROUP_NAMES,
                    "malignant": MALIGNANT, "subtype_names": SUBTYPE_NAMES}


def stream_seed(seed: int, name: str) -> int:
    """The seed of one of DRAWS."""
    stream = DRAWS.index(name)
    return int(np.random.SeedSequence(seed).spawn(stream + 1)[stream].generate_state(1)[0])


def _parameters(count, seed, group_weights, class_weights, ring):
    """All that `count` pictures show: the lesion on each, (N,), and a dict of arrays (N, ...)."""
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    chances = []
    for name, weights, n in (("group_weights", group_weights, len(GROUP_NAMES)),
                             ("class_weights", class_weights, len(CLASS_NAMES))):
        w = np.asarray(weights, float)
        if w.shape != (n,) or not np.isfinite(w).all() or (w < 0).any() or w.sum() == 0:
            raise ValueError(f"{name} must be {n} weights >= 0, not all 0, got {weights}")
        chances.append(w / w.sum())
    lesion_rng, view_rng = (np.random.default_rng([seed, k]) for k in range(2))
    views = 1 + (lesion_rng.random(count) < .25)
    lesion_of = np.repeat(np.arange(count), views)[:count]
    n = lesion_of[-1] + 1
    groups, labels = (lesion_rng.choice(len(p), n, p=p) for p in chances)
    cdf = np.where(np.equal.outer(labels, SUBTYPE_CLASS), SUBTYPE_SHARE.T[groups], 0).cumsum(1)
    subtypes = (lesion_rng.random((n, 1)) * cdf[:, -1:] >= cdf).sum(1)
    truth = {"labels": labels, "groups": groups, "subtypes": subtypes}
    p = {k: a[lesion_of] for k, a in (truth | _draw_lesions(lesion_rng, **truth)).items()}
    return lesion_of, p | _draw_views(view_rng, p["groups"], np.broadcast_to(ring, 4)[p["labels"]])


def _photograph(p, size, noise_rng):
    """Paint and develop everything in p, a few pictures at a time: uint8 (N, 3, size, size)."""
    if not 16 <= size <= 128:
        raise ValueError(f"size must be 16 to 128 pixels, got {size}")
    images = np.empty((len(p["labels"]), 3, size, size), np.uint8)
    fine = size * (2 if size <= 64 else 1)                      # painted finer, then averaged
    step = max(1, CHUNK // fine ** 2)
    for i in range(0, len(images), step):
        part = {k: a[i:i + step] for k, a in p.items()}
        images[i:i + step] = _develop(_paint(part, fine), part, size, noise_rng)
    return images


def _draw_lesions(rng, labels, groups, subtypes):
    """The parameters of n lesions and the skin below them, a dict of float32 arrays (n, ...)."""
    n, dark = len(labels), groups / 5
    r = dict(zip(COLUMNS, RECIPES[subtypes].T))
    spread = lambda sigma, *shape: np.exp(sigma * rng.standard_normal((n, *shape)))     # around 1
    atypia = rng.beta(7 * r["atypia"], 7 * (1 - r["atypia"]))    # wide: some nevi look worse than
    p = {"atypia": atypia, "radius": r["radius"] * spread(.18),  # some melanomas
         "sharp": np.clip(r["sharp"] * spread(.3), .1, 1),
         "melanin": _melanin(subtypes, groups) * spread(.30),
         "blood": r["blood"] * spread(.35), "bleach": r["bleach"] * spread(.3)}
    for name in COLUMNS[6:]:
        # What marks a melanoma's disorder shows up more often the more atypical a lesion is.
        chance = r[name] * (.3 + 1.2 * atypia if name in ("veil", "regression") else 1)
        p[name] = (rng.random(n) < chance) * rng.uniform(.45, 1, n)
    p["fourier"] = rng.standard_normal((n, 8)) * (.03 + .20 * atypia[:, None])
    p["fourier"] /= np.arange(1, 9) ** .8
    p["fourier_phase"] = rng.uniform(0, 2 * np.pi, (n, 8))
    p["stretch"] = np.exp(rng.normal(0, .15, n))
    p["lean"] = rng.standard_normal((n, 2)) * (.1 + .7 * atypia[:, None])    # colour gradient
    for name, low, high in (("blotch", 2, 6), ("mottle", 6, 14)):    # textures of 5 waves
        angle, f = rng.uniform(0, 2 * np.pi, (n, 5)), rng.uniform(low, high, (n, 5))
        p[name] = np.stack([f * np.cos(angle), f * np.sin(angle), rng.uniform(0, 6.3, (n, 5))], 2)
    p["net_angle"], p["net_period"] = rng.uniform(0, np.pi, n), rng.uniform(.19, .27, n)
    p["ridge_angle"], p["ridge_period"] = rng.uniform(0, np.pi, n), rng.uniform(.24, .32, n)
    p["acral"] = np.isin(subtypes, ACRAL).astype(float)
    disc = rng.standard_normal((n, 40, 2))      # places for 40 spots, even over a disc
    disc *= np.sqrt(rng.random((n, 40, 1))) / np.linalg.norm(disc, axis=2, keepdims=True)
    p["spots"] = disc * p["radius"][:, None, None] * .85
    p["spot_size"] = spread(.25, 40)
    p["freckle_at"] = rng.uniform(-1.4, 1.4, (n, 10, 2))
    p["vessel_lines"] = _draw_trees(rng, n, p["radius"])
    # Palms and soles keep little melanin on every skin type.
    p["skin_melanin"] = SKIN_MELANIN[groups] * spread(.13) * (1 - .5 * p["acral"] * dark)
    p["skin_net"] = SKIN_NET[groups] * spread(.3) * (1 - p["acral"])
    p["skin_blood"] = SKIN_BLOOD[groups] * spread(.25)
    p["freckles"] = (rng.random(n) < SKIN_FRECKLES[groups]) * rng.uniform(.3, .8, n)
    return {name: np.asarray(a, np.float32) for name, a in p.items()}


def _melanin(subtypes, groups):
    """Nevi are darker on darker skin (Zalaudek et al. 2007), Spitz nevi pink on light skin."""
    melanin, darker = RECIPES[subtypes, COLUMNS.index("melanin")], .9 * (groups / 5)
    return melanin * (1 + darker) + np.where(subtypes == SPITZ, darker, 0)


def _draw_trees(rng, n, radius):
    """Arborising vessels: two trunks and five branches, (n, 7, 6) as _strokes takes them."""
    x, y, angle, length, bend, width = np.zeros((6, n, 7))
    side = rng.uniform(0, 2 * np.pi, (n, 1)) + rng.uniform(.7, 2.5, (n, 2)) * (0, 1)
    start = rng.uniform(.75, 1, (n, 2)) * radius[:, None]
    x[:, :2], y[:, :2] = start * np.cos(side), start * np.sin(side)
    angle[:, :2] = side + np.pi + rng.normal(0, .45, (n, 2))       # inwards, past the middle
    length[:, :2], width[:, :2] = rng.uniform(.9, 1.6, (n, 2)) * radius[:, None], .040
    bend[:, :2] = rng.normal(0, .35, (n, 2))
    for j in range(2, 7):                              # a branch leaves its trunk at share `at`
        trunk, at = j % 2, rng.uniform(.2, .8, n) * length[:, j % 2]
        c, s, off = np.cos(angle[:, trunk]), np.sin(angle[:, trunk]), bend[:, trunk] * at ** 2
        x[:, j], y[:, j] = x[:, trunk] + c * at - s * off, y[:, trunk] + s * at + c * off
        angle[:, j] = angle[:, trunk] + rng.choice((-1, 1), n) * rng.uniform(.4, .9, n)
        length[:, j], width[:, j] = rng.uniform(.4, .8, n) * radius, .026
        bend[:, j] = rng.normal(0, .5, n)
    return np.stack([x, y, angle, length, bend, width], 2)


def _draw_views(rng, groups, ring):
    """How each picture was taken: n sets of pose, hairs, light, blur, noise; float32 (n, ...)."""
    n, hairs, dark = len(groups), 4, groups[:, None] / 5
    v = {"turn": rng.uniform(0, 2 * np.pi, n), "shift": rng.normal(0, .10, (n, 2)),
         "zoom": np.exp(rng.normal(0, .12, n)), "flip": rng.choice((-1, 1), n)}
    angle = rng.uniform(0, 2 * np.pi, (n, 1)) + rng.normal(0, .5, (n, hairs))    # hairs lie one way
    x, y = rng.uniform(-1, 1, (2, n, hairs)) - 1.0 * np.stack([np.cos(angle), np.sin(angle)])
    curl = rng.normal(0, 1, (n, hairs)) * (.15 + .35 * dark)           # curlier on dark skin
    v["hair_lines"] = np.stack([x, y, angle, rng.uniform(.8, 2.2, (n, hairs)), curl,
                                np.full((n, hairs), .028)], 2)
    v["hair"] = (rng.random(n) < .30) * rng.uniform(.4, .9, n)
    v["hair_dark"] = np.clip(dark[:, 0] + rng.uniform(.2, .8, n), 0, 1)
    v["light"] = rng.normal(0, .07, (n, 2))
    v["exposure"] = np.exp(rng.normal(0, .07, (n, 1)) + rng.normal(0, .025, (n, 3)))
    v["vignette"] = rng.uniform(.02, .20, n)
    v["tube"] = np.where(rng.random(n) < ring, rng.uniform(1.08, 1.25, n), 9)   # the scope's ring
    v["blur"], v["noise"] = rng.uniform(0, 1, n), rng.uniform(.010, .028, n)
    return {name: np.asarray(a, np.float32) for name, a in v.items()}


# ---- painting: each function returns one map (B, H, W) -----------------------------------------
def _col(a):
    """(B,) as (B, 1, 1), to meet a map."""
    return a[:, None, None]


def _step(x):
    """A soft step from 0 to 1 around x = 0."""
    return .5 + .5 * np.tanh(x)


def _waves(u, v, waves):
    """A smooth random texture about 0, mostly in -1..1: a sum of plane waves. waves: (B, K, 3)."""
    out = np.zeros_like(u)
    for k in range(waves.shape[1]):
        out += np.sin(_col(waves[:, k, 0]) * u + _col(waves[:, k, 1]) * v + _col(waves[:, k, 2]))
    return out * np.float32(waves.shape[1] ** -.5)


def _spots(u, v, strength, at, size):
    """Round spots. strength: (B,), rows of 0 cost nothing; at: (B, n, 2); size: (B, n) radii."""
    out, rows = np.zeros_like(u), np.flatnonzero(strength)
    uu, vv = u[rows], v[rows]
    for j in range(at.shape[1]):
        d2 = ((uu - _col(at[rows, j, 0])) ** 2 + (vv - _col(at[rows, j, 1])) ** 2)
        out[rows] += np.exp(-(d2 / _col(size[rows, j] ** 2)) ** 2)
    return np.minimum(out, 1) * _col(strength)


def _strokes(u, v, strength, lines, pixel):
    """Bent lines. lines: (B, n, 6) start x, y, angle, length, bend, width; strength: as above."""
    out, rows = np.zeros_like(u), np.flatnonzero(strength)
    uu, vv = u[rows], v[rows]
    for j in range(lines.shape[1]):
        x, y, angle, length, bend, width = (_col(a) for a in lines[rows, j].T)
        c, s, du, dv = np.cos(angle), np.sin(angle), uu - x, vv - y
        along, across = c * du + s * dv, c * dv - s * du
        taper = width * (1.1 - .6 * np.clip(along / length, 0, 1))
        drawn = np.maximum(taper, .8 * pixel)          # thinner than a pixel: paler, not thinner
        ink = np.exp(-((across - bend * along ** 2) / drawn) ** 2) * (taper / drawn)
        ink *= _step(along / .05) * _step((length - along) / .05)
        out[rows] = np.maximum(out[rows], ink)
    return out * _col(strength)


def _honeycomb(u, v, angle, period, warps):
    """A net, 1 on a line, 0 in a hole: three gratings 60 degrees apart, bent by warps (B, H, W)."""
    total = .5 * warps[0]
    for k, warp in enumerate(warps):
        a, f = angle + k * np.pi / 3, 6.28 / period
        total = total + np.cos(_col(f * np.cos(a)) * u + _col(f * np.sin(a)) * v + warp)
    return _step(-1.5 * (total + .1))


def _outline(u, v, p):
    """The lesion: 1 inside, 0 outside; and depth, 0 in the middle to 1 on the border. The border
    r(angle) is a Fourier series: its first terms are asymmetry, its last ones notches."""
    stretch = _col(np.sqrt(p["stretch"]))
    uu, vv = u * stretch, v / stretch
    r, theta = np.hypot(uu, vv), np.arctan2(vv, uu)
    border = np.ones_like(u)
    for k in range(8):
        phase = _col(p["fourier_phase"][:, k])
        border += _col(p["fourier"][:, k]) * np.cos((k + 1) * theta + phase)
    border = _col(p["radius"]) * np.maximum(border, .3)
    return _step((border - r) / _col(.16 - .12 * p["sharp"])), r / border


def _paint(p, size):
    """Pictures before the camera: reflectance (B, 3, size, size) float32, about 0..1."""
    pixel = np.float32(2 / size)
    y, x = np.meshgrid(*[(np.arange(size, dtype=np.float32) + .5) * pixel - 1] * 2, indexing="ij")
    c, s = _col(np.cos(p["turn"]) * p["zoom"]), _col(np.sin(p["turn"]) * p["zoom"])
    dx, dy = (x - _col(p["shift"][:, 0])) * _col(p["flip"]), y - _col(p["shift"][:, 1])
    u, v = c * dx - s * dy, s * dx + c * dy                     # the lesion's own coordinates
    blotch, mottle = _waves(u, v, p["blotch"]), _waves(u, v, p["mottle"])
    inside, depth = _outline(u + .02 * mottle, v + .02 * blotch, p)
    # the bare skin: a follicular net, freckles, blotches of redness
    net, rows = np.zeros_like(u), np.flatnonzero(p["skin_net"])
    net[rows] = _honeycomb(u[rows], v[rows], p["net_angle"][rows] + .4, np.full(len(rows), .30),
                           (1.2 * blotch[rows], .9 * mottle[rows], -.9 * mottle[rows])) - .5
    melanin = _col(p["skin_melanin"]) * (1 + .05 * mottle + 1.3 * _col(p["skin_net"]) * net)
    melanin += .35 * _spots(u, v, p["freckles"], p["freckle_at"], .08 * p["spot_size"][:, :10])
    blood = _col(p["skin_blood"]) * (1 + .18 * blotch)
    melanin *= 1 - np.minimum(_col(p["bleach"]), .9) * inside
    pigment = _pigment(u, v, p, inside, depth, blotch, mottle)
    # the print of palm and sole: ridges and, between them, thinner furrows
    ridge, furrow, rows = np.zeros_like(u), np.zeros_like(u), np.flatnonzero(p["acral"])
    angle, k = p["ridge_angle"][rows], 6.28 / p["ridge_period"][rows]
    wave = np.cos(_col(k * np.cos(angle)) * u[rows] + _col(k * np.sin(angle)) * v[rows]
                  + .5 * blotch[rows])
    ridge[rows], furrow[rows] = _step(2.5 * (wave + .25)), _step(3.0 * (-wave - .55))
    melanin += furrow * (.10 + .25 * melanin)
    pigment *= (1 + _col(p["ridges"]) * (1.3 * ridge - .85)
                + _col(p["furrows"]) * (1.9 * furrow - .75))

    def spots(name, first, last, size):     # a structure at places first..last, about this large
        part = slice(first, last)
        return _spots(u, v, p[name], p["spots"][:, part], size * p["spot_size"][:, part])
    radius = p["radius"][:, None]
    red = _strokes(u, v, p["vessels"], p["vessel_lines"], pixel) + spots("dotted", 0, 14, .055)
    blood += inside * (_col(p["blood"]) * (1 + .35 * blotch) + .9 * red)
    cysts = spots("cysts", 0, 7, .06)
    dark = spots("globules", 14, 24, .065) + spots("cysts", 24, 28, .06)   # comedo-like openings
    pigment += inside * dark * (.5 + .5 * _col(p["melanin"]))
    veil, scar = spots("veil", 34, 35, .65 * radius), spots("regression", 35, 36, .5 * radius)
    pigment *= 1 - .75 * np.minimum(scar + cysts + .4 * veil, 1)
    deep = inside * np.minimum(.9 * spots("nests", 28, 34, .13) + .75 * veil + .25 * scar, .95)
    white = inside * (.22 * cysts + .10 * scar + .07 * veil)
    image = reflect(melanin + pigment, blood, deep, white)
    hair = _strokes(x + 0 * u, y + 0 * u, p["hair"], p["hair_lines"], pixel)[:, None]
    tint = np.array((.42, .28, .17), np.float32) * (1 - .85 * p["hair_dark"][:, None])
    return image * (1 - hair) + tint[:, :, None, None] * hair


def _pigment(u, v, p, inside, depth, blotch, mottle):
    """Melanin of the lesion: patchy and leaning to one side with atypia, a net where it has one."""
    lean = (_col(p["lean"][:, 0]) * u + _col(p["lean"][:, 1]) * v) / _col(p["radius"])
    atypia = _col(p["atypia"])
    tone = 1 + .6 * atypia * blotch + .25 * atypia * mottle + .4 * lean - .25 * (depth - .5)
    rows = np.flatnonzero(p["network"])
    bend = .4 + 1.6 * atypia[rows]
    net = _honeycomb(u[rows], v[rows], p["net_angle"][rows], p["net_period"][rows],
                     (bend * blotch[rows], bend * mottle[rows], -bend * mottle[rows]))
    strength = _col(p["network"][rows]) * np.clip(1 - atypia[rows] * (.5 - blotch[rows]), .1, 1)
    tone[rows] *= 1 + strength * (1.1 * net - .55)
    return inside * _col(p["melanin"]) * np.maximum(tone, .1)


def reflect(melanin, blood, deep, white):
    """Optical densities to colour: (B, H, W) each, to (B, 3, H, W).
        R = surface + T * dermis + (1 - T) * glow + white,    T = exp(-melanin)
        dermis = (1 - deep) * DERMIS * exp(-blood) + deep * DEEP
    T dims blood and deep pigment alike on dark skin, but not surface and glow: contrast falls."""
    planes = []
    for ch in range(3):
        through = np.exp(-MELANIN_RGB[ch] * melanin)
        dermis = DERMIS_RGB[ch] * np.exp(-BLOOD_RGB[ch] * blood)
        dermis += deep * (DEEP_RGB[ch] - dermis)
        planes.append(SURFACE + MELANIN_GLOW[ch] + through * (dermis - MELANIN_GLOW[ch])
                      + white * (.4 + .6 * through))
    return np.stack(planes, 1)


def _develop(image, p, size, rng):
    """The camera: light, lens, pixels, noise. (B, 3, H, W) to uint8 (B, 3, size, size)."""
    fine = image.shape[-1]
    at = (np.arange(fine, dtype=np.float32) + .5) * np.float32(2 / fine) - 1
    y, x = at[:, None], at[None, :]
    r2 = x ** 2 + y ** 2
    light = 1 + _col(p["light"][:, 0]) * x + _col(p["light"][:, 1]) * y
    light -= _col(p["vignette"]) * r2 / 2
    light *= _step((_col(p["tube"]) - np.sqrt(r2)) / .04) * .95 + .05
    image = image * light[:, None] * p["exposure"][:, :, None, None]
    for axis in (2, 3):                                         # a 3-tap blur each way
        lo, hi = (image.take(np.clip(np.arange(fine) + k, 0, fine - 1), axis) for k in (-1, 1))
        image = image + .25 * p["blur"][:, None, None, None] * (lo + hi - 2 * image)
    f = fine // size
    image = image.reshape(len(image), 3, size, f, size, f).mean((3, 5))
    sigma = p["noise"][:, None, None, None] * (.35 + .65 * image)       # more noise in more light
    image += sigma * rng.standard_normal(image.shape, np.float32)
    return (np.clip(image, 0, 1) * 255 + .5).astype(np.uint8)
