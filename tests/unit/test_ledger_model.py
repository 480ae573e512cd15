"""The direction of scenes."""

import pytest

from pointbook.v1 import points_pb2
from pointbook_server.ledger.scenes import DECREASING_SCENES, INCREASING_SCENES
from support.ledger_events import account_after, decrease_event, increase_event, last_entry


@pytest.mark.parametrize("scene", sorted(DECREASING_SCENES))
def test_a_decreasing_scene_disagrees_with_an_increase(scene: str) -> None:
    """The event is still applied, and marked."""
    assert last_entry(increase_event(10, 5, 5, scene=scene)).scene_disagrees
    assert not last_entry(decrease_event(10, 5, 5, scene=scene)).scene_disagrees
    assert account_after(increase_event(10, 5, 5, scene=scene)).balance == 5


@pytest.mark.parametrize("scene", sorted(INCREASING_SCENES))
def test_an_increasing_scene_disagrees_with_a_decrease(scene: str) -> None:
    assert last_entry(decrease_event(10, 5, 5, scene=scene)).scene_disagrees
    assert not last_entry(increase_event(10, 5, 5, scene=scene)).scene_disagrees


def test_every_scene_of_the_api_has_one_direction() -> None:
    prefix = "POINTS_UPDATE_SCENE_"
    names = [name.removeprefix(prefix) for name, number in points_pb2.PointsUpdateScene.items() if number]

    assert sorted([*DECREASING_SCENES, *INCREASING_SCENES]) == sorted(names)


def test_an_unknown_scene_never_disagrees() -> None:
    assert not last_entry(decrease_event(10, 5, 5, scene="LUCKY_DRAW")).scene_disagrees
    assert not last_entry(increase_event(10, 5, 5, scene="LUCKY_DRAW")).scene_disagrees
