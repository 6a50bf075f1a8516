"""A block of samples on its way through an evaluation: read, prepared for each arm, run and judged."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from porting.errors import SourceError
from porting.evaluation.decoding import Decoded, RefusedImageError, decode
from porting.evaluation.items import Block, Item
from porting.evaluation.tally import Tally
from porting.kinds.transforms import Array

if TYPE_CHECKING:
    from PIL import Image

# Maps an RGB image to `(H, W, C)` float32.
Prepare = Callable[["Image.Image"], Array]


@dataclass(frozen=True)
class Sample:
    """A readable sample of a block. `number` is its position in the data set."""

    number: int
    name: str
    label: int | None


@dataclass
class Batch:
    """The readable samples of a block, and the inputs of each arm.

    `same` is the input of both models: `(N, H, W, C)` float32, or token ids and a mask by name. `pixels` holds the
    images before preprocessing until `own`, with Keras's own preprocessing, is computed from them. `refused` holds the
    number, name, cause and details of each sample left out, and `remarks` the number, name and remark of others.
    `results` holds the results by arm.
    """

    block: int
    hashes: Array
    samples: list[Sample] = field(default_factory=list)
    same: Any = None
    pixels: list[Image.Image] = field(default_factory=list)
    own: Array | None = None
    refused: list[tuple[int, str, str, str]] = field(default_factory=list)
    remarks: list[tuple[int, str, str]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    results: dict[str, Array] = field(default_factory=dict)


def load_images(block: Block, prepare: Prepare, pool: Executor | None = None, *, keep_pixels: bool = False) -> Batch:
    """Read, decode and prepare a block's images for PyTorch, in parallel if there is a pool."""

    def one(item: Item) -> _Loaded:
        loaded = _Loaded(item)
        try:
            data = _read(item)
            loaded.hash = _hash(data)
            found = decode(data)
            loaded.remarks = found.remarks
            loaded.same = _prepared(found, prepare)
            loaded.pixels = found.image if keep_pixels else None
        except RefusedImageError as error:
            loaded.refusal = error
        return loaded

    found = list(map(one, block.items) if pool is None else pool.map(one, block.items))
    batch = Batch(block.number, np.array([0 if each.refusal else each.hash for each in found], np.uint64))
    same: list[Array] = []
    for number, loaded in enumerate(found, block.start):
        name = loaded.item.name
        if loaded.same is None:
            assert loaded.refusal is not None  # one of the two is set
            batch.refused.append((number, name, loaded.refusal.cause, loaded.refusal.detail[:200]))
            continue
        batch.samples.append(Sample(number, name, loaded.item.label))
        batch.remarks += [(number, name, remark) for remark in loaded.remarks]
        same.append(loaded.same)
        if loaded.pixels is not None:
            batch.pixels.append(loaded.pixels)
    if same:
        batch.same = _stacked(same)
    return batch


def opened(batch: Batch) -> Tally:
    """A tally with what is known about a batch before its results: its files and its loading time."""
    tally = Tally()
    tally.remember(batch.block, batch.hashes)
    tally.seconds.update(batch.seconds)
    for number, name, cause, detail in batch.refused:
        tally.counts[f"refused:{cause}"] += 1
        tally.keep("refused", number, number, {"sample": name, "cause": cause, "detail": detail})
    for number, name, remark in batch.remarks:
        tally.counts[f"remark:{remark}"] += 1
        tally.keep(f"remark:{remark}", number, number, {"sample": name})
    tally.counts["samples"] += len(batch.samples)
    return tally


def prepare_own(batch: Batch, prepare: Prepare, pool: Executor | None = None) -> None:
    """Prepare the images of a batch with Keras's own preprocessing; if the result equals `same`, share the array."""
    if not batch.pixels:
        return

    def one(image: Image.Image) -> Array | str:
        try:
            return prepare(image)
        except Exception as error:  # the user's code may fail for some sizes
            return str(error) or type(error).__name__

    made = list(map(one, batch.pixels) if pool is None else pool.map(one, batch.pixels))
    kept = [place for place, each in enumerate(made) if not isinstance(each, str)]
    for place, each in enumerate(made):
        if isinstance(each, str):
            sample = batch.samples[place]
            batch.refused.append(
                (sample.number, sample.name, "cannot be prepared", f"Keras's own preprocessing: {each}"[:200])
            )
    batch.samples = [batch.samples[place] for place in kept]
    batch.same = batch.same[kept]
    # On Ray, PyTorch has already run.
    batch.results = {arm: result[kept] for arm, result in batch.results.items()}
    batch.pixels = []
    if kept:
        stacked = _stacked([made[place] for place in kept])
        batch.own = batch.same if np.array_equal(stacked, batch.same) else stacked


def _stacked(images: Sequence[Any]) -> Array:
    """Stack images; raises SourceError if their sizes differ."""
    shapes = sorted({np.shape(image) for image in images})
    if len(shapes) > 1:
        raise SourceError(
            f"prepared images have several shapes: {', '.join(map(str, shapes[:4]))}",
            hint="A function for --keras-preprocessing or --pytorch-preprocessing must return one size for all images.",
        )
    return np.stack(images)


@dataclass
class _Loaded:
    item: Item
    hash: int = 0
    remarks: tuple[str, ...] = ()
    refusal: RefusedImageError | None = None
    same: Array | None = None
    pixels: Image.Image | None = None


def _read(item: Item) -> bytes:
    try:
        return item.read()
    except OverflowError as error:
        raise RefusedImageError("too large", str(error)) from None
    except Exception as error:  # the file system or a storage client may raise anything
        raise RefusedImageError("cannot be read", str(error) or repr(error)) from None


def _prepared(found: Decoded, prepare: Prepare) -> Array:
    try:
        return prepare(found.image)
    except Exception as error:  # code of other packages may fail for some sizes
        size = "x".join(map(str, found.image.size))
        raise RefusedImageError("cannot be prepared", f"{size} pixels: {error}") from None


def load_tokens(block: Block, longest: int, vocabulary: int) -> Batch:
    """Load the token ids of a block's texts, truncated to `longest` tokens and padded with zeros and a mask."""
    batch = Batch(block.number, np.zeros(len(block.items), np.uint64))
    rows = []
    for place, (number, item) in enumerate(enumerate(block.items, block.start)):
        tokens = item.tokens or ()
        batch.hashes[place] = _hash(np.asarray(tokens, np.int64).tobytes()) if tokens else 0
        if not tokens:
            batch.refused.append((number, item.name, "empty", "no tokens"))
        elif max(tokens) >= vocabulary:
            detail = f"token {max(tokens)}, but the vocabulary has {vocabulary}"
            batch.refused.append((number, item.name, "unknown token", detail))
        else:
            if len(tokens) > longest:
                batch.remarks.append((number, item.name, f"cut at {longest} tokens"))
            batch.samples.append(Sample(number, item.name, item.label))
            rows.append(tokens[:longest])
    if rows:
        ids = np.zeros((len(rows), max(map(len, rows))), np.int32)
        mask = np.zeros_like(ids)
        for row, tokens in enumerate(rows):
            ids[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = 1
        batch.same = {"token_ids": ids, "padding_mask": mask}
    return batch


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
