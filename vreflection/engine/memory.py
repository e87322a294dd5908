"""Will it fit: the cache's size against what the device has left, before anything is allocated."""

from __future__ import annotations

import torch

from ..errors import ConfigError
from .cache import cache_bytes

GIB = 2**30
# The rest is for activations, workspaces and captured graphs.
USABLE_SHARE = 0.92


def available_bytes(device: torch.device) -> int | None:
    """Free memory of a device; None where the platform does not tell."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # Blocks the allocator holds but nobody uses are free to us.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        with open("/proc/meminfo") as lines:
            found = {line.split(":")[0]: line.split()[1] for line in lines}
        return int(found["MemAvailable"]) * 1024
    except (OSError, KeyError):
        return None


def check_fit(shape: dict, rows: int, columns: int, device: torch.device, held: int = 0) -> int:
    """Bytes of a cache of `rows` times `columns`.

    Args:
        shape: layers, heads, width and dtype of the cache. held: bytes of the present cache that will be freed.

    Raises:
        ConfigError: it does not fit; the message says what would.
    """
    needed = cache_bytes(rows=rows, columns=columns, **shape)
    available = available_bytes(device)
    if available is None:
        return needed
    usable = int(USABLE_SHARE * (available + held))
    if needed <= usable:
        return needed
    per_column = cache_bytes(rows=1, columns=1, **shape)
    longest, most = usable // (per_column * rows), usable // (per_column * columns)
    raise ConfigError(
        f"the key/value cache for max_batch_size={rows} times max_length={columns} needs {needed / GIB:.2f} GiB, "
        f"{device} has {usable / GIB:.2f} GiB to give; with this batch size lengths up to {longest} fit, at this "
        f"length up to {most} rows"
    )
