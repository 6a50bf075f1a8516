"""Families of this project and of installed packages, by the registry and by the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import torch

from porting.errors import FamilyError
from porting.families import registry
from porting.families.van import VanFamily
from porting.models.synthetic import fill_with_synthetic_weights
from tests.families.toy import ToyFamily

TOY = Path(__file__).with_name("toy.py")
PYPROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "toy-family"
version = "1.0"

[project.entry-points."porting.families"]
toy = "toy_family:ToyFamily"
broken = "toy_family.missing:Family"

[tool.hatch.build.targets.wheel]
packages = ["toy_family"]
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder into which pip installs a package with a family."""
    folder = tmp_path_factory.mktemp("package")
    (folder / "pyproject.toml").write_text(PYPROJECT)
    (folder / "toy_family").mkdir()
    (folder / "toy_family" / "__init__.py").write_text(TOY.read_text())
    target = folder / "installed"
    options = ["--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--target", target]
    command = [sys.executable, "-m", "pip", "install", "--quiet", *map(str, options), str(folder)]
    subprocess.run(command, check=True, capture_output=True)
    return target


def van_port(installed: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    paths = [str(installed), *filter(None, sys.path)]
    return subprocess.run(
        [sys.executable, "-m", "porting.cli.main", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def test_registered_families() -> None:
    assert registry.family_names()[0] == "van"
    assert registry.family_names() == tuple(registry._FAMILIES)
    assert isinstance(registry.get_family("van"), VanFamily)
    with pytest.raises(FamilyError, match="unknown family 'lenet'") as caught:
        registry.get_family("lenet")
    assert caught.value.hint.startswith("Did you mean resnet? Choose from van, convnext, ")


def test_families_of_other_packages_are_listed_and_a_broken_one_breaks_no_other(installed: Path) -> None:
    done = van_port(installed, "families", "--json")
    assert done.returncode == 0, done.stderr
    found = {each["family"]: each for each in json.loads(done.stdout)}
    assert list(found) == [*registry._FAMILIES, "broken", "toy"]
    assert found["toy"]["variants"] == ["small", "large"]
    assert (
        "the family 'broken' of the package toy-family cannot be used: ModuleNotFoundError" in found["broken"]["error"]
    )
    assert "toy: small large" in van_port(installed, "families").stdout


def test_choices_follow_the_family(installed: Path) -> None:
    assert "--variant [small|large]" in van_port(installed, "port", "--family", "toy", "--help").stdout
    done = van_port(installed, "--family", "toy", "--variant", "b0")
    assert done.returncode == 2
    assert "the family toy has no 'b0'; it has small, large" in done.stderr
    done = van_port(installed, "--family", "broken", "--variant", "b0")
    assert done.returncode == 2
    assert "the family 'broken' of the package toy-family cannot be used" in done.stderr


@pytest.mark.slow
def test_a_family_of_another_package_is_ported_checked_reverted_and_exported(installed: Path, tmp_path: Path) -> None:
    family = ToyFamily()
    model = family.build_reference(family.spec("small"))
    fill_with_synthetic_weights(model, seed=0)
    checkpoint, out, back = tmp_path / "toy.pth", tmp_path / "toy.h5", tmp_path / "back.pth"
    torch.save(model.state_dict(), checkpoint)
    toy = ("--family", "toy", "--variant", "small", "--samples", 2)
    done = van_port(installed, *toy, "--checkpoint", checkpoint, "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    assert 'Load it into porting.get_family("toy").build("small", 5)' in done.stdout
    for command in (
        ("check", *toy, "--weights", out, "--checkpoint", checkpoint),
        ("revert", *toy, "--weights", out, "--out", back),
        ("export", *toy, "--weights", out, "--checkpoint", checkpoint, "--out", tmp_path / "toy.tflite"),
    ):
        done = van_port(installed, *command)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "AT PARITY" in done.stdout
    reverted = torch.load(back, weights_only=True)
    tensors = model.state_dict()
    assert reverted.keys() == tensors.keys()
    assert all(torch.equal(reverted[name], tensors[name]) for name in tensors if "num_batches" not in name)
    built = family.build("small")
    built.load_weights(out)
    images = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
    with torch.no_grad():
        expected = model.eval()(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
    np.testing.assert_allclose(built(images), expected, atol=1e-5)


def test_what_six_fields_give(tmp_path: Path) -> None:
    family = ToyFamily()
    spec = family.spec("large")
    assert (spec.num_classes, family.variants) == (5, ("small", "large"))
    entries = family.key_map(spec).entries
    assert len(entries) == len(family.build("large").weights)
    assert entries[-1].targets[0] == "head/bias"
    assert family.key_map(family.spec("large", 0)).entries[-1].targets[0] == "norm/beta"
    shapes = family.weight_shapes(spec)
    assert list(shapes)[:2] == ["stem_conv", "stem_bn"]
    assert shapes["head"] == {"kernel": (16, 5), "bias": (5,)}
    state_dict = {name: tensor.numpy() for name, tensor in family.build_reference(spec).state_dict().items()}
    assert family.guess_variant(state_dict) == "large"
    assert family.num_classes("large", state_dict) == 5
    assert isinstance(eval(family.how_to_build(spec), {"porting": _Porting}), keras.Model)


class _Porting:
    """A stand-in for `porting` in an environment where the family is installed."""

    @staticmethod
    def get_family(name: str) -> ToyFamily:
        assert name == "toy"
        return ToyFamily()
