"""Tasks whose score functions go wrong, as user code does. A module that imports no torch: the
processes that score load it, and each test starts some.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

from mesh.tasks.spell_backward import SpellBackward
from mesh.types import Prompt


@dataclass(frozen=True)
class Faulty(SpellBackward):
    """Does what the response says; else its reward is the number that the response is."""

    notes: str = ""

    def score(self, prompt: Prompt, response: str) -> float:
        word, _, rest = response.partition(" ")
        if word.startswith("-") or word[:1].isdigit():
            return float(word)
        return float(getattr(self, word)(rest))

    def note(self, name: str) -> float:
        """Leaves the ids of this process and its parent, the keeper."""
        Path(self.notes, name).write_text(f"{os.getpid()} {os.getppid()}")
        return 0.5

    def hang(self, _: str) -> float:
        while True:
            time.sleep(1)

    def hang_in_c(self, _: str) -> float:
        """Holds the interpreter's lock for years."""
        return sum(1 for _ in [0]) + (pow(3, 10**9) % 7)

    def hang_with_children(self, name: str) -> float:
        """One child in the process group, one in a session of its own, and one orphan."""
        sleep = ["sleep", "1000"]
        orphan = "import subprocess; print(subprocess.Popen(['sleep', '1000'], stdout=2).pid)"
        pids = [
            subprocess.Popen(sleep).pid,
            subprocess.Popen(sleep, start_new_session=True).pid,
            int(subprocess.check_output([sys.executable, "-c", orphan], start_new_session=True)),
        ]
        Path(self.notes, name).write_text(" ".join(map(str, [os.getpid(), os.getppid(), *pids])))
        return self.hang("")

    def crash(self, name: str) -> float:
        os.kill(os.getpid(), signal.Signals[name])
        return self.hang("")

    def exit(self, status: str) -> float:
        os._exit(int(status))

    def leave(self, status: str) -> float:
        sys.exit(int(status))

    def fail(self, message: str) -> float:
        raise KeyError(message)

    def say(self, text: str) -> float:
        print(text)
        print(text.upper(), file=sys.stderr)
        return 0.5

    def fork(self, _: str) -> float:
        """The copy returns as well."""
        os.fork()
        return 0.75

    def count_modules(self, name: str) -> float:
        return float(name in sys.modules)


@dataclass(frozen=True)
class HungNow(SpellBackward):
    """Hangs over the first response to prompt 1 of a step, and over any in `seed` 1."""

    def score(self, prompt: Prompt, response: str) -> float:
        while prompt.prompt_id == 1 and response != prompt.answer:
            time.sleep(1)
        return super().score(prompt, response)


@dataclass(frozen=True)
class FromOne(SpellBackward):
    """Numbers its training prompts from 1."""

    def train_prompts(self, step: int, num: int) -> list[Prompt]:
        prompts = super().train_prompts(step, num)
        return [replace(prompt, prompt_id=prompt.prompt_id + 1) for prompt in prompts]
