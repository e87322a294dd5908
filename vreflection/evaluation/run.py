"""Answer benchmarks with a model: raw answers to disk as they come, resumable after any end, shared by any number of
processes. Nothing is scored here.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any

import torch

from .._version import __version__
from ..data.in_order import in_order
from ..engine.decoder import LOOK_EVERY, LatentDecoder
from ..engine.requests import Request
from ..engine.settings import resolve_latent_steps
from ..errors import ConfigError, DataError
from ..model.checkpoint import checkpoint_tensors, load_config, local_folder, weight_files
from ..model.config import VReflectionConfig
from ..model.modeling import VReflectionForConditionalGeneration
from ..model.processor import VReflectionProcessor
from ..model.weight_files import DTYPES
from .asking import Asked, Prompts, load_processor, raw_answer
from .benchmarks import Benchmark, load_benchmark
from .benchmarks.pictures import IMAGE_VIEW
from .fingerprints import file_digest, joined_digest
from .manifests import settle_manifest
from .protocol import Protocol, load_protocol
from .raw_files import RawWriter, Shard, claimed, done_ids
from .records import Item, Manifest

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
# Encoded images kept for questions that follow: an 8K image is 120 MB of visual tokens for a 7B model.
IMAGE_CACHE = 8
# Of the checkpoint, beside its weights: what decides which tokens a prompt becomes and where an answer ends.
SETTINGS_FILES = (
    "config.json", "generation_config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json",
)  # fmt: skip


@dataclass(frozen=True)
class EvalSettings:
    """What to answer, with what, and where to.

    Attributes:
        model: checkpoint folder or hub id. benchmarks: names. out: the run's folder.
        data_root, hub, allow_other_counts: see `load_benchmark`. protocol: name or file.
        shard: which part is this process's; `None` is torchrun's rank, or all. limit: about how many items of each
            benchmark, from its start, in whole groups.
        latent_steps, latent_mode, force_latent: see `LatentDecoder`. batch_size: questions decoded together.
        repetition_penalty: 1 is none, whatever the checkpoint's generation config says.
        dtype: default as stored. device: default the first GPU if there is one.
    """

    model: str
    benchmarks: Sequence[str]
    out: Path
    data_root: Path | None = None
    protocol: str = "strict"
    hub: bool = False
    allow_other_counts: bool = False
    shard: Shard | None = None
    limit: int | None = None
    latent_steps: int | None = None
    latent_mode: str = "clean"
    force_latent: bool = False
    batch_size: int = 8
    repetition_penalty: float = 1.0
    dtype: str | None = None
    device: str | None = None


@dataclass
class EvalReport:
    """What came of it.

    Attributes:
        asked, done: items of the whole run per benchmark, asked for and answered by any process so far.
        answered: items this process answered. unverified: benchmarks whose row counts are not the published ones.
        main: whether this process speaks for the run. failed: items that could not be asked, and why.
    """

    asked: dict[str, int]
    done: dict[str, int] = field(default_factory=dict)
    answered: int = 0
    unverified: list[str] = field(default_factory=list)
    main: bool = True
    failed: list[str] = field(default_factory=list)

    @property
    def missing(self) -> dict[str, int]:
        return {name: self.asked[name] - self.done[name] for name in self.asked if self.done[name] < self.asked[name]}


def run_evaluation(settings: EvalSettings, on_progress: Progress | None = None) -> EvalReport:
    """Answer what is not answered yet of this process's share.

    Returns once every process that torchrun started has done its share.

    Raises:
        ConfigError, DataError, CheckpointError: bad settings, files or checkpoint, before anything is written; another
            run in `out`; items whose images cannot be used, after all others were answered.
    """
    check_settings(settings)
    protocol = load_protocol(settings.protocol)
    benchmarks = [
        load_benchmark(name, settings.data_root, hub=settings.hub, allow_other_counts=settings.allow_other_counts)
        for name in settings.benchmarks
    ]
    wanted = {benchmark.name: limited(units(benchmark.items), settings.limit) for benchmark in benchmarks}
    folder = local_folder(settings.model)
    config = load_config(folder, {name: tensor.shape for name, tensor in checkpoint_tensors(folder).items()})
    processor = load_processor(folder, protocol)
    manifest = make_manifest(settings, protocol, benchmarks, wanted, folder, config, processor)
    report = EvalReport(
        asked={name: sum(map(len, parts)) for name, parts in wanted.items()},
        unverified=[benchmark.name for benchmark in benchmarks if not benchmark.verified],
    )
    with processes(settings.shard) as (shard, main):
        report.main = main
        with claimed(settings.out, shard) as setup:
            settle_manifest(settings.out, manifest)
            setup.close()
            mine = [item for parts in wanted.values() for part in parts[shard.index :: shard.count] for item in part]
            done = {(name, ident) for name in wanted for ident in done_ids(settings.out, name)}
            progress = Counted(mine, done, on_progress)
            left = [item for item in mine if (item.benchmark, item.id) not in done]
            if left:
                model = load_model(folder, settings)
                decoder = LatentDecoder(
                    model, max_batch_size=settings.batch_size, latent_mode=settings.latent_mode, image_cache=IMAGE_CACHE
                )
                prompts = Prompts(processor, protocol, model.dtype)
                answer_items(decoder, prompts, left, settings, shard, progress, report)
    for name in wanted:
        ids = {item.id for part in wanted[name] for item in part}
        report.done[name] = len(ids & done_ids(settings.out, name))
    if report.failed:
        raise DataError(
            "items-unanswered",
            f"{len(report.failed)} items could not be asked, all others of this process were answered and are kept; "
            f"repair the files and run the same command again. The first: {report.failed[0]}",
            str(settings.out),
        )
    return report


def check_settings(settings: EvalSettings) -> None:
    """Raise ConfigError for numbers and names that cannot be meant."""
    for name in ("limit", "batch_size"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise ConfigError(f"{name}: expected at least 1, got {value}")
    if not settings.benchmarks:
        raise ConfigError("benchmarks: expected at least one name, got none")
    if len(set(settings.benchmarks)) < len(settings.benchmarks):
        raise ConfigError(f"benchmarks: expected each name once, got {', '.join(settings.benchmarks)}")
    if settings.latent_mode not in ("clean", "parity"):
        raise ConfigError(f"latent_mode: expected clean or parity, got {settings.latent_mode!r}")
    if settings.dtype is not None and settings.dtype not in DTYPES:
        raise ConfigError(f"dtype: expected one of {', '.join(DTYPES)}, got {settings.dtype!r}")


def units(items: Sequence[Item]) -> list[list[Item]]:
    """Items that belong to one process: a group (a pair, four rotations), and neighbours on the same images."""
    parts: list[list[Item]] = []
    of_group: dict[str, list[Item]] = {}
    of_images: dict[tuple[str, ...], list[Item]] = {}
    for item in items:
        part = of_group.get(item.group) or of_images.get(item.image_keys)
        if part is None:
            part = []
            parts.append(part)
        part.append(item)
        of_group.setdefault(item.group, part)
        of_images.setdefault(item.image_keys, part)
    return parts


def limited(parts: list[list[Item]], limit: int | None) -> list[list[Item]]:
    """The first parts, until they hold at least `limit` items."""
    taken: list[list[Item]] = []
    for part in parts:
        if limit is not None and sum(map(len, taken)) >= limit:
            break
        taken.append(part)
    return taken


def answer_items(
    decoder: LatentDecoder,
    prompts: Prompts,
    items: Sequence[Item],
    settings: EvalSettings,
    shard: Shard,
    progress: Counted,
    report: EvalReport,
) -> None:
    """Decode items and write each answer as soon as it is finished.

    A thread prepares the images of the next few prompts meanwhile: at most five prompts wait outside the batch, and a
    prompt in the batch has let go of its pixels.
    """
    running: dict[int, tuple[Asked, Request]] = {}
    writers: dict[str, RawWriter] = {}
    numbers = count()

    def requests(prepared: Iterator[Asked]) -> Iterator[Request]:
        for asked in prepared:
            if asked.prompt is None:
                report.failed.append(f"{asked.item.benchmark}:{asked.item.id}: {asked.error}")
                continue
            made = request(decoder, asked, prompts.protocol, settings)
            running[next(numbers)] = replace(asked, prompt=None), made
            yield made

    with ExitStack() as stack:
        # An interrupt leaves no thread behind.
        prepared = in_order(1, prompts.of, items)
        stack.callback(prepared.close)  # pyright: ignore[reportAttributeAccessIssue]
        for event in stack.enter_context(closing(decoder.serve(requests(prepared), LOOK_EVERY))):
            asked, made = running[event.index]
            made.prompt.pixel_values = None  # the prompt is in the cache, or it has failed
            if event.generation is None:
                continue
            del running[event.index]
            name = asked.item.benchmark
            if name not in writers:
                writers[name] = stack.enter_context(closing(RawWriter(shard.raw_file(settings.out, name))))
            writers[name].write(raw_answer(asked, event.generation, prompts.processor))
            report.answered += 1
            progress.add(asked.item)


def request(decoder: LatentDecoder, asked: Asked, protocol: Protocol, settings: EvalSettings) -> Request:
    """Greedy, with the protocol's limit; in clean mode latent positions do not count towards it."""
    return decoder.request(
        asked.prompt,
        latent_steps=settings.latent_steps,
        allow_other_latent_steps=True,
        force_latent=settings.force_latent,
        seed=0,
        do_sample=False,
        repetition_penalty=settings.repetition_penalty,
        max_new_tokens=protocol.answer_tokens(asked.item.benchmark),
    )


