"""``replay=<directory>``: compute a dumped training step again, and show where NaN or infinite values come from."""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning
import torch
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from rlhf.data import Batch, Prompt
from rlhf.distributed import is_rank_zero
from rlhf.errors import ConfigError, listed
from rlhf.logs import quiet_libraries
from rlhf.models import all_named_modules
from rlhf.overrides import leaves
from rlhf.run import apply_speed, build_trainer, builder_and_adapted_inputs
from rlhf.sampling import Rollout
from rlhf.stage.dumps import STATE, read_batches, read_report
from rlhf.stage.random_state import set_random_state
from rlhf.stages import stages

COMPARED = ("stage", "model", "adapter", "reward", "seed")  # parts of the configuration that a replay depends on
SHOWN_CHARACTERS = 60  # of a response


def replay(cfg: DictConfig) -> float:
    """Replay the dump in ``cfg.replay`` with the stage of this configuration, and print what is found. Returns NaN."""
    quiet_libraries()
    if cfg.stage_name not in stages() or stages()[cfg.stage_name].exports is None:
        raise ConfigError(
            f"replay={cfg.replay} requires a stage that trains, got stage={cfg.stage_name}.",
            "Repeat the command that the error of the run has shown.",
        )
    directory = Path(cfg.replay)
    callback = Replay(directory)
    check_same_config(OmegaConf.to_container(cfg, resolve=True), callback.summary["config"], directory)
    lightning.seed_everything(cfg.seed, workers=True, verbose=False)
    apply_speed(cfg)
    datamodule = instantiate(cfg.data)
    build, inputs = builder_and_adapted_inputs(cfg)
    module = build(**inputs, tokenizer=inputs["policy"].tokenizer(datamodule.training_texts()))
    module.precompute_ref_logprobs = False  # The batches of DPO contain them.
    silent = cfg.copy()
    silent.callbacks, silent.logger, silent.trainer.enable_checkpointing = {}, {}, False
    trainer = build_trainer(silent, [callback])
    warnings.filterwarnings("ignore", message=".*callbacks used to create the checkpoint.*")
    try:
        trainer.fit(module, datamodule, ckpt_path=str(directory / STATE), weights_only=True)
    except Replayed:
        return float("nan")
    raise ConfigError(
        f"replay={directory}: the dumped step comes after the end of training with this configuration.",
        "Repeat the command of the run, and add only replay=<directory>.",
    )


def check_same_config(config: Any, dumped: Mapping[str, Any], directory: Path) -> None:
    """Refuse a configuration that differs from the one of the dumped run in a key that the replay depends on.

    The module is built from the configuration of the command line. The one in the dump is only compared with it.

    Args:
        config: The configuration of the command line.
        dumped: The configuration in the dump; empty if the run was not started by ``train.py``.
        directory: Directory of the dump.
    """
    then, now = (dict(leaves({name: one.get(name) for name in COMPARED})) for one in (dumped or config, config))
    changed = [key for key in sorted(then.keys() | now.keys()) if then.get(key) != now.get(key)]
    if changed:
        differences = "; ".join(f"{key} was {then.get(key)} and is {now.get(key)}" for key in changed)
        raise ConfigError(
            f"replay={directory}: the configuration is not that of the dumped step: {differences}.",
            "Repeat the command of the run, and add only replay=<directory>.",
        )


