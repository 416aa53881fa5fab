"""Checks of session ids, titles and tags."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

from fabula.errors import InvalidArgument

_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
MAX_TITLE = 200  # characters
MAX_TAGS, MAX_TAG = 16, 60  # of a session; characters of each


def is_session_id(id: object) -> bool:
    """Whether a value is a valid session id."""
    return isinstance(id, str) and _ID.fullmatch(id) is not None


def checked_title(title: object) -> str:
    """A valid title of a session.

    Raises:
        InvalidArgument: it is too long, or has control characters.
    """
    if not isinstance(title, str) or len(title) > MAX_TITLE:
        raise InvalidArgument(f"title must be text of at most {MAX_TITLE} characters")
    if title and any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in title):
        raise InvalidArgument(f"title {title!r:.60} must be one line without control characters")
    return title


def checked_tags(tags: object) -> tuple[str, ...]:
    """Valid tags of a session, without duplicates, in order.

    Raises:
        InvalidArgument: they are too many, too long, or have control characters.
    """
    if isinstance(tags, str) or not isinstance(tags, Iterable):
        raise InvalidArgument("tags must be a list of strings")
    found = tuple(dict.fromkeys(tags)) if tags else ()
    if len(found) > MAX_TAGS:
        raise InvalidArgument(f"a session has at most {MAX_TAGS} tags, not {len(found)}")
    for tag in found:
        if not isinstance(tag, str) or not tag.strip() or len(tag) > MAX_TAG:
            raise InvalidArgument(f"a tag must be text of 1 .. {MAX_TAG} characters, not {tag!r:.60}")
        checked_title(tag)
    return found
