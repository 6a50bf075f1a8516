"""Training parity: models that train like PyTorch pass, and every known deviation is found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import torch
from click.testing import Result
from torch import nn

import van_tf
from porting.families.van import VanFamily
from porting.parity.report import ParityReport
from porting.parity.training import OptimizerPair, compare_masks, compare_training, training_batch, usual_optimizers
from porting.references.van import VAN
from van_tf.layers import BatchNorm

IMAGES = np.random.default_rng(0).normal(size=(4, 48, 48, 3)).astype(np.float32)
LABELS = np.array([3, 1, 4, 1])


@pytest.fixture
def train(family: VanFamily, reference: VAN, ported: Path) -> Callable[..., dict[str, ParityReport]]:
    """Train nano for two steps with some optimisers. Returns the reports by name."""

    def run(*optimizers: OptimizerPair, steps: tuple[int, ...] = (1,), freeze: str = "") -> dict[str, ParityReport]:
        candidate = van_tf.van_nano(weights=ported)
        for weight in candidate.trainable_weights:
            weight.trainable = weight.path != freeze
        before = [np.array(weight) for weight in candidate.weights]
        key_map = family.key_map(family.spec("nano"))
        reports = compare_training(reference, candidate, key_map, IMAGES, LABELS, optimizers, steps=steps)
        for weight, value in zip(candidate.weights, before, strict=True):
            np.testing.assert_array_equal(weight, value)
        return {report.name: report for report in reports}

    return run


@pytest.fixture(scope="module")
def ported(family: VanFamily, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from porting.tasks.port import port

    return port(family, "nano", tmp_path_factory.mktemp("x") / "x.h5", checkpoint=checkpoint, check=False).path


def failed(report: ParityReport) -> set[str]:
    return {divergence.layer for divergence in report.divergences}


@pytest.mark.slow
def test_van_trains_as_pytorch_does(train: Callable[..., dict[str, ParityReport]]) -> None:
    reports = train(*usual_optimizers(van_tf.AdamW), steps=(1, 2))
    assert list(reports) == ["SGD, step 1", "SGD, step 2", "AdamW, step 1", "AdamW, step 2"]
    for report in reports.values():
        assert report.passed, report.first_divergence
    first = reports["SGD, step 1"]
    names = [layer.source for layer in first.layers]
    assert names[:2] == ["loss", "gradient of head.bias"]  # from the loss backwards
    assert {"block1.0.layer_scale_1", "block1.0.norm1.running_var", "head.weight"} <= set(names)
    # The gradient of a bias before a BatchNorm is only rounding, so AdamW's step there is arbitrary.
    kinds = {layer.source: layer.kind for layer in reports["AdamW, step 1"].layers}
    assert kinds["patch_embed2.proj.bias"] == "weight, 48 of 48 left out"


def test_a_step_of_sgd_is_pytorchs(train: Callable[..., dict[str, ParityReport]]) -> None:
    report = train(usual_optimizers()[0])["SGD, step 1"]
    assert report.passed, report.first_divergence


def test_the_biased_variance_is_found(
    train: Callable[..., dict[str, ParityReport]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BatchNorm, "call", keras.layers.BatchNormalization.call)
    report = train(usual_optimizers()[0])["SGD, step 1"]
    assert failed(report) >= {f"patch_embed{stage}.norm.running_var" for stage in (2, 3, 4)}
    assert all(name.endswith("running_var") for name in failed(report))


def test_kerass_own_adamw_is_found(train: Callable[..., dict[str, ParityReport]]) -> None:
    report = train(usual_optimizers()[1])["AdamW, step 1"]
    assert not report.passed
    assert not any(name.startswith("gradient") or "running" in name for name in failed(report))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"learning_rate": 0.0101}, "weight"),
        ({"learning_rate": 0.01, "momentum": 0.8}, "weight"),
        ({"learning_rate": 0.01, "weight_decay": 1e-3}, "weight"),
    ],
    ids=str,
)
def test_another_sgd_is_found(
    train: Callable[..., dict[str, ParityReport]], settings: dict[str, float], expected: str
) -> None:
    pair = usual_optimizers()[0]
    other = OptimizerPair("SGD", pair.reference, lambda: keras.optimizers.SGD(**{"momentum": 0.9, **settings}))
    report = train(other, steps=(2,))["SGD, step 2"]
    assert not report.passed
    assert {layer.kind for layer in report.layers if report.failed(layer)} >= {expected}


@pytest.mark.slow
def test_a_weight_that_is_not_trained_is_found(train: Callable[..., dict[str, ParityReport]]) -> None:
    report = train(usual_optimizers()[0], freeze="block1_0/norm1/gamma")["SGD, step 1"]
    reasons = {each.layer: each.reason for each in report.divergences}
    assert reasons["gradient of block1.0.norm1.weight"] == "Keras does not train it"


class Both(nn.Module):
    """A PyTorch model with dropout and drop path under the names of a Keras model's layers."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        from porting.references.van import DropPath

        self.drop, self.drop_path = nn.Dropout(rate), DropPath(rate)


