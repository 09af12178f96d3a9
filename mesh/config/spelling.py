"""The right name for a wrong one, or none: a far match misleads more than it helps."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from difflib import SequenceMatcher, get_close_matches

SIMILAR = 0.75  # difflib's ratio of a key's last part and a misspelling of it
SIMILAR_WHOLE = 0.9  # the same of whole names, which share most of their letters with their group
SIMILAR_CHOICE = 0.6  # the same where the choices are few
MOST = 4  # suggestions; a word that fits more keys says nothing

OTHER_SYSTEMS = {
    "num_prompts": "batch_size train_batch_size global_batch_size rollout_batch_size",
    "sft.batch_size": "batch_size",
    "group_size": "num_generations num_rollouts rollouts_per_prompt n_samples_per_prompt",
    "updates_per_step": "num_minibatches num_mini_batches mini_batch_size ppo_mini_batch_size "
    "ppo_epochs num_ppo_epochs num_iterations",
    "kl_stop": "target_kl",
    "refill_rounds": "filter_groups filter_groups_enable max_num_gen_batches dynamic_sampling",
    "refill_on": "filter_groups_metric",
    "ema": "ema_decay",
    "stop.after": "early_stopping patience early_stopping_patience",
    "steps": "epochs num_epochs num_train_epochs total_epochs max_steps num_steps total_steps",
    "trainer.lr": "learning_rate",
    "trainer.microbatch_tokens": "gradient_accumulation_steps per_device_train_batch_size",
    "trainer.decay": "lr_scheduler_type lr_scheduler lr_decay_style lr_warmup_style",
    "trainer.lr_floor": "min_lr_ratio min_lr min_lr_rate",
    "trainer.warmup_steps": "lr_warmup_steps warmup_ratio lr_warmup_steps_ratio",
    "trainer.optimizer": "optim",
    "trainer.clip_norm": "max_grad_norm grad_clip gradient_clipping",
    "trainer.activation_checkpointing": "gradient_checkpointing",
    "trainer.dp_shard": "data_parallel_size dp_size dp",
    "trainer.tp": "tensor_parallel_size tp_size",
    "generator.dp": "data_parallel_size dp_size dp",
    "generator.tp": "tensor_parallel_size tp_size",
    "generator.max_new_tokens": "max_tokens max_completion_length max_response_length",
    "model.max_length": "max_prompt_length max_seq_length max_model_len",
    "model.path": "model_name_or_path model_name",
    "kl_coef": "beta kl_beta kl_weight kl_penalty kl_loss_coef init_kl_coef use_kl_loss",
    "kl_in": "use_kl_in_reward",
    "kl_estimator": "kl_loss_type",
    "teacher.path": "teacher_model teacher_model_name_or_path",
    "clip_low": "epsilon clip_range cliprange clip_ratio clip_eps",
    "clip_high": "epsilon epsilon_high clip_range cliprange clip_ratio clip_ratio_high clip_eps",
    "dual_clip": "delta clip_ratio_c",
    "importance": "rollout_is vllm_importance_sampling_correction",
    "importance_high": "tis_imp_ratio_cap vllm_importance_sampling_cap",
    "length_penalty": "overlong_buffer overlong_buffer_enable overlong_buffer_penalty_factor",
    "length_penalty_tokens": "overlong_buffer overlong_buffer_len soft_punish_cache",
    "loss": "loss_fn loss_type policy_loss loss_mode importance_sampling_level algorithm",
    "aggregation": "loss_agg_mode",
    "advantage": "adv_estimator scale_rewards norm_adv_by_std_in_grpo",
    "truncated": "mask_truncated_completions overlong_filtering",
    "task": "dataset reward_fn reward_function",
    "run_dir": "output_dir",
    "checkpoint.best_metric": "metric_for_best_model",
    "checkpoint.every": "save_steps save_freq",
    "eval.every": "eval_steps test_freq",
    "log.wandb": "wandb_project report_to",
    "log.trackio": "trackio_project",
}
"""By our key, the names that the same setting has in other systems for RL of language models."""


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """The choice of which `word` is a misspelling."""
    return next(iter(get_close_matches(word, list(choices), n=1, cutoff=SIMILAR_CHOICE)), None)


def meant(word: str, choices: Iterable[str], prefix: str = "") -> str:
    """The question of a message, "did you mean CHOICE? ", where one is near; else nothing."""
    close = nearest(word, choices)
    return f"did you mean {prefix}{close}? " if close else ""


def near_keys(name: str, keys: Collection[str]) -> list[str]:
    """The keys that `name`, which is none, may be meant for; none of a far match.

    The first of these that finds any: the name with other separators; the whole name misspelt; a
    misspelling or a beginning of a key in the same group; another system's name; a key of the same
    name in another group; a beginning, then a misspelling of any key.
    """
    name, flat = name.lower().replace("-", "_"), flattened(name)
    group, last = split(name)
    own = [key for key in keys if split(key)[0] == group]
    whole = [key for key in misspelt(last, keys) if similar(name, key) >= SIMILAR_WHOLE]
    found = (
        [key for key in keys if flattened(key) == flat],
        whole or misspelt(last, own) or begun(last, own),
        [key for key in OTHER_SYSTEMS if key in keys and elsewhere(key) & tails(name)],
        [key for key in keys if split(key)[1] == last],
        begun(last, keys) or misspelt(last, keys),
    )
    near = next(filter(None, found), [])
    return near if len(near) <= MOST else []


def near_below(name: str, groups: Iterable[str]) -> list[str]:
    """`name` with the group that its beginning is a misspelling of; below one any key may stand.

    So `eval.set.x.task` is meant for `eval.sets.x.task`.
    """
    parts = name.lower().replace("-", "_").split(".")
    found = []
    for group in groups:
        size = group.count(".") + 1
        begin, rest = ".".join(parts[:size]), name.split(".")[size:]
        if rest and similar(begin, group) >= SIMILAR_WHOLE:
            found.append((similar(begin, group), ".".join([group, *rest])))
    return [max(found)[1]] if found else []


def flattened(name: str) -> str:
    """`eval.every`, `eval-every` and `Eval_Every` are `eval_every`."""
    return name.lower().replace("-", "_").replace(".", "_")


def tails(name: str) -> set[str]:
    """`a.b.c` ends in `c`, `b_c` and `a_b_c`."""
    parts = name.lower().replace("-", "_").split(".")
    return {"_".join(parts[first:]) for first in range(len(parts))}


def split(name: str) -> tuple[str, str]:
    """(group, last part) of a dotted name; the group of a key of the top is empty."""
    group, _, last = name.rpartition(".")
    return group, last


def begun(last: str, keys: Iterable[str]) -> list[str]:
    """The keys whose last part begins so, as two begin with `trainer.dp`."""
    return [key for key in keys if len(last) > 1 and split(key)[1].startswith(last)]


def misspelt(last: str, keys: Iterable[str]) -> list[str]:
    """The keys whose last part is the most similar, where any is similar enough."""
    ratios = {key: similar(last, split(key)[1]) for key in keys}
    best = max(ratios.values(), default=0.0)
    return [key for key, ratio in ratios.items() if ratio == best >= SIMILAR]


def elsewhere(key: str) -> set[str]:
    """The names of a key of ours in other systems."""
    return set(OTHER_SYSTEMS[key].split())


def similar(one: str, other: str) -> float:
    """0 of texts that share nothing, 1 of equal ones."""
    return SequenceMatcher(None, one, other).ratio()
