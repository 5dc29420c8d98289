"""Steps on fake tensors, which have shapes, dtypes and lifetimes and no numbers, and a count of what is alive.

The code of a run takes them as it is; a few things that torch cannot do with fake tensors are put right here.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.distributed import device_mesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from stepdistill import placement
from stepdistill.models.denoiser import Denoiser


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors that operations within the block make, until nothing holds them: now, and at most.

    Storages count once however many tensors view them. Scratch space inside a single operation is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, tuple[weakref.ref[Any], int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and look at what it made."""
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.hold(leaf)
        return out

    def hold(self, tensor: Tensor) -> None:
        """Count a tensor's storage, of a sharded one this process's part, unless it counts already."""
        storage = (tensor._local_tensor if isinstance(tensor, DTensor) else tensor).untyped_storage()
        key = storage._cdata
        if key not in self._known:
            size = storage.nbytes()
            self._known[key] = weakref.ref(storage, lambda _: self._let_go(key)), size
            self.add(size)

    def add(self, size: int) -> None:
        """Count bytes that come by other ways; negative ones go."""
        self.now += size
        self.peak = max(self.peak, self.now)

    def resized(self, storage: torch.UntypedStorage) -> None:
        """Count a storage as large as it has become: sharded networks are gathered and let go so."""
        known = self._known.get(storage._cdata)
        if known is not None:
            self._known[storage._cdata] = known[0], storage.nbytes()
            self.add(storage.nbytes() - known[1])

    def _let_go(self, key: int) -> None:
        _, size = self._known.pop(key)
        self.now -= size


class Imagined(TorchDispatchMode):
    """Lets code that reads numbers run on fake tensors: flags are true, numbers are 1, whole random ones are drawn."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation."""
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # two of three operations ask for nothing else
        kwargs, aten = kwargs or {}, torch.ops.aten
        drawn = func in (aten.randint.generator, aten.randint.low_generator)
        read = func is aten._local_scalar_dense.default
        if drawn or (read and not isinstance(args[0], FakeTensor)):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if read:
            dtype = args[0].dtype
            return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1
        return func(*args, **kwargs)


@contextmanager
def cuda_autocast() -> Iterator[None]:
    """Autocast as on a card, on a CPU: norms and softmax stay in float32 there, and keep float32 for the backward pass.

    The functions are those of CUDA's list of float32 operations (torch 2 documentation of torch.amp) that the networks
    of diffusers call under autocast. They are replaced, since modes of torch do not reach what a backward pass computes
    again.
    """

    def in_float32(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return function(x.float() if torch.is_autocast_enabled("cpu") else x, *args, **kwargs)

        return call

    with ExitStack() as stack:
        for owner, name in (
            (F, "layer_norm"),
            (F, "group_norm"),
            (F, "softmax"),
            (torch, "softmax"),
            (Tensor, "softmax"),
        ):
            stack.enter_context(patch.object(owner, name, in_float32(getattr(owner, name))))
        yield


@contextmanager
def rehearsal(*, as_on_cuda: bool = False, devices: int = 1) -> Iterator[LiveBytes]:
    """Within the block new tensors are fake, and everything is on one device.

    Copies of real networks, and of networks on the meta device, are fake: ``copy.deepcopy`` allocates nothing.

    Args:
        as_on_cuda: let autocast choose dtypes as it does on a card.
        devices: how many processes share the run; this is the first of them.
    """
    books = LiveBytes()
    with ExitStack() as stack:
        for kind in (Tensor, nn.Parameter):
            stack.enter_context(patch.object(kind, "__deepcopy__", _fake_copy))
        stack.enter_context(patch.object(nn.Module, "to", lambda module, *args, **kwargs: module))  # torch cannot
        stack.enter_context(patch.object(placement, "Resting", partial(_Away, books)))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(books)
        stack.enter_context(Imagined())
        if as_on_cuda:
            stack.enter_context(cuda_autocast())
        if devices > 1:
            stack.enter_context(_others(devices, books))
        yield books


@contextmanager
def _others(devices: int, books: LiveBytes) -> Iterator[None]:
    """Be the first of several processes, of which the others do not exist; what they would send is not waited for."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    make_mesh, resize = device_mesh.init_device_mesh, torch.UntypedStorage.resize_

    def mesh(*args: Any, **kwargs: Any) -> device_mesh.DeviceMesh:
        with _disable_current_modes():  # it holds real numbers
            return make_mesh(*args, **kwargs)

    def resized(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
        resize(storage, size)
        books.resized(storage)
        return storage

    dist.init_process_group("fake", rank=0, world_size=devices, store=FakeStore())
    try:
        with (
            patch.object(device_mesh, "init_device_mesh", mesh),
            patch.object(torch.UntypedStorage, "resize_", resized),
        ):
            yield
    finally:
        dist.destroy_process_group()


def _fake_copy(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
    if tensor.device.type == "meta" and not isinstance(tensor, FakeTensor):
        new = torch.empty(tensor.shape, dtype=tensor.dtype)
    else:
        new = tensor.detach().clone()
    if isinstance(tensor, nn.Parameter):
        new = nn.Parameter(new, tensor.requires_grad)
    memo[id(tensor)] = new
    return new


class _Away(placement.Resting):
    """A network that counts while it is on the device and no longer."""

    def __init__(self, books: LiveBytes, denoiser: Denoiser, device: torch.device | str, *, pin: bool = True):
        self.books, self.here = books, False
        self.size = sum(t.untyped_storage().nbytes() for t in (*denoiser.net.parameters(), *denoiser.net.buffers()))
        books.add(-self.size)
        self.hook = denoiser.net.register_forward_pre_hook(lambda *_: self.arrive())

    def arrive(self) -> None:
        """Be on the device."""
        if not self.here:
            self.here = True
            self.books.add(self.size)

    def leave(self, *, changed: bool = False) -> None:
        """Be away again."""
        if self.here:
            self.here = False
            self.books.add(-self.size)
