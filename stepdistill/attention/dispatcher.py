"""Our attention in diffusers' dispatcher, for single networks: its own switch also turns the teacher's.

All private API of diffusers 0.36 to 0.42, kept in this file. A backend's name is a member of an enumeration there,
which is extended; a network takes part by ``processor._attention_backend``, and the process-wide choice stays.
"""

from __future__ import annotations

from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch import Tensor

from stepdistill.kernels import BACKENDS, Backend, steer_attention


def backend_name(backend: Backend | None) -> AttentionBackendName:
    """The dispatcher's name of one of our backends (None: whichever our dispatch chooses), registered if it is new.

    Raises:
        ValueError: for an unknown backend.
        RuntimeError: if this diffusers keeps its backends otherwise.
    """
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is none of {', '.join(BACKENDS)}")
    value = "stepdistill" if backend is None else f"stepdistill_{backend}"
    if value in AttentionBackendName._value2member_map_:
        return AttentionBackendName(value)
    if not hasattr(_AttentionBackendRegistry, "_backends") or not issubclass(AttentionBackendName, str):
        raise RuntimeError("this diffusers keeps its attention backends in an unknown way; 0.36 to 0.42 are known")
    member = str.__new__(AttentionBackendName, value)
    member._name_ = value.upper()
    member._value_ = value
    member._sort_order_ = len(AttentionBackendName._member_names_)
    AttentionBackendName._member_names_.append(member._name_)
    AttentionBackendName._member_map_[member._name_] = member
    AttentionBackendName._value2member_map_[value] = member
    _AttentionBackendRegistry.register(member)(_attend(backend))
    return member


def _attend(backend: Backend | None):
    """What the dispatcher calls. It names every argument: those that a backend does not name are dropped silently."""

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        _parallel_config: object | None = None,
    ) -> Tensor:
        if attn_mask is not None or dropout_p or is_causal or enable_gqa or _parallel_config is not None:
            native = _AttentionBackendRegistry._backends[AttentionBackendName.NATIVE]
            return native(
                query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, _parallel_config=_parallel_config
            )
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))  # (B, S, H, D) there
        return steer_attention(q, [(k, v)], (1.0,), scale=scale, prefer=backend).transpose(1, 2)

    return attend
