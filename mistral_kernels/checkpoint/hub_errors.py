"""Describe the errors of huggingface_hub: one line with the remedy."""

from __future__ import annotations

import errno

# Base classes of errors of httpx, requests and Python.
_CONNECTION_ERRORS = {
    "TransportError",
    "RequestException",
    "ConnectionError",
    "TimeoutError",
    "LocalEntryNotFoundError",
}


def why_failed(repo_id: str, revision: str | None, error: Exception, cached: str) -> str:
    """Return one line: why a request to the hub failed, and what to do.

    Errors are recognized by the names of their classes. The classes of the HTTP library depend on
    the version of huggingface_hub.

    Args:
        repo_id: Hub id of the model.
        revision: Requested branch, tag or commit; None: "main".
        error: Error of huggingface_hub.
        cached: Predicate for the message: what the cache holds of the model, such as "is not in
            the cache".
    """
    kinds = {kind.__name__ for kind in type(error).__mro__}
    status = getattr(getattr(error, "response", None), "status_code", None)
    model, page = f"hub model {repo_id!r}", f"https://huggingface.co/{repo_id}"
    reason = _one_line(error)
    if "GatedRepoError" in kinds:
        return (
            f"{model} is gated: accept its license at {page}, then set HF_TOKEN to an access token "
            "of that account or run `hf auth login`"
        )
    if "RevisionNotFoundError" in kinds:
        return (
            f"{model} has no revision {revision!r}; its branches and tags are at {page}/tree/main"
        )
    if "RepositoryNotFoundError" in kinds:
        return (
            f"no such folder and no such hub model: {repo_id!r}; check the name or, if the model "
            "is private, set HF_TOKEN to an access token or run `hf auth login`"
        )
    if status in (401, 403):
        return (
            f"the hub refuses the access token for {repo_id!r}: set HF_TOKEN to a valid token with "
            "read access, or unset HF_TOKEN and run `hf auth logout` to use none"
        )
    if status is not None:
        return f"the hub does not serve {repo_id!r}: {reason}; try again later"
    if "LocalTokenNotFoundError" in kinds:
        return "token=True requires a saved access token; set HF_TOKEN or run `hf auth login`"
    if "OfflineModeIsEnabled" in kinds:
        return f"{model} {cached}, and HF_HUB_OFFLINE is set; unset it to download the model"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"no space to download {repo_id!r}: {reason}; set HF_HOME to a folder on a larger disk"
        )
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS):
        return f"cannot write the download of {repo_id!r}: {reason}; set HF_HOME to another folder"
    if kinds & _CONNECTION_ERRORS:
        return (
            f"no such folder: {repo_id!r}; the hub model of this name {cached}, and the hub cannot "
            f"be reached ({reason}); check the connection, or give the folder of a checkpoint"
        )
    return f"no such folder: {repo_id!r}, and the request to the hub failed: {reason}"


def _one_line(error: Exception) -> str:
    """Return the type and message of an error in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
