"""Processes that are killed at random moments of their work."""

import os
import random
import signal
import time
from collections.abc import Callable, Iterator, Sequence


def killed_children(
    work: Callable[[str, int], None], kills: int, *, wanted: Sequence[int], seconds: Callable[[random.Random], float]
) -> Iterator[tuple[str, int]]:
    """Fork, let the child work, kill it; yield its name and how many records it told to have written.

    Args:
        work: called in the child with its name and the pipe into which it writes a byte after every record.
        kills: how many children, one after another.
        wanted: for how many records it is waited, one of these at random, before the time begins to run.
        seconds: draws how long after that the child is killed.
    """
    draw = random.Random(0)
    for kill in range(kills):
        told, tell = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(told)
            work(str(kill), tell)
        os.close(tell)
        least, done = draw.choice(wanted), 0
        while done < least:
            byte = os.read(told, 1)
            assert byte, f"child {kill} ended by itself"
            done += 1
        time.sleep(seconds(draw))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        done += len(os.read(told, 10**6))
        os.close(told)
        yield str(kill), done
