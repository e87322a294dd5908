"""Text and image preprocessing without torchvision: a tokenizer plus the host library's PIL image processor."""

import inspect
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from torch import Tensor

from vreflection.data.collate import Collator
from vreflection.data.encode import encode_prompt
from vreflection.data.images import check_image_size
from vreflection.data.pixels import to_rgb
from vreflection.data.template import (
    IMAGE_PAD,
    LATENT_TOKENS,
    LVR,
    LVR_END,
    LVR_LATENT_END,
    LVR_START,
    TURN_END,
    VIDEO_PAD,
    VISION_END,
    VISION_START,
    LatentTokenIds,
)
from vreflection.errors import CheckpointError

# Training limits of the method, in visual tokens per image (28 x 28 px each with the released checkpoints).
MIN_VISUAL_TOKENS = 128
MAX_VISUAL_TOKENS = 5120

# An image, its file, or the bytes of one.
ImageLike = Image.Image | bytes | str | Path
_GENERATE_KEYS = ("input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "image_grid_thw")


class VReflectionProcessor:
    """Everything between raw text and images and the model's tensors.

    Tokens of the latent span that the tokenizer lacks are added to it, in the order of the method's contract.

    Args:
        tokenizer: a Qwen2-type tokenizer of the host library.
        image_processor: the host library's PIL image processor for Qwen2-VL.
        token_ids: ids from a model config; read from the tokenizer when None.

    Attributes:
        token_ids: ids of all special tokens (`LatentTokenIds`).

    Raises:
        CheckpointError: the tokenizer lacks Qwen2.5-VL's own special tokens or disagrees with `token_ids`.
    """

    def __init__(self, tokenizer: Any, image_processor: Any, token_ids: LatentTokenIds | None = None):
        found = add_latent_tokens(tokenizer)
        if token_ids is not None and token_ids != found:
            raise CheckpointError(
                f"expected the tokenizer to agree with the model config ({token_ids}), got {found}; "
                "use the tokenizer saved with this checkpoint"
            )
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.token_ids = found

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        min_visual_tokens: int | None = MIN_VISUAL_TOKENS,
        max_visual_tokens: int | None = MAX_VISUAL_TOKENS,
        token_ids: LatentTokenIds | None = None,
    ) -> "VReflectionProcessor":
        """Load tokenizer and image settings from a checkpoint folder (or anything the host library resolves).

        Args:
            path: checkpoint folder.
            min_visual_tokens, max_visual_tokens: limits per image; None keeps the checkpoint's own.
            token_ids: see the class.

        Raises:
            CheckpointError: files are missing or unusable.
        """
        image_processor = _load_image_processor(str(path), min_visual_tokens, max_visual_tokens)
        return cls(load_tokenizer(path), image_processor, token_ids)

    def save_pretrained(self, path: str | Path) -> None:
        """Write tokenizer and image settings so that `from_pretrained(path, None, None)` gives the same processor."""
        self.tokenizer.save_pretrained(str(path))
        self.image_processor.save_pretrained(str(path))

    @property
    def spatial_merge_size(self) -> int:
        """Patches per visual token and axis."""
        return int(self.image_processor.merge_size)

    @property
    def visual_token_limits(self) -> tuple[int, int]:
        """Smallest and largest number of visual tokens an image is resized to."""
        area = _token_pixels(self.image_processor.patch_size, self.image_processor.merge_size)
        size = self.image_processor.size
        return size["shortest_edge"] // area, size["longest_edge"] // area

    def encode_text(self, text: str) -> list[int]:
        """Token ids of template text; special tokens in it become their ids, nothing is added."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def process_images(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """Resize, normalise and cut images into patches.

        Args:
            images: at least one PIL image, any mode; taken as a viewer shows it, EXIF orientation applied.

        Returns:
            `pixel_values` (patches of all images, patch width) float32 and `image_grid_thw` (I, 3) int64 in patches.

        Raises:
            DataError: a size that cannot be processed (`image-empty`, `image-too-large`, `image-aspect`).
        """
        if not images:
            raise ValueError("expected at least one image, got none; leave pixel_values out for text-only prompts")
        for index, image in enumerate(images):
            check_image_size(*image.size, name=f"image {index}")
        features = self.image_processor.preprocess([to_rgb(image, "shown") for image in images], return_tensors="pt")
        return {"pixel_values": features["pixel_values"], "image_grid_thw": features["image_grid_thw"].long()}

    def image_grid(self, width: int, height: int) -> tuple[int, int, int]:
        """The `grid_thw` an image of this size (px) gets in `process_images`, without its pixels."""
        smart_resize = inspect.getmodule(type(self.image_processor)).smart_resize  # pyright: ignore
        size, patch = self.image_processor.size, self.image_processor.patch_size
        rows, columns = smart_resize(
            height,
            width,
            factor=patch * self.spatial_merge_size,
            min_pixels=size["shortest_edge"],
            max_pixels=size["longest_edge"],
        )
        return 1, rows // patch, columns // patch

    def __call__(
        self,
        images: ImageLike | Sequence[ImageLike | Sequence[ImageLike] | None] | None,
        questions: str | Sequence[str],
        padding: Literal["left", "right"] = "left",
        return_position_ids: bool = False,
    ) -> dict[str, Tensor]:
        """Prompts ready for `model.generate(**batch)`.

        Args:
            images: per question one image, a list of images or None; None for text only. Images are PIL,
                paths or bytes of files, and taken as a viewer shows them.
            questions: one text or a list; without `<image>` placeholders the images go in front of the text.
            padding: side of the padding; decoding needs "left".
            return_position_ids: also return `position_ids` (3, B, L), 0 at padding.

        Returns:
            `input_ids`, `attention_mask`, `mm_token_type_ids` (B, L), and `pixel_values`, `image_grid_thw` if any
            prompt has images.
        """
        texts = [questions] if isinstance(questions, str) else list(questions)
        groups = _group_images(images, len(texts))
        prompts = [
            encode_prompt(text, self, group, source=f"prompt {n}")
            for n, (text, group) in enumerate(zip(texts, groups, strict=True))
        ]
        batch = Collator(self.token_ids.pad, padding)(prompts)
        keys = (*_GENERATE_KEYS, "position_ids") if return_position_ids else _GENERATE_KEYS
        return {key: batch[key] for key in keys if key in batch and len(batch[key])}

    def decode(self, ids: Iterable[int] | Tensor, skip_special_tokens: bool = True) -> str:
        """Text of one row of token ids."""
        values = [int(value) for value in ids]
        return self.tokenizer.decode(values, skip_special_tokens=skip_special_tokens)


def load_tokenizer(path: str | Path) -> Any:
    """A folder's tokenizer as it is; from `tokenizer.json`, or from `vocab.json` and `merges.txt`.

    Raises:
        CheckpointError: nothing there that loads.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(path))
    except (OSError, ValueError, ImportError) as error:  # ImportError: the loader's last resorts are not installed
        raise CheckpointError(
            f"expected tokenizer.json and tokenizer_config.json in {path}, got no tokenizer that loads "
            f"({_first_line(error)}); copy the tokenizer files of the base model there, or bring weights and tokenizer "
            "together: vreflection convert --tokenizer-from <folder>"
        ) from error


