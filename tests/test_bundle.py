import json
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

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
    for name in ("centre", "map", "means"):
        np.testing.assert_array_equal(getattr(one.ood, name), getattr(two.ood, name))
    assert one.ood.map.shape == (384, 384)
    assert (one.ood.threshold, one.ood.rows) == (two.ood.threshold, 720)
    assert replace(one, head=two.head, ood=two.ood) == two
    assert sorted(path.name for path in bundle.iterdir()) == ["README.md", "bundle.json", "head.safetensors"]
    card = (bundle / "README.md").read_text()
    assert f"{demo['metrics']['test']['accuracy']:.4f}" in card
    assert "negative, neutral, positive" in card
    assert f"distance over {one.ood.threshold:.2f}" in card


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


def test_bundles_from_before_there_was_ood(bundle):
    fields = json.loads((bundle / "bundle.json").read_text())
    del fields["ood"]
    (bundle / "bundle.json").write_text(json.dumps(fields))
    arrays = load_file(bundle / "head.safetensors")
    save_file({name: arrays[name] for name in ("weight", "bias")}, bundle / "head.safetensors")
    old = bundles.load(str(bundle))
    assert old.ood is None
    bundles.save(old, str(bundle))
    assert "Mahalanobis" not in (bundle / "README.md").read_text()
    assert bundles.load(str(bundle)).ood is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"centre": np.zeros(383)}, r"weights \(3, 384\), but ood centre \(383,\)"),
        ({"map": np.zeros((384, 383))}, r"map \(384, 383\)"),
        ({"means": np.zeros((0, 384))}, r"means \(0, 384\)"),
        ({"means": np.zeros(384)}, r"means \(384,\)"),
        ({"means": None}, "is damaged"),
        ({"threshold": "far"}, "threshold 'far'"),
        ({"threshold": 1e999}, "threshold inf"),
        ({"rows": None}, "is damaged"),
        ({"colour": "blue"}, "is damaged"),
    ],
)
def test_ood_has_to_fit_the_weights(bundle, change, message):
    fields = json.loads((bundle / "bundle.json").read_text())
    arrays = load_file(bundle / "head.safetensors")
    for name, value in change.items():
        place, key = (arrays, f"ood.{name}") if f"ood.{name}" in arrays else (fields["ood"], name)
        if value is None:
            del place[key]
        else:
            place[key] = value
    (bundle / "bundle.json").write_text(json.dumps(fields))
    save_file(arrays, bundle / "head.safetensors")
    with pytest.raises(BundleError, match=message):
        bundles.load(str(bundle))


def test_labels_and_weights_have_to_agree(bundle):
    fields = json.loads((bundle / "bundle.json").read_text())
    (bundle / "bundle.json").write_text(json.dumps({**fields, "labels": ["a", "b"]}))
    with pytest.raises(BundleError, match="2 labels, but weights"):
        bundles.load(str(bundle))
