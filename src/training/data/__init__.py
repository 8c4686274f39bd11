"""Training and validation data: webdataset shards, CSV tables, lists, synthetic samples."""

from .batches import TrainData, ValData
from .build import build_labelled_data, build_train_data, build_val_data
from .samples import DataReport

__all__ = ["DataReport", "TrainData", "ValData", "build_labelled_data", "build_train_data", "build_val_data"]
