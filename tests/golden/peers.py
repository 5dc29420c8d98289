"""Numbers of clean-fid, torch-fidelity and pytorch-fid for tests/evaluation/test_peers.py.

    python -m pip install --target PEERS --no-deps clean-fid==0.1.35 torch-fidelity==0.4.0 pytorch-fid==0.3.0
    PYTHONPATH=.:PEERS python tests/golden/peers.py

Nothing here is imported by the tests but what makes the inputs.
"""

from __future__ import annotations

import base64
import json
import sys
import tempfile
import types
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from tests.evaluation import tiny_inception as inception

PEERS = ("clean-fid", "torch-fidelity", "pytorch-fid", "numpy", "scipy", "torch", "pillow")


def banks() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Pairs of feature banks (real, fake), float64: well conditioned, correlated, ReLU-like, fewer than D."""
    rng = np.random.default_rng(20151205)
    mix = rng.standard_normal((24, 24)) * np.logspace(0, -2, 24)

    def bank(n: int, scale: float, shift: float) -> np.ndarray:
        return scale * rng.standard_normal((n, 24)) + shift

    return {
        "isotropic": (bank(300, 1, 0), bank(250, 1.3, 0.2)),
        "correlated": (bank(300, 1, 0) @ mix, bank(250, 1.1, 0.3) @ mix),
        "rectified": (np.maximum(bank(400, 1, 0.1), 0), np.maximum(bank(400, 1.2, 0), 0)),
        "few": (bank(300, 1, 0), bank(20, 1.3, 0.2)),
    }


def picture() -> np.ndarray:
    """uint8 (40, 56, 3): edges, ramps and noise."""
    rng = np.random.default_rng(7)
    y, x = np.mgrid[:40, :56]
    ramp = np.stack([x * 4, y * 6, (x + y) * 2], -1)
    return (
        np.where(rng.random((40, 56, 1)) < 0.5, ramp, rng.integers(0, 256, (40, 56, 3))).clip(0, 255).astype(np.uint8)
    )


PLACES = [(0, 0, 0), (1, 5, 0), (2, 0, 298), (0, 298, 298), (1, 150, 149), (2, 77, 211), (0, 201, 33), (1, 298, 7)]
"""Channel, row and column of the pixels that are kept of a resized picture."""


def main() -> None:
    """Ask the peers, and write peers.json."""
    sys.modules["pkg_resources"] = types.ModuleType("pkg_resources")  # gone from setuptools; imported, not used
    import scipy.linalg
    from cleanfid.fid import frechet_distance, kernel_distance
    from cleanfid.inception_pytorch import InceptionV3 as CleanInception
    from cleanfid.resize import build_resizer
    from pytorch_fid import inception as pytorch_fid
    from pytorch_fid.fid_score import calculate_frechet_distance
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric
    from torch_fidelity.utils import torch_atomic_save

    del CleanInception, scipy
    out: dict[str, object] = {"versions": {name: version(name) for name in PEERS}, "command": __doc__.strip()}
    out["frechet"], out["kid"], out["precision_recall"] = {}, {}, {}
    for name, (real, fake) in banks().items():
        moments = [(x.mean(0), np.cov(x, rowvar=False)) for x in (real, fake)]
        a, b = (fid_features_to_statistics(torch.from_numpy(x)) for x in (real, fake))
        out["frechet"][name] = {
            "clean-fid": float(frechet_distance(*moments[0], *moments[1])),
            "pytorch-fid": float(calculate_frechet_distance(*moments[0], *moments[1])),
            "torch-fidelity": fid_statistics_to_metric(a, b, False)["frechet_inception_distance"],
        }
        n = min(len(real), len(fake))
        settings = {"kid_subsets": 1, "kid_subset_size": n, "verbose": False}
        features = [torch.from_numpy(x[:n]) for x in (fake, real)]
        out["kid"][name] = {
            "clean-fid": kernel_distance(real[:n], fake[:n], num_subsets=1, max_subset_size=n),
            "torch-fidelity": float(kid_features_to_metric(*features, **settings)["kernel_inception_distance_mean"]),
        }
        settings = {"prc_neighborhood": 3, "prc_batch_size": 100, "save_cpu_ram": False, "verbose": False}
        prc = prc_features_to_metric(torch.from_numpy(fake), torch.from_numpy(real), **settings)
        out["precision_recall"][name] = {"torch-fidelity": [prc["precision"], prc["recall"]]}

    shown = picture()
    tensor = torch.from_numpy(shown).permute(2, 0, 1)[None]
    resized = {name: build_resizer(name)(shown).transpose(2, 0, 1) for name in ("clean", "legacy_pytorch")}
    resized["tensorflow"] = interpolate_bilinear_2d_like_tensorflow1x(tensor.float(), (299, 299), align_corners=False)[
        0
    ].numpy()
    out["resize"] = {
        name: {"mean": float(x.astype(np.float64).mean()), "pixels": [float(x[place]) for place in PLACES]}
        for name, x in resized.items()
    }

    state = inception.state()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "weights.pth"
        torch.save(state, file)
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(file))
        out["inception"] = {"tensorflow": network(tensor)[0][0, ::128].tolist()}
        pytorch_fid.load_state_dict_from_url = lambda *_, **__: state
        ported = pytorch_fid.InceptionV3([3]).eval()
        with torch.no_grad():
            seen = ported(tensor.float() / 255)[0]
        out["inception"]["legacy_pytorch"] = seen[0, ::128, 0, 0].tolist()
        cached = Path(folder) / "cached.pt"
        torch_atomic_save(fid_features_to_statistics(torch.from_numpy(banks()["few"][0][:, :3]).float()), cached)
        out["cached_statistics"] = base64.b64encode(cached.read_bytes()).decode()
    path = Path(__file__).with_suffix(".json")
    path.write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
