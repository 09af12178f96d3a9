"""One HTML file of the parts in page/ and the data of a report.

Nothing is fetched: styles and scripts stand in the file, and its Content-Security-Policy forbids
the network. The data is JSON in a script element that no browser executes.
"""

from __future__ import annotations

import json
import re
from html import escape
from pathlib import Path
from typing import Any

PARTS = Path(__file__).parent / "page"
UNSAFE = re.compile("[<>&\u2028\u2029\ud800-\udfff]")
PLACE = re.compile(r"\{\{(\w+)\}\}")


def page(data: dict[str, Any], connect: str = "'none'") -> str:
    """The file. `connect`: addresses that scripts may read from, as a Content-Security-Policy
    writes them; 'self' for a page that is served and updates itself."""
    filled = {
        "title": escape(title_of(data)).encode("utf-8", "replace").decode(),
        "connect": connect,
        "styles": joined("style", "*.css"),
        "scripts": joined("script", "*.js"),
        "data": embedded(data),
    }
    return PLACE.sub(lambda found: filled[found[1]], (PARTS / "page.html").read_text())


def title_of(data: dict[str, Any]) -> str:
    """The heading of the first run; a live page may begin before there is one."""
    runs = data["runs"]
    return str(runs[0]["headline"]["title"]) if runs else "Waiting for a run"


def joined(element: str, pattern: str) -> str:
    """The files of page/ that match, in the order of their names, each as one element."""
    texts = [path.read_text() for path in sorted(PARTS.glob(pattern))]
    return "\n".join(f"<{element}>\n{text}</{element}>" for text in texts)


def embedded(data: Any) -> str:
    """JSON that can stand in a script element: no character of it ends or opens one, and lone
    surrogates, which UTF-8 lacks, are escaped. Raises ValueError for NaN and infinities."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
