"""The loop as a whole: a small run, interrupted, resumed; and its parts by brute force."""
import hashlib
import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import data
import ddpm
import loop
from conftest import SMALL, new, set_to
from datasets import phantom
from engine import config as configuration
from engine.augment import to_float
from engine.command import launch
from engine.run import Run, derive, fingerprint
from extras import few_labels, measures, networks, outcome
from guidance import OBJECTIVES, Drawn, Generator, synthesise

HERE = Path(__file__).parents[1]


def read(run, name="results.json"):
    return json.loads((run / name).read_text())


def said(capsys):
    """The lines by which the program says what was wrong."""
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("loop.py: ")]


# ---- the whole -----------------------------------------------------------------------------------

def test_the_run_folder_holds_what_it_should(tiny):
    results = read(tiny)
    assert list(results["arms"]) == ["real", "replay", "recolour", "random", "guided"]
    added = {results["arms"][arm]["added"] for arm in results["arms"] if arm != "real"}
    assert len(added) == 1 and results["arms"]["real"]["added"] == 0      # as many in every arm
    for arm in results["arms"].values():
        assert arm["seeds"] == 2 and not arm["optimistic"]
        assert {"accuracy", "sensitivity", "specificity", "balanced_accuracy", "auroc",
                "sensitivity_at_90"} <= set(arm["test"]["all"])
        assert set(arm["test"]) == {"all", "hard", "worst_group"}
        assert len(arm["per_class"]) == 4 and len(arm["per_group"]) == 6
    assert results["splits"]["train"]["images"] == 160 and len(results["rounds"]) == 1
    assert configuration.load(tiny / "config.yaml").as_dict() == results["config"]
    for name in ("data", "children", "types"):
        assert Image.open(tiny / f"pictures/{name}.png").width > 50
    for event in map(json.loads, (tiny / "log.jsonl").read_text().splitlines()):
        assert {"time", "event"} <= set(event)
    assert "guided" in (tiny / "report.md").read_text()
    assert "<svg" in (tiny / "report.html").read_text()


def test_results_hold_what_is_printed_and_little_more(tiny):
    assert (tiny / "results.json").stat().st_size < 60_000


class Killed(BaseException):
    """Nothing in the program catches it, as nothing catches kill -9."""


def often(run):
    """The experiment, with a checkpoint every 20 steps instead of every 30 seconds."""
    loop.experiment(Run(run.folder, run.config, seconds=0))


def stages(folder):
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return Counter(line["stage"] for line in lines if line["event"] == "stage")


def test_a_run_killed_anywhere_and_resumed_gives_the_same_bytes(tiny, tmp_path, monkeypatch):
    """Killed before and after the rename of files of every stage; before it, the temporary file
    stays behind. benchmarks/interrupt.py does it with kill -9 at random moments."""
    rename, kills = os.replace, [
        ("ddpm.partial.pt", True), ("ddpm.pt", False), ("mined_1.pt", False),
        ("guided_1_128.pt", False), ("student_random_1.pt", False), ("predictions.npz", True),
        (".png", True), ("synthetic.csv", False), ("results.json", False)]

    def replace(source, target):
        if kills and Path(target).name.endswith(kills[0][0]):
            if kills.pop(0)[1]:
                rename(source, target)
            raise Killed
        rename(source, target)
    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(SMALL)
    arguments, folder = ["--config", "tiny.yaml"], Path("runs/tiny")
    while kills:
        with pytest.raises(Killed):
            launch(often, {}, arguments)
        arguments = ["--resume", "runs/tiny"]
        if len(kills) == 5:             # in the middle of a synthesis: what is done stays done
            part = (folder / "checkpoints/guided_1_0.pt").stat()
            assert not (folder / "checkpoints/guided_1_128.pt").exists()
    assert launch(often, {}, arguments) == 0
    now = (folder / "checkpoints/guided_1_0.pt").stat()
    assert (now.st_ino, now.st_mtime_ns) == (part.st_ino, part.st_mtime_ns)
    assert set(stages(folder).values()) == {1} and stages(folder) == stages(tiny)
    kept = {p.name for p in (folder / "checkpoints").glob("*.pt")}
    assert kept == {p.name for p in (tiny / "checkpoints").glob("*.pt")}
    assert {"guided_1_0.pt", "guided_1_128.pt", "mined_1.pt", "judge.pt"} < kept
    files = sorted(p.relative_to(tiny) for p in tiny.rglob("*") if p.suffix in (".png", ".csv"))
    assert len(files) > 20
    for name in [*files, Path("results.json"), Path("config.yaml"), Path("predictions.npz")]:
        assert (tiny / name).read_bytes() == (folder / name).read_bytes(), name


