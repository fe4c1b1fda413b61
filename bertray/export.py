"""Export: a bundle to a folder that another library loads: transformers, ONNX Runtime or sentence-transformers.

Knows nothing of Ray. What was made is held against plain transformers on a few texts, one at a time, before anything is
written. It computes in float32, and cuts longer texts, whatever precision and truncation the bundle was fitted with.

export.json   of every export: its format, labels, inputs and files; the mark by which a later export replaces it
README.md     what it is, how to use it, how exact it is
"""

import importlib.util
import json
import logging
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bertray.bundle import Bundle
from bertray.checkpoints import Checkpoint
from bertray.errors import BertrayError, BundleError, CheckpointError
from bertray.features import OF_PAIRS, OF_TOKENS, related, with_surroundings
from bertray.predict import checkpoint_of
from bertray.storage import Location

FORMATS = ("transformers", "onnx", "sentence-transformers")
_MARK = "export.json"
_WRAPPER = Path(__file__).parent / "templates" / "modeling_bertray.py"
_POOLINGS = {
    "text-classification": ("pooler", "cls", "mean", "max"),
    "token-classification": ("first", "mean"),
    "question-answering": ("mean",),
}
_CLASSES = {
    "text-classification": "ForSequenceClassification",
    "token-classification": "ForTokenClassification",
    "question-answering": "ForQuestionAnswering",
}
_PIPELINES = {"text-classification": "BertrayTextPipeline", "token-classification": "BertrayTokenPipeline"}
_TOLERANCE = 1e-4  # of probabilities; of logits and vectors as a part of the largest, if that is over 1
_ONE_FILE = 1 << 30  # bytes of weights that model.onnx holds itself; protobuf ends at 2 GiB
_SAMPLE = (
    ("a plain text", "of a few words"),
    ("Nobody could say why the 12 trains, all of them late, were unbelievably full that day.", "They were."),
    ("yes", "A second text, which is the longer one of the two: what comes of it?"),
)

Batch = dict[str, torch.Tensor]


def export(bundle: Bundle, format: str, output: str) -> dict[str, Any]:
    """Write a bundle and its encoder for another library.

    Args:
        format: one of FORMATS.
        output: a local folder: new, empty, or holding an earlier export, whose files are replaced.

    Returns:
        output, format, classes (what loads it), wrapper (whether that is code in the folder, for which transformers
        wants trust_remote_code=True), difference (the largest to plain transformers, on a few texts) and files.

    Raises:
        BundleError: the bundle is none that the format can hold.
        CheckpointError: its encoder cannot be had, or lacks what the bundle uses.
        BertrayError: the folder is not free, or a package is missing.
    """
    if format not in FORMATS:
        raise BertrayError(f"--format must be one of {', '.join(FORMATS)}. Got {format!r} instead.")
    folder = _free(output)
    earlier = _files(folder)
    features = _features(bundle)
    if bundle.siamese and format != "sentence-transformers":
        raise BundleError(
            f"A siamese bundle encodes two texts apart, which --format {format} cannot. Export its encoder with "
            "--format sentence-transformers, or fit on pairs in one sequence."
        )
    with _quiet():
        parts = _Parts(bundle, features, checkpoint_of(bundle.encoder))
        parts.check()
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as made:
            written = _WRITERS[format](parts, Path(made))
            _finish(bundle, format, Path(made), written)
            files = _move(Path(made), folder, earlier)
    return {"output": str(folder), "format": format, **written.summary, "files": files}


@dataclass(frozen=True)
class _Written:
    """What a writer has made.

    classes: what loads it, by name.
    wrapper: whether that is code in the folder.
    difference: the largest to plain transformers.
    usage: Python that uses it, for the card.
    more: what export.json says of it besides.
    """

    classes: str
    wrapper: bool
    difference: float
    usage: str
    more: dict[str, Any]

    @property
    def summary(self) -> dict[str, Any]:
        return {"classes": self.classes, "wrapper": self.wrapper, "difference": self.difference}


