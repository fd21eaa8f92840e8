"""Hostile inputs by the hundred: does each end in one line and status 2, or in what is documented?

    python benchmarks/hostile.py                                   600 cases, 6 minutes on a core
    python benchmarks/hostile.py --only config --cases 10000       damaged configs and --set alone
    python benchmarks/hostile.py --only npz --seed 7

Damaged configs, values, names, tables, images and folders go through the command line of loop.py,
with an experiment that ends once the data are split (the phantom is not drawn); damaged
checkpoints, results.json, predictions.npz, seen.json and log.jsonl of a small finished run through
--resume, predict.py, score_on.py and the report; closed and full outputs and Ctrl-C through
processes of their own. Wanted is status 0 with nothing damaged used in silence, or status 2 with
one line; and nothing that was there may be gone. Whatever else comes is printed with its case, and
the status is 1.
"""
import contextlib
import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

HERE = Path(__file__).resolve().parents[1]
for folder in ("", "examples"):
    sys.path.insert(0, str(HERE / folder))
import data
import loop
import predict
import score_on
from datasets.layouts import HAM_CLASSES
from ddpm import SAMPLERS
from engine import config as configuration
from engine.command import Parser, launch, one_line
from engine.run import fingerprint
from extras import external, few_labels, report
from guidance import OBJECTIVES
from loop import ARMS

KNOWN = {"loop.arms": (*ARMS, "all"), "guidance.sampler": SAMPLERS,
         "guidance.objectives": OBJECTIVES}             # as in loop.main
ODD = [*" \n\t\0\r\ufeff\ud7ff/~-:?{}[]'\"|>#%@`,;", "", "\x1b[31m", "..", "*a", "&a ", "!!int ",
       "!!python/object:os.system ", "<<: ", "- ", ": ", "? ", "nan", ".nan", "-.inf", "1e-4",
       "1e999", "-1", "0x", "010", "9" * 30, "9" * 5000, "true", "on", "null", "2001-02-30",
       "1:60", "---\n"]
NAMES = ["=1+1", "@SUM(A1)", "+x", "-x", "<script>x</script>", "a&b", "a|b", "a,b", 'a"b', "a'b",
         "a\nb", " ", "ä", "皮", "nan", "x" * 200, "x" * 300, "a\\b", "%s", "{x}", "$(x)", "..x"]
VALUES = [None, True, -1, 0, 1e308, float("nan"), 10 ** 30, "", "x", "<script>alert(1)</script>",
          "../../x", [], {}, [[]], {"": None}, "=1+1", "\ud800"]
SMALL = f"""extends: {HERE}/configs/tiny.yaml
data: {{train: 160, val: 60, test: 100}}
unet: {{width: 16}}
ddpm: {{steps: 30, batch: 8}}
classifier: {{steps: 20, guide_steps: 10, batch: 16}}
guidance: {{steps: 3, classifier_free: 1}}
evaluate: {{draws: 100, oracle: 100}}
loop: {{surplus: 4, margin: 0.9}}
"""


class Case(NamedTuple):
    """One hostile input: call() -> status, and what must hold afterwards ("" or what is wrong)."""
    words: str
    program: str
    call: Callable[[], int]
    holds: Callable[[int], str] = lambda status: ""


# ---- damage --------------------------------------------------------------------------------------

def damaged(text: str, rng: random.Random) -> bytes:
    """`text` after one to four random edits: odd pieces put in, parts cut, doubled or exchanged."""
    for _ in range(rng.randint(1, 4)):
        a, b = sorted(rng.randint(0, len(text)) for _ in range(2))
        b = min(b, a + rng.choice([1, 3, 30, 300]))
        piece = rng.choice([rng.choice(ODD), text[a:b] * 2, text[a:b][::-1], "",
                            chr(rng.randrange(256))])
        text = text[:a] + piece + text[rng.choice([a, b]):]
    content = bytearray(text, "utf-8", "surrogatepass")
    if content and rng.random() < 0.1:
        content[rng.randrange(len(content))] = rng.randrange(256)
    return bytes(content)


def bitten(content: bytes, rng: random.Random) -> bytes:
    """Bytes as a bad disk or a stopped copy leaves them."""
    a, b = sorted(rng.randrange(len(content)) for _ in range(2))
    return rng.choice([
        b"", content[:a], content[a:], content[:a] + content[b:], b"\0" * len(content),
        content[:a] + bytes([content[a] ^ 1 << rng.randrange(8)]) + content[a + 1:],
        content[:a] + b"\0" * (b - a) + content[b:], content + content[a:b], b"text\n",
        b"PK\3\4" + content[a:b], b"\x93NUMPY\1\0" + content[a:b]])


