"""The configuration: one yaml file, one section per module, every key checked before anything runs.

config.yaml holds every key with its default, unit and reason; another file `extends:` it and says
only what differs; `--set section.key=value` overrides both.
"""
import dataclasses
import difflib
import math
import typing
from dataclasses import dataclass, field
from pathlib import Path

import yaml

ARMS = ("real", "balanced", "pseudo", "replay", "recolour", "noise", "external", "random",
        "guided")


class ConfigError(ValueError):
    """One line that names the key, what was found and what to write instead."""


def within(low: float | None = None, high: float | None = None, *, choices: tuple = (),
           least: int = 0):
    """A field whose value (or whose every entry) lies in [low, high] or among `choices`; a list
    has at least `least` entries."""
    return field(metadata={"low": low, "high": high, "choices": choices, "least": least})


@dataclass(frozen=True)
class Data:
    kind: str = within(choices=("phantom", "ham10000", "isic", "fitzpatrick17k", "dermamnist",
                               "folder", "csv"))
    root: str
    size: int = within(16, 512)
    seed: int = within(0, 2 ** 32)
    train: int = within(40, 10 ** 6)
    val: int = within(40, 10 ** 6)
    test: int = within(40, 10 ** 6)
    val_fraction: float = within(0.01, 0.5)
    test_fraction: float = within(0.01, 0.5)
    split_by: str = within(choices=("lesion", "image"))
    labelled: float = within(0.001, 1)
    malignant: list[str]
    image_column: str
    label_column: str
    lesion_column: str
    group: str
    skip_bad: bool
    folds: int = within(2, 20)


@dataclass(frozen=True)
class Unet:
    width: int = within(16, 1024)
    multipliers: list[int] = within(1, 16, least=1)
    blocks: int = within(1, 8)
    attention: int = within(0, 64)
    patch: int = within(1, 8)
    joint_head: bool


@dataclass(frozen=True)
class Ddpm:
    T: int = within(10, 10_000)
    schedule: str = within(choices=("cosine", "linear"))
    prediction: str = within(choices=("v", "eps"))
    steps: int = within(1)
    batch: int = within(2, 10 ** 5)
    lr: float = within(1e-7, 1)
    ema: float = within(0, 0.99999)
    drop: float = within(0, 0.9)
    classifier_weight: float = within(0, 10)
    classifier_probability: float = within(0, 1)


@dataclass(frozen=True)
class Classifier:
    network: str = within(choices=("auto", "small", "resnet18", "resnet34", "resnet50"))
    weights: str
    steps: int = within(1)
    guide_steps: int = within(1)
    batch: int = within(2, 10 ** 5)
    lr: float = within(1e-7, 1)
    jitter: list[float] = within(0, 3, least=1)


@dataclass(frozen=True)
class Guidance:
    targets: str = within(choices=("hard", "groups", "both"))
    external: str
    start: str = within(choices=("counterfactual", "recoloured", "parent"))
    depth: float = within(0.05, 1)
    strength: float = within(0.05, 1)
    steps: int = within(1)
    classifier_free: float = within(0, 20)
    class_scale: float = within(0, 10)
    hardness_scale: float = within(0, 10)


@dataclass(frozen=True)
class Evaluate:
    min_count: int = within(1)
    draws: int = within(100, 10 ** 6)
    oracle: int = within(100, 10 ** 6)
    inception: str


@dataclass(frozen=True)
class Loop:
    seed: int = within(0, 2 ** 32)
    seeds: int = within(1, 100)
    rounds: int = within(1, 20)
    arms: list[str] = within(choices=ARMS + ("all",), least=1)
    margin: float = within(-1, 1)
    added: float = within(0.01, 20)
    surplus: float = within(1, 10)
    share: float = within(0.01, 0.9)
    mine_from: str = within(choices=("train", "test"))
    device: str
    bf16: str = within(choices=("auto", "true", "false"))
    compile: str = within(choices=("auto", "true", "false"))
    deterministic: bool


@dataclass(frozen=True)
class Config:
    data: Data
    unet: Unet
    ddpm: Ddpm
    classifier: Classifier
    guidance: Guidance
    evaluate: Evaluate
    loop: Loop

    def as_dict(self) -> dict:
        return dataclasses.asdict(self)


