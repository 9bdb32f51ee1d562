"""Rates of layers from the spectra of their weights: an opponent, after AdaS.

AdaS (Hosseini & Plataniotis, 2020, https://arxiv.org/abs/2006.08075) gives each layer a
rate that follows what its weights have gained in rank: with the knowledge gain G, the
sum of the singular values of the low-rank part of the weights over the largest and over
their number,

    rate ← momentum × rate + scale × max(0, G − G' of the epoch before)

Here the low-rank part is what exceeds the optimal hard threshold of Gavish & Donoho
(2014), for which there is a closed form, instead of the variational factorisation of
the paper; the momentum, 0.8, and the first rate, 0.03, are the paper's. So it is
AdaS-like, not AdaS.
"""

import keras
import numpy as np


def _matrices(kernel):
    """A kernel as matrices: that of a convolution unfolded by both of its channels."""
    if kernel.ndim < 4:
        return [kernel.reshape(-1, kernel.shape[-1])]
    return [
        np.moveaxis(kernel, axis, 0).reshape(kernel.shape[axis], -1) for axis in (2, 3)
    ]


def knowledge_gain(kernel) -> float:
    """The share of its largest singular value that the low-rank part has on average."""
    gains = []
    for matrix in _matrices(np.asarray(kernel, "float64")):
        singular = np.linalg.svd(matrix, compute_uv=False)
        ratio = min(matrix.shape) / max(matrix.shape)
        # Gavish & Donoho (2014), their fit for noise of unknown level.
        omega = 0.56 * ratio**3 - 0.95 * ratio**2 + 1.82 * ratio + 1.43
        kept = singular[singular > omega * np.median(singular)]
        gains.append(kept.sum() / max(singular[0], 1e-30) / len(singular))
    return float(np.mean(gains))


class SpectralRates(keras.callbacks.Callback):
    """Sets the rate of each layer, of a model with a `LayerwiseOptimizer`.

    Layers without a kernel keep the mean rate of the others.
    """

    def __init__(self, start=0.03, momentum=0.8, scale=1.0):
        super().__init__()
        self.start, self.momentum, self.scale = start, momentum, scale

    def on_train_begin(self, logs=None):
        self.model.optimizer.learning_rate = self.start
        names = self.model.optimizer.multipliers
        variables = {v.path: v for v in self.model.trainable_variables}
        kernels = {}
        for path, variable in variables.items():
            owner = path.rpartition("/")[0]
            for name in names:
                if variable.ndim > 1 and f"/{owner}".endswith(f"/{name}"):
                    kernels[name] = variable
        self.kernels, self.others = kernels, set(names) - set(kernels)
        self.gains = {name: knowledge_gain(k) for name, k in kernels.items()}
        self.rates = dict.fromkeys(kernels, self.start)

    def on_epoch_end(self, epoch, logs=None):
        for name, kernel in self.kernels.items():
            gain = knowledge_gain(kernel)
            gained = max(0.0, gain - self.gains[name])
            self.rates[name] = self.momentum * self.rates[name] + self.scale * gained
            self.gains[name] = gain
        mean = float(np.mean(list(self.rates.values())))
        rates = self.rates | dict.fromkeys(self.others, mean)
        self.model.optimizer.set_multipliers(
            {name: rate / self.start for name, rate in rates.items()}
        )
