"""Rounds of the pipeline: collect preferences of the current policy's responses, train on them, and evaluate."""

from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from rlhf.errors import ConfigError
from rlhf.overrides import quote
from rlhf.stages import policy_stages, stages


@dataclass(frozen=True)
class RoundStep:
    """One step of a round.

    Args:
        name: Name of the step, such as ``round_1/dpo``. It is also its directory in the run.
        stage: The stage.
        overrides: Its inputs, data and output, as on the command line.
    """

    name: str
    stage: str
    overrides: list[str]


def round_steps(cfg: DictConfig, directory: Path) -> list[RoundStep]:
    """Return the steps of all rounds of ``pipeline.rounds``.

    A round samples responses of the policy of the round before, labels them (``stage=collect``), and trains that
    policy on the pairs. Each round evaluates the policies of all rounds so far.

    Args:
        cfg: The configuration of the pipeline.
        directory: Directory of the run.
    """
    own = cfg.pipeline.round
    check_round(cfg)
    policies = {str(own.policy): _policy_path(directory, str(own.policy))}
    steps: list[RoundStep] = []
    for number in range(1, cfg.pipeline.rounds + 1):
        name = f"round_{number}"
        steps += [
            RoundStep(f"{name}/{stage}", stage, _overrides(cfg, directory, number, stage, policies))
            for stage in own.steps
            if stage != "evaluate"
        ]
        policies[name] = _policy_path(directory, name, _trained_by(own.steps))
        if "evaluate" in own.steps:
            steps.append(
                RoundStep(f"{name}/evaluate", "evaluate", _overrides(cfg, directory, number, "evaluate", policies))
            )
    return steps


def final_policy(cfg: DictConfig, directory: Path) -> Path:
    """Return the path of the policy of the last round."""
    return _policy_path(directory, f"round_{cfg.pipeline.rounds}", _trained_by(cfg.pipeline.round.steps))


def check_round(cfg: DictConfig) -> None:
    """Reject rounds without labels or without a policy, and steps that cannot be part of a round.

    Raises:
        ConfigError: ``pipeline.round`` is configured inconsistently.
    """
    steps, policy = list(cfg.pipeline.round.steps), str(cfg.pipeline.round.policy)
    allowed = ("collect", "reward", *(info.name for info in policy_stages() if info.name != "sft"), "evaluate")
    fix = "Set pipeline.round.steps=[collect,dpo,evaluate] or [collect,reward,ppo,evaluate]."
    if unknown := [step for step in steps if step not in allowed]:
        raise ConfigError(
            f"pipeline.round.steps must consist of {', '.join(allowed)}, got {', '.join(map(str, unknown))}.", fix
        )
    trained = [step for step in steps if stages()[step].exports == "policy"]
    if steps[:1] != ["collect"] or len(trained) != 1 or len(set(steps)) < len(steps):
        raise ConfigError(
            f"pipeline.round.steps must start with collect and contain one stage that trains a policy, got "
            f"[{','.join(steps)}].",
            fix,
        )
    if policy not in {info.name for info in policy_stages()} and not Path(policy).is_file():
        raise ConfigError(
            f"pipeline.round.policy must be a stage of the run or a file, got {policy}.",
            "Set pipeline.round.policy=sft.",
        )


def _overrides(cfg: DictConfig, directory: Path, number: int, stage: str, policies: dict[str, Path]) -> list[str]:
    """Return where a step of a round reads and writes.

    Args:
        cfg: The configuration of the pipeline.
        directory: Directory of the run.
        number: Number of the round, from 1.
        stage: The stage.
        policies: The policy that the rounds start from, and those of the rounds so far, by name.
    """
    own, start = directory / f"round_{number}", next(iter(policies))
    found = [f"paths.output={quote(own / stage)}", f"seed={_seed(cfg.seed, number)}"]
    if stage == "evaluate":
        models = ",".join(f"{Path(name).stem}:{quote(path)}" for name, path in policies.items())
        return [*found, f"stage.models={{{models}}}", f"stage.baseline={Path(start).stem}"]
    # A reward model starts from the same policy in every round; a policy is trained further.
    found.append(f"stage.policy={quote(policies[start] if stage == 'reward' else list(policies.values())[-1])}")
    if stage == "collect" and number > 1 and cfg.pipeline.round.accumulate:
        found.append(f"stage.include=[{quote(directory / f'round_{number - 1}' / 'collect' / _preferences())}]")
    if stages()[stage].reads == "preferences":
        found += [f"data.train={quote(own / 'collect' / _preferences())}", "data.val=null"]
    elif stage != "collect" and "reward" in cfg.pipeline.round.steps:
        found.append(f"stage.reward_model={quote(own / 'reward' / str(stages()['reward'].final))}")
    return found


def _trained_by(steps: list[str]) -> str:
    return next(step for step in steps if stages()[step].exports == "policy")


def _policy_path(directory: Path, name: str, stage: str | None = None) -> Path:
    """Return the path of a stage's policy, of the policy that a stage has trained in a round, or of a file."""
    if name in stages():
        return directory / name / str(stages()[name].final)
    return Path(name) if stage is None else directory / name / stage / str(stages()[stage].final)


def _preferences() -> str:
    return str(stages()["collect"].final)


def _seed(seed: int, number: int) -> int:
    """Return the seed of a round. Those of all rounds of runs with small seeds differ."""
    return (1000 * number + seed) % 2**32
