import json
from dataclasses import replace

import numpy as np
import pytest

from bertray import bundle as bundles
from bertray.errors import BundleError


@pytest.fixture
def bundle(demo, tmp_path):
    loaded = bundles.load(demo["bundle"])
    bundles.save(loaded, str(tmp_path / "head"))
    return tmp_path / "head"


def test_it_survives_saving_and_holds_no_code(demo, bundle):
    one, two = bundles.load(demo["bundle"]), bundles.load(str(bundle))
    np.testing.assert_array_equal(one.head.weight, two.head.weight)
    assert replace(one, head=two.head) == two
    assert sorted(path.name for path in bundle.iterdir()) == ["README.md", "bundle.json", "head.safetensors"]
    card = (bundle / "README.md").read_text()
    assert f"{demo['metrics']['test']['accuracy']:.4f}" in card
    assert "negative, neutral, positive" in card


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("bundle.json", None, "is not a bundle"),
        ("head.safetensors", None, "is not a bundle"),
        ("bundle.json", b"{", "is damaged"),
        ("head.safetensors", b"junk", "is damaged"),
        ("bundle.json", b'{"version": 99}', "is a bundle of version 99"),
        ("bundle.json", b'{"version": 2}', "is damaged"),
        ("bundle.json", b"[]", "is damaged"),
    ],
)
def test_damage_is_one_line(bundle, file, content, message):
    (bundle / file).unlink()
    if content is not None:
        (bundle / file).write_bytes(content)
    with pytest.raises(BundleError, match=message):
        bundles.load(str(bundle))


def test_labels_and_weights_have_to_agree(bundle):
    fields = json.loads((bundle / "bundle.json").read_text())
    (bundle / "bundle.json").write_text(json.dumps({**fields, "labels": ["a", "b"]}))
    with pytest.raises(BundleError, match="2 labels, but weights"):
        bundles.load(str(bundle))
