"""Tables of the newest schema version. migrations/ creates them, so a change here needs a revision there."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Dialect

VERSION_TABLE = "fabula_version"  # not alembic's default: others may share a PostgreSQL database


class Bytes(sa.LargeBinary):
    """Bytes without conversion: a damaged value must reach the checksum, whatever its type."""

    def result_processor(self, dialect: Dialect, coltype: object) -> Any:  # noqa: ARG002
        return None


metadata = sa.MetaData()

sessions = sa.Table(
    "sessions",
    metadata,
    sa.Column("tenant", sa.Text, primary_key=True),
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("model", sa.Text, nullable=False),
    sa.Column("fingerprint", sa.Text, nullable=False),
    sa.Column("settings", sa.Text, nullable=False),  # JSON
    sa.Column("base_id", sa.Text),
    sa.Column("head_id", sa.Text),
    sa.Column("undone", sa.Text, nullable=False),  # JSON
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("updated_at", sa.Double, nullable=False),
    sa.Column("checksum", Bytes, nullable=False),
    sa.Index("sessions_base", "base_id"),
)

turns = sa.Table(
    "turns",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("tenant", sa.Text, nullable=False),
    sa.Column("session_id", sa.Text),
    sa.Column("parent_id", sa.Text, sa.ForeignKey("turns.id")),
    sa.Column("number", sa.Integer, nullable=False),
    sa.Column("chat", sa.Integer, nullable=False),
    sa.Column("prompt", Bytes, nullable=False),  # UTF-8
    sa.Column("text", Bytes, nullable=False),  # UTF-8
    sa.Column("kept", sa.Integer, nullable=False),
    sa.Column("prompt_ids", Bytes, nullable=False),  # little-endian int32
    sa.Column("token_ids", Bytes, nullable=False),
    sa.Column("params", sa.Text, nullable=False),  # JSON
    sa.Column("finish_reason", sa.Text),
    sa.Column("timings", sa.Text),  # JSON
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("checksum", Bytes, nullable=False),
    sa.Column("cut", sa.Text),  # JSON
    sa.Column("said", sa.Text),  # JSON
    sa.ForeignKeyConstraint(["tenant", "session_id"], ["sessions.tenant", "sessions.id"]),
    sa.Index("turns_session", "tenant", "session_id"),
    sa.Index("turns_parent", "parent_id"),
)

tags = sa.Table(
    "tags",
    metadata,
    sa.Column("turn_id", sa.Text, sa.ForeignKey("turns.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("tag", sa.Text, primary_key=True),
)
