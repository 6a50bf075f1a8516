"""Comparisons in the background, while Keras goes on, find what comparisons at each layer find."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import keras
import pytest
import torch
from keras import layers
from torch import nn
from torch.nn import functional as F

from porting import check_parity
from porting.parity import background, compare
from porting.parity.background import in_background
from porting.parity.report import ParityReport
from porting.reports.document import to_json
from tests.parity.test_written_otherwise import (
    HEALTHY,
    WRONG,
    conv_weights,
    dense_weights,
    norm_weights,
    numbers,
    run,
    seeded,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(torch.nn.utils.weight_norm|spectral_norm).*:FutureWarning", "ignore:.*torch.jit:DeprecationWarning"
)


class Small(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.interpolate(x, (4, 4), mode="bilinear", antialias=True, align_corners=False)


class Net(nn.Module):
    """A block, a resize that TensorFlow computes in float32, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.small, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), Small(), nn.Linear(64, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.small(self.norm(self.conv(x))).permute(0, 2, 3, 1).flatten(1))


def pair(epsilon: float = 1e-5, bump: float = 0.0) -> tuple[nn.Module, keras.Model]:
    reference: Any = seeded(Net)
    x = inputs = keras.Input((10, 10, 3))
    x = layers.BatchNormalization(epsilon=epsilon, name="norm")(layers.Conv2D(4, 3, name="conv")(x))
    x = layers.Flatten()(layers.Resizing(4, 4, antialias=True, name="small")(x))
    model = keras.Model(inputs, layers.Dense(3, name="head")(x))
    model.get_layer("conv").set_weights(conv_weights(reference.conv))
    model.get_layer("norm").set_weights(norm_weights(reference.norm))
    kernel, bias = dense_weights(reference.head)
    kernel = kernel.copy()
    kernel[3, 1] += bump
    model.get_layer("head").set_weights([kernel, bias])
    return reference, model


def at_once(monkeypatch: pytest.MonkeyPatch, check: Callable[[], ParityReport]) -> ParityReport:
    with monkeypatch.context() as patch:
        patch.setattr(compare, "in_background", lambda: contextlib.nullcontext(None))
        return check()


@pytest.mark.parametrize("batch_size", [None, 1, 2])
@pytest.mark.parametrize(
    ("case", "culprit"),
    [({}, ""), ({"epsilon": 1.1e-5}, "norm"), ({"bump": 1e-4}, "head")],
    ids=["healthy", "epsilon", "weight"],
)
def test_float32_inside_a_named_layer(
    case: dict[str, float], culprit: str, batch_size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference, model = pair(**case)
    images = numbers(3, 10, 10, 3)

    def check() -> ParityReport:
        return check_parity(reference, model, images, batch_size=batch_size)

    report = check()
    assert report.passed == (not culprit), str(report)
    assert [culprit.layer for culprit in report.culprits] == [culprit] * bool(culprit)
    if report.passed:
        assert report.float32_inside == ("small",)
    assert to_json(report) == to_json(at_once(monkeypatch, check))


@pytest.mark.slow
@pytest.mark.parametrize("name", [*HEALTHY, *WRONG])
def test_the_reports_are_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    port = HEALTHY[name]() if name in HEALTHY else WRONG[name][0]()
    assert to_json(run(port)) == to_json(at_once(monkeypatch, lambda: run(port)))


def test_calls_are_made_in_order_and_raise_where_they_are_asked_for() -> None:
    made: list[int] = []

    def call(number: int) -> int:
        made.append(number)
        if number == 3:
            raise ArithmeticError("three")
        return 2 * number

    with in_background() as calls:
        assert calls is not None
        found = [calls.submit(partial(call, number), torch.zeros(1)) for number in range(6)]
        calls.wait()
        assert made == list(range(6))
        assert [each.result() for number, each in enumerate(found) if number != 3] == [0, 2, 4, 8, 10]
        with pytest.raises(ArithmeticError, match="three"):
            found[3].result()


def test_no_more_tensors_wait_than_memory_is_meant_for(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor, at_once = torch.zeros(100), 3
    monkeypatch.setattr(background, "MOST_BYTES", at_once * tensor.nbytes)
    lock, waiting, most = threading.Lock(), 0, 0

    def call() -> None:
        nonlocal waiting
        with lock:
            waiting -= 1

    with in_background() as calls:
        assert calls is not None
        for _ in range(50):
            calls.submit(call, tensor)
            with lock:
                waiting += 1
                most = max(most, waiting)
        calls.wait()
    assert waiting == 0
    assert most <= at_once


def test_an_error_ends_the_thread_without_the_calls_that_wait() -> None:
    begun, may_end = threading.Event(), threading.Event()
    made: list[int] = []

    def first() -> None:
        begun.set()
        may_end.wait(10)

    def use() -> None:
        with in_background() as calls:
            assert calls is not None
            calls.submit(first, torch.zeros(1))
            calls.submit(partial(made.append, 1), torch.zeros(1))
            begun.wait(10)
            threading.Timer(0.1, may_end.set).start()
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        use()
    assert not made
