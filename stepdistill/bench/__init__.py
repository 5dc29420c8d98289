"""``stepdistill bench``: a teacher and any set of students, measured alike, kept, and laid out to be looked at.

``suite`` says what to measure, ``rows`` finds it on disk, ``measure`` samples and judges, ``cache`` keeps every outcome
by its content, ``output`` writes records, tables, plots and the page.
"""

from stepdistill.bench.suite import Subject, Suite

__all__ = ["Subject", "Suite"]
