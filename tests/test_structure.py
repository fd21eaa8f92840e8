"""The rules of the house, read from the sources alone: who may import whom, and how long is long.

A rule takes {path: source text} and returns what breaks it; each is broken once below.
"""
import ast
import functools
import io
import tokenize
from pathlib import Path

import pytest

HERE = Path(__file__).parents[1]
SEVEN = ("data", "unet", "ddpm", "classifier", "guidance", "evaluate", "loop")
ROOMS = ("engine", "datasets", "extras")
BESIDE = ("tests", "benchmarks", "examples", "exercises")       # not counted in the whole
METHOD = tuple(f"{name}.py" for name in SEVEN)


@functools.cache
def house():
    """Every Python file of the repository, but for what a user's environment or runs hold."""
    folders = (*ROOMS, *BESIDE, "docs", "configs")
    paths = [*HERE.glob("*.py"), *(p for f in folders for p in (HERE / f).rglob("*.py"))]
    return {path.relative_to(HERE).as_posix(): path.read_text() for path in paths}


@functools.cache
def every(text):
    return list(ast.walk(ast.parse(text)))


def nodes(text, *kinds):
    return [node for node in every(text) if isinstance(node, kinds)]


def imports(files, path):
    """The files that one imports, relative imports and `from room import module` included."""
    found, known = set(), {name.removesuffix(".py").replace("/", "."): name for name in files}
    package = path.split("/")[:-1]
    for node in nodes(files[path], ast.Import, ast.ImportFrom):
        names = [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            above = package[:len(package) + 1 - node.level] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            names = [base, *(f"{base}.{name}".strip(".") for name in names)]
        found |= {known[name] for name in names if name in known}
    return found


def downward(files):
    """The seven, engine and datasets import nothing above them; of the seven, only loop extras."""
    wrong = []
    for path in files:
        room = path.split("/")[0] if "/" in path else ""
        for other in imports(files, path):
            below = other.startswith(("engine/", "datasets/"))
            if path in METHOD:
                fits = below or other in METHOD[:METHOD.index(path)] or (
                    path == "loop.py" and other.startswith("extras/"))
            elif room == "engine":
                fits = other.startswith("engine/") or (
                    (path, other) == ("engine/command.py", "datasets/layouts.py"))
            elif room == "datasets":
                fits = other.startswith("datasets/")
            else:
                fits = room != "extras" or below or other.startswith("extras/") or (
                    other in METHOD[:-1])
            wrong += [] if fits else [f"{path} imports {other}"]
    return wrong


def no_circle(files):
    left = {path: imports(files, path) for path in files}
    while free := [path for path in left if not left[path] & left.keys()]:
        for path in free:
            del left[path]
    return sorted(left)


def no_import_inside(files):
    return [f"{path}:{node.lineno}" for path in files if not path.startswith("tests/")
            for function in nodes(files[path], ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
            for node in ast.walk(function) if isinstance(node, ast.Import | ast.ImportFrom)]


def only_the_seven_at_the_top(files):
    return sorted({path for path in files if "/" not in path} ^ set(METHOD))


def count(files):
    return sum(len(text.splitlines()) for text in files.values())


def short_files(files):
    whole = {path: text for path, text in files.items() if path.split("/")[0] not in BESIDE}
    counts = {"the seven": (count({p: files.get(p, "") for p in METHOD}), 1650),
              "loop.py": (count({"": files.get("loop.py", "")}), 300), "all": (count(whole), 5585)}
    return [f"{name}: {found} lines, at most {most}" for name, (found, most) in counts.items()
            if found > most]


def short_functions(files, most=60):
    return [f"{path}: {node.name}" for path, text in files.items()
            for node in nodes(text, ast.FunctionDef, ast.AsyncFunctionDef)
            if node.end_lineno - node.lineno + 1 > most]


def short_lines(files, most=100):
    return [f"{path}:{i}" for path, text in files.items()
            for i, line in enumerate(text.splitlines(), 1) if len(line) > most]


def light_lines(files):
    """Of the seven: the mean length of a line of code, and the share of lines with a comment."""
    lengths, comments, total = [], 0, 0
    for text in (files.get(path, "") for path in METHOD):
        lines, docs, ends = text.splitlines(), set(), {}
        for node in nodes(text, ast.Module, ast.ClassDef, ast.FunctionDef):
            if ast.get_docstring(node) is not None:
                docs |= {*range(node.body[0].lineno, node.body[0].end_lineno + 1)}
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.COMMENT:
                ends[token.start[0]] = token.start[1]
        code = [line[:ends.get(i)].rstrip() for i, line in enumerate(lines, 1) if i not in docs]
        lengths += [len(line) for line in code if line]
        comments, total = comments + len(ends), total + len(lines)
    mean, share = sum(lengths) / max(1, len(lengths)), comments / max(1, total)
    return ([f"{mean:.1f} characters a line of code"] if mean > 46 else []) + (
        [f"{share:.1%} of lines with a comment"] if share < 0.1 else [])


RULES = (downward, no_circle, no_import_inside, only_the_seven_at_the_top, short_files,
         short_functions, short_lines, light_lines)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_house_keeps(rule):
    assert not rule(house())


# ---- every rule, broken once ---------------------------------------------------------------------

SMALL = {path: '"""What it is."""\nx = 1   # why\n' for path in METHOD} | {
    "engine/command.py": "from datasets import layouts\nfrom . import run\n",
    "engine/run.py": "import sys\n", "datasets/layouts.py": "", "extras/report.py": "import data\n",
    "guidance.py": "from data import x\nimport ddpm     # why\nfrom engine.run import sys\n",
    "loop.py": "import guidance     # why\nfrom extras import report\n",
    "tests/test_x.py": "import loop\n" + "y = 1\n" * 9000, "benchmarks/speed.py": "import loop\n"}
LONG = "def f():\n" + "    x = 1\n" * 60
BREAKS = [
    (downward, "data.py", "import ddpm"), (downward, "ddpm.py", "from evaluate import vote"),
    (downward, "guidance.py", "from extras import report"), (downward, "data.py", "import loop"),
    (downward, "extras/report.py", "from loop import ARMS"),
    (downward, "engine/run.py", "import unet"), (downward, "engine/run.py", "import extras.report"),
    (downward, "engine/run.py", "from datasets.layouts import DataError"),
    (downward, "datasets/layouts.py", "from engine import run"),
    (downward, "datasets/layouts.py", "def f():\n    from data import ImageSet"),
    (no_circle, "engine/run.py", "from engine import command"),
    (no_circle, "extras/plots.py", "from . import plots"),
    (no_import_inside, "extras/report.py", "def f():\n    if f:\n        import sys"),
    (no_import_inside, "benchmarks/speed.py", "class A:\n    def f(self):\n        import sys"),
    (only_the_seven_at_the_top, "mining.py", ""), (only_the_seven_at_the_top, "loop.py", None),
    (short_files, "loop.py", "x = 1\n" * 301), (short_files, "data.py", "x = 1\n" * 1650),
    (short_files, "extras/plots.py", "x = 1\n" * 5585),
    (short_functions, "extras/report.py", LONG), (short_functions, "tests/test_x.py", LONG),
    (short_functions, "data.py", "class A:\n    def g(self):\n"
     + LONG.replace("def", "        def").replace("    x", " " * 12 + "x")),
    (short_lines, "benchmarks/speed.py", "x = " + "1" * 97),
    (light_lines, "data.py", f"x = {'1' * 43}\n" * 1000 + "# why\n" * 200),
    (light_lines, "data.py", f"x = 1       # {'why ' * 20}\n" + "x = 1\n" * 200)]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_small_house_keeps(rule):
    assert not rule(SMALL)


@pytest.mark.parametrize("rule, path, text", BREAKS, ids=[f"{b[0].__name__}-{i}" for i, b in
                                                          enumerate(BREAKS)])
def test_a_broken_rule_is_seen(rule, path, text):
    files = {**SMALL, path: text}
    if text is None:
        del files[path]
    assert rule(files)


def test_a_small_step_less_is_kept():
    near = {**SMALL, "extras/report.py": LONG.replace("    x = 1\n", "", 1), "data.py":
            f"x = {'1' * 42}\n" * 900 + f"# {'why ' * 20}\n" * 100, "loop.py":
            "x = 1   # why\n" * 300}
    assert not [rule for rule in (short_functions, short_files, light_lines) if rule(near)]