@dataclass(frozen=True)
class _Parts:
    """A bundle and its checkpoint: what all formats are made of.

    features: pooling and layer of each.
    """

    bundle: Bundle
    features: tuple[tuple[str, int], ...]
    checkpoint: Checkpoint

    @property
    def depth(self) -> int:
        """How many layers are needed."""
        return max(layer for _, layer in self.features)

    @property
    def of_tokens(self) -> bool:
        """Whether there is an answer to each token."""
        return _of_tokens(self.bundle)

    @property
    def words(self) -> str:
        """Which of its tokens answer for a word: the `first`, or the `mean` of all. A mean of states gives what the
        mean of their logits gives, so in both cases a token has logits of its own."""
        return self.features[0][0]

    @cached_property
    def config(self) -> Any:
        """The encoder's config without the layers above those that are needed, but with one at least; with all where
        the family's config ties other things to their number."""
        from transformers import AutoConfig

        whole = AutoConfig.from_pretrained(self.checkpoint.folder)
        cut = AutoConfig.from_pretrained(self.checkpoint.folder, num_hidden_layers=max(1, self.depth))
        try:
            return type(cut).from_dict(cut.to_dict())
        except Exception:  # what a config holds against itself has many kinds
            return whole

    @property
    def last(self) -> bool:
        """Whether the highest layer that is needed is the last that there is in the export."""
        return self.depth == self.config.num_hidden_layers

    @cached_property
    def plain(self) -> Any:
        """The whole encoder as transformers loads it.

        Raises:
            CheckpointError: it cannot be loaded, or its pooler is needed and not trained.
        """
        try:
            model, missing = _loaded("AutoModel", self.checkpoint)
        except Exception as error:  # transformers raises many kinds: say what it said
            reason = " ".join(str(error).split())[:300]
            raise CheckpointError(f"{self.checkpoint.name} cannot be loaded: {reason}") from error
        pooled = any(pooling == "pooler" for pooling, _ in self.features)
        if pooled and (getattr(model, "pooler", None) is None or any("pooler" in key for key in missing)):
            raise CheckpointError(f"{self.checkpoint.name} has no trained pooler. Fit on mean, cls or max.")
        return model

    @cached_property
    def tokenizer(self) -> Any:
        """The checkpoint's, with the bundle's max_length, and with token types only where the encoder knows them."""
        from transformers import AutoTokenizer

        typed = getattr(self.config, "type_vocab_size", 0) > 1
        names = ["input_ids", "token_type_ids", "attention_mask"] if typed else ["input_ids", "attention_mask"]
        limit = self.bundle.encoder["max_length"]
        tokenizer = AutoTokenizer.from_pretrained(
            self.checkpoint.folder, model_max_length=limit, max_length=limit, model_input_names=names
        )
        backend = tokenizer.backend_tokenizer  # for those who load tokenizer.json with the package tokenizers alone
        backend.enable_truncation(limit)
        backend.enable_padding(pad_id=tokenizer.pad_token_id, pad_token=tokenizer.pad_token)
        return tokenizer

    def check(self) -> None:
        """Whether checkpoint and head belong together.

        Raises:
            BundleError: they do not.
        """
        layers, width = self.checkpoint.layers, self.plain.config.hidden_size
        for pooling, layer in self.features:
            if layer > layers or (pooling == "pooler" and layer < layers):
                raise BundleError(
                    f"The bundle uses {pooling}_{layer}, but {self.checkpoint.name} has {layers} layers and a pooler "
                    "on the last at most. Fit it again."
                )
        asked = self.bundle.task == "question-answering"
        parts = OF_PAIRS if self.bundle.siamese else OF_TOKENS if asked else 1  # see features.related
        wanted = (len(_labels(self.bundle)), parts * len(self.features) * width)
        if self.bundle.head.weight.shape != wanted:
            raise BundleError(f"The bundle's weights are {self.bundle.head.weight.shape}, not {wanted}. Fit it again.")

    def batch(self) -> Batch:
        """The sample, padded."""
        texts = [[pair[side] for pair in _SAMPLE] for side in range(1 + _paired(self.bundle))]
        return dict(self.tokenizer(*texts, truncation=True, padding=True, return_tensors="pt"))

    @torch.inference_mode()
    def vectors(self, inputs: Batch) -> NDArray[np.float32]:
        """What the head is put on, by plain transformers: [features * width] of a text, or [tokens, ...] of its tokens.

        Args:
            inputs: of one text, [1, tokens] each, without padding.
        """
        output = self.plain(**inputs, output_hidden_states=True)
        pooled = {
            "first": lambda states: states,
            "cls": lambda states: states[0],
            "mean": lambda states: states if self.of_tokens else states.mean(0),
            "max": lambda states: states.amax(0),
            "pooler": lambda states: output.pooler_output[0],
        }
        found = torch.cat([pooled[name](output.hidden_states[at][0]) for name, at in self.features], -1).numpy()
        return self._related(found, inputs) if self.bundle.task == "question-answering" else found

    def _related(self, states: NDArray[np.float32], inputs: Batch) -> NDArray[np.float32]:
        """[own tokens, 3 * width] of a question and its text: see `answers.logits`."""
        ids = inputs["input_ids"][0]
        question = states[1 : int((ids == self.tokenizer.sep_token_id).nonzero()[0])].mean(0, keepdims=True)
        own = np.concatenate([question, states[self.own(ids).numpy()]])[:, None]
        both = with_surroundings(own, np.array([0, len(own)]))[1:]
        return related(both[:, 0], np.repeat(question, len(both), 0), both[:, 1])

    def own(self, ids: torch.Tensor) -> torch.Tensor:
        """[..., tokens] which of them answer: of a question and its text [CLS] and the text's tokens, else all."""
        if self.bundle.task != "question-answering":
            return torch.ones_like(ids, dtype=torch.bool)
        apart = ids == self.tokenizer.sep_token_id
        found = (apart.cumsum(-1) > 0) & ~apart
        found[..., 0] = True
        return found

    def answers(self, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        """[..., outputs] of vectors: logits for tokens, else what the bundle answers."""
        logits = torch.from_numpy(vectors @ self.bundle.head.weight.T + self.bundle.head.bias)
        return self.activated(logits).numpy()

    def activated(self, logits: torch.Tensor) -> torch.Tensor:
        if self.of_tokens or self.bundle.problem == "regression":
            return logits
        return logits.sigmoid() if self.bundle.problem == "multi_label" else logits.softmax(-1)

    @torch.inference_mode()
    def difference(self, run: Callable[[Batch], Any], of: Callable[[NDArray[np.float32]], Any]) -> float:
        """The largest difference, on the sample, between what an export makes of the padded texts, and plain
        transformers of each alone.

        Args:
            run: from a batch to [texts, outputs], or [texts, tokens, outputs].
            of: from vectors to the same of one text.
        """
        batch, worst = self.batch(), 0.0
        for row, (found, mask) in enumerate(zip(run(batch), batch["attention_mask"].bool(), strict=True)):
            expected = of(self.vectors({name: values[row : row + 1, mask] for name, values in batch.items()}))
            kept = mask & self.own(batch["input_ids"][row])
            found = np.asarray(found)[kept.numpy()] if self.of_tokens else np.asarray(found)
            worst = max(worst, float(np.abs(found - expected).max() / max(1.0, np.abs(expected).max())))
        return worst

    def held(self, run: Callable[[Batch], Any], of: Callable[[NDArray[np.float32]], Any]) -> float:
        """The same; an error where it is too large."""
        difference = self.difference(run, of)
        if not difference <= _TOLERANCE:
            raise BundleError(
                f"{self.checkpoint.name}, cut after layer {self.depth} and with padding, answers otherwise than alone, "
                f"by {difference:.2g}. Fit on a checkpoint of BERT's family."
            )
        return difference


def _features(bundle: Bundle) -> tuple[tuple[str, int], ...]:
    """Pooling and layer of each feature.

    Raises:
        BundleError: they are none that an export can compute.
    """
    known = _POOLINGS.get(bundle.task)
    if known is None:
        raise BundleError(f"Bundles for {bundle.task} cannot be exported, only those for {', '.join(_POOLINGS)}.")
    found = tuple(re.fullmatch(rf"({'|'.join(known)})_(\d+)", name) for name in bundle.features)
    features = tuple((match[1], int(match[2])) for match in found if match)
    if not found or len(features) < len(found):
        raise BundleError(
            f"The bundle's features are {', '.join(bundle.features) or 'none'}: {bundle.task} knows "
            f"{', '.join(known)} with the number of a layer. Fit it again."
        )
    if bundle.task == "token-classification" and len({pooling for pooling, _ in features}) > 1:
        raise BundleError(
            "A head on first and mean tokens of words at once sees words, which no exported model does. Fit on "
            "features of one of the two."
        )
    return features


def _of_tokens(bundle: Bundle) -> bool:
    return bundle.task != "text-classification"


def _paired(bundle: Bundle) -> bool:
    """Whether two texts make one sequence."""
    return bundle.task == "question-answering" or (bundle.pairs and not bundle.siamese)


def _labels(bundle: Bundle) -> tuple[str, ...]:
    """A name of each output of the head."""
    if bundle.task == "question-answering":
        return ("start", "end")
    return bundle.labels or ("value",) if bundle.problem == "regression" else bundle.labels


# --- folders ------------------------------------------------------------------------------------------------------


def _free(output: str) -> Path:
    """The folder to write to.

    Raises:
        BertrayError: it is on a store, or holds other things.
    """
    if "://" in output:
        raise BertrayError(f"{output} is a URL: --output must be a local folder. Copy it there afterwards.")
    folder = Path(Location(output).path)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not (folder / _MARK).is_file()):
        raise BertrayError(f"{folder} is there and is no earlier export. Give a new or empty folder as --output.")
    return folder


