"""Networks made out of a teacher's: what is kept, what is left out, what starts at zero."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from stepdistill.models.families.base import guidance_embedding
from stepdistill.models.lora import Adapted
from stepdistill.models.surgery import bare_copy, told_guidance, with_layers
from tests.tiny import sd, sd3, unet2d


def count(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def test_blocks_are_kept_evenly_first_and_last_among_them() -> None:
    torch.manual_seed(0)
    net = sd3.transformer(num_layers=5)
    small = with_layers(net, 3)
    ours, theirs = small.state_dict(), net.state_dict()
    for mine, kept in enumerate((0, 2, 4)):
        block = {k: v for k, v in ours.items() if k.startswith(f"transformer_blocks.{mine}.")}
        assert block
        for key, value in block.items():
            assert torch.equal(value, theirs[key.replace(f".{mine}.", f".{kept}.", 1)]), key
    assert torch.equal(ours["proj_out.weight"], theirs["proj_out.weight"])
    assert count(small) < count(net)


def test_a_transformer_without_its_idle_blocks_computes_the_same() -> None:
    """If the blocks in between change nothing, leaving them out changes nothing."""
    torch.manual_seed(0)
    net = sd3.transformer(num_layers=3).eval()
    for p in net.transformer_blocks[1].parameters():
        nn.init.zeros_(p)  # the gates of adaLN too
    args = {
        "hidden_states": torch.randn(2, 4, 8, 8), "encoder_hidden_states": torch.randn(2, 5, 32),
        "pooled_projections": torch.randn(2, 32), "timestep": torch.tensor([10.0, 900.0]), "return_dict": False,
    }  # fmt: skip
    assert_close(with_layers(net, 2).eval()(**args)[0], net(**args)[0])


@pytest.mark.parametrize("net", [lambda: sd.unet(layers_per_block=2), lambda: unet2d.pipeline(layers_per_block=3).unet])
def test_unets_lose_layers_of_each_block(net: object) -> None:
    torch.manual_seed(0)
    large = net()
    small = with_layers(large, 1)
    assert small.config.layers_per_block == 1
    ours, theirs = small.state_dict(), large.state_dict()
    up = len(large.up_blocks[0].resnets) - 1
    assert torch.equal(ours["up_blocks.0.resnets.1.conv1.weight"], theirs[f"up_blocks.0.resnets.{up}.conv1.weight"])
    assert torch.equal(ours["down_blocks.0.resnets.0.conv1.weight"], theirs["down_blocks.0.resnets.0.conv1.weight"])
    assert count(small) < count(large)


@pytest.mark.parametrize(("layers", "said"), [(3, "has 3 .num_layers.; use 1 to 2"), (7, "use 1 to 2")])
def test_more_layers_than_there_are_is_refused(layers: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        with_layers(sd3.transformer(), layers)


def test_a_network_without_countable_layers_is_refused() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = {"width": 3}

    with pytest.raises(ValueError, match="has no num_layers"):
        with_layers(Plain(), 1)


def test_a_told_unet_starts_where_the_teacher_is_and_listens() -> None:
    torch.manual_seed(0)
    net = sd.unet().eval()
    told = told_guidance(net).eval()
    x, t, c = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.randn(2, 5, 16)

    def out(scales: list[float]) -> torch.Tensor:
        embedded = guidance_embedding(torch.tensor(scales), told.config.time_cond_proj_dim)
        return told(x, t, encoder_hidden_states=c, timestep_cond=embedded, return_dict=False)[0]

    plain = net(x, t, encoder_hidden_states=c, return_dict=False)[0]
    assert_close(out([1.0, 7.0]), plain, rtol=0, atol=0)
    out([1.0, 7.0]).square().sum().backward()
    assert float(told.time_embedding.cond_proj.weight.grad.abs().sum()) > 0
    with pytest.raises(ValueError, match="has no input for the guidance scale"):
        told_guidance(sd3.transformer())


def test_guidance_is_embedded_as_diffusers_pipelines_do() -> None:
    pipeline = sd.pipeline()
    scales = torch.tensor([1.0, 2.5, 7.5])
    for width in (16, 17):
        theirs = pipeline.get_guidance_scale_embedding(scales - 1, embedding_dim=width)
        assert_close(guidance_embedding(scales, width), theirs)


def test_a_bare_copy_of_an_adapted_network_has_no_adapters() -> None:
    torch.manual_seed(0)
    net = sd.unet()
    state = {k: v.clone() for k, v in net.state_dict().items()}
    Adapted(net, 4, 4.0, ("to_q",))
    copied = bare_copy(net).state_dict()
    assert copied.keys() == state.keys()
    assert all(torch.equal(copied[k], v) for k, v in state.items())
