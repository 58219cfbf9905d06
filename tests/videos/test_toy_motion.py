import numpy as np
import pytest

from re2tal.datasets.toy.scene import (
    ACTION_SECONDS,
    ACTIONS,
    FRAME_SIZE,
    UNSEEN_ACTIONS,
    action,
    distractor,
)

FPS = 12
BOTH_SETS = pytest.mark.parametrize("actions", [ACTIONS, UNSEEN_ACTIONS])


def two_frames(
    actions: tuple[str, ...], count: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Poses (N, 4) of actors at random times, a frame later, and their classes (N,)."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % len(actions)
    now, later = np.empty((count, 4)), np.empty((count, 4))
    for i, label in enumerate(labels):
        seconds = np.exp(rng.uniform(*np.log(ACTION_SECONDS)))
        motion = action(actions[label], seconds, rng.uniform(0, 2 * np.pi), rng)
        begin = rng.uniform(0, seconds - 1 / FPS)
        pose = motion(np.array([begin, begin + 1 / FPS]))
        now[i], later[i] = np.stack([pose.x, pose.y, pose.log_size, pose.angle], 1)
    return now, later, labels


def accuracy_of_histograms(values: np.ndarray, labels: np.ndarray, bins: int) -> float:
    """Held-out accuracy of the likeliest class in each cell of a histogram of all columns."""
    edges = np.quantile(values, np.linspace(0, 1, bins + 1)[1:-1], axis=0)
    cells = np.zeros(len(values), int)
    for column, edge in zip(values.T, edges.T, strict=True):
        cells = cells * bins + np.searchsorted(edge, column)
    half = len(values) // 2
    counts = np.zeros((bins ** values.shape[1], labels.max() + 1))
    np.add.at(counts, (cells[:half], labels[:half]), 1)
    return float((counts[cells[half:]].argmax(1) == labels[half:]).mean())


@BOTH_SETS
def test_one_frame_says_nothing_about_the_action_and_two_say_much(actions: tuple[str, ...]) -> None:
    # What differs between two frames of a toy video is the actor's pose; all else is drawn without
    # knowing the class. So this bounds what any classifier of single frames can find.
    now, later, labels = two_frames(actions, 12_000, seed=0)
    now[:, 3] %= 2 * np.pi
    chance = 1 / len(actions)

    assert accuracy_of_histograms(now, labels, bins=4) < chance + 0.05
    moved = later - np.where(np.arange(4) == 3, 0, now)
    moved[:, 3] = np.angle(np.exp(1j * (later[:, 3] - now[:, 3])))
    assert accuracy_of_histograms(moved, labels, bins=4) > 2 * chance


@BOTH_SETS
def test_place_and_size_are_distributed_alike_in_every_class(actions: tuple[str, ...]) -> None:
    now, _, labels = two_frames(actions, 1000 * len(actions), seed=1)
    for column in range(3):
        spread = now[:, column].std()
        for label in range(len(actions)):
            own = now[labels == label, column]
            assert abs(own.mean() - now[:, column].mean()) < 0.15 * spread
            assert abs(own.std() / spread - 1) < 0.15


@pytest.mark.parametrize("name", [*ACTIONS, *UNSEEN_ACTIONS])
def test_the_actor_stays_in_view_and_never_jumps(name: str) -> None:
    for seed in range(50):
        rng = np.random.default_rng(seed)
        t = np.arange(0, ACTION_SECONDS[1], 1 / FPS)
        pose = action(name, ACTION_SECONDS[1], 0.0, rng)(t)
        for coordinate in (pose.x, pose.y):
            assert np.all((coordinate > -20) & (coordinate < FRAME_SIZE + 20))
            assert np.abs(np.diff(coordinate)).max() < 20
        assert np.abs(pose.log_size).max() < 0.5


def test_each_action_changes_what_its_name_says() -> None:
    t = np.arange(0, 4, 1 / 60)

    def straightened(values: np.ndarray) -> np.ndarray:
        return np.asarray(values - np.polyval(np.polyfit(t, values, 1), t))

    for seed in range(20):
        pose = {name: action(name, 4.0, 0.0, np.random.default_rng(seed))(t) for name in ACTIONS}
        assert np.ptp(pose["pulse"].log_size) > 0.5
        assert abs(pose["spin"].angle[-1]) > 2 * np.pi
        for name in ("shake", "zigzag"):
            assert np.ptp(straightened(pose[name].x)) > 2 * np.ptp(straightened(pose[name].y))
        assert np.ptp(straightened(pose["bounce"].y)) > 15
        radius = np.hypot(straightened(pose["orbit"].x), straightened(pose["orbit"].y))
        assert radius.mean() > 6
        for name in set(ACTIONS) - {"pulse"}:
            assert np.ptp(pose[name].log_size) == 0
        for name in set(ACTIONS) - {"spin"}:
            assert abs(pose[name].angle[-1]) < 2


def test_distractor_motion_joins_the_actions() -> None:
    for seed in range(30):
        rng = np.random.default_rng(seed)
        first = action("orbit", 2.0, 0.0, rng)(np.array([2.0]))
        then = action("pulse", 2.0, 0.0, rng)(np.zeros(1))
        pose = distractor(first, then, 1.5, rng)(np.array([0.0, 1.5]))
        for of in ("x", "y", "log_size"):
            assert getattr(pose, of) == pytest.approx(
                [getattr(first, of)[0], getattr(then, of)[0]], abs=1e-6
            )
        assert pose.angle[0] == first.angle[0]


def test_an_unknown_action_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown toy action 'jump'; the actions are bounce"):
        action("jump", 1.0, 0.0, np.random.default_rng(0))
