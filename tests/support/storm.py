"""Changes without a pause: Services of ``duos`` come, change and go."""

import contextlib
import random
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Final, Self

from tests.support.api_server import ApiServer
from tests.support.duos import web
from tests.support.netns import Namespace

#: The numbers of the Services that change; number 1 never does.
NUMBERS: Final = range(2, 42)
# A storm for a daemon that takes a tenth of a second for a sync, and bearable for the API server.
_PAUSE_S: Final = 0.005


class Storm:
    """Changes one Service after the other in a thread, for as long as the ``with`` block lasts."""

    def __init__(self, api: ApiServer, pods: Sequence[Namespace], seed: int) -> None:
        """Endpoints are taken from *pods*; the same *seed* makes the same changes."""
        self._api = api
        self._pods = pods
        self._random = random.Random(seed)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="storm", daemon=True)
        #: How many changes there were.
        self.changes = 0

    def end(self) -> None:
        """Change nothing more; what was changed stays."""
        self._stop.set()
        self._thread.join(30)
        assert not self._thread.is_alive()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end()

    def _run(self) -> None:
        while not self._stop.wait(_PAUSE_S):
            number = self._random.choice(NUMBERS)
            items = web(number, *self._random.sample(self._pods, self._random.randint(0, 3)))
            if self._random.random() < 0.3:
                for item in items:
                    metadata = item["metadata"]
                    with contextlib.suppress(KeyError):
                        self._api.delete(item["kind"], metadata["namespace"], metadata["name"])
            else:
                self._api.apply_many(items)
            self.changes += 1
