"""Synthetic weights that use every tensor, for checks without a trained checkpoint.

Plain random initialisation hides mistakes: layer scales of 1e-2 damp a block a hundredfold, biases are zero, and
BatchNorm statistics are the identity.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from porting.models.modes import in_mode

_CALIBRATION_SHAPE = (4, 3, 64, 64)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def fill_with_synthetic_weights(
    model: nn.Module, seed: int = 0, run: Callable[[nn.Module], object] | None = None
) -> None:
    """Give every parameter and statistic of a model, in place, values that reveal errors.

    Kernels are drawn anew from `seed`, with a variance of one over their fan-in. Biases, norm scales and single
    parameters become random numbers in narrow ranges. BatchNorm statistics are then measured on a batch, so that
    activations keep their scale however deep the model is. `run` runs the model on that batch; by default it is a
    batch of random images.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(parameter: torch.Tensor, low: float, high: float) -> None:
        parameter.data.uniform_(low, high, generator=generator)

    with torch.no_grad():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if isinstance(module, (*_BATCH_NORMS, nn.LayerNorm)):
                    draw(parameter, *((0.6, 1.4) if name == "weight" else (-0.3, 0.3)))
                elif name == "bias":
                    draw(parameter, -0.2, 0.2)
                elif parameter.ndim <= 1:  # a single parameter, such as a layer scale
                    draw(parameter, 0.1, 0.5)
                else:
                    fan_in = parameter[0].numel()
                    # PyTorch draws float64 several times more slowly.
                    drawn = torch.empty(parameter.shape).normal_(0.0, fan_in**-0.5, generator=generator)
                    parameter.copy_(drawn)
        images = torch.randn(_CALIBRATION_SHAPE, generator=generator) if run is None else None
        measure_batch_norms(model, run or (lambda own: own(images)))


def measure_batch_norms(model: nn.Module, run: Callable[[nn.Module], object]) -> None:
    """Set the running statistics of every BatchNorm, in place, to those of the batch that `run` feeds the model.

    A norm that gets one number per channel, such as behind a global pooling of one sample, keeps its statistics. A
    model without such norms does not run.
    """
    norms = [module for module in model.modules() if isinstance(module, _BATCH_NORMS)]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0  # the statistics of this batch alone, not a blend with the initial ones
    hooks = [norm.register_forward_pre_hook(_keep_statistics_of_one) for norm in norms]
    try:
        with in_mode(model, training=True), torch.no_grad():
            run(model)
    finally:
        for hook in hooks:
            hook.remove()
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def _keep_statistics_of_one(norm: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    if inputs[0].numel() == inputs[0].shape[1]:
        norm.eval()
