"""What a server allows: addresses, keys, limits."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import ConfigError
from .addresses import is_loopback


@dataclass(frozen=True)
class ServeSettings:
    """A server's limits.

    Attributes:
        name: of the model, as clients ask for it. host, port: where it listens.
        api_key: what clients must send as a bearer token; `None` asks for nothing.
        batch_size: answers decoded together. max_queue: answers that may wait beyond those.
        max_length: tokens of prompt and answer, latents included. default_tokens, max_tokens: of an answer.
        allowed_hosts: further names that requests may give as their host, as behind a proxy.
        max_body: bytes of a request. max_buffered: bytes of all requests under way. max_images: per request.
        max_pixels: per image, before it is resized. large_pixels: images of more are read one at a time, so that the
            others need not wait for them.
        image_cache: bytes of images kept as patches. max_choices: `n` of a request. max_stops: stop texts of a request.
        spans: latent spans that an answer has room for beside its tokens, and that a request may say something about.
        other_latent_steps: allow numbers of latent steps the checkpoint was not trained with, up to `max_latent_steps`.
        remote_images: fetch http(s) image addresses; private and loopback targets and redirects never.
        fetch_seconds: for one of them, from its name to its last byte.
        header_seconds: for a request's head. body_seconds: for its body, and a second more per `BODY_RATE` bytes.
        idle_seconds: between two requests of a connection. write_seconds: for a client that does not read.
        max_connections: open at a time. drain_seconds: for running answers when told to stop.
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
    allowed_hosts: tuple[str, ...] = ()
    max_body: int = 64 * 2**20
    max_buffered: int = 2**30
    max_images: int = 8
    max_pixels: int = 40_000_000
    large_pixels: int = 4_000_000
    image_cache: int = 256 * 2**20
    max_choices: int = 8
    max_stops: int = 4
    spans: int = 8
    other_latent_steps: bool = False
    max_latent_steps: int = 64
    remote_images: bool = False
    fetch_seconds: float = 10.0
    header_seconds: float = 20.0
    body_seconds: float = 30.0
    idle_seconds: float = 30.0
    write_seconds: float = 60.0
    max_connections: int = 2048
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
        if self.api_key is not None:
            check_key(self.api_key)

    @property
    def hosts(self) -> tuple[str, ...] | None:
        """Host names that requests may give besides loopback addresses; None for any.

        A page of somebody else whose name is made to resolve to this machine names itself.
        """
        if is_loopback(self.host) or self.host.lower() == "localhost":
            return ("localhost", *self.allowed_hosts)
        return (self.host, *self.allowed_hosts) if self.allowed_hosts else None


def check_key(key: str) -> None:
    """Refuse a key that no client could send, or ConfigError."""
    if not key:
        raise ConfigError("api_key: expected a key, got an empty text; leave it out to ask for none")
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError("api_key: expected one line of printable ASCII without blanks, as headers carry it")
