"""The HTTP application: OpenAI's chat completions, models, health, metrics, and the page."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import asdict
from importlib import resources
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from .._version import __version__
from .chat import ChatService, Choice, Job, SpanEnd, TextPiece, usage
from .errors import ApiError, bad
from .guards import OPEN_PATHS, Guards
from .media import preview
from .metrics import Metrics
from .schema import read_request
from .settings import ServeSettings
from .worker import Worker

logger = logging.getLogger(__name__)

PAGE = {"/": "index.html", "/page.js": "page.js", "/page.css": "page.css"}
TYPES = {"html": "text/html; charset=utf-8", "js": "text/javascript; charset=utf-8", "css": "text/css; charset=utf-8"}
# Pictures of the page that may be decoded or wait; in a thread of their own, so that answers do not wait for them.
MAX_PREVIEWS = 4
CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def create_app(service: ChatService, settings: ServeSettings, examples: list[dict[str, Any]] | None = None) -> FastAPI:
    """The application of one service. Starts and stops the service's worker with it.

    Args:
        examples: for the page: `{"title", "question", "image": data address, "boxes"}`, the boxes in hop order.
    """
    worker = service.worker
    painter, previews = ThreadPoolExecutor(1, thread_name_prefix="previews"), 0
    metrics = Metrics(lambda: service.in_work, lambda: len(worker.decoder.rows))

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        worker.start()
        try:
            yield
        finally:
            await asyncio.get_running_loop().run_in_executor(None, worker.stop)
            service.readers.shutdown(wait=False, cancel_futures=True)
            painter.shutdown(wait=False, cancel_futures=True)

    app = FastAPI(title="vreflection", version=__version__, lifespan=life, docs_url=None, redoc_url=None)
    app.state.metrics, app.state.service = metrics, service
    created = int(time.time())

    @app.exception_handler(ApiError)
    async def api_error(_: Request, error: ApiError) -> Response:
        return JSONResponse(error.body(), error.status, error.headers)

    @app.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> Response:
        found = ApiError(error.status_code, str(error.detail), code=str(error.detail).lower().replace(" ", "_"))
        return JSONResponse(found.body(), error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def failure(_: Request, error: Exception) -> Response:
        return JSONResponse(ApiError(500, "the server failed; its log says how", code="internal").body(), 500)

    @app.get("/health")
    async def health() -> Response:
        state = "ok" if worker.healthy else "failing"
        return JSONResponse({"status": state, "version": __version__}, 200 if worker.healthy else 503)

    @app.get("/metrics")
    async def prometheus() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    def model_card() -> dict[str, Any]:
        card = {"id": settings.name, "object": "model", "created": created, "owned_by": "vreflection"}
        return {**card, "stage": service.config.stage, "latent_steps": service.trained_steps}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model_card()]}

    @app.get("/v1/models/{name}")
    async def model(name: str) -> dict[str, Any]:
        if name != settings.name:
            raise ApiError(
                404, f"model: expected {settings.name!r}, got {name[:80]!r}", param="model", code="model_not_found"
            )
        return model_card()

    @app.get("/examples")
    async def page_examples() -> dict[str, Any]:
        shown = {"maps": service.maps is not None, "spans": settings.spans}
        return {"examples": examples or [], "model": model_card(), **shown}

    @app.post("/image")
    async def image(request: Request) -> Response:
        """What the model gets of an image, for the page to draw: browsers turn and colour some files otherwise."""
        nonlocal previews
        body = await body_of(request)
        url = body.get("image") if isinstance(body, dict) else None
        if not isinstance(url, str):
            raise bad('image: expected {"image": "data:image/…;base64,…"}, got no text of that name', "image")
        if previews >= MAX_PREVIEWS:
            raise ApiError(
                429, f"expected at most {MAX_PREVIEWS} images at a time, got one more; try again in a second",
                code="overloaded", headers={"Retry-After": "1"},
            )  # fmt: skip
        previews += 1
        try:
            picture = await asyncio.get_running_loop().run_in_executor(painter, preview, url, settings, "image")
        finally:
            previews -= 1
        return Response(picture, media_type="image/png", headers={"Cache-Control": "no-store"})

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        began = time.monotonic()
        status = 500
        try:
            response = await answer(request, began)
            status = response.status_code
            return response
        except ApiError as error:
            status = error.status
            raise
        finally:
            metrics.requests.labels(status=str(status)).inc()

    async def answer(request: Request, began: float) -> Response:
        asked = read_request(await body_of(request))
        count = asked.n or 1
        service.reserve(min(count, settings.max_choices))
        held = min(count, settings.max_choices)
        job: Job | None = None
        try:
            job = await service.prepare(asked)
            if settings.log_prompts:
                logger.info("%s: %s", job.ident, [m.model_dump() for m in asked.messages])
            service.start(job, bool(asked.stream))
            if asked.stream:
                stream = streamed(service, job, asked.stream_options is not None and asked.stream_options.include_usage)
                guarded = closing(stream, service, job, held, metrics, began)
                held = 0  # given back when the stream ends
                return StreamingResponse(guarded, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
            whole = await unless_gone(request, collected(service, job))
            if whole is None:
                metrics.disconnected.inc()
                return Response(status_code=499)
            count_answer(metrics, job, began)
            return JSONResponse(whole)
        finally:
            if held:
                if job is not None:
                    service.cancel(job)
                service.release(held)

    for path, name in PAGE.items():
        app.add_api_route(path, page_file(name), methods=["GET"], include_in_schema=False)
    app.add_middleware(Guards, settings=settings, open_paths=lambda path: path in OPEN_PATHS or path in PAGE)
    return app


async def body_of(request: Request) -> Any:
    try:
        return json.loads(await request.body())
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"expected JSON, got {error}", code="invalid_json") from None


async def unless_gone(request: Request, work) -> Any:
    """The work's result, or `None` as soon as the client is gone."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (working, watching):
            task.cancel()


