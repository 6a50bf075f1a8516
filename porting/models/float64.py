"""Converts a PyTorch model to double precision. Its results are taken as the truth.

PyTorch has no depthwise convolution for float64. It runs one small convolution per channel, which takes most of the
time of a float64 pass. Here such a module adds the taps of its kernel one after another, each over all channels. The
products are the same, and so is their sum, up to float64 rounding.

A large model is not copied. Each function that it calls gets float64 copies of its weights, which live no longer than
that call. The results are the same, and the memory is that of the largest weight.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Any

from porting.models.clamps import clamped, is_clamp

if TYPE_CHECKING:
    from torch import Tensor, nn


class WritesError(RuntimeError):
    """The code of a model writes into a tensor that is not in float64, which a copy of it would not see."""


def _writes(name: str) -> bool:
    """Whether a function of PyTorch changes its first argument."""
    return name in _ASSIGNING or (name.endswith("_") and not name.endswith("__"))


# Methods that change their tensor, without those that end in one underscore.
_CHANGING = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or")
_ASSIGNING = frozenset({"__setitem__", *(f"__i{name}__" for name in _CHANGING)})
_CREATING = frozenset({"zeros", "ones", "empty", "eye", "arange"})
# Functions that need no float64 copy of a weight.
_LOOKING = frozenset(
    {
        "__len__",
        "dim",
        "size",
        "numel",
        "nelement",
        "stride",
        "is_contiguous",
        "is_floating_point",
        "is_complex",
        "data_ptr",
        "element_size",
        "detach",
        "__getitem__",
        "chunk",
        "expand",
        "expand_as",
        "narrow",
        "permute",
        "reshape",
        "select",
        "split",
        "squeeze",
        "swapaxes",
        "t",
        "transpose",
        "unbind",
        "unsqueeze",
        "view",
        "view_as",
        "movedim",
        "moveaxis",
        "flatten",
        "unflatten",
        "requires_grad_",
        "__set__",
    }
)


def in_float64(model: nn.Module) -> nn.Module:
    """Copy the model in double precision, without an intermediate copy in its own precision."""
    import torch
    from torch import nn

    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(_exact_copy(parameter.detach()), requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = _exact_copy(buffer)
    truth = copy.deepcopy(model, memo).double()
    for module in truth.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, torch.Tensor) and value.dtype == torch.float32:  # neither a parameter nor a buffer
                vars(module)[name] = value.double()
        # Not for subclasses, which may compute something else.
        if type(module) is nn.Conv2d and _is_plain_depthwise(module):
            vars(module)["forward"] = partial(_depthwise, module)
    return truth


@contextlib.contextmanager
def computing_in_float64(model: nn.Module) -> Iterator[None]:
    """Let a PyTorch model that is fed float64 compute in float64, whatever type its weights have."""
    with _float64_by_default(), staying_in_float64() if is_double(model) else _weights_in_float64():
        yield


# Where the constants that a model's code creates are collected; None if nobody asks for them.
_COLLECTED: ContextVar[list[Any] | None] = ContextVar("collected", default=None)
_CONSTANTS, _MOST_NUMBERS = frozenset({"tensor", "as_tensor", "full", "linspace"}), 65_536


@contextlib.contextmanager
def collecting_constants() -> Iterator[list[Tensor]]:
    """Yield a list of the tensors that code makes of its own numbers while models run in this context."""
    found: list[Tensor] = []
    token = _COLLECTED.set(found)
    try:
        yield found
    finally:
        _COLLECTED.reset(token)


@contextlib.contextmanager
def _float64_by_default() -> Iterator[None]:
    """Let code that creates a tensor without a type, such as `torch.tensor(0.1)`, create it in float64."""
    import torch

    own = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(own)


def is_double(model: nn.Module) -> bool:
    """Whether all floats of a model are in float64."""
    import torch

    tensors = (*model.parameters(), *model.buffers())
    return all(tensor.dtype == torch.float64 for tensor in tensors if tensor.is_floating_point())


@contextlib.contextmanager
def _weights_in_float64() -> Iterator[None]:
    """Do as `staying_in_float64`, and give every function float64 copies of the tensors that are in another type.

    Functions that only look at a tensor, or at its numbers in another arrangement, get it as it is.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    def double(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.detach().double() if value.is_floating_point() and value.dtype != torch.float64 else value
        if type(value) in {tuple, list}:
            return type(value)(double(each) for each in value)
        return torch.float64 if value is torch.float32 else value

    class Upcasting(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            name = getattr(func, "__name__", "")
            first = args[0] if args else kwargs.get("input")
            if name == "__get__":
                found = func(*args, **kwargs)
                # Code that casts to the type of a weight must not leave float64.
                floating = isinstance(found, torch.dtype) and found.is_floating_point
                return torch.float64 if floating else found
            if name in _LOOKING:
                return func(*args, **kwargs)
            written = kwargs.get("out", first if _writes(name) else None)
            if isinstance(written, torch.Tensor) and written.is_floating_point() and written.dtype != torch.float64:
                raise WritesError(f"{name} writes into a tensor of {written.dtype}")
            if name == "embedding":
                return double(func(*args, **kwargs))  # it picks rows; a table may be half of a model
            if func is torch.Tensor.float and isinstance(first, torch.Tensor):
                return first.double()
            kwargs = {key: double(each) for key, each in kwargs.items()}
            return _in_double_if_new(name, func(*map(double, args), **kwargs))

    with Upcasting():
        yield


@contextlib.contextmanager
def staying_in_float64() -> Iterator[None]:
    """Keep float64 tensors in float64 where the code of a model casts them to float32.

    Many models cast around a softmax or a norm, whatever their precision, to be safe in half precision. Integers that
    the code casts to float32, such as positions, become float64 too, and so do tensors that it creates in float32.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    class Staying(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            first = args[0] if args else kwargs.get("input")
            made = not isinstance(first, torch.Tensor)
            if made or first.dtype == torch.float64 or not (first.is_floating_point() or first.is_complex()):
                if func is torch.Tensor.float:
                    return first.double()
                args = tuple(torch.float64 if each is torch.float32 else each for each in args)
                kwargs = {k: torch.float64 if each is torch.float32 else each for k, each in kwargs.items()}
            name = getattr(func, "__name__", "")
            if is_clamp(name):
                func, args, kwargs = clamped(func, args, kwargs)
            return _in_double_if_new(name, func(*args, **kwargs))

    with Staying():
        yield


def _in_double_if_new(name: str, result: Any) -> Any:
    """A tensor that code creates without a type, in float64 like all others. Its numbers are exact in float32 too."""
    import torch

    collected = _COLLECTED.get() if name in _CONSTANTS else None
    is_tensor = collected is not None and isinstance(result, torch.Tensor) and result.dtype == torch.float64
    if collected is not None and is_tensor and 0 < result.numel() <= _MOST_NUMBERS:
        collected.append(result.detach().clone())
    made = name in _CREATING and isinstance(result, torch.Tensor)
    return result.double() if made and result.dtype == torch.float32 else result


def _exact_copy(tensor: Tensor) -> Tensor:
    """Copy a tensor, floats to float64, into memory of its own even if it is float64 already."""
    import torch

    return tensor.to(torch.float64, copy=True) if tensor.is_floating_point() else tensor.clone()


def _is_plain_depthwise(module: nn.Conv2d) -> bool:
    """Whether the convolution has one channel in and out per group, stride 1 and zero padding."""
    return (
        module.groups == module.in_channels == module.out_channels
        and module.stride == (1, 1)
        and module.padding_mode == "zeros"
        and isinstance(module.padding, tuple)
        and "forward" not in vars(module)
    )


def _depthwise(module: nn.Conv2d, images: Tensor) -> Tensor:
    """Compute the result of `module` for `(N, C, H, W)`, tap by tap. The zero padding is skipped, not added."""
    import torch

    assert isinstance(module.padding, tuple)  # `_is_plain_depthwise` rules out a string
    weight = module.weight[:, 0, :, :, None, None]
    sides = [
        size + 2 * padding - dilation * (taps - 1)
        for size, padding, dilation, taps in zip(
            images.shape[-2:], module.padding, module.dilation, module.kernel_size, strict=True
        )
    ]
    if min(sides) < 1 or images.ndim != 4:
        # PyTorch itself raises the right error, or takes images without a batch axis.
        return type(module).forward(module, images)
    result = images.new_zeros(*images.shape[:2], *sides)
    if module.bias is not None:
        result += module.bias[:, None, None]
    rows, columns = (
        [_overlap(side, size, tap * dilation - padding) for tap in range(taps)]
        for side, size, padding, dilation, taps in zip(
            sides, images.shape[-2:], module.padding, module.dilation, module.kernel_size, strict=True
        )
    )
    # Everything here is in float64: `staying_in_float64` need not look at each of the many small operations.
    with torch._C.DisableTorchFunction():
        for i, (to_rows, from_rows) in enumerate(rows):
            for j, (to_columns, from_columns) in enumerate(columns):
                result[..., to_rows, to_columns].addcmul_(images[..., from_rows, from_columns], weight[:, i, j])
    return result


def _overlap(to_size: int, from_size: int, shift: int) -> tuple[slice, slice]:
    """The positions in the result that a tap with this `shift` adds to, and those in the image that it reads."""
    begin = max(0, -shift)
    end = max(begin, min(to_size, from_size - shift))
    return slice(begin, end), slice(begin + shift, end + shift)
