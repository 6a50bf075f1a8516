"""Read data sets in every form that `--data` accepts, as samples in a fixed order.

Readers do not read ahead and never run code of a data set. Files may be at any address that fsspec supports.
"""

from __future__ import annotations

import csv
import json
import posixpath
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from porting.errors import PortingError, SourceError
from porting.evaluation.items import Item
from porting.evaluation.labels import Labels
from porting.models.images import IMAGE_SUFFIXES
from porting.wording import reason_of

_SUFFIXES = (*IMAGE_SUFFIXES, ".jpe", ".gif", ".tif", ".tiff")
# Possible names of a table's columns, the most likely first.
_IMAGE_COLUMNS = ("image", "path", "file", "filename", "file_name", "image_path", "img", "jpg", "png")
_LABEL_COLUMNS = ("label", "class", "target", "cls", "labels", "category", "synset", "fine_label")
_TEXT_COLUMNS = ("text", "sentence", "content")
_TOKEN_COLUMNS = ("token_ids", "input_ids", "tokens", "ids")
# The files that may hold a sample's label in a shard, the most reliable first.
_LABEL_FILES = ("cls", "label", "json", "txt")
_LONGEST_LINE = 64 << 20
Tokenizer = Callable[[str], "list[int]"]


@dataclass(frozen=True)
class Dataset:
    """A data set. `items` iterates over its samples from the start; `total` is their number if it is cheap to get."""

    described: str
    items: Callable[[], Iterator[Item]]
    total: int | None = None
    notes: tuple[str, ...] = ()


def is_local(spec: str) -> bool:
    """Whether `spec` names files or folders of this machine."""
    return "://" not in spec and spec.partition(":")[0] not in {"tfds", "hf"}


def open_data(spec: str, labels: Labels, *, tokenizer: Tokenizer | None = None) -> Dataset:
    """Open the data set that `spec` names. Any error becomes a SourceError.

    `spec` is one of: a folder of class folders, or of images without labels; a `.csv` or `.jsonl` file of paths and
    labels, or of texts; a `.parquet` file; `.tar` shards of WebDataset, with `{000..009}` or `*`;
    `tfds:NAME[/CONFIG][:SPLIT]`; `hf:NAME[:SPLIT]`; or a folder that datasets saved. A local path is made absolute, so
    that it stays valid in other working folders.
    """
    local = is_local(spec)
    try:
        found = _open_data(str(Path(spec).absolute()) if local else spec, labels, tokenizer=tokenizer)
    except PortingError:
        raise
    except Exception as error:  # storage clients and packages that read data sets may raise anything
        raise SourceError(f"{spec}: {reason_of(error)}") from None

    def items() -> Iterator[Item]:
        try:
            yield from found.items()
        except PortingError:
            raise
        except Exception as error:
            raise SourceError(f"{spec}: cannot be read: {reason_of(error)}") from None

    return replace(found, items=items, described=spec if local else found.described)


def _open_data(spec: str, labels: Labels, *, tokenizer: Tokenizer | None = None) -> Dataset:
    """Open the data set that `spec` names, as `open_data` explains, without handling all errors."""
    scheme, _, rest = spec.partition(":")
    if scheme == "tfds" and rest:
        return _tfds(rest, labels)
    if scheme == "hf" and rest and not rest.startswith("//"):
        return _hugging_face(rest, labels)
    suffix = posixpath.splitext(spec)[1].lower()
    if suffix == ".tar":
        return _shards(spec, labels)
    if suffix == ".parquet":
        return _parquet(spec, labels)
    file_system, path = _file_system(spec)
    if suffix in {".csv", ".tsv", ".jsonl", ".ndjson"}:
        return _table(spec, suffix, labels, tokenizer)
    try:
        is_folder = file_system.isdir(path)
    except Exception as error:  # the storage client may raise anything
        raise SourceError(f"{spec}: {reason_of(error)}") from None
    if not is_folder:
        raise SourceError(
            f"{spec}: no such folder, and not a known form of data set",
            hint="--data takes a folder, .csv, .jsonl, .parquet, .tar shards, tfds:NAME or hf:NAME.",
        )
    if file_system.exists(posixpath.join(path, "dataset_info.json")) or file_system.exists(
        posixpath.join(path, "dataset_dict.json")
    ):
        return _hugging_face(spec, labels)
    return _folder(spec, file_system, path, labels)


