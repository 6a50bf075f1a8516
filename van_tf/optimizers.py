"""AdamW with the arithmetic of PyTorch."""

from __future__ import annotations

import math
from typing import Any

import keras
from keras import ops


@keras.saving.register_keras_serializable(package="van_tf")
class AdamW(keras.optimizers.AdamW):
    """Keras's AdamW with the update and the defaults of torch.optim.AdamW (arXiv 1711.05101, algorithm 2).

    The two differ in the first steps. PyTorch divides by `sqrt(v / (1 - beta_2 ** t)) + epsilon`. Keras adds epsilon
    before correcting the bias, so epsilon has thirty times the effect at first. Keras also computes the power in
    float32, which leaves five digits of `1 - beta_2`.

    Raises ValueError for amsgrad, which is not supported.
    """

    def __init__(
        self, learning_rate: Any = 1e-3, weight_decay: float = 0.01, *, epsilon: float = 1e-8, **kwargs: Any
    ) -> None:
        super().__init__(learning_rate, weight_decay=weight_decay, epsilon=epsilon, **kwargs)
        if self.amsgrad:
            raise ValueError("this AdamW does not support amsgrad; keras.optimizers.AdamW does")

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        index = self._get_variable_index(variable)
        momentum, velocity = self._momentums[index], self._velocities[index]
        gradient, rate, step = (ops.cast(x, variable.dtype) for x in (gradient, learning_rate, self.iterations + 1))
        # 1 - beta ** step, in full precision.
        first, second = (-ops.expm1(step * math.log(max(beta, 1e-300))) for beta in (self.beta_1, self.beta_2))
        self.assign_add(momentum, (gradient - momentum) * (1 - self.beta_1))
        self.assign_add(velocity, (ops.square(gradient) - velocity) * (1 - self.beta_2))
        denominator = ops.sqrt(velocity) / ops.sqrt(second) + self.epsilon
        self.assign_sub(variable, momentum * (rate / first) / denominator)
