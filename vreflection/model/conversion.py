"""Checkpoints from one layout to another, bytes to bytes: no model is built and no whole tensor is held."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ..data.template import LATENT_TOKENS
from ..errors import CheckpointError, ConfigError
from .checkpoint import (
    LATENT_TOKEN_OF,
    STUDENT_PREFIX,
    TEACHER_PREFIX,
    StagedFolder,
    StoredTensor,
    added_tokens,
    check_tensors,
    checkpoint_tensors,
    load_config,
    local_folder,
    read_json,
)
from .checkpoint_layouts import LAYOUTS, PLAIN_PROCESSOR, PROCESSOR, layout_config, stored_name
from .config import DECODE_STAGE, VReflectionConfig
from .image_settings import CODE_FILE, IMAGE_FILE, set_processor_class
from .processor import add_latent_tokens, load_tokenizer
from .weight_files import DTYPES, plan_shards, same_bytes, write_weights, written_bytes

EMBEDDING, HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json",
    "special_tokens_map.json", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
OTHER_FILES = (
    "video_preprocessor_config.json",
    "generation_config.json",
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
    "NOTICE",
)
REPLACED = (
    "model*.safetensors*",
    "pytorch_model*.bin*",
    *TOKENIZER_FILES,
    IMAGE_FILE,
    CODE_FILE,
    *OTHER_FILES,
    "config.json",
)


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion wrote.

    Attributes:
        stage: of the source; `written_stage`: what the target loads as.
        tensors, parameters, bytes, files: of the target's weights.
        left_out: tensors of the source that the target does not hold.
        unknown: tensors that no part of the model uses, carried along.
    """

    source: str
    target: str
    layout: str
    stage: str
    written_stage: str
    tensors: int
    parameters: int
    bytes: int
    files: list[str]
    left_out: list[str]
    unknown: list[str]
    seconds: float

    def as_dict(self) -> dict:
        return asdict(self)

    def summary(self) -> str:
        """A few lines for people."""
        lines = [
            f"{self.target}: {self.layout} layout, {self.tensors} tensors, {self.parameters:,} parameters, "
            f"{self.bytes / 2**30:.2f} GiB in {len(self.files)} files, {self.seconds:.0f} s"
        ]
        if self.left_out:
            lines.append(f"left out: {len(self.left_out)} tensors, such as {self.left_out[:3]}")
        if self.unknown:
            lines.append(f"carried along, used by nothing here: {self.unknown[:5]}")
        if self.stage != self.written_stage:
            lines.append(
                f"stage {self.stage} became {self.written_stage}: it decodes as before, but without the modules no "
                "stage 2 starts from it and the student's attention cannot be shown"
            )
        return "\n".join(lines)


