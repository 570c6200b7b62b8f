"""Who is silent, behind or stuck is named, and nobody else."""

from clinometer.distributed.heartbeat import GIVE_UP, LivenessCheck, RankProgress

PATIENCE = 10.0


def judged(seconds, beats_at, own_at=None, patience=None):
    """Listen every second; returns what was found, with the second it was found in."""
    judge, found = LivenessCheck([1, 2, 3], PATIENCE), []
    for second in range(seconds):
        finding = judge.look(float(second), beats_at(second), own_at(second) if own_at else None, patience)
        if finding is not None:
            found.append((second, finding))
            if finding.fatal:
                break
    return found


def test_ranks_that_beat_and_go_on_are_left_alone():
    everyone = lambda s: {rank: RankProgress(s + 1, s, s, "h") for rank in (1, 2, 3)}  # noqa: E731
    assert judged(200, everyone, lambda s: RankProgress(s, s, s)) == []


def test_a_rank_that_says_nothing_more_is_named_once_the_patience_is_over():
    def beats(s):
        return {
            rank: RankProgress(min(s, 20) + 1 if rank == 2 else s + 1, s, min(s, 20), f"host{rank}")
            for rank in (1, 2, 3)
        }

    ((second, finding),) = judged(200, beats)
    assert (finding.key, finding.values["rank"], finding.values["host"]) == ("parallel.silent", 2, "host2")
    assert finding.fatal
    assert 20 + PATIENCE < second <= 22 + PATIENCE


def test_a_broken_connection_shortens_the_patience():
    silent = lambda s: {rank: RankProgress(1 if rank == 3 else s + 1) for rank in (1, 2, 3)}  # noqa: E731
    ((second, finding),) = judged(200, silent, patience=2.0)
    assert finding.values["rank"] == 3
    assert second <= 4


def test_a_rank_that_answers_and_stays_behind_is_named_once_and_then_given_up():
    def beats(s):
        return {rank: RankProgress(s + 1, 5 if rank == 3 else 6, 412, "slow host") for rank in (1, 2, 3)}

    found = judged(500, beats, lambda s: RankProgress(s, 6, 412))
    assert [finding.key for _, finding in found] == ["parallel.slow", "parallel.given_up"]
    assert all(finding.values["rank"] == 3 and finding.values["step"] == 412 for _, finding in found)
    assert [finding.fatal for _, finding in found] == [False, True]
    assert found[1][0] > GIVE_UP * PATIENCE


def test_the_slow_one_accuses_nobody():
    ahead = lambda s: {rank: RankProgress(s + 1, 9, 9) for rank in (1, 2, 3)}  # noqa: E731
    assert judged(500, ahead, lambda s: RankProgress(s, 5, 5)) == []


def test_all_in_one_collective_that_does_not_end_are_given_up_without_a_name():
    same = lambda s: {rank: RankProgress(s + 1, 7, 7) for rank in (1, 2, 3)}  # noqa: E731
    ((second, finding),) = judged(500, same, lambda s: RankProgress(s, 7, 7))
    assert finding.key == "parallel.stuck"
    assert second > GIVE_UP * PATIENCE


def test_nobody_is_behind_before_the_training_and_while_files_are_written():
    waiting = lambda s: {rank: RankProgress(s + 1, rank, 0) for rank in (1, 2, 3)}  # noqa: E731
    assert judged(500, waiting) == []
