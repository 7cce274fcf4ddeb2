"""What classes are called: by their folder; ImageNet's folders are WordNet ids, which have words."""

from pathlib import Path

_LINES = (Path(__file__).parent / "imagenet_classes.txt").read_text().splitlines()
# {WordNet id: words} of ImageNet-1k, in the order of its labels.
IMAGENET = dict(line.split(" ", 1) for line in _LINES if not line.startswith("#"))


def words(class_name):
    """What a class shows, for people: "n01440764" is "tench, Tinca tinca"; other names say it themselves."""
    return IMAGENET.get(class_name, class_name)
