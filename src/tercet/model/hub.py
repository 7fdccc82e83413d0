"""The Hugging Face Hub: what is downloaded from it, and its errors in a user's words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tercet.errors import TercetError
from tercet.version import __version__


def download(repo_id: str, files: Sequence[str], revision: str | None, local_only: bool) -> Path:
    """The folder of the hub's cache that holds some files of a repository.

    Args:
        repo_id: `organisation/name`.
        files: names to fetch, those of them that are there.
        revision: branch, tag or commit; default the main one.
        local_only: take what the cache has and ask nobody.

    Raises:
        TercetError: no such repository or revision, no right to read it, no connection.
    """
    from huggingface_hub import snapshot_download

    with hub_errors(f"no folder {repo_id} here, and the hub does not give a model of that name"):
        folder = snapshot_download(
            repo_id,
            revision=revision,
            allow_patterns=list(files),
            library_name="tercet",
            library_version=__version__,
            local_files_only=local_only,
        )
    return Path(folder)


@contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """Word the hub's errors for a user, `what` first."""
    from huggingface_hub import errors

    # The error of the HTTP client beneath, which differs from version to version of the hub's library.
    transport = errors.HfHubHTTPError.__bases__[0]
    try:
        yield
    except errors.GatedRepoError as error:
        raise TercetError(f"{what}: access must be asked for on its page, then `hf auth login`") from error
    except errors.RepositoryNotFoundError as error:
        raise TercetError(
            f"{what}: no such repository, or a private one; check the name, or `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise TercetError(f"{what}: no such revision; check its name on the repository's page") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError) as error:
        raise TercetError(
            f"{what}: the hub cannot be reached and the cache has no copy; check the connection"
        ) from error
    except (errors.EntryNotFoundError, OSError, ValueError) as error:
        raise TercetError(f"{what}: {' '.join(str(error).split())}") from error
    except Exception as error:
        if not isinstance(error, transport):
            raise
        if not isinstance(error, errors.HfHubHTTPError):
            raise TercetError(
                f"{what}: the hub cannot be reached ({' '.join(str(error).split())}); check the connection"
            ) from error
        raise TercetError(f"{what}: {' '.join(str(error).split())}") from error
