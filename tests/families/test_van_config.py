"""VANs of any size, from a file of settings: port, check, revert, export, and code of other publishers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from porting.models.frameworks import start_tensorflow
from porting.models.synthetic import fill_with_synthetic_weights
from porting.references.van import VAN

RunCli = Callable[..., Result]
# Three stages, a fractional ratio, four channels, three classes.
SETTINGS: dict[str, Any] = {
    "embed_dims": [8, 12, 20],
    "depths": [1, 2, 1],
    "mlp_ratios": [2.5, 0.5, 2],
    "in_chans": 4,
    "classes": 3,
    "input_size": 48,
}


def on_noise(channels: int) -> Callable[[Any], Any]:
    images = torch.randn(4, channels, 64, 64)
    return lambda model: model(images)


def reference_of(stated: dict[str, Any]) -> VAN:
    torch.manual_seed(0)
    model = VAN(
        stated["embed_dims"],
        stated["depths"],
        stated["mlp_ratios"],
        num_classes=stated["classes"],
        in_chans=stated.get("in_chans", 3),
        layer_norm_eps=stated.get("layer_norm_eps", 1e-6),
    )
    fill_with_synthetic_weights(model, seed=2, run=on_noise(stated.get("in_chans", 3)))
    return model.eval()


@pytest.fixture
def given_files(tmp_path: Path) -> tuple[Path, Path]:
    """Write the settings and a checkpoint."""
    config, checkpoint = tmp_path / "small.json", tmp_path / "small.pth"
    config.write_text(json.dumps(SETTINGS))
    torch.save(reference_of(SETTINGS).state_dict(), checkpoint)
    return config, checkpoint


def test_port_check_and_revert(run_cli: RunCli, given_files: tuple[Path, Path], tmp_path: Path) -> None:
    config, checkpoint = given_files
    out = tmp_path / "small.h5"
    ported = run_cli("--config", config, "--checkpoint", checkpoint, "--out", out)
    assert ported.exit_code == 0, ported.output
    assert 'van_tf.van(van_tf.VanConfig.from_file("small.json"))' in ported.output
    checked = run_cli("check", "--config", config, "--weights", out, "--checkpoint", checkpoint)
    assert checked.exit_code == 0, checked.output
    back = run_cli("revert", "--config", config, "--weights", out, "--out", tmp_path / "back.pth")
    assert back.exit_code == 0, back.output
    again, before = torch.load(tmp_path / "back.pth"), torch.load(checkpoint)
    again = again.get("state_dict", again)
    assert all(torch.equal(again[name], tensor) for name, tensor in before.items() if "num_batches" not in name)

    import van_tf

    model = van_tf.van(van_tf.VanConfig.from_file(config), weights=out)
    images = np.random.default_rng(1).normal(size=(2, 48, 48, 4)).astype(np.float32)
    with torch.inference_mode():
        expected = reference_of(SETTINGS)(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()
    np.testing.assert_allclose(model(images), expected, atol=1e-4 * abs(expected).max())
    assert [each.shape[-1] for each in van_tf.features(model)(images)] == SETTINGS["embed_dims"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["small.tflite", "small.onnx"])
def test_export(run_cli: RunCli, given_files: tuple[Path, Path], tmp_path: Path, name: str) -> None:
    config, checkpoint = given_files
    out = tmp_path / "small.h5"
    assert run_cli("--config", config, "--checkpoint", checkpoint, "--no-check", "--out", out).exit_code == 0
    done = run_cli("export", "--config", config, "--checkpoint", checkpoint, "--weights", out, "--out", tmp_path / name)
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not the configuration of a VAN"),
        ("[1, 2]", "expected an object with the settings"),
        ('{"depths": [1, 1]}', "settings lack embed_dims"),
        ('{"embed_dims": [8, 8], "depths": [1]}', "one number per stage each"),
        ('{"embed_dims": [8, 8], "depths": [1, 1], "mlp_ratios": [0.01, 1]}', "at least one channel"),
        ('{"embed_dims": [8, 8.5], "depths": [1, 1], "mlp_ratios": [1, 1]}', "must be positive integers"),
        ('{"embed_dims": 8, "depths": 1, "mlp_ratios": 1}', "lists of numbers"),
        ('{"embed_dims": [8, "x"], "depths": [1, 1], "mlp_ratios": [1, 1]}', "must be positive integers"),
        ('{"hidden_sizes": [8, 8], "depths": [1, 1], "mlp_ratios": [1, 1], "strides": [2, 2]}', "strides is [2, 2]"),
        ('{"model_type": "vit"}', "not for van"),
    ],
)
def test_settings_of_something_else(run_cli: RunCli, tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    result = run_cli("--config", path, "--checkpoint", "nowhere.pth")
    assert result.exit_code == 2, result.output
    assert message in result.output


def test_settings_go_with_no_variant_and_no_other_family(run_cli: RunCli, given_files: tuple[Path, Path]) -> None:
    config, _ = given_files
    assert "--config replaces --variant" in run_cli("--config", config, "--variant", "b0").output
    assert "--config works only with the family van" in run_cli("--family", "resnet", "--config", config).output
    assert "Give a PyTorch checkpoint with --checkpoint" in run_cli("--config", config).output


def test_toml_and_dicts_say_the_same(tmp_path: Path) -> None:
    start_tensorflow()
    from van_tf import VanConfig

    path = tmp_path / "small.toml"
    path.write_text("\n".join(f"{name} = {value}" for name, value in SETTINGS.items()))
    found = VanConfig.from_file(path)
    assert found == VanConfig.from_dict(SETTINGS, name="small") == VanConfig.from_dict(found.to_dict())
    assert found.name == "small"


@settings(max_examples=6, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(st.data())
def test_any_configuration_of_transformers_agrees(data: st.DataObject) -> None:
    """Check against the class of transformers, with its own config.json."""
    start_tensorflow()
    import transformers

    import van_tf
    from porting.families.van_config import ConfiguredVanFamily
    from porting.files.weights_file import assign_weights
    from porting.mapping.convert import convert
    from porting.tasks.case import open_case

    stages = data.draw(st.integers(2, 5))
    draw = st.lists(st.integers(2, 12), min_size=stages, max_size=stages)
    config = transformers.VanConfig(
        hidden_sizes=data.draw(draw),
        depths=data.draw(st.lists(st.integers(1, 2), min_size=stages, max_size=stages)),
        mlp_ratios=data.draw(st.lists(st.integers(1, 3), min_size=stages, max_size=stages)),
        patch_sizes=[7] + [3] * (stages - 1),
        strides=[4] + [2] * (stages - 1),
        num_channels=data.draw(st.integers(1, 5)),
        num_labels=data.draw(st.integers(1, 5)),
        layer_norm_eps=data.draw(st.sampled_from([1e-6, 1e-5])),
        image_size=64,
    )
    theirs = transformers.VanForImageClassification(config)
    fill_with_synthetic_weights(theirs, seed=1, run=on_noise(config.num_channels))
    theirs.eval()
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        family = ConfiguredVanFamily(Path(folder) / "config.json")
        case = open_case(family, family.variant, Path(folder))
        model = case.build_candidate()
        assign_weights(model, convert(case.state_dict, case.key_map, case.shapes).weights)
        built = van_tf.van(van_tf.VanConfig.from_file(Path(folder) / "config.json"))
    assert [each.shape for each in built.weights] == [each.shape for each in model.weights]
    images = np.random.default_rng(0).normal(size=(2, 64, 64, config.num_channels)).astype(np.float32)
    with torch.inference_mode():
        expected = theirs(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).logits.numpy()
    np.testing.assert_allclose(model(images), expected, atol=2e-4 * max(abs(expected).max(), 1e-3))
