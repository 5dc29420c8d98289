"""Resizes against Pillow, torchvision, open_clip and hand-worked pixels; tests/evaluation/test_peers.py has peers'."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from PIL import Image
from torchvision.transforms import InterpolationMode

from stepdistill.evaluation.resize import RESIZES, resize


def images(h: int, w: int, n: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, h, w), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def test_clean_is_pillows_bicubic_of_each_float_channel():
    """Overshoots are clipped, nothing is rounded to bytes, and batches do not mix."""
    x = images(20, 33)
    got = resize(x, 48, "clean")
    for b, c in ((0, 0), (1, 2)):
        plane = Image.fromarray(x[b, c].numpy().astype(np.float32), mode="F").resize((48, 48), Image.BICUBIC)
        np.testing.assert_array_equal(got[b, c], np.asarray(plane).clip(0, 255))
    assert got.min() == 0 and got.max() == 255 and bool((got != got.round()).any())


def test_pil_is_torchvisions_resize_of_a_picture():
    x = images(20, 33)
    picture = Image.fromarray(x[1].permute(1, 2, 0).numpy())
    expected = TF.pil_to_tensor(TF.resize(picture, [24, 24], InterpolationMode.BICUBIC))
    torch.testing.assert_close(resize(x, 24, "pil")[1], expected.float(), rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(20, 33), (41, 20), (24, 24), (37, 53), (20, 24)])
def test_clip_is_open_clips_own_transform(shape):
    from open_clip.transform import image_transform

    x = images(*shape)
    transform = image_transform(16, is_train=False, mean=(0, 0, 0), std=(1, 1, 1))
    expected = torch.stack([transform(Image.fromarray(i.permute(1, 2, 0).numpy())) for i in x])
    torch.testing.assert_close(resize(x, 16, "clip") / 255, expected, rtol=0, atol=1e-6)


def test_tensorflow_puts_corners_on_corners():
    """Two pixels to four: outputs lie at 0, 0.5, 1, 1.5 of the input; 1.5 is beyond the last pixel and stays there."""
    x = torch.tensor([[0, 100], [40, 140]], dtype=torch.uint8).expand(1, 3, 2, 2)
    got = resize(x, 4, "tensorflow")[0, 0]
    assert got[0].tolist() == [0, 50, 100, 100]
    assert got[:, 0].tolist() == [0, 20, 40, 40]
    assert got[1, 1] == 70


def test_antialias_is_what_parts_torchmetrics_from_pytorch_fid():
    """A checkerboard shrunk by four: averaged to grey, or whatever lies near the sample."""
    board = (255 * ((torch.arange(64)[:, None] // 2 + torch.arange(64) // 2) % 2)).to(torch.uint8).expand(1, 3, 64, 64)
    spread = {how: float(resize(board, 13, how).std()) for how in ("torchmetrics", "legacy_pytorch", "cmmd", "clean")}
    assert spread["torchmetrics"] < 20 and spread["clean"] < 25
    assert spread["legacy_pytorch"] > 60 and spread["cmmd"] > 60


@pytest.mark.parametrize("how", RESIZES)
def test_images_of_the_right_size_stay_as_they_are(how):
    x = images(12, 12)
    torch.testing.assert_close(resize(x, 12, how), x.float(), rtol=0, atol=1e-4)


def test_none_and_unknown_resizes_are_refused():
    with pytest.raises(ValueError, match="images must be 8x8 under resize 'none', got 12x9"):
        resize(images(12, 9), 8, "none")
    with pytest.raises(ValueError, match="one of none, clean"):
        resize(images(8, 8), 8, "bicubic")