def twisted(value, rng: random.Random):
    """A json value with one place in it taken out or replaced."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        rest = {k: v for k, v in value.items() if k != key}
        return rest if rng.random() < 0.3 else {**value, key: twisted(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.7:
        i = rng.randrange(len(value))
        return value[:i] + [twisted(value[i], rng)] * rng.randint(0, 2) + value[i + 1:]
    return rng.choice(VALUES)


def misfit(arrays: dict, rng: random.Random) -> dict:
    """The arrays of predictions.npz with one gone, or of another type, shape or range."""
    name = rng.choice(list(arrays))
    a = arrays[name]
    other = rng.choice([None, a[:0], a[:-1], a[None], a.T[..., None], a.astype(str), np.array(7),
                        np.concatenate([a, a]), np.full(a.shape, np.nan), np.full(a.shape, -9),
                        np.full(a.shape, 10 ** 9), np.full(a.shape, None)])
    rest = {k: v for k, v in arrays.items() if k != name}
    return rest if other is None else {**rest, name: other}


# ---- through the command line of loop.py ---------------------------------------------------------

def split(run) -> None:
    """What loop.experiment begins with."""
    if run.config.data.kind != "phantom":
        splits = data.load(run.config.data, run.cache)
        splits |= few_labels.hide(run.config.data, splits)
        fingerprint(run.config, splits | external.load_made(run.config, splits["train"]))


def knocking(arguments: list[str], holds=lambda status: "") -> Case:
    return Case(repr(arguments), "loop.py", lambda: launch(split, KNOWN, arguments), holds)


def config_case(rng: random.Random, _) -> Case:
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
        return knocking(["--config", "c.yaml", f"--set={override}"])
    Path("c.yaml").write_bytes(damaged(lines, rng))
    return knocking(["--config", "c.yaml"])


def arguments_case(rng: random.Random, _) -> Case:
    """Words that do not belong together, and names for the run's folder."""
    tiny = str(HERE / "configs/tiny.yaml")
    if rng.random() < 0.5:
        name = rng.choice([*NAMES, *ODD, "a/b", "cache", ".", "../up", "/tmp/x", "x" * 260])
        before = {p.name for p in Path().iterdir()} | {"runs"}

        def holds(status):
            beside = {p.name for p in Path().iterdir()} - before
            return f"made {beside} beside runs/" if beside else ""
        return knocking(["--config", tiny, f"--name={name}"], holds)
    words = ["--config", tiny, "--resume", "runs/absent", ".", "", "--set", "--name", "x", "-y",
             "--config=", "--resume=", "--resume=.", "--resume=/", "--set=", "--conf", "-x", "\0"]
    return knocking([rng.choice(words) for _ in range(rng.randint(0, 5))])


# ---- data ----------------------------------------------------------------------------------------

def pictures(root: Path, count: int, name=lambda i: f"I{i:02d}.jpg") -> list[Path]:
    shutil.rmtree(root, ignore_errors=True)
    paths = [root / name(i) for i in range(count)]
    for i, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (5 * i, 100, 100)).save(path)
    return paths


def ham(rng: random.Random) -> tuple[str, list[str]]:
    """Whole images and the whole table's text; and the command that reads them."""
    pictures(Path("root"), 35)
    rows = ["lesion_id,image_id,dx,age"] + [f"L{i:02d},I{i:02d},{HAM_CLASSES[i % 7]},60"
                                            for i in range(35)]
    return "\n".join(rows) + "\n", ["--config", str(HERE / "configs/tiny.yaml"), "--set",
                                    "data.kind=ham10000", "--set", "data.root=root"]


def table_case(rng: random.Random, _) -> Case:
    """A damaged HAM10000_metadata.csv beside whole images."""
    text, arguments = ham(rng)
    Path("root/HAM10000_metadata.csv").write_bytes(damaged(text, rng))
    return knocking(arguments)


def image_case(rng: random.Random, _) -> Case:
    """One damaged image; a refusal has to name it."""
    text, arguments = ham(rng)
    Path("root/HAM10000_metadata.csv").write_text(text)
    path = rng.choice(sorted(Path("root").glob("*.jpg")))
    content = bitten(path.read_bytes(), rng)
    path.write_bytes(content)
    return knocking(arguments)


