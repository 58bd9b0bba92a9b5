"""Values that a configuration rejects, each with its stage and the whole message.

A row is: stage, key, value, the text of the message after ``must be``, and the value that the fix sets.
"""

import math
from typing import Any

NAN, INF = math.nan, math.inf
POSITIVE_INT = "an integer of at least 1"
NON_NEGATIVE_INT = "an integer of at least 0"
POSITIVE = "a number above 0"
NON_NEGATIVE = "a number of at least 0"
TEMPERATURE = "0 or a number of at least 1e-06"
BELOW_ONE = "a number of at least 0 and below 1"
FRACTION = "a number from 0 to 1"
SCHEDULE = "cosine, linear, or constant"
PAIR = "a list of 2 numbers of at least 0 and below 1"
FILE = "one path or Hub dataset ID, or null"
SEED = "an integer from 0 to 4294967295"
OR_NULL = " or null"
LIMIT = "an integer of at least 1, a number above 0 and at most 1, or null"

# Wrong values by the kind of key.
NOT_POSITIVE_INT: list[Any] = [0, -4, 1.5, "abc", None, True, [1]]
NOT_POSITIVE: list[Any] = [0, -1, "abc", None, NAN, INF, False]
NOT_NON_NEGATIVE: list[Any] = [-1, "abc", NAN, [0.1]]
NOT_BELOW_ONE: list[Any] = [1, -0.1, "abc", NAN]

