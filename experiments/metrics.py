"""GLUE's metrics, from a model's outputs."""

from collections.abc import Callable, Iterable

import numpy as np
import pandas as pd
from jaxtyping import Float, Shaped


def _f1(predictions: np.ndarray, labels: np.ndarray) -> float:
    found = np.sum((predictions == 1) & (labels == 1))
    return float(2 * found / max(1, np.sum(predictions == 1) + np.sum(labels == 1)))


def _pearson(predictions: np.ndarray, labels: np.ndarray) -> float:
    """The correlation; 0.0 where one side is constant and it is undefined."""
    if np.ptp(predictions) == 0 or np.ptp(labels) == 0:
        return 0.0
    return float(np.corrcoef(predictions, labels)[0, 1])


def _spearman(predictions: np.ndarray, labels: np.ndarray) -> float:
    return _pearson(*(pd.Series(z).rank().to_numpy() for z in (predictions, labels)))


# Each takes predictions, classes or scores, and the labels. Matthews's is the correlation of two classes.
METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": lambda predictions, labels: float(np.mean(predictions == labels)),
    "f1": _f1,
    "matthews": _pearson,
    "pearson": _pearson,
    "spearman": _spearman,
}


def score(
    names: Iterable[str], outputs: Float[np.ndarray, "N outputs"], labels: Shaped[np.ndarray, " N"]
) -> dict[str, float]:
    """The metrics of one evaluation set; nan, all of them, if an output is not finite.

    Args:
      names: of metrics; those of another evaluation set, with a prefix, are passed over.
      outputs: logits of the classes, or one score each.
    """
    metrics = {name: METRICS[name] for name in names if name in METRICS}
    # In double precision: sums over an evaluation set lose digits in the outputs' own.
    outputs, labels = np.asarray(outputs, np.float64), np.asarray(labels)
    if not np.isfinite(outputs).all():
        return dict.fromkeys(metrics, float("nan"))
    predictions = outputs[:, 0] if outputs.shape[1] == 1 else outputs.argmax(axis=1)
    return {name: metric(predictions, labels.astype(np.float64)) for name, metric in metrics.items()}
