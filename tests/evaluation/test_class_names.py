"""Classes of a model and of data are matched by name, in order where there are no names, or refused."""

import pytest

from vit_jax.errors import UserError
from vit_jax.evaluation.class_names import match

MODEL = ("tench, Tinca tinca", "Great White_Shark", "crane", "crane, bird", "n/a", "dog", "toy dog, dog")
SYNSETS = ("n01440764", "n01443537", "n01484850")


@pytest.mark.parametrize(
    ("ours", "theirs", "expected", "words"),
    [
        (("cat", "dog"), ("dog", "CAT"), [1, 0], "matched by name; accuracy is among all 2 classes of M"),
        (MODEL, ("great white shark", "Tinca Tinca"), [1, 0], "among all 7 classes of M, of which D has 2"),
        (MODEL, ("dog", "bird", "crane"), [5, 3, 2], "by name"),  # a whole name comes first
        (("crane", "crane"), ("crane", "crane"), [0, 1], "the same names in the same order"),
        (("0", "1"), ("cat", "dog"), [0, 1], "M has no class names: the 2 classes are assumed to be in the same order"),
        (("tench", "goldfish", "shark"), SYNSETS, [0, 1, 2], "D has no class names"),
        (("cafe\u0301", "x"), ("caf\u00e9",), [0], "by name"),
        (("x", "Digit 1", "1", "0"), ("0", "1"), [3, 2], "by name"),
        (SYNSETS, SYNSETS[:0:-1], [2, 1], "matched by name"),
        (SYNSETS, ("n00000001", SYNSETS[0]), None, "M has 3 classes, D has 2"),
        (("0", "1", "2"), ("0", "1"), None, "M has 3 classes, D has 2"),
    ],
)
def test_classes_are_matched(ours, theirs, expected, words):
    if expected is None:
        with pytest.raises(UserError, match=words):
            match(ours, theirs, "M", "D")
        return
    indices, line = match(ours, theirs, "M", "D")
    assert indices.tolist() == expected and words in line


@pytest.mark.parametrize(
    ("ours", "theirs", "words"),
    [
        (
            ("cat", "dog"),
            ("cat", "bird", "cow"),
            "2 of the 3 classes of D are none of the 2 of M.*: bird, cow\n.*cat, dog",
        ),
        (("a, x", "b, x"), ("x", "a"), "not one alone: x"),
        (("a", "b"), ("A", "a_", "b"), "A, a_ of D are the same class of M: a\n"),
        (("cat", "dog"), ("0", "1", "2"), "M has 2 classes, D has 3, and D has no class names"),
        (tuple("0123456789"), ("cat", "dog"), "and M has no class names"),
    ],
)
def test_classes_that_differ_are_refused_in_three_lines_at_most(ours, theirs, words):
    with pytest.raises(UserError, match=words) as caught:
        match(ours, theirs, "M", "D")
    assert str(caught.value).count("\n") <= 2
