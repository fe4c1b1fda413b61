"""The bundle: what a user takes home. Head weights as safetensors, one JSON, a model card; no code, no pickles.

head.safetensors   weight [classes, width], bias [classes]
bundle.json        the fields of Bundle but the head
README.md          the model card
"""

import json
from dataclasses import asdict, dataclass
from typing import Any

from bertray.errors import BundleError
from bertray.heads import LinearHead
from bertray.storage import Location

VERSION = 2


@dataclass(frozen=True)
class Bundle:
    """A fitted head with all that is needed to use it.

    problem: what a text-classification answers: `single_label`, `multi_label` or `regression`.
    features: which pooled states of which layers a vector consists of, side by side: `mean_6` is the mean over the
        tokens of the sixth layer's output, `cls_0` that of the embeddings at [CLS].
    encoder: the spec's encoder section, with the hashes (`identity`) of the checkpoint it was fitted on.
    columns: the names that the training rows used, for batch prediction.
    fingerprint: of the vectors and settings that it was fitted on.
    metrics: split -> accuracy, macro_f1, loss, rows; empty until it is evaluated.
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
    metrics: dict[str, dict[str, float]]

    @property
    def pairs(self) -> bool:
        """Whether it takes pairs of texts."""
        return bool(self.columns["text_pair"])


def save(bundle: Bundle, url: str) -> None:
    """Write a bundle; bundle.json goes first and comes last, since its presence means that the bundle is whole."""
    from safetensors.numpy import save as to_bytes

    folder = Location(url)
    fields = {"version": VERSION, **{name: value for name, value in vars(bundle).items() if name != "head"}}
    (folder / "bundle.json").delete()
    (folder / "head.safetensors").write(to_bytes(asdict(bundle.head)))
    (folder / "README.md").write(_card(bundle).encode())
    (folder / "bundle.json").write(json.dumps(fields, indent=1, ensure_ascii=False).encode())


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
        head = LinearHead(**from_bytes((folder / "head.safetensors").read()))
        lists = {name: tuple(fields[name]) for name in ("labels", "features", "losses")}
        bundle = Bundle(**{**fields, **lists}, head=head)
    except FileNotFoundError:
        raise BundleError(
            f"{url} is not a bundle: it has no bundle.json and head.safetensors. Give the folder head/ of a run."
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, SafetensorError, OSError) as error:
        raise BundleError(f"{url} is damaged ({error}). Fit it again, or copy it again.") from None
    if head.weight.shape[0] != len(bundle.labels) or head.bias.shape != head.weight.shape[:1]:
        raise BundleError(f"{url} is damaged: {len(bundle.labels)} labels, but weights {head.weight.shape}.")
    return bundle


def _card(bundle: Bundle) -> str:
    encoder = bundle.encoder
    rows = (
        "\n".join(
            f"| {split} | {m['rows']:.0f} | {m['accuracy']:.4f} | {m['macro_f1']:.4f} | {m['loss']:.4f} |"
            for split, m in bundle.metrics.items()
        )
        or "| not evaluated yet | | | | |"
    )
    settings = ", ".join(f"{name} {value}" for name, value in bundle.head_spec.items())
    return f"""---
library_name: bertray
pipeline_tag: {bundle.task}
base_model: {encoder["model"]}
---
# {bundle.task} on {encoder["model"]}

A linear head on frozen vectors, fitted by [bertray]. It holds no encoder: `{encoder["model"]}`
(revision {encoder["revision"]}, weights sha256 {encoder["identity"]["weights"][:16]}...) is loaded beside it.

- Labels: {", ".join(bundle.labels)}
- Input: {"pairs of texts" if bundle.pairs else "single texts"}, at most {encoder["max_length"]} tokens
  (longer ones: {encoder["truncation"]})
- Vectors: {encoder["pooling"]} pooling, {bundle.head.weight.shape[1]} wide, precision {encoder["precision"]}
- Fitted with: {settings}

| split | rows | accuracy | macro F1 | log loss |
|---|---|---|---|---|
{rows}

Use it:

    import bertray
    labels, probabilities = bertray.load("PATH OF THIS FOLDER").predict(["a text"])

Limits: it knows its labels only, and always answers one of them; on text unlike its training rows its
probabilities mean little.

[bertray]: a distributed job that encodes text once and fits heads on the vectors.
"""
