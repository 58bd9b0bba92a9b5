"""Output formats of evaluation: samples.jsonl, and a table for the terminal."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from rlhf.evaluate.metrics import ModelResponses, point_estimate
from rlhf.evaluate.responses import ResponseBatch
from rlhf.files import write_json_lines
from rlhf.metrics.evaluation_names import KL_TO, TARGET, WIN_RATE
from rlhf.printable import printable


def write_samples(
    path: Path,
    prompts: Sequence[str],
    targets: Sequence[str | None],
    responses: Mapping[str, ModelResponses],
) -> None:
    """Write one JSON line per prompt, with the response of every model and its metrics.

    Args:
        path: File to write.
        prompts: Raw text of each prompt.
        targets: Reference response to each prompt; None where there is none.
        responses: Responses of each model by name.
    """
    rows = []
    for row, (prompt, target) in enumerate(zip(prompts, targets, strict=True)):
        of_models = {
            name: {
                "text": model.texts[row],
                **{metric: round(values[row], 4) for metric, values in model.metrics.items()},
            }
            for name, model in responses.items()
            if name != TARGET
        }
        rows.append({"prompt": prompt, "target": target, "responses": of_models})
    write_json_lines(path, rows)


def write_unscored(path: Path, sampled: Mapping[str, Sequence[ResponseBatch]]) -> None:
    """Write one JSON line per response of an evaluation that did not finish.

    Args:
        path: File to write.
        sampled: Batches of responses of each model by name.
    """
    rows = (
        {"model": name, "prompt": prompt.raw_text, "response": text}
        for name, batches in sampled.items()
        for batch in batches
        for prompt, text in zip(batch.prompts.prompts, batch.texts, strict=True)
    )
    write_json_lines(path, rows)


def comparison_table(metrics: Mapping[str, Any], *, baseline: str, output: Path | None, note: str = "") -> Table:
    """Build the table of all models for the terminal.

    Args:
        metrics: The content of metrics.json.
        baseline: Name of the model that the others are compared with.
        output: Directory of metrics.json, for the caption. None: it has not been written.
        note: A further sentence of the caption.
    """
    place = "" if output is None else f" All metrics are in {output}."
    caption = f"RM: reward model. KL to {baseline}, nats per response.{note}{place}"
    table = Table(
        title=f"{metrics['prompts']} held-out prompts; 95% bootstrap intervals; ties count as 0.5",
        caption=Text(printable(caption), style="table.caption"),
        box=box.SIMPLE_HEAD,
        padding=(0, 0, 0, 1),
    )
    columns = {
        "gold\nscore": ("gold",),
        "RM\nscore": ("reward",),
        f"gold wins\nvs {baseline}": (WIN_RATE + baseline, "gold"),
        f"RM wins\nvs {baseline}": (WIN_RATE + baseline, "reward"),
        f"gold wins\nvs {TARGET}": (WIN_RATE + TARGET, "gold"),
        "KL": (KL_TO + baseline,),
        "tokens": ("length",),
        "ROUGE\nL": ("rougeL",),
    }
    models = metrics["models"]
    shown = {title: keys for title, keys in columns.items() if any(_entry(model, keys) for model in models.values())}
    table.add_column("model", overflow="fold", min_width=6)  # Long model names wrap; numbers do not.
    for title in shown:
        table.add_column(Text(printable(title)), justify="right", no_wrap=True)
    for name, model in models.items():
        table.add_row(
            Text(printable(name.replace("_best_of_", "\nbest of "))),  # Words wrap better than a long name.
            *(_cell(_entry(model, keys), with_interval="wins" in title) for title, keys in shown.items()),
        )
    return table


def _entry(metrics: dict[str, Any], keys: tuple[str, ...]) -> dict[str, float]:
    for key in keys:
        metrics = metrics.get(key, {})
    return metrics


def _cell(interval: dict[str, float], *, with_interval: bool) -> str:
    if not interval:
        return ""
    estimate = f"{point_estimate(interval):.2f}"
    return f"{estimate}\n{interval['low']:.2f}..{interval['high']:.2f}" if with_interval else estimate
