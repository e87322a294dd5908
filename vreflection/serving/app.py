"""The HTTP application: OpenAI's interfaces, health, metrics, and the page."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from importlib import resources
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from .._version import __version__
from .chat import Chat
from .completions import Completion
from .envelope import CLIENT_GONE, Envelope
from .errors import ApiError, bad
from .guards import OPEN_PATHS, Guards
from .interfaces import Interface
from .jobs import Job, usage
from .media import preview
from .metrics import Metrics
from .responses import Responses
from .schema import check_values
from .service import AnswerService
from .settings import ServeSettings
from .worker import Worker

logger = logging.getLogger(__name__)

PAGE = {"/": "index.html", "/page.js": "page.js", "/page.css": "page.css"}
INTERFACES: dict[str, type[Interface]] = {
    "/v1/chat/completions": Chat, "/v1/completions": Completion, "/v1/responses": Responses,
}  # fmt: skip
TYPES = {"html": "text/html; charset=utf-8", "js": "text/javascript; charset=utf-8", "css": "text/css; charset=utf-8"}
# Pictures of the page that may be decoded or wait; in a thread of their own, so that answers do not wait for them.
MAX_PREVIEWS = 4
# Values of a body: each takes up a hundred bytes once it is read, and is looked at one by one.
MAX_VALUES = 2**18
CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def create_app(
    service: AnswerService, settings: ServeSettings, examples: list[dict[str, Any]] | None = None
) -> FastAPI:
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
            service.lanes.shutdown()
            painter.shutdown(wait=False, cancel_futures=True)

    app = FastAPI(title="vreflection", version=__version__, lifespan=life, docs_url=None, redoc_url=None)
    app.state.metrics, app.state.service = metrics, service
    created = int(time.time())

    @app.exception_handler(ApiError)
    async def api_error(_: Request, error: ApiError) -> Response:
        return JSONResponse(error.body(), error.status, error.headers)

    @app.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> Response:
        shown = ApiError(error.status_code, str(error.detail), code=str(error.detail).lower().replace(" ", "_"))
        return JSONResponse(shown.body(), error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def failure(_: Request, error: Exception) -> Response:
        return JSONResponse(internal_error().body(), 500)

    @app.get("/health")
    async def health() -> Response:
        state = "ok" if worker.healthy else "failing"
        return JSONResponse({"status": state, "version": __version__}, 200 if worker.healthy else 503)

    @app.get("/metrics")
    async def prometheus() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    def model_card() -> dict[str, Any]:
        card = {"id": settings.name, "object": "model", "created": created, "owned_by": "vreflection"}
        limits = {"max_model_len": settings.max_length, "max_tokens": settings.max_tokens}
        return {**card, **limits, "stage": service.config.stage, "latent_steps": service.trained_steps}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model_card()]}

    @app.get("/v1/models/{name:path}")
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

    async def answer(request: Request, interface: type[Interface]) -> Response:
        began = time.monotonic()
        exchange = interface(await body_of(request))
        count = service.reserve(exchange.request)
        job: Job | None = None
        try:
            job = await service.prepare(exchange.request)
            if settings.log_prompts:
                logger.info("%s: %s", job.ident, exchange.request.summary())
            service.start(job, exchange.stream)
            if exchange.stream:
                events = closing(exchange, service, job, count, metrics, began)
                count = 0  # released when the stream ends
                return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
            whole = await unless_gone(request, exchange.whole(service, job))
            if whole is None:
                return Response(status_code=CLIENT_GONE)
            count_answer(metrics, job, began)
            return JSONResponse(whole)
        finally:
            if count:
                if job is not None:
                    service.cancel(job)
                service.release(count)

    def answering(interface: type[Interface]):
        async def endpoint(request: Request) -> Response:
            return await answer(request, interface)

        return endpoint

    for path, interface in INTERFACES.items():
        app.add_api_route(path, answering(interface), methods=["POST"])

    @app.get("/v1/responses/{ident}")
    async def stored_response(ident: str) -> Response:
        raise ApiError(
            404, f"expected no request for {ident[:80]!r}, as responses are not stored here; send the whole "
            "conversation as input", code="not_found",
        )  # fmt: skip

    for path, name in PAGE.items():
        app.add_api_route(path, page_file(name), methods=["GET"], include_in_schema=False)
    app.add_middleware(
        Guards,
        settings=settings,
        open_paths=lambda path: path in OPEN_PATHS or path in PAGE,
        full=lambda path: service.full() if path in INTERFACES else None,
    )
    app.add_middleware(Envelope, metrics=metrics, counts=INTERFACES.__contains__)
    return app


async def body_of(request: Request) -> Any:
    """The parsed body.

    Raises:
        ApiError: 400 for what is no JSON, or holds values that no field takes (see `check_values`); 413 for too many.
    """
    try:
        content = await request.body()
    except ClientDisconnect:
        raise ApiError(CLIENT_GONE, "the client went away while it sent the request") from None
    if content.count(b",") > MAX_VALUES:
        raise ApiError(413, f"expected a body of at most {MAX_VALUES} values, got more", code="body_too_large")
    try:
        body = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"expected JSON, got {error}", code="invalid_json") from None
    check_values(body)
    return body


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


async def closing(
    exchange: Interface, service: AnswerService, job: Job, count: int, metrics: Metrics, began: float
) -> AsyncIterator[bytes]:
    """An answer as server-sent events; whatever ends it frees its rows and its place."""
    whole = failed = False
    try:
        try:
            async for event in exchange.events(service, job):
                yield exchange.frame(event)
        except ApiError as error:
            failed = True
            yield exchange.frame(exchange.failure(error))
        except Exception:
            failed = True
            logger.exception("a stream failed")
            yield exchange.frame(exchange.failure(internal_error()))
        whole = True
        if exchange.ending:
            yield exchange.ending
    finally:
        service.cancel(job)
        service.release(count)
        if not whole:
            metrics.disconnected.inc()
        elif not failed:
            count_answer(metrics, job, began)


def internal_error() -> ApiError:
    return ApiError(500, "the server failed; its log says how", code="internal")


def count_answer(metrics: Metrics, job: Job, began: float) -> None:
    tokens = usage(job)
    for kind in ("prompt", "completion"):
        metrics.tokens.labels(kind=kind).inc(tokens[f"{kind}_tokens"])
    metrics.tokens.labels(kind="latent").inc(tokens["latent_steps"])
    metrics.seconds.observe(time.monotonic() - began)
    if job.first is not None:
        metrics.first.observe(job.first - began)


def page_file(name: str):
    async def page() -> Response:
        content = resources.files("vreflection.serving").joinpath("page").joinpath(name).read_bytes()
        headers = {"Content-Security-Policy": CSP, "Cache-Control": "no-cache"}
        return Response(content, media_type=TYPES[name.rpartition(".")[2]], headers=headers)

    return page


def make_service(model, processor, settings: ServeSettings, maps=None, **decoder) -> AnswerService:
    """A service with a decoder of its own.

    Args:
        decoder: `step`, `tier` and the like for `LatentDecoder`.
    """
    from ..engine.decoder import LatentDecoder

    latent_decoder = LatentDecoder(
        model, max_batch_size=settings.batch_size, max_length=settings.max_length,
        image_cache=2 * settings.batch_size, **decoder,
    )  # fmt: skip
    return AnswerService(Worker(latent_decoder), processor, settings, maps)
