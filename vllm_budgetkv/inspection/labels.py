"""What classes of heads and shares are called, on the page and in the pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm_budgetkv.inspection.story import Story


def share_text(ratio: float) -> str:
    """A share in per cent, with a digit behind the point where it is small."""
    return f"{ratio:.0%}" if ratio == 0 or ratio >= 0.0995 else f"{ratio:.1%}"


def labels_of(story: Story) -> dict[str, str]:
    """What each class of heads is called: where a policy knows one class only, just heads."""
    if not story.tells_classes:
        return {one.name: "all heads" for one in story.classes}
    return {one.name: f"{one.name} heads" for one in story.classes}


def brightest(story: Story) -> float:
    """The largest share that any patch has in a class of heads; 1 without patches."""
    found = [float(one.share[story.is_vision].max(initial=0)) for one in story.classes]
    return max(found, default=0.0) or 1.0
