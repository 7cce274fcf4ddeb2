"""Facts about ImageNet-1k: the number of its images, and the words for its classes."""

from pathlib import Path

IMAGENET_IMAGES = {"train": 1_281_167, "validation": 50_000}

_LINES = (Path(__file__).parent / "imagenet_classes.txt").read_text().splitlines()
# {WordNet id: words}, in the order of the labels.
IMAGENET = dict(line.split(" ", 1) for line in _LINES if not line.startswith("#"))


def words(class_name: str) -> str:
    """Returns the words for a WordNet id ("n01440764": "tench, Tinca tinca"); other names as they are."""
    return IMAGENET.get(class_name, class_name)
