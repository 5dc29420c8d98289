"""stepdistill: turn a pretrained diffusers pipeline into a one- to four-step generator."""

import importlib as _importlib
import logging as _logging
from typing import Any as _Any

# Importing diffusers asks xformers, which warns at length where it has no compiled operators; using it says so too.
_logging.getLogger("xformers").setLevel(_logging.ERROR)

__version__ = "0.1.0"


def __getattr__(name: str) -> _Any:
    """``stepdistill.sample`` and ``optimize``, fetched when asked for: it takes seconds to import what they need."""
    if name == "sample":
        return _importlib.import_module("stepdistill.generate").sample
    if name == "optimize":
        return _importlib.import_module("stepdistill.inference").optimize
    raise AttributeError(f"module 'stepdistill' has no attribute {name!r}")
