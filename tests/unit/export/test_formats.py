from __future__ import annotations

import os
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.numpy

from embedtrain.data.vector_files import read_vectors
from embedtrain.errors import UserError
from embedtrain.export import Vectors, export_vectors, open_vectors
from embedtrain.export.formats import FORMATS
from embedtrain.export.recommendations import write_recommendations
from embedtrain.report import write_report

TEXT_FORMATS = ["word2vec", "word2vec-binary"]


@pytest.fixture(params=[None, 4], ids=["one block", "blocks of 4"])
def blocks(request, monkeypatch):
    """Runs the test with a table of one block, and of several with a shorter last one."""
    if request.param:
        monkeypatch.setattr("embedtrain.export.vectors._BLOCK_BYTES", request.param * 4 * 6)


def same_bits(left, right):
    return np.array_equal(left.view(np.uint32), right.view(np.uint32))


@pytest.mark.parametrize("format", TEXT_FORMATS)
def test_gensim_reads_word2vec(format, vectors, table, tmp_path, blocks):
    keyedvectors = pytest.importorskip("gensim.models", reason="gensim is not installed").KeyedVectors
    (path,) = export_vectors(vectors, format, str(tmp_path / "out"))
    loaded = keyedvectors.load_word2vec_format(path, binary=format == "word2vec-binary")
    assert loaded.index_to_key == vectors.words
    assert same_bits(loaded.vectors, table)


def test_glove_is_word2vec_without_its_first_line(vectors, tmp_path, blocks):
    texts = [Path(export_vectors(vectors, format, str(tmp_path / format))[0]) for format in ("word2vec", "glove")]
    word2vec, glove = (path.read_text().splitlines() for path in texts)
    assert glove == word2vec[1:]


def test_word2vec_text_is_lines_of_shortest_values(make_run, tmp_path):
    values = np.array([[0.1, -2, 1e-8], [0, 0.3, 1e20]], dtype=np.float32)
    vectors = open_vectors(make_run({"item": values}))
    (path,) = export_vectors(vectors, "word2vec", str(tmp_path / "out.txt"))
    assert Path(path).read_text() == "2 3\n0 0.1 -2 1e-8\n1 0 0.3 1e+20\n"


def test_npy(vectors, table, tmp_path, blocks):
    path, vocabulary = export_vectors(vectors, "npy", str(tmp_path / "out.npy"))
    assert same_bits(np.load(path), table)
    assert same_bits(np.load(path, mmap_mode="r"), table)
    check_vocabulary(vocabulary, vectors)


def test_safetensors(vectors, table, tmp_path, blocks):
    path, vocabulary = export_vectors(vectors, "safetensors", str(tmp_path / "out.safetensors"))
    tensors = safetensors.numpy.load_file(path)
    assert list(tensors) == ["vectors"]
    assert same_bits(tensors["vectors"], table)
    check_vocabulary(vocabulary, vectors)


def check_vocabulary(path: str, vectors: Vectors):
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    assert lines == [f"{word}\t{n}" for word, n in zip(vectors.words, vectors.counts, strict=True)] + [""]


def test_parquet(vectors, table, tmp_path, blocks):
    (path,) = export_vectors(vectors, "parquet", str(tmp_path / "out.parquet"))
    read = pq.read_table(path)
    assert read.schema.names == ["word", "count", "vector"]
    assert read.schema.field("vector").type == pa.list_(pa.float32(), 6)
    assert read["word"].to_pylist() == vectors.words
    assert read["count"].to_pylist() == vectors.counts.tolist()
    flat = read["vector"].combine_chunks().flatten().to_numpy()
    assert same_bits(flat.reshape(10, 6), table)
    assert pq.ParquetFile(path).num_row_groups == len(list(vectors.blocks()))


def test_tables_without_a_vocabulary(make_run, tmp_path):
    vectors = open_vectors(make_run({"item": np.ones((3, 2), np.float32)}))
    (path,) = export_vectors(vectors, "parquet", str(tmp_path / "out.parquet"))
    assert pq.read_table(path).drop(["vector"]).to_pydict() == {"word": ["0", "1", "2"]}
    _, vocabulary = export_vectors(vectors, "npy", str(tmp_path / "out.npy"))
    assert Path(vocabulary).read_text() == "0\n1\n2\n"


