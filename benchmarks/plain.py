"""Plain services: what one writes in an afternoon to answer with a transformers model and a linear head, on Ray Serve
as its documentation shows, and on FastAPI. Peers of `bertray serve`, with the same head and the same answers.

Both are given what is better for them where that is a setting: all cores to torch, the faster precision, no log of
requests, and as many requests in the model at a time as a batch takes.
"""

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any

from benchmarks import machine

PRECISIONS = {"fp32": "float32", "bf16": "bfloat16"}
_BATCH = 64
_LENGTH = 512
_TIMES = 4  # the first is a warm-up


class Model:
    """A transformers model, the mean over each text's tokens, and the head of a bundle."""

    def __init__(self, folder: str, precision: str) -> None:
        import torch
        from transformers import AutoModel, AutoTokenizer

        from bertray import bundle as bundles
        from bertray.predict import checkpoint_of

        torch.set_num_threads(machine.cores())
        bundle = bundles.load(folder)
        encoder = checkpoint_of(bundle.encoder).folder
        self._tokenizer = AutoTokenizer.from_pretrained(encoder)
        self._model = AutoModel.from_pretrained(encoder, dtype=getattr(torch, PRECISIONS[precision])).eval()
        if bundle.features != (f"mean_{self._model.config.num_hidden_layers}",):
            raise SystemExit(f"The bundle must be on the mean over the last layer. Got {bundle.features} instead.")
        self._weight, self._bias = torch.from_numpy(bundle.head.weight), torch.from_numpy(bundle.head.bias)
        self._labels = bundle.labels

    def __call__(self, texts: Sequence[str]) -> list[list[dict[str, Any]]]:
        import torch

        if not texts:
            return []
        encoded = self._tokenizer(list(texts), padding=True, truncation=True, max_length=_LENGTH, return_tensors="pt")
        mask = encoded["attention_mask"].unsqueeze(-1)
        with torch.inference_mode():
            hidden = self._model(**encoded).last_hidden_state.float()
            vectors = (hidden * mask).sum(1) / mask.sum(1)
            scores = (vectors @ self._weight.T + self._bias).softmax(1).numpy()
        return [[{"label": self._labels[i], "score": float(row[i])} for i in row.argsort()[::-1]] for row in scores]


def faster(folder: str, texts: Sequence[str]) -> str:
    """The precision in which the model is faster here: each in turn, the best of a few times counts."""
    models = {precision: Model(folder, precision) for precision in PRECISIONS}
    best: dict[str, float] = {}
    for _ in range(_TIMES):
        for precision, model in models.items():
            started = time.perf_counter()
            for first in range(0, len(texts), _BATCH):
                model(texts[first : first + _BATCH])
            seconds = time.perf_counter() - started
            best[precision] = min(seconds, best.get(precision, seconds))
    return min(best, key=lambda precision: best[precision])


def on_ray(folder: str, precision: str, port: int) -> None:
    """Serve by Ray Serve until interrupted: an ingress, and the model behind it in batches."""
    import ray
    from fastapi import Body, FastAPI
    from ray import serve

    app = FastAPI()
    settings: dict[str, Any] = {
        "max_ongoing_requests": 4 * _BATCH,
        "ray_actor_options": {"num_cpus": 0.5},
        "logging_config": {"enable_access_log": False},
    }

    @serve.deployment(**settings)
    class Labels:
        def __init__(self) -> None:
            self.model = Model(folder, precision)

        @serve.batch(max_batch_size=_BATCH, batch_wait_timeout_s=0)
        async def __call__(self, requests: list[list[str]]) -> list[list[Any]]:
            answers = iter(self.model([text for texts in requests for text in texts]))
            return [[next(answers) for _ in texts] for texts in requests]

    @serve.deployment(**settings)
    @serve.ingress(app)
    class Ingress:
        def __init__(self, labels: Any) -> None:
            self.labels = labels

        @app.post("/predict")
        async def predict(self, inputs: Annotated[str | list[str], Body(embed=True)]) -> list[Any]:
            if isinstance(inputs, str):
                return (await self.labels.remote([inputs]))[0]
            return await self.labels.remote(inputs)

        @app.get("/health")
        async def health(self) -> dict[str, str]:
            return {"status": "ok"}

    ray.init("local", include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(Ingress.bind(Labels.bind()))  # type: ignore[attr-defined]
    try:
        while True:
            time.sleep(3600)
    finally:
        serve.shutdown()
        ray.shutdown()


def on_fastapi(folder: str, precision: str, port: int) -> None:
    """Serve by uvicorn in this process until interrupted; the model runs beside the event loop, a request at a time,
    since several at once would only share its cores."""
    import uvicorn
    from fastapi import Body, FastAPI

    model, app, beside = Model(folder, precision), FastAPI(), ThreadPoolExecutor(1)

    @app.post("/predict")
    async def predict(inputs: Annotated[str | list[str], Body(embed=True)]) -> list[Any]:
        loop = asyncio.get_running_loop()
        if isinstance(inputs, str):
            return (await loop.run_in_executor(beside, model, [inputs]))[0]
        return await loop.run_in_executor(beside, model, inputs)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")
