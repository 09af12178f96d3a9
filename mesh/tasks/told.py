"""A task is told the tokenizer: `use_tokenizer(tokenizer)`, once, after it was made.

In every process that makes the task, the ranks and those that score. A task that counts tokens, or
that makes its prompts fit, does not have to look for the directory.
"""

from __future__ import annotations

from typing import Any

from mesh.config.user_code import call_user_code
from mesh.tasks import TokenizerFiles

METHOD = "use_tokenizer"


def tell_tokenizer(task: Any, files: TokenizerFiles | None) -> None:
    """Call the task's `use_tokenizer`, if it has one. ValueError where it raises, or where there is
    no tokenizer to tell.
    """
    method = getattr(task, METHOD, None)
    if method is None:
        return
    if files is None:
        raise ValueError(f"the task's {METHOD} needs the tokenizer, which could not be read")
    from mesh.text.tokenizer import load_tokenizer  # scoring processes start without it

    tokenizer = load_tokenizer(files.directory, files.model)
    call_user_code(f"{METHOD} of {task!r}", lambda: method(tokenizer))
