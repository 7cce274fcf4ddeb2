"""The confusion matrix counts every image once."""

import numpy as np

from convit_jax.figures.confusion import plot_confusion


def test_counts_of_classes_and_of_predictions_without_images():
    labels, predicted = np.array([3, 3, 3, 7, 7]), np.array([3, 7, 9, 7, 7])
    axes, _ = plot_confusion(labels, predicted, "class {}".format).axes
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["class 3", "class 7"]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["class 3", "class 7", "others"]
    found = {text.get_position()[::-1]: text.get_text() for text in axes.texts}
    assert found == {(0, 0): "1", (0, 1): "1", (0, 2): "1", (1, 1): "2"}
    np.testing.assert_allclose(axes.images[0].get_array(), [[1 / 3, 1 / 3, 1 / 3], [0, 1, 0]])


def test_names_of_many_classes_are_left_out():
    axes, _ = plot_confusion(np.arange(101), np.arange(101), str).axes
    assert len(axes.get_xticks()) < 101
    np.testing.assert_array_equal(axes.images[0].get_array(), np.eye(101))
