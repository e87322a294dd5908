import importlib.util

import pytest

from vreflection.quickstart import photos


def test_every_photo_is_bundled_in_colour_and_large_enough():
    for photo in photos.PHOTOS:
        pixels = photos.load_photo(photo.name)
        assert pixels.ndim == 3 and pixels.shape[2] == 3 and min(pixels.shape[:2]) >= 224
        spread = pixels.astype(int).max(2) - pixels.astype(int).min(2)
        assert spread.max() > 40, f"{photo.name} is grey"


def test_photos_are_disjoint_across_splits():
    owned = {split: {(p.package, p.file) for p in photos.photos_of(split)} for split in photos.SPLITS}
    assert all(owned.values())
    assert sum(map(len, owned.values())) == len(set.union(*owned.values())) == len(photos.PHOTOS)


def test_attributions_name_the_photographers():
    credits = {credit["name"]: credit for credit in photos.attributions()}
    assert credits["china"]["author"] == "danielbuechele" and credits["china"]["licence"] == "CC BY 2.0"
    assert credits["flower"]["licence"] == "CC BY 2.0"
    assert all(credit["author"] and credit["licence"] and credit["source"] for credit in credits.values())
    assert {credit["split"] for credit in photos.attributions("test")} == {"test"}


def test_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install \"vreflection\[quickstart\]\""):
        photos.photo_path(photos.PHOTOS[0])


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="validation"):
        photos.photos_of("dev")
    with pytest.raises(ValueError, match="chelsea"):
        photos.load_photo("lena")
