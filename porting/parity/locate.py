"""What a divergence looks like, in plain words.

The strongest evidence is a counterfactual: the mistake is made on purpose in PyTorch, on the layer's own input, and if
that gives Keras's numbers, the mistake is found. Where no known mistake does, the pattern of the difference itself is
looked at. Nothing is said where nothing fits.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

# A cause must leave at most this share of the difference unexplained.
EXPLAINED = 0.05
# Below this share the numbers are Keras's own but for rounding.
REPRODUCED = 1e-3
# A factor and an offset fit two points of a channel always; only many say anything.
_POINTS_A_CHANNEL = 16


@dataclass(frozen=True)
class Diagnosis:
    """A cause in plain words.

    `unexplained` is the share of the RMS difference that it leaves; `checked` is all that was tried.
    """

    layer: str
    cause: str
    unexplained: float
    checked: tuple[str, ...]

    @property
    def confidence(self) -> str:
        """How sure it is: a reproduced mistake leaves next to nothing."""
        return "certain" if self.unexplained <= REPRODUCED else "likely"


# Every ordered pair of so many tensors is tried; a whole deep model has hundreds of one shape.
_MOST_PAIRED = 20

Hypothesis = tuple[str, Callable[[], "Tensor | None"]]


def diagnose(
    layer: str,
    module: nn.Module | None,
    inputs: list[Tensor],
    expected: Tensor,
    actual: Tensor,
    others: Mapping[str, Tensor],
) -> Diagnosis | None:
    """Looks for the cause of the difference between two tensors in PyTorch's axis order.

    `module` is what PyTorch ran on `inputs` to get `expected`, None for tensors that no module made, such as a layer's
    input. `others` are tensors of the same run that might have been taken by mistake, by name.
    """
    import torch

    if expected.shape != actual.shape:
        return None
    with torch.no_grad():
        return _diagnose(layer, module, inputs, expected.double(), actual.double(), others)


def _diagnose(
    layer: str,
    module: nn.Module | None,
    inputs: list[Tensor],
    exact: Tensor,
    found: Tensor,
    others: Mapping[str, Tensor],
) -> Diagnosis | None:
    total = _rms(found - exact)
    if not math.isfinite(total) or total == 0.0:
        return None
    hypotheses: list[Hypothesis] = []
    if module is not None:
        hypotheses += _module_hypotheses(module, inputs)
    hypotheses += _precision_hypotheses(module, inputs, exact)
    hypotheses += _wiring_hypotheses(exact, others)
    checked: list[str] = []
    best: tuple[float, str] = (math.inf, "")
    for cause, make in itertools.chain(hypotheses, _pattern_hypotheses(exact, found)):
        checked.append(cause)
        guess = make()
        if guess is None or guess.shape != found.shape:
            continue
        left = _rms(found - guess.double()) / total
        # An earlier hypothesis is the more specific one; a later one must be clearly better.
        if left < best[0] * 0.1 or (left < best[0] and best[0] > EXPLAINED):
            best = (left, cause)
        if left <= REPRODUCED:
            break
    if best[0] > EXPLAINED:
        return None
    return Diagnosis(layer, best[1], best[0], tuple(checked))


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


def _run(module: nn.Module, inputs: list[Tensor], change: Callable[[nn.Module], object]) -> Callable[[], Tensor | None]:
    """The module's result in float64 after one change to a copy of it."""

    def run() -> Tensor | None:
        import torch

        changed = copy.deepcopy(module).double().eval()
        with torch.no_grad():
            try:
                change(changed)
                result = changed(*[_double(tensor) for tensor in inputs])
            except (RuntimeError, ValueError, TypeError, AttributeError):
                return None  # the mistake cannot be made with these shapes
        return result if isinstance(result, torch.Tensor) else None

    return run


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _set(name: str, value: Callable[[Any], object]) -> Callable[[nn.Module], None]:
    def change(module: nn.Module) -> None:
        new = value(module)
        current = getattr(module, name)
        if hasattr(current, "data") and hasattr(new, "shape"):
            current.data = new
        else:
            setattr(module, name, new)

    return change


