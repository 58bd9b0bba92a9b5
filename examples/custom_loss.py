"""A custom preference loss: DPO with an exponential loss, in plain Python.

A preference loss is a function of the log-ratios of the chosen and the rejected responses. The script trains a small
model on the bundled demonstrations, then trains it on the bundled preferences with the loss below.
On the command line the same loss is used with ``stage=dpo stage.loss._target_=examples.custom_loss.exponential_loss``.

    python examples/custom_loss.py            # about a minute on two CPU cores
    python examples/custom_loss.py --quick    # a few steps of each stage
"""

import sys
import tempfile
from pathlib import Path

import lightning
from torch import Tensor

from rlhf.data import PreferenceDataModule
from rlhf.dpo import DPOModule
from rlhf.export import open_model_source, save_result
from rlhf.models import Transformer
from rlhf.sft import SFTDataModule, SFTModule

DATA = {"template": "{prompt}\nSummary:", "max_length": 256}


def exponential_loss(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """Exponential loss of the margin between the implicit rewards.

        L = mean exp(-beta (chosen - rejected))

    Args:
        chosen: [pairs] log pi - log pi_ref of the chosen responses, in nats.
        rejected: [pairs] the same of the rejected responses.
        beta: Reward units per nat.

    Returns:
        Scalar loss.
    """
    return (-beta * (chosen - rejected)).exp().mean()


def main() -> None:
    batches = 2 if "--quick" in sys.argv else 60
    limits = {"max_epochs": 1, "limit_train_batches": batches, "limit_val_batches": batches}
    flags = {**limits, "logger": False, "enable_checkpointing": False, "use_distributed_sampler": False}
    lightning.seed_everything(1)

    # 1. Train the base model, and its tokenizer, on demonstrations.
    demonstrations = SFTDataModule(train="data/rl_train.jsonl", val="data/rl_val.jsonl", **DATA)
    base = Transformer(hidden_size=128)
    tokenizer = base.tokenizer(demonstrations.training_texts())
    sft = SFTModule(policy=base, tokenizer=tokenizer)
    lightning.Trainer(**flags).fit(sft, demonstrations)

    # 2. Export it: the file is the starting point and the reference model of the next stage.
    with tempfile.TemporaryDirectory() as folder:
        save_result(sft.result(), Path(folder, "sft.pt"), {})
        source = open_model_source(str(Path(folder, "sft.pt")))

        # 3. Train on preferences with the custom loss.
        preferences = PreferenceDataModule(train="data/prefs_train.jsonl", val="data/prefs_val.jsonl", **DATA)
        dpo = DPOModule(policy=source, loss=exponential_loss, beta=0.3)
        trainer = lightning.Trainer(**flags)
        trainer.fit(dpo, preferences)
    for name in ("val/rewards/accuracies", "val/rewards/margins"):
        print(f"{name}: {float(trainer.callback_metrics[name]):.3f}")


if __name__ == "__main__":
    main()
