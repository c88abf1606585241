"""Text: the embedded sample against its promise, sources in their order, packing against plain lists, bad input."""

import copy
import logging
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from datasets import Dataset, IterableDataset
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from grape_hf import hub
from grape_hf.text import (
    EMBEDDED,
    count_text,
    embedded_sample,
    iterate_texts,
    load_text,
    pack,
    tokenize,
    train_tokenizer,
)
from grape_hf.text.sample import _without_runs_of

LINES = [f"line {i} of a text about {('one', 'two', 'three')[i % 3]} things" for i in range(200)]


@pytest.fixture
def text_file(tmp_path: Path) -> str:
    path = tmp_path / "train.txt"
    path.write_text("\n".join(LINES) + "\n")
    return str(path)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(LINES, vocab_size=300)


def runs(texts: list[str], length: int) -> set[tuple[str, ...]]:
    words = " ".join(texts).lower().split()
    return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}


class TestEmbeddedSample:
    def test_no_run_of_13_words_is_in_both_splits(self):
        sample = embedded_sample()
        assert not runs(sample["train"]["text"], 13) & runs(sample["validation"]["text"], 13)
        # The search can find something: shorter runs are shared.
        assert runs(sample["train"]["text"], 4) & runs(sample["validation"]["text"], 4)

    def test_most_of_the_text_is_there_and_no_paragraph_twice(self):
        sample = embedded_sample()
        texts = [*sample["train"]["text"], *sample["validation"]["text"]]
        assert len(set(texts)) == len(texts)
        words = [sum(len(text.split()) for text in sample[split]["text"]) for split in ("train", "validation")]
        assert words[0] > 40_000
        assert words[1] > 2_500

    def test_a_run_over_the_end_of_a_paragraph_counts(self):
        held_out = [" ".join(map(str, range(20)))]
        first, second = " ".join(map(str, range(7))), " ".join(map(str, range(7, 14)))
        assert _without_runs_of(held_out, [first, second]) == [first]
        assert _without_runs_of(held_out, [first, "between", second]) == [first, "between", second]

    def test_it_is_the_same_every_time(self):
        assert embedded_sample()["train"]["text"] == embedded_sample()["train"]["text"]


class TestSources:
    def test_text_files(self, text_file: str, tmp_path: Path):
        (tmp_path / "valid.txt").write_text("a line\n\nanother\n")
        data = load_text(train_file=text_file, validation_file=str(tmp_path / "valid.txt"))
        assert "".join(data.train["text"]) == Path(text_file).read_text()
        assert data.validation["text"][:] == ["a line\n", "\n", "another\n"]
        assert data.name == f"{text_file} / {tmp_path / 'valid.txt'}"

    def test_the_end_of_a_file_is_held_out(self, text_file: str):
        data = load_text(train_file=text_file)
        assert len(data.validation) == 10
        assert [*data.train["text"], *data.validation["text"]] == [line + "\n" for line in LINES]

    def test_parquet_with_a_column_named(self, tmp_path: Path):
        path = str(tmp_path / "train.parquet")
        Dataset.from_dict({"number": [1] * 40, "body": ["words"] * 40}).to_parquet(path)
        data = load_text(train_file=path, text_column="body")
        assert next(iterate_texts(data.train, data.column)) == "words"

    def test_a_folder_of_a_data_set_by_name(self, tmp_path: Path):
        for split in ("train", "validation"):
            Dataset.from_dict({"text": [split] * 3}).to_parquet(str(tmp_path / f"{split}.parquet"))
        data = load_text(dataset_name=str(tmp_path))
        assert (data.train["text"][0], data.validation["text"][0]) == ("train", "validation")
        assert data.name == str(tmp_path)

    @pytest.mark.parametrize("rows", [None, 2])
    def test_a_stream_with_a_validation_split(self, text_file: str, tmp_path: Path, rows: int | None):
        (tmp_path / "valid.txt").write_text("1\n2\n3\n")
        data = load_text(
            train_file=text_file, validation_file=str(tmp_path / "valid.txt"), streaming=True, validation_rows=rows
        )
        assert isinstance(data.train, IterableDataset)
        assert isinstance(data.validation, Dataset)
        assert len(data.validation) == (rows or 3)

    def test_a_stream_without_validation_gives_its_first_rows(self, text_file: str):
        data = load_text(train_file=text_file, streaming=True, validation_rows=7)
        assert [*data.validation["text"], *iterate_texts(data.train)] == [line + "\n" for line in LINES]
        with pytest.raises(ValueError, match="Set validation_rows"):
            load_text(train_file=text_file, streaming=True)

    def test_validation_rows_limits_a_split(self):
        assert len(load_text(dataset_name=EMBEDDED, validation_rows=5).validation) == 5

    def test_the_embedded_sample_can_be_streamed(self):
        assert isinstance(load_text(dataset_name=EMBEDDED, streaming=True).train, IterableDataset)


