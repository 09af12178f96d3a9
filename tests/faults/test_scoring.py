"""Score functions that hang, crash, raise and lie, in real processes: what becomes of the rewards,
of the run, and of all that user code has started.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from launching import REPOSITORY, Run, launch, run
from user_tasks import Noted

from mesh.config.changes import changed
from mesh.config.schema import Conf, RewardConf
from mesh.lifecycle.ending import alive
from mesh.program.plan import task_spec
from mesh.tasks import TaskSpec, load_task
from mesh.tasks.calls import TaskSource
from mesh.tasks.handle import Job
from mesh.tasks.response import Response, Score
from mesh.tasks.scorer import (
    Scorer,
    checked_task,
    num_workers,
    reward_problems,
    scoring_of,
)
from mesh.tasks.spell_backward import SpellBackward
from mesh.types import Prompt

PROMPT = Prompt(0, "abc>", "cba")
LIMIT = 3.0  # longer than a busy machine takes for a score that does not hang
FAULTS = {  # what the response makes the score function do, and what is said of it
    "hang": "hung for 3 s",
    "hang_in_c": "hung for 3 s",
    "crash SIGSEGV": "ended its process by signal 11 (SIGSEGV)",
    "crash SIGKILL": "ended its process by signal 9 (SIGKILL: out of memory?)",
    "exit 3": "ended its process with exit status 3",
    "exit 0": "ended its process with exit status 0",
    "leave 3": "raised SystemExit: 3",
    "fail lost": "raised KeyError: 'lost'",
    "nan": "returned nan of type float, which is not finite in float64",
    "-inf": "returned -inf of type float, which is not finite in float64",
}


PLACES = {"hang": "hang", "hang_in_c": "hang_in_c", "crash SIGSEGV": "crash", "fail lost": "fail"}
"""Faults that happen in a function of the user's, which the message shows."""


class Scoring:
    """A scorer with its task, in this process as a rank has it."""

    def __init__(self, name: str, args: dict, **reward):
        conf = Conf(task=f"user_tasks:{name}", task_args=args, reward=RewardConf(**reward))
        self.task = load_task(conf.task, 0, args)
        self.scorer = Scorer(TaskSource(self.task, task_spec(conf), scoring_of(conf)))

    def __call__(self, *responses: str, prompt: Prompt = PROMPT) -> list[float]:
        scores = self.scorer.score([prompt] * len(responses), [*map(Response, responses)])
        return [score.reward for score in scores]


@pytest.fixture
def scoring(tmp_path: Path) -> Iterator[Callable[..., Scoring]]:
    """Makes scorers of `Obedient`, which notes process ids in `tmp_path`."""
    made = []

    def make(name: str = "Obedient", args: dict | None = None, **reward) -> Scoring:
        args = {"notes": str(tmp_path)} if args is None else args
        made.append(Scoring(name, args, **{"timeout_seconds": LIMIT} | reward))
        return made[-1]

    yield make
    for one in made:
        one.scorer.close()


def noted(path: Path) -> list[int]:
    """The process ids in a note, once it is there."""
    wait_for(path.exists)
    return [int(word) for word in path.read_text().split()]


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def wait_until_gone(pids: list[int]) -> None:
    assert pids
    wait_for(lambda: not any(map(alive, pids)))


@pytest.mark.parametrize("workers", [1, 3])
def test_rewards_keep_their_order(scoring, workers):
    responses = [f"nap {number}" for number in range(10)] + [str(n / 7) for n in range(200)]
    expected = [*range(10), *(n / 7 for n in range(200))]
    assert scoring(workers=workers)(*responses) == expected


@pytest.mark.parametrize("workers", [1, 2])
def test_zero_makes_every_failure_0_and_counts_it(scoring, workers):
    ask = scoring(workers=workers, on_failure="zero")
    responses = [response for fault in FAULTS for response in (fault, "0.5")]
    assert ask("0.25", *responses, "-2") == [0.25, *([0.0, 0.5] * len(FAULTS)), -2.0]
    count, example = ask.scorer.failures()
    assert count == len(FAULTS)
    shown = [line for line in example.splitlines() if line.startswith("  response: ")]
    assert len(shown) == 1 and shown[0].removeprefix("  response: ").strip("'") in FAULTS
    assert ask("1.0") == [1.0]
    assert ask.scorer.failures() == (0, "")


