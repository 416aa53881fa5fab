"""Sessions, turns and tags."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "sessions",
        sa.Column("tenant", sa.Text, primary_key=True),
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("fingerprint", sa.Text, nullable=False),
        sa.Column("settings", sa.Text, nullable=False),
        sa.Column("base_id", sa.Text),
        sa.Column("head_id", sa.Text),
        sa.Column("undone", sa.Text, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("updated_at", sa.Double, nullable=False),
        sa.Column("checksum", sa.LargeBinary, nullable=False),
    )
    op.create_index("sessions_base", "sessions", ["base_id"])
    op.create_table(
        "turns",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("tenant", sa.Text, nullable=False),
        sa.Column("session_id", sa.Text),
        sa.Column("parent_id", sa.Text, sa.ForeignKey("turns.id")),
        sa.Column("number", sa.Integer, nullable=False),
        sa.Column("chat", sa.Integer, nullable=False),
        sa.Column("prompt", sa.LargeBinary, nullable=False),
        sa.Column("text", sa.LargeBinary, nullable=False),
        sa.Column("kept", sa.Integer, nullable=False),
        sa.Column("prompt_ids", sa.LargeBinary, nullable=False),
        sa.Column("token_ids", sa.LargeBinary, nullable=False),
        sa.Column("params", sa.Text, nullable=False),
        sa.Column("finish_reason", sa.Text),
        sa.Column("timings", sa.Text),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("checksum", sa.LargeBinary, nullable=False),
        sa.ForeignKeyConstraint(["tenant", "session_id"], ["sessions.tenant", "sessions.id"]),
    )
    op.create_index("turns_session", "turns", ["tenant", "session_id"])
    op.create_index("turns_parent", "turns", ["parent_id"])
    op.create_table(
        "tags",
        sa.Column("turn_id", sa.Text, sa.ForeignKey("turns.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("tag", sa.Text, primary_key=True),
    )
