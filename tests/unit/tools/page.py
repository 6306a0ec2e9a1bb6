"""The code of docs/tools.md, by its headings."""

import re
from pathlib import Path

_PAGE = Path(__file__).parents[3] / "docs/tools.md"


def code_by_heading() -> dict[str, list[str]]:
    """The code of each section; of what stands before the first, by ""."""
    sections = re.split(r"^## (.*)$", _PAGE.read_text(), flags=re.MULTILINE)
    found = {}
    for heading, text in zip(["", *sections[1::2]], sections[::2], strict=True):
        blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        if blocks:
            found[heading] = blocks
    return found
