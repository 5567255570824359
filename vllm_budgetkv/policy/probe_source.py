"""Where the queries that score the cache come from: which tokens of a request, and how many."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm_budgetkv.policy.options import PolicyOptions


class PromptPlaces(Protocol):
    """What a source asks of a prompt; `PromptSpans` answers it."""

    @property
    def prompt_tokens(self) -> int: ...

    @property
    def end_of_vision(self) -> int: ...

    def last_text_positions(self, start: int, stop: int, count: int) -> list[int]: ...


class ProbeSource(ABC):
    """Which queries score the cache."""

    runs_ahead: ClassVar[bool]
    """Whether text can run ahead of a prompt to give the first queries. Such queries were asked
    elsewhere, so they are turned to stand behind the cached tokens."""
    asks_from_start: ClassVar[bool] = False
    """Whether queries are kept from the start, also of requests that may never be compressed."""
    is_replaced: ClassVar[bool] = False
    """Whether the prompt's last text, read where it stands, takes the place of what ran ahead."""

    @staticmethod
    def capacity_tokens(options: PolicyOptions) -> int:
        """Most queries that are kept."""
        return options.probe_tokens

    @staticmethod
    @abstractmethod
    def positions(
        places: PromptPlaces, start: int, stop: int, options: PolicyOptions, is_seeded: bool
    ) -> Sequence[int]:
        """Which of the tokens [start, stop) of a request enter, ascending.

        Args:
            places: where the request's text is.
            start, stop: the tokens of a step.
            options: how many to take.
            is_seeded: whether a look-ahead has given the first queries.
        """


class PromptText(ProbeSource):
    """The last text tokens; those of the prompt run ahead of a long one."""

    runs_ahead = True
    is_replaced = True

    @staticmethod
    def positions(
        places: PromptPlaces, start: int, stop: int, options: PolicyOptions, is_seeded: bool
    ) -> Sequence[int]:
        if is_seeded:
            # the look-ahead's queries stand for the end of the prompt; a long text behind the last
            # vision token, or a prompt of text alone, must not take their place until it is reached
            end_tokens = places.prompt_tokens - options.probe_tokens
            start = max(start, places.end_of_vision, end_tokens)
        return places.last_text_positions(start, stop, options.probe_tokens)


class ChatTemplate(ProbeSource):
    """The last tokens of the prompt, those of the chat template; nothing later replaces them."""

    runs_ahead = True
    # they pass once, long before the output of a short prompt needs them
    asks_from_start = True

    @staticmethod
    def capacity_tokens(options: PolicyOptions) -> int:
        return options.template_tokens

    @staticmethod
    def positions(
        places: PromptPlaces, start: int, stop: int, options: PolicyOptions, is_seeded: bool
    ) -> Sequence[int]:
        if is_seeded:
            return []
        last = places.last_text_positions(0, places.prompt_tokens, options.template_tokens)
        return [position for position in last if start <= position < stop]


class RecentTokens(ProbeSource):
    """The last tokens of each step whatever they are, where they stand."""

    # the three axes of vision differ, so its queries could not be turned
    runs_ahead = False

    @staticmethod
    def positions(
        places: PromptPlaces, start: int, stop: int, options: PolicyOptions, is_seeded: bool
    ) -> Sequence[int]:
        return range(max(start, stop - options.probe_tokens), stop)
