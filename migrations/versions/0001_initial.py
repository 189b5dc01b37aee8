"""The tables user, conversation and message."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

Integer64 = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
Timestamp = sa.DateTime(timezone=True)


def partial_index(condition):
    """Return the arguments that make an index cover only the rows of a condition."""
    return {"sqlite_where": sa.text(condition), "postgresql_where": sa.text(condition)}


def upgrade():
    op.create_table(
        "user",
        sa.Column("id", Integer64, nullable=False),
        sa.Column("user_id", Integer64),
        sa.Column("username", sa.String(80), nullable=False),
        sa.Column("password_hash", sa.String(255), nullable=False),
        sa.Column("is_logged_in", sa.Boolean(), nullable=False),
        sa.Column("last_login", Timestamp),
        sa.Column("last_logout", Timestamp),
        sa.Column("session_token", sa.String(43)),
        sa.Column("is_disabled", sa.Boolean(), server_default=sa.false(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_user"),
        sa.UniqueConstraint("user_id", name="uq_user_user_id"),
        sa.UniqueConstraint("username", name="uq_user_username"),
        sa.UniqueConstraint("session_token", name="uq_user_session_token"),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "conversation",
        sa.Column("id", Integer64, nullable=False),
        sa.Column("name", sa.String(255), nullable=False),
        sa.Column("user_id", Integer64, nullable=False),
        sa.Column("created_at", Timestamp, nullable=False),
        sa.Column("updated_at", Timestamp, nullable=False),
        sa.Column("archived_at", Timestamp),
        sa.Column("title_requested_at", Timestamp),
        sa.ForeignKeyConstraint(["user_id"], ["user.id"], name="fk_conversation_user_id_user", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name="pk_conversation"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_conversation_user_id_id", "conversation", ["user_id", "id"])
    latest = ["user_id", "updated_at", "id"]
    op.create_index("ix_conversation_user_id_updated_at_id", "conversation", latest)
    for name, condition in (("archived", "archived_at IS NOT NULL"), ("unarchived", "archived_at IS NULL")):
        op.create_index(f"ix_conversation_{name}", "conversation", latest, **partial_index(condition))
    op.create_table(
        "message",
        sa.Column("id", Integer64, nullable=False),
        sa.Column("sender", sa.String(4), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.Column("conversation_id", Integer64, nullable=False),
        sa.Column("created_at", Timestamp, nullable=False),
        sa.Column("status", sa.String(11), server_default="complete", nullable=False),
        sa.Column("parent_id", Integer64),
        sa.Column("is_current", sa.Boolean(), server_default=sa.true(), nullable=False),
        sa.Column("error", sa.String(255)),
        sa.Column("heartbeat_at", Timestamp),
        sa.Column("idempotency_key", sa.String(255)),
        sa.CheckConstraint("sender IN ('user', 'bot')", name=op.f("ck_message_sender")),
        sa.CheckConstraint(
            "status IN ('complete', 'in_progress', 'stopped', 'failed', 'truncated')", name=op.f("ck_message_status")
        ),
        sa.CheckConstraint("sender = 'bot' OR status = 'complete'", name=op.f("ck_message_user_status")),
        sa.CheckConstraint("(status = 'in_progress') = (heartbeat_at IS NOT NULL)", name=op.f("ck_message_heartbeat")),
        sa.ForeignKeyConstraint(
            ["conversation_id"], ["conversation.id"], name="fk_message_conversation_id_conversation", ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(["parent_id"], ["message.id"], name="fk_message_parent_id_message"),
        sa.PrimaryKeyConstraint("id", name="pk_message"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_message_conversation_id_id", "message", ["conversation_id", "id"])
    op.create_index(
        "ix_message_conversation_id_idempotency_key",
        "message",
        ["conversation_id", "idempotency_key"],
        unique=True,
        **partial_index("idempotency_key IS NOT NULL"),
    )
    op.create_index("ix_message_parent_id", "message", ["parent_id"])
    op.create_index("ix_message_in_progress", "message", ["conversation_id"], **partial_index("status = 'in_progress'"))


def downgrade():
    op.drop_table("message")
    op.drop_table("conversation")
    op.drop_table("user")
