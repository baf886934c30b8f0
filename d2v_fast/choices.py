"""Settings that take one of some words."""

from __future__ import annotations

import difflib
from typing import Any, Literal, get_args, get_origin, get_type_hints


def nearest(word: str, words: Any) -> str:
    """ "; did you mean …?" or an empty string."""
    found = difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)
    return f"; did you mean {found[0]}?" if found else ""


def one_of(name: str, value: Any, choices: Any) -> None:
    """Raise a ValueError that names the nearest choice unless `value` is one of those of a Literal."""
    if value not in get_args(choices):
        hint = nearest(str(value), get_args(choices))
        raise ValueError(f"{name}: found {value!r}, expected one of {', '.join(map(repr, get_args(choices)))}{hint}")


class Checked:
    """Base class of dataclasses whose words are checked at construction.

    Raises:
        ValueError: A field holds a string that its Literal does not name.
    """

    def __post_init__(self) -> None:
        for name, choices in _choices(type(self)).items():
            if isinstance(value := getattr(self, name), str):
                one_of(name, value, choices)


def _choices(cls: Any) -> dict[str, Any]:
    """The Literal of each field that has one, alone or among other types."""
    hints = {name: (hint, *get_args(hint)) for name, hint in get_type_hints(cls).items()}
    return {name: kind for name, kinds in hints.items() for kind in kinds if get_origin(kind) is Literal}
