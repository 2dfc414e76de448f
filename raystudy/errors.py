"""The refusal that a user can act on: what is wrong, where, and the remedy."""

from __future__ import annotations


class StudyError(Exception):
    """A study, file or service that raystudy refuses, in words for the person who runs it.

    Parameters
    ----------
    what : the rule that was broken, with the offending value.
    where : file, key path, row or address.
    remedy : what would be right.
    """

    def __init__(self, what: str, *, where: str | None = None, remedy: str | None = None) -> None:
        self.what, self.where, self.remedy = what, where, remedy
        super().__init__(what, where, remedy)

    def __str__(self) -> str:
        lines = [f"{self.where}: {self.what}" if self.where else self.what]
        if self.remedy:
            lines.append(f"  remedy: {self.remedy}")
        return "\n".join(lines)

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.what, self.where, self.remedy)


class DamagedFileError(StudyError, ValueError):
    """A file whose bytes are not those that were written, torn or with a flipped bit, or are no numbers."""


class NewerStudyError(StudyError):
    """A study directory of a format that a newer raystudy wrote."""


def check_setting(settings: object, key: str, ok: bool, rule: str) -> None:
    """Refuse one setting of a settings class that breaks its rule.

    The message begins with the key and ends with its value; config_text.py finds the line in the file by that key.
    """
    if not ok:
        raise ValueError(f"{key}: {rule}, got {getattr(settings, key)}")


def _rebuild(kind: type[StudyError], what: str, where: str | None, remedy: str | None) -> StudyError:
    return kind(what, where=where, remedy=remedy)
