"""Warnings about texts that a model does not read as they are written, once at the start.

Looked at are the prompts of the evaluation, and those of the task's data set or else of step 1;
where solutions are taught, the solutions instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch.distributed as dist

from mesh.lifecycle.process import Process
from mesh.tasks import Draw, data_set, draw_prompts
from mesh.tasks.prompts import SHOWN, PromptSource
from mesh.tasks.solution import solution_of
from mesh.text.fidelity import Controls, control_ids, read_text
from mesh.text.tokenizer import Tokenizer
from mesh.types import Prompt

Places = list[int]
"""Indices of texts among those that were looked at."""


def prompt_warnings(
    process: Process, source: PromptSource, held_out: Sequence[Prompt], num: int
) -> list[str]:
    """Warnings about the prompts of a program; num: that training draws a step, 0: none.
    Collective.
    """
    training = [] if num == 0 else data_set(source.task) or draw_prompts(source.task, Draw(0, num))
    prompts = [*held_out, *training]
    if source.teaches:
        solutions = [solution_of(source.task, prompt) for prompt in prompts]
        texts = [text for solution in solutions for text in solution.texts]
        return text_warnings(process, source.tokenizer, "solution", texts)
    return text_warnings(process, source.tokenizer, "prompt", [written(p) for p in prompts])


def written(prompt: Prompt) -> str:
    """Text of a prompt that a user has written: of messages their contents, of token ids none."""
    contents = [message.get("content") for message in prompt.messages]
    return "\n".join(text for text in (prompt.text, *contents) if isinstance(text, str) and text)


def text_warnings(
    process: Process, tokenizer: Tokenizer, what: str, texts: Sequence[str]
) -> list[str]:
    """Warnings about texts, each of them a `what`, on every rank. Ranks share the work of encoding
    them. Collective.
    """
    rank, ranks = dist.get_rank(process.cpu_group), dist.get_world_size(process.cpu_group)
    controls = control_ids(tokenizer)
    mine: dict[Controls, Places] = {}
    changed: Places = []
    for place in range(rank, len(texts), ranks):
        reading = read_text(tokenizer, texts[place], controls)
        if reading is not None:
            mine.setdefault(reading.controls, []).append(place)
            changed += [place] if reading.came_back is not None else []
    shares = process.gather((mine, changed))
    places: dict[Controls, Places] = {}
    for share, _ in shares:
        for key, found in share.items():
            places.setdefault(key, []).extend(found)
    changed = sorted(place for _, found in shares for place in found)
    return [
        *control_lines(tokenizer, what, texts, places),
        *([changed_line(tokenizer, what, texts, changed)] if changed else []),
    ]


def control_lines(
    tokenizer: Tokenizer, what: str, texts: Sequence[str], places: Mapping[Controls, Places]
) -> list[str]:
    """A line for each control token of which some texts have more than others. What all have alike
    is a chat template's.
    """
    lines = []
    for control in sorted({control for key in places for control, _ in key}):
        counts = {key: dict(key).get(control, 0) for key in places}
        fewest = min(counts.values())
        more = sorted(i for key in places if counts[key] > fewest for i in places[key])
        if more:
            end = ", which ends a response" if control in tokenizer.eos_ids else ""
            lines.append(
                f"warning: the {what} {texts[more[0]][:SHOWN]!r} has the control token "
                f"{tokenizer.backend.id_to_token(control)!r}{end}, more often than other {what}s "
                f"({len(more)} of {len(texts)} {what}s): the model does not read it as text; take "
                "it out of the data, unless a chat template has written it"
            )
    return lines


def changed_line(tokenizer: Tokenizer, what: str, texts: Sequence[str], changed: Places) -> str:
    """The line for texts that do not come back from their tokens, with the first."""
    text = texts[changed[0]]
    reading = read_text(tokenizer, text, frozenset())
    assert reading is not None, "a text that came back as another cannot be encoded"
    return (
        f"warning: the tokenizer in {tokenizer.directory} loses a part of the {what} "
        f"{text[:SHOWN]!r}, which comes back as {reading.came_back!r} ({len(changed)} of "
        f"{len(texts)} {what}s): the model sees another text than the task's score; write the "
        f"{what}s as they come back, or set model.tokenizer to one that keeps them"
    )