def _file_system(spec: str) -> tuple[Any, str]:
    import fsspec

    try:
        file_system, path = fsspec.core.url_to_fs(spec)
    except (ImportError, ValueError) as error:
        raise SourceError(
            f"{spec}: {reason_of(error)}", hint="fsspec needs a package for this kind of storage, such as s3fs."
        ) from None
    return file_system, path


def _address(spec: str, file_system: Any, path: str) -> str:
    """Convert a path in a file system to an address that any process can open."""
    return str(file_system.unstrip_protocol(path)) if "://" in spec else path


def _folder(spec: str, file_system: Any, path: str, labels: Labels) -> Dataset:
    entries = sorted(file_system.ls(path, detail=True), key=lambda entry: str(entry["name"]))
    names = {entry["name"]: posixpath.basename(str(entry["name"]).rstrip("/")) for entry in entries}
    # For fsspec, a link is neither a file nor a folder.
    kinds = {
        e["name"]: "directory" if e["type"] != "file" and file_system.isdir(e["name"]) else "file" for e in entries
    }
    folders = [name for name, kind in kinds.items() if kind == "directory" and not names[name].startswith(".")]
    numbers = labels.of_folders([names[each] for each in folders]) if folders else {}

    def files_in(folder: str) -> list[str]:
        own = [name for name, kind in kinds.items() if kind == "file"]
        found = own if folder == path else file_system.find(folder)
        return sorted(each for each in found if not posixpath.basename(each).startswith("."))

    def items() -> Iterator[Item]:
        for folder in folders or [path]:
            number = numbers.get(names.get(folder, ""))
            for each in files_in(folder):
                # In class folders, every file counts as an image. In a plain folder, other files may lie beside images.
                if folders or each.lower().endswith(_SUFFIXES):
                    yield Item(posixpath.relpath(each, path), number, _address(spec, file_system, each))

    # With ignored labels, only the first samples are read, so counting is not worth the time.
    total = sum(len(files_in(folder)) for folder in folders) if folders and not labels.ignored else None
    by_order = bool(folders) and not labels.names and any(not names[each].isdigit() for each in folders)
    note = "class folders were numbered in sorted order, because the model's class names are unknown"
    return Dataset(spec, items, total, (note,) if by_order else ())


def _column(found: Mapping[str, Any], wanted: tuple[str, ...]) -> str | None:
    lower = {str(name).strip().lower(): str(name) for name in found}
    return next((lower[name] for name in wanted if name in lower), None)


def _table(spec: str, suffix: str, labels: Labels, tokenizer: Tokenizer | None) -> Dataset:
    import fsspec

    base = spec.rpartition("/")[0]

    def rows() -> Iterator[tuple[int, dict[str, Any]]]:
        try:
            with fsspec.open(spec, "rt", encoding="utf-8-sig", newline="") as file:
                if suffix in {".csv", ".tsv"}:
                    yield from enumerate(csv.DictReader(file, delimiter="\t" if suffix == ".tsv" else ","), 2)
                    return
                number = 0
                while line := file.readline(_LONGEST_LINE):
                    number += 1
                    if line.strip():
                        row = json.loads(line)
                        if not isinstance(row, dict):
                            raise ValueError(f"line {number} is not an object")
                        yield number, row
        except (OSError, ValueError, csv.Error, RecursionError) as error:
            raise SourceError(f"{spec}: cannot be read: {reason_of(error)}") from None

    def items() -> Iterator[Item]:
        for number, row in rows():
            name = f"line {number}"
            label_column = _column(row, _LABEL_COLUMNS)
            label = labels.number(row[label_column]) if label_column else None
            if image := _column(row, _IMAGE_COLUMNS):
                where = str(row[image])
                inside = "://" in where or where.startswith("/") or not base
                yield Item(where, label, where if inside else f"{base}/{where}")
            elif tokens := _column(row, _TOKEN_COLUMNS):
                yield Item(name, label, tokens=_token_ids(row[tokens], f"{spec}, {name}"))
            elif text := _column(row, _TEXT_COLUMNS):
                if tokenizer is None:
                    raise SourceError(
                        f"{spec} contains texts", hint="Give the model's tokenizer with --tokenizer FOLDER."
                    )
                yield Item(name, label, tokens=tuple(tokenizer(str(row[text]))))
            else:
                raise SourceError(
                    f"{spec}, {name}: no column of images, texts or token ids among {', '.join(map(str, row))}",
                    hint=f"Name the column of images {', '.join(_IMAGE_COLUMNS[:4])}, and that of labels label.",
                )

    return Dataset(spec, items)