def test_folders_without_groups_all_arms_two_rounds_another_sampler_and_the_leak_shown(tmp_path):
    drawn = phantom.draw(200, 16, 3)
    for i, (image, label) in enumerate(zip(drawn["images"], drawn["labels"])):
        path = tmp_path / "photos" / phantom.CLASS_NAMES[label] / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.transpose(1, 2, 0)).save(path)
    folder = new(tmp_path, "data.kind=folder", f"data.root={tmp_path / 'photos'}",
                 "data.malignant=[mel, bcc]", "data.val_fraction=0.2", "ddpm.steps=20",
                 "classifier.steps=12", "classifier.jitter=[0.1, 0.5]", "guidance.start=parent",
                 "guidance.strength=0.3", "guidance.sampler=dpm",
                 "guidance.objectives.hardness=0.1", "guidance.classifier_free=1.5",
                 "loop.rounds=2", "loop.seeds=1", "loop.arms=[all, leaked]", "loop.added=0.2")
    results = read(folder)
    assert list(results["arms"]) == ["real", "replay", "recolour", "recolour_random", "noise",
                                     "noise_hard", "random", "guided", "leaked"]
    assert [a for a in results["arms"] if results["arms"][a]["optimistic"]] == ["leaked"]
    made = {arm for arm in results["arms"] if results["arms"][arm]["added"]}
    assert len(made) == 8 and len(results["rounds"]) == 2
    for entry in results["rounds"]:
        assert set(entry["balanced accuracy on val"]) == made
        assert set(entry["children wrong"]) == made - {"leaked"}
        assert entry["parents wrong"]["replay"] == entry["children wrong"]["replay"]
    assert "rounds_children_wrong" in (folder / "report.md").read_text()
    assert "optimistic" in (folder / "report.md").read_text()
    assert results["jitter"]["chosen"] in (0.1, 0.5)
    assert {"crossfit_2_1", "noise_2_0", "leaked_1_0", "jitter"} <= {
        path.stem for path in (folder / "checkpoints").glob("*.pt")}
    holds_no_place_or_name(folder, str(tmp_path))


def holds_no_place_or_name(folder, place):
    """But for its config, the run folder says nothing of where it was made."""
    assert place in (folder / "config.yaml").read_text()
    for path in (p for p in folder.rglob("*") if p.is_file() and p.name != "config.yaml"):
        content = path.read_bytes()
        if path.suffix == ".npz":
            with np.load(path) as arrays:
                content = "".join(str(arrays[k].tolist()) for k in arrays.files
                                  if arrays[k].dtype.kind == "U").encode()
        for secret in (place, str(HERE), f"{Path.home()}/"):
            assert secret.encode() not in content, (path, secret)


def test_a_run_of_real_images_alone_makes_none(tmp_path):
    run = new(tmp_path, "loop.arms=[real]", "loop.seeds=1", "classifier.steps=10")
    assert not (run / "synthetic").exists()
    assert {path.stem for path in (run / "checkpoints").glob("*.pt")} == {
        "judge", "crossfit_1_0", "crossfit_1_1", "student_real_0"}
    assert "hard cases" in (run / "report.md").read_text().lower()


def test_a_run_by_ancestral_sampling_ends_in_its_report(tmp_path):
    run = new(tmp_path, "loop.arms=[real, guided]", "loop.seeds=1", "guidance.start=parent",
              "guidance.sampler=ddpm", "classifier.steps=12")
    assert read(run)["arms"]["guided"]["added"] > 0 and (run / "report.md").exists()


def test_determinism_is_asked_of_torch_where_the_config_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(SMALL)
    asked = []
    try:
        for value in ("false", "true"):
            assert launch(lambda run: asked.append(torch.are_deterministic_algorithms_enabled()),
                          {}, ["--config", "tiny.yaml", "--set", f"loop.deterministic={value}"]
                          ) == 0
    finally:
        torch.use_deterministic_algorithms(False)
    assert asked == [False, True]