def keras_both(rate: float, path_rate: float | None = None, noise_shape: Any = (None, 1, 1, 1)) -> keras.Model:
    inputs = keras.Input((None, None, 3))
    x = keras.layers.Dropout(rate, name="drop")(inputs)
    path_rate = rate if path_rate is None else path_rate
    return keras.Model(inputs, keras.layers.Dropout(path_rate, noise_shape=noise_shape, name="drop_path")(x))


def test_masks_of_the_same_kind_agree() -> None:
    audit = compare_masks(Both(0.2), keras_both(0.2))
    assert (audit.layers, audit.differences) == (2, ())
    assert compare_masks(Both(0.0), keras_both(0.0)).layers == 0


@pytest.mark.parametrize(
    ("candidate", "layer", "actual"),
    [
        (lambda: keras_both(0.2, 0.3), "drop_path", "dropped, not 0.2, a whole sample at once"),
        (lambda: keras_both(0.2, noise_shape=None), "drop_path", "0.2 dropped, number by number"),
    ],
)
def test_other_masks_are_found(candidate: Callable[[], keras.Model], layer: str, actual: str) -> None:
    (difference,) = compare_masks(Both(0.2), candidate()).differences
    assert difference.layer == layer
    assert actual in difference.actual
    assert difference.expected == "0.2 dropped, a whole sample at once, the rest scaled up"


def test_a_batch_is_crops_and_classes() -> None:
    images = np.random.default_rng(0).normal(size=(3, 224, 200, 3)).astype(np.float32)
    batch, labels = training_batch(images, 7)
    assert batch.shape == (8, 96, 96, 3)
    assert labels.shape == (8,)
    assert set(labels) <= set(range(7))
    assert training_batch(IMAGES, 10)[0].shape == (8, 48, 48, 3)
    assert len({crop.tobytes() for crop in batch}) == 8


def test_adamw_is_torchs_and_survives_a_config() -> None:
    variable = keras.Variable(np.array([1.0, -2.0, 3.0], np.float32))
    parameter = nn.Parameter(torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64))
    mine = van_tf.AdamW.from_config(van_tf.AdamW(0.01, weight_decay=0.1).get_config())
    theirs = torch.optim.AdamW([parameter], 0.01, weight_decay=0.1)
    for step in range(5):
        gradient = np.array([1e-9, 0.5 - step, 1e-7], np.float32)
        mine.apply([keras.ops.convert_to_tensor(gradient)], [variable])
        parameter.grad = torch.from_numpy(gradient.astype(np.float64))
        theirs.step()
    np.testing.assert_allclose(variable, parameter.detach(), rtol=3e-7)
    with pytest.raises(ValueError, match="does not support amsgrad"):
        van_tf.AdamW(amsgrad=True)


@pytest.mark.slow
def test_the_command(run_cli: Callable[..., Result], checkpoint: Path, ported: Path) -> None:
    result = run_cli("check", "--variant", "nano", "--weights", ported, "--checkpoint", checkpoint, "--train")
    assert result.exit_code == 0, result.output
    assert "AdamW, step 10" in result.output
