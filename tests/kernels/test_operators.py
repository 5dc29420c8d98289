"""The registered operators: torch's own checks, torch.compile, forward mode, second derivatives, autocast."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from stepdistill.kernels import (
    Stream,
    block_sparse_attention,
    branch_attention,
    dispatch,
    merge_lse,
    prefer,
    qk_norm_rope,
    steer_attention,
)
from stepdistill.kernels.block_sparse import to_index

MASK = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 0]], dtype=torch.bool)


class Operation(NamedTuple):
    """A function of tensors and a backend, and the operator behind it."""

    run: Callable[..., Tensor]
    tensors: Callable[[], list[Tensor]]
    operator: str


def _x(*shape: int) -> Tensor:
    return torch.randn(shape, requires_grad=True)


def _steer(q, k, v, w, backend=None):
    return steer_attention(q, [(k, v), (v, k)], w, lengths=torch.tensor([[3, 2]], device=q.device), prefer=backend)


def _apart(q, k, v, backend=None):
    return sum(z * (i + 1) for i, z in enumerate(branch_attention(q, [(k, v), (v, k)], prefer=backend)))


def _rope(x, gain, backend=None):
    stream = Stream(*x.unbind(2), gain, gain)
    angles = torch.arange(stream.q.shape[1] * 2.0, device=x.device).reshape(-1, 2)
    two = [stream, stream._replace(q=stream.k)]
    angles = torch.cat([angles, angles])
    q, k, v = qk_norm_rope(two, (angles.cos(), angles.sin()), eps=1e-6, prefer=backend)
    return q * 2 + k * v


def _sparse(q, k, v, backend=None):
    return block_sparse_attention(q, k, v, to_index(MASK.to(q.device), 16), prefer=backend)


OPERATIONS = {
    "steer_attention": Operation(
        _steer, lambda: [_x(1, 2, 3, 4), _x(1, 2, 3, 4), _x(1, 2, 3, 4), torch.tensor([1.0, -0.5], requires_grad=True)],
        "steer_attention",
    ),
    "branch_attention": Operation(_apart, lambda: [_x(1, 1, 3, 4) for _ in range(3)], "steer_attention"),
    "qk_norm_rope": Operation(_rope, lambda: [_x(1, 2, 3, 2, 4), _x(4)], "qk_norm_rope"),
    "block_sparse_attention": Operation(_sparse, lambda: [_x(1, 1, 40, 4) for _ in range(3)], "block_sparse_attention"),
}  # fmt: skip


@pytest.fixture(params=OPERATIONS)
def operation(request: pytest.FixtureRequest) -> Operation:
    """Each operation in turn."""
    return OPERATIONS[request.param]


@pytest.fixture
def device(one_setting) -> str:
    """The interpreter's, or the GPU."""
    if one_setting.device == "cuda":
        pytest.skip("float32 inputs; the interpreter serves")
    return one_setting.device


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_torch_finds_no_fault_with_the_registration(device: str) -> None:
    quick = ("test_schema", "test_autograd_registration", "test_faketensor")
    q, k = _x(1, 1, 2, 4), _x(1, 1, 1, 4)
    steer = torch.ops.stepdistill.steer_attention.default
    torch.library.opcheck(steer, (q, [k, k], [k, k], torch.ones(1, 2), torch.ones(1, 2, dtype=torch.int32), 0.5, False))
    torch.library.opcheck(steer, (q, [k], [k], torch.ones(1, 1), None, 0.5, True), test_utils=quick)
    x = [_x(1, 1, 1, 4), _x(1, 2, 1, 4)]
    gains = [_x(4), _x(4)]
    angles = torch.ones(3, 2), torch.zeros(3, 2)
    for values in (x, []):
        torch.library.opcheck(
            torch.ops.stepdistill.qk_norm_rope.default, (x, x, values, gains, gains, *angles, 1e-6, True, False),
            test_utils=quick,
        )  # fmt: skip
    index, count, block = to_index(MASK[:1, :1], 16)
    torch.library.opcheck(
        torch.ops.stepdistill.block_sparse_attention.default, (q, k, k, index, count, block, 0.5), test_utils=quick
    )


