"""The README says what is so: its commands, files and configs exist, and CI runs its test line."""
import re
from pathlib import Path

HERE = Path(__file__).parents[1]
README = (HERE / "README.md").read_text()
COMMANDS = [line.strip() for line in README.splitlines() if re.match(r"    (pip|python) ", line)]


def test_ci_runs_the_very_line():
    line = next(c for c in COMMANDS if c.endswith("python -m pytest"))
    assert line in (HERE / ".ci/run").read_text().splitlines()


def test_every_script_and_config_that_a_command_names_is_there():
    named = {name for c in COMMANDS for name in re.findall(r"[\w/]+\.(?:py|yaml|txt)", c)}
    assert {"loop.py", "config.yaml", "requirements.txt"} <= named
    assert not [name for name in named if not (HERE / name).exists()]


def test_every_module_stands_in_the_reading_order():
    table = README[README.index("## Reading order"):README.index("## Running")]
    assert set(re.findall(r"`(\w+\.py)`", table)) == {p.name for p in HERE.glob("*.py")}


def test_every_picture_and_link_is_there():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links and not [link for link in links if "://" not in link
                          and not (HERE / link).exists()]


def test_requirements_are_the_five():
    wanted = {"torch", "numpy", "pillow", "pyyaml", "pytest"}
    lines = (HERE / "requirements.txt").read_text().split()
    assert {re.split(r"[=<>]", line)[0] for line in lines} == wanted
    imported = set()
    for path in HERE.glob("*.py"):
        imported |= set(re.findall(r"^\s*(?:import|from) (\w+)", path.read_text(), re.M))
    import sys
    ours = {p.stem for p in HERE.glob("*.py")} | {"engine", "datasets", "extras"}
    assert imported - ours - set(sys.stdlib_module_names) == {"torch", "numpy", "PIL", "yaml"}
