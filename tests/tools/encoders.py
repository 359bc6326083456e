"""``python -m tests.tools.encoders BUNDLE``: cost of serving pictures through a frozen encoder, in processor time.

A JPEG of one megapixel is sent to ``/embed``. The service's processor time per request is compared with that of decoding the
file and running the bare graph of the encoder in ONNX Runtime, with one thread each. Rounds alternate. It also prints the time
from the start of the process to its readiness, its memory, and its image rate with 16 connections.
"""

import io
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image

from concord.model import bundle
from concord.model.modality import EncodedModality, is_picture
from tests.support.server import running

ROUNDS, REQUESTS = 5, 20


def megapixel_jpeg() -> bytes:
    """Return a smooth random picture of 1,000 x 1,000 pixels."""
    generator = np.random.default_rng(0)
    small = Image.fromarray(generator.integers(0, 256, (40, 40, 3)).astype(np.uint8))
    file = io.BytesIO()
    small.resize((1000, 1000), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def bare_seconds(session: onnxruntime.InferenceSession, content: bytes, side: int) -> float:
    """Return the processor time of decoding and resizing a JPEG and one run of a graph."""
    began = time.process_time()
    for _ in range(REQUESTS):
        with Image.open(io.BytesIO(content)) as image:
            pixels = np.asarray(image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC), np.float32)
        session.run(None, {session.get_inputs()[0].name: (pixels.transpose(2, 0, 1)[None] - 127) / np.float32(128)})
    return (time.process_time() - began) / REQUESTS


def main() -> None:
    folder = Path(sys.argv[1]).absolute()
    manifest = bundle.read(folder).manifest
    (modality, *_) = (m for m in manifest.modalities if isinstance(m, EncodedModality) and is_picture(m))
    encoder = manifest.encoders[modality.encoder]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(folder / encoder.graph, options, providers=["CPUExecutionProvider"])
    content, side = megapixel_jpeg(), encoder.preprocessing.height  # type: ignore[union-attr]  # of a picture
    began = time.perf_counter()
    with running(CONCORD_BUNDLE=str(folder), CONCORD_THREADS="1") as service:
        ready = time.perf_counter() - began
        start_cpu = service.cpu_seconds()

        def embed() -> str:
            response = service.client.post("/embed", files={modality.name: ("p.jpg", content)})
            response.raise_for_status()
            return response.headers["server-timing"]

        embed()
        ratios = []
        for _ in range(ROUNDS):
            bare = bare_seconds(session, content, side)
            before = service.cpu_seconds()
            for _ in range(REQUESTS):
                timing = embed()
            served = (service.cpu_seconds() - before) / REQUESTS
            ratios.append(bare / served)
            print(f"bare {1000 * bare:.1f} ms, served {1000 * served:.1f} ms of processor time, ratio {bare / served:.2f}")
        print(timing)
        with ThreadPoolExecutor(16) as pool:
            before, began = service.cpu_seconds(), time.perf_counter()
            list(pool.map(lambda _: embed(), range(160)))
            cpu, wall = service.cpu_seconds() - before, time.perf_counter() - began
        print(f"16 connections: {160 / wall:.1f} pictures/s, {1000 * cpu / 160:.1f} ms of processor time each")
        print(f"ratio, median of {ROUNDS} rounds: {np.median(ratios):.2f}")
        print(
            f"ready after {ready:.1f} s, of which {start_cpu:.1f} s of processor time; {service.resident_bytes() / 1e6:.0f} MB"
        )


if __name__ == "__main__":
    main()
