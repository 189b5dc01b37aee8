"""The database models."""

from app.models.conversation import Conversation
from app.models.message import Message
from app.models.user import User

__all__ = ["Conversation", "Message", "User"]
