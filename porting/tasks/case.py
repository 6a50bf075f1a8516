"""A case: both models of one port and their checkpoint, bound once at the start of every task."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

import numpy as np

from porting.errors import KeyMapError, OptionError, PortingError, WeightsFileError
from porting.families.base import Family, Spec, by_path
from porting.families.registry import families_with, family_names
from porting.files import weights_file
from porting.files.checkpoint import Checkpoint, checkpoint_files, read_checkpoint, verify_container
from porting.files.provenance import describe_source, versions
from porting.files.survey import Survey
from porting.kinds.transforms import Array, Shape
from porting.mapping.convert import convert, refuse_other_keys, to_float32
from porting.mapping.key_map import KeyMap
from porting.mapping.naming import Naming, naming_called
from porting.models.images import Preprocessing
from porting.parity.training import OptimizerPair
from porting.progress import SILENT, Progress
from porting.sources.download import require_sha256
from porting.sources.fetch import fetch
from porting.sources.table import GIVEN_BY_PATH, Source, parse_location
from porting.wording import listed

if TYPE_CHECKING:
    import keras
    from torch import nn


@dataclass(frozen=True)
class Case:
    """Both models of one port, how to build them, and where the weights come from.

    `checkpoint` is None if the task needs none. `source` is its row in the table of sources, or None for a file given
    by path. The rest of a task reads everything from its Case.
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
        """The key map from the checkpoint's names."""
        return self.family.key_map(self.spec)

    @cached_property
    def reference_map(self) -> KeyMap:
        """The key map from the reference's own names."""
        return self.family.key_map(self.family.spec(self.spec.variant, self.num_classes))

    @property
    def reference_pairs(self) -> dict[str, str]:
        """The Keras layer of each module of the reference. Parameters that a module holds itself are left out."""
        return self.reference_map.one_to_one

    @cached_property
    def layers(self) -> dict[str, dict[str, Shape]]:
        """Each variable's name and shape by top-level layer of the Keras model, in the order in which Keras reads."""
        return self.family.weight_shapes(self.spec)

    @property
    def shapes(self) -> dict[str, Shape]:
        """The shapes of the Keras model's variables, by name."""
        return by_path(self.layers)

    @property
    def state_dict(self) -> dict[str, Array]:
        assert self.checkpoint is not None  # a task that reads it has opened one
        return self.checkpoint.state_dict

    @property
    def how_to_build(self) -> str:
        return self.family.how_to_build(self.spec)

    @property
    def preprocessing(self) -> Preprocessing:
        return self.family.preprocessing(self.spec)

    def check_inputs(self, samples: int | None = None) -> Any:
        """The Keras model's inputs, one array or several by name, at most `samples`; None for an image model."""
        return self.family.inputs_of(self.spec, samples)

    def build_candidate(self) -> keras.Model:
        """Build the Keras model without the checkpoint's weights."""
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
        """Build the PyTorch model and load the checkpoint's weights with PyTorch itself, not from the conversion.

        Model and checkpoint share memory if the checkpoint is already in float32.
        """
        # Both maps have their entries in the same order. Some have no targets to tell them apart.
        return self.reference_with(
            {
                mine: self.state_dict[theirs]
                for own, entry in zip(self.reference_map.entries, self.key_map.entries, strict=True)
                for mine, theirs in zip(own.sources, entry.sources, strict=True)
            }
        )

    def reference_with(self, state_dict: Mapping[str, Array]) -> nn.Module:
        """Build the PyTorch model with a state_dict that uses the reference's own names."""
        import torch

        dropped = self.reference_map.drops
        reference = self.family.build_empty_reference(self.spec)
        if any(name in dropped for name, _ in reference.named_parameters(remove_duplicate=False)):
            reference = self.family.build_reference(self.spec)  # these keep the numbers of their initialisation
        own = reference.state_dict()
        # The class also has counters and constants of its own, which the key map drops.
        state_dict = {**{name: own[name].numpy() for name in own.keys() & dropped}, **state_dict}
        arrays = {
            name: array if np.issubdtype(array.dtype, np.integer) else to_float32(array)
            for name, array in state_dict.items()
        }
        tensors = {name: torch.from_numpy(np.require(array, requirements=["C", "W"])) for name, array in arrays.items()}
        reference.load_state_dict(tensors, strict=True, assign=True)
        return reference.eval()

    def convert_reference(self, reference: nn.Module) -> dict[str, Array]:
        """Convert a reference with weights other than the checkpoint's to Keras weights, by name."""
        tensors = {name: tensor.numpy() for name, tensor in reference.state_dict().items()}
        return dict(convert(tensors, self.reference_map, self.shapes, allow_non_finite=True).weights)

    def load_candidate(self, weights: Path) -> keras.Model:
        """Build the Keras model and load a weights file; raises WeightsFileError if they do not fit."""
        return weights_file.load_model(weights, self.build_candidate, self.how_to_build)

    @property
    def where(self) -> str:
        """The checkpoint's path, or the variant whose weights its publisher loaded, for messages."""
        return "the checkpoint" if self.checkpoint is None else str(self.checkpoint.path)

    def refuse_other_tensors(self) -> None:
        """Raise KeyMapError, with the hint `variant_hint`, unless the checkpoint has the tensors of the model."""
        self.family.refuse_unfit_rows(self.spec, self.state_dict)
        refuse_other_keys(self.state_dict, self.key_map, self.shapes, where=self.where, hint=self.variant_hint)
        # The two models may be built with other arguments, such as two numbers of classes.
        known = self.family.tensor_shapes(self.spec)
        rows = [
            f"  {name}: expected {known[name]}, found {array.shape}"
            for name, array in self.state_dict.items()
            if name in known and name not in self.key_map.drops and known[name] != array.shape
        ]
        if rows:
            said = f"{self.where}: its tensors do not have the shapes of the PyTorch model"
            raise KeyMapError(f"{said}\n{listed(rows, separator=chr(10))}", hint=self.variant_hint())

    def variant_hint(self) -> str:
        """The hint for a checkpoint whose tensors do not match the model."""
        guess = self.family.guess_variant(self.state_dict)
        if guess is not None and guess != self.spec.variant:
            return f"These tensors belong to {self.family.name} {guess}: use --variant {guess}."
        shorter = {name.partition(".")[2]: tensor for name, tensor in self.state_dict.items()}  # below a first module
        for tensors in (self.state_dict, shorter):
            for other in families_with(tensors):
                with suppress(PortingError):  # its package may be missing
                    guess = other.guess_variant(tensors)
                    if guess is not None and (other, guess) != (self.family, self.spec.variant):
                        belongs = f"{other.name} {guess}"
                        return f"These tensors belong to {belongs}: use --family {other.name} --variant {guess}."
        return f"{self.family.expected(self.spec)} `van-port inspect` shows what the file holds."

    def describe(self) -> dict[str, Any]:
        """The facts of the case for provenance and reports."""
        facts: dict[str, Any] = {
            "num_classes": self.num_classes,
            **self.family.facts(self.spec),
            "layout": self.naming.name,
            "settings": self.spec.settings,
            "absorbed_epsilon": list(self.key_map.absorbed),
            "assumed": sorted(self.spec.settings.keys() - self.spec.stated.keys()),
            "build": self.how_to_build,
            "versions": versions(),
        }
        if self.checkpoint is not None:
            facts["source"] = describe_source(self.source, self.checkpoint)
        return {name: fact for name, fact in facts.items() if fact is not None}


