"""One of the two processes of a data-parallel run on the CPU. The fixture ``two_ranks`` in conftest.py starts both."""

import os
import sys
from pathlib import Path

import torch

from harness import TinyRun
from pitfalls.settings import ONE_STEP
from rlhf.distributed import disconnect
from rlhf.models import Pretrained
from rlhf.sampling import SamplingParams

DDP = {"strategy": "ddp", "devices": 2, "max_steps": 1}


def main(folder: Path, rank: int) -> None:
    """Train the model in ``folder`` as one of two ranks. Weights and batch statistics go to ``folder/<rank>``."""
    source = Pretrained(str(folder))
    tokenizer = source.tokenizer()
    output = folder / str(rank)
    output.mkdir()
    tiny_run = TinyRun(output, tokenizer, source.language_model(tokenizer))

    run = tiny_run.train("sft", data={"batch_size": 4}, trainer=DDP, **ONE_STEP)
    torch.save((run.module.policy.lm.state_dict(), [batch.loss_terms for batch in run.batches]), output / "sft.pt")

    # Responses of rank 0 end after 2 tokens, those of rank 1 after up to 16. No rank may wait for the other meanwhile.
    sampling = SamplingParams(max_new_tokens=(2, 16)[rank], temperature=0.7)
    keys = {"sampling": sampling, "minibatch_size": 8, "ppo_epochs": 1}
    run = tiny_run.train("ppo", data={"batch_size": 4}, trainer={**DDP, "max_steps": 2, "max_epochs": 2}, **keys)
    longest = [int(batch.response_mask.sum(dim=1).max()) for batch in run.batches]
    torch.save((run.module.policy.lm.state_dict(), longest), output / "ppo.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for architecture in ("transformer", "mamba"):
        main(Path(sys.argv[1]) / architecture, int(os.environ["LOCAL_RANK"]))
    disconnect()
