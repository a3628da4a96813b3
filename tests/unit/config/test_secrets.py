from __future__ import annotations

from embedtrain.config.secrets import hide_secrets, without_secrets


def test_settings_are_told_without_secrets() -> None:
    settings = {
        "data": {"path": ["ftp://a:key1@b/c", "plain"], "tokenizer": "bert"},
        "own": {"api_key": "key2", "token": None, "password": "my key3", "rows": 3},
    }
    assert hide_secrets("", settings) == {
        "data": {"path": ["ftp://a@b/c", "plain"], "tokenizer": "bert"},
        "own": {"api_key": "(hidden)", "token": None, "password": "(hidden)", "rows": 3},
    }


def test_yaml_is_told_without_secrets() -> None:
    text = "own:\n  token: my long key\n  secret: 'it''s a key'\n  password: null\n  flow: {api_key: key, rows: 3}\n"
    assert without_secrets(text) == (
        "own:\n  token: (hidden)\n  secret: (hidden)\n  password: null\n  flow: {api_key: (hidden), rows: 3}\n"
    )
