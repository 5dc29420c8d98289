"""Attention of one network at a time: the same numbers, nobody else touched, everything put back."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from diffusers.models import attention_dispatch
from torch import Tensor

from stepdistill import kernels
from stepdistill.attention import fused_qk, use_attention
from stepdistill.attention.dispatcher import backend_name
from stepdistill.attention.processors import CrossAttention, FluxAttention
from stepdistill.models.families import open_pipeline
from tests.tiny import flux, pixart, sd, sd3, sdxl, wan

REGISTRY = attention_dispatch._AttentionBackendRegistry


def answer(module) -> tuple[torch.nn.Module, callable]:
    """A network and its answer for one prompt, the same every time."""
    opened = open_pipeline(module.pipeline(), size=getattr(module, "SIZE", None))
    cond = opened.encode(["ab c"])
    x = torch.randn(1, *opened.sample_shape)
    t = torch.full((1,), 0.7)

    def run() -> Tensor:
        with torch.no_grad():
            return opened.denoiser(x, t, cond)

    return opened.denoiser.net, run


@pytest.mark.parametrize("module", [sd, sdxl, pixart, sd3, flux, wan], ids=lambda m: m.__name__)
@pytest.mark.parametrize("backend", [None, "naive"])
def test_the_same_answer_and_the_same_processors_afterwards(module, backend: str | None) -> None:
    net, run = answer(module)
    before, expected = dict(net.attn_processors), run()
    with use_attention(net, backend):
        assert all(net.attn_processors[name] is not p for name, p in before.items())
        found = run()
    torch.testing.assert_close(found, expected, rtol=0, atol=3e-5)
    assert all(net.attn_processors[name] is p for name, p in before.items())
    assert torch.equal(run(), expected)


def test_processors_come_back_after_an_error() -> None:
    net = sd.unet()
    before = dict(net.attn_processors)
    with pytest.raises(KeyError), use_attention(net, "naive"):
        raise KeyError
    assert all(net.attn_processors[name] is p for name, p in before.items())


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """The backends of the calls of our attention, from processors and from diffusers' dispatcher."""
    calls: list[str | None] = []
    from stepdistill.attention import dispatcher, processors

    def spy(*args, prefer=None, **kwargs):
        calls.append(prefer)
        return kernels.steer_attention(*args, prefer=prefer, **kwargs)

    for module in (dispatcher, processors):
        monkeypatch.setattr(module, "steer_attention", spy)
    return calls


@pytest.mark.parametrize("module", [sd3, flux], ids=lambda m: m.__name__)
def test_the_student_switches_and_the_teacher_does_not(module, counted: list[str | None]) -> None:
    """diffusers' own set_attention_backend turns every network whose processors name none."""
    student, run_student = answer(module)
    _, run_teacher = answer(module)
    active = REGISTRY._active_backend
    with use_attention(student, "naive"):
        run_teacher()
        assert counted == []
        run_student()
        assert counted and set(counted) == {"naive"}
        assert REGISTRY._active_backend is active
    counted.clear()
    run_student()
    assert counted == []


def test_a_processor_shared_with_the_teacher_is_left_alone(counted: list[str | None]) -> None:
    (student, _), (teacher, run_teacher) = answer(flux), answer(flux)
    shared = next(iter(student.attn_processors.values()))
    for net in (student, teacher):
        net.set_attn_processor(shared)
    with use_attention(student, "naive"):
        run_teacher()
    assert counted == []


def test_what_the_backend_cannot_do_goes_to_the_native_one(counted: list[str | None]) -> None:
    """With a backend that does not name them, diffusers drops masks silently."""
    q = torch.randn(1, 5, 2, 8)
    mask = torch.tensor([True, True, False, True, False]).expand(1, 1, 5, 5)
    for options in ({"attn_mask": mask}, {"is_causal": True}, {}):
        found, native = (
            attention_dispatch.dispatch_attention_fn(q, q, q, backend=backend, **options)
            for backend in (backend_name("naive"), attention_dispatch.AttentionBackendName.NATIVE)
        )
        torch.testing.assert_close(found, native)
    assert counted == ["naive"]