async def collected(service: ChatService, job: Job) -> dict[str, Any]:
    """The whole answer as one object."""

    async def one(choice: Choice) -> dict[str, Any]:
        text = "".join([event.text async for event in service.events(job, choice) if isinstance(event, TextPiece)])
        made = {
            "index": choice.index,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": None,
            "finish_reason": choice.finish,
        }
        details = await service.details(job, choice)
        return made if details is None else {**made, "latent": details}

    choices = await asyncio.gather(*(one(choice) for choice in job.choices))
    return {**heading(service, job, "chat.completion"), "choices": choices, "usage": usage(job)}


def heading(service: ChatService, job: Job, kind: str) -> dict[str, Any]:
    return {
        "id": job.ident,
        "object": kind,
        "created": job.created,
        "model": service.settings.name,
        "system_fingerprint": f"vreflection-{__version__}",
    }


async def streamed(service: ChatService, job: Job, with_usage: bool) -> AsyncIterator[dict[str, Any]]:
    """Chunks of all choices as they come."""
    head = heading(service, job, "chat.completion.chunk")
    chunks: asyncio.Queue = asyncio.Queue()

    def chunk(choice: Choice, delta: dict[str, Any], finish: str | None = None, **more) -> dict[str, Any]:
        made = {"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": finish, **more}
        return {**head, "choices": [made]}

    async def one(choice: Choice) -> None:
        try:
            chunks.put_nowait(chunk(choice, {"role": "assistant", "content": ""}))
            shows = job.request.latent is not None
            async for event in service.events(job, choice):
                if isinstance(event, TextPiece):
                    chunks.put_nowait(chunk(choice, {"content": event.text}))
                elif isinstance(event, SpanEnd):
                    looks = await service.details(job, choice, so_far=True)
                    if looks is not None:
                        chunks.put_nowait(chunk(choice, {}, latent=looks))
                elif shows:
                    chunks.put_nowait(chunk(choice, {}, latent=asdict(event)))
            details = await service.details(job, choice)
            more = {} if details is None else {"latent": details}
            chunks.put_nowait(chunk(choice, {}, choice.finish, **more))
        except ApiError as error:
            chunks.put_nowait(error)
        finally:
            chunks.put_nowait(None)

    running = [asyncio.ensure_future(one(choice)) for choice in job.choices]
    try:
        left = len(running)
        while left:
            made = await chunks.get()
            if made is None:
                left -= 1
            elif isinstance(made, ApiError):
                yield made.body()
                return
            else:
                yield made
        if with_usage:
            yield {**head, "choices": [], "usage": usage(job)}
    finally:
        for task in running:
            task.cancel()


async def closing(
    stream: AsyncIterator[dict[str, Any]], service: ChatService, job: Job, held: int, metrics: Metrics, began: float
) -> AsyncIterator[bytes]:
    """The stream as server-sent events; whatever ends it frees its rows and its place."""
    whole = False
    try:
        async for made in stream:
            yield f"data: {json.dumps(made, ensure_ascii=False)}\n\n".encode()
        whole = True
        yield b"data: [DONE]\n\n"
    finally:
        service.cancel(job)
        service.release(held)
        if whole:
            count_answer(metrics, job, began)
        else:
            metrics.disconnected.inc()


def count_answer(metrics: Metrics, job: Job, began: float) -> None:
    told = usage(job)
    for kind in ("prompt", "completion"):
        metrics.tokens.labels(kind=kind).inc(told[f"{kind}_tokens"])
    metrics.tokens.labels(kind="latent").inc(told["latent_steps"])
    metrics.seconds.observe(time.monotonic() - began)
    if job.first is not None:
        metrics.first.observe(job.first - began)


def page_file(name: str):
    async def page() -> Response:
        content = resources.files("vreflection.serving").joinpath("page").joinpath(name).read_bytes()
        headers = {"Content-Security-Policy": CSP, "Cache-Control": "no-cache"}
        return Response(content, media_type=TYPES[name.rpartition(".")[2]], headers=headers)

    return page


def make_service(model, processor, settings: ServeSettings, maps=None, **decoder) -> ChatService:
    """A service with a decoder of its own.

    Args:
        decoder: `step`, `tier` and the like for `LatentDecoder`.
    """
    from ..engine.decoder import LatentDecoder

    made = LatentDecoder(
        model, max_batch_size=settings.batch_size, max_length=settings.max_length,
        image_cache=2 * settings.batch_size, **decoder,
    )  # fmt: skip
    return ChatService(Worker(made), processor, settings, maps)
