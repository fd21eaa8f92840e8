"""The configuration, every key checked before anything runs. config.yaml holds each with its
default, unit and reason; others `extends:` it, and `--set section.key=value` overrides both."""
import copy
import difflib
import functools
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace

import yaml

DEFAULTS = Path(__file__).parents[1] / "config.yaml"
WORDS = {int: "a whole number", float: "a finite number", str: "text", bool: "true or false"}

# Two numbers: the least and the most. Texts: the choices. In []: of a list's every entry. A value's
# type is its rule's, or its default's.
RULES = {
    "data": dict(kind=("phantom", "ham10000", "isic", "fitzpatrick17k", "dermamnist", "folder",
                       "csv"), size=(16, 512), seed=(0, 2 ** 32), val_fraction=(0.01, 0.5),
                 test_fraction=(0.01, 0.5), labelled=(0.001, 1.0), split_by=("lesion", "image"),
                 train=(40, 10 ** 6), val=(40, 10 ** 6), test=(40, 10 ** 6), folds=(2, 20)),
    "unet": dict(width=(16, 1024), multipliers=[(1, 16)], blocks=(1, 8), attention=(0, 64),
                 patch=(1, 8)),
    "ddpm": dict(T=(10, 10_000), schedule=("cosine", "linear"), prediction=("v", "eps"),
                 steps=(1, None), batch=(2, 10 ** 5), lr=(1e-7, 1.0), ema=(0.0, 0.99999),
                 drop=(0.0, 0.9), classifier_weight=(0.0, 10.0), classifier_probability=(0.0, 1.0)),
    "classifier": dict(network=("auto", "small", "resnet18", "resnet34", "resnet50"),
                       steps=(1, None), guide_steps=(1, None), batch=(2, 10 ** 5),
                       lr=(1e-7, 1.0), jitter=[(0.0, 3.0)]),
    "guidance": dict(targets=("hard", "groups"), start=("counterfactual", "recoloured", "parent"),
                     depth=(0.05, 1.0), strength=(0.05, 1.0), steps=(1, None),
                     classifier_free=(0.0, 20.0), objectives=(0.0, 10.0)),
    "evaluate": dict(min_count=(1, None), draws=(100, 10 ** 6), margin=(0.0, 100.0),
                     oracle=(100, 10 ** 6)),
    "loop": dict(seed=(0, 2 ** 32), seeds=(1, 100), rounds=(1, 20), margin=(-1.0, 1.0),
                 added=(0.01, 20.0), surplus=(1.0, 10.0), share=(0.01, 0.9),
                 bf16=("auto", "true", "false")),
}


class ConfigError(ValueError):
    """One line that names the key, what was found and what to write instead."""


def require(condition, message: str) -> None:
    if not condition:
        raise ConfigError(message)


class Section(SimpleNamespace):
    """Values as attributes; vars(section) is the dict."""

    def __setattr__(self, name, value):
        raise AttributeError(f"'{name}': a config does not change, Config.replace makes another")


class Config(Section):
    """Sections data, unet, ddpm, classifier, guidance, evaluate and loop: config.ddpm.steps."""

    def as_dict(self) -> dict[str, dict]:
        return {name: copy.deepcopy(vars(section)) for name, section in vars(self).items()}

    def replace(self, section: str, **values) -> "Config":
        """A copy with other values, checked: config.replace("guidance", start="parent")."""
        return build(merge(self.as_dict(), {section: values}))


class Loader(yaml.SafeLoader):
    """Safe yaml of plain values only: no tags, which name types, no anchors, which multiply without
    end, no key written twice, of which the plain loader keeps the last."""

    def compose_node(self, parent, index):
        event = self.peek_event()
        found = (event.anchor and f"&{event.anchor}" or getattr(event, "tag", None)
                 or len(getattr(event, "value", "")) > 2000 and "a value of over 2,000 characters")
        require(not found, f"line {event.start_mark.line + 1}: {found} is not read here; write "
                           "plain values")
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for i, key in enumerate(keys):
            require(isinstance(key, str), f"key {key!r} is no text: yaml reads on, off, yes and no "
                    "as true and false, and bare numbers as numbers; put it in quotes")
            require(key not in keys[:i], f"key '{key}' stands twice, the second time in line "
                    f"{node.value[i][0].start_mark.line + 1}: remove one")
        return super().construct_mapping(node, deep)


