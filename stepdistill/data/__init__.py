"""Where batches come from: real data, the teacher's own samples, or conditions alone."""

from stepdistill.data.base import Data, Setting, epochs, lent, weights_hash
from stepdistill.data.cache import Store
from stepdistill.data.classes import Digits, DigitsData, Labels, load_digits
from stepdistill.data.folders import Captioned, ClassFolders
from stepdistill.data.hub import HubImages, HubPrompts
from stepdistill.data.images import ImageSource, ShapesData, image_shape
from stepdistill.data.pairs import TeacherPairs
from stepdistill.data.prompts import Prompts, PromptSource, ShapesPrompts
from stepdistill.data.report import Report
from stepdistill.data.tars import WebShards

__all__ = [
    "Captioned",
    "ClassFolders",
    "Data",
    "Digits",
    "DigitsData",
    "HubImages",
    "HubPrompts",
    "ImageSource",
    "Labels",
    "PromptSource",
    "Prompts",
    "Report",
    "Setting",
    "ShapesData",
    "ShapesPrompts",
    "Store",
    "TeacherPairs",
    "WebShards",
    "epochs",
    "image_shape",
    "lent",
    "load_digits",
    "weights_hash",
]
