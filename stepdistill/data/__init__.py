"""Where batches come from: real data, the teacher's own samples, or conditions alone."""

from stepdistill.data.base import Data, Setting, epochs, lent, weights_hash
from stepdistill.data.classes import Digits, DigitsData, Labels, load_digits
from stepdistill.data.images import Captioned, ImageSource, ShapesData, image_shape
from stepdistill.data.pairs import TeacherPairs
from stepdistill.data.prompts import Prompts, PromptSource, ShapesPrompts

__all__ = [
    "Captioned",
    "Data",
    "Digits",
    "DigitsData",
    "ImageSource",
    "Labels",
    "PromptSource",
    "Prompts",
    "Setting",
    "ShapesData",
    "ShapesPrompts",
    "TeacherPairs",
    "epochs",
    "image_shape",
    "lent",
    "load_digits",
    "weights_hash",
]
