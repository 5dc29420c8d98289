"""FID's Inception against torchvision's with the three pools changed, and what happens without weights."""

from __future__ import annotations

import hashlib

import pytest
import torch
import torchvision
from safetensors.torch import save_file

from stepdistill.evaluation.extractors import inception
from stepdistill.evaluation.inception import InceptionV3
from stepdistill.evaluation.weights import WEIGHTS
from tests.evaluation import tiny_inception as made_up


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return made_up.state()


def images(n: int, size: int = 40) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, size, size), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


@pytest.mark.filterwarnings("ignore")
def test_network_is_torchvisions_with_the_pools_of_2015(state, monkeypatch):
    peer = torchvision.models.inception_v3(num_classes=1008, aux_logits=False, init_weights=False).eval()
    peer.load_state_dict(state)
    peer.fc = torch.nn.Identity()
    ours = InceptionV3().eval()
    ours.load_state_dict({k: v for k, v in state.items() if not k.startswith("fc.")})
    x = torch.randn(1, 3, 299, 299, generator=torch.Generator().manual_seed(1))
    pools = []

    def pool_of_2015(h, **size):
        pools.append(h.shape[1])
        assert size == {"kernel_size": 3, "stride": 1, "padding": 1}
        if len(pools) == 9:  # the last block's
            return torch.nn.functional.max_pool2d(h, **size)
        return average(h, **size, count_include_pad=False)

    with torch.no_grad():
        features = ours(x)
        plain = peer(x)
        average = torch.nn.functional.avg_pool2d
        monkeypatch.setattr(torch.nn.functional, "avg_pool2d", pool_of_2015)
        expected = peer(x)
    assert pools == [192, 256, 288, 768, 768, 768, 768, 1280, 2048]
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)
    assert (features - plain).abs().max() > 0.01  # the pools matter


def test_weights_are_found_named_and_hashed(state, tmp_path, monkeypatch):
    file = tmp_path / "pt_inception-2015-12-05-6726825d.pth"
    torch.save(state, file)
    monkeypatch.setenv(WEIGHTS, str(tmp_path))
    extractor = inception()
    assert extractor.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert (extractor.name, extractor.resize, extractor.dim) == ("inception-2015/clean299", "clean299", 2048)
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "same.safetensors")
    x = images(3)
    torch.testing.assert_close(inception(tmp_path / "same.safetensors", batch_size=2)(x), extractor(x))


def test_missing_weights_say_which_and_where(tmp_path, monkeypatch):
    monkeypatch.delenv(WEIGHTS, raising=False)
    with pytest.raises(
        FileNotFoundError, match=r"(?s)6726825d.*STEPDISTILL_WEIGHTS is not set.*put pt_inception"
    ) as error:
        inception()
    assert "\n" not in str(error.value)
    monkeypatch.setenv(WEIGHTS, str(tmp_path))
    with pytest.raises(FileNotFoundError, match=f"at {tmp_path}/pt_inception-2015-12-05-6726825d.pth"):
        inception()
    with pytest.raises(FileNotFoundError, match=r"at nowhere\.pth"):
        inception("nowhere.pth")


def test_damaged_and_foreign_weights_are_named(state, tmp_path):
    cut = tmp_path / "cut.pth"
    cut.write_bytes(b"PK\x03\x04 and then nothing")
    with pytest.raises(ValueError, match=r"cut\.pth is not a whole file of weights"):
        inception(cut)
    torch.save({**state, "Mixed_7c.branch_pool.conv.weight": torch.zeros(2, 2)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"Mixed_7c.branch_pool.conv.weight has shape \(2, 2\), expected \(192, 2048"):
        inception(tmp_path / "other.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="must hold tensors by name, got list"):
        inception(tmp_path / "list.pth")
    with pytest.raises(ValueError, match="clean, legacy_pytorch, torchmetrics or tensorflow; got 'pil'"):
        inception(cut, how="pil")


def test_a_pickle_that_runs_code_does_not_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"x": Bomb()}, tmp_path / "bomb.pth")
    with pytest.raises(ValueError, match=r"bomb\.pth is not a whole file of weights"):
        inception(tmp_path / "bomb.pth")
    assert not (tmp_path / "ran").exists()
