"""What can be read from activations about the class: activations → nats.

A readout fixes the reader, and with it the meaning of the number: how many nats
that reader gets out of the activations.

`Predictions` reads a network's output. It streams, so that a pass over many batches
keeps only counts: `init` makes the empty state, `update` adds a batch (pure, may be
compiled), `finish` turns the state into an `Information`. `Columns` does the same for
an output whose units are questions of their own, and has the parts of their mean.

`LinearReadout` and `UnitHistogram` read any layer. They need all samples at once, but
only a few numbers of each: `features` makes them from a batch of activations (pure, may
be compiled), and `read` turns the features of all samples into an `Information`;
`reader` does it for several layers with the same labels.

All but `Columns` have `measure(activations, class_ids, num_classes)`, the whole in one
call.
"""

from keras_milr.readouts.columns import Columns, label_counts
from keras_milr.readouts.linear import LinearReadout
from keras_milr.readouts.predictions import (
    Predictions,
    attainable,
    from_counts,
    from_hits,
    from_tables,
    hit_counts,
    predicted_class,
    prediction_counts,
)
from keras_milr.readouts.result import (
    Information,
    from_array,
    mean,
    separate,
    to_array,
)
from keras_milr.readouts.units import UnitHistogram

__all__ = [
    "Columns",
    "Information",
    "LinearReadout",
    "Predictions",
    "UnitHistogram",
    "attainable",
    "from_array",
    "from_counts",
    "from_hits",
    "from_tables",
    "hit_counts",
    "label_counts",
    "mean",
    "predicted_class",
    "prediction_counts",
    "separate",
    "to_array",
]
