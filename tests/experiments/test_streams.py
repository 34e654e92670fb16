"""Corruptions and the streams that are made of them."""

import numpy as np
import pytest

from experiments.data import Split
from experiments.data.corruptions import CORRUPTIONS, corrupt
from experiments.data.streams import SETTINGS, arrange, batches

SIDE = 32


def pictures(number, channels=3):
    """Discs and ramps, so that every corruption has something to change."""
    rng = np.random.default_rng(0)
    at = np.mgrid[:SIDE, :SIDE]
    images = np.empty((number, SIDE, SIDE, channels), np.uint8)
    for image in images:
        away = np.hypot(*(at - rng.integers(8, 24, 2)[:, None, None]))
        shade = 40 + 4 * at[1] + 90 * (away < 8)
        image[...] = np.clip(shade[..., None] + 12 * np.arange(channels), 0, 255)
    return images


@pytest.mark.parametrize("channels", [1, 3])
def test_each_corruption_changes_images_the_more_the_severer(channels):
    images = pictures(24, channels)
    kept = images.copy()
    assert len(CORRUPTIONS) == 15
    for name in CORRUPTIONS:
        away = []
        for severity in (1, 3, 5):
            found = corrupt(images, name, severity, seed=1)
            assert (found.shape, found.dtype) == (images.shape, images.dtype)
            away.append(np.abs(found.astype(float) - images).mean())
            again = corrupt(images, name, severity, seed=1)
            np.testing.assert_array_equal(found, again)
        assert 0.3 < away[0] < away[1] < away[2], (name, away)
    np.testing.assert_array_equal(images, kept)
    np.testing.assert_array_equal(corrupt(images, "clean", 5), images)


@pytest.mark.parametrize("name", ["gaussian_noise", "frost", "occlusion", "snow"])
def test_what_is_random_differs_from_image_to_image_and_with_the_seed(name):
    images = np.repeat(pictures(1), 2, axis=0)
    found = corrupt(images, name, 3, seed=1)
    assert not np.array_equal(*found)
    assert not np.array_equal(found, corrupt(images, name, 3, seed=2))


@pytest.mark.parametrize(
    ("name", "severity", "message"),
    [
        ("fogg", 1, "name='fogg'.*nearest: fog"),
        ("fog", 0, "severity=0; accepted are 1"),
    ],
)
def test_what_is_no_corruption_is_said(name, severity, message):
    with pytest.raises(ValueError, match=message):
        corrupt(pictures(1), name, severity)


LABELS = np.arange(60) % 3
SHIFTS = ("fog", "contrast", "brightness")


def planned(setting, **options):
    return arrange(LABELS, setting, shifts=SHIFTS, count=20, seed=3, **options)


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_plan_has_each_shift_as_often(setting):
    plan = planned(setting)
    counts = np.bincount(plan.shift, minlength=4)
    wanted = {"clean": [60, 0, 0, 0], "return": [60, 20, 20, 20]}
    assert counts.tolist() == wanted.get(setting, [0, 20, 20, 20])
    assert plan.fresh == ({0, 20, 40} if setting == "reset" else {0})
    assert len(planned(setting, repeats=2)) == 2 * len(plan)


def test_the_order_is_that_of_the_setting():
    assert np.all(np.diff(planned("continual").shift) >= 0)
    assert np.sum(np.diff(planned("mixed").shift) != 0) > 15
    labels = LABELS[planned("correlated").index].reshape(3, 20)
    assert np.all(np.diff(labels) >= 0)
    severity = planned("gradual").severity.reshape(3, 20)
    assert severity.max() == 5
    assert severity[:, 0].tolist() == severity[:, -1].tolist() == [1, 1, 1]
    assert planned("return").shift[20:40].tolist() == [0] * 20


def test_batches_hold_what_was_planned():
    split = Split(pictures(60), LABELS.astype(np.int32))
    plan = planned("reset")
    found = list(batches(split, plan, 6, seed=1))
    assert len(found) == 9  # three of each shift; the rest of two is left out
    assert [batch.fresh for batch in found] == [True, False, False] * 3
    assert all(np.ptp(batch.shift) == 0 for batch in found)
    dark = np.concatenate([b.images for b in batches(split, planned("clean"), 20)])
    plain = split.images[planned("clean").index]
    np.testing.assert_array_equal(dark, plain)
    labels = np.concatenate([b.labels for b in batches(split, planned("mixed"), 20)])
    np.testing.assert_array_equal(labels, LABELS[planned("mixed").index])
