"""Reference statistics, mean and covariance of features, as files that other tools write and read.

``.npz`` with ``mu`` and ``sigma`` is pytorch-fid's, clean-fid's and EDM's; ``.pt`` is torch-fidelity's cache. EDM's
newer ``.pkl`` files are pickles, which run code when they are read: they are refused.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from stepdistill.checkpoint import write_atomically
from stepdistill.evaluation.metrics import MeanCov, Moments


def load_statistics(path: str | PathLike[str]) -> Moments:
    """Mean and covariance of a reference, in float64.

    The file does not say which extractor, resize or how many images it was made with; you must.

    Args:
        path: ``.npz`` with ``mu`` (D,) and ``sigma`` (D, D), or torch-fidelity's ``*-stat-fid-*.pt``.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: in one line, if it is a pickle, damaged, or holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no statistics at {path}")
    if path.suffix == ".npz":
        stored = _from_npz(path)
    elif path.suffix == ".pt":
        stored = _from_torch(path)
    else:
        why = "a pickle runs code when it is read: save its mu and sigma as .npz" if path.suffix == ".pkl" else ""
        raise ValueError(f"statistics must be .npz or torch-fidelity's .pt, got {path}{why and '; ' + why}")
    missing = [name for name in ("mu", "sigma") if name not in stored]
    if missing:
        raise ValueError(f"{path} has no {' and no '.join(missing)}; it holds {', '.join(stored) or 'nothing'}")
    arrays = [np.asarray(stored[name]) for name in ("mu", "sigma")]
    if not all(np.issubdtype(array.dtype, np.floating) for array in arrays):
        raise ValueError(f"{path}: mu and sigma must be floats, got {arrays[0].dtype} and {arrays[1].dtype}")
    mean, cov = map(torch.as_tensor, arrays)
    return _checked(mean, cov, path)


def save_statistics(path: str | PathLike[str], statistics: MeanCov | Moments) -> None:
    """Writes ``mu`` and ``sigma`` as ``.npz``, which pytorch-fid and clean-fid read; an older file stays if it fails.

    Raises:
        ValueError: if the path does not end in .npz, or there are fewer than two samples.
        OSError: if the disk refuses.
    """
    path = Path(path)
    if path.suffix != ".npz":
        raise ValueError(f"statistics are written as .npz, got {path}")
    arrays = {"mu": statistics.mean.cpu().numpy(), "sigma": statistics.cov.cpu().numpy()}

    def write(aside: Path) -> None:
        with aside.open("wb") as file:
            np.savez_compressed(file, **arrays)

    write_atomically(path, write)


def _from_npz(path: Path) -> Mapping[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not a whole .npz file of numbers ({str(error).splitlines()[0]})") from error


def _from_torch(path: Path) -> Mapping[str, np.ndarray]:
    # What an array of numbers is made of, and nothing else.
    made_of = [np._core.multiarray._reconstruct, np.ndarray, np.dtype, type(np.dtype("f4")), type(np.dtype("f8"))]
    old_name = (np._core.multiarray._reconstruct, "numpy.core.multiarray._reconstruct")  # of files from numpy 1
    try:
        with torch.serialization.safe_globals([*made_of, old_name]):
            stored = torch.load(path, "cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, ValueError) as error:
        raise ValueError(f"{path} is not a file of torch-fidelity ({str(error).splitlines()[0]})") from error
    if not isinstance(stored, dict):
        raise ValueError(f"{path} must hold mu and sigma, got {type(stored).__name__}")
    return stored


def _checked(mean: Tensor, cov: Tensor, path: Path) -> Moments:
    if mean.ndim != 1 or cov.shape != (len(mean), len(mean)) or not len(mean):
        raise ValueError(f"{path}: mu must be (D,) and sigma (D, D), got {tuple(mean.shape)} and {tuple(cov.shape)}")
    mean, cov = mean.double(), cov.double()
    if not bool(mean.isfinite().all() and cov.isfinite().all()):
        raise ValueError(f"{path} holds NaN or infinity")
    if not torch.allclose(cov, cov.T, rtol=1e-4, atol=1e-6 * float(cov.diagonal().abs().max())):
        raise ValueError(f"{path}: sigma is not symmetric, so it is no covariance")
    return Moments(mean, (cov + cov.T) / 2)