def parse(text: str, where: str):
    try:
        return yaml.load(text, Loader)          # a subclass of SafeLoader: builds no objects
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{where}{line}: {problem or 'not yaml'}") from None
    except (ValueError, RecursionError) as error:       # ours; an impossible date; too deep a list
        raise ConfigError(f"{where}: {error}") from None


def merge(below, above):
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    return below | {key: merge(below.get(key), value) for key, value in above.items()}


def read(path: Path, seen: tuple[Path, ...] = ()) -> dict:
    """The sections of a config file over those of the file that it `extends:`, unchecked."""
    try:
        here, text = path.resolve(), path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        said = f"cannot be read ({getattr(error, 'strerror', None) or 'not utf-8 text'})"
        raise ConfigError(f"{seen[-1]}: 'extends:' leads to {os.path.abspath(path)}, which {said}; "
                          f"write where that file is, such as {DEFAULTS}" if seen else
                          f"{path}: {said}") from None
    require(here not in seen, f"{path}: 'extends' goes round in a circle")
    sections = parse(text, str(path))
    require(isinstance(sections, dict), f"{path}: wanted sections such as 'data:' with keys below "
            f"them, found {'nothing' if sections is None else type(sections).__name__}")
    parent = sections.pop("extends", "")
    require(isinstance(parent, str),
            f"{path}: 'extends' must be the path of another config, found {parent!r}")
    for name, section in sections.items():
        require(isinstance(section, dict),
                f"{path}: section '{name}' must hold keys, found {section!r}")
    return merge(read(path.parent / parent, (*seen, here)) if parent else {}, sections)


defaults = functools.cache(lambda: read(DEFAULTS))      # read once, and not before it is needed


def nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), 1, 0.5)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(known)}"


def checked(key: str, value, default, rule, known: Mapping[str, Iterable[str]] = {}):
    """The value, of its default's type and within its rule, or a ConfigError that names the key.
    The rule's type goes first, so that a wrong edit of config.yaml itself is found as well."""
    if isinstance(default, dict):       # the sections, a section, or a mapping of names to numbers
        require(isinstance(value, dict),
                f"{key}: wanted numbers by name such as {default}, found {value!r}")
        at, names = key and f"{key}.", known.get(key, value) if "." in key else default
        rules = rule if isinstance(rule, dict) else dict.fromkeys(value, rule)
        for name in {**value, **default, **rules}:
            require(name in value, f"{at}{name} is missing: begin the file with "
                                   "'extends: config.yaml', which holds every key")
            if name not in names:
                raise ConfigError(f"unknown {'key' if key else 'section'} '{at}{name}': "
                                  f"{nearest(name, names)}")
        return {name: checked(at + name, value[name], default.get(name, 0.0), rules.get(name, ()),
                              known) for name in default | value}
    if isinstance(rule or default, list):
        require(isinstance(value, list), f"{key}: wanted a list such as [a, b], found {value!r}")
        require(value or not (rule or default), f"{key}: the list is empty, give at least 1")
        default, rule = ("", rule[0]) if rule else ((default or [""])[0], tuple(known.get(key, ())))
        return [checked(f"{key}[{i}]", entry, default, rule) for i, entry in enumerate(value)]
    rule = tuple(known.get(key, rule))
    kind = type(rule[0] if rule else "" if default is None else default)
    if kind is float and type(value) is int:
        value = float(str(value))       # of text, so that 400 digits are infinite and no error
    elif kind is str and type(value) is bool:
        value = str(value).lower()
    if type(value) is not kind or kind is float and not math.isfinite(value):
        digits = r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?"
        hint = (f" (yaml reads {value} as text: write {float(value)!r} as 1.0e-4 is written)"
                if kind is float and re.fullmatch(digits, str(value), re.I) else "")
        raise ConfigError(f"{key}: wanted {WORDS[kind]}, found {value!r}{hint}")
    if rule and kind is str:
        require(value in rule, f"{key}: found {value!r}, {nearest(value, rule)}")
    elif rule:
        low, high = rule
        bounds = f"between {low} and {high}" if high else f"at least {low}"
        require(low <= value <= (high or math.inf), f"{key}: wanted {bounds}, found {value!r}")
    return value