def test_tensorboard_reads_the_projector_folder(vectors, table, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
    from tensorboard.plugins.base_plugin import TBContext
    from tensorboard.plugins.projector.projector_plugin import ProjectorPlugin
    from werkzeug.test import Client

    folder = tmp_path / "projector"
    paths = export_vectors(vectors, "projector", str(folder))
    assert sorted(os.path.basename(path) for path in paths) == sorted(os.listdir(folder))
    plugin = ProjectorPlugin(TBContext(logdir=str(folder), multiplexer=EventMultiplexer()))
    apps = plugin.get_plugin_apps()
    query = "?run=.&name=word"
    tensor = Client(apps["/tensor"]).get("/tensor" + query)
    assert tensor.status_code == 200, tensor.data
    assert same_bits(np.frombuffer(tensor.data, np.float32).reshape(10, 6), table)
    metadata = Client(apps["/metadata"]).get("/metadata" + query).data.decode()
    assert metadata.split("\n")[:2] == ["word\tcount", "the\t1000"]
    info = Client(apps["/info"]).get("/info?run=.").json
    assert info["embeddings"][0]["tensorShape"] == [10, 6]


def test_the_projector_gets_the_most_frequent_rows_and_says_so(make_run, tmp_path, caplog):
    vectors = open_vectors(make_run({"item": np.ones((10_500, 1), np.float32)}))
    lines = Path(export_vectors(vectors, "projector", str(tmp_path / "a"))[1]).read_text().splitlines()
    assert (len(lines), lines[-1]) == (10_000, "9999")
    assert "exporting only the first 10,000 of 10,500 rows" in caplog.text
    lines = Path(export_vectors(vectors, "projector", str(tmp_path / "b"), max_rows=10_200)[1]).read_text()
    assert lines.count("\n") == 10_200


def test_max_rows_for_any_format(vectors, table, tmp_path):
    path, _ = export_vectors(vectors, "npy", str(tmp_path / "out.npy"), max_rows=3)
    assert same_bits(np.load(path), table[:3])
    with pytest.raises(UserError, match="max_rows must be at least 1, got 0"):
        export_vectors(vectors, "npy", str(tmp_path / "none.npy"), max_rows=0)


@pytest.mark.parametrize("format", FORMATS)
def test_any_fsspec_path_and_new_folders(format, vectors, tmp_path):
    local = export_vectors(vectors, format, str(tmp_path / "new" / "folder" / "out"))
    memory = fsspec.filesystem("memory")
    try:
        remote = export_vectors(vectors, format, "memory://export-test/new/out")
        assert sorted(memory.find("/export-test")) == sorted(path.removeprefix("memory:/") for path in remote)
        for path, url in zip(local, remote, strict=True):
            assert Path(path).read_bytes() == memory.cat_file(url)
    finally:
        memory.rm("/export-test", recursive=True)


def test_unknown_format_lists_the_formats(vectors, tmp_path):
    with pytest.raises(UserError, match=r"unknown export format 'csv': use one of word2vec, .*, projector"):
        export_vectors(vectors, "csv", str(tmp_path / "out"))


@pytest.mark.parametrize("format", FORMATS)
def test_existing_files_are_kept_unless_allowed(format, vectors, tmp_path):
    run_files = {str(path) for path in tmp_path.rglob("*")}
    output = str(tmp_path / "out")
    paths = export_vectors(vectors, format, output)
    contents = [Path(path).read_bytes() for path in paths]
    with pytest.raises(UserError, match="already exists"):
        export_vectors(vectors.first(2), format, output)
    assert [Path(path).read_bytes() for path in paths] == contents
    export_vectors(vectors.first(2), format, output, overwrite=True)
    assert Path(paths[0]).read_bytes() != contents[0]
    assert {str(path) for path in tmp_path.rglob("*") if not path.is_dir()} - run_files == set(paths)


def test_a_folder_or_an_impossible_place_is_refused(vectors, tmp_path):
    with pytest.raises(UserError, match="is a folder"):
        export_vectors(vectors, "npy", str(tmp_path), overwrite=True)
    file = tmp_path / "file"
    file.write_text("")
    for format in ("npy", "projector"):
        with pytest.raises(UserError, match=r"cannot write the output: .*file"):
            export_vectors(vectors, format, str(file / "out"))


@pytest.mark.parametrize("format", FORMATS)
def test_a_failed_export_leaves_nothing(format, vectors, tmp_path, monkeypatch):
    monkeypatch.setattr("embedtrain.export.vectors._BLOCK_BYTES", 4 * 4 * 6)
    read = Vectors.rows

    def fails_at_the_second_block(self, start, stop):
        if start > 0:
            raise OSError("disk gone")
        return read(self, start, stop)

    monkeypatch.setattr(Vectors, "rows", fails_at_the_second_block)
    folder = tmp_path / "exports"
    with pytest.raises(OSError, match="disk gone"):
        export_vectors(vectors, format, str(folder / "out"))
    assert not folder.exists()


def test_a_refused_export_leaves_folders_that_were_there(make_run, tmp_path):
    vectors = open_vectors(make_run({"word": np.ones((1, 2), np.float32)}, ["\ufeffa"]))
    there = tmp_path / "there"
    there.mkdir()
    for output in (there, there / "new" / "deep"):
        with pytest.raises(UserError, match="cannot hold the word"):
            export_vectors(vectors, "projector", str(output))
        assert list(tmp_path.glob("there/**/*")) == []
        assert there.is_dir()


@pytest.mark.parametrize("format", ["npy", "safetensors", "projector"])
def test_a_vocabulary_refuses_words_for_its_own_reason(format, make_run, tmp_path):
    vectors = open_vectors(make_run({"word": np.ones((1, 2), np.float32)}, ["\ufeffa"]))
    with pytest.raises(UserError, match=r"a word must not contain a tab or a line break, or begin with .*parquet"):
        export_vectors(vectors, format, str(tmp_path / "out"))


@pytest.mark.parametrize("format", TEXT_FORMATS)
@pytest.mark.parametrize("word", ["New York", "a\vb", ""])
def test_word2vec_refuses_words_that_readers_would_cut(format, word, make_run, tmp_path):
    vectors = open_vectors(make_run({"word": np.ones((2, 2), np.float32)}, ["fine", word]))
    with pytest.raises(UserError) as caught:
        export_vectors(vectors, format, str(tmp_path / "out"))
    assert str(caught.value).startswith(f"the format {format} cannot hold the word {word!r}: ")
    assert "parquet" in str(caught.value)
    (path,) = export_vectors(vectors, "parquet", str(tmp_path / "out.parquet"))
    assert pq.read_table(path)["word"].to_pylist() == ["fine", word]


ODD = ["5\u00a0000", "a\u2028b", "x\u3000", "\u0085y", "esc\x1b[31m", "\x1f"]
"""Words with spaces that are none in ASCII, and with control characters."""


@pytest.mark.parametrize("format", [*TEXT_FORMATS, "glove", "npy", "parquet"])
@pytest.mark.parametrize("suffix", ["", ".gz", ".bz2", ".xz", ".zst"])
def test_odd_words_and_compressed_files_come_back(format, suffix, make_run, tmp_path):
    values = np.random.default_rng(1).normal(size=(len(ODD), 4)).astype(np.float32)
    vectors = open_vectors(make_run({"word": values}, ODD))
    output = str(tmp_path / f"out{suffix}")
    if suffix and format in ("npy", "parquet"):
        with pytest.raises(UserError, match=rf"files of the format {format} are not compressed: name it .*out"):
            export_vectors(vectors, format, output)
        return
    path = export_vectors(vectors, format, output)[0]
    (block,) = read_vectors(path, 4)
    assert list(block.names) == ODD
    assert same_bits(block.rows(np.arange(len(ODD))), values)
    assert not suffix or Path(path).read_bytes()[:2] in (b"\x1f\x8b", b"BZ", b"\xfd7", b"\x28\xb5")
    if format != "npy" and format != "parquet" and suffix in ("", ".gz", ".bz2", ".xz"):
        keyedvectors = pytest.importorskip("gensim.models", reason="gensim is not installed").KeyedVectors
        loaded = keyedvectors.load_word2vec_format(
            path, binary=format == "word2vec-binary", no_header=format == "glove"
        )
        assert loaded.index_to_key == ODD


@pytest.mark.parametrize("format", ["glove", "npy"])
def test_a_word_that_begins_as_a_byte_order_mark_is_refused(format, make_run, tmp_path):
    vectors = open_vectors(make_run({"word": np.ones((1, 2), np.float32)}, ["\ufeffa"]))
    with pytest.raises(UserError, match="cannot hold the word"):
        export_vectors(vectors, format, str(tmp_path / "out"))


def test_recommendations_and_reports_are_not_compressed(tmp_path):
    with pytest.raises(UserError, match="format parquet are not compressed"):
        write_recommendations([], str(tmp_path / "top.parquet.gz"))
    with pytest.raises(UserError, match="format HTML are not compressed"):
        write_report(str(tmp_path), "page.html.zst", [], None)
