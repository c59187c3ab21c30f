"""How long work reports itself. Components call this; only the command line prints."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives messages and the advance of one task at a time."""

    def message(self, text: str) -> None:
        """Something worth one line."""

    def warning(self, text: str) -> None:
        """Something the user should know about and nobody has to stop for."""

    def begin(self, task: str, total: int, unit: str) -> None:
        """A task of ``total`` units starts."""

    def advance(self, amount: int, note: str = "") -> None:
        """``amount`` further units are done; ``note`` says how it stands (a loss, a rate)."""

    def end(self) -> None:
        """The task is over, done or not."""


class Silent:
    """Reports nothing; the default of the library."""

    def message(self, text: str) -> None:
        """Ignore."""

    def warning(self, text: str) -> None:
        """Ignore."""

    def begin(self, task: str, total: int, unit: str) -> None:
        """Ignore."""

    def advance(self, amount: int, note: str = "") -> None:
        """Ignore."""

    def end(self) -> None:
        """Ignore."""
