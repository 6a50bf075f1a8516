"""From what a data set calls a class to the number that the model has for it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from porting.errors import SourceError

IMAGENET_CLASSES = 1000
_SYNSET = re.compile(r"n\d{8}")
_HINT = "Give the model's classes in its order, one a line, with --labels FILE."


@dataclass(frozen=True)
class Labels:
    """The model's classes in its order; `names` has for each the names it goes by, none where they are not known.

    With `ignored`, no label is looked at.
    """

    classes: int
    names: tuple[tuple[str, ...], ...] = ()
    ignored: bool = False

    def number(self, stated: int | str | None) -> int | None:
        """The class's number, which may lie outside the head; raises SourceError for a name that is not known."""
        if self.ignored:
            return None
        if isinstance(stated, float) and stated.is_integer():
            stated = int(stated)
        if stated is None or (isinstance(stated, int) and not isinstance(stated, bool)):
            return stated
        text = str(stated).strip()
        if not text:
            return None
        found = self._by_name.get(_plain(text))
        if found is not None:
            return found
        if re.fullmatch(r"-?\d{1,9}(\.0)?", text):  # pandas writes 3.0 where a value is missing elsewhere
            return int(float(text))
        raise SourceError(f"the label {text!r} is none of the model's {self.classes} classes", hint=_HINT)

    def of_folders(self, folders: Sequence[str]) -> dict[str, int]:
        """The number of the class that each folder is of: by name, by number, or all of them in sorted order.

        Raises SourceError where none of these fits.
        """
        if self.ignored:
            return {}
        known = self._by_name
        if all(_plain(folder) in known for folder in folders):
            return {folder: known[_plain(folder)] for folder in folders}
        if all(re.fullmatch(r"\d{1,9}", folder) for folder in folders):
            return {folder: int(folder) for folder in folders}
        if len(folders) == self.classes and not self.names:
            return {folder: number for number, folder in enumerate(sorted(folders))}
        unknown = next(folder for folder in folders if _plain(folder) not in known)
        hint = _HINT
        if _SYNSET.fullmatch(unknown) and self.classes == IMAGENET_CLASSES:
            hint = f"timm knows ImageNet's synsets: pip install 'van-port[timm]'. {_HINT}"
        raise SourceError(
            f"the folder {unknown!r} is none of the model's {self.classes} classes, and there are {len(folders)} "
            "class folders",
            hint=hint,
        )

    def name(self, number: int) -> str:
        """For people."""
        return self.names[number][-1] if 0 <= number < len(self.names) else str(number)

    @cached_property
    def _by_name(self) -> dict[str, int]:
        """Every name that one class alone goes by; a class's own name goes before a shortened one of another."""
        found: dict[str, int] = {}
        for place in range(max(map(len, self.names), default=0)):
            numbers: dict[str, set[int]] = {}
            for number, names in enumerate(self.names):
                if place < len(names):
                    numbers.setdefault(_plain(names[place]), set()).add(number)
            found = {name: min(own) for name, own in numbers.items() if len(own) == 1} | found
        return found


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name.strip().lower())


def read_labels(path: Path, classes: int) -> Labels:
    """From a text file with one class a line; a synset before the name counts as another name of it."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{path}: not a list of classes: {error}", hint=_HINT) from None
    if len(lines) != classes:
        raise SourceError(f"{path}: {len(lines)} classes, and the model has {classes}", hint=_HINT)
    names = []
    for line in lines:
        first, _, rest = line.partition(" ")
        names.append((first, rest.strip()) if _SYNSET.fullmatch(first) and rest.strip() else (line,))
    return Labels(classes, tuple(names))


def usual_labels(classes: int, names: Sequence[str]) -> Labels:
    """Those of a family, or ImageNet's where there are 1000 and timm is installed, or numbers alone."""
    if len(names) == classes:
        return Labels(classes, tuple((name,) for name in names))
    if classes == IMAGENET_CLASSES:
        try:
            from timm.data import ImageNetInfo
        except ImportError:
            return Labels(classes)
        info = ImageNetInfo()
        described = {name: info.label_name_to_description(name) for name in info.label_names()}
        # The first of several synonyms is enough for people.
        return Labels(classes, tuple((name, text, text.partition(",")[0]) for name, text in described.items()))
    return Labels(classes)
