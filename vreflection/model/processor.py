"""Text and image preprocessing without torchvision: a tokenizer plus the host library's PIL image processor."""

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, AutoTokenizer, Qwen2Tokenizer
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin

from vreflection.data.collate import Collator
from vreflection.data.encode import EncodedSample, encode_chat, encode_prompt
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
    TURN_START,
    VIDEO_PAD,
    VISION_END,
    VISION_START,
    LatentTokenIds,
)
from vreflection.errors import CheckpointError
from vreflection.model.chat_messages import read_conversation, read_template_text, split_conversations
from vreflection.model.config import VReflectionConfig
from vreflection.model.image_inputs import ImageLike, group_images
from vreflection.model.image_settings import first_line, load_image_processor, set_processor_class, token_pixels

Padding = Literal["left", "right", "longest", True, False]
_GENERATE_KEYS = ("input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "image_grid_thw")
# What the host library's Auto classes and pipelines pass along: for fetching files, and for others than a processor.
_HUB_ARGUMENTS = {"cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder"}
_FOR_OTHERS = {
    "_from_auto", "_from_pipeline", "_commit_hash", "trust_remote_code", "use_fast", "dtype", "torch_dtype",
    "device_map", "attn_implementation", "quantization_config", "code_revision",
}  # fmt: skip


class VReflectionProcessor(ProcessorMixin):
    """Everything between raw text and images and the model's tensors.

    Tokens of the latent span that the tokenizer lacks are added to it, in the order of the method's contract.

    Args:
        tokenizer: a Qwen2-type tokenizer of the host library.
        image_processor: the host library's PIL image processor for Qwen2-VL.
        token_ids: ids from a model config; read from the tokenizer when None.

    Attributes:
        token_ids: ids of the special tokens that the method uses (`LatentTokenIds`).
        special_tokens: the texts of all special tokens of the tokenizer; plain text must not spell them.

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
        self.chat_template = getattr(tokenizer, "chat_template", None)
        self.token_ids = found
        added = tokenizer.added_tokens_decoder.values()
        # What `encode_text` turns into one id wherever a text spells it.
        self.special_tokens = tuple(dict.fromkeys([token.content for token in added if token.special]))

    @classmethod
    def from_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls,
        pretrained_model_name_or_path: str | Path,
        min_visual_tokens: int | None = None,
        max_visual_tokens: int | None = None,
        token_ids: LatentTokenIds | None = None,
        **kwargs,
    ) -> "VReflectionProcessor":
        """Load tokenizer and image settings from a checkpoint folder (or anything the host library resolves).

        Args:
            pretrained_model_name_or_path: checkpoint folder.
            min_visual_tokens, max_visual_tokens: limits per image; None keeps the checkpoint's own.
            token_ids: see the class.
            kwargs: where the host library fetches files: `revision, cache_dir, token`, ….

        Raises:
            CheckpointError: files are missing or unusable.
        """
        unknown = set(kwargs) - _HUB_ARGUMENTS - _FOR_OTHERS
        if unknown:
            raise TypeError(
                f"from_pretrained: unexpected arguments {sorted(unknown)}; image sizes are limited by "
                "min_visual_tokens and max_visual_tokens"
            )
        hub = {name: value for name, value in kwargs.items() if name in _HUB_ARGUMENTS}
        path = str(pretrained_model_name_or_path)
        image_processor = load_image_processor(path, min_visual_tokens, max_visual_tokens, **hub)
        return cls(load_tokenizer(path, **hub), image_processor, token_ids)

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Write tokenizer and image settings so that `from_pretrained(folder)` gives the same processor."""
        if push_to_hub:
            raise ValueError(f"push_to_hub: expected False, got {push_to_hub!r}; save to a folder and upload that")
        for part, file in (
            (self.tokenizer, "tokenizer_config.json"),
            (self.image_processor, "preprocessor_config.json"),
        ):
            part.save_pretrained(str(save_directory))
            set_processor_class(Path(save_directory) / file, type(self).__name__)

    def to_dict(self) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Image settings and token ids; the tokenizer has files of its own."""
        parts = {"image_processor": self.image_processor.to_dict(), "token_ids": asdict(self.token_ids)}
        return {"processor_class": type(self).__name__, **parts}

    @property
    def model_input_names(self) -> list[str]:
        """What `__call__` may return for `generate`."""
        return list(_GENERATE_KEYS)

    @property
    def spatial_merge_size(self) -> int:
        """Patches per visual token and axis."""
        return int(self.image_processor.merge_size)

    @property
    def visual_token_limits(self) -> tuple[int, int]:
        """Smallest and largest number of visual tokens an image is resized to."""
        area = token_pixels(self.image_processor.patch_size, self.image_processor.merge_size)
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

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        images: ImageLike | Sequence[ImageLike | Sequence[ImageLike] | None] | None = None,
        text: str | Sequence[str] | None = None,
        videos: None = None,
        audio: None = None,
        *,
        padding: Padding = "left",
        return_tensors: Literal["pt"] | None = "pt",
        return_position_ids: bool = False,
    ) -> BatchFeature:
        """Prompts ready for `model.generate(**batch)`.

        Args:
            images: per question one image, a list of images or None; None for text only. Images are PIL,
                paths or bytes of files, taken as a viewer shows them, or pixels (H, W, 3) or (3, H, W) uint8.
            text: one question or a list. Plain text: the template is put around it, and without `<image>` placeholders
                the images go in front of it. Or what `apply_chat_template` made, taken as it is: then `images` may be
                the images of all texts in one list.
            videos, audio: None; the model reads images only.
            padding: side of the padding; decoding needs "left", which "longest" and True stand for. False: none, for
                prompts of one length.
            return_tensors: torch tensors either way.
            return_position_ids: also return `position_ids` (3, B, L), 0 at padding.

        Returns:
            `input_ids`, `attention_mask`, `mm_token_type_ids` (B, L), and `pixel_values`, `image_grid_thw` if any
            prompt has images.

        Raises:
            ValueError: arguments of another form. DataError: an unusable image or text; special tokens in a question.
        """
        for name, value in (("videos", videos), ("audio", audio)):
            if value is not None:
                raise ValueError(f"{name}: expected None, got {type(value).__name__}; the model reads text and images")
        if text is None:
            raise ValueError("text: expected a question or a list of questions, got none")
        questions = [text] if isinstance(text, str) else list(text)
        chats = [
            read_template_text(question, f"prompt {n}", self.special_tokens)
            if question.startswith(TURN_START)
            else None
            for n, question in enumerate(questions)
        ]
        places = [sum(part is None for turn in chat.turns for part in turn.parts) for chat in chats if chat]
        groups = group_images(
            images,
            len(questions),
            single=isinstance(text, str),
            places=places if len(places) == len(questions) else None,
        )
        prompts = [
            encode_prompt(question, self, group, source=f"prompt {n}")
            if chat is None
            else encode_chat(chat.turns, self, group, system=chat.system, source=f"prompt {n}")  # pyright: ignore
            for n, (question, chat, group) in enumerate(zip(questions, chats, groups, strict=True))
        ]
        return self._batch(prompts, padding, return_tensors, return_position_ids)

    def apply_chat_template(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        conversation: Any,
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = False,
        return_dict: bool = False,
        return_tensors: Literal["pt"] | None = "pt",
        padding: Padding = "left",
        processor_kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """A conversation, or a batch of them, as the model is prompted with it; the template is that of training.

        Args:
            conversation: messages `{"role": …, "content": text or parts}`; parts are `{"type": "text", "text": …}` and
                `{"type": "image", "image": …}` (PIL, path, bytes, pixels), or `url`; for text alone also
                `{"type": "image"}`.
            add_generation_prompt, continue_final_message: the model begins an answer, or goes on with the last
                message. One of them with `tokenize`; neither gives the text of the complete messages.
            processor_kwargs: further arguments, `padding` and `return_tensors`.

        Returns:
            text, which `__call__` takes with the images; with `tokenize` the ids `(B, L)`, and with `return_dict` as
            well all that `generate` takes.

        Raises:
            ValueError: messages of another form. DataError: an unusable image or text.
        """
        answers = bool(add_generation_prompt) + bool(continue_final_message)
        if answers == 2 or (tokenize and not answers):
            raise ValueError(
                f"expected {'only ' if answers else ''}one of add_generation_prompt=True and "
                "continue_final_message=True: with tokenize the processor makes prompts to answer"
            )
        parts, batched = split_conversations(conversation)
        chats = [read_conversation(messages, image_data=tokenize) for messages in parts]
        for chat in chats if answers else ():
            if chat.last_role != ("assistant" if continue_final_message else "user"):
                raise ValueError(
                    "conversation: expected a user message last with add_generation_prompt, an assistant's with "
                    f"continue_final_message, got {[turn.role for turn in chat.turns]}"
                )
        if not tokenize:
            texts = [chat.text(bool(answers), self.special_tokens) for chat in chats]
            return texts if batched else texts[0]
        prompts = [
            encode_chat(chat.turns, self, chat.images, system=chat.system, source=f"conversation {n}")  # pyright: ignore
            for n, chat in enumerate(chats)
        ]
        settings = {"padding": padding, "return_tensors": return_tensors, **(processor_kwargs or {})}
        batch = self._batch(prompts, **settings)
        return batch if return_dict else batch["input_ids"]

    def _batch(
        self, prompts: list[EncodedSample], padding: Any, return_tensors: Any, return_position_ids: bool = False
    ) -> BatchFeature:
        if padding not in ("left", "right", "longest", True, False):
            raise ValueError(f'padding: expected "left", "right", "longest", True or False, got {padding!r}')
        lengths = [len(prompt.input_ids) for prompt in prompts]
        if padding is False and len(set(lengths)) > 1:
            raise ValueError(f"padding=False: expected prompts of one length, got {lengths}; use padding=True")
        if return_tensors not in ("pt", None):
            raise ValueError(f'return_tensors: expected "pt", got {return_tensors!r}')
        batch = Collator(self.token_ids.pad, "right" if padding == "right" else "left")(prompts)
        keys = (*_GENERATE_KEYS, "position_ids") if return_position_ids else _GENERATE_KEYS
        return BatchFeature({key: batch[key] for key in keys if key in batch and len(batch[key])})

    def decode(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        ids: Iterable[int] | Tensor,
        skip_special_tokens: bool = True,
        clean_up_tokenization_spaces: bool | None = None,
        **kwargs,
    ) -> str:
        """Text of one row of token ids; keywords are those of the tokenizer's `decode`."""
        return self.tokenizer.decode(
            [int(value) for value in ids],
            skip_special_tokens=skip_special_tokens,
            clean_up_tokenization_spaces=clean_up_tokenization_spaces,
            **kwargs,
        )

    def batch_decode(
        self, ids: Iterable[Iterable[int] | Tensor], skip_special_tokens: bool = True, **kwargs
    ) -> list[str]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Texts of several rows; keywords as `decode`."""
        return [self.decode(row, skip_special_tokens, **kwargs) for row in ids]

    def post_process_image_text_to_text(
        self, generated_outputs, skip_special_tokens: bool = True, **kwargs
    ) -> list[str]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """`batch_decode` under the name that the host library's pipelines call."""
        return self.batch_decode(generated_outputs, skip_special_tokens, **kwargs)


def load_tokenizer(path: str | Path, **hub) -> Any:
    """A folder's tokenizer as it is; from `tokenizer.json`, or from `vocab.json` and `merges.txt`.

    Args:
        hub: where the host library fetches files.

    Raises:
        CheckpointError: nothing there that loads.
    """
    try:
        return AutoTokenizer.from_pretrained(str(path), **hub)
    except (OSError, ValueError, ImportError) as error:  # ImportError: the loader's last resorts are not installed
        raise CheckpointError(
            f"expected tokenizer.json and tokenizer_config.json in {path}, got no tokenizer that loads "
            f"({first_line(error)}); copy the tokenizer files of the base model there, or bring weights and tokenizer "
            "together: vreflection convert --tokenizer-from <folder>"
        ) from error


def add_latent_tokens(tokenizer: Any) -> LatentTokenIds:
    """Add the tokens of the latent span that a tokenizer lacks, in the contract's order; ids of all special tokens.

    Raises:
        CheckpointError: Qwen2.5-VL's own special tokens or a padding token are missing.
    """
    _add_latent_tokens(tokenizer)
    return _read_token_ids(tokenizer)


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


AutoProcessor.register(VReflectionConfig, VReflectionProcessor)
AutoTokenizer.register(VReflectionConfig, fast_tokenizer_class=Qwen2Tokenizer)
