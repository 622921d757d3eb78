"""A moving average of a model's weights, which forgets the noise of the last steps."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

__all__ = ["WeightAverage"]


class WeightAverage:
    """Weights averaged over steps: ``average = memory * average + (1 - memory) * weights``.

    Over the first steps the memory is shorter (step / (step + 9)), so that where training began is soon forgotten.

    Args:
        model: whose parameters are averaged, from their present values on.
        memory: at least 0 and below 1; 0 keeps nothing, and costs nothing.
    """

    def __init__(self, model: nn.Module, memory: float) -> None:
        self.memory, self.steps = memory, 0
        self.values = self._weights(model) if memory else {}

    @staticmethod
    def _weights(model: nn.Module) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the weights of a step."""
        if not self.memory:
            return
        self.steps += 1
        memory = min(self.memory, self.steps / (self.steps + 9))
        parameters = dict(model.named_parameters())
        torch._foreach_lerp_(list(self.values.values()), [parameters[name] for name in self.values], 1 - memory)

    @contextlib.contextmanager
    def shown(self, model: nn.Module) -> Iterator[None]:
        """Let the model have the averaged weights inside the ``with`` block."""
        if not self.memory:
            yield
            return
        own = self._weights(model)
        self.put(model)
        try:
            yield
        finally:
            model.load_state_dict(own, strict=False)

    def put(self, model: nn.Module) -> None:
        """Give the model the averaged weights for good; without an average its weights stay."""
        model.load_state_dict(self.values, strict=False)

    def state_dict(self) -> dict:
        return {"steps": self.steps, "values": self.values}

    def load_state_dict(self, state: dict) -> None:
        self.steps = state["steps"]
        for name, value in state["values"].items():
            self.values[name].copy_(value)