class TestHubOutOfReach:
    """The Hub is a closed port, or a server that never finishes its answer: real sockets, real time-outs."""

    @pytest.fixture(autouse=True)
    def online(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)

    @pytest.fixture
    def dripping_server(self) -> Iterator[str]:
        """A server whose answer never ends: each byte comes in time, so no time-out of a single read helps."""
        closing = threading.Event()
        with socket.create_server(("127.0.0.1", 0)) as server:

            def answer() -> None:
                connection, _ = server.accept()
                with connection:
                    connection.sendall(b"HTTP/1.1 200 OK\r\nX-Drip: ")
                    for _ in range(400):  # 20 s, should nobody lose patience
                        if closing.wait(0.05):
                            break
                        connection.sendall(b".")

            thread = threading.Thread(target=answer, daemon=True)
            thread.start()
            yield f"http://127.0.0.1:{server.getsockname()[1]}"
            closing.set()
            socket.create_connection(server.getsockname()).close()  # if nobody came, it still waits for someone
            thread.join()

    def use_endpoint(self, monkeypatch: pytest.MonkeyPatch, url: str) -> None:
        api = hub.HfApi
        monkeypatch.setattr(hub, "HfApi", lambda: api(endpoint=url))

    def test_refused(self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
        self.use_endpoint(monkeypatch, "http://127.0.0.1:9")
        data = load_text()
        assert data.name.startswith("embedded sample")
        assert data.hub_id is None
        assert "NOT WikiText-103" in caplog.text
        assert "refused" in caplog.text

    def test_too_slow(self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, dripping_server: str):
        self.use_endpoint(monkeypatch, dripping_server)
        start = time.monotonic()
        data = load_text(hub_timeout=0.5)
        assert time.monotonic() - start < 15
        assert data.name.startswith("embedded sample")
        assert "no answer within 0.5 s" in caplog.text


class TestBadInput:
    def test_a_data_set_asked_for_is_an_error(self, caplog: pytest.LogCaptureFixture):
        with pytest.raises(ValueError, match="'some/set' cannot be loaded"):
            load_text(dataset_name="some/set")
        with pytest.raises(ValueError, match="'Salesforce/wikitext' .wikitext-2-raw-v1. cannot be loaded"):
            load_text(dataset_config="wikitext-2-raw-v1")
        assert "embedded" not in caplog.text

    def test_missing_file(self):
        with pytest.raises(FileNotFoundError, match=r"train_file='/no/such.txt': expected a text or parquet file"):
            load_text(train_file="/no/such.txt")

    def test_missing_validation_file(self, text_file: str):
        with pytest.raises(FileNotFoundError, match="validation_file='/no/such.txt'"):
            load_text(train_file=text_file, validation_file="/no/such.txt")

    def test_folder(self, tmp_path: Path):
        with pytest.raises(FileNotFoundError, match="found a folder there .* as dataset_name"):
            load_text(train_file=str(tmp_path))

    def test_empty_file(self, tmp_path: Path):
        (tmp_path / "empty.txt").touch()
        with pytest.raises(ValueError, match=r"empty.txt' is empty: expected text, got 0 bytes"):
            load_text(train_file=str(tmp_path / "empty.txt"))

    def test_parquet_without_rows(self, tmp_path: Path):
        path = str(tmp_path / "none.parquet")
        Dataset.from_dict({"text": ["x"]}).select([]).to_parquet(path)
        with pytest.raises(
            ValueError, match=r"none.parquet' cannot be read as parquet: .* Expected a .parquet file with rows"
        ):
            load_text(train_file=path)
        with pytest.raises(ValueError, match="the training split of .* is empty"):
            load_text(train_file=path, validation_file=path, streaming=True)

    def test_not_text(self, tmp_path: Path):
        (tmp_path / "binary.txt").write_bytes(bytes(range(128, 256)))
        with pytest.raises(ValueError, match="cannot be read as text"):
            load_text(train_file=str(tmp_path / "binary.txt"))

    def test_wrong_column(self, text_file: str):
        with pytest.raises(ValueError, match="no column 'body', only 'text'"):
            load_text(train_file=text_file, text_column="body")

    def test_column_of_numbers(self, tmp_path: Path):
        path = str(tmp_path / "numbers.parquet")
        Dataset.from_dict({"text": list(range(40))}).to_parquet(path)
        with pytest.raises(ValueError, match="expected text in column 'text', got int"):
            load_text(train_file=path)

    def test_two_sources(self, text_file: str):
        with pytest.raises(ValueError, match="one source of text, got both"):
            load_text(train_file=text_file, dataset_name="some/set")

    def test_validation_alone(self, text_file: str):
        with pytest.raises(ValueError, match="needs a train_file"):
            load_text(validation_file=text_file)


class TestTokenizer:
    def test_it_writes_any_text_and_survives_saving(self, tokenizer: PreTrainedTokenizerFast, tmp_path: Path):
        text = "Things é 漢字\n\n  and\ttabs"
        tokenizer.save_pretrained(tmp_path)
        loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path)
        assert loaded.decode(loaded(text)["input_ids"]) == text
        assert loaded.eos_token == "<|endoftext|>"
        assert len(loaded) == 300

    def test_lower_case(self):
        tokenizer = train_tokenizer(LINES, vocab_size=300, lowercase=True)
        assert tokenizer("ABC")["input_ids"] == tokenizer("abc")["input_ids"]

    def test_vocabulary_too_small(self):
        with pytest.raises(ValueError, match="expected at least 257"):
            train_tokenizer(LINES, vocab_size=256)


