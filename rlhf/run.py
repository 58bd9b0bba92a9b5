"""One stage from configuration to result: seed, build, fit, export. The one place that instantiates."""

import logging
import platform
import tempfile
import time
from importlib.metadata import version
from inspect import signature
from pathlib import Path
from typing import Any, get_args

import lightning
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import get_object, instantiate
from lightning.pytorch.callbacks import Callback, Checkpoint, ProgressBar
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from rlhf import __version__
from rlhf.errors import UserError
from rlhf.export import (
    FINAL,
    RL_STAGES,
    RL_TRAINED,
    Export,
    describe,
    hash_file,
    open_model_source,
    save_huggingface,
    save_result,
)
from rlhf.logs import log_file, quiet_libraries
from rlhf.preflight import run_preflight
from rlhf.stage import Result

log = logging.getLogger(__name__)


def run(cfg: DictConfig) -> float:
    """What ``train.py`` does: one stage, or the pipeline. Returns the figure of merit, for sweeps."""
    if HydraConfig.initialized() and HydraConfig.get().mode is RunMode.MULTIRUN:
        cfg.paths.output = HydraConfig.get().runtime.output_dir
    if cfg.check not in (False, True, "only"):
        raise UserError(f"check={cfg.check} is none of false, true, only", "check=true")
    if cfg.stage_name == "pipeline":
        from rlhf.pipeline import run_pipeline

        return run_pipeline(cfg)
    return run_stage(cfg)


def run_stage(cfg: DictConfig) -> float:
    """Run one stage and write what it leaves behind."""
    quiet_libraries()
    output = Path(cfg.paths.output)
    with log_file(output / f"{cfg.stage_name}.log"):
        started = time.perf_counter()
        lightning.seed_everything(cfg.seed, workers=True, verbose=False)
        merit = evaluate(cfg) if cfg.stage_name == "evaluate" else train(cfg, output)
        log.info("%s took %.0f s; everything lies in %s", cfg.stage_name, time.perf_counter() - started, output)
        return merit


def train(cfg: DictConfig, output: Path) -> float:
    """Fit one stage; the number it is judged by."""
    for part in ("stage", "data", "model"):
        _check_numbers(OmegaConf.to_container(cfg[part], resolve=False), part)
    parents = {"policy": _policy(cfg)}
    checkpoint = _checkpoint(cfg, output)

    datamodule = instantiate(cfg.data)
    build = instantiate(cfg.stage, _partial_=True)
    if "reward_model" in cfg.stage:
        parents["reward_model"] = _reward_models(cfg, build.keywords["reward"].needs_model)
    module = build(**parents)
    module.tokenizer = datamodule.tokenizer = parents["policy"].tokenizer(datamodule.training_texts())
    provenance = _provenance(cfg, parents)
    proof = [_SelfCheck(output, provenance, only=cfg.check == "only")] if cfg.check else []
    trainer = _trainer(cfg, [_ExportHeader(provenance), *proof])
    try:
        trainer.fit(module, datamodule, ckpt_path=checkpoint)
    except _Checked:
        return float("nan")
    if module.monitor not in trainer.callback_metrics and datamodule.records("val"):
        trainer.validate(module, datamodule, verbose=False)

    if trainer.fast_dev_run:
        log.warning("trainer.fast_dev_run: nothing is exported")
    elif trainer.is_global_zero:
        _export(cfg, output, module.result(), provenance)
    merit = trainer.callback_metrics.get(module.monitor)
    log.info("%s = %s", module.monitor, "none" if merit is None else f"{float(merit):.4f}")
    return float("nan") if merit is None else float(merit)


def _check_numbers(node: Any, path: str) -> None:
    """Refuse text where a class or function wants a number, before anything is loaded; ``node`` is unresolved."""
    if not isinstance(node, dict):
        return
    target = get_object(node["_target_"]) if "_target_" in node else None
    functions = [c.__init__ for c in target.__mro__] if isinstance(target, type) else [target] if target else []
    wanted = {
        p.name: get_args(p.annotation) or (p.annotation,)
        for function in functions
        for p in signature(function).parameters.values()
    }
    for key, value in node.items():
        types = wanted.get(key, ())
        number = (int in types or float in types) and str not in types
        if number and isinstance(value, str) and value != "???" and not value.startswith("${"):
            raise UserError(f"{path}.{key}={value} is not a number", f"{path}.{key}=<number>")
        _check_numbers(value, f"{path}.{key}")


