"""NaN and infinity in weights are refused by name, or ported unchanged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np
import pytest
import torch
from click.testing import Result

from porting.errors import CheckpointError
from porting.families.van import VanFamily
from porting.files.survey import survey_file
from porting.references.van import VAN
from porting.tasks.check import check
from porting.tasks.options import CheckOptions
from porting.tasks.port import port
from porting.tasks.revert import revert

ALLOWED = CheckOptions(samples=1, allow_non_finite=True)
NAMES = ("block1.0.attn.proj_1.weight", "head.bias")


@pytest.fixture(scope="module")
def diverged(reference: VAN, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a NaN and an infinity."""
    tensors = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    tensors[NAMES[0]][2, 1] = -np.inf
    tensors[NAMES[1]][3] = np.nan
    path = tmp_path_factory.mktemp("diverged") / "x.pth"
    torch.save(tensors, path)
    return path


@pytest.fixture(scope="module")
def ported(family: VanFamily, diverged: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ported") / "x.h5"
    result = port(family, "nano", out, checkpoint=diverged, options=ALLOWED)
    assert result.report is not None
    assert result.report.passed
    assert result.conversion.non_finite == NAMES
    return out


def test_they_are_carried_over(ported: Path, diverged: Path, family: VanFamily, tmp_path: Path) -> None:
    survey = survey_file(ported)
    assert survey.provenance is not None
    assert survey.provenance["non_finite"] == list(NAMES)
    assert survey.provenance["parity"]["status"] == "passed"
    back = tmp_path / "back.pth"
    result = revert(family, "nano", ported, back, options=ALLOWED)
    assert result.report is not None
    assert result.report.passed
    once, again = (torch.load(path, weights_only=True) for path in (diverged, back))
    for name in NAMES:
        torch.testing.assert_close(again[name], once[name], rtol=0, atol=0, equal_nan=True)


def test_the_rest_is_still_checked(ported: Path, diverged: Path, family: VanFamily, tmp_path: Path) -> None:
    model = family.build("nano", 10)
    model.load_weights(ported)
    weight = next(variable for variable in model.weights if variable.path == "block2_1/mlp/fc2/kernel")
    weight.assign(weight * 1.01)
    model.save_weights(tmp_path / "x.weights.h5")
    report = check(family, "nano", tmp_path / "x.weights.h5", checkpoint=diverged, options=ALLOWED)
    assert report.first_divergence is not None
    assert report.first_divergence.layer == "block2.1.mlp.fc2"


@pytest.mark.parametrize("value", [0.0, np.inf])
def test_another_value_in_the_place_of_a_nan_fails(
    ported: Path, diverged: Path, family: VanFamily, tmp_path: Path, value: float
) -> None:
    model: keras.Model = family.build("nano", 10)
    model.load_weights(ported)
    bias = model.get_layer("head").bias
    bias.assign(np.nan_to_num(np.asarray(bias), nan=1.0 if value == 0.0 else value, posinf=np.inf))
    model.save_weights(tmp_path / "x.weights.h5")
    report = check(family, "nano", tmp_path / "x.weights.h5", checkpoint=diverged, options=ALLOWED)
    assert report.first_divergence is not None
    assert report.first_divergence.layer == "head"


def test_without_the_option_all_commands_refuse(
    ported: Path, diverged: Path, family: VanFamily, tmp_path: Path
) -> None:
    for run in (
        lambda: port(family, "nano", tmp_path / "x.h5", checkpoint=diverged, check=False),
        lambda: check(family, "nano", ported, checkpoint=diverged),
        lambda: revert(family, "nano", ported, tmp_path / "x.pth", check=False),
    ):
        with pytest.raises(CheckpointError, match="head.bias: 1 NaN, 0 infinite of 10") as caught:
            run()
        assert "--allow-non-finite" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_the_command_names_them(run_cli: Callable[..., Result], diverged: Path, tmp_path: Path) -> None:
    arguments = ["--variant", "nano", "--checkpoint", str(diverged), "--out", str(tmp_path / "x.h5"), "--no-check"]
    refused = run_cli(*arguments)
    assert refused.exit_code == 3
    allowed = run_cli(*arguments, "--allow-non-finite")
    assert allowed.exit_code == 0, allowed.output
    assert f"NaN or infinity in 2 tensors: {', '.join(NAMES)}" in allowed.output
