"""Writing a folder from all ranks together, complete or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from bumblebee.checkpoint.atomic import put_in_place, remove, start_aside
from bumblebee.checkpoint.digests import write_digests
from bumblebee.distributed import process_group


@contextmanager
def collective_folder(folder: Path, replace: bool = False) -> Iterator[tuple[Path, dict[str, str]]]:
    """Yield a temporary folder into which every rank writes, and rename it to ``folder``. An error on any rank reaches all.

    The yielded dict is for the SHA-256 of files that this rank has written, by path relative to the folder. Rank 0 writes
    SHA256SUMS with the digests of all ranks, and with those of the remaining files, which it reads.

    Args:
        folder: where the files belong.
        replace: replace an existing folder as a whole; see ``put_in_place``.

    Raises:
        OSError: this rank could not write; nothing of the folder is left then.
        OtherRankFailed: another rank could not.
    """
    error: Exception | None = None
    digests: dict[str, str] = {}
    partial = folder.parent / f".{folder.name}.partial"
    failed = f"another rank could not write {folder}"
    if process_group.is_main():
        error = _error_of(lambda: start_aside(folder))
    process_group.raise_on_all_ranks(error, failed)
    try:
        yield partial, digests
    except Exception as failure:
        error = failure
    if process_group.any_rank(error is not None):
        if process_group.is_main():
            remove(partial)
        process_group.raise_on_all_ranks(error, failed)
    everywhere = dict(process_group.all_gather_items(list(digests.items())))
    if process_group.is_main():
        error = _error_of(lambda: write_digests(partial, everywhere)) or _error_of(
            lambda: put_in_place(partial, folder, replace)
        )
    process_group.raise_on_all_ranks(error, failed)


def _error_of(action: Callable[[], object]) -> Exception | None:
    try:
        action()
    except Exception as error:
        return error
    return None
