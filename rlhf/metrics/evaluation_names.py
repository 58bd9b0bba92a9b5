"""Names in the ``metrics.json`` and ``samples.jsonl`` of an evaluation. Imports no torch."""

TARGET = "target"  # under which the reference responses of the data are listed with the models
SCORERS = ("gold", "reward")  # metrics that responses are compared by, the preferred one first
WIN_RATE, KL_TO = "win_rate_vs_", "kl_to_"  # prefixes of metrics, before the name of another model
