"""The truth that a counterfactual is after: the phantom draws a lesion again on another skin."""
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from datasets import phantom


def carry(count: int, size: int, seed: int, index, groups, shot: int = 0) -> np.ndarray:
    """Pictures `index` of draw(count, size, seed) as they were on skin of the types `groups`, both
    (N,): what a perfect generator would make of a parent. Returns uint8 (N, 3, size, size).
    The lesion keeps all but what skin does to it (nevi are darker on darker skin). Skin and sensor
    noise are drawn anew, by random stream `shot`."""
    _, p = phantom._parameters(count, seed, *phantom.draw.__defaults__)
    p = {k: a[index] for k, a in p.items()}
    rng = np.random.default_rng([seed, 3 + shot])
    own, p["groups"] = p["groups"], np.asarray(groups)
    fresh = phantom._draw_lesions(rng, p["labels"], p["groups"], p["subtypes"])
    p |= {k: fresh[k] for k in ("skin_melanin", "skin_net", "skin_blood", "freckles")}
    there, here = (phantom._melanin(p["subtypes"], groups) for groups in (p["groups"], own))
    p["melanin"] = (p["melanin"] * (there / here)).astype(np.float32)
    return phantom._photograph(p, size, rng)