class Reading(TypedDict, total=False):
    """How to read a checkpoint.

    `layout` is the name of its publisher's naming; by default, the tensor names decide. `ema`, `key` and `prefix`
    choose which weights of the file to use, as `read_checkpoint` explains. `sha256` must match the file's hash.
    """

    layout: str | None
    ema: bool
    sha256: str | None
    key: str | None
    prefix: str | None


def open_case(
    family: Family,
    variant: str,
    location: str | Path | None,
    progress: Progress = SILENT,
    **reading: Unpack[Reading],
) -> Case:
    """Open the checkpoint at `location`, or the variant's official one, and recognise its publisher and settings.

    Raises SourceError, CheckpointError, or KeyMapError if the naming is unknown or ambiguous, or if the checkpoint
    states settings that the family cannot build.
    """
    sha256 = reading.get("sha256")
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
        chosen = {"key": reading.get("key"), "prefix": reading.get("prefix")}
        fit = partial(family.fit, variant)
        loaded = read_checkpoint(path, ema=reading.get("ema", False), **chosen, fit=fit)
        if source is None:
            require_sha256(str(path), loaded.sha256, sha256)
    spec = family.recognise(variant, loaded.state_dict, forced=reading.get("layout"), facts=loaded.facts)
    return Case(family, spec, loaded, source)


def files_of(location: str | Path | None) -> tuple[Path, ...]:
    """The files that a checkpoint given by path is read from; empty for an address."""
    if location is None or (isinstance(location, str) and "://" in location):
        return ()
    return checkpoint_files(Path(location))


def case_of_file(
    family: Family, variant: str, survey: Survey, *, layout: str | None = None, num_classes: int | None = None
) -> Case:
    """The case of a file of Keras weights, without a checkpoint.

    The naming is `layout` if given, else that of the file's provenance, else the family's first. The number of classes
    is `num_classes` if given, else that of the shapes in the file, else that of its provenance, else the variant's
    default. The settings come from the provenance if the naming is the provenance's. Raises KeyMapError for an unknown
    naming.
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
    """Raise WeightsFileError if the provenance of a weights file names another family, or another variant."""
    facts = survey.provenance or {}
    stated = facts.get("variant")
    other = facts.get("family")
    if isinstance(other, str) and other in family_names() and other != family.described:
        raise WeightsFileError(
            f"{weights}: holds weights of {other} {stated}, not of {family.described}",
            hint=f"Use --family {other} --variant {stated}.",
        )
    if facts.get("family") == family.described and isinstance(stated, str) and stated != variant:
        raise WeightsFileError(
            f"{weights}: holds weights of {family.described} {stated}, but --variant says {variant}",
            hint=f"Use --variant {stated}, or omit --variant."
            if stated in family.variants
            else "Give the file's own variant.",
        )


def refuse_without_checkpoint(family: Family, variant: str, survey: Survey, weights: Path) -> None:
    """Raise OptionError if a weights file was ported from another checkpoint than the one that is used by default."""
    facts = survey.provenance or {}
    source = facts.get("source")
    if source is None and "checkpoint_sha256" in facts:  # of an exported file
        source = {"license": facts.get("license"), "sha256": facts["checkpoint_sha256"], "name": "another checkpoint"}
    if not isinstance(source, dict) or source.get("license") != GIVEN_BY_PATH:
        return
    published = [row.sha256 for row in family.table if row.variant == variant and row.sha256]  # maybe the beginning
    if not any(str(source.get("sha256")).startswith(each) for each in published):
        raise OptionError(
            f"{weights}: was ported from {source.get('name')}"
            + (f", not from the published checkpoint of {variant}" if family.has_published else ""),
            hint=f"Give that file with --checkpoint; its sha256 is {source.get('sha256')}.",
        )


def without_head(case: Case) -> Case:
    """The case of the same model without its head, as the publisher would save it."""
    return replace(case, spec=case.spec.without_head())
