"""The dynamic weight of the hidden-state losses: the papers' where states differ, bounded where they hardly do."""

import itertools

import pytest

from minitron_mcore.distillation.states.token_loss import LEAST_DIFFERENCE, dynamic_weight

WEIGHTS, LOGITS, SIZES = (0.5, 1.0, 3.0), (1e-3, 0.7, 11.0), (1e-4, 1.0, 250.0)


def test_it_is_the_papers_where_states_differ() -> None:
    """To the last bit, whatever the states' scale."""
    for weight, logits, size in itertools.product(WEIGHTS, LOGITS, SIZES):
        for difference in (1.01 * LEAST_DIFFERENCE, 0.3, 1.0, 40.0):
            states = difference * size
            assert dynamic_weight(weight, logits, states, size) == weight * logits / states


@pytest.mark.parametrize("difference", [0.0, -1e-9, 1e-13, 1.1e-9, 1e-5, 0.99 * LEAST_DIFFERENCE])
def test_it_has_a_ceiling_where_states_hardly_differ(difference: float) -> None:
    for weight, logits, size in itertools.product(WEIGHTS, LOGITS, SIZES):
        ceiling = weight * logits / (LEAST_DIFFERENCE * size)
        alpha = dynamic_weight(weight, logits, difference * size, size)
        assert alpha == pytest.approx(ceiling, rel=1e-12)
        assert alpha * difference * size <= weight * logits


def test_no_loss_gets_no_weight() -> None:
    """A logit loss of 0, or rounding below it, or a teacher whose states are all 0, as a student's are."""
    assert dynamic_weight(1.0, 0.0, 0.5, 1.0) == dynamic_weight(1.0, -1e-8, 0.5, 1.0) == 0.0
    assert dynamic_weight(1.0, 0.7, 0.0, 0.0) == 0.0