def _files(folder: Path) -> list[str]:
    """What an earlier export wrote there.

    Raises:
        BertrayError: its mark is damaged.
    """
    mark = folder / _MARK
    if not mark.exists():
        return []
    try:
        files = [Path(name) for name in json.loads(mark.read_text(encoding="utf-8"))["files"]]
    except (ValueError, KeyError, TypeError):
        raise BertrayError(f"{mark} is damaged. Delete {folder}, or give another --output.") from None
    return [str(file) for file in files if ".." not in file.parts and not file.is_absolute()]


def _move(made: Path, folder: Path, earlier: Sequence[str]) -> list[str]:
    """Put what was made in place of an earlier export, of which nothing but what it wrote is deleted. The mark comes
    last, and an earlier one stays until then: what breaks off can be done again."""
    files = sorted(str(path.relative_to(made)) for path in made.rglob("*") if path.is_file())
    mode = (made / "README.md").stat().st_mode  # some libraries make files that nobody else may read
    for name in set(earlier) - {_MARK}:
        (folder / name).unlink(missing_ok=True)
    for name in sorted(files, key=lambda name: name == _MARK):
        (made / name).chmod(mode)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).replace(folder / name)
    for inner in {(folder / name).parent for name in earlier} - {folder}:
        if inner.is_dir() and not any(inner.iterdir()):
            inner.rmdir()
    return files


