"""Loading a configuration: values, precedence, and the exact text of a refusal."""

from __future__ import annotations

import dataclasses

import pytest

from mesh.config.changes import changed
from mesh.config.evaluation_sets import documented_keys
from mesh.config.keys import Refusal, conf_keys, range_problems, refuse, value_of
from mesh.config.loading import load_conf, read_conf, save_conf
from mesh.config.schema import CONF_DIR, Conf, resolve_path
from mesh.config.spelling import MOST, OTHER_SYSTEMS, near_keys, nearest

NAMES = sorted(path.stem for path in CONF_DIR.glob("*.yaml"))
CONFIGS = f"name one of {', '.join(NAMES)}, or a path to a .yaml"


def refusal(*words: str) -> list[str]:
    """The problems that load_conf lists for these words."""
    with pytest.raises(Refusal) as caught:
        load_conf(list(words))
    first, *lines = str(caught.value).splitlines()
    title = "1 problem" if len(lines) == 1 else f"{len(lines)} problems"
    assert first == f"{title} with the configuration:"
    assert all(line.startswith("- ") for line in lines)
    return [line[2:] for line in lines]


def test_tiny_config_holds_the_settings_that_learn():
    name, conf = load_conf(["conf=qwen3_tiny"])
    assert name == "qwen3_tiny"
    assert (conf.steps, conf.task, conf.num_prompts, conf.group_size) == (
        150,
        "spell_backward",
        64,
        8,
    )
    assert (conf.trainer.lr, conf.trainer.betas, conf.trainer.warmup_steps) == (
        6e-4,
        (0.9, 0.99),
        5,
    )
    assert (conf.model.path, conf.model.flavor, conf.model.max_length) == (
        "package:qwen3_tiny",
        "tiny",
        32,
    )
    assert (conf.generator.max_new_tokens, conf.eval.every, conf.device) == (8, 10, "cpu")


def test_qwen3_config():
    _, conf = load_conf(["conf=qwen3"])
    assert (conf.model.flavor, conf.model.path, conf.model.max_length) == ("0.6B", None, 1024)
    assert (conf.trainer.lr, conf.generator.max_new_tokens, conf.steps) == (1e-6, 256, 100)
    assert conf.task == "arithmetic"


@pytest.mark.parametrize("name", ["qwen3", "qwen3_tiny"])
def test_split_config_is_its_base_but_for_the_mode(name: str):
    _, base = load_conf([f"conf={name}"])
    split_name, split = load_conf([f"conf={name}_split"])
    assert split_name == f"{name}_split" and split.mesh.mode == "split"
    assert changed(split, {"mesh.mode": "colocated"}) == base


def test_words_override_the_config_and_the_last_word_wins():
    words = ["steps=7", "trainer.lr=3e-4", "trainer.betas=[0.8,0.9]", "steps=9", "mesh.mode=split"]
    _, conf = load_conf(["conf=qwen3_tiny", *words])
    assert (conf.steps, conf.trainer.lr, conf.trainer.betas) == (9, 3e-4, (0.8, 0.9))
    assert (conf.mesh.mode, conf.trainer.warmup_steps) == ("split", 5)


def test_values_are_read_by_the_type_of_their_key():
    words = ["sync.verify=off", "run_dir=1e3", "trainer.dp_shard=2", "log.progress=no"]
    _, conf = load_conf(["conf=qwen3_tiny", *words, "trainer.dtype=null", "model.path=null"])
    assert (conf.sync.verify, conf.run_dir, conf.trainer.dp_shard) == ("off", "1e3", 2)
    assert (conf.log.progress, conf.trainer.dtype, conf.model.path) == (False, None, None)


def test_task_args_take_any_name_and_type():
    words = ["task_args.max_length=4", "task_args.names=[a,1]", "task_args.deep.rate=1e-3"]
    _, conf = load_conf(["conf=qwen3_tiny", *words])
    assert conf.task_args == {"max_length": "4", "names": ["a", "1"], "deep": {"rate": "1e-3"}}


def test_schema_defaults_are_inside_their_own_ranges():
    assert range_problems(Conf()) == []


def test_every_problem_is_listed_at_once():
    assert refusal(
        "conf=qwen_tiny", "trainer.lrr=2", "--steps=3", "foo", "seed=", "trainer.tp=x", "steps=0"
    ) == [
        "'--steps=3' is not key=value; write steps=3",
        "'foo' is not key=value; write foo=VALUE",
        "seed= has no value; write seed=VALUE, or seed=null to unset it",
        f"conf=qwen_tiny: no such config; did you mean qwen3_tiny? {CONFIGS}",
        "trainer.lrr=2: unknown key; did you mean trainer.lr? --help lists all keys",
        "trainer.tp=x: expected an integer; write e.g. trainer.tp=1",
        "steps=0: must be >= 1; the default is 100",
    ]


