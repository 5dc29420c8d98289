"""Colours and pairs, worked by hand."""

from __future__ import annotations

import pytest
import torch

from stepdistill.evaluation.comparison import contrast, paired, saturation
from stepdistill.evaluation.features import Pixels


def flat(*levels: int) -> torch.Tensor:
    return torch.tensor(levels, dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 4, 6)


def test_saturation_is_the_gap_between_channels():
    assert saturation(torch.cat([flat(255, 0, 0), flat(90, 90, 90), flat(51, 102, 0)])).tolist() == pytest.approx(
        [100, 0, 40]
    )


def test_contrast_is_the_spread_of_brightness():
    """Half black, half white: half of the range; a flat colour: none; green counts more than blue."""
    x = flat(0, 0, 0).repeat(4, 1, 1, 1)
    x[0, :, :2] = 255
    x[1] = flat(255, 30, 7)
    x[2, 1, :2], x[3, 2, :2] = 255, 255
    assert contrast(x).tolist() == pytest.approx([50, 0, 58.7 / 2, 11.4 / 2])


def test_pairs_are_compared_in_pixels_and_features():
    a = flat(0, 0, 0).repeat(2, 1, 1, 1)
    b = a.clone()
    b[1] = 51
    got = paired(a, b, Pixels(4, 6))
    assert got.pixels.tolist() == pytest.approx([0, 20])
    assert got.features.tolist() == pytest.approx([0, (24 * 0.4**2) ** 0.5], rel=1e-5)
    assert paired(a, b).features is None
    with pytest.raises(ValueError, match="one number and size"):
        paired(a, b[:1])
    with pytest.raises(ValueError, match="uint8"):
        saturation(a.float())
