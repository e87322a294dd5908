"""lmms-eval's chat interface on our decoder: `lmms_eval --model vreflection --model_args pretrained=FOLDER`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms

from ..errors import ConfigError
from .answering import ChatAnswerer, ChatQuestion, Segment, sampling_settings

MAX_NEW_TOKENS = 512  # of tasks that say nothing


class VReflectionChat(lmms):
    """A V-Reflection checkpoint under lmms-eval. Latent positions never use up a task's `max_new_tokens`.

    Args:
        pretrained: checkpoint folder or hub id. The rest: see `ChatAnswerer`.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 8,
        device: str | None = None,
        dtype: str | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        latent_steps: int | None = None,
        force_latent: bool = False,
        max_batch_size: Any = None,  # the harness passes it to every model
        **unknown: Any,
    ):
        super().__init__()
        if unknown:
            raise ConfigError(f"model_args: unknown {sorted(unknown)}; see vreflection.harnesses.lmms_eval_model")
        self._join_processes()
        place = device
        if self.world_size > 1 and (device is None or device == "cuda"):
            place = f"cuda:{self.accelerator.local_process_index}" if device == "cuda" or _cuda() else device
        self.answerer = ChatAnswerer(
            pretrained, batch_size=int(batch_size), min_pixels=min_pixels, max_pixels=max_pixels,
            latent_steps=latent_steps, force_latent=bool(force_latent), dtype=dtype, device=place,
        )  # fmt: skip

    def _join_processes(self) -> None:
        import os

        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return
        from accelerate import Accelerator

        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        answers = self.answerer.answers(self._question(request) for request in requests)
        return [
            GenerationResult(
                text=answer.text,
                token_counts=TokenCounts(
                    input_tokens=answer.prompt_tokens, output_tokens=answer.tokens, reasoning_tokens=answer.latent_steps
                ),
            )
            for answer in answers
        ]

    def _question(self, request: Instance) -> ChatQuestion:
        _, doc_to_messages, task_settings, doc_id, task, split = request.args
        messages = doc_to_messages(self.task_dict[task][split][doc_id])
        settings, until = sampling_settings(task_settings, MAX_NEW_TOKENS)
        return ChatQuestion(segments_of(messages), settings, until)

    def loglikelihood(self, requests: list[Instance]):
        raise NotImplementedError("vreflection answers generate_until tasks; choose a task with that output type")

    def generate_until_multi_round(self, requests: list[Instance]):
        raise NotImplementedError("vreflection answers one user turn; choose a single-round task")


def segments_of(messages: Any) -> list[Segment]:
    """Text and images of one user turn, in order.

    Raises:
        ConfigError: several turns, a system prompt of the task's own, or other media than images.
    """
    turns = [message for message in messages if message["role"] != "system"]
    system = [message for message in messages if message["role"] == "system"]
    if system or len(turns) != 1 or turns[0]["role"] != "user":
        got = ", ".join(message["role"] for message in messages)
        raise ConfigError(f"messages: expected one user turn (the system prompt is the checkpoint's own), got {got}")
    content = turns[0]["content"]
    if isinstance(content, str):
        return [content]
    segments: list[Segment] = []
    for part in content:
        if part["type"] == "text":
            segments.append(part["text"])
        elif part["type"] == "image":
            image = part["url"]
            segments.append(Path(image) if isinstance(image, str) else image)
        else:
            raise ConfigError(f"messages: expected text and images, got {part['type']}")
    return segments


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()
