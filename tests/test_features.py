import numpy as np
import pytest
import torch

from bertray.errors import SpecError
from bertray.features import features, numbers, parse, related, with_surroundings


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("last", (6,)),
        ("last4", (3, 4, 5, 6)),
        ("all", tuple(range(7))),
        (0, (0,)),
        (-1, (6,)),
        ((4, -3, 2), (2, 4)),
    ],
)
def test_layers(layers, expected):
    assert numbers(layers, 6) == expected


def test_small_encoders_and_layers_that_are_not_there():
    assert numbers("last4", 2) == (0, 1, 2)
    for layer in (7, -8):
        with pytest.raises(SpecError, match=rf"must be from 0 \(embeddings\) to 6 here. Got {layer}"):
            numbers((1, layer), 6)


def test_features_by_layer_and_the_pooler_once():
    found = features(["mean", "pooler", "cls", "mean"], (1, 2), 2)
    assert list(map(str, found)) == ["mean_1", "cls_1", "mean_2", "cls_2", "pooler_2"]
    assert list(map(parse, map(str, found))) == list(found)
    assert list(map(str, features("pooler", "all", 12))) == ["pooler_12"]


def test_related_vectors_are_the_same_as_arrays_and_tensors():
    rng = np.random.default_rng(0)
    u, v, around = rng.normal(size=(3, 5, 4))
    pair, token = related(u, v), related(u, v, around)
    np.testing.assert_array_equal(pair, np.hstack([u, v, np.abs(u - v), u * v]))
    np.testing.assert_array_equal(token, np.hstack([u, u * v, around * v]))
    tensors = [torch.from_numpy(array) for array in (u, v, around)]
    np.testing.assert_array_equal(related(*tensors[:2]).numpy(), pair)
    np.testing.assert_array_equal(related(*tensors).numpy(), token)


def test_surroundings_are_means_within_a_question():
    vectors = np.random.default_rng(0).normal(size=(50, 2, 3)).astype(np.float32)
    edges = np.array([0, 40, 41, 50])
    found = with_surroundings(vectors, edges)
    assert found.shape == (50, 4, 3)
    np.testing.assert_array_equal(found[:, :2], vectors)
    np.testing.assert_allclose(found[1, 2:], vectors[1:14].mean(0), atol=1e-6)
    np.testing.assert_allclose(found[20, 2:], vectors[8:33].mean(0), atol=1e-6)
    np.testing.assert_allclose(found[39, 2:], vectors[27:40].mean(0), atol=1e-6)
    np.testing.assert_allclose(found[45, 2:], vectors[42:50].mean(0), atol=1e-6)
    assert not found[[0, 40, 41], 2:].any()  # questions have none
