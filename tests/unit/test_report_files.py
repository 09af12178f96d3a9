"""The reader of run directories: damaged, half-written, foreign and missing files give words."""

from __future__ import annotations

import gzip
import json

import pytest
from report_runs import make_run, member

from tools.report.build import report_data
from tools.report.lines import Damage, blocks, records
from tools.report.main import main
from tools.report.reading import read_run
from tools.report.rollouts import index_of
from tools.report.samples import samples_of


@pytest.fixture
def run_dir(tmp_path):
    return make_run(tmp_path / "run", steps=12, tokens=5, prompts=2)


def missing_of(run_dir):
    """The sentences of a page about one directory."""
    return report_data([run_dir])["runs"][0]["missing"]


def test_links_to_files_that_are_not_the_runs_are_not_followed(run_dir, tmp_path):
    (tmp_path / "other").write_text("private: 1\n")
    (run_dir / "profiles").mkdir()
    for name in ("config.yaml", "profiles/step-1-rank-0.txt"):
        (run_dir / name).unlink(missing_ok=True)
        (run_dir / name).symlink_to(tmp_path / "other")
    assert missing_of(run_dir) == [
        "config.yaml is a link, which is not followed.",
        "profiles/step-1-rank-0.txt is a link, which is not followed.",
    ]
    assert "private" not in str(report_data([run_dir]))


def test_samples_of_an_older_version_beside_the_file_are_named(run_dir):
    (run_dir / "samples.jsonl").write_text('{"step": 1}\n')
    assert missing_of(run_dir) == [
        "The rollouts of samples.jsonl, of an older version, are not shown."
    ]


def test_nothing_is_missing_from_a_whole_run(run_dir):
    assert missing_of(run_dir) == []


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("metrics.jsonl", "no curve can be drawn"),
        ("timeline.jsonl", "who worked and who waited is not known"),
        ("samples.jsonl.gz", "no rollout can be shown"),
        ("config.yaml", "the configuration is not known"),
        ("environment.json", "machine and versions are not known"),
    ],
)
def test_a_file_that_is_gone_empty_or_a_directory_is_said(run_dir, name, words):
    path = run_dir / name
    path.unlink()
    assert [words in sentence for sentence in missing_of(run_dir)] == [True]
    path.mkdir()
    assert len(missing_of(run_dir)) == 1 and name in missing_of(run_dir)[0]
    path.rmdir()
    path.write_bytes(b"")
    assert len(missing_of(run_dir)) == 1 and name in missing_of(run_dir)[0]


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "timeline.jsonl", "samples.jsonl.gz", "config.yaml",
             "environment.json", "validation.json", "strict.json"]
)  # fmt: skip
@pytest.mark.parametrize(
    "content",
    [b"\x00\xff\xfe\x1f", b"[1, 2]\n", b'"text"\n', b"null\n", b"[" * 100_000 + b"\n",
     b"\x1f\x8b\x08 no gzip"],
)  # fmt: skip
def test_content_of_another_kind_is_said_and_raises_nothing(run_dir, name, content):
    (run_dir / name).write_bytes(content)
    sentences = missing_of(run_dir)
    assert sentences and all(name in sentence for sentence in sentences), sentences


def test_damaged_lines_are_counted_and_the_others_shown(run_dir):
    path = run_dir / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[3] = b'{"step": 3, "reward/me\n'
    lines[4] = b"\n"  # not counted: it holds nothing
    lines[5] = b'{"reward/mean": 1.0}\n'
    path.write_bytes(b"".join(lines) + b'{"step": 13, "reward/mean": 0.')
    run = read_run(run_dir)
    assert [line["step"] for line in run.metrics] == [0, 1, 2, 6, 7, 8, 9, 10, 11, 12]
    assert run.missing == [
        "metrics.jsonl is damaged: 2 lines were left out that are no complete records.",
        "metrics.jsonl ends in half a record, which is left out; a run that is going on or was "
        "killed leaves such an end.",
    ]


def test_of_a_step_that_is_there_twice_the_later_line_counts(run_dir):
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 5, "reward/mean": 77.0}) + "\n")
    run = read_run(run_dir)
    assert [line["step"] for line in run.metrics] == [*range(13)]
    assert run.metrics[5]["reward/mean"] == 77.0
    assert "1 steps twice" in run.missing[0]


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ({"step": 13, "reward/mean": "much"}, "reward/mean"),
        ({"step": 13, "reward/mean": [1, 2]}, "reward/mean"),
        ({"step": 13, "grad_norm": None}, "grad_norm"),
        ({"step": 13, "grad_norm": 10**400}, "grad_norm"),
    ],
)
def test_a_value_of_the_wrong_type_is_a_gap_or_no_point(run_dir, line, key):
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n" + '{"step": 14, "grad_norm": NaN}\n')
    data = report_data([run_dir])["runs"][0]
    (series,) = [s for c in data["curves"] for s in c["series"] if s["key"] == key]
    points = dict(zip(series["steps"], series["values"], strict=True))
    assert points.get(13) is None and points[12] is not None
    (norm,) = [s for c in data["curves"] for s in c["series"] if s["key"] == "grad_norm"]
    assert norm["values"][norm["steps"].index(14)] is None


