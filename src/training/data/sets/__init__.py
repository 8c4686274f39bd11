"""Data sets for evaluation and fine-tuning. Each file registers the data sets that it reads."""

from . import any_data, arrays, imagenet

__all__ = ["any_data", "arrays", "imagenet"]