# ---- the table of arms ---------------------------------------------------------------------------

def test_random_differs_from_guided_in_parents_and_in_hardness_guidance_alone():
    random, guided = loop.ARMS["random"], loop.ARMS["guided"]
    assert random == guided._replace(parents="random", hardness=False)
    assert (guided.parents, guided.hardness) == ("hard", True)
    assert loop.ARMS["leaked"] == guided._replace(parents="test")


@pytest.fixture
def more_arms():
    """The table, put back afterwards."""
    before = dict(loop.ARMS)
    yield loop.ARMS
    loop.ARMS.clear()
    loop.ARMS.update(before)


def mirrored(kit, parents, targets, objectives):
    return Drawn(parents.images[:, :, :, ::-1].copy())


def test_an_arm_is_one_line_of_the_table_and_one_function(more_arms, tmp_path):
    more_arms["mirrored"] = loop.Arm(mirrored, filtered=False)
    run = new(tmp_path, "loop.arms=[real, replay, mirrored]", "loop.seeds=1", "loop.share=0.5",
              "classifier.steps=10")
    results = read(run)
    assert list(results["arms"]) == ["real", "replay", "mirrored"]
    added = results["arms"]["mirrored"]["added"]
    assert 0 < added == results["arms"]["replay"]["added"]
    assert results["filter"]["mirrored"]["kept"] >= added
    assert any(c["arm"] == "mirrored" and c["against"] == "real" for c in results["comparisons"])
    assert "mirrored" in (run / "report.md").read_text()
    names = {path.stem for path in (run / "checkpoints").glob("*.pt")}
    assert "student_mirrored_0" in names
    with np.load(run / "predictions.npz") as p:
        assert not np.array_equal(p["test_probs_mirrored"], p["test_probs_replay"])


@pytest.mark.parametrize("child", [
    mirrored, lambda kit, parents, targets, objectives:
    Drawn(255 - parents.images, np.zeros(len(parents), bool), len(parents))],
    ids=["near-copies", "not finite"])
def test_an_arm_that_has_no_images_ends_the_run_in_one_line(child, more_arms, tmp_path, capsys):
    more_arms["empty"] = loop.Arm(child)
    run = new(tmp_path, "loop.arms=[real, empty]", "classifier.steps=3", status=2)
    [line] = said(capsys)
    assert "arm empty: no image passed the filter" in line and "'kept': 0" in line
    assert not (run / "results.json").exists()


# ---- parts ---------------------------------------------------------------------------------------

@pytest.fixture
def generator(run, train):
    """An untrained one, its weights away from where they start: there the last layer is 0."""
    unet = networks.new_unet(run, train, 1)
    with torch.no_grad():
        for i, weight in enumerate(unet.parameters()):
            weight += 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(i))
    guide = networks.new_resnet(run, train, 1, noise_levels=run.config.ddpm.T)
    schedule = ddpm.Schedule(run.config.ddpm.T)
    return Generator(unet.eval(), guide.eval(), schedule, "v", False)


class Knows(nn.Module):
    """A judge that knows every label: that of the nearest image told."""

    def __init__(self, images, labels):
        super().__init__()
        self.x, self.labels = to_float(torch.tensor(images)).flatten(1), torch.tensor(labels)

    def forward(self, x):
        nearest = torch.cdist(x.flatten(1), self.x).argmin(1)
        return 9.0 * nn.functional.one_hot(self.labels[nearest], 4)


class Brightness(nn.Module):
    """A student that is quite sure of class 0, the more so the brighter the image."""

    def forward(self, x):
        light = 2 + x.mean((1, 2, 3))
        return torch.stack([light, *[0 * light] * 3], 1)