def evaluate(cfg: DictConfig) -> float:
    """Compare the models of a run on held-out prompts, and print the table."""
    if cfg.check == "only":
        log.info("check=only: stage=evaluate trains nothing, so there is nothing to check")
        return float("nan")
    policies = _policies(cfg)
    reward = _existing(cfg, "reward")
    chosen = cfg.stage.reward_model
    reward_model = open_model_source(chosen) if chosen else open_model_source(str(reward)) if reward else None
    settings: Any = OmegaConf.to_container(cfg.stage, resolve=True)
    datamodule = instantiate(cfg.data)
    module = instantiate(settings, _partial_=True)(models=policies, reward_model=reward_model)
    if module.baseline not in policies:
        raise UserError(
            f"stage.baseline={module.baseline} is not among the models: {', '.join(policies)}",
            f"stage.baseline={next(iter(policies))}",
        )
    tokenizers = {name: source.tokenizer(()) for name, source in policies.items()}
    module.tokenizer = datamodule.tokenizer = tokenizers[module.baseline]
    for name, tokenizer in tokenizers.items():
        if tokenizer.get_vocab() != module.tokenizer.get_vocab():
            raise UserError(
                f"model {name} has another vocabulary than {module.baseline}: their log-probs cannot be compared"
            )
    trainer = _trainer(cfg, [])
    if trainer.world_size > 1:
        raise UserError("stage=evaluate runs on one device", "trainer.devices=1 trainer.strategy=auto")
    trainer.test(module, datamodule, verbose=False)
    Console().print(module.table())
    return module.merit


# where models come from


def _policy(cfg: DictConfig) -> Any:
    """What the stage starts from: what was typed, the run's SFT model, or the base model of ``model=``."""
    if cfg.stage.policy:
        return open_model_source(cfg.stage.policy)
    if cfg.stage_name == "sft":
        return instantiate(cfg.model)
    if sft := _existing(cfg, "sft"):
        return open_model_source(str(sft))
    if "path" in cfg.model:
        log.warning("run=%s has no SFT model: starting from model.path=%s itself", cfg.run, cfg.model.path)
        return instantiate(cfg.model)
    return _parent(cfg, "policy", "sft")


def _parent(cfg: DictConfig, key: str, stage: str) -> Any:
    """What was typed as ``stage.<key>``, or what an earlier stage of this run made."""
    typed, made = cfg.stage[key], _existing(cfg, stage)
    if typed:
        return open_model_source(typed)
    if made is None:
        raise UserError(
            f"run={cfg.run}: stage={cfg.stage_name} needs the result of stage={stage}, and there is no "
            f"{Path(cfg.paths.run) / stage / FINAL[stage]}",
            f"python train.py stage={stage} run={cfg.run}   or name one: stage.{key}=<path>",
        )
    return open_model_source(str(made))


def _reward_models(cfg: DictConfig, needed: bool) -> list[Any]:
    """What was typed as ``stage.reward_model``, one or several; else the run's, if the reward reads a model."""
    if OmegaConf.is_list(cfg.stage.reward_model):
        return [open_model_source(path) for path in cfg.stage.reward_model]
    return [_parent(cfg, "reward_model", "reward")] if cfg.stage.reward_model or needed else []


def _existing(cfg: DictConfig, stage: str) -> Path | None:
    path = Path(cfg.paths.run) / stage / FINAL[stage]
    return path if path.is_file() else None


def _policies(cfg: DictConfig) -> dict[str, Any]:
    """The models to compare: those of ``stage.models``, by default every policy of the run."""
    if cfg.stage.models:
        listed = OmegaConf.to_container(cfg.stage.models)
        pairs = listed.items() if isinstance(listed, dict) else ((name, name) for name in listed)
        chosen = {str(name): str(path) for name, path in pairs}
    else:
        chosen = _made(Path(cfg.paths.run))
        if not chosen:
            raise UserError(f"run={cfg.run}: no model to evaluate in {cfg.paths.run}", f"python train.py run={cfg.run}")
    sources = {}
    for name, path in chosen.items():
        made = _existing(cfg, path) if path in FINAL else None
        if path in FINAL and made is None:
            raise UserError(f"run={cfg.run} has no {path} model", f"python train.py stage={path} run={cfg.run}")
        sources[name] = open_model_source(str(made or path))
    return sources


