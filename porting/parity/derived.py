"""Computes, in float64, weights that a port derives from several tensors.

Keras's LSTM has one bias and PyTorch's has two; a weight norm is folded into a kernel, and a BatchNorm into the
convolution before it. Such a weight is rounded to float32 once, when it is stored. If a Keras weight is the rounding of
a derived one, the exact view uses the number before rounding. Otherwise it keeps the weight, and the outputs differ.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from porting.kinds import kind_called, kind_of_module
from porting.kinds.transforms import CONVOLUTION, DENSE, DEPTHWISE, Array
from porting.parity.record import Recording

if TYPE_CHECKING:
    from torch import Tensor, nn

# A few roundings of the greatest number, since a sum of terms that cancel is rounded relative to the terms.
_ROUNDED = 2.0**-21
# The bytes of a model's float32 weights from which on copies in float64 are avoided.
LARGE = 256 << 20


def derived_weights(model: nn.Module, recording: Recording, epsilons: Iterable[float] = ()) -> list[Array]:
    """List all weights that a port may derive from the tensors of this float64 model, in Keras's order of axes.

    `epsilons` are those of Keras's batch norms, whose variance may include the difference to PyTorch's epsilon.
    """
    found = [each for module in model.modules() for each in _of_module(module)]
    found += [*_folded_norms(model, recording), *_shifted_variances(model, set(epsilons))]
    found += [rows for each in found for rows in _behind_a_flatten(each, recording)]
    return [np.ascontiguousarray(each) for each in found]


def _behind_a_flatten(kernel: Array, recording: Recording) -> Iterator[Array]:
    """The kernel of a Dense with its rows in the order of Keras's Flatten, for every map that it may follow."""
    if kernel.ndim != 2:
        return
    maps = {tuple(truth.tensor.shape[1:]) for truth in recording.truths if truth.tensor.ndim > 2}
    for channels, *sides in maps:
        if channels * math.prod(sides) == len(kernel):
            yield np.moveaxis(kernel.reshape(channels, *sides, -1), 0, -2).reshape(kernel.shape)


def _shifted_variances(model: nn.Module, epsilons: set[float]) -> Iterator[Array]:
    from torch import nn

    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_var is not None:
            for epsilon in epsilons - {module.eps}:
                yield module.running_var.numpy() + (module.eps - epsilon)


def halved_weights(model: nn.Module) -> list[Array]:
    """List the half-precision weights of a model, in every order of axes that Keras may use."""
    import torch

    return [
        np.ascontiguousarray(each)
        for tensor in model.state_dict().values()
        if tensor.dtype in {torch.float16, torch.bfloat16}
        for each in in_all_orders(tensor.detach().double().numpy())
    ]


def rounds_to(values: Array, halved: list[Array]) -> Array | None:
    """The half-precision weight that float32 `values` round to; None if there is none, or if they are that weight."""
    for exact in halved:
        if exact.shape != values.shape:
            continue
        if np.array_equal(exact, values):
            return None
        if bool((np.abs(values - exact) <= 2.0**-8 * np.abs(exact) + 2.0**-24).all()):
            return exact
    return None


def in_all_orders(array: Array) -> Iterator[Array]:
    """Yield a tensor in every order of axes that Keras may use: unchanged, and by each kernel's transform."""
    yield array
    for transform in (CONVOLUTION, DEPTHWISE, DENSE):
        if transform.takes(array.ndim):
            yield transform.apply(array)


def is_nearly(values: Array, stored: Array) -> bool:
    """Whether weights are those of a tensor but for a small mistake, as rounding them makes."""
    return bool((np.abs(values - stored.reshape(values.shape)) <= _DAMAGE * np.abs(stored).max(initial=0.0)).all())


class StoredWeights:
    """Recognises weights that hold the numbers of a checkpoint tensor, in any order of axes."""

    def __init__(self, tensors: Iterable[Array]) -> None:
        self._tensors = list(tensors)
        self._known = {_checksum(tensor) for tensor in self._tensors}
        self._numbers: Array | None = None

    def has(self, values: Array) -> bool:
        """Whether `values` hold such a tensor, or only zeros, which nothing computes."""
        return not values.any() or _checksum(values) in self._known

    def has_parts(self, values: Array) -> bool:
        """Whether `values` are made of numbers that the tensors hold, such as the queries of a fused projection."""
        if self._numbers is None:
            self._numbers = np.unique(np.concatenate([each.ravel() for each in self._tensors] or [np.zeros(0)]))
        return bool(np.isin(values.ravel()[:_SOME], self._numbers).all() and np.isin(values, self._numbers).all())


