"""One-line errors that say what to do."""

import difflib
from collections.abc import Iterable

UNKNOWN = "No known action matches that input."  # an environment's answer; nothing has changed


def unknown(what: str, name: str, known: Iterable[str]) -> ValueError:
    """The error for a name that does not exist; it says what may have been meant or what there is.

    >>> print(unknown("task", "raido", ["radio", "fan"]))
    unknown task 'raido'; did you mean radio?
    >>> print(unknown("task", "boil", ["radio", "fan"]))
    unknown task 'boil'; there are: radio, fan
    """
    known = list(known)
    close = difflib.get_close_matches(str(name), known, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else f"there are: {', '.join(known)}"
    return ValueError(f"unknown {what} {name!r}; {hint}")


def paired(items, values, what):
    """(item, value) for each item. Raises ValueError if there are not as many values."""
    values = list(values)
    if len(values) != len(items):
        raise ValueError(f"{what} gave {len(values)} for {len(items)}")
    return zip(items, values)


def first_line(error):
    """The beginning of an exception's text, on one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__