def _token_ids(value: Any, where: str) -> tuple[int, ...]:
    if not isinstance(value, list) or not value or not all(type(each) is int and 0 <= each < 2**31 for each in value):
        raise SourceError(f"{where}: token ids must be a list of non-negative integers")
    return tuple(value)


def _shards(spec: str, labels: Labels) -> Dataset:
    """Open WebDataset shards. Files of one sample are adjacent in a tar and share their name up to the first dot."""
    import fsspec

    paths = sorted(address for part in _braces(spec) for address in _expanded(part))
    if not paths:
        raise SourceError(f"{spec}: no such shards")

    def items() -> Iterator[Item]:
        for path in paths:
            try:
                with fsspec.open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
                    yield from _samples(path, tar)
            except (OSError, tarfile.TarError, ValueError) as error:  # ValueError: storage without byte ranges
                raise SourceError(f"{path}: not a complete tar file: {reason_of(error)}") from None

    def _samples(path: str, tar: tarfile.TarFile) -> Iterator[Item]:
        key, image, label, rank = None, None, None, len(_LABEL_FILES)
        shard = posixpath.basename(path)

        def made() -> Iterator[Item]:
            if image is not None:
                name = f"{shard}::{image.name}"
                yield Item(name, labels.number(label), path, image.offset_data, image.size)

        while (member := tar.next()) is not None:
            vars(tar)["members"] = []  # the tar object would keep all members in memory
            if not member.isfile():
                continue
            stem, _, ending = posixpath.basename(member.name).partition(".")
            own = posixpath.join(posixpath.dirname(member.name), stem)
            if own != key:
                yield from made()
                key, image, label, rank = own, None, None, len(_LABEL_FILES)
            suffix = f".{ending.lower()}"
            if suffix in _SUFFIXES or (image is None and suffix.endswith(_SUFFIXES)):  # prefer x.jpg to x.mask.png
                image = member
            elif ending.lower() in _LABEL_FILES[:rank] and member.size <= 1 << 20:
                handle = tar.extractfile(member)
                text = handle.read().decode("utf-8", "replace").strip() if handle is not None else ""
                stated = _label_of_json(text) if ending.lower() == "json" else text
                if ending.lower() == "txt" and not _is_label(stated, labels):
                    stated = None  # a caption
                if stated is not None:
                    label, rank = stated, _LABEL_FILES.index(ending.lower())
        yield from made()

    return Dataset(spec, items)


def _is_label(stated: Any, labels: Labels) -> bool:
    try:
        return labels.number(stated) is not None
    except SourceError:
        return False


def _label_of_json(text: str) -> Any:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):
        return None
    column = _column(row, _LABEL_COLUMNS) if isinstance(row, dict) else None
    return row[column] if column else row if isinstance(row, int) else None


def _braces(spec: str) -> Iterator[str]:
    """Expand `a{00..02}.tar` and `a{x,y}.tar`, to at most a million names."""
    before, found, rest = spec.partition("{")
    inside, closed, after = rest.partition("}")
    if not found or not closed:
        yield spec
        return
    first, dots, last = inside.partition("..")
    if dots and first.isdigit() and last.isdigit() and int(last) - int(first) < 1_000_000:
        choices = [f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1)]
    else:
        choices = inside.split(",")
    for choice in choices:
        yield from _braces(f"{before}{choice}{after}")


def _expanded(spec: str) -> list[str]:
    file_system, path = _file_system(spec)
    if "*" in path or "?" in path:
        return [_address(spec, file_system, each) for each in file_system.glob(path)]
    return [spec]


def _parquet(spec: str, labels: Labels) -> Dataset:
    import fsspec

    parquet = _package("pyarrow.parquet")

    def opened() -> Any:
        try:
            return parquet.ParquetFile(fsspec.open(spec, "rb").open())
        except Exception as error:  # pyarrow's errors have several base classes
            raise SourceError(f"{spec}: not a Parquet file: {reason_of(error)}") from None

    names = opened().schema_arrow.names
    image, label = _column(dict.fromkeys(names), _IMAGE_COLUMNS), _column(dict.fromkeys(names), _LABEL_COLUMNS)
    if image is None:
        raise SourceError(f"{spec}: no column of images among {', '.join(names)}", hint="Name it image.")
    base = spec.rpartition("/")[0]

    def items() -> Iterator[Item]:
        number = 0
        for batch in opened().iter_batches(64, columns=[image, *([label] if label else [])]):
            for row in batch.to_pylist():
                yield _item_of(row[image], f"row {number}", labels.number(row[label]) if label else None, base)
                number += 1

    return Dataset(spec, items, opened().metadata.num_rows)


