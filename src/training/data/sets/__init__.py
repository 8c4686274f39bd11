"""Data sets for evaluation and fine-tuning. Each file registers the data sets that it reads."""

from . import any_data, cifar, imagenet, mnist, objectnet

__all__ = ["any_data", "cifar", "imagenet", "mnist", "objectnet"]
