"""The base class of families whose two models both come from other packages."""

from __future__ import annotations

import fnmatch
import hashlib
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from porting.errors import FamilyError, SourceError
from porting.families.base import Family, Spec, by_path, coverage
from porting.families.builders import library, timm_model, transformers_without_filling
from porting.files.checkpoint import Checkpoint
from porting.files.weights_file import weight_shapes
from porting.kinds.transforms import Array, Constant, Shape
from porting.mapping.key_map import KeyMap, TensorEntry
from porting.mapping.naming import Naming
from porting.mapping.rules import KeyRule
from porting.models.images import IMAGENET, Preprocessing
from porting.models.rows import key_map_of_rows
from porting.progress import SILENT, Progress
from porting.sources.table import USUAL_CLASSES, Source
from porting.wording import reason_of

if TYPE_CHECKING:
    import keras
    from PIL import Image
    from torch import nn


class LibraryFamily(Family):
    """A family whose PyTorch models are in timm, torchvision or transformers, and whose Keras models are in a package.

    A subclass defines `name`; `publisher`, the package of the PyTorch models; `models`, which maps each variant (the
    publisher's name) to what the builders need; `rows`; `head`, the PyTorch name of the classifier, or "" for none;
    `inputs`; `make_candidate`; and `build_reference` if the models are not timm's. The rows are matched against both
    live models, so they also handle what names alone do not show, such as a bias that one side lacks. `drops` are
    patterns of PyTorch tensors that Keras computes or does not need; integer tensors are always dropped. `foreign` are
    prefixes of names that belong to larger models around these. `zeros` are tensors that Keras lacks and that must be
    zero.

    `body` are what precedes the names of all rows but the head's in a model with a head, in PyTorch and in Keras.
    `names_in_5` is for rows under the names of transformers 4: parts of them, and what stands there in transformers 5.
    """

    publisher = "timm"
    models: Mapping[str, Any]
    rows: Sequence[KeyRule] = ()
    head = ""
    drops: Sequence[str] = ()
    foreign: tuple[str, ...] = ()
    zeros: Sequence[str] = ()
    body = ("", "")
    names_in_5: Sequence[tuple[str, str]] = ()
    inputs = Preprocessing(224, 256, **IMAGENET)
    # The packages choose their own settings of training.
    strict_settings = False

    def build_reference(self, spec: Spec) -> nn.Module:
        return timm_model(spec)

    @abstractmethod
    def make_candidate(self, spec: Spec) -> keras.Model:
        """Build the Keras model."""

    def rows_of(self, spec: Spec) -> Sequence[KeyRule]:
        """The rows of one variant under the names of transformers 4; by default, `rows` with `body` before them."""
        if not spec.num_classes or not any(self.body):
            return self.rows
        source, target = self.body
        return [
            row if row.source == self.head else replace(row, source=source + row.source, target=target + row.target)
            for row in self.rows
        ]

    @cached_property
    def other_names(self) -> Mapping[str, Sequence[tuple[str, str]]]:
        """What another version of the package names differently: by layout, parts of this version's names and its own.

        Nothing is imported for it: the names of layouts are listed where the package is not installed, too.
        """
        if not self.names_in_5:
            return {}
        if _major_version(self.publisher) < 5:
            return {"transformers 5": self.names_in_5}
        return {"transformers 4": [(new, old) for old, new in reversed(self.names_in_5)]}

    def coverage(self, names: Collection[str]) -> float:
        specs = [self.spec(self.variants[0]), *([self.spec(self.variants[0], 0)] if self.head else ())]
        forms = [(), self.names_in_5] if self.names_in_5 else [()]
        rows = [
            [replace(row, source=renamed(row.source, form)) for row in self.rows_of(spec)]
            for spec in specs
            for form in forms
        ]
        return max(coverage(each, names) for each in rows)

    def load_published(self, variant: str) -> nn.Module:
        """Load the PyTorch model with its published weights, using the publisher's loader, which may download them."""
        if self.publisher == "timm":
            return library("timm").create_model(variant, pretrained=True)  # type: ignore[no-any-return]
        if self.publisher == "torchvision":
            return library("torchvision.models").get_model(variant, weights="DEFAULT")  # type: ignore[no-any-return]
        # The class built here derives from the package's own, so its from_pretrained works.
        model = type(self.build_reference(self.spec(variant)))
        return model.from_pretrained(variant)  # type: ignore[attr-defined,no-any-return]

    def prepare_reference(self, spec: Spec) -> Callable[[Image.Image], Array]:
        """The preprocessing that the publisher's package defines for the variant's weights, else that of `inputs`."""
        if self.publisher == "timm":
            data, models = library("timm.data"), library("timm.models")
            config = models.get_pretrained_cfg(spec.variant)
            if config is None:
                return super().prepare_reference(spec)
            transform = data.create_transform(**data.resolve_data_config(pretrained_cfg=config.to_dict()))
        elif self.publisher == "torchvision":
            transform = library("torchvision.models").get_model_weights(spec.variant).DEFAULT.transforms()
        else:
            return super().prepare_reference(spec)
        return lambda image: np.ascontiguousarray(np.moveaxis(transform(image).numpy(), 0, -1), np.float32)

    @cached_property
    def namings(self) -> tuple[Naming, ...]:  # type: ignore[override]
        own = Naming(self.publisher, tuple(self.rows), head=self.head, foreign=self.foreign, has_head=bool(self.head))
        return (own, *(replace(own, name=name) for name in self.other_names))

    @cached_property
    def table(self) -> tuple[Source, ...]:
        classes = USUAL_CLASSES if self.head else 0
        return tuple(Source(self.name, variant, self.publisher, variant, classes=classes) for variant in self.models)

    def published(self, variant: str, progress: Progress = SILENT) -> Checkpoint:
        """Load the published weights; raises SourceError if the publisher's package cannot load them."""
        from porting.models.frameworks import without_logs

        progress(f"loading {variant} by {self.publisher}")
        try:
            # The packages draw their own progress bars, and tell of every attempt to reach a hub.
            with progress.paused(), without_logs():
                model = self.load_published(variant)
        except (FamilyError, SourceError):
            raise
        except Exception as error:  # the package and its HTTP client may raise anything
            raise SourceError(
                f"{self.publisher} cannot load the published weights of {variant}: {reason_of(error)}",
                hint="Download them on a machine with access and give them with --checkpoint FILE.",
            ) from None
        tensors = {name: tensor.detach().cpu().numpy() for name, tensor in model.state_dict().items()}
        digest = hashlib.sha256()
        for name in sorted(tensors):
            digest.update(name.encode() + np.ascontiguousarray(tensors[name]).tobytes())
        return Checkpoint(Path(variant), digest.hexdigest(), f"{self.publisher}'s own loading", tensors)

    def build_empty_reference(self, spec: Spec) -> nn.Module:
        from porting.models.frameworks import without_filling

        with without_filling(), transformers_without_filling(self.publisher):
            reference = self.build_reference(spec)
        for module in reference.modules():
            tie = getattr(module, "tie_weights", None)
            if callable(tie):  # it belongs to the initialisation that was left out
                tie()
        return reference

    def build_candidate(self, spec: Spec) -> keras.Model:
        # Reuse the model that the rows were matched against: nothing has changed its weights.
        spare: dict[tuple[str, int], Any] = self.cache.setdefault("_spare", {})
        return spare.pop(_key(spec), None) or self.make_candidate(spec)

    def reference_names(self, spec: Spec) -> Collection[str]:
        return self.tensor_shapes(spec).keys()

    def key_map(self, spec: Spec) -> KeyMap:
        own = self._bound(spec)[0]
        names = self.other_names.get(spec.naming.name)
        if names is None:
            return own
        entries = [replace(each, sources=tuple(renamed(name, names) for name in each.sources)) for each in own.entries]
        layers = [replace(pair, source=renamed(pair.source, names)) for pair in own.layers]
        return KeyMap.of(layers, entries, {renamed(name, names) for name in own.drops}, own.foreign)

    def weight_shapes(self, spec: Spec) -> dict[str, dict[str, Shape]]:
        return self._bound(spec)[1]

    def tensor_shapes(self, spec: Spec) -> dict[str, Shape]:
        shapes: dict[tuple[str, int], dict[str, Shape]] = self.cache.setdefault("_shapes", {})
        if _key(spec) not in shapes:
            state = self._reference_without_memory(spec).state_dict()
            shapes[_key(spec)] = {name: tuple(tensor.shape) for name, tensor in state.items()}
        names = self.other_names.get(spec.naming.name, ())
        return {renamed(name, names): shape for name, shape in shapes[_key(spec)].items()}

    def synthetic_reference(self, spec: Spec) -> nn.Module:
        """Build the PyTorch model with synthetic weights that reveal mistakes, for checks without trained weights."""
        import torch

        from porting.models.inputs import make_inputs
        from porting.models.synthetic import fill_with_synthetic_weights

        reference, given = self.build_reference(spec), self.check_inputs(spec)
        if given is None:
            images = torch.randn(2, 3, *[self.preprocessing(spec).input_size] * 2)
            fill_with_synthetic_weights(reference, 0, run=lambda model: model(images))
        else:
            inputs = make_inputs(reference, self.make_candidate(spec), given)
            run = partial(inputs.call_reference, dtype=torch.float32)
            fill_with_synthetic_weights(reference, 0, run=run)
        for name in self.zeros:
            reference.get_parameter(name).data.zero_()
        return reference

    def unused_tensors(self, spec: Spec) -> dict[str, Array]:
        dropped = self.key_map(spec).drops
        names = self.other_names.get(spec.naming.name, ())
        state = {renamed(name, names): tensor for name, tensor in self.build_reference(spec).state_dict().items()}
        return {name: tensor.numpy() for name, tensor in state.items() if name in dropped}

    def classes_in(self, variant: str, shapes: Iterable[Shape]) -> int | None:
        """Deduce the number of classes from the shapes that the file has beside those of the body."""
        if not self.head:
            return 0
        key_map, layers = self._bound(self.spec(variant))
        own = by_path(layers)
        head = {t for e in key_map.entries for t in e.targets if e.sources[:1] in _tensors_of(self.head)}
        kernel = max((own[name] for name in head), key=len)
        left = Counter(shapes)
        left.subtract(shape for name, shape in own.items() if name not in head)
        found = {
            shape[-1] for shape, count in left.items() if count > 0 and shape[:-1] == kernel[:-1] and len(shape) > 1
        }
        if not found:
            return 0
        return found.pop() if len(found) == 1 else None

    def guess_variant(self, state_dict: Mapping[str, Array]) -> str | None:
        """Compare only names and shapes of PyTorch's tensors: building every variant in Keras would take minutes."""
        for variant in self.models:
            spec = Spec(variant, self.num_classes(variant, state_dict), self.namings[0])
            expected = self.tensor_shapes(spec)
            if all(name in state_dict and state_dict[name].shape == shape for name, shape in expected.items()):
                return variant
        return None

    def _key_map_under(self, variant: str, naming: Naming) -> KeyMap:
        """A key map for recognising a checkpoint, which needs only PyTorch's names and no Keras model."""
        spec = self.spec(variant, None if naming.head or not self.head else 0, naming)
        return KeyMap.of((), [TensorEntry((name,), (), Constant(0.0)) for name in self.reference_names(spec)])

    def _bound(self, spec: Spec) -> tuple[KeyMap, dict[str, dict[str, Shape]]]:
        """The key map of the rows in both live models, and the shapes of the Keras model."""
        from porting.models.frameworks import start_tensorflow

        bound: dict[tuple[str, int], tuple[KeyMap, dict[str, dict[str, Shape]]]] = self.cache.setdefault("_maps", {})
        if _key(spec) not in bound:
            start_tensorflow()
            reference, candidate = self._reference_without_memory(spec), self.make_candidate(spec)
            rows = [row for row in self.rows_of(spec) if spec.num_classes or not self.head or row.source != self.head]
            if _major_version(self.publisher) >= 5:
                rows = [replace(row, source=renamed(row.source, self.names_in_5)) for row in rows]
            key_map = key_map_of_rows(reference, candidate, rows)
            entries = [*key_map.entries, *(TensorEntry((name,), (), Constant(0.0)) for name in self.zeros)]
            used = {name for entry in entries for name in entry.sources}
            drops = {
                name
                for name, tensor in reference.state_dict().items()
                if name not in used
                and (not tensor.is_floating_point() or any(fnmatch.fnmatch(name, each) for each in self.drops))
            }
            key_map = KeyMap.of(key_map.layers, entries, key_map.drops | drops, self.foreign)
            bound[_key(spec)] = key_map, weight_shapes(candidate)
            self.cache["_spare"] = {_key(spec): candidate}
        return bound[_key(spec)]

    def _reference_without_memory(self, spec: Spec) -> nn.Module:
        """Build the reference on the meta device, or normally if its constructor needs real numbers."""
        from porting.models.frameworks import without_memory

        try:
            with without_memory():
                return self.build_reference(spec)
        except (NotImplementedError, RuntimeError):
            return self.build_reference(spec)


def _major_version(package: str) -> int:
    try:
        return int(version(package).partition(".")[0])
    except PackageNotFoundError:
        return 0


def renamed(name: str, parts: Iterable[tuple[str, str]]) -> str:
    """A name with each part replaced by what stands there in another version's names."""
    for own, other in parts:
        name = name.replace(own, other)
    return name


def _tensors_of(module: str) -> set[tuple[str]]:
    return {(f"{module}.weight",), (f"{module}.bias",)}


def _key(spec: Spec) -> tuple[str, int]:
    return spec.variant, spec.num_classes
