"""Going back: a run that continues after step N keeps nothing that came later."""

from __future__ import annotations

import sqlite3

from clinometer.record.format import windows


def cut_after(connection: sqlite3.Connection, step: int) -> None:
    """Remove everything later than `step`, in one transaction.

    An alert that began before and was seen after it ends at `step`: a continued run opens its own alerts.
    """
    connection.execute("BEGIN IMMEDIATE")
    try:
        for table in ("steps", "histograms", "events", "alerts", "weights"):
            connection.execute(f"DELETE FROM {table} WHERE step > ?", (step,))
        for table in ("tensors", "scalar_names", "pins"):
            connection.execute(f"DELETE FROM {table} WHERE since > ?", (step,))
        connection.execute(
            "UPDATE alerts SET until = ?1, logged = min(logged, ?1) WHERE until IS NULL OR until > ?1",
            (step,),
        )
        (last,) = connection.execute("SELECT max(step) FROM steps").fetchone()
        windows.delete_from(connection, last)
        connection.execute("COMMIT")
    except BaseException:
        connection.execute("ROLLBACK")
        raise
