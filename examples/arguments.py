"""What the examples ask on their command line: a config, and where to write."""
import argparse
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from engine.command import Parser


def parser(program: str, about: str) -> Parser:
    """One that takes --config and --set."""
    asked = Parser(program, about)
    asked.add_argument("--config", required=True, help="a yaml file such as config.yaml")
    asked.add_argument("--set", action="append", default=[], metavar="section.key=value")
    return asked


def output(*suffixes: str) -> Callable[[str], Path]:
    """The type of --out: a file that can be written, known before any work is done."""
    def path(text: str) -> Path:
        out = Path(text)
        if out.suffix.lower() not in suffixes or out.is_dir():
            raise argparse.ArgumentTypeError(f"found {text!r}, write a file that ends in "
                                             + " or ".join(suffixes))
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            with open(out, "ab"):
                new = out.stat().st_size == 0
            if new:
                out.unlink()
        except (OSError, ValueError) as error:
            raise argparse.ArgumentTypeError(
                f"{text!r} cannot be written ({getattr(error, 'strerror', error)})") from None
        return out
    return path
