"""Traces, and the page that is made of them."""

from __future__ import annotations

from tests.tamper.mutation import Mutation

OF_INSPECTION = (
    Mutation(
        "trace: neighbours that share an entry hide the most",
        "cache/trace.py",
        "max(a[2], b[2]), max(a[3], b[3])",
        "b[2], b[3]",
    ),
    Mutation(
        "trace: what stands behind a head's tokens is kept too",
        "cache/trace.py",
        "positions.where(is_held & (positions < prompt_tokens), prompt_tokens)",
        "positions.where(positions < prompt_tokens, prompt_tokens)",
    ),
    Mutation(
        "trace: a preempted request's compressions are not told again",
        "cache/trace.py",
        "            trace.seen_compressions = 0\n",
        "",
    ),
    Mutation(
        "trace: an error ends the request",
        "cache/notices.py",
        "    except Exception:  # noqa: BLE001\n        warn_once(failure)",
        "    except ZeroDivisionError:\n        warn_once(failure)",
    ),
    Mutation(
        "inspect: time stamps are patches",
        "cache/vision.py",
        '"ranges": [list(one) for one in place.ranges]',
        '"ranges": [[place.offset, place.offset + place.length]]',
    ),
    Mutation(
        "inspect: a grid that its tokens do not fill",
        "inspection/story.py",
        "            if sum(f * r * c for f, r, c in runs) != positions.size:\n",
        "            if False:\n",
    ),
    Mutation(
        "inspect: rows and columns change places",
        "inspection/story.py",
        "reshape(rows, columns))",
        "reshape(columns, rows).T)",
    ),
    Mutation(
        "inspect: words are decoded without those before them",
        "inspection/words.py",
        "        text = decode(token_ids[before:end])[len(context) :]\n",
        "        text = decode(token_ids[first:end])\n",
    ),
    Mutation(
        "inspect: half a character is a word",
        "inspection/words.py",
        "not text.endswith(BROKEN) or ",
        "True or ",
    ),
    Mutation(
        "inspect: the last of the text is left out",
        "inspection/words.py",
        "        shown[first:last] = False\n",
        "        shown[first:] = False\n",
    ),
    Mutation(
        "inspect: the picture of another frame",
        "inspection/tiles.py",
        "frame * num_pictures // num_frames",
        "frame",
    ),
    Mutation(
        "inspect: text becomes markup",
        "inspection/page.py",
        "autoescape=True",
        "autoescape=False",
    ),
    Mutation(
        "inspect: numbers end their element",
        "inspection/page.py",
        '.replace("<", "\\\\u003c")',
        "",
    ),
    Mutation(
        "inspect: all frames of a video are shown",
        "inspection/tiles.py",
        "    if means.size <= most:\n",
        "    if True:\n",
    ),
)
