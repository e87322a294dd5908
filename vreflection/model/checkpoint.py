"""Reading and writing checkpoints: safetensors only, checked before loading, replaced whole or not at all."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import tempfile
import warnings
from pathlib import Path

import torch

from ..errors import CheckpointError
from .config import STAGES, VReflectionConfig

# Released checkpoints predate the host library's current module names.
KEY_MAPPING = {
    r"^visual": "model.visual",
    r"^model(?!\.(language_model|visual))": "model.language_model",
}
TEACHER_PREFIX, STUDENT_PREFIX = "box_feature_resampler.", "student_resampler."
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")


def current_name(name: str) -> str:
    """A tensor's name today, from its name in a checkpoint."""
    for pattern, target in KEY_MAPPING.items():
        name = re.sub(pattern, target, name)
    return name


def read_header(path: Path) -> dict[str, tuple[int, ...]]:
    """Tensor shapes of a safetensors file without reading its data."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > path.stat().st_size - 8:
                raise ValueError(f"header of {length} bytes in a file of {path.stat().st_size}")
            header = json.loads(file.read(length))
        end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
        if path.stat().st_size < 8 + length + end:
            raise ValueError(f"{8 + length + end} bytes expected, {path.stat().st_size} found: the file was cut short")
    except (ValueError, struct.error, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file ({error}); copy or save it again") from error
    return {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}


def checkpoint_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of every tensor in a checkpoint folder, under today's names.

    Raises:
        CheckpointError: no safetensors (pickle files are refused), a shard is missing or damaged.
    """
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index}: not a usable index ({error}); copy or save it again") from error
        missing = [name for name in names if not (folder / name).exists()]
        if missing:
            raise CheckpointError(f"{folder}: shards {missing} named in {index.name} are missing; copy them there")
    else:
        names = [path.name for path in sorted(folder.glob("*.safetensors"))]
    if not names:
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLE_SUFFIXES)
        if pickles:
            raise CheckpointError(
                f"{folder}: expected *.safetensors, got pickle files {pickles}, which can run code when opened; "
                "convert them to safetensors where you trust them"
            )
        raise CheckpointError(f"{folder}: expected model weights (*.safetensors), found none")
    shapes: dict[str, tuple[int, ...]] = {}
    for name in names:
        shapes |= {current_name(key): shape for key, shape in read_header(folder / name).items()}
    return shapes


def detect_stage(shapes: dict[str, tuple[int, ...]]) -> str:
    """The stage a checkpoint's tensors show, for checkpoints whose config does not say."""
    if any(name.startswith(STUDENT_PREFIX) for name in shapes):
        return "stage2"
    return "stage1" if any(name.startswith(TEACHER_PREFIX) for name in shapes) else "base"


def check_tensors(folder: Path, found: dict[str, tuple[int, ...]], model: torch.nn.Module, tied: set[str]) -> None:
    """Compare a checkpoint's tensors with what the model needs."""
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    missing = sorted(name for name in expected if name not in found and name not in tied)
    wrong = sorted(name for name in expected if name in found and found[name] != expected[name])
    if missing:
        raise CheckpointError(
            f"{folder}: {len(missing)} tensors are missing, such as {missing[:3]}; "
            f"is this a checkpoint of stage {model.config.stage!r}?"
        )
    if wrong:
        detail = "; ".join(f"{name}: expected {expected[name]}, got {found[name]}" for name in wrong[:3])
        raise CheckpointError(f"{folder}: {len(wrong)} tensors have another shape than config.json says: {detail}")
    unused = sorted(
        name for name in found if name not in expected and name.startswith((TEACHER_PREFIX, STUDENT_PREFIX))
    )
    if unused:
        warnings.warn(f"{folder}: stage {model.config.stage!r} does not use {unused[:3]} …", stacklevel=4)


def local_folder(path: str | os.PathLike, revision: str | None = None) -> Path:
    """A checkpoint folder on this machine; other names are looked up on the hub."""
    folder = Path(path)
    if folder.is_dir():
        return folder
    if folder.exists() or len(folder.parts) != 2 or str(path).startswith((".", "/", "~")):
        raise CheckpointError(f"model: expected a checkpoint folder or a hub id 'owner/name', got {str(path)!r}")
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.txt", "*.jinja"]
    return Path(snapshot_download(str(path), revision=revision, allow_patterns=patterns))