@pytest.mark.parametrize(
    ("name", "near"),
    [
        # a misspelling: in the same group, else in any
        ("trainer.lrr", "trainer.lr"),
        ("stepps", "steps"),
        ("generater.tp", "generator.tp"),
        ("checkpoints.every", "checkpoint.every"),
        ("trainer.beta", "trainer.betas"),
        ("rewards.workers", "reward.workers"),
        ("lrr", "trainer.lr sft.lr"),
        # other separators
        ("eval_every", "eval.every"),
        ("Group-Size", "group_size"),
        # another group
        ("trainer.temperature", "generator.temperature"),
        ("optim.lr", "trainer.lr sft.lr"),
        # a beginning
        ("trainer.dp", "trainer.dp_replicate trainer.dp_shard"),
        ("top", "generator.top_k generator.top_p"),
        # other systems
        ("learning_rate", "trainer.lr"),
        ("actor.learning_rate", "trainer.lr"),
        ("batch_size", "num_prompts sft.batch_size"),
        ("rollout_batch_size", "num_prompts"),
        ("num_generations", "group_size"),
        ("max_tokens", "generator.max_new_tokens"),
        ("generator.max_completion_length", "generator.max_new_tokens"),
        ("max_prompt_length", "model.max_length"),
        ("beta", "kl_coef"),
        ("num_train_epochs", "steps"),
        ("eval.steps", "eval.every"),
        ("gradient_accumulation_steps", "trainer.microbatch_tokens"),
        ("model_name_or_path", "model.path"),
        ("ppo_epochs", "updates_per_step"),
        ("num_iterations", "updates_per_step"),
        ("epsilon_high", "clip_high"),
        ("loss_type", "loss"),
        ("use_kl_loss", "kl_coef"),
        ("kl_beta", "kl_coef"),
        ("filter_groups", "refill_rounds"),
        ("algorithm.filter_groups.enable", "refill_rounds"),
        ("algorithm.filter_groups.metric", "refill_on"),
        ("overlong_buffer", "length_penalty length_penalty_tokens"),
        ("reward_model.overlong_buffer.len", "length_penalty_tokens"),
        ("ema_decay", "ema"),
        ("lr_scheduler_type", "trainer.decay"),
        ("algorithm.gamma", ""),
        # nothing that it could mean
        ("updates_per_batch", "updates_per_step"),
        ("trainer.foo", ""),
        ("log.wandb_api_key", ""),
        ("x", ""),
    ],
)
def test_a_wrong_name_suggests_the_keys_that_it_may_mean_or_none(name: str, near: str):
    assert near_keys(name, conf_keys()) == near.split()


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("eval.set.aime.task", "eval.sets.aime.task"),
        ("task_arg.path", "task_args.path"),
        ("trainer.optimizer_arg.beta", "trainer.optimizer_args.beta"),
        ("loss_arg.scale", "loss_args.scale"),
    ],
)
def test_a_misspelt_group_of_free_names_keeps_what_is_below_it(name: str, near: str):
    assert refusal("conf=qwen3_tiny", f"{name}=1") == [
        f"{name}=1: unknown key; did you mean {near}? --help lists all keys"
    ]


def test_names_of_other_systems_lead_to_keys_that_exist_and_are_no_keys():
    keys, words = conf_keys(), [name for names in OTHER_SYSTEMS.values() for name in names.split()]
    assert OTHER_SYSTEMS.keys() <= keys.keys() and not keys.keys() & set(words)
    for name in words:
        assert 1 <= len(near_keys(name, keys)) <= MOST