@pytest.mark.parametrize("backend", ["triton", None])
def test_one_graph_under_torch_compile(operation: Operation, device: str, backend: str | None) -> None:
    tensors = operation.tensors()
    torch._dynamo.reset()
    compiled = torch.compile(operation.run, fullgraph=True, backend="aot_eager", dynamic=False)
    for run in (compiled, operation.run):
        out = run(*tensors, backend=backend)
        grads = torch.autograd.grad(out.square().sum(), tensors)
        if run is compiled:
            found = [out, *grads]
    torch.testing.assert_close(found, [out, *grads], rtol=0, atol=2e-5)


def test_forward_mode_takes_the_naive_form(operation: Operation, device: str) -> None:
    """A registered operator without a forward rule gives a zero tangent and no error, under which sCM would train."""
    tensors = [t.detach().double() for t in operation.tensors()]
    tangents = [torch.randn_like(t) for t in tensors]
    _, found = torch.func.jvp(operation.run, tuple(tensors), tuple(tangents))
    h = 1e-6
    ahead, behind = (
        operation.run(*[t + s * h * d for t, d in zip(tensors, tangents, strict=True)], backend="naive")
        for s in (1, -1)
    )
    true = (ahead - behind) / (2 * h)
    assert found.abs().max() > 0.01
    torch.testing.assert_close(found, true, rtol=1e-6, atol=1e-7)


def test_forward_mode_under_torch_compile(device: str) -> None:
    x = torch.randn(1, 1, 3, 4, dtype=torch.float64)

    def tangent(x: Tensor) -> Tensor:
        return torch.func.jvp(_apart, (x, x, x), (x, 2 * x, x.cos()))[1]

    torch._dynamo.reset()
    found = torch.compile(tangent, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(found, tangent(x))
    assert found.abs().max() > 0.01


def test_forward_mode_is_refused_by_whatever_has_no_tangents(operation: Operation, device: str) -> None:
    tensors = tuple(t.detach() for t in operation.tensors())
    with pytest.raises(ValueError, match="no forward-mode derivative"):
        torch.func.jvp(lambda *x: operation.run(*x, backend="triton"), tensors, tensors)
    assert not dispatch.forward_mode()
    with torch.autograd.forward_ad.dual_level():
        assert dispatch.forward_mode()
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            torch.ops.stepdistill.block_sparse_attention(
                *[torch.ones(1, 1, 3, 4)] * 3, *to_index(MASK[:1, :1], 16), 0.5
            )


def test_second_derivatives_are_refused_and_the_naive_form_has_them(operation: Operation, device: str) -> None:
    def slope(backend: str) -> Tensor:
        tensors = operation.tensors()
        grad = torch.autograd.grad(
            operation.run(*tensors, backend=backend).square().sum(), tensors[0], create_graph=True
        )
        return torch.autograd.grad(grad[0].square().sum(), tensors[0])[0]

    with pytest.raises(RuntimeError, match=r"stepdistill.*_backward"):
        slope("triton")
    assert slope("naive").abs().max() > 0
    with prefer("naive"):
        assert slope(None).abs().max() > 0


@pytest.mark.parametrize("backend", ["triton", "naive", None])
def test_autocast_casts_what_goes_into_attention(device: str, backend: str | None) -> None:
    q = _x(1, 1, 3, 4)
    for run in (
        lambda: steer_attention(q, [(q, q)], (1.0,), prefer=backend),
        lambda: _sparse(*[_x(1, 1, 40, 4)] * 3, backend),
    ):
        with torch.autocast("cpu", torch.bfloat16):
            assert run().dtype == torch.bfloat16
        assert run().dtype == torch.float32


def test_activation_checkpointing(operation: Operation, device: str) -> None:
    tensors = operation.tensors()
    out = checkpoint(lambda *x: operation.run(*x, backend="triton"), *tensors, use_reentrant=False)
    found = torch.autograd.grad(out.square().sum(), tensors)
    true = torch.autograd.grad(operation.run(*tensors, backend="triton").square().sum(), tensors)
    torch.testing.assert_close(found, true)


def test_merging_is_differentiable_twice() -> None:
    o, lse = torch.randn(2, 1, 3, 4, dtype=torch.float64), torch.randn(2, 1, 3, dtype=torch.float64)

    def run(o, lse):
        return merge_lse([(o[0], lse[0]), (o[1], lse[1])])

    assert torch.autograd.gradgradcheck(run, (o.requires_grad_(), lse.requires_grad_()))
