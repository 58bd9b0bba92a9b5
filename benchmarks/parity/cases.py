"""The cases of the comparison. Both environments import this file, so it uses the standard library only."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

STEPS = 20
BATCH_SIZE = 8
TEMPLATE = "{prompt}\nSummary:"
MAX_LENGTH = 512  # longer than every sequence, so neither side truncates
OPTIMIZER = {"learning_rate": 1e-3, "weight_decay": 0.01, "betas": (0.9, 0.98), "eps": 1e-8}
CLIP = 1.0  # maximum norm of the gradient
DEMONSTRATIONS, PAIRS = "data/rl_train.jsonl", "data/prefs_train.jsonl"


@dataclass(frozen=True)
class Case:
    """One training run on both sides.

    Args:
        name: Name in the table.
        stage: Our stage, a key of ``ours.STAGES``.
        trainer: Class of TRL.
        metrics: Metrics to compare: label, and the names of the metric here and in TRL.
        ours: Keywords of our module.
        theirs: Keywords of TRL's config.
        data: File of records, in the repository, or in the work directory if it starts with ``work:``.
        template: Text around the prompt.
        bos: False removes the BOS token from the tokenizer on both sides.
        reason: Why the two sides differ, and which one is correct; empty if they should agree.
    """

    name: str
    stage: str
    trainer: str
    metrics: dict[str, tuple[str, str]]
    ours: dict[str, Any] = field(default_factory=dict)
    theirs: dict[str, Any] = field(default_factory=dict)
    data: str = PAIRS
    template: str = TEMPLATE
    bos: bool = True
    reason: str = ""


LOSS = {"loss": ("train/loss", "loss"), "gradient norm": ("grad_norm", "grad_norm")}
ACCURACY = {"accuracy": ("rewards/accuracies", "rewards/accuracies")}
MARGIN = {"margin": ("rewards/margins", "rewards/margins")}
CHOSEN = {"log-prob of chosen": ("logps/chosen", "logps/chosen")}
PAIR_METRICS = {**LOSS, **ACCURACY, **MARGIN, **CHOSEN}
# As in TRL, the reference model is evaluated at each step, so that the first margins are exactly 0.
AT_EACH_STEP = {"precompute_ref_logprobs": False}
NO_REFERENCE = {"reference_free": True}
MEANS = {"length_normalized": True}
CASES = [
    Case(
        name="SFT",
        stage="sft",
        trainer="SFTTrainer",
        data=DEMONSTRATIONS,
        ours={"samples": 0},
        metrics={
            **LOSS,
            "accuracy": ("train/token_accuracy", "mean_token_accuracy"),
            "entropy": ("train/entropy", "entropy"),
        },
    ),
    Case(
        name="reward",
        stage="reward",
        trainer="RewardTrainer",
        metrics={**LOSS, "accuracy": ("train/accuracy", "accuracy"), "margin": ("train/margin", "margin")},
    ),
    Case(
        name="reward, centered",
        stage="reward",
        trainer="RewardTrainer",
        ours={"centering_coef": 0.01},
        theirs={"center_rewards_coefficient": 0.01},
        metrics={**LOSS, "mean score": ("train/mean_reward", "mean_reward"), "margin": ("train/margin", "margin")},
    ),
    Case(
        name="DPO, sigmoid",
        stage="dpo",
        trainer="DPOTrainer",
        ours={"loss": "sigmoid_loss", "beta": 0.1, **AT_EACH_STEP},
        theirs={"loss_type": ["sigmoid"], "beta": 0.1},
        metrics=PAIR_METRICS,
    ),
    Case(
        name="DPO with an SFT term",
        stage="dpo",
        trainer="DPOTrainer",
        ours={"loss": "sigmoid_loss", "beta": 0.1, "sft_coef": 0.5, **AT_EACH_STEP},
        theirs={"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5], "beta": 0.1},
        metrics=PAIR_METRICS,
    ),
    Case(
        name="IPO, mean per token",
        stage="dpo",
        trainer="DPOTrainer",
        ours={"loss": "ipo_loss", "beta": 1.0, **MEANS, **AT_EACH_STEP},
        theirs={"loss_type": ["ipo"], "beta": 1.0},
        metrics={**LOSS, **CHOSEN},
    ),
    Case(
        name="IPO, sums as in the paper",
        stage="dpo",
        trainer="DPOTrainer",
        ours={"loss": "ipo_loss", "beta": 1.0, **AT_EACH_STEP},
        theirs={"loss_type": ["ipo"], "beta": 1.0},
        metrics={"loss": LOSS["loss"]},
        reason="TRL divides each log-ratio by the length of the response, which the paper (eq. 17) does not. Here, "
        "stage.length_normalized=true does it (see the row above).",
    ),
    Case(
        name="hinge",
        stage="dpo",
        trainer="DPOTrainer",
        ours={"loss": "hinge_loss", "beta": 0.1, **AT_EACH_STEP},
        theirs={"loss_type": ["hinge"], "beta": 0.1},
        metrics=PAIR_METRICS,
    ),
    Case(
        name="robust",
        stage="dpo",
        trainer="DPOTrainer",
        ours={"loss": ["robust_loss", {"label_smoothing": 0.1}], "beta": 0.1, **AT_EACH_STEP},
        theirs={"loss_type": ["robust"], "label_smoothing": 0.1, "beta": 0.1},
        metrics=PAIR_METRICS,
    ),
    Case(
        name="CPO: conservative, no reference, SFT term",
        stage="dpo",
        trainer="CPOTrainer",
        ours={
            "loss": ["conservative_loss", {"label_smoothing": 0.1}],
            "beta": 0.1,
            "sft_coef": 1.0,
            **NO_REFERENCE,
        },
        theirs={"loss_type": "sigmoid", "label_smoothing": 0.1, "beta": 0.1, "cpo_alpha": 1.0},
        metrics=PAIR_METRICS,
    ),
    Case(
        name="SimPO",
        stage="dpo",
        trainer="CPOTrainer",
        ours={"loss": ["simpo_loss", {"target_margin": 1.0}], "beta": 2.0, **NO_REFERENCE, **MEANS},
        theirs={"loss_type": "simpo", "simpo_gamma": 1.0, "beta": 2.0, "cpo_alpha": 0.0},
        metrics={**LOSS, **ACCURACY, **MARGIN},
    ),
    Case(
        name="ORPO, one-token prompts",
        stage="dpo",
        trainer="ORPOTrainer",
        data="work:one_token_prompts.jsonl",
        template="{prompt}",
        bos=False,
        ours={"loss": "odds_ratio_loss", "beta": 0.1, "sft_coef": 1.0, **NO_REFERENCE, **MEANS},
        theirs={"beta": 0.1},
        metrics={**LOSS, **ACCURACY, **MARGIN},
    ),
    Case(
        name="ORPO",
        stage="dpo",
        trainer="ORPOTrainer",
        ours={"loss": "odds_ratio_loss", "beta": 0.1, "sft_coef": 1.0, **NO_REFERENCE, **MEANS},
        theirs={"beta": 0.1},
        metrics={"loss": LOSS["loss"], **MARGIN},
        reason="TRL's SFT term covers prompt and response, ours the response only, as in stage=sft; the authors' code "
        "has an option for it. With one-token prompts, which are never predicted, both agree (see the row above).",
    ),
    Case(
        name="KTO",
        stage="kto",
        trainer="KTOTrainer",
        data="work:unpaired.jsonl",
        ours={"loss": "kto_loss", "beta": 0.1, **AT_EACH_STEP},
        theirs={"beta": 0.1},
        metrics={**LOSS, **MARGIN, "KL baseline": ("kto/kl", "kl"), **CHOSEN},
    ),
]


@dataclass(frozen=True)
class Iteration:
    """One PPO iteration on both sides, on the same responses.

    Args:
        name: Name of its files.
        gamma: Discount factor.
        gae_lambda: lambda of generalized advantage estimation.
        eos_logit: Added to the logit of EOS. With a negative value, every response has the maximum length.
        estimator: KL estimator, ``k1`` or ``k3``.
        whiten_rewards: Scale the rewards to unit variance.
    """

    name: str
    gamma: float
    gae_lambda: float
    eos_logit: float
    estimator: str = "k1"
    whiten_rewards: bool = False


PROMPTS = 16
RESPONSE_LENGTH = 12  # maximum number of tokens
PASSES = 4
PPO = {"clip_range": 0.2, "value_clip_range": 0.2, "value_coef": 0.1, "kl_coef": 0.05}
PPO_OPTIMIZER = {"learning_rate": 1e-4, "weight_decay": 0.0, "betas": (0.9, 0.999), "eps": 1e-5}
TEMPERATURE = 0.7
MISSING_EOS_PENALTY = 1.0
LONG, RAGGED = -3.0, 3.0
ITERATIONS = [
    Iteration("long", gamma=0.99, gae_lambda=0.95, eos_logit=LONG),
    Iteration("long-k3", gamma=0.99, gae_lambda=0.95, eos_logit=LONG, estimator="k3"),
    Iteration("long-whitened", gamma=0.99, gae_lambda=0.95, eos_logit=LONG, whiten_rewards=True),
    Iteration("ragged-lambda-1", gamma=1.0, gae_lambda=1.0, eos_logit=RAGGED),
    Iteration("ragged", gamma=1.0, gae_lambda=0.95, eos_logit=RAGGED),
]


def fingerprint(rows: Sequence[tuple[list[int], int]]) -> str:
    """Return a hash of a batch, which has the token ids and the number of response tokens of each row."""
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]
