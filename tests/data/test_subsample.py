"""Subsets: the authors' rule to the image; the random rule's nesting and independence; the command."""

import hashlib
from itertools import pairwise

import numpy as np
import pytest
from conftest import names, run_python

from convit_jax.data.index import Source, make_index
from convit_jax.data.subsample import select
from convit_jax.data.tfds import TfdsImages
from convit_jax.errors import UserError

both_rules = pytest.mark.parametrize("rule", ["first", "random"])


def data_set(*sizes):
    """A source with classes of these sizes."""
    source = Source()
    source.class_names = tuple(map(str, range(len(sizes))))
    numbers = [(label, number) for label, size in enumerate(sizes) for number in range(size)]
    source.index = make_index([label for label, _ in numbers], [f"{label}/{number:05d}" for label, number in numbers])
    return source


@pytest.mark.parametrize(  # 100 * 0.29 is 28.999999999999996
    ("size", "fraction", "kept"), [(100, 0.29, 28), (100, 0.57, 56), (1300, 0.05, 65), (1, 1.0, 1), (7, 0.999, 6)]
)
@both_rules
def test_a_class_keeps_int_n_f_images_in_ascending_order(size, fraction, kept, rule):
    source = data_set(size, 50)
    indices = select(source, sampling_ratio=fraction, rule=rule)
    assert np.bincount(source.labels[indices]).tolist() == [kept, int(50 * fraction)]
    assert indices.dtype == np.int64
    assert (np.diff(indices) > 0).all()


def test_the_first_rule_keeps_the_first_names_of_each_class():
    assert select(data_set(10, 4, 7), sampling_ratio=0.5).tolist() == [0, 1, 2, 3, 4, 10, 11, 14, 15, 16]


@both_rules
def test_subsets_are_nested_and_a_class_does_not_depend_on_the_others(rule):
    source = data_set(10, 26, 18)
    for seed in (0, 7):
        subsets = [set(select(source, sampling_ratio=f, rule=rule, seed=seed)) for f in (0.1, 0.3, 0.5, 1)]
        assert all(small < large for small, large in pairwise(subsets))
        few = select(source, sampling_ratio=0.5, rule=rule, seed=seed, num_classes=2)
        assert {*few} == {index for index in subsets[2] if source.labels[index] < 2}
    small, large = (select(data_set(*sizes), sampling_ratio=0.4, rule=rule, seed=1) for sizes in ((30,), (30, 500)))
    np.testing.assert_array_equal(large[large < 30], small)


def test_random_subsets_differ_by_seed_and_take_every_image_equally_often():
    source = data_set(20)
    subsets = [select(source, sampling_ratio=0.25, rule="random", seed=seed) for seed in range(2000)]
    assert subsets[0].tolist() == [1, 3, 5, 7, 10]  # in every version
    assert len({tuple(subset) for subset in subsets[:4]}) == 4
    counts = sum(np.bincount(subset, minlength=20) for subset in subsets)
    assert np.abs(counts / 2000 - 0.25).max() < 0.04  # four standard deviations


@pytest.mark.parametrize("number", [0, 3])
def test_more_classes_than_the_data_has_are_refused(number):
    with pytest.raises(UserError, match=rf"data\.num_classes is {number}.*has 2 classes"):
        select(data_set(10, 4), num_classes=number)


@pytest.mark.parametrize("size", [3, 7, 49, 1300])
def test_a_fraction_that_leaves_a_class_empty_is_refused_with_one_that_is_enough(size):
    source = data_set(size, 0, size)  # a class without images is no error
    with pytest.raises(UserError, match=f"no image of class 0, which has {size}: give at least") as caught:
        select(source, sampling_ratio=0.5 / size)
    enough = float(str(caught.value).split("give at least ")[1].rstrip("."))
    assert 2 <= len(select(source, sampling_ratio=enough)) <= 4


def test_the_command_lists_a_subset_with_the_hash_of_its_lines(tfds_data):
    root = tfds_data / "tfrecord"
    config = ["--config=configs/convit_s.py", f"--config.data.dir={root}", "--config.data.name=cifar10"]
    done = run_python("-m", "convit_jax.subset", *config, "--config.data.sampling_ratio=0.5", "--list")
    *lines, summary = done.stdout.splitlines(keepends=True)
    source = TfdsImages("cifar10", root, "train")
    expected = np.array(names(source))[select(source, sampling_ratio=0.5)]
    assert [line.rstrip("\n") for line in lines] == expected.tolist()
    digest = hashlib.sha256("".join(lines).encode()).hexdigest()
    assert summary.startswith("# 10 of 20 images in 10 classes of cifar10, ratio 0.5, rule first")
    assert summary.endswith(f"sha256 {digest}\n")
