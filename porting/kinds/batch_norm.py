"""Batch normalisation in one to three dimensions."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from porting.errors import KeyMapError
from porting.kinds.base import Kind, Leaf, Mistake, Settings, with_change, with_value
from porting.kinds.transforms import Shifted

if TYPE_CHECKING:
    import keras
    from torch import Tensor, nn

# Epsilons of PyTorch, Keras, keras.applications and published models: a wrong epsilon is likely one of these.
USUAL_EPSILONS = (1e-3, 1e-4, 1e-5, 1.001e-5, 1e-6, 1e-7, 1e-8, 1e-12, 0.0)


class BatchNorm(Kind):
    name = "batch_norm"
    leaves = (
        Leaf("weight", "gamma", default=1.0),
        Leaf("bias", "beta", default=0.0),
        Leaf("running_mean", "moving_mean"),
        Leaf("running_var", "moving_variance"),
    )
    # A counter of training steps, which Keras does not keep.
    drops = ("num_batches_tracked",)
    training_settings = frozenset({"momentum"})

    def with_details(self, details: str) -> Kind:
        """`+9e-06`: an offset to add to the variance, which is PyTorch's epsilon minus Keras's.

        With it both models compute the same at inference. In training each uses its own epsilon.
        """
        try:
            offset = float(details)
        except ValueError:
            offset = math.nan
        if not math.isfinite(offset):
            raise KeyMapError(
                f"the kind batch_norm takes an offset of the variance: got {details!r}",
                hint="PyTorch's epsilon minus Keras's, such as batch_norm:-9.9e-04.",
            )
        shifted = BatchNorm()
        shifted.leaves = (
            *self.leaves[:3],
            Leaf("running_var", "moving_variance", Shifted("variance with another epsilon", offset)),
        )
        return shifted

    def is_module(self, module: nn.Module) -> bool:
        from torch import nn

        return isinstance(module, nn.modules.batchnorm._BatchNorm)

    def is_layer(self, layer: keras.layers.Layer) -> bool:
        from keras import layers

        return isinstance(layer, layers.BatchNormalization)

    def module_settings(self, module: Any) -> Settings:
        settings: Settings = {"eps": module.eps, "axis": "channels"}
        if module.momentum is not None:
            settings["momentum"] = module.momentum
        return settings

    def layer_settings(self, layer: Any) -> Settings:
        axis = layer.axis if isinstance(layer.axis, int) else layer.axis[0]
        rank = layer.input_spec.ndim if layer.built and layer.input_spec is not None else None
        # Keras's momentum is the share of the old value, PyTorch's that of the new one.
        return {
            "eps": layer.epsilon,
            "momentum": 1.0 - layer.momentum,
            "axis": "channels" if rank is None or axis in (-1, 1, rank - 1) else f"axis {axis}",
        }

    def in_keras(self, setting: str, value: Any) -> str:
        return f"{1.0 - value:g}" if setting == "momentum" else ""

    def mistakes(self, module: Any, inputs: list[Tensor]) -> Iterator[Mistake]:
        import torch

        yield from norm_mistakes(module, inputs)
        if module.running_var is None:
            return
        values = {
            "the running variance is stored as standard deviation": ("running_var", lambda m: m.running_var.sqrt()),
            "the running variance is squared": ("running_var", lambda m: m.running_var.square()),
            "the running mean is lost": ("running_mean", lambda m: torch.zeros_like(m.running_mean)),
            "the running variance is lost": ("running_var", lambda m: torch.ones_like(m.running_var)),
        }
        if module.affine:
            exchanged = with_change(module, inputs, _exchange_affine)
            yield Mistake("its scale (gamma) and shift (beta) are exchanged", exchanged)
        yield Mistake("the running mean and variance are exchanged", with_change(module, inputs, _exchange_statistics))
        for cause, (name, value) in values.items():
            yield Mistake(cause, with_value(module, inputs, name, value))
        yield Mistake("the running statistics are the initial ones", with_change(module, inputs, _reset_statistics))
        yield Mistake(
            "it runs in training mode, on the batch's own statistics",
            with_change(module, inputs, lambda m: m.train(True)),
        )


def norm_mistakes(module: Any, inputs: list[Tensor]) -> Iterator[Mistake]:
    """Mistakes of any normalisation with an epsilon, a scale and a shift."""
    import torch

    for eps in USUAL_EPSILONS:
        if not math.isclose(eps, module.eps, rel_tol=1e-9):
            cause = f"an epsilon of {eps:g} instead of {module.eps:g}"
            yield Mistake(cause, with_value(module, inputs, "eps", partial(constant, eps)))
    if module.weight is not None:
        lost = with_value(module, inputs, "weight", lambda m: torch.ones_like(m.weight))
        yield Mistake("its scale (gamma) is lost", lost)
    if module.bias is not None:
        yield Mistake(
            "its shift (beta) is lost", with_value(module, inputs, "bias", lambda m: torch.zeros_like(m.bias))
        )


def constant(value: float, _: Any) -> float:
    """The value itself, whatever the module, for `with_value`."""
    return value


def scaled_and_shifted(module: Any, x: Tensor, sides: tuple[int, ...]) -> Tensor:
    """A normalised tensor times the module's scale plus its shift, both of the shape `sides`, as far as it has them."""
    if module.weight is None:
        return x
    scaled: Tensor = x * module.weight.reshape(sides)
    return scaled if module.bias is None else scaled + module.bias.reshape(sides)


def _exchange_affine(module: Any) -> None:
    module.weight.data, module.bias.data = module.bias.data, module.weight.data


def _exchange_statistics(module: Any) -> None:
    module.running_mean, module.running_var = module.running_var, module.running_mean


def _reset_statistics(module: Any) -> None:
    module.running_mean.zero_()
    module.running_var.fill_(1.0)


KIND = BatchNorm()
