"""Keys and values of cross-attention, which depend on the prompt alone, computed once for it.

They are the same in every step and for every seed. In MM-DiTs (SD3, FLUX) the text changes from block to block and
with time, so there is nothing to keep.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from stepdistill.inference.weights import WeightWatch, with_children


def _unet_text(net: nn.Module, text: Tensor) -> Tensor | None:
    kind = net.config.encoder_hid_dim_type
    if kind == "text_proj":
        return net.encoder_hid_proj(text)
    return text if kind is None else None  # the others mix images in


def _pixart_text(net: nn.Module, text: Tensor) -> Tensor:
    return text if net.caption_projection is None else net.caption_projection(text)


def _sana_text(net: nn.Module, text: Tensor) -> Tensor:
    return net.caption_norm(net.caption_projection(text))


def _wan_text(net: nn.Module, text: Tensor) -> Tensor:
    return net.condition_embedder.text_embedder(text)


TEXT_OF: dict[str, Callable[[nn.Module, Tensor], Tensor | None]] = {
    "UNet2DConditionModel": _unet_text,
    "PixArtTransformer2DModel": _pixart_text,
    "SanaTransformer2DModel": _sana_text,
    "WanTransformer3DModel": _wan_text,
}
"""What cross-attention reads, by class of the network: (network, ``encoder_hidden_states``) -> (B, L, D), as its own
forward makes it; None where it depends on more than the text."""

_BYPASSED_BY = ("cross_attention_kwargs", "attention_kwargs", "joint_attention_kwargs", "encoder_hidden_states_image")
"""Arguments of a network's call that change its keys and values."""


class Slot:
    """The forward of one ``to_k`` or ``to_v`` layer: what is kept of it, or what it computes."""

    def __init__(self, cache: KVCache, layer: nn.Module, index: int):
        self.cache, self.index, self.original = cache, index, layer.forward

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """See the class."""
        kept = self.cache.current
        return self.original(x, *args, **kwargs) if kept is None else kept[self.index]


class KVCache:
    """Computes a denoising network's text keys and values once for each text; exact.

    A text is the tensor itself: its storage, shape and version counter, and it is kept alive so that no other tensor
    can come to lie in its place. Everything is dropped when a layer, its adapters, its weights, device or dtype change.
    Calls with gradients, and with arguments that change keys or values (LoRA scales, images), go through.

    Args:
        net: a network whose class is in ``TEXT_OF``.
        entries: texts that are remembered; the one unused for longest goes first.
    """

    def __init__(self, net: nn.Module, entries: int = 4):
        self.net, self.entries = net, entries
        self.current: list[Tensor] | None = None
        """What the layers answer in the call that is under way."""
        self._given = False
        self._kept: OrderedDict[tuple[object, ...], tuple[Tensor, list[Tensor]]] = OrderedDict()
        self._position = list(inspect.signature(type(net).forward).parameters).index("encoder_hidden_states") - 1
        self._attentions = [m for m in net.modules() if _reads_text(m)]
        self._patched: list[nn.Module] = []
        self._hooks = [
            net.register_forward_pre_hook(self._before, with_kwargs=True),
            net.register_forward_hook(self._after, always_call=True),
        ]
        self._install()
        self._watch = WeightWatch(self._watched)

    def remove(self) -> None:
        """Leave the network as it was."""
        for hook in self._hooks:
            hook.remove()
        self._uninstall()
        self._kept.clear()

    def check(self) -> None:
        """Forget everything if a weight was rewritten in a way that ``_version`` does not show."""
        if self._watch.rewritten():
            self._forget()

    def find(self, text: Tensor) -> list[Tensor] | None:
        """All keys and values of a text, (B, L, ...) each; None where the network mixes more than text in."""
        if self._watch.moved():
            self._forget()
        version = None if text.is_inference() else text._version
        key = (text.data_ptr(), text.shape, text.stride(), text.dtype, text.device, version)
        kept = self._kept.pop(key, None)
        if kept is None:
            self.current = None  # or the layers would answer with the last text's
            # ordinary tensors whoever calls, in inference mode or not: compiled code tells them apart
            with torch.inference_mode(False), torch.no_grad():
                read = TEXT_OF[type(self.net).__name__](self.net, text)
                if read is None:
                    return None
                kept = text, [layer(read) for layer in self._patched]
        self._kept[key] = kept
        if len(self._kept) > self.entries:
            self._kept.popitem(last=False)
        return kept[1]

    @contextmanager
    def answering(self, kept: list[Tensor] | None) -> Iterator[None]:
        """Answer with these whatever text the network is called with: within a graph, which cannot look for itself."""
        self.current, self._given = kept, True
        try:
            yield
        finally:
            self.current, self._given = None, False

    @property
    def layers(self) -> int:
        """How many keys and values are kept for a text."""
        return len(self._patched)

    def _install(self) -> None:
        for attention in self._attentions:
            for layer in (attention.to_k, attention.to_v):
                layer.forward = Slot(self, layer, len(self._patched))
                self._patched.append(layer)

    def _uninstall(self) -> None:
        for layer in self._patched:
            del layer.forward
        self._patched.clear()

    def _watched(self) -> list[nn.Module]:
        layers = [layer for a in self._attentions for layer in (a.to_k, a.to_v)]
        return with_children([*layers, *_projections(self.net)])

    def _forget(self) -> None:
        self._kept.clear()
        self._uninstall()
        self._install()  # a LoRA puts other layers in their place
        self._watch.remember()

    def _before(self, net: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._given or torch.compiler.is_compiling():
            return
        self.current = None
        given = kwargs.get("encoder_hidden_states", args[self._position] if len(args) > self._position else None)
        if given is None or torch.is_grad_enabled() or any(kwargs.get(name) for name in _BYPASSED_BY[:3]):
            return
        if kwargs.get(_BYPASSED_BY[3]) is None:
            self.current = self.find(given)

    def _after(self, net: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not (self._given or torch.compiler.is_compiling()):
            self.current = None


def takes_kv_cache(net: nn.Module) -> bool:
    """Whether a network has cross-attention whose keys and values depend on the text alone."""
    return type(net).__name__ in TEXT_OF and any(map(_reads_text, net.modules()))


def _reads_text(module: nn.Module) -> bool:
    if not getattr(module, "is_cross_attention", False) or not isinstance(getattr(module, "to_k", None), nn.Module):
        return False  # an Attention of diffusers, of whichever of its classes
    return getattr(module, "norm_cross", None) is None and getattr(module, "added_kv_proj_dim", None) is None


def _projections(net: nn.Module) -> list[nn.Module]:
    """What the text passes before any attention."""
    found = [getattr(net, name, None) for name in ("encoder_hid_proj", "caption_projection", "caption_norm")]
    found.append(getattr(getattr(net, "condition_embedder", None), "text_embedder", None))
    return [module for module in found if module is not None]
