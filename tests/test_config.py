"""Every way to write a config wrongly gives one line that names the key, and exit status 2."""
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from engine import config

HERE = Path(__file__).parents[1]
DEFAULT = HERE / "config.yaml"


def load(text, tmp_path, overrides=()):
    path = tmp_path / "c.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return config.load(path, overrides)


def test_the_default_holds_exactly_the_declared_keys():
    sections = yaml.safe_load(DEFAULT.read_text())
    assert config.load(DEFAULT).as_dict() == sections


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
    c = config.load(DEFAULT)
    assert load(yaml.safe_dump(c.as_dict()), tmp_path) == c


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
    ("unet.joint_head=true", "unet.joint_head", "ddpm.classifier_weight"),
    ("unet.joint_head=1", "unet.joint_head", "true or false"),
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
    ("guidance.external=made", "guidance.external", "loop.arms"),
    ("loop.arms=[real, external]", "guidance.external", "folder or csv"),
    ("classifier.weights=w.pth", "classifier.network", "resnet18"),
    ("loop.arms=[guided]", "loop.arms", "real"), ("loop.arms=[]", "loop.arms", "empty"),
    ("loop.arms=[real, gided]", "loop.arms[1]", "'guided'"),
    ("loop.mine_from=val", "loop.mine_from", "train"), ("loop.seeds=0", "loop.seeds", "between"),
    ("loop.share=1", "loop.share", "between"), ("evaluate.draws=1", "evaluate.draws", "between"),
    ("loop", "--set", "section.key=value"), ("loop.seeds", "--set", "section.key=value"),
    ("=3", "--set", "section.key=value"), ("loop.seeds=[", "--set loop.seeds=[", ""),
]


@pytest.mark.parametrize("override, key, hint", OVERRIDES, ids=[o[0] for o in OVERRIDES])
def test_a_wrong_value_is_named(override, key, hint):
    with pytest.raises(config.ConfigError) as error:
        config.load(DEFAULT, [override])
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
            (["loop.mine_from=test", "loop.arms=[real]"], "loop.mine_from")):
        with pytest.raises(config.ConfigError, match=key):
            config.load(DEFAULT, overrides)


FILES = [
    ("", "nothing"), ("- 1\n- 2\n", "list"), ("just text\n", "str"), ("data: 3\n", "'data'"),
    ("data:\n\tsize: 3\n", "line 2"), ("data: {size: 3\n", "line"), (b"\xff\xfe\x00", "utf-8"),
    ("ddpm: {steps: 1, steps: 2}\n", "'steps' stands twice"),
    ("ddpm: {on: 2}\n", "yaml reads on"), ("extends: 3\n", "extends"),
    ("extends: c.yaml\n", "circle"), ("extends: absent.yaml\n", "absent.yaml"),
    ("data: {size: 32}\n", "extends: config.yaml"), ("x: !!python/object:os.system {}\n", "line 1"),
]


@pytest.mark.parametrize("text, hint", FILES, ids=[repr(f[0])[:30] for f in FILES])
def test_a_wrong_file_is_named(text, hint, tmp_path):
    with pytest.raises(config.ConfigError) as error:
        load(text, tmp_path)
    assert hint in str(error.value) and "\n" not in str(error.value)


def test_a_byte_order_mark_is_no_error(tmp_path):
    assert load("\ufeff" + DEFAULT.read_text(), tmp_path) == config.load(DEFAULT)


@pytest.mark.parametrize("arguments, hint", [
    (["--config", "absent.yaml"], "absent.yaml"),
    (["--config", str(DEFAULT), "--set", "ddpm.stepz=5"], "did you mean 'steps'"),
    (["--config", str(DEFAULT), "--set", "loop.device=tpu9"], "loop.device"),
    (["--resume", "runs/absent"], "runs/absent"),
    (["--config", str(HERE / "configs/ham10000.yaml"), "--set", "data.root=absent"], "data.root"),
])
def test_the_command_ends_with_one_line_and_status_2(arguments, hint, tmp_path):
    done = subprocess.run([sys.executable, str(HERE / "loop.py"), *arguments], cwd=tmp_path,
                          capture_output=True, text=True)
    lines = [line for line in done.stderr.splitlines() if line.startswith("loop.py:")]
    assert done.returncode == 2 and len(lines) == 1 and hint in lines[0]
    assert "Traceback" not in done.stderr
