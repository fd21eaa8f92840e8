"""Every way to write a config wrongly gives one line that names the key, and exit status 2."""
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import loop
from engine import config

HERE = Path(__file__).parents[1]
DEFAULT = HERE / "config.yaml"
KNOWN = {"guidance.sampler": ("ddim", "ddpm", "dpm"),
         "loop.arms": "real replay recolour random guided external pseudo leaked all".split(),
         "guidance.objectives": {"class_evidence": 1, "hardness": 2, "margin": 3}}


def load(text, tmp_path, overrides=(), known={}):
    path = tmp_path / "c.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return config.load(path, overrides, known)


def test_the_default_is_what_plain_yaml_reads():
    sections = yaml.safe_load(DEFAULT.read_text())
    assert config.load(DEFAULT).as_dict() == sections
    assert list(sections) == "data unet ddpm classifier guidance evaluate loop".split()


def test_every_key_of_the_default_has_a_comment_on_its_line_or_the_next():
    lines = DEFAULT.read_text().splitlines()
    keys = [i for i, line in enumerate(lines) if line.startswith("  ") and line.strip()[0] != "#"]
    assert len(keys) > 60
    for i in keys:
        assert " # " in lines[i] or lines[i + 1].strip().startswith("#"), lines[i]


def test_every_rule_is_of_a_key_and_of_the_type_of_its_default_and_every_number_has_one():
    sections = yaml.safe_load(DEFAULT.read_text())
    for section, keys in sections.items():
        for key, default in keys.items():
            rule = config.RULES[section].get(key)
            numbers = (default.values() if isinstance(default, dict) else
                       default if isinstance(default, list) else [default])
            for value in numbers:
                if type(value) in (int, float):
                    low, high = rule[0] if isinstance(default, list) else rule
                    assert type(value) is type(low) and type(high) in (type(low), type(None)), key
    for section, rules in config.RULES.items():
        assert rules.keys() <= sections[section].keys()


