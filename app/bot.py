"""The bot: a conversation's history in, pieces of reply out. It knows no HTTP and no database."""


def simulated_bot(history):
    """Yield the pieces of a reply to `history`, a list of (sender, text), oldest first.

    No model and no chance: the same history always gets the same reply.
    """
    said = history[-1][1]
    yield f"You said: {said}"
