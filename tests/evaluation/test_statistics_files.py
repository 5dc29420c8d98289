"""Statistics of other tools are read, and nothing in them runs; torch-fidelity's own file is in test_peers.py."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from stepdistill.evaluation.metrics import MeanCov, frechet_distance
from stepdistill.evaluation.statistics_files import load_statistics, save_statistics

FEATURES = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))


def test_written_files_are_pytorch_fids_and_come_back(tmp_path):
    stats = MeanCov.of(FEATURES)
    save_statistics(tmp_path / "real.npz", stats)
    with np.load(tmp_path / "real.npz") as peer:  # as pytorch-fid and clean-fid read it
        np.testing.assert_allclose(peer["sigma"], np.cov(FEATURES.double().numpy(), rowvar=False))
    assert frechet_distance(load_statistics(tmp_path / "real.npz"), stats) == pytest.approx(0, abs=1e-12)
    with pytest.raises(ValueError, match=r"as \.npz"):
        save_statistics(tmp_path / "real.pt", stats)


def test_edms_npz_is_read_whatever_else_it_holds(tmp_path):
    np.savez(tmp_path / "edm.npz", mu=np.zeros(3, np.float32), sigma=np.eye(3, dtype=np.float32), note="cifar10")
    got = load_statistics(tmp_path / "edm.npz")
    assert got.cov.dtype == torch.float64 and got.cov.equal(torch.eye(3).double())


def test_torch_files_hold_arrays_and_nothing_that_runs(tmp_path):
    torch.save({"mu": np.zeros(2), "sigma": np.eye(2)}, tmp_path / "ok.pt")
    assert load_statistics(tmp_path / "ok.pt").mean.tolist() == [0, 0]

    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"mu": Bomb(), "sigma": np.eye(2)}, tmp_path / "bomb.pt")
    with pytest.raises(ValueError, match=r"bomb.pt is not a file of torch-fidelity"):
        load_statistics(tmp_path / "bomb.pt")
    np.savez(tmp_path / "bomb.npz", mu=np.array([Bomb()], dtype=object), sigma=np.eye(2))
    with pytest.raises(ValueError, match=r"bomb\.npz is not a whole .npz file of numbers"):
        load_statistics(tmp_path / "bomb.npz")
    assert not (tmp_path / "ran").exists()


def test_unreadable_files_are_one_clear_line(tmp_path):
    (tmp_path / "edm.pkl").write_bytes(pickle.dumps({"mu": 1}))
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04cut")
    (tmp_path / "empty.npz").write_bytes(b"")
    np.savez(tmp_path / "other.npz", mean=np.zeros(3))
    np.savez(tmp_path / "shapes.npz", mu=np.zeros(3), sigma=np.eye(4))
    np.savez(tmp_path / "nan.npz", mu=np.zeros(2), sigma=np.full((2, 2), np.nan))
    np.savez(tmp_path / "words.npz", mu=np.array(["a", "b"]), sigma=np.eye(2))
    np.savez(tmp_path / "lopsided.npz", mu=np.zeros(2), sigma=np.array([[1.0, 0.5], [0.0, 1.0]]))
    torch.save([1], tmp_path / "list.pt")
    for name, message in {
        "edm.pkl": "a pickle runs code when it is read",
        "cut.npz": "cut.npz is not a whole .npz file",
        "empty.npz": "empty.npz is not a whole .npz file",
        "other.npz": "no mu and no sigma; it holds mean",
        "shapes.npz": r"got \(3,\) and \(4, 4\)",
        "nan.npz": "NaN or infinity",
        "words.npz": "must be floats, got <U1 and float64",
        "lopsided.npz": "not symmetric",
        "list.pt": "must hold mu and sigma, got list",
    }.items():
        with pytest.raises(ValueError, match=message) as error:
            load_statistics(tmp_path / name)
        assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match="no statistics at"):
        load_statistics(tmp_path / "absent.npz")
