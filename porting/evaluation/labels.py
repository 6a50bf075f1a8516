"""Map the class names of a data set to the class numbers of the model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from porting.errors import OptionError, SourceError
from porting.wording import counted

# The name that stands for ImageNet's labels in the place of a file, and their number.
IMAGENET, IMAGENET_CLASSES = "imagenet", 1000
_SYNSET = re.compile(r"n\d{8}")
_HINT = "List the model's classes in order, one per line, in a file, and give it with --labels FILE."


@dataclass(frozen=True)
class Labels:
    """The model's classes in order. `names` holds all names of each class, and is empty if they are unknown.

    With `ignored`, labels are not read.
    """

    classes: int
    names: tuple[tuple[str, ...], ...] = ()
    ignored: bool = False

    def number(self, stated: int | str | None) -> int | None:
        """The number of a class, which may be outside the head; raises SourceError for an unknown name."""
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
        if re.fullmatch(r"-?\d{1,9}(\.0)?", text):  # pandas writes 3.0 if other values are missing
            return int(float(text))
        raise SourceError(f"the label {text!r} is not one of the model's {self.classes} classes", hint=_HINT)

    def of_folders(self, folders: Sequence[str]) -> dict[str, int]:
        """The class number of each folder: by name, by number, or for all folders in sorted order.

        Raises SourceError if none of these applies.
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
            hint = f"timm knows ImageNet's synsets. Install it: pip install 'van-port[timm]'. {_HINT}"
        raise SourceError(
            f"the folder {unknown!r} is not one of the model's {self.classes} classes, and there are {len(folders)} "
            "class folders",
            hint=hint,
        )

    def name(self, number: int) -> str:
        """The name of a class, for people."""
        return self.names[number][-1] if 0 <= number < len(self.names) else str(number)

    @cached_property
    def _by_name(self) -> dict[str, int]:
        """Every unambiguous name. The full name of a class takes precedence over the shortened name of another."""
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


def read_labels(path: Path, classes: int | None = None) -> Labels:
    """Read labels from a text file with one class per line. A synset before the name is an additional name.

    Raises SourceError if there is no such file, and OptionError if it is no list of as many `classes`, if given.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except FileNotFoundError:
        raise SourceError(f"{path}: no such file", hint=_HINT) from None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OptionError(f"{path}: not a list of classes: {reason}", hint=_HINT) from None
    if classes is not None and len(lines) != classes:
        raise OptionError(
            f"{path}: lists {counted(len(lines), 'class', 'classes')}, but the model has {classes}", hint=_HINT
        )
    names = []
    for line in lines:
        first, _, rest = line.partition(" ")
        names.append((first, rest.strip()) if _SYNSET.fullmatch(first) and rest.strip() else (line,))
    return Labels(len(names), tuple(names))


def usual_labels(classes: int, names: Sequence[str]) -> Labels:
    """The family's labels, else ImageNet's if there are 1000 classes and timm is installed, else only numbers."""
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
