"""Learning rates from mutual information, for Keras."""

from keras_milr import information, policies, readouts
from keras_milr._version import __version__
from keras_milr.callbacks import MutualInformationLR
from keras_milr.metrics import MutualInformation
from keras_milr.optimizers import LayerwiseOptimizer
from keras_milr.plotting import plot_history
from keras_milr.range_test import LRRange, lr_range_test

__all__ = [
    "LRRange",
    "LayerwiseOptimizer",
    "MutualInformation",
    "MutualInformationLR",
    "__version__",
    "information",
    "lr_range_test",
    "plot_history",
    "policies",
    "readouts",
]
