"""The alerts on training metrics: what each of them watches, what it means, and what to change. Imports no torch."""

from typing import NamedTuple


class Rule(NamedTuple):
    """One alert.

    Args:
        metrics: The metrics that it needs. The first one is compared with the threshold.
        setting: The argument of ``Alerts`` that is its threshold.
        meaning: What the active alert means.
        change: What to change then.
        is_minimum: Whether it fires below the threshold, not above it.
    """

    metrics: tuple[str, ...]
    setting: str
    meaning: str
    change: str
    is_minimum: bool = False


RULES = {
    "kl": Rule(
        ("objective/kl",),
        "max_kl_per_sequence",
        "The policy has moved far away from the reference model.",
        "Raise stage.kl_coef, lower stage.learning_rate, or set stage.clip_range=0.1 or stage.ppo_epochs=2.",
    ),
    "length": Rule(
        ("response/length", "objective/scores"),
        "max_length_growth",
        "Scores rise because responses get longer, which is a form of reward hacking.",
        "Raise stage.kl_coef, train for fewer iterations (trainer.limit_train_batches), or use a reward model without "
        "length bias. Compare the responses of stage=evaluate.",
    ),
    "repetition": Rule(
        ("response/repetition",),
        "max_repetition_share",
        "Responses repeat themselves.",
        "Raise stage.kl_coef, lower stage.learning_rate, or set stage.sampling.temperature=1.",
    ),
    "truncation": Rule(
        ("response/truncated",),
        "max_truncated_share",
        "Responses reach the maximum length without EOS.",
        "Raise stage.scores.missing_eos_penalty or stage.sampling.max_new_tokens, or train stage=sft for longer.",
    ),
    "entropy": Rule(
        ("policy/entropy_avg",),
        "min_entropy_per_token",
        "The policy has collapsed: it samples nearly the same response every time.",
        "Set stage.sampling.temperature=1, raise stage.kl_coef, or lower stage.learning_rate.",
        is_minimum=True,
    ),
    "constant_scores": Rule(
        ("objective/score_range",),
        "min_score_range",
        "Every response of an iteration has the same score, so there is nothing to learn from.",
        "Check the function in reward.path, and the samples in the log.",
        is_minimum=True,
    ),
    "explained_variance": Rule(
        ("critic/explained_variance",),
        "min_explained_variance",
        "The critic predicts returns worse than a constant would, so advantages are mostly noise.",
        "Raise stage.critic_learning_rate or stage.value_coef, or set stage.value_clip_range=null. Check val/accuracy "
        "of the reward model.",
        is_minimum=True,
    ),
    "gradient_norm": Rule(
        ("grad_norm",),
        "max_gradient_norm_ratio",
        "The gradient is much larger than before, or not finite: training is unstable.",
        "Lower stage.learning_rate, raise stage.warmup_ratio, or lower trainer.gradient_clip_val. Inspect the data "
        "of this step.",
    ),
}
