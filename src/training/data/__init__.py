"""Training and validation data: webdataset shards, CSV tables, synthetic samples."""

from training.data.build import build_train_data, build_val_data
from training.data.batches import TrainData, ValData
from training.data.report import DataReport

__all__ = ["DataReport", "TrainData", "ValData", "build_train_data", "build_val_data"]
