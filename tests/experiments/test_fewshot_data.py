"""Few-shot sets and the tasks drawn from them."""

import jax
import numpy as np
import pytest

from experiments import data
from experiments.data.fewshot import CIFAR_FS_SPLITS
from experiments.tasks.episodes import Images, Sine
from tests.experiments import fewshot_sets


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tfds")
    fewshot_sets.Drawings(data_dir=path).download_and_prepare()
    fewshot_sets.Colours(data_dir=path).download_and_prepare()
    return path


def ink(split):
    """The place of the ink in the first drawing of each class."""
    return [tuple(np.argwhere(image[0, :, :, 0] > 128)[0]) for image in split]


def test_omniglot_by_alphabet(folder):
    loaded = data.load_fewshot("omniglot", data_dir=folder)
    # Five of the seven alphabets are for validation; training has four rotations.
    assert loaded.train.shape == (2 * 2 * 4, 4, 28, 28, 1)
    assert loaded.validation.shape == (5 * 2, 4, 28, 28, 1)
    assert loaded.test.shape == (7 * 2, 4, 28, 28, 1)
    assert loaded.train.dtype == np.uint8
    assert not loaded.train.flags.writeable
    for split in (loaded.train, loaded.validation, loaded.test):
        assert 0 < split.mean() < 64  # ink is bright, paper dark
        np.testing.assert_array_equal(split, np.broadcast_to(split[:, :1], split.shape))
    places = [set(ink(s)) for s in (loaded.train[:4], loaded.validation, loaded.test)]
    assert len(places[0]) == 4
    assert not places[0] & places[1]
    assert not (places[0] | places[1]) & places[2]
    turned = np.rot90(loaded.train[:4], 3, axes=(2, 3))
    np.testing.assert_array_equal(loaded.train[12:], turned)


def test_cifar_fs_is_regrouped_from_cifar100(folder):
    loaded = data.load_fewshot("cifar_fs", data_dir=folder)
    colours = lambda split: split[:, 0, 0, 0, 0].tolist()
    # apple and bee; beaver and otter; baby and worm: train and test images together.
    assert colours(loaded.train) == [0, 3]
    assert colours(loaded.validation) == [2, 5]
    assert colours(loaded.test) == [1, 4]
    assert loaded.test.shape == (2, 4, 32, 32, 3)


def test_published_splits_have_their_sizes():
    validation, test = CIFAR_FS_SPLITS["validation"], CIFAR_FS_SPLITS["test"]
    assert (len(validation), len(test), len(validation & test)) == (16, 20, 0)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("omniglott", "name='omniglott'; accepted are omniglot, cifar_fs"),
        ("cifar_fs", "Accepted is a folder with cifar_fs or cifar100"),
        ("omniglot", "which holds no prepared set"),
    ],
)
def test_a_set_that_is_not_there(tmp_path, name, message):
    with pytest.raises(data.DataError, match=message):
        data.load_fewshot(name, data_dir=tmp_path)


def image_set(classes=6, examples=5):
    """The pixel of an image says its class and its number."""
    numbers = np.arange(classes * examples, dtype=np.uint8)
    split = numbers.reshape(classes, examples, 1, 1, 1)
    zero, one = np.zeros(1, np.float32), np.full(1, 1 / 255, np.float32)
    return data.FewShotSet("numbers", split, split, split, zero, one)


def test_episodes():
    episodes = Images(image_set(), ways=3, shots=2, queries=3)
    drawn = episodes.draw("train", 50, seed=0, step=4)
    support, query = jax.jit(episodes.build)(episodes.arrays("train"), drawn)
    assert support[0].shape == (50, 6, 1, 1, 1)
    assert query[0].shape == (50, 9, 1, 1, 1)
    # Examples alternate between the classes.
    np.testing.assert_array_equal(support[1][7], [0, 1, 2] * 2)
    np.testing.assert_array_equal(query[1][7], [0, 1, 2] * 3)
    number = lambda part: np.rint(part[0].reshape(50, -1)).astype(int)
    for mine, theirs in zip(number(support), number(query), strict=True):
        images = {*mine, *theirs}
        assert len(images) == 15  # nothing twice
        classes = mine[:3] // 5
        assert len(set(classes)) == 3
        np.testing.assert_array_equal(mine // 5, np.tile(classes, 2))
        np.testing.assert_array_equal(theirs // 5, np.tile(classes, 3))
    # Every class and every image has its turn.
    assert len(np.unique(number(support))) == 30


@pytest.mark.parametrize(
    "episodes", [Sine(3, 4), Images(image_set(), 2, 1, 1)], ids=["sine", "images"]
)
def test_tasks_depend_on_seed_part_and_step_alone(episodes):
    given = dict(part="train", tasks=3, seed=1, step=2)
    same = lambda a, b: all(np.array_equal(a[key], b[key]) for key in a)
    first = episodes.draw(**given)
    assert same(first, episodes.draw(**given))
    for change in (dict(part="test"), dict(seed=2), dict(step=3)):
        assert not same(first, episodes.draw(**given | change))


def test_sine_waves():
    episodes = Sine(shots=10, queries=5)
    drawn = episodes.draw("train", 200, seed=0, step=0)
    (x, y), (xq, yq) = episodes.build((), drawn)
    assert x.shape == y.shape == (200, 10, 1)
    assert xq.shape == yq.shape == (200, 5, 1)
    assert 4.9 < np.abs(x).max() <= 5
    assert 4 < np.abs(y).max() <= 5
    a, b = drawn["amplitude"], drawn["phase"]
    assert a.min() >= 0.1
    assert 0 <= b.min() <= b.max() <= np.pi
    np.testing.assert_allclose(yq, a * np.sin(xq + b), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(ways=7), "ways=7; accepted are 2 to 6, the classes for train"),
        (dict(shots=4), "shots=4 with queries=2; accepted are 5 or fewer together"),
    ],
)
def test_impossible_tasks(options, message):
    with pytest.raises(ValueError, match=message):
        Images(image_set(), **{"ways": 2, "shots": 1, "queries": 2, **options})
