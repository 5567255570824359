"""What is broken on purpose."""

from __future__ import annotations

from tests.tamper.of_cache import OF_CACHE
from tests.tamper.of_counts import OF_COUNTS
from tests.tamper.of_host import OF_HOST
from tests.tamper.of_inspection import OF_INSPECTION
from tests.tamper.of_pictures import OF_PICTURES
from tests.tamper.of_requests import OF_REQUESTS

MUTATIONS = (*OF_COUNTS, *OF_CACHE, *OF_HOST, *OF_REQUESTS, *OF_INSPECTION, *OF_PICTURES)
