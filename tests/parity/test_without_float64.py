"""Checks of code that TensorFlow has no float64 for, and of code that states float32 or complex64 for what it makes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
import torch
import torchvision
from keras import layers
from torch import nn
from torch.nn import functional as F

import porting
from porting.models.exact_functions import exact_functions

FRAME, STEP = 16, 8
Function = Callable[[Any, Any], Any]


class Theirs(nn.Module):
    """A linear layer, whose result `function` gets with the window that the model holds."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.fc, self.function = nn.Linear(6, 5), function
        self.register_buffer("window", torch.hann_window(FRAME))

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self.fc(x), self.window)


class Ours(keras.Model):  # type: ignore[misc]
    def __init__(self, function: Callable[[Any], Any]) -> None:
        super().__init__()
        self.fc, self.function = layers.Dense(5), function

    def call(self, x: Any) -> Any:
        return self.function(self.fc(x))


def check(theirs: Function, ours: Callable[[Any], Any], *shape: int) -> porting.ParityReport:
    torch.manual_seed(0)
    reference, candidate = Theirs(theirs).eval(), Ours(ours)
    x = np.random.default_rng(0).normal(size=(2, *shape, 6)).astype(np.float32)
    candidate(x)
    candidate.fc.set_weights([reference.fc.weight.detach().numpy().T, reference.fc.bias.detach().numpy()])
    axes = [tuple(range(x.ndim))]
    return porting.check_parity(
        reference, candidate, x, input_axes=axes, output_axes=axes[0] if len(shape) > 2 else None
    )


def spectrum(y: torch.Tensor, window: torch.Tensor) -> torch.Tensor:
    frames = torch.stft(y.flatten(1), FRAME, STEP, window=window, center=False, return_complex=True)
    return frames.abs().transpose(1, 2)


def spectrum_of_keras(y: Any, periodic: bool = True, scale: float = 1.0) -> Any:
    def window(length: Any, dtype: Any) -> Any:
        return tf.signal.hann_window(length, periodic=periodic, dtype=dtype)

    flat = tf.reshape(y, (2, -1))
    return scale * tf.abs(tf.signal.stft(flat, FRAME, STEP, window_fn=window))


def turned(y: torch.Tensor, _: Any) -> torch.Tensor:
    return torch.fft.ifft(torch.fft.fft(y) * torch.exp(1j * torch.arange(5))).real


def turned_in_keras(y: Any, step: float = 1.0) -> Any:
    angles = tf.range(5, dtype=tf.float32) * step
    spectrum = tf.signal.fft(tf.cast(y, tf.complex64)) * tf.complex(tf.cos(angles), tf.sin(angles))
    return tf.cast(tf.signal.ifft(spectrum), tf.float32)


def boxes(y: Any, xp: Any) -> tuple[Any, Any]:
    """Corners and scores of some boxes that overlap."""
    first = y[0]
    corner = first[:, :2] / 4
    return xp.concat([corner, corner + abs(first[:, 2:4]) + 1], -1), first[:, 4]


def detections(y: torch.Tensor, _: Any) -> Any:
    found, scores = boxes(y, torch)
    kept = torchvision.ops.nms(found, scores, 0.4)[:4]
    return found[kept], scores[kept]


def detections_of_keras(y: Any, limit: float = 0.4, with_scores: bool = False) -> Any:
    found, scores = boxes(y, tf)
    if with_scores:
        kept, best = tf.image.non_max_suppression_with_scores(found, scores, 4, limit)
        return tf.gather(found, kept), best
    kept = tf.image.non_max_suppression(found, scores, 4, limit)
    return tf.gather(found, kept), tf.gather(scores, kept)


def normalized(y: Any, alpha: float = 0.3, radius: int = 1) -> Any:
    return tf.nn.local_response_normalization(y, radius, 2.0, alpha / 3, 0.75)


def sums_in_an_array(y: Any, first: float = 0.0) -> Any:
    steps = tf.TensorArray(tf.float32, size=y.shape[1])
    total = tf.fill(tf.shape(y[:, 0]), first)
    for number in range(y.shape[1]):
        total += y[:, number]
        steps = steps.write(number, total)
    return tf.transpose(steps.stack(), (1, 0, 2))


def sums_by_scan(y: Any, factor: float = 1.0) -> Any:
    return tf.transpose(tf.scan(lambda total, each: factor * total + each, tf.transpose(y, (1, 0, 2))), (1, 0, 2))