class TestPacking:
    def rows(self, lines: list[str]) -> Dataset:
        return Dataset.from_dict({"text": lines})

    def test_blocks_are_the_text_end_to_end(self, tokenizer: PreTrainedTokenizerFast):
        blocks = pack(tokenize(self.rows(LINES), tokenizer), context=16)
        expected = tokenizer("\n".join(LINES) + "\n")["input_ids"]
        found = [token for block in blocks["input_ids"] for token in block]
        assert found == expected[: len(found)]
        assert len(expected) - len(found) < 16
        assert {len(block) for block in blocks["input_ids"]} == {16}
        assert all(b["labels"] == [-100, *b["input_ids"][1:]] for b in blocks)

    def test_line_breaks_and_empty_rows(self, tokenizer: PreTrainedTokenizerFast):
        rows = tokenize(self.rows(["one", "two\n", "", None, "\n"]), tokenizer)
        assert [tokenizer.decode(ids) for ids in rows["input_ids"]] == ["one\n", "two\n", "", "", "\n"]

    def test_no_special_tokens(self, tokenizer: PreTrainedTokenizerFast):
        eager = copy.deepcopy(tokenizer)
        eager.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", tokenizer.eos_token_id)]
        )
        assert eager("one\n")["input_ids"][0] == tokenizer.eos_token_id
        rows = self.rows(["one\n"])
        assert tokenize(rows, eager)["input_ids"][:] == tokenize(rows, tokenizer)["input_ids"][:]

    def test_counts(self, tokenizer: PreTrainedTokenizerFast):
        rows = tokenize(self.rows(LINES), tokenizer)
        text = "\n".join(LINES) + "\n"
        assert count_text(rows) == (len(tokenizer(text)["input_ids"]), len(text.split()))

    def test_worker_processes_give_the_same(self, tokenizer: PreTrainedTokenizerFast):
        rows = self.rows(LINES * 25)  # 5,000 rows: two batches, so two workers are worth it
        alone, together = (pack(tokenize(rows, tokenizer, num_proc=n), 16, num_proc=n) for n in (1, 2))
        ids = [token for block in together["input_ids"] for token in block]
        assert len(alone) - len(together) <= 2  # each worker drops less than a block
        assert ids[: 16 * 100] == [token for block in alone["input_ids"][:100] for token in block]

    def test_many_workers_do_not_cut_a_small_text_to_nothing(self, tokenizer: PreTrainedTokenizerFast):
        rows = self.rows(LINES[:8])
        tokens = count_text(tokenize(rows, tokenizer))[0]
        assert len(pack(tokenize(rows, tokenizer, num_proc=8), tokens, num_proc=8)) == 1

    def test_a_second_time_comes_from_the_cache(self, text_file: str, tokenizer: PreTrainedTokenizerFast):
        def build() -> Dataset:
            return pack(tokenize(load_text(train_file=text_file).train, tokenizer), context=16)

        assert build().cache_files == build().cache_files != []

    def test_a_stream_gives_the_same_blocks(self, tokenizer: PreTrainedTokenizerFast):
        whole = pack(tokenize(self.rows(LINES), tokenizer), context=16)
        stream = pack(tokenize(self.rows(LINES).to_iterable_dataset(), tokenizer), context=16)
        assert isinstance(stream, IterableDataset)
        assert list(stream) == list(whole)

    @pytest.mark.parametrize("stream", [False, True])
    def test_shorter_than_one_context(self, tokenizer: PreTrainedTokenizerFast, stream: bool):
        rows = self.rows(["a few words"])
        rows = rows.to_iterable_dataset() if stream else rows
        with pytest.raises(ValueError, match="the novel is shorter than one context: expected at least 1,024 tokens"):
            pack(tokenize(rows, tokenizer), context=1024, what="the novel")

    def test_a_context_that_predicts_nothing(self, tokenizer: PreTrainedTokenizerFast):
        with pytest.raises(ValueError, match="context=1: expected at least 2"):
            pack(tokenize(self.rows(LINES), tokenizer), context=1)


def test_iterate_texts_stops_at_the_limit():
    rows = Dataset.from_dict({"text": LINES})
    assert list(iterate_texts(rows, limit=3)) == LINES[:3]
    assert list(iterate_texts(rows.to_iterable_dataset(), limit=3)) == LINES[:3]
    assert list(iterate_texts(rows, limit=10**6)) == LINES


def test_the_warning_is_a_warning(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    load_text()
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "HF_HUB_OFFLINE" in caplog.text
