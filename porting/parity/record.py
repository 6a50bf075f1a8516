"""Records the float64 run of the PyTorch model: every tensor that a module takes or returns, once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from porting.kinds.base import CallInputs
from porting.models.inputs import leaves_by_key
from porting.models.observe import Observer, Replacement, call_inputs, observe_modules, to_torch
from porting.models.stacks import modules_of
from porting.parity.content import Place, Truth, as_real, place_of_result
from porting.parity.report import OUTPUT

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


@dataclass
class Call:
    """The inputs and outputs of one call of a module, and how it was given its inputs."""

    inputs: list[Truth] = field(default_factory=list)
    outputs: list[Truth] = field(default_factory=list)
    given: CallInputs = field(default_factory=lambda: CallInputs(()))
    types: list[torch.dtype] = field(default_factory=list)

    def taken(self) -> CallInputs:
        """The tensors that the call took, to call the module again in the same way."""
        return self.given.with_other(
            truth.tensor if dtype.is_floating_point or dtype.is_complex else truth.tensor.to(dtype)
            for truth, dtype in zip(self.inputs, self.types, strict=True)
        )


@dataclass
class Recording:
    """A recorded run: all calls by name, the order in which they ended, all tensors, and the results by key."""

    calls: dict[str, Call] = field(default_factory=dict)
    order: dict[str, int] = field(default_factory=dict)
    truths: list[Truth] = field(default_factory=list)
    outputs: dict[str, Truth] = field(default_factory=dict)


def output_name(key: str) -> str:
    """The name of a result in reports."""
    return f"{OUTPUT}{key}" if not key or key.startswith("[") else f"{OUTPUT}[{key}]"


class _Recorder:
    watches_inputs = True

    def __init__(self, *, copies: bool) -> None:
        self.recording = Recording()
        self._copies = copies
        # By id and version. Keeping the tensors alive makes sure that no id is used twice.
        self._kept: dict[tuple[int, int], tuple[Tensor, Truth]] = {}

    def before(self, name: str, inputs: list[Tensor]) -> Replacement:
        call = self.recording.calls.setdefault(name, Call())
        call.inputs = [self._keep(tensor, (name, False, index)) for index, tensor in enumerate(inputs)]
        call.types = [tensor.dtype for tensor in inputs]
        return None

    def keep_arguments(self, name: str, args: Any, kwargs: Any) -> None:
        self.recording.calls[name].given = call_inputs((), args, kwargs)

    def after(self, name: str, outputs: list[Tensor]) -> Replacement:
        recording = self.recording
        recording.calls[name].outputs = [self._keep(each, (name, True, index)) for index, each in enumerate(outputs)]
        recording.order[name] = len(recording.order)
        return None

    def keep_results(self, leaves: Mapping[str, Any]) -> None:
        for key, leaf in leaves.items():
            with contextlib.suppress(TypeError):  # an array of something else than numbers
                is_dense = hasattr(leaf, "detach") and str(leaf.layout) == "torch.strided"
                tensor = leaf if is_dense else to_torch(leaf)
                self.recording.outputs[key] = self._keep(tensor, place_of_result(key))

    def _keep(self, tensor: Tensor, place: Place) -> Truth:
        key = id(tensor), version(tensor)
        if key not in self._kept:
            detached = tensor.detach()
            self._kept[key] = tensor, Truth(as_real(detached.clone() if self._copies else detached))
            self.recording.truths.append(self._kept[key][1])
        truth = self._kept[key][1]
        truth.places.append(place)
        return truth

    def finish(self) -> bool:
        """Free what only the recording needs. Returns whether it is valid: no kept tensor was changed in place since.

        `x += y` and an in-place ReLU make such changes.
        """
        kept, self._kept = self._kept, {}
        return self._copies or all(version(tensor) == seen for (_, seen), (tensor, _) in kept.items())


def version(tensor: Tensor) -> int:
    """How often a tensor was changed in place."""
    return 0 if tensor.is_inference() else tensor._version


def record(model: nn.Module, run: Callable[[nn.Module], Any]) -> Recording:
    """Run the model, and run it again with copies if it overwrites a recorded tensor."""
    import torch

    @contextlib.contextmanager
    def running(observer: Observer) -> Iterator[Callable[[], dict[str, Any]]]:
        with torch.no_grad(), observe_modules(model, observer, stacks=True):
            yield lambda: leaves_by_key(run(model))

    return record_run(running)


def record_run(running: Callable[[Observer], AbstractContextManager[Callable[[], Mapping[str, Any]]]]) -> Recording:
    """Record a run of any model. `running` yields, for an observer, a function that runs it and returns its results."""
    for copies in (False, True):
        recorder = _Recorder(copies=copies)
        with running(recorder) as run:
            recorder.keep_results(run())
        if recorder.finish():
            break
    return recorder.recording


class NoiseObserver:
    """Observes a float32 run of PyTorch and measures how far each wanted tensor is from the recorded truth."""

    def __init__(self, recording: Recording, wanted: set[int]) -> None:
        self.recording = recording
        self._wanted = wanted
        self.watches_inputs = any(
            id(truth) in wanted and not any(is_output for _, is_output, _ in truth.places) for truth in recording.truths
        )

    def before(self, name: str, inputs: list[Tensor]) -> Replacement:
        if name in self.recording.calls:
            self._measure(self.recording.calls[name].inputs, inputs)
        return None

    def after(self, name: str, outputs: list[Tensor]) -> Replacement:
        if name in self.recording.calls:
            self._measure(self.recording.calls[name].outputs, outputs)
        return None

    def results(self, result: Any) -> None:
        found = leaves_by_key(result)
        for key, truth in self.recording.outputs.items():
            if key in found:
                self._measure([truth], [to_torch(found[key])])

    def _measure(self, truths: list[Truth], tensors: list[Tensor]) -> None:
        from porting.parity.measure import measure_distance

        for truth, tensor in zip(truths, tensors, strict=False):
            if truth.noise is None and id(truth) in self._wanted:
                real = as_real(tensor)
                if real.shape == truth.tensor.shape:
                    truth.noise = measure_distance(real, truth.tensor)


def kinds_of(model: nn.Module) -> Mapping[str, str]:
    """The class of every module, by its name."""
    return {path: type(module).__name__ for path, module in modules_of(model).items()}
