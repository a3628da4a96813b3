"""Texts without the passwords and tokens in them, for files and pages that others read."""

from __future__ import annotations

import re

from embedtrain.storage import shown

HIDDEN = "(hidden)"

_SCHEME = r"[A-Za-z][A-Za-z0-9+.\-]*://"
# A URL ends at a space, a quote, or where the next one of a list or a chain begins.
_URL = re.compile(rf"{_SCHEME}[^\s'\"]*?(?=,?{_SCHEME}|[\s'\"]|$)")
_NAME = r"(?:[\w.\-]*[._\-])?(?:password|passwd|secret|token|api_?key|access_?key|secret_?key|credentials?)"
_SETTING = re.compile(
    rf"(?P<name>(?<![\w.\-]){_NAME}['\"]?\s*[=:][^\S\n]*)(?P<value>'[^'\n]*'|\"[^\"\n]*\"|[^\s,&}}\]]+)", re.IGNORECASE
)
_EMPTY = ("null", "~", "''", '""')


def without_secrets(text: str) -> str:
    """Returns a text without the passwords of URLs and the values of settings that are named a password, a token etc.

    Args:
        text: a setting, the words of a command, or a configuration in YAML.
    """
    return _SETTING.sub(_hidden, _URL.sub(lambda found: shown(found.group()), text))


def _hidden(found: re.Match[str]) -> str:
    return found.group() if found["value"] in _EMPTY else f"{found['name']}{HIDDEN}"
