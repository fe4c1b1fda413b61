"""The spec: what to read, which encoder and head to use, and where to run, as one frozen tree.

Every field has a default (the seed notebook's where it had one), a line of description and a plain
statement of what it may hold; `bertray spec` prints them, and error messages quote them. Knows nothing of
what the values are used for.
"""

import difflib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import pydantic
import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.fields import FieldInfo

from bertray.annotations import form_of
from bertray.errors import SpecError

Key = tuple[str | int, ...]
Pooling = Literal["pooler", "cls", "mean", "max", "first"]
Layers = Literal["last", "last4", "all"] | int | tuple[int, ...]
AutoCount = Literal["auto"] | Annotated[int, Field(ge=1)]


class Part(BaseModel):
    """A frozen section of a spec; unknown keys are errors and nothing is converted silently."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Source(Part):
    """Where the rows of one split come from. A bare string stands for `path`."""

    path: str = Field("", description="file, glob, folder or URL such as s3://bucket/rows; save_to_disk folders too")
    hub: str = Field("", description="name of a data set on the Hugging Face hub, instead of path")
    config: str = Field("", description="configuration of the hub data set")
    split: str = Field("", description="split of a hub or save_to_disk data set, slices allowed: train[:2000]")
    revision: str = Field("main", description="revision of the hub data set")
    format: Literal["auto", "parquet", "arrow", "csv", "tsv", "json", "jsonl", "text"] = Field(
        "auto", description="format of the files; auto goes by their names"
    )
    limit: int = Field(0, ge=0, description="read at most this many rows; 0 reads all")

    @model_validator(mode="before")
    @classmethod
    def _string_is_path(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_place(self) -> "Source":
        if self.path and self.hub:
            raise ValueError("must give either path or hub, not both")
        return self

    @property
    def given(self) -> bool:
        return bool(self.path or self.hub)


class Data(Part):
    """Which rows to read, and which of their columns hold what."""

    train: Source = Field(Source(), description="rows to fit the head on")
    dev: Source = Field(
        Source(),
        description="rows to choose by (search, early stopping, temperature); without them, folds of train",
    )
    test: Source = Field(Source(), description="rows to judge the head by; may be left out")
    text: str = Field("text", min_length=1, description="column of the text, or its list of words; of the question")
    text_pair: str = Field("", description="column of a pair's second text, or of the context; empty for single texts")
    label: str = Field("label", description="column of the label: name or number, or list of names, tags or answers")
    id: str = Field("", description="column of the row's id; empty derives ids from file and row")
    labels: tuple[str, ...] = Field(
        (), description="label names in the order of their numbers; empty takes what the training rows hold"
    )
    unit_rows: AutoCount = Field("auto", description="rows that are encoded, written and retried together")
    max_rejects: Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0, le=1)] = Field(
        1.0, description="rows of a split that may be set aside before the job stops: a count, or a share such as 0.01"
    )
    changed: Literal["encode", "refuse"] = Field(
        "encode", description="what to do when a file is not what it was when it was encoded: encode it again, or stop"
    )

    @model_validator(mode="after")
    def _distinct_names(self) -> "Data":
        if len(set(self.labels)) != len(self.labels):
            raise ValueError("labels must be distinct")
        return self


class Encoder(Part):
    """The frozen BERT, and how its output becomes one vector a text."""

    model: str = Field(
        "google-bert/bert-base-uncased",
        min_length=1,
        description="folder, URL of one in an object store, hub name, or a model that an installed package carries",
    )
    revision: str = Field("main", description="revision of the hub model")
    pooling: Pooling | tuple[Pooling, ...] = Field(
        "pooler",
        description="pooler (dense and tanh over [CLS]), [CLS] itself, mean or max over all tokens, or several side by "
        "side; of words their first token or the mean over theirs",
    )
    layers: Layers = Field(
        "last", description="layers whose states are pooled, from 0 (embeddings) up, or counted from the last by -1, -2"
    )
    pair: Literal["cross", "siamese"] = Field(
        "cross",
        description="pairs as one sequence, or each text by itself, once: a head then sees u, v, abs(u-v) and u*v",
    )
    max_length: int = Field(512, ge=3, description="most tokens a text may have, [CLS] and [SEP] included")
    truncation: Literal["truncate", "error", "window"] = Field(
        "truncate",
        description="what becomes of longer texts: cut and counted, refused, or encoded whole in overlapping windows",
    )
    overlap: int = Field(64, ge=0, description="tokens that neighbouring windows share, where truncation is window")
    states: Literal["store", "encode"] = Field(
        "store", description="vectors of words: kept, or encoded again in every pass, which takes no room but longer"
    )
    precision: Literal["auto", "fp32", "bf16", "fp16", "int16", "int8"] = Field(
        "auto", description="number format of the encoder; auto takes the fastest with a cosine of 0.999 to fp32"
    )

    @model_validator(mode="after")
    def _windows_move_on(self) -> "Encoder":
        room = self.max_length - 2  # the tokenizer, once it is there, knows whether there are more special tokens
        if self.truncation == "window" and self.overlap >= room:
            raise ValueError(f"overlap must be less than {room} (max_length without [CLS] and [SEP])")
        return self


class Search(Part):
    """What to choose among by the rows that are left out: every combination of what is listed. Encodes nothing."""

    l2: tuple[Annotated[float, Field(ge=0)], ...] = Field((), description="penalties")
    layers: tuple[Layers, ...] = Field((), description="layers, among those that are stored")
    pooling: tuple[Pooling | tuple[Pooling, ...], ...] = Field((), description="poolings, among those that are stored")
    combine: tuple[Literal["concat", "mean", "mix"], ...] = Field((), description="ways to take several layers")
    seeds: tuple[Annotated[int, Field(ge=0, le=2**32 - 1)], ...] = Field((), description="seeds of first weights")

    @property
    def given(self) -> bool:
        return any(getattr(self, name) for name in type(self).model_fields)


class Head(Part):
    """The linear head and how it is fitted."""

    optimizer: Literal["adam", "sgd", "lbfgs"] = Field(
        "adam", description="adam and sgd run in batches; lbfgs runs on all rows to the optimum"
    )
    lr: float = Field(0.01, gt=0, description="learning rate of adam and sgd")
    batch_size: int = Field(32, ge=1, description="rows (texts) a step of adam and sgd")
    epochs: int = Field(10, ge=1, description="passes over the rows of adam and sgd")
    early_stopping: int = Field(0, ge=0, description="epochs without a better loss on data.dev before it ends; 0 never")
    seed: int = Field(0, ge=0, le=2**32 - 1, description="seed of the first weights and of the order of rows")
    l2: float = Field(0.0, ge=0, description="penalty: l2/2 times the squared weights is added to the mean loss")
    standardize: bool = Field(False, description="scale each feature to mean 0 and deviation 1 on the training rows")
    combine: Literal["concat", "mean", "mix"] = Field(
        "concat", description="several layers side by side, averaged, or in a learned mix of shares"
    )
    class_weight: Literal["none", "balanced"] = Field(
        "none", description="balanced: rows of rare classes count more, all classes the same"
    )
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of each label that is spread over all classes")
    folds: int = Field(
        5,
        ge=0,
        description="parts of the training rows, each left out once, to choose and calibrate by; 0 none",
    )
    answer_accuracy: float = Field(
        0.0, ge=0, lt=1, description="least accuracy of what is answered: less sure rows get no label; 0 answers all"
    )
    search: Search = Field(Search(), description="what to choose among")

    @model_validator(mode="after")
    def _folds_are_several(self) -> "Head":
        if self.folds == 1:
            raise ValueError("folds must be 0, or at least 2")
        return self


class RaySizes(Part):
    """What to take of the Ray cluster."""

    address: str = Field("auto", min_length=1, description="cluster to use; auto joins a running one or starts its own")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where the encoder runs; auto takes GPUs if any")
    workers: AutoCount = Field("auto", description="encoder processes; auto takes one a GPU, or one for each few CPUs")
    cpus_per_worker: AutoCount = Field("auto", description="CPUs (threads) of each encoder process")
    patience: int = Field(
        600, ge=1, description="seconds without a sign of life after which an encoder process is ended and replaced"
    )
    price: float = Field(
        0.0,
        ge=0,
        description="of a GPU (or where there are none, a process) for an hour, to tell what a run cost; 0: not told",
    )
    fit_workers: int = Field(0, ge=0, description="Ray Train workers that fit the head; 0 fits in the calling process")
    fit_memory: AutoCount = Field(
        "auto", description="MB of vectors to hold while fitting, more are read from disk; auto is half of what is free"
    )


class Spec(Part):
    """A whole job: rows in, vectors, head, metrics, report and bundle out."""

    task: Literal["text-classification", "token-classification", "question-answering"] = Field(
        "text-classification", description="what is predicted"
    )
    problem: Literal["single_label", "multi_label", "regression"] = Field(
        "single_label", description="what a text-classification answers: one class, any number of them, or a number"
    )
    data: Data = Field(Data(), description="rows and columns")
    encoder: Encoder = Field(Encoder(), description="the frozen BERT")
    head: Head = Field(Head(), description="the linear head")
    ray: RaySizes = Field(RaySizes(), description="sizes for Ray")
    examples: tuple[str, ...] = Field((), description="texts to label at the end, for a look")
    output: str = Field(
        "runs/bertray", min_length=1, description="folder of the run; runs/<name of the file> from a file"
    )

    @property
    def form(self) -> str:
        """What the labels are, as in `annotations`."""
        return form_of(self.task, self.problem)

    @model_validator(mode="after")
    def _parts_fit(self) -> "Spec":
        for wrong, words in self._conflicts():
            if wrong:
                raise ValueError(words)
        return self

    def _conflicts(self) -> Iterator[tuple[bool, str]]:
        head, pair, words = self.head, self.data.text_pair, self.task != "text-classification"
        names = (self.encoder.pooling,) if isinstance(self.encoder.pooling, str) else self.encoder.pooling
        mixes, siamese = {head.combine, *head.search.combine}, self.encoder.pair == "siamese"
        yield bool(self.examples and pair), "examples must be left out when data.text_pair is given"
        yield (
            words and not set(names) <= {"first", "mean"},
            f"encoder.pooling must be first or mean for {self.task}: of the tokens of each word",
        )
        yield not words and "first" in names, "encoder.pooling must not be first for text-classification: cls is meant"
        yield (
            self.form == "answers" and names != ("mean",),
            "encoder.pooling must be mean for question-answering: of the question's tokens; all others stay single",
        )
        several = len(names) > 1 or any(not isinstance(each, str) for each in head.search.pooling)
        yield several and bool(mixes - {"concat"}), "head.combine mean and mix are for a single encoder.pooling"
        yield words and self.problem != "single_label", f"problem must be left out for {self.task}"
        yield self.task == "question-answering" and not pair, "data.text_pair must name the column of the contexts"
        yield (
            self.encoder.states == "encode" and (not words or self.ray.fit_workers > 0),
            "encoder.states encode is for words (token-classification, question-answering), with ray.fit_workers 0",
        )
        yield siamese and (words or not pair), "encoder.pair siamese is for text-classification with data.text_pair"
        related = "siamese pairs" if siamese else self.task  # differences and products of features are no means of them
        yield (
            (siamese or self.form == "answers") and bool(mixes - {"concat"}),
            f"head.combine mean and mix cannot be had for {related}",
        )
        yield self.form != "name" and head.answer_accuracy > 0, "head.answer_accuracy is for problem single_label"
        yield (
            self.form not in ("name", "tokens") and (head.class_weight != "none" or head.label_smoothing > 0),
            "head.class_weight and label_smoothing are for single labels",
        )
        yield (
            head.early_stopping > 0 and (head.optimizer == "lbfgs" or not self.data.dev.given),
            "head.early_stopping is for adam and sgd, with data.dev",
        )
        yield (
            head.search.given and not head.folds and not self.data.dev.given,
            "head.search needs rows to choose by: data.dev, or head.folds",
        )


def load_spec(spec: "str | Path | Mapping[str, Any] | Spec", overrides: Sequence[str] = ()) -> Spec:
    """Read a spec from a YAML file, a mapping or another spec, and apply overrides such as
    `encoder.pooling=mean` (values are YAML).

    Raises:
        SpecError: with one line for every mistake, each naming its place.
    """
    lines: dict[Key, str] = {}
    if isinstance(spec, Spec):
        data: Any = spec.model_dump(mode="json")
    elif isinstance(spec, Mapping):
        data = json.loads(json.dumps(spec, default=str))
    else:
        data, lines = _read_yaml(Path(spec))
        if isinstance(data, dict):
            data.setdefault("output", f"runs/{Path(spec).stem}")
    if not isinstance(data, dict):
        raise SpecError(f"{spec} must be a mapping of keys such as data, encoder and head. Got {data!r} instead.")
    for override in overrides:
        _override(data, override, lines)
    try:
        return Spec.model_validate_json(json.dumps(data))
    except pydantic.ValidationError as error:
        raise SpecError("\n".join(dict.fromkeys(_messages(error, lines)))) from None


def encoder_of(fields: Mapping[str, Any]) -> Encoder:
    """The encoder's section as a plan or a bundle keeps it: as JSON, where lists are not tuples."""
    return Encoder.model_validate_json(json.dumps(fields))