def _constant(value: float, _: Any) -> float:
    return value


def _module_hypotheses(module: nn.Module, inputs: list[Tensor]) -> Iterator[Hypothesis]:
    """Known porting mistakes for the kind of module, each made on purpose."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    def made(cause: str, change: Callable[[nn.Module], object]) -> Hypothesis:
        return cause, _run(module, inputs, change)

    def function(cause: str, compute: Callable[[Tensor], Tensor]) -> Hypothesis:
        return cause, lambda: compute(inputs[0].double())

    if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
        yield made("the bias is lost", _set("bias", lambda m: torch.zeros_like(m.bias)))
    if isinstance(module, nn.Linear):
        yield made("the kernel is not transposed", _set("weight", lambda m: m.weight.t().contiguous()))
    if isinstance(module, nn.Conv2d):
        yield made("the kernel's height and width are swapped", _set("weight", lambda m: m.weight.transpose(2, 3)))
        yield made("the kernel is flipped in height and width", _set("weight", lambda m: m.weight.flip(2, 3)))
        yield made("the kernel is flipped in height", _set("weight", lambda m: m.weight.flip(2)))
        yield made("the kernel is flipped in width", _set("weight", lambda m: m.weight.flip(3)))
        if module.groups == 1:
            yield made(
                "the kernel's input and output channels are swapped",
                _set("weight", lambda m: m.weight.transpose(0, 1).contiguous()),
            )
        if module.groups > 1:
            yield made(
                "the depthwise kernel went through a plain convolution's transposition",
                _set("weight", lambda m: _depthwise_as_plain(m.weight)),
            )
        if any(step > 1 for step in module.dilation):
            yield "the dilation is lost", lambda: _conv(module, inputs[0], dilation=(1, 1))
        if any(module.padding):
            yield (
                'zero padding as TensorFlow\'s "same" does it: on the right and bottom first',
                lambda: _conv_same(module, inputs[0]),
            )
            for mode in ("reflect", "replicate"):
                yield made(f"the border is padded by {mode}, not by zeros", _padding_mode(mode))
    if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm)):
        for eps in (1e-3, 1e-4, 1e-5, 1.001e-5, 1e-6, 1e-12, 0.0):
            if not math.isclose(eps, module.eps, rel_tol=1e-9):
                yield made(f"an epsilon of {eps:g} instead of {module.eps:g}", _set("eps", partial(_constant, eps)))
        yield made("its scale (gamma) is lost", _set("weight", lambda m: torch.ones_like(m.weight)))
        yield made("its shift (beta) is lost", _set("bias", lambda m: torch.zeros_like(m.bias)))
    if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
        yield made(
            "the running variance is stored as standard deviation",
            _set("running_var", lambda m: m.running_var.sqrt()),
        )
        yield made("the running variance is squared", _set("running_var", lambda m: m.running_var.square()))
        yield made("the running mean is lost", _set("running_mean", lambda m: torch.zeros_like(m.running_mean)))
        yield made("the running variance is lost", _set("running_var", lambda m: torch.ones_like(m.running_var)))
        yield made("the running statistics are the initial ones", _reset_statistics)
        yield made("it runs in training mode, on the batch's own statistics", lambda m: m.train(True))
    if isinstance(module, nn.GELU):
        yield function("the tanh approximation of GELU", lambda x: F.gelu(x, approximate="tanh"))
        yield function("the sigmoid approximation of GELU", lambda x: x * torch.sigmoid(1.702 * x))
    if type(module).__module__ == "torch.nn.modules.activation":
        others: dict[str, Callable[[Tensor], Tensor]] = {
            "ReLU": F.relu,
            "SiLU": F.silu,
            "GELU": F.gelu,
            "tanh": torch.tanh,
            "sigmoid": torch.sigmoid,
        }
        for name, compute in others.items():
            if type(module).__name__.lower() != name.lower():
                yield function(f"{name} instead of {type(module).__name__}", compute)
        yield function("no activation at all", lambda x: x)


def _depthwise_as_plain(weight: Tensor) -> Tensor:
    # transpose(2, 3, 1, 0) gives (H, W, 1, C); read back as (H, W, C, 1) the numbers keep their order in memory.
    channels, _, height, width = weight.shape
    return weight.permute(2, 3, 1, 0).reshape(height, width, channels, 1).permute(2, 3, 0, 1)


def _conv(module: nn.Conv2d, x: Tensor, *, dilation: tuple[int, int]) -> Tensor:
    from torch.nn import functional as F

    padding = tuple((size - 1) * step // 2 for size, step in zip(module.kernel_size, dilation, strict=True))
    bias = None if module.bias is None else module.bias.double()
    return F.conv2d(x.double(), module.weight.double(), bias, module.stride, padding, dilation, module.groups)


def _conv_same(module: nn.Conv2d, x: Tensor) -> Tensor:
    from torch.nn import functional as F

    pads: list[int] = []
    for side, size, stride, step in zip(x.shape[-2:], module.kernel_size, module.stride, module.dilation, strict=True):
        reach = (size - 1) * step + 1
        total = max((-(-side // stride) - 1) * stride + reach - side, 0)
        pads = [total // 2, total - total // 2, *pads]  # F.pad takes the last axis first
    bias = None if module.bias is None else module.bias.double()
    padded = F.pad(x.double(), pads)
    return F.conv2d(padded, module.weight.double(), bias, module.stride, 0, module.dilation, module.groups)


def _padding_mode(mode: str) -> Callable[[nn.Module], None]:
    def change(module: Any) -> None:
        height, width = (int(pad) for pad in module.padding)
        module.padding_mode = mode
        module._reversed_padding_repeated_twice = [width, width, height, height]

    return change


def _reset_statistics(module: Any) -> None:
    module.running_mean.zero_()
    module.running_var.fill_(1.0)


def _rounded(values: Tensor, bits: int) -> Tensor:
    """Values with `bits` bits of mantissa after the point, to the nearest."""
    import torch

    mantissa, exponent = torch.frexp(values.double())
    scale = 2.0 ** (bits + 1)
    return torch.ldexp(torch.round(mantissa * scale) / scale, exponent)


_PRECISIONS = {"bfloat16": 7, "float16 or TF32": 10}


def _precision_hypotheses(module: nn.Module | None, inputs: list[Tensor], exact: Tensor) -> Iterator[Hypothesis]:
    for name, bits in _PRECISIONS.items():
        yield f"its result is rounded to {name}", partial(_rounded, exact, bits)
        if module is not None and list(module.parameters()):

            def weights_rounded(changed: nn.Module, bits: int = bits) -> None:
                for parameter in changed.parameters():
                    parameter.data = _rounded(parameter.data, bits)

            def kernel_rounded(changed: nn.Module, bits: int = bits) -> None:
                for parameter in changed.parameters():
                    if parameter.ndim > 1:
                        parameter.data = _rounded(parameter.data, bits)

            yield f"its kernel is rounded to {name}", _run(module, inputs, kernel_rounded)
            yield f"its weights are rounded to {name}", _run(module, inputs, weights_rounded)
            rounded = [_rounded(x, bits) if x.is_floating_point() else x for x in inputs]
            yield f"it computes in {name}", _run(module, rounded, weights_rounded)


def _wiring_hypotheses(exact: Tensor, others: Mapping[str, Tensor]) -> Iterator[Hypothesis]:
    """Another tensor taken in place of the right one, or of one of its summands."""
    same = {name: tensor for name, tensor in others.items() if tensor.shape == exact.shape}
    for name, tensor in same.items():
        yield f"it is {name} instead", partial(_combined, tensor)
    for name, tensor in same.items():
        yield f"{name} is not added", partial(_combined, exact, minus=tensor)
        yield f"{name} is added once too often", partial(_combined, exact, plus=tensor)
    if len(same) > _MOST_PAIRED:
        return
    for (right, one), (wrong, other) in itertools.permutations(same.items(), 2):
        yield f"{wrong} is added where {right} belongs", partial(_combined, exact, minus=one, plus=other)


def _combined(base: Tensor, *, plus: Tensor | None = None, minus: Tensor | None = None) -> Tensor:
    result = base.double()
    if plus is not None:
        result = result + plus.double()
    return result if minus is None else result - minus.double()


def _pattern_hypotheses(exact: Tensor, found: Tensor) -> Iterator[Hypothesis]:
    """The shape of the difference itself, where no known mistake reproduces it."""
    channels = 1 if exact.ndim > 2 else -1
    axes = [axis for axis in range(exact.ndim) if axis != channels % exact.ndim]

    yield "a constant factor", lambda: exact * ((exact * found).sum() / exact.square().sum())
    yield "a constant offset", lambda: exact + (found - exact).mean()
    if exact.ndim > 1:
        yield "its channels are permuted", lambda: _permuted(exact, found, channels)
        if exact.numel() // exact.shape[channels] >= _POINTS_A_CHANNEL:
            yield (
                "a constant factor per channel",
                lambda: exact * ((exact * found).sum(axes, True) / exact.square().sum(axes, True).clamp_min(1e-300)),
            )
            yield "a constant offset per channel", lambda: exact + (found - exact).mean(axes, keepdim=True)
            yield "a factor and an offset per channel", lambda: _affine_fit(exact, found, axes)
        yield "only a few channels differ", lambda: _few_channels_replaced(exact, found, axes)
    if exact.ndim == 4:
        yield "height and width are swapped", lambda: exact.transpose(2, 3)
        yield "it is flipped in height", lambda: exact.flip(2)
        yield "it is flipped in width", lambda: exact.flip(3)
        yield "only the border differs, as with another padding", lambda: _border_replaced(exact, found)
    yield "only a few elements differ", lambda: _few_replaced(exact, found)


def _few_channels_replaced(exact: Tensor, found: Tensor, axes: list[int]) -> Tensor | None:
    """Keras's own values in a tenth of the channels, those that differ most, and the truth in all others."""
    import torch

    size = (found - exact).square().sum(axes, keepdim=True)
    count = size.numel() // 10
    if not count:
        return None
    threshold = size.flatten().topk(count).values[-1]
    return torch.where(size >= threshold, found, exact)


