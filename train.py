"""The command line: ``python train.py stage=<name> key=value ...``. See ``python train.py --help``."""

import sys

import hydra
from omegaconf import DictConfig

from rlhf.errors import plain_errors
from rlhf.run_names import check_run_override
from rlhf.sweep import exit_code


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> float:
    """Run one stage or the pipeline, and return the metric that a sweep optimizes."""
    from rlhf.main import run  # Imported here because it loads torch, which --help does not need.

    with plain_errors():
        return run(cfg)


if __name__ == "__main__":
    with plain_errors():
        check_run_override(sys.argv[1:])
        main()
        sys.exit(exit_code())  # of a sweep in which a job has failed
