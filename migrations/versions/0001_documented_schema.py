"""The documented schema: users, their conversations, the messages in them."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

Integer64 = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
Moment = sa.DateTime(timezone=True)


def upgrade():
    op.create_table(
        "user",
        sa.Column("id", Integer64, nullable=False),
        sa.Column("user_id", Integer64, sa.Computed("id", persisted=True), nullable=False),
        sa.Column("username", sa.String(80), nullable=False),
        sa.Column("password_hash", sa.String(255), nullable=False),
        sa.Column("is_logged_in", sa.Boolean(), nullable=False),
        sa.Column("last_login", Moment),
        sa.Column("last_logout", Moment),
        sa.PrimaryKeyConstraint("id", name="pk_user"),
        sa.UniqueConstraint("user_id", name="uq_user_user_id"),
        sa.UniqueConstraint("username", name="uq_user_username"),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "conversation",
        sa.Column("id", Integer64, nullable=False),
        sa.Column("name", sa.String(255), nullable=False),
        sa.Column("user_id", Integer64, nullable=False),
        sa.Column("created_at", Moment, nullable=False),
        sa.ForeignKeyConstraint(["user_id"], ["user.id"], name="fk_conversation_user_id_user", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name="pk_conversation"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_conversation_user_id_id", "conversation", ["user_id", "id"])
    op.create_table(
        "message",
        sa.Column("id", Integer64, nullable=False),
        sa.Column("sender", sa.String(4), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.Column("conversation_id", Integer64, nullable=False),
        sa.Column("created_at", Moment, nullable=False),
        sa.CheckConstraint("sender IN ('user', 'bot')", name=op.f("ck_message_sender")),
        sa.ForeignKeyConstraint(
            ["conversation_id"], ["conversation.id"], name="fk_message_conversation_id_conversation", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name="pk_message"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_message_conversation_id_id", "message", ["conversation_id", "id"])


def downgrade():
    op.drop_table("message")
    op.drop_table("conversation")
    op.drop_table("user")
