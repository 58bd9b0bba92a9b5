"""The files of a run: where the inputs of a stage are, what it exports, and how that was made."""

import json
import logging
import platform
import shutil
from collections.abc import Callable, Collection, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from rlhf import __version__
from rlhf.distributed import barrier, is_rank_zero
from rlhf.errors import ConfigError
from rlhf.export import open_model_source, save_result
from rlhf.export.huggingface import save_huggingface
from rlhf.files import FINAL_MODEL, atomic_write, sha256_of_file
from rlhf.lineage import code_files, model_digest, outdated_stages, warn_about_outdated
from rlhf.models import BaseModel, ModelSource, SharedBase, WithAdapter, as_sequence
from rlhf.run_names import OUTPUTS, RUN, command_in_run
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
    if (path := input_path(cfg, key)) is not None:
        return open_sources(cfg, path)
    if (made_by := stages()[cfg.stage_name].inputs[key]) != BASE_MODEL:
        log.warning("run=%s has no %s model. The stage starts from model.path=%s.", cfg.run, made_by, cfg.model.path)
    return _base_model(cfg)


def input_path(cfg: DictConfig, key: str, planned: Collection[Path] = ()) -> Any:
    """Return the path or the paths of one input of a stage, as ``resolve_input`` finds it; None for the base model.

    Args:
        cfg: The configuration of the stage.
        key: The input.
        planned: Absolute directories of stages that will have been trained before this one.

    Raises:
        ConfigError: There is no such input.
    """
    if (chosen := cfg.stage[key]) is not None:
        return chosen
    made_by = stages()[cfg.stage_name].inputs[key]
    if made_by == BASE_MODEL:
        return None
    path = Path(cfg.paths.run) / made_by / str(stages()[made_by].final)
    if path.is_file() or path.parent.absolute() in planned:
        return str(path)
    if stages()[made_by].exports == "policy" and "path" in cfg.model:
        return None
    raise ConfigError(
        f"stage={cfg.stage_name} requires the output of stage={made_by}, but run={cfg.run} has no {path}.",
        f"Run {command_in_run(Path(cfg.paths.run), f'stage={made_by}')}, or set stage.{key}=<path>",
    )


def open_sources(cfg: DictConfig, chosen: Any) -> ModelSource | list[ModelSource]:
    """Return the model source of a configured path, or those of a list of paths."""
    attention = cfg.model.get("attention")
    if OmegaConf.is_list(chosen):
        return [open_model_source(str(path), attention=attention) for path in chosen]
    return open_model_source(str(chosen), attention=attention)


def with_adapter(cfg: DictConfig, inputs: dict[str, Any]) -> dict[str, Any]:
    """Return the inputs of a stage as sources of models with the adapter of ``adapter=``, if there is one.

    Raises:
        ConfigError: The policy has random weights.
    """
    if cfg.adapter is None:
        return inputs
    lora, shared = instantiate(cfg.adapter), SharedBase()
    BaseModel.require_path(inputs["policy"])

    def adapted(source: Any) -> Any:
        if isinstance(source, list):
            return [adapted(one) for one in source]
        return None if source is None else WithAdapter(source, lora, shared)

    return {name: adapted(source) for name, source in inputs.items()}


def output_of(cfg: DictConfig, stage: str) -> Path | None:
    """Return the path of the model that a stage has exported in this run, or None."""
    path = Path(cfg.paths.run) / stage / str(stages()[stage].final)
    return path if path.is_file() else None


def policies_to_evaluate(cfg: DictConfig) -> dict[str, ModelSource]:
    """Return the policies of ``stage.models`` by name; by default all policies of the run."""
    return open_policies(cfg, cfg.stage.models, key="stage.models")


def open_policies(cfg: DictConfig, models: Any, *, key: str) -> dict[str, ModelSource]:
    """Return policies by name.

    Args:
        cfg: The composed configuration.
        models: Names of stages or variants, or paths: a list, or a mapping of names to these. None or empty: all
            policies of the run.
        key: The key of ``models``, for messages.

    Raises:
        ConfigError: There is no such model, or the run has no policy.
    """
    if models:
        chosen = named(models)
    else:
        chosen = policies_of_run(Path(cfg.paths.run))
        if not chosen:
            raise ConfigError(
                f"stage={cfg.stage_name} found no model in {cfg.paths.run}.",
                f"Run {command_in_run(Path(cfg.paths.run))}",
            )
    attention = cfg.model.get("attention")
    paths = {name: _policy_path(cfg, path, key) for name, path in chosen.items()}
    return {name: open_model_source(path, attention=attention) for name, path in paths.items()}


def named(models: Any) -> dict[str, str]:
    """Return the stages, variants or paths in ``stage.models`` by name."""
    listed: Any = OmegaConf.to_container(models) if OmegaConf.is_config(models) else models
    pairs = listed.items() if isinstance(listed, Mapping) else ((name, name) for name in listed)
    return {str(name): str(path) for name, path in pairs}


def policies_of_run(directory: Path) -> dict[str, str]:
    """Return name and path of every policy of a run: the stages in their order, then the variants of the pipeline."""
    infos = policy_stages()
    found = [path for info in infos for path in sorted(directory.glob(f"*/{info.final}"))]
    names = {info.name for info in infos}
    of_stages = {path.parent.name: str(path) for path in found if path.parent.name in names}
    return {**of_stages, **{path.parent.name: str(path) for path in found}}


def _policy_path(cfg: DictConfig, path: str, key: str) -> str:
    if path not in stages():
        return policies_of_run(Path(cfg.paths.run)).get(path, path)  # a variant of the pipeline, or a path
    if (output := output_of(cfg, path)) is None:
        raise ConfigError(
            f"{key} contains {path}, but run={cfg.run} has no {path} model.",
            f"Run {command_in_run(Path(cfg.paths.run), f'stage={path}')}",
        )
    return str(output)


