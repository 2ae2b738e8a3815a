"""Rows of Parquet files as records, through pyarrow, the only file that imports it.

A file is read row group by row group, so memory is about one of these, however large the file is. The line of a record is the
number of its row, counted from 1. Nulls stay in, as None: a column is there for all rows or for none.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from datamodules.records import OnError, Record, RecordError

if TYPE_CHECKING:
    from datamodules.json_stream import File

ROWS = 1024  # turned into Python objects at once


def read_parquet(path: str, file: File, on_error: OnError) -> Iterator[Record]:
    """The rows of a file, in order.

    Raises:
        RecordError: the file is damaged.
        ValueError: pyarrow is not installed.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError(f"{path}: reading Parquet files needs pyarrow: pip install pyarrow ({error})") from error
    row = 0
    try:
        table = parquet.ParquetFile(file, pre_buffer=False)
        for group in range(table.num_row_groups):
            # No threads: records may be read in a process that forks its workers.
            for batch in table.iter_batches(ROWS, row_groups=[group], use_threads=False):
                for value in batch.to_pylist():
                    row += 1
                    yield Record(path, row, value)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise RecordError(path, row + 1, f"not a sound Parquet file: {str(error).splitlines()[0]}") from None
