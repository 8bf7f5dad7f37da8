import numpy as np
import pytest

from experiments import metrics

# Labels and predictions by hand: 3 true positives, 1 false positive, 2 false negatives, 2 true negatives.
LABELS = np.array([1, 1, 1, 0, 1, 1, 0, 0], np.int32)
PREDICTIONS = np.array([1, 1, 1, 1, 0, 0, 0, 0])
LOGITS = np.eye(2, dtype=np.float32)[PREDICTIONS] - 0.5
CLASSES = [
    ("accuracy", 5 / 8),
    ("f1", 2 * 3 / (2 * 3 + 1 + 2)),
    ("matthews", (3 * 2 - 1 * 2) / np.sqrt((3 + 1) * (3 + 2) * (2 + 1) * (2 + 2))),
]
# Deviations of the scores from their mean: -1.5, -0.5, 0.5, 1.5; of the outputs: -2, -3, 0, 5.
SCORES = np.array([1, 2, 3, 4], np.float32)
OUTPUTS = np.array([[2], [1], [4], [9]], np.float32)
CORRELATIONS = [
    ("pearson", (3 + 1.5 + 0 + 7.5) / np.sqrt((2.25 + 0.25 + 0.25 + 2.25) * (4 + 9 + 0 + 25))),
    ("spearman", 1 - 6 * (1 + 1) / (4 * (16 - 1))),  # the ranks are 2, 1, 3, 4
]


@pytest.mark.parametrize(("name", "expected"), CLASSES)
def test_classes(name, expected):
    assert metrics.score([name], LOGITS, LABELS) == {name: pytest.approx(expected)}


@pytest.mark.parametrize(("name", "expected"), CORRELATIONS)
def test_correlations(name, expected):
    assert metrics.score([name], OUTPUTS, SCORES) == {name: pytest.approx(expected)}


def test_three_classes():
    outputs = np.array([[0, 1, 2], [3, 1, 2], [0, 5, 2], [0, 1, 2]], np.float32)
    assert metrics.score(["accuracy"], outputs, np.array([2, 0, 1, 1])) == {"accuracy": 0.75}


@pytest.mark.parametrize("always", [0, 1])
@pytest.mark.parametrize("labels", [LABELS, np.zeros_like(LABELS), np.ones_like(LABELS)])
def test_constant_classes(always, labels):
    logits = np.eye(2, dtype=np.float32)[np.full(len(labels), always)]
    scores = metrics.score(["accuracy", "f1", "matthews"], logits, labels)
    assert scores["accuracy"] == np.mean(labels == always)
    assert scores["matthews"] == 0
    assert scores["f1"] == (
        0 if not always else pytest.approx(2 * labels.sum() / (labels.sum() + len(labels)))
    )


@pytest.mark.parametrize("name", ["pearson", "spearman"])
@pytest.mark.parametrize(
    ("outputs", "labels"),
    [
        (np.full((4, 1), 0.1, np.float32), SCORES),
        (OUTPUTS, np.full(4, 0.1, np.float32)),
        (OUTPUTS[:1], SCORES[:1]),
    ],
    ids=["outputs", "labels", "one example"],
)
def test_constant_scores(name, outputs, labels):
    assert metrics.score([name], outputs, labels) == {name: 0}


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    ("names", "outputs", "labels"),
    [
        ([name for name, _ in CLASSES], LOGITS, LABELS),
        ([name for name, _ in CORRELATIONS], OUTPUTS, SCORES),
    ],
    ids=["classes", "scores"],
)
def test_not_finite(bad, names, outputs, labels):
    outputs = outputs.copy()
    outputs[1, 0] = bad
    scores = metrics.score(names, outputs, labels)
    assert list(scores) == names
    assert np.isnan(list(scores.values())).all()


def test_metrics_of_another_evaluation_set_are_passed_over():
    assert metrics.score(("accuracy", "mismatched_accuracy"), LOGITS, LABELS) == {"accuracy": 5 / 8}
