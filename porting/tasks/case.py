"""A case: a model of a family and the checkpoint that it is of, bound once at the entrance of every task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from porting.errors import WeightsFileError
from porting.families.base import Family, Spec, by_path
from porting.files import weights_file
from porting.files.checkpoint import Checkpoint, checkpoint_files, read_checkpoint, verify_container
from porting.files.provenance import describe_source, versions
from porting.files.survey import Survey
from porting.kinds.transforms import Array, Shape
from porting.mapping.convert import convert, to_float32
from porting.mapping.key_map import KeyMap
from porting.mapping.naming import Naming, naming_called
from porting.models.images import Preprocessing
from porting.parity.training import OptimizerPair
from porting.progress import SILENT, Progress
from porting.sources.download import require_sha256
from porting.sources.fetch import fetch
from porting.sources.table import Source, parse_location

if TYPE_CHECKING:
    import keras
    from torch import nn


@dataclass(frozen=True)
class Case:
    """Both models of one port, how to make them, and where the weights come from.

    `checkpoint` is None where a task needs none; `source` is its row in the table of sources, None for a file that was
    given by path. What follows takes a Case and asks it alone.
    """

    family: Family
    spec: Spec
    checkpoint: Checkpoint | None = None
    source: Source | None = None

    @property
    def naming(self) -> Naming:
        return self.spec.naming

    @property
    def num_classes(self) -> int:
        return self.spec.num_classes

    @cached_property
    def key_map(self) -> KeyMap:
        """From the checkpoint's names."""
        return self.family.key_map(self.spec)

    @cached_property
    def reference_map(self) -> KeyMap:
        """From the reference's own names."""
        return self.family.key_map(self.family.spec(self.spec.variant, self.num_classes))

    @property
    def reference_pairs(self) -> dict[str, str]:
        """The Keras layer of every module of the reference; a parameter that a module holds by itself is none."""
        return self.reference_map.one_to_one

    @cached_property
    def layers(self) -> dict[str, dict[str, Shape]]:
        """By top-level layer of the Keras model, each variable's name and shape, in the order in which Keras reads."""
        return self.family.weight_shapes(self.spec)

    @property
    def shapes(self) -> dict[str, Shape]:
        """Of the Keras model's variables, by name."""
        return by_path(self.layers)

    @property
    def state_dict(self) -> dict[str, Array]:
        assert self.checkpoint is not None  # a task that asks for it has opened one
        return self.checkpoint.state_dict

    @property
    def how_to_build(self) -> str:
        return self.family.how_to_build(self.spec)

    @property
    def preprocessing(self) -> Preprocessing:
        return self.family.preprocessing(self.spec)

    def check_inputs(self) -> Any:
        """The Keras model's inputs, an array or several by name; None for a model of images."""
        return self.family.check_inputs(self.spec)

    def build_candidate(self) -> keras.Model:
        """The Keras model, fresh."""
        return self.family.build_candidate(self.spec)

    def build_with_dropout(self) -> tuple[nn.Module, keras.Model] | None:
        return self.family.build_with_dropout(self.spec)

    def optimizers(self) -> tuple[OptimizerPair, ...]:
        return self.family.optimizers()

    def shrinkable(self, parameter: str) -> bool:
        return self.family.shrinkable(parameter)

    def unused_tensors(self) -> dict[str, Array]:
        return self.family.unused_tensors(self.spec)

    def fuse(self, candidate: keras.Model, form: str) -> keras.Model:
        return self.family.fuse(candidate, form)

    def load_reference(self) -> nn.Module:
        """The PyTorch model with the checkpoint's weights, loaded by PyTorch itself and not from the conversion.

        The two share memory where the checkpoint is in float32 already.
        """
        own = {entry.targets: entry.sources for entry in self.reference_map.entries}
        return self.reference_with(
            {
                mine: self.state_dict[theirs]
                for entry in self.key_map.entries
                for mine, theirs in zip(own[entry.targets], entry.sources, strict=True)
            }
        )

    def reference_with(self, state_dict: Mapping[str, Array]) -> nn.Module:
        """The PyTorch model with the tensors of a state_dict under the reference's own names."""
        import torch

        reference = self.family.build_reference(self.spec)
        own = reference.state_dict()
        # What the key map leaves out and the class has: its own counters and constants.
        state_dict = {**{name: own[name].numpy() for name in own.keys() & self.reference_map.drops}, **state_dict}
        arrays = {
            name: array if np.issubdtype(array.dtype, np.integer) else to_float32(array)
            for name, array in state_dict.items()
        }
        tensors = {name: torch.from_numpy(np.require(array, requirements=["C", "W"])) for name, array in arrays.items()}
        reference.load_state_dict(tensors, strict=True, assign=True)
        return reference.eval()

    def convert_reference(self, reference: nn.Module) -> dict[str, Array]:
        """Keras's weights, by name, for a reference with other weights than the checkpoint's."""
        tensors = {name: tensor.numpy() for name, tensor in reference.state_dict().items()}
        return convert(tensors, self.reference_map, self.shapes, allow_non_finite=True).weights

    def load_candidate(self, weights: Path) -> keras.Model:
        """The Keras model with the weights of a file; raises WeightsFileError where they do not fit what is built."""
        return weights_file.load_model(weights, self.build_candidate, self.how_to_build)

    def variant_hint(self) -> str:
        """What to do where the checkpoint's tensors are not those of the model."""
        variant = self.spec.variant
        guess = self.family.guess_variant(self.state_dict)
        if guess is not None and guess != variant:
            return f"These tensors are those of {self.family.name} {guess}: use --variant {guess}."
        layouts = ", ".join(naming.name for naming in self.family.namings)
        return (
            f"Expected the weights of {self.family.name} {variant}, taken to have {self.naming.name} names; --layout "
            f"takes others ({layouts}), and `van-port inspect` shows what the file holds."
        )

    def describe(self) -> dict[str, Any]:
        """For provenance and reports."""
        facts: dict[str, Any] = {
            "family": self.family.described,
            "variant": self.spec.variant,
            "num_classes": self.num_classes,
            "layout": self.naming.name,
            "settings": self.spec.settings,
            "absorbed_epsilon": list(self.key_map.absorbed),
            "assumed": sorted(self.spec.settings.keys() - self.spec.stated.keys()),
            "build": self.how_to_build,
            "versions": versions(),
        }
        if self.checkpoint is not None:
            facts["source"] = describe_source(self.source, self.checkpoint)
        return facts