KEYS: list[tuple[str, str, list[Any], str, str]] = [
    ("sft", "seed", [-1, "abc", 1.5, None, 2**32], SEED, "1"),
    ("sft", "stage.learning_rate", NOT_POSITIVE, POSITIVE, "0.0005"),
    ("sft", "stage.weight_decay", NOT_NON_NEGATIVE, NON_NEGATIVE, "0.0"),
    ("sft", "stage.betas", [[0.9], [2, 3], 0.9, "abc", [0.9, 1.0], None, []], PAIR, "[0.9,0.98]"),
    ("sft", "stage.eps", [-1, 0, "abc", NAN], POSITIVE, "1e-08"),
    ("sft", "stage.schedule", ["cos", None, 1], SCHEDULE, "cosine"),
    ("sft", "stage.warmup_ratio", [2, *NOT_BELOW_ONE], BELOW_ONE, "0.05"),
    ("sft", "stage.gradient_checkpointing", ["yes", 1, None], "true or false", "false"),
    ("sft", "stage.on_nonfinite", ["ignore", None], "stop or skip", "stop"),
    ("sft", "stage.max_nonfinite_steps", [0, -1, 1.5, None], POSITIVE_INT, "10"),
    ("sft", "stage.on_out_of_memory", ["retry", None], "stop or halve", "stop"),
    ("sft", "stage.samples", [-1, 0.5, "abc", None], NON_NEGATIVE_INT, "4"),
    ("sft", "stage.max_new_tokens", NOT_POSITIVE_INT, POSITIVE_INT, "64"),
    ("sft", "stage.sampler.stop_interval", [0, -1, 1.5, "abc"], POSITIVE_INT + OR_NULL, "<integer>"),
    ("sft", "data.batch_size", NOT_POSITIVE_INT, POSITIVE_INT, "16"),
    ("sft", "data.eval_batch_size", NOT_POSITIVE_INT, POSITIVE_INT, "64"),
    ("sft", "data.max_length", [1, -5, 10.5, "abc", None], "an integer of at least 2", "512"),
    ("sft", "data.max_rows", [0, -3, 1.5, "abc"], POSITIVE_INT + OR_NULL, "<integer>"),
    ("sft", "data.val_fraction", NOT_BELOW_ONE, BELOW_ONE, "0.05"),
    ("sft", "data.on_error", ["ignore", None], "stop or skip", "stop"),
    ("sft", "data.loss_on", ["foo", None], "response, assistant, or all", "response"),
    ("sft", "data.train", [["a", "b"], 5, {"a": "b"}], FILE, "<file>"),
    ("sft", "data.val", [["a", "b"], 5], FILE, "<file>"),
    ("sft", "data.subset", [["a"], 5], "text or null", "<text>"),
    ("sft", "data.template", [5, ["a"]], "text or null", "<text>"),
    ("sft", "model.hidden_size", [0, -1, 1.5, "abc", None], POSITIVE_INT, "256"),
    ("sft", "model.num_layers", [0, -1, 1.5], POSITIVE_INT, "2"),
    ("sft", "model.num_heads", [0, -1, 1.5], POSITIVE_INT, "4"),
    ("sft", "model.vocab_size", [0, -1, 1.5], POSITIVE_INT, "2048"),
    ("sft", "model.initializer_range", NOT_NON_NEGATIVE, NON_NEGATIVE, "0.04"),
    ("sft", "callbacks.alerts.window", [0, -1, 1.5], POSITIVE_INT, "5"),
    ("sft", "callbacks.checkpoint.every_n_minutes", [-1, "abc", NAN], NON_NEGATIVE + OR_NULL, "5.0"),
    ("sft", "trainer.max_steps", [0, -5, 1.5, None], f"{POSITIVE_INT} or -1", "-1"),
    ("sft", "trainer.max_epochs", [0, -2, 1.5], f"{POSITIVE_INT}, -1, or null", "1"),
    ("sft", "trainer.limit_train_batches", [0, 0.0, 2.5, -1, "abc"], LIMIT, "100"),
    ("sft", "trainer.log_every_n_steps", [0, -1, 1.5], POSITIVE_INT + OR_NULL, "1"),
    ("sft", "trainer.accumulate_grad_batches", [0, -1, 1.5, None], POSITIVE_INT, "1"),
    ("sft", "trainer.gradient_clip_val", [-1, "abc", NAN], NON_NEGATIVE + OR_NULL, "1.0"),
    ("sft", "trainer.num_nodes", [0, -1, 1.5], POSITIVE_INT, "1"),
    ("reward", "stage.hidden_dim", [0, -1, 1.5, None], POSITIVE_INT, "128"),
    ("reward", "stage.num_heads", [0, -1, 1.5], POSITIVE_INT, "1"),
    ("reward", "stage.centering_coef", NOT_NON_NEGATIVE, NON_NEGATIVE, "0.0"),
    ("reward", "stage.label_smoothing", [0.5, -0.1, NAN], "a number of at least 0 and below 0.5", "0.0"),
    ("reward", "data.demonstration_rows", [0, -1, 1.5], POSITIVE_INT, "512"),
    ("dpo", "stage.beta", NOT_POSITIVE, POSITIVE, "0.3"),
    ("dpo", "stage.sft_coef", NOT_NON_NEGATIVE, NON_NEGATIVE, "0.0"),
    ("ppo", "stage.gamma", [2, -1, "abc", NAN, None], FRACTION, "0.99"),
    ("ppo", "stage.gae_lambda", [2, -1, "abc", NAN], FRACTION, "0.95"),
    ("ppo", "stage.value_coef", NOT_NON_NEGATIVE, NON_NEGATIVE, "0.1"),
    ("ppo", "stage.critic", ["foo", None], "separate or shared", "separate"),
    ("ppo", "stage.critic_init", ["foo", 1], "reward_model, sft, random, or null", "reward_model"),
    ("ppo", "stage.critic_warmup", [-1, 1.5, "abc", None], NON_NEGATIVE_INT, "0"),
    ("ppo", "stage.clip_range", NOT_POSITIVE, POSITIVE, "0.2"),
    ("ppo", "stage.kl_coef", NOT_NON_NEGATIVE, NON_NEGATIVE, "0.1"),
    ("ppo", "stage.entropy_coef", NOT_NON_NEGATIVE, NON_NEGATIVE, "0.0"),
    ("ppo", "stage.ppo_epochs", NOT_POSITIVE_INT, POSITIVE_INT, "4"),
    ("ppo", "stage.minibatch_size", NOT_POSITIVE_INT, POSITIVE_INT, "64"),
    ("ppo", "stage.sampling.temperature", [*NOT_NON_NEGATIVE, 1e-38, True], TEMPERATURE, "0.7"),
    ("ppo", "stage.sampling.top_p", [0, 2, "abc", NAN, None], "a number above 0 and at most 1", "1.0"),
    ("ppo", "stage.sampling.top_k", [-1, 1.5, "abc", None], NON_NEGATIVE_INT, "0"),
    ("ppo", "stage.kl.estimator", ["k4", None], "k1, k2, k3, or full", "k1"),
    ("ppo", "stage.kl.horizon", [0, -1, 1.5], POSITIVE_INT + OR_NULL, "<integer>"),
    ("ppo", "stage.scores.clip", [0, -1, "abc"], POSITIVE + OR_NULL, "5.0"),
    ("ppo", "stage.limits.dual_clip", [1, 0, -1], "a number above 1 or null", "<number>"),
    ("grpo", "stage.num_generations", [0, -1, 1.5, None], POSITIVE_INT, "4"),
    ("evaluate", "stage.bootstrap", [0, -1, 1.5, None], POSITIVE_INT, "2000"),
]


def shown(value: Any) -> str:
    """Return a value as a message shows it."""
    if isinstance(value, str):
        return f"'{value}'"
    if isinstance(value, list):
        return f"[{','.join(map(str, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {item}' for key, item in value.items())}}}"
    return "null" if value is None else str(value).lower()


MISTAKES = [
    (stage, key, value, f"{key} must be {constraint}, got {shown(value)}.\n  Set {key}={valid}.")
    for stage, key, values, constraint, valid in KEYS
    for value in values
]
