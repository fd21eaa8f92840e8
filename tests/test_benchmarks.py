"""Every benchmark is there to be run, and those that need no long training do run: at their
smallest size."""
import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
from datasets import phantom
from engine import config as configuration
from engine.training import Noise
from extras import measures

HERE = Path(__file__).resolve().parents[1]
BENCHMARKS = HERE / "benchmarks"
SCRIPTS = sorted(BENCHMARKS.glob("*.py"))


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(HERE / "examples"))
    monkeypatch.syspath_prepend(str(BENCHMARKS))    # as when one is run


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_answers_help(path, capsys, monkeypatch):
    if "import diffusers" in path.read_text() or "from diffusers" in path.read_text():
        pytest.importorskip("diffusers")
    module = importlib.import_module(path.stem)
    if not hasattr(module, "main"):
        return                                      # a part of others
    monkeypatch.setattr(sys, "argv", [path.name, "--help"])
    with pytest.raises(SystemExit) as stopped:
        module.main()
    assert stopped.value.code == 0 and "usage: " in capsys.readouterr().out


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_what_is_imported_is_there(path):
    """Of our own modules; also where diffusers is not installed and the import itself fails."""
    ours = {p.stem for p in (*HERE.glob("*.py"), *SCRIPTS)} | {"engine", "datasets", "extras"}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in ours - {
                "diffusers_unet", "speed", "quality_per_cost"}:
            module = importlib.import_module(node.module)
            for name in node.names:
                assert hasattr(module, name.name) or importlib.util.find_spec(
                    f"{node.module}.{name.name}"), f"{path.name}: {node.module}.{name.name}"


def test_run_by_their_path_from_another_folder(tmp_path):
    done = subprocess.run([sys.executable, str(BENCHMARKS / "coverage.py"), "--studies", "x"],
                          cwd=tmp_path, text=True, capture_output=True)
    assert done.returncode == 2 and "--studies" in done.stderr


def test_load():
    import load
    load.write_images(60)
    for _ in range(2):                              # decoded, then from the cache
        assert sum(map(len, load.load(60).values())) == 60
    load.nearest(60)
    load.ledger(60)
    assert len(list(Path("ledger/synthetic").glob("*/*.png"))) == 60


def test_hostile_inputs(tiny):
    import hostile
    kinds = [kind for kind in hostile.KINDS if kind != hostile.SLOW]
    found = hostile.tried(tiny, 20, 0, kinds)
    assert found["wrong"] == 0 and found["refused"] > 7


def test_hostile_sees_what_is_wrong():
    import hostile

    def case(call, holds=lambda status: ""):
        return hostile.Case("", "x", call, holds)

    def line(*words):
        return lambda: print(*words, sep="\n", file=sys.stderr) or 2
    assert hostile.knock(case(line("x: no"))) == (2, "")
    for call in (line("x: no", "x: more"), line("no"), line(), lambda: {}["a"], lambda: 1):
        assert hostile.knock(case(call))[1]
    assert hostile.knock(case(lambda: 0, lambda status: "gone"))[1] == "gone"


def test_sensitivity_of_the_survey_is_the_report_s():
    """when_does_it_help.tables against measures.everything, on made-up predictions."""
    import when_does_it_help as survey
    rng, n, seeds = np.random.default_rng(0), 200, 3
    p = {"class_names": np.array(["nv", "mel"]), "group_names": np.array(["I", "VI"]),
         "subtype_names": np.array([], str), "malignant": np.array([False, True]),
         "arms": np.array(["real"]), "seeds": np.arange(seeds), "optimistic": np.array([False])}
    for split in ("val", "test"):
        labels = rng.integers(0, 2, n)
        sick = np.clip(0.3 * labels + rng.uniform(0, 0.7, (seeds, n)), 0, 1)
        probs = np.stack([1 - sick, sick], -1)
        p |= {f"{split}_labels": labels, f"{split}_groups": rng.integers(0, 2, n),
              f"{split}_subtypes": np.full(n, -1), f"{split}_reference": probs,
              f"{split}_lesions": np.arange(n).astype(str), f"{split}_probs_real": probs}
    test = measures.everything(p, draws=50)["arms"]["real"]["test"]
    found = survey.tables(p, "real", evaluate.subsets(p, 10)[0], np.ones((n, 1)), 10)
    assert set(found) == set(survey.METRICS)
    for (subset, metric), table in found.items():
        assert table.mean() == pytest.approx(test[subset][metric]["value"], abs=1e-6)


