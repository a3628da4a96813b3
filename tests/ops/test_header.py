"""embedtrain.h is the only declaration of the native library's C ABI: whatever differs from it is refused."""

from __future__ import annotations

import ast
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from embedtrain.ops._backend import dispatch, header, library

PACKAGE = Path(header.__file__).resolve().parents[2]
OPS = PACKAGE / "ops"
TEXT = """
#pragma once
#ifdef __cplusplus
extern "C" {
#endif
// A comment; with void nothing(int x);
struct Pair {
    const float* values;  // [n], or null
    int64_t num_values;
};
void add(const struct Pair* pairs, int64_t num_pairs, float factor,
         void* const* targets, int num_threads);
#ifdef __cplusplus
}
#endif
"""


def test_declarations_are_read() -> None:
    declared = header.parse(TEXT)
    assert declared.functions == {
        "add": {
            "pairs": "pointer",
            "num_pairs": "int64_t",
            "factor": "float",
            "targets": "pointer",
            "num_threads": "int",
        }
    }
    assert declared.structs == {"Pair": {"values": "pointer", "num_values": "int64_t"}}
    assert declared.array_code("Pair", ("values", "num_values")) == "q"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("void add", "int add"),
        ("float factor", "size_t factor"),
        ("int num_threads", "int"),
        ("void add", "typedef int number;\nvoid add"),
    ],
)
def test_what_python_cannot_call_is_refused(old: str, new: str) -> None:
    with pytest.raises(ValueError):
        header.parse(TEXT.replace(old, new))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("float factor", "int factor"),
        ("int64_t num_pairs, float factor", "float factor, int64_t num_pairs"),
        ("    int64_t num_values;\n", ""),
        ("num_values", "num_pairs"),
        ("int64_t num_pairs", "int64_t number"),
    ],
)
def test_the_fingerprint_is_of_the_declarations_alone(old: str, new: str) -> None:
    before = header.parse(TEXT).fingerprint()
    assert header.parse(TEXT.replace("// A comment", "// Another")).fingerprint() == before
    assert header.parse(TEXT.replace(old, new)).fingerprint() != before


def test_a_struct_that_python_lays_out_otherwise_is_refused() -> None:
    declared = header.parse(TEXT)
    for members in (("num_values", "values"), ("values",), ("values", "num_values", "more")):
        with pytest.raises(TypeError, match="Pair"):
            declared.array_code("Pair", members)
    with pytest.raises(TypeError, match="Pair"):
        header.parse(TEXT.replace("int64_t num_values", "int num_values")).array_code("Pair", ("values", "num_values"))


def test_a_library_built_from_other_declarations_is_refused() -> None:
    if library.find() is None:
        pytest.skip(library.how_to_build())
    assert library.load(library.PATH, library.declarations())
    text = header.PATH.read_text(encoding="utf-8")
    swapped = text.replace("int64_t num_rows, int64_t dim,", "int64_t dim, int64_t num_rows,")
    longer = text.replace("void embedtrain_publish(", "void embedtrain_publish(int more, ")
    for other in (swapped, longer):
        assert other != text
        with pytest.raises(RuntimeError, match=r"built from another embedtrain\.h"):
            library.load(library.PATH, header.parse(other))


def test_the_reference_runs_beside_a_library_that_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise RuntimeError("built from another embedtrain.h")

    monkeypatch.setattr(library, "find", refuse)
    monkeypatch.setenv(dispatch.VARIABLE, "reference")
    dispatch.cpu_backend.cache_clear()
    assert dispatch.cpu_backend() == "reference"
    dispatch.cpu_backend.cache_clear()


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize(
    ("definition", "is_accepted"),
    [
        ("void embedtrain_publish(void* own_region, int64_t number) {}", True),
        ("void embedtrain_publish(void* own_region, int number) {}", False),
        ("void embedtrain_publish(void* own_region) {}", False),
        ('extern "C" void embedtrain_unknown(void* own_region) {}', False),
    ],
)
def test_the_compiler_refuses_a_kernel_that_is_declared_otherwise(definition: str, is_accepted: bool) -> None:
    flag = "-Werror=missing-declarations"
    assert flag in (PACKAGE.parent / "setup.py").read_text(encoding="utf-8")
    # What is not of C is another function than the declared one, and an undeclared one.
    source = f'#include "embedtrain.h"\n{definition}\n'
    program = ["g++", "-fsyntax-only", "-std=c++17", flag, f"-I{header.PATH.parent}", "-x", "c++", "-"]
    done = subprocess.run(program, input=source, capture_output=True, text=True)
    assert (done.returncode == 0) == is_accepted, done.stderr


def test_every_call_passes_as_many_arguments_as_declared() -> None:
    functions = library.declarations().functions
    seen = set()
    for path, call in calls():
        assert isinstance(call.func, ast.Attribute)
        name = call.func.attr
        assert name in functions, f"{path}: {name} is not in embedtrain.h"
        assert sum(map(count, call.args)) == len(functions[name]), f"{path}:{call.lineno}: {name}"
        seen.add(name)
    assert seen == functions.keys()


def calls() -> Iterator[tuple[Path, ast.Call]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            is_call = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
            if is_call and node.func.attr.startswith("embedtrain_"):
                yield path, node


def count(argument: ast.expr) -> int:
    """Returns how many arguments an expression stands for: a starred shape for two, a generator for its tuple's."""
    if not isinstance(argument, ast.Starred):
        return 1
    if isinstance(argument.value, ast.Attribute) and argument.value.attr == "shape":
        return 2
    assert isinstance(argument.value, ast.GeneratorExp), ast.unparse(argument)
    (source,) = argument.value.generators
    assert isinstance(source.iter, ast.Tuple), ast.unparse(argument)
    return len(source.iter.elts)