class Replay(Callback):
    """Computes the batches of a dump again when training would start, and raises ``Replayed`` instead of training.

    Args:
        directory: Directory of the dump.

    Attributes:
        summary: Stage, step, fault and configuration of the dumped run.
        report: What has been found, as lines of text.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.summary = read_report(directory)
        self.report: list[str | Table] = []

    def on_train_start(self, trainer: lightning.Trainer, module: Any) -> None:
        self.report.append(f"Dumped: {self.summary['fault']}")
        plugin: Any = trainer.precision_plugin
        items = read_batches(self.directory, {kind.__name__: kind for kind in (*_subclasses(Batch), Rollout, Prompt)})
        for number, item in enumerate(items, 1):
            self.report.append(f"Batch {number} of {len(items)}")
            replay = _replay_rollout if "rollout" in item else _replay_step
            with plugin.forward_context(), first_nonfinite_output(module) as found:
                lines = replay(module, item)
            self.report += [*lines, *_weights(module), f"First module with an output that is not finite: {found[0]}"]
        if is_rank_zero():
            for line in self.report:
                Console().print(line, soft_wrap=not isinstance(line, Table), markup=False)
        raise Replayed


class Replayed(Exception):
    """The dump has been replayed, and there is nothing to train."""


def _subclasses(kind: type[Any]) -> Iterator[type[Any]]:
    for subclass in kind.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)


def _replay_step(module: Any, item: dict[str, Any]) -> list[str | Table]:
    """Return the loss of each row of a batch, and what the backward pass of the batch finds."""
    batch = item["batch"].to(module.device)
    with torch.enable_grad():
        set_random_state(item["random_state"])
        loss, _ = module.training_loss(batch)
        losses = []
        with torch.no_grad():
            for row in range(batch.row_count):
                set_random_state(item["random_state"])
                losses.append({"loss": float(module.training_loss(batch.select([row]))[0])})
        lines: list[str | Table] = [_table(losses, item["locations"]), f"Loss of the batch: {loss.item()}"]
        module.zero_grad()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with torch.autograd.detect_anomaly():
                    loss.backward()
            lines.append("Backward pass: no operation returns NaN")
        except RuntimeError as error:
            lines.append(f"Backward pass: {error}")
    gradients = [(name, weight.grad) for name, weight in module.named_parameters() if weight.grad is not None]
    return [*lines, f"Gradients that are not finite: {_names(gradients)}"]


def _replay_rollout(module: Any, item: dict[str, Any]) -> list[str | Table]:
    """Return score, log-prob, KL and value of each response of a rollout."""
    rollout, prompts = item["rollout"].to(module.device), item["batch"]
    experience = module.collector.evaluate_rollout(rollout, item["first_split"])
    scores, _ = module.collector.score(rollout, prompts)
    columns = {"score": scores, "log-prob": experience.logprobs.sum(dim=1), "KL": experience.kl.sum(dim=1)}
    if experience.values is not None:
        columns["value"] = experience.values.sum(dim=1)
    texts = rollout.decode(module.tokenizer)
    rows = [
        {**{name: float(values[row]) for name, values in columns.items()}, "response": texts[row][:SHOWN_CHARACTERS]}
        for row in range(len(texts))
    ]
    per_prompt = max(len(texts) // max(len(item["locations"]), 1), 1)
    return [_table(rows, [location for location in item["locations"] for _ in range(per_prompt)])]


def _table(rows: Sequence[Mapping[str, float | str]], locations: Sequence[str]) -> Table:
    table = Table()
    for title in ("row", *rows[0]):
        table.add_column(title, overflow="fold")
    for number, values in enumerate(rows):
        where = locations[number] if len(locations) == len(rows) else str(number + 1)
        cells = [value if isinstance(value, str) else f"{value:.6g}" for value in values.values()]
        faulty = any(isinstance(value, float) and not math.isfinite(value) for value in values.values())
        table.add_row(where, *cells, style="bold red" if faulty else None)
    return table


def _weights(module: nn.Module) -> list[str]:
    return [f"Weights that are not finite: {_names(list(module.named_parameters()))}"]


def _names(tensors: Sequence[tuple[str, Tensor]]) -> str:
    names = [name for name, tensor in tensors if not bool(tensor.isfinite().all())]
    return listed(names) or "none"


@contextmanager
def first_nonfinite_output(module: nn.Module) -> Iterator[list[str]]:
    """Yield a list with the name of the first module whose output is not finite in this context, or ``none``.

    Modules inside of frozen models count as well.
    """
    found = ["none"]

    def watch(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            if found[0] == "none" and any(not bool(tensor.isfinite().all()) for tensor in _tensors(output)):
                found[0] = name

        return hook

    handles = [part.register_forward_hook(watch(name)) for name, part in all_named_modules(module) if name]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _tensors(output: Any) -> Iterator[Tensor]:
    """Yield the floating-point tensors in an output of a module."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _tensors(value)
