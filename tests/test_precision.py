"""``trainer.precision=auto`` is bf16-mixed where the device has instructions for it."""

import pytest
import torch
from omegaconf import OmegaConf

from rlhf.precision import has_bfloat16, resolve_precision


def resolved(accelerator: str, precision: str = "auto") -> str:
    cfg = OmegaConf.create({"trainer": {"accelerator": accelerator, "precision": precision}})
    resolve_precision(cfg)
    return str(cfg.trainer.precision)


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({}, "32-true"),
        ({"avx512_f": True}, "32-true"),
        ({"avx512_bf16": True}, "bf16-mixed"),
        ({"amx_bf16": True}, "bf16-mixed"),
    ],
)
def test_cpu(capabilities: dict[str, bool], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolved("cpu") == resolved("auto") == expected


@pytest.mark.parametrize("supported", [False, True])
def test_cuda_is_asked_before_the_cpu(supported: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": not supported})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported)
    assert has_bfloat16("gpu") == has_bfloat16("auto") == supported
    assert has_bfloat16("cpu") != supported


def test_other_accelerators_use_float32() -> None:
    assert resolved("mps") == "32-true"


def test_an_explicit_precision_stays() -> None:
    assert resolved("cpu", "16-mixed") == "16-mixed"
    cfg = OmegaConf.create({"command": {}})
    resolve_precision(cfg)
    assert cfg == {"command": {}}
