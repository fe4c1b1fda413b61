"""The registry: which heads are served, under which names and in which versions. Knows nothing of HTTP or of Ray.

All heads share one frozen encoder. What is served at a moment is a `Shelf`, which never changes: a request takes one
and uses it to its end, so that it sees all of a change or nothing of it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from bertray.bundle import Bundle
from bertray.errors import BertrayError, BundleError
from bertray.features import Feature, parse

NAME = "[A-Za-z0-9][A-Za-z0-9._-]{0,99}"  # of a head
_KEPT = 8  # versions of a name that one can go back to


class Reading(NamedTuple):
    """A way of reading texts that heads have in common: how much of a text, what of it becomes vectors, and which
    features those are made of. Texts that are read in one way can be encoded together."""

    max_length: int
    truncation: str
    overlap: int
    part: str
    features: tuple[str, ...]


@dataclass(frozen=True)
class Head:
    """A bundle under a name. Versions of a name count from 1; a version is never another bundle."""

    name: str
    version: int
    bundle: Bundle
    url: str


@dataclass(frozen=True)
class Shelf:
    """The heads that are served at one moment, by name; the first is the default."""

    heads: Mapping[str, Head] = field(default_factory=dict)

    def head(self, name: str | None = None) -> Head | None:
        """A head by its name, or the default one; None if there is no such head."""
        return next(iter(self.heads.values()), None) if name is None else self.heads.get(name)

    def reading(self, head: Head) -> Reading:
        """How the texts of a head are read: with all features that any head wants of texts that are read like that, so
        that one pass serves them all."""
        return self._readings[_manner(head.bundle)]

    @cached_property
    def _readings(self) -> dict[tuple[int, str, int, str], Reading]:
        wanted: dict[tuple[int, str, int, str], set[Feature]] = {}
        for head in self.heads.values():
            wanted.setdefault(_manner(head.bundle), set()).update(map(parse, head.bundle.features))
        return {
            manner: Reading(*manner, tuple(map(str, sorted(features, key=lambda each: (each.layer, each.pooling)))))
            for manner, features in wanted.items()
        }


def _manner(bundle: Bundle) -> tuple[int, str, int, str]:
    encoder = bundle.encoder
    return encoder["max_length"], encoder["truncation"], encoder["overlap"], bundle.part


def _same(a: Bundle, b: Bundle) -> bool:
    """Whether two bundles answer alike."""
    told = ("fingerprint", "labels", "features", "threshold", "temperature", "lengths")
    return all(getattr(a, name) == getattr(b, name) for name in told) and all(
        np.array_equal(getattr(a.head, name), getattr(b.head, name)) for name in ("weight", "bias")
    )


class Registry:
    """Heads that come and go while they are served."""

    def __init__(self, encoder: Mapping[str, Any]) -> None:
        """A registry without heads.

        Args:
            encoder: the section of a bundle that tells what encoder it was fitted on: all heads must share it.
        """
        self._encoder = encoder
        self._history: dict[str, list[Head]] = {}
        self._versions: dict[str, int] = {}
        self.shelf = Shelf()

    def check(self, bundle: Bundle, url: str) -> None:
        """Whether a bundle can be answered with the encoder that runs.

        Raises:
            BundleError: it was fitted on another one.
        """
        for key in ("identity", "precision"):
            mine, its = self._encoder[key], bundle.encoder.get(key)
            if mine != its:
                known = its if isinstance(its, dict) else {}
                parts = mine if key == "identity" else ()
                part = next((part for part in parts if mine[part] != known.get(part)), key)
                raise BundleError(
                    f"{url} was fitted on another encoder than the one that is served ({self._encoder['model']}): its "
                    f"{part} differs. Serve it by itself, or fit it on this one."
                )

    def next(self, name: str, bundle: Bundle, url: str) -> Head:
        """The head that `put` would make of a bundle; the one that is served already if it is the same."""
        self.check(bundle, url)
        served = self.shelf.heads.get(name)
        if served and served.url == url and _same(served.bundle, bundle):
            return served
        return Head(name, self._versions.get(name, 0) + 1, bundle, url)

    def with_heads(self, heads: Mapping[str, Head]) -> Shelf:
        """What would be served with those heads besides, or instead of those of the same names."""
        return Shelf({**self.shelf.heads, **heads})

    def put(self, head: Head) -> None:
        """Serve a head (of `next`) from now on."""
        self.replace(self.with_heads({head.name: head}).heads)

    def replace(self, heads: Mapping[str, Head]) -> None:
        """Serve those heads from now on, and no others."""
        for head in heads.values():
            kept = self._history.setdefault(head.name, [])
            if not any(head is other for other in kept):
                del kept[self._place(head.name) + 1 :]  # what was rolled back from is not what was served before
                kept.append(head)
                self._versions[head.name] = max(head.version, self._versions.get(head.name, 0))
            del kept[:-_KEPT]
        self.shelf = Shelf(dict(heads))

    def remove(self, name: str) -> None:
        """Serve a head no longer.

        Raises:
            BertrayError: it is the last one.
        """
        if len(self.shelf.heads) == 1:
            raise BertrayError(f"{name} is the only head that is served. Put another one first.")
        self.shelf = Shelf({other: head for other, head in self.shelf.heads.items() if other != name})
        self._history.pop(name, None)

    def previous(self, name: str) -> Head | None:
        """The version before the one that is served; None if there is none."""
        place = self._place(name)
        return self._history[name][place - 1] if place > 0 else None

    def _place(self, name: str) -> int:
        """Where in its history the head is that is served under a name; -1 if none is."""
        served = self.shelf.heads.get(name)
        return next((i for i, head in enumerate(self._history.get(name, [])) if head is served), -1)

    def roll_back(self, name: str) -> Head:
        """Serve the version before the one that is served now.

        Raises:
            BertrayError: there is none.
        """
        head = self.previous(name)
        if head is None:
            raise BertrayError(f"{name} has no version before the one that is served.")
        self.shelf = self.with_heads({name: head})
        return head
