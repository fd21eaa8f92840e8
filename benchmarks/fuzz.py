"""Random damage to configs and tables: does any of it end in more than one line?

    python benchmarks/fuzz.py [--cases 10000] [--seed 0]

Every case goes through the command line of loop.py, with an experiment that ends once the data are
split (the phantom is not drawn). Wanted is status 0, or status 2 with one line; whatever else comes
is printed with its case, and the status is 1. A few minutes on one core.
"""
import contextlib
import io
import os
import random
import sys
import tempfile
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
import data
from datasets.layouts import HAM_CLASSES
from ddpm import SAMPLERS
from engine import config as configuration
from engine.command import Parser, launch, one_line
from engine.run import fingerprint
from extras import external, few_labels
from guidance import OBJECTIVES
from loop import ARMS

HERE = Path(__file__).resolve().parents[1]
KNOWN = {"loop.arms": (*ARMS, "all"), "guidance.sampler": SAMPLERS,
         "guidance.objectives": OBJECTIVES}             # as in loop.main
ODD = [*" \n\t\0\r\ufeff\ud7ff/~-:?{}[]'\"|>#%@`,;", "", "\x1b[31m", "..", "*a", "&a ", "!!int ",
       "!!python/object:os.system ", "<<: ", "- ", ": ", "? ", "nan", ".nan", "-.inf", "1e-4",
       "1e999", "-1", "0x", "010", "9" * 30, "9" * 5000, "true", "on", "null", "2001-02-30",
       "1:60", "---\n"]


def damaged(text: str, rng: random.Random) -> bytes:
    """`text` after one to four random edits: odd pieces put in, parts cut, doubled or exchanged."""
    for _ in range(rng.randint(1, 4)):
        a, b = sorted(rng.randint(0, len(text)) for _ in range(2))
        b = min(b, a + rng.choice([1, 3, 30, 300]))
        piece = rng.choice([rng.choice(ODD), text[a:b] * 2, text[a:b][::-1], "",
                            chr(rng.randrange(256))])
        text = text[:a] + piece + text[rng.choice([a, b]):]
    content = bytearray(text, "utf-8")
    if content and rng.random() < 0.1:
        content[rng.randrange(len(content))] = rng.randrange(256)
    return bytes(content)


def config_case(rng: random.Random) -> list[str]:
    """A damaged config, or a whole one and a damaged override."""
    lines = (HERE / "configs/tiny.yaml").read_text().replace("..", str(HERE))
    if rng.random() < 0.5:
        lines = (HERE / "config.yaml").read_text()
    keys = [f"{section}.{key}" for section, fields in configuration.load(
        HERE / "config.yaml").as_dict().items() for key in fields]
    if rng.random() < 0.5:
        override = f"{rng.choice(keys)}={rng.choice(ODD)}{rng.choice(ODD)}"
        override = rng.choice([override, damaged(override, rng).decode("utf-8", "replace")])
        Path("c.yaml").write_text(lines)
        return ["--config", "c.yaml", f"--set={override}"]
    Path("c.yaml").write_bytes(damaged(lines, rng))
    return ["--config", "c.yaml"]


def table_case(rng: random.Random) -> list[str]:
    """A damaged HAM10000_metadata.csv beside whole images."""
    rows = ["lesion_id,image_id,dx,age"] + [f"L{i:02d},I{i:02d},{HAM_CLASSES[i % 7]},60"
                                            for i in range(35)]
    Path("root/HAM10000_metadata.csv").write_bytes(damaged("\n".join(rows) + "\n", rng))
    return ["--config", str(HERE / "configs/tiny.yaml"), "--set", "data.kind=ham10000",
            "--set", "data.root=root"]


def split(run) -> None:
    """What loop.experiment begins with."""
    if run.config.data.kind != "phantom":
        splits = data.load(run.config.data, run.cache)
        splits |= few_labels.hide(run.config.data, splits)
        fingerprint(run.config, splits | external.load_made(run.config, splits["train"]))


def knock(arguments: list[str]) -> tuple[int | None, str]:
    """The exit status, and what is wrong with how the command line takes these arguments."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            status = launch(split, KNOWN, arguments)
    except BaseException as error:      # a SystemExit too: nothing else may end it
        return None, f"{type(error).__name__}: {error}"
    lines = said.getvalue().splitlines()
    right = status == 0 or status == 2 and len(lines) == 1 and lines[0].startswith("loop.py: ")
    return status, "" if right else f"status {status}, {lines}"


@one_line("fuzz.py")
def main(argv: list[str] | None = None) -> int:
    parser = Parser("fuzz.py", __doc__)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    os.chdir(tempfile.mkdtemp())
    Path("root").mkdir()
    for i in range(35):
        Image.new("RGB", (16, 16), (5 * i, 100, 100)).save(f"root/I{i:02d}.jpg")
    found = refused = 0
    for case in range(arguments.cases):
        rng = random.Random(f"{arguments.seed} {case}")
        command = (config_case if case % 2 else table_case)(rng)
        status, problem = knock(command)
        refused += status == 2
        if problem:
            found += 1
            print(f"case {case}, {command}: {problem}"[:500], flush=True)
        if (case + 1) % 1000 == 0:
            print(f"{case + 1} cases: {refused} refused, {found} not in one line", flush=True)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