class Loader(yaml.SafeLoader):
    """Safe yaml of plain values only. A key written twice is refused: the plain loader silently
    keeps the last; so are tags, which name types, and anchors, which can multiply without end."""

    def compose_node(self, parent, index):
        event = self.peek_event()
        found = (event.anchor and f"&{event.anchor}" or getattr(event, "tag", None)
                 or len(getattr(event, "value", "")) > 2000 and "a value of over 2,000 characters")
        if found:
            raise ConfigError(f"line {event.start_mark.line + 1}: {found} is not read here; write "
                              "plain values")
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise ConfigError(f"key {key!r} is no text: yaml reads on, off, yes and no as "
                                  "true and false, and bare numbers as numbers; put it in quotes")
            if key in seen:
                raise ConfigError(f"key '{key}' stands twice, the second time in line "
                                  f"{key_node.start_mark.line + 1}: remove one")
            seen.add(key)
        return super().construct_mapping(node, deep)


def parse(text: str, where: str):
    """yaml to Python, with an error of one line."""
    try:
        return yaml.load(text, Loader)          # a subclass of SafeLoader: builds no objects
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not yaml"
        raise ConfigError(f"{where}{line}: {problem}") from None
    except (ValueError, RecursionError) as error:       # ours; an impossible date; too deep a list
        raise ConfigError(f"{where}: {error}") from None


def read(path: Path, seen: tuple[Path, ...] = ()) -> dict:
    """The sections of a config file over those of the file that it `extends:`, unchecked."""
    try:
        here, text = path.resolve(), path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not utf-8 text"
        raise ConfigError(f"{path}: cannot be read ({reason})") from None
    if here in seen:
        raise ConfigError(f"{path}: 'extends' goes round in a circle")
    sections = parse(text, str(path))
    if not isinstance(sections, dict):
        raise ConfigError(f"{path}: wanted sections such as 'data:' with keys below them, found "
                          f"{'nothing' if sections is None else type(sections).__name__}")
    below = {}
    if "extends" in sections:
        parent = sections.pop("extends")
        if not isinstance(parent, str):
            raise ConfigError(f"{path}: 'extends' must be the path of another config, "
                              f"found {parent!r}")
        below = read(path.parent / parent, (*seen, here))
    for name, section in sections.items():
        if not isinstance(section, dict):
            raise ConfigError(f"{path}: section '{name}' must hold keys, found {section!r}")
        below[name] = {**below.get(name, {}), **section}
    return below


def nearest(name: str, known: typing.Iterable[str]) -> str:
    known = list(known)
    close = difflib.get_close_matches(name, known, 1, 0.5)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(known)}"


def checked(key: str, value, kind, rules: dict):
    """The value as its declared type, or a ConfigError that names the key."""
    if typing.get_origin(kind) is list:
        if not isinstance(value, list):
            raise ConfigError(f"{key}: wanted a list such as [a, b], found {value!r}")
        if len(value) < rules.get("least", 0):
            raise ConfigError(f"{key}: the list is empty, give at least {rules['least']}")
        entry, = typing.get_args(kind)
        return [checked(f"{key}[{i}]", v, entry, rules) for i, v in enumerate(value)]
    if kind is float and type(value) is int:
        value = float(str(value))       # of text, so that 400 digits are infinite and no error
    if kind is str and isinstance(value, bool):
        value = str(value).lower()
    if type(value) is not kind:
        hint = ""
        if kind is float and isinstance(value, str):
            try:
                hint = f" (yaml reads {value} as text: write {float(value)!r} as 1.0e-4 is written)"
            except ValueError:
                pass
        word = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}[kind]
        raise ConfigError(f"{key}: wanted {word}, found {value!r}{hint}")
    if kind is float and not math.isfinite(value):
        raise ConfigError(f"{key}: wanted a finite number, found {value!r}")
    low, high, choices = (rules.get(k) for k in ("low", "high", "choices"))
    if choices and value not in choices:
        raise ConfigError(f"{key}: found {value!r}, {nearest(value, choices)}")
    if low is not None and value < low or high is not None and value > high:
        bounds = f"at least {low}" if high is None else f"between {low} and {high}"
        raise ConfigError(f"{key}: wanted {bounds}, found {value!r}")
    return value


