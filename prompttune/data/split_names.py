"""Usual names of splits, in any case and spelling: ``Train``, ``training_set``, ``val2017``, ``Test-Images``."""

from __future__ import annotations

import re
import unicodedata

TRAIN, VAL, TEST, ALL = "train", "val", "test", "all"
SPLITS = (TRAIN, VAL, TEST)
"""Splits that a data set may define; :data:`ALL` stands for a data set without splits."""

NAMES = {
    TRAIN: frozenset({"train", "training", "trainval", "trn"}),
    VAL: frozenset({"val", "valid", "validate", "validation", "dev", "development", "eval", "evaluation", "holdout"}),
    TEST: frozenset({"test", "testing", "tst"}),
}
FILLERS = ("dataset", "datasets", "set", "sets", "data", "split", "images", "image", "imgs", "img", "folder")
"""Words that add nothing to the name of a split."""


def split_of(name: str) -> str | None:
    """The split that a name stands for, one of :data:`SPLITS`; None for any other name.

    Case, digits, punctuation and :data:`FILLERS` are ignored, also without a separator: ``trainset``.
    """
    words = re.findall(r"[^\W\d_]+", unicodedata.normalize("NFKC", name).casefold())
    kept = [word for word in words if word not in FILLERS]
    if len(kept) != 1:
        return None
    bare = {kept[0], *(kept[0].removesuffix(filler) for filler in FILLERS)}
    return next((split for split, names in NAMES.items() if names & bare), None)


def splits_in(text: str) -> set[str]:
    """The splits named by the words of a longer name, such as that of a shard: ``pets-train-0001``."""
    return {split for word in re.split(r"[\W\d_]+", text) if (split := split_of(word))}