@pytest.mark.parametrize("path", sorted((HERE / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_config_loads_and_says_what_differs_only(path):
    built, own = config.load(path).as_dict(), yaml.safe_load(path.read_text())
    default = config.load(path.parent / own["extends"]).as_dict()
    for section, keys in own.items():
        for key, value in keys.items() if section != "extends" else ():
            assert built[section][key] == value
            assert default[section][key] != value, f"{section}.{key} repeats the default"


def test_extends_and_set_override_in_that_order(tmp_path):
    (tmp_path / "below.yaml").write_text(DEFAULT.read_text())
    text = "extends: below.yaml\nddpm: {steps: 7, lr: 1.0e-2}\n"
    c = load(text, tmp_path, ["ddpm.steps=9", "loop.arms=[real, guided]", "data.root="])
    assert (c.ddpm.steps, c.ddpm.lr, c.ddpm.batch) == (9, 0.01, config.load(DEFAULT).ddpm.batch)
    assert c.loop.arms == ["real", "guided"] and c.data.root == ""


def test_a_resolved_config_reads_back(tmp_path):
    c = config.load(DEFAULT, ["loop.bf16=true", "guidance.objectives.margin=1"])
    assert load(yaml.safe_dump(c.as_dict(), sort_keys=False), tmp_path) == c != config.load(DEFAULT)


def test_a_value_is_of_the_type_of_its_default(tmp_path):
    overrides = ["ddpm.lr=1", "data.malignant=[mel]", "guidance.objectives.hardness=0",
                 "loop.bf16=false", "unet.multipliers=[1, 2]", "classifier.jitter=[1]",
                 "loop.compile=true"]
    c = config.load(DEFAULT, overrides)
    values = [c.ddpm.lr, c.data.malignant[0], c.guidance.objectives["hardness"], c.loop.bf16,
              c.unet.multipliers[1], c.classifier.jitter[0], c.loop.compile, c.ddpm.steps]
    assert values == [1, "mel", 0, "false", 2, 1, True, 1400]
    assert list(map(type, values)) == [float, str, float, str, int, float, bool, int]


def test_a_mapping_is_merged_entry_by_entry(tmp_path):
    default = config.load(DEFAULT).guidance.objectives
    other = {**default, "hardness": 0.5}
    text = f"extends: {DEFAULT}\nguidance: {{objectives: {{hardness: 0.5}}}}\n"
    assert default["hardness"] not in (0.5, 0.25)
    assert load(text, tmp_path).guidance.objectives == other
    for override in ("guidance.objectives.hardness=0.5", "guidance.objectives={hardness: 0.5}"):
        assert config.load(DEFAULT, [override]).guidance.objectives == other
        assert load(text.replace("0.5", "0.25"), tmp_path, [override]).guidance.objectives == other
    assert config.load(DEFAULT).guidance.objectives == default


def test_names_that_other_modules_know_are_enough():
    c = config.load(DEFAULT, ["guidance.objectives.margin=2", "guidance.sampler=dpm",
                              "loop.arms=[real]"], KNOWN)
    assert c.guidance.objectives["margin"] == 2 and c.guidance.sampler == "dpm"
    free = ["guidance.objectives.new=1", "guidance.sampler=new", "loop.arms=[real, new]"]
    assert config.load(DEFAULT, [*free, "loop.rounds=1"]).loop.arms[1] == "new"      # any name
    for override in free:
        with pytest.raises(config.ConfigError, match="new"):
            config.load(DEFAULT, [override], KNOWN)


def test_a_config_is_frozen_and_compares_by_its_values():
    c, same = config.load(DEFAULT), config.load(DEFAULT)
    assert c == same and c.ddpm == same.ddpm and vars(c.data)["size"] == c.data.size
    for place, name in ((c.ddpm, "steps"), (c.ddpm, "new"), (c, "ddpm")):
        with pytest.raises(AttributeError, match=name):
            setattr(place, name, 3)
    c.as_dict()["guidance"]["objectives"].clear()
    c.as_dict()["loop"]["arms"].clear()
    assert c == same == config.load(DEFAULT)


def test_a_changed_copy_is_checked_and_leaves_the_first_alone():
    c = config.load(DEFAULT)
    other = c.replace("guidance", start="parent", objectives={"hardness": 1})
    assert other.guidance.start == "parent" != c.guidance.start and other.ddpm == c.ddpm
    assert other.guidance.objectives == {**c.guidance.objectives, "hardness": 1.0}
    assert other != c == config.load(DEFAULT)
    for section, values in (("guidance", {"strat": 1}), ("guidance", {"start": 1}), ("gui", {})):
        with pytest.raises(config.ConfigError, match="gu"):
            c.replace(section, **values)


@pytest.mark.parametrize("key, wrong", [("ddpm.lr", "1e-4"), ("ddpm.steps", 1.5),
                                        ("ddpm.steps", None), ("classifier.jitter", 0.3),
                                        ("unet.multipliers", []), ("ddpm.schedule", True)])
def test_a_default_edited_wrongly_is_found_too(key, wrong):
    section, name = key.split(".")
    with pytest.raises(config.ConfigError, match=key):
        config.checked(key, wrong, wrong, config.RULES[section][name])


OVERRIDES = [
    ("ddpm.stepz=5", "ddpm.stepz", "steps"), ("dpm.steps=5", "dpm", "ddpm"),
    ("ddpm.steps=many", "ddpm.steps", "whole number"), ("ddpm.steps=1.5", "ddpm.steps", "1.5"),
    ("ddpm.steps=true", "ddpm.steps", "True"), ("ddpm.steps=0", "ddpm.steps", "at least 1"),
    ("ddpm.steps=", "ddpm.steps", "''"), ("ddpm.steps=null", "ddpm.steps", "None"),
    ("ddpm.lr=1e-4", "ddpm.lr", "0.0001"), ("ddpm.lr=fast", "ddpm.lr", "'fast'"),
    ("ddpm.lr=.nan", "ddpm.lr", "finite"), ("ddpm.lr=.inf", "ddpm.lr", "finite"),
    ("ddpm.lr=-1", "ddpm.lr", "between"), ("ddpm.schedule=cosin", "ddpm.schedule", "'cosine'"),
    ("ddpm.prediction=x0", "ddpm.prediction", "known: v, eps"),
    ("ddpm.drop=1", "ddpm.drop", "between"), ("unet.multipliers=[]", "unet.multipliers", "empty"),
    ("unet.multipliers=2", "unet.multipliers", "list"),
    ("unet.multipliers=[1, two]", "unet.multipliers[1]", "'two'"),
    ("unet.width=40", "unet.width", "multiple of 16"),
    ("ddpm.joint_head=true", "ddpm.joint_head", "ddpm.classifier_weight"),
    ("ddpm.joint_head=1", "ddpm.joint_head", "true or false"),
    ("ddpm.classifier_weight=-0.1", "ddpm.classifier_weight", "between"),
    ("ddpm.classifier_probability=2", "ddpm.classifier_probability", "between"),
    ("data.size=36", "data.size", "multiple of 8"), ("data.size=8", "data.size", "between"),
    ("data.size=256", "data.size", "phantom"), ("data.kind=ham1000", "data.kind", "ham10000"),
    ("data.kind=ham10000", "data.root", "folder"), ("data.kind=on", "data.kind", "phantom"),
    ("data.val_fraction=0.9", "data.val_fraction", "between"),
    ("data.skip_bad=1", "data.skip_bad", "true or false"),
    ("data.group=sex", "data.group", "phantom"),
    ("data.malignant=mel", "data.malignant", "list"), ("data.folds=1", "data.folds", "between"),
    ("classifier.jitter=[]", "classifier.jitter", "empty"),
    ("classifier.jitter=0.3", "classifier.jitter", "list"),
    ("classifier.network=resnet19", "classifier.network", "resnet18"),
    ("guidance.depth=0", "guidance.depth", "between"),
    ("guidance.steps=960", "guidance.steps", "950"),
    ("guidance.start=noise", "guidance.start", "counterfactual"),
    ("guidance.targets=group", "guidance.targets", "'groups'"),
    ("guidance.targets=both", "guidance.targets", "known: hard, groups"),
    ("guidance.sampler=dmp", "guidance.sampler", "'dpm'"),
    ("guidance.sampler=euler", "guidance.sampler", "known: ddim, ddpm, dpm"),
    ("guidance.sampler=ddpm", "guidance.sampler", "guidance.start: parent"),
    ("guidance.objectives.hardnes=1", "guidance.objectives.hardnes", "'hardness'"),
    ("guidance.objectives={x: 1}", "guidance.objectives.x", "known: class_evidence, hardness"),
    ("guidance.objectives.hardness=11", "guidance.objectives.hardness", "between"),
    ("guidance.objectives.hardness=-1", "guidance.objectives.hardness", "between"),
    ("guidance.objectives.hardness=big", "guidance.objectives.hardness", "'big'"),
    ("guidance.objectives=0.1", "guidance.objectives", "hardness"),
    ("guidance.objectives={on: 1}", "guidance.objectives", "yaml reads on"),
    ("guidance.steps.more=1", "guidance.steps.more", "did you mean"),
    ("guidance.external=made", "guidance.external", "loop.arms"),
    ("loop.arms=[real, external]", "guidance.external", "folder or csv"),
    ("classifier.weights=w.pth", "classifier.network", "resnet18"),
    ("loop.arms=[guided]", "loop.arms", "real"), ("loop.arms=[]", "loop.arms", "empty"),
    ("loop.arms=[real, gided]", "loop.arms[1]", "'guided'"),
    ("loop.compile=auto", "loop.compile", "true or false"),
    ("loop.seeds=0", "loop.seeds", "between"), ("loop.mine_from=test", "loop.mine_from", "known"),
    ("loop.share=1", "loop.share", "between"), ("evaluate.draws=1", "evaluate.draws", "between"),
    ("loop", "--set", "section.key=value"), ("loop.seeds", "--set", "section.key=value"),
    ("=3", "--set", "section.key=value"), ("loop.seeds=[", "--set loop.seeds=[", ""),
]


@pytest.mark.parametrize("override, key, hint", OVERRIDES, ids=[o[0] for o in OVERRIDES])
def test_a_wrong_value_is_named(override, key, hint):
    with pytest.raises(config.ConfigError) as error:
        config.load(DEFAULT, [override], KNOWN)
    text = str(error.value)
    assert key in text and hint in text and "\n" not in text


def test_what_only_keys_together_get_wrong():
    for overrides, key in (
            (["data.kind=folder", "data.root=x"], "data.malignant"),
            (["data.kind=folder", "data.root=x", "data.malignant=[a]", "data.group=sex"],
             "data.group"),
            (["data.kind=csv", "data.root=x", "data.malignant=[a]", "data.image_column=file"],
             "data.label_column"),
            (["data.kind=ham10000", "data.root=x", "data.val_fraction=0.45",
              "data.test_fraction=0.45"], "data.val_fraction"),
            (["loop.arms=[real, noise]"], "loop.rounds: found 2; .* write 1, or add 'guided'"),
            (["loop.arms=[real, leaked]"], "loop.arms: 'leaked' .* add 'guided'"),
            (["loop.arms=[real, pseudo]"], "data.labelled"),
            (["guidance.start=parent", "guidance.sampler=ddpm", "guidance.steps=501"],
             "guidance.steps")):
        with pytest.raises(config.ConfigError, match=key):
            config.load(DEFAULT, overrides)
    for good in (["loop.arms=[all, leaked]"], ["guidance.start=parent", "guidance.sampler=ddpm"]):
        config.load(DEFAULT, good)


FILES = [
    ("", "nothing"), ("- 1\n- 2\n", "list"), ("just text\n", "str"), ("data: 3\n", "'data'"),
    ("data:\n\tsize: 3\n", "line 2"), ("data: {size: 3\n", "line"), (b"\xff\xfe\x00", "utf-8"),
    ("ddpm: {steps: 1, steps: 2}\n", "'steps' stands twice"),
    ("ddpm: {on: 2}\n", "yaml reads on"), ("extends: 3\n", "extends"),
    ("extends: c.yaml\n", "circle"), ("extends: absent.yaml\n", "absent.yaml"),
    ("extends: ../absent.yaml\n", "'extends:' leads to"), ("extends: ''\n", "extends: config.yaml"),
    ("data: {size: 32}\n", "extends: config.yaml"), ("x: !!python/object:os.system {}\n", "line 1"),
]


@pytest.mark.parametrize("text, hint", FILES, ids=[repr(f[0])[:30] for f in FILES])
def test_a_wrong_file_is_named(text, hint, tmp_path):
    with pytest.raises(config.ConfigError) as error:
        load(text, tmp_path)
    assert hint in str(error.value) and "\n" not in str(error.value)


def test_a_copied_config_that_extends_nothing_there_says_where_it_looked(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    with pytest.raises(config.ConfigError) as error:
        load((HERE / "configs/tiny.yaml").read_text(), folder)
    text = str(error.value)
    assert text.startswith(str(folder / "c.yaml")) and "\n" not in text
    assert f"{tmp_path / 'config.yaml'}, which cannot be read" in text and str(DEFAULT) in text


def test_a_byte_order_mark_is_no_error(tmp_path):
    assert load("\ufeff" + DEFAULT.read_text(), tmp_path) == config.load(DEFAULT)


def test_the_command_ends_with_one_line_and_status_2(tmp_path):
    done = subprocess.run([sys.executable, str(HERE / "loop.py"), "--config", "absent.yaml"],
                          cwd=tmp_path, capture_output=True, text=True)
    lines = [line for line in done.stderr.splitlines() if line.startswith("loop.py:")]
    assert done.returncode == 2 and len(lines) == 1 and "absent.yaml" in lines[0]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments, hint", [
    (["--config", str(DEFAULT), "--set", "ddpm.stepz=5"], "did you mean 'steps'"),
    (["--config", str(DEFAULT), "--set", "loop.device=tpu9"], "loop.device"),
    (["--resume", "runs/absent"], "runs/absent"),
    (["--config", str(HERE / "configs/ham10000.yaml"), "--set", "data.root=absent"], "data.root"),
])
def test_whatever_is_wrong_is_one_line(arguments, hint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert loop.main(arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("loop.py:")]
    assert len(lines) == 1 and hint in lines[0]
