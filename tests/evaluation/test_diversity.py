"""Diversity of banks and of seeds, by hand and by loops."""

from __future__ import annotations

import math

import pytest
import torch

from stepdistill.evaluation.diversity import perceptual_diversity, seed_diversity, vendi, vendi_per_prompt


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_vendi_counts_what_differs():
    """Equal rows are one sample, orthogonal ones n, two equal groups of orthogonal directions two."""
    assert vendi(torch.ones(7, 3)) == pytest.approx(1)
    assert vendi(3 * torch.eye(5)) == pytest.approx(5)
    assert vendi(torch.eye(2).repeat(4, 1)) == pytest.approx(2)


@pytest.mark.parametrize(("n", "dim"), [(5, 9), (30, 4), (6, 6)])
def test_vendi_is_the_entropy_of_the_similarity_matrix(n, dim):
    x = randn(n, dim).double()
    unit = x / x.norm(dim=1, keepdim=True)
    shares = torch.linalg.eigvals(unit @ unit.T / n).real.clamp(min=1e-300)
    assert vendi(x) == pytest.approx(math.exp(-float((shares * shares.log()).sum())), rel=1e-9)


def test_vendi_per_prompt_is_that_of_each_prompts_seeds():
    x = randn(4, 3, 6)
    x[:, 1] = x[0, 1]  # the second prompt's seeds are all alike
    got = vendi_per_prompt(x)
    assert got[1] == pytest.approx(1) and got[0] == pytest.approx(vendi(x[:, 0]))


def test_seed_diversity_is_the_mean_distance_over_pairs_of_seeds():
    x = torch.tensor([[[0.0, 0.0], [1.0, 1.0]], [[3.0, 4.0], [1.0, 1.0]], [[0.0, 8.0], [1.0, 1.0]]])  # (S=3, P=2, D=2)
    assert seed_diversity(x).tolist() == pytest.approx([(5 + 8 + 5) / 3, 0])


def test_perceptual_diversity_feeds_the_network_minus_one_to_one():
    images = torch.randint(0, 256, (3, 5, 3, 4, 4), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    seen = []

    def network(a, b):
        seen.append((float(a.min()), float(a.max())))
        return (a - b).square().mean((1, 2, 3), keepdim=True)  # as lpips: (B, 1, 1, 1)

    got = perceptual_diversity(images, network, batch_size=2)
    x = images.double() / 127.5 - 1
    expected = sum((x[i] - x[j]).square().mean((1, 2, 3)) for i, j in ((0, 1), (0, 2), (1, 2))) / 3
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)
    assert min(low for low, _ in seen) < -0.9 and max(high for _, high in seen) > 0.9


def test_bad_stacks_are_named():
    with pytest.raises(ValueError, match="at least two seeds"):
        seed_diversity(randn(1, 3, 4))
    with pytest.raises(ValueError, match="3 dimensions"):
        vendi_per_prompt(randn(3, 4))
    with pytest.raises(ValueError, match="none of zeros"):
        vendi(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="uint8"):
        perceptual_diversity(randn(2, 3, 3, 4, 4), lambda a, b: a)
    with pytest.raises(ValueError, match="one distance a pair"):
        perceptual_diversity(torch.zeros(2, 3, 3, 4, 4, dtype=torch.uint8), lambda a, b: (a - b).mean())
