import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.config import ConfigError, load_config, render_config
from pretrain.train import RunConfig

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
TINY = Path(__file__).parents[1] / "tiny.yaml"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_load_and_survive_a_round_trip(path: Path, tmp_path: Path) -> None:
    config = load_config(path, [], RunConfig)
    (tmp_path / "again.yaml").write_text(render_config(config))
    assert load_config(tmp_path / "again.yaml", [], RunConfig) == config


def refusal(*overrides: str) -> str:
    """The message with which the tiny config plus `overrides` is refused."""
    with pytest.raises(ConfigError) as error:
        load_config(TINY, list(overrides), RunConfig)
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("engine.learning_rate=1", ["engine.learning_rate: unknown key", "Valid: zero_stage, offload, precision, lr"]),
        ("train.batch_sise=4", ["train.batch_sise: unknown key", "Did you mean 'batch_size'?"]),
        ("model.image.widht=4", ["model.image.widht: unknown key", "Did you mean 'width'?", "patch_size"]),
        ("losses.matchin.weight=1", ["losses.matchin: unknown key", "Did you mean 'matching'?"]),
        ("model.image.kind=vitt", ["model.image.kind: unknown kind 'vitt'", "vit, resnet"]),
        ("model.fusion={width: 4}", ["model.fusion.kind: is missing", "cross, shared, weighted, med"]),
        ("engine.lr=fast", ["engine.lr", "number", "'fast'"]),
        ("train.batch_size=8.5", ["train.batch_size", "8.5"]),
        ("train.batch_size=true", ["train.batch_size", "True"]),
        ("train.duration=8", ["train.duration"]),
        ("train.duration=8 weeks", ["train.duration", "'2000 steps'"]),
        ("engine.precision=fp64", ["engine.precision", "fp32"]),
        ("model.image.patch_size=7", ["model.image", "multiple of patch_size 7"]),
        ("model.fusion=null", ["losses.matching needs model.fusion"]),
        ("data.augment.crop_scale=[0.9, 0.1]", ["data.augment.crop_scale", "least"]),
        ("data.path.sub=1", ["'path' is a single value"]),
        ("data.path", ["write key=value"]),
        ("train={", ["not valid YAML"]),
        ("model.image=vit", ["model.image: should be a mapping of keys to values; found 'vit'"]),
        ("model.warm_start=[{kind: open_clip, name: x, prts: [x]}]", ["model.warm_start.0.prts: unknown key. Did you mean 'parts'?"]),
        ("model.warm_start=[{kind: opencip, name: x}]", ["model.warm_start.0.kind: unknown kind 'opencip'. Did you mean 'open_clip'?"]),
        ("model.warm_start=[{kind: native, path: x}, {name: x}]", ["model.warm_start.1.kind: is missing. Valid: open_clip"]),
        ("model.warm_start=[open_clip]", ["model.warm_start.0: should be a mapping of keys to values; found 'open_clip'"]),
        ("model.warm_start=[{kind: open_clip}]", ["model.warm_start.0.name: is missing.", "set it in the file"]),
        ("model.warm_start=[{kind: timm, name: x, parts: image_tower}]", ["model.warm_start.0.parts: ", "list; found 'image_tower'"]),
        ("model.warm_start=[{kind: timm, name: x, parts: [3]}]", ["model.warm_start.0.parts.0: ", "string; found 3"]),
        ("data.stages=[{mpa: x}]", ["data.stages.0.mpa: unknown key. Did you mean 'map'?"]),
        ("data.datasets=[{path: x, wieght: 1}]", ["data.datasets.0.wieght: unknown key. Did you mean 'weight'?"]),
    ],
)  # fmt: skip
def test_mistakes_are_named_in_one_line(override: str, parts: list[str]) -> None:
    message = refusal(override)
    assert all(part in message for part in parts), message


def test_a_key_below_a_list_is_no_override(tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text("run: x\nmodel: {warm_start: [{kind: timm, name: x}]}\n")
    with pytest.raises(ConfigError, match=r"'warm_start' is a list; give it whole, model.warm_start=\[...\]$"):
        load_config(tmp_path / "list.yaml", ["model.warm_start.0.name=y"], RunConfig)


def test_numbers_with_exponents_are_numbers(tmp_path: Path) -> None:
    assert load_config(TINY, ["engine.lr=3e-4", "engine.weight_decay=1"], RunConfig).engine.lr == 3e-4


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("run: a\nrun: b\n", "key 'run' is given twice"),
        ("- a\n- b\n", "YAML mapping"),
        ("run: [a\n", "not valid YAML"),
        ("run: runs/x\n", "data: is missing"),
    ],
)
def test_files_that_are_no_config(text: str, part: str, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ConfigError, match=part):
        load_config(tmp_path / "bad.yaml", [], RunConfig)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(ConfigError, match="no/such.yaml: cannot read the config"):
        load_config("no/such.yaml", [], RunConfig)


def test_help_and_config_do_not_import_torch() -> None:
    code = "import sys, pretrain.__main__ as m, pretrain.config; m.build_parser(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
