"""The cache: what comes back is what was kept, damage is said, hashes follow files."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from stepdistill.bench import cache as module
from stepdistill.bench.cache import Cache, default_folder, key_of

VALUE = {"scores": {"fd": 0.1 + 0.2}, "right": "0110", "none": None}
KEY = key_of({"what": "scores", "seed": 1})


def test_what_was_kept_comes_back_in_another_process(tmp_path: Path) -> None:
    Cache(tmp_path).save(KEY, {"seed": 1}, VALUE)
    assert Cache(tmp_path).load(KEY) == VALUE
    assert Cache(tmp_path).load(key_of({"what": "scores", "seed": 2})) is None
    assert [path.name for path in tmp_path.rglob("*.json")] == [f"{KEY}.json"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-20],
        lambda text: text.replace("0110", "0111"),
        lambda text: text.replace(KEY, key_of({})),
        lambda text: "[]",
        lambda text: json.dumps(json.loads(text) | {"format": 0}),
        lambda text: "\udcff",
    ],
)
def test_a_damaged_entry_is_said_and_made_again(damage, tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.save(KEY, {"seed": 1}, VALUE)
    path = cache.path(KEY)
    path.write_text(damage(path.read_text()), errors="surrogateescape")
    with pytest.warns(UserWarning, match=f"cache entry {path} is damaged .* it is measured again"):
        assert cache.load(KEY) is None
    cache.save(KEY, {"seed": 1}, VALUE)
    assert cache.load(KEY) == VALUE


def test_hashes_are_those_of_the_contents_and_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "w.safetensors"
    file.write_bytes(b"abc")
    cache = Cache(tmp_path / "cache")
    assert cache.file_hash(file) == hashlib.sha256(b"abc").hexdigest()
    cache.flush()
    again = Cache(tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(module.hashlib, "sha256", None)
        assert again.file_hash(file) == hashlib_of(b"abc")
    file.write_bytes(b"xyz")
    assert again.file_hash(file) == hashlib_of(b"xyz")
    stat = file.stat()
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))  # as new, so it is read, and found the same
    assert again.file_hash(file) == hashlib_of(b"xyz")


def hashlib_of(data: bytes) -> str:
    """Kept apart from the module that the test takes away."""
    return {b"abc": ABC, b"xyz": XYZ}[data]


ABC, XYZ = (hashlib.sha256(data).hexdigest() for data in (b"abc", b"xyz"))


def test_a_folders_hash_follows_names_configs_and_weights_alone(tmp_path: Path) -> None:
    folder, cache = tmp_path / "pipeline", Cache(tmp_path / "cache")
    (folder / "unet").mkdir(parents=True)
    (folder / "unet/config.json").write_text("{}")
    first = cache.folder_hash(folder)
    (folder / "README.md").write_text("a card")
    (folder / "grid.png").write_text("a picture")
    assert cache.folder_hash(folder) == first
    (folder / "unet/config.json").rename(folder / "unet/other.json")
    assert cache.folder_hash(folder) != first


def test_code_that_makes_numbers_counts_and_code_that_lays_them_out_does_not() -> None:
    names = set(module._code_files())
    assert {"sampling.py", "evaluation/metrics.py", "models/denoiser.py", "evaluation/benchmark.py"} <= names
    assert not names & set(module.NOT_NUMBERS) and "cli.py" not in names


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"--cache .*file/cache: cannot be written to .* name another folder"):
        Cache(tmp_path / "file" / "cache")


def test_the_cache_lies_where_caches_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_folder() == Path("/somewhere/stepdistill/bench")