def noisy(shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def test_every_arm_s_images_come_through_make(run, splits, train, generator):
    students = [networks.new_resnet(run, train, s).eval() for s in (1, 2)]
    keep = loop.Filter(run, students[0], train, splits)
    given = splits | {"external": splits["val"].subset(np.arange(30))}
    hard = np.arange(0, 60, 5)
    mined = hard, data.other_groups(train.subset(hard), 0)
    for name, arm in loop.ARMS.items():
        if arm.child is None:
            continue
        kit = loop.make_kit(run, name, 1, train, generator, students)
        source, chosen, targets = loop.parents_for(kit, arm, mined, given, students)
        found, parents = loop.make(kit, arm, keep, source, chosen, targets), source.subset(chosen)
        assert source is {"external": given["external"], "test": splits["test"]}.get(
            arm.parents, train), name
        assert isinstance(found, loop.Candidates) and len(found.children) == len(chosen) > 0
        for key in ("labels", "folds", "sources", "lesions"):       # of its parent: so no leak
            assert np.array_equal(getattr(found.children, key), getattr(parents, key)), name
        assert np.array_equal(found.children.groups,
                              np.where(targets < 0, parents.groups, targets))
        assert len(found.judge) == len(found.distance) == len(found.rejected_by) == len(chosen)
        if arm.child is not loop.copied:
            assert not np.array_equal(found.children.images, parents.images), name


def test_objectives_and_sampler_of_the_config_reach_the_children(run, train, generator):
    """Every one that the tables name; and an arm without hardness guidance has none."""
    students, seen = [Brightness().eval()], {}
    parents = train.subset(np.flatnonzero(train.labels == 0)[:6])

    def drawn(objectives, **settings):
        given = set_to(run, "guidance", start="parent", **settings)
        kit = loop.Kit(given, f"x{len(seen)}", 1, train, generator, students)
        seen[len(seen)] = loop.from_model(kit, parents, parents.groups, objectives).images
        return seen[len(seen) - 1].tobytes()
    off = dict.fromkeys(OBJECTIVES, 0.0)
    samplers = {drawn(off, sampler=name) for name in ddpm.SAMPLERS}
    assert len(samplers) == len(ddpm.SAMPLERS) == 3 and drawn({}, sampler="ddim") in samplers
    assert len({drawn(off | {name: 5.0}) for name in OBJECTIVES} | {drawn(off)}) == 3
    for name in run.config.guidance.objectives:
        told = []
        given = set_to(run, "guidance", objectives={**run.config.guidance.objectives, name: 7.0})
        for arm in (loop.ARMS["guided"], loop.ARMS["random"]):
            arm = arm._replace(child=lambda *args: told.append(args[3]) or Drawn(args[1].images))
            kit = loop.Kit(given, "x", 1, train, None, students)
            loop.make(kit, arm, lambda *args: (0, 0, 0), train, np.arange(3), np.full(3, -1))
        assert told[0] == given.config.guidance.objectives and told[0][name] == 7
        assert told[1] == told[0] | {"hardness": 0.0}


def test_images_from_elsewhere_that_are_ours_are_dropped(run, splits, train):
    """Whoever made them may have copied any split; the judge agrees with everything here."""
    own = [splits[name].images[:6] for name in ("train", "val", "test")]
    given = train.subset(np.arange(24))
    given = loop.replace(given, images=np.concatenate([*(x[:, :, ::-1] for x in own),
                                                       noisy(own[0].shape)]))
    keep = loop.Filter(run, Knows(given.images, given.labels), train, splits)
    judge, distance, why = keep(loop.ARMS["external"], given, True)
    assert (why[:18] == loop.REASONS.index("copy")).all() and (why[18:] == 0).all()
    assert np.allclose(distance[:6], 0, atol=1e-3) and (judge > 0.99).all()
    _, _, why = keep(loop.ARMS["noise"], given, True)       # ours have not seen val and test
    assert (why[:6] == loop.REASONS.index("copy")).all() and (why[6:] == 0).all()
    _, _, why = keep(loop.ARMS["noise"], given, np.arange(24) != 23)
    assert np.flatnonzero(why)[6:].tolist() == [23] and loop.REASONS[why[23]] == "nonfinite"
    other = loop.replace(given, labels=(given.labels + 1) % 4)
    assert (keep(loop.ARMS["noise"], other, True)[2] == loop.REASONS.index("judge")).all()
    for name in ("replay", "recolour", "recolour_random"):  # their label is the photograph's
        assert not keep(loop.ARMS[name], other, True)[2].any()


def test_near_copies_of_training_images_are_never_written(run, splits, train):
    """Every other image that is made is its parent, one grey level off and turned."""
    def half_copied(kit, parents, targets, objectives):
        images = noisy(parents.images.shape)
        images[::2] = np.rot90(parents.images[::2], axes=(2, 3)).clip(0, 254) + 1
        made.append(images)
        return Drawn(images)
    made, arm = [], loop.Arm(half_copied)
    hard = np.arange(0, len(train), 3)
    targets = data.other_groups(train.subset(hard), 0)
    kit = loop.Kit(run, "x", 1, train, None, [])
    first = loop.make(kit, arm, lambda *args: (0, 0, 0), train, hard, targets)
    judge = Knows(first.children.images, first.children.labels)         # it agrees with all
    keep = loop.Filter(run, judge, train, splits)
    found = loop.make(kit, arm, keep, train, hard, targets)
    outcome.write_synthetic(run, train, [found], [np.flatnonzero(found.rejected_by == 0)])
    written = [np.asarray(Image.open(p)).transpose(2, 0, 1)
               for p in run.folder.glob("synthetic/*/*.png")]
    dropped = (found.rejected_by == loop.REASONS.index("copy")).sum()
    assert dropped >= len(made[0][::2]) and len(written) == (found.rejected_by == 0).sum() > 20
    assert measures.nearest(np.stack(written), train.images)[0].min() > keep.too_near > 0
    copies = {image.tobytes() for image in made[0][::2]}
    assert not copies & {image.tobytes() for image in written}
    assert len(loop.kept([found, found], 15)) == 30 and loop.kept(None, 15) is None

    about, table = (run.folder / "synthetic" / name for name in ("about.json", "synthetic.csv"))
    about, lines = json.loads(about.read_text()), table.read_text().splitlines()[1:]
    files = [(run.folder / "synthetic" / line.split(",")[0]).read_bytes() for line in lines]
    whole = hashlib.sha256(b"".join(files) + table.read_bytes()).hexdigest()
    assert about["content_sha256"] == whole and about["images"] == len(written)
    assert about["config_and_data"] == run.fingerprint and "by hand" in about["what"]


def test_checkpoints_belong_to_what_files_hold_and_not_to_where_they_lie(tmp_path, config, train):
    def word(section="loop", splits={}, **values):
        return fingerprint(config.replace("data", size=32).replace(section, **values), splits)
    for name in ("a.pth", "b.pth"):
        (tmp_path / name).write_bytes(b"weights")
    first, second = ({"network": "resnet18", "weights": str(tmp_path / name)}
                     for name in ("a.pth", "b.pth"))
    found = word("classifier", **first)
    assert found == word("classifier", **second)
    (tmp_path / "b.pth").write_bytes(b"others")
    assert found != word("classifier", **second)
    assert word() == word("evaluate", draws=101) == word("loop", device="cpu") != word(share=0.2)
    assert len({word(splits={"external": train.subset(np.arange(n))}) for n in (9, 10)}) == 2


def test_no_student_judges_what_it_or_its_child_has_seen(run, train):
    """Whatever stands in the images of fold k and in their children, student k is the same to the
    last bit, and the others are not: so it saw none of them, and no other was spared."""
    run = Run(run.folder, run.config.replace("classifier", steps=3))
    children = train.subset(np.arange(0, len(train), 3))
    spoilt = noisy(train.images.shape)

    def fit(number, k, *which):
        """The weights of the students where the images of fold k of these sets are spoilt."""
        sets = [loop.replace(s, images=np.where((s.folds == k)[:, None, None, None] & (i in which),
                                                spoilt[:len(s)], s.images))
                for i, s in enumerate((train, children))]
        place = run.folder / str(number)
        place.mkdir()
        students, probs = loop.cross_fit(Run(place, run.config), 1, *sets, 0.1)
        return [torch.cat([w.flatten() for w in s.state_dict().values()]) for s in students], probs
    before, probs = fit(0, -1)
    assert np.allclose(probs.sum(1), 1, atol=1e-5) and len(before) == 2
    for number, (k, which) in enumerate([(0, (0, 1)), (1, (0,)), (1, (1,))], 1):
        after, changed = fit(number, k, *which)
        assert [torch.equal(a, b) for a, b in zip(before, after)] == [k == 0, k == 1]
        other = train.folds != k                # judged by those who saw the spoilt ones
        assert not np.array_equal(probs[other], changed[other])
        if 0 not in which:
            assert np.array_equal(probs[~other], changed[~other])


def test_a_share_of_every_batch_is_added_images_and_classes_are_even_in_both(run, train):
    share = run.config.loop.share
    images, weights = loop.mixed(run, train, train.subset(np.arange(30)))
    assert np.isclose(weights[len(train):].sum(), share) and np.isclose(weights.sum(), 1)
    for part in (slice(0, len(train)), slice(len(train), None)):
        of_class = [weights[part][images.labels[part] == c].sum()
                    for c in np.unique(images.labels[part])]
        assert np.allclose(of_class, of_class[0])
    for added in (None, train.subset([])):
        images, alone = loop.mixed(run, train, added)
        assert images is train and np.allclose(alone * (1 - share), weights[:len(train)])
    _, even = loop.mixed(run, train, real="cells")
    cells = data.cells(train)
    of_cell = [even[cells == c].sum() for c in np.unique(cells)]
    groups = [len(np.unique(train.groups[train.labels == c])) for c in range(4)]
    wanted = np.repeat(0.25 / np.array(groups), groups)
    assert np.allclose(of_cell, wanted)


def test_mining_takes_the_wrong_and_the_unsure(run, train):
    run = set_to(run, "loop", margin=0.3)
    probs = np.full((len(train), 4), 0.1, np.float32)
    probs[np.arange(len(train)), train.labels] = 0.7                    # all right ...
    hard = np.arange(0, len(train), 4)
    probs[hard] = 0.25                                                  # ... but these: margin 0
    parents, targets = loop.mine(run, train, probs, 192, None, 1)
    assert len(parents) == 192 and set(parents) == set(hard)
    assert (targets != train.groups[parents]).all() and (targets >= 0).all()
    again = [loop.mine(run, train, probs, 192, None, number)[0].tolist() for number in (1, 2)]
    assert again[0] == parents.tolist() != again[1]
    with pytest.raises(data.DataError, match="loop.margin"):
        probs[hard, train.labels[hard]] = 0.9
        loop.mine(run, train, probs, 192, None, 1)
    given = set_to(run, "guidance", targets="groups")       # the rarest cells, hard or not
    wanted = few_labels.even_parents(train, None, 192, run.seed("even", 1))
    for ours, theirs in zip(loop.mine(given, train, probs, 192, None, 1), wanted):
        assert np.array_equal(ours, theirs)


def test_every_arm_adds_in_each_round_as_many_images_of_each_class_and_group(run, train):
    """By hand: a round of candidates, each arm's with its own losses."""
    rng, makers = np.random.default_rng(0), {
        name: loop.ARMS[name] for name in ("replay", "random", "guided", "external", "leaked")}

    def of(share):
        chosen, none = rng.integers(0, len(train), 300), np.zeros(300)
        why = np.where(rng.random(300) < share, 0, 2)
        return loop.Candidates(train.subset(chosen), chosen, none, none, none, why, 0)
    made = {name: [of(0.2), of(share)]          # the first round is over
            for name, share in zip(makers, (1, 0.7, 0.5, 0.9, 0.8))}
    used = loop.as_many_each(makers, made, 10**6)
    counts = {}
    for name, index in used.items():
        m = made[name][-1]
        assert not m.rejected_by[index].any() and (np.diff(index) > 0).all()
        cells, chosen = data.cells(m.children), set(index)
        counts[name] = Counter(cells[index].tolist())
        for cell in counts[name] if name in ("replay", "random", "guided") else ():
            passed = np.flatnonzero((cells == cell) & (m.rejected_by == 0))     # the first of these
            assert passed[:counts[name][cell]].tolist() == sorted(chosen & set(passed))
            counts["all", name, cell] = len(passed)
    assert counts["replay"] == counts["random"] == counts["guided"] != counts["external"]
    for cell, n in counts["guided"].items():
        assert n == min(counts["all", name, cell] for name in ("replay", "random", "guided"))
    for name in ("external", "leaked"):     # of others' images: of a class as many
        labels = [np.bincount(made[a][-1].children.labels[used[a]]) for a in (name, "guided")]
        assert labels[0].tolist() == labels[1].tolist()

    fewer = loop.as_many_each(makers, made, 40)     # where not all fit, even over the cells
    cells = data.cells(made["guided"][-1].children)[fewer["guided"]]
    assert {len(index) for index in fewer.values()} == {40}
    few, most = Counter(cells.tolist()), max(Counter(cells.tolist()).values())
    assert all(n >= most - 1 or n == counts["guided"][cell] for cell, n in few.items())
    without = {name: arm for name, arm in makers.items() if name not in ("external", "leaked")}
    again = loop.as_many_each(without, made, 40)        # who else runs changes the count at most
    assert all(np.array_equal(again[name], fewer[name]) for name in without)
    added = loop.children_used({"guided": made["guided"]}, [again, fewer])["guided"]
    assert added.sources.tolist() == [
        *made["guided"][0].children.sources[again["guided"]],
        *made["guided"][1].children.sources[fewer["guided"]]]
    made["random"] = [of(0)]
    with pytest.raises(data.DataError, match="arm random: no image passed .*'judge': 300"):
        loop.as_many_each(makers, made, 48)


def test_an_external_image_is_a_candidate_in_one_round_alone(run, train):
    run = set_to(run, "loop", rounds=3)
    rounds = [loop.parents_for(loop.Kit(run, "x", 1, train, None, [], number),
                               loop.ARMS["external"], (np.arange(4), None),
                               {"external": train}, []) for number in (1, 2, 3)]
    assert all(source is train and (targets == -1).all() for source, _, targets in rounds)
    assert sorted(np.concatenate([some for _, some, _ in rounds])) == list(range(len(train)))


def test_a_recoloured_start_keeps_the_recoloured_image_where_little_noise_is_added(
        run, train, generator):
    parents = train.subset(np.arange(40))
    targets, made = data.other_groups(parents, 0), {}
    for start in ("recoloured", "parent"):
        given = set_to(run, "guidance", start=start, strength=0.05, steps=1)
        kit = loop.Kit(given, start, 0, train, generator, [])
        made[start] = loop.from_model(kit, parents, targets, {}).images
    kit = loop.Kit(run, "recolour", 0, train, None, [])
    wanted = loop.recoloured(kit, parents, targets, {}).images

    def off(a, b):
        return np.abs(a.astype(float) - b).mean()
    assert off(parents.images, wanted) > 2 * off(made["recoloured"], wanted)
    assert off(made["parent"], parents.images) < off(made["recoloured"], parents.images)


def test_recolouring_carries_one_flat_skin_to_another(run, train):
    flat = np.zeros_like(train.images)
    skins = np.array([[220, 190, 170], [200, 160, 140], [170, 130, 110], [140, 100, 80],
                      [100, 70, 55], [60, 45, 35]])
    flat[:] = skins[train.groups][:, :, None, None]
    train = loop.replace(train, images=flat)
    targets = (train.groups + 1) % 6
    kit = loop.Kit(run, "recolour_1", 0, train, None, [])
    moved = loop.recoloured(kit, train, targets, {}).images
    assert abs(moved.astype(int) - skins[targets][:, :, None, None]).max() <= 1


def test_the_batch_size_of_sampling_and_the_threads_change_last_digits_alone(run, train, generator):
    students = [networks.new_resnet(run, train, 2).eval()]
    parents, threads = train.subset(np.arange(20)), torch.get_num_threads()
    targets, c = data.other_groups(parents, 0), run.config.guidance

    def images(size):
        """In batches of this size."""
        parts = np.split(np.arange(20), range(size, 20, size))
        return np.stack([np.concatenate([synthesise(
            generator, students, parents.subset(i), targets[i], i, c, start=start,
            objectives=c.objectives).images for i in parts])
            for start in ("counterfactual", "parent", "noise")]).astype(int)
    whole, in_parts = images(20), images(3)
    assert whole.std() > 10 and abs(whole - in_parts).max() <= 2
    assert (whole != in_parts).mean() < 0.05

    x, none = to_float(torch.tensor(parents.images)), torch.zeros(20, dtype=torch.int64)
    found = []
    for count in (1, 2):
        torch.set_num_threads(count)
        with torch.no_grad():
            found.append(torch.cat([generator.unet(x, none, none, none).flatten(),
                                    students[0](x).flatten()]))
    torch.set_num_threads(threads)
    assert torch.allclose(*found, atol=1e-4)


def test_seeds_are_told_apart(run):
    made = {derive(s, name, k) for s in range(5) for name in ("student", "judge")
            for k in range(20)}
    assert len(made) == 200 and derive(1, "a") == derive(1, "a") == derive(1, *["a"])
    of_arms = {loop.make_kit(run, name, k, None, None, []).seed
               for name in ("recolour", "noise", "random", "guided") for k in (1, 2)}
    assert len(of_arms) == 2            # an arm's children differ by its doing, not by its noise