def _finish(bundle: Bundle, format: str, folder: Path, written: _Written) -> None:
    """The card, and the mark with the names of all files."""
    (folder / "README.md").write_text(_card(bundle, format, written), encoding="utf-8")
    words = {"words": bundle.features[0].split("_")[0]} if bundle.task == "token-classification" else {}
    files = sorted([*(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()), _MARK])
    mark = {
        "format": format,
        "task": bundle.task,
        "problem": bundle.problem,
        "labels": _labels(bundle),
        "features": bundle.features,
        **words,
        "pairs": _paired(bundle),
        "max_length": bundle.encoder["max_length"],
        "model": bundle.encoder["model"],
        "revision": bundle.encoder["revision"],
        "fingerprint": bundle.fingerprint,
        "threshold": bundle.threshold,
        **({"lengths": bundle.lengths} if bundle.lengths else {}),
        **written.summary,
        **written.more,
        "files": files,
    }
    (folder / _MARK).write_text(json.dumps(mark, indent=1, ensure_ascii=False), encoding="utf-8")


# --- transformers -------------------------------------------------------------------------------------------------


def _to_transformers(parts: _Parts, folder: Path) -> _Written:
    """Weights, config and tokenizer: of the family's own class where there is one, else with the wrapper."""
    model, wrapper = _stock(parts), False
    difference = np.inf if model is None else parts.difference(_answering(parts, model), parts.answers)
    if not difference <= _TOLERANCE:
        model, wrapper = _wrapped(parts), True
        difference = parts.held(_answering(parts, model), parts.answers)
        shutil.copy(_WRAPPER, folder / _WRAPPER.name)
    model.save_pretrained(folder)
    parts.tokenizer.save_pretrained(folder)
    return _Written(type(model).__name__, wrapper, difference, _transformers_usage(parts, wrapper), {})