def check_together(c: Config) -> Config:
    """What no key can know alone."""
    d, k, g, arms = c.data, c.classifier, c.guidance, {*c.loop.arms}
    phantom, inverts = d.kind == "phantom", g.start == "counterfactual"
    unit = c.unet.patch * 2 ** (len(c.unet.multipliers) - 1)
    levels = int((g.depth if inverts else g.strength) * c.ddpm.T)
    for wrong, message in (
        (d.size % unit, f"data.size: {d.size} must be a multiple of {unit}, unet.patch times 2 for "
         "every level after the first in unet.multipliers"),
        (c.unet.width % 16, f"unet.width: {c.unet.width} must be a multiple of 16"),
        (c.ddpm.joint_head and not c.ddpm.classifier_weight, "ddpm.joint_head: the head learns "
         "with ddpm.classifier_weight, write one above 0 such as 0.2; found 0"),
        (phantom and d.size > 128, f"data.size: the phantom has 16 to 128 pixels, found {d.size}"),
        (not phantom and not d.root, f"data.root: kind '{d.kind}' needs the folder of the images"),
        (d.kind in ("folder", "csv") and not d.malignant,
         "data.malignant: name the malignant classes, such as [mel]"),
        (d.kind == "csv" and not (d.image_column and d.label_column), "data.image_column, "
         "data.label_column: name the columns of the csv that hold each image's file and class"),
        (phantom and d.group or d.kind == "folder" and d.group not in ("", "ita"), "data.group: "
         f"kind {d.kind} has no columns, found '{d.group}'; write \"\" or, with a folder, ita"),
        (d.val_fraction + d.test_fraction > 0.8, "data.val_fraction + data.test_fraction: at most "
         f"0.8, the rest is train; found {d.val_fraction + d.test_fraction:.2f}"),
        (k.weights and k.network in ("auto", "small"), f"classifier.network: found '{k.network}'; "
         "classifier.weights are of resnet18, resnet34 or resnet50: write which"),
        (k.weights and d.size == 16, "data.size: at 16 pixels the bf16 gradients of published "
         "networks are of memory nobody wrote (a stride over one pixel); write 32 or more"),
        (g.steps > levels, f"guidance.steps: {g.steps} do not fit into the {levels} noise levels"),
        (inverts and g.sampler == "ddpm", "guidance.sampler: 'ddpm' draws noise anew and forgets "
         "the parent of a counterfactual: write ddim or dpm, or guidance.start: parent"),
        (not arms & {"real", "all"}, "loop.arms: add 'real', with which all others are compared"),
        ("external" in arms and not g.external,
         "guidance.external: arm 'external' needs the folder or csv of its images"),
        (g.external and not arms & {"external", "all"},
         "guidance.external: add 'external' to loop.arms, the arm of these images"),
        ("pseudo" in arms and d.labelled == 1, "loop.arms: 'pseudo' needs images whose class is "
         "not told: write data.labelled below 1, or leave it out"),
        ("leaked" in arms and not arms & {"guided", "all"},
         "loop.arms: 'leaked' is shown beside the clean loop: add 'guided'"),
        (c.loop.rounds > 1 and arms - {"real", "balanced", "pseudo", "external"}
         and not arms & {"guided", "all"}, f"loop.rounds: found {c.loop.rounds}; what a further "
         "round mines depends on guided's images: write 1, or add 'guided' to loop.arms"),
    ):
        require(not wrong, message)
    return c


def build(sections: dict, known: Mapping[str, Iterable[str]] = {}) -> Config:
    """Sections to a Config: every key known, present, of its type and in its range."""
    built = checked("", sections, defaults(), RULES, known)
    return check_together(Config(**{name: Section(**keys) for name, keys in built.items()}))


def load(path: str | Path, overrides: Iterable[str] = (), known: Mapping = {}) -> Config:
    """Read, extend, override and check. overrides: 'section.key=value' in yaml, or of an entry of a
    mapping 'section.key.entry=value'. known: {key: the names that may stand there}."""
    sections = read(Path(path))
    for text in overrides:
        key, equals, value = text.partition("=")
        section, _, name = key.partition(".")
        require(equals and section and name,
                f"--set {text}: wanted section.key=value, such as ddpm.steps=500")
        value = parse(value, f"--set {text}") if value else ""
        mapping, _, entry = name.partition(".")
        if entry and isinstance(defaults().get(section, {}).get(mapping), dict):
            name, value = mapping, {entry: value}
        sections = merge(sections, {section: {name: value}})
    return build(sections, known)
