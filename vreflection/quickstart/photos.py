"""The photographs behind the notes: files from the scikit-learn and scikit-image wheels, never downloaded."""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

SPLITS = ("train", "validation", "test")
INSTALL_HINT = 'pip install "vreflection[quickstart]"'


@dataclass(frozen=True)
class Photo:
    """One bundled photograph: where its file lies, which split owns it, and whom to credit."""

    name: str
    split: str
    package: str  # import name of the package whose wheel holds the file
    file: str  # path below that package's folder
    author: str
    licence: str
    source: str


# Only colour photographs whose licence is stated in the wheel; one photo belongs to exactly one split.
PHOTOS: tuple[Photo, ...] = (
    Photo(
        "china",
        "train",
        "sklearn",
        "datasets/images/china.jpg",
        "danielbuechele",
        "CC BY 2.0",
        "https://www.flickr.com/photos/danielbuechele/6061409035/",
    ),
    Photo("coffee", "train", "skimage", "data/coffee.png", "Rachel Michetti", "CC0", "courtesy of Pikolo Espresso Bar"),
    Photo(
        "rocket",
        "train",
        "skimage",
        "data/rocket.jpg",
        "SpaceX",
        "public domain",
        "https://www.flickr.com/photos/spacexphotos/16511594820/",
    ),
    Photo(
        "hubble_deep_field",
        "train",
        "skimage",
        "data/hubble_deep_field.jpg",
        "NASA",
        "public domain",
        "http://hubblesite.org/newscenter/archive/releases/2012/37/image/a/",
    ),
    Photo(
        "retina",
        "train",
        "skimage",
        "data/retina.jpg",
        "Mikael Häggström",
        "CC0 1.0",
        "https://commons.wikimedia.org/wiki/File:Fundus_photograph_of_normal_left_eye.jpg",
    ),
    Photo("chelsea", "validation", "skimage", "data/chelsea.png", "Stefan van der Walt", "CC0", "scikit-image"),
    Photo(
        "flower",
        "test",
        "sklearn",
        "datasets/images/flower.jpg",
        "vultilion",
        "CC BY 2.0",
        "https://www.flickr.com/photos/vultilion/6056698931/",
    ),
    Photo(
        "astronaut",
        "test",
        "skimage",
        "data/astronaut.png",
        "NASA (portrait of Eileen Collins)",
        "public domain",
        "https://flic.kr/p/r9qvLn",
    ),
)


def check_split(split: str) -> str:
    """Return `split` if it is one of train, validation, test; raise ValueError otherwise."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}; got {split!r}")
    return split


def photos_of(split: str) -> tuple[Photo, ...]:
    """The photographs owned by one split, in a fixed order."""
    check_split(split)
    return tuple(photo for photo in PHOTOS if photo.split == split)


def photo_path(photo: Photo) -> Path:
    """Path of a photograph inside the installed package; ImportError names the extra to install."""
    spec = importlib.util.find_spec(photo.package)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(
            f"the quickstart's photo {photo.name!r} comes with the package {photo.package!r}, "
            f"which is not installed: {INSTALL_HINT}"
        )
    path = Path(next(iter(spec.submodule_search_locations))) / photo.file
    if not path.is_file():
        raise FileNotFoundError(
            f"{photo.package} no longer carries {photo.file} (looked for {path}); "
            f"install the tested versions through constraints.txt"
        )
    return path


@functools.cache
def load_photo(name: str) -> np.ndarray:
    """Pixels of one photograph by name: (height, width, 3) uint8, read-only and cached."""
    import numpy as np
    from PIL import Image

    photo = next((photo for photo in PHOTOS if photo.name == name), None)
    if photo is None:
        raise ValueError(f"no photo named {name!r}; there are {', '.join(photo.name for photo in PHOTOS)}")
    with Image.open(photo_path(photo)) as image:
        pixels_HWC = np.array(image.convert("RGB"))
    pixels_HWC.setflags(write=False)
    return pixels_HWC


def attributions(split: str | None = None) -> list[dict[str, str]]:
    """Credits to print wherever crops are shown: name, author, licence, source, split and bundled_in of each photo."""
    bundle = {"sklearn": "scikit-learn", "skimage": "scikit-image"}
    return [
        {
            "name": photo.name,
            "author": photo.author,
            "licence": photo.licence,
            "source": photo.source,
            "split": photo.split,
            "bundled_in": bundle[photo.package],
        }
        for photo in (PHOTOS if split is None else photos_of(split))
    ]