def _stock(parts: _Parts) -> Any:
    """The family's own class with the bundle's head in it; None where its head is no single linear layer on the one
    feature of the bundle."""
    bundle = parts.bundle
    wanted = "first" if parts.of_tokens else "pooler"
    if parts.features != ((wanted, parts.depth),) or not parts.last:
        return None
    config = type(parts.config).from_dict({**parts.config.to_dict(), **_labelled(bundle)})
    try:
        model, _ = _loaded(f"AutoModel{_CLASSES[bundle.task]}", parts.checkpoint, config)
    except ValueError:  # the family has no such class
        return None
    own = [part for name, part in model.named_children() if name != model.base_model_prefix]
    heads = [part for part in own if not isinstance(part, torch.nn.Dropout)]
    if len(heads) != 1 or not isinstance(heads[0], torch.nn.Linear):
        return None
    return model if _filled(heads[0], bundle) else None


def _wrapped(parts: _Parts) -> Any:
    """The class of templates/modeling_bertray.py with encoder and head in it."""
    bundle = parts.bundle
    wrapper = _wrapper_module()
    name = f"Bertray{_CLASSES[bundle.task]}"
    unneeded = ("_name_or_path", "architectures", "dtype", "id2label", "label2id", "transformers_version")
    encoder = {key: value for key, value in parts.config.to_dict().items() if key not in unneeded}
    features = [f"{'first' if parts.of_tokens else pooling}_{layer}" for pooling, layer in parts.features]
    separator = parts.tokenizer.sep_token_id if bundle.task == "question-answering" else -1
    config = wrapper.BertrayConfig(encoder, features, separator, **_labelled(bundle))
    auto = f"AutoModel{_CLASSES[bundle.task]}"
    config.auto_map = {
        "AutoConfig": f"{_WRAPPER.stem}.BertrayConfig",
        auto: f"{_WRAPPER.stem}.{name}",
    }
    if bundle.task in _PIPELINES:
        config.custom_pipelines = {bundle.task: {"impl": f"{_WRAPPER.stem}.{_PIPELINES[bundle.task]}", "pt": [auto]}}
    model = getattr(wrapper, name)(config)
    pooled = getattr(model.encoder, "pooler", None) is not None
    model.encoder, _ = _loaded("AutoModel", parts.checkpoint, parts.config)
    if not pooled and hasattr(model.encoder, "pooler"):
        model.encoder.pooler = None
    _filled(model.head, bundle)
    return model.eval()


def _wrapper_module() -> ModuleType:
    """templates/modeling_bertray.py, from its place: it is copied, so it can import nothing of bertray."""
    spec = importlib.util.spec_from_file_location(_WRAPPER.stem, _WRAPPER)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _labelled(bundle: Bundle) -> dict[str, Any]:
    """What a config says of labels."""
    problems = {"multi_label": "multi_label_classification", "regression": "regression"}
    problem = problems.get(bundle.problem, "single_label_classification")
    return {
        "id2label": dict(enumerate(_labels(bundle))),
        "label2id": {label: i for i, label in enumerate(_labels(bundle))},
        "problem_type": problem if bundle.task == "text-classification" else None,
    }


