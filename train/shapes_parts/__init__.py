"""Parts of `train/shapes_teachers.py`."""
