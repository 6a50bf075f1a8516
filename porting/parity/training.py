"""Checks whether the Keras model trains as the PyTorch model does.

Both start from the same weights and take the same steps on the same batch, with the same loss and optimiser. Loss,
gradients, BatchNorm statistics and all weights are compared like layers. PyTorch also trains in float64, and that run
is the truth. Keras may be a few times as far from it as PyTorch in float32 is. Steps amplify rounding by a random
amount. PyTorch therefore trains in float32 several times, with the batch in another order, which changes only the
rounding, and the greatest distance counts. Dropout and drop path are off, since two random masks cannot agree;
`compare_masks` compares the masks on their own.
"""

from __future__ import annotations

import copy
import math
import statistics
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from porting.kinds.transforms import Array
from porting.mapping.key_map import KeyMap
from porting.models.modes import in_mode
from porting.models.observe import to_torch
from porting.models.traverse import named_layers, named_variables, variable_names
from porting.parity.measure import DifferenceSum, measure_truth
from porting.parity.report import (
    FEW_ELEMENTS,
    FLOAT32,
    FLOAT32_ROUNDOFF,
    Audit,
    Distance,
    LayerComparison,
    Limits,
    ParityReport,
    SettingDifference,
    View,
)
from porting.parity.settings import settings_of_module
from porting.progress import SILENT, Progress

if TYPE_CHECKING:
    import keras
    from torch import Tensor, nn

STEPS = (1, 10)
BATCH = 8
GREATEST_SIDE = 96
# The number of samples on which masks are drawn, and the shape of each.
_DRAWN, _SHAPE = 4096, (4, 4, 3)
_SIGMAS = 5.0
# How many more times PyTorch trains in float32, each with the batch in another order.
_OTHER_ORDERS = 3


@dataclass(frozen=True)
class OptimizerPair:
    """The same optimiser in both frameworks. `reference` takes parameters, `candidate` takes nothing.

    `normalizes` is whether a step divides by the size of the gradient, as Adam's does. If a gradient is as small as its
    rounding error, such a step is the sign of that error times the learning rate. Numbers whose gradient PyTorch does
    not know to a hundredth are therefore left out.
    """

    name: str
    reference: Callable[[Any], Any]
    candidate: Callable[[], Any]
    normalizes: bool = False


def usual_optimizers(adamw: Callable[..., Any] | None = None) -> tuple[OptimizerPair, ...]:
    """SGD with momentum, and AdamW. `adamw` is a Keras optimiser with PyTorch's arithmetic; the default is Keras's own.

    Keras's own applies epsilon differently in the first steps, which the check detects.
    """
    import keras
    import torch

    sgd: dict[str, Any] = {"momentum": 0.9}
    adam: dict[str, Any] = {"weight_decay": 0.05}
    return (
        OptimizerPair(
            "SGD",
            lambda parameters: torch.optim.SGD(parameters, 0.01, **sgd),
            lambda: keras.optimizers.SGD(0.01, **sgd),
        ),
        OptimizerPair(
            "AdamW",
            lambda parameters: torch.optim.AdamW(parameters, 1e-3, eps=1e-8, **adam),
            lambda: (adamw or keras.optimizers.AdamW)(1e-3, epsilon=1e-8, **adam),
            normalizes=True,
        ),
    )


