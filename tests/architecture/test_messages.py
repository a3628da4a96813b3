"""The messages of the package read aloud as sentences; `python tests/architecture/test_messages.py` prints them all."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

MAX_LENGTH = 320
"""Characters of a message without the values in it."""

_CAPITALS = re.compile(r"[A-Z][a-z]*[A-Z0-9]|(Redis|Arrow|Parquet|NumPy|Option|Python|TensorBoard|Triton|Spearman)\b")
"""Beginnings of messages that are names, which have capitals anywhere."""

# Phrases that a reader needs to read twice, each with what to write instead.
UNCLEAR: dict[str, str] = {
    r"\bmeanwhile\b": "at the same time, in the meantime",
    r"\bso many\b": "the number",
    r"\bwhere (the|an?|it|no|there)\b": "if, when",
    r"(?<!there )\b(is|are) no (?!longer\b|more\b|struct\b|parameters\b)": "is not a",
    r"\bnot un\w+ed\b|\bcannot be (un|mis)\w+|\bmust not be (un|dis)\w+": "the positive word",
    r"\bnobody\b": "no rank, no user, no process",
    r"\bwhatever\b": "any",
    r"\b(is|are|was|were) told\b": "gets",
    r"\bhanded on\b": "copied",
    r"\bsuch lines\b": "bad lines",
    r"\bis there already\b|\bis already there\b": "already exists",
    r"\bcould not be (read|written|opened|used|asked|made|removed|listed|created)\b": "cannot read, cannot write",
    r"\bis short of\b": "has too little",
    r"\b(un)?packed\b": "packaged, compressed",
    r"\blooked at\b": "read",
    r"\bis of (the|another) kind\b": "is a",
    r"\bsee to it\b|\bas it (has|stands|were)\b|\bthose that were\b|\bthat of the\b": "name the noun",
}

# Messages that break a rule, with the reason.
ALLOWED: dict[str, str] = {}


@dataclass(frozen=True)
class Message:
    """A text that a user can see, with `{}` for each value in it."""

    place: str
    kind: str
    text: str

    @property
    def shown(self) -> str:
        return f"{self.place}: {self.kind}: {self.text}"


def template_of(node: ast.expr) -> str | None:
    """Returns the text of a string or an f-string, with `{}` for its values; None for another expression."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = template_of(node.left), template_of(node.right)
        return None if left is None and right is None else f"{left or '{}'}{right or '{}'}"
    return None


def messages_in(path: Path) -> Iterator[Message]:
    """Yields the texts of errors, of warnings and of lines for the user in a file."""
    name = path.relative_to(ROOT).as_posix()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and node.args:
            called = ast.unparse(node.func).rpartition(".")[2]
            is_logged = called in ("warning", "info") and "logger" in ast.unparse(node.func)
            text = template_of(node.args[0])
            if (called.endswith("Error") or called == "Gone" or is_logged) and text:
                yield Message(f"{name}:{node.lineno}", called, text)


def all_messages() -> list[Message]:
    return [message for path in sorted((ROOT / "embedtrain").rglob("*.py")) for message in messages_in(path)]


def faults_of(message: Message) -> Iterator[str]:
    """Yields what is wrong with a message."""
    text = message.text
    if text[0].isupper() and not _CAPITALS.match(text):
        yield "begins with a capital"
    if text.rstrip()[-1] in ".!" and ". " not in text.rstrip() and not text.endswith("..."):
        yield "ends with a full stop, though it is a single sentence"
    if len(text.replace("{}", "")) > MAX_LENGTH:
        yield f"is longer than {MAX_LENGTH} characters"
    if "  " in text.strip() and "\n" not in text:
        yield "has two spaces in a row"
    for pattern, better in UNCLEAR.items():
        if found := re.search(pattern, text):
            yield f"says {found.group()!r}: rather {better}"


def test_messages_are_found() -> None:
    found = all_messages()
    kinds = {message.kind for message in found}
    assert len(found) > 500
    assert {"UserError", "ValueError", "RuntimeError", "CheckpointError", "warning", "info"} <= kinds


def test_messages_read_aloud_as_sentences() -> None:
    wrong = [
        f"{message.shown}\n    {fault}"
        for message in all_messages()
        if message.text not in ALLOWED
        for fault in faults_of(message)
    ]
    assert not wrong, "\n".join(wrong)


def test_messages_of_settings_name_a_setting() -> None:
    nameless = [
        message.shown
        for message in all_messages()
        if re.search(r"/config/\w+\.py|/config\.py", message.place) and message.kind == "UserError"
        if not re.search(r"\{\}|[a-z_]+[.=][a-z_]+|\b(start_from|seed|model)\b", message.text)
    ]
    assert not nameless, "\n".join(nameless)


def test_allowed_messages_exist_and_break_a_rule() -> None:
    faulty = {message.text for message in all_messages() if any(faults_of(message))}
    assert set(ALLOWED) <= faulty


def test_a_fault_of_each_kind_is_found() -> None:
    for text, fault in (
        ("Expected a number", "begins with a capital"),
        ("a number is expected.", "ends with a full stop"),
        ("x" * (MAX_LENGTH + 1), "is longer than"),
        ("one  two", "two spaces"),
        ("{} is no integer", "is not a"),
        ("the file changed meanwhile", "meanwhile"),
    ):
        assert any(fault in found for found in faults_of(Message("", "", text))), text
    for text in ("{} must be at least 1, got {}", "CSV cannot hold {}", "--top must be at least 1", "{}: {}"):
        assert list(faults_of(Message("", "", text))) == [], text


if __name__ == "__main__":
    sys.stdout.writelines(f"{message.shown}\n" for message in all_messages())
