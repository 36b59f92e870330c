"""Changes without a pause: Services of ``duos`` come, change and go."""

import contextlib
import random
from collections.abc import Sequence
from typing import Final

from tests.support.api_server import ApiServer
from tests.support.background import Background, Rest
from tests.support.duos import web
from tests.support.netns import Namespace

#: The numbers of the Services that change; number 1 never does.
NUMBERS: Final = range(2, 42)
# A storm for a daemon that takes a tenth of a second for a sync, and bearable for the API server.
_PAUSE_S: Final = 0.005


class Storm(Background):
    """Changes one Service after the other; what was changed stays when it ends."""

    def __init__(self, api: ApiServer, pods: Sequence[Namespace], seed: int) -> None:
        """Endpoints are taken from *pods*; the same *seed* makes the same changes."""
        super().__init__(self._change, name="storm")
        self._api = api
        self._pods = pods
        self._random = random.Random(seed)
        #: How many changes there were.
        self.changes = 0

    def _change(self, rest: Rest) -> None:
        while not rest(_PAUSE_S):
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
