"""One of two processes of a data-parallel run on the CPU; ``two_ranks`` in conftest.py starts both."""

import os
import sys
from pathlib import Path

import torch

from pitfalls.runs import ONE_STEP, Runs
from rlhf.models import Pretrained
from rlhf.sampling import SamplingParams

DDP = {"strategy": "ddp", "devices": 2, "max_steps": 1}


def main(folder: Path, rank: int) -> None:
    """Train the model in ``folder`` as one of two ranks, and leave weights and what was seen in ``folder/<rank>``."""
    source = Pretrained(str(folder))
    tokenizer = source.tokenizer()
    own = folder / str(rank)
    own.mkdir()
    runs = Runs(own, tokenizer, source.language_model(tokenizer))

    run = runs.fit("sft", data={"batch_size": 4}, trainer=DDP, **ONE_STEP)
    torch.save((run.module.policy.lm.state_dict(), [batch.loss_terms for batch in run.batches]), own / "sft.pt")

    # the answers of rank 0 end after 2 tokens, those of rank 1 go on to 16: what one waits for, the other must still do
    sampling = SamplingParams(max_new_tokens=(2, 16)[rank], temperature=0.7)
    run = runs.fit("ppo", data={"batch_size": 4}, trainer={**DDP, "max_steps": 2, "max_epochs": 2}, sampling=sampling)
    longest = [int(batch.response_mask.sum(dim=1).max()) for batch in run.batches]
    torch.save((run.module.policy.lm.state_dict(), longest), own / "ppo.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for architecture in ("transformer", "mamba"):
        main(Path(sys.argv[1]) / architecture, int(os.environ["LOCAL_RANK"]))
