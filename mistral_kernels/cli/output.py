"""Output of the generation commands: JSON records, and the progress of long prompts."""

from __future__ import annotations

import codecs
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from tqdm import tqdm

from mistral_kernels.cli.command import write_out

T = TypeVar("T")


def write_record(record: dict[str, Any]) -> None:
    """Write a line of JSON to stdout, in ASCII unless stdout is UTF-8."""
    utf8 = codecs.lookup(sys.stdout.encoding or "utf-8").name == "utf-8"
    write_out(json.dumps(record, ensure_ascii=not utf8) + "\n")


def with_progress(
    stream: Callable[[Callable[[int], object]], Iterator[T]], prompt_tokens: int
) -> Iterator[T]:
    """Yield the items of a stream. Show the progress of its prefill if stderr is a terminal.

    The bar appears after two seconds, and disappears before the first item.

    Args:
        stream: function that takes the argument `progress` of `stream_generate` and returns the
            stream.
        prompt_tokens: number of tokens of all prompts.
    """
    with tqdm(
        total=prompt_tokens,
        desc="prompt",
        unit=" tokens",
        delay=2,
        leave=False,
        dynamic_ncols=True,
        disable=None,
    ) as bar:
        for item in stream(bar.update):
            bar.close()
            yield item