def test_a_far_choice_is_not_suggested():
    assert nearest("qwen_tiny", NAMES) == "qwen3_tiny" and nearest("llama", NAMES) is None
    assert refusal("conf=llama") == [f"conf=llama: no such config; {CONFIGS}"]
    assert refusal("conf=qwen3_tiny", "quantisation=2") == [
        "quantisation=2: unknown key; --help lists all keys"
    ]


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("lr=3", "lr=3: unknown key; did you mean trainer.lr or sft.lr? --help lists all keys"),
        (
            "group-size=4",
            "group-size=4: unknown key; did you mean group_size? --help lists all keys",
        ),
        (
            "log=3",
            "log=3: a group of keys; set one of log.progress, log.tensorboard, log.wandb, "
            "log.trackio, log.samples, log.samples_mb, log.tokens, log.timeline, log.evaluations",
        ),
        ("steps=3.5", "steps=3.5: expected an integer; write e.g. steps=100"),
        ("steps=true", "steps=true: expected an integer; write e.g. steps=100"),
        ("steps=null", "steps=null: expected an integer; write e.g. steps=100"),
        (
            "generator.dp=all",
            "generator.dp=all: expected an integer, or null; write e.g. generator.dp=1",
        ),
        ("trainer.lr=fast", "trainer.lr=fast: expected a number; write e.g. trainer.lr=1e-06"),
        (
            "log.progress=maybe",
            "log.progress=maybe: expected true or false; write e.g. log.progress=true",
        ),
        (
            "mesh.mode=splt",
            "mesh.mode=splt: expected one of colocated, split; write e.g. mesh.mode=split",
        ),
        (
            "mesh.mode=xyz",
            "mesh.mode=xyz: expected one of colocated, split; write e.g. mesh.mode=colocated",
        ),
        (
            "sync.verify=evry",
            "sync.verify=evry: expected one of every, first, off, or null; "
            "write e.g. sync.verify=every",
        ),
        (
            "trainer.betas=[0.9]",
            "trainer.betas=[0.9]: expected a list of 2 numbers; write e.g. "
            "trainer.betas=[0.9, 0.95]",
        ),
        (
            "trainer.betas=[0.9",
            "trainer.betas=[0.9: expected a list of 2 numbers; write e.g. "
            "trainer.betas=[0.9, 0.95]",
        ),
        (
            "task_args=3",
            "task_args=3: expected a mapping like {name: value}; write e.g. task_args={}",
        ),
        (
            "run_dir=${HOME}/x",
            "run_dir=${HOME}/x: ${...} is not replaced here; write the value itself",
        ),
        ("trainer.lr=nan", "trainer.lr=nan: must be > 0 and finite; the default is 1e-06"),
        ("trainer.lr=inf", "trainer.lr=inf: must be > 0 and finite; the default is 1e-06"),
        (
            "trainer.betas=[0.9,1]",
            "trainer.betas=[0.9, 1.0]: must be >= 0 and < 1; the default is [0.9, 0.95]",
        ),
        ("group_size=1", "group_size=1: must be >= 2; the default is 8"),
        ("generator.top_p=0", "generator.top_p=0.0: must be > 0 and <= 1; the default is 1.0"),
        ("clip_low=1", "clip_low=1.0: must be >= 0 and < 1; the default is null"),
        (
            "truncated_reward=nan",
            "truncated_reward=nan: must be >= -1e+100 and <= 1e+100; the default is null",
        ),
        (
            "truncated_reward=-inf",
            "truncated_reward=-inf: must be >= -1e+100 and <= 1e+100; the default is null",
        ),
        ("advantage_eps=-1", "advantage_eps=-1.0: must be >= 0 and finite; the default is 1e-06"),
        ("trainer.tp=0", "trainer.tp=0: must be >= 1; the default is 1"),
    ],
)
def test_a_wrong_word_names_key_value_and_remedy(word: str, line: str):
    assert refusal("conf=qwen3_tiny", word) == [line]


def test_config_from_a_path_extends_a_shipped_one(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("# mine\ndefaults: qwen3_tiny\nsync:\n  verify: off\nrun_dir:\n")
    name, conf = load_conf([f"conf={path}", "seed=3"])
    assert (name, conf.sync.verify, conf.run_dir, conf.seed, conf.steps) == (
        "mine",
        "off",
        None,
        3,
        150,
    )


def test_problems_of_a_yaml_name_it(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("defaults: qwen4\ntrainer: 3\nstepps: 4\n")
    assert refusal(f"conf={path}") == [
        f"conf=qwen4: no such config; did you mean qwen3? {CONFIGS}",
        "bad.yaml: trainer=3: a group of keys; set one of "
        + ", ".join(name for name in conf_keys() if name.startswith("trainer.")),
        "bad.yaml: stepps=4: unknown key; did you mean steps? --help lists all keys",
    ]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("- steps\n", "{path} holds no `key: value` lines; write e.g. `steps: 100`"),
        ("defaults: {path}\n", "x.yaml: its defaults lead back to itself; remove one of them"),
    ],
)
def test_unusable_yaml(tmp_path, text: str, line: str):
    path = tmp_path / "x.yaml"
    path.write_text(text.format(path=path))
    assert refusal(f"conf={path}") == [line.format(path=path)]


