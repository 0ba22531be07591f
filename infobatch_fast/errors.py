"""What a user did wrong, in one line: the command line prints it and exits with code 2."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake of the user's or their machine; the message names argument, rule and value."""


_ALIASES = {"gpu": "cuda", "resnet18": "r18", "resnet50": "r50", "float16": "fp16"}


def unknown_name(argument: str, value: object, known: Iterable[str]) -> str:
    """The message for a name that is not one of `known`, with the nearest one suggested."""
    known = list(known)
    near = difflib.get_close_matches(_ALIASES.get(str(value), str(value)), known, n=1, cutoff=0.5)
    hint = f" (did you mean {near[0]}?)" if near else ""
    return f"{argument} must be one of {', '.join(known)}, got {value}{hint}"


def reason(error: BaseException) -> str:
    """What an exception says, as one line of bounded length."""
    text = " ".join(str(error).split())
    return (text or type(error).__name__)[:300]