def fingerprint(value: Any) -> str:
    """A short, stable hash of anything that JSON can hold."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def describe() -> str:
    """The schema as commented YAML: a line for every key, with its default and what it may hold."""
    return "\n".join(_describe(Spec, 0))


def _describe(part: type[Part], depth: int) -> Iterator[str]:
    indent = "  " * depth
    for name, field in part.model_fields.items():
        if _is_part(field.annotation):
            yield f"{indent}{name}:{'':<24}# {field.description}"
            yield from _describe(field.annotation, depth + 1)  # type: ignore[arg-type]
        else:
            default = json.dumps(field.get_default() if field.default != () else [])
            yield f"{indent + name + ': ' + default:<40} # {field.description} ({allowed(field)})"


def allowed(field: FieldInfo) -> str:
    """What a field may hold, in words."""
    return _words(field.annotation, field.metadata)


def _words(kind: Any, metadata: Sequence[Any]) -> str:
    if get_origin(kind) is Annotated:
        kind, *metadata = get_args(kind)
        metadata = [constraint for extra in metadata for constraint in getattr(extra, "metadata", [extra])]
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(get_args(kind)) if len(get_args(kind)) > 1 else get_args(kind)[0]
    if get_args(kind) and get_origin(kind) is not tuple:
        return " or ".join(_words(option, ()) for option in get_args(kind))
    if get_origin(kind) is tuple:
        of = get_args(kind)[0]
        return "a list of " + ("strings" if of is str else "numbers" if of in (int, float) else "these")
    if _is_part(kind):
        return "a mapping"
    if kind is bool:
        return "true or false"
    if kind is str:
        return "a string that is not empty" if metadata else "a string"
    bounds = [
        f"{word} {getattr(constraint, name):.10g}"
        for constraint in metadata
        for name, word in (("ge", "of at least"), ("gt", "above"), ("le", "and at most"), ("lt", "and below"))
        if hasattr(constraint, name)
    ]
    return " ".join(["a whole number" if kind is int else "a number", *bounds])


def _is_part(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Part)


def _messages(error: pydantic.ValidationError, lines: Mapping[Key, str]) -> Iterator[str]:
    for problem in error.errors():
        part, field, key = _locate(problem["loc"])
        where = ".".join(map(str, key)) or "the spec"
        place = next((lines[key[:n]] for n in range(len(key), 0, -1) if key[:n] in lines), "")
        if problem["type"] == "extra_forbidden":
            near = difflib.get_close_matches(str(key[-1]), part.model_fields, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"Known here: {', '.join(part.model_fields)}."
            yield f"{place}{where} is not a key of a spec. {hint}"
        elif problem["type"] == "value_error":
            yield f"{place}{where}: {problem['ctx']['error']}."
        else:
            words = "a string" if isinstance(key[-1], int) else allowed(field) if field else "a mapping of keys"
            yield f"{place}{where} must be {words}. Got {json.dumps(problem['input'])} instead."


def _locate(loc: Key) -> tuple[type[Part], FieldInfo | None, Key]:
    """The part and field that an error's location names, and the location without pydantic's own steps
    (those into the options of a union)."""
    part: type[Part] = Spec
    field: FieldInfo | None = None
    for depth, step in enumerate(loc):
        if step not in part.model_fields:
            return part, field, loc[: depth + 1] if field is None or isinstance(step, int) else loc[:depth]
        field = part.model_fields[str(step)]
        if not _is_part(field.annotation):
            rest = loc[depth + 1 :]
            return part, field, loc[: depth + 2] if rest and isinstance(rest[0], int) else loc[: depth + 1]
        part, field = field.annotation, field if depth == len(loc) - 1 else None  # type: ignore[assignment]
    return part, field, loc


def _override(data: dict[str, Any], override: str, lines: dict[Key, str]) -> None:
    name, equals, text = override.partition("=")
    key = tuple(name.strip().split("."))
    if not equals or not all(key):
        raise SpecError(f"--set must be like encoder.pooling=mean. Got {override!r} instead.")
    for step in key[:-1]:
        inner = data.get(step)
        # A source may be written as a bare path; going into it makes the mapping it stands for.
        inner = {"path": inner} if isinstance(inner, str) and step in ("train", "dev", "test") else inner
        data[step] = inner if isinstance(inner, dict) else {}
        data = data[step]
    try:
        data[key[-1]] = yaml.load(text, _Loader) if text else ""
    except yaml.YAMLError:
        data[key[-1]] = text
    lines[key] = "--set "


def _read_yaml(path: Path) -> tuple[Any, dict[Key, str]]:
    """The data of a YAML file, and for every key in it the place to show in a message."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        node = yaml.compose(text, _Loader)
        lines: dict[Key, str] = {}
        _index(node, (), f"{path}:", lines)
        return yaml.load(text, _Loader) if node else {}, lines
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise SpecError(f"The spec {path} cannot be read: {reason}. Give the path of a YAML file.") from None
    except (yaml.YAMLError, TypeError, RecursionError) as error:  # TypeError: {{ x }} is a mapping as a key
        raise SpecError(f"The spec {path} is not YAML: {' '.join(str(error).split())}") from None


def _index(node: Any, key: Key, prefix: str, lines: dict[Key, str]) -> None:
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            inner = (*key, name.value)
            if inner in lines:
                raise SpecError(f"{prefix}{name.start_mark.line + 1}: {'.'.join(map(str, inner))} is given twice.")
            lines[inner] = f"{prefix}{name.start_mark.line + 1}: "
            _index(value, inner, prefix, lines)
    elif isinstance(node, yaml.SequenceNode):
        for position, value in enumerate(node.value):
            lines[(*key, position)] = f"{prefix}{value.start_mark.line + 1}: "
            _index(value, (*key, position), prefix, lines)


class _Loader(yaml.SafeLoader):
    """YAML with 1.2's scalars: `no` and `on` are words, 1e-2 is a number, 12:30 and dates are text."""


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), list(_first))
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))  # 010 is ten
