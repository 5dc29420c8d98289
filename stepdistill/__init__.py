"""stepdistill: turn a pretrained diffusers pipeline into a one- to four-step generator."""

import logging as _logging

# Importing diffusers asks xformers, which warns at length where it has no compiled operators; using it says so too.
_logging.getLogger("xformers").setLevel(_logging.ERROR)

__version__ = "0.1.0"
