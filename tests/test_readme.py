"""README and docs/ say what is so: commands, counts, names, links; and test decides nothing."""
import ast
import importlib
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest

import data
import loop
from ddpm import SAMPLERS
from engine import config
from engine.run import Run
from guidance import OBJECTIVES

HERE = Path(__file__).parents[1]
PAGES = [HERE / "README.md", HERE / "CONTRIBUTING.md", HERE / "CHANGELOG.md",
         *sorted((HERE / "docs").glob("*.md"))]
TEXT = {page: page.read_text() for page in PAGES}
README = TEXT[HERE / "README.md"]
COMMANDS = [line.strip() for text in TEXT.values() for line in text.splitlines()
            if re.match(r"    (pip|python) ", line)]
COMMANDS += [quoted for text in TEXT.values() for quoted in re.findall(r"`(python [^`]+)`", text)]
METHOD = "unet", "ddpm", "guidance", "classifier", "data", "evaluate", "loop"
CODE = [path for path in sorted(HERE.rglob("*.py"))
        if not path.relative_to(HERE).parts[0].startswith((".", "tests", "benchmarks", "runs"))]


def section(title):
    start = README.index(f"\n## {title}\n")
    return README[start:README.find("\n## ", start + 1)]


def defined(path):
    """The functions, classes and constants of a module."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return found


# ---- commands ----------------------------------------------------------------------------------

def test_ci_runs_the_very_line():
    [line] = [c for c in COMMANDS if c.endswith("&& python -m pytest")]
    assert line in (HERE / ".ci/run").read_text().splitlines()


def test_whatever_a_command_names_is_there():
    assert len(COMMANDS) > 30
    named = {name for c in COMMANDS for name in re.findall(r"[\w/]+\.(?:py|yaml|txt)\b", c)}
    modules = {name for c in COMMANDS for name in re.findall(r"python -m ([\w.]+)", c)} - {"pytest"}
    assert {"loop.py", "config.yaml", "requirements.txt"} <= named and "extras.report" in modules
    named |= {name.replace(".", "/") + ".py" for name in modules}
    assert not [name for name in sorted(named) if not (HERE / name).exists()]


def test_every_key_that_a_page_names_is_in_the_config_or_the_module():
    known = config.load(HERE / "config.yaml").as_dict()
    named = {pair for c in COMMANDS for pair in re.findall(r"--set (\w+)\.(\w+)=", c)}
    named |= {pair for text in TEXT.values()
              for pair in re.findall(r"`(\w+)\.(\w+)(?:[=:][^`]*)?`", text)
              if pair[0] in known and pair[1] not in ("py", "yaml")}
    assert len(named) > 20
    assert not [pair for pair in sorted(named) if pair[1] not in known[pair[0]]
                and pair[1] not in defined(HERE / f"{pair[0]}.py")]


def test_every_config_of_a_command_loads_with_what_it_sets():
    known = {"loop.arms": (*loop.ARMS, "all"), "guidance.sampler": SAMPLERS,
             "guidance.objectives": OBJECTIVES}
    for command in COMMANDS:
        words = shlex.split(command, comments=True)
        where = [after for word, after in zip(words, words[1:]) if word in ("--config", "--on")]
        if where:
            settings = [after for word, after in zip(words, words[1:]) if word == "--set"]
            config.load(HERE / where[0], settings, known)


# ---- README ------------------------------------------------------------------------------------

def test_the_readme_is_short():
    assert len(README.splitlines()) <= 150 and len(README.split()) <= 1500


def test_the_reading_table_has_every_module_and_its_true_length():
    rows = re.findall(r"^\| `(\w+)\.py` .*\| (\d+) \|$", section("Read it"), re.M)
    assert tuple(name for name, _ in rows) == METHOD
    assert {p.stem for p in HERE.glob("*.py")} == set(METHOD)
    lines = {name: len((HERE / f"{name}.py").read_text().splitlines()) for name in METHOD}
    assert {name: int(count) for name, count in rows} == lines


def test_the_loop_in_ten_lines_calls_what_there_is():
    lines = re.findall(r"^    (.*?)(?:  +#.*)?$", section("The loop"), re.M)
    assert len(lines) == 10
    ours, called = defined(HERE / "loop.py"), re.findall(r"([\w.]+)\(", "\n".join(lines))
    assert {"student", "cross_fit", "mine", "make", "mixed"} <= set(called)
    for name in [*called, "ARMS"]:
        module, _, function = name.rpartition(".")
        there = [p for p in (HERE / f"{module}.py", HERE / f"extras/{module}.py") if p.exists()]
        assert function in (defined(there[0]) if module else ours), name


def test_the_arms_are_those_of_the_table():
    assert re.findall(r"^\| `(\w+)` \|", section("The arms"), re.M) == list(loop.ARMS)


def test_every_room_is_named():
    folders = {p.parts[0] for p in (path.relative_to(HERE) for path in CODE) if len(p.parts) > 1}
    assert folders <= set(re.findall(r"`(\w+)/`", section("What else is here")))


# ---- every page --------------------------------------------------------------------------------

@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_picture_and_link_is_there(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", TEXT[page]):
        path, _, anchor = link.partition("#")
        if "://" in link:
            continue
        target = page.parent / path if path else page
        assert target.exists(), link
        if anchor:
            titles = re.findall(r"^#+ (.*)$", target.read_text(), re.M)
            slugs = [re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles]
            assert anchor in slugs, link


def test_every_test_that_a_page_names_is_there():
    named = {pair for text in TEXT.values() for pair in re.findall(r"(tests/\w+\.py)::(\w+)", text)}
    assert len(named) > 10
    assert not [pair for pair in sorted(named) if pair[1] not in defined(HERE / pair[0])]


def test_every_word_of_the_glossary_is_used():
    glossary = HERE / "docs/glossary.md"
    words = [word for words in re.findall(r"^\| \*\*(.+?)\*\*", TEXT[glossary], re.M)
             for word in words.split(", ")]
    used = [path.read_text() for path in CODE]
    used += [text for page, text in TEXT.items() if page != glossary]
    used = " ".join("\n".join(used).lower().split())
    assert len(words) > 20 and not [word for word in words if word.lower() not in used]


# ---- the tour, the course -----------------------------------------------------------------------

def test_every_function_that_a_page_links_is_there():
    """[`module.name.name`](../module.py): the name is defined in that very file."""
    found = [(page, *link) for page in PAGES
             for link in re.findall(r"\[`([\w.]+)`\]\(([\w./]+\.py)\)", TEXT[page])]
    assert len({name for _, name, _ in found}) > 25
    for page, name, path in found:
        module, _, inner = name.partition(".")
        assert Path(path).stem == module, name
        here = importlib.import_module(module)
        for part in inner.split("."):
            here = getattr(here, part)              # AttributeError names what is not there


def test_the_tour_has_twelve_stops_each_with_what_a_stop_has():
    stops = re.split(r"^## \d+\. .*$", TEXT[HERE / "docs/tour.md"], flags=re.M)[1:]
    assert len(stops) == 12
    for i, stop in enumerate(stops, 1):
        assert "**Predict first.**" in stop and "**If it is wrong:**" in stop, i
        assert re.search(r"\[`[\w.]+`\]\(\.\./\w+\.py\)", stop), i


def test_every_picture_of_the_tour_has_the_command_that_draws_it():
    tour, seen = (TEXT[HERE / f"docs/{name}.md"] for name in ("tour", "what_you_should_see"))
    for name in re.findall(r"\(tour/(\w+)\.png\)", tour):
        assert re.search(rf"^    python examples/{name}\.py .*--out docs/tour/{name}\.png$", tour,
                         re.M), name
    known = re.findall(r"\(tour/(\w+)\.png\)", tour + seen)
    pictures = {path.stem: path.stat().st_size for path in (HERE / "docs/tour").glob("*.png")}
    assert set(pictures) == set(known)
    assert max(pictures.values()) < 60_000 and sum(pictures.values()) < 700_000


def test_every_example_that_a_page_runs_knows_its_arguments(capsys):
    """What each of these commands asks for, by the example's own --help."""
    commands = [shlex.split(c, comments=True) for c in COMMANDS if "python examples/" in c]
    helps = {}
    for words in commands:
        name = Path(words[1]).stem
        if name not in helps:
            with pytest.raises(SystemExit):
                importlib.import_module(name).main(["--help"])
            helps[name] = capsys.readouterr().out
        assert all(word in helps[name] for word in words if word.startswith("--")), words
    assert len(helps) > 9


