"""Loads PyTorch and TensorFlow into one process, in an order that does not crash."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import importlib.util
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from typing import Any


def load_triton() -> None:
    """Load Triton if it is installed. Call this before anything imports TensorFlow.

    TensorFlow's wheels make their own copy of LLVM visible to the whole process (tensorflow issue 124205). Triton
    comes with PyTorch's CUDA builds; torch._dynamo, timm and transformers import it. If it loads after TensorFlow, it
    ends the process. If it loads first, it uses its own copy, and both work.
    """
    if "triton" not in sys.modules and importlib.util.find_spec("triton") is not None:
        importlib.import_module("triton._C.libtriton")


def start_tensorflow(threads: int | None = None) -> None:
    """Import TensorFlow after Triton, without the lines that it writes to standard error on every start.

    `threads` is the number of threads for each operation. It has no effect once TensorFlow has begun to compute.

    TensorFlow's C++ part writes before any log level can be set, so the file descriptor is redirected while it loads.
    If the import fails, what was written is shown.
    """
    if threads is not None:
        start_tensorflow()
        import tensorflow as tf

        with contextlib.suppress(RuntimeError):  # TensorFlow has begun to compute
            tf.config.threading.set_intra_op_parallelism_threads(threads)
    silence_retracing()
    if "tensorflow" in sys.modules:
        return
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    load_triton()
    with holding_back_stderr(), collecting_later():
        import keras  # noqa: F401
        import tensorflow  # noqa: F401


# Whether this process collects no garbage until a framework is imported.
_postponed = False


def postpone_garbage_collection() -> None:
    """Collect no cyclic garbage until a framework was imported here, and never search what was loaded until then.

    Call this at the start of a process that belongs to us. The frameworks make a million objects that stay. Python
    searches them while they load and again at exit, which takes more than two seconds.
    """
    global _postponed
    _postponed = True
    gc.disable()


@contextlib.contextmanager
def collecting_later() -> Iterator[None]:
    """Collect no cyclic garbage in this context, and none before it if that was postponed."""
    global _postponed
    enabled = gc.isenabled() or _postponed
    gc.disable()
    try:
        yield
    finally:
        if _postponed:
            gc.freeze()
            _postponed = False
        if enabled:
            gc.enable()


def silence_retracing() -> None:
    """Leave out TensorFlow's warning that Keras compiles grouped convolutions anew for each layer.

    Nobody who uses Keras can change it.
    """
    logging.getLogger("tensorflow").addFilter(_is_of_interest)  # adding it again has no effect


def _is_of_interest(record: logging.LogRecord) -> bool:
    return "_conv_xla" not in record.getMessage()


@contextlib.contextmanager
def holding_back_stderr() -> Iterator[None]:
    """Hold back what C++ code writes to standard error in this context, and show it only after an exception."""
    sys.stderr.flush()
    saved = os.dup(2)
    with tempfile.TemporaryFile() as held_back:
        os.dup2(held_back.fileno(), 2)
        try:
            yield
        except BaseException:
            held_back.seek(0)
            os.write(saved, held_back.read())
            raise
        finally:
            os.dup2(saved, 2)
            os.close(saved)


@contextlib.contextmanager
def without_logs(*names: str) -> Iterator[None]:
    """Silence these loggers, by default all, and all warnings, for packages whose errors are told in our own words."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    disabled = logging.root.manager.disable
    try:
        if not names:  # a package that is imported here would set its levels anew
            logging.disable(logging.CRITICAL)
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def import_library(name: str) -> Any:
    """Import a Python package of PyTorch models, after Triton. Raises ImportError if it is not installed.

    transformers imports TensorFlow itself, so TensorFlow is started first, to hold back what it writes.
    """
    if name.partition(".")[0] == "transformers" and importlib.util.find_spec("transformers") is not None:
        start_tensorflow()
    load_triton()
    with collecting_later():
        return importlib.import_module(name)


@contextlib.contextmanager
def without_memory() -> Iterator[None]:
    """Build PyTorch models in this context on the meta device: tensors have shapes and no numbers.

    Random initialisation has nothing to fill there, and is left out: on this device it loads torch._dynamo, which takes
    about a second and 300 MB.
    """
    import torch

    with torch.device("meta"), without_filling():
        yield


