"""Under mixed precision, autocast casts the weights of the policy once per validation batch, not once per token."""

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from contract.configs import compose_config
from harness import TinyRun
from rlhf.sampling import SamplingParams


class Casts(TorchDispatchMode):
    """Counts how many elements of given parameters are cast to another dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: set[int] = set()
        self.elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.overloadpacket.__name__ in ("_to_copy", "to") and args[0].data_ptr() in self.addresses:
            self.elements += args[0].numel()
        return function(*args, **(kwargs or {}))


def test_weights_are_cast_once_per_rollout(tiny_run: TinyRun) -> None:
    """In validation, 8 tokens are sampled, and then scored: two casts of each weight, and a few more of the convolution
    of Mamba. Autocast has no cache in inference mode, and Lightning switches the cache off.
    """
    flags = {"precision": "bf16-mixed", "inference_mode": compose_config("stage=ppo").trainer.inference_mode}
    val = tiny_run.write("val", [{"prompt": "Who won?", "completion": "May"}])
    sampling = SamplingParams(max_new_tokens=8, temperature=0.7, stop_tokens=["<pad>"])
    run = tiny_run.build("ppo", sampling=sampling, data={"val": val}, trainer=flags)
    with Casts() as casts:
        run.module.setup = lambda stage: casts.addresses.update(addresses(run.module))
        run.trainer.validate(run.module, run.datamodule, verbose=False)
    assert 0 < casts.elements <= 3 * sum(weight.numel() for weight in run.module.policy.parameters())


def addresses(module: Any) -> set[int]:
    """Open the models of a stage, and return the addresses of the weights of the policy."""
    module.configure_model()
    return {weight.data_ptr() for weight in module.policy.parameters()}
