"""Data for training, evaluation and calibration: ``build_data(DataConfig(...)) -> Data``.

Every epoch can be repeated and resumed: its order is a function of (seed, epoch) alone, and the
augmentation of a sample one of (seed, epoch, index) alone, whatever the number of workers or processes.
"""

from adq.train.data.build import build_data, check_classes, check_input
from adq.train.data.config import SOURCES, Data, DataConfig
from adq.train.data.memory import CropFlip, MemoryDataset
from adq.train.data.sampler import EpochSampler

__all__ = [
    "SOURCES",
    "CropFlip",
    "Data",
    "DataConfig",
    "EpochSampler",
    "MemoryDataset",
    "build_data",
    "check_classes",
    "check_input",
]
