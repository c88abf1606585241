"""A card's metadata: the figures of a run in the form that the Hub reads (``model-index``)."""

import re

from huggingface_hub import EvalResult
from transformers.modelcard import METRIC_TAGS, TASK_TAG_TO_NAME_MAPPING

from grape_hf.reports.markdown import is_finite, is_hub_id, label, listed
from grape_hf.reports.run_records import UNNAMED, RunRecord

_METRIC = re.compile(rf"(?:(?P<split>eval|test)_)?(?:.+_)?(?P<metric>{'|'.join((*METRIC_TAGS, 'perplexity'))})")
_LOSS = re.compile(r"(?:(?P<split>eval|test)_)?(?:.+_)?(?P<metric>loss)")


def eval_results(record: RunRecord, task: str) -> list[EvalResult]:
    """Put the run's figures into the form of the metadata: metrics that the Hub knows, else losses.

    Args:
        record: the run.
        task: the Hub's name of what the model is for.

    Returns:
        A result for each finite figure, under the data set's name, ``"not named"`` if it was not given.
    """
    summary = record.summary
    names, tags = listed(summary.dataset), [tag for tag in listed(summary.dataset_tags) if is_hub_id(tag)]
    named = {k: v for k, v in next(iter(listed(summary.dataset_metadata)), {}).items() if v not in (None, "None")}

    def result(name: str, value: float, found: re.Match[str]) -> EvalResult:
        return EvalResult(
            task_type=task,
            task_name=TASK_TAG_TO_NAME_MAPPING.get(task),
            dataset_type=tags[0] if len(tags) == 1 else "unknown",
            dataset_name=", ".join(names) or UNNAMED,
            dataset_config=named.get("config"),
            dataset_args=next(iter(listed(summary.dataset_args)), None),
            dataset_split="test" if found["split"] == "test" else named.get("split"),
            metric_type=found["metric"],
            metric_value=value,
            metric_name=label(name),
        )

    for pattern in (_METRIC, _LOSS):
        matches = {name: pattern.fullmatch(name) for name, value in sorted(record.results.items()) if is_finite(value)}
        if results := [result(name, record.results[name], found) for name, found in matches.items() if found]:
            return results
    return []
