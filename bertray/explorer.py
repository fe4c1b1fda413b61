"""What BERT sees: a text as tokens, tables and vectors; what a checkpoint consists of; why a head answers as it does.

All of it is plain data, for the terminal, JSON and the page alike. Knows nothing of how it is shown.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bertray import anatomy, checkpoints
from bertray.checkpoints import Checkpoint
from bertray.errors import BertrayError, CheckpointError
from bertray.spec import Encoder as EncoderSpec

if TYPE_CHECKING:
    import torch

    from bertray.bundle import Bundle
    from bertray.forward import Layers, Passage
    from bertray.pretraining import Heads
    from bertray.reading import Reading

_MOST_MAPPED = 64  # tokens of a text that maps of token by token are made of
_MOST_READ = 512  # tokens, of models that can read thousands
_NEIGHBOURS = 5  # of a token in its table
_CANDIDATES = 5  # for a masked word
_ROWS = 3  # of a table
_POSITIONS = 128  # of the position table, in its picture
_ABOUT = {
    "tokens": "The tokenizer cuts a text into the pieces that the model's vocabulary has, and gives each its number. "
    "Special tokens mark where texts begin and end. The attention mask is 1 for what is read: bertray never pads.",
    "tables": "Each token starts as a row of the token table. To it are added a row for its place and one for which "
    "text it is of, where the model has such tables; a layer norm brings the sum to the scale that the first layer "
    "expects. Nothing here knows the context yet: a word starts with the same row in every text.",
    "architecture": "What the checkpoint consists of. Each layer lets tokens look at one another (attention), and then "
    "works on each by itself (two dense layers). All of it is frozen; only a linear head on top is trained.",
    "outputs": "Behind each layer every token has a vector, and by now it knows its context. last_hidden_state holds "
    "those of the last layer. pooler_output, where there is one, is one more dense layer and tanh over the vector of "
    "the first token, [CLS]; it is no layer norm. BERT had it to tell whether a sentence follows another. To get one "
    "vector a text, those of its tokens are pooled.",
    "pretraining": "BERT learned from plain text: to fill words that were masked, and (the first BERT) to tell whether "
    "a sentence follows another.",
    "prediction": "Why the head answers so. Occlusion: by how much the label's score falls without the word. Gradient "
    "times input: how fast the label's logit grows with the token's embedding, as if it went on in a straight line; "
    "the two need not agree.",
}
SECTIONS = tuple(_ABOUT)
OF_TEXTS = tuple(name for name in SECTIONS if name != "prediction")  # what needs no bundle

Found = dict[str, Any]
Floats = NDArray[np.float32]


def explore(
    text: str,
    pair: str | None = None,
    *,
    model: str = "",
    bundle: str = "",
    show: Sequence[str] = (),
    dims: int = 10,
) -> Found:
    """Look at a text, or a pair of texts, with the eyes of a frozen BERT.

    A dict of plain data, arrays being float32 NumPy. T is the number of tokens, L of layers, W the width of a state, d
    how many numbers of a vector are given:

    model, texts, notes, about: whose eyes; what was looked at; in sentences what the model lacks or was left out, and
        what each section is about.
    tokens: `tokens` (place, token, id, type, mask, position, of (which text), start, stop, special, unknown), `words`
        (text, of, start, stop, places, pieces, read_as, unknown), `changed` (words that the tokenizer reads as others),
        `unknown`, `dropped` (characters that no token stands for), `count` and `kept` (tokens with and without what
        was cut), `limit` (of tokens).
    tables: `token`, `position`, `type` (name, shape, values: the first rows [3, d]) or None; `input`: for each token
        what they add up to (token, position, type, sum, normalized, each [T, d], and norms of each [T]); `neighbours`
        of each token; `positions`: places, and the cosines between them, or None.
    architecture: type, layers, heads, width, inner, vocabulary, kind, parameters, frozen, trained, and `tree`: its
        lines (name, depth, shapes, parameters, times).
    outputs: last_hidden_state (shape, values [T, d]), pooler_output (shape, values [d]) or None, poolings (name,
        values [d], norm), cosine [L + 1, T, T] and attention [L, heads, T, T] (None over 64 tokens; attention also
        where the encoder does not tell it), movement (norm [L + 1, T], and cosines from_previous [L, T] and
        from_first [L + 1, T]), same_words (word, first, second, cosine [L + 1]).
    pretraining: `masked` (why_not, fills) and `follows` (why_not, probability).
    prediction: with a bundle, as `reasons.reasons`.

    Args:
        model: a checkpoint; left out, that of the bundle, or else the spec's default.
        bundle: folder of a bundle, whose prediction is explained.
        show: some of these sections alone; what only others need is not loaded.
        dims: numbers of a vector to give; 0 for all.

    Raises:
        CheckpointError: there is no such model, or it is no encoder of BERT's family.
        BundleError: there is no such bundle, or the model is another than it was fitted on.
        BertrayError: the text is none, or not what the bundle takes.
    """
    sections = _checked(text, pair, show, dims)
    if not bundle:
        if "prediction" in show:
            raise BertrayError("A prediction is explained of a bundle, and there is none (--bundle FOLDER).")
        return Explorer(_checkpoint(model)).look(text, pair, sections, dims)
    from bertray import bundle as bundles
    from bertray.predict import checkpoint_of

    fitted = bundles.load(bundle)
    if fitted.pairs != (pair is not None):
        raise BertrayError(f"{bundle} takes {'two texts' if fitted.pairs else 'one text'}.")
    if model:  # where it lies now
        fitted = replace(fitted, encoder={**fitted.encoder, "model": model})
    return Explorer(checkpoint_of(fitted.encoder)).look(text, pair, sections, dims, fitted, bundle)


def vocabulary(ids: Sequence[int], *, model: str = "") -> Found:
    """Which tokens those ids are: `ids` (id, token) and the `text` that they make. Loads the tokenizer alone.

    Raises:
        CheckpointError: there is no such model.
        BertrayError: there is no such token.
    """
    from bertray.reading import named

    explorer = Explorer(_checkpoint(model))
    tokenizer = explorer.tokenizer
    for number in ids:
        if not 0 <= number < len(tokenizer):
            raise BertrayError(
                f"{explorer.checkpoint.name} has no token {number}: its tokens are 0 to {len(tokenizer) - 1}."
            )
    return {
        "model": explorer.checkpoint.name,
        "ids": [{"id": number, "token": named(tokenizer, number)} for number in ids],
        "text": tokenizer.decode(list(ids)),
    }


def plain(found: Any) -> Any:
    """The same with lists for arrays, and at most six decimals (in maps of token by token four), for JSON."""
    if isinstance(found, Mapping):
        return {name: plain(value) for name, value in found.items()}
    if isinstance(found, list | tuple):
        return [plain(value) for value in found]
    if isinstance(found, np.ndarray):
        return np.round(found.astype(np.float64), 4 if found.ndim > 2 else 6).tolist()
    return round(found, 6) if isinstance(found, float) else found


def _checked(text: str, pair: str | None, show: Sequence[str], dims: int) -> tuple[str, ...]:
    for given in (text, *([] if pair is None else [pair])):
        if not isinstance(given, str):
            raise BertrayError(f"A text must be a string. Got {given!r:.60} instead.")
        try:
            given.encode()
        except UnicodeEncodeError:
            raise BertrayError("The text holds bytes that are no UTF-8 (lone surrogates). Write it again.") from None
    if unknown := [name for name in show if name not in SECTIONS]:
        raise BertrayError(f"There is no section {unknown[0]!r}. There are {', '.join(SECTIONS)}.")
    if dims < 0:
        raise BertrayError(f"dims must be 0 (all) or more. Got {dims} instead.")
    return tuple(name for name in SECTIONS if not show or name in show)


def _checkpoint(model: str) -> Checkpoint:
    default = EncoderSpec()
    return checkpoints.find(model or default.model, default.revision, weights=False)


class Explorer:
    """A checkpoint that is looked into. What is looked at is loaded when it is first needed."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint

    @cached_property
    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer."""
        from bertray.tokens import load

        return load(self.checkpoint.folder)

    @cached_property
    def _layers(self) -> "Layers":
        from bertray.forward import Layers

        return Layers(self.checkpoint)

    @cached_property
    def _heads(self) -> "Heads":
        from bertray.pretraining import Heads

        return Heads(self.checkpoint, self._layers.weights, self._layers.config.model_type)

    def look(
        self,
        text: str,
        pair: str | None,
        sections: Sequence[str],
        dims: int,
        bundle: "Bundle | None" = None,
        url: str = "",
    ) -> Found:
        """As `explore`."""
        if not self.checkpoint.has_weights:
            if "tokens" not in sections:
                raise CheckpointError(f"{self.checkpoint.folder} holds no weights, but a tokenizer: show tokens alone.")
            sections = ["tokens"]
        read = self._read(text, pair, bundle)
        passage = None
        if {"tables", "outputs"} & {*sections}:
            passage = self._passage(read, keep=len(read.ids) <= _MOST_MAPPED)
        shown: Found = {}
        for name in sections:
            if name == "tokens":
                shown[name] = read.found
            elif name == "tables" and passage:
                shown[name] = self._tables(read, passage, dims)
            elif name == "architecture":
                shown[name] = self._architecture(bundle)
            elif name == "outputs" and passage:
                same = [] if pair is None else self._same_words(text, pair)
                shown[name] = _outputs(passage, dims) | {"same_words": same}
            elif name == "pretraining":
                shown[name] = self._pretraining(read, pair is not None)
            elif name == "prediction" and bundle:
                shown[name] = self._reasons(bundle, url, text, pair)
        return {
            "model": self.checkpoint.name,
            "texts": [text] if pair is None else [text, pair],
            "notes": [*read.notes, *self._notes(read, passage, shown, bundle)],
            "about": {name: _ABOUT[name] for name in shown},
            **shown,
        }

    def _notes(
        self, read: "Reading", passage: "Passage | None", shown: Found, bundle: "Bundle | None"
    ) -> Iterator[str]:
        """What the model lacks, and what of a text is not shown."""
        from bertray.forward import TESTED

        family = self._layers.config.model_type
        if not self.checkpoint.has_weights:
            yield f"{self.checkpoint.folder} holds no weights: only its tokenizer is looked at."
        elif family not in TESTED:
            yield f"Nobody has held what is shown of a {family} against what it does: its tables may add up otherwise."
        if bundle and bundle.siamese:
            yield "This head reads its two texts apart; here they are shown as the encoder would read them together."
        if bundle and read.cut and bundle.encoder["truncation"] == "window":
            yield "This head reads all of the text, in windows; here, and for gradients, it is the first of them."
        if "tables" in shown and not shown["tables"]["position"]:
            yield "This model has no table of positions: its attention knows how far apart tokens are."
        if passage and passage.normalized.shape != passage.states[0].shape:
            widths = [part.shape[1] for part in (passage.normalized, passage.states[0])]
            yield f"Embeddings are {widths[0]} wide here, and projected to {widths[1]} before the first layer."
        if "outputs" in shown:
            outputs, count = shown["outputs"], len(read.ids)
            if outputs["pooler_output"] is None:
                yield "This checkpoint has no trained pooler, and so no pooler_output."
            if count > _MOST_MAPPED:
                yield f"Maps of token by token are made for up to {_MOST_MAPPED} tokens; here are {count:,}."
            elif outputs["attention"] is None:
                yield "This encoder does not tell its attention."

    def _read(self, text: str, pair: str | None, bundle: "Bundle | None" = None) -> "Reading":
        """A text or a pair as tokens: as many as a bundle reads at most, or as the model can."""
        from bertray.reading import read

        layers = self._layers
        limit = int(bundle.encoder["max_length"]) if bundle else min(layers.limit or _MOST_READ, _MOST_READ)
        return read(self.tokenizer, [text] if pair is None else [text, pair], limit, layers.typed, layers.positions)

    def _passage(self, read: "Reading", keep: bool, gradient: bool = False) -> "Passage":
        return self._layers.passage(read.ids, read.types, keep, gradient)

    # --- tables -------------------------------------------------------------------------------------------

    def _tables(self, read: "Reading", passage: "Passage", dims: int) -> Found:
        from bertray.forward import TABLES

        found: Found = dict.fromkeys(TABLES)
        for kind in TABLES:
            if name := self._layers.table(kind):
                shape = self._layers.weights.shapes[name]
                first = _array(self._layers.weights.rows(name, range(min(_ROWS, shape[0]))))
                found[kind] = {"name": name, "shape": list(shape), "values": first[:, : dims or None]}
        found["input"] = _input(passage, dims)
        found["neighbours"] = self._neighbours(read, found["token"]["name"])
        found["positions"] = self._positions(found["position"]["name"]) if found["position"] else None
        return found

    def _neighbours(self, read: "Reading", name: str) -> list[Found]:
        """The tokens of the vocabulary that lie nearest to each of the text, by cosine in the table."""
        import torch
        from torch.nn.functional import normalize

        special = {*self.tokenizer.all_special_ids}
        wanted = list(dict.fromkeys(number for number in read.ids if number not in special))
        if not wanted:
            return []
        own = normalize(self._layers.weights.rows(name, wanted))
        best, which, start = torch.empty(len(wanted), 0), torch.empty(len(wanted), 0, dtype=torch.long), 0
        for block in self._layers.weights.blocks(name):
            numbers = torch.arange(start, start + len(block)).expand(len(wanted), -1)
            both, which = torch.cat([best, own @ normalize(block).T], 1), torch.cat([which, numbers], 1)
            best, places = both.topk(min(_NEIGHBOURS + 1, both.shape[1]))  # and the token itself
            which, start = which.gather(1, places), start + len(block)
        return [
            {
                **self._named(number),
                "nearest": [
                    {**self._named(other), "cosine": cosine}
                    for other, cosine in zip(others, cosines, strict=True)
                    if other != number
                ][:_NEIGHBOURS],
            }
            for number, others, cosines in zip(wanted, which.tolist(), best.tolist(), strict=True)
        ]

    def _named(self, number: int) -> Found:
        from bertray.reading import named

        return {"token": named(self.tokenizer, number), "id": number}

    def _positions(self, name: str) -> Found:
        """How alike positions are: cosines between rows of their table, evenly spaced."""
        first, rows = self._layers.first_position, self._layers.weights.shapes[name][0]
        places = range(first, rows, max(1, -(-(rows - first) // _POSITIONS)))
        unit = _unit(_array(self._layers.weights.rows(name, places)))
        return {"places": list(places), "cosine": unit @ unit.T}

    # --- all else -----------------------------------------------------------------------------------------

    def _architecture(self, bundle: "Bundle | None") -> Found:
        config, tree = self._layers.config, anatomy.tree(self._layers.weights.shapes)
        total = sum(line["parameters"] * line["times"] for line in tree if not line["depth"])
        trained = None
        if bundle is not None:
            shape = bundle.head.weight.shape
            trained = {"shape": list(shape), "parameters": bundle.head.weight.size + len(bundle.head.bias)}
        return {
            "type": config.model_type,
            "layers": int(config.num_hidden_layers),
            "heads": int(config.num_attention_heads),
            "width": int(config.hidden_size),
            "inner": int(getattr(config, "intermediate_size", 0) or getattr(config, "hidden_dim", 0)),
            "vocabulary": int(config.vocab_size),
            "kind": self._layers.weights.kind,
            "parameters": total,
            "frozen": total,
            "trained": trained,
            "tree": tree,
        }

    def _same_words(self, text: str, pair: str) -> list[Found]:
        """Words that stand in both texts: how alike their vectors are behind each layer, when each text is read by
        itself. A word of several pieces has their mean."""
        sides = []
        for given in (text, pair):
            read = self._read(given, None)
            states = _states(self._passage(read, keep=False))
            words: dict[tuple[int, ...], tuple[Found, Floats]] = {}
            for word in read.found["words"]:
                ids = tuple(read.ids[place] for place in word["places"])
                words.setdefault(ids, (word, _unit(states[:, word["places"]].mean(1))))
            sides.append(words)
        both = [(word, u, *sides[1][ids]) for ids, (word, u) in sides[0].items() if ids in sides[1]]
        return [
            {
                "word": word["read_as"],
                "first": [word["start"], word["stop"]],
                "second": [other["start"], other["stop"]],
                "cosine": (u * v).sum(1),
            }
            for word, u, other, v in both
            if not word["unknown"]
        ]

    def _pretraining(self, read: "Reading", paired: bool) -> Found:
        from bertray.pretraining import Answers

        heads = self._heads
        hint = "None of those that are read is [MASK]." if read.cut else "Write [MASK] for a word to have it filled."
        masked = heads.no_fills or ("" if read.masked else hint)
        follows = heads.no_follows or ("" if paired else "Give a second text to be told whether it follows.")
        found = Answers([], None)
        if not masked or not follows:
            found = heads.answers(read.ids, read.types, read.masked, _CANDIDATES)
        fills = [
            {"place": place, "candidates": [{**self._named(number), "probability": p} for number, p in best]}
            for place, best in zip(read.masked, found.fills, strict=False)
        ]
        return {
            "masked": {"why_not": masked, "fills": fills},
            "follows": {"why_not": follows, "probability": None if follows else found.follows},
        }

    def _reasons(self, bundle: "Bundle", url: str, text: str, pair: str | None) -> Found:
        from bertray.reasons import Seen, reasons

        def see(given: str, other: str | None) -> Seen:
            read = self._read(given, other, bundle)
            return Seen(read.found["tokens"], self._passage(read, keep=False, gradient=True))

        return reasons(bundle, url, text, pair, see)


def _input(passage: "Passage", dims: int) -> Found:
    """What the tables give each token, their sum, and what the first layer is given."""
    parts = {kind: _array(part) for kind, part in passage.parts.items()}
    parts["sum"] = np.sum(list(parts.values()), axis=0)
    parts["normalized"] = _array(passage.normalized)
    return {
        **{kind: part[:, : dims or None] for kind, part in parts.items()},
        "norms": {kind: np.linalg.norm(part, axis=1) for kind, part in parts.items()},
    }


def _outputs(passage: "Passage", dims: int) -> Found:
    states = _states(passage)
    last, few = states[-1], states.shape[1] <= _MOST_MAPPED
    names = ("cls", "mean", "max", *(["pooler"] if passage.pooled is not None else []))
    poolings = {name: _array(passage.vector(name, -1)) for name in names}
    pooled = poolings.get("pooler")
    unit = _unit(states)
    return {
        "last_hidden_state": {"shape": [1, *last.shape], "values": last[:, : dims or None]},
        "pooler_output": pooled if pooled is None else {"shape": [1, len(pooled)], "values": pooled[: dims or None]},
        "poolings": [
            {"name": name, "values": vector[: dims or None], "norm": float(np.linalg.norm(vector))}
            for name, vector in poolings.items()
        ],
        "cosine": unit @ unit.transpose(0, 2, 1) if few else None,
        "attention": np.stack([_array(looks) for looks in passage.attention]) if passage.attention else None,
        "movement": {
            "norm": np.linalg.norm(states, axis=2),
            "from_previous": (unit[1:] * unit[:-1]).sum(2),
            "from_first": (unit * unit[:1]).sum(2),
        },
    }


def _states(passage: "Passage") -> Floats:
    """[L + 1, T, W]."""
    return np.stack([_array(state) for state in passage.states])


def _array(tensor: "torch.Tensor") -> Floats:
    found: Floats = tensor.detach().numpy()
    return found


def _unit(vectors: Floats) -> Floats:
    """Vectors [..., width] of length 1."""
    found: Floats = vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), np.float32(1e-12))
    return found
