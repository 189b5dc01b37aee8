"""Sends that never double: the key under which a message was sent, once in a conversation."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

INDEX = "ix_message_conversation_id_idempotency_key"
HAS_KEY = sa.text("idempotency_key IS NOT NULL")


def upgrade():
    op.add_column("message", sa.Column("idempotency_key", sa.String(255)))
    op.create_index(
        INDEX,
        "message",
        ["conversation_id", "idempotency_key"],
        unique=True,
        sqlite_where=HAS_KEY,
        postgresql_where=HAS_KEY,
    )


def downgrade():
    op.drop_index(INDEX, "message")
    op.drop_column("message", "idempotency_key")