def build(sections: dict) -> Config:
    """Sections to a Config: every key known, present, of its type and in its range."""
    kinds = typing.get_type_hints(Config)
    for name in sections:
        if name not in kinds:
            raise ConfigError(f"unknown section '{name}': {nearest(name, kinds)}")
    built = {}
    for name, kind in kinds.items():
        given = sections.get(name, {})
        fields, types = {f.name: f for f in dataclasses.fields(kind)}, typing.get_type_hints(kind)
        for key in given:
            if key not in fields:
                raise ConfigError(f"unknown key '{name}.{key}': {nearest(key, fields)}")
        for key in fields:
            if key not in given:
                raise ConfigError(f"{name}.{key} is missing: begin the file with "
                                  "'extends: config.yaml', which holds every key")
        built[name] = kind(**{key: checked(f"{name}.{key}", given[key], types[key],
                                           fields[key].metadata) for key in fields})
    config = Config(**built)
    check_together(config)
    return config


def check_together(c: Config) -> None:
    """What no key can know alone."""
    unit = c.unet.patch * 2 ** (len(c.unet.multipliers) - 1)
    if c.data.size % unit:
        raise ConfigError(f"data.size: {c.data.size} must be a multiple of {unit}, unet.patch "
                          "times 2 for every level after the first in unet.multipliers")
    if c.unet.width % 16:
        raise ConfigError(f"unet.width: {c.unet.width} must be a multiple of 16")
    if c.unet.joint_head and not c.ddpm.classifier_weight:
        raise ConfigError("unet.joint_head: the head learns with ddpm.classifier_weight, write one "
                          "above 0 such as 0.2; found 0")
    if c.data.kind == "phantom" and c.data.size > 128:
        raise ConfigError("data.size: the phantom is drawn at 16 to 128 pixels, "
                          f"found {c.data.size}")
    if c.data.kind != "phantom" and not c.data.root:
        raise ConfigError(f"data.root: data.kind '{c.data.kind}' needs the folder of the images")
    if c.data.kind in ("folder", "csv") and not c.data.malignant:
        raise ConfigError("data.malignant: name the malignant classes, such as [mel]")
    if c.data.kind == "csv" and not (c.data.image_column and c.data.label_column):
        raise ConfigError("data.image_column, data.label_column: name the columns of the csv that "
                          "hold each image's file and class")
    if c.data.kind == "phantom" and c.data.group or (
            c.data.kind == "folder" and c.data.group not in ("", "ita")):
        raise ConfigError(f"data.group: kind {c.data.kind} has no columns, found '{c.data.group}'; "
                          "write \"\" for none, or with a folder ita")
    if c.data.val_fraction + c.data.test_fraction > 0.8:
        total = c.data.val_fraction + c.data.test_fraction
        raise ConfigError("data.val_fraction + data.test_fraction: at most 0.8, something must be "
                          f"left to train on; found {total:.2f}")
    if c.classifier.weights and c.classifier.network in ("auto", "small"):
        raise ConfigError(f"classifier.network: found '{c.classifier.network}'; classifier.weights "
                          "are of resnet18, resnet34 or resnet50: write which")
    depth = c.guidance.depth if c.guidance.start == "counterfactual" else c.guidance.strength
    if c.guidance.steps > int(depth * c.ddpm.T):
        raise ConfigError(f"guidance.steps: {c.guidance.steps} steps do not fit into the "
                          f"{int(depth * c.ddpm.T)} noise levels that they cross")
    if "real" not in c.loop.arms and "all" not in c.loop.arms:
        raise ConfigError("loop.arms: 'real' is the arm that all others are compared with, add it")
    if ("external" in c.loop.arms) > bool(c.guidance.external):
        raise ConfigError("guidance.external: arm 'external' needs the folder or csv of its images")
    if bool(c.guidance.external) > bool({"external", "all"} & set(c.loop.arms)):
        raise ConfigError("guidance.external: add 'external' to loop.arms, the arm of these images")
    if "pseudo" in c.loop.arms and c.data.labelled == 1:
        raise ConfigError("loop.arms: 'pseudo' needs images whose class is not told: write "
                          "data.labelled below 1, or leave it out")
    if c.loop.mine_from == "test" and "guided" not in c.loop.arms and "all" not in c.loop.arms:
        raise ConfigError("loop.mine_from: 'test' is shown beside the clean loop: add 'guided' to "
                          "loop.arms")


def load(path: str | Path, overrides: typing.Sequence[str] = ()) -> Config:
    """Read, extend, override and check a config. overrides: 'section.key=value', value in yaml."""
    sections = read(Path(path))
    for text in overrides:
        key, equals, value = text.partition("=")
        section, dot, name = key.partition(".")
        if not (equals and dot and section and name):
            raise ConfigError(f"--set {text}: wanted section.key=value, such as ddpm.steps=500")
        sections.setdefault(section, {})[name] = parse(value, f"--set {text}") if value else ""
    return build(sections)