@contextlib.contextmanager
def without_filling() -> Iterator[None]:
    """Build PyTorch models in this context without the functions of torch.nn.init: parameters hold anything.

    Memory that nothing is written to takes up nothing, so a large model takes none until its weights are loaded.
    """
    import torch
    from torch.nn import init
    from torch.overrides import TorchFunctionMode

    drawing = {torch.Tensor.normal_, torch.Tensor.uniform_}

    def may_stay(tensor: Any) -> bool:
        # Not a buffer, which may be none of the weights that are loaded.
        return isinstance(tensor, torch.nn.Parameter) or (isinstance(tensor, torch.Tensor) and tensor.is_meta)

    class Unfilled(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            # PyTorch calls the functions of torch.nn.init with `tensor` by name.
            tensor = kwargs.get("tensor", args[0] if args else None)
            # Code may draw again until numbers fit, so drawing itself is left out only where there are no numbers.
            fills = func in drawing and isinstance(tensor, torch.Tensor) and tensor.is_meta
            if fills or (getattr(func, "__module__", "") == init.__name__ and may_stay(tensor)):
                return tensor
            return func(*args, **kwargs)

    def leaving(own: Callable[..., Any]) -> Callable[..., Any]:
        def fill(tensor: Any, *args: Any, **kwargs: Any) -> Any:
            return tensor if may_stay(tensor) else own(tensor, *args, **kwargs)

        return fill

    # Not all of them can be seen by the mode.
    own = {name: each for name, each in vars(init).items() if name.endswith("_") and not name.startswith("_")}
    with replaced(init, **{name: leaving(each) for name, each in own.items()}), Unfilled():
        yield


@contextlib.contextmanager
def without_random_weights() -> Iterator[None]:
    """Build Keras models in this context with zeros in place of random weights, for weights that are loaded next.

    To draw random numbers takes a third of the time in which a model is built.
    """
    from keras import initializers
    from keras.src.initializers import random_initializers

    def zeros(self: Any, shape: Any, dtype: Any = None) -> Any:
        return initializers.Zeros()(shape, dtype=dtype)

    drawing = [
        each
        for each in vars(random_initializers).values()
        if isinstance(each, type) and issubclass(each, initializers.Initializer) and "__call__" in vars(each)
    ]
    with contextlib.ExitStack() as stack:
        for each in drawing:
            stack.enter_context(replaced(each, __call__=zeros))
        yield


def return_free_memory() -> None:
    """Collect garbage, and return to the system the memory that is free.

    Otherwise the C library of Linux keeps what was freed in pieces of up to 32 MiB, as the weights of most layers are.
    """
    gc.collect()
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


@contextlib.contextmanager
def replaced(owner: Any, **functions: Any) -> Iterator[None]:
    """Replace attributes of a module or a class in this context."""
    own = {name: getattr(owner, name) for name in functions}
    try:
        for name, function in functions.items():
            setattr(owner, name, function)
        yield
    finally:
        for name, function in own.items():
            setattr(owner, name, function)


@contextlib.contextmanager
def eager_functions() -> Iterator[None]:
    """Run what is compiled by `tf.function` eagerly in this context, so that the calls inside it can be observed.

    Its compiled form may also be made for float32 alone.
    """
    import tensorflow as tf

    own = tf.config.functions_run_eagerly()
    tf.config.run_functions_eagerly(True)
    try:
        yield
    finally:
        tf.config.run_functions_eagerly(own)


@contextlib.contextmanager
def compiled_calls() -> Iterator[list[str]]:
    """Yield a list that gets the name of every function that `tf.function` has compiled and that is called here."""
    from tensorflow.python.eager.polymorphic_function import polymorphic_function

    called: list[str] = []
    owner = polymorphic_function.Function
    own = owner.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        called.append(str(getattr(self, "_name", "")))
        return own(self, *args, **kwargs)

    with replaced(owner, __call__=call):
        yield called


@contextlib.contextmanager
def convolving(special: Callable[..., Any]) -> Iterator[None]:
    """Let Keras's backend convolve by `special` in this context, or as it does wherever that returns None.

    `special` takes the arguments of the backend's `conv`, all by place.
    """
    from keras.src.backend import nn

    own = nn.conv

    def conv(
        inputs: Any,
        kernel: Any,
        strides: Any = 1,
        padding: str = "valid",
        data_format: str | None = None,
        dilation_rate: Any = 1,
    ) -> Any:
        given = inputs, kernel, strides, padding, data_format, dilation_rate
        result = special(*given)
        return own(*given) if result is None else result

    with replaced(nn, conv=conv):
        yield


@contextlib.contextmanager
def torch_on_one_thread() -> Iterator[None]:
    """Let PyTorch compute on one thread while Keras runs on another framework.

    The measurements between Keras's layers are small. On several threads each waits for the slowest, and on a busy
    machine a check takes many times as long. On an idle one it takes the same time.
    """
    import keras
    import torch

    if keras.backend.backend() == "torch":
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def numbered_afresh() -> Iterator[None]:
    """Make Keras number unnamed layers as if no other model had been built in this process.

    Rows and weights files contain these names, and a model that is built again must have the same ones.
    """
    from keras.src.backend.common import global_state

    counts = global_state.get_global_attribute("object_name_uids")
    try:
        global_state.set_global_attribute("object_name_uids", None)
        yield
    finally:
        global_state.set_global_attribute("object_name_uids", counts)