@dataclass
class _Run:
    """The results of one training, by PyTorch's names and in PyTorch's order of axes. Steps count from 1.

    Only the gradients of the first step are kept, since later ones belong to different weights on each side.
    """

    losses: dict[int, Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    values: dict[int, dict[str, Tensor]] = field(default_factory=dict)


def compare_training(
    reference: nn.Module,
    candidate: keras.Model,
    key_map: KeyMap,
    images: Array,
    labels: Array,
    optimizers: Sequence[OptimizerPair],
    *,
    steps: Sequence[int] = STEPS,
    limits: Limits | None = None,
    progress: Progress = SILENT,
) -> tuple[ParityReport, ...]:
    """Train both models on one batch with each optimiser, and report on each of the `steps`, counted from 1.

    `images` are `(N, H, W, C)` and `labels` are `(N,)` class numbers. The loss is the mean cross-entropy of the logits,
    or the mean square of the maps if the model returns maps. `key_map` pairs the tensors. A report has the loss before
    the step, then, for the first step, every gradient from the loss backwards, then every tensor after the step. Both
    models have their old weights when it returns.
    """
    limits = limits or Limits()
    reports = []
    last = max(steps)
    rng = np.random.default_rng(0)
    orders = [np.arange(len(images)), *(rng.permutation(len(images)) for _ in range(_OTHER_ORDERS))]
    total = (len(orders) + 2) * last * len(optimizers)
    for number, pair in enumerate(optimizers):
        trainings = [
            ("PyTorch, float64", _train_torch(copy.deepcopy(reference).double(), pair, images, labels, steps)),
            ("Keras", _train_keras(candidate, key_map, pair, images, labels, steps)),
        ]
        for order in orders:
            training = _train_torch(copy.deepcopy(reference), pair, images[order], labels[order], steps)
            trainings.append(("PyTorch, float32", training))
        runs = []
        for which, (name, training) in enumerate(trainings):
            for step in range(1, last + 1):
                progress(
                    f"training with {pair.name}: {name}", (len(trainings) * number + which) * last + step - 1, total
                )
                run = next(training)
            runs.append(run)
            training.close()
        truth, actual, *expected = runs
        undecided = _undecided(expected, truth) if pair.normalizes else {}
        for step in steps:
            layers = list(_compare(expected, truth, actual, key_map, step, undecided, limits))
            report = ParityReport(
                tuple(_with_usual_rounding(layers)),
                (),
                (),
                None,
                (images.shape,),
                limits,
                f"{pair.name}, step {step}",
            )
            reports.append(report)
    return tuple(reports)


def _train_torch(
    model: nn.Module, pair: OptimizerPair, images: Array, labels: Array, steps: Sequence[int]
) -> Generator[_Run]:
    import torch
    from torch.nn import functional as F

    exact = next(model.parameters()).dtype
    batch = torch.from_numpy(np.ascontiguousarray(np.moveaxis(images, -1, 1))).to(exact)
    targets = torch.from_numpy(labels.astype(np.int64))
    model.train().requires_grad_(True)
    optimizer = pair.reference(model.parameters())
    run = _Run()
    for step in range(1, max(steps) + 1):
        optimizer.zero_grad()
        output = model(batch)
        loss = F.cross_entropy(output, targets) if output.ndim == 2 else output.square().mean()
        with warnings.catch_warnings():
            # The first backward pass looks for a GPU, and a CUDA build warns if there is none.
            warnings.filterwarnings("ignore", "CUDA initialization")
            loss.backward()
        if step == 1:
            run.gradients = {
                name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
                for name, parameter in model.named_parameters()
            }
        optimizer.step()
        if step in steps:
            run.losses[step] = loss.detach().reshape(1)
            run.values[step] = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        yield run


def _train_keras(
    model: keras.Model, key_map: KeyMap, pair: OptimizerPair, images: Array, labels: Array, steps: Sequence[int]
) -> Generator[_Run]:
    import keras
    import tensorflow as tf

    before = [np.array(variable) for variable in model.weights]
    optimizer = pair.candidate()
    trained = model.trainable_variables
    names = variable_names(model)
    run = _Run()
    try:
        for step in range(1, max(steps) + 1):
            with tf.GradientTape() as tape:
                output = model(images, training=True)
                if len(output.shape) == 2:
                    crosses = keras.ops.sparse_categorical_crossentropy(labels, output, from_logits=True)
                    loss = keras.ops.mean(crosses)
                else:
                    loss = keras.ops.mean(keras.ops.square(output))
            gradients = tape.gradient(loss, [variable.value for variable in trained])
            if step == 1:
                shown = {
                    names[id(variable)]: np.zeros(variable.shape, np.float32)
                    if gradient is None
                    else np.array(gradient)
                    for variable, gradient in zip(trained, gradients, strict=True)
                }
                run.gradients = _in_torchs_order(shown, key_map)
            pairs = [(g, v) for g, v in zip(gradients, trained, strict=True) if g is not None]
            optimizer.apply([g for g, _ in pairs], [v for _, v in pairs])
            if step in steps:
                run.losses[step] = to_torch(keras.ops.reshape(loss, (1,))).clone()
                values = {name: np.array(variable) for name, variable in named_variables(model).items()}
                run.values[step] = _in_torchs_order(values, key_map)
            yield run
    finally:
        for variable, value in zip(model.weights, before, strict=True):
            variable.assign(value)


def _in_torchs_order(arrays: Mapping[str, Array], key_map: KeyMap) -> dict[str, Tensor]:
    import torch

    return {
        name: torch.from_numpy(np.asarray(values, order="C"))
        for entry in key_map.entries
        if all(target in arrays for target in entry.targets)
        for name, values in entry.to_torch(arrays, {}).items()
    }


def _undecided(expected: Sequence[_Run], truth: _Run) -> dict[str, Tensor]:
    """Masks, by name, of the numbers whose gradient PyTorch does not know to a hundredth."""
    errors = {
        name: max(float((run.gradients[name] - exact).abs().max()) for run in expected)
        for name, exact in truth.gradients.items()
    }
    return {name: exact.abs() < 100 * errors[name] for name, exact in truth.gradients.items()}


def _compare(
    expected: Sequence[_Run],
    truth: _Run,
    actual: _Run,
    key_map: KeyMap,
    step: int,
    undecided: Mapping[str, Tensor],
    limits: Limits,
) -> Iterator[LayerComparison]:
    targets = {name: ", ".join(entry.targets) for entry in key_map.entries for name in entry.sources}
    losses = [run.losses[step] for run in expected]
    yield _one("loss", "loss", "loss", losses, truth.losses[step], actual.losses[step], limits)
    if step == 1:
        for name in reversed(truth.gradients):
            theirs = [run.gradients[name] for run in expected]
            ours = actual.gradients.get(name)
            yield _one(f"gradient of {name}", targets[name], "gradient", theirs, truth.gradients[name], ours, limits)
    for name, found in actual.values[step].items():
        kind = "statistics" if name.rpartition(".")[2].startswith("running_") else "weight"
        exact, theirs = truth.values[step][name], [run.values[step][name] for run in expected]
        left_out = undecided.get(name)
        if left_out is not None and left_out.any():
            kind += f", {int(left_out.sum())} of {left_out.numel()} left out"
            found, *theirs = (_where(left_out, exact, side) for side in (found, *theirs))
        yield _one(name, targets[name], kind, theirs, exact, found, limits)


def _where(condition: Tensor, one: Tensor, other: Tensor) -> Tensor:
    import torch

    return torch.where(condition, one.to(other.dtype), other)


def _one(
    name: str,
    target: str,
    kind: str,
    expected: Sequence[Tensor],
    truth: Tensor,
    actual: Tensor | None,
    limits: Limits,
) -> LayerComparison:
    """Compare one tensor. `expected` are PyTorch's float32 runs; the difference shown is to the first of them."""
    measured = [measure_truth(each, truth) for each in expected]
    error, _, scale = measured[0]
    sizes = [size.total() for _, size, _ in measured]
    noise = Distance(max(size.max for size in sizes), max(size.rms for size in sizes))
    shape, dtype = tuple(truth.shape), str(expected[0].dtype).removeprefix("torch.")
    difference = DifferenceSum()
    if actual is None or actual.shape != truth.shape:
        problem = "Keras does not train it" if actual is None else f"shape {tuple(actual.shape)} instead of {shape}"
        view = View(scale.total(), noise, noise, problem)
        return LayerComparison(name, target, kind, shape, dtype, "none", {FLOAT32: view}, difference.total())
    limit = limits.of(name) * max(noise.max, scale.total().max * FLOAT32_ROUNDOFF)
    found = difference.add(actual, expected[0], error, limit)
    view = View(scale.total(), noise, found.total())
    return LayerComparison(name, target, kind, shape, dtype, dtype, {FLOAT32: view}, difference.total())


def _with_usual_rounding(layers: list[LayerComparison]) -> Iterator[LayerComparison]:
    """Give small tensors the usual rounding, which is the median over their kind.

    The loss is a single number that contains the rounding of all kinds, so it gets the greatest of these medians.
    """
    found: dict[str, list[float]] = {}
    for layer in layers:
        rounding = layer.views[FLOAT32].relative_rounding
        if layer.kind != "loss" and math.isfinite(rounding):
            found.setdefault(_kind(layer), []).append(rounding)
    usual = {kind: statistics.median(roundings) for kind, roundings in found.items()}
    usual["loss"] = max(usual.values(), default=0.0)
    for layer in layers:
        if math.prod(layer.shape) < FEW_ELEMENTS:
            view = replace(layer.views[FLOAT32], usual_rounding=usual.get(_kind(layer), 0.0))
            layer = replace(layer, views={FLOAT32: view})
        yield layer


def _kind(layer: LayerComparison) -> str:
    return layer.kind.partition(",")[0]


def training_batch(images: Array, classes: int, seed: int = 0) -> tuple[Array, Array]:
    """Make `BATCH` crops, at most `GREATEST_SIDE` pixels a side, of images `(N, H, W, C)`, and a class for each."""
    rng = np.random.default_rng(seed)
    side = min(GREATEST_SIDE, *images.shape[1:3])
    crops = []
    for index in range(BATCH):
        image = images[index % len(images)]
        top, left = (int(rng.integers(0, length - side + 1)) for length in image.shape[:2])
        crop = image[top : top + side, left : left + side]
        crops.append(crop[:, ::-1] if index >= len(images) else crop)
    return np.ascontiguousarray(np.stack(crops)), rng.integers(0, max(classes, 1), BATCH)


def compare_masks(reference: nn.Module, candidate: keras.Model) -> Audit:
    """Compare the masks of dropout and drop path in every paired layer with a rate above 0.

    On both sides, the dropped share must be the rate within chance, the kept numbers must be scaled up to match, and
    two calls must draw different masks. A mask must cover whole samples on both sides or single numbers on both.
    Modules and layers pair by name.
    """
    layers = {path.replace("/", "."): layer for path, layer in named_layers(candidate).items()}
    differences: list[SettingDifference] = []
    compared = 0
    for source, module in reference.named_modules():
        rate = settings_of_module(module).get("rate", 0.0)
        if not rate or source not in layers:
            continue
        compared += 1
        expected, actual = _torch_mask(module, rate), _keras_mask(layers[source], rate)
        if expected != actual:
            differences.append(SettingDifference(source, "mask in training", expected, actual))
    return Audit(compared, compared, tuple(differences))


def _torch_mask(module: nn.Module, rate: float) -> str:
    import torch

    ones = torch.ones(_DRAWN, _SHAPE[-1], *_SHAPE[:-1])
    with in_mode(module, training=True):
        drawn = [np.moveaxis(module(ones).numpy(), 1, -1) for _ in range(2)]
    return _describe_mask(drawn, rate)


def _keras_mask(layer: keras.layers.Layer, rate: float) -> str:
    ones = np.ones((_DRAWN, *_SHAPE), np.float32)
    return _describe_mask([np.asarray(layer(ones, training=True)) for _ in range(2)], rate)


def _describe_mask(drawn: Sequence[Array], rate: float) -> str:
    """Describe two masks in words that depend on their kind and not on chance."""
    first, second = drawn
    kept = first != 0
    flat = kept.reshape(len(kept), -1)
    per_sample = bool((flat == flat[:, :1]).all())
    count = len(flat) if per_sample else flat.size
    share = 1.0 - float(flat.mean())
    near = abs(share - rate) <= _SIGMAS * math.sqrt(rate * (1 - rate) / count)
    scales = first[kept]
    exact = scales.size > 0 and bool(np.allclose(scales, 1 / (1 - rate), rtol=1e-5))
    words = [
        f"{rate:g} dropped" if near else f"{share:.4f} dropped, not {rate:g}",
        "a whole sample at once" if per_sample else "number by number",
        "the rest scaled up" if exact else "the rest not scaled up by as much",
    ]
    if np.array_equal(first, second):
        words.append("the same in each call")
    return ", ".join(words)