def open_case(
    family: Family,
    variant: str,
    location: str | Path | None,
    *,
    layout: str | None = None,
    ema: bool = False,
    sha256: str | None = None,
    key: str | None = None,
    prefix: str | None = None,
    progress: Progress = SILENT,
) -> Case:
    """The checkpoint at `location`, or the variant's official one, and what it is taken for.

    `layout` is the name of a naming, by default the one that the tensors' names show; `ema`, `key` and `prefix` say
    which weights of the file to take, as `read_checkpoint` explains. Raises SourceError, CheckpointError, or
    KeyMapError for an unknown naming, one that cannot be told, or a statement that the family cannot build.
    """
    found = family.source_of(variant) if location is None else parse_location(family.name, variant, location)
    source = found if isinstance(found, Source) else None
    loaded = family.published(variant, progress) if location is None else None
    if loaded is None:
        path = (
            fetch(found, verify=verify_container, sha256=sha256, progress=progress)
            if isinstance(found, Source)
            else found
        )
        progress("reading the checkpoint")
        loaded = read_checkpoint(path, ema=ema, key=key, prefix=prefix, fit=partial(family.fit, variant))
        if source is None:
            require_sha256(str(path), loaded.sha256, sha256)
    spec = family.recognise(variant, loaded.state_dict, forced=layout, facts=loaded.facts)
    return Case(family, spec, loaded, source)


def files_of(location: str | Path | None) -> tuple[Path, ...]:
    """The files that a checkpoint given by path is read from; none for an address."""
    if location is None or (isinstance(location, str) and "://" in location):
        return ()
    return checkpoint_files(Path(location))


def case_of_file(
    family: Family, variant: str, survey: Survey, *, layout: str | None = None, num_classes: int | None = None
) -> Case:
    """What a file of Keras weights is of, without a checkpoint.

    The naming is the one called `layout`, else that of the file's provenance, else the family's first; the classes are
    `num_classes`, else as the shapes in the file show them, else those of its provenance, else the variant's usual
    ones. The settings are those of its provenance where the naming is. Raises KeyMapError for an unknown naming.
    """
    provenance = survey.provenance or {}
    own = str(provenance.get("layout", family.namings[0].name))
    naming = naming_called(family.namings, own if layout is None else layout)
    if num_classes is None:
        num_classes = family.classes_in(variant, [shape for _, shape, _ in survey.tensors])
    if num_classes is None:
        stated = provenance.get("num_classes")
        num_classes = stated if isinstance(stated, int) and stated >= 0 else family.usual_classes(variant)
    settings = provenance.get("settings")
    stated = {
        name: float(value)
        for name, value in (settings if isinstance(settings, dict) and naming.name == own else {}).items()
        if name in naming.settings and isinstance(value, (int, float)) and not isinstance(value, bool)
    }
    return Case(family, family.spec(variant, num_classes, naming, stated))


def refuse_another(family: Family, variant: str, survey: Survey, weights: Path) -> None:
    """Raises WeightsFileError where a file of Keras weights says that it is of another variant of the family."""
    facts = survey.provenance or {}
    stated = facts.get("variant")
    if facts.get("family") == family.described and isinstance(stated, str) and stated != variant:
        raise WeightsFileError(
            f"{weights}: the weights of {family.described} {stated}, and --variant says {variant}",
            hint=f"Use --variant {stated}, or leave it out." if stated in family.variants else "Give its own variant.",
        )


def without_head(case: Case) -> Case:
    """The body of the same model saved alone, as its publisher would."""
    return replace(case, spec=case.spec.without_head())