def _made(run_folder: Path) -> dict[str, str]:
    """Name and file of every policy of a run: the stages in order, then the pipeline's variants of them."""
    stages = [stage for stage in FINAL if stage != "reward"]
    files = [path for stage in stages for path in sorted(run_folder.glob(f"*/{FINAL[stage]}"))]
    own = {path.parent.name: str(path) for path in files if path.parent.name in stages}
    return {**own, **{path.parent.name: str(path) for path in files}}


def _checkpoint(cfg: DictConfig, output: Path) -> str | None:
    if not cfg.resume:
        return None
    last = output / "checkpoints" / "last.ckpt"
    if not last.is_file():
        raise UserError(f"resume=true, but there is no {last}", "leave resume=true off to start anew")
    return str(last)


# what the stage leaves behind


def _export(cfg: DictConfig, output: Path, result: Any, provenance: dict[str, Any]) -> None:
    stage = cfg.stage_name
    path = output / FINAL[stage]
    save_result(result, path, provenance)
    log.info("saved %s", path)
    run_folder = Path(cfg.paths.run)
    better = RL_STAGES[: RL_STAGES.index(stage)] if stage in RL_STAGES else ()
    outdone = any((run_folder / other / FINAL[other]).is_file() for other in better)
    if output == run_folder / stage and stage in RL_STAGES and not outdone:
        save_result(result, run_folder / RL_TRAINED, provenance)
        log.info("saved %s, what load_model('rl_trained') opens", run_folder / RL_TRAINED)
    if cfg.save_hf:
        if stage == "reward":
            log.warning(
                "save_hf: a reward model has no Hugging Face form with its head; only the policies get a folder"
            )
        else:
            save_huggingface(str(path), str(output / "hf"))
            log.info("saved %s, a folder for transformers", output / "hf")


def _provenance(cfg: DictConfig, parents: dict[str, Any]) -> dict[str, Any]:
    paths = {name: path for name in ("train", "val") if (path := cfg.data.get(name))}
    return {
        "stage": cfg.stage_name,
        "parents": {
            name: [
                {"source": str(source), "sha256": hash_file(getattr(source, "path", ""))}
                for source in (sources if isinstance(sources, list) else [sources])
            ]
            for name, sources in parents.items()
        },
        "data": {name: {"path": path, "sha256": hash_file(path)} for name, path in paths.items()},
        "config": OmegaConf.to_container(cfg, resolve=True),
        "versions": {
            "rlhf": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "lightning")},
        },
    }


def _trainer(cfg: DictConfig, callbacks: list[Callback]) -> lightning.Trainer:
    configured = [instantiate(callback) for callback in cfg.callbacks.values() if callback is not None]
    for flag, kind in {"enable_progress_bar": ProgressBar, "enable_checkpointing": Checkpoint}.items():
        if cfg.trainer[flag] is False:
            configured = [callback for callback in configured if not isinstance(callback, kind)]
    loggers = [instantiate(logger) for logger in cfg.logger.values() if logger is not None]
    trainer: lightning.Trainer = instantiate(cfg.trainer, callbacks=[*configured, *callbacks], logger=loggers)
    if isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy | DeepSpeedStrategy):
        raise UserError(
            f"trainer.strategy={cfg.trainer.strategy}: results of sharded models cannot be exported yet",
            "trainer=ddp, or trainer.strategy=auto",
        )
    return trainer


class _ExportHeader(Callback):
    """Puts into every checkpoint what is needed to open its model without the run: config, tokenizer, provenance."""

    def __init__(self, provenance: dict[str, Any]) -> None:
        self.provenance = provenance

    def on_save_checkpoint(self, trainer: lightning.Trainer, module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["rlhf"] = describe(module.result(), self.provenance)


class _SelfCheck(Callback):
    """Has the stage prove itself before it trains, and with ``only`` stops after that."""

    def __init__(self, output: Path, provenance: dict[str, Any], only: bool) -> None:
        self.output = output
        self.provenance = provenance
        self.only = only

    def on_fit_start(self, trainer: lightning.Trainer, module: Any) -> None:
        run_preflight(module, self.reopen)
        if self.only:
            raise _Checked

    def reopen(self, result: Result) -> Any:
        """A result after its way through a file, which lies beside the real ones for a moment."""
        with tempfile.TemporaryDirectory(dir=self.output, prefix="check-") as folder:
            path = Path(folder, "result.pt")
            save_result(result, path, self.provenance)
            export = Export(str(path))
            scalar = export.kind == "scalar_model"
            return export.scalar_model(result.tokenizer) if scalar else export.language_model(result.tokenizer)


class _Checked(Exception):
    """``check=only``: the checks have passed, and nothing is to be trained."""
