"""Subsets: the authors' rule to the image; the random rule's nesting and independence; the command."""

import hashlib
from itertools import pairwise

import numpy as np
import pytest
from conftest import run_python

from convit_jax.data.subsample import select
from convit_jax.data.tfds import TfdsImages
from convit_jax.errors import UserError

both_rules = pytest.mark.parametrize("rule", ["first", "random"])


def data_set(*sizes, shuffle=None):
    """Labels and names of classes of these sizes, in the order of names or shuffled."""
    names = [f"{label}/{number:05d}" for label, size in enumerate(sizes) for number in range(size)]
    if shuffle is not None:
        names = np.random.default_rng(shuffle).permutation(names).tolist()
    return np.array([int(name.split("/")[0]) for name in names]), names


def chosen_names(labels, names, **settings):
    return {names[index] for index in select(labels, names, **settings)}


@pytest.mark.parametrize(  # 100 * 0.29 is 28.999999999999996
    ("size", "fraction", "kept"), [(100, 0.29, 28), (100, 0.57, 56), (1300, 0.05, 65), (1, 1.0, 1), (7, 0.999, 6)]
)
@both_rules
def test_a_class_keeps_int_n_f_images(size, fraction, kept, rule):
    labels, names = data_set(size, 50)
    indices = select(labels, names, sampling_ratio=fraction, rule=rule)
    assert np.bincount(labels[indices]).tolist() == [kept, int(50 * fraction)]


def test_the_first_rule_keeps_the_first_names_of_each_class():
    expected = {f"{label}/{number:05d}" for label, kept in enumerate((5, 2, 3)) for number in range(kept)}
    assert chosen_names(*data_set(10, 4, 7, shuffle=0), sampling_ratio=0.5) == expected


@both_rules
def test_indices_are_ascending_int64_and_do_not_depend_on_the_order_of_the_records(rule):
    results = set()
    for shuffle in (None, 0, 1):
        labels, names = data_set(30, 20, shuffle=shuffle)
        indices = select(labels, names, sampling_ratio=0.4, rule=rule, seed=1)
        assert indices.dtype == np.int64
        assert (np.diff(indices) > 0).all()
        results.add(frozenset(names[index] for index in indices))
        np.testing.assert_array_equal(select(labels, names, rule=rule), np.arange(50))
    assert len(results) == 1


@both_rules
def test_subsets_are_nested_and_a_class_does_not_depend_on_the_others(rule):
    labels, names = data_set(10, 26, 18, shuffle=3)
    for seed in (0, 7):
        subsets = [set(select(labels, names, sampling_ratio=f, rule=rule, seed=seed)) for f in (0.1, 0.3, 0.5, 1)]
        assert all(small < large for small, large in pairwise(subsets))
        few = select(labels, names, sampling_ratio=0.5, rule=rule, seed=seed, num_classes=2)
        assert {*few} == {index for index in subsets[2] if labels[index] < 2}
    small = chosen_names(*data_set(30), sampling_ratio=0.4, rule=rule, seed=1)
    large = chosen_names(*data_set(30, 500), sampling_ratio=0.4, rule=rule, seed=1)
    assert {name for name in large if name.startswith("0/")} == small


def test_random_subsets_differ_by_seed_and_take_every_image_equally_often():
    labels, names = data_set(20)
    subsets = [select(labels, names, sampling_ratio=0.25, rule="random", seed=seed) for seed in range(2000)]
    assert len({tuple(subset) for subset in subsets[:4]}) == 4
    counts = sum(np.bincount(subset, minlength=20) for subset in subsets)
    assert np.abs(counts / 2000 - 0.25).max() < 0.04  # four standard deviations


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(num_classes=0), r"data\.num_classes is 0.*has 2 classes"),
        (dict(num_classes=3), r"data\.num_classes is 3.*has 2 classes"),
        (dict(sampling_ratio=0.2), r"no image of class 1, which has 4: give at least"),
    ],
)
def test_impossible_subsets_are_refused_with_the_field(settings, message):
    with pytest.raises(UserError, match=message):
        select(*data_set(10, 4), **settings)


@pytest.mark.parametrize("size", [3, 7, 49, 1300])
def test_the_fraction_in_the_message_is_enough_and_an_empty_class_no_error(size):
    labels, names = data_set(size, 0, size)
    with pytest.raises(UserError, match="give at least") as caught:
        select(labels, names, sampling_ratio=0.5 / size)
    enough = float(str(caught.value).split("give at least ")[1].rstrip("."))
    assert 2 <= len(select(labels, names, sampling_ratio=enough)) <= 4


def test_the_command_lists_a_subset_with_the_hash_of_its_lines(tfds_data):
    root = tfds_data / "tfrecord"
    config = ["--config=configs/convit_s.py", f"--config.data.dir={root}", "--config.data.name=cifar10"]
    done = run_python("-m", "convit_jax.subset", *config, "--config.data.sampling_ratio=0.5", "--list")
    *lines, summary = done.stdout.splitlines(keepends=True)
    source = TfdsImages("cifar10", root, "train")
    expected = [source.names[index] for index in select(source.labels, source.names, sampling_ratio=0.5)]
    assert [line.rstrip("\n") for line in lines] == expected
    digest = hashlib.sha256("".join(lines).encode()).hexdigest()
    assert summary.startswith("# 10 of 20 images in 10 classes of cifar10, ratio 0.5, rule first")
    assert summary.endswith(f"sha256 {digest}\n")
