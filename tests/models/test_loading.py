"""Pipelines with code of their own are loaded by one process at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
from diffusers import DiffusionPipeline
from filelock import FileLock, Timeout

from stepdistill.models.families import load_pipeline, loading
from stepdistill.paths import project_dir


def test_no_other_process_touches_the_cache_of_modules_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """diffusers writes over the cached file before it imports it: a second process that came then found half of it."""
    load, busy = DiffusionPipeline.from_pretrained, []

    def watched(*args: object, **kwargs: object) -> DiffusionPipeline:
        with pytest.raises(Timeout):
            FileLock(tmp_path / "modules" / ".stepdistill.lock", timeout=0).acquire()
        busy.append(True)
        return load(*args, **kwargs)

    monkeypatch.setattr(loading, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", watched)
    code = str(project_dir("pipelines") / "class_conditional.py")
    for _ in range(2):  # and it is free again afterwards
        load_pipeline(project_dir("assets") / "digits" / "teacher", custom_pipeline=code)
    assert busy == [True, True]
