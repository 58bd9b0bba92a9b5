"""What is compared. Both sides read this file, so it imports nothing but the standard library."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

STEPS = 20
BATCH_SIZE = 8
TEMPLATE = "{prompt}\nSummary:"
MAX_LENGTH = 512  # longer than every text: nothing is cut on either side
OPTIMIZER = {"learning_rate": 1e-3, "weight_decay": 0.01, "betas": (0.9, 0.98), "eps": 1e-8}
CLIP = 1.0  # largest norm of the gradient
DEMONSTRATIONS, PAIRS = "data/rl_train.jsonl", "data/prefs_train.jsonl"


@dataclass(frozen=True)
class Case:
    """One curve on both sides.

    Args:
        name: of the row in the table.
        stage: ours, a folder of ``rlhf/``.
        trainer: theirs, a class of TRL.
        numbers: what is compared: label to the name here and the name there.
        ours: keywords of our stage's module.
        theirs: keywords of TRL's config.
        data: file of records, in the repository, or in the work folder if it begins with ``work:``.
        template: text around the prompt.
        bos: False takes the BOS off the tokenizer, on both sides.
        reason: why the two differ, and which is right, where they do.
    """

    name: str
    stage: str
    trainer: str
    numbers: dict[str, tuple[str, str]]
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
PAIR_NUMBERS = {**LOSS, **ACCURACY, **MARGIN, **CHOSEN}
AT_EACH_STEP = {
    "precompute_ref_logprobs": False
}  # as TRL does by default: the first margins are then 0 to the last bit
NO_REFERENCE = {"reference_free": True}
MEANS = {"length_normalized": True}
CASES = [
    Case(
        name="SFT",
        stage="sft",
        trainer="SFTTrainer",
        data=DEMONSTRATIONS,
        ours={"samples": 0},
        numbers={
            **LOSS,
            "accuracy": ("train/token_accuracy", "mean_token_accuracy"),
            "entropy": ("train/entropy", "entropy"),
        },
    ),
    Case(
        name="reward",
        stage="reward",
        trainer="RewardTrainer",
        numbers={**LOSS, "accuracy": ("train/accuracy", "accuracy"), "margin": ("train/margin", "margin")},
    ),
    Case(
        name="reward, centred",
        stage="reward",
        trainer="RewardTrainer",
        ours={"centering_coef": 0.01},
        theirs={"center_rewards_coefficient": 0.01},
        numbers={**LOSS, "mean score": ("train/mean_reward", "mean_reward"), "margin": ("train/margin", "margin")},
    ),
    Case(
        name="DPO, sigmoid",
        stage="dpo",
        trainer="DPOTrainer",
        ours={"objective": "sigmoid_loss", "beta": 0.1, **AT_EACH_STEP},
        theirs={"loss_type": ["sigmoid"], "beta": 0.1},
        numbers=PAIR_NUMBERS,
    ),
    Case(
        name="DPO with an SFT term",
        stage="dpo",
        trainer="DPOTrainer",
        ours={"objective": "sigmoid_loss", "beta": 0.1, "sft_coef": 0.5, **AT_EACH_STEP},
        theirs={"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5], "beta": 0.1},
        numbers=PAIR_NUMBERS,
    ),
    Case(
        name="IPO, mean a token",
        stage="dpo",
        trainer="DPOTrainer",
        ours={"objective": "ipo_loss", "beta": 1.0, **MEANS, **AT_EACH_STEP},
        theirs={"loss_type": ["ipo"], "beta": 1.0},
        numbers={**LOSS, **CHOSEN},
    ),
    Case(
        name="IPO, sums as in the paper",
        stage="dpo",
        trainer="DPOTrainer",
        ours={"objective": "ipo_loss", "beta": 1.0, **AT_EACH_STEP},
        theirs={"loss_type": ["ipo"], "beta": 1.0},
        numbers={"loss": LOSS["loss"]},
        reason="TRL divides each log-ratio by the length of its answer, which the paper does not; ours does so with "
        "stage.length_normalized=true, the row above. The paper's eq. 17 is ours",
    ),
    Case(
        name="hinge",
        stage="dpo",
        trainer="DPOTrainer",
        ours={"objective": "hinge_loss", "beta": 0.1, **AT_EACH_STEP},
        theirs={"loss_type": ["hinge"], "beta": 0.1},
        numbers=PAIR_NUMBERS,
    ),
    Case(
        name="robust",
        stage="dpo",
        trainer="DPOTrainer",
        ours={"objective": ["robust_loss", {"label_smoothing": 0.1}], "beta": 0.1, **AT_EACH_STEP},
        theirs={"loss_type": ["robust"], "label_smoothing": 0.1, "beta": 0.1},
        numbers=PAIR_NUMBERS,
    ),
    Case(
        name="CPO: conservative, no reference, SFT term",
        stage="dpo",
        trainer="CPOTrainer",
        ours={
            "objective": ["conservative_loss", {"label_smoothing": 0.1}],
            "beta": 0.1,
            "sft_coef": 1.0,
            **NO_REFERENCE,
        },
        theirs={"loss_type": "sigmoid", "label_smoothing": 0.1, "beta": 0.1, "cpo_alpha": 1.0},
        numbers=PAIR_NUMBERS,
    ),
    Case(
        name="SimPO",
        stage="dpo",
        trainer="CPOTrainer",
        ours={"objective": ["simpo_loss", {"target_margin": 1.0}], "beta": 2.0, **NO_REFERENCE, **MEANS},
        theirs={"loss_type": "simpo", "simpo_gamma": 1.0, "beta": 2.0, "cpo_alpha": 0.0},
        numbers={**LOSS, **ACCURACY, **MARGIN},
    ),
    Case(
        name="ORPO, one-token prompts",
        stage="dpo",
        trainer="ORPOTrainer",
        data="work:one_token_prompts.jsonl",
        template="{prompt}",
        bos=False,
        ours={"objective": "odds_ratio_loss", "beta": 0.1, "sft_coef": 1.0, **NO_REFERENCE, **MEANS},
        theirs={"beta": 0.1},
        numbers={**LOSS, **ACCURACY, **MARGIN},
    ),
    Case(
        name="ORPO",
        stage="dpo",
        trainer="ORPOTrainer",
        ours={"objective": "odds_ratio_loss", "beta": 0.1, "sft_coef": 1.0, **NO_REFERENCE, **MEANS},
        theirs={"beta": 0.1},
        numbers={"loss": LOSS["loss"], **MARGIN},
        reason="TRL's SFT term runs over prompt and answer, ours over the answer, as in stage=sft; the authors' code "
        "has a switch for it. With prompts of one token, which nothing predicts, both are the same: the row above",
    ),
    Case(
        name="KTO",
        stage="kto",
        trainer="KTOTrainer",
        data="work:verdicts.jsonl",
        ours={"objective": "kto_loss", "beta": 0.1, **AT_EACH_STEP},
        theirs={"beta": 0.1},
        numbers={**LOSS, **MARGIN, "KL baseline": ("kto/kl", "kl"), **CHOSEN},
    ),
]


@dataclass(frozen=True)
class Iteration:
    """One PPO iteration on both sides: the same answers, scored and learned from.

    Args:
        name: of its files.
        gamma, gae_lambda, whiten_rewards: as in PPO.
        estimator: of the KL, ``k1`` or ``k3``.
        ends: strength of the policy's wish to end an answer: negative, and every answer is as long as allowed.
    """

    name: str
    gamma: float
    gae_lambda: float
    ends: float
    estimator: str = "k1"
    whiten_rewards: bool = False


PROMPTS = 16
ANSWER_LENGTH = 12  # most tokens of an answer
PASSES = 4
PPO = {"clip_range": 0.2, "value_clip_range": 0.2, "value_coef": 0.1, "kl_coef": 0.05}
PPO_OPTIMIZER = {"learning_rate": 1e-4, "weight_decay": 0.0, "betas": (0.9, 0.999), "eps": 1e-5}
TEMPERATURE = 0.7
MISSING_EOS_PENALTY = 1.0
LONG, RAGGED = -3.0, 3.0
ITERATIONS = [
    Iteration("long", gamma=0.99, gae_lambda=0.95, ends=LONG),
    Iteration("long-k3", gamma=0.99, gae_lambda=0.95, ends=LONG, estimator="k3"),
    Iteration("long-whitened", gamma=0.99, gae_lambda=0.95, ends=LONG, whiten_rewards=True),
    Iteration("ragged-lambda-1", gamma=1.0, gae_lambda=1.0, ends=RAGGED),
    Iteration("ragged", gamma=1.0, gae_lambda=0.95, ends=RAGGED),
]


def fingerprint(rows: Sequence[tuple[list[int], int]]) -> str:
    """A batch in 16 characters: token ids of each row, and how many of them are its answer."""
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]