@pytest.mark.parametrize("artefact", ["ring", "scope"])
def test_a_planted_shortcut_goes_with_melanoma_but_not_in_test(artefact):
    """Shares within four standard errors; what shows it differs from the bare picture, no other."""
    import shortcut
    c = configuration.load(configuration.DEFAULTS, [
        "data.size=16", "data.train=400", "data.val=200", "data.test=400"]).data
    splits, shown = shortcut.planted(c, 0.9, artefact)
    for name, s in splits.items():
        how = {"ring": 0} if artefact == "ring" else {}
        bare, _ = phantom.collect(name, len(s), 16, c.seed, **how)
        assert (shown[name] == (s.images != bare["images"]).any((1, 2, 3))).all()
        sick = s.labels == s.class_names.index("mel")
        for of, share in ((sick, 0.9), (~sick, 0.1)):
            share = 0.5 if name == "test" else share
            error = (share * (1 - share) / of.sum()) ** 0.5
            assert abs(shown[name][of].mean() - share) <= 4 * error


def test_a_pasted_ring_is_the_phantom_s_and_another_scope_keeps_the_middle():
    import shortcut
    bare, ringed = (phantom.draw(200, 32, 3, ring=ring)["images"] for ring in (0, 1))
    pasted = shortcut.with_ring(bare, np.random.default_rng(0))
    assert shortcut.shows_ring(pasted).all() and not shortcut.shows_ring(bare).any()
    assert abs(pasted.mean((0, 1)) - ringed.mean((0, 1))).max() < 15    # grey levels; chance: 5
    ramp = np.broadcast_to(np.arange(32) * 8, (1, 3, 32, 32)).astype(np.uint8)
    seen = shortcut.other_scope(ramp, None)[0, 0, 16].astype(float)
    nearer = 15.5 + (np.arange(32) - 15.5) * 24 / 32                    # 24 pixels fill 32
    assert np.abs(seen - 8 * nearer)[2:-2].max() < 2


def test_the_shortcut_s_stronger_augmentation():
    """A crop of a ramp is a flatter ramp; MixUp's loss is that of the mixed labels."""
    import shortcut
    generator = torch.Generator().manual_seed(0)
    ramp = torch.linspace(-1, 1, 32).expand(50, 3, 32, 32)
    inner = shortcut.crop(ramp, generator)[:, :, :, 2:-2]
    assert torch.allclose(inner, inner[:, :1, :1].expand_as(inner), atol=1e-5)
    slope = inner.diff(dim=-1)[:, 0, 0] * 31 / 2
    assert torch.allclose(slope, slope[:, :1].expand_as(slope), atol=1e-4)
    assert slope.min() > 0.49 and slope.max() < 1.01 and slope.std() > 0.1

    plain = torch.tensor([[10], [200], [90]]).expand(3, 3 * 64).view(3, 3, 8, 8).byte()
    labels, network = torch.tensor([0, 3, 1]), torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(3 * 64, 4))
    found = shortcut.augmented("mixup", network, plain, labels, 0.0, torch.arange(3),
                               generator.manual_seed(1))
    torch.rand(3, 3, generator=generator.manual_seed(1))        # the turns, and a shift
    torch.randint(3, (2, 3, 1, 1), generator=generator)
    share = torch.rand(3, 1, generator=generator)
    x, target = plain.flatten(1) / 127.5 - 1, torch.eye(4)[labels]
    mixed, wanted = (share * a + (1 - share) * a.flip(0) for a in (x, target))
    log_p = network(mixed.view(3, 3, 8, 8)).log_softmax(1)
    assert found.item() == pytest.approx(-(wanted * log_p).sum(1).mean().item(), abs=1e-6)


