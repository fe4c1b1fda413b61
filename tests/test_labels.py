import pytest

from bertray import labels
from bertray.errors import SourceError


def test_names_come_in_numeric_or_alphabetic_order():
    assert labels.find_names({"10": 1, "9": 1, "2": 5}) == ("2", "9", "10")
    assert labels.find_names({"pos": 1, "neg": 1, "10": 1}) == ("10", "neg", "pos")


@pytest.mark.parametrize(
    ("found", "names", "expected"),
    [
        (["neg", "pos"], ("neg", "pos"), {"neg": 0, "pos": 1}),
        (["0", "1"], ("neg", "pos"), {"0": 0, "1": 1}),
        (["1", "2", "3"], ("1", "2", "3"), {"1": 0, "2": 1, "3": 2}),  # names win over numbers
        (["0", "1", "2"], ("1", "2", "3"), {"0": 0, "1": 1, "2": 2}),  # not all are names: all are numbers
        (["1"], ("0", "1"), {"1": 1}),
    ],
)
def test_what_class_a_label_stands_for(found, names, expected):
    assert labels.index(found, names) == expected


def test_names_and_numbers_together():
    with pytest.raises(SourceError, match="mix names \\('neg'\\) and numbers \\('1'\\)"):
        labels.index(["neg", "1"], ("neg", "pos"))


@pytest.mark.parametrize("found", [["neg", "x"], ["2"], ["other"], ["-1"], ["²"]])
def test_labels_outside_the_names(found):
    with pytest.raises(SourceError, match="label"):
        labels.check(found, ("a", "b"), "rows.csv")
    with pytest.raises(SourceError, match="none of the label names"):
        labels.index(found, ("neg", "pos"))
