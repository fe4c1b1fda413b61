"""Prediction: texts to answers, one by one in Python or files at a time on Ray."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from bertray import answers, checkpoints
from bertray import bundle as bundles
from bertray import pairs as pair_texts
from bertray.annotations import Wrong, text_of, words_of
from bertray.bundle import Bundle
from bertray.checkpoints import Checkpoint
from bertray.cluster import over_nodes
from bertray.embed import embed
from bertray.errors import BertrayError, BundleError, SourceError
from bertray.features import OF_TOKENS, parse
from bertray.lease import held
from bertray.sources import Columns, is_saved_dataset, units
from bertray.spec import Encoder as EncoderSpec
from bertray.spec import RaySizes, Source, encoder_of, fingerprint
from bertray.splits import Split, made_by
from bertray.storage import Location, output_folder
from bertray.store import Manifest, Store


class Predictions(NamedTuple):
    """labels: the answer to each of n texts: a label (None below the bundle's threshold), a list of labels, a number, a
    list of entities {label, start, stop, text, score}, or an answer {text, start, stop, score}; probabilities: [n,
    labels] in the order of the bundle's labels, where it answers with labels."""

    labels: list[Any]
    probabilities: NDArray[np.float32] | None


class Predictor:
    """A bundle with its encoder, ready to answer."""

    def __init__(self, bundle: Bundle, device: str = "auto", threads: int = 0) -> None:
        """Load the encoder that the bundle was fitted on.

        Raises:
            BundleError: the encoder that is found is not the one the bundle was fitted on.
        """
        import torch

        from bertray.encoder import Encoder

        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.bundle = bundle
        wanted = list(map(parse, bundle.features))
        self.encoder = Encoder(
            checkpoint_of(bundle.encoder), encoder_spec(bundle.encoder), device, threads, bundle.part, wanted
        )

    def predict(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> Predictions:
        """Answer texts, or with `pairs` the pairs (texts[i], pairs[i]): questions and their contexts, where it answers
        questions. Texts may be lists of words, where it labels words.

        Raises:
            BertrayError: the texts are not strings, or pairs are missing or given to a bundle without them.
        """
        texts, pairs, words = self._checked(texts, pairs)
        encoded = self._encoded(texts, pairs, words)
        found = answers_to(self.bundle, encoded.vectors, encoded.spans, texts, pairs)
        probabilities = None
        if "probabilities" in found:
            flat = found["probabilities"].flatten().to_numpy()
            probabilities = flat.reshape(len(texts), len(self.bundle.labels))
        return Predictions(labels_of(found), probabilities)

    def vectors(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> NDArray[np.float32]:
        """What the head sees of texts, or of pairs: [n, width], where it sees each whole.

        Raises:
            BertrayError: as `predict`.
        """
        return np.asarray(self._encoded(*self._checked(texts, pairs)).vectors, np.float32)

    def _encoded(self, texts: list[str], pairs: list[str] | None, words: list[Any] | None) -> Any:
        if self.bundle.siamese and pairs is not None:
            return pair_texts.encode(self.encoder, texts, pairs)[0]
        return self.encoder.encode(texts, pairs, words)

    def _checked(
        self, texts: Sequence[Any], pairs: Sequence[str] | None
    ) -> tuple[list[str], list[str] | None, list[Any] | None]:
        if isinstance(texts, str):
            texts, pairs = [texts], None if pairs is None else [pairs] if isinstance(pairs, str) else pairs
        if self.bundle.pairs != (pairs is not None):
            takes = "pairs of texts" if self.bundle.pairs else "single texts"
            raise BertrayError(
                f"This bundle takes {takes}: call predict({'texts, pairs' if self.bundle.pairs else 'texts'})."
            )
        if pairs is not None and len(pairs) != len(texts):
            raise BertrayError(f"texts and pairs must be of one length. Got {len(texts)} and {len(pairs)} instead.")
        words: list[Any] | None = None
        if self.bundle.part == "word":
            texts, words = _in_words(texts)
        for text in (*texts, *(pairs or ())):
            if not isinstance(text, str):
                raise BertrayError(f"Texts must be strings. Got {text!r} instead.")
        return list(texts), None if pairs is None else list(pairs), words


def _in_words(texts: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Texts, and where the words of those are that were given as lists of words."""
    joined, words = [], []
    for text in texts:
        try:
            plain, lengths = text_of(text)
        except Wrong:
            plain, lengths = text, None
        joined.append(plain)
        words.append(None if lengths is None else words_of(lengths))
    return joined, words


def answers_to(
    bundle: Bundle, vectors: Any, spans: Any, texts: Sequence[str], pairs: Sequence[str] | None
) -> dict[str, pa.Array]:
    """What a bundle answers to texts that were encoded, as columns (see `answers.columns`).

    Args:
        vectors, spans: as in `Encoded`, of the bundle's features; of siamese pairs what `related` gives.
    """
    edges = None
    if bundle.part != "text":
        width = bundle.head.weight.shape[1] // (OF_TOKENS if bundle.part == "token" else 1)
        edges = np.cumsum([0, *map(len, vectors)])
        spans = np.concatenate([np.zeros((0, 2), np.int64), *spans])
        vectors = np.concatenate([np.zeros((0, width), np.float32), *vectors])
    logits, edges, spans = answers.logits(bundle, vectors, edges, spans)
    return answers.columns(bundle, logits, texts, pairs, edges, spans)


def labels_of(found: dict[str, pa.Array]) -> list[Any]:
    """Of each text what `Predictions.labels` says."""
    predicted: list[Any] = found["predicted"].to_pylist()
    if "start" not in found:
        return predicted
    others = (found[name].to_pylist() for name in ("start", "stop", "score"))
    names = ("text", "start", "stop", "score")
    return [dict(zip(names, row, strict=True)) for row in zip(predicted, *others, strict=True)]


def load(path: str, device: str = "auto") -> Predictor:
    """The predictor of a bundle in a folder (local, or a URL)."""
    return Predictor(bundles.load(str(path)), device)


def predict_files(
    bundle_url: str, source: Source, output: str, columns: Columns, sizes: RaySizes, max_rejects: float = 1.0
) -> Manifest:
    """Label all rows of a source on the connected Ray cluster, resumable like embedding.

    Writes to `output` id, text (and text_pair) and what `answers.columns` tells of each row, with label (entities,
    answer) for predicted: one file where it ends in .parquet, .csv or .jsonl, else a folder of Parquet shards with a
    manifest. Rows that are set aside go to OUTPUT.rejects.jsonl, or into the folder's rejects/.
    """
    bundle = bundles.load(bundle_url)
    columns = replace(columns, form=bundle.form)
    if bool(columns.text_pair) != bundle.pairs:
        takes = (
            "pairs: give the column of the second text" if bundle.pairs else "single texts: leave out the second text"
        )
        raise BundleError(f"{bundle_url} takes {takes} (--text-pair).")
    if is_saved_dataset(source):
        raise SourceError(f"{source.path} is a save_to_disk folder. Give its rows as files, such as Parquet.")
    if Location(output).url.startswith(f"{Location(source.path).url}/"):
        raise BertrayError(f"{output} lies inside the input {source.path}. Give another --output.")
    bundle_url, output = Location(bundle_url).url, output_folder(output).url
    cut = tuple(units(source, columns, over_nodes=over_nodes))
    if output in {unit.url for unit in cut}:
        raise BertrayError(f"{output} is one of the input's files. Give another --output.")
    kind = output.rpartition(".")[2] if output.endswith((".parquet", ".csv", ".jsonl")) else ""
    store = Store(f"{output}.parts" if kind else output)
    checkpoint, spec = checkpoint_of(bundle.encoder), encoder_spec(bundle.encoder)
    made = {**made_by(spec, checkpoint, columns, source.model_dump(), bundle.features), "bundle": bundle.fingerprint}
    split = Split("predictions", cut, columns, store, made)
    with held(store.location) as holder:
        _refuse_other(store, fingerprint(made), output)
        manifest = embed(
            [split],
            spec,
            checkpoint,
            sizes,
            finish=WithAnswers(bundle),
            max_rejects=max_rejects,
            run=holder.run,
            features=bundle.features,
            siamese=bundle.siamese,
        )["predictions"]
        store.prune(manifest)  # answers to rows that have changed since
        if kind:
            join(store, Location(output), kind, bundle)
            if manifest.total("rejected"):
                lines = [
                    json.dumps(row, ensure_ascii=False) for unit in manifest.units for row in store.rejects(unit.unit)
                ]
                Location(f"{output}.rejects.jsonl").write("".join(f"{line}\n" for line in lines).encode())
            store.location.delete()
    return manifest


def _refuse_other(store: Store, fingerprint: str, output: str) -> None:
    """Shards of another bundle or source must not mix with these: the folder remembers what it is for."""
    marker = store.location / ".made-by"
    if marker.exists() and marker.read().decode() != fingerprint:
        raise BertrayError(
            f"{store.url} holds predictions of another bundle or input. Delete it, or give another --output."
        )
    if not marker.exists() and store.location.files():
        raise BertrayError(f"{output} is a folder that holds other files. Give a folder of its own as --output.")
    marker.write(fingerprint.encode())


_NAMES = {"tokens": "entities", "answers": "answer"}  # of what is predicted, where it is no label


@dataclass(frozen=True)
class WithAnswers:
    """From a unit's rows and what the encoder gave them to the table of their answers."""

    bundle: Bundle

    def __call__(self, rows: pa.Table, encoded: Any, features: Sequence[str]) -> pa.Table:
        pairs = rows["text_pair"].to_pylist() if self.bundle.pairs else None
        found = answers_to(self.bundle, encoded.vectors, encoded.spans, rows["text"].to_pylist(), pairs)
        rows = rows.drop_columns(["label"])
        for name, column in found.items():
            name = _NAMES.get(self.bundle.form, "label") if name == "predicted" else name
            rows = rows.append_column(name, column)
        return rows


def join(store: Store, target: Location, kind: str, bundle: Bundle) -> None:
    """Write the shards as one file, in the order of the rows. CSV has no lists: probabilities have a column each, all
    else is written as JSON."""
    names = ["id", "text", *(["text_pair"] if bundle.pairs else []), *_told(bundle)]
    tables: Iterator[pa.Table] = store.tables(names)
    with target.create() as stream:
        writer: Any = None
        for table in tables:
            if kind == "jsonl":
                stream.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in table.to_pylist()).encode())
                continue
            table = _flat(table, bundle.labels) if kind == "csv" else table
            if writer is None:
                writer = (pa.csv.CSVWriter if kind == "csv" else pq.ParquetWriter)(stream, table.schema)
            writer.write_table(table)
        if writer is not None:
            writer.close()


def _told(bundle: Bundle) -> list[str]:
    """The columns of an answer."""
    return {
        "name": ["label", "score", "probabilities"],
        "names": ["label", "probabilities"],
        "number": ["label"],
        "tokens": ["entities"],
        "answers": ["answer", "start", "stop", "score"],
    }[bundle.form]


def _flat(table: pa.Table, labels: Sequence[str]) -> pa.Table:
    if "probabilities" in table.column_names:
        flat = table["probabilities"].combine_chunks().flatten().to_numpy().reshape(-1, len(labels))
        table = table.drop_columns(["probabilities"])
        for i, label in enumerate(labels):
            table = table.append_column(f"p_{label}", pa.array(np.ascontiguousarray(flat[:, i])))
    for place, field in enumerate(table.schema):
        if pa.types.is_list(field.type):
            cells = [json.dumps(cell, ensure_ascii=False) for cell in table[field.name].to_pylist()]
            table = table.set_column(place, field.name, pa.array(cells, pa.string()))
    return table


def encoder_spec(encoder: Mapping[str, Any]) -> EncoderSpec:
    """The encoder section of the spec that a bundle was fitted by, from that of the bundle."""
    return encoder_of({name: value for name, value in encoder.items() if name != "identity"})


def checkpoint_of(encoder: Mapping[str, Any]) -> Checkpoint:
    """The checkpoint that a bundle was fitted on, from that section of it.

    Raises:
        CheckpointError: it cannot be had.
        BundleError: what is found by its name is not the same.
    """
    name, revision, identity = (encoder[key] for key in ("model", "revision", "identity"))
    checkpoint = checkpoints.find(name, revision)
    if checkpoint.identity != identity:
        other = next(part for part in identity if checkpoint.identity.get(part) != identity[part])
        raise BundleError(
            f"The {other} of {name} in {checkpoint.folder} is not what the bundle was fitted on. Get "
            "it as it was, or fit again."
        )
    return checkpoint
