"""Texts without the passwords and tokens in them, for files and pages that others read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from embedtrain.storage import shown

HIDDEN = "(hidden)"

_SCHEME = r"[A-Za-z][A-Za-z0-9+.\-]*://"
# A URL ends at a space, a quote, or where the next one of a list or a chain begins.
_URL = re.compile(rf"{_SCHEME}[^\s'\"]*?(?=,?{_SCHEME}|[\s'\"]|$)")
_NAME = r"(?:[\w.\-]*[._\-])?(?:password|passwd|secret|token|api_?key|access_?key|secret_?key|credentials?)"
_SECRET = re.compile(_NAME, re.IGNORECASE)
# In YAML a value may have spaces; elsewhere it ends at one.
_SETTING = re.compile(
    rf"(?P<name>(?<![\w.\-]){_NAME}['\"]?(?:[^\S\n]*:[^\S\n]+(?=(?P<yaml>[^\n,}}\]]+))|=(?=(?P<word>[^\s,&}}\]]+))))"
    r"(?:(?P=yaml)|(?P=word))",
    re.IGNORECASE,
)
_EMPTY = ("null", "~", "''", '""')


def without_secrets(text: str) -> str:
    """Returns a text without the passwords of URLs and the values of settings that are named a password, a token etc.

    Args:
        text: a setting, the words of a command, or a configuration in YAML.
    """
    return _SETTING.sub(_hidden, _URL.sub(lambda found: shown(found.group()), text))


def hide_secrets(name: str, value: Any) -> Any:
    """Returns the value of a setting or of an option without what is secret in it; of a mapping, of all its values."""
    if isinstance(value, Mapping):
        return {key: hide_secrets(str(key), each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [hide_secrets(name, each) for each in value]
    if value not in (None, "") and _SECRET.fullmatch(name):
        return HIDDEN
    return without_secrets(value) if isinstance(value, str) else value


def _hidden(found: re.Match[str]) -> str:
    value = (found["yaml"] or found["word"]).strip()
    return found.group() if value in _EMPTY else f"{found['name']}{HIDDEN}"