def add_latent_tokens(tokenizer: Any) -> LatentTokenIds:
    """Add the tokens of the latent span that a tokenizer lacks, in the contract's order; ids of all special tokens.

    Raises:
        CheckpointError: Qwen2.5-VL's own special tokens or a padding token are missing.
    """
    _add_latent_tokens(tokenizer)
    return _read_token_ids(tokenizer)


def _group_images(images: Any, count: int) -> list[list[ImageLike]]:
    """One list of images per question."""
    if images is None:
        return [[] for _ in range(count)]
    if isinstance(images, (Image.Image, bytes, str, Path)):
        images = [images]
    if len(images) != count:
        raise ValueError(
            f"expected one entry of images per question ({count}), got {len(images)}; "
            "nest the list for several images per question, use None for a question without"
        )
    groups = []
    for group in images:
        single = isinstance(group, (Image.Image, bytes, str, Path))
        groups.append([] if group is None else [group] if single else list(group))
    return groups


def _add_latent_tokens(tokenizer: Any) -> None:
    known = tokenizer.get_vocab()
    missing = [token for token in LATENT_TOKENS if token not in known]
    if missing:
        from tokenizers import AddedToken

        # As special tokens, so that decoding can leave them out.
        tokenizer.add_tokens([AddedToken(t, normalized=False, special=True) for t in missing], special_tokens=True)


