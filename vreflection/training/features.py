"""Filling a feature store with the visual tokens of a frozen vision tower."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..data.feature_store import FeatureStore, image_digest
from ..data.images import open_image
from ..data.in_order import in_order
from ..data.pixels import ImageView
from ..errors import ConfigError, DataError
from ..model.modeling import VReflectionForConditionalGeneration
from ..model.processor import VReflectionProcessor

# What decides the pixels that the tower sees; absent attributes count as None.
_IMAGE_SETTINGS = (
    *("size", "patch_size", "temporal_patch_size", "merge_size", "resample", "do_resize", "do_rescale"),
    *("rescale_factor", "do_normalize", "image_mean", "image_std", "do_convert_rgb"),
)
_NOT_OF_THE_TOWER = ("transformers_version", "_name_or_path", "dtype", "torch_dtype")


@dataclass
class FillReport:
    """Images found in the store, computed now, and left out with the reason."""

    present: int = 0
    computed: int = 0
    unusable: list[DataError] = field(default_factory=list)

    @property
    def done(self) -> int:
        return self.present + self.computed + len(self.unusable)


@dataclass(frozen=True)
class _Prepared:
    """One image ready for the tower, or why not; nothing of both if it is in the store."""

    path: str
    digest: str = ""
    pixels_PW: Tensor | None = None
    grid_13: Tensor | None = None
    error: DataError | None = None

    @property
    def patches(self) -> int:
        return 0 if self.pixels_PW is None else len(self.pixels_PW)


def feature_key(
    model: VReflectionForConditionalGeneration, processor: VReflectionProcessor, image_view: ImageView = "stored"
) -> str:
    """Names what visual tokens depend on besides the image: image settings, the tower's weights, number type.

    Reads every weight of the tower (about a second per gigabyte). Call it as the features are computed: under the same
    autocast, on whole (not sharded) weights.
    """
    settings = {name: getattr(processor.image_processor, name, None) for name in _IMAGE_SETTINGS}
    settings["kind"] = type(processor.image_processor).__name__
    device = next(model.model.visual.parameters()).device.type
    autocast = str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else None
    settings["tower"] = tower_fingerprint(model)
    settings["autocast"] = autocast
    if image_view != "stored":  # stores from before there was a choice stay what they are
        settings["image_view"] = image_view
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=_plain).encode()).hexdigest()[:32]


def tower_fingerprint(model: VReflectionForConditionalGeneration) -> str:
    """SHA-256 of the vision tower's settings and weights."""
    settings = {k: v for k, v in model.model.visual.config.to_dict().items() if k not in _NOT_OF_THE_TOWER}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.model.visual.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


def fill_feature_store(
    store: FeatureStore,
    paths: Iterable[str],
    model: VReflectionForConditionalGeneration,
    processor: VReflectionProcessor,
    batch_tokens: int = 16384,
    rank: int = 0,
    world: int = 1,
    on_progress: Callable[[int, int], None] | None = None,
    workers: int = 2,
    image_view: ImageView = "stored",
) -> FillReport:
    """Compute and store the visual tokens of images that the store lacks.

    Args:
        store: opened with `feature_key(model, processor, image_view)`.
        paths: image files; repeated ones count once.
        model, processor: the tower and its image settings.
        batch_tokens: visual tokens per forward of the tower; an image above that goes alone.
        rank, world: this process does every `world`-th image, beginning with `rank`.
        on_progress: called with (images done, images of this process).
        workers: threads that open and cut images while the tower computes.
        image_view: how images are read, as the store's key says.

    Returns:
        What became of this process's images. Unusable ones are left out, with their `DataError`.

    Raises:
        ConfigError: the store was opened for another model or other image settings.
        OSError: the store's folder is not writable or full; what was stored stays.
    """
    if not 0 <= rank < world or batch_tokens < 1 or workers < 1:
        got = f"rank {rank} of {world}, batch_tokens {batch_tokens}, workers {workers}"
        raise ValueError(f"expected rank below world, batch_tokens and workers of at least 1, got {got}")
    key = feature_key(model, processor, image_view)
    if store.settings_key != key:
        raise ConfigError(
            f"feature store: expected one for this model and these image settings ({key}), got {store.settings_key}; "
            "open it with feature_key(model, processor, image_view)"
        )
    mine = sorted(set(paths))[rank::world]
    report = FillReport()
    batch = _Batch(store, model, processor.spatial_merge_size**2, report)
    visual = model.model.visual
    was_training = visual.training
    visual.eval()
    try:
        for image in in_order(workers, lambda path: _prepare(store, path, processor, image_view), mine):
            if image.pixels_PW is None:
                report.present += image.error is None
                report.unusable += [] if image.error is None else [image.error]
            else:
                batch.add(image, batch_tokens)
            if on_progress is not None:
                on_progress(report.done, len(mine))
        batch.compute()
    finally:
        visual.train(was_training)
    if on_progress is not None:
        on_progress(report.done, len(mine))
    return report


def _prepare(store: FeatureStore, path: str, processor: VReflectionProcessor, image_view: ImageView) -> _Prepared:
    if path in store:
        return _Prepared(path)
    try:
        digest = image_digest(path)
        made = processor.process_images([open_image(path, view=image_view)])
    except DataError as error:
        return _Prepared(path, error=DataError(error.reason, error.message, path))
    return _Prepared(path, digest, made["pixel_values"], made["image_grid_thw"])


class _Batch:
    """Images that go through the tower together."""

    def __init__(
        self, store: FeatureStore, model: VReflectionForConditionalGeneration, merged: int, report: FillReport
    ):
        self.store, self.model, self.merged, self.report = store, model, merged, report
        self.images: list[_Prepared] = []

    def add(self, image: _Prepared, batch_tokens: int) -> None:
        """Take an image, after computing those before it if they would be too many together."""
        if sum(other.patches for other in self.images) + image.patches > batch_tokens * self.merged:
            self.compute()
        self.images.append(image)

    @torch.no_grad()
    def compute(self) -> None:
        """Put the tokens of all images into the store."""
        if not self.images:
            return
        weight: Any = next(self.model.model.visual.parameters())
        pixels = [image.pixels_PW for image in self.images if image.pixels_PW is not None]
        grids = [image.grid_13 for image in self.images if image.grid_13 is not None]
        tokens_TD = self.model.visual_tokens(
            torch.cat(pixels).to(weight.device, weight.dtype), torch.cat(grids).to(weight.device)
        )
        parts = tokens_TD.cpu().split([image.patches // self.merged for image in self.images])
        for image, grid_13, tokens_ND in zip(self.images, grids, parts, strict=True):
            if torch.isfinite(tokens_ND).all():
                self.store.put(image.path, tokens_ND, grid_13[0], image.digest)
                self.report.computed += 1
                continue
            message = f"expected finite visual tokens, got others in {tokens_ND.dtype}; compute in bfloat16 or float32"
            self.report.unusable.append(DataError("feature-not-finite", message, image.path))
        self.images.clear()


def _plain(value: Any) -> Any:
    """Settings objects of the host library as JSON."""
    return dict(value) if hasattr(value, "keys") else str(value)
