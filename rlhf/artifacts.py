"""The files of a run: where the inputs of a stage are, what it exports, and how that was made."""

import logging
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from rlhf import __version__
from rlhf.errors import ConfigError
from rlhf.export import RL_TRAINED, open_model_source, save_huggingface, save_result
from rlhf.files import sha256_of_file
from rlhf.models import ModelSource
from rlhf.stage import Result
from rlhf.stages import BASE_MODEL, StageInfo, policy_stages, stages

log = logging.getLogger(__name__)


# Inputs


def resolve_input(cfg: DictConfig, key: str) -> ModelSource | list[ModelSource]:
    """Return the model source of one input of a stage.

    This is, in this order: the path or paths in ``stage.<key>``, the output of the stage that makes the input in this
    run, or the base model of ``model=`` where it is pretrained.

    Raises:
        ConfigError: None of these exists.
    """
    if (chosen := cfg.stage[key]) is not None:
        return open_sources(chosen)
    made_by = stages()[cfg.stage_name].inputs[key]
    if made_by == BASE_MODEL:
        return _base_model(cfg)
    if (path := output_of(cfg, made_by)) is not None:
        return open_model_source(str(path))
    if stages()[made_by].exports == "policy" and "path" in cfg.model:
        log.warning("run=%s has no %s model. The stage starts from model.path=%s.", cfg.run, made_by, cfg.model.path)
        return _base_model(cfg)
    raise ConfigError(
        f"stage={cfg.stage_name} requires the output of stage={made_by}, but run={cfg.run} has no "
        f"{Path(cfg.paths.run) / made_by / str(stages()[made_by].final)}.",
        f"Run python train.py stage={made_by} run={cfg.run}, or set stage.{key}=<path>",
    )


def open_sources(chosen: Any) -> ModelSource | list[ModelSource]:
    """Return the model source of a configured path, or those of a list of paths."""
    if OmegaConf.is_list(chosen):
        return [open_model_source(str(path)) for path in chosen]
    return open_model_source(str(chosen))


def output_of(cfg: DictConfig, stage: str) -> Path | None:
    """Return the path of the model that a stage has exported in this run, or None."""
    path = Path(cfg.paths.run) / stage / str(stages()[stage].final)
    return path if path.is_file() else None


def policies_to_evaluate(cfg: DictConfig) -> dict[str, ModelSource]:
    """Return the policies of ``stage.models`` by name; by default all policies of the run."""
    if cfg.stage.models:
        listed: Any = OmegaConf.to_container(cfg.stage.models)
        pairs = listed.items() if isinstance(listed, dict) else ((name, name) for name in listed)
        chosen = {str(name): str(path) for name, path in pairs}
    else:
        chosen = policies_of_run(Path(cfg.paths.run))
        if not chosen:
            raise ConfigError(
                f"stage=evaluate found no model to evaluate in {cfg.paths.run}.", f"Run python train.py run={cfg.run}"
            )
    return {name: open_model_source(_policy_path(cfg, path)) for name, path in chosen.items()}


def policies_of_run(directory: Path) -> dict[str, str]:
    """Return name and path of every policy of a run: the stages in their order, then the variants of the pipeline."""
    infos = policy_stages()
    found = [path for info in infos for path in sorted(directory.glob(f"*/{info.final}"))]
    names = {info.name for info in infos}
    of_stages = {path.parent.name: str(path) for path in found if path.parent.name in names}
    return {**of_stages, **{path.parent.name: str(path) for path in found}}


def _policy_path(cfg: DictConfig, path: str) -> str:
    if path not in stages():
        return policies_of_run(Path(cfg.paths.run)).get(path, path)  # a variant of the pipeline, or a path
    if (output := output_of(cfg, path)) is None:
        raise ConfigError(
            f"stage.models contains {path}, but run={cfg.run} has no {path} model.",
            f"Run python train.py stage={path} run={cfg.run}",
        )
    return str(output)


def resume_checkpoint(cfg: DictConfig, output: Path) -> str | None:
    """Return the checkpoint that ``resume=true`` continues from; None without it."""
    if not cfg.resume:
        return None
    last = output / "checkpoints" / "last.ckpt"
    if not last.is_file():
        raise ConfigError(f"resume=true requires a checkpoint, but there is no {last}.", "Set resume=false.")
    return str(last)


def _base_model(cfg: DictConfig) -> ModelSource:
    source: ModelSource = instantiate(cfg.model)
    return source


# Outputs


def export_result(cfg: DictConfig, output: Path, result: Result, provenance: dict[str, Any]) -> None:
    """Write the result of a stage: its ``*_final.pt``, and where they apply the run's final model and an HF folder."""
    info = stages()[cfg.stage_name]
    path = output / str(info.final)
    save_result(result, path, provenance)
    log.info("saved %s", path)
    run_directory = Path(cfg.paths.run)
    if output == run_directory / info.name and _makes_final_model(info, run_directory):
        save_result(result, run_directory / RL_TRAINED, provenance)
        log.info("saved %s, which load_model('rl_trained') opens", run_directory / RL_TRAINED)
    if cfg.save_hf and info.exports == "policy":
        save_huggingface(str(path), str(output / "hf"))
        log.info("saved %s, a folder that transformers opens", output / "hf")
    elif cfg.save_hf:
        log.warning("save_hf=true has no effect in stage=%s: only policies are written as a folder.", info.name)


def _makes_final_model(info: StageInfo, run_directory: Path) -> bool:
    """Return whether a stage makes the final model of a run: no stage of a lower ``rl_priority`` has an output."""
    if info.rl_priority is None:
        return False
    preferred = [
        other for other in stages().values() if other.rl_priority is not None and other.rl_priority < info.rl_priority
    ]
    return not any((run_directory / other.name / str(other.final)).is_file() for other in preferred)


def describe_provenance(cfg: DictConfig, inputs: dict[str, Any]) -> dict[str, Any]:
    """Return how a result is made: stage, inputs and data with their hashes, configuration and versions."""
    paths = {name: path for name in ("train", "val") if (path := cfg.data.get(name))}
    return {
        "stage": cfg.stage_name,
        "inputs": {
            name: [
                {"source": str(source), "sha256": sha256_of_file(getattr(source, "path", ""))}
                for source in (sources if isinstance(sources, list) else [sources])
            ]
            for name, sources in inputs.items()
            if sources is not None
        },
        "data": {name: {"path": path, "sha256": sha256_of_file(path)} for name, path in paths.items()},
        "config": OmegaConf.to_container(cfg, resolve=True),
        "versions": {
            "rlhf": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "lightning")},
        },
    }
