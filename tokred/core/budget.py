"""Keep rates, budgets and layer schedules: validation, and the arithmetic from numbers to token counts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real

from tokred.core.errors import InvalidParameterError, LayerError

__all__ = [
    "budget_tokens",
    "check_budget",
    "check_choice",
    "check_count",
    "check_fraction",
    "check_layers",
    "check_removals",
    "removals_per_layer",
    "resolve_layers",
]


def check_fraction(field: str, value: object) -> float:
    """Return a keep rate in (0, 1]."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < float(value) <= 1:
        raise InvalidParameterError(f"{field}={value!r}: expected a fraction in (0, 1], 1 keeps every token")
    return float(value)


def check_count(field: str, value: object, minimum: int = 0) -> int:
    """Return an integer count of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < minimum:
        raise InvalidParameterError(f"{field}={value!r}: expected an integer >= {minimum}")
    return int(value)


def check_choice(field: str, value: object, choices: Sequence[object]) -> None:
    """Refuse a value that is not among the choices."""
    if value not in choices:
        raise InvalidParameterError(f"{field}={value!r}: expected one of {', '.join(repr(c) for c in choices)}")


def check_budget(field: str, value: object) -> float | int:
    """Return a budget: a fraction in (0, 1] of the tokens, or a count >= 1 of tokens.

    The integer 1 is one token, the float 1.0 is all of them.
    """
    if isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1:
        return int(value)
    if isinstance(value, Real) and not isinstance(value, (bool, Integral)):
        number = float(value)
        if 0 < number <= 1:
            return number
        if number > 1 and number.is_integer():
            return int(number)
    raise InvalidParameterError(f"{field}={value!r}: expected a fraction in (0, 1] or a whole number of tokens >= 1")


def budget_tokens(budget: float | int, total: int) -> int:
    """Tokens that a budget allows out of `total`: at least 1, at most `total`; a fraction rounds down."""
    count = budget if isinstance(budget, int) else math.floor(budget * total + 1e-6)
    return min(max(count, 1), total)


def check_layers(field: str, layers: object) -> tuple[int, ...]:
    """Return 0-based layer indices, strictly ascending."""
    if isinstance(layers, (str, bytes)) or not isinstance(layers, Sequence) or not layers:
        raise InvalidParameterError(f"{field}={layers!r}: expected a sequence of 0-based layer indices, e.g. (3, 6, 9)")
    checked = tuple(check_count(field, layer) for layer in layers)
    if list(checked) != sorted(set(checked)):
        raise InvalidParameterError(f"{field}={layers!r}: layer indices must ascend and not repeat")
    return checked


def resolve_layers(
    field: str, layers: Sequence[int] | None, default: Sequence[int], depth: int, method: str
) -> tuple[int, ...]:
    """Layers at which to act in a model of `depth` blocks.

    Layers that the caller named must all exist. A method's own default (`layers` is None) is written for 12 blocks or
    more; of it, those are used that the model has, and a model that has none of them is refused.
    """
    if layers is not None:
        outside = [layer for layer in layers if layer >= depth]
        if outside:
            raise LayerError(
                f"{method}: {field} names block {outside[0]}, but this model has {depth} blocks (0 to {depth - 1})"
            )
        return tuple(layers)
    present = tuple(layer for layer in default if layer < depth)
    if not present:
        raise LayerError(
            f"{method}: none of its default blocks {tuple(default)} exists in a model of depth {depth}; pass {field}="
        )
    return present


def check_removals(field: str, r: object) -> int | tuple[float, ...]:
    """Return a schedule of removals in canonical form: an int, ``(r, inflection)`` or counts layer by layer.

    A tuple of two whose second entry lies in [-1, 1], and a list of two whose second entry is a float, are
    ``(r, inflection)``; any other sequence counts tokens layer by layer. The canonical inflection is a float, and
    canonical counts are never exactly two (a zero is appended), so that both survive JSON.
    """
    if isinstance(r, (Integral, str)) or not isinstance(r, Sequence):
        return check_count(field, r)
    if len(r) == 2 and (isinstance(r[1], float) or (isinstance(r, tuple) and -1 <= r[1] <= 1)):
        mean, inflection = check_count(field, r[0]), float(r[1])
        if not -1 <= inflection <= 1:
            raise InvalidParameterError(f"{field}={r!r}: the inflection must lie in [-1, 1]")
        return (mean, inflection)
    counts = tuple(check_count(field, value) for value in r)
    if not counts:
        raise InvalidParameterError(f"{field}={r!r}: expected a count, a list of counts or (r, inflection)")
    return (*counts, 0) if len(counts) == 2 else counts


def removals_per_layer(r: int | tuple[float, ...], depth: int) -> tuple[int, ...]:
    """Tokens to remove in each of `depth` blocks, from the canonical form of `check_removals`.

    ``(r, f)`` ramps linearly from ``int(r (1 - f))`` to ``2 r - int(r (1 - f))``, truncated (ToMe's released
    ``parse_r``): f = -1 decreases to 0, 0 is constant, 1 increases from 0. Counts are padded with zeros.

    Raises:
        LayerError: counts for more blocks than the model has.
    """
    if isinstance(r, int):
        return (r,) * depth
    if len(r) == 2:
        mean, inflection = int(r[0]), r[1]
        if depth == 1:
            return (mean,)
        low = int(mean * (1 - inflection))
        high = 2 * mean - low
        step = (high - low) / (depth - 1)
        return tuple(int(low + step * layer) for layer in range(depth))
    if any(r[depth:]):
        raise LayerError(f"r has {len(r)} entries, but this model has {depth} blocks; give at most one a block")
    return (*(int(value) for value in r[:depth]), *(0,) * (depth - len(r)))
