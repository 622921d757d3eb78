"""A GPU that is only claimed: tensors of the CPU say that they lie on one, so that code takes the way that it takes there.

Results stay in buffers with room for all tokens, nothing is read on the host that could be avoided, and rows beyond the last token
are what `conftest.py` fills fresh memory with. An index that is read there ends in an IndexError, as in an assertion on a device.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from madtp_kernels import backends, repeats

# Some of what CUDA's autocast computes in float32, and that of a CPU does not.
WIDENED = {
    F.layer_norm, F.softmax, F.log_softmax, Tensor.softmax, Tensor.log_softmax, Tensor.sum, Tensor.cumsum, Tensor.pow, Tensor.log,
    Tensor.exp, Tensor.norm,
}  # fmt: skip
CLAIMS = {
    Tensor.device.__get__: torch.device("cuda"),
    Tensor.is_cuda.__get__: True,
    Tensor.is_cpu.__get__: False,
}


def _where_it_is(value):
    return "cpu" if isinstance(value, torch.device) and value.type == "cuda" else value


def _wide(value):
    half = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if half else value


class PretendedGPU(TorchFunctionMode):
    """Within it, every tensor claims to lie on a GPU. Operations run on the CPU, by the backend that the CPU prefers.

    Attributes:
        layer_norms: shapes ``[C, D]`` of what PyTorch's LayerNorm was called on.
    """

    def __enter__(self):
        self.layer_norms = []
        self.patch, resolve = pytest.MonkeyPatch(), backends._resolve
        self.patch.setattr(backends, "_resolve", lambda op, package, name, device, *rest: resolve(
            op, package, name, "cpu", *rest
        ))  # fmt: skip
        self.patch.setattr(repeats, "signature", lambda *_: None)
        for name in ("is_autocast_enabled", "get_autocast_dtype", "autocast"):
            ask = getattr(torch, name)
            self.patch.setattr(torch, name, lambda *_, ask=ask, **options: ask("cpu", **options))
        self.patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        return super().__enter__()

    def __exit__(self, *exception):
        super().__exit__(*exception)
        self.patch.undo()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in CLAIMS:
            return CLAIMS[function]
        if function is F.layer_norm:
            self.layer_norms.append(tuple(args[0].shape))
        kwargs = {name: _where_it_is(value) for name, value in (kwargs or {}).items()}
        args = map(_where_it_is, args)
        if function in WIDENED and torch.is_autocast_enabled("cuda"):
            args, kwargs = map(_wide, args), {name: _wide(value) for name, value in kwargs.items()}
        return function(*args, **kwargs)
