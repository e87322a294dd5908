"""VLMEvalKit with our decoder: `python -m vreflection.harnesses.vlmevalkit --kit DIR --pretrained DIR -- --data …`.

Registers the model under a name in the kit's own list, then runs the kit's `run.py` with everything after `--`.
"""

from __future__ import annotations

import argparse
import runpy
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, ConfigError, DataError
from .answering import ChatAnswerer, ChatQuestion, Segment

MAX_NEW_TOKENS = 512


def model_class() -> type:
    """The class the kit instantiates; made here, because its base lives in the kit."""
    from vlmeval.vlm.base import BaseModel  # pyright: ignore[reportMissingImports]

    class VReflectionVLM(BaseModel):
        """A V-Reflection checkpoint under VLMEvalKit. Latent positions never use up `max_new_tokens`."""

        INTERLEAVE = True

        def __init__(self, pretrained: str, max_new_tokens: int = MAX_NEW_TOKENS, **settings: Any):
            super().__init__()
            # The kit asks one question at a time.
            self.answerer = ChatAnswerer(pretrained, batch_size=1, **settings)
            self.max_new_tokens = max_new_tokens

        def generate_inner(self, message: Sequence[dict[str, str]], dataset: str | None = None) -> str:
            question = ChatQuestion(segments_of(message), {"max_new_tokens": self.max_new_tokens})
            return self.answerer.answers([question])[0].text

    return VReflectionVLM


def segments_of(message: Sequence[dict[str, str]]) -> list[Segment]:
    """Text and images of a message, in order.

    Raises:
        ConfigError: other media than images.
    """
    segments: list[Segment] = []
    for part in message:
        if part["type"] not in ("text", "image"):
            raise ConfigError(f"message: expected text and images, got {part['type']}")
        segments.append(part["value"] if part["type"] == "text" else Path(part["value"]))
    return segments


def register(name: str, pretrained: str, **settings: Any) -> None:
    """Put the model into the kit's list of models."""
    from vlmeval.config import supported_VLM  # pyright: ignore[reportMissingImports]

    supported_VLM[name] = partial(model_class(), pretrained=pretrained, **settings)


def main(arguments: Sequence[str] | None = None) -> None:
    words = list(sys.argv[1:] if arguments is None else arguments)
    own, rest = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    parser = argparse.ArgumentParser(prog="python -m vreflection.harnesses.vlmevalkit", description=__doc__)
    parser.add_argument("--kit", required=True, type=Path, help="folder of a VLMEvalKit checkout, with run.py")
    parser.add_argument("--pretrained", required=True, help="checkpoint folder or hub id")
    parser.add_argument("--name", default="vreflection", help="name in the kit's tables")
    parser.add_argument("--max-new-tokens", type=int, default=MAX_NEW_TOKENS)
    for name in ("--min-pixels", "--max-pixels", "--latent-steps"):
        parser.add_argument(name, type=int)
    parser.add_argument("--force-latent", action="store_true")
    parser.add_argument("--dtype")
    parser.add_argument("--device")
    settings = vars(parser.parse_args(own))
    kit, name, pretrained = settings.pop("kit"), settings.pop("name"), settings.pop("pretrained")
    script = kit / "run.py"
    if not script.is_file():
        raise ConfigError(f"--kit: expected a VLMEvalKit checkout with run.py, got {str(kit)!r}")
    sys.path.insert(0, str(kit))
    register(name, pretrained, **settings)
    sys.argv = [str(script), "--model", name, *rest]
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    try:
        main()
    except (CheckpointError, ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