def folder_case(rng: random.Random, _) -> Case:
    """Classes, or images, of odd names."""
    odd = rng.choice(NAMES)
    with contextlib.suppress(OSError):          # too long a name
        if rng.random() < 0.5:
            pictures(Path("root"), 30, lambda i: f"{(odd, 'nv', 'mel')[i % 3]}/{i}.png")
        else:
            pictures(Path("root"), 30, lambda i: f"{('nv', 'mel')[i % 2]}/{odd}{i}.png")
    return knocking(["--config", str(HERE / "configs/tiny.yaml"), "--set", "data.kind=folder",
                     "--set", "data.root=root", "--set", "data.malignant=[mel]"])


# ---- a finished run ------------------------------------------------------------------------------

def copied(whole: Path) -> Path:
    """A copy of the run that may be damaged. Files are linked: they are replaced, not written."""
    shutil.rmtree("runs", ignore_errors=True)
    copy = Path("runs/copy")
    shutil.copytree(whole, copy, copy_function=os.link)
    replace(copy / "log.jsonl", (whole / "log.jsonl").read_bytes())
    return copy


def replace(path: Path, content: bytes) -> None:
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def held(folder: Path) -> dict[str, str]:
    """{file: digest} of a folder."""
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in folder.rglob("*") if p.is_file()}


def asked(copy: Path, whole: Path, rng: random.Random, only: str = "") -> Case:
    """One of the commands on a damaged copy, with what has to hold after it."""
    before, commands = held(copy), {
        "predict.py": lambda: predict.main([str(copy), "photos", "--out", "answer.csv"]),
        "score_on.py": lambda: score_on.main([str(copy), "--on", "small.yaml"]),
        "report": lambda: report.main([str(copy)])}
    program = only or rng.choice(list(commands))

    def holds(status: int) -> str:
        now = held(copy)
        written = ("results.json", "report.md", "report.html", ".svg") if program == "report" else (
            "external_small.json",)
        changed = [n for n in before if now.get(n) != before[n] and not n.endswith(written)]
        if changed:
            return f"changed {changed}"
        if status == 0 and "<script" in (copy / "report.html").read_text():
            return "markup in report.html"
        return ""
    return Case(program, program, commands[program], holds)


def npz_case(rng: random.Random, whole: Path) -> Case:
    """predictions.npz bitten, or with arrays that do not fit."""
    copy = copied(whole)
    path = copy / "predictions.npz"
    if rng.random() < 0.5:
        replace(path, bitten(path.read_bytes(), rng))
        bites = True
    else:
        with np.load(path) as stored:
            arrays = misfit(dict(stored), rng)
        buffer, bites = io.BytesIO(), False
        np.savez(buffer, **arrays)
        replace(path, buffer.getvalue())
    case = asked(copy, whole, rng)

    def holds(status):
        if status == 0 and bites:
            with np.load(path) as a, np.load(whole / "predictions.npz") as b:
                if any(not np.array_equal(a[name], b[name]) for name in b):
                    return "other predictions were used in silence"
        return case.holds(status)
    return case._replace(words=f"predictions.npz, {case.words}", holds=holds)


def json_case(rng: random.Random, whole: Path) -> Case:
    """results.json or seen.json bitten or twisted."""
    copy, name = copied(whole), rng.choice(["results.json", "results.json", "seen.json"])
    content = (copy / name).read_bytes()
    if rng.random() < 0.6:
        changed = json.dumps(twisted(json.loads(content), rng)).encode()
    else:
        changed = bitten(content, rng)
    replace(copy / name, changed)
    case = asked(copy, whole, rng, "score_on.py" if name == "seen.json" else "")
    return case._replace(words=f"{name}, {case.words}")


def log_case(rng: random.Random, whole: Path) -> Case:
    """Odd lines in log.jsonl."""
    copy = copied(whole)
    lines = (copy / "log.jsonl").read_text().splitlines()
    for i in rng.sample(range(len(lines)), rng.randint(1, 5)):
        lines[i] = rng.choice([json.dumps(twisted(json.loads(lines[i]), rng)), lines[i][:9], "3",
                               "null",
                               "[" * 5000, '{"event": "loss"}', '{"event": "stage", "stage": 3}'])
    replace(copy / "log.jsonl", "\n".join(lines).encode("utf-8", "surrogatepass"))
    case = asked(copy, whole, rng, "report")
    return case._replace(words=f"log.jsonl, {case.words}")


