"""What evaluate.compare found, in sentences."""
from evaluate import COMPARED

WORDS = {"worse": "worse than", "better": "better than", "equal": "equal within the margin to",
         "not settled": "not settled against"}


def verdict(found: dict) -> str:
    """Of evaluate.score: the arm in question against all controls, on all test images and in the
    worst group, and what the intervals leave out."""
    asked = next((r["arm"] for r in found["comparisons"]), "real")
    rows = [r for r in found["comparisons"] if r["arm"] == asked and not r["optimistic"]]
    if not rows:
        return "no verdict: the run has no control arm"
    said = f"{asked} is {conclusion(rows, 'all', 'balanced_accuracy')}"
    if found["worst_group"] is not None:
        said += f"; in the worst group, {found['worst_group']}, it is " + "; it is ".join(
            conclusion(rows, "worst_group", metric) for metric in COMPARED["worst_group"])
    if found["arms"][asked]["seeds"] == 1:      # what evaluate.interval leaves out
        said += "; one seed, so the spread between trainings is not in the intervals"
    return said


def conclusion(rows: list[dict], subset: str, metric: str) -> str:
    """The outcome against each control, and the figures of the one that least is gained over."""
    rows = [r for r in rows if (r["subset"], r["metric"]) == (subset, metric)]
    measure = metric.replace("_", " ")
    if not rows or any(r["low"] is None for r in rows):
        return f"not judged by {measure}: n too small"
    kinds = {kind: [r["against"] for r in rows if r["outcome"] == kind] for kind in WORDS}
    said = "; ".join(f"{WORDS[kind]} {', '.join(names)}" for kind, names in kinds.items() if names)
    least = min(rows, key=lambda r: r["value"])
    value, low, high = (100 * least[key] for key in ("value", "low", "high"))
    return (f"{said}: {value:+.1f} points of {measure} over {least['against']} "
            f"(95 % interval {low:+.1f} to {high:+.1f}"
            + f", of all {len(rows)} at once" * (len(rows) > 1) + ")")
