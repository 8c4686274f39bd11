"""Data sets for evaluation and fine-tuning. Each file registers the data sets that it reads."""

from . import any_data, cifar, cifar_tests, imagenet, mnist, objectnet, tiny_imagenet

__all__ = ["any_data", "cifar", "cifar_tests", "imagenet", "mnist", "objectnet", "tiny_imagenet"]