def checkpoint_case(rng: random.Random, whole: Path) -> Case:
    """A checkpoint bitten, gone or another's, under a command that reads it."""
    copy = copied(whole)
    some = sorted((copy / "checkpoints").glob(rng.choice(["student_guided*", "*"])))
    path, other = rng.choice(some), rng.choice(some)
    content = rng.choice([bitten(path.read_bytes(), rng), other.read_bytes(), None])
    if content is None:
        path.unlink()
    else:
        replace(path, content)
    case = asked(copy, whole, rng, rng.choice(["predict.py", "score_on.py"]))

    def holds(status):
        same = content == (whole / "checkpoints" / path.name).read_bytes()
        if status == 0 and path.name.startswith("student_guided") and not same:
            return "used in silence"
        return case.holds(status)
    return case._replace(words=f"{path.name}, {case.words}", holds=holds)


def config_of_run_case(rng: random.Random, whole: Path) -> Case:
    """A finished run's config.yaml edited afterwards."""
    copy = copied(whole)
    text = (copy / "config.yaml").read_text()
    replace(copy / "config.yaml", rng.choice([
        damaged(text, rng), text.replace("size: 16", "size: 32").encode(),
        text.replace("network: auto", "network: resnet18").encode(),
        text.replace("folds: 2", "folds: 3").encode()]))
    case = asked(copy, whole, rng, rng.choice(["predict.py", "score_on.py"]))
    return case._replace(words=f"config.yaml, {case.words}")


def resume_case(rng: random.Random, whole: Path) -> Case:
    """A folder in whatever state under --resume: what it holds is used, or kept aside."""
    copy, words = copied(whole), []
    (copy / "results.json").unlink()
    for _ in range(rng.randint(1, 3)):
        path = rng.choice([p for p in copy.rglob("*") if p.is_file() and p.suffix != ".html"])
        words.append(str(path.relative_to(copy)))
        content = path.read_bytes()
        if rng.random() < 0.2:
            path.unlink()
        elif content:
            replace(path, damaged(content.decode(), rng) if path.name == "config.yaml" else
                    bitten(content, rng))
    before = set(held(copy / "checkpoints").values())

    def walk(run):
        splits = data.load(run.config.data)
        splits |= few_labels.hide(run.config.data, splits)
        run.begin(splits)
        for path in sorted(run.checkpoints.glob("*.pt")):
            stored = run.load(path.stem)
            if stored and path.read_bytes() != (whole / "checkpoints" / path.name).read_bytes():
                raise AssertionError(f"{path.name} was used in silence")

    def holds(status):
        lost = before - set(held(copy).values())
        return f"{len(lost)} checkpoints are gone" if lost else ""
    return Case(f"--resume, {words}", "loop.py",
                lambda: launch(walk, KNOWN, ["--resume", str(copy)]), holds)


def out_case(rng: random.Random, whole: Path) -> Case:
    """Where predict.py is to write, and what it is to read."""
    copy = copied(whole)
    Path("mine.csv").write_text("my,own\n")
    Path("a.csv").mkdir(exist_ok=True)
    out = rng.choice(["mine.csv", "a.csv", "x.txt", "", "\0.csv", "deep/er/x.csv", "/proc/x.csv",
                      "mine.csv/x.csv", "x" * 300 + ".csv", "=x.csv", "/dev/full", "x.CSV"])
    read = rng.choice(["photos", "photos/0.png", "absent", "mine.csv", "runs", "\0", ""])
    arguments = [str(copy), read, f"--out={out}"]

    def holds(status):
        if Path("mine.csv").read_text() != "my,own\n":
            return "a file of the user's was overwritten"
        return "" if status or Path(out).is_file() else "nothing was written"
    return Case(repr(arguments), "predict.py", lambda: predict.main(arguments), holds)


def on_case(rng: random.Random, whole: Path) -> Case:
    """score_on.py on a damaged config, or on odd classes."""
    copy = copied(whole)
    Path("on.yaml").write_bytes(damaged(SMALL, rng))
    pictures(Path("root"), 12, lambda i: f"{rng.choice(NAMES[:12])}/{i}.png")
    arguments = [str(copy), "--on", "on.yaml", *rng.choice([[], [
        "--set=data.kind=folder", "--set=data.root=root", "--set=data.malignant=[a&b]"]])]
    return Case(f"score_on {arguments}", "score_on.py", lambda: score_on.main(arguments))


