"""The precision that ``trainer.precision=auto`` stands for."""

from omegaconf import DictConfig


def resolve_precision(cfg: DictConfig) -> None:
    """Replace ``trainer.precision=auto`` by the precision in which the device is fast.

    Outputs record the precision that was used, so a run that is resumed on another kind of device reports the change.
    """
    if "trainer" in cfg and cfg.trainer.precision == "auto":
        cfg.trainer.precision = "bf16-mixed" if has_bfloat16(cfg.trainer.accelerator) else "32-true"


def has_bfloat16(accelerator: str) -> bool:
    """Return whether a device has instructions for matrix products in bfloat16.

    Args:
        accelerator: Accelerator of the Trainer. ``auto`` is a CUDA device if there is one, and the CPU otherwise.
    """
    import torch  # imported here, because commands that are rejected should not load it

    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if accelerator not in ("auto", "cpu"):
        return False
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
