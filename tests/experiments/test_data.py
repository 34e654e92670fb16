"""Loading, splitting and batching, on small files made here."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from experiments import data
from experiments.data import medmnist, prepared, tiny_imagenet
from experiments.data.dataset import channel_statistics, hold_out, make_dataset
from tests.experiments.small_sets import (
    jpeg,
    make_split,
    medmnist_arrays,
    tiny_imagenet_files,
    write_zip,
)


class TestDataset:
    def test_digits(self):
        digits = data.load("digits")
        splits = (digits.train, digits.validation, digits.test)
        assert [len(split) for split in splits] == [1257, 180, 360]
        assert digits.image_shape == (8, 8, 1)
        assert digits.train.images.max() == 255
        for split in splits:
            assert split.images.dtype == np.uint8
            assert split.labels.dtype == np.int32
            counts = np.bincount(split.labels)
            assert counts.max() - counts.min() <= 8

    def test_digits_splits_are_disjoint_and_test_does_not_move(self):
        first, second = (data.load("digits", seed=seed) for seed in (0, 1))
        np.testing.assert_array_equal(first.test.images, second.test.images)
        assert not np.array_equal(first.validation.labels, second.validation.labels)
        again = data.load("digits", seed=0)
        np.testing.assert_array_equal(first.train.images, again.train.images)

    def test_arrays_are_read_only(self):
        with pytest.raises(ValueError, match="read-only"):
            data.load("digits").train.labels[0] = 1

    def test_statistics_are_those_of_the_pixels(self):
        images = make_split(20, 2, (5, 4, 3)).images
        images[..., 2] = 9
        mean, std = channel_statistics(images)
        scaled = images.astype(np.float64) / 255
        np.testing.assert_allclose(mean, scaled.mean((0, 1, 2)), rtol=1e-6)
        np.testing.assert_allclose(std[:2], scaled.std((0, 1, 2))[:2], rtol=1e-6)
        assert std[2] == 1.0

    def test_hold_out_is_stratified_fixed_and_complete(self):
        split = make_split(100, 4, (1, 1, 1))
        split = data.Split(np.arange(100, dtype=np.uint8)[:, None], split.labels)
        rest, held = hold_out(split, seed=3)
        assert np.bincount(held.labels).tolist() == [2, 2, 2, 2]  # round(2.5) is 2.
        both = np.concatenate([rest.images, held.images]).ravel()
        np.testing.assert_array_equal(np.sort(both), np.arange(100))
        np.testing.assert_array_equal(held.images, hold_out(split, seed=3)[1].images)
        other = hold_out(split, seed=4)[1]
        assert not np.array_equal(held.images, other.images)

    def test_hold_out_leaves_every_class_an_example(self):
        split = data.Split(np.zeros((3, 1), np.uint8), np.array([0, 1, 1]))
        rest, held = hold_out(split, seed=0)
        assert sorted(rest.labels) == [0, 1]
        assert sorted(held.labels) == [1]

    def test_folds_test_every_image_once_and_then_along_others(self):
        digits = data.load("digits")
        parts = [data.fold(digits, 5, number, seed=0) for number in range(10)]
        flat = lambda split: {image.tobytes() for image in split.images}
        held, size = flat(digits.validation), len(digits.train) + len(digits.test)
        for part in parts:
            splits = flat(part.train), flat(part.validation), flat(part.test)
            assert sum(map(len, splits)) == len(set.union(*splits)) == size + len(held)
            assert splits[1] == held
            counts = np.bincount(part.test.labels)
            assert counts.max() - counts.min() <= 3
        for repeat in (parts[:5], parts[5:]):
            assert sum(len(part.test) for part in repeat) == size
            assert len(set.union(*(flat(part.test) for part in repeat))) == size
        assert flat(parts[0].test) != flat(parts[5].test)
        other = data.fold(digits, 5, 0, seed=1)
        assert flat(other.test) not in [flat(part.test) for part in parts]

    def test_more_folds_than_images_of_a_class_are_an_error(self):
        with pytest.raises(data.DataError, match=r"folds=600; accepted are 2 to 1\d\d"):
            data.fold(data.load("digits"), 600, 0, seed=0)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"num_classes": 3}, "labels from 0 to 3; accepted are 0 to 2"),
            ({"test": make_split(8, 4, (9, 9, 1))}, "must have one shape"),
            ({"train": make_split(8, 2)}, "2 classes have no training example"),
            ({"test": make_split(0, 4)}, "no examples"),
        ],
    )
    def test_splits_that_do_not_fit(self, changes, message):
        arguments = {
            "train": make_split(16, 4),
            "validation": None,
            "test": make_split(8, 4),
            "num_classes": 4,
        }
        with pytest.raises(data.DataError, match=message):
            make_dataset("toy", **(arguments | changes), seed=0)


class TestNames:
    def test_missing_data_dir_lists_the_names(self):
        with pytest.raises(data.DataError, match=r"data_dir=None.*digits.*breastmnist"):
            data.load("fashion_mnist")

    def test_absent_data_dir(self, tmp_path):
        with pytest.raises(data.DataError, match="is no folder"):
            data.load("fashion_mnist", data_dir=tmp_path / "absent")

    def test_a_file_is_no_data_dir(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(data.DataError, match="is no folder"):
            data.load("fashion_mnist", data_dir=tmp_path / "file", download=True)

    def test_unknown_set_lists_what_the_folder_holds(self, tmp_path):
        np.savez(tmp_path / "breastmnist.npz", **medmnist_arrays())
        with pytest.raises(data.DataError) as caught:
            data.load("cifar1O", data_dir=tmp_path)
        message = str(caught.value)
        assert "name='cifar1O'" in message
        assert "holds breastmnist. " in message
        assert "tiny_imagenet" in message
        assert "\n" not in message

    def test_multi_label_set_is_refused(self):
        with pytest.raises(data.DataError, match=r"chestmnist.*up to 14 labels"):
            data.load("chestmnist")


class TestMedmnist:
    @pytest.mark.parametrize("name", ["breastmnist", "retinamnist"])
    def test_raw_file(self, tmp_path, name):
        arrays = medmnist_arrays(medmnist.SETS[name].channels)
        np.savez(tmp_path / f"{name}.npz", **arrays)
        dataset = data.load(name, data_dir=str(tmp_path))
        assert dataset.name == name
        assert dataset.num_classes == len(medmnist.SETS[name].classes)
        assert dataset.image_shape == (28, 28, medmnist.SETS[name].channels)
        for split, key in ((dataset.validation, "val"), (dataset.test, "test")):
            images = arrays[f"{key}_images"].reshape(split.images.shape)
            np.testing.assert_array_equal(split.images, images)
            np.testing.assert_array_equal(split.labels, arrays[f"{key}_labels"][:, 0])

    def test_classes_of_the_publishers(self):
        classes = {name: len(spec.classes) for name, spec in medmnist.SETS.items()}
        assert classes == {
            "pathmnist": 9,
            "dermamnist": 7,
            "octmnist": 4,
            "pneumoniamnist": 2,
            "retinamnist": 5,
            "breastmnist": 2,
            "bloodmnist": 8,
            "tissuemnist": 8,
            "organamnist": 11,
            "organcmnist": 11,
            "organsmnist": 11,
        }

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"val_labels": None}, "lacks val_labels; it has"),
            ({"train_images": np.zeros((12, 9, 9), np.uint8)}, r"uint8 \(12, 9, 9\)"),
            ({"train_images": np.zeros((12, 28, 28))}, r"accepted is uint8 \(n, 28, 2"),
            ({"test_labels": np.zeros((4, 14), np.uint8)}, r"accepted is integer \(4"),
            ({"test_labels": np.zeros((3, 1), np.uint8)}, r"accepted is integer \(4"),
            ({"train_labels": np.full((12, 1), 5)}, "accepted are 0 to 1"),
            ({"test_labels": np.array([{}] * 4)}, "not a whole .npz file"),
        ],
    )
    def test_wrong_arrays(self, tmp_path, changes, message):
        arrays = {
            k: v for k, v in (medmnist_arrays() | changes).items() if v is not None
        }
        np.savez(tmp_path / "breastmnist.npz", **arrays)
        with pytest.raises(data.DataError, match=message):
            data.load("breastmnist", data_dir=tmp_path)

    @pytest.mark.parametrize("keep", [0.0, 0.5])
    def test_truncated_file(self, tmp_path, keep):
        path = tmp_path / "breastmnist.npz"
        np.savez_compressed(path, **medmnist_arrays())
        content = path.read_bytes()
        path.write_bytes(content[: int(keep * len(content))])
        with pytest.raises(data.DataError, match=r"not a whole \.npz file"):
            data.load("breastmnist", data_dir=tmp_path)

    def test_flipped_byte(self, tmp_path):
        path = tmp_path / "breastmnist.npz"
        np.savez_compressed(path, **medmnist_arrays())
        content = bytearray(path.read_bytes())
        content[len(content) // 3] ^= 0xFF
        path.write_bytes(content)
        with pytest.raises(data.DataError, match=r"not a whole \.npz file"):
            data.load("breastmnist", data_dir=tmp_path)

    def test_a_bare_array_is_no_npz(self, tmp_path):
        with (tmp_path / "breastmnist.npz").open("wb") as file:
            np.save(file, np.zeros(3))
        with pytest.raises(data.DataError, match=r"not a whole \.npz file"):
            data.load("breastmnist", data_dir=tmp_path)


class TestTinyImagenet:
    def test_raw_file(self, tmp_path):
        files = tiny_imagenet_files()
        write_zip(tmp_path / "tiny-imagenet-200.zip", files)
        dataset = data.load("tiny_imagenet", data_dir=tmp_path)
        assert dataset.num_classes == 200
        assert dataset.image_shape == (64, 64, 3)
        assert np.unique(dataset.train.labels).tolist() == [0, 7, 199]
        assert np.bincount(dataset.train.labels)[[0, 7, 199]].tolist() == [9, 9, 9]
        assert np.bincount(dataset.validation.labels)[[0, 7, 199]].tolist() == [1, 1, 1]
        assert sorted(dataset.test.labels) == [0, 7, 199]
        with Image.open(io.BytesIO(files["val/images/val_7.JPEG"])) as image:
            expected = np.asarray(image)
        (index,) = np.flatnonzero(dataset.test.labels == 7)
        np.testing.assert_array_equal(dataset.test.images[index], expected)

    def test_grey_images_become_coloured(self, tmp_path):
        path = write_zip(tmp_path / "tiny-imagenet-200.zip", tiny_imagenet_files())
        dataset = data.load("tiny_imagenet", data_dir=tmp_path)
        images = np.concatenate([dataset.train.images, dataset.validation.images])
        grey = (images == images[..., :1]).all(axis=(1, 2, 3))
        assert grey.sum() == 3
        assert len(list(tiny_imagenet.read(path, "train"))) == 30

    def test_two_files_are_ambiguous(self, tmp_path):
        for name in ("tiny-imagenet-200.zip", "tiny-imagenet-200-part.zip"):
            (tmp_path / name).touch()
        with pytest.raises(data.DataError, match="accepted is one file"):
            data.load("tiny_imagenet", data_dir=tmp_path)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"wnids.txt": None}, r"lacks .*wnids\.txt"),
            ({"wnids.txt": b"n0 n1"}, "lists 2 classes in wnids.txt; accepted are 200"),
            ({"val/val_annotations.txt": None}, r"lacks .*val_annotations\.txt"),
            ({"val/val_annotations.txt": b"val_0.JPEG"}, "not a whole zip file"),
            ({"val/val_annotations.txt": b""}, "no validation images"),
            ({"val/images/val_7.JPEG": None}, r"lacks .*val_7\.JPEG"),
            ({"train/n9/images/n9_0.JPEG": jpeg(0)}, "lacks 'n9'"),
            ({"val/images/val_7.JPEG": jpeg(0)[:400]}, r"val_7\.JPEG a damaged image"),
            ({"val/images/val_7.JPEG": b"none"}, r"val_7\.JPEG a damaged image"),
            ({"val/images/val_7.JPEG": jpeg(0, size=32)}, r"a image of \(32, 32\)"),
        ],
    )
    def test_wrong_archive(self, tmp_path, changes, message):
        files = tiny_imagenet_files() | changes
        files = {
            name: content for name, content in files.items() if content is not None
        }
        write_zip(tmp_path / "tiny-imagenet-200.zip", files)
        with pytest.raises(data.DataError, match=message):
            data.load("tiny_imagenet", data_dir=tmp_path)

    def test_truncated_archive(self, tmp_path):
        path = write_zip(tmp_path / "tiny-imagenet-200.zip", tiny_imagenet_files())
        path.write_bytes(path.read_bytes()[:5000])
        with pytest.raises(data.DataError, match="not a whole zip file"):
            data.load("tiny_imagenet", data_dir=tmp_path)

    def test_flipped_byte(self, tmp_path):
        path = write_zip(tmp_path / "tiny-imagenet-200.zip", tiny_imagenet_files())
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 0xFF
        path.write_bytes(content)
        with pytest.raises(data.DataError, match=r"not a whole zip file \(Bad CRC"):
            data.load("tiny_imagenet", data_dir=tmp_path)


class TestBatches:
    def test_every_example_at_most_once(self):
        split = data.Split(
            np.arange(103, dtype=np.uint8).reshape(-1, 1, 1, 1), np.arange(103)
        )
        batches = list(data.epoch_batches(split, 10, seed=0, epoch=0))
        assert [len(labels) for _, labels in batches] == [10] * 10
        labels = np.concatenate([labels for _, labels in batches])
        assert len(np.unique(labels)) == 100
        for images, labels in batches:
            np.testing.assert_array_equal(images.ravel(), labels)

    def test_order_depends_on_seed_and_epoch_alone(self):
        split = make_split(64, 64, (1, 1, 1))
        order = lambda seed, epoch: np.concatenate(
            [y for _, y in data.epoch_batches(split, 16, seed=seed, epoch=epoch)]
        ).tolist()
        assert order(1, 2) == order(1, 2)
        assert len({tuple(order(s, e)) for s in range(3) for e in range(3)}) == 9

    @pytest.mark.parametrize("batch_size", [0, 11, -1])
    def test_impossible_size_is_an_error_at_once(self, batch_size):
        with pytest.raises(ValueError, match="accepted are 1 to 10"):
            data.epoch_batches(make_split(10, 2), batch_size, seed=0, epoch=0)

    def test_normalize_under_jit(self):
        digits = data.load("digits")
        normalize = jax.jit(lambda images: data.normalize(images, digits))
        images = normalize(digits.train.images)
        assert images.dtype == jnp.float32
        assert abs(float(images.mean())) < 1e-4
        assert abs(float(images.std()) - 1) < 1e-4
        expected = (digits.train.images / 255.0 - digits.mean) / digits.std
        np.testing.assert_allclose(images, expected, atol=1e-5)

    def test_normalize_is_strict(self, strict_promotion):
        digits = data.load("digits")
        data.normalize(jnp.asarray(digits.test.images[:2]), digits)


class TestAugment:
    def test_every_image_is_a_shifted_and_perhaps_flipped_crop(self):
        images = make_split(24, 2, (6, 5, 3)).images
        out = np.asarray(jax.jit(data.augment)(images, jax.random.key(0)))
        assert out.shape == images.shape
        assert out.dtype == np.uint8
        padded = np.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)))
        seen = set()
        for image, big in zip(out, padded, strict=True):
            matches = [
                (y, x, flip)
                for y in range(9)
                for x in range(9)
                for flip in (False, True)
                if np.array_equal(
                    image[:, ::-1] if flip else image, big[y : y + 6, x : x + 5]
                )
            ]
            assert matches
            seen.update(matches)
        assert {flip for *_, flip in seen} == {False, True}
        assert len({(y, x) for y, x, _ in seen}) > 12

    def test_depends_on_the_key_alone(self):
        images = make_split(8, 2).images
        first, again, other = (
            np.asarray(data.augment(images, jax.random.key(seed))) for seed in (0, 0, 1)
        )
        np.testing.assert_array_equal(first, again)
        assert not np.array_equal(first, other)

    def test_is_strict_and_compiles_once(self, strict_promotion):
        augment = jax.jit(lambda images, key: data.augment(images, key))
        images = jnp.asarray(make_split(4, 2).images)
        for seed in range(3):
            augment(images, jax.random.key(seed))
        assert augment._cache_size() == 1


def test_versions_are_ordered_by_number(tmp_path):
    for version in ("3.9.0", "3.10.0", "incomplete.AB_4.0.0"):
        folder = tmp_path / "toy" / version
        folder.mkdir(parents=True)
        (folder / "dataset_info.json").touch()
    assert prepared.prepared_sets(tmp_path) == {"toy": tmp_path / "toy" / "3.10.0"}
