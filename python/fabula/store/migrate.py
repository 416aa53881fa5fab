"""Brings a database to the newest schema version, with alembic and without its command line or configuration file."""

from __future__ import annotations

import threading
from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from fabula.errors import StoreError, StoreTooNew
from fabula.store.schema import VERSION_TABLE

_SCRIPTS = Path(__file__).with_name("migrations")
_alembic = threading.Lock()  # its context is the process's, so one migration runs at a time
_POSTGRES_LOCK = 0x466162756C61  # a number of our own among the database's advisory locks


def migrate(connection: sa.Connection, place: str, *, revision: str = "head") -> None:
    """Takes a database, new or of an older version, to `revision`: all the way or, when it fails, not at all.

    Args:
        connection: in no transaction.
        place: the database's name for messages.
        revision: a schema version; tests ask for older ones.

    Raises:
        StoreTooNew: its version is none of those known here.
        StoreError: the database has tables already, but none of Fabula's.
    """
    config = Config()
    config.set_main_option("script_location", str(_SCRIPTS).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    scripts = ScriptDirectory.from_config(config)
    with _alembic, connection.begin():
        if connection.dialect.name == "postgresql":  # another process may open the same database now
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_POSTGRES_LOCK)))
        current = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE}).get_current_revision()
        if current is None and sa.inspect(connection).get_table_names():
            raise StoreError(f"{place}: holds the tables of some other program; give an empty place", path=place)
        if current is not None and current not in {script.revision for script in scripts.walk_revisions()}:
            raise StoreTooNew(
                f"{place}: has schema version {current}, which a newer Fabula wrote; this one knows versions up to "
                f"{scripts.get_current_head()}",
                path=place,
            )
        if current != scripts.get_current_head():
            command.upgrade(config, revision)
