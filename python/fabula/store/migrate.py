"""Migrates a database to the newest schema version, with alembic as a library."""

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
_alembic = threading.Lock()  # alembic's context is global to the process
_POSTGRES_LOCK = 0x466162756C61  # our key among the database's advisory locks


def migrate(connection: sa.Connection, place: str, *, revision: str = "head") -> None:
    """Migrates a new or older database to `revision` in one transaction.

    Args:
        connection: without an open transaction.
        place: name of the database, for messages.
        revision: a schema version; tests use older ones.

    Raises:
        StoreTooNew: its schema version is unknown.
        StoreError: it has tables of another program.
    """
    config = Config()
    config.set_main_option("script_location", str(_SCRIPTS).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    scripts = ScriptDirectory.from_config(config)
    with _alembic, connection.begin():
        if connection.dialect.name == "postgresql":  # another process may open the same database at the same time
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