def load_config(folder: Path, shapes: dict[str, tuple[int, ...]]) -> VReflectionConfig:
    file = folder / "config.json"
    if not file.exists():
        raise CheckpointError(f"{folder}: expected config.json, found none")
    try:
        values = json.loads(file.read_text())
    except ValueError as error:
        raise CheckpointError(f"{file}: not valid JSON ({error})") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{file}: expected an object, got {type(values).__name__}")
    if values.get("model_type") != VReflectionConfig.model_type:
        raise CheckpointError(
            f"{file}: expected model_type {VReflectionConfig.model_type!r}, got {values.get('model_type')!r}"
        )
    config = VReflectionConfig.from_pretrained(folder)
    shown = detect_stage(shapes)
    if "stage" not in values:
        config.stage = shown
    needs = STAGES.get(config.stage)
    if needs is None or (needs.teacher, needs.student) != (STAGES[shown].teacher, STAGES[shown].student):
        raise CheckpointError(
            f"{folder}: config.json says stage {config.stage!r}, but the tensors are those of {shown!r}"
        )
    return config


class CheckpointMixin:
    """`from_pretrained` and `save_pretrained` with the checks above."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, expect_stage: str | None = None, **kwargs):
        """Load a checkpoint: ours, a released one (old key names), or a plain Qwen2.5-VL.

        Args:
            pretrained_model_name_or_path: folder or hub id.
            expect_stage: refuse a checkpoint of another stage.
            kwargs: for the host library, such as `dtype`, `device_map`, `attn_implementation`.

        Raises:
            CheckpointError: wrong stage, missing or mis-shaped tensors, pickle instead of safetensors, damaged files.
        """
        folder = local_folder(pretrained_model_name_or_path, kwargs.pop("revision", None))
        shapes = checkpoint_shapes(folder)
        config = kwargs.pop("config", None) or load_config(folder, shapes)
        if expect_stage is not None and config.stage != expect_stage:
            raise CheckpointError(f"{folder}: expected a checkpoint of stage {expect_stage!r}, got {config.stage!r}")
        with torch.device("meta"):
            skeleton = cls(config)  # pyright: ignore[reportCallIssue]
        tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
        check_tensors(folder, shapes, skeleton, tied)  # pyright: ignore[reportArgumentType]
        kwargs.setdefault("key_mapping", KEY_MAPPING)
        return super().from_pretrained(  # pyright: ignore[reportAttributeAccessIssue]
            folder, *args, config=config, use_safetensors=True, **kwargs
        )

    def save_pretrained(self, save_directory, *args, **kwargs) -> None:
        """Save as safetensors; the folder's files are replaced only once all new ones are written.

        Raises:
            CheckpointError: the disk is full or not writable; what was in the folder before is untouched.
        """
        if not kwargs.get("is_main_process", True):
            return
        kwargs.setdefault("save_original_format", False)
        with StagedFolder(Path(save_directory)) as partial:
            super().save_pretrained(partial, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]


class StagedFolder:
    """Write into a sibling folder, then move its files into place; on failure the target is untouched."""

    def __init__(self, target: Path):
        self.target = target

    def __enter__(self) -> Path:
        try:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self.partial = Path(tempfile.mkdtemp(prefix=f".{self.target.name}.", dir=self.target.parent))
        except OSError as error:
            raise CheckpointError(f"cannot write to {self.target.parent}: {error}") from error
        return self.partial

    def __exit__(self, kind, error, traceback) -> bool:
        if error is None:
            try:
                self.publish()
            except OSError as failure:
                shutil.rmtree(self.partial, ignore_errors=True)
                raise self.explain(failure) from failure
            return False
        shutil.rmtree(self.partial, ignore_errors=True)
        if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
            raise self.explain(error) from error
        return False

    def explain(self, error: BaseException) -> CheckpointError:
        free = shutil.disk_usage(self.target.parent).free / 2**30
        return CheckpointError(
            f"could not save {self.target}: {error} ({free:.1f} GiB free there); nothing was changed, "
            "free some space or choose another folder"
        )

    def publish(self) -> None:
        # Weights last but one, config last: a reader that sees the new config sees the new weights.
        files = sorted(self.partial.iterdir(), key=lambda p: (p.name == "config.json", p.suffix == ".safetensors"))
        for file in files:
            if file.is_file():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
        self.target.mkdir(parents=True, exist_ok=True)
        stale = [p for p in self.target.glob("model*.safetensors*") if not (self.partial / p.name).exists()]
        for file in files:
            os.replace(file, self.target / file.name)
        for file in stale:
            file.unlink()
        self.partial.rmdir()