def _affine_fit(exact: Tensor, found: Tensor, axes: list[int]) -> Tensor:
    centred = exact - exact.mean(axes, keepdim=True)
    slope = (centred * found).sum(axes, True) / centred.square().sum(axes, True).clamp_min(1e-300)
    return found.mean(axes, keepdim=True) + slope * centred


def _permuted(exact: Tensor, found: Tensor, channels: int) -> Tensor | None:
    """The expected channels in the order in which the actual ones resemble them most."""
    one, other = (tensor.movedim(channels, 0).flatten(1) for tensor in (exact, found))
    if one.shape[1] < 2:
        return None
    distance = (one.square().sum(1)[None] + other.square().sum(1)[:, None] - 2 * other @ one.T).clamp_min(0)
    order = distance.argmin(1)
    if len(set(order.tolist())) != len(order):
        return None
    return exact.index_select(channels % exact.ndim, order)


def _border_replaced(exact: Tensor, found: Tensor) -> Tensor | None:
    """The truth inside, Keras's own values in a frame of at most a quarter of the map."""
    height, width = exact.shape[2:]
    frame = max(1, min(height, width) // 4)
    if min(height, width) < 5:
        return None
    guess = found.clone()
    guess[:, :, frame:-frame, frame:-frame] = exact[:, :, frame:-frame, frame:-frame]
    return guess


def _few_replaced(exact: Tensor, found: Tensor) -> Tensor | None:
    count = max(1, exact.numel() // 1000)
    if exact.numel() < 100:
        return None
    guess = exact.clone().flatten()
    worst = (found - exact).abs().flatten().topk(count).indices
    guess[worst] = found.flatten()[worst]
    return guess.reshape(exact.shape)