def _filled(linear: torch.nn.Linear, bundle: Bundle) -> bool:
    """Put the bundle's head into a layer, if it fits."""
    weight, bias = (torch.from_numpy(np.array(part, np.float32)) for part in (bundle.head.weight, bundle.head.bias))
    if linear.weight.shape != weight.shape or linear.bias is None:
        return False
    linear.load_state_dict({"weight": weight, "bias": bias})
    return True


def _answering(parts: _Parts, model: Any) -> Callable[[Batch], torch.Tensor]:
    """From a batch to answers, by a model with a head."""
    return lambda batch: parts.activated(_logits(model(**batch)))


def _logits(output: Any) -> torch.Tensor:
    """[texts, labels], or [texts, tokens, outputs]."""
    return output.logits if "logits" in output else torch.stack([output.start_logits, output.end_logits], -1)


def _loaded(auto: str, checkpoint: Checkpoint, config: Any = None) -> tuple[Any, set[str]]:
    """A model in float32 by one of transformers' Auto classes, and the names of weights that the checkpoint lacks."""
    import transformers

    more = {} if config is None else {"config": config}
    model, info = getattr(transformers, auto).from_pretrained(
        checkpoint.folder, dtype=torch.float32, output_loading_info=True, local_files_only=True, **more
    )
    return model.eval().requires_grad_(False), set(info["missing_keys"])


# --- ONNX ---------------------------------------------------------------------------------------------------------


class _Graph(torch.nn.Module):
    """What model.onnx computes: answers to texts, or logits of tokens."""

    def __init__(self, parts: _Parts) -> None:
        super().__init__()
        self.model = _wrapped(parts)
        self.activated = parts.activated

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Of input_ids, attention_mask and maybe token_type_ids, [texts, tokens] each."""
        return self.activated(_logits(self.model(*inputs)))


def _to_onnx(parts: _Parts, folder: Path) -> _Written:
    """model.onnx, with texts and tokens of any number, and the tokenizer."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            raise BertrayError(f"--format onnx needs {package}, which is not installed: pip install 'bertray[export]'")
    import onnxruntime

    graph = _Graph(parts).eval()
    batch = parts.batch()
    names = [name for name in ("input_ids", "attention_mask", "token_type_ids") if name in batch]
    output = "logits" if parts.of_tokens else "values" if parts.bundle.problem == "regression" else "probabilities"
    size = sum(weights.nbytes for weights in graph.parameters())
    path = folder / "model.onnx"
    try:
        torch.onnx.export(
            graph,
            tuple(batch[name] for name in names),
            path,
            input_names=names,
            output_names=[output],
            dynamic_shapes=(tuple({0: torch.export.Dim("texts"), 1: torch.export.Dim("tokens")} for _ in names),),
            external_data=size > _ONE_FILE,
            dynamo=True,
            verbose=False,
        )
    except Exception as error:  # torch raises many kinds: say what it said
        reason = " ".join(str(error).split())[:300]
        raise BundleError(f"torch cannot make a graph of {parts.checkpoint.name}: {reason}") from error
    session = onnxruntime.InferenceSession(path)

    def run(batch: Batch) -> NDArray[np.float32]:
        return session.run([output], {name: batch[name].numpy() for name in names})[0]

    difference = parts.held(run, parts.answers)
    parts.tokenizer.save_pretrained(folder)
    more = {"inputs": names, "output": output}
    return _Written("onnxruntime.InferenceSession", False, difference, _onnx_usage(parts, output), more)


# --- sentence-transformers ----------------------------------------------------------------------------------------


