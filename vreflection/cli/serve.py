"""`vreflection serve`"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Annotated

import typer


def command(
    model: Annotated[str, typer.Option(help="checkpoint folder or hub id")],
    host: Annotated[str, typer.Option(help="address to listen on; 0.0.0.0 for all")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one")] = 8000,
    name: Annotated[str | None, typer.Option(help="the model's name for clients [default: the folder's]")] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="file with the key clients must send; or set VREFLECTION_API_KEY")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="answers decoded together")] = 32,
    max_queue: Annotated[int, typer.Option(min=0, help="answers that may wait beyond those, then 429")] = 256,
    max_length: Annotated[
        int | None,
        typer.Option(
            min=16, help="tokens of prompt and answer together [default: 8192, or the checkpoint's positions if fewer]"
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="tokens an answer may ask for")] = 2048,
    max_images: Annotated[int, typer.Option(min=0, help="images per request")] = 8,
    max_pixels: Annotated[int, typer.Option(min=1, help="pixels per image")] = 40_000_000,
    max_body: Annotated[int, typer.Option(min=1, help="bytes per request")] = 64 * 2**20,
    other_latent_steps: Annotated[
        bool, typer.Option("--other-latent-steps", help="allow numbers of steps the checkpoint was not trained with")
    ] = False,
    remote_images: Annotated[
        bool, typer.Option("--remote-images", help="fetch images by public http(s) address, without redirects")
    ] = False,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="put prompts into the log")] = False,
    allowed_host: Annotated[
        list[str] | None, typer.Option(help="further host name in requests, as behind a proxy; may be repeated")
    ] = None,
    drain_seconds: Annotated[float, typer.Option(min=0, help="for running answers when told to stop")] = 30.0,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16 [default: as stored]")] = None,
    device: Annotated[str | None, typer.Option(help="such as cpu or cuda:0 [default: a GPU if there is one]")] = None,
    examples: Annotated[bool, typer.Option(help="examples from the quickstart on the page")] = True,
) -> None:
    """Serve a checkpoint to OpenAI's clients, and a page to look at it. Needs: pip install 'vreflection[serve]'."""
    from ..errors import ConfigError

    try:
        from ..serving.app import create_app, make_service
    except ImportError as error:
        raise ConfigError(f"serve: {error.name} is not installed; pip install 'vreflection[serve]'") from None
    from ..model.checkpoint import local_folder
    from ..model.compat import quiet_host_library
    from ..quickstart.page_examples import page_examples
    from ..serving.launch import check_served, load_served, positions_of
    from ..serving.server import Server, bind, exposure
    from ..serving.settings import ServeSettings
    from .progress import log_to_terminal

    folder = local_folder(model)
    settings = ServeSettings(
        name=name or Path(model).name, host=host, port=port, api_key=api_key(api_key_file), batch_size=batch_size,
        max_queue=max_queue, max_length=max_length or min(8192, positions_of(folder) or 8192),
        default_tokens=min(512, max_tokens), max_tokens=max_tokens, max_body=max_body, max_images=max_images,
        max_pixels=max_pixels, other_latent_steps=other_latent_steps, remote_images=remote_images,
        allowed_hosts=tuple(allowed_host or ()), drain_seconds=drain_seconds, log_prompts=log_prompts,
    )  # fmt: skip
    check_served(folder, settings, dtype, device)
    with bind(host, port) as listener:
        quiet_host_library()
        log_to_terminal()
        if (warning := exposure(settings)) is not None:
            typer.echo(warning, err=True)
        loaded, processor, maps = load_served(folder, dtype, device)
        service = make_service(loaded, processor, settings, maps)
        app = create_app(service, settings, page_examples() if examples else [])

        def announce(port: int) -> None:
            shown = f"[{host}]" if ":" in host else host
            key = "with a key" if settings.api_key else "without a key"
            typer.echo(f"{settings.name}: http://{shown}:{port} (page), /v1 (OpenAI's interface), {key}", err=True)

        server = Server(app, service, settings, announce)
        for number in (signal.SIGINT, signal.SIGTERM):
            # uvicorn drains first and then hands the signal on; that was all there was to do.
            signal.signal(number, lambda *_: None)
        server.run(sockets=[listener])
    if not server.started:
        raise typer.Exit(1)


def api_key(file: Path | None) -> str | None:
    """From a file or the environment: on a command line every user of the machine could read it."""
    from ..errors import ConfigError

    if file is None:
        key = os.environ.get("VREFLECTION_API_KEY")
        return None if key is None else key.strip()
    try:
        return file.read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"api_key_file: expected a readable text file, got {error}") from None
