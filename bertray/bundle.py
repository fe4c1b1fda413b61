"""The bundle: what a user takes home. Head weights as safetensors, one JSON, a model card; no code, no pickles.

head.safetensors   weight [classes, width], bias [classes]; where texts have vectors ood.centre, ood.map and ood.means
                   (see `ood.Familiar`)
bundle.json        the fields of Bundle but these
README.md          the model card
"""

import json
import math
from dataclasses import asdict, dataclass
from typing import Any

from bertray.annotations import form_of, part_of
from bertray.errors import BundleError
from bertray.heads import LinearHead
from bertray.ood import SHARE, Familiar
from bertray.storage import Location

VERSION = 2
_OOD = ("centre", "map", "means")  # arrays of a Familiar


@dataclass(frozen=True)
class Bundle:
    """A fitted head with all that is needed to use it.

    problem: what a text-classification answers: `single_label`, `multi_label` or `regression`.
    features: which pooled states of which layers a vector consists of, side by side: `mean_6` is the mean over the
        tokens of the sixth layer's output, `cls_0` that of the embeddings at [CLS].
    encoder: the spec's encoder section, with the hashes (`identity`) of the checkpoint it was fitted on.
    columns: the names that the training rows used, for batch prediction.
    fingerprint: of the vectors and settings that it was fitted on.
    metrics: split -> name -> figure; empty until it is evaluated.
    temperature: what the logits were divided by on rows left out, already in the weights.
    threshold: how sure the head has to be: below that probability a row gets no label. Of a question: by how much no
        answer has to be likelier than the best one, in logits.
    lengths: of answers to questions: the log of how probable those of 1, 2, ... tokens are.
    ood: what the training rows look like, to tell texts that are unlike them; None where words have vectors, and in
        bundles from before there was such a thing.
    """

    task: str
    problem: str
    labels: tuple[str, ...]
    features: tuple[str, ...]
    encoder: dict[str, Any]
    columns: dict[str, str]
    head_spec: dict[str, Any]
    losses: tuple[float, ...]
    seconds: float
    fingerprint: str
    versions: dict[str, str]
    head: LinearHead
    metrics: dict[str, dict[str, float | None]]
    temperature: float = 1.0
    threshold: float = 0.0
    lengths: tuple[float, ...] = ()
    ood: Familiar | None = None

    @property
    def form(self) -> str:
        """What its labels are, as in `annotations`."""
        return form_of(self.task, self.problem)

    @property
    def part(self) -> str:
        """What of its texts becomes a vector."""
        return part_of(self.form)

    @property
    def siamese(self) -> bool:
        """Whether the texts of its pairs are encoded apart."""
        return self.pairs and self.encoder["pair"] == "siamese"

    @property
    def pairs(self) -> bool:
        """Whether it takes pairs of texts."""
        return bool(self.columns["text_pair"])


def save(bundle: Bundle, url: str) -> None:
    """Write a bundle; bundle.json goes first and comes last, since its presence means that the bundle is whole."""
    from safetensors.numpy import save as to_bytes

    folder = Location(url)
    fields = {"version": VERSION, **{name: value for name, value in vars(bundle).items() if name != "head"}}
    arrays = asdict(bundle.head)
    if bundle.ood:
        fields["ood"] = asdict(bundle.ood)
        arrays |= {f"ood.{name}": fields["ood"].pop(name) for name in _OOD}
    (folder / "bundle.json").delete()
    (folder / "head.safetensors").write(to_bytes(arrays))
    (folder / "README.md").write(_card(bundle).encode())
    (folder / "bundle.json").write(json.dumps(fields, indent=1, ensure_ascii=False, allow_nan=False).encode())


