"""Plans: what is kept, by properties over random shapes and scores; how close the cuts are; what is refused."""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minitron_mcore.architecture import Architecture, build_architecture
from minitron_mcore.importance.scores import Scores, save_scores
from minitron_mcore.pruning.plan import scores_fingerprint
from minitron_mcore.pruning.plan_file import HeadResidual, PruningPlan, load_plan, save_plan
from minitron_mcore.pruning.targets import TARGETS
from tests.plans import make_plan
from tests.refusals import refuses


def model(**changes: Any) -> Architecture:
    fields = {
        "num_layers": 6,
        "hidden_size": 12,
        "ffn_hidden_size": 20,
        "num_attention_heads": 6,
        "num_query_groups": 2,
        "kv_channels": 4,
        "vocab_size": 50,
        "max_position_embeddings": 64,
    }
    return build_architecture({**fields, **changes})


def scores_of(architecture: Architecture, seed: int = 0, levels: int = 0, **arrays: Any) -> Scores:
    """Random scores in (1, 2); with `levels`, of that many values only, so that there are ties."""
    a, draw = architecture, numpy.random.default_rng(seed)
    shapes = {
        "hidden": (a.hidden_size,),
        "ffn": (a.num_layers, a.ffn_hidden_size),
        "heads": (a.num_layers, a.num_attention_heads),
        "layers": (a.num_layers,),
        "groups": (a.num_layers, a.num_query_groups),
    }
    random = {axis: draw.random(shape) + 1 for axis, shape in shapes.items()}
    if levels:
        random = {axis: numpy.floor(values * levels) for axis, values in random.items()}
    return Scores(a, **{**random, **arrays})


@st.composite
def cases(draw: st.DrawFn) -> tuple[Scores, dict[str, int | None]]:
    """Scores of a random teacher, with or without ties, and a student it can be pruned to."""
    groups, q = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    teacher = model(
        num_layers=draw(st.integers(1, 6)),
        hidden_size=draw(st.integers(1, 16)),
        ffn_hidden_size=draw(st.integers(1, 16)),
        num_attention_heads=groups * q,
        num_query_groups=groups,
    )
    target: dict[str, int | None] = {name: draw(st.integers(1, getattr(teacher, name))) for name in TARGETS}
    target["num_attention_heads"] = target["num_query_groups"] * draw(st.integers(1, q))  # type: ignore[operator]
    return scores_of(teacher, draw(st.integers(0, 1000)), draw(st.sampled_from([0, 3]))), target


def best(values: numpy.ndarray, count: int) -> list[int]:
    """Independent of the code: pick the highest one after another, the first of equal ones."""
    left = list(range(len(values)))
    picked = []
    for _ in range(count):
        picked.append(max(left, key=lambda index: values[index]))
        left.remove(picked[-1])
    return sorted(picked)


@given(cases())
@settings(max_examples=60, deadline=None)
def test_the_best_are_kept_and_of_equal_scores_the_lower_index(case: tuple[Scores, dict[str, int | None]]) -> None:
    scores, target = case
    plan, teacher = make_plan(scores, target), scores.architecture
    assert plan.layers == best(scores.layers, plan.student.num_layers)
    assert plan.hidden == best(scores.hidden, plan.student.hidden_size)
    assert list(plan.ffn) == list(plan.heads) == list(plan.groups) == plan.layers
    q = teacher.heads_per_group
    assert scores.groups is not None
    for layer in plan.layers:
        assert plan.ffn[layer] == best(scores.ffn[layer], plan.student.ffn_hidden_size)
        assert plan.groups[layer] == best(scores.groups[layer], plan.student.num_query_groups)
        assert plan.heads[layer] == [
            group * q + head
            for group in plan.groups[layer]
            for head in best(scores.heads[layer, group * q : (group + 1) * q], plan.student.heads_per_group)
        ]
    assert plan.student == teacher.replace(**target)


@given(cases())
@settings(max_examples=30, deadline=None)
def test_nothing_asked_for_keeps_everything(case: tuple[Scores, dict[str, int | None]]) -> None:
    scores, _ = case
    a = scores.architecture
    for layers in ("scattered", "contiguous"):
        plan = make_plan(scores, {name: None for name in TARGETS}, layers=layers)
        assert plan.student == a and plan.layers == list(range(a.num_layers))
        assert plan.hidden == list(range(a.hidden_size))
        assert all(kept == list(range(a.ffn_hidden_size)) for kept in plan.ffn.values())
        assert all(kept == list(range(a.num_attention_heads)) for kept in plan.heads.values())
        assert all(cut.margin is None for cut in plan.cuts.values())
        assert not [warning for warning in plan.warnings if "margin" in warning]


