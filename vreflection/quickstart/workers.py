"""Arms trained side by side, each in a process of its own with one thread: small models gain nothing from two."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from multiprocessing import active_children, get_context, parent_process
from typing import Any

Progress = Callable[[str, int, int], None]
# Done in a worker: (argument, progress) -> result.
Work = Callable[[Any, Progress], Any]

_queue: Any = None  # of this worker


def run_jobs(
    work: Work,
    jobs: Mapping[str, Any],
    after: Mapping[str, str | None],
    workers: int,
    on_progress: Progress,
    on_result: Callable[[str, Any], None] | None = None,
) -> dict[str, Any]:
    """Do every job once the one it comes `after` is done; results by name.

    Jobs that others wait for go first. With one worker everything happens in this process.

    Args:
        work: a function that a new process can import. on_result: called here with the name and result of each job.

    Raises:
        whatever a job raises; jobs under way are waited for, no other is begun. A KeyboardInterrupt waits for nothing.
    """
    order = sorted(jobs, key=lambda name: (not any(other == name for other in after.values()), list(jobs).index(name)))
    if workers == 1:
        results: dict[str, Any] = {}
        while len(results) < len(jobs):
            name = next(name for name in order if name not in results and _ready(after.get(name), jobs, results))
            results[name] = work(jobs[name], on_progress)
            _tell(on_result, name, results[name])
        return {name: results[name] for name in jobs}
    context = get_context("spawn")
    queue = context.SimpleQueue()
    reader = threading.Thread(target=_forward, args=(queue, on_progress), daemon=True)
    reader.start()
    results, running = {}, {}
    others = active_children()
    pool = ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(queue,))
    try:
        while len(results) < len(jobs):
            for name in order:
                free = len(running) < workers and name not in results and name not in running.values()
                if free and _ready(after.get(name), jobs, results):
                    running[pool.submit(_work, work, jobs[name])] = name
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                name = running.pop(future)
                results[name] = future.result()
                _tell(on_result, name, results[name])
    except KeyboardInterrupt:
        for worker in active_children():
            if worker not in others:
                worker.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        queue.put(None)
        reader.join()
    return {name: results[name] for name in jobs}


def _tell(on_result: Callable[[str, Any], None] | None, name: str, result: Any) -> None:
    if on_result is not None:
        on_result(name, result)


def _ready(before: str | None, jobs: Mapping[str, Any], results: Mapping[str, Any]) -> bool:
    return before is None or before in results or before not in jobs


def _forward(queue: Any, on_progress: Progress) -> None:
    while (event := queue.get()) is not None:
        on_progress(*event)


def _begin(queue: Any) -> None:
    """First thing in a worker."""
    global _queue
    _queue = queue
    import torch

    from ..model.compat import quiet_host_library

    torch.set_num_threads(1)
    quiet_host_library()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed quickstart leaves no worker behind."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(work: Work, job: Any) -> Any:
    return work(job, lambda phase, done, total: _queue.put((phase, done, total)))