def test_the_course_lists_the_exercises_as_they_say_themselves():
    rows = re.findall(r"^\| (\d+) \| \[(.*?)\]\(\.\./(\S+)\)(?: \(open-ended\))? "
                      r"\| (\d) \| (\d) \| (\d+) \|$", TEXT[HERE / "docs/course.md"], re.M)
    assert len(rows) == 12
    for number, title, path, *figures in rows:
        head = (HERE / path).read_text()
        assert head.startswith(f'"""Exercise {number}') and f": {title}.\n" in head
        assert "Difficulty {}/5 - Importance {}/5 - {} minutes".format(*figures) in head


# ---- what the pages claim of the code ----------------------------------------------------------

def test_requirements_are_the_five():
    lines = (HERE / "requirements.txt").read_text().split()
    assert {re.split(r"[=<>]", line)[0] for line in lines} == {
        "torch", "numpy", "pillow", "pyyaml", "pytest"}
    imported = set()
    for path in CODE:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.split(".")[0])
    ours = {path.relative_to(HERE).parts[0].removesuffix(".py") for path in CODE}
    ours |= {path.stem for path in CODE}            # examples import each other
    used = {"torch", "numpy", "PIL", "yaml", "pytest"}      # pytest by the exercises' markers
    assert imported - ours - set(sys.stdlib_module_names) == used


def test_another_test_set_changes_nothing_but_its_scores(tmp_path):
    """Two runs that differ in the test split alone: what students say of val is the same to the
    bit, so no test image has reached a network, the mining, the filter or a choice."""
    found = []
    for images in (50, 40):
        c = config.load(HERE / "configs/tiny.yaml", [
            f"data.test={images}", "data.train=120", "data.val=40", "unet.width=16", "ddpm.steps=5",
            "ddpm.batch=8", "classifier.steps=30", "classifier.batch=8",
            "classifier.guide_steps=5", "classifier.jitter=[0.3, 0.6]",
            "guidance.steps=2", "guidance.classifier_free=1", "loop.seeds=1", "loop.surplus=2",
            "loop.rounds=1", "loop.arms=[real, guided]", "evaluate.draws=100",
            "evaluate.oracle=100"])
        folder = tmp_path / str(images)
        folder.mkdir()
        loop.experiment(Run(folder, c))
        with np.load(folder / "predictions.npz") as stored:
            found.append({name: stored[name] for name in stored})
        splits = data.load(c.data)      # the distance at which a copy is a copy: hardly trained,
        keep = loop.Filter(None, None, splits["train"], splits)     # the model draws none
        found[-1]["val_too_near"] = keep.too_near
    assert [len(p["test_labels"]) for p in found] == [50, 40]
    same = [name for name in found[0] if name.startswith("val_")]
    assert "val_probs_guided" in same and "val_reference" in same
    assert all(np.array_equal(found[0][name], found[1][name]) for name in same)
