"""What else a plan can be made by: KV groups, depth metrics, layers by name, variants; and what it records of it."""

from __future__ import annotations

import json
from typing import Any

import numpy
import pytest

from minitron_mcore.architecture import Architecture, build_architecture
from minitron_mcore.importance.scores import Scores
from minitron_mcore.pruning.plan import scores_fingerprint
from minitron_mcore.pruning.plan_file import PruningPlan
from tests.plans import make_plan
from tests.refusals import refuses


def model(**changes: Any) -> Architecture:
    fields = {
        "num_layers": 5,
        "hidden_size": 16,
        "ffn_hidden_size": 20,
        "num_attention_heads": 6,
        "num_query_groups": 3,
        "kv_channels": 4,
        "vocab_size": 50,
    }
    return build_architecture({**fields, **changes})


def scores_of(seed: int = 0, **arrays: Any) -> Scores:
    draw, a = numpy.random.default_rng(seed), model()
    shapes = {"hidden": (16,), "ffn": (5, 20), "heads": (5, 6), "groups": (5, 3), "layers": (5,)}
    return Scores(a, **{**{axis: draw.random(shape) + 1 for axis, shape in shapes.items()}, **arrays})


def test_heads_are_ranked_within_the_groups_that_stay() -> None:
    groups = numpy.tile([3.0, 1.0, 2.0], (5, 1))
    groups[4] = [1, 1, 1]  # a tie: the lower indices stay
    heads = numpy.tile([1.0, 2.0, 9.0, 8.0, 5.0, 4.0], (5, 1))
    plan = make_plan(scores_of(groups=groups, heads=heads), {"num_query_groups": 2, "num_attention_heads": 2})
    assert plan.groups == {0: [0, 2], 1: [0, 2], 2: [0, 2], 3: [0, 2], 4: [0, 1]}
    assert plan.heads == {0: [1, 4], 1: [1, 4], 2: [1, 4], 3: [1, 4], 4: [1, 2]}
    assert plan.decided["groups"] == [[2.0, 1.0]] * 4 + [[1.0, 1.0]]
    # Layer by layer, group by group, of the groups that stay.
    assert plan.decided["heads"] == [[2.0, 1.0], [5.0, 4.0]] * 4 + [[2.0, 1.0], [9.0, 8.0]]
    assert "hidden" not in plan.decided, "nothing of it was dropped"
    assert (plan.cuts["groups"].layer, plan.cuts["groups"].margin) == (4, 0.0)
    assert [
        said for said in plan.warnings if said.startswith("groups: the lowest score kept in layer 4 is 0.0e+00 abov")
    ]
    assert plan.cost()["student"]["parameters"] == model(num_attention_heads=2, num_query_groups=2).num_parameters
    assert json.loads(plan.to_json())["groups"]["4"] == [0, 1]


def test_groups_that_were_not_scored_cannot_be_pruned() -> None:
    with refuses(
        "student.num_query_groups", 2, "is fewer than the teacher's 3, but the scores have none for KV groups"
    ):
        make_plan(scores_of(groups=None), {"num_query_groups": 2})
    assert make_plan(scores_of(groups=None), {"num_attention_heads": 3}).groups[0] == [0, 1, 2]


def test_a_head_that_has_its_group_to_itself_speaks_for_it() -> None:
    a = model(num_query_groups=6)
    heads = numpy.tile([1.0, 2.0, 9.0, 8.0, 5.0, 4.0], (5, 1))
    scores = Scores(a, numpy.ones(16), numpy.ones((5, 20)), heads, numpy.ones(5))
    plan = make_plan(scores, {"num_attention_heads": 3})
    assert plan.groups[0] == plan.heads[0] == [2, 3, 4]
    # Where groups were scored, they decide: a group's heads cannot stay without it.
    by_groups = Scores(a, numpy.ones(16), numpy.ones((5, 20)), heads, numpy.ones(5), groups=-heads)
    assert make_plan(by_groups, {"num_attention_heads": 3}).heads[0] == [0, 1, 5]


def test_plans_from_before_groups_were_pruned_still_read() -> None:
    plan = make_plan(scores_of(), {"num_attention_heads": 3, "num_layers": 2})
    data = json.loads(plan.to_json())
    for name in ("groups", "decided"):
        del data[name]
    older = PruningPlan.from_json(json.dumps(data))
    assert older.groups == plan.groups == {layer: [0, 1, 2] for layer in plan.layers}
    assert older.fingerprint == plan.fingerprint
    # The heads tell which groups stay, too.
    plan = make_plan(scores_of(), {"num_query_groups": 2, "num_layers": 2})
    data = json.loads(plan.to_json())
    del data["groups"]
    assert PruningPlan.from_json(json.dumps(data)) == plan


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"groups": {"0": [0, 1]}}, "gives groups for the layers [0], but keeps the layers"),
        ({"groups": [1]}, "must map names to values in groups"),
        ({"groups.": [0, 3]}, "has the index 3 in groups.{}, but the teacher's are 0 to 2"),
        ({"groups.": [0]}, "keeps 1 indices in groups.{}, but the student's shape needs 2"),
        ({"groups.": [1, 0]}, "must have groups.{} in ascending order"),
        ({"groups.": [0, 1], "heads.": [0, 1, 2, 4]}, "keeps 1 query heads of KV group 1 in heads.{}"),
        ({"groups.": [0, 2], "heads.": [0, 1, 2, 3]}, "keeps query heads of KV group 1 in heads.{}, but not the group"),
    ],
)
def test_groups_in_a_file_are_checked(change: dict[str, Any], rule: str) -> None:
    plan = make_plan(scores_of(), {"num_query_groups": 2, "num_layers": 2})
    data = json.loads(plan.to_json())
    for name, value in change.items():
        if name.endswith("."):
            data[name[:-1]][str(plan.layers[0])] = value
        else:
            data[name] = value
    with refuses("plan", None, rule.format(plan.layers[0])):
        PruningPlan.from_json(json.dumps(data))


