"""Standard errors of scores and of paired differences, against the textbook's formulas and a bootstrap."""

from __future__ import annotations

import math
from typing import Any

import numpy
import pytest

from minitron_mcore.architecture import build_architecture
from minitron_mcore.evaluation.harness.papers import MODELS, TASKS, published, published_score
from minitron_mcore.evaluation.harness.scores import differences, in_words, scores_of

NUMBERS = numpy.random.default_rng(3)


def results(values: dict[str, list[Any]], score: dict[str, Any], groups: dict[str, list[str]] | None = None) -> Any:
    """As `lm_eval.evaluate` gives them: `values` of a metric `m` by task, `score` its value by task or group."""
    samples = {
        task: [{"doc_id": n, "doc_hash": str(n), "filter": "none", "m": value} for n, value in enumerate(each)]
        for task, each in values.items()
    }
    scores = {task: {"alias": task, "m,none": value, "m_stderr,none": "N/A"} for task, value in score.items()}
    return {"results": scores, "samples": samples, "group_subtasks": groups or {}, "n-shot": dict.fromkeys(score, 5)}


def test_a_mean_and_a_paired_difference() -> None:
    one = NUMBERS.integers(0, 2, 50).astype(float)
    other = numpy.where(NUMBERS.random(50) < 0.1, 1 - one, one)
    first = scores_of(results({"t": one.tolist()}, {"t": one.mean()}))
    second = scores_of(results({"t": other.tolist()}, {"t": other.mean()}))
    assert first["t"]["m"].stderr == pytest.approx(one.std(ddof=1) / math.sqrt(50))
    found = differences(second, first)["t"]["m"]
    assert found["difference"] == pytest.approx((other - one).mean())
    assert found["stderr"] == pytest.approx((other - one).std(ddof=1) / math.sqrt(50))
    assert (other - one).std() < one.std(), "paired, it is the less"


def test_on_other_documents_no_error_of_the_difference_is_claimed() -> None:
    first, second = results({"t": [0.0, 1.0, 1.0]}, {"t": 2 / 3}), results({"t": [0.0, 1.0, 1.0]}, {"t": 2 / 3})
    second["samples"]["t"][1]["doc_hash"] = "another"
    assert differences(scores_of(second), scores_of(first)) == {"t": {"m": {"difference": 0.0, "stderr": None}}}


@pytest.mark.parametrize("kind", ["exp", "bits", "perplexity"])
def test_perplexities_against_a_bootstrap(kind: str) -> None:
    words = NUMBERS.integers(20, 200, 400).astype(float)
    logs = -words * (2 + 0.3 * NUMBERS.standard_normal(400))

    def statistic(take: numpy.ndarray) -> float:
        ratio = -logs[take].sum() / words[take].sum()
        return {"exp": math.exp(ratio), "bits": ratio / math.log(2), "perplexity": math.exp(-logs[take].mean() / 100)}[
            kind
        ]

    pairs = [[log, word] for log, word in zip(logs, words, strict=True)]
    values = (logs / 100).tolist() if kind == "perplexity" else pairs
    score = scores_of(results({"t": values}, {"t": statistic(numpy.arange(400))}))["t"]["m"]
    drawn = [statistic(NUMBERS.integers(0, 400, 400)) for _ in range(2000)]
    assert score.stderr == pytest.approx(numpy.std(drawn), rel=0.15), "2000 draws say it to some percent"
    assert score.influences is not None and abs(score.influences.sum()) < 1e-6 * abs(score.influences).sum()


@pytest.mark.parametrize("weighted", [True, False])
def test_a_group_is_the_mean_of_documents_or_of_tasks(weighted: bool) -> None:
    parts = {"a": NUMBERS.random(10).tolist(), "b": NUMBERS.random(40).tolist()}
    means, variances = zip(*((numpy.mean(each), numpy.var(each, ddof=1)) for each in parts.values()), strict=True)
    value = numpy.mean(parts["a"] + parts["b"]) if weighted else numpy.mean(means)
    found = scores_of(results(parts, {"g": value, "a": means[0]}, {"g": ["a", "b"]}))["g"]["m"]
    assert len(found.documents) == 50
    if weighted:
        expected = numpy.std(parts["a"] + parts["b"], ddof=1) / math.sqrt(50)
        assert found.stderr == pytest.approx(expected)
    else:
        assert found.stderr == pytest.approx(math.sqrt(variances[0] / 10 + variances[1] / 40) / 2, rel=0.05)


def test_a_score_that_is_no_statistic_known_here_has_its_value_alone() -> None:
    found = scores_of(results({"t": [0.2, 0.7, 0.9]}, {"t": 0.7}))["t"]["m"]
    assert (found.value, found.stderr, found.influences) == (0.7, None, None)


def test_filters_tell_metrics_of_one_name_apart() -> None:
    given = results({"t": [1.0, 0.0]}, {"t": 0.5})
    given["results"]["t"]["m,strict"] = 1.0
    given["samples"]["t"] += [{"doc_id": n, "doc_hash": str(n), "filter": "strict", "m": 1.0} for n in range(2)]
    assert {name: score.value for name, score in scores_of(given)["t"].items()} == {"m,none": 0.5, "m,strict": 1.0}


def test_the_papers_models_are_known_by_their_shapes() -> None:
    shapes = {"num_layers": 32, "hidden_size": 3072, "ffn_hidden_size": 9216, "num_attention_heads": 32}
    wide = build_architecture({"family": "llama", **shapes, "num_query_groups": 8, "vocab_size": 128256})
    assert published(wide) == "Llama-3.1-Minitron-4B-Width"
    smaller = build_architecture({"family": "llama", **shapes, "num_query_groups": 4, "vocab_size": 128256})
    assert published(smaller) is None and published(None) is None
    assert published_score("Minitron-4B", "mmlu", "acc", 5) == 0.586
    assert published_score("Minitron-4B", "mmlu", "acc", 0) is None, "with other shots it is another task"
    assert published_score("Minitron-4B", "arc_challenge", "acc", 25) is None
    assert all(len(scores) == len(TASKS) for _, scores in MODELS.values())
    given = results({"winogrande": [1.0, 0.0]}, {"winogrande": 0.5})
    given["results"]["winogrande"] = {"acc,none": 0.5, "acc_stderr,none": 0.1}
    for sample in given["samples"]["winogrande"]:
        sample["acc"] = sample["m"]
    plain = in_words(scores_of(given), "Llama-3.1-8B")
    assert plain == {
        "winogrande": {
            "shots": 5,
            "documents": 2,
            "metrics": {"acc": {"value": 0.5, "stderr": 0.1, "published": 0.773}},
        }
    }
