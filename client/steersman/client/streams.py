"""What calls with a request stream need beside `calls`: items of any source, and the errors of that source."""

from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


async def each(source: AsyncIterable[T] | Iterable[T]) -> AsyncIterator[T]:
    """The items of either kind of iterable."""
    if isinstance(source, AsyncIterable):
        async for item in source:
            yield item
    else:
        for item in source:
            yield item


class Remembering(Generic[T]):
    """An iterator that keeps the error its source raised; a blocking call would log it and lose it."""

    def __init__(self, source: Iterator[T]) -> None:
        self._source = source
        self._error: Exception | None = None

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        try:
            return next(self._source)
        except StopIteration:
            raise
        except Exception as error:
            self._error = error
            raise

    def raise_error(self) -> None:
        """Raises the error of the source, if there was one."""
        if self._error is not None:
            raise self._error from None
