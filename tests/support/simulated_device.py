"""A device that is not the CPU, with real execution: PyTorch's PrivateUse1 backend, registered in Python as ``sim``.

Its tensors hold a tensor on the CPU, on which every operation is computed. An operation on tensors of both devices raises, as
on a GPU, with the same exceptions: copies, scalars (zero-dimensional tensors on the CPU), and indices on the CPU.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_map_only
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

aten = torch.ops.aten
NAME = "sim"
_MIXED_DEVICES = {"copy_", "_to_copy", "_copy_from", "index", "index_put_", "index_put", "_index_put_impl_", "_unsafe_index"}
"""Operations that may have tensors of both devices."""


class SimulatedTensor(torch.Tensor):
    """A tensor of the device ``sim:0``."""

    elem: Tensor

    @staticmethod
    def __new__(cls, elem: Tensor) -> "SimulatedTensor":
        wrapper = torch.Tensor._make_wrapper_subclass(
            cls, elem.shape, strides=elem.stride(), storage_offset=elem.storage_offset(), dtype=elem.dtype, device=f"{NAME}:0"
        )
        wrapper.elem = elem
        return wrapper

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"sim({self.elem})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, *args, **(kwargs or {}))


def _run(func: Any, *args: Any, **kwargs: Any) -> Any:
    tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
    name = func.overloadpacket.__name__
    here = [tensor for tensor in tensors if isinstance(tensor, SimulatedTensor)]
    elsewhere = [tensor for tensor in tensors if not isinstance(tensor, SimulatedTensor) and tensor.ndim]
    if here and elsewhere and name not in _MIXED_DEVICES:
        raise RuntimeError(
            f"Expected all tensors to be on the same device: {func} has {len(here)} on sim, {len(elsewhere)} on cpu"
        )
    plain_args, plain_kwargs = tree_map_only(SimulatedTensor, lambda tensor: tensor.elem, (args, kwargs))
    device = kwargs.get("device")
    target = torch.device(device).type if device is not None else (NAME if here else "cpu")
    if device is not None:
        plain_kwargs["device"] = torch.device("cpu")
    plain_kwargs.pop("pin_memory", None)
    result = func(*plain_args, **plain_kwargs)
    if target != NAME:
        return result
    written = {id(tensor.elem): tensor for tensor in here}  # in-place operations return the tensor that they were given

    def wrap(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return written[id(value)] if id(value) in written else SimulatedTensor(value)

    return tree_map(wrap, result)


class _Module(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    def get_rng_state(self, _: Any = None) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)  # the device has no generator

    def set_rng_state(self, state: Tensor, _: Any = None) -> None:
        pass


def register() -> torch.device:
    """Register the backend, once for the process, and return its device."""
    if torch._C._get_privateuse1_backend_name() != NAME:
        _setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
        library = torch.library.Library("_", "IMPL")
        library.fallback(_run, "PrivateUse1")
        _LIBRARIES.append(library)
    return torch.device(NAME, 0)


_LIBRARIES: list[torch.library.Library] = []
