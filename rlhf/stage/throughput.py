"""Throughput of training: tokens and sequences per second."""

import time


class ThroughputMeter:
    """Counts tokens and sequences from its creation, or from the last call of ``rates``, without the time of pauses."""

    def __init__(self) -> None:
        self._restart()

    def _restart(self) -> None:
        self._tokens = 0
        self._sequences = 0
        self._started = time.perf_counter()
        self._paused: float | None = None

    def pause(self) -> None:
        """Stop the clock."""
        self._paused = time.perf_counter()

    def resume(self) -> None:
        """Start the clock again."""
        if self._paused is not None:
            self._started += time.perf_counter() - self._paused
            self._paused = None

    def add(self, tokens: int, sequences: int) -> None:
        """Count the tokens (without padding) and the sequences of a batch on this device."""
        self._tokens += tokens
        self._sequences += sequences

    def rates(self, devices: int) -> dict[str, float]:
        """Return tokens and sequences per second, multiplied by the number of devices, and start counting again.

        The mean over all devices is their total throughput.

        Args:
            devices: Number of devices.
        """
        seconds = max(time.perf_counter() - self._started, 1e-9)
        rates = {
            "throughput/tokens_per_s": self._tokens * devices / seconds,
            "throughput/sequences_per_s": self._sequences * devices / seconds,
        }
        self._restart()
        return rates