INFLUENCE = numpy.array([0.9, 0.1, 0.2, 0.3, 0.8])
LOSS = {"lm_loss@1": numpy.array([0.5, 0.4, 0.1, 0.2, 0.3]), "lm_loss@2": numpy.array([0.9, 0.3, 0.4, 0.2])}


@pytest.mark.parametrize(
    ("layers", "metric", "count", "kept", "decided"),
    [
        ("scattered", "block_influence", 3, [0, 3, 4], [0.3, 0.2]),
        ("contiguous", "block_influence", 3, [0, 3, 4], [0.5, 0.3]),
        ("scattered", "lm_loss", 3, [0, 1, 4], [0.3, 0.2]),
        ("contiguous", "lm_loss", 3, [0, 1, 2], [0.3, 0.2]),
        ("contiguous", "lm_loss", 4, [0, 1, 3, 4], [0.2, 0.1]),
        ("contiguous", "lm_loss", 5, [0, 1, 2, 3, 4], None),  # nothing goes: nothing need be scored
    ],
)
def test_layers_by_each_metric(
    layers: str, metric: str, count: int, kept: list[int], decided: list[float] | None
) -> None:
    scores = scores_of(layers=INFLUENCE, depth=LOSS)
    plan = make_plan(scores, {"num_layers": count}, layers=layers, depth_metric=metric)
    assert plan.layers == kept
    assert plan.decided.get("layers") == (None if decided is None else [pytest.approx(decided)])
    assert plan.settings["depth_metric"] == metric


def test_of_equal_blocks_the_later_goes() -> None:
    scores = scores_of(depth={"accuracy@2": numpy.array([0.5, 0.1, 0.2, 0.1])})
    plan = make_plan(scores, {"num_layers": 3}, layers="contiguous", depth_metric="accuracy")
    assert plan.layers == [0, 1, 2] and plan.cuts["layers"].margin == 0
    assert any(warning.startswith("layers: the lowest score kept is 0.0e+00 above") for warning in plan.warnings)


@pytest.mark.parametrize(
    ("layers", "metric", "refusal"),
    [
        ("contiguous", "lm_loss", ("prune.depth_metric", "lm_loss", "was not measured for blocks of 3 layers")),
        ("scattered", "logit_mse", ("prune.depth_metric", "logit_mse", "was not measured for blocks of 1 layer")),
        ("middle", "lm_loss", ("prune.layers", "middle", "must be one of scattered, contiguous")),
    ],
)
def test_a_metric_that_was_not_scored_is_refused(layers: str, metric: str, refusal: tuple[str, Any, str]) -> None:
    with refuses(*refusal):
        make_plan(scores_of(depth=LOSS), {"num_layers": 2}, layers=layers, depth_metric=metric)


def test_layers_by_name_need_no_scores() -> None:
    plan = make_plan(scores_of(layers=INFLUENCE), {}, keep_layers=[0, 1, 2], depth_metric="logit_mse")
    assert plan.layers == [0, 1, 2] and plan.student.num_layers == 3
    assert plan.settings["layers"] == "given" and "layers" not in plan.decided


def test_a_variant_decides_in_its_place() -> None:
    scores = scores_of()
    other = scores_of(1)
    arrays = {axis: getattr(other, axis) for axis in ("hidden", "ffn", "heads", "groups")}
    scores = scores_of(variants={"mean/mean/pre_activation": arrays})
    target: dict[str, int | None] = {
        "hidden_size": 8,
        "ffn_hidden_size": 8,
        "num_attention_heads": 2,
        "num_query_groups": 2,
    }
    plan = make_plan(scores, target, variant="mean/mean/pre_activation")
    expected = make_plan(other, target)
    assert (plan.hidden, plan.ffn, plan.heads, plan.groups) == (
        expected.hidden,
        expected.ffn,
        expected.heads,
        expected.groups,
    )
    assert plan.fingerprint != make_plan(scores, target).fingerprint
    # The file is what the plan was made from, whichever of its variants.
    assert plan.settings["scores_fingerprint"] == scores_fingerprint(scores)
    assert plan.settings["variant"] == "mean/mean/pre_activation"
    assert plan.settings["scores"]["importance"]["sequence_aggregation"] == "mean"
    with refuses("prune.variant", "l2/var/pre_activation", "is not among the scores' variants"):
        make_plan(scores, target, variant="l2/var/pre_activation")


def test_every_array_is_in_the_fingerprint() -> None:
    prints = {scores_fingerprint(scores_of(groups=None)), scores_fingerprint(scores_of())}
    prints |= {scores_fingerprint(scores_of(depth={name: LOSS[name]})) for name in LOSS}
    assert len(prints) == 4


def test_ratios_and_divisors_are_stated() -> None:
    plan = make_plan(scores_of(), {}, ratios={"hidden_size": 0.6}, divisible_by=4)
    assert plan.student.hidden_size == 8  # 9.6 is nearest to 8 of 4, 8, 12 by 1.6 against 2.4
    assert (plan.settings["ratios"], plan.settings["divisible_by"]) == ({"hidden_size": 0.6}, 4)


def test_sizes_that_tensor_cores_dislike_are_warned_about() -> None:
    def warned(**target: int) -> bool:
        return any("is not a multiple of 8" in said for said in make_plan(scores_of(), target).warnings)

    assert warned(hidden_size=9) and not warned(hidden_size=8)
    assert not warned(ffn_hidden_size=19), "the teacher's 20 neurons are no multiple of 8 either"