def halves_by_map(y: Any, factor: float = 0.5) -> Any:
    return tf.map_fn(lambda each: each * factor, y, fn_output_signature=tf.float32)


def halves_by_python(y: Any, factor: float = 0.5) -> Any:
    return tf.py_function(lambda each: each * factor, [y], tf.float32)


def halves_by_numpy(y: Any, factor: float = 0.5) -> Any:
    return tf.numpy_function(lambda each: each * np.asarray(factor, each.dtype), [y], tf.float32)


def pooled(kind: str) -> Function:
    pool = getattr(F, f"{kind}_pool3d")
    return lambda y, _: pool(y.movedim(-1, 1), 2).movedim(1, -1)


def half(y: torch.Tensor, _: Any) -> torch.Tensor:
    return y * 0.5


# The two sides, the shape of one input, and what makes it wrong.
CASES: dict[str, tuple[Function, Callable[..., Any], tuple[int, ...], dict[str, Any]]] = {
    "spectrum": (spectrum, spectrum_of_keras, (8,), {"periodic": False}),
    "spectrum, slightly wrong": (spectrum, spectrum_of_keras, (8,), {"scale": 1.00001}),
    "complex numbers": (turned, turned_in_keras, (8,), {"step": 1.00001}),
    "suppression": (detections, detections_of_keras, (12,), {"limit": 0.05}),
    "suppression with scores": (
        detections,
        lambda y, **how: detections_of_keras(y, with_scores=True, **how),
        (12,),
        {"limit": 0.05},
    ),
    "response normalization": (
        lambda y, _: F.local_response_norm(y.permute(0, 3, 1, 2), 3, 0.3, 0.75, 2.0).permute(0, 2, 3, 1),
        normalized,
        (2, 3),
        {"alpha": 0.30001},
    ),
    "an array of tensors": (lambda y, _: y.cumsum(1), sums_in_an_array, (4,), {"first": 1e-5}),
    "scan": (lambda y, _: y.cumsum(1), sums_by_scan, (4,), {"factor": 1.00001}),
    "map": (half, halves_by_map, (4,), {"factor": 0.500005}),
    "a function of Python": (half, halves_by_python, (4,), {"factor": 0.500005}),
    "a function of NumPy": (half, halves_by_numpy, (4,), {"factor": 0.500005}),
    "greatest of volumes": (pooled("max"), lambda y, n=2: tf.nn.max_pool3d(y, n, 2, "VALID"), (4, 4, 4), {"n": 1}),
    "means of volumes": (pooled("avg"), lambda y, n=2: tf.nn.avg_pool3d(y, n, 2, "VALID"), (4, 4, 4), {"n": 1}),
}


@pytest.mark.parametrize("name", CASES)
def test_healthy_ports_pass(name: str) -> None:
    theirs, ours, shape, _ = CASES[name]
    report = check(theirs, ours, *shape)
    assert report.passed, str(report)


@pytest.mark.parametrize("name", CASES)
def test_mistakes_are_found(name: str) -> None:
    theirs, ours, shape, wrong = CASES[name]
    report = check(theirs, lambda y: ours(y, **wrong), *shape)
    assert not report.passed


@pytest.mark.parametrize("seed", range(20))
def test_the_same_boxes_are_kept(seed: int) -> None:
    rng = np.random.default_rng(seed)
    corners, sides, scores = rng.normal(size=(40, 2)), rng.normal(size=(40, 2)), rng.normal(size=40).round(1)
    found = np.concatenate([corners, corners + sides], axis=1).astype(np.float32)  # any two opposite corners
    found[::7, 2] = found[::7, 0]  # boxes without an area
    limits = rng.uniform(0.1, 0.9), rng.choice([-np.inf, 0.0])
    single = tf.image.non_max_suppression(found, scores.astype(np.float32), 15, *map(np.float32, limits))
    with exact_functions(staying=True):
        double = tf.image.non_max_suppression(tf.constant(found, tf.float64), tf.constant(scores), 15, *limits)
    assert np.array_equal(single, double)


@pytest.mark.parametrize("radius", [1, 2, 5])
def test_responses_are_normalized_alike(radius: int) -> None:
    maps = np.random.default_rng(0).normal(size=(2, 3, 4, 6))
    single = tf.nn.lrn(maps.astype(np.float32), radius, 1.5, 0.2, 0.6)
    with exact_functions(staying=True):
        double = tf.nn.lrn(tf.constant(maps), radius, 1.5, 0.2, 0.6)
    assert double.dtype == tf.float64
    np.testing.assert_allclose(single, double, rtol=1e-5)
