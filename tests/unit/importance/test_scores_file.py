"""Scores and their file: what is in, what earlier versions left out, what is refused; and what may be asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest
from safetensors.numpy import load_file, save_file

from minitron_mcore.architecture import Architecture, build_architecture
from minitron_mcore.errors import InputError
from minitron_mcore.importance.config import ImportanceConfig, variant_names
from minitron_mcore.importance.scores import Scores, load_scores, random_scores, save_scores, tolerance_of
from tests.refusals import refuses

L = 4
VARIANTS = ("mean/var/pre_activation", "l2/l2/down_projection_input")
PRIMARY = "l2/mean/down_projection_input"


def architecture() -> Architecture:
    shape = {"num_layers": L, "hidden_size": 8, "ffn_hidden_size": 12, "num_attention_heads": 4, "num_query_groups": 2}
    return build_architecture({**shape, "vocab_size": 64})


def draw(**changes: Any) -> Scores:
    a, random = architecture(), numpy.random.default_rng(1)

    def width() -> dict[str, numpy.ndarray]:
        return {
            "hidden": random.random(a.hidden_size),
            "ffn": random.random((L, a.ffn_hidden_size)),
            "heads": random.random((L, a.num_attention_heads)),
            "groups": random.random((L, a.num_query_groups)),
        }

    said = ImportanceConfig()
    fields: dict[str, Any] = {
        **width(),
        "layers": random.random(L),
        "settings": {
            "importance": {
                name: getattr(said, name)
                for name in ("method", "batch_aggregation", "sequence_aggregation", "neuron_site")
            },
            "precision": "bf16",
            "tolerance": tolerance_of("bf16", "l2", "mean"),
        },
        "variants": {name: width() for name in VARIANTS},
        "depth": {"lm_loss@1": random.random(L), "lm_loss@3": random.random(L - 2)},
    }
    return Scores(architecture=a, **{**fields, **changes})


def assert_same(found: Scores, wanted: Scores) -> None:
    theirs, mine = dict(found.arrays()), dict(wanted.arrays())
    assert theirs.keys() == mine.keys()
    for name, values in mine.items():
        assert theirs[name].dtype == numpy.float64 and numpy.array_equal(theirs[name], values), name


def test_everything_comes_back_from_the_file(tmp_path: Path) -> None:
    scores = draw()
    save_scores(scores, tmp_path / "scores.safetensors")
    found = load_scores(tmp_path / "scores.safetensors")
    assert_same(found, scores)
    assert found.settings == scores.settings and found.architecture == scores.architecture
    assert [path.name for path in tmp_path.iterdir()] == ["scores.safetensors"]
    names = set(load_file(tmp_path / "scores.safetensors"))
    assert {"groups", "variants/mean/var/pre_activation/ffn", "depth/lm_loss@3"} < names


def test_a_file_of_an_earlier_version_has_five_arrays_less(tmp_path: Path) -> None:
    scores = draw(groups=None, variants={}, depth={})
    save_scores(scores, tmp_path / "scores")
    assert set(load_file(tmp_path / "scores")) == {"hidden", "ffn", "heads", "layers"}
    found = load_scores(tmp_path / "scores")
    assert found.groups is None and found.variants == {} and found.depth == {}


def test_an_array_that_no_scores_have_is_refused(tmp_path: Path) -> None:
    from safetensors import safe_open

    save_scores(draw(), tmp_path / "scores")
    with safe_open(str(tmp_path / "scores"), framework="numpy") as stored:
        metadata = stored.metadata()
    for name in ("biases", "variants/ffn", "variants/l2/mean/site/neurons", "depth/lm_loss"):
        arrays = {**load_file(tmp_path / "scores"), name: numpy.zeros(L)}
        save_file(arrays, str(tmp_path / "other"), metadata=metadata)
        with refuses("scores", tmp_path / "other", name.rpartition("/")[2], "score again"):
            load_scores(tmp_path / "other")


def test_what_is_not_scores_is_named(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text('{\n  "format": "minitron_plan",\n  "layers": []\n}\n')
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "architecture.yaml").touch()
    (tmp_path / "text").write_text("neither")
    said = {
        "plan.json": "is a pruning plan",
        "teacher": "is a checkpoint",
        "text": "cannot be read",
        "none": "does not",
    }
    for name, rule in said.items():
        with refuses("scores", tmp_path / name, rule, "name the file that `minitron score` wrote"):
            load_scores(tmp_path / name)
    with refuses("scores", None, "is missing"):
        load_scores(None)


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"groups": numpy.zeros((L, 3))}, "have the shape (4, 3) in groups, but the model needs (4, 2)"),
        ({"groups": numpy.full((L, 2), numpy.nan)}, "hold NaN or Inf in groups"),
        ({"variants": {VARIANTS[0]: {"heads": numpy.zeros((L, 3))}}}, f"in variants/{VARIANTS[0]}/heads, but"),
        ({"variants": {VARIANTS[0]: {"hidden": numpy.full(8, numpy.inf)}}}, f"Inf in variants/{VARIANTS[0]}/hidden"),
        ({"depth": {"lm_loss@2": numpy.zeros(L)}}, "have the shape (4,) in depth/lm_loss@2, but the model needs (3,)"),
        ({"depth": {"lm_loss@1": numpy.full(L, numpy.nan)}}, "hold NaN or Inf in depth/lm_loss@1"),
        ({"depth": {"lm_loss": numpy.zeros(L)}}, "name is not METRIC@LENGTH"),
    ],
)
def test_what_does_not_fit_is_named(changes: dict[str, Any], rule: str) -> None:
    with refuses("scores", None, rule):
        draw(**changes)


def test_a_variant_takes_the_primary_choices_place_and_gives_it_back() -> None:
    scores = draw()
    assert scores.primary == PRIMARY and scores.variant(PRIMARY) is scores
    for name in VARIANTS:
        other = scores.variant(name)
        assert other.primary == name and set(other.variants) == {PRIMARY, *VARIANTS} - {name}
        for axis, values in scores.variants[name].items():
            assert numpy.array_equal(getattr(other, axis), values)
        assert other.layers is scores.layers and other.depth is scores.depth
        batch, sequence, _ = name.split("/")
        assert other.settings["tolerance"] == tolerance_of("bf16", batch, sequence)
        assert_same(other.variant(PRIMARY), scores)
    with refuses("prune.variant", "var/var/pre_activation", "is not among", "importance.aggregations"):
        scores.variant("var/var/pre_activation")


def test_depth_of_blocks() -> None:
    scores = draw()
    for length in range(1, L + 1):
        sums = [scores.layers[start : start + length].sum() for start in range(L - length + 1)]
        assert numpy.allclose(scores.depth_of("block_influence", length), sums, rtol=1e-15)
    assert numpy.array_equal(scores.depth_of("lm_loss", 3), scores.depth["lm_loss@3"])
    for metric, length in (("lm_loss", 2), ("accuracy", 1)):
        with refuses(
            "prune.depth_metric",
            metric,
            f"blocks of {length} layer{'s' * (length > 1)}",
            f"{metric} in importance.depth_metrics",
        ):
            scores.depth_of(metric, length)
    with refuses("scores", None, "have no block of 5 layers"):
        scores.depth_of("block_influence", 5)


def test_random_scores_are_the_seeds_alone() -> None:
    first, again, other = (random_scores(architecture(), seed) for seed in (3, 3, 4))
    assert_same(again, first)
    for (axis, values), (_, others) in zip(first.arrays(), other.arrays(), strict=True):
        assert not numpy.array_equal(values, others) and len(numpy.unique(values)) == values.size, axis
    assert first.settings["importance"]["method"] == "random" and first.primary == ""


def test_what_is_asked_for_is_named_once_the_primary_choice_first() -> None:
    assert variant_names(ImportanceConfig()) == [PRIMARY]
    both = ImportanceConfig(aggregations=["mean/mean", "l2/mean"], neuron_sites=["pre_activation"])
    assert variant_names(both) == [
        PRIMARY,
        "mean/mean/down_projection_input",
        "l2/mean/pre_activation",
        "mean/mean/pre_activation",
    ]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"aggregations": ["mean/mean", "l3/mean"]}, r"aggregations\[1\]=l3/mean must be one of mean/mean"),
        ({"aggregations": ["mean"]}, r"aggregations\[0\]=mean must be one of"),
        ({"aggregations": ["l2/var", "l2/var"]}, "aggregations=.* holds l2/var twice"),
        ({"neuron_sites": ["gate"]}, r"neuron_sites\[0\]=gate must be one of"),
        ({"batch_aggregation": "l3"}, "batch_aggregation=l3 must be one of"),
        ({"method": "gradient"}, "method=gradient must be one of"),
        ({"num_samples": 0}, "num_samples=0 must be at least 1"),
        ({"depth_metrics": ["bleu"]}, r"depth_metrics\[0\]=bleu must be one of"),
        ({"depth_metrics": ["accuracy"]}, "importance.multiple_choice"),
        ({"block_lengths": [2, 2]}, "block_lengths=.* holds 2 twice"),
        ({"block_lengths": [0]}, r"block_lengths\[0\]=0 must be at least 1"),
        ({"method": "magnitude", "depth_metrics": ["lm_loss"]}, "depth_metrics.*importance.method=magnitude"),
        ({"method": "random", "aggregations": ["l2/l2"]}, "aggregations.*importance.method=random"),
    ],
)
def test_what_nothing_can_be_scored_with_is_refused_in_one_sentence(given: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        ImportanceConfig(**given)
    assert "\n" not in str(caught.value)
