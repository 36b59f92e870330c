"""Objects in a directory that the daemon watches (``--manifests``), in place of an API server."""

import json
from collections.abc import Iterable
from pathlib import Path

from tests.support.builders import Json


class ObjectFiles:
    """A directory with one file, which is replaced as a whole: all its objects change at once."""

    def __init__(self, scratch: Path) -> None:
        """Make the directory inside *scratch*."""
        self.directory = scratch / "objects"
        self.directory.mkdir()

    def write(self, objects: Iterable[Json]) -> None:
        """Let *objects* be all there are."""
        # Renamed into place, so that the daemon never reads half of it.
        new = self.directory / ".objects.json"
        new.write_text(json.dumps({"kind": "List", "apiVersion": "v1", "items": list(objects)}))
        new.rename(self.directory / "objects.json")