def process_case(rng: random.Random, whole: Path) -> Case:
    """Outputs that are closed, full or of few letters, and Ctrl-C, in a process of its own."""
    copy = copied(whole)
    commands = {"report": f"-m extras.report {Path(copy).resolve()}",
                "show_data.py": f"{HERE}/examples/show_data.py --config small.yaml --out sheet.png",
                "loop.py": f"{HERE}/loop.py --config small.yaml"}
    program = rng.choice(list(commands))
    how = rng.choice([">&-", "2>&-", ">/dev/full", "2>/dev/full", "ascii", "Ctrl-C", "| true"])
    shell = f"cd {HERE if program == 'report' else Path().resolve()} && exec {sys.executable} "
    shell += commands[program]
    if how == "ascii":
        shell = f"export PYTHONIOENCODING=ascii; {shell}"
    elif how == "| true":
        shell = f"set -o pipefail; ({shell}) | true"
    elif how != "Ctrl-C":
        shell += f" {how}"
    wait = rng.uniform(3, 6)            # after the imports

    def call():
        process = subprocess.Popen(["bash", "-c", shell], stdout=subprocess.PIPE, text=True,
                                   stderr=subprocess.PIPE, start_new_session=True)
        if how == "Ctrl-C":
            time.sleep(wait)
            os.killpg(process.pid, signal.SIGINT)
        said = process.communicate(timeout=120)[1]
        if how == "Ctrl-C" and "in <module>" in said and "import" in said:
            return 0            # Python was still importing: its own traceback, nothing begun
        print(said, end="", file=sys.stderr)
        if how == "Ctrl-C" and (process.returncode, bool(said)) in ((130, True), (-2, False)):
            return 0            # -2: it had said and done all, and Python was clearing up
        return process.returncode
    return Case(f"{program} {how}", program, call)


KINDS = {"config": config_case, "arguments": arguments_case, "table": table_case,
         "image": image_case, "folder": folder_case, "npz": npz_case, "json": json_case,
         "log": log_case, "checkpoint": checkpoint_case, "changed": config_of_run_case,
         "resume": resume_case, "out": out_case, "on": on_case, "process": process_case}
SLOW = "process"        # seconds each: one in 40


# ---- and what comes of it ------------------------------------------------------------------------

ASIDE = re.compile(r"^\S+\.(pt|previous|pt\.previous): .*; set aside as|^(images|data|stage|\s*$)")


def knock(case: Case) -> tuple[int | None, str]:
    """The exit status, and what is wrong with how the program takes this input ("")."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            status = case.call() or 0
    except SystemExit as end:
        status = end.code or 0
    except BaseException as error:
        return None, f"{type(error).__name__}: {error}"
    lines = [line for line in said.getvalue().splitlines() if not ASIDE.match(line)]
    if status == 0:
        return 0, case.holds(0)
    silent = "2>" in case.words and not lines
    if status != 2 or not silent and (len(lines) != 1 or
                                      not lines[0].startswith(f"{case.program}: ")):
        return status, f"status {status}, {lines[-9:]}"
    return status, case.holds(status)


def small_run() -> Path:
    """A finished run of few steps, in `whole`."""
    Path("small.yaml").write_text(SMALL)
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        if loop.main(["--config", "small.yaml"]):
            raise RuntimeError("the small run itself does not end well")
    os.rename("runs/small", "whole")
    return Path("whole")


def tried(whole: Path, cases: int, seed: int, kinds) -> Counter:
    """Count what becomes of so many cases, in the working directory, and print what is wrong."""
    Path("small.yaml").write_text(SMALL)
    pictures(Path("photos"), 3, lambda i: f"{i}.png")
    found, kinds = Counter(), list(kinds)
    for number in range(cases):
        rng = random.Random(f"{seed} {number}")
        kind = kinds[number % len(kinds)]
        if kind == SLOW and len(kinds) > 1 and number % 40 >= len(kinds):
            kind = kinds[0]
        case = KINDS[kind](rng, whole)
        status, problem = knock(case)
        found["cases"] += 1
        found["refused"] += status == 2
        found["wrong"] += bool(problem)
        if problem:
            print(f"{kind} {number}, {case.words}: {problem}"[:600], flush=True)
        if (number + 1) % 1000 == 0:
            print(dict(found), flush=True)
    return found


@one_line("hostile.py")
def main(argv: list[str] | None = None) -> int:
    parser = Parser("hostile.py", __doc__)
    parser.add_argument("--cases", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=KINDS, action="append", help="this kind of input")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        kinds = arguments.only or KINDS
        plain = {"config", "arguments", "table", "image", "folder"}
        whole = small_run() if set(kinds) - plain else Path()
        found = tried(whole.resolve(), arguments.cases, arguments.seed, kinds)
        os.chdir("/")
    print(f"{found['cases']} cases: {found['refused']} refused, {found['wrong']} wrong")
    return 1 if found["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
