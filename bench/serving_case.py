"""A server for the load test, in a process of its own: `python bench/serving_case.py BATCH` prints its port and serves.

The quickstart's base model with latent steps, which never ends by itself: every answer has the length it was asked for.
"""

import signal
import sys
import threading
import time

import torch
import uvicorn

from vreflection.model.modeling import VReflectionForConditionalGeneration
from vreflection.model.processor import VReflectionProcessor
from vreflection.quickstart.base import base_dir
from vreflection.serving.app import create_app, make_service
from vreflection.serving.settings import ServeSettings


def make(batch: int, queue: int = 100_000):
    torch.manual_seed(0)
    processor = VReflectionProcessor.from_pretrained(base_dir())
    ids = processor.token_ids
    names = {"lvr_start_id": ids.lvr_start, "lvr_id": ids.lvr, "lvr_latent_end_id": ids.lvr_latent_end}
    base = VReflectionForConditionalGeneration.from_pretrained(base_dir(), dtype=torch.float32)
    model = VReflectionForConditionalGeneration.from_base(base, "stage1", lvr_end_id=ids.lvr_end, **names).eval()
    model.generation_config.eos_token_id = None
    settings = ServeSettings(name="m", batch_size=batch, max_queue=queue, max_length=256)
    return create_app(make_service(model, processor, settings), settings)


def main() -> None:
    torch.set_num_threads(1)
    config = uvicorn.Config(make(int(sys.argv[1])), host="127.0.0.1", port=0, log_level="error", access_log=False)
    server = uvicorn.Server(config)
    signal.signal(signal.SIGTERM, lambda *_: None)  # handed on after the server has drained

    def announce():
        while not server.started:
            time.sleep(0.01)
        print(server.servers[0].sockets[0].getsockname()[1], flush=True)

    threading.Thread(target=announce, daemon=True).start()
    server.run()


if __name__ == "__main__":
    main()