def test_stop_shows_task_case_what_happened_and_where(scoring):
    ask = scoring()
    for fault, outcome in FAULTS.items():
        with pytest.raises(ValueError) as caught:
            ask("1.0", fault, "2.0")
        first, prompt, response, answer, remedy = str(caught.value).splitlines()[:5]
        assert first == f"the score function of {ask.task!r} {outcome}"
        assert [prompt.split(), response.split(": ")[1].strip(), answer.split()] == [
            ["prompt:", "'abc>'"], repr(fault), ["answer:", "'cba'"],
        ]  # fmt: skip
        assert "make it return one finite number" in remedy and "reward.timeout_seconds=3" in remedy
        assert "reward.on_failure=zero" in remedy
        if function := PLACES.get(fault):
            (place,) = (
                line for line in str(caught.value).splitlines() if line.endswith(f" {function}")
            )
            assert "user_tasks.py" in place
    assert ask("1.0") == [1.0]


def test_after_a_stop_nothing_is_left_of_what_was_under_way(scoring):
    ask = scoring(workers=2)
    assert ask(*["nap 4"] * 6) == [4.0] * 6
    with pytest.raises(ValueError, match="raised KeyError: 'lost'"):
        ask("nap 2", "fail lost")
    assert ask("1.0", "3.0") == [1.0, 3.0]


def test_a_process_that_ends_between_two_scores_is_replaced_without_a_word(scoring, tmp_path):
    ask = scoring()
    assert ask("note first") == [0.5]
    os.kill(noted(tmp_path / "first")[0], signal.SIGKILL)
    wait_until_gone(noted(tmp_path / "first"))
    assert ask("note second", "exit_later 0") == [0.5, 0.25]
    wait_until_gone(noted(tmp_path / "second"))
    assert ask("1.0") == [1.0]


def test_the_keeper_ends_with_the_child_and_the_child_with_the_keeper(scoring, tmp_path):
    ask = scoring(on_failure="zero")
    for victim in (0, 1):
        assert ask(f"note {victim}") == [0.5]
        pids = noted(tmp_path / str(victim))
        os.kill(pids[victim], signal.SIGKILL)
        wait_until_gone(pids)


def test_what_a_score_has_started_ends_with_its_process(scoring, tmp_path):
    ask = scoring(on_failure="zero")
    assert ask("hang_with_children pids", "1.0") == [0.0, 1.0]
    pids = noted(tmp_path / "pids")
    assert len(pids) == 5
    wait_until_gone(pids)


def test_close_leaves_no_process(scoring, tmp_path):
    ask = scoring(workers=2)
    ask(*(f"note {n}" for n in range(2)), *["nap 1"] * 8)
    pids = {pid for n in range(2) for pid in noted(tmp_path / str(n))}
    assert all(map(alive, pids))
    ask.scorer.close()
    wait_until_gone(list(pids))


RANK = """
import signal, sys
from mesh.tasks import TaskSpec, load_task
from mesh.tasks.response import Response
from mesh.tasks.calls import ScoringSettings, TaskSource
from mesh.tasks.scorer import Scorer
from mesh.types import Prompt
signal.signal(signal.SIGINT, lambda *_: None)
spec = TaskSpec("user_tasks:Obedient", 0, {"notes": sys.argv[1]})
task = load_task(spec.name, spec.seed, spec.args)
scoring = ScoringSettings(workers=len(sys.argv) - 2, timeout_seconds=60.0, on_failure="zero")
scorer, responses = Scorer(TaskSource(task, spec, scoring)), sys.argv[2:]
scores = scorer.score([Prompt(0, "", "")] * len(responses), [*map(Response, responses)])
print([score.reward for score in scores], flush=True)
input()
"""


@pytest.fixture
def rank(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen]]:
    """Starts a process that scores responses, says the rewards, and waits."""
    started = []

    def start(*responses: str) -> subprocess.Popen:
        places = [str(REPOSITORY), str(REPOSITORY / "tests"), os.environ.get("PYTHONPATH", "")]
        started.append(
            subprocess.Popen(
                [sys.executable, "-c", RANK, str(tmp_path), *responses],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(places)},
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                start_new_session=True,
            )
        )  # fmt: skip
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_kill_9_of_a_rank_leaves_nothing(rank, tmp_path):
    """Neither what hangs with the interpreter's lock, nor children, nor what is idle."""
    hanging = rank("hang_with_children hanging", "hang_in_c")
    idle = rank("note idle")
    assert idle.stdout.readline() == "[0.5]\n"
    pids = noted(tmp_path / "hanging") + noted(tmp_path / "idle")
    assert all(map(alive, pids))
    for process in (hanging, idle):
        process.kill()
        out, _ = process.communicate(timeout=60)  # also waits for all that hold its stdout
        assert out == ""
    wait_until_gone(pids)


