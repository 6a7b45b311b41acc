"""The rounds that a recipe of `align` names, each with its own keys."""

from __future__ import annotations

from minitron_mcore.jobs.align import Round, rounds_of
from minitron_mcore.recipe import load_recipe
from tests.refusals import refuses


def rounds(stages: str, *keys: str) -> list[Round]:
    given = ["align.load=model", "align.checkpoint=aligned", "align.epochs=1", f"align.stages={stages}", *keys]
    return list(rounds_of(load_recipe(None, given)))


def test_what_align_says_is_for_the_rounds_that_have_a_use_for_it() -> None:
    stages = "{sft: {}, rpo: {method: rpo_sq}, simpo: {method: simpo, gamma: 2}}"
    sft, rpo, simpo = rounds(stages, "align.beta=0.3", "align.eta=2", "align.mean=samples", "align.reference=resident")
    assert (sft.config.beta, sft.config.mean, sft.config.reference) == (0.1, "samples", "precomputed")
    assert (rpo.config.beta, rpo.config.eta, rpo.config.mean, rpo.config.reference) == (0.3, 2, "tokens", "resident")
    assert (simpo.config.beta, simpo.config.gamma, simpo.config.eta) == (0.3, 2, 1)
    # What is given to the round itself has no effect there.
    with refuses("align.stages.sft.beta", 0.2, "has no effect with align.method=sft"):
        rounds("{sft: {beta: 0.2}}")


def test_a_round_goes_on_from_the_one_before_with_its_template() -> None:
    one, two, three, four = rounds("{one: {}, two: {chat: {template: zephyr}}, three: {}, four: {tokens: 1k}}")
    assert [each.config.load for each in (one, two, three)] == ["model", "aligned/one", "aligned/two"]
    assert [each.recipe.chat.template for each in (one, two, three)] == [None, "zephyr", "zephyr"]
    assert (three.config.epochs, four.config.epochs, four.config.tokens) == (1, 0, 1000)


def test_a_blank_that_yaml_wants() -> None:
    with refuses("align.stages.one.lr:5", None, "is not a key of a recipe", "put a blank behind the colon: lr: 5"):
        rounds("{one: {lr:5}}")
