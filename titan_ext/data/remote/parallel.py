"""Several things at a time, in threads that no process waits for at its end."""

import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import TypeVar

_Item = TypeVar("_Item")


def in_parallel(do: Callable[[_Item], None], items: Iterable[_Item], most: int) -> None:
    """Does something with every item, with up to ``most`` at a time; raises the first error, after which none begins."""
    left, errors = deque(items), list[BaseException]()

    def work() -> None:
        while not errors:
            try:
                item = left.popleft()
            except IndexError:
                return
            try:
                do(item)
            except BaseException as error:  # noqa: BLE001 - raised again below
                errors.append(error)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(most, len(left)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