@given(cases())
@settings(max_examples=30, deadline=None)
def test_json_round_trip(case: tuple[Scores, dict[str, int | None]]) -> None:
    plan = make_plan(*case)
    again = PruningPlan.from_json(plan.to_json())
    assert again == plan and again.fingerprint == plan.fingerprint


@given(st.integers(0, 100), st.randoms(use_true_random=False))
@settings(max_examples=30, deadline=None)
def test_permuting_what_is_scored_permutes_the_plan(seed: int, random: Any) -> None:
    scores = scores_of(model(), seed)
    order = {axis: random.sample(range(size), size) for axis, size in (("hidden", 12), ("ffn", 20))}
    # Heads may change places within their KV group alone.
    order["heads"] = random.sample(range(3), 3) + random.sample(range(3, 6), 3)
    permuted = Scores(
        scores.architecture,
        scores.hidden[order["hidden"]],
        scores.ffn[:, order["ffn"]],
        scores.heads[:, order["heads"]],
        scores.layers,
    )
    target: dict[str, int | None] = {"hidden_size": 7, "ffn_hidden_size": 9, "num_attention_heads": 4}
    before, after = make_plan(scores, target), make_plan(permuted, target)
    assert sorted(order["hidden"][index] for index in after.hidden) == before.hidden
    for layer in before.layers:
        assert sorted(order["ffn"][index] for index in after.ffn[layer]) == before.ffn[layer]
        assert sorted(order["heads"][index] for index in after.heads[layer]) == before.heads[layer]


def test_a_contiguous_block_goes() -> None:
    influence = numpy.array([0.9, 0.1, 0.6, 0.2, 0.3, 0.8])
    plan = make_plan(scores_of(model(), layers=influence), {"num_layers": 4}, layers="contiguous")
    assert plan.layers == [0, 1, 2, 5]
    assert plan.cuts["layers"].margin == pytest.approx((0.7 - 0.5) / 0.7)
    assert make_plan(scores_of(model(), layers=influence), {"num_layers": 4}).layers == [0, 2, 4, 5]
    # Of equal blocks the later one goes: the lower indices stay. The sums are equal whatever their order.
    equal = make_plan(
        scores_of(model(), layers=numpy.array([0.1, 0.2, 0.3, 0.3, 0.2, 0.1])), {"num_layers": 3}, layers="contiguous"
    )
    assert equal.layers == [0, 1, 2] and equal.cuts["layers"].margin == 0


def test_margins_are_those_of_the_narrowest_cut() -> None:
    ffn = numpy.tile(numpy.linspace(10, 1, 20), (6, 1))
    ffn[3, :2] = 8.0, 7.999999
    heads = numpy.tile([6.0, 4.0, 1.0], (6, 2))
    heads[2] = [6, 4, 1, 5, 3, 2]
    hidden = numpy.arange(12.0)
    plan = make_plan(
        scores_of(model(), hidden=hidden, ffn=ffn, heads=heads),
        {"ffn_hidden_size": 4, "num_attention_heads": 4, "hidden_size": 11},
    )
    # Layer 3's fourth and fifth best; in the other layers the margin is larger.
    ordered = sorted(ffn[3], reverse=True)
    cut = plan.cuts["ffn"]
    assert (cut.layer, cut.lowest_kept, cut.highest_dropped) == (3, ordered[3], ordered[4])
    assert cut.margin == pytest.approx((ordered[3] - ordered[4]) / ordered[3])
    assert (plan.cuts["heads"].layer, plan.cuts["heads"].group) == (2, 1)
    assert plan.cuts["heads"].margin == pytest.approx((3 - 2) / 3)
    assert plan.cuts["hidden"].margin == 1.0  # the best of what was dropped scores 0
    assert plan.cuts["layers"].margin is None


def warned(hidden: numpy.ndarray, tolerance: float | None, **options: Any) -> bool:
    settings = {} if tolerance is None else {"tolerance": tolerance}
    scores = scores_of(model(), hidden=hidden, settings=settings)
    plan = make_plan(scores, {"hidden_size": 6}, **options)
    return any("hidden: the lowest score kept is 1.0e-04 above" in warning for warning in plan.warnings)


