"""A device that is not the CPU on a machine without one, and what is launched on it.

torch's fake tensors have a shape and a device but no numbers, and an operator whose inputs
are on two devices raises. "fakegpu" is a backend that is registered in Python: what is made
without a device is on the CPU, and does not go unnoticed. Import this before the first
backward pass of a program, which starts a queue for each device that there is.
"""

from contextlib import contextmanager

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

DEVICE = "fakegpu"
_setup_privateuseone_for_python_backend(DEVICE)
# torch.utils.checkpoint asks every device that there is for it
getattr(torch, DEVICE).get_amp_supported_dtype = lambda: [torch.bfloat16]


@contextmanager
def on_fake_gpu(*modules, device=DEVICE):
    """Parameters and buffers are on DEVICE, without numbers, and so is what is made with
    device=DEVICE."""
    with FakeTensorMode():
        for module in modules:
            for part in module.modules():
                for name, p in part._parameters.items():
                    if p is not None:
                        fake = torch.empty(p.shape, dtype=p.dtype, device=device)
                        part._parameters[name] = nn.Parameter(fake, p.requires_grad)
                for name, b in part._buffers.items():
                    if b is not None:
                        fake = torch.empty(b.shape, dtype=b.dtype, device=device)
                        part._buffers[name] = fake
        yield


def tensors(result):
    """All tensors in nested tuples and lists."""
    if isinstance(result, torch.Tensor):
        return [result]
    if isinstance(result, (tuple, list)):
        return [t for part in result for t in tensors(part)]
    return []


class Counter(TorchDispatchMode):
    """Counts the operators that compute: on a GPU each is the launch of a kernel or more.
    Views and uninitialized memory cost nothing there."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        aliases = [a.alias_info for a in function._schema.arguments if a.alias_info]
        view = any(not alias.is_write for alias in aliases)
        free = ("empty", "new_empty", "empty_strided", "new_empty_strided", "_unsafe_view")
        if tensors(result) and not view and function._opname not in free:
            self.count += 1
        return result


def count_operators(layer, h, l, batch=1):
    """Operators of one forward pass without gradients, and of one forward and backward
    pass, in the parallel mode that is the default, at any size: nothing is computed. On a
    CPU without numbers, where torch.utils.checkpoint works too; the operators are the same.
    """
    with on_fake_gpu(layer, device="cpu"):
        u = torch.empty(batch, h, l)
        with torch.no_grad(), Counter() as forward:
            layer(u)
        with Counter() as both:
            layer(u)[0].sum().backward()
    return forward.count, both.count
