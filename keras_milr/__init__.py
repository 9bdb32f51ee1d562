"""Learning rates from mutual information, for Keras."""

from keras_milr import information, policies, readouts
from keras_milr._version import __version__
from keras_milr.callbacks import MutualInformationLR
from keras_milr.metrics import MutualInformation
from keras_milr.optimizers import LayerwiseOptimizer
from keras_milr.plotting import plot_history

__all__ = [
    "LayerwiseOptimizer",
    "MutualInformation",
    "MutualInformationLR",
    "__version__",
    "information",
    "plot_history",
    "policies",
    "readouts",
]
