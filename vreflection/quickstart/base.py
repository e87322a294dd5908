"""The quickstart's base model: a Qwen2.5-VL of three million parameters, its configuration and its folder."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from vreflection.quickstart.tokenizer import build_tokenizer, special_ids

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

PATCH_SIZE = 14  # pixels
MERGE_SIZE = 2  # patches per visual token and side
VOCABULARY = 384  # rows of the embedding table; the tokenizer fills 378
LLM_WIDTH = 192

VISION_SETTINGS = {
    "depth": 4,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_heads": 4,
    "out_hidden_size": LLM_WIDTH,
    "patch_size": PATCH_SIZE,
    "spatial_merge_size": MERGE_SIZE,
    "temporal_patch_size": 2,
    "window_size": 112,
    # The default indexes lie beyond a shallow tower and would leave every block windowed.
    "fullatt_block_indexes": [0, 1, 2, 3],
}
TEXT_SETTINGS = {
    "vocab_size": VOCABULARY,
    "hidden_size": LLM_WIDTH,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    # The sections must sum to head_dim / 2 = 16; a wrong sum only fails at the first forward.
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
}


def base_dir() -> Path:
    """Folder of the base model that ships with the package."""
    return Path(__file__).parent / "assets" / "base"


def base_config(tokenizer: PreTrainedTokenizerFast | None = None, layers: int | None = None) -> Qwen2_5_VLConfig:
    """Configuration of the base model, with the tokenizer's special ids and the four `lvr_*_id` attributes.

    Vision: 4 blocks of 128, all with full attention; language model: `layers` (4) layers of 192, tied embeddings.
    """
    from transformers import Qwen2_5_VLConfig

    ids = special_ids(tokenizer or build_tokenizer())
    text_ids = {name: ids.pop(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    # pad_token_id stays out of the text config: it would zero and freeze an embedding row.
    text = TEXT_SETTINGS | {"bos_token_id": text_ids["bos_token_id"], "eos_token_id": text_ids["eos_token_id"]}
    if layers is not None:
        text["num_hidden_layers"] = layers
    return Qwen2_5_VLConfig(
        vision_config=dict(VISION_SETTINGS), text_config=text, tie_word_embeddings=True, **text_ids, **ids
    )


def build_image_processor() -> Qwen2VLImageProcessorPil:
    """transformers' PIL image processor (no torchvision): 224x224 images pass unscaled as 16x16 patches."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil(patch_size=PATCH_SIZE, merge_size=MERGE_SIZE, temporal_patch_size=2)


@contextlib.contextmanager
def _quiet_progress_bars() -> Iterator[None]:
    """Silence transformers' loading and saving bars: a 6 MB folder needs none, and callers own the terminal."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def load_base(
    path: str | os.PathLike[str] | None = None, dtype: torch.dtype | None = None
) -> tuple[Qwen2_5_VLForConditionalGeneration, PreTrainedTokenizerFast]:
    """Load a base folder (default: the shipped one) as (model in eval mode, tokenizer); `dtype` defaults to fp32.

    Without an explicit dtype transformers would load the bf16 of the file, which is slow on many CPUs.
    """
    import torch
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

    folder = Path(path) if path is not None else base_dir()
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"no base model in {folder}: expected config.json and model.safetensors; "
            f"rebuild it with vreflection.quickstart.pretrain.pretrain_base({str(folder)!r})"
        )
    with _quiet_progress_bars():
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=dtype or torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def _drop_axial_rope(config_file: Path) -> None:
    """Remove the vision tower's default rope entry: newer releases refill it, 5.5 warns about it on every load."""
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config["vision_config"].pop("rope_parameters", None)
    config_file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def save_base(
    model: Qwen2_5_VLForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    out_dir: str | os.PathLike[str],
    extra_files: dict[str, bytes] | None = None,
) -> Path:
    """Write a transformers folder with bf16 weights, tokenizer and image processor; `extra_files` maps name to bytes.

    The folder is completed beside `out_dir` and then renamed. An existing `out_dir` is replaced only if it is empty
    or holds a model (config.json).
    """
    import torch
    from transformers import GenerationConfig

    out_dir = Path(out_dir)
    if out_dir.exists() and any(out_dir.iterdir()) and not (out_dir / "config.json").is_file():
        raise FileExistsError(f"{out_dir} holds files but no config.json; choose another folder or empty it")
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}-", dir=out_dir.parent))
    try:
        staging.chmod(0o755)
        stored = copy.deepcopy(model).to(torch.bfloat16)
        stored.generation_config = GenerationConfig(
            bos_token_id=model.config.text_config.bos_token_id,
            eos_token_id=model.config.text_config.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            do_sample=False,
        )
        with _quiet_progress_bars():
            stored.save_pretrained(staging)
        _drop_axial_rope(staging / "config.json")
        tokenizer.save_pretrained(staging)
        build_image_processor().save_pretrained(staging)
        for name, content in (extra_files or {}).items():
            (staging / name).write_bytes(content)
        for path in staging.iterdir():
            path.chmod(0o644)  # safetensors writes files that only their owner can read
        if out_dir.exists():
            shutil.rmtree(out_dir)
        staging.replace(out_dir)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return out_dir
