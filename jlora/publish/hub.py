"""Writing to the Hugging Face hub: all files in one commit, or none."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from jlora.storage.hub_id import check_name
from jlora.storage.whole import Content, size_of

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_ADVICE: Mapping[int, str] = {
    401: "the token was refused. Log in with a valid one (`hf auth login`, or HF_TOKEN in the environment).",
    402: "the account does not pay for this. Push to a public repository, or see its billing.",
    403: "the token may not write there. Use a token with write permission, or a repository of your own.",
    404: "there is no such repository or revision, or the token may not see it. Check the name and the token's permissions.",
    409: "somebody else is changing the repository. Push again.",
    429: "there were too many requests. Wait a few minutes and push again.",
}
"""HTTP status -> what it means and the edit to make."""


class HubError(RuntimeError):
    """The hub did not take what was to be pushed."""


class Pushed(NamedTuple):
    url: str
    """Of the repository."""
    kept: tuple[str, ...]
    """Files of the repository that were left as they were."""


def without_token(text: str) -> str:
    """The text without this user's token of the hub, which a server may send back in an error."""
    from huggingface_hub import get_token

    token = get_token()
    return text.replace(token, "hf_***") if token else text


def push_files(
    repo: str,
    files: Mapping[str, Content],
    *,
    message: str,
    private: bool = False,
    revision: str | None = None,
    keep: Collection[str] = (),
) -> Pushed:
    """Creates the repository or takes the one there is, and adds the files in one commit; then compares what is there.

    Args:
        repo: "user/name", or "name" for the token's user.
        files: path in the repository -> content. Other files of the repository stay.
        message: of the commit.
        private: create it private, and refuse one that is public.
        revision: branch to commit to; created from the default one where it is missing. None: the default branch.
        keep: of these, the ones that the repository has already are left as they are.

    Raises:
        ValueError: for what no repository can be called.
        HubError: without a token; for what the hub refuses, with the edit to make; when it lacks a file afterwards.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    check_name(repo)
    token = get_token()
    if not token:
        raise HubError(
            "There is no Hugging Face token, so nothing was pushed. Make one with write permission at "
            "https://huggingface.co/settings/tokens, then `hf auth login`, or set HF_TOKEN."
        )
    api = HfApi(token=token, library_name="jlora")
    with _explained(repo, "Nothing was pushed."):
        url = api.create_repo(repo, private=private or None, exist_ok=True)
        repo = url.repo_id
        if private and not api.model_info(repo).private:
            raise HubError(
                f"{repo!r} exists and is public, so nothing was pushed. Make it private in its settings, choose another name, "
                "or leave --private out."
            )
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        before = _sizes(api, repo, revision) if keep else {}
        kept = tuple(name for name in keep if name in files and name in before)
    chosen = {name: content for name, content in files.items() if name not in kept}
    with _explained(repo, "A push is one commit: the repository is there, its files are as they were."):
        operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=c) for name, c in chosen.items()]
        api.create_commit(repo, operations, commit_message=message, revision=revision)
    with _explained(repo, "The files were sent, but not looked at again."):
        there = _sizes(api, repo, revision)
    missing = [name for name, content in chosen.items() if there.get(name) != size_of(content)]
    if missing:
        raise HubError(
            f"{repo!r} did not take {', '.join(missing)} (does it have a .gitignore that names them?); the other files are there."
        )
    return Pushed(str(url), kept)


def _sizes(api: "HfApi", repo: str, revision: str | None) -> dict[str, int]:
    """Path -> bytes of the files of a repository."""
    entries = api.list_repo_tree(repo, recursive=True, revision=revision)
    return {entry.path: size for entry in entries if (size := getattr(entry, "size", None)) is not None}


@contextmanager
def _explained(repo: str, state: str) -> Iterator[None]:
    """Says what an error of the hub client means, and what is the state of the repository after it."""
    try:
        yield
    except HubError:
        raise
    except Exception as error:  # the client raises dozens of unrelated types; which ones depends on its version
        status, said = _status(error), " ".join(without_token(str(error)).split())[:400].rstrip(".")
        if status is None:
            why = f"{type(error).__name__}: {said}. Check the repository's name, the network and HF_ENDPOINT."
        elif status in _ADVICE:
            why = f"{_ADVICE[status]} (status {status})"
        elif status >= 500:
            why = f"the hub failed with status {status}. Push again later."
        else:
            why = f"{said} (status {status})."
        raise HubError(f"{repo!r} could not be pushed: {why} {state} The files here are untouched.") from error


def _status(error: BaseException | None) -> int | None:
    """The HTTP status behind an error."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is not None:
            return int(status)
        error = error.__cause__
    return None
