from __future__ import annotations

from pathlib import Path

import keras
import numpy as np
import pytest
import torch
from torch import nn

from porting.families.base import Spec
from porting.families.van import VanFamily
from porting.files.weights_file import assign_weights
from porting.mapping.convert import convert
from porting.models.synthetic import fill_with_synthetic_weights
from porting.parity.report import ParityReport
from porting.parity.stress import stress_cases, with_loud_weights, with_small_variances
from porting.references.van import VAN
from porting.tasks.case import open_case
from porting.tasks.check import compare_models
from porting.tasks.options import CheckOptions


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(2, 64, 64, 3)).astype(np.float32)


def test_small_variances_come_near_the_epsilons(family: VanFamily, reference: VAN, images: np.ndarray) -> None:
    before = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    small = with_small_variances(reference, images, family.shrinkable)
    variances = [
        float(tensor.median())
        for name, tensor in small.state_dict().items()
        if name.startswith("block") and name.endswith("norm2.running_var")
    ]
    assert max(variances) < 1e-4
    assert all(torch.equal(before[name], tensor) for name, tensor in reference.state_dict().items())


def test_cases_cover_weights_and_shapes(family: VanFamily, reference: VAN, images: np.ndarray) -> None:
    cases = list(stress_cases(reference, images, family.shrinkable))
    names = ["small variances", "loud weights, seed 0", "1 of 81x66", "3 of 33x33"]
    assert [case.name for case in cases] == names
    assert [case.images.shape[0] for case in cases] == [2, 2, 1, 3]
    assert [case.has_new_weights for case in cases] == [True, True, False, False]
    assert [case.name for case in stress_cases(reference, images, lambda _: False)] == names[1:]


class WrongEpsilons(VanFamily):
    """Use a LayerNorm epsilon from other published code, which ordinary weights hide."""

    def build_candidate(self, spec: Spec) -> keras.Model:
        model = super().build_candidate(spec)
        for layer in model.layers:
            if isinstance(layer, keras.layers.LayerNormalization):
                layer.epsilon = 1e-5
        return model


def run(family: VanFamily, checkpoint: Path) -> ParityReport:
    case = open_case(family, "nano", checkpoint)
    candidate = case.build_candidate()
    assign_weights(candidate, convert(case.state_dict, case.key_map, case.shapes).weights)
    return compare_models(case, candidate, CheckOptions(samples=2, stress=True))


def test_a_faithful_port_stands_the_stress(family: VanFamily, checkpoint: Path) -> None:
    report = run(family, checkpoint)
    assert report.passed, [(each.name, str(each.first_divergence)) for each in report.stress]
    assert len(report.stress) == 4


@pytest.mark.slow
def test_an_epsilon_that_ordinary_weights_hide_is_loud(checkpoint: Path) -> None:
    report = run(WrongEpsilons(), checkpoint)
    small = report.stress[0]
    assert small.first_divergence is not None
    assert small.first_divergence.layer == "norm1"
    assert small.diagnosis is not None
    assert small.diagnosis.cause == "an epsilon of 1e-05 instead of 1e-06"

    def loudness(each: ParityReport) -> float:
        return max(layer.views["exact"].relative_error for layer in each.layers if layer.source == "norm1")

    assert loudness(small) > 100 * loudness(report)


class Sized(nn.Module):
    """Takes images of 8x8 alone, and has no BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(144, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert x.shape[2:] == (8, 8), "this model takes images of 8x8"
        return self.fc(torch.relu(self.conv(x)).flatten(1))


def test_a_model_of_one_size_gets_loud_weights() -> None:
    images = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
    model = Sized().eval()
    loud = with_loud_weights(model, images, 0)
    assert not torch.equal(loud.conv.weight, model.conv.weight)  # type: ignore[union-attr,arg-type]


@pytest.mark.parametrize("momentum", [0.1, None])
def test_modes_and_momenta_of_every_norm_are_restored(momentum: float | None) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=momentum), nn.BatchNorm2d(4)).train()
    model[1].eval()
    with_loud_weights(model, np.zeros((1, 8, 8, 3), np.float32), 0)
    fill_with_synthetic_weights(model, 0)
    assert [each.training for each in model.modules()] == [True, True, False, True]
    assert model[1].momentum == momentum
