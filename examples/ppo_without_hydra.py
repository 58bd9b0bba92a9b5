"""PPO in plain Lightning, without Hydra: SFT and PPO as two LightningModules and two Trainers.

PPO is an ordinary LightningModule: its datamodule samples responses, scores them and yields minibatches, so every flag
of ``lightning.Trainer`` works. The reward is a Python function that prefers responses which mention a weekday.

    python examples/ppo_without_hydra.py            # about a minute on two CPU cores
    python examples/ppo_without_hydra.py --quick    # a few steps of each stage
"""

import sys
import tempfile
from pathlib import Path

import lightning
from lightning.pytorch.loggers import CSVLogger

from rlhf.export import open_model_source, save_result
from rlhf.models import Transformer
from rlhf.ppo import PPOModule
from rlhf.reward_functions import PythonReward
from rlhf.rl import RolloutDataModule
from rlhf.sampling import SamplingParams
from rlhf.sft import SFTDataModule, SFTModule

DATA = {"template": "{prompt}\nSummary:", "max_length": 256, "train": "data/rl_train.jsonl", "val": "data/rl_val.jsonl"}


def mentions_weekday(prompts: list[str], responses: list[str]) -> list[float]:
    """Return 1 for every response that mentions a weekday, and 0 for the others."""
    return [float("day" in response) for response in responses]


def main() -> None:
    quick = "--quick" in sys.argv
    flags = {"accelerator": "cpu", "enable_checkpointing": False, "use_distributed_sampler": False}
    lightning.seed_everything(1)

    # 1. Supervised fine-tuning of a model with random weights; its tokenizer is trained on the same data.
    demonstrations = SFTDataModule(**DATA)
    base = Transformer(hidden_size=128)
    sft = SFTModule(policy=base, tokenizer=base.tokenizer(demonstrations.training_texts()))
    trainer = lightning.Trainer(max_steps=2 if quick else 100, logger=False, limit_val_batches=1, **flags)
    trainer.fit(sft, demonstrations)

    with tempfile.TemporaryDirectory() as folder:
        # 2. The exported model is PPO's starting point and its reference model.
        save_result(sft.result(), Path(folder, "sft.pt"), {})

        # 3. PPO: 8 minibatches are 2 passes over a rollout of 64 responses.
        ppo = PPOModule(
            policy=open_model_source(str(Path(folder, "sft.pt"))),
            reward=PythonReward(path=f"{__file__}:mentions_weekday"),
            sampling=SamplingParams(max_new_tokens=24),
            ppo_epochs=2,
            minibatch_size=16,
        )
        logger = CSVLogger("outputs", name="ppo_without_hydra")
        trainer = lightning.Trainer(
            limit_train_batches=8 if quick else 120, max_epochs=1, logger=logger, limit_val_batches=1, **flags
        )
        trainer.fit(ppo, RolloutDataModule(**{**DATA, "batch_size": 64}))
    print(f"Mean score of the last rollout: {ppo.metrics['objective/scores']:.3f}. Metrics of all: {logger.log_dir}")


if __name__ == "__main__":
    main()