def test_broken_yaml(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("steps: [1\n")
    (line,) = refusal(f"conf={path}")
    assert line.startswith(f"{path} is not YAML: ") and "line 2" in line


def test_saved_config_reads_back_equal(tmp_path):
    words = ["task_args.a='4'", "task_args.b=off", "sync.verify=off", "trainer.dp_shard=2"]
    _, conf = load_conf(["conf=qwen3_tiny_split", *words, "run_dir=here"])
    conf.task_args["digits"] = "4"
    save_conf(conf, tmp_path / "config.yaml")
    assert read_conf(tmp_path / "config.yaml") == conf
    (tmp_path / "config.yaml").write_text("steps: 0\n")
    with pytest.raises(ValueError, match="steps=0: must be >= 1"):
        read_conf(tmp_path / "config.yaml")


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["conf="], ["conf=qwen3", "--help"]])
def test_help_lists_configs_and_keys(capsys, words: list[str]):
    with pytest.raises(SystemExit) as caught:
        load_conf(words)
    assert caught.value.code == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == "usage: RECIPE conf=NAME [key=value ...]"
    assert [line.split()[0] for line in lines[3 : 3 + len(NAMES)]] == NAMES
    assert (
        "qwen3_split qwen3 with trainer and generator on disjoint ranks (2 GPUs or more)" in lines
    )
    assert "trainer.lr=1e-06 peak learning rate (> 0 and finite)" in lines
    listed = {line.partition("=")[0] for line in lines[5 + len(NAMES) :]}
    assert listed == {key.name for key in documented_keys()} > set(conf_keys())


def test_a_missing_config_is_refused_with_the_list_of_configs():
    with pytest.raises(Refusal) as caught:
        load_conf(["steps=3"])
    first, *configs, last = str(caught.value).splitlines()
    assert first == "conf=NAME is needed; NAME is a path to a .yaml, or one of"
    assert [line.split()[0] for line in configs] == NAMES
    assert last == "--help lists all keys"


def test_help_is_printed_by_the_first_rank_only(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit):
        load_conf(["--help"])
    assert capsys.readouterr().out == ""


def test_every_key_has_a_meaning_and_its_default():
    conf = Conf()
    for key in conf_keys().values():
        assert key.meaning and key.default == value_of(conf, key.name)
    sections = [part.name for part in dataclasses.fields(Conf) if part.name not in conf_keys()]
    assert sections == [
        "invariant", "mesh", "model", "teacher", "prompt", "difficulty", "trainer", "generator",
        "conversation", "reward", "vllm", "sync", "eval", "stop", "generate", "sft", "validate",
        "checkpoint", "export", "log", "profile",
    ]  # fmt: skip


def test_refuse_lists_each_problem_once_and_nothing_where_there_is_none():
    refuse([])
    with pytest.raises(ValueError, match=r"^2 problems with the configuration:\n- a\n- b$"):
        refuse(["a", "b", "a"])


def test_resolve_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert resolve_path("package:qwen3_tiny").parts[-3:] == ("mesh", "data", "qwen3_tiny")
    assert str(resolve_path("~/model")) == "/home/someone/model"
    assert str(resolve_path("a/b")) == "a/b"


@pytest.mark.parametrize(
    "word, texts",
    [
        ("[abc>,1e3>, 007]", ["abc>", "1e3>", "007"]),
        ("[12+34=,'a, b']", ["12+34=", "a, b"]),
        ("hello there>", ["hello there>"]),
        ("-", ["-"]),
        ("[]", []),
    ],
)
def test_a_list_of_texts_keeps_every_text_as_it_stands(tmp_path, word, texts):
    _, conf = load_conf(["conf=qwen3_tiny", f"generate.prompts={word}"])
    assert conf.generate.prompts == texts
    save_conf(conf, tmp_path / "config.yaml")
    assert read_conf(tmp_path / "config.yaml") == conf


def test_a_changed_configuration_is_a_copy():
    conf = Conf()
    values = {"steps": 7, "trainer.tp": 2, "trainer.lr": 0.5, "mesh.mode": "split"}
    other = changed(conf, values)
    assert {name: value_of(other, name) for name in values} == values
    assert conf == Conf(), "what was given stays as it was"
    rest = conf_keys().keys() - values
    assert [name for name in rest if value_of(other, name) != value_of(conf, name)] == []
    assert changed(conf, {}) == conf
    for name in ("stepps", "trainer.lrr", "trainr.lr", "trainer.lr.x"):
        with pytest.raises((AttributeError, TypeError)):
            changed(conf, {name: 1})


def test_a_configuration_cannot_be_assigned_to():
    for part in (Conf(), Conf().trainer, Conf().log):
        name = dataclasses.fields(part)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(part, name, None)
