"""TFLite metadata, which describes the inputs and results of a LiteRT file.

The tables follow TensorFlow Lite's metadata schema, identifier M001. A file stores them in a buffer called
TFLITE_METADATA. The code below writes each field by its number in the schema.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Sequence
from typing import Any

import flatbuffers
from ai_edge_litert import schema_py_generated as schema

from porting.exporting.usage import LABELS_FILE, Tensor, Usage
from porting.files.exported_file import DESCRIPTION_SLOT, METADATA_BUFFER

_MODEL_IDENTIFIER, _IDENTIFIER = b"TFL3", b"M001"
# Runtimes map weights from the file, so the weights need the alignment that their kernels expect.
_ALIGNMENT = 16
# The first version of the reader that supports normalisation.
_MIN_PARSER = "1.0.0"
_NORMALIZATION, _IMAGE, _RGB = 1, 2, 1  # in the unions ProcessUnitOptions and ContentProperties, and in ColorSpaceType
_AXIS_LABELS = 2  # in AssociatedFileType


class _Aligned(flatbuffers.Builder):  # type: ignore[misc]
    """A builder that keeps weights aligned as TensorFlow's converter wrote them."""

    def StartVector(self, elemSize: int, numElems: int, alignment: int) -> Any:  # noqa: N802, N803
        aligned = _ALIGNMENT if elemSize == 1 and numElems >= _ALIGNMENT else alignment
        return super().StartVector(elemSize, numElems, aligned)


def with_metadata(content: bytes, usage: Usage) -> bytes:
    """Add the metadata of `usage` to a file's content. Tensors and operations do not change.

    Labels are a file in a ZIP archive at the end, where the metadata's readers look for them.
    """
    model = schema.ModelT.InitFromPackedBuf(content, 0)
    graph = model.subgraphs[0]
    ours = {each.name: each for each in (*usage.inputs, *usage.results)}
    # Metadata follows the order of the file; the signature maps it to names.
    if not model.signatureDefs:
        raise ValueError("TensorFlow could not write the names of the inputs and results into the file")
    signature = model.signatureDefs[0]
    inputs, results = (
        _in_order(order, given, ours)
        for order, given in ((graph.inputs, signature.inputs), (graph.outputs, signature.outputs))
    )
    buffer = schema.BufferT()
    buffer.data = bytearray(_packed(inputs, results, usage))
    model.buffers.append(buffer)
    entry = schema.MetadataT()
    entry.name, entry.buffer = METADATA_BUFFER, len(model.buffers) - 1
    model.metadata = [*(model.metadata or []), entry]
    builder = _Aligned(len(content) + 4096)
    builder.Finish(model.Pack(builder), _MODEL_IDENTIFIER)
    file = io.BytesIO(bytes(builder.Output()))
    if usage.labels:
        with zipfile.ZipFile(file, "a") as archive:
            # With a fixed date, the same model gives the same file.
            archive.writestr(zipfile.ZipInfo(LABELS_FILE), usage.labels_text)
    return file.getvalue()


def _in_order(order: Sequence[int], signature: Sequence[Any], ours: dict[str, Tensor]) -> list[Tensor]:
    names = {int(each.tensorIndex): each.name.decode() for each in signature}
    return [ours[names[int(index)]] for index in order]


def _packed(inputs: list[Tensor], results: list[Tensor], usage: Usage) -> bytes:
    builder = flatbuffers.Builder(1024)
    takes = _vector(builder, [_tensor(builder, each, usage if usage.mean is not None else None) for each in inputs])
    gives = _vector(builder, [_tensor(builder, each, None, labelled=bool(usage.labels)) for each in results])
    graph = _table(builder, 10, {2: takes, 3: gives})
    facts = usage.properties()
    strings = {
        5: facts.get("license", ""),
        0: f"{facts.get('family', '')} {facts.get('variant', '')}".strip(),
        DESCRIPTION_SLOT: "\n".join(f"{key}: {value}" for key, value in facts.items()),
        7: _MIN_PARSER,
    }
    fields = {slot: builder.CreateString(text) for slot, text in strings.items()}
    root = _table(builder, 8, {**fields, 3: _vector(builder, [graph])})
    builder.Finish(root, _IDENTIFIER)
    return bytes(builder.Output())


def _tensor(builder: Any, tensor: Tensor, usage: Usage | None, *, labelled: bool = False) -> int:
    """Write a TensorMetadata; with `usage`, that of an image, whose normalisation is for values from 0 to 255."""
    fields = {0: builder.CreateString(tensor.name), 1: builder.CreateString(str(tensor))}
    if labelled:
        named = _table(builder, 5, {0: builder.CreateString(LABELS_FILE)}, {2: _AXIS_LABELS})
        fields[6] = _vector(builder, [named])
    if usage is not None:
        assert usage.mean is not None
        assert usage.std is not None
        mean, std = ([255 * number for number in numbers] for numbers in (usage.mean, usage.std))
        options = _table(builder, 2, {0: _floats(builder, mean), 1: _floats(builder, std)})
        unit = _table(builder, 2, {1: options}, {0: _NORMALIZATION})
        fields[4] = _vector(builder, [unit])
        fields[3] = _table(builder, 3, {1: _table(builder, 2, {}, {0: _RGB})}, {0: _IMAGE})
        low, high = ([(at - m) / s for m, s in zip(mean, std, strict=True)] for at in (0.0, 255.0))
        fields[5] = _table(builder, 2, {0: _floats(builder, high), 1: _floats(builder, low)})
    return _table(builder, 7, fields)


def _table(builder: Any, slots: int, offsets: dict[int, int], numbers: dict[int, int] | None = None) -> int:
    builder.StartObject(slots)
    for slot, number in (numbers or {}).items():
        builder.PrependInt8Slot(slot, number, 0)
    for slot, offset in offsets.items():
        builder.PrependUOffsetTRelativeSlot(slot, offset, 0)
    return int(builder.EndObject())


def _vector(builder: Any, offsets: list[int]) -> int:
    return _filled(builder, offsets, builder.PrependUOffsetTRelative)


def _floats(builder: Any, numbers: Sequence[float]) -> int:
    return _filled(builder, numbers, builder.PrependFloat32)


def _filled(builder: Any, items: Sequence[Any], prepend: Callable[[Any], None]) -> int:
    builder.StartVector(4, len(items), 4)
    for item in reversed(items):
        prepend(item)
    return int(builder.EndVector())
