"""A conversation in the form of OpenAI's chat messages, from files and a question."""

from __future__ import annotations

import base64
import json
import mimetypes
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

# for a name that tells nothing
UNKNOWN_TYPES = {"image": "image/jpeg", "video": "video/mp4"}


def messages_of(media: Sequence[tuple[str, str]], question: str) -> list[dict[str, Any]]:
    """One turn of a user: pictures and videos in their order, then the question.

    Args:
        media: "image" or "video", and the path of the file.
        question: text.

    Raises:
        ValueError: there is no such file.
    """
    content = [
        {"type": f"{kind}_url", f"{kind}_url": {"url": _data_url(kind, path)}}
        for kind, path in media
    ]
    return [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]


def read_messages(path: str) -> list[dict[str, Any]]:
    """The messages in a JSON file, as they would be sent to a server.

    Raises:
        ValueError: there is no such file, or it holds no list of messages.
    """
    text = _bytes_of("--messages", path).decode(errors="replace")
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"--messages {path} is no JSON: {error}") from error
    is_list = isinstance(found, list) and found
    if not is_list or not all(isinstance(one, dict) and "role" in one for one in found):
        raise ValueError(
            f"--messages {path} must be a list of chat messages, as "
            '[{"role": "user", "content": "Hello"}]'
        )
    return found


def _data_url(kind: str, path: str) -> str:
    content = base64.b64encode(_bytes_of(f"--{kind}", path)).decode()
    guessed = mimetypes.guess_type(path)[0] or ""
    media_type = guessed if guessed.startswith(kind) else UNKNOWN_TYPES[kind]
    return f"data:{media_type};base64,{content}"


def _bytes_of(flag: str, path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{flag} {path} cannot be read ({error.strerror}): name a file") from error
