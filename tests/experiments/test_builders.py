"""Preparing sets with TFDS and reading them back, both without TensorFlow."""

import dataclasses
import functools
import hashlib
import http.server
import json
import shutil
import threading

import numpy as np
import pytest
import tensorflow_datasets as tfds

from experiments import data
from experiments.data import builders, images, medmnist, prepared
from tests.experiments import small_sets as small


def assert_same(first: data.Dataset, second: data.Dataset):
    for name in ("train", "validation", "test"):
        one, other = getattr(first, name), getattr(second, name)
        np.testing.assert_array_equal(one.images, other.images)
        np.testing.assert_array_equal(one.labels, other.labels)
    assert first.num_classes == second.num_classes


class Toy(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A set as TFDS ships them, of any splits and features."""

    VERSION = tfds.core.Version("1.2.3")

    def __init__(self, splits, features, **kwargs):
        self.toy_splits, self.toy_features = splits, features
        super().__init__(file_format="array_record", **kwargs)

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(self.toy_features),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        return {
            name: self._generate_examples(split)
            for name, split in self.toy_splits.items()
        }

    def _generate_examples(self, split):
        for index, (image, label) in enumerate(
            zip(split.images, split.labels, strict=True)
        ):
            example = {"image": images.encode(image), "label": int(label)}
            yield index, {key: example[key] for key in self.toy_features}


def prepare_toy(data_dir, splits, features=None):
    shape = next(iter(splits.values())).images.shape[1:]
    features = features or {
        "image": tfds.features.Image(shape=shape),
        "label": tfds.features.ClassLabel(num_classes=4),
    }
    Toy(splits, features, data_dir=data_dir).download_and_prepare()
    return data_dir / "toy" / "1.2.3"


@pytest.fixture(scope="module")
def toy_dir(tmp_path_factory):
    data_dir = tmp_path_factory.mktemp("tfds")
    prepare_toy(
        data_dir,
        {
            "train": small.make_split(2100, 4, (8, 8, 3)),
            "test": small.make_split(12, 4, (8, 8, 3), seed=1),
        },
    )
    return data_dir


@pytest.fixture
def toy_copy(toy_dir, tmp_path):
    shutil.copytree(toy_dir / "toy", tmp_path / "toy")
    return tmp_path


class TestPrepared:
    def test_every_pixel_comes_back(self, toy_dir):
        dataset = data.load("toy", data_dir=toy_dir, seed=5)
        assert (dataset.name, dataset.num_classes) == ("toy", 4)
        assert [len(dataset.train), len(dataset.validation)] == [1892, 208]
        expected = small.make_split(12, 4, (8, 8, 3), seed=1)
        np.testing.assert_array_equal(dataset.test.images, expected.images)
        np.testing.assert_array_equal(dataset.test.labels, expected.labels)
        splits, _ = prepared.read(toy_dir / "toy" / "1.2.3", name="toy")
        whole = small.make_split(2100, 4, (8, 8, 3))
        np.testing.assert_array_equal(splits["train"].images, whole.images)

    @pytest.mark.parametrize("validation", ["validation", "val"])
    def test_official_validation_split(self, tmp_path, validation):
        splits = {
            name: small.make_split(num, 4, (4, 4, 1), seed=num)
            for name, num in (("train", 40), (validation, 8), ("test", 4))
        }
        prepare_toy(tmp_path, splits)
        dataset = data.load("toy", data_dir=tmp_path)
        assert len(dataset.train) == 40
        np.testing.assert_array_equal(
            dataset.validation.images, splits[validation].images
        )

    def test_validation_is_the_test_split_where_none_is_labelled(self, tmp_path):
        splits = {
            "train": small.make_split(40, 4, (4, 4, 1)),
            "validation": small.make_split(8, 4, (4, 4, 1), seed=1),
        }
        prepare_toy(tmp_path, splits)
        dataset = data.load("toy", data_dir=tmp_path)
        assert [len(dataset.train), len(dataset.validation)] == [36, 4]
        np.testing.assert_array_equal(dataset.test.images, splits["validation"].images)

    def test_without_evaluation_split(self, tmp_path):
        prepare_toy(tmp_path, {"train": small.make_split(8, 4)})
        with pytest.raises(data.DataError, match="has the splits train; needed are"):
            data.load("toy", data_dir=tmp_path)

    def test_few_shot_splits_are_refused(self, tmp_path):
        split = small.make_split(8, 2, (4, 4, 1))
        other = data.Split(split.images, split.labels + 2)
        prepare_toy(tmp_path, {"train": split, "test": other})
        with pytest.raises(data.DataError, match="2 classes have no training example"):
            data.load("toy", data_dir=tmp_path)

    @pytest.mark.parametrize(
        "features",
        [
            {"label": tfds.features.ClassLabel(num_classes=4)},
            {"image": tfds.features.Image(shape=(28, 28, 1))},
            {
                "image": tfds.features.Image(shape=(None, None, 1)),
                "label": tfds.features.ClassLabel(num_classes=4),
            },
            {
                "image": tfds.features.Image(shape=(28, 28, 1)),
                "label": tfds.features.Scalar(np.int64),
            },
        ],
    )
    def test_other_tasks_are_refused(self, tmp_path, features):
        prepare_toy(tmp_path, {"train": small.make_split(8, 4)}, features)
        with pytest.raises(data.DataError, match="accepted are sets with a uint8"):
            data.load("toy", data_dir=tmp_path)

    def test_images_of_another_size_than_promised(self, tmp_path):
        features = {
            "image": tfds.features.Image(shape=(9, 9, 1)),
            "label": tfds.features.ClassLabel(num_classes=4),
        }
        prepare_toy(tmp_path, {"train": small.make_split(8, 4)}, features)
        with pytest.raises(data.DataError, match=r"image of \(28, 28\) pixels"):
            data.load("toy", data_dir=tmp_path)

    def test_unknown_set_lists_the_prepared_ones(self, toy_dir):
        with pytest.raises(data.DataError, match=r"'toys' is not in .*holds toy\. "):
            data.load("toys", data_dir=toy_dir)


class TestDamage:
    def damage(self, data_dir, pattern, change):
        (path,) = (data_dir / "toy" / "1.2.3").glob(pattern)
        content = change(path.read_bytes())
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(data.DataError) as caught:
            data.load("toy", data_dir=data_dir)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    @pytest.mark.parametrize(
        "change",
        [
            lambda content: content[: len(content) // 2],
            lambda content: b"",
            lambda content: None,
            lambda content: content[:70000] + bytes(1000) + content[71000:],
        ],
        ids=["truncated", "empty", "missing", "overwritten"],
    )
    def test_records(self, toy_copy, change):
        message = self.damage(toy_copy, "*train.array_record*", change)
        assert "unreadable split 'train'" in message
        assert "prepare the set again" in message

    def test_a_record_that_is_no_image(self, toy_copy, monkeypatch):
        monkeypatch.setattr(images, "encode", lambda pixels: b"no image")
        shutil.rmtree(toy_copy / "toy")
        prepare_toy(toy_copy, {"train": small.make_split(8, 4)})
        with pytest.raises(data.DataError, match=r"'train' .damaged image"):
            data.load("toy", data_dir=toy_copy)

    @pytest.mark.parametrize("pattern", ["features.json", "dataset_info.json"])
    def test_metadata(self, toy_copy, pattern):
        message = self.damage(toy_copy, pattern, lambda content: content[:40])
        assert "damaged metadata" in message

    def test_missing_features(self, toy_copy):
        message = self.damage(toy_copy, "features.json", lambda content: None)
        assert "damaged metadata" in message

    def test_another_file_format(self, toy_copy):
        def as_tfrecord(content):
            return json.dumps(json.loads(content) | {"fileFormat": "tfrecord"}).encode()

        message = self.damage(toy_copy, "dataset_info.json", as_tfrecord)
        assert "in the array_record format" in message


class TestBuilders:
    def test_medmnist(self, tmp_path):
        raw = tmp_path / "raw"
        raw.mkdir()
        np.savez(raw / "breastmnist.npz", **small.medmnist_arrays())
        builders.prepare("breastmnist", data_dir=tmp_path, manual_dir=raw)
        assert_same(
            data.load("breastmnist", data_dir=tmp_path),
            data.load("breastmnist", data_dir=raw),
        )
        builder = tfds.builder("medmnist/breastmnist", data_dir=tmp_path)
        assert builder.info.features["label"].names == ["malignant", "normal, benign"]

    def test_tiny_imagenet(self, tmp_path):
        raw = tmp_path / "raw"
        raw.mkdir()
        small.write_zip(raw / "tiny-imagenet-200.zip", small.tiny_imagenet_files())
        builders.prepare("tiny_imagenet", data_dir=tmp_path, manual_dir=raw)
        assert_same(
            data.load("tiny_imagenet", data_dir=tmp_path),
            data.load("tiny_imagenet", data_dir=raw),
        )

    def test_damaged_raw_file(self, tmp_path):
        raw = tmp_path / "raw"
        raw.mkdir()
        (raw / "breastmnist.npz").write_bytes(b"PK")
        with pytest.raises(data.DataError, match=r"not a whole \.npz file"):
            builders.prepare("breastmnist", data_dir=tmp_path, manual_dir=raw)
        assert prepared.prepared_sets(tmp_path) == {}

    def test_a_name_that_tfds_does_not_know(self, tmp_path):
        with pytest.raises(data.DataError, match="Dataset nosuch not found"):
            data.load("nosuch", data_dir=tmp_path, download=True)

    def test_a_builder_that_needs_tensorflow(self, tmp_path, monkeypatch):
        def download_and_prepare(self, **kwargs):
            raise ModuleNotFoundError("Failed: No module named 'tensorflow'")

        builder = tfds.core.DatasetBuilder
        monkeypatch.setattr(builder, "download_and_prepare", download_and_prepare)
        with pytest.raises(data.DataError, match=r"pip install 'dsbp-jax\[prepare\]'"):
            data.load("cifar10", data_dir=tmp_path, download=True)


class TestDownload:
    @pytest.fixture
    def served(self, tmp_path, monkeypatch):
        """A server that stands in for the publishers'."""
        folder = tmp_path / "served"
        folder.mkdir()
        np.savez(folder / "breastmnist.npz", **small.medmnist_arrays())

        class Handler(http.server.SimpleHTTPRequestHandler):
            def log_message(self, *args):
                pass

        handler = functools.partial(Handler, directory=folder)
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            thread = threading.Thread(target=server.serve_forever)
            thread.start()
            url = f"http://127.0.0.1:{server.server_port}/breastmnist.npz"
            monkeypatch.setattr(medmnist.MedMNIST, "url", url)
            yield folder / "breastmnist.npz"
            server.shutdown()
            thread.join()

    def expect(self, path, monkeypatch):
        """Takes the checksum of a file for the publishers'."""
        md5 = hashlib.md5(path.read_bytes()).hexdigest()
        spec = dataclasses.replace(medmnist.SETS["breastmnist"], md5=md5)
        monkeypatch.setitem(medmnist.SETS, "breastmnist", spec)

    def test_download_prepares_once(self, served, tmp_path, monkeypatch):
        self.expect(served, monkeypatch)
        folder = tmp_path / "new" / "folder"
        dataset = data.load("breastmnist", data_dir=folder, download=True)
        assert_same(dataset, data.load("breastmnist", data_dir=served.parent))
        served.unlink()
        assert_same(dataset, data.load("breastmnist", data_dir=folder, download=True))

    def test_wrong_checksum_is_not_kept(self, served, tmp_path, monkeypatch):
        with pytest.raises(data.DataError, match=r"has the MD5 checksum .* instead of"):
            data.load("breastmnist", data_dir=tmp_path, download=True)
        self.expect(served, monkeypatch)
        data.load("breastmnist", data_dir=tmp_path, download=True)
