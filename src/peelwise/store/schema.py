"""The schema of a run history, and how a file of any version is opened."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import cache
from pathlib import Path

from peelwise.errors import PeelwiseError, StoreError
from peelwise.records.plain_text import clean

APPLICATION_ID = 0x7065656C  # "peel": tells our files from everybody else's
# What a history holds; the table of profiles only repeats numbers of statistics for quick reading.
TABLES = ("runs", "blocks", "steps", "probes", "statistics", "matrices", "verdicts", "events")

_NEW_TABLE = "CREATE TABLE "

# What takes a file from one schema version to the next; the file's user_version counts how many were applied.
MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """CREATE TABLE runs (
            id INTEGER PRIMARY KEY, name TEXT NOT NULL, started TEXT NOT NULL, ended TEXT, status TEXT NOT NULL,
            host TEXT NOT NULL, pid INTEGER NOT NULL, architecture TEXT NOT NULL, parameters INTEGER NOT NULL,
            budget REAL, in_distribution INTEGER NOT NULL, probe TEXT NOT NULL, settings TEXT NOT NULL,
            versions TEXT NOT NULL)""",
        """CREATE TABLE blocks (
            run_id INTEGER NOT NULL REFERENCES runs, block INTEGER NOT NULL, name TEXT NOT NULL,
            PRIMARY KEY (run_id, block)) WITHOUT ROWID""",
        """CREATE TABLE steps (
            id INTEGER PRIMARY KEY, run_id INTEGER NOT NULL REFERENCES runs, step INTEGER NOT NULL,
            time REAL NOT NULL, loss REAL, share REAL NOT NULL)""",
        "CREATE INDEX steps_of_run ON steps (run_id, step)",
        """CREATE TABLE probes (
            id INTEGER PRIMARY KEY, run_id INTEGER NOT NULL REFERENCES runs, step INTEGER NOT NULL,
            time REAL NOT NULL, kind TEXT NOT NULL, probe_loss REAL NOT NULL, slope REAL, slope_low REAL,
            slope_high REAL, still_falling INTEGER, seconds REAL NOT NULL, share REAL NOT NULL,
            letters TEXT NOT NULL)""",
        "CREATE INDEX probes_of_run ON probes (run_id, step)",
        # Clustered by record, so that writing appends; one block's history is one look-up per record.
        """CREATE TABLE statistics (
            probe_id INTEGER NOT NULL REFERENCES probes, name TEXT NOT NULL, block INTEGER NOT NULL,
            value REAL NOT NULL, low REAL, high REAL, to_median REAL, to_trend REAL,
            PRIMARY KEY (probe_id, name, block)) WITHOUT ROWID""",
        """CREATE TABLE matrices (
            probe_id INTEGER NOT NULL REFERENCES probes, block INTEGER NOT NULL, matrix TEXT NOT NULL,
            share REAL NOT NULL, PRIMARY KEY (probe_id, block, matrix)) WITHOUT ROWID""",
        """CREATE TABLE verdicts (
            probe_id INTEGER NOT NULL REFERENCES probes, block INTEGER NOT NULL, colour TEXT NOT NULL,
            reason TEXT NOT NULL, measured_step INTEGER, PRIMARY KEY (probe_id, block)) WITHOUT ROWID""",
        """CREATE TABLE events (
            id INTEGER PRIMARY KEY, run_id INTEGER NOT NULL REFERENCES runs, step INTEGER NOT NULL,
            time REAL NOT NULL, level TEXT NOT NULL, kind TEXT NOT NULL, block INTEGER, since_step INTEGER,
            text TEXT NOT NULL, suggestion TEXT NOT NULL)""",
        "CREATE INDEX events_of_run ON events (run_id, id)",
        """CREATE VIEW history AS
            SELECT probes.run_id, probes.step, probes.kind, statistics.block, blocks.name AS block_name,
                   statistics.name AS statistic, value, low, high, to_median, to_trend,
                   substr(probes.letters, statistics.block + 1, statistics.block >= 0) AS letter
            FROM statistics JOIN probes ON probes.id = statistics.probe_id
            LEFT JOIN blocks ON blocks.run_id = probes.run_id AND blocks.block = statistics.block""",
    ),
    # Clustered by statistic: a measurement appends at a few places; a statistic is one stretch of the file.
    (
        """CREATE TABLE profiles (
            name TEXT NOT NULL, kind TEXT NOT NULL, probe_id INTEGER NOT NULL REFERENCES probes, numbers BLOB NOT NULL,
            PRIMARY KEY (name, kind, probe_id)) WITHOUT ROWID""",
    ),
)


def opened_for_writing(path: Path) -> sqlite3.Connection:
    """Open or make a file, at this version's schema; the caller holds the writer's lock."""
    # A trainer may call from another thread than the one that began; it does so one call at a time.
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    try:
        _check_ours(connection, path)
        connection.execute("PRAGMA synchronous = NORMAL")
        # Where the file system cannot share memory, SQLite stays with a rollback journal: slower, as safe.
        connection.execute("PRAGMA journal_mode = WAL")
        _migrate(connection)
    except BaseException:
        connection.close()
        raise
    return connection


def opened_for_reading(path: Path) -> sqlite3.Connection:
    """Open a file without ever writing to it; what one of an older schema lacks is made in memory."""
    address = f"{path.absolute().as_uri()}?mode=ro"
    connection = sqlite3.connect(address, uri=True, isolation_level=None)
    try:
        try:
            version = _check_ours(connection, path)
        except sqlite3.OperationalError:
            if path.with_name(f"{path.name}-wal").exists():
                raise
            # A folder that cannot be written has no room for the shared memory of a live file; this one is at rest.
            connection.close()
            connection = sqlite3.connect(f"{address}&immutable=1", uri=True, isolation_level=None)
            version = _check_ours(connection, path)
        missing = [statement for script in MIGRATIONS[version:] for statement in script]
        if version and all(statement.startswith(_NEW_TABLE) for statement in missing):
            # Empty tables stand beside the file, which may be far too large to copy at every reading.
            connection.execute("PRAGMA temp_store = MEMORY")
            for statement in missing:
                connection.execute(statement.replace(_NEW_TABLE, "CREATE TEMPORARY TABLE ", 1))
        elif missing:
            with closing(connection) as source:
                connection = sqlite3.connect(":memory:", isolation_level=None)
                source.backup(connection)
            _migrate(connection)
    except BaseException:
        connection.close()
        raise
    connection.row_factory = sqlite3.Row
    return connection


def _check_ours(connection: sqlite3.Connection, path: Path) -> int:
    """Return the schema version of a file that is ours, or empty; refuse any other."""
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if application != APPLICATION_ID and (tables or version or application):
        raise StoreError(f"{path} is a database, but no run history of peelwise. Choose another file.")
    if version < 0:
        raise StoreError(f"{path} is damaged: it says that its schema is {version}.")
    if version > len(MIGRATIONS):
        raise StoreError(
            f"{path} has schema {version}; this version knows up to {len(MIGRATIONS)}. Update peelwise, "
            "or choose another file."
        )
    # A view in the place of a table could take for ever, and a table with other columns hold anything.
    expected = _tables(MIGRATIONS[:version])
    found = dict(connection.execute("SELECT name, sql FROM sqlite_master WHERE type = 'table'"))
    changed = [name for name, sql in expected.items() if found.get(name) != sql]
    if changed:
        raise StoreError(f"{path} is damaged: its tables are not those of schema {version} ({', '.join(changed)}).")
    return int(version)


@cache
def _tables(scripts: tuple[tuple[str, ...], ...]) -> dict[str, str]:
    """Return name -> SQL of the tables that migrations make, as SQLite words it."""
    with closing(sqlite3.connect(":memory:")) as connection:
        for script in scripts:
            for statement in script:
                connection.execute(statement)
        return dict(connection.execute("SELECT name, sql FROM sqlite_master WHERE type = 'table'"))


def _migrate(connection: sqlite3.Connection) -> None:
    """Bring a file to this version's schema, whole or not at all."""
    with atomic(connection):
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        for script in MIGRATIONS[version:]:
            for statement in script:
                connection.execute(statement)
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")


