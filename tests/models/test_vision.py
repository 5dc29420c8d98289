"""Discriminators on frozen networks of images: what they are shown, what is trained, and whose they are."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.testing import assert_close

from stepdistill.build import guided, new_discriminator, new_vision, open_teacher
from stepdistill.evaluation.classifier import DigitClassifier, load_digit_classifier
from stepdistill.evaluation.digits import DIGIT_CLASSIFIER
from stepdistill.models.discriminator import Discriminator
from stepdistill.models.families import Opened, open_pipeline
from stepdistill.models.nets import Nets, only_trains
from stepdistill.models.taps import Tap
from stepdistill.models.vision import Images, Vision
from stepdistill.recipe import Heads, Teacher


@pytest.fixture(scope="module")
def digits() -> Opened:
    return open_teacher(Teacher("bundled:digits"))


class Seen(nn.Module):
    """Keeps the images it is shown."""

    def __init__(self, channels: int = 3):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, images: Tensor) -> Tensor:
        self.images = images
        return self.norm(self.conv(images))


def t_of(x: Tensor) -> Tensor:
    return torch.zeros(len(x), dtype=torch.float64)


def test_images_arrive_as_the_network_was_trained() -> None:
    net, x = Seen(), 2 * torch.rand(2, 3, 4, 4) - 1
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    Vision(net, mean=mean, std=std)(x, t_of(x), {})
    by_torchvision = torchvision.transforms.v2.functional.normalize((x + 1) / 2, mean, std)
    assert_close(net.images, by_torchvision)
    Vision(net, mean=mean, std=std)(x[:, :1], t_of(x), {})  # grey: the same in all three channels
    assert_close(
        net.images, torchvision.transforms.v2.functional.normalize((x[:, :1].expand(-1, 3, -1, -1) + 1) / 2, mean, std)
    )
    Vision(net)(x, t_of(x), {})
    assert_close(net.images, x)
    Vision(net, Images(size=9))(x, t_of(x), {})
    assert net.images.shape == (2, 3, 9, 9)


def test_frames_of_a_video_stand_side_by_side() -> None:
    net, video = Seen(), torch.randn(2, 3, 5, 4, 4)
    disc = Discriminator(Vision(net), (Tap("conv", 4),), width=8)
    (features,) = disc.features(video, t_of(video), {})
    assert_close(net.images, torch.cat([video[i].transpose(0, 1) for i in range(2)]))
    assert features.shape == (2, 4, 20, 4)
    assert_close(features[1, :, 8:12], net.conv(video[1, :, 2][None])[0])


def test_nobody_trains_the_network_or_the_decoder_and_the_sample_is_reached_through_both() -> None:
    net, decoder = Seen(), nn.Conv2d(2, 3, 1)
    vision = Vision(net, Images(decoder, decoder))
    disc = Discriminator(vision, (Tap("norm", 4),), width=8)
    before = copy.deepcopy(vision.state_dict())
    disc.train()
    vision.train()
    assert not net.norm.training and not any(p.requires_grad for p in vision.parameters())
    x = torch.randn(2, 2, 4, 4, requires_grad=True)
    nets = Nets({"disc": disc})
    with only_trains(nets, ("disc",)) as moved:
        disc(x, t_of(x), {"labels": torch.ones(2)}).mean().backward()
    assert {id(p) for p in moved} == {id(p) for p in disc.parameters()} == {id(p) for p in disc.heads.parameters()}
    assert float(x.grad.abs().sum()) > 0
    assert all(p.grad is None for p in vision.parameters())
    after = vision.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)  # batch statistics among them
    assert set(disc.state_dict()) == {f"heads.{k}" for k in disc.heads.state_dict()}


def test_the_judge_of_digits_is_read_layer_by_layer(digits: Opened) -> None:
    nets = Nets({"teacher": guided(digits, Teacher("bundled:digits"))})
    disc = new_discriminator(digits, Heads(backbone="judge", width=8), nets)
    classifier = load_digit_classifier(DIGIT_CLASSIFIER)
    assert isinstance(disc.backbone.net, DigitClassifier)
    x = torch.randn(3, 1, 8, 8)
    h1 = classifier.conv1(x)
    h2 = classifier.norm2(classifier.conv2(nn.functional.silu(h1)))
    h3 = classifier.norm3(classifier.conv3(nn.functional.avg_pool2d(nn.functional.silu(h2), 2)))
    for features, by_hand in zip(disc.features(x, t_of(x), {}), (h1, h2, h3), strict=True):
        assert_close(features, by_hand)
    assert disc(x, t_of(x), {}).shape == (3, 64 + 64 + 16)
    (only,) = new_discriminator(digits, Heads("judge", ("norm3",), 8), nets).features(x, t_of(x), {})
    assert_close(only, h3)


def test_the_judge_of_shapes_sees_what_latents_decode_to() -> None:
    opened = open_teacher(Teacher("bundled:shapes-sd"))
    vision, taps = new_vision(opened, "judge")
    latents = torch.randn(2, *opened.sample_shape, requires_grad=True)
    disc = Discriminator(vision, taps, width=8)
    seen = []
    handle = vision.net.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    logits = disc(latents, t_of(latents), {})
    handle.remove()
    assert_close(seen[0], opened.decode(latents.detach()), rtol=1e-4, atol=1e-4)
    logits.sum().backward()
    assert float(latents.grad.abs().sum()) > 0
    assert all(p.grad is None for p in opened.pipeline.vae.parameters())
    assert vision.images.decoder is opened.pipeline.vae  # so that it moves to the run's device


@pytest.fixture
def untrained_vgg(monkeypatch: pytest.MonkeyPatch) -> None:
    """VGG16-BN of the real class and random weights, in place of a download."""
    make = torchvision.models.vgg16_bn

    def vgg16_bn(*, weights: object) -> nn.Module:
        assert weights is torchvision.models.VGG16_BN_Weights.IMAGENET1K_V1
        with torch.device("meta"):
            net = make(weights=None)
        net.features = net.features.to_empty(device="cpu")
        for name, value in net.features.state_dict().items():
            value.normal_(std=0.05) if name.endswith("weight") and value.ndim == 4 else value.fill_(1)
        return net

    monkeypatch.setattr(torchvision.models, "vgg16_bn", vgg16_bn)


def test_vgg_is_read_where_its_blocks_end(untrained_vgg: None) -> None:
    opened = open_pipeline(importlib.import_module("tests.tiny.sd").pipeline())
    vision, taps = new_vision(opened, "vgg16_bn")
    layers = list(vision.net)
    for tap in taps:
        assert isinstance(layers[int(tap.name)], nn.ReLU) and isinstance(layers[int(tap.name) + 1], nn.MaxPool2d)
    assert vision.images.size == 224
    disc = Discriminator(vision, taps, width=4)
    latents = torch.randn(1, *opened.sample_shape, requires_grad=True)
    maps = disc.features(latents, t_of(latents), {})
    assert [tuple(m.shape[1:]) for m in maps] == [(128, 112, 112), (256, 56, 56), (512, 28, 28), (512, 14, 14)]
    disc.judge(maps).sum().backward()
    assert float(latents.grad.abs().sum()) > 0


def test_a_teacher_that_has_no_judge_is_told_what_to_read_instead(digits: Opened) -> None:
    opened = open_pipeline(importlib.import_module("tests.tiny.sd").pipeline())
    with pytest.raises(ValueError, match=r"heads.backbone: 'judge' is for the bundled digits and shapes; of Stable"):
        new_vision(opened, "judge")
    nets = Nets({"teacher": guided(digits, Teacher("bundled:digits"))})
    with pytest.raises(ValueError, match=r"heads.taps: 'conv9' is none of judge's features: conv1, norm2, norm3"):
        new_discriminator(digits, Heads("judge", ("conv9",)), nets)
