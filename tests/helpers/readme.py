"""The README and its code blocks."""

import re

from tests.helpers.server import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def get_block(language, text):
    """Return the only code block of a language that contains a text."""
    blocks = re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)
    (block,) = [block for block in blocks if text in block]
    return block
