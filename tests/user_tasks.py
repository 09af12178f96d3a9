"""Tasks as users write them, most of them wrong. No torch is imported here: every process that
scores imports this module.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mesh.tasks.draw import is_held_out
from mesh.tasks.response import Response, Score
from mesh.tasks.spell_backward import SpellBackward
from mesh.text.tokenizer import Tokenizer
from mesh.types import Prompt, Reply, TurnText

ORPHAN = "import subprocess; print(subprocess.Popen(['sleep', '1000'], stdout=2).pid)"


@dataclass(frozen=True)
class Flat(SpellBackward):
    """Every response is worth the same."""

    def score(self, prompt: Prompt, response: str) -> float:
        return 0.5


@dataclass(frozen=True)
class Obedient(SpellBackward):
    """The score is the number that the response is, or what a method that it names makes of the
    rest of the response. `notes`: a directory for process ids.
    """

    notes: str = ""

    def score(self, prompt: Prompt, response: str) -> float:
        word, _, rest = response.partition(" ")
        method = getattr(self, word, None)
        return float(word) if method is None else method(rest)

    def note(self, name: str) -> float:
        """Notes this process and its supervisor."""
        self._note(name)
        return 0.5

    def nap(self, value: str) -> float:
        """Takes longer for a smaller number."""
        time.sleep(0.05 * (10 - float(value)))
        return float(value)

    def hang(self, _: str) -> float:
        while True:
            time.sleep(1)

    def hang_in_c(self, _: str) -> float:
        """Backtracks for years, and holds the interpreter's lock."""
        return float(re.match(r"(a+)+$", "a" * 60 + "b") is not None)

    def hang_with_children(self, name: str) -> float:
        """One child in the process group, one in a session of its own, and an orphan there."""
        sleep = ["sleep", "1000"]
        started = [
            subprocess.Popen(sleep).pid,
            subprocess.Popen(sleep, start_new_session=True).pid,
            int(subprocess.check_output([sys.executable, "-c", ORPHAN], start_new_session=True)),
        ]
        self._note(name, started)
        return self.hang("")

    def crash(self, name: str) -> float:
        os.kill(os.getpid(), signal.Signals[name])
        return self.hang("")

    def exit(self, status: str) -> float:
        os._exit(int(status))

    def exit_later(self, status: str) -> float:
        threading.Timer(0.05, os._exit, [int(status)]).start()
        return 0.25

    def leave(self, status: str) -> float:
        sys.exit(int(status))

    def fail(self, message: str) -> float:
        raise KeyError(message)

    def say(self, text: str) -> float:
        print(text, end="")
        print(text.upper(), file=sys.stderr)
        return 0.5

    def fork(self, _: str) -> float:
        """The copy returns as well."""
        os.fork()
        return 0.75

    def has_imported(self, name: str) -> float:
        return float(name in sys.modules)

    def _note(self, name: str, more: list[int] | None = None) -> None:
        path = Path(self.notes, name)
        path.with_suffix(".part").write_text(" ".join(map(str, [*pair_of_ids(), *(more or [])])))
        path.with_suffix(".part").rename(path)


@dataclass(frozen=True)
class Obliging(Obedient):
    """The reply is what the last turn says in JSON, or what a method that it names returns."""

    def reply(self, prompt: Prompt, turns: Sequence[TurnText], seed: int) -> Reply:
        word, _, rest = turns[-1].text.partition(" ")
        if word == "seed":
            return f"{seed} after {len(turns)} turns of {prompt.question}"
        if word == "nap":
            self.nap(rest)
            return rest
        if word == "return":
            return eval(rest)
        if word == "null" or word[0] in '{["':
            return json.loads(turns[-1].text)
        return getattr(self, word)(rest)


@dataclass(frozen=True)
class Shouts(SpellBackward):
    def reply(self, prompt: Prompt, turns: Sequence[TurnText]) -> Reply:
        return None if len(turns) > 2 else turns[-1].text.upper()


@dataclass(frozen=True)
class AsksForMore(SpellBackward):
    def reply(self, prompt: Prompt, turns: Sequence[TurnText], mood: str) -> Reply:
        return mood


@dataclass(frozen=True)
class Parted(SpellBackward):
    """Its reward has parts, one of which only some responses have. What is correct is not what has
    a reward of 1."""

    def score(self, prompt: Prompt, response: Response) -> Score:
        right = [a == b for a, b in zip(response, prompt.answer, strict=False)]
        share = sum(right) / len(prompt.answer)
        parts = {"share": share, "tokens": len(response.tokens)}
        if response:
            parts["first"] = float(right[0])
        correct = sum(right) >= 2 and response.finish_reason == "stop"
        return Score(0.9 * share, parts, correct)


@dataclass(frozen=True)
class HangsOver1(SpellBackward):
    """Hangs over a wrong answer to prompt 1. `notes`: a directory for process ids."""

    notes: str = ""

    def score(self, prompt: Prompt, response: str) -> float:
        Path(self.notes, str(os.getpid())).write_text(" ".join(map(str, pair_of_ids())))
        while prompt.prompt_id == 1 and response != prompt.answer:
            time.sleep(1)
        return super().score(prompt, response)


@dataclass(frozen=True)
class Noted(Prompt):
    """A prompt with more than a prompt has."""

    weight: float = 0.0


@dataclass(frozen=True)
class Weighted(SpellBackward):
    def score(self, prompt: Prompt, response: str) -> float:
        assert isinstance(prompt, Noted)
        return prompt.weight


