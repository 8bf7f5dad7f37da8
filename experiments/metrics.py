"""GLUE's metrics, from a model's outputs."""

from collections.abc import Callable, Iterable

import numpy as np
import scipy.stats
from jaxtyping import Float, Shaped
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef


def _unless_constant(metric: Callable) -> Callable:
    """A correlation, with 0.0 where one side is constant and it is undefined."""

    def correlation(predictions, labels) -> float:
        if np.ptp(predictions) == 0 or np.ptp(labels) == 0:
            return 0.0
        return float(metric(predictions, labels))

    return correlation


# Each takes predictions, classes or scores, and the labels.
METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": lambda predictions, labels: float(accuracy_score(labels, predictions)),
    "f1": lambda predictions, labels: float(f1_score(labels, predictions, zero_division=0.0)),
    "matthews": _unless_constant(lambda predictions, labels: matthews_corrcoef(labels, predictions)),
    "pearson": _unless_constant(lambda predictions, labels: scipy.stats.pearsonr(predictions, labels)[0]),
    "spearman": _unless_constant(lambda predictions, labels: scipy.stats.spearmanr(predictions, labels)[0]),
}


def score(
    names: Iterable[str],
    outputs: Float[np.ndarray, "N outputs"],
    labels: Shaped[np.ndarray, " N"],
    prefix: str = "",
) -> dict[str, float]:
    """The metrics of one evaluation set; nan, all of them, if an output is not finite.

    Args:
      names: of metrics; those of another evaluation set, with another prefix, are passed over.
      outputs: logits of the classes, or one score each.
      prefix: of the names of this evaluation set's metrics.
    """
    metrics = {name: METRICS.get(name.removeprefix(prefix)) for name in names if name.startswith(prefix)}
    metrics = {name: metric for name, metric in metrics.items() if metric is not None}
    # In double precision: sums over an evaluation set lose digits in the outputs' own.
    outputs, labels = np.asarray(outputs, np.float64), np.asarray(labels)
    if not np.isfinite(outputs).all():
        return dict.fromkeys(metrics, float("nan"))
    if outputs.shape[1] == 1:
        predictions, labels = outputs[:, 0], labels.astype(np.float64)
    else:
        predictions = outputs.argmax(axis=1)
    return {name: metric(predictions, labels) for name, metric in metrics.items()}
