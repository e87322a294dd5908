"""A server for the load test, in a process of its own: `python bench/serving_case.py BATCH` prints its port and serves.

The quickstart's base model with latent steps, which never ends by itself: every answer has the length it was asked for.
"""

import signal
import sys

import torch

from vreflection.model.modeling import VReflectionForConditionalGeneration
from vreflection.model.processor import VReflectionProcessor
from vreflection.quickstart.base import base_dir
from vreflection.serving.app import create_app, make_service
from vreflection.serving.server import Server, bind
from vreflection.serving.service import AnswerService
from vreflection.serving.settings import ServeSettings


def make(batch: int, queue: int = 100_000) -> AnswerService:
    torch.manual_seed(0)
    processor = VReflectionProcessor.from_pretrained(base_dir())
    ids = processor.token_ids
    names = {"lvr_start_id": ids.lvr_start, "lvr_id": ids.lvr, "lvr_latent_end_id": ids.lvr_latent_end}
    base = VReflectionForConditionalGeneration.from_pretrained(base_dir(), dtype=torch.float32)
    model = VReflectionForConditionalGeneration.from_base(base, "stage1", lvr_end_id=ids.lvr_end, **names).eval()
    model.generation_config.eos_token_id = None
    settings = ServeSettings(name="m", batch_size=batch, max_queue=queue, max_length=256)
    return make_service(model, processor, settings)


def main() -> None:
    torch.set_num_threads(1)
    service = make(int(sys.argv[1]))
    app = create_app(service, service.settings)
    server = Server(app, service, service.settings, lambda port: print(port, flush=True))
    signal.signal(signal.SIGTERM, lambda *_: None)  # handed on after the server has drained
    server.run(sockets=[bind("127.0.0.1", 0)])


if __name__ == "__main__":
    main()
