"""What keeps one update from going too far, beside PPO's clip range."""

from dataclasses import dataclass

from rlhf.errors import UserError


@dataclass(frozen=True)
class UpdateLimits:
    """Bounds on an update; null switches one off.

    Args:
        clip_range_high: clip range of ratios above 1, where it differs from ``stage.clip_range``; dimensionless.
            A wider one lets unlikely tokens grow (Yu et al. 2025, arXiv:2503.14476: 0.28 beside 0.2).
        dual_clip: most that a token of negative advantage can cost, in units of its advantage; above 1
            (Ye et al. 2020, arXiv:1912.09729: 3).
        stop_kl_per_token: KL of the new policy to the one that answered, nats a token (half the mean squared
            log-ratio of a minibatch). The first minibatch past it and all that follow of this rollout are not learned
            from (the early stop of Schulman et al. 2017's published code, there at 1.5 x 0.01).
        skip_ratio: a minibatch whose mean ratio is above this is not learned from; dimensionless (TRL 0.9.6: 10).
    """

    clip_range_high: float | None = None
    dual_clip: float | None = None
    stop_kl_per_token: float | None = None
    skip_ratio: float | None = None

    def __post_init__(self) -> None:
        if self.clip_range_high is not None and self.clip_range_high <= 0:
            raise UserError(
                f"stage.limits.clip_range_high={self.clip_range_high} lets no ratio grow",
                "stage.limits.clip_range_high=0.28",
            )
        for name in ("dual_clip", "skip_ratio"):
            value = getattr(self, name)
            if value is not None and value <= 1:
                raise UserError(
                    f"stage.limits.{name}={value} is not above 1, the ratio before any update",
                    f"stage.limits.{name}={3 if name == 'dual_clip' else 10}",
                )
        if self.stop_kl_per_token is not None and self.stop_kl_per_token <= 0:
            raise UserError(
                f"stage.limits.stop_kl_per_token={self.stop_kl_per_token} would stop before the first step",
                "stage.limits.stop_kl_per_token=0.02",
            )
