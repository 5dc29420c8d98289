"""Numbers of clean-fid, torch-fidelity and pytorch-fid on the same features, pixels and files.

tests/golden/peers.json has theirs, with versions and the command that asks them again.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from stepdistill.evaluation.extractors import inception as inception_features
from stepdistill.evaluation.metrics import MeanCov, frechet_distance, precision_recall
from stepdistill.evaluation.mmd import kid
from stepdistill.evaluation.resize import resize
from stepdistill.evaluation.statistics_files import load_statistics
from tests.evaluation import tiny_inception as inception
from tests.golden.peers import PLACES, banks, picture

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "peers.json").read_text())
BANKS = {name: tuple(map(torch.from_numpy, pair)) for name, pair in banks().items()}
PICTURE = torch.from_numpy(picture()).permute(2, 0, 1)[None]


@pytest.mark.parametrize("name", BANKS)
def test_frechet_distance_agrees_to_a_millionth(name):
    real, fake = BANKS[name]
    ours = frechet_distance(MeanCov.of(real), MeanCov.of(fake))
    for peer, theirs in GOLDEN["frechet"][name].items():
        assert ours == pytest.approx(theirs, rel=1e-6), peer


@pytest.mark.parametrize("name", BANKS)
def test_kid_of_one_subset_of_all_agrees(name):
    real, fake = BANKS[name]
    n = min(len(real), len(fake))
    for peer, theirs in GOLDEN["kid"][name].items():
        assert kid(real[:n], fake[:n]) == pytest.approx(theirs, rel=1e-9), peer


@pytest.mark.parametrize("name", BANKS)
def test_precision_and_recall_agree_at_their_k(name):
    assert precision_recall(*BANKS[name], k=3) == pytest.approx(GOLDEN["precision_recall"][name]["torch-fidelity"])


@pytest.mark.parametrize("how", ["clean", "legacy_pytorch", "tensorflow"])
def test_resized_pixels_agree(how):
    got, golden = resize(PICTURE, 299, how)[0], GOLDEN["resize"][how]
    assert got.shape == (3, 299, 299)
    assert float(got.double().mean()) == pytest.approx(golden["mean"], abs=1e-5)
    assert [float(got[place]) for place in PLACES] == pytest.approx(golden["pixels"], abs=1e-3)


def test_inception_features_agree(tmp_path):
    """The whole way, resize, scale and network, on weights that are made up."""
    file = tmp_path / "pt_inception-2015-12-05-6726825d.pth"
    torch.save(inception.state(), file)
    for how in ("tensorflow", "legacy_pytorch"):
        got = inception_features(file, how)(PICTURE)
        assert got.shape == (1, 2048)
        assert got[0, ::128].tolist() == pytest.approx(GOLDEN["inception"][how], rel=1e-3, abs=1e-4), how


def test_torch_fidelitys_cached_statistics_are_read(tmp_path):
    file = tmp_path / "x-stat-fid-2048.pt"
    file.write_bytes(base64.b64decode(GOLDEN["cached_statistics"]))
    features = BANKS["few"][0][:, :3].numpy()
    got = load_statistics(file)
    np.testing.assert_allclose(got.mean, features.mean(0), atol=1e-6)
    np.testing.assert_allclose(got.cov, np.cov(features, rowvar=False), rtol=1e-6)