def _to_sentence_transformers(parts: _Parts, folder: Path) -> _Written:
    """Transformer and Pooling, and for the pooler a Dense: they give the vectors. The head is no part of it."""
    bundle = parts.bundle
    poolings = [pooling for pooling, _ in parts.features]
    layers = {layer for _, layer in parts.features}
    if parts.of_tokens or len(layers) > 1 or not parts.last or ("pooler" in poolings and len(poolings) > 1):
        raise BundleError(
            f"sentence-transformers pools the last layer of an encoder for a vector a text, which "
            f"{', '.join(bundle.features)} of {parts.checkpoint.name} is not. "
            "Export with --format transformers or onnx."
        )
    model = _wrapped(parts)
    difference = parts.held(lambda batch: model.vectors(**batch), lambda vectors: vectors)
    modules = ["Transformer", "Pooling"]
    if poolings == ["pooler"]:
        modules.append("Dense")
        poolings = ["cls"]
        _write_pooler(model.encoder, folder / "2_Dense")
    model.encoder.save_pretrained(folder)
    parts.tokenizer.save_pretrained(folder)
    paths = ["", *(f"{i}_{name}" for i, name in enumerate(modules[1:], 1))]
    listed = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{name}"}
        for i, (name, path) in enumerate(zip(modules, paths, strict=True))
    ]
    _write_json(folder / "modules.json", listed)
    _write_json(folder / "sentence_bert_config.json", {"max_seq_length": bundle.encoder["max_length"]})
    _write_json(folder / "1_Pooling" / "config.json", _pooling_config(poolings, parts.config.hidden_size))
    return _Written(" + ".join(modules), False, difference, _sentence_usage(parts), {})


def _pooling_config(poolings: Sequence[str], width: int) -> dict[str, Any]:
    """What Pooling reads: as all its versions do where its own order of poolings is the bundle's."""
    if list(poolings) != sorted(poolings):
        return {"embedding_dimension": width, "pooling_mode": list(poolings)}
    names = {"cls": "cls_token", "max": "max_tokens", "mean": "mean_tokens"}
    return {
        "word_embedding_dimension": width,
        **{f"pooling_mode_{name}": pooling in poolings for pooling, name in names.items()},
    }


def _write_pooler(encoder: Any, folder: Path) -> None:
    """BERT's pooler, a dense layer and tanh over [CLS], as a Dense module."""
    from safetensors.torch import save_file

    dense = getattr(encoder.pooler, "dense", None)
    if not isinstance(dense, torch.nn.Linear) or not isinstance(
        getattr(encoder.pooler, "activation", None), torch.nn.Tanh
    ):
        raise BundleError(
            f"The pooler of {type(encoder).__name__} is not BERT's dense layer and tanh, which alone "
            "sentence-transformers can hold. Export with --format transformers or onnx."
        )
    width = dense.out_features
    tanh = "torch.nn.modules.activation.Tanh"
    config = {"in_features": width, "out_features": width, "bias": True, "activation_function": tanh}
    _write_json(folder / "config.json", config)
    weights = {f"linear.{name}": values.contiguous() for name, values in dense.state_dict().items()}
    save_file(weights, folder / "model.safetensors")


def _write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")


_WRITERS: dict[str, Callable[[_Parts, Path], _Written]] = {
    "transformers": _to_transformers,
    "onnx": _to_onnx,
    "sentence-transformers": _to_sentence_transformers,
}


# --- cards --------------------------------------------------------------------------------------------------------


def _card(bundle: Bundle, format: str, written: _Written) -> str:
    encoder = bundle.encoder
    code = f"the code in {_WRAPPER.name}, which loading it runs" if written.wrapper else "no code of its own"
    usage = "\n".join(f"    {line}" if line else "" for line in written.usage.splitlines())
    answers = "vectors" if format == "sentence-transformers" else "logits" if _of_tokens(bundle) else "answers"
    problem = "" if _of_tokens(bundle) else f" ({bundle.problem.replace('_', ' ')})"
    inputs = "pairs of texts" if _paired(bundle) else "single texts"
    if bundle.task == "question-answering":
        inputs = "a question and a text"
    longer = {
        "truncate": "as in the bundle",
        "window": "where the bundle encodes windows of them",
        "error": "where the bundle refuses them",
    }[encoder["truncation"]]
    return f"""---
library_name: {format}
pipeline_tag: {"feature-extraction" if format == "sentence-transformers" else bundle.task}
base_model: {encoder["model"]}
---
# {bundle.task} on {encoder["model"]}, for {format}

Written by [bertray] from a bundle: its encoder up to the highest layer that is used{_and_head(format)}.

- Loaded by: {written.classes}, {code}
- Outputs: {", ".join(_labels(bundle))}{problem}
- Input: {inputs}, at most {encoder["max_length"]} tokens
  (longer ones are cut, {longer})
- Features: {", ".join(bundle.features)}
- Exact: {answers} differ from plain transformers by {written.difference:.1g} at most, on a few texts when this was
  written. It computes in float32; the bundle was fitted on vectors of precision {encoder["precision"]}.

Use it:

{usage}

[bertray]: a distributed job that encodes text once and fits heads on the vectors.
"""


