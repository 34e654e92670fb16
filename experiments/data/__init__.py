"""Image sets for classification, decoded once into memory, and their batches.

`load` returns a `Dataset` of uint8 images in three splits, whatever the source:
scikit-learn's digits (no file needed), any image classification set prepared by
TensorFlow Datasets in the array_record format, and the publishers' own files of
MedMNIST and Tiny ImageNet. TensorFlow is never needed to read. What cannot be loaded
raises a `DataError` that says what would be accepted. `corruptions` and `streams` make
shifted images of any set.
"""

from experiments.data.batches import (
    augment as augment,
    epoch_batches as epoch_batches,
    normalize as normalize,
)
from experiments.data.dataset import (
    DataError as DataError,
    Dataset as Dataset,
    Split as Split,
    few as few,
    fold as fold,
    with_classes as with_classes,
    with_label_noise as with_label_noise,
)
from experiments.data.fewshot import (
    FewShotSet as FewShotSet,
    load_alphabets as load_alphabets,
    load_fewshot as load_fewshot,
)
from experiments.data.loading import load as load
