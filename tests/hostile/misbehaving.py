"""No attack: what the pool has to notice, one of each, for the test of the pool."""

import os
import time

OUTCOMES = {2: "SILENT DIFFERENCE"}


def attack(victims, directories, index):
    """Crash, hang, fail, differ, or be fine, by number."""
    if index == 1:
        os.abort()
    if index == 3:
        raise ZeroDivisionError
    if index == 5:
        time.sleep(60)
    return "misbehaving", OUTCOMES.get(index, "refused")