def test_ctrl_c_is_not_for_the_score_function(rank, tmp_path):
    process = rank("note here", "nap 5", "nap 5")
    noted(tmp_path / "here")
    os.killpg(process.pid, signal.SIGINT)
    assert process.stdout.readline() == "[0.5, 5.0, 5.0]\n"


def test_what_user_code_prints_reaches_the_terminal(scoring, capfd, monkeypatch):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    assert scoring()("say hello", "say {}") == [0.5, 0.5]
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("hello{}", "HELLO\n{}\n")


def test_a_fork_that_returns_scores_nothing_twice(scoring):
    assert scoring()(*["fork", "1.0", "fork", "2.0"] * 10) == [0.75, 1.0, 0.75, 2.0] * 10


def test_processes_that_score_import_no_torch(scoring):
    modules = ["torch", "numpy", "user_tasks", "mesh.tasks.scoring"]
    assert scoring()(*(f"has_imported {name}" for name in modules)) == [0.0, 0.0, 1.0, 1.0]


def test_prompts_of_the_users_own_class_arrive_whole(scoring):
    ask = scoring("Weighted", {})
    assert ask("", prompt=Noted(0, "q", "a", weight=0.125)) == [0.125]


def test_prompts_that_cannot_be_sent_are_named(scoring):
    with pytest.raises(ValueError, match="prompts of Weighted.*cannot be sent.*reward.workers=0"):
        scoring("Weighted", {})("", prompt=Noted(0, "q", "a", weight=lambda: 0))


def test_long_responses_arrive_whole(scoring):
    ask = scoring(on_failure="zero")
    assert ask("1.0") == [1.0]
    (worker,) = ask.scorer.calls.pool.workers
    long, short = (Job(0, "score", (), b"x" * (1 << bits)) for bits in (18, 10))
    assert worker.takes(long, 3) and worker.takes(short, 3)
    worker.jobs.append(long)
    assert not worker.takes(long, 3) and worker.takes(short, 3)  # a long one would have to wait
    worker.jobs.append(short)
    assert worker.takes(short, 3) and not worker.takes(short, 2)
    worker.jobs.append(long)
    assert not worker.takes(short, 4), "the socket is full"
    worker.jobs.clear()
    assert ask(*[f"1.0 {'x' * (1 << 20)}"] * 3, "fail " + "y" * (1 << 20), "2") == [1, 1, 1, 0, 2]


def test_processes_are_for_user_code_and_start_when_they_are_needed(scoring):
    shipped, own = "spell_backward", "my_tasks:Mine"
    counts = [(shipped, None, 0), (shipped, 2, 2), (own, None, 1), (own, 0, 0)]
    for task, workers, expected in counts:
        assert num_workers(Conf(task=task, reward=RewardConf(workers=workers))) == expected
    ask = scoring()
    assert ask() == [] and ask.scorer.calls.pool.workers == []
    conf = Conf(reward=RewardConf(workers=1))
    scorer = Scorer(TaskSource(SpellBackward(0), task_spec(conf), scoring_of(conf)))
    assert scorer.score([PROMPT] * 2, [Response("cba"), Response("abc")]) == [Score(1), Score(0)]
    assert scorer.calls.pool is not None and len(scorer.calls.pool.workers) == 1
    scorer.close()


def test_zero_without_processes(scoring):
    ask = scoring(workers=0, on_failure="zero")
    assert ask("1.0", "fail lost", "nan", "leave 0") == [1.0, 0.0, 0.0, 0.0]
    count, example = ask.scorer.failures()
    assert count == 3 and "raised KeyError: 'lost'" in example


@dataclass(frozen=True)
class OfMain(SpellBackward):
    """Becomes a class of __main__, which no other process has."""


def test_a_task_of_main_is_refused_at_start_up(monkeypatch):
    monkeypatch.setattr(sys.modules["__main__"], "OfMain", OfMain, raising=False)
    spec = TaskSpec("__main__:OfMain", seed=0)
    assert checked_task(spec, workers=0) == (OfMain(0), [])
    with pytest.raises(ValueError) as caught:
        checked_task(spec, workers=1)
    assert str(caught.value).startswith(
        "task=__main__:OfMain: a scoring process, which is a fresh Python, cannot create "
        "this task: task=__main__:OfMain: __main__ has no OfMain"
    )
    assert "reward.workers=0" in str(caught.value)


