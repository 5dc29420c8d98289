"""Where the repository's top-level folders are."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

Folder = Literal["assets", "train", "pipelines", "eval"]


def project_dir(name: Folder) -> Path:
    """A top-level folder of the repository that the package runs from.

    Args:
        name: the folder, e.g. "assets".

    Returns:
        Its absolute path.

    Raises:
        FileNotFoundError: if it is not there, as when the package was installed without the repository.
    """
    folder = Path(__file__).resolve().parents[1] / name
    if not folder.is_dir():
        raise FileNotFoundError(
            f"folder {name}/ is not at {folder}: stepdistill is installed without its repository; "
            "clone it and run `pip install -e .` there"
        )
    return folder
