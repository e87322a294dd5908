"""Errors arrive whole wherever they were raised."""

import copy
import pickle

import pytest
from torch.utils.data import DataLoader, Dataset

from vreflection.errors import DataError


class Bad(Dataset):
    def __init__(self, *parts):
        self.parts = parts

    def __len__(self):
        return 1

    def __getitem__(self, index):
        try:
            raise DataError("image-missing", "an inner one", "inner:1")
        except DataError as error:
            raise DataError(*self.parts) from error


PARTS = [
    ("file-changed", "expected the file: got 'another'\nover two lines", "rows.json:3"),
    ("no-rows", "expected a row, got none", None),
]


@pytest.mark.parametrize("parts", PARTS)
def test_a_worker_s_data_error_arrives_whole(parts):
    batches = iter(DataLoader(Bad(*parts), num_workers=1))
    with pytest.raises(DataError) as caught:
        next(batches)
    assert next(batches, None) is None  # and the worker ends
    assert (caught.value.reason, caught.value.message, caught.value.source) == parts
    assert str(caught.value) == str(DataError(*parts))


@pytest.mark.parametrize("parts", PARTS)
def test_copies_are_whole(parts):
    for again in (pickle.loads(pickle.dumps(DataError(*parts))), copy.copy(DataError(*parts))):
        assert (again.reason, again.message, again.source) == parts and len(again.__notes__) == 1


def test_a_message_is_needed():
    with pytest.raises(TypeError, match="expected a reason and a message"):
        DataError("image-missing")
