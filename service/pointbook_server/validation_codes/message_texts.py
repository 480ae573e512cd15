"""The texts of messages with codes.

Source: docs/reference/validation-codes.md#message-texts
"""

from collections.abc import Iterator, Mapping
from string import Template

from pointbook_common.durations import MINUTE_MS
from pointbook_server.programs.model import Program, language_key

DEFAULT_TEMPLATE = "$code is your code to redeem $points points. It is valid for $minutes minutes."
DEFAULT_TITLE = "Your code"


def message_text(program: Program, language: str, code: str, points: int) -> str:
    """Return the text of a message, from the program's templates or the default."""
    template = _find_template(program.validation.message_templates, language)
    return Template(template).safe_substitute(
        code=code,
        points=points,
        program=program.display_name,
        minutes=program.validation.code_life_ms // MINUTE_MS,
    )


def message_title(program: Program) -> str:
    """Return the subject of an e-mail: the program's name, or the default one."""
    return program.display_name or DEFAULT_TITLE


def _find_template(templates: Mapping[str, str], language: str) -> str:
    """Return the template that matches a language best.

    If none matches, it is the template for every language, or else the English one.
    """
    by_tag = {language_key(tag): template for tag, template in templates.items()}
    tags = (*_lookup_tags(language), "", "en")
    return next((by_tag[tag] for tag in tags if tag in by_tag), DEFAULT_TEMPLATE)


def _lookup_tags(language: str) -> Iterator[str]:
    """Yield the tags that match a language, the best one first.

    Each step removes the last subtag, and with it a single-character subtag before it, which only introduces it.

    Source: https://www.rfc-editor.org/rfc/rfc4647#section-3.4
    """
    subtags = language_key(language).split("-")
    while subtags:
        yield "-".join(subtags)
        subtags.pop()
        while subtags and len(subtags[-1]) == 1:
            subtags.pop()