class Counted:
    """Progress per benchmark of one process's share."""

    def __init__(self, items: Sequence[Item], done: set[tuple[str, str]], heard: Progress | None):
        self.heard = heard
        self.total: dict[str, int] = {}
        self.count: dict[str, int] = {}
        for item in items:
            self.total[item.benchmark] = self.total.get(item.benchmark, 0) + 1
            before = self.count.get(item.benchmark, 0)
            self.count[item.benchmark] = before + ((item.benchmark, item.id) in done)
        if heard is not None:
            for name, total in self.total.items():
                heard(name, self.count[name], total)

    def add(self, item: Item) -> None:
        self.count[item.benchmark] += 1
        if self.heard is not None:
            self.heard(item.benchmark, self.count[item.benchmark], self.total[item.benchmark])


@contextmanager
def processes(shard: Shard | None) -> Iterator[tuple[Shard, bool]]:
    """This process's share, and whether it speaks for the run; under torchrun, all leave together.

    Raises:
        ConfigError: a shard was given although torchrun deals the work.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield shard or Shard(), True
        return
    if shard is not None:
        raise ConfigError(f"shard: torchrun deals the work to its {world} processes; leave --shard out")
    import torch.distributed as dist

    rank = int(os.environ["RANK"])
    # A process that is done waits for the others, however long they take.
    dist.init_process_group("gloo", timeout=timedelta(days=30))
    try:
        yield Shard(rank, world), rank == 0
        dist.barrier()
    finally:
        dist.destroy_process_group()


def chosen_device(settings: EvalSettings) -> torch.device:
    if settings.device is not None:
        try:
            return torch.device(settings.device)
        except RuntimeError as error:
            raise ConfigError(f"device: expected such as cpu or cuda:0, got {settings.device!r} ({error})") from None
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def load_model(folder: Path, settings: EvalSettings) -> VReflectionForConditionalGeneration:
    dtype = "auto" if settings.dtype is None else DTYPES[settings.dtype][1]
    model = VReflectionForConditionalGeneration.from_pretrained(folder, dtype=dtype)
    return model.eval().to(chosen_device(settings))


def make_manifest(
    settings: EvalSettings,
    protocol: Protocol,
    benchmarks: Sequence[Benchmark],
    wanted: Mapping[str, list[list[Item]]],
    folder: Path,
    config: VReflectionConfig,
    processor: VReflectionProcessor,
) -> Manifest:
    """All that decides an answer. The same for every process of a run."""
    steps = resolve_latent_steps(config, settings.latent_steps, allow_other=True)
    if settings.force_latent and not steps:
        raise ConfigError(f"force_latent: a checkpoint of stage {config.stage!r} has no latent steps; leave it out")
    trained = 0 if config.traits.slot_input == "none" else config.num_latent_tokens
    tensors = checkpoint_tensors(folder)
    stored = sorted({tensor.dtype for tensor in tensors.values()})
    device, size = chosen_device(settings), processor.image_processor.size
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    notes: dict[str, Any] = {
        "protocol": protocol.as_dict(),
        "image_view": IMAGE_VIEW,
        "checkpoint": {name: file_digest(folder / name) for name in SETTINGS_FILES if (folder / name).exists()},
    }
    return Manifest(
        protocol=protocol.tag,
        model=settings.model,
        digest=joined_digest({path.name: file_digest(path) for path in weight_files(folder)}),
        stage=config.stage,
        latents={
            "steps": steps,
            "trained_steps": trained,
            "mode": settings.latent_mode,
            "forced": settings.force_latent,
        },
        benchmarks={
            benchmark.name: {
                "rows": len(benchmark.items),
                "asked": sum(map(len, wanted[benchmark.name])),
                "counts_verified": benchmark.verified,
                "revision": benchmark.revision,
                "licence": benchmark.licence,
                "files": dict(benchmark.files),
            }
            for benchmark in benchmarks
        },
        generation={
            "max_new_tokens": {name: protocol.answer_tokens(name) for name in wanted},
            "do_sample": False,
            "repetition_penalty": settings.repetition_penalty,
            "dtype": settings.dtype or ", ".join(stored),
            "device": device.type,
        },
        pixels={"min": int(size["shortest_edge"]), "max": int(size["longest_edge"])},
        versions={
            "vreflection": __version__,
            "torch": torch.__version__,
            "transformers": version("transformers"),
            "tokenizers": version("tokenizers"),
            "pillow": version("pillow"),
            "device": name,
        },
        notes=notes,
    )