def test_the_shortcut_s_trial(capsys):
    """As many images in every arm, told ones by themselves; nothing is trained twice."""
    import shortcut
    small = [f"--set={key}" for key in (
        "data.size=16", "data.train=200", "data.val=40", "data.test=40", "unet.width=16",
        "unet.multipliers=[1, 2]",
        "ddpm.steps=2", "ddpm.batch=8", "classifier.batch=8", "classifier.steps=2",
        "guidance.steps=2", "loop.seeds=1")]
    arms = ["replay@0.3", "guided@0.3", "guided@0.1", "guided_told@0.3"]
    arguments = ["--draws", "7", "--rate", "0.7", *small, "--arms", *arms, "--generative",
                 "--stop", "1", "--artefact", "scope"]
    for _ in range(2):
        shortcut.main(arguments)
        said = capsys.readouterr().out
    assert "/2, " not in said                       # no step of a training
    ours, told = (ast.literal_eval(line.split(": ", 1)[1]) for line in said.splitlines()
                  if line.startswith("added, of 60"))
    assert ours == dict.fromkeys(("guided", "replay"), 60)
    assert [*told] == ["guided_told"] and 0 < told["guided_told"] <= 60
    rows = Path("runs/shortcut/table.md").read_text().splitlines()
    assert [row.split(" | ")[0] for row in rows[2:]] == [
        f"| {name}" for name in (*shortcut.CONTROLS, *arms, "diffusion model")]
    for wrong in (["--arms", "guided@2"], ["--rate", "nan"], ["--against", "x"],
                  ["--rate", "1"], ["--stop", "-1"],
                  ["--set=loop.rounds=2", "--arms", "replay@0.3"]):
        with pytest.raises(SystemExit) as stopped:
            shortcut.main(["--draws", "8", *small, *wrong])
        assert stopped.value.code == 2 and capsys.readouterr().err.count("\n") == 1
    assert not [*Path("runs/shortcut/draw-8").glob("checkpoints/*")]


def test_the_diffusion_model_as_a_classifier(tiny, capsys):
    """The error in eps is abar times that in the velocity, which the network predicts; val chooses
    the weights under which errors tell the class."""
    import generative_classifier as generative
    from finished import Finished
    of = Finished(tiny)
    splits = of.splits()
    generator, some = of.generator(splits["train"]), splits["val"].subset([0, 1])
    found = generative.errors(of.run, generator, some, 1, True, 0)          # (weights, N, C)
    unet, _, schedule, *_ = generator
    t = torch.full((2,), round(0.95 * schedule.T))
    eps = Noise(of.run.seed("errors", 0) + np.arange(2))(3, *some.images.shape[2:])
    x0 = torch.tensor(some.images) / 127.5 - 1
    a = schedule.alphas_cumprod[t[0]].item()
    for c in range(len(some.class_names)):
        with torch.no_grad():
            v = unet(a ** 0.5 * x0 + (1 - a) ** 0.5 * eps, t, torch.full_like(t, c),
                     torch.tensor(some.groups))
        wrong = (v - (a ** 0.5 * eps - (1 - a) ** 0.5 * x0)).square().mean((1, 2, 3)).numpy()
        for k, share in enumerate((a, 1, 1 - a)):                       # eps, v, x0
            assert found[k, :, c] == pytest.approx(share * wrong, rel=0.05)

    labels, rng = np.arange(60) % 3, np.random.default_rng(0)
    blind = rng.random((60, 3))
    told = np.where(np.arange(3) == labels[:, None], 0.5, 0.6) + 0.1 * rng.random((60, 3))
    name, probs = generative.chosen(np.stack([blind, told, blind]), labels)
    assert name == "v" and (probs(np.stack([blind, told, blind])).argmax(1) == labels).mean() > 0.8
    generative.main([str(tiny), "--images", "20", "--levels", "1"])
    assert capsys.readouterr().out.count("| diffusion model, group ") == 4


def test_what_you_should_see_writes_its_table_between_its_marks(tmp_path, monkeypatch, capsys):
    import what_you_should_see
    page, config = tmp_path / "page.md", tmp_path / "small.yaml"
    config.write_text(f"extends: {HERE / 'configs/tiny.yaml'}\ndata: {{train: 160, val: 60}}\n"
                      "unet: {width: 16}\nddpm: {batch: 4, T: 60}\nevaluate: {oracle: 100}\n"
                      "classifier: {steps: 3, guide_steps: 3, batch: 8}\n")
    page.write_text("before\n<!-- small -->\nold\n<!-- end of small -->\nafter\n")
    arguments = ["--config", str(config), "--page", str(page), "--steps", "2"]
    for _ in range(2):                          # the second time nothing is trained again
        what_you_should_see.main(arguments)
    text = page.read_text()
    assert text.startswith("before\n<!-- small -->\n") and "old" not in text
    assert text.endswith("\n<!-- end of small -->\nafter\n")
    assert text.count("| ![2 steps](tour/seen_small_2.png) |") == 1
    assert "A student: loss " in text and "at t = 45." in text
    assert (tmp_path / "tour/seen_small_2.png").exists()
    log = (tmp_path / "runs/what_you_should_see/small/log.jsonl").read_text()
    assert log.count('"stage": "ddpm_2", "seconds"') == 1

    page.write_text("no marks\n")
    with pytest.raises(SystemExit) as stopped:
        what_you_should_see.main(arguments)
    assert stopped.value.code == 2 and page.read_text() == "no marks\n"
    assert "<!-- small -->" in capsys.readouterr().err
