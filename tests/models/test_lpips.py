"""LPIPS between the images behind samples: its formula, where its gradients go, and which recipes may ask for it."""

from __future__ import annotations

import importlib
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torchmetrics
from safetensors import safe_open
from torch import Tensor, nn
from torch.testing import assert_close
from torchvision.models import SqueezeNet1_1_Weights, squeezenet1_1

from stepdistill.build import new_lpips, open_teacher, to_images
from stepdistill.distill import distill
from stepdistill.functional.distances import L2, LPIPS, Huber
from stepdistill.models.families import open_pipeline
from stepdistill.models.nets import Nets
from stepdistill.models.vision import Perceptual
from stepdistill.objective import Batch, Step
from stepdistill.objectives import CD, CT, DMD, ECT, ICT, KD, LCM, PCM, PD, ImagineFlash, Reflow
from stepdistill.plan import plan
from stepdistill.recipe import Recipe, Teacher
from stepdistill.recipes import find
from stepdistill.sampling import Sampler, trailing
from stepdistill.schedule import RectifiedFlow
from stepdistill.student import Student

SQUEEZE = LPIPS("squeeze", size=32)


@pytest.fixture
def squeezenet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """A SqueezeNet of random weights, which lie where torchvision looks for those that it has fetched."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = squeezenet1_1(weights=None)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(net.state_dict(), folder / Path(SqueezeNet1_1_Weights.IMAGENET1K_V1.url).name)
    return net.features.eval()


def by_hand(features: nn.Module, a: Tensor, b: Tensor) -> Tensor:
    """Zhang et al., arXiv:1801.03924 eq. 1: unit length at each place, squared differences, weighted, averaged."""
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    folder = Path(torchmetrics.__file__).parent / "functional" / "image" / "lpips_models"
    weights = [w.flatten() for w in torch.load(folder / "squeeze.pth", map_location="cpu").values()]
    total = torch.zeros(len(a))
    maps = [(x - shift.view(3, 1, 1)) / scale.view(3, 1, 1) for x in (a, b)]
    for i, layer in enumerate(features):
        maps = [layer(m) for m in maps]
        if i in (1, 4, 7, 9, 10, 11, 12):  # the seven places of LPIPS's SqueezeNet
            one, other = (m / m.square().sum(1, keepdim=True).sqrt().clamp_min(1e-10) for m in maps)
            weighted = (one - other).square() * weights.pop(0).view(1, -1, 1, 1)
            total = total + weighted.sum(1).mean((1, 2))
    assert not weights
    return total


@torch.no_grad()
def test_it_is_the_papers_sum_over_layers(squeezenet: nn.Module) -> None:
    opened = open_teacher(Teacher("bundled:digits"))
    a, b = torch.rand(2, 3, 1, 8, 8) * 2 - 1
    enlarged = [
        nn.functional.interpolate(x, size=(48, 48), mode="bilinear", antialias=True).repeat(1, 3, 1, 1) for x in (a, b)
    ]
    found = new_lpips(opened, LPIPS("squeeze", size=48))(a, b)
    assert_close(found, by_hand(squeezenet, *enlarged), rtol=1e-4, atol=1e-6)
    assert (found > 0.01).all()
    assert_close(new_lpips(opened, SQUEEZE)(a, a), torch.zeros(3))


def test_gradients_reach_latents_through_the_decoder_and_nobody_else(squeezenet: nn.Module) -> None:
    opened = open_pipeline(importlib.import_module("tests.tiny.sd").pipeline())
    looks = new_lpips(opened, SQUEEZE)
    assert looks.images.decoder is opened.pipeline.vae  # so that it moves to the run's device
    a, b = torch.randn(2, 2, *opened.sample_shape)
    a.requires_grad_()
    looks(a, b).sum().backward()
    assert float(a.grad.abs().sum()) > 0 and all(p.grad is None for p in looks.parameters())
    looks.train()
    assert not any(module.training for module in looks.modules())


def test_the_gradient_is_the_numeric_derivative_of_what_people_would_see() -> None:
    class Smooth(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return (a.sin() - b.sin()).square().sum((1, 2, 3))

    opened = open_pipeline(importlib.import_module("tests.tiny.sd").pipeline())
    looks = Perceptual(Smooth(), to_images(opened, 48))
    a, b, along = torch.randn(3, 1, *opened.sample_shape)
    a.requires_grad_()
    looks(a, b).sum().backward()
    with torch.no_grad():
        numeric = (looks(a + 0.01 * along, b) - looks(a - 0.01 * along, b)).sum() / 0.02
    assert_close((a.grad * along).sum(), numeric, rtol=0.01, atol=1e-4)


def test_a_videos_distance_is_the_mean_over_its_frames() -> None:
    class Apart(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return (a - b).abs().mean((1, 2, 3), keepdim=True)

    a, b = torch.randn(2, 2, 3, 5, 4, 4)
    assert_close(Perceptual(Apart())(a, b), (a - b).abs().mean((1, 2, 3, 4)))


def short(recipe: Recipe, **fields: object) -> Recipe:
    run = replace(recipe.run, steps=4, batch=4, save_every=2, log_every=1, health_every=0)
    return replace(recipe, evaluation=None, run=run, **fields)


def test_a_run_trains_by_it_resumes_and_keeps_none_of_its_weights(squeezenet: nn.Module, tmp_path: Path) -> None:
    kd = find("digits_kd")
    data = replace(kd.data, count=8)
    recipe = short(kd, objective=KD(distance=SQUEEZE), data=data)
    done = distill(recipe, tmp_path / "run")
    apart = distill(short(kd, objective=KD(distance=L2()), data=data), tmp_path / "other")
    assert not torch.equal(done.student.net.conv_in.weight, apart.student.net.conv_in.weight)
    assert Recipe.load(tmp_path / "run" / "recipe.json") == recipe

    last = tmp_path / "run" / "checkpoints" / "00000004.safetensors"
    with safe_open(last, "pt") as kept:
        assert not any("lpips" in key for key in kept.keys())  # noqa: SIM118 (no mapping)
        end = {key: kept.get_tensor(key) for key in kept.keys()}  # noqa: SIM118
    last.unlink()
    shutil.rmtree(done.pipeline)  # as if it had been stopped after step 2
    distill(recipe, tmp_path / "run", resume=True)
    with safe_open(last, "pt") as kept:
        assert all(torch.equal(end[key], kept.get_tensor(key)) for key in end)

    (stage,) = plan(recipe, memory=True)
    looks = new_lpips(done.opened, SQUEEZE)
    assert stage.memory.weights["lpips"] == sum(t.nbytes for t in [*looks.parameters(), *looks.buffers()])


def test_reflows_premetric_is_a_naive_loop_over_samples() -> None:
    class Off(nn.Module):
        """A velocity that is wrong by what it is told."""

        def forward(self, x_t: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
            return x_t * 0.3 + t.view(-1, 1, 1, 1).to(x_t)

    def looks(a: Tensor, b: Tensor) -> Tensor:
        return (a - b).flatten(1).abs().mean(1)

    line, n, d = RectifiedFlow(), 5, 3 * 4 * 4
    student = Student(Sampler(trailing(2)), Off(), line, "velocity", lambda net, x, t, cond: net(x, t))
    path = torch.randn(n, 3, 3, 4, 4, dtype=torch.float64)
    batch, step = Batch({}, (n, 3, 4, 4), path=path), Step.at(0)
    objective = Reflow(perceptual=looks, distance=Huber(0.05))
    found = objective.student_loss(Nets({"student": student}), batch, step).total

    times, total = objective.times(line, n, Step.at(0)), 0.0
    for i in range(n):
        t, noise, image = float(times[i]), path[i, 0], path[i, -1]
        x_t = (1 - t) * image + t * noise
        v = x_t * 0.3 + t
        gap = float((v - (noise - image)).square().sum()) ** 0.5
        c = 0.05 * d**0.5
        huber = ((gap**2 + c**2) ** 0.5 - c) / d  # the paper divides by d
        total += (1 - t) * huber + float((x_t - t * v - image).abs().mean()) / t
    assert float(found) == pytest.approx(total / n, rel=1e-5)


def test_it_stands_where_images_are_compared_and_nowhere_else() -> None:
    for objective in (CD, CT, ICT, ECT, LCM, KD, PD, ImagineFlash):
        assert objective.between_images == {"distance"}
    dmd = find("digits_dmd")
    inside = replace(dmd, objective=DMD(regression=KD(distance=LPIPS())))
    assert inside.objective.regression.distance == LPIPS("vgg", 224)
    pcm = find("digits_pcm")
    with pytest.raises(
        ValueError, match=r"objective.distance: LPIPS compares images, and PCM's distance stands between others"
    ):
        replace(pcm, objective=PCM(segments=pcm.objective.segments, distance=LPIPS()))
    reflow = find("digits_reflow")
    assert replace(reflow, objective=Reflow(perceptual=LPIPS())).objective.perceptual == LPIPS()
    with pytest.raises(ValueError, match="Reflow's distance"):
        replace(reflow, objective=Reflow(distance=LPIPS()))
    with pytest.raises(RuntimeError, match="has no network until its recipe is built"):
        LPIPS()(torch.zeros(1, 1), torch.zeros(1, 1))
    with pytest.raises(ValueError, match=r"LPIPS.size must be at least 32"):
        LPIPS(size=8)
    with pytest.raises(ValueError, match=r"LPIPS.net must be vgg, alex or squeeze; got 'resnet'"):
        LPIPS("resnet")  # type: ignore[arg-type]


def test_weights_that_are_not_there_are_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("<urlopen error [Errno -2] Name or service not known>")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", offline)
    opened = open_teacher(Teacher("bundled:digits"))
    with pytest.raises(ValueError, match=r"LPIPS: torchvision's weights could not be fetched to .*checkpoints: <url"):
        new_lpips(opened, LPIPS())


def test_weights_that_are_code_are_not_run(squeezenet: nn.Module, tmp_path: Path) -> None:
    class Code:
        def __reduce__(self) -> tuple:
            return Path.touch, (tmp_path / "ran",)

    (file,) = (tmp_path / "torch" / "hub" / "checkpoints").iterdir()
    torch.save({"features.0.weight": Code()}, file)
    opened = open_teacher(Teacher("bundled:digits"))
    with pytest.raises(ValueError, match=r"torchvision's weights could not be fetched.*Weights only load failed"):
        new_lpips(opened, SQUEEZE)
    assert not (tmp_path / "ran").exists()