def test_the_dispatchers_name_is_one_name() -> None:
    name = backend_name("naive")
    assert name is backend_name("naive") and name is not backend_name(None)
    assert attention_dispatch.AttentionBackendName("stepdistill_naive") is name
    assert copy.deepcopy(name) is name and pickle.loads(pickle.dumps(name)) is name
    with pytest.raises(ValueError, match="none of triton"):
        backend_name("flash")


def test_under_torch_compile_in_one_graph() -> None:
    net, _ = answer(flux)
    attn = net.transformer_blocks[0].attn
    x, text = torch.randn(1, 4, 32), torch.randn(1, 3, 32)
    with use_attention(net, "naive"), torch.no_grad():
        torch._dynamo.reset()
        found = torch.compile(attn, backend="aot_eager", fullgraph=True)(x, text)
        torch.testing.assert_close(found, attn(x, text))


def test_a_backend_that_cannot_run_here_is_refused_before_anything_runs() -> None:
    net = sd.unet()
    for backend in ("xformers", "triton") if not torch.cuda.is_available() else ():
        if backend == "triton" and kernels.dispatch.interpreting():
            continue
        with (
            pytest.raises(ValueError, match=f"backend '{backend}' cannot run UNet2DConditionModel"),
            use_attention(net, backend),
        ):
            pass
    with pytest.raises(ValueError, match="none of triton"), use_attention(net, "flash"):
        pass
    with pytest.raises(ValueError, match="no attention processors"), use_attention(torch.nn.Linear(2, 2), None):
        pass


def test_foreign_processors_are_refused_and_stay() -> None:
    net = sd.unet()
    name, own = next(iter(net.attn_processors.items()))

    class Foreign:
        def __call__(self, *args, **kwargs):
            raise AssertionError

    net.set_attn_processor({**net.attn_processors, name: Foreign()})
    with pytest.raises(ValueError, match="has a Foreign"), use_attention(net, "naive"):
        pass
    assert isinstance(net.attn_processors[name], Foreign)
    net.set_attn_processor({**net.attn_processors, name: own})


def test_masks_and_images_through_the_unet_processor() -> None:
    """The VAE's form: (B, C, H, W) with a group norm and a residual; and a mask on the keys."""
    from diffusers.models.attention_processor import Attention, AttnProcessor2_0

    vae = Attention(8, heads=2, dim_head=4, norm_num_groups=4, residual_connection=True, rescale_output_factor=1.5)
    cross = Attention(8, cross_attention_dim=6, heads=2, dim_head=4)
    x, context = torch.randn(2, 8, 3, 3), torch.randn(2, 5, 6)
    bias = torch.zeros(2, 1, 5).masked_fill(torch.rand(2, 1, 5) < 0.4, -1e4)
    for attn, args in ((vae, (x,)), (cross, (x.flatten(2).mT, context, bias))):
        found, true = (attn.set_processor(p) or attn(*args) for p in (CrossAttention("naive"), AttnProcessor2_0()))
        torch.testing.assert_close(found, true, rtol=0, atol=1e-5)


def test_fused_queries_and_keys_of_flux() -> None:
    net, run = answer(flux)
    for module in net.modules():  # gains of one would hide whose is whose
        if isinstance(module, torch.nn.RMSNorm):
            module.weight.data.uniform_(0.5, 2)
    expected = run()
    with fused_qk(net):
        assert all(isinstance(p, FluxAttention) for p in net.attn_processors.values())
        torch.testing.assert_close(run(), expected, rtol=0, atol=3e-5)
        with use_attention(net, "naive"):  # both at once
            torch.testing.assert_close(run(), expected, rtol=0, atol=3e-5)
    assert torch.equal(run(), expected)
    with pytest.raises(ValueError, match="UNet2DConditionModel has a"), fused_qk(sd.unet()):
        pass
