"""The one command: ``python train.py stage=<name> key=value ...``; ``python train.py --help`` tells the rest."""

import hydra
from omegaconf import DictConfig

from rlhf.errors import plain_errors


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> float:
    """Run one stage, or all of them, and return the figure a sweep optimises."""
    from rlhf.run import run  # loads torch: not for --help

    with plain_errors():
        return run(cfg)


if __name__ == "__main__":
    with plain_errors():
        main()