ELSEWHERE = """
import os, sys
from mesh.tasks.spell_backward import SpellBackward as Task
if "pytest" not in sys.modules:
    {}
"""


@pytest.mark.parametrize(
    ("line", "outcome"),
    [
        ("os._exit(4)", "ended its process with exit status 4"),
        ("raise KeyError('no such device')", "KeyError: 'no such device'"),
        ("import no_such_module", "cannot import elsewhere_2 (No module named 'no_such_module')"),
    ],
)
def test_a_module_that_fails_in_another_process_is_refused(
    tmp_path, monkeypatch, request, line, outcome
):
    name = f"elsewhere_{request.node.callspec.indices['line']}"
    (tmp_path / f"{name}.py").write_text(ELSEWHERE.format(line))
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=f"task={name}:Task: a scoring process") as caught:
        checked_task(TaskSpec(f"{name}:Task", seed=0), workers=1)
    assert outcome in str(caught.value)


def test_a_limit_beyond_the_patience_of_the_other_ranks_is_refused():
    conf = Conf(task="a:B", timeout_seconds=60, reward=RewardConf(timeout_seconds=60.0))
    assert reward_problems(conf) == [
        "reward.timeout_seconds=60.0: the other ranks wait no longer than timeout_seconds=60; use "
        "less, or raise timeout_seconds"
    ]
    assert reward_problems(changed(conf, {"reward.timeout_seconds": 59.0})) == []


SMALL = [
    "conf=qwen3_tiny", "task=user_tasks:HangsOver1", "num_prompts=4", "group_size=2", "steps=2",
    "eval.num_prompts=2", "eval.num_samples=1", "eval.every=0", "log.tensorboard=false",
    "log.samples=-1", f"reward.timeout_seconds={LIMIT}",
]  # fmt: skip


def pids_of_run(notes: Path) -> list[int]:
    return [int(word) for path in notes.iterdir() for word in path.read_text().split()]


def test_a_run_continues_and_counts_scores_that_hang(tmp_path, monkeypatch):
    """Rank 1 has the prompt over which the score function hangs; rank 0 says and counts it."""
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY / "tests"))
    (notes := tmp_path / "notes").mkdir()
    words = [*SMALL, "reward.on_failure=zero", f"task_args.notes={notes}"]
    made: Run = run("recipes/grpo.py", tmp_path / "run", 2, *words)
    hung = {
        step: sum(i == 1 and reward == 0 for (i, _), (_, reward) in made.answers(step).items())
        for step in (1, 2)
    }
    assert sum(hung.values()) > 0
    assert {line["step"]: line.get("reward/failed") for line in made.metrics[1:]} == hung
    assert "reward/failed" not in made.metrics[0] and made.metrics[0]["eval/failed"] >= 0
    assert made.output.count("reward/failed=") == sum(count > 0 for count in hung.values())
    assert "counted as 0.0, such as\nthe score function of HangsOver1(" in made.output
    wait_until_gone(pids_of_run(notes))


def test_a_run_stops_on_all_ranks_and_names_the_score_that_hangs(tmp_path):
    """The ranks of one replica: one of them scores, and the other waits for its rewards."""
    (notes := tmp_path / "notes").mkdir()
    words = [*SMALL, "generator.tp=2", f"task_args.notes={notes}", f"run_dir={tmp_path / 'run'}"]
    result = launch("recipes/grpo.py", 2, *words, status=1, path=REPOSITORY / "tests")
    message = result.stderr[result.stderr.index("ValueError: the score function of ") :]
    first, prompt, response, answer = message.splitlines()[:4]
    assert first.endswith("hung for 3 s")
    word = json.loads(prompt.partition("prompt:")[2].strip().replace("'", '"')).removesuffix(">")
    assert answer.partition("answer:")[2].strip() == repr(word[::-1])
    assert response.partition("response:")[2].strip() != repr(word[::-1])
    assert "user_tasks.py" in message  # where it hung
    pids = pids_of_run(notes)
    assert len(pids) == 4, "rank 0 at the start and one that scores: a process and its keeper each"
    wait_until_gone(pids)
