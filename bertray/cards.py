"""Cards: the README.md of an export, which tells what it is, how to use it and how exact it is.

Knows only what it is told of the export: it reads and writes no files.
"""

from collections.abc import Callable

from bertray.models import WRAPPER
from bertray.parts import Parts
from bertray.writers import Written


def card(parts: Parts, format: str, written: Written) -> str:
    """What an export of that format is, how to use it and how exact it is, as Markdown with the hub's header."""
    bundle, encoder = parts.bundle, parts.bundle.encoder
    code = f"the code in {WRAPPER.name}, which loading it runs" if written.wrapper else "no code of its own"
    usage = "\n".join(f"    {line}" if line else "" for line in _USAGES[format](parts, written).splitlines())
    answers = "vectors" if format == "sentence-transformers" else "logits" if parts.of_tokens else "answers"
    problem = "" if parts.of_tokens else f" ({bundle.problem.replace('_', ' ')})"
    inputs = "pairs of texts" if parts.paired else "single texts"
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
- Outputs: {", ".join(parts.labels)}{problem}
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


def _transformers_usage(parts: Parts, written: Written) -> str:
    bundle = parts.bundle
    trust = ", trust_remote_code=True" if written.wrapper else ""
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
            if written.wrapper
            else "# where punctuation splits a word, as in it's, the label of its first part is the word's"
        )
        return f"""from transformers import pipeline
tag = pipeline("{bundle.task}", model="PATH OF THIS FOLDER", aggregation_strategy="{strategy}"{trust})
tag("a text")
{words}"""
    text = '{"text": "a text", "text_pair": "another"}' if parts.paired else '"a text"'
    return f"""from transformers import pipeline
classify = pipeline("{bundle.task}", model="PATH OF THIS FOLDER"{trust})
classify({text}, truncation=True, top_k=None)"""


def _onnx_usage(parts: Parts, written: Written) -> str:
    bundle = parts.bundle
    texts = '["a text"], ["another"]' if parts.paired else '["a text", "another"]'
    of_word = {"first": "its first token's", "mean": "the mean of its tokens'"}
    notes = {
        "text-classification": f"# [texts, {len(parts.labels)}]",
        "token-classification": f"# [texts, tokens, {len(parts.labels)}]; a word's are {of_word.get(parts.words)}",
        "question-answering": '# [texts, tokens, 2]: start and end; token 0 is "no answer"',
    }
    return f"""import onnxruntime
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("PATH OF THIS FOLDER")
session = onnxruntime.InferenceSession("PATH OF THIS FOLDER/model.onnx")
inputs = tokenizer({texts}, truncation=True, padding=True, return_tensors="np")
({written.more["output"]},) = session.run(None, dict(inputs))
{notes[bundle.task]}"""


def _sentence_usage(parts: Parts, written: Written) -> str:
    texts = '("a text", "another")' if parts.paired else '"a text"'
    return f"""from sentence_transformers import SentenceTransformer
vectors = SentenceTransformer("PATH OF THIS FOLDER").encode([{texts}])"""


_USAGES: dict[str, Callable[[Parts, Written], str]] = {
    "transformers": _transformers_usage,
    "onnx": _onnx_usage,
    "sentence-transformers": _sentence_usage,
}
