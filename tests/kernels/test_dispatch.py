"""Who computes: libraries by default, what is asked for if it can, a clear refusal if it cannot."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stepdistill.kernels import dispatch, prefer, qk_norm_rope, steer_attention
from stepdistill.kernels.dispatch import choose
from stepdistill.kernels.qk_norm_rope import Stream

X = torch.randn(1, 2, 5, 8)
ALL = {"triton": None, "sdpa": None, "naive": None}


def python(code: str, **environment: str) -> str:
    """What a fresh interpreter without Triton's own interpreter prints."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_libraries_come_first_and_the_naive_form_last() -> None:
    assert choose("steer_attention", ALL, X, (), None) == "sdpa"
    assert choose("steer_attention", ALL | {"sdpa": "no"}, X, (), None) == "naive"
    assert choose("steer_attention", ALL, X, (), "triton") == "triton"


def test_what_is_asked_for_runs_or_says_why_not() -> None:
    with pytest.raises(ValueError, match=r"steer_attention: prefer='triton' cannot serve: too wide; leave prefer out"):
        choose("steer_attention", ALL | {"triton": "too wide"}, X, (), "triton")
    with pytest.raises(ValueError, match="none of triton, sdpa, naive"):
        choose("steer_attention", ALL, X, (), "flash")
    with pytest.raises(ValueError, match="head dimension 200"):
        wide = torch.zeros(1, 1, 2, 200)
        steer_attention(wide, [(wide, wide)], (1.0,), prefer="triton")
    with pytest.raises(ValueError, match=r"dtype torch\.float64"):
        steer_attention(X.double(), [(X.double(), X.double())], (1.0,), prefer="triton")
    with pytest.raises(ValueError, match="4 branches"):
        steer_attention(X, [(X, X)] * 4, (1.0,) * 4, prefer="triton")
    with pytest.raises(ValueError, match="log-sum-exp"):
        steer_attention(X, [(X, X)], (1.0,), prefer="sdpa", return_lse=True)


def test_a_preference_holds_for_a_block_and_is_no_order_to_others() -> None:
    with prefer("naive"):
        assert choose("steer_attention", ALL, X, (), None) == "naive"
        assert choose("steer_attention", ALL, X, (), "sdpa") == "sdpa"
        with prefer("flex"):  # qk_norm_rope knows no flex
            q, *_ = qk_norm_rope([Stream(X, X, None, None, None)], None, eps=1e-6)
            assert q.shape == X.shape
    assert choose("steer_attention", ALL, X, (), None) == "sdpa"
    with pytest.raises(ValueError, match="none of triton, sdpa"), prefer("cudnn"):
        pass


def test_a_shape_is_enabled_by_its_row_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the device it was timed on, without gradients, for that shape and dtype."""

    class OnGpu:
        device, dtype = torch.device("cuda"), torch.bfloat16

    row = ("steer_attention", "NVIDIA H100", "bfloat16", 1, 2, 3)
    monkeypatch.setattr(dispatch, "_enabled", frozenset({row}))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    with torch.no_grad():
        assert choose("steer_attention", ALL, OnGpu(), (1, 2, 3), None) == "triton"
        assert choose("steer_attention", ALL | {"triton": "no"}, OnGpu(), (1, 2, 3), None) == "sdpa"
        assert choose("steer_attention", ALL, OnGpu(), (1, 2, 4), None) == "sdpa"
        assert choose("qk_norm_rope", ALL, OnGpu(), (1, 2, 3), None) == "sdpa"
        assert choose("steer_attention", ALL, X, (1, 2, 3), None) == "sdpa"
        monkeypatch.setattr(OnGpu, "dtype", torch.float16)
        assert choose("steer_attention", ALL, OnGpu(), (1, 2, 3), None) == "sdpa"
        monkeypatch.setattr(OnGpu, "dtype", torch.bfloat16)
    assert choose("steer_attention", ALL, OnGpu(), (1, 2, 3), None) == "sdpa"


def test_enabled_rows_have_records_that_earn_it() -> None:
    """Every shape that is a default stands in eval/attention.json with 5 % or more, eager and as a graph."""
    sys.path.insert(0, str(Path("eval").resolve()))
    try:
        from attention import GAIN, RECORDS, gains
    finally:
        sys.path.pop(0)
    rows = json.loads(RECORDS.read_text())["rows"] if RECORDS.is_file() else []
    earned = {
        (r["kernel"], r["device"], r["dtype"], *r["shape"])
        for r in rows
        if not r["device"].startswith("cpu") and len(gains(r)) == 2 and min(gains(r).values()) >= GAIN
    }
    assert dispatch._enabled <= earned


def test_the_choice_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "stepdistill.kernels.dispatch"):
        for _ in range(2):
            choose("a kernel", ALL, X, (7, 7), None)
    assert [r.message for r in caplog.records] == ["a kernel (7, 7) torch.float32 on cpu: sdpa"]


def test_xformers_is_asked_by_a_real_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """It imports, and calls itself available, where its kernels are missing."""
    ops = pytest.importorskip("xformers.ops")
    monkeypatch.setattr(dispatch, "_probed", {})

    def missing(q, k, v, **kwargs):
        raise NotImplementedError("No operator found\nbecause of many things")

    monkeypatch.setattr(ops, "memory_efficient_attention", missing)
    with pytest.raises(
        ValueError, match=r"xformers refuses torch.float32, head dimension 8 on cpu \(No operator found\)"
    ):
        steer_attention(X, [(X, X)], (1.0,), prefer="xformers")

    def working(q, k, v, scale=None):  # (B, M, H, d) there
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)

    monkeypatch.setattr(ops, "memory_efficient_attention", working)
    monkeypatch.setattr(dispatch, "_probed", {})
    both = [steer_attention(X, [(X, X), (X * 2, X)], (1.0, -0.5), prefer=p) for p in ("xformers", "sdpa")]
    torch.testing.assert_close(*both)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_flex_attention_agrees() -> None:
    lengths = torch.tensor([[3, 5]])
    both = [steer_attention(X, [(X, X), (X * 2, X)], (1.0, -0.5), lengths=lengths, prefer=p) for p in ("flex", "sdpa")]
    torch.testing.assert_close(*both)


def test_imports_are_light_and_without_triton_everything_else_works() -> None:
    code = (
        "import sys, torch; from stepdistill.kernels import steer_attention\n"
        "print({'diffusers', 'transformers', 'triton', 'xformers'} & set(sys.modules))\n"
        "x = torch.ones(1, 1, 2, 8)\n"
        "try: steer_attention(x, [(x, x)], (1.0,), prefer='triton')\n"
        "except ValueError as error: print(str(error).partition('cannot serve: ')[2])"
    )
    light, no_gpu = python(code, CUDA_VISIBLE_DEVICES="").splitlines()
    assert light == "set()" and no_gpu.startswith("it needs an NVIDIA GPU")
    blocked = (
        "import sys; sys.modules['triton'] = None\n"
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'triton' else find(name, *a)\n"
        "import torch; from stepdistill.kernels import steer_attention\n"
        "x = torch.ones(1, 1, 2, 8); print(steer_attention(x, [(x, x)], (1.0,)).sum().item())\n"
        "try: steer_attention(x, [(x, x)], (1.0,), prefer='triton')\n"
        "except ValueError as error: print(error)"
    )
    assert python(blocked).splitlines() == [
        "16.0", "steer_attention: prefer='triton' cannot serve: triton is not installed; leave prefer out",
    ]  # fmt: skip