def _read_token_ids(tokenizer: Any) -> LatentTokenIds:
    vocab = tokenizer.get_vocab()
    names = {
        "image": IMAGE_PAD,
        "video": VIDEO_PAD,
        "vision_start": VISION_START,
        "vision_end": VISION_END,
        "lvr_start": LVR_START,
        "lvr": LVR,
        "lvr_latent_end": LVR_LATENT_END,
        "lvr_end": LVR_END,
        "eos": TURN_END,
    }
    missing = [token for token in names.values() if token not in vocab]
    if missing or tokenizer.pad_token_id is None:
        raise CheckpointError(
            f"expected a Qwen2.5-VL tokenizer with a padding token, got one without {missing or 'a padding token'}; "
            "use the tokenizer of the Qwen2.5-VL base model"
        )
    return LatentTokenIds(pad=tokenizer.pad_token_id, **{name: vocab[token] for name, token in names.items()})


def _load_image_processor(path: str, min_visual_tokens: int | None, max_visual_tokens: int | None) -> Any:
    processor_class = _pil_image_processor_class()
    try:
        config, _ = processor_class.get_image_processor_dict(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"expected preprocessor_config.json in {path}, got none that loads ({_first_line(error)}); "
            "copy the file of the Qwen2.5-VL base model there"
        ) from error
    # Both spellings occur in released checkpoints; one explicit size keeps the class default out of it.
    size = {**dict(processor_class.size), **(config.pop("size", None) or {})}
    area = _token_pixels(
        config.get("patch_size", processor_class.patch_size), config.get("merge_size", processor_class.merge_size)
    )
    for edge, pixels_key, tokens in (
        ("shortest_edge", "min_pixels", min_visual_tokens),
        ("longest_edge", "max_pixels", max_visual_tokens),
    ):
        pixels = config.pop(pixels_key, None) or size.pop(pixels_key, None) or size.get(edge)
        size[edge] = pixels if tokens is None else tokens * area
    if not 0 < size["shortest_edge"] <= size["longest_edge"]:
        raise ValueError(
            f"expected 0 < min <= max pixels per image, got {size}; change min_visual_tokens or max_visual_tokens"
        )
    return processor_class(**config, size=size)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _token_pixels(patch_size: int, merge_size: int) -> int:
    """Pixels behind one visual token."""
    return (patch_size * merge_size) ** 2


def _pil_image_processor_class() -> Any:
    """The host library's image processor that needs no torchvision."""
    try:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        return Qwen2VLImageProcessorPil
    except ImportError:
        import transformers

    # Some versions call the PIL implementation by the plain name; the torchvision one shares that name elsewhere.
    plain = getattr(transformers, "Qwen2VLImageProcessor", None)
    if isinstance(plain, type) and not any("Torchvision" in base.__name__ for base in plain.__mro__):
        return plain
    raise ImportError(
        f"expected a PIL image processor for Qwen2-VL, got none in transformers {transformers.__version__}; "
        "install transformers>=5.5.4"
    )
