"""Evaluation: uint8 images -> features -> scores -> records -> tables, plots and a page.

Imported by name where they are needed: ``evaluator`` (any teacher), ``reference``, ``extractors`` and ``clip`` (local
weights), ``infinity``, ``diversity``, ``comparison``, ``intervals``, ``distributed``, ``statistics_files``; ``digits``
(scikit-learn's data), ``report`` and ``plots`` (matplotlib). eval/metrics.md says what each metric is.
"""

from stepdistill.evaluation.features import DigitFeatures, Extractor, Pixels, to_uint8
from stepdistill.evaluation.metrics import MeanCov, Moments, density_coverage, frechet_distance, precision_recall
from stepdistill.evaluation.mmd import cmmd, kid, kid_blocks
from stepdistill.evaluation.records import Record, check_same_protocol, load_records, records_from_scores, save_records
from stepdistill.evaluation.tables import format_value, markdown_table

__all__ = [
    "DigitFeatures",
    "Extractor",
    "MeanCov",
    "Moments",
    "Pixels",
    "Record",
    "check_same_protocol",
    "cmmd",
    "density_coverage",
    "format_value",
    "frechet_distance",
    "kid",
    "kid_blocks",
    "load_records",
    "markdown_table",
    "precision_recall",
    "records_from_scores",
    "save_records",
    "to_uint8",
]