def _and_head(format: str) -> str:
    return (
        ", which gives the vectors; the head is no part of it"
        if format == "sentence-transformers"
        else ", and its head"
    )


def _transformers_usage(parts: _Parts, wrapper: bool) -> str:
    bundle = parts.bundle
    trust = ", trust_remote_code=True" if wrapper else ""
    if bundle.task == "question-answering":
        return f"""from transformers import AutoModelForQuestionAnswering, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("PATH OF THIS FOLDER"{trust})
model = AutoModelForQuestionAnswering.from_pretrained("PATH OF THIS FOLDER"{trust})
scores = model(**tokenizer("a question", "a text", truncation=True, return_tensors="pt"))
# start_logits and end_logits of each token; token 0 is "no answer\""""
    if bundle.task == "token-classification":
        strategy = {"first": "first", "mean": "average"}[parts.words]
        words = (
            'tag(["it\'s", "my", "own", "words"], is_split_into_words=True)'
            if wrapper
            else "# where punctuation splits a word, as in it's, the label of its first part is the word's"
        )
        return f"""from transformers import pipeline
tag = pipeline("{bundle.task}", model="PATH OF THIS FOLDER", aggregation_strategy="{strategy}"{trust})
tag("a text")
{words}"""
    text = '{"text": "a text", "text_pair": "another"}' if _paired(bundle) else '"a text"'
    return f"""from transformers import pipeline
classify = pipeline("{bundle.task}", model="PATH OF THIS FOLDER"{trust})
classify({text}, truncation=True, top_k=None)"""


def _onnx_usage(parts: _Parts, output: str) -> str:
    bundle = parts.bundle
    texts = '["a text"], ["another"]' if _paired(bundle) else '["a text", "another"]'
    of_word = {"first": "its first token's", "mean": "the mean of its tokens'"}
    notes = {
        "text-classification": f"# [texts, {len(_labels(bundle))}]",
        "token-classification": f"# [texts, tokens, {len(_labels(bundle))}]; a word's are {of_word.get(parts.words)}",
        "question-answering": '# [texts, tokens, 2]: start and end; token 0 is "no answer"',
    }
    return f"""import onnxruntime
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("PATH OF THIS FOLDER")
session = onnxruntime.InferenceSession("PATH OF THIS FOLDER/model.onnx")
inputs = tokenizer({texts}, truncation=True, padding=True, return_tensors="np")
({output},) = session.run(None, dict(inputs))
{notes[bundle.task]}"""


def _sentence_usage(parts: _Parts) -> str:
    texts = '("a text", "another")' if _paired(parts.bundle) else '"a text"'
    return f"""from sentence_transformers import SentenceTransformer
vectors = SentenceTransformer("PATH OF THIS FOLDER").encode([{texts}])"""


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what transformers and torch's exporter say of weights and layers that are left out on purpose."""
    from transformers.utils import logging as library

    exporter = logging.getLogger("torch.onnx")
    levels = library.get_verbosity(), exporter.level
    bars = library.is_progress_bar_enabled()
    library.set_verbosity_error()
    library.disable_progress_bar()
    exporter.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        library.set_verbosity(levels[0])
        exporter.setLevel(levels[1])
        if bars:
            library.enable_progress_bar()