@dataclass(frozen=True)
class Keyed(SpellBackward):
    """Its ids are keys of a table of its own, in which `score` looks the answer up."""

    def train_prompts(self, step: int, num: int) -> list[Prompt]:
        prompts = super().train_prompts(step, num)
        return [replace(p, prompt_id=key_of(p.answer), answer="") for p in prompts]

    def eval_prompts(self, num: int) -> list[Prompt]:
        prompts = super().eval_prompts(num)
        return [replace(p, prompt_id=key_of(p.answer), answer="") for p in prompts]

    def score(self, prompt: Prompt, response: str) -> float:
        return float(key_of(response) == prompt.prompt_id)


def key_of(word: str) -> int:
    """A negative number for every second word."""
    return int.from_bytes(word.encode()) * (-1) ** len(word)


@dataclass(frozen=True)
class Twice(SpellBackward):
    """Gives two of its training prompts one id."""

    def train_prompts(self, step: int, num: int) -> list[Prompt]:
        prompts = super().train_prompts(step, num)
        return [replace(p, prompt_id=3 if p.prompt_id == 7 else p.prompt_id) for p in prompts]


@dataclass(frozen=True)
class Unseeded(SpellBackward):
    """From step `pure` on, counted from 0, its training prompts are other ones in each process."""

    pure: int = 0

    def train_prompts(self, step: int, num: int) -> list[Prompt]:
        prompts = super().train_prompts(step, num)
        if step < self.pure:
            return prompts
        letters = random.SystemRandom().choices("abcdefghijklmnopqrstuvwxyz", k=4)
        return [*prompts[:-1], replace(prompts[-1], text="".join(letters) + ">")]


@dataclass(frozen=True)
class Told(SpellBackward):
    """Its questions are the number of tokens of the tokenizer that it was told."""

    def use_tokenizer(self, tokenizer: Tokenizer) -> None:
        object.__setattr__(self, "size", len(tokenizer.backend.get_vocab()))

    def train_prompts(self, step: int, num: int) -> list[Prompt]:
        return [Prompt(i, f"{self.size}>", "") for i in range(num)]


@dataclass(frozen=True)
class ByHash(SpellBackward):
    """Its answers depend on Python's hashes, which differ from process to process."""

    def train_prompts(self, step: int, num: int) -> list[Prompt]:
        return [replace(p, answer=str(hash(p.text))) for p in super().train_prompts(step, num)]


@dataclass(frozen=True)
class AnswersByRank(SpellBackward):
    """The same questions on every rank, and another answer to one of them on each."""

    def train_prompts(self, step: int, num: int) -> list[Prompt]:
        prompts = super().train_prompts(step, num)
        prompts[2] = replace(prompts[2], answer=f"answer of {os.environ['RANK']}")
        return prompts


@dataclass(frozen=True)
class LongLater(SpellBackward):
    """From the third step on, the training prompt with index 2 has 31 tokens; those of later rounds
    are ordinary."""

    def train_prompts(self, step: int, num: int, round: int = 0) -> list[Prompt]:
        prompts = super().train_prompts(step, num, round)
        if round == 0 and step >= 2:
            prompts[2] = replace(prompts[2], text="z" * 30 + ">")
        return prompts


@dataclass(frozen=True)
class Short(SpellBackward):
    """Has one held-out prompt less than it is asked for."""

    def eval_prompts(self, num: int) -> list[Prompt]:
        return super().eval_prompts(num - 1)


@dataclass(frozen=True)
class ShortTraining(SpellBackward):
    """The same, of training prompts."""

    def train_prompts(self, step: int, num: int) -> list[Prompt]:
        return super().train_prompts(step, num - 1)


RIGHT = (2, 3, 3, 4, 5, 6, 6)  # held-out prompts that are right after 1, 2, ... steps
last_step = [0]


@dataclass(frozen=True)
class Foreseen(SpellBackward):
    """Evaluations come out as `RIGHT` says, whatever the model; every step changes the weights. To
    be scored by the rank itself."""

    def train_prompts(self, step: int, num: int) -> list[Prompt]:
        last_step[:] = [step]
        return super().train_prompts(step, num)

    def score(self, prompt: Prompt, response: str) -> float:
        if is_held_out(prompt.text):
            return float(prompt.prompt_id < RIGHT[min(last_step[0], len(RIGHT) - 1)])
        return float(len(response))  # seldom all equal in a group


@dataclass(frozen=True)
class Troubled(SpellBackward):
    """Scores of rank TROUBLE_RANK raise, or (TROUBLE_HANGS) hang, in step TROUBLE_STEP, those of
    training prompts or (TROUBLE_HELD_OUT) of held-out ones; without these variables it is a task
    like any other. To be scored by the rank itself."""

    def train_prompts(self, step: int, num: int) -> list[Prompt]:
        last_step[:] = [step]
        return super().train_prompts(step, num)

    def score(self, prompt: Prompt, response: str) -> float:
        here = os.environ["RANK"] == os.environ.get("TROUBLE_RANK", "0")
        now = str(last_step[0] + 1) == os.environ.get("TROUBLE_STEP")
        if here and now and is_held_out(prompt.text) == ("TROUBLE_HELD_OUT" in os.environ):
            time.sleep(1000 if "TROUBLE_HANGS" in os.environ else 0)
            raise RuntimeError("the judge does not answer")
        return float(len(response))


def pair_of_ids() -> list[int]:
    """This process and its parent, the supervisor."""
    return [os.getpid(), os.getppid()]


def num_letters(prompt: Prompt, response: str) -> int:
    return len(response)


def slowly(prompt: Prompt, response: str) -> float:
    time.sleep(0.1)
    return 0.0


def share(prompt: Prompt, response: str) -> float:
    return 0.5


def fails_over_z(answer: str, response: str) -> float | None:
    return None if "z" in response else float(answer == "cba")
