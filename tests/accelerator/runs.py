"""Runs of every stage on the emulated device, and the same runs on the CPU."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from accelerator.device import emulated_device
from accelerator.lightning_accelerator import ACCELERATOR, emulated_trainer
from harness import DEMONSTRATIONS, RATINGS, FakeSource, MetricsLogger, Run, TinyRun, quick_trainer
from rlhf.data import PromptDataModule
from rlhf.evaluate import EvaluateModule
from rlhf.models import ModelSource, Pretrained
from rlhf.sampling import LocalSampler, SamplingParams
from rlhf.speed import speed

# Every kind of training: its stage and its keywords.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "sft": ("sft", {}),
    "reward": ("reward", {}),
    "ratings": ("reward", {}),
    "dpo": ("dpo", {}),
    "kto": ("kto", {}),
    "ppo": ("ppo", {}),
    "ppo_shared": ("ppo", {"critic": "shared"}),
    "grpo": ("grpo", {"num_generations": 2, "minibatch_size": 8}),
}
# A transformer with every kind of training. The other models differ in their layers, which few kinds cover.
PAIRINGS = [
    *(("transformer", kind) for kind in KINDS),
    *(("mamba", kind) for kind in ("sft", "reward", "ppo")),
    *(("pretrained", kind) for kind in ("sft", "dpo", "ppo")),
]


@contextmanager
def comparable() -> Iterator[None]:
    """Let runs on the device and on the CPU draw the same random numbers and compute the same tensors.

    The device has neither fused attention nor oneDNN, and the CPU does not compute rows in groups of like length.
    """
    same_operations = speed(packed_rows=False, row_groups=1, onednn_products=False)
    with emulated_device(own_generator=False), sdpa_kernel(SDPBackend.MATH), same_operations:
        yield


def logged(run: Run) -> list[dict[str, float]]:
    """Return everything that a run has logged except its throughput."""
    return [{name: call[name] for name in call if "throughput" not in name} for call in run.logger.calls]


class DeviceRuns(TinyRun):
    """Runs with two optimizer steps or more, on 8 records in batches of 4.

    Args:
        folder: As for ``TinyRun``.
        tokenizer: As for ``TinyRun``.
        lm: As for ``TinyRun``.
        from_folder: Whether the policy is read from a Hugging Face folder, as with ``model=pretrained``.
    """

    def __init__(
        self, folder: Path, tokenizer: PreTrainedTokenizerBase, lm: PreTrainedModel, *, from_folder: bool = False
    ) -> None:
        super().__init__(folder, tokenizer, lm)
        self.policy: ModelSource = FakeSource(deepcopy(lm).train())
        if from_folder:
            lm.save_pretrained(folder / "pretrained")
            tokenizer.save_pretrained(folder / "pretrained")
            self.policy = Pretrained(path=str(folder / "pretrained"))
        on_policy = {"ppo_epochs": 1, "sampler": LocalSampler(stop_interval=3), "samples": 0}
        self.stage_keys.update(ppo=dict(on_policy), grpo=dict(on_policy))

    def run(self, kind: str, *, precision: str = "32-true", trainer: dict[str, Any] | None = None, **keys: Any) -> Run:
        """Build a run on the device.

        Args:
            kind: One of ``KINDS``.
            precision: ``32-true`` or ``bf16-mixed``.
            trainer: Flags of ``lightning.Trainer``.
            keys: As for ``TinyRun.build``.
        """
        stage, own = KINDS[kind]
        data = {"batch_size": 4, **keys.pop("data", {})}
        if kind == "ratings":
            data.setdefault("train", self.write("ratings", RATINGS))
        flags = {**emulated_trainer(precision), **(trainer or {})}
        return self.build(stage, data=data, trainer=flags, **{"policy": self.policy, **own, **keys})

    def both(
        self,
        kind: str,
        *,
        trainer: dict[str, Any] | None = None,
        callbacks: Callable[[], list[lightning.Callback]] = list,
        **keys: Any,
    ) -> tuple[Run, Run]:
        """Train in 32-true on the device and on the CPU, with the same random numbers.

        Args:
            kind: One of ``KINDS``.
            trainer: Flags of ``lightning.Trainer``.
            callbacks: Builds further callbacks for each of the runs.
            keys: As for ``run``.
        """
        with comparable():
            on_device = self.run(kind, trainer=trainer, callbacks=callbacks(), **deepcopy(keys)).fit()
            cpu = {"accelerator": "cpu", "strategy": "auto", **(trainer or {})}
            return on_device, self.run(kind, trainer=cpu, callbacks=callbacks(), **keys).fit()

    def evaluate(self, *, precision: str = "32-true", accelerator: str = ACCELERATOR, **keys: Any) -> EvaluateModule:
        """Evaluate the policy against itself and the reference responses on the 8 prompts of the harness.

        It draws the same random numbers on the device and on the CPU.
        """
        keys = {
            "models": {"sft": self.policy, "ppo": self.policy},
            "reward_model": FakeSource(self.reward_model),
            "sampling": SamplingParams(max_new_tokens=8, temperature=0.7),
            "sampler": LocalSampler(stop_interval=3),
            "output": str(self.folder / "evaluation"),
            "bootstrap": 20,
            **keys,
        }
        module = EvaluateModule(tokenizer=self.tokenizer, **keys)
        prompts = self.write("prompts", DEMONSTRATIONS)
        datamodule = PromptDataModule(test=prompts, max_length=64, eval_batch_size=4, tokenizer=self.tokenizer)
        flags = emulated_trainer(precision) if accelerator == ACCELERATOR else {"accelerator": accelerator}
        lightning.seed_everything(7, verbose=False)
        trainer = quick_trainer(default_root_dir=self.folder, logger=MetricsLogger(), **flags)
        with comparable():
            trainer.test(module, datamodule, verbose=False)
        return module