@pytest.mark.parametrize(("tolerance", "expected"), [(None, False), (1e-3, True), (6e-5, True), (4e-5, False)])
def test_a_margin_within_the_tolerance_is_warned_about(tolerance: float | None, expected: bool) -> None:
    """The cut's margin is 1e-4; both of its scores may move, so twice the tolerance counts."""
    hidden = numpy.ones(12)
    hidden[:6] += 1e-4
    assert warned(hidden, tolerance) == expected
    # The tolerance is relative to the largest score: the same margin among small scores is less certain.
    hidden[0] = 100.0
    assert warned(hidden, tolerance)


def test_a_block_is_known_less_closely_than_a_layer() -> None:
    """Totals of three layers, 5e-5 apart, where a layer's influence is known to 1e-5."""
    influence = numpy.array([1.0, 1, 1, 1, 1, 1 - 5e-5])
    scores = scores_of(model(), layers=influence)
    assert make_plan(scores, {"num_layers": 3}, layers="contiguous").warnings
    assert not make_plan(scores, {"num_layers": 5}, layers="scattered").warnings


def test_scores_of_zero_and_below_give_finite_margins() -> None:
    for hidden in (numpy.zeros(12), -numpy.arange(12.0)):
        plan = make_plan(scores_of(model(), hidden=hidden), {"hidden_size": 1})
        assert plan.hidden == [0] and numpy.isfinite(plan.cuts["hidden"].margin or 0.0)
        json.loads(plan.to_json(), parse_constant=pytest.fail)


def test_transformers_refuses_what_the_export_warning_says() -> None:
    from transformers import LlamaConfig, NemotronConfig

    plan = make_plan(scores_of(model()), {"hidden_size": 8})
    assert any("multiple of num_attention_heads=6" in warning for warning in plan.warnings)
    fields: dict[str, Any] = {"hidden_size": 8, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 4}
    with pytest.raises(Exception, match="not a multiple"):
        LlamaConfig(**fields)
    NemotronConfig(**fields)
    for family, hidden_size in (("nemotron", 8), ("llama", 6)):
        warnings = make_plan(scores_of(model(family=family)), {"hidden_size": hidden_size}).warnings
        assert not any("transformers" in warning for warning in warnings)


def test_costs_before_and_after() -> None:
    plan = make_plan(scores_of(model()), {"num_layers": 3}, sequence_length=32)
    cost = plan.cost()
    assert cost["teacher"]["parameters"] == model().num_parameters
    assert cost["student"]["forward_flops_per_token"] == model(num_layers=3).forward_flops_per_token(32)
    assert json.loads(plan.to_json())["cost"] == cost


@pytest.mark.parametrize(
    ("target", "options", "rule"),
    [
        ({"hidden_size": 13}, {}, "is larger than the teacher's 12"),
        ({"num_layers": 0}, {}, "must be at least 1"),
        ({"ffn_hidden_size": 2.5}, {}, "must be a whole number"),
        ({"num_attention_heads": 3}, {}, "is not a multiple of the teacher's num_query_groups=2"),
        ({"num_attention_heads": True}, {}, "must be a whole number"),
        ({"ffn_hidden_size": 9}, {"tensor": 2}, "is not a multiple of parallel.tensor=2"),
        ({"num_layers": 3}, {"pipeline": 4}, "is fewer than the 4 stages of parallel.pipeline=4"),
    ],
)
def test_impossible_students_are_refused(target: dict[str, Any], options: dict[str, Any], rule: str) -> None:
    ((name, size),) = target.items()
    with refuses(f"student.{name}", size, rule):
        make_plan(scores_of(model()), target, **options)


def test_impossible_layouts_and_choices_are_refused() -> None:
    with pytest.raises(ValueError, match=r"parallel\.tensor=4 does not divide num_query_groups=2"):
        make_plan(scores_of(model()), {}, tensor=4)
    with refuses("prune.layers", "middle", "must be one of scattered, contiguous"):
        make_plan(scores_of(model()), {}, layers="middle")
    with refuses("student.kv_channels", None, "is not a key of a recipe"):
        make_plan(scores_of(model()), {"kv_channels": 2})


def test_scores_that_are_no_numbers_are_refused() -> None:
    scores = scores_of(model())
    scores.ffn[2, 3] = numpy.nan
    with refuses("scores", None, "NaN or Inf in ffn"):
        make_plan(scores, {})


