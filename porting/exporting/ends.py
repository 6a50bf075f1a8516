"""What an export can put before and behind the model: the normalisation of images, and a softmax.

Both are part of what is proven: PyTorch gets the same parts, in its own precision.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from porting.models.images import Preprocessing
from porting.models.inputs import Inputs, inverse

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Ends:
    """`normalization` is that of images with values from 0 to 255; None leaves it out. `softmax` is over classes."""

    normalization: Preprocessing | None = None
    softmax: bool = False

    def before(self, images: Any) -> Any:
        """Normalise images `(N, H, W, 3)` in TensorFlow."""
        if self.normalization is None:
            return images
        mean, std = (np.array(each, np.float32) for each in (self.normalization.mean, self.normalization.std))
        return (images / np.float32(255) - mean) / std

    def behind(self, result: Any) -> Any:
        """Compute probabilities `(N, classes)` in TensorFlow."""
        if not self.softmax:
            return result
        import tensorflow as tf

        return tf.nn.softmax(result)

    def unprepared(self, inputs: Inputs) -> Inputs:
        """Turn normalised images into those from 0 to 255 that the exported file takes."""
        if self.normalization is None:
            return inputs
        mean, std = (np.array(each) for each in (self.normalization.mean, self.normalization.std))
        (images,), (axes,) = inputs.candidate, inputs.axes
        assert axes is not None  # the inputs of image models are one array
        raw = (255 * (images * std + mean)).astype(np.float32)
        return Inputs((raw,), (np.transpose(raw, inverse(axes)),), (axes,))

    def add_to(self, reference: nn.Module) -> None:
        """Give a PyTorch model of images `(N, 3, H, W)` the same ends. The names of its modules stay."""
        normalization = self.normalization
        if normalization is not None:
            reference.register_forward_pre_hook(lambda _, given: (_normalized(given[0], normalization),))
        if self.softmax:
            reference.register_forward_hook(lambda _, __, result: _probabilities(result))


def _normalized(images: Any, preprocessing: Preprocessing) -> Any:
    mean, std = (images.new_tensor(each).reshape(-1, 1, 1) for each in (preprocessing.mean, preprocessing.std))
    return (images / 255 - mean) / std


def _probabilities(result: Any) -> Any:
    """The softmax of a tensor, or of each in a dict or a sequence."""
    if isinstance(result, Mapping):
        return {name: _probabilities(each) for name, each in result.items()}
    if isinstance(result, (tuple, list)):
        return [_probabilities(each) for each in result]
    return result.softmax(-1)
