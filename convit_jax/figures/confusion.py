"""The confusion matrix of an evaluation: a row per class, a column per prediction."""

from collections.abc import Callable

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

MOST_NAMED = 100  # classes, for names at the axes
MOST_NUMBERED = 20  # classes, for counts to be readable in the cells


def plot_confusion(labels: np.ndarray, predicted: np.ndarray, class_name: Callable[[int], str]) -> Figure:
    """Returns the figure: counts, and colours for their share of the row. Classes without images are in one column."""
    classes = np.unique(labels)
    known = np.isin(predicted, classes)
    names = [class_name(label).split(",")[0] for label in classes]  # ImageNet has several words for a class
    of_columns = names if known.all() else [*names, "others"]
    counts = np.zeros((len(names), len(of_columns)), int)
    np.add.at(counts, (np.searchsorted(classes, labels), np.where(known, np.searchsorted(classes, predicted), -1)), 1)
    shares = counts / counts.sum(axis=1, keepdims=True)

    side = 2.2 + min(max(0.15 * len(names), 2.2), 15)
    figure = Figure(figsize=(1.1 * side, side), layout="compressed")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, 0, 1))  # rare confusions are visible, too
    if len(names) <= MOST_NAMED:
        axes.set_xticks(range(len(of_columns)), of_columns, rotation=90)
        axes.set_yticks(range(len(names)), names)
    axes.tick_params(length=0, labelsize=7)
    axes.set(xlabel="prediction", ylabel="class")
    if len(names) <= MOST_NUMBERED:
        for (row, column), count in np.ndenumerate(counts):
            if count:
                color = "white" if shares[row, column] > 0.4 else "black"
                axes.text(column, row, str(count), ha="center", va="center", fontsize=7, color=color)
    bar = figure.colorbar(image, ax=axes, shrink=0.6, format=PercentFormatter(1), label="share of the class's images")
    bar.ax.tick_params(labelsize=7)
    return figure
