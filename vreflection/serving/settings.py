"""What a server allows: addresses, keys, limits."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import ConfigError

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class ServeSettings:
    """A server's limits.

    Attributes:
        name: of the model, as clients ask for it. host, port: where it listens.
        api_key: what clients must send as a bearer token; `None` asks for nothing.
        batch_size: answers decoded together. max_queue: answers that may wait beyond those.
        max_length: tokens of prompt and answer, latents included. default_tokens, max_tokens: of an answer.
        max_body: bytes of a request. max_images: per request. max_pixels: per image, before it is resized.
        image_cache: bytes of images kept as patches. max_choices: `n` of a request. max_stops: stop texts of a request.
        spans: latent spans that an answer has room for beside its tokens, and that a request may say something about.
        other_latent_steps: allow numbers of latent steps the checkpoint was not trained with, up to `max_latent_steps`.
        remote_images: fetch http(s) image addresses; private and loopback targets and redirects never.
        fetch_seconds: for one of them. drain_seconds: for running answers when told to stop.
        log_prompts: put prompts and answers into the log.
    """

    name: str = "vreflection"
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    batch_size: int = 32
    max_queue: int = 256
    max_length: int = 8192
    default_tokens: int = 512
    max_tokens: int = 2048
    max_body: int = 64 * 2**20
    max_images: int = 8
    max_pixels: int = 40_000_000
    image_cache: int = 256 * 2**20
    max_choices: int = 8
    max_stops: int = 4
    spans: int = 8
    other_latent_steps: bool = False
    max_latent_steps: int = 64
    remote_images: bool = False
    fetch_seconds: float = 10.0
    drain_seconds: float = 30.0
    log_prompts: bool = False

    def __post_init__(self):
        for field in (
            "batch_size",
            "max_length",
            "default_tokens",
            "max_tokens",
            "max_body",
            "max_pixels",
            "max_choices",
            "spans",
        ):
            if getattr(self, field) < 1:
                raise ConfigError(f"{field}: expected at least 1, got {getattr(self, field)}")
        for field in ("max_queue", "max_images", "max_stops", "max_latent_steps"):
            if getattr(self, field) < 0:
                raise ConfigError(f"{field}: expected at least 0, got {getattr(self, field)}")
        if not 0 <= self.port < 65536:
            raise ConfigError(f"port: expected 0 to 65535, got {self.port}")
        if self.api_key is not None and not self.api_key.strip():
            raise ConfigError("api_key: expected a key, got an empty text; leave it out to ask for none")

    @property
    def hosts(self) -> tuple[str, ...] | None:
        """Host names requests may name; any unless the server listens on the loopback only.

        A page of somebody else whose name is made to resolve to this machine names itself.
        """
        return LOOPBACK if self.host in LOOPBACK else None