def test_timeline_of_another_form_is_left_out(run_dir):
    wrong = [
        {"step": 20, "ranks": 3}, {"step": 21}, {"step": 22, "ranks": [{"rank": "x"}]},
        {"step": 23, "ranks": [{"rank": 0, "role": 7, "events": [["train", 2, 1], [1], "a",
                                                                  ["sync", 0.5, 1.5, 9.0]]}]},
    ]  # fmt: skip
    with open(run_dir / "timeline.jsonl", "a") as file:
        file.writelines(json.dumps(line) + "\n" for line in wrong)
    data = report_data([run_dir])["runs"][0]
    assert data["missing"] == ["timeline.jsonl: 3 lines name no ranks with events."]
    last = data["timeline"]["steps"][-1]
    assert last["step"] == 23 and last["ranks"] == [[["sync", 0.5, 1.5, 1.0]], []]


def test_a_directory_that_is_no_run_is_refused_in_words(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("x")
    for path, words in ((tmp_path, "holds no run"), (tmp_path / "gone", "is not a directory")):
        assert main([str(path)]) == 2
        assert words in capsys.readouterr().err
    assert main([]) == 2 and "python tools/report.py" in capsys.readouterr().err
    assert main([str(tmp_path), "hide=names,paths", "ouput=x.html"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "ouput=x.html: unknown key; did you mean output? the keys are output, title, hide, picture",
        "hide=names,paths: names cannot be hidden; use hosts or paths",
    ]


def test_a_run_of_an_older_version_with_unknown_keys_is_shown(run_dir):
    with open(run_dir / "config.yaml", "a") as file:
        file.write("old_section:\n  beta: 0.5\n  api_key: sesame\n")
    rows = {row["key"]: row for row in report_data([run_dir])["runs"][0]["config"]}
    assert rows["old_section.beta"]["value"] == "0.5" and rows["old_section.beta"]["changed"]
    assert "no such key" in rows["old_section.beta"]["help"]
    assert rows["old_section.api_key"]["value"] == "(not shown)"
    changed = {key for key, row in rows.items() if row["changed"] and "old" not in key}
    assert changed == {"steps", "model.path"}


def test_gzip_members_are_read_around_damage(tmp_path):
    rows = [{"step": step, "split": "train"} for step in range(6)]
    parts = [bytearray(member([row])) for row in rows]
    parts[2][12] ^= 0xFF
    parts[2][14] ^= 0xFF
    path = tmp_path / "samples.jsonl.gz"
    path.write_bytes(b"".join(map(bytes, parts))[:-5])
    damage = Damage(path.name)
    assert [row["step"] for row in records(path, damage)] == [0, 1, 3, 4]
    assert damage.gaps >= 1 and damage.truncated
    whole = Damage("a file that somebody compressed again")
    path.write_bytes(gzip.compress(b"".join(json.dumps(row).encode() + b"\n" for row in rows)))
    assert [row["step"] for row in records(path, whole)] == [*range(6)] and not whole.sentences()


def test_blocks_are_found_again_at_their_places(tmp_path):
    for name, content in (
        ("a", b"".join(b'{"step": %d}\n' % n for n in range(20_000))),
        ("b", b"".join(gzip.compress(b'{"step": %d}\n' % n, mtime=0) for n in range(50))),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        found = [*blocks(path, Damage(name))]
        assert len(found) > 1 and found[-1].end == len(content)
        for block in found[1::7]:
            assert next(blocks(path, Damage(name), block.offset)) == block


def test_an_index_grows_with_its_file_and_notices_another_one(run_dir):
    path = run_dir / "samples.jsonl.gz"
    whole = path.read_bytes()
    rows = index_of(path).rows
    version = index_of(path).version
    more = {"step": 13, "split": "train", "set": "", "chosen": "best", "prompt_id": 0}
    path.write_bytes(whole + member([more]) + member([more])[:9])
    assert index_of(path).rows == rows + 1 and index_of(path).version == version
    assert index_of(path).damage.truncated
    path.write_bytes(member([more]) * 3)
    assert index_of(path).rows == 3 and index_of(path).version != version


def test_samples_of_older_runs_are_shown(tmp_path):
    run_dir = make_run(tmp_path / "run", steps=3, prompts=0)
    (run_dir / "samples.jsonl.gz").unlink()
    old = [
        {"step": step, "prompt_id": prompt, "sample_id": sample, "prompt": "p", "response": "r",
         "reward": float(prompt), "finish_reason": "stop"}
        for step in (1, 2) for prompt in range(5) for sample in range(2)
    ]  # fmt: skip
    text = "".join(json.dumps(row) + "\n" for row in old)
    (run_dir / "samples.jsonl").write_text(text + "damaged\n")
    run = read_run(run_dir)
    found = samples_of(run)
    assert found["total"] == found["kept"] == len(old)
    assert run.missing == [
        "samples.jsonl is damaged: 1 line was left out that is no complete record."
    ]
