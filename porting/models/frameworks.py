"""Starting PyTorch and TensorFlow in one process, which takes some care."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import sys
import tempfile
from collections.abc import Iterator
from typing import Any


def load_triton() -> None:
    """Loads Triton, where it is installed, and must be called before anything imports TensorFlow.

    TensorFlow's wheels make their own copy of LLVM visible to the whole process (tensorflow issue 124205). Triton,
    which comes with PyTorch's CUDA builds and is imported by torch._dynamo, timm and transformers, then ends the
    process when it loads; loaded first, it keeps to its own copy and both work.
    """
    if "triton" not in sys.modules and importlib.util.find_spec("triton") is not None:
        importlib.import_module("triton._C.libtriton")


def start_tensorflow(threads: int | None = None) -> None:
    """Imports TensorFlow after Triton and without the lines that it writes to standard error on every start.

    `threads` is what each of its operations may use, which counts only until it has begun to compute.

    Its C++ part writes there before any log level can be set, so the descriptor itself is turned away while it
    loads; what was written is shown when the import fails.
    """
    if threads is not None:
        start_tensorflow()
        import tensorflow as tf

        with contextlib.suppress(RuntimeError):  # it has begun
            tf.config.threading.set_intra_op_parallelism_threads(threads)
    if "tensorflow" in sys.modules:
        return
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    load_triton()
    with holding_back_stderr():
        import keras  # noqa: F401
        import tensorflow  # noqa: F401


@contextlib.contextmanager
def holding_back_stderr() -> Iterator[None]:
    """What C++ code writes to standard error while this lasts is shown only where it ends in an exception."""
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


def import_library(name: str) -> Any:
    """A package of PyTorch models, imported so that it disturbs nothing; raises ImportError where it is not there.

    transformers imports TensorFlow by itself, with all that TensorFlow writes to standard error.
    """
    if name.partition(".")[0] == "transformers" and importlib.util.find_spec("transformers") is not None:
        start_tensorflow()
    load_triton()
    return importlib.import_module(name)
