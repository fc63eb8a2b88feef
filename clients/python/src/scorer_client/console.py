"""What is shown to people."""

import sys


def printable(text: str) -> str:
    """Workers and miners write part of it, and a terminal obeys control characters."""
    return "".join(character if character.isprintable() else "?" for character in text)


def say(problem: object) -> None:
    """Standard output carries only the answer."""
    print(f"aggregator: {printable(str(problem))}", file=sys.stderr)
