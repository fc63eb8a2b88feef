"""Output for people."""

import sys


def printable(text: str) -> str:
    """Replaces control characters, which a terminal would obey: workers and miners write part of the text."""
    return "".join(character if character.isprintable() else "?" for character in text)


def counted(count: int, noun: str) -> str:
    """A number of things, of which there may be one."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def print_error(problem: object) -> None:
    """To standard error; standard output carries results only."""
    print(f"scorer-client: {printable(str(problem))}", file=sys.stderr)
