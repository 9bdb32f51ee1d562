"""Private names of Keras that we rely on, all of them.

Tested with Keras 3.12.4 and 3.15.1.
"""

import keras


def metrics(model) -> list:
    """Every metric instance of the model, compiled or its own.

    On TensorFlow the compiled metrics are built in the first training step, and
    `model.metrics` does not list them before; by then it is too late to say that one
    is missing. What `compile` was given stands in `_user_metrics` of the container.
    """
    found = []
    for metric in model.metrics:
        found.append(metric)
        for name in ("_user_metrics", "_user_weighted_metrics"):
            found.extend(keras.tree.flatten(getattr(metric, name, None)))
    return [m for m in found if isinstance(m, keras.metrics.Metric)]
