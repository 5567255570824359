"""All rows of the table of models, in its order."""

from __future__ import annotations

from tests.families.seeing import SEEING
from tests.families.text import TEXT
from tests.families.unbuilt import UNBUILT

FAMILIES = {family.name: family for family in (*SEEING, *TEXT, *UNBUILT)}
