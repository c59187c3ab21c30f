"""What went wrong between this machine and the Hub, told apart from what is wrong with a model."""

from __future__ import annotations

from kdcache.errors import ModelError


def refuse_unreachable(model: str, revision: str | None, error: BaseException) -> None:
    """Where a model's files could not be had from the Hub, that is what is wrong, and not the files.

    Args:
        model: folder or id.
        revision: that was asked for.
        error: what loading it ended in.

    Raises:
        ModelError: the Hub was not reached, and the model is not, or not as a whole, in its cache on this machine.
    """
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, LocalEntryNotFoundError | OfflineModeIsEnabled):
            shown, asked = (model, "") if revision is None else (f"{model} at {revision}", f" --revision {revision}")
            raise ModelError(
                f"{shown} is not whole on this machine, and the Hub cannot be reached from it; fetch it where there is a network (hf "
                f"download {model}{asked}), or name a folder"
            ) from error
        cause = cause.__cause__ or cause.__context__