def _base_model(cfg: DictConfig) -> ModelSource:
    source: ModelSource = instantiate(cfg.model)
    return source


# Outputs


def export_result(cfg: DictConfig, output: Path, result: Result, provenance: dict[str, Any]) -> None:
    """Write the result of a stage: its ``*_final.pt``, and where they apply the run's final model and an HF folder.

    All ranks call this function, and wait until rank 0 has written the files.
    """
    info = stages()[cfg.stage_name]
    path = output / str(info.final)
    save_result(result, path, provenance)
    if is_rank_zero():
        log.info("saved %s", path)
        run_directory = Path(cfg.paths.run)
        if output == run_directory / info.name:
            warn_about_outdated(run_directory, info)
        if _makes_final_model(info, path, run_directory):
            make_final_model(path, run_directory)
        _write_huggingface(cfg, path, output / "hf")
    barrier()


def complete_export(cfg: DictConfig, output: Path, start: Callable[[], None]) -> None:
    """Write what the export of a finished stage lacks: the run's final model and an HF folder where they apply.

    Args:
        cfg: The configuration of the stage.
        output: Directory of the stage.
        start: Called before anything is written.
    """
    info, run_directory = stages()[cfg.stage_name], Path(cfg.paths.run)
    path = output / str(info.final)
    log.info("stage=%s is finished: %s stays as it is.", info.name, path)
    if not is_rank_zero() or cfg.trainer.fast_dev_run or cfg.check == "only":
        return
    lacks_folder = bool(cfg.save_hf) and not _has_huggingface(cfg, path, output / "hf")
    lacks_model = _is_older(run_directory / FINAL_MODEL, path) and _makes_final_model(info, path, run_directory)
    if lacks_folder or lacks_model:
        start()
    if lacks_model:
        make_final_model(path, run_directory)
    if lacks_folder:
        _write_huggingface(cfg, path, output / "hf")


def _makes_final_model(info: StageInfo, path: Path, run_directory: Path) -> bool:
    """Return whether the result of a stage becomes the final model of the run: no preferred stage has made that.

    Stages of a lower ``rl_priority`` are preferred, if they were trained from the current models of the run.
    """
    if info.rl_priority is None or path.parent != run_directory / info.name:
        return False
    outdated = outdated_stages(run_directory)
    return not any(
        (run_directory / other.name / str(other.final)).is_file() and other.name not in outdated
        for other in stages().values()
        if other.rl_priority is not None and other.rl_priority < info.rl_priority
    )


def _is_older(path: Path, other: Path) -> bool:
    """Return whether a file is older than another one, or missing."""
    return not path.is_file() or path.stat().st_mtime_ns < other.stat().st_mtime_ns


def make_final_model(path: Path, run_directory: Path) -> None:
    """Copy the result of a stage to the final model of a run, on rank 0."""
    if not is_rank_zero():
        return
    with open(path, "rb") as source:
        atomic_write(run_directory / FINAL_MODEL, lambda file: shutil.copyfileobj(source, file))
    log.info("saved %s, which %s opens", run_directory / FINAL_MODEL, load_call(run_directory / FINAL_MODEL))


def load_call(final: Path) -> str:
    """Return the Python code that opens the final model of a run."""
    run = final.parent
    if run.parent != Path(OUTPUTS):
        return f"load_model({json.dumps(str(final))})"
    return 'load_model("rl_trained")' if run.name == RUN else f'load_model("rl_trained", run={json.dumps(run.name)})'


def _has_huggingface(cfg: DictConfig, path: Path, directory: Path) -> bool:
    """Return whether a Hugging Face folder of a result exists, with the adapter as ``save_hf`` asks for it."""
    is_adapter = (directory / "adapter_config.json").is_file()
    wants_adapter = cfg.adapter is not None and cfg.save_hf != "merged"
    return is_adapter == wants_adapter and not _is_older(directory / "tokenizer.json", path)  # the last file written


def _write_huggingface(cfg: DictConfig, path: Path, directory: Path) -> None:
    """Write a result as a Hugging Face folder if ``save_hf`` asks for it and transformers has a class for it."""
    if cfg.save_hf:
        try:
            save_huggingface(str(path), str(directory), merged=cfg.save_hf == "merged")
        except ConfigError as error:
            log.warning("%s", error)
            return
        opened_by = "peft" if cfg.adapter is not None and cfg.save_hf != "merged" else "transformers"
        log.info("saved %s, a folder that %s opens", directory, opened_by)
    elif directory.is_dir():  # of a run that has been extended
        log.warning("%s holds the earlier result. To replace it, repeat the command with save_hf=true.", directory)


def describe_provenance(cfg: DictConfig, inputs: dict[str, Any]) -> dict[str, Any]:
    """Return how a result is made: stage, inputs and data with their digests, configuration and versions."""
    paths = {name: path for name in ("train", "val") if (path := cfg.data.get(name))}
    config: Any = OmegaConf.to_container(cfg, resolve=True)
    return {
        "stage": cfg.stage_name,
        "inputs": {
            name: [
                {"source": str(source), "sha256": model_digest(getattr(source, "path", ""))}
                for source in as_sequence(sources)
            ]
            for name, sources in inputs.items()
            if sources is not None
        },
        "data": {name: {"path": path, "sha256": sha256_of_file(path)} for name, path in paths.items()},
        "code": {key: {"path": path, "sha256": sha256_of_file(path)} for key, path in code_files(config).items()},
        "config": config,
        "versions": {
            "rlhf": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "lightning")},
        },
    }