def edited(**changes: Any) -> str:
    plan = make_plan(scores_of(model()), {"num_layers": 2, "hidden_size": 3, "num_attention_heads": 4})
    data = json.loads(plan.to_json())
    for path, value in changes.items():
        *parents, last = path.split("__")
        target = data
        for parent in parents:
            target = target[parent]
        if value is None:
            del target[last]
        else:
            target[last] = value
    return json.dumps(data)


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"format": "other"}, 'lacks "format": "minitron_plan"'),
        ({"hidden": None}, "lacks hidden"),
        ({"ffn": [1]}, "must map names to values in ffn"),
        ({"hidden": [0, 5, 12]}, "has the index 12 in hidden, but the teacher's are 0 to 11"),
        ({"hidden": [-1, 5, 6]}, "has the index -1 in hidden"),
        ({"hidden": [0, 5, 5]}, "must have hidden in ascending order, each index once"),
        ({"hidden": [6, 5, 7]}, "must have hidden in ascending order"),
        ({"hidden": [5, 7]}, "keeps 2 indices in hidden, but the student's shape needs 3"),
        ({"hidden": None, "layers": None}, "lacks layers, hidden"),
        ({"hidden": [1, 2, 3.5]}, "must have a whole number in hidden.2"),
        ({"hidden": "all"}, "must have a list in hidden"),
        ({"layers": [0, 1]}, "gives ffn for the layers"),
        ({"student__kv_channels": 2}, "has student.kv_channels=2, which must be the teacher's 4"),
        ({"student__num_layers": "two"}, "must be a whole number"),
        ({"cuts": {"ffn": {"depth": 3}}}, "lacks cuts.ffn.kept"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused_when_it_is_read(
    changes: dict[str, Any], rule: str, tmp_path: Path
) -> None:
    path = tmp_path / "plan.json"
    path.write_text(edited(**changes))
    with refuses("plan", path, rule):
        load_plan(path)


def test_a_plan_made_by_hand_is_checked_as_one_that_is_read() -> None:
    plan = make_plan(scores_of(model()), {"hidden_size": 3})
    wrong: list[Any] = [[0.0, 1.0, 2.0], numpy.arange(3), "012"]
    for hidden in wrong:
        with refuses("plan", None, "must have a list of whole numbers in hidden"):
            dataclasses.replace(plan, hidden=hidden)
    residual = HeadResidual("papre", ["query"], {layer: [] for layer in plan.layers})
    with refuses("prune.head_residual", "papre", "is not allowed", "paper, laco"):
        dataclasses.replace(plan, residual=residual)


def test_heads_must_be_as_many_in_each_group() -> None:
    data = json.loads(edited())
    layer = next(iter(data["heads"]))
    data["heads"][layer] = [0, 1, 2, 3]
    with refuses("plan", None, f"keeps 3 query heads of KV group 0 in heads.{layer}"):
        PruningPlan.from_json(json.dumps(data))


def test_files(tmp_path: Path) -> None:
    plan, path = make_plan(scores_of(model()), {"num_layers": 2}), tmp_path / "plans" / "plan.json"
    save_plan(plan, path)
    assert load_plan(path, model()) == plan and [*path.parent.iterdir()] == [path]
    # One line for each list of indices.
    assert f'  "hidden": {list(range(12))},' in path.read_text().splitlines()
    with refuses("plan", path, "another model than this teacher: hidden_size is 12 there and 16 here"):
        load_plan(path, model(hidden_size=16))
    with refuses("plan", tmp_path / "none.json", "does not exist", "`minitron plan`"):
        load_plan(tmp_path / "none.json")
    for content in (b"{", b"\xff\xfe\x00"):
        path.write_bytes(content)
        with refuses("plan", path, "is not JSON"):
            load_plan(path)
    save_scores(scores_of(model()), path)
    with refuses("plan", path, "is a scores file", "`minitron plan`"):
        load_plan(path)
    for name, rule in (("latest_checkpointed_iteration.txt", "is a checkpoint"), ("notes", "is a folder")):
        (tmp_path / name[0] / name).mkdir(parents=True)
        (tmp_path / name[0] / name).rmdir()
        (tmp_path / name[0] / name).touch()
        with refuses("plan", tmp_path / name[0], rule):
            load_plan(tmp_path / name[0])


def test_fingerprints_follow_what_they_name() -> None:
    scores = scores_of(model())
    other = copy.deepcopy(scores)
    assert scores_fingerprint(other) == scores_fingerprint(scores)
    other.heads[0, 0] *= 1.5
    assert scores_fingerprint(other) != scores_fingerprint(scores)
    plan = make_plan(scores, {"num_layers": 3})
    assert plan.settings["scores_fingerprint"] == scores_fingerprint(scores)
    assert plan.fingerprint == make_plan(scores, {"num_layers": 3}, sequence_length=8).fingerprint
    assert plan.fingerprint != make_plan(scores, {"num_layers": 2}).fingerprint
