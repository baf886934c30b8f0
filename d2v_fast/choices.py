"""Validation of settings: choices, ranges and class names. Does not import torch, so that the command line starts quickly."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from numbers import Real
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

Norm = Literal["none", "layer", "instance", "batch", "group"]
TargetNorm = Literal["none", "layer", "instance"]
Implementation = Literal["auto", "eager", "compile", "native", "triton"]
LayerSource = Literal["ffn", "block_output", "block_input"]
Init = Literal["hf", "data2vec", "sincos"]
EMAScope = Literal["all", "encoder", "layers"]
CLSReduction = Literal["mean", "sum"]


@dataclass(frozen=True)
class Range:
    """The valid interval of a number, as an annotation of its type. On a list or mapping it applies to each number in it.

    Args:
        interval: For example "[0, 1)". A round bracket excludes the bound.
        zero: Whether 0 is valid too.
    """

    interval: str
    zero: bool = False

    def __contains__(self, number: Any) -> bool:
        low, high = (float(bound) for bound in self.interval[1:-1].split(","))
        above = low <= number if self.interval[0] == "[" else low < number
        inside = above and (number <= high if self.interval[-1] == "]" else number < high)
        return inside or (self.zero and number == 0)

    def __str__(self) -> str:
        """What is expected, in words."""
        low = self.interval[1:].partition(",")[0]
        if self.interval.endswith("inf)"):
            return {"[": f"at least {low}", "(": "a number" if low == "-inf" else f"a number above {low}"}[self.interval[0]]
        return f"{'0 or ' * self.zero}a number in {self.interval}"


PositiveInt = Annotated[int, Range("[1, inf)")]
NonNegativeInt = Annotated[int, Range("[0, inf)")]
PositiveFloat = Annotated[float, Range("(0, inf)")]
Finite = Annotated[float, Range("(-inf, inf)")]
NonNegativeFloat = Annotated[float, Range("[0, inf)")]
ClosedUnitInterval = Annotated[float, Range("[0, 1]")]
OpenUnitInterval = Annotated[float, Range("(0, 1)")]
Beta = Annotated[float, Range("[1e-30, 1e30]", zero=True)]  # of smooth-L1; fp32 must be able to represent both β and 1/β


def arguments(cls: type) -> dict[str, Any]:
    """The annotations of the arguments of a class, including those that it passes on to its parents."""
    hints: dict[str, Any] = {}
    bases: Any = reversed(cls.__mro__)
    for base in bases:
        with suppress(NameError):  # an annotation may use a name that is only imported for type checkers
            hints |= get_type_hints(base.__init__, include_extras=True)
    return hints


def argument_defaults(cls: type) -> dict[str, Any]:
    """The defaults of the `arguments` of a class that have one."""
    bases: Any = reversed(cls.__mro__)
    found = (parameter for base in bases for parameter in inspect.signature(base.__init__).parameters.values())
    return {parameter.name: parameter.default for parameter in found if parameter.default is not parameter.empty}


def ranges(cls: type) -> dict[str, Range]:
    """The ranges of the `arguments` of a class."""
    return {name: found for name, hint in arguments(cls).items() if (found := _range(hint))}


def _range(hint: Any) -> Range | None:
    found = (part if isinstance(part, Range) else _range(part) for part in get_args(hint))
    return next(filter(None, found), None)


def _is_container(hint: Any) -> bool:
    kind = get_origin(hint)
    if kind in (Annotated, Union, UnionType):
        return any(map(_is_container, get_args(hint)))
    return kind not in (None, Literal)


def _kinds(hint: Any) -> Iterator[Any]:
    """The alternatives in a hint. For a list, tuple or mapping, those of its elements or values."""
    kind, inner = get_origin(hint), get_args(hint)
    if kind in (None, Literal):
        yield hint
    else:
        for part in inner[:1] if kind is Annotated else inner[1:] if kind is dict else inner:
            if part is not ...:
                yield from _kinds(part)


def _elements(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list | tuple):
        for element in value.values() if isinstance(value, dict) else value:
            yield from _elements(element)
    else:
        yield value


class Rule:
    """The values that the Literal and `Range` in an annotation allow, for each element of a container; any value if none."""

    def __init__(self, hint: Any):
        kinds = list(_kinds(hint))
        others = [kind for kind in kinds if get_origin(kind) is not Literal and kind not in (int, float)]
        self.range, self.container = _range(hint), _is_container(hint)
        self.words = tuple(word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind))
        self.numbers = int in kinds or float in kinds
        self.classes = tuple(kind for kind in others if isinstance(kind, type) and kind is not Any)
        self.open = (self.range is None and not self.words) or len(self.classes) < len(others)

    def check(self, name: str, value: Any) -> None:
        """Raise a ValueError that gives the valid values unless `value` is one of them."""
        if self.open:
            return
        for element in _elements(value) if self.container else (value,):
            if self.numbers and isinstance(element, Real):
                if self.range is None or element in self.range:
                    continue
            elif element in self.words or isinstance(element, self.classes):
                continue
            if self.words and (self.range is None or isinstance(element, str)):
                raise _not_among(name, element, self.words)
            alternative = " or None" if NoneType in self.classes and not isinstance(element, Real) else ""
            raise ValueError(f"{name}: found {element!r}, expected {self.range}{alternative}")


def nearest(word: str, words: Any) -> str:
    """ "; did you mean …?" or an empty string."""
    found = difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)
    return f"; did you mean {found[0]}?" if found else ""


def one_of(name: str, value: Any, choices: Any) -> None:
    """Raise a ValueError that names the nearest choice unless `value` is one of the choices of a Literal."""
    if value not in get_args(choices):
        raise _not_among(name, value, get_args(choices))


def _not_among(name: str, value: Any, words: tuple[Any, ...]) -> ValueError:
    expected = ", ".join(map(repr, words))
    return ValueError(f"{name}: found {value!r}, expected one of {expected}{nearest(str(value), words)}")


def import_class(setting: str, name: str, base: type, public: str, error: type[ValueError] = ValueError) -> Any:
    """The class that a setting names as "package.module:Class".

    Args:
        setting: Name of the setting, for messages.
        name: Value of the setting.
        base: Required base class. Without it, someone else's config could call os:system.
        public: The name of `base` for messages.
        error: What to raise.

    Raises:
        ValueError: The class cannot be imported, or does not derive from `base`; of type `error`.
    """
    module, _, attribute = name.partition(":")
    try:
        cls = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as cause:
        reason = " ".join(str(cause).split())
        raise error(
            f"{setting}={name}: cannot be imported: {reason}; expected package.module:Class, where the module is installed or "
            "in the current folder"
        ) from cause
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise error(f"{setting}={name}: found {cls!r}, expected a class that derives from {public}")
    return cls


class Checked:
    """Base class of dataclasses that checks their fields at construction, by the Literal and the `Range` in their types.

    Raises:
        ValueError: A field is not valid; the message names the field, its value and what is expected.
    """

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self), include_extras=True).items():
            Rule(hint).check(name, getattr(self, name))