def _item_of(value: Any, name: str, label: int | None, base: str = "") -> Item:
    """Make an item of a table's image value: bytes, a path, or a struct of both."""
    if isinstance(value, Mapping):
        if value.get("bytes") is not None:
            return Item(value.get("path") or name, label, data=bytes(value["bytes"]))
        value = value.get("path")
    if isinstance(value, (bytes, bytearray)):
        return Item(name, label, data=bytes(value))
    where = str(value or "")
    return Item(
        where or name, label, where if "://" in where or where.startswith("/") or not base else f"{base}/{where}"
    )


def _tfds(rest: str, labels: Labels) -> Dataset:
    tfds = _package("tensorflow_datasets")
    name, _, split = rest.partition(":")
    try:
        builder = tfds.builder(name)
        split = split or ("test" if "test" in builder.info.splits else next(iter(builder.info.splits), "train"))
        total = int(builder.info.splits[split].num_examples)
    except Exception as error:  # unknown names, or any error of the downloader
        raise SourceError(
            f"tfds:{rest}: {reason_of(error)}",
            hint="Prepare it first with tfds build NAME, or check its name and split.",
        ) from None
    features = builder.info.features
    image, label = _column(features, _IMAGE_COLUMNS), _column(features, _LABEL_COLUMNS)
    if image is None:
        raise SourceError(f"tfds:{rest}: no images among its features {', '.join(features)}")
    numbered = _numbering(getattr(features[label], "names", None) if label else None, labels)

    def items() -> Iterator[Item]:
        decoders = {image: tfds.decode.SkipDecoding()}
        for number, row in enumerate(builder.as_dataset(split=split, decoders=decoders, shuffle_files=False)):
            stated = int(row[label]) if label else None
            yield Item(f"{split} {number}", numbered(stated), data=bytes(row[image].numpy()))

    return Dataset(f"tfds:{name}:{split}", items, total)


def _hugging_face(rest: str, labels: Labels) -> Dataset:
    datasets = _package("datasets")
    name, _, split = rest.partition(":") if "://" not in rest else (rest, "", "")
    try:
        folder = _file_system(name)[0].isdir(name)
        found = datasets.load_from_disk(name) if folder else datasets.load_dataset(name, split=split or None)
        if isinstance(found, datasets.DatasetDict):
            split = split or next((each for each in ("test", "validation") if each in found), next(iter(found)))
            found = found[split]
        image, label = _column(found.features, _IMAGE_COLUMNS), _column(found.features, _LABEL_COLUMNS)
        if image is not None and isinstance(found.features[image], datasets.Image):
            found = found.cast_column(image, datasets.Image(decode=False))
    except Exception as error:  # errors of datasets, its client or the file system
        raise SourceError(
            f"hf:{rest}: {reason_of(error)}", hint="Check the name and the split: hf:NAME:SPLIT."
        ) from None
    if image is None:
        raise SourceError(f"hf:{rest}: no column of images among {', '.join(found.features)}")
    numbered = _numbering(getattr(found.features[label], "names", None) if label else None, labels)

    def items() -> Iterator[Item]:
        for number, row in enumerate(found):
            yield _item_of(row[image], f"row {number}", numbered(row[label]) if label else None)

    return Dataset(f"hf:{name}" + (f":{split}" if split else ""), items, len(found))


def _numbering(own: list[str] | None, labels: Labels) -> Callable[[Any], int | None]:
    """A function from a stated label to a class number.

    It maps the data set's class names if the model has all of them, else it uses the data set's own numbers.
    """
    numbers: list[int | None] = []
    if own and labels.names:
        try:
            numbers = [labels.number(name) for name in own]
        except SourceError:
            numbers = []
        if len(set(numbers)) < len(numbers):  # two names of one class are ambiguous
            numbers = []
    return lambda stated: (
        numbers[stated] if isinstance(stated, int) and 0 <= stated < len(numbers) else labels.number(stated)
    )


def _package(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError:
        raise SourceError(
            f"this data set needs {name.partition('.')[0]}", hint="Install it: pip install 'van-port[data]'."
        ) from None


def hugging_face_tokenizer(folder: str) -> Tokenizer:
    """Load a tokenizer that transformers saved in a folder; raises SourceError."""
    transformers = _package("transformers")
    try:
        made = transformers.AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        raise SourceError(f"{folder}: not a tokenizer: {reason_of(error)}") from None
    return lambda text: list(made(text)["input_ids"])
