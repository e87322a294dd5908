"""Reading and writing checkpoints: safetensors only, checked before loading, replaced whole or not at all."""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import shutil
import struct
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import CheckpointError
from .config import HOST_MODEL_TYPE, STAGES, VReflectionConfig

# Released checkpoints predate the host library's current module names.
KEY_MAPPING = {
    r"^visual": "model.visual",
    r"^model(?!\.(language_model|visual))": "model.language_model",
}
TEACHER_PREFIX, STUDENT_PREFIX = "box_feature_resampler.", "student_resampler."
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
ADAPTER_FILE = "adapters.safetensors"
SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
LATENT_TOKEN_OF = {
    "lvr_start_id": "<|lvr_start|>",
    "lvr_id": "<|lvr|>",
    "lvr_latent_end_id": "<|lvr_latent_end|>",
    "lvr_end_id": "<|lvr_end|>",
}
DTYPE_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "BF16": 2, "F16": 2, "I16": 2, "U16": 2,
    "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor's bytes lie: `size` bytes from `start` in `file`, of safetensors' `dtype`."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


def current_name(name: str) -> str:
    """A tensor's name today, from its name in a checkpoint."""
    for pattern, target in KEY_MAPPING.items():
        name = re.sub(pattern, target, name)
    return name


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, without reading their data."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > path.stat().st_size - 8:
                raise ValueError(f"header of {length} bytes in a file of {path.stat().st_size}")
            header = json.loads(file.read(length))
        found = {}
        for name, entry in header.items():
            if name != "__metadata__":
                (start, stop), shape, dtype = entry["data_offsets"], tuple(entry["shape"]), entry["dtype"]
                if not 0 <= start <= stop or stop - start != math.prod(shape) * DTYPE_BYTES[dtype]:
                    raise ValueError(f"{name}: {stop - start} bytes for {dtype} of shape {shape}")
                found[name] = StoredTensor(path, dtype, shape, 8 + length + start, stop - start)
        end = max((tensor.start + tensor.size for tensor in found.values()), default=0)
        if path.stat().st_size < end:
            raise ValueError(f"{end} bytes expected, {path.stat().st_size} found: the file was cut short")
    except (ValueError, struct.error, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file ({error}); copy or save it again") from error
    return found


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files a checkpoint consists of, in the host library's order of preference.

    Raises:
        CheckpointError: there are none (pickle files are refused), or the index is unusable or names missing shards.
    """
    index = folder / INDEX_FILE
    if (folder / SINGLE_FILE).exists():
        return [folder / SINGLE_FILE]
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            if any(name != Path(name).name for name in names):
                raise ValueError(f"expected file names without folders, got {names}")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index}: not a usable index ({error}); copy or save it again") from error
        missing = [name for name in names if not (folder / name).exists()]
        if missing:
            raise CheckpointError(f"{folder}: shards {missing} named in {index.name} are missing; copy them there")
        return [folder / name for name in names]
    found = sorted(folder.glob("*.safetensors"))
    if [path.name for path in found] == [ADAPTER_FILE]:
        raise CheckpointError(
            f"{folder}: holds adapters of an unfinished run and no model of its own; let the run finish (the same "
            "command with --resume), its output is a whole model"
        )
    if found:
        return found
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise CheckpointError(
            f"{folder}: expected *.safetensors, got pickle files {pickles}, which can run code when opened; "
            "convert them to safetensors where you trust them"
        )
    raise CheckpointError(f"{folder}: expected model weights (*.safetensors), found none")


def checkpoint_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor in a checkpoint folder, under today's names.

    Raises:
        CheckpointError: as `weight_files`; a shard is damaged, or two of its tensors are one by today's names.
    """
    tensors: dict[str, StoredTensor] = {}
    for path in weight_files(folder):
        for stored_name, tensor in read_header(path).items():
            name = current_name(stored_name)
            if name in tensors:
                raise CheckpointError(
                    f"{folder}: {name} is stored twice, in {tensors[name].file.name} and in {path.name} (there as "
                    f"{stored_name}); remove the file that does not belong to this checkpoint"
                )
            tensors[name] = tensor
    return tensors


def checkpoint_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of every tensor in a checkpoint folder, under today's names; raises as `checkpoint_tensors`."""
    return {name: tensor.shape for name, tensor in checkpoint_tensors(folder).items()}


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
    try:
        return Path(snapshot_download(str(path), revision=revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:  # unreachable, unknown, not allowed, or no hub id at all
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"model: expected a checkpoint folder or a hub id that can be downloaded, got {str(path)!r} ({reason})"
        ) from None


def read_json(file: Path) -> dict:
    """A JSON object."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file}: not valid JSON ({error})") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{file}: expected an object, got {type(values).__name__}")
    return values


def load_config(folder: Path, shapes: dict[str, tuple[int, ...]], tokenizer: Path | None = None) -> VReflectionConfig:
    """The configuration of a checkpoint; what it leaves out is read from the tensors and the tokenizer files.

    Args:
        shapes: of its tensors, under today's names. tokenizer: folder of the tokenizer files; default `folder`.

    Raises:
        CheckpointError: no usable `config.json`, another model type, another stage than the tensors show, or ids of
            latent tokens that are nowhere to be found.
    """
    file = folder / "config.json"
    if not file.exists():
        raise CheckpointError(f"{folder}: expected config.json, found none")
    values = read_json(file)
    known = (VReflectionConfig.model_type, HOST_MODEL_TYPE)
    if values.get("model_type") not in known:
        raise CheckpointError(f"{file}: expected model_type {' or '.join(known)}, got {values.get('model_type')!r}")
    config = VReflectionConfig.from_pretrained(folder)
    shown = detect_stage(shapes)
    if "stage" not in values:
        config.stage = shown
    needs = STAGES.get(config.stage)
    if needs is None or (needs.teacher, needs.student) != (STAGES[shown].teacher, STAGES[shown].student):
        raise CheckpointError(
            f"{folder}: config.json says stage {config.stage!r}, but the tensors are those of {shown!r}"
        )
    queries = shapes.get(f"{TEACHER_PREFIX}queries", ())
    if "num_latent_tokens" not in values and len(queries) == 3:
        config.num_latent_tokens = queries[1]
    if any(values.get(name) is None for name in LATENT_TOKEN_OF):
        adopt_token_ids(config, tokenizer or folder, values)
    return config


def adopt_token_ids(config: VReflectionConfig, folder: Path, values: dict) -> None:
    """Fill in ids of latent tokens that `config.json` leaves out, from the tokenizer files beside it."""
    known = added_tokens(folder)
    missing = [name for name in LATENT_TOKEN_OF if values.get(name) is None]
    absent = [LATENT_TOKEN_OF[name] for name in missing if LATENT_TOKEN_OF[name] not in known]
    if not absent:
        for name in missing:
            setattr(config, name, known[LATENT_TOKEN_OF[name]])
    elif config.traits.slot_style != "none":
        raise CheckpointError(
            f"{folder}: expected {missing} in config.json or the tokens {absent} in the tokenizer files, found "
            "neither; add the ids, or the tokenizer saved with these weights"
        )


def added_tokens(folder: Path) -> dict[str, int]:
    """Ids of the tokens added to a tokenizer's own vocabulary, read from its files; empty where there are none."""
    found: dict[str, int] = {}
    for name in ("added_tokens.json", "tokenizer_config.json", "tokenizer.json"):
        if not (folder / name).exists():
            continue
        values = read_json(folder / name)
        try:
            if name == "added_tokens.json":
                found |= {token: int(index) for token, index in values.items()}
            elif name == "tokenizer_config.json":
                decoder = values.get("added_tokens_decoder", {})
                found |= {entry["content"]: int(index) for index, entry in decoder.items()}
            else:
                found |= {entry["content"]: int(entry["id"]) for entry in values.get("added_tokens", [])}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{folder / name}: not a usable tokenizer file ({error!r}); copy it again") from error
    return found


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
    """Write into a sibling folder, then move its files into place; on failure the target is untouched.

    Args:
        target: the folder to fill. New or empty, it appears whole, by one rename; otherwise file by file, the
            configuration last.
        replaced: patterns of files in `target` that go if no new file takes their place.
    """

    def __init__(self, target: Path, replaced: tuple[str, ...] = ("model*.safetensors*",)):
        self.target, self.replaced = target, replaced

    def __enter__(self) -> Path:
        self.partial = self.target.parent / f".{self.target.name}.{secrets.token_hex(4)}"
        try:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self.partial.mkdir()
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
        for path in (*files, self.partial):
            flush(path)
        empty = self.target.is_dir() and not self.target.is_symlink() and not any(self.target.iterdir())
        if empty or not os.path.lexists(self.target):
            os.replace(self.partial, self.target)
        else:
            self.target.mkdir(exist_ok=True)  # a plain file of that name is refused here
            kept = {path.name for path in files}
            stale = [p for pattern in self.replaced for p in self.target.glob(pattern) if p.name not in kept]
            for file in files:
                os.replace(file, self.target / file.name)
            for file in stale:
                file.unlink(missing_ok=True)
            self.partial.rmdir()
            flush(self.target)
        flush(self.target.parent)


def flush(path: Path) -> None:
    """Bring a file's data, or a folder's entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