def convert_checkpoint(
    source: str | os.PathLike,
    target: str | os.PathLike,
    to: str = "vreflection",
    *,
    without_modules: bool = False,
    dtype: str | None = None,
    max_shard_size: str | int = "5GB",
    tokenizer_from: str | os.PathLike | None = None,
    overwrite: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> ConversionReport:
    """Write a checkpoint in another layout; the target appears whole or not at all.

    Args:
        source: folder or hub id, in any of the layouts.
        target: new or empty folder; with `overwrite` a checkpoint folder whose files are replaced.
        to: `vreflection`, `qwen2_5_vl` (a plain Qwen2.5-VL folder, always without the two modules) or `released` (the
            key names and flat configuration of the published weights).
        without_modules: leave out both compression modules, which decoding does not use.
        dtype: `float32`, `bfloat16` or `float16`; default: every tensor keeps its own, bit for bit.
        max_shard_size: bytes per weight file, as a number or such as `"5GB"`.
        tokenizer_from: folder whose tokenizer (and, where missing, image settings) go with the weights.
        on_progress: called as `on_progress(bytes_done, bytes_in_all)`.

    Raises:
        CheckpointError: the source is incomplete, damaged or pickled, or the target cannot be written.
        ConfigError: an argument is out of range.
    """
    started = time.perf_counter()
    shard_bytes = parse_size(max_shard_size)
    for name, value, known in (("to", to, LAYOUTS), ("dtype", dtype, (None, *DTYPES))):
        if value not in known:
            raise ConfigError(f"{name}: expected one of {[k for k in known if k]}, got {value!r}")
    folder, target = local_folder(source), Path(target)
    check_target(folder, target, overwrite)
    tensors = checkpoint_tensors(folder)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    companions = Path(tokenizer_from) if tokenizer_from is not None else folder
    config = load_config(folder, shapes, companions)
    expected = check_complete(folder, shapes, config)
    kept, left_out = select(folder, tensors, config, expected, to, without_modules)
    stage = config.stage
    if without_modules and config.traits.teacher:
        # What is left of each stage decodes as before: on its own states, or on the slots' embedding.
        config.stage = DECODE_STAGE if config.traits.slot_input == "latents" else "filler"
    shards = plan_shards({stored_name(name, to): tensor for name, tensor in kept.items()}, shard_bytes, dtype)
    total = sum(written_bytes(tensor, dtype) for shard in shards for tensor in shard.values())
    check_space(target, total)
    with StagedFolder(target, REPLACED) as partial:
        copy_companions(folder, companions, partial, config, to)
        shown = {name: shapes[name] for name in kept}
        values = layout_config(read_json(folder / "config.json"), config, to, shown, stage)
        if dtype is not None:
            set_dtype(values, dtype)
        (partial / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        files = write_weights(partial, shards, dtype, total, on_progress)
    return ConversionReport(
        source=str(source),
        target=str(target),
        layout=to,
        stage=stage,
        written_stage="base" if to == "qwen2_5_vl" else config.stage,
        tensors=len(kept),
        parameters=sum(torch.Size(tensor.shape).numel() for tensor in kept.values()),
        bytes=total,
        files=files,
        left_out=left_out,
        unknown=sorted(set(kept) - expected),
        seconds=time.perf_counter() - started,
    )


def parse_size(size: str | int) -> int:
    """Bytes, from a number or a text such as `5GB` or `512MiB`."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", str(size), re.IGNORECASE)
    count = (
        0 if match is None else float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " ")
    )
    if count < 1:
        raise ConfigError(f"max_shard_size: expected bytes such as 5GB or 512MiB, got {size!r}")
    return int(count)


def check_target(source: Path, target: Path, overwrite: bool) -> None:
    """Refuse to write onto the source, or into a folder that holds something, before anything is read."""
    inner, outer = source.resolve(), target.resolve()
    if inner == outer or outer in inner.parents or inner in outer.parents:
        raise CheckpointError(f"out: expected a folder apart from the source {source}, got {target}; choose another")
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"out: expected a folder, got the file {target}; choose another name")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise CheckpointError(
            f"out: {target} is not empty; choose another folder, or pass --overwrite to replace the checkpoint in it"
        )


def check_space(target: Path, needed: int) -> None:
    place = next(path for path in target.absolute().parents if path.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise CheckpointError(
            f"out: {needed / 2**30:.1f} GiB of weights do not fit {place} ({free / 2**30:.1f} GiB free); nothing was "
            "changed, free some space or choose another folder"
        )


def check_complete(folder: Path, shapes: dict[str, tuple[int, ...]], config: VReflectionConfig) -> set[str]:
    """Names of the tensors the model has; refuses a source that lacks or mis-shapes any."""
    from .modeling import VReflectionForConditionalGeneration

    with torch.device("meta"):
        skeleton = VReflectionForConditionalGeneration(config)
    tied = {HEAD} if config.tie_word_embeddings else set()
    check_tensors(folder, shapes, skeleton, tied)
    return set(skeleton.state_dict())


def select(
    folder: Path,
    tensors: dict[str, StoredTensor],
    config: VReflectionConfig,
    expected: set[str],
    to: str,
    without_modules: bool,
) -> tuple[dict[str, StoredTensor], list[str]]:
    """The tensors to write, in the order they are stored, and the names of those left out."""
    dropped = set()
    if without_modules or to == "qwen2_5_vl":
        dropped |= {name for name in tensors if name.startswith((TEACHER_PREFIX, STUDENT_PREFIX))}
    if to == "qwen2_5_vl":
        dropped |= set(tensors) - expected
    if config.tie_word_embeddings and HEAD in tensors:
        if not same_bytes(tensors[HEAD], tensors[EMBEDDING]):
            raise CheckpointError(
                f"{folder}: config.json ties {HEAD} to {EMBEDDING}, but the file holds two different tensors; set "
                "tie_word_embeddings to false there to keep both, or remove the head"
            )
        dropped.add(HEAD)
    return {name: tensor for name, tensor in tensors.items() if name not in dropped}, sorted(dropped)


def set_dtype(values: dict, dtype: str) -> None:
    """The precision a configuration announces, wherever it does."""
    values["torch_dtype" if "torch_dtype" in values else "dtype"] = dtype
    for part in ("text_config", "vision_config"):
        if isinstance(values.get(part), dict):
            for name in ("dtype", "torch_dtype"):
                if values[part].get(name) is not None:
                    values[part][name] = dtype


def copy_companions(source: Path, companions: Path, partial: Path, config: VReflectionConfig, to: str) -> None:
    """Tokenizer, chat template, image and generation settings; ids in `config` follow the tokenizer where it had none.

    Raises:
        CheckpointError: no tokenizer or image settings, or ids that differ from the configuration's.
    """
    fix = "name a folder that has them, such as the base model's: --tokenizer-from <folder>"
    has_words = (companions / "vocab.json").exists() and (companions / "merges.txt").exists()
    if not has_words and not (companions / "tokenizer.json").exists():
        raise CheckpointError(
            f"{companions}: expected tokenizer.json, or vocab.json and merges.txt, found neither; {fix}"
        )
    image = next((place / IMAGE_FILE for place in (source, companions) if (place / IMAGE_FILE).exists()), None)
    if image is None:
        raise CheckpointError(f"{source}: expected {IMAGE_FILE}, found none; {fix}")
    shutil.copyfile(image, partial / IMAGE_FILE)
    for name in (*TOKENIZER_FILES, *OTHER_FILES):
        places = (companions, source) if name.startswith("chat_template") else (companions,)
        places = (source,) if name in OTHER_FILES else places
        found = next((place / name for place in places if (place / name).exists()), None)
        if found is not None:
            shutil.copyfile(found, partial / name)
    for name in (IMAGE_FILE, "tokenizer_config.json"):
        name_processor(partial / name, to)
    known = added_tokens(companions)
    needs_latents = to != "qwen2_5_vl" or config.traits.slot_style != "none"
    if needs_latents and any(token not in known for token in LATENT_TOKENS):
        known = complete_tokenizer(companions, partial)
    if not needs_latents:
        return
    ids = {name: known[token] for name, token in LATENT_TOKEN_OF.items()}
    if config.traits.slot_style == "none":
        # Nothing was trained on the four ids yet: the tokenizer decides.
        for name, index in ids.items():
            setattr(config, name, index)
    given = {name: getattr(config, name) for name in ids}
    rows = config.text_config.vocab_size  # pyright: ignore[reportOptionalMemberAccess]
    if given != ids or max(ids.values()) >= rows:
        raise CheckpointError(
            f"{companions}: expected the tokenizer to agree with config.json ({given}, below {rows} rows), got {ids}; "
            "use the tokenizer saved with these weights: --tokenizer-from <folder>"
        )


def name_processor(file: Path, layout: str) -> None:
    """Name the processor class of a layout where a settings file names one or the other, for `AutoProcessor`."""
    name = PROCESSOR if layout == "vreflection" else PLAIN_PROCESSOR
    named = read_json(file).get("processor_class") if file.exists() else None
    # Our own name is written again, for the code that goes with it.
    if named in {PROCESSOR, PLAIN_PROCESSOR} and (named != name or name == PROCESSOR):
        set_processor_class(file, name)


def complete_tokenizer(companions: Path, partial: Path) -> dict[str, int]:
    """Save the tokenizer with the latent tokens it lacked; ids of all added tokens."""
    tokenizer = load_tokenizer(companions)
    add_latent_tokens(tokenizer)
    template = {name: (partial / name).read_bytes() for name in TOKENIZER_FILES[-2:] if (partial / name).exists()}
    for name in TOKENIZER_FILES:
        (partial / name).unlink(missing_ok=True)
    tokenizer.save_pretrained(str(partial))
    for name, content in template.items():
        (partial / name).write_bytes(content)
    return added_tokens(partial)