def _checksum(values: Array) -> tuple[int, int, int]:
    """A checksum of float32 numbers that does not depend on their order."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).reshape(-1).astype(np.uint64)
    return bits.size, int(bits.sum()), int((bits * bits).sum())


def substitute_for(values: Array, derived: list[Array]) -> Array | None:
    """The derived weight of which float32 `values` are the rounding; None if none fits."""
    for exact in derived:
        if exact.shape != values.shape:
            continue
        # A kernel is a product, number by number. A bias may be a sum of terms that cancel.
        size = np.abs(exact) if exact.ndim > 1 else float(np.abs(exact).max(initial=0.0))
        limit = _ROUNDED * size
        if bool((np.abs(values.astype(np.float64) - exact) <= limit).all()):
            return exact
    return None


# The factors that are folded into weights are such powers of a whole number, as of the size of an attention's heads.
_POWERS = (-0.5, -0.25, 0.5, 0.25)
_GREATEST_FACTOR = 4096
# The number of elements on which a factor is tried before all are compared.
_TRIED = 64
# A number of a weight is damaged, and not another one, up to this share of the greatest number.
_DAMAGE = 1e-3
_SOME = 4096
# A table of the types of tokens has at most so many rows.
_MOST_TYPES = 4


def scaled_weight(values: Array, tensors: Iterable[Array]) -> Array | None:
    """A tensor times the root of a whole number, if float32 `values` are its rounding; None if there is none."""
    for tensor in tensors:
        exact = tensor.reshape(values.shape)
        first = exact.ravel()[:_TRIED]
        if (first == first[0]).all() or not _is_times(values.ravel()[:_TRIED], first):
            continue  # equal numbers, such as the ones of a new norm, say nothing
        factor = _is_times(values, exact)
        if not factor:
            continue
        for power in _POWERS:
            number = factor ** (1 / power)
            if 2 <= round(number) <= _GREATEST_FACTOR and abs(number / round(number) - 1.0) < 1e-6:
                scaled: Array = exact * float(round(number)) ** power
                return scaled
    return None


def _is_times(values: Array, exact: Array) -> float:
    """The factor between a tensor and float32 `values` that are its rounding, number by number; 0 if there is none."""
    size = float(np.square(exact).sum())
    factor = float((values * exact).sum()) / size if size else 0.0
    rounded = factor * exact
    return factor if factor > 0.0 and bool((np.abs(values - rounded) <= 2.0**-22 * np.abs(rounded)).all()) else 0.0


def table_with_row(values: Array, tables: Iterable[Array]) -> Array | None:
    """A table to whose rows another's first row is added, as a type of token is to positions; None if there is none.

    All have rows of one length. The sum has as many as float32 `values`, which are its rounding, from the beginning or
    the end of the table.
    """
    for table, other in itertools.permutations(tables, 2):
        if len(table) < len(values) or len(other) > _MOST_TYPES:
            continue
        for rows in (table[: len(values)], table[len(table) - len(values) :]):
            found: Array = rows + other[0]
            if bool((np.abs(values - found) <= 2.0**-23 * (np.abs(rows) + np.abs(other[0]))).all()):
                return found
    return None


def is_too_large_to_copy(model: nn.Module) -> bool:
    """Whether to run a model in float64 without a copy in float64, casting each weight while it is used.

    Not for models from which a port may derive weights: those are compared as they were before their rounding. The
    casts cannot reach into TorchScript.
    """
    import torch

    size = sum(4 * parameter.numel() for parameter in model.parameters())
    scripted = any(isinstance(module, torch.jit.ScriptModule) for module in model.modules())
    return size > LARGE and not has_derived(model) and not scripted


def has_derived(model: nn.Module) -> bool:
    """Whether the model has modules from which a port may derive weights."""
    from torch import nn

    return any(
        isinstance(module, (nn.RNNBase, nn.RNNCellBase, nn.modules.batchnorm._BatchNorm)) or _is_parametrized(module)
        for module in model.modules()
    )


def _of_module(module: nn.Module) -> Iterator[Array]:
    from torch import nn

    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)) and module.bias:
        for suffix in _directions(module):
            one, other = (getattr(module, f"bias_{name}{suffix}").detach().numpy() for name in ("ih", "hh"))
            yield one + other
    if isinstance(module, nn.RNNBase):
        yield from _computed_weights(module)
    tensor: Any = getattr(module, "weight", None)
    if tensor is not None and _is_parametrized(module):
        weight = tensor.detach().numpy()
        kind = kind_of_module(module)
        for leaf in kind.leaves if kind is not None else ():
            if leaf.sources == ("weight",):
                with contextlib.suppress(ValueError):
                    yield from leaf.transform.to_keras([weight], [])
        yield weight


def _computed_weights(module: nn.RNNBase) -> Iterator[Array]:
    """The weights of recurrent layers that are no parameters, as Keras holds them, such as those under weight_norm."""
    from torch import nn

    for index in range(module.num_layers):
        for leaf in kind_called(f"recurrent:l{index}").leaves_for(module):
            tensors = [getattr(module, name, None) for name in leaf.sources]
            if len(tensors) == 1 and tensors[0] is not None and not isinstance(tensors[0], nn.Parameter):
                yield from leaf.transform.to_keras([tensors[0].detach().double().numpy()], [])


def _directions(module: Any) -> Iterator[str]:
    for layer in range(getattr(module, "num_layers", 0)):
        yield f"_l{layer}"
        if module.bidirectional:
            yield f"_l{layer}_reverse"
    if not hasattr(module, "num_layers"):  # a cell
        yield ""


def _is_parametrized(module: nn.Module) -> bool:
    from torch.nn.utils import parametrize

    if parametrize.is_parametrized(module, "weight"):
        return True
    return any(type(hook).__name__ in {"WeightNorm", "SpectralNorm"} for hook in module._forward_pre_hooks.values())


def _with_norm_before(norm: nn.modules.batchnorm._BatchNorm, module: nn.Module) -> Iterator[Array]:
    """The kernel and bias of a dense layer, or of a convolution without padding, with the norm before it folded in."""
    import torch
    from torch import nn

    if not isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return
    if not isinstance(module, nn.Linear) and (module.groups > 1 or any(module.padding)):
        return  # what it pads with would have to be shifted too
    assert norm.running_var is not None  # the caller has seen to it
    assert norm.running_mean is not None
    if module.weight.shape[1] != len(norm.running_var):
        return
    scale = torch.rsqrt(norm.running_var + norm.eps)
    shift = -norm.running_mean * scale
    if norm.affine:
        scale, shift = scale * norm.weight, shift * norm.weight + norm.bias
    weight = module.weight.detach()
    per_input = (1, -1, *[1] * (weight.ndim - 2))
    more = (weight * shift.detach().view(per_input)).flatten(1).sum(1)
    yield (more if module.bias is None else more + module.bias.detach()).numpy()
    kernel = (weight * scale.detach().view(per_input)).numpy()
    yield DENSE.apply(kernel) if kernel.ndim == 2 else CONVOLUTION.apply(kernel)


def fold(module: nn.Module, norm: nn.modules.batchnorm._BatchNorm) -> tuple[Tensor, Tensor] | None:
    """Fold a norm into the kernel and bias of the convolution or dense layer before it; None for other modules."""
    from torch import nn

    if not isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)):
        return None
    if norm.running_var is None or norm.running_mean is None:
        return None
    factor = (norm.running_var + norm.eps).rsqrt()
    factor = factor if norm.weight is None else factor * norm.weight
    weight = module.weight * factor.reshape(-1, *[1] * (module.weight.ndim - 1))
    bias = -norm.running_mean if module.bias is None else module.bias - norm.running_mean
    bias = bias * factor if norm.bias is None else bias * factor + norm.bias
    return weight.detach(), bias.detach()


def _folded_norms(model: nn.Module, recording: Recording) -> Iterator[Array]:
    """Yield kernels and biases of convolutions and dense layers with a BatchNorm after or before them folded in."""
    from torch import nn

    modules = dict(model.named_modules())
    made_by = {id(truth): name for name, call in recording.calls.items() for truth in call.outputs if name in modules}
    for name, call in recording.calls.items():
        maker = modules.get(made_by.get(id(call.inputs[0]), "")) if call.inputs else None
        if isinstance(maker, nn.modules.batchnorm._BatchNorm) and maker.running_var is not None:
            yield from _with_norm_before(maker, modules[name]) if name in modules else ()
        norm = modules.get(name)
        if not isinstance(norm, nn.modules.batchnorm._BatchNorm) or norm.running_var is None or not call.inputs:
            continue
        before = modules.get(made_by.get(id(call.inputs[0]), ""))
        folded = None if before is None else fold(before, norm)
        if folded is None:
            continue
        weight, bias = (tensor.numpy() for tensor in folded)
        yield bias
        if weight.ndim == 2:
            yield DENSE.apply(weight)
            continue
        yield CONVOLUTION.apply(weight)
        if weight.shape[1] == 1 and DEPTHWISE.takes(weight.ndim):
            yield DEPTHWISE.apply(weight)
