"""The language study: nothing lies in two parts, labels follow ratings, the vocabulary is always the same."""

from __future__ import annotations

import importlib
import io
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import pytest

from relu_deploy.errors import DataError

STUDIES = Path(__file__).parents[2] / "examples" / "studies"
TWEETS = (
    "1\t2.5\tSuch a lovely day &amp; night\n2\t-1.75\tI hate it\n3\t0.5\tPerhaps\n4\t-0.49\tHm\n5\t3.0\tI HATE it\n"
)
FILMS = "7_1\t-0.51\tDull and long\n7_2\t0.51\tAlmost good\n"


@pytest.fixture
def language(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The study's data, imported by its plain name as the study does."""
    pytest.importorskip("tokenizers", reason="tokenizers is not installed: pip install 'relu-deploy[dev]'")
    monkeypatch.syspath_prepend(STUDIES)
    return importlib.import_module("language_data")


@pytest.fixture
def study(language: ModuleType) -> ModuleType:
    """The study itself."""
    for package in ("accelerate", "onnxscript", "transformers"):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install 'relu-deploy[all,dev]'")
    return importlib.import_module("language")


@pytest.fixture
def archive(tmp_path: Path, language: ModuleType) -> Path:
    """A source package of the real one's layout, with seven made-up sentences."""
    tables = {
        "tweets_GroundTruth.txt": TWEETS,
        "movieReviewSnippets_GroundTruth.txt": FILMS,
        "_README_.txt": "no table",
    }
    inner = packed({f"hutto_ICWSM_2014/{name}": text.encode() for name, text in tables.items()})
    path = tmp_path / language.ARCHIVE
    path.write_bytes(packed({"vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz": inner}))
    return path


def packed(files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def test_labels_follow_ratings_and_neutral_or_repeated_sentences_are_left_out(language, archive):
    found = language.load_sentences(archive)
    assert len(found) == 4
    assert {sentence.text: sentence.label for sentence in found} == {
        "Dull and long": 0,
        "Almost good": 1,
        "Such a lovely day &amp; night": 1,
        "I hate it": 0,
    }


def test_a_missing_archive_is_named_with_the_command_that_gets_it(language, tmp_path):
    with pytest.raises(DataError, match="there is no") as caught:
        language.load_sentences(tmp_path / language.ARCHIVE)
    assert caught.value.hint == f"pip download --no-deps --no-binary :all: --dest {tmp_path} vaderSentiment==3.3.2"


@pytest.mark.parametrize(
    "content",
    [b"", b"no archive", packed({"other": b""}), packed({"other": b"x" * 9000})[:90]],
    ids=[
        "empty",
        "no archive",
        "without the file",
        "cut",
    ],  # an archive has the time in it: workers must agree on names
)
def test_a_damaged_archive_is_refused(language, tmp_path, content):
    path = tmp_path / language.ARCHIVE
    path.write_bytes(content)
    with pytest.raises(DataError, match="damaged"):
        language.load_sentences(path)


def made_up(language: ModuleType, count: int = 3000) -> list:
    words = ["good", "bad", "film", "phone", "slow", "great", "awful", "plot", "very", "not"]
    texts = [" ".join(words[(i // 10**k) % 10] for k in range(4)) + ("!" if i % 3 else "") for i in range(count)]
    return [language.Sentence(f"films:{i // 4}", 1.0 if i % 2 else -1.0, text) for i, text in enumerate(texts)]


def test_no_sentence_and_no_text_lies_in_two_parts(language):
    sentences = language.select(made_up(language) + made_up(language, 500))
    parts = {split: [s for s in sentences if s.split == split] for split in language.SPLITS}
    assert len(sentences) == 3000 == sum(map(len, parts.values()))
    for value in ("group", "key"):
        kinds = [{getattr(sentence, value) for sentence in part} for part in parts.values()]
        assert len(set.union(*kinds)) == sum(map(len, kinds))
    assert sentences == language.select(sentences)
    assert 0.15 < len(parts["test"]) / 3000 < 0.25
    assert 0.05 < len(parts["validation"]) / 3000 < 0.15


def test_the_vocabulary_is_the_same_in_another_process(language):
    """Trainers that break ties by a hash table's order give another vocabulary each time."""
    script = (
        "import language_data as d; texts = [f'{a}{b}c {b}{a}' for a in 'xyzüß' for b in 'mnopq'];"
        "t = d.train_tokenizer(texts, size=320); print(ascii(t.to_str()))"
    )
    runs = {
        subprocess.run([sys.executable, "-c", script], cwd=STUDIES, capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    }
    assert len(runs) == 1


def test_sentences_become_ids_of_one_length(language):
    tokenizer = language.train_tokenizer(["a good film", "a bad film &amp; plot"] * 3, length=8)
    encoded = language.encode(tokenizer, ["a good &amp; bad film", "film " * 20])
    pad, cls, sep = (language.SPECIAL.index(token) for token in (language.PAD, language.CLS, language.SEP))
    short, long = encoded["input_ids"].tolist()
    assert short[0] == long[0] == cls
    assert short[6:] == [sep, pad]
    assert long[7] == sep
    assert encoded["attention_mask"].tolist() == [[1] * 7 + [0], [1] * 8]
    assert tokenizer.decode(short).split() == ["Ġa", "Ġgood", "Ġ&", "Ġbad", "Ġfilm"]


def test_the_study_stops_with_the_command_that_gets_the_data(study, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["language.py", "-o", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"pip download .* vaderSentiment==3\.3\.2"):
        study.main()


def test_every_row_knows_its_teacher_and_the_data_it_was_trained_on(study, archive, tmp_path):
    options = study.Options(tmp_path, 1, 1, 1.0, smoke=True)
    data, counts = study.prepare(tmp_path)
    assert sum(counts.values()) == 4
    first = {row: study.job_of(row, 0, data, options) for row in study.ROWS}
    assert len({job.name for job in first.values()}) == len(study.ROWS)
    teacher = str(tmp_path / "jobs" / first["B"].name)
    assert {job.settings["teacher"] for row, job in first.items() if row != "B"} == {teacher}
    study.prepare(tmp_path)
    assert study.job_of("B", 0, data, options) == first["B"]


def test_the_page_says_what_became_of_the_papers_claims(study, tmp_path):
    options = study.Options(tmp_path, 2, 1, 1.0, smoke=False)
    layers = {"int8_layers": 14.0, "layers": 18.0}
    results = {
        study.job_name(row, seed): {"fp32": 80.0 + seed + i, "int8": 79.0, "f1": 79.5, **layers}
        for i, row in enumerate(study.ROWS)
        for seed in range(2)
    }
    speeds = {"GELU": study.Speed(1000.0, "QPS", "1"), "ReLU": study.Speed(1100.0, "QPS", "1.10 [1.05, 1.15]")}
    counts = {"train": 7, "validation": 1, "test": 2}
    text = "\n".join(study.page(results, speeds, ["busy"], counts, options))
    assert "- B+KD over B (the paper: 82.51 and 81.48 % exact match): +2.00 ± 0.00: yes" in text
    assert "- B+KD keeps at least 99.0 % of B: 102.5 %: yes" in text
    assert "KD with ReLU over KD with GELU: -4.00 ± 0.00: no" in text
    assert "14 of 18" in text
