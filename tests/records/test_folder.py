import errno
import threading
from pathlib import Path

import pytest

from peelwise.errors import OutputError
from peelwise.records.folder import check_free, written_whole

OURS = "certificate.json"


@pytest.fixture
def earlier(tmp_path):
    """An earlier result, alone in its parent folder."""
    folder = tmp_path / "out"
    (folder / "sub").mkdir(parents=True)
    (folder / OURS).write_text("old")
    (folder / "sub" / "more").write_text("old")
    return folder


def content(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def write(folder, text="new", then=None):
    with written_whole(folder) as temporary:
        (temporary / OURS).write_text(text)
        (temporary / "sub").mkdir()
        (temporary / "sub" / text).write_text(text)
        if then is not None:
            raise then


def failing_rename(monkeypatch, error, which):
    """Let the ``which``-th rename from now on raise ``error`` instead."""
    rename, calls = Path.rename, []

    def rename_or_fail(self, target):
        calls.append(target)
        if len(calls) == which:
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", rename_or_fail)


def test_a_new_folder_appears_whole_with_its_parents(tmp_path):
    write(tmp_path / "a" / "b" / "out")

    assert content(tmp_path) == {f"a/b/out/{OURS}": "new", "a/b/out/sub/new": "new"}
    assert (tmp_path / "a" / "b" / "out").stat().st_mode & 0o777 == 0o755


def test_an_earlier_folder_is_replaced_at_the_end_and_wholly(earlier):
    with written_whole(earlier) as temporary:
        (temporary / OURS).write_text("new")
        assert temporary.parent == earlier.parent  # one file system, so that a rename will do
        assert content(earlier)[OURS] == "old"

    assert content(earlier.parent) == {f"out/{OURS}": "new"}
    assert list(earlier.parent.iterdir()) == [earlier]


def test_a_relative_folder_is_the_one_of_the_beginning(earlier, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with written_whole(Path("out")) as temporary:
        (temporary / OURS).write_text("new")
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")

    assert content(earlier) == {OURS: "new"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_end_by_exception_leaves_everything_as_it_was(earlier, error):
    before = content(earlier)
    with pytest.raises(error):
        write(earlier, then=error)

    assert content(earlier) == before
    assert list(earlier.parent.iterdir()) == [earlier]


def test_a_first_result_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "out", then=KeyboardInterrupt)

    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_and_leaves_everything_as_it_was(earlier):
    before = content(earlier)
    with pytest.raises(OutputError, match="could not be completed: No space left"):
        write(earlier, then=OSError(errno.ENOSPC, "No space left on device"))

    assert content(earlier) == before
    assert list(earlier.parent.iterdir()) == [earlier]


@pytest.mark.parametrize("which", [1, 2])
@pytest.mark.parametrize(
    ("error", "seen"),
    [(PermissionError(errno.EACCES, "denied"), OutputError), (KeyboardInterrupt(), KeyboardInterrupt)],
)
def test_an_end_between_the_renames_keeps_the_earlier_result(earlier, monkeypatch, which, error, seen):
    before = content(earlier)
    failing_rename(monkeypatch, error, which)
    with pytest.raises(seen):
        write(earlier)

    assert content(earlier) == before
    assert list(earlier.parent.iterdir()) == [earlier]


def test_writers_at_once_leave_one_whole_result_and_no_rubbish(tmp_path):
    folder, failures = tmp_path / "out", []
    ready = threading.Barrier(4, timeout=20)

    def writer(text):
        for _ in range(25):
            try:
                with written_whole(folder) as temporary:
                    for name in ("one", "two"):
                        (temporary / name).write_text(text)
                    ready.wait()  # all replace the folder at the same moment
            except OutputError as error:
                failures.append(error)

    threads = [threading.Thread(target=writer, args=(text,)) for text in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert list(tmp_path.iterdir()) == [folder]
    assert set(content(folder)) == {"one", "two"}
    assert len(set(content(folder).values())) == 1
    assert len(failures) < 100  # somebody got through


def test_another_writer_between_the_renames_wins(earlier, monkeypatch):
    """While one has moved the old result away, another puts its own in place: that one stays."""
    rename = Path.rename

    def rename_and_be_overtaken(self, target):
        result = rename(self, target)
        if target.name == "old":
            earlier.mkdir()
            (earlier / "other").write_text("other")
        return result

    monkeypatch.setattr(Path, "rename", rename_and_be_overtaken)
    with pytest.raises(OutputError, match="could not be completed"):
        write(earlier)

    assert content(earlier.parent) == {"out/other": "other"}


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"), written_whole(tmp_path / "file" / "out"):
        pytest.fail("nothing may be computed for an output that has no place")


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("place", ["out", "a/b/out", "empty"])
def test_free_places_are_free_and_stay_untouched(tmp_path, place, force):
    (tmp_path / "empty").mkdir()
    check_free(tmp_path / place, force=force, ours=OURS)

    assert [path.name for path in tmp_path.iterdir()] == ["empty"]
    assert list((tmp_path / "empty").iterdir()) == []


def test_an_earlier_result_is_free_with_force_only(earlier):
    check_free(earlier, force=True, ours=OURS)
    with pytest.raises(OutputError, match="not empty"):
        check_free(earlier, force=False, ours=OURS)

    assert content(earlier)[OURS] == "old"


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(
    ("place", "words"),
    [("file", "is a file"), ("file/out", "cannot be written: Not a directory"), ("file/a/out", "cannot be written")],
)
def test_a_file_in_the_way_is_refused(tmp_path, place, words, force):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(OutputError, match=words):
        check_free(tmp_path / place, force=force, ours=OURS)

    assert (tmp_path / "file").read_text() == "kept"


def test_a_foreign_folder_is_refused_even_with_force(earlier):
    (earlier / OURS).unlink()
    with pytest.raises(OutputError, match="not replaced even with --force"):
        check_free(earlier, force=True, ours=OURS)

    assert content(earlier)


@pytest.mark.parametrize("place", ["out", "a/b/out", "empty"])
def test_an_unwritable_place_is_refused(tmp_path, monkeypatch, place):
    (tmp_path / "empty").mkdir()

    def denied(suffix=None, prefix=None, dir=None):
        assert Path(dir) == tmp_path  # where the temporary folder would stand
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("tempfile.mkdtemp", denied)
    with pytest.raises(OutputError, match="cannot be written: Permission denied"):
        check_free(tmp_path / place, force=False, ours=OURS)
