"""What a result of `van-port export` says of itself: its facts, and the tensors that it holds.

The files are untrusted. `porting.files.survey` reads them in a process with limited time and memory.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from porting.errors import ExportError

# The suffix of the artifact's name, by format.
FORMATS = {"saved_model": "", "litert": ".tflite", "onnx": ".onnx"}
TITLES = {"saved_model": "SavedModel", "litert": "LiteRT", "onnx": "ONNX"}
# The buffer of a LiteRT file that holds its metadata, and where the text about the model is in its table.
METADATA_BUFFER, DESCRIPTION_SLOT = b"TFLITE_METADATA", 1
# What a SavedModel says of itself, in the folder that TensorFlow leaves to its writers.
EXTRA_FOLDER, USAGE_FILE = "assets.extra", "usage.json"
# The packages that reading a format needs in addition to the regular dependencies.
_NEEDED = {"litert": ("ai_edge_litert", "flatbuffers"), "onnx": ("onnx",), "saved_model": ()}
_MOST_TEXT = 16 << 20  # bytes

Row = tuple[str, tuple[int, ...], str]


def form_of(path: Path) -> str | None:
    """The format of a result of `van-port export`, by its name; None for a file of Keras weights."""
    if path.is_dir():
        return "saved_model"
    return next((form for form, suffix in FORMATS.items() if suffix and path.suffix == suffix), None)


def exported_form(path: Path) -> str | None:
    """The format of a file with its suffix, or of a folder that holds a SavedModel; None for all others."""
    is_other_folder = path.is_dir() and not (path / "saved_model.pb").is_file()
    return None if is_other_folder else form_of(path)


def require_reader(form: str) -> None:
    """Raise ExportError if a package is missing that reads this format."""
    if missing := [name for name in _NEEDED[form] if importlib.util.find_spec(name) is None]:
        raise ExportError(
            f"reading {TITLES[form]} needs {' and '.join(missing)}", hint="Run `pip install 'van-port[export]'`."
        )


def read_exported(path: Path) -> tuple[dict[str, str] | None, list[Row]]:
    """Read the facts and the tensors of an exported file, `(name, shape, type)` each. Facts are None without any.

    Raises whatever the format's library raises for a damaged file.
    """
    if form_of(path) == "litert":
        return _read_litert(path.read_bytes())
    return _read_onnx(path) if form_of(path) == "onnx" else _read_saved_model(path)


def _read_litert(content: bytes) -> tuple[dict[str, str] | None, list[Row]]:
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    if not schema.Model.ModelBufferHasIdentifier(content, 0):
        raise ValueError("it does not begin as a LiteRT file")
    model = schema.ModelT.InitFromPackedBuf(content, 0)
    types = {number: name.lower() for name, number in vars(schema.TensorType).items() if isinstance(number, int)}
    rows = [
        (_text(tensor.name), tuple(map(int, tensor.shape if tensor.shape is not None else ())), types[tensor.type])
        for graph in model.subgraphs
        for tensor in graph.tensors
        if model.buffers[tensor.buffer].data is not None
    ]
    held = next((each for each in model.metadata or [] if each.name == METADATA_BUFFER), None)
    if held is None:
        return None, rows
    data = bytes(model.buffers[held.buffer].data)
    root = flatbuffers.encode.Get(flatbuffers.packer.uoffset, data, 0)
    table = flatbuffers.table.Table(data, root)
    place = table.Offset(4 + 2 * DESCRIPTION_SLOT)
    lines = _text(table.String(place + table.Pos)).splitlines() if place else []
    return {name: value for name, _, value in (line.partition(": ") for line in lines)}, rows


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _read_onnx(path: Path) -> tuple[dict[str, str] | None, list[Row]]:
    import onnx

    model = onnx.load(path, load_external_data=False)
    if not model.HasField("graph"):
        raise ValueError("it holds no graph")
    rows = [
        (each.name, tuple(each.dims), onnx.helper.tensor_dtype_to_np_dtype(each.data_type).name)
        for each in model.graph.initializer
    ]
    return {each.key: each.value for each in model.metadata_props} or None, rows


def _read_saved_model(path: Path) -> tuple[dict[str, str] | None, list[Row]]:
    usage = path / EXTRA_FOLDER / USAGE_FILE
    facts = None
    if usage.is_file():
        with usage.open("rb") as file:
            text = file.read(_MOST_TEXT + 1)
        if len(text) > _MOST_TEXT:
            raise ValueError(f"its {USAGE_FILE} is larger than {_MOST_TEXT:,} bytes")
        found = json.loads(text)
        if not isinstance(found, dict):
            raise ValueError(f"its {USAGE_FILE} is not a JSON object")
        facts = {str(name): value if isinstance(value, str) else json.dumps(value) for name, value in found.items()}
    return facts, [*_variables(path / "variables" / "variables"), *_constants(path / "saved_model.pb")]


def _variables(prefix: Path) -> Iterator[Row]:
    from porting.models.frameworks import start_tensorflow

    if not prefix.with_suffix(".index").is_file():
        return
    start_tensorflow()
    import tensorflow as tf

    reader = tf.train.load_checkpoint(str(prefix))
    dtypes = reader.get_variable_to_dtype_map()
    for name, shape in sorted(reader.get_variable_to_shape_map().items()):
        if dtypes[name] != tf.string:  # the graph of objects
            yield name.removesuffix("/.ATTRIBUTES/VARIABLE_VALUE"), tuple(shape), dtypes[name].name


def _constants(path: Path) -> Iterator[Row]:
    """The constants of a graph, in which a model that is exported keeps its weights."""
    from porting.models.frameworks import start_tensorflow

    start_tensorflow()
    import tensorflow as tf
    from tensorflow.core.protobuf import saved_model_pb2

    model = saved_model_pb2.SavedModel()
    model.ParseFromString(path.read_bytes())
    for graph in model.meta_graphs:
        for function in graph.graph_def.library.function:
            for node in function.node_def:
                value = node.attr["value"].tensor
                if node.op == "Const" and value.dtype != tf.string.as_datatype_enum:
                    shape = tuple(side.size for side in value.tensor_shape.dim)
                    yield node.name, shape, tf.as_dtype(value.dtype).name