@contextmanager
def atomic(connection: sqlite3.Connection) -> Iterator[None]:
    """Make everything inside one transaction."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        # After some errors (a full disk) SQLite has rolled back by itself.
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


@contextmanager
def explained(path: Path, verb: str = "written") -> Iterator[None]:
    """Turn SQLite's errors into ours."""
    try:
        yield
    except sqlite3.ProgrammingError:
        raise  # a closed connection or wrong SQL is our caller's or our own mistake
    except sqlite3.Error as error:
        raise StoreError(f"{path} cannot be {verb}: {reason(path, error)}.") from error
    except UnicodeError as error:  # of SQLite's own message, which quotes what it could not read
        raise StoreError(f"{path} is damaged: its tables are no text.") from error


@contextmanager
def sound(path: Path) -> Iterator[None]:
    """Take what fails on a file's content for damage of the file: text that is no JSON, letters that no verdict has."""
    try:
        yield
    except PeelwiseError:
        raise
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError) as error:
        what = clean(f"{type(error).__name__}: {error}"[:200])
        raise StoreError(f"{path} is damaged: what it holds does not go together ({what}).") from error


def reason(path: Path, error: sqlite3.Error) -> str:
    """Return SQLite's words, or clearer ones."""
    words = clean(str(error))[:200]  # it quotes what it could not read
    if words == "interrupted":
        return "that takes too long; it is damaged, or very large"
    if "not a database" in words:
        return "it is no SQLite file"
    if "unable to open" in words and not path.parent.is_dir():
        return f"there is no folder {path.parent}"
    return words
