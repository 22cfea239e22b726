"""What others have named, as a terminal or a log may show it."""

from __future__ import annotations


def shown(text: object) -> str:
    r"""The text with a backslash escape for every character that is not printable.

    Ids, names and errors come from producers and models. A newline among them would forge a line of a log, and an
    escape sequence would do to a terminal whatever it likes.
    """
    found = str(text)
    if found.isprintable():
        return found
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in found
    )


def shown_lines(text: object) -> str:
    """The same of a text that keeps its lines, such as a traceback."""
    return "\n".join(map(shown, str(text).split("\n")))