def load(url: str) -> Bundle:
    """Read a bundle.

    Raises:
        BundleError: there is none, or it is damaged or of a newer version.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load as from_bytes

    folder = Location(url)
    try:
        fields = json.loads((folder / "bundle.json").read())
        version = fields.pop("version")
        if version != VERSION:
            raise BundleError(
                f"{url} is a bundle of version {version}; this bertray reads version {VERSION}. "
                "Install the bertray that wrote it, or fit again."
            )
        arrays = from_bytes((folder / "head.safetensors").read())
        if known := fields.pop("ood", None):
            fields["ood"] = Familiar(**{name: arrays.pop(f"ood.{name}") for name in _OOD} | known)
        head = LinearHead(**arrays)
        lists = {name: tuple(fields[name]) for name in ("labels", "features", "losses", "lengths")}
        bundle = Bundle(**{**fields, **lists}, head=head)
    except FileNotFoundError:
        raise BundleError(
            f"{url} is not a bundle: it has no bundle.json and head.safetensors. Give the folder head/ of a run."
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, SafetensorError, OSError) as error:
        raise BundleError(f"{url} is damaged ({error}). Fit it again, or copy it again.") from None
    if head.weight.shape[0] != len(bundle.labels) or head.bias.shape != head.weight.shape[:1]:
        raise BundleError(f"{url} is damaged: {len(bundle.labels)} labels, but weights {head.weight.shape}.")
    if bundle.ood and not _fits(bundle.ood, head):
        shapes = ", ".join(f"{name} {getattr(bundle.ood, name).shape}" for name in _OOD)
        threshold = repr(bundle.ood.threshold)
        raise BundleError(f"{url} is damaged: weights {head.weight.shape}, but ood {shapes}, threshold {threshold}.")
    return bundle


def _fits(ood: Familiar, head: LinearHead) -> bool:
    """Whether what the training rows look like is of vectors as the head takes them."""
    return (
        ood.centre.shape == head.weight.shape[1:]
        and ood.map.shape == ood.centre.shape + ood.means.shape[1:]
        and ood.means.ndim == 2
        and len(ood.means) > 0
        and isinstance(ood.threshold, float)
        and math.isfinite(ood.threshold)
    )


def _card(bundle: Bundle) -> str:
    encoder = bundle.encoder
    names = list(dict.fromkeys(name for figures in bundle.metrics.values() for name in figures))
    header = (
        "| split | " + " | ".join(name.replace("_", " ") for name in names) + " |\n" + "|---" * (len(names) + 1) + "|\n"
    )
    rows = "\n".join(
        f"| {split} | {' | '.join(_figure(name, figures.get(name)) for name in names)} |"
        for split, figures in bundle.metrics.items()
    )
    settings = ", ".join(f"{name} {value}" for name, value in bundle.head_spec.items() if name != "search")
    kind = bundle.task if bundle.problem == "single_label" else f"{bundle.task} ({bundle.problem})"
    return f"""---
library_name: bertray
pipeline_tag: {bundle.task}
base_model: {encoder["model"]}
---
# {kind} on {encoder["model"]}

A linear head on frozen vectors, fitted by [bertray]. It holds no encoder: `{encoder["model"]}`
(revision {encoder["revision"]}, weights sha256 {encoder["identity"]["weights"][:16]}...) is loaded beside it.

- Labels: {", ".join(bundle.labels)}
- Input: {"pairs of texts" if bundle.pairs else "single texts"}, at most {encoder["max_length"]} tokens
  (longer ones: {encoder["truncation"]})
- Vectors: {", ".join(bundle.features)}, {bundle.head.weight.shape[1]} numbers, precision {encoder["precision"]}
- Fitted with: {settings}
- Probabilities: temperature {bundle.temperature:.3f}, found on rows left out{_told_threshold(bundle)}
{_told_distance(bundle)}
{header + rows if rows else "Not evaluated yet."}

Use it:

    import bertray
    answers = bertray.load("PATH OF THIS FOLDER").predict(["a text"])

Limits: it knows its labels only; on text unlike its training rows its probabilities mean little.

[bertray]: a distributed job that encodes text once and fits heads on the vectors.
"""


def _figure(name: str, value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}" if name == "rows" else f"{value:.4f}"


def _told_threshold(bundle: Bundle) -> str:
    if bundle.form != "name" or not bundle.threshold:
        return ""
    return f"; no label below {bundle.threshold:.3f}"


def _told_distance(bundle: Bundle) -> str:
    if not bundle.ood:
        return ""
    return (
        f"- Unlike its training rows: vectors with a Mahalanobis distance over {bundle.ood.threshold:.2f}, as "
        f"{100 * SHARE:g} % of\n  rows like these have (learned from {bundle.ood.rows:,})\n"
    )
